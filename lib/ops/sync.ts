/**
 * sync: make one owner have exactly the mappings it should have. Every VMM action and every `add` and `remove` is this
 * one operation. Idempotent; the cost does not depend on how many other mappings there are.
 */
import { KvmIbError } from '../core/errors.ts';
import type { Mapping, Owner } from '../core/mapping.ts';
import { ownerName, sameMapping } from '../core/mapping.ts';
import type { Change } from '../core/plan.ts';
import { plan } from '../core/plan.ts';
import type { Holder, Phase, StateFile } from '../core/state.ts';
import { mappingsOf, STATE_VERSION } from '../core/state.ts';
import { rulesetTag } from '../nat/ruleset.ts';
import { apply } from './apply.ts';
import type { Host } from './host.ts';
import { domainName } from './host.ts';
import { observeMappings, ownAddressInRange, pairOf, tableSpec } from './observe.ts';

export interface SyncRequest {
  readonly owner: Owner;
  /** The mappings that the owner should have; empty: none, and no file. */
  readonly wish: readonly Mapping[];
  /** What is done, for the file and the messages: `deploy`, `add`, … */
  readonly action: string;
  /** This process, or the one that the outcome depends on. */
  readonly holder: Holder;
  /** True: the file stays pending until `commit` or `undo`. */
  readonly pending?: boolean;
  readonly dryRun?: boolean;
}

export interface SyncResult {
  readonly owner: string;
  readonly changes: readonly Change[];
  /** Conntrack entries deleted. */
  readonly flushed: number;
  readonly warnings: readonly string[];
}

/** @throws KvmIbError; the kernel and the files are then as they were before, except with `reversal-failed` */
export function sync(host: Host, request: SyncRequest): Promise<SyncResult> {
  return host.withLock(`${request.action} ${ownerName(request.owner)}`, () => syncLocked(host, request));
}

/** The pending file of an action whose stock part succeeded becomes active. Nothing when another action took over. */
export function commit(host: Host, owner: Owner, holder: Holder): Promise<SyncResult> {
  return host.withLock(`commit ${ownerName(owner)}`, async () => {
    const file = host.store.read(owner);
    if (!isPendingOf(file, holder)) return nothing(owner);
    // The taps exist only now: the action's own sync could not see them.
    const observed = await observeMappings(host, file.mappings, [], file.mappings);
    const changes = plan({ want: file.mappings, release: [] }, observed);
    const { flushed, warnings } = await apply(host, changes);
    host.store.write({ ...file, phase: { name: 'active' }, previous: [], updated: host.now() });
    return { owner: ownerName(owner), changes, flushed, warnings };
  });
}

/** Back to what the owner had before the pending action. Nothing when another action took over. */
export function undo(host: Host, owner: Owner, holder: Holder, action: string): Promise<SyncResult> {
  return host.withLock(`undo ${ownerName(owner)}`, async () => {
    const file = host.store.read(owner);
    if (!isPendingOf(file, holder)) return nothing(owner);
    return syncLocked(host, { owner, wish: file.previous, action: `undo ${action}`, holder });
  });
}

function isPendingOf(file: StateFile | undefined, holder: Holder): file is StateFile {
  if (file?.phase.name !== 'pending') return false;
  const { pid, start, bootId } = file.phase.holder;
  return pid === holder.pid && start === holder.start && bootId === holder.bootId;
}

function nothing(owner: Owner): SyncResult {
  return { owner: ownerName(owner), changes: [], flushed: 0, warnings: [] };
}

/** sync for a caller that holds the lock. */
export async function syncLocked(host: Host, request: SyncRequest): Promise<SyncResult> {
  const { owner, wish } = request;
  requireDistinct(wish);
  const prior = host.store.read(owner);
  const before = mappingsOf(prior);
  const rivals = await staleRivals(host, owner, wish);
  const stale = [...rivals.values()].flatMap((rival) => rival.mappings);
  refuseOwnAddresses(host, wish);
  const warnings = [...rivals.values()].map(
    (r) =>
      `${r.mappings.map((m) => `${m.guest} <-> ${m.address}`).join(', ')} released from ${ownerName(r.file.owner)}, which is not active`,
  );
  if (wish.length === 0 && prior === undefined) return { ...nothing(owner), warnings };

  if (!request.dryRun) await ensureTable(host, [...wish, ...before, ...stale]);
  const trusted = prior?.phase.name === 'active' ? prior.mappings : [];
  const release = [...before.filter((old) => !wish.some((m) => sameMapping(m, old))), ...stale];
  const observed = await observeMappings(host, wish, release, [...trusted, ...release]);
  const changes = plan({ want: wish, release }, observed);
  if (request.dryRun) return { owner: ownerName(owner), changes, flushed: 0, warnings };

  const written = writeIntent(host, request, prior, changes);
  let applied: { flushed: number; warnings: readonly string[] };
  try {
    applied = await apply(host, changes);
  } catch (error) {
    if (written && !(error instanceof KvmIbError && error.code === 'reversal-failed')) restore(host, owner, prior);
    throw error;
  }
  for (const { file, mappings } of rivals.values()) {
    const rest = file.mappings.filter((m) => !mappings.includes(m));
    if (rest.length === 0) host.store.remove(file.owner);
    else host.store.write({ ...file, mappings: rest, previous: [], updated: host.now() });
  }
  if (wish.length === 0) host.store.remove(owner);
  else if (written && !request.pending) host.store.write(stateFile(host, owner, { name: 'active' }, wish, []));
  return { owner: ownerName(owner), changes, flushed: applied.flushed, warnings: [...warnings, ...applied.warnings] };
}

/** Writes where this sync is going, before the kernel is touched. @returns whether a file was written */
function writeIntent(
  host: Host,
  request: SyncRequest,
  prior: StateFile | undefined,
  changes: readonly Change[],
): boolean {
  const { owner, wish } = request;
  if (wish.length === 0) {
    host.store.write(stateFile(host, owner, { name: 'removing' }, mappingsOf(prior), []));
    return true;
  }
  const unchanged =
    prior?.phase.name === 'active' &&
    changes.length === 0 &&
    prior.mappings.length === wish.length &&
    wish.every((m) => prior.mappings.some((old) => sameMapping(m, old)));
  if (unchanged && !request.pending) return false;
  const previous =
    prior === undefined || prior.phase.name === 'removing'
      ? []
      : prior.phase.name === 'pending'
        ? prior.previous
        : prior.mappings;
  const phase: Phase = { name: 'pending', action: request.action, holder: request.holder };
  host.store.write(stateFile(host, owner, phase, wish, previous));
  return true;
}

function restore(host: Host, owner: Owner, prior: StateFile | undefined): void {
  if (prior === undefined) host.store.remove(owner);
  else host.store.write(prior);
}

export function stateFile(
  host: Host,
  owner: Owner,
  phase: Phase,
  mappings: readonly Mapping[],
  previous: readonly Mapping[],
): StateFile {
  return { version: STATE_VERSION, owner, phase, mappings, previous, updated: host.now() };
}

function requireDistinct(wish: readonly Mapping[]): void {
  const seen = new Set<string>();
  for (const m of wish) {
    for (const [what, key] of [
      ['guest address', m.guest],
      ['IB address', m.address],
    ] as const) {
      if (seen.has(key)) {
        throw new KvmIbError('conflict', `Cannot map NIC ${m.nic ?? '-'}`, {
          why: `the ${what} ${key} is asked for twice`,
          fix: 'give each NIC an address of its own',
        });
      }
      seen.add(key);
    }
  }
}

interface Rival {
  readonly file: StateFile;
  readonly mappings: readonly Mapping[];
}

/**
 * Other owners that claim a wished address. One whose VM is gone is stale and is released in this sync.
 * @throws KvmIbError `conflict` naming both when the other is in use, or when nobody can tell
 */
async function staleRivals(host: Host, owner: Owner, wish: readonly Mapping[]): Promise<ReadonlyMap<string, Rival>> {
  const rivals = new Map<string, Rival>();
  let active: ReadonlySet<string> | undefined;
  let asked = false;
  for (const mapping of wish) {
    for (const key of [mapping.guest, mapping.address]) {
      const file = host.store.holderOf(key);
      if (file === undefined || ownerName(file.owner) === ownerName(owner)) continue;
      const held = mappingsOf(file).filter((m) => m.guest === key || m.address === key);
      if (file.phase.name !== 'removing') {
        if (!asked && file.owner.kind === 'vm') {
          active = await host.domains.active();
          asked = true;
        }
        refuseLiveRival(host, owner, key, file, active);
      }
      const name = ownerName(file.owner);
      const known = rivals.get(name)?.mappings ?? [];
      rivals.set(name, { file, mappings: [...known, ...held.filter((m) => !known.includes(m))] });
    }
  }
  return rivals;
}

function refuseLiveRival(
  host: Host,
  owner: Owner,
  key: string,
  file: StateFile,
  active: ReadonlySet<string> | undefined,
): void {
  const other = ownerName(file.owner);
  const message = `Cannot give ${key} to ${ownerName(owner)}`;
  if (file.owner.kind !== 'vm') {
    throw new KvmIbError('conflict', message, {
      why: `${other} has it`,
      fix:
        file.owner.kind === 'manual'
          ? `if it is not needed: kvm-ib remove --guest ${file.owner.guest}`
          : 'it stands under `static` in the configuration; take it out there',
    });
  }
  const fix = `see \`kvm-ib list\`; when VM ${file.owner.vm} is really gone: kvm-ib remove --vm ${file.owner.vm}`;
  if (file.phase.name === 'pending' && host.processes.isAlive(file.phase.holder)) {
    throw new KvmIbError('conflict', message, {
      why: `${other} has it, and its ${file.phase.action} is under way`,
      fix,
    });
  }
  if (active === undefined) {
    throw new KvmIbError('conflict', message, {
      why: `${other} has it, and libvirt does not answer whether ${domainName(file.owner.vm)} is running`,
      fix,
    });
  }
  if (active.has(domainName(file.owner.vm))) {
    throw new KvmIbError('conflict', message, { why: `${other} has it, and its domain is active on this host`, fix });
  }
}

function refuseOwnAddresses(host: Host, wish: readonly Mapping[]): void {
  const own = host.store.readTable()?.hostAddresses;
  for (const name of new Set(wish.map((m) => m.network))) {
    const network = host.config.networks.find((n) => n.name === name);
    const error = network && ownAddressInRange(network, own?.get(name) ?? []);
    if (error !== undefined) throw error;
  }
}

/**
 * The table is made off the action path, by reconcile at boot. When it is not there, or was made for another
 * configuration, this action makes it whole: with every mapping that this host should have.
 */
async function ensureTable(host: Host, mappings: readonly Mapping[]): Promise<void> {
  const record = host.store.readTable();
  const { table, tag } = await host.nat.lookup(mappings.slice(0, 1).map(pairOf));
  if (record !== undefined) {
    const spec = { networks: host.config.networks, hostAddresses: record.hostAddresses };
    if (table && tag === rulesetTag(spec)) return;
  }
  const spec = tableSpec(host, await host.links.addresses());
  for (const network of host.config.networks) {
    const error = ownAddressInRange(network, spec.hostAddresses.get(network.name) ?? []);
    if (error !== undefined && mappings.some((m) => m.network === network.name)) throw error;
  }
  const all = distinctPairs(host.store.all().files.flatMap((file) => file.mappings));
  await host.nat.load(spec, all.map(pairOf));
  host.store.writeTable({ hostAddresses: spec.hostAddresses });
  // Flows that began while the table was away go on without translation until their entries go.
  if (!table) {
    const stale = [...spec.hostAddresses.values()].flat();
    await host.conntrack.flush(all.map(({ guest, address }) => ({ kind: 'foreign', guest, address, stale })));
  }
}

/** Mappings without a second one for the same guest or IB address; the first stands. */
export function distinctPairs(mappings: readonly Mapping[]): readonly Mapping[] {
  const seen = new Set<string>();
  return mappings.filter((m) => {
    if (seen.has(m.guest) || seen.has(m.address)) return false;
    seen.add(m.guest).add(m.address);
    return true;
  });
}
