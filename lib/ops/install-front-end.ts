/** What `kvm-ib install front-end` puts into OpenNebula's remotes, and what it leaves to the operator. Pure. */
import { KvmIbError } from '../core/errors.ts';
import type { Network } from '../core/mapping.ts';
import type { Edit } from '../opennebula/oned-conf.ts';
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
  STOCK,
  vmMadSection,
} from '../opennebula/registration.ts';
import type { DriverName } from './driver-name.ts';
import { editLines } from './driver-name.ts';
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
  const asKvm = otherNames(facts.onedConf).includes(STOCK) && !isRegistered(facts.onedConf);
  return [
    // Where `kvm` runs our folder a section more would be a second name that nobody asked for.
    ...(asKvm ? [] : [{ name: 'vm_mad.conf', text: vmMadText(facts) }]),
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

/** Both files as they will be. */
export interface FrontEndFacts extends FrontEndFiles {
  /** Null: not said. Then nothing is written into the files of OpenNebula. */
  readonly driverName: DriverName | null;
  /** What is changed in them, by path. */
  readonly edits: ReadonlyMap<string, readonly Edit[]>;
  readonly version: OneVersion;
  readonly networks: readonly { readonly network: Network; readonly options: NetworkTemplateOptions }[];
  /** False: the networks are an example, since no configuration was given. */
  readonly networksConfigured: boolean;
  /** True: `--mtu` was given; else the usual one is in the templates. */
  readonly mtuGiven: boolean;
  /** Where the templates are written; null: nowhere. */
  readonly templates: string | null;
}

const NAME_CHOICE = [
  'First choose the name of the driver, "kvm-ib" or "kvm" (docs/driver-name.md)',
  'kvm-ib  Chosen for each host: those without kvm-ib keep the driver of OpenNebula. Live disk snapshots need words in',
  `        ${VMM_EXECRC}. Live disk-saveas is lost on qcow2, ssh and local datastores, and on ceph with an ssh system datastore.`,
  'kvm     Nothing is lost. But every host of the driver "kvm" must have kvm-ib from the restart on, without InfiniBand',
  '        too: else each deploy there fails. No host with the stock driver is left to be mixed up with.',
  'The command writes either:',
  '  kvm-ib install front-end --driver-name kvm-ib --dry-run',
  '  kvm-ib install front-end --driver-name kvm --dry-run',
  'The steps below are those of kvm-ib by hand.',
] as const;

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
  const unknown = !registered && older.length === 0;
  const name = facts.driverName ?? (registered ? DRIVER : (older[0] ?? DRIVER));
  for (const [path, edits] of facts.edits) note(`Lines of ${path}`, ...editLines(edits));
  if (unknown) note(...NAME_CHOICE);
  for (const other of outdated) {
    step(
      `Bring the section of VM_MAD "${other}" in ${ONED_CONF} up to date: it runs this driver as well, and its hosts and VMs keep that name`,
      vmMadSection(facts.version, facts, other),
    );
  }
  if (unknown) {
    step(
      `Add to ${ONED_CONF} (OpenNebula ${facts.version.text}), behind the section VM_MAD of "kvm", which must stay`,
      vmMadSection(facts.version, facts),
    );
  }
  if (unknown || facts.edits.size > 0) {
    optional(
      `If users must not choose IB addresses themselves, add to ${ONED_CONF} as well`,
      'VM_RESTRICTED_ATTR = "NIC/IB_IP"',
    );
  }
  const snapshots = liveSnapshotsLine(facts.version, facts, registered || unknown ? [DRIVER, ...older] : older);
  if (snapshots !== undefined) {
    optional(
      `For live disk snapshots, this line of ${VMM_EXECRC}; it needs a restart of OpenNebula`,
      snapshots,
      '# Live disk-saveas stays out of reach: OpenNebula asks there for a driver called kvm.',
    );
  }
  if (name === STOCK && facts.edits.size > 0) {
    step(
      'Have kvm-ib on every host of the driver "kvm" before the restart: without it each deploy there fails, of any VM',
      `${one('onehost sync --force')}     # the probe, by which a host reports kvm-ib within ten minutes`,
      'kvm-ib install host                              # on each of them',
      'kvm-ib doctor                                    # here: names those that have not reported it',
    );
  }
  const restart = unknown || outdated.length > 0 || facts.edits.size > 0;
  step(
    `${restart ? 'Restart OpenNebula, then copy the driver' : 'Copy the driver'} to the hosts: ${describeSize(size)} more than without kvm-ib`,
    ...(restart ? ['systemctl restart opennebula'] : []),
    one('onehost sync --force'),
  );
  step(
    name === STOCK
      ? 'Create each host'
      : 'Create each host, in a cluster of its own: at a migration OpenNebula uses the driver of the destination',
    `${one('onecluster create CLUSTER')}                     # unless it is there`,
    `${one('onecluster adddatastore CLUSTER DATASTORE')}     # the image and system datastores of its VMs`,
    one(`onehost create HOST -i kvm -v ${name} -c CLUSTER`),
    ...(name === STOCK
      ? ['# A host that has the driver "kvm" already stays as it is.']
      : [
          '# Of a host that is there already; its VMs follow when they are deployed or migrated the next time:',
          `echo 'VM_MAD = "${name}"' > /var/lib/one/vm_mad`,
          one('onehost update HOST /var/lib/one/vm_mad --append'),
          one('onecluster addhost CLUSTER HOST'),
        ]),
  );
  const before = facts.driverName === null ? [] : [...(registered ? [DRIVER] : []), ...older];
  for (const other of before.filter((one) => one !== name)) {
    note(
      `VM_MAD "${other}" runs this driver too, and stays until no host and no VM has that name`,
      other === DRIVER || other === STOCK
        ? `Then: kvm-ib uninstall front-end --driver-name ${other}`
        : `Then take its section out of ${ONED_CONF}.`,
    );
  }
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
