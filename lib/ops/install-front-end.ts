/** What `kvm-ib install front-end` puts into OpenNebula's remotes, and what it leaves to the operator. Pure. */
import { KvmIbError } from '../core/errors.ts';
import type { Network } from '../core/mapping.ts';
import type { FrontEndFiles, NetworkTemplateOptions, OneVersion } from '../opennebula/registration.ts';
import {
  addressNetworkTemplate,
  DRIVER,
  guestNetworkTemplate,
  HOOK_COMMAND,
  hookTemplates,
  isCurrent,
  isRegistered,
  liveSnapshotsLine,
  nicExample,
  otherNames,
  vmMadSection,
} from '../opennebula/registration.ts';
import type { Item, Note, Observation, Operation } from './install.ts';
import { parents } from './install.ts';
import { CONFIG_FILE } from './install-host.ts';

export const REMOTES = '/var/lib/one/remotes';
export const VERSION_FILE = `${REMOTES}/VERSION`;
export const ONED_CONF = '/etc/one/oned.conf';
export const VMM_EXECRC = '/etc/one/vmm_exec/vmm_execrc';
export const FRONT_END_USER = 'oneadmin';
export const DRIVER_DIRECTORY = `${REMOTES}/vmm/${DRIVER}`;
const HOOK_DIRECTORY = `${REMOTES}/hooks/${DRIVER}`;

/**
 * @param driverFiles every file below `drivers/` of the package, with its mode: `drivers/vmm/kvm-ib/*` and the probes
 *   `drivers/im/…`, the hook `drivers/hooks/…`; all lie at the same path below the remotes
 * @param givenConfig configuration of the hosts, put beside: later runs and the templates use it; null: none
 * @param vmm false: without the VMM driver, where the network driver does its work
 */
export function frontEndItems(
  driverFiles: readonly { readonly path: string; readonly mode: number }[],
  givenConfig: string | null,
  vmm = true,
): readonly Item[] {
  const file = (path: string, mode: number, source: string): Item => {
    return { kind: 'file', path, mode, source: { package: source }, keep: 'ours' };
  };
  const below = driverFiles.flatMap(({ path, mode }) => {
    const place = path.replace(/^drivers\//, '');
    const wanted = vmm ? /^(?:vmm\/kvm-ib|hooks\/kvm-ib|im)\// : /^(?:hooks\/kvm-ib|im)\//;
    return wanted.test(place) ? [{ place, path, mode }] : [];
  });
  const own = [...(vmm ? [DRIVER_DIRECTORY] : []), HOOK_DIRECTORY];
  const folders = new Set(
    below.flatMap(({ place }) => parents(place)).filter((folder) => !own.includes(`${REMOTES}/${folder}`)),
  );
  return [
    ...[...folders].sort().map((folder): Item => {
      return { kind: 'directory', path: `${REMOTES}/${folder}`, mode: 0o755, own: false };
    }),
    ...own.map((path): Item => ({ kind: 'directory', path, mode: 0o755, own: true })),
    // Before the launchers, which look for it beside them.
    ...(vmm ? [file(`${DRIVER_DIRECTORY}/parser.mjs`, 0o644, 'bundle/parser.mjs')] : []),
    ...below.map(({ place, path, mode }) => file(`${REMOTES}/${place}`, mode, path)),
    ...(givenConfig === null ? [] : configItems(givenConfig)),
  ];
}

function configItems(text: string): readonly Item[] {
  return [
    { kind: 'directory', path: dirname(CONFIG_FILE), mode: 0o755, own: false },
    { kind: 'file', path: CONFIG_FILE, mode: 0o644, source: { text }, keep: 'always' },
  ];
}

/**
 * The driver of 2012 has the same folder. Its scripts are the way back, so they are not written over.
 * @throws KvmIbError `conflict` when there is a driver that is not this one
 */
export function refuseOlderDriver(look: Pick<Observation, 'children'>): void {
  const found = look.children(DRIVER_DIRECTORY);
  if (found.length === 0 || found.includes(`${DRIVER_DIRECTORY}/launch.sh`)) return;
  throw new KvmIbError('conflict', `Cannot install the driver in ${DRIVER_DIRECTORY}`, {
    why: 'another driver of that name is there, such as the one of 2012',
    fix: `keep it for the way back, outside the remotes: mv ${DRIVER_DIRECTORY} /var/lib/one/kvm-ib-before; then install again (docs/migrate.md)`,
  });
}

/** Also the configuration, which an earlier run may have put there. */
export function frontEndRemovals(
  driverFiles: readonly { readonly path: string; readonly mode: number }[],
): readonly Item[] {
  return frontEndItems(driverFiles, '');
}

/** What can be written to a directory for `onevnet create` and `onehook create`, by name of the file. */
export function templateFiles(facts: FrontEndFacts): readonly { readonly name: string; readonly text: string }[] {
  return [
    { name: 'vm_mad.conf', text: vmMadText(facts) },
    ...facts.networks.flatMap(({ network, options }) => [
      { name: `${network.name}-guests.net`, text: guestNetworkTemplate(network, options) },
      { name: `${network.name}-addresses.net`, text: addressNetworkTemplate(network) },
      { name: `${network.name}-vm.txt`, text: nicExample(network, facts.version) },
    ]),
    ...hookTemplates().map(({ name, text }) => ({ name: `${name}.hook`, text })),
  ];
}

/** For the end of `oned.conf`; where an older driver has our folder, for the place of its section. */
function vmMadText(facts: FrontEndFacts): string {
  const [older] = otherNames(facts.onedConf);
  if (older === undefined || isRegistered(facts.onedConf)) return vmMadSection(facts.version, facts);
  return `# In the place of the section VM_MAD "${older}", not beside it.\n${vmMadSection(facts.version, facts, older)}`;
}

export function templateItems(
  directory: string,
  facts: FrontEndFacts,
  files: ReturnType<typeof templateFiles> = templateFiles(facts),
): readonly Item[] {
  return [
    { kind: 'directory', path: directory, mode: 0o755, own: false },
    ...files.map(({ name, text }): Item => {
      return { kind: 'file', path: `${directory}/${name}`, mode: 0o644, source: { text }, keep: 'unless-ours' };
    }),
  ];
}

function dirname(path: string): string {
  return path.slice(0, path.lastIndexOf('/'));
}

/** Bytes and files that `onehost sync` copies to each host more than before. */
export function syncedSize(operations: readonly Operation[]): { readonly files: number; readonly bytes: number } {
  const files = operations.filter((op) => op.item?.kind === 'file' && op.path.startsWith(`${REMOTES}/`));
  return { files: files.length, bytes: files.reduce((sum, op) => sum + (op.size ?? 0), 0) };
}

export interface FrontEndFacts extends FrontEndFiles {
  readonly version: OneVersion;
  readonly networks: readonly { readonly network: Network; readonly options: NetworkTemplateOptions }[];
  /** False: the networks are an example, since no configuration was given. */
  readonly networksConfigured: boolean;
  /** True: `--mtu` was given; else the usual one is in the templates. */
  readonly mtuGiven: boolean;
  /** Where the templates are written; null: nowhere. */
  readonly templates: string | null;
}

/** What is left to the operator, in the order to do it. */
export function frontEndNotes(
  facts: FrontEndFacts,
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
  const optional = (title: string, ...lines: readonly string[]): void => note(`Optional. ${title}`, ...lines);
  const one = (command: string): string => `runuser -u ${FRONT_END_USER} -- ${command}`;
  /** A template, and how it is handed to OpenNebula. */
  const create = (command: string, name: string, text: string, more = ''): readonly string[] =>
    facts.templates === null
      ? [`# ${name}; then: ${one(`${command} ${name}${more}`)}`, text]
      : [one(`${command} ${facts.templates}/${name}${more}`)];

  const registered = isRegistered(facts.onedConf);
  const older = otherNames(facts.onedConf);
  const outdated = older.filter((name) => !isCurrent(facts.version, facts, name));
  for (const name of outdated) {
    step(
      `Bring the section of VM_MAD "${name}" in ${ONED_CONF} up to date: it runs this driver as well, and its hosts and VMs keep that name`,
      vmMadSection(facts.version, facts, name),
    );
  }
  if (!registered && older.length === 0) {
    step(
      `Add to ${ONED_CONF} (OpenNebula ${facts.version.text}), behind the section VM_MAD of "kvm", which must stay`,
      vmMadSection(facts.version, facts),
    );
    optional(
      `If users must not choose IB addresses themselves, add to ${ONED_CONF} as well`,
      'VM_RESTRICTED_ATTR = "NIC/IB_IP"',
    );
  }
  const snapshots = liveSnapshotsLine(
    facts.version,
    facts,
    registered || older.length === 0 ? [DRIVER, ...older] : older,
  );
  if (snapshots !== undefined) {
    optional(
      `For live disk snapshots, this line of ${VMM_EXECRC}; it needs a restart of OpenNebula`,
      snapshots,
      '# Live disk-saveas stays out of reach: OpenNebula asks there for a driver called kvm.',
    );
  }
  const restart = (!registered && older.length === 0) || outdated.length > 0;
  step(
    `${restart ? 'Restart OpenNebula, then copy the driver' : 'Copy the driver'} to the hosts: ${describeSize(size)} more than without kvm-ib`,
    ...(restart ? ['systemctl restart opennebula'] : []),
    one('onehost sync --force'),
  );
  step(
    'Create each host, in a cluster of its own: at a migration OpenNebula uses the driver of the destination',
    `${one('onecluster create CLUSTER')}                     # unless it is there`,
    `${one('onecluster adddatastore CLUSTER DATASTORE')}     # the image and system datastores of its VMs`,
    one(`onehost create HOST -i kvm -v ${registered ? DRIVER : (older[0] ?? DRIVER)} -c CLUSTER`),
  );
  if (!facts.networksConfigured) {
    note(
      'The networks below are an example',
      'Give the configuration of the hosts for your own: kvm-ib install front-end --config kvm-ib.yaml --mtu MTU_OF_IB0',
    );
  } else if (!facts.mtuGiven) {
    note(
      `GUEST_MTU of the templates is ${facts.networks[0]?.options.mtu ?? 0}, that of a link in datagram mode`,
      'Compare it with a host, `cat /sys/class/net/ib0/mtu`, and give another one: kvm-ib install front-end --mtu 4092',
    );
  }
  for (const { network, options } of facts.networks) {
    step(
      `Create the virtual network of the guests, with VN_MAD "dummy": stock "bridge" deletes ${network.bridge} with the last guest of a host`,
      ...create('onevnet create', `${network.name}-guests.net`, guestNetworkTemplate(network, options), ' -c CLUSTER'),
    );
    optional(
      'For users to see and choose IB addresses: a virtual network that leases them to external aliases of a NIC',
      ...create('onevnet create', `${network.name}-addresses.net`, addressNetworkTemplate(network), ' -c CLUSTER'),
    );
    note('A VM template then has (the second line only with the optional network)', nicExample(network, facts.version));
  }
  optional(
    'For the mapping of a guest that powered itself off to go at once, not within a minute: two state hooks',
    ...hookTemplates().flatMap(({ name, text }) => create('onehook create', `${name}.hook`, text)),
    `# Have a hook for one of these states already? Call ${HOOK_COMMAND} from it: docs/install-command.md shows how.`,
  );
  return notes;
}

export function describeSize({ files, bytes }: { readonly files: number; readonly bytes: number }): string {
  return `${Math.ceil(bytes / 1000)} kB in ${files} files`;
}
