/** What `kvm-ib install front-end` puts into OpenNebula's remotes, and what it leaves to the operator. Pure. */
import type { Network } from '../core/mapping.ts';
import type { FrontEndFiles, NetworkTemplateOptions, OneVersion } from '../opennebula/registration.ts';
import {
  addressNetworkTemplate,
  DRIVER,
  guestNetworkTemplate,
  isRegistered,
  liveSnapshotsLine,
  nicExample,
  vmMadSection,
} from '../opennebula/registration.ts';
import type { Item, Note, Operation } from './install.ts';
import { parents } from './install.ts';

export const REMOTES = '/var/lib/one/remotes';
export const VERSION_FILE = `${REMOTES}/VERSION`;
export const ONED_CONF = '/etc/one/oned.conf';
export const VMM_EXECRC = '/etc/one/vmm_exec/vmm_execrc';
export const FRONT_END_USER = 'oneadmin';
const DRIVER_DIRECTORY = `${REMOTES}/vmm/${DRIVER}`;

/**
 * @param driverFiles every file below `drivers/` of the package, with its mode: `drivers/vmm/kvm-ib/*` and the probes
 *   `drivers/im/…`; both lie at the same path below the remotes
 */
export function frontEndItems(
  driverFiles: readonly { readonly path: string; readonly mode: number }[],
): readonly Item[] {
  const file = (path: string, mode: number, source: string): Item => {
    return { kind: 'file', path, mode, source: { package: source }, keep: 'ours' };
  };
  const below = driverFiles.flatMap(({ path, mode }) => {
    const place = path.replace(/^drivers\//, '');
    return /^(?:vmm\/kvm-ib|im)\//.test(place) ? [{ place, path, mode }] : [];
  });
  const folders = new Set(below.flatMap(({ place }) => parents(place)).filter((folder) => folder !== `vmm/${DRIVER}`));
  return [
    ...[...folders].sort().map((folder): Item => {
      return { kind: 'directory', path: `${REMOTES}/${folder}`, mode: 0o755, own: false };
    }),
    { kind: 'directory', path: DRIVER_DIRECTORY, mode: 0o755, own: true },
    // Before the launchers, which look for it beside them.
    file(`${DRIVER_DIRECTORY}/parser.mjs`, 0o644, 'bundle/parser.mjs'),
    ...below.map(({ place, path, mode }) => file(`${REMOTES}/${place}`, mode, path)),
  ];
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
}

/** What is left to the operator, in the order to do it. */
export function frontEndNotes(
  facts: FrontEndFacts,
  size: { readonly files: number; readonly bytes: number },
): readonly Note[] {
  const notes: Note[] = [];
  const note = (title: string, text: string): void => void notes.push({ title, text: text.trimEnd() });
  const registered = isRegistered(facts.onedConf);
  if (!registered) {
    note(
      `Add to ${ONED_CONF} (OpenNebula ${facts.version.text}), behind the section of "kvm", which must stay`,
      vmMadSection(facts.version, facts),
    );
    note(
      `If users must not choose IB addresses themselves, add to ${ONED_CONF} as well`,
      'VM_RESTRICTED_ATTR = "NIC/IB_IP"',
    );
  }
  const snapshots = liveSnapshotsLine(facts.version, facts);
  if (snapshots !== undefined) {
    note(
      `For live disk snapshots, this line of ${VMM_EXECRC}`,
      `${snapshots}\n# Live disk-saveas stays out of reach: OpenNebula asks there for a driver called kvm.`,
    );
  }
  note(
    registered && snapshots === undefined
      ? `Copy it to the hosts: ${describeSize(size)} more than without kvm-ib`
      : `Restart OpenNebula, then copy it to the hosts: ${describeSize(size)} more than without kvm-ib`,
    [
      ...(registered && snapshots === undefined ? [] : ['systemctl restart opennebula']),
      `runuser -u ${FRONT_END_USER} -- onehost sync --force`,
    ].join('\n'),
  );
  note(
    'Create each host, in a cluster of its own: at a migration OpenNebula uses the driver of the destination',
    `runuser -u ${FRONT_END_USER} -- onehost create HOST -i kvm -v ${DRIVER} -c CLUSTER`,
  );
  if (!facts.networksConfigured) {
    note(
      'The networks below are an example',
      'Give the configuration of the hosts for your own: kvm-ib install front-end --config kvm-ib.yaml --mtu MTU_OF_IB0',
    );
  }
  for (const { network, options } of facts.networks) {
    note(
      `Virtual network of the guests: onevnet create ${network.name}-guests.net`,
      guestNetworkTemplate(network, options),
    );
    note(
      `Optional, users see and choose IB addresses: onevnet create ${network.name}-addresses.net`,
      addressNetworkTemplate(network),
    );
    note('A VM template then has', nicExample(network));
  }
  return notes;
}

export function describeSize({ files, bytes }: { readonly files: number; readonly bytes: number }): string {
  return `${Math.ceil(bytes / 1000)} kB in ${files} files`;
}
