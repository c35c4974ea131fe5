/**
 * sync: make one owner have exactly the mappings it should have. Every VMM action and every `add` and `remove` is this
 * one operation. Idempotent; the cost does not depend on how many other mappings there are.
 */
import type { Ipv4, Mac } from '../core/address.ts';
import { KvmIbError, toKvmIbError } from '../core/errors.ts';
import type { Mapping, Owner } from '../core/mapping.ts';
import { domainName, ownerName, sameMapping } from '../core/mapping.ts';
import type { Change } from '../core/plan.ts';
import { plan } from '../core/plan.ts';
import { networkOfLinks, networksText } from '../core/served.ts';
import type { DomainState, Holder, Phase, StateFile } from '../core/state.ts';
import { mappingsOf, presentMappings, STATE_VERSION, wishOfDomain } from '../core/state.ts';
import type { JournalPhase } from '../import/phase.ts';
import type { ObservedPairs, TableSpec } from '../nat/engine.ts';
import { rulesetTag } from '../nat/ruleset.ts';
import { apply, reversalFailed } from './apply.ts';
import type { Host, TableRecord } from './host.ts';
import {
  isLoadedFor,
  neededSpec,
  observedPairs,
  observeMappings,
  ownAddressInRange,
  pairOf,
  refuseMissingLinks,
} from './observe.ts';
import type { Probing } from './probe.ts';
import { createProbing, takenBy } from './probe.ts';

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
  /** Hardware addresses of hosts that may still have the addresses, as `ip link` writes them. */
  readonly except?: readonly string[];
  /** Of a VM whose domain is there: how that bears on the wish. */
  readonly domain?: DomainView | undefined;
  /** NIC numbers of aliases that are detached by this. */
  readonly detachedAliases?: readonly number[];
}

/** Of the wish for a running VM, what `wishOfDomain` makes of it. */
export interface DomainView {
  readonly vm: number;
  readonly unmapped: readonly number[];
  readonly attaching: readonly number[];
  /** NICs whose mapping stays as it is, whatever the wish says. */
  readonly keep: (held: Mapping) => boolean;
}

export interface SyncResult {
  readonly owner: string;
  readonly changes: readonly Change[];
  /** Conntrack entries deleted. */
  readonly flushed: number;
  readonly warnings: readonly string[];
}

/** Milliseconds. */
export interface Timings {
  /** Spent waiting for other hosts to answer; 0: nothing was probed. */
  readonly probe: number;
  /** Of all of it, the probe and the wait for the lock included. */
  readonly total: number;
}

/** @throws KvmIbError; the kernel and the files are then as they were before, except with `reversal-failed` */
export async function sync(host: Host, request: SyncRequest): Promise<SyncResult & { readonly timings: Timings }> {
  const began = performance.now();
  const probing = createProbing(host, request.except);
  await probeAhead(host, request.wish, probing);
  const who = `${request.action} ${ownerName(request.owner)}`;
  const { domain } = request;
  const result =
    domain === undefined
      ? await host.withLock(who, () => syncLocked(host, request, probing))
      : await withDomain(host, { kind: 'vm', vm: domain.vm }, request.holder, who, (seen) =>
          syncLocked(
            host,
            { ...request, wish: (prior) => wishFor(request.wish, domain, macsOf(seen), prior) },
            probing,
          ),
        );
  return { ...result, timings: { probe: probing.spent(), total: performance.now() - began } };
}

/** Without the lock, so that actions at once do not wait for each other's probes. What is local already is not asked for. */
export async function probeAhead(host: Host, wish: readonly Mapping[], probing: Probing): Promise<void> {
  const absent: Mapping[] = [];
  for (const mapping of wish) if (!(await host.links.isLocal(mapping.address))) absent.push(mapping);
  await probing.ask(absent);
}

/**
 * Runs `act` under the host lock with what libvirt says of a VM's domain. libvirt is asked before, so that one that is slow or
 * hangs holds nobody up. It is asked again if an action came in between and changed the file, or if another action's stock
 * script may have changed the domain meanwhile.
 */
export async function withDomain<T>(
  host: Host,
  owner: Extract<Owner, { kind: 'vm' }>,
  holder: Holder,
  who: string,
  act: (domain: DomainState, file: StateFile | undefined) => Promise<T>,
): Promise<T> {
  const before = JSON.stringify(host.store.read(owner));
  const domain = await host.domains.state(owner.vm);
  return host.withLock(who, async () => {
    const file = host.store.read(owner);
    const isOthers = file?.phase.name === 'pending' && pendingBy(file, holder) === undefined;
    const stands = JSON.stringify(file) === before && !isOthers;
    return act(stands ? domain : await host.domains.state(owner.vm), file);
  });
}

export type PendingFile = StateFile & { readonly phase: Extract<Phase, { name: 'pending' }> };

/** The file, if it is pending and waits for this process. */
export function pendingBy(file: StateFile | undefined, holder: Holder): PendingFile | undefined {
  if (!isPending(file)) return undefined;
  const { pid, start, bootId } = file.phase.holder;
  return pid === holder.pid && start === holder.start && bootId === holder.bootId ? file : undefined;
}

export function isPending(file: StateFile | undefined): file is PendingFile {
  return file?.phase.name === 'pending';
}

function macsOf(domain: DomainState): ReadonlySet<Mac> | undefined {
  return domain.kind === 'active' ? domain.macs : undefined;
}

export function nothingDone(owner: Owner, ...warnings: readonly string[]): SyncResult {
  return { owner: ownerName(owner), changes: [], flushed: 0, warnings };
}

/** A request whose wish may depend on what the owner has. */
type LockedRequest = Omit<SyncRequest, 'wish' | 'domain'> & {
  readonly wish: readonly Mapping[] | ((prior: StateFile | undefined) => readonly Mapping[]);
};

/** sync for a caller that holds the lock. */
export async function syncLocked(
  host: Host,
  asked: LockedRequest,
  probing: Probing = createProbing(host, asked.except),
): Promise<SyncResult> {
  const { owner } = asked;
  const prior = host.store.read(owner);
  const wish = typeof asked.wish === 'function' ? asked.wish(prior) : asked.wish;
  const request = { ...asked, wish };
  requireDistinct(wish);
  const before = mappingsOf(prior);
  const rivals = await staleRivals(host, owner, wish);
  const stale = rivals.flatMap(mappingsOf);
  refuseOwnAddresses(host, wish, host.store.readTable()?.hostAddresses);
  const warnings = rivals.map((rival) => {
    const pairs = mappingsOf(rival).map((m) => `${m.guest} <-> ${m.address}`);
    return `${pairs.join(', ')} released from ${ownerName(rival.owner)}, which is not active`;
  });
  if (wish.length === 0 && prior === undefined) return nothingDone(owner);

  if (!request.dryRun) await ensureTable(host, wish, [...wish, ...before, ...stale]);
  // Of an active file the kernel has the very alias, or none. Of any other it may have one of several.
  const trusted = [prior, ...rivals].flatMap((file) => (file?.phase.name === 'active' ? file.mappings : []));
  const release = [...before.filter((old) => !wish.some((m) => sameMapping(m, old))), ...stale];
  const observed = await observeMappings(host, wish, release, trusted);
  const changes = plan({ want: wish, release }, observed);
  const taken = takenBy(changes);
  await probing.ask(taken);
  probing.refuse(taken);
  const result = { owner: ownerName(owner), changes };
  if (request.dryRun) return { ...result, flushed: 0, warnings: [...warnings, ...probing.warnings(new Set())] };
  if (isDone(request, prior, changes) && rivals.length === 0) return { ...result, flushed: 0, warnings };

  // Where this goes is written before the kernel is touched. The owner's file comes last, since it takes over the claims.
  const intents = [...rivals.map((rival) => removing(host, rival)), intentOf(host, request, prior)];
  const originals: readonly Stored[] = [
    { owner, file: prior },
    ...rivals.map((file): Stored => ({ owner: file.owner, file })),
  ];
  try {
    for (const file of intents) host.store.write(file);
    const applied = await apply(host, changes, () => {
      for (const rival of rivals) host.store.remove(rival.owner);
      if (wish.length === 0) host.store.remove(owner);
      else if (!request.pending) host.store.write(activeFile(host, owner, wish, detachedAliases(request, prior)));
    });
    const unprobed = probing.warnings(applied.unannounced);
    return { ...result, flushed: applied.flushed, warnings: [...warnings, ...unprobed, ...applied.warnings] };
  } catch (error) {
    const half = error instanceof KvmIbError && error.code === 'reversal-failed';
    throw putBack(host, half ? intents.map((file) => ({ owner: file.owner, file })) : originals, error);
  }
}

/** The wish, held against what the VM has and, where it is known, against the interfaces of its domain. */
export function wishFor(
  wish: readonly Mapping[],
  domain: DomainView,
  macs: ReadonlySet<Mac> | undefined,
  prior: StateFile | undefined,
): readonly Mapping[] {
  const held = mappingsOf(prior);
  const stays = held.filter((old, index) => domain.keep(old) && held.findIndex((m) => m.nic === old.nic) === index);
  const rest = wish.filter((m) => !stays.some((old) => old.nic === m.nic));
  return wishOfDomain({ ...domain, mappings: [...rest, ...stays] }, held, macs);
}

function detachedAliases(request: SyncRequest, prior: StateFile | undefined): readonly number[] {
  return [...new Set([...(prior?.detachedAliases ?? []), ...(request.detachedAliases ?? [])])];
}

/** Nothing differs, in the kernel or in the file. */
function isDone(request: SyncRequest, prior: StateFile | undefined, changes: readonly Change[]): boolean {
  const { wish } = request;
  return (
    !request.pending &&
    changes.length === 0 &&
    prior?.phase.name === 'active' &&
    detachedAliases(request, prior).length === prior.detachedAliases.length &&
    mappingsOf(prior).length === wish.length &&
    wish.every((m) => prior.mappings.some((old) => sameMapping(m, old)))
  );
}

/** The file that says where this sync is going. It names every mapping that the kernel may hold on the way. */
function intentOf(host: Host, request: SyncRequest, prior: StateFile | undefined): StateFile {
  const { owner, wish } = request;
  if (prior !== undefined && wish.length === 0) return removing(host, prior);
  const previous =
    prior === undefined || prior.phase.name === 'removing'
      ? []
      : prior.phase.name === 'pending'
        ? prior.previous
        : prior.mappings;
  const known = [...wish, ...previous];
  const leftovers = mappingsOf(prior).filter((old) => !known.some((m) => sameMapping(m, old)));
  const phase: Phase = { name: 'pending', action: request.action, holder: request.holder };
  return {
    ...stateFile(host, owner, phase, wish),
    previous,
    leftovers,
    detachedAliases: detachedAliases(request, prior),
  };
}

/** The file of an owner whose mappings are all to go. */
export function removing(host: Host, file: StateFile): StateFile {
  return stateFile(host, file.owner, { name: 'removing' }, mappingsOf(file));
}

export function stateFile(host: Host, owner: Owner, phase: Phase, mappings: readonly Mapping[]): StateFile {
  return {
    version: STATE_VERSION,
    owner,
    phase,
    mappings,
    previous: [],
    leftovers: [],
    detachedAliases: [],
    updated: host.now(),
  };
}

/** The file of an owner whose mappings the kernel holds; of a VM: whose domain is there, or the stock script said so. */
export function activeFile(
  host: Host,
  owner: Owner,
  mappings: readonly Mapping[],
  detachedAliases: readonly number[] = [],
): StateFile {
  const bootId = owner.kind === 'vm' ? { bootId: host.processes.bootId() } : {};
  return { ...stateFile(host, owner, { name: 'active', ...bootId }, mappings), detachedAliases };
}

/** The file of an owner; undefined: it has none. */
export interface Stored {
  readonly owner: Owner;
  readonly file: StateFile | undefined;
}

/** Writes files back after a failure. @returns what to throw: the cause, or `reversal-failed` when that failed too */
export function putBack(host: Host, files: readonly Stored[], cause: unknown): KvmIbError {
  const error = toKvmIbError(cause, 'Cannot write the state');
  const reasons: string[] = [];
  for (const { owner, file } of files) {
    try {
      if (file === undefined) host.store.remove(owner);
      else host.store.write(file);
    } catch (reversalCause) {
      const { message, why } = toKvmIbError(reversalCause);
      reasons.push(`state of ${ownerName(owner)}: ${message}${why === undefined ? '' : `: ${why}`}`);
    }
  }
  return reasons.length === 0 || error.code === 'reversal-failed' ? error : reversalFailed(error, reasons);
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

/**
 * Other owners that claim a wished address. One whose VM is gone is stale, and all of it is released in this sync.
 * @throws KvmIbError `conflict` naming both when the other is in use, or when nobody can tell
 */
async function staleRivals(host: Host, owner: Owner, wish: readonly Mapping[]): Promise<readonly StateFile[]> {
  const rivals = new Map<string, StateFile>();
  let active: ReadonlySet<string> | undefined;
  let asked = false;
  for (const key of wish.flatMap((m) => [m.guest, m.address])) {
    const file = host.store.holderOf(key);
    if (file === undefined) continue;
    const name = ownerName(file.owner);
    if (name === ownerName(owner) || rivals.has(name)) continue;
    if (file.phase.name !== 'removing') {
      if (!asked && file.owner.kind === 'vm') {
        active = await host.domains.active();
        asked = true;
      }
      refuseLiveRival(host, owner, key, file, active);
    }
    rivals.set(name, file);
  }
  return [...rivals.values()];
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

function refuseOwnAddresses(
  host: Host,
  wish: readonly Mapping[],
  own: ReadonlyMap<string, readonly Ipv4[]> | undefined,
): void {
  for (const network of new Set(wish.map((m) => networkOfLinks(host.config.networks, m)))) {
    const error = network && ownAddressInRange(network, own?.get(network.name) ?? []);
    if (error !== undefined) throw error;
  }
}

/**
 * The table is made off the action path, by reconcile at boot. When it is not there, or was made for another
 * configuration, this action makes it whole: with every mapping that this host should have.
 */
export async function ensureTable(host: Host, wish: readonly Mapping[], mappings: readonly Mapping[]): Promise<void> {
  const record = host.store.readTable();
  if (record !== undefined && isLoadedFor(record, host.config, wish)) {
    const { table, tag } = await host.nat.lookup(mappings.slice(0, 1).map(pairOf));
    if (table && tag === rulesetTag(record)) return;
  }
  refuseUnderOldRules(host, 'Cannot load the table');
  await refuseOldRules(host, 'Cannot load the table', record);
  // What runs under an older configuration stays served.
  const { files, unreadable } = host.store.all();
  const needing = [...files.flatMap(mappingsOf), ...wish];
  const spec = neededSpec(host, needing, await host.links.addresses(), unreadable.length > 0);
  refuseOwnAddresses(host, wish, spec.hostAddresses);
  // A configuration that names a wrong link must not reach the packets of the mappings that work.
  await refuseMissingLinks(host, wish);
  const held = files.flatMap(presentMappings);
  await loadTable(host, spec, held, await host.nat.list(spec));
}

/**
 * Loads the table with the pairs that it holds already and, where those leave room, with these mappings: what differs is
 * brought right by the plan, in its order. Then drops the flows that began while it was not as it should be, since they go on without it.
 * The record of what it was loaded for is written last, so that whoever is stopped in between is followed by one who
 * does all of this again.
 * @param flows `keep`: those that are there stay, since other rules have translated them the same way
 * @returns how many conntrack entries were deleted
 */
export async function loadTable(
  host: Host,
  spec: TableSpec,
  mappings: readonly Mapping[],
  observed: ObservedPairs,
  flows: 'flush' | 'keep' = 'flush',
): Promise<number> {
  const wanted = distinctPairs(mappings);
  const present = observedPairs(observed);
  const taken = new Set<string>(present.flatMap(({ guest, address }) => [guest, address]));
  const absent = wanted.filter((m) => !taken.has(m.guest) && !taken.has(m.address));
  const comments = new Map(wanted.map(pairOf).map((pair) => [`${pair.guest} ${pair.address}`, pair.comment]));
  const commented = present.map((pair) => ({ ...pair, comment: comments.get(`${pair.guest} ${pair.address}`) ?? '' }));
  host.store.writeTable(undefined);
  await host.nat.load(spec, [...commented, ...absent.map(pairOf)]);
  const stale = [...spec.hostAddresses.values()].flat();
  const foreign = wanted.map(({ guest, address }) => ({ kind: 'foreign', guest, address, stale }) as const);
  const flushed = flows === 'keep' ? 0 : await host.conntrack.flush(foreign);
  host.store.writeTable({ ...spec, configured: networksText(host.config.networks) });
  return flushed;
}

/**
 * Our guards drop what has no mapping. So while the old rules translate, the table must not come by itself.
 * @param also further phases in which it must not
 * @throws KvmIbError `conflict` while an import is on its way, stopped half-way, or rolled back
 */
export function refuseUnderOldRules(host: Host, message: string, also: readonly JournalPhase[] = []): void {
  const phase = host.store.importPhase();
  if (phase === undefined || ![...UNDER_OLD_RULES, ...also].includes(phase)) return;
  throw new KvmIbError('conflict', message, unfinishedImport(phase));
}

/**
 * On a host where the table never was: the guests that an older deployment serves have no mapping, so its guards would cut
 * them off.
 * @param record what the table was loaded for
 * @throws KvmIbError `conflict` naming how many
 */
export async function refuseOldRules(host: Host, message: string, record: TableRecord | undefined): Promise<void> {
  if (record !== undefined || host.store.importPhase() !== undefined) return;
  const guests = (await host.oldRules?.()) ?? [];
  if (guests.length === 0) return;
  throw new KvmIbError('conflict', message, {
    why: `rules of iptables translate ${guests.length === 1 ? guests[0] : `${guests.length} guests`} still, which the guards of the table would cut off`,
    fix: 'take them over first: kvm-ib import',
  });
}

const UNDER_OLD_RULES: readonly JournalPhase[] = ['applying', 'rolling-back', 'rolled-back'];

/** Why kvm-ib stands still in a phase of an import, and the way on. */
export function unfinishedImport(phase: JournalPhase): {
  readonly why: string;
  readonly fix: string;
} {
  if (phase === 'rolled-back') {
    return {
      why: 'the import was rolled back: the old rules are in force',
      fix: 'go over again with `kvm-ib import --apply`; to stay with the old rules: systemctl disable --now kvm-ib.timer kvm-ib-reconcile.service',
    };
  }
  const back = 'back with `kvm-ib import --rollback`';
  if (phase === 'rolling-back') return { why: 'an import was stopped on its way back', fix: `go ${back}` };
  return { why: 'an import was stopped half-way', fix: `go on with \`kvm-ib import --resume\`, or ${back}` };
}

/** Mappings without a second one for the same guest or IB address; the first stands. */
function distinctPairs(mappings: readonly Mapping[]): readonly Mapping[] {
  const seen = new Set<string>();
  return mappings.filter((m) => {
    if (seen.has(m.guest) || seen.has(m.address)) return false;
    seen.add(m.guest).add(m.address);
    return true;
  });
}
