/** What kvm-ib knows (`list`) and how the kernel differs from it (`status`). Neither changes anything. */
import type { Ipv4 } from '../core/address.ts';
import { resolveMapping } from '../core/config.ts';
import type { KvmIbError } from '../core/errors.ts';
import { toKvmIbError } from '../core/errors.ts';
import type { Config, Mapping, Owner } from '../core/mapping.ts';
import { isOurLabel, ownerName } from '../core/mapping.ts';
import type { Change, Observed } from '../core/plan.ts';
import { mappingsOf } from '../core/state.ts';
import type { ObservedTable } from '../nat/engine.ts';
import type { Host } from './host.ts';
import type { HostView } from './observe.ts';
import { hasAddress, observeHost, ownAddressInRange } from './observe.ts';
import type { Intent } from './reconcile.ts';
import { probedGoal, readIntent, tableDifferences } from './reconcile.ts';
import { unfinishedImport } from './sync.ts';

/** One row of `list`. */
export interface ListEntry {
  readonly network: string;
  readonly device: string;
  readonly guest: string;
  readonly address: string;
  readonly vm: number | null;
  readonly nic: number | null;
  readonly mac: string | null;
  readonly label: string;
  readonly owner: 'vm' | 'manual' | 'static';
  readonly state: 'active' | 'pending' | 'removing';
}

export interface Listing {
  readonly entries: readonly ListEntry[];
  readonly unreadable: readonly { readonly path: string; readonly why: string }[];
}

/** Every mapping that this host should have, from the files alone: needs no rights beyond reading them. */
export function list(host: Pick<Host, 'store'>): Listing {
  const { files, unreadable } = host.store.all();
  const entries = files.flatMap((file) =>
    file.mappings.map((m): ListEntry => {
      const { network, device, guest, address, vm, nic, mac, label } = m;
      return { network, device, guest, address, vm, nic, mac, label, owner: file.owner.kind, state: file.phase.name };
    }),
  );
  return { entries, unreadable };
}

export type DriftPart = 'table' | 'map' | 'alias' | 'mtu' | 'hairpin' | 'file';

/** One difference between what should be and what is. Guest and address are null where it concerns no single mapping. */
export interface Drift {
  readonly guest: string | null;
  readonly address: string | null;
  readonly part: DriftPart;
  readonly expected: string;
  readonly observed: string;
  readonly fix: string;
}

/**
 * A mapping that was made under an older configuration and goes on as it is. No drift: kernel and files agree, and it
 * works whole.
 */
export interface Outdated {
  readonly owner: string;
  readonly vm: number | null;
  readonly nic: number | null;
  readonly network: string;
  readonly guest: string;
  readonly address: string;
  readonly device: string;
  readonly bridge: string;
  /** What the configuration gives now; null: nothing. */
  readonly now: {
    readonly network: string;
    readonly address: string;
    readonly device: string;
    readonly bridge: string;
  } | null;
  /** Why it gives nothing; null when it gives something. */
  readonly why: string | null;
  readonly ends: string;
}

export interface Status {
  readonly ok: boolean;
  readonly mappings: number;
  readonly drift: readonly Drift[];
  /** Mappings that differ from what the configuration gives now, and when that ends. They are no drift. */
  readonly outdated: readonly Outdated[];
  /** What keeps the answer from being complete: libvirt silent, … */
  readonly warnings: readonly string[];
}

const RECONCILE = 'kvm-ib reconcile';

/** Compares files, configuration and kernel. */
export async function status(host: Host): Promise<Status> {
  return (await inspect(host)).status;
}

/** `status`, and what was seen of the table on the way. */
export function inspect(host: Host): Promise<{ readonly status: Status; readonly table: ObservedTable }> {
  return host.withLock('status', async () => {
    const intent = await readIntent(host);
    const standing = intent.entries.flatMap((entry) => mappingsOf(entry.file));
    const view = await observeHost(host, standing, intent.unreadable.length > 0);
    // Whoever has an address that is missing here is named, and asking changes nothing.
    const { goal, changes, probing } = await probedGoal(host, intent, view);
    const drift = [
      ...fileDrift(intent),
      ...intent.conflicts.map((error) => errorDrift(null, 'file', error)),
      ...tableDifferences(view).map(tableDrift),
      ...linkDrift(host, view),
      ...goal.hindered.map(({ mapping, error }) => errorDrift(mapping, 'alias', error)),
      ...changes.flatMap((change) => changeDrift(change, view.observed)),
      ...orphanAliases(intent, view),
    ];
    const kept = intent.entries.filter((entry) => entry.verdict === 'keep');
    const mappings = kept.flatMap((entry) => entry.file.mappings).length;
    const outdated = kept.flatMap(({ file }) =>
      file.mappings.flatMap((m) => outdatedOf(host.config, file.owner, m) ?? []),
    );
    const standstill = await standstillOf(host);
    const warnings = [
      ...intent.warnings,
      ...probing.warnings(new Set()),
      ...(standstill === undefined ? [] : [`${standstill.why}; ${standstill.fix}`]),
    ];
    const told = drift.map((one) => (standstill !== undefined ? { ...one, fix: standstill.fix } : one));
    const found = { ok: drift.length === 0, mappings, drift: told, outdated, warnings };
    return { status: found, table: view.table };
  });
}

/** Why reconcile does nothing now, and what to type instead; undefined: it works. */
async function standstillOf(host: Host): Promise<ReturnType<typeof unfinishedImport> | undefined> {
  const phase = host.store.importPhase();
  if (phase !== undefined) return phase === 'applied' ? undefined : unfinishedImport(phase);
  if (host.store.readTable() !== undefined) return undefined;
  const guests = (await host.oldRules?.()) ?? [];
  if (guests.length === 0) return undefined;
  return { why: `rules of iptables translate ${guests.length} guests of the configuration`, fix: 'kvm-ib import' };
}

/** What the configuration would make of this mapping; undefined: the same. */
function outdatedOf(config: Config, owner: Owner, mapping: Mapping): Outdated | undefined {
  const { network, device, bridge, guest, address, mac, vm, nic } = mapping;
  // One that does not say where its address came from is taken to have been named.
  const wished = mapping.named === false ? undefined : address;
  // A VM's NIC stays on its bridge; a mapping by hand goes where the address is.
  const wish = { guest, address: wished, mac, vm, nic, ...(vm === null ? {} : { bridge }) };
  const of = { owner: ownerName(owner), vm, nic, network, guest, address, device, bridge };
  try {
    const now = resolveMapping(config, wish);
    if (now.address === address && now.device === device && now.bridge === bridge) return undefined;
    const { network: name, ...rest } = now;
    const given = { network: name, address: rest.address, device: rest.device, bridge: rest.bridge };
    return { ...of, now: given, why: null, ends: endOf(owner, mapping, true) };
  } catch (cause) {
    const { why, message } = toKvmIbError(cause);
    return { ...of, now: null, why: why ?? message, ends: endOf(owner, mapping, false) };
  }
}

function endOf(owner: Owner, { guest, address, nic, mac, named }: Mapping, isGiven: boolean): string {
  if (owner.kind === 'static') return `at the next \`${RECONCILE}\``;
  const remove = `kvm-ib remove --guest ${guest}`;
  const options = [
    `--guest ${guest}`,
    ...(named === false ? [] : [`--address ${address}`]),
    ...(mac === null ? [] : [`--mac ${mac}`]),
  ].join(' ');
  if (owner.kind === 'manual') return `by \`${isGiven ? `${remove} && kvm-ib add ${options}` : remove}\``;
  if (!isGiven) return `when VM ${owner.vm} ends, or by \`${remove}\`, which cuts it off`;
  const add = `kvm-ib add --vm ${owner.vm} --nic ${nic} ${options}`;
  return `at the next reboot, reset or power cycle of VM ${owner.vm}, or by \`${add}\`, which breaks its connections`;
}

/** What reconcile cannot bring right by itself. */
function errorDrift(mapping: Mapping | null, part: DriftPart, error: KvmIbError): Drift {
  return {
    guest: mapping?.guest ?? null,
    address: mapping?.address ?? null,
    part,
    expected: mapping === null ? 'one claim on each address' : `${mapping.address}/32 on ${mapping.device}`,
    observed: error.why ?? error.message,
    fix: error.fix ?? RECONCILE,
  };
}

function tableDrift(observed: string): Drift {
  return {
    guest: null,
    address: null,
    part: 'table',
    expected: 'the table as kvm-ib loads it',
    observed,
    fix: RECONCILE,
  };
}

function fileDrift(intent: Intent): readonly Drift[] {
  const item = (m: Mapping, expected: string, observed: string): Drift => {
    return { guest: m.guest, address: m.address, part: 'file', expected, observed, fix: RECONCILE };
  };
  const fromFiles = intent.entries.flatMap(({ file, stored, verdict, why }): readonly Drift[] => {
    const seen = stored === undefined ? 'absent' : stored.phase.name;
    if (verdict === 'release') {
      return mappingsOf(file).map((m) => item(m, `no file of ${ownerName(file.owner)}: ${why}`, seen));
    }
    if (verdict === 'leave' || (stored === file && file.phase.name === 'active')) return [];
    const before = stored?.mappings.map((m) => `${m.guest} <-> ${m.address}`).join(', ');
    const changed = stored?.phase.name === 'active' ? `active: ${before}` : seen;
    return file.mappings.map((m) => item(m, `active: ${why}`, changed));
  });
  const broken = intent.unreadable.map(
    ({ path, why }): Drift => ({
      guest: null,
      address: null,
      part: 'file',
      expected: `a state file at ${path}`,
      observed: why,
      fix: `mv ${path} ${path}.bad && kvm-ib reconcile`,
    }),
  );
  return [...fromFiles, ...broken];
}

function linkDrift(host: Host, view: HostView): readonly Drift[] {
  const links = (of: 'device' | 'bridge') => new Set(view.spec.networks.map((network) => network[of]));
  const gone = (what: string, fix: string): Drift => {
    return { guest: null, address: null, part: 'mtu', expected: `${what} with its MTU`, observed: 'absent', fix };
  };
  const missing = [
    ...[...links('device')]
      .filter((name) => view.absent.has(name))
      .map((name) => gone(`link ${name}`, `ip link show ${name}`)),
    ...[...links('bridge')]
      .filter((name) => view.absent.has(name))
      .map((name) => gone(`bridge ${name}`, 'virsh net-list --all')),
  ];
  const own = host.config.networks.flatMap((network): Drift[] => {
    const own = ownAddressInRange(network, view.spec.hostAddresses.get(network.name) ?? []);
    if (own === undefined) return [];
    const { why = '', fix = '' } = own;
    const expected = 'no address of the host in the IB range';
    return [{ guest: null, address: null, part: 'alias', expected, observed: why, fix }];
  });
  return [...missing, ...own];
}

function changeDrift(change: Change, observed: Observed): readonly Drift[] {
  switch (change.kind) {
    case 'add-alias':
    case 'delete-alias': {
      const alias = `${change.address}/32 on ${change.device} labelled ${change.label}`;
      const [expected, seen] = change.kind === 'add-alias' ? [alias, 'absent'] : ['absent', alias];
      return [
        { guest: change.guest, address: change.address, part: 'alias', expected, observed: seen, fix: RECONCILE },
      ];
    }
    case 'change-pairs':
      return pairDrift(change, observed);
    case 'set-mtu':
      return [
        {
          guest: null,
          address: null,
          part: 'mtu',
          expected: `${change.link} ${change.to}`,
          observed: `${change.link} ${change.from}`,
          fix: RECONCILE,
        },
      ];
    case 'set-hairpin':
      return [
        {
          guest: null,
          address: null,
          part: 'hairpin',
          expected: `${change.port} on, because bridge-nf-call-iptables is 1`,
          observed: `${change.port} off`,
          fix: RECONCILE,
        },
      ];
    case 'flush-mapping':
    case 'flush-foreign':
    case 'announce':
      return [];
  }
}

function pairDrift(change: Extract<Change, { kind: 'change-pairs' }>, observed: Observed): readonly Drift[] {
  const drift: Drift[] = [];
  const item = (guest: Ipv4 | null, address: Ipv4 | null, expected: string, seen: string): void => {
    drift.push({ guest, address, part: 'map', expected, observed: seen, fix: RECONCILE });
  };
  for (const { guest, address } of change.add.guestToIb) {
    item(guest, address, `guest_to_ib ${guest} : ${address}`, observed.guestToIb.get(guest) ?? 'absent');
  }
  for (const { guest, address } of change.add.ibToGuest) {
    item(guest, address, `ib_to_guest ${address} : ${guest}`, observed.ibToGuest.get(address) ?? 'absent');
  }
  for (const { guest, mac } of change.add.macs) item(guest, null, `guest_mac ${guest} . ${mac}`, 'absent');
  for (const guest of change.add.unbound) item(guest, null, `guest_any_mac ${guest}`, 'absent');
  const replaced = new Set<string>([
    ...change.add.guestToIb.map((e) => e.guest),
    ...change.add.ibToGuest.map((e) => e.address),
  ]);
  for (const { guest, address } of change.remove.guestToIb) {
    if (!replaced.has(guest)) item(guest, address, 'absent', `guest_to_ib ${guest} : ${address}`);
  }
  for (const { guest, address } of change.remove.ibToGuest) {
    if (!replaced.has(address)) item(guest, address, 'absent', `ib_to_guest ${address} : ${guest}`);
  }
  for (const { guest, mac } of change.remove.macs) item(guest, null, 'absent', `guest_mac ${guest} . ${mac}`);
  for (const guest of change.remove.unbound) item(guest, null, 'absent', `guest_any_mac ${guest}`);
  return drift;
}

/** Aliases that look like ours but that no file knows: reported, never removed, since the label alone proves nothing. */
function orphanAliases(intent: Intent, view: HostView): readonly Drift[] {
  const known = new Set(intent.entries.flatMap(({ file }) => mappingsOf(file).map((m) => m.address)));
  const unread = intent.unreadable.length > 0;
  return view.addresses.flatMap((entry): Drift[] => {
    if (known.has(entry.address) || !isOurLabel(entry.device, entry.label)) return [];
    const isOnOurs = view.spec.networks.some((n) => n.device === entry.device && hasAddress(n, entry.address));
    if (!isOnOurs) return [];
    return [
      {
        guest: null,
        address: entry.address,
        part: 'alias',
        expected: unread ? 'named by a file' : 'absent: no file has it',
        observed: `${entry.address}/${entry.prefixLength} on ${entry.device} labelled ${entry.label}`,
        // The alias of a file that cannot be read looks just the same.
        fix: unread
          ? 'see to the state file that cannot be read first'
          : `ip address del ${entry.address}/${entry.prefixLength} dev ${entry.device}`,
      },
    ];
  });
}
