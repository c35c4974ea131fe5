/**
 * The network driver on the front-end, for sites that keep the stock VMM driver: what goes where, and what is left to the
 * operator. Pure.
 */
import { KvmIbError, printable } from '../core/errors.ts';
import {
  addressNetworkTemplate,
  DRIVER,
  guestNetworkTemplate,
  hookTemplates,
  isNetworkDriverRegistered,
  nicExample,
  type OneVersion,
  vnMadSection,
} from '../opennebula/registration.ts';
import type { Item, Note, Observation } from './install.ts';
import type { FrontEndFacts } from './install-front-end.ts';
import { describeSize, FRONT_END_USER, ONED_CONF, REMOTES } from './install-front-end.ts';

const DRIVERS = `${REMOTES}/vnm`;
export const NETWORK_DIRECTORY = `${DRIVERS}/${DRIVER}`;
/** Actions that run hooks. */
const HOOKED = ['pre', 'post', 'clean'] as const;
/** Drivers of OpenNebula that do not run hooks for all three, or not on the host. */
const WITHOUT_HOOKS = ['elastic', 'nodeport'];

/**
 * @param driverFiles every file below `drivers/` of the package
 * @param hooksOf other network drivers that are to call it as their hook
 */
export function networkDriverItems(
  driverFiles: readonly { readonly path: string; readonly mode: number }[],
  hooksOf: readonly string[],
): readonly Item[] {
  const directory = (path: string, own = false): Item => ({ kind: 'directory', path, mode: 0o755, own });
  const file = (path: string, mode: number, source: string): Item => {
    return { kind: 'file', path, mode, source: { package: source }, keep: 'ours' };
  };
  const launchers = driverFiles.filter(({ path }) => path.startsWith(`drivers/vnm/${DRIVER}/`));
  return [
    directory(DRIVERS),
    directory(NETWORK_DIRECTORY, true),
    // Before the launchers, which look for it beside them.
    file(`${NETWORK_DIRECTORY}/vnm.mjs`, 0o644, 'bundle/vnm.mjs'),
    ...launchers.map(({ path, mode }) => file(`${REMOTES}/${path.slice('drivers/'.length)}`, mode, path)),
    // Their folders are the other driver's, and stay. A copy, since `onehost sync` makes one of a link anyhow.
    ...hooksOf.flatMap((name) =>
      HOOKED.map((action) => file(hookPath(name, action), 0o755, `drivers/vnm/${DRIVER}/${action}`)),
    ),
  ];
}

function hookPath(name: string, action: (typeof HOOKED)[number]): string {
  return `${DRIVERS}/${name}/${action}.d/${DRIVER}`;
}

/** What an earlier run has installed. */
export function installedNetworkDriver(look: Pick<Observation, 'children'>): {
  readonly isThere: boolean;
  readonly hooksOf: readonly string[];
} {
  const names = look.children(DRIVERS).map((path) => path.slice(DRIVERS.length + 1));
  return {
    isThere: look.children(NETWORK_DIRECTORY).includes(`${NETWORK_DIRECTORY}/launch.sh`),
    hooksOf: names
      .filter((name) => /^[A-Za-z0-9_.-]{1,64}$/.test(name))
      .filter((name) => HOOKED.some((a) => look.children(`${DRIVERS}/${name}/${a}.d`).includes(hookPath(name, a)))),
  };
}

/** A network driver of that name that is another one is not written over. @throws KvmIbError `conflict` */
export function refuseOtherNetworkDriver(look: Pick<Observation, 'children'>): void {
  const found = look.children(NETWORK_DIRECTORY);
  if (found.length === 0 || found.includes(`${NETWORK_DIRECTORY}/launch.sh`)) return;
  throw new KvmIbError('conflict', `Cannot install the network driver in ${NETWORK_DIRECTORY}`, {
    why: 'another driver of that name is there',
    fix: `move it away: mv ${NETWORK_DIRECTORY} /var/lib/one/kvm-ib-vnm-before; then install again`,
  });
}

/**
 * @param text names of network drivers, with commas
 * @throws KvmIbError `usage` or `unsupported` when one of them is not there, or cannot call us
 */
export function parseHooksOf(
  text: string,
  version: OneVersion,
  look: Pick<Observation, 'children'>,
): readonly string[] {
  const names = [...new Set(text.split(',').map((name) => name.trim()))];
  const message = `Cannot hook into the network driver "${printable(text, 60)}"`;
  if (version.major < 5 || (version.major === 5 && version.minor < 10)) {
    throw new KvmIbError('unsupported', message, {
      why: `network drivers of OpenNebula ${version.text} run no hooks; 5.10 and later do`,
      fix: 'use --vnm alone, and VN_MAD "kvm-ib"',
    });
  }
  for (const name of names) {
    const refuse = (why: string): KvmIbError =>
      new KvmIbError('usage', message, {
        why,
        fix: `give one that is in ${DRIVERS} and runs hooks: dummy, bridge, 802.1Q`,
      });
    if (!/^[A-Za-z0-9_.-]{1,64}$/.test(name) || /^\.+$/.test(name)) throw refuse('that is no name of a driver');
    if (name === DRIVER) throw refuse('that is our own, which needs no hooks');
    if (WITHOUT_HOOKS.includes(name)) throw refuse(`${name} does not run hooks of pre, post and clean on the host`);
    if (look.children(`${DRIVERS}/${name}`).length === 0) throw refuse(`there is no ${DRIVERS}/${name}`);
  }
  return names;
}

/** VN_MAD of the guests' virtual network. */
function vnMadOf(hooksOf: readonly string[]): string {
  return hooksOf[0] ?? DRIVER;
}

/** As `templateFiles`, for the network driver. */
export function networkTemplateFiles(
  facts: FrontEndFacts,
  hooksOf: readonly string[],
): readonly { readonly name: string; readonly text: string }[] {
  return [
    ...(hooksOf.length === 0 ? [{ name: 'vn_mad.conf', text: vnMadSection() }] : []),
    ...facts.networks.flatMap(({ network, options }) => [
      { name: `${network.name}-guests.net`, text: guestNetworkTemplate(network, options, vnMadOf(hooksOf)) },
      { name: `${network.name}-addresses.net`, text: addressNetworkTemplate(network) },
      { name: `${network.name}-vm.txt`, text: nicExample(network, facts.version) },
    ]),
    ...hookTemplates().map(({ name, text }) => ({ name: `${name}.hook`, text })),
  ];
}

/** What is left to the operator, in the order to do it. */
export function networkDriverNotes(
  facts: FrontEndFacts,
  hooksOf: readonly string[],
  size: { readonly files: number; readonly bytes: number },
): readonly Note[] {
  const notes: Note[] = [];
  let steps = 0;
  const note = (title: string, ...lines: readonly string[]): void =>
    void notes.push({ title, text: lines.join('\n').trimEnd() });
  const step = (title: string, ...lines: readonly string[]): void => {
    steps += 1;
    note(`Step ${steps}. ${title}`, ...lines);
  };
  const one = (command: string): string => `runuser -u ${FRONT_END_USER} -- ${command}`;
  const create = (command: string, name: string, text: string, more = ''): readonly string[] =>
    facts.templates === null
      ? [`# ${name}; then: ${one(`${command} ${name}${more}`)}`, text]
      : [one(`${command} ${facts.templates}/${name}${more}`)];
  const { version } = facts;
  const name = vnMadOf(hooksOf);
  const isNew = hooksOf.length === 0 && wantsSection(version) && !isNetworkDriverRegistered(facts.onedConf);
  if (isNew) step(`Add to ${ONED_CONF}, behind the other sections VN_MAD_CONF`, vnMadSection());
  step(
    `${isNew ? 'Restart OpenNebula, then copy the driver' : 'Copy the driver'} to the hosts: ${describeSize(size)} more than without kvm-ib`,
    ...(isNew ? ['systemctl restart opennebula'] : []),
    one('onehost sync --force'),
  );
  if (version.major < 5) {
    step(
      "Create each host with it: before 5.0 the network driver is the host's",
      one(`onehost create HOST -i kvm -v kvm -n ${name}`),
    );
  } else {
    note(
      'Hosts and their VMM driver stay as they are',
      'Every host that may run such a VM needs kvm-ib: kvm-ib install host',
    );
  }
  for (const { network, options } of facts.networks) {
    step(
      `Create the virtual network of the guests, with VN_MAD "${name}"`,
      ...create(
        'onevnet create',
        `${network.name}-guests.net`,
        guestNetworkTemplate(network, options, name),
        ' -c CLUSTER',
      ),
    );
    note(
      'Optional. For users to see and choose IB addresses: a virtual network that leases them to external aliases of a NIC',
      ...create('onevnet create', `${network.name}-addresses.net`, addressNetworkTemplate(network), ' -c CLUSTER'),
    );
    note('A VM template then has (the second line only with the optional network)', nicExample(network, version));
  }
  note(
    'Recommended. The network driver is not called for a guest that powers itself off, nor when a VM that is off is terminated: two state hooks end its mapping at once, not within a minute',
    ...hookTemplates().flatMap((hook) => create('onehook create', `${hook.name}.hook`, hook.text)),
  );
  note('What this way lacks against the VMM driver', 'docs/life-cycle.md, "The network driver"');
  return notes;
}

/** Since 5.8 oned knows network drivers by sections; before, the folder is enough. */
function wantsSection({ major, minor }: OneVersion): boolean {
  return major > 5 || (major === 5 && minor >= 8);
}
