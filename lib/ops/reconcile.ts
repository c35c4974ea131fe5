/**
 * reconcile: make the kernel equal to the files, and end what no driver action ends: guests that powered themselves off,
 * crashed, or whose host was lost. It runs at boot, after a firewall reload and on a timer.
 */
import type { Ipv4, LinkName, Mac } from '../core/address.ts';
import { resolveMapping } from '../core/config.ts';
import { KvmIbError, toKvmIbError } from '../core/errors.ts';
import type { Mapping, Owner } from '../core/mapping.ts';
import { aliasKey, domainName, isOurLabel, ownerName, sameMapping } from '../core/mapping.ts';
import type { Change, Desired, Observed } from '../core/plan.ts';
import { plan } from '../core/plan.ts';
import { networksText, printTableRecord } from '../core/served.ts';
import type { StateFile, Verdict } from '../core/state.ts';
import { isOfBoot, mappingsOf, presentMappings, verdictOf, wishOfDomain } from '../core/state.ts';
import type { LinkAddress, RepeatItem } from '../link/ports.ts';
import type { TableSpec } from '../nat/engine.ts';
import { rulesetTag } from '../nat/ruleset.ts';
import type { Announced } from './announce.ts';
import { againOn, announceAgain, itemsOf, seenLinks, standing as standingAliases } from './announce.ts';
import { apply, repeatLater } from './apply.ts';
import type { Host } from './host.ts';
import type { HostView } from './observe.ts';
import { hasAddress, hindranceOf, neededSpec, observeHost, ownAddressInRange, strangersOf } from './observe.ts';
import type { Probing } from './probe.ts';
import { createProbing, heldTwice, takenBy } from './probe.ts';
import { activeFile, loadTable, refuseOldRules, refuseUnderOldRules, removing, stateFile } from './sync.ts';

export interface ReconcileResult {
  /** What was done, or with `dryRun` what would be. */
  readonly changes: readonly Change[];
  /** Why the table was loaded anew; empty when it was left. */
  readonly table: readonly string[];
  /** Owners whose mappings were released, or with `dryRun` would be. */
  readonly released: readonly string[];
  /** Owners left alone, with the reason. */
  readonly left: readonly { readonly owner: string; readonly why: string }[];
  readonly warnings: readonly string[];
  /** What could not be brought right. The rest was. */
  readonly errors: readonly KvmIbError[];
  readonly flushed: number;
  /** Aliases that were announced again because their link changed, or with `dryRun` would be. */
  readonly announced: readonly Announced[];
}

/** One owner, and what is to become of its mappings. */
export interface Entry {
  /** As it should be: of a static mapping, as the configuration has it. */
  readonly file: StateFile;
  /** As it stands in the directory. */
  readonly stored: StateFile | undefined;
  readonly verdict: Verdict;
  readonly why: string;
  /** libvirt has its domain among the active ones. */
  readonly running?: boolean | undefined;
}

/** What each file means. Shared by reconcile and status. */
export interface Intent {
  readonly entries: readonly Entry[];
  readonly unreadable: readonly { readonly path: string; readonly why: string }[];
  readonly warnings: readonly string[];
  /** Claims that cannot stand beside an earlier one. */
  readonly conflicts: readonly KvmIbError[];
}

/** Reads the files, asks libvirt once, and decides. Static mappings of the configuration count as files. */
export async function readIntent(host: Host): Promise<Intent> {
  // First the files, then libvirt: a file becomes active only after its domain did, so a domain that is not there now
  // has ended.
  const { files: stored, unreadable } = host.store.all();
  const vms = stored.some((file) => file.owner.kind === 'vm');
  const active = vms ? await host.domains.active() : new Set<string>();
  const moving = new Set<number>();
  for (const { owner, phase } of stored) {
    const mayMove = owner.kind === 'vm' && phase.name === 'pending' && !host.processes.isAlive(phase.holder);
    if (mayMove && active?.has(domainName(owner.vm)) && (await host.domains.isMoving(owner.vm))) moving.add(owner.vm);
  }
  const read = stored.map((file) => entryOf(host, file, active, moving));
  const running = read.flatMap(({ file, verdict, running: is }) =>
    file.owner.kind === 'vm' && verdict === 'keep' && is ? [file.owner.vm] : [],
  );
  const interfaces =
    running.length === 0 ? new Map<number, ReadonlySet<Mac>>() : await host.domains.interfaces(running);
  const entries = read.map((entry) => ofDomain(entry, interfaces));
  const unread = new Set(unreadable.map(({ path }) => path.slice(path.lastIndexOf('/') + 1)));
  for (const [owner, mapping] of statics(host)) {
    // Its file is there and cannot be read: what it says is not known, so it is not written over.
    if (unread.has(`${ownerName(owner)}.json`)) continue;
    const index = entries.findIndex((entry) => ownerName(entry.file.owner) === ownerName(owner));
    const known = entries[index]?.stored;
    const [held] = known?.mappings ?? [];
    if (known?.phase.name === 'active' && held !== undefined && sameMapping(held, mapping)) continue;
    const file = { ...stateFile(host, owner, { name: 'active' }, [mapping]), previous: mappingsOf(known) };
    if (index !== -1) entries.splice(index, 1);
    // Behind all that stands already: it yields to them.
    entries.push({ file, stored: known, verdict: 'keep', why: 'the configuration has it' });
  }
  const warnings =
    active === undefined ? ['libvirt does not answer: no mapping of a VM is released until it does'] : [];
  return { ...withoutDoubleClaims(entries), unreadable, warnings };
}

function statics(host: Host): readonly (readonly [Extract<Owner, { kind: 'static' }>, Mapping])[] {
  return host.config.static.map(({ guest, address }) => [
    { kind: 'static', guest },
    resolveMapping(host.config, { guest, address, mac: null, vm: null, nic: null }),
  ]);
}

function entryOf(
  host: Host,
  file: StateFile,
  active: ReadonlySet<string> | undefined,
  moving: ReadonlySet<number>,
): Entry {
  const { owner, phase } = file;
  if (owner.kind === 'static' && !host.config.static.some((entry) => entry.guest === owner.guest)) {
    const why = 'it is no longer under `static` in the configuration';
    return { file, stored: file, verdict: 'release', why };
  }
  const alive = phase.name === 'pending' && host.processes.isAlive(phase.holder);
  const running = owner.kind === 'vm' ? active?.has(domainName(owner.vm)) : undefined;
  const isMoving = owner.kind === 'vm' && moving.has(owner.vm);
  const verdict = verdictOf(file, alive, running, host.processes.bootId(), isMoving);
  const why =
    verdict === 'leave' && isMoving ? 'its domain is on its way between two hosts' : reason(file, verdict, alive);
  return { file, stored: file, verdict, why, running };
}

/**
 * A running VM keeps what its domain has NICs for. The rest goes: of an action that ended half-way, of a NIC that the guest let go
 * late or somebody detached by hand.
 */
function ofDomain(entry: Entry, interfaces: ReadonlyMap<number, ReadonlySet<Mac>>): Entry {
  const { file, verdict } = entry;
  const macs = file.owner.kind === 'vm' && verdict === 'keep' ? interfaces.get(file.owner.vm) : undefined;
  if (macs === undefined) return entry;
  const wish = { mappings: file.mappings, unmapped: [], attaching: [] };
  const mappings = wishOfDomain(wish, mappingsOf(file), macs);
  if (mappings.length === file.mappings.length && mappings.every((m) => file.mappings.includes(m))) return entry;
  if (mappings.length === 0) return { ...entry, verdict: 'release', why: 'its domain has none of these NICs' };
  const why = 'its domain has not the same NICs';
  return { ...entry, file: { ...file, mappings, leftovers: mappingsOf(file) }, why };
}

function reason(file: StateFile, verdict: Verdict, holderAlive: boolean): string {
  if (file.phase.name === 'removing') return 'its removal was not finished';
  if (verdict === 'leave' && file.phase.name === 'active') {
    return 'it is from before the boot of this host, and libvirt does not answer whether it runs here';
  }
  if (verdict === 'leave')
    return holderAlive ? 'its action is under way' : 'its action ended half-way, and libvirt does not answer';
  if (verdict === 'release' && file.owner.kind === 'vm') return `${domainName(file.owner.vm)} is not active`;
  return 'it is wanted';
}

/** Of two owners that claim one address the later is left as it is. What an action is at work on comes first. */
function withoutDoubleClaims(entries: readonly Entry[]): Pick<Intent, 'entries' | 'conflicts'> {
  const claims = new Map<string, string>();
  const claim = (mappings: readonly Mapping[], name: string): void => {
    for (const key of mappings.flatMap((m) => [m.guest, m.address])) if (!claims.has(key)) claims.set(key, name);
  };
  for (const { file, verdict } of entries) if (verdict === 'leave') claim(mappingsOf(file), ownerName(file.owner));
  const conflicts: KvmIbError[] = [];
  const settled = entries.flatMap((entry): readonly Entry[] => {
    if (entry.verdict !== 'keep') return [entry];
    const name = ownerName(entry.file.owner);
    const keys = entry.file.mappings.flatMap((m) => [m.guest, m.address]);
    const taken = keys.find((key) => claims.has(key) && claims.get(key) !== name);
    if (taken === undefined) {
      claim(entry.file.mappings, name);
      return [entry];
    }
    const why = `${claims.get(taken)} has it`;
    conflicts.push(
      new KvmIbError('conflict', `Cannot give ${taken} to ${name}`, {
        why,
        fix: 'see `kvm-ib list`, and take one of the two away',
      }),
    );
    return entry.stored === undefined
      ? []
      : [{ ...entry, file: entry.stored, verdict: 'leave', why: `of ${taken}: ${why}` }];
  });
  return { entries: settled, conflicts };
}

/** What the kernel is to hold, as far as it can. */
export interface Goal extends Desired {
  /**
   * Wanted mappings that something stands in the way of, and what. Nothing of theirs is touched, unless another host has
   * the address: what this host has of it is then released, and the file stays for when the other one is gone.
   */
  readonly hindered: readonly { readonly mapping: Mapping; readonly error: KvmIbError }[];
  /** Guest and IB addresses that nothing is done about: of hindered mappings, and of owners that are left alone. */
  readonly untouched: ReadonlySet<string>;
}

/** @param probing what the fabric answered for addresses that it was asked for; without it nobody was asked */
export function goalOf(host: Host, intent: Intent, view: HostView, probing?: Pick<Probing, 'conflictOf'>): Goal {
  const of = (verdict: Verdict): readonly StateFile[] =>
    intent.entries.filter((entry) => entry.verdict === verdict).map((entry) => entry.file);
  const kept = of('keep').flatMap((file) => file.mappings);
  const strangers = strangersOf(
    view.addresses,
    intent.entries.flatMap((entry) => mappingsOf(entry.file)),
  );
  const running = new Set(intent.entries.flatMap(({ file, running: is }) => (is ? file.mappings : [])));
  const aliases = new Set(view.observed.aliases.map(aliasKey));
  const elsewhere: Mapping[] = [];
  const hindered = kept.flatMap((mapping) => {
    const error = hindranceOf(host.config, mapping, view, strangers);
    if (error !== undefined) return [{ mapping, error }];
    const conflict = probing?.conflictOf(mapping.address);
    if (conflict === undefined) return [];
    const { vm } = mapping;
    const stands = aliases.has(aliasKey(mapping));
    if (stands || hasPair(mapping, view.observed)) elsewhere.push(mapping);
    const isTwice = vm !== null && running.has(mapping);
    return [{ mapping, error: isTwice ? heldTwice({ ...mapping, vm }, conflict, stands) : conflict }];
  });
  const untouched = new Set<string>(
    [...of('leave').flatMap(mappingsOf), ...hindered.map(({ mapping }) => mapping)].flatMap((m) => [
      m.guest,
      m.address,
    ]),
  );
  const isFree = (m: Mapping): boolean => !untouched.has(m.guest) && !untouched.has(m.address);
  const isHindered = new Set(hindered.map(({ mapping }) => mapping));
  const want = kept.filter((m) => !isHindered.has(m));
  const release = [
    ...of('release').flatMap(mappingsOf),
    ...of('keep').flatMap((file) => mappingsOf(file).filter((m) => !file.mappings.includes(m))),
  ].filter(isFree);
  // What a file that cannot be read has put there is not known, so nothing unknown goes.
  const standing = new Set([...untouched, ...orphaned(view, [...kept, ...release])]);
  const strays = intent.unreadable.length > 0 ? [] : strayElements(view.spec, kept, release, standing, view.observed);
  return { want, release: [...release, ...elsewhere, ...strays], hindered, untouched };
}

/** Whether the kernel holds anything of the pair. */
function hasPair({ guest, address, mac }: Mapping, observed: Observed): boolean {
  return (
    observed.guestToIb.get(guest) === address ||
    observed.ibToGuest.get(address) === guest ||
    (mac === null ? observed.unbound.has(guest) : observed.macs.has(`${guest} ${mac}`))
  );
}

/**
 * Guest and IB addresses of pairs that no file knows but whose alias stands, as after the state was lost. The alias is not
 * ours to remove without a file, and without its pair the host itself would answer at the guest's address.
 */
function orphaned(view: HostView, mappings: readonly Mapping[]): readonly string[] {
  const known = new Set(mappings.map((m) => m.address));
  return view.addresses.flatMap(({ device, address, label }) => {
    const isOurs = view.spec.networks.some((n) => n.device === device) && isOurLabel(device, label);
    const guest = view.observed.ibToGuest.get(address);
    return isOurs && guest !== undefined && !known.has(address) ? [guest, address] : [];
  });
}

/** Elements in our table that no file knows. The table is ours alone, so they go. */
function strayElements(
  spec: TableSpec,
  kept: readonly Mapping[],
  release: readonly Mapping[],
  untouched: ReadonlySet<string>,
  observed: Observed,
): readonly Mapping[] {
  const known = new Set<string>([...untouched, ...[...kept, ...release].flatMap((m) => [m.guest, m.address])]);
  const byGuest = new Map(kept.map((m) => [m.guest, m]));
  const stray = (guest: Ipv4, address: Ipv4, mac: Mac | null): Mapping => {
    const network = spec.networks.find((n) => hasAddress(n, address));
    return {
      network: network?.name ?? '',
      device: network?.device ?? ('lo' as LinkName),
      bridge: network?.bridge ?? ('lo' as LinkName),
      guest,
      address,
      mac,
      vm: null,
      nic: null,
      // No label: an alias is ours by file and label, and there is no file.
      label: '',
    };
  };
  const found: Mapping[] = [];
  for (const [guest, address] of observed.guestToIb) if (!known.has(guest)) found.push(stray(guest, address, null));
  for (const [address, guest] of observed.ibToGuest) if (!known.has(address)) found.push(stray(guest, address, null));
  const none = '0.0.0.0' as Ipv4;
  const files = new Set([...kept, ...release].map((m) => `${m.guest} ${m.mac}`));
  for (const entry of observed.macs) {
    const [guest, mac] = entry.split(' ') as [Ipv4, Mac];
    if (files.has(entry) || untouched.has(guest)) continue;
    found.push(stray(guest, byGuest.get(guest)?.address ?? observed.guestToIb.get(guest) ?? none, mac));
  }
  for (const guest of observed.unbound) if (!known.has(guest)) found.push(stray(guest, none, null));
  return found;
}

/** @throws KvmIbError when not even the look at the kernel or the files succeeded; else errors are in the result */
export function reconcile(host: Host, options: { readonly dryRun?: boolean } = {}): Promise<ReconcileResult> {
  return host.withLock('reconcile', () => reconcileLocked(host, options.dryRun ?? false));
}

/** reconcile for a caller that holds the lock. */
export async function reconcileLocked(host: Host, dryRun: boolean): Promise<ReconcileResult> {
  refuseUnderOldRules(host, 'Cannot reconcile', ['switching']);
  const intent = await readIntent(host);
  const standing = intent.entries.flatMap((e) => mappingsOf(e.file));
  const keep = intent.unreadable.length > 0;
  let view = await observeHost(host, standing, keep);
  const table = tableDifferences(view);
  const record = host.store.readTable();
  if (table.length === 0 && record === undefined) table.push('it is not known what it was loaded for');
  let flushed = 0;
  if (table.length > 0 && !dryRun) {
    if (!view.table.table) await refuseOldRules(host, 'Cannot reconcile', record);
    const bootId = host.processes.bootId();
    const mappings = intent.entries
      .filter((e) => e.verdict !== 'release' && isOfBoot(e.file, bootId))
      .flatMap((e) => (e.verdict === 'keep' ? e.file.mappings : presentMappings(e.file)));
    flushed += await loadTable(host, view.spec, mappings, view.table);
    view = await observeHost(host, standing, keep);
  }
  const links = await seenLinks(host);
  const onLinks = standingAliases(
    intent.entries.filter((e) => e.verdict !== 'release').flatMap((e) => e.file.mappings),
    view.addresses,
  );
  // A link that was away may have missed that another host took an address: nothing is announced again unasked.
  const { goal, changes, probing } = await probedGoal(host, intent, view, itemsOf(againOn(links, onLinks), onLinks));
  const [aliases, contested] = partition(onLinks, ({ address }) => probing.conflictOf(address) === undefined);
  const announced = againOn(links, aliases);
  const releases = intent.entries.filter((entry) => entry.verdict === 'release');
  const errors = [...intent.conflicts, ...ownAddresses(host, view.spec)];
  const warnings = [...intent.warnings];
  for (const { path, why } of intent.unreadable) {
    warnings.push(`${path}: ${why}; nothing unknown is removed while it is there`);
  }
  const decided = new Set<string>(goal.hindered.map(({ mapping }) => mapping.address));
  const undecided = contested.filter(({ address }) => !decided.has(address));
  errors.push(...undecided.flatMap(({ address }) => probing.conflictOf(address) ?? []));
  for (const { mapping, error } of goal.hindered) {
    // A link may be absent at boot; with the host's own address in the way, the network is named once.
    if (error.code === 'host-lacks') warnings.push(`${mapping.guest} <-> ${mapping.address} waits: ${error.why}`);
    else if (!errors.some((known) => known.message === error.message && known.why === error.why)) errors.push(error);
  }
  const left = intent.entries
    .filter((entry) => entry.verdict === 'leave')
    .map((entry) => ({ owner: ownerName(entry.file.owner), why: entry.why }));
  const name = (entry: Entry): string => ownerName(entry.file.owner);
  if (dryRun && table.length === 0) {
    const staying = intent.entries.filter((e) => e.verdict !== 'release').flatMap((e) => mappingsOf(e.file));
    if (isSpare(view.spec, neededSpec(host, staying, view.addresses, keep))) table.push(SPARE);
  }
  if (dryRun) {
    warnings.push(...probing.warnings(new Set()));
    return { changes, table, released: releases.map(name), left, warnings, errors, flushed, announced };
  }

  for (const { file, stored, verdict } of intent.entries) {
    if (verdict === 'release' && file.phase.name !== 'removing') host.store.write(removing(host, file));
    if (verdict === 'keep' && file !== stored) host.store.write(file);
  }
  const outcome = await applyResiliently(host, goal, changes, view.observed, async () => {
    return (await observeHost(host, standing, keep)).observed;
  });
  const isDone = ({ file }: Entry): boolean =>
    !mappingsOf(file).some((m) =>
      [m.guest, m.address].some((key) => outcome.failed.has(key) || goal.untouched.has(key)),
    );
  const finish = (act: () => void): void => {
    try {
      act();
    } catch (error) {
      errors.push(toKvmIbError(error, 'Cannot write the state'));
    }
  };
  for (const entry of intent.entries.filter(isDone)) {
    const { file, verdict } = entry;
    if (verdict === 'release') finish(() => host.store.remove(file.owner));
    if (verdict === 'keep' && (file.phase.name !== 'active' || mappingsOf(file).length > file.mappings.length)) {
      finish(() => host.store.write(activeFile(host, file.owner, file.mappings, file.detachedAliases)));
    } else if (verdict === 'keep' && entry.running && !isOfBoot(file, host.processes.bootId())) {
      finish(() => host.store.write(activeFile(host, file.owner, file.mappings, file.detachedAliases)));
    }
  }
  const loadedFor = { ...view.spec, configured: networksText(host.config.networks) };
  if (table.length === 0 && record !== undefined && printTableRecord(record) !== printTableRecord(loadedFor)) {
    finish(() => host.store.writeTable(loadedFor));
  }
  const { files } = host.store.all();
  if (!keep) finish(() => host.store.repairClaims(files));
  const remaining = files.flatMap(mappingsOf);
  const needed = neededSpec(host, remaining, view.addresses, keep);
  if (isSpare(view.spec, needed)) {
    try {
      const held = files.flatMap(presentMappings);
      flushed += await loadTable(host, needed, held, (await observeHost(host, remaining, keep)).table);
      table.push(SPARE);
    } catch (error) {
      errors.push(toKvmIbError(error, 'Cannot take what has ended out of the table'));
    }
  }
  try {
    const unsettled = contested.filter((item) => undecided.includes(item) || outcome.failed.has(item.address));
    warnings.push(...(await announceAgain(host, links, announced, aliases, unsettled)));
  } catch (error) {
    errors.push(toKvmIbError(error, 'Cannot write the state'));
  }
  return {
    changes,
    table,
    released: releases.filter(isDone).map(name),
    left,
    warnings: [...warnings, ...probing.warnings(outcome.unannounced), ...outcome.warnings],
    errors: [...errors, ...outcome.errors],
    flushed: flushed + outcome.flushed,
    announced,
  };
}

/**
 * The goal and its plan, after the fabric was asked for every address that would be taken: one that answers is left alone.
 * @param standing addresses that are on their link and are to be asked for as well
 */
export async function probedGoal(
  host: Host,
  intent: Intent,
  view: HostView,
  standing: readonly LinkAddress[] = [],
): Promise<{ readonly goal: Goal; readonly changes: readonly Change[]; readonly probing: Probing }> {
  const probing = createProbing(host);
  const goal = goalOf(host, intent, view);
  const changes = plan(goal, view.observed);
  const taken = takenBy(changes);
  await Promise.all([probing.ask(taken), probing.askOthers(standing)]);
  await probing.askFirst(taken);
  const asked = [...taken, ...standing];
  if (!asked.some(({ address }) => probing.conflictOf(address) !== undefined)) return { goal, changes, probing };
  const rest = goalOf(host, intent, view, probing);
  return { goal: rest, changes: plan(rest, view.observed), probing };
}

function partition<T>(all: readonly T[], isFirst: (one: T) => boolean): readonly [readonly T[], readonly T[]] {
  return [all.filter(isFirst), all.filter((one) => !isFirst(one))];
}

/** Why the table is loaded anew although it is as it was loaded. */
const SPARE = 'it serves what only mappings of an older configuration needed, and they have ended';

function isSpare(loaded: TableSpec, needed: TableSpec): boolean {
  return rulesetTag(loaded) !== rulesetTag(needed);
}

/** Why the table must be loaded anew. */
export function tableDifferences(view: HostView): string[] {
  if (!view.table.table) return ['the table ip kvm_ib is not there'];
  return [...view.table.differences];
}

function ownAddresses(host: Host, spec: TableSpec): readonly KvmIbError[] {
  return host.config.networks.flatMap((n) => ownAddressInRange(n, spec.hostAddresses.get(n.name) ?? []) ?? []);
}

interface ResilientOutcome {
  /** Guest and IB addresses of mappings that were not brought right. */
  readonly failed: ReadonlySet<string>;
  readonly flushed: number;
  readonly warnings: readonly string[];
  readonly unannounced: ReadonlySet<string>;
  readonly errors: readonly KvmIbError[];
}

/** All at once; when a step fails, mapping by mapping, so that one that cannot be helped does not hold up the rest. */
async function applyResiliently(
  host: Host,
  goal: Desired,
  changes: readonly Change[],
  observed: Observed,
  look: () => Promise<Observed>,
): Promise<ResilientOutcome> {
  try {
    return { failed: new Set(), errors: [], ...(await apply(host, changes)) };
  } catch (error) {
    // Half of it is in the kernel, so what was observed is not so any more; the next reconcile sees.
    if (error instanceof KvmIbError && error.code === 'reversal-failed') {
      const all = [...goal.want, ...goal.release].flatMap((m) => [m.guest, m.address]);
      return { failed: new Set(all), flushed: 0, warnings: [], unannounced: new Set(), errors: [error] };
    }
  }
  const failed = new Set<string>();
  const errors: KvmIbError[] = [];
  const warnings: string[] = [];
  const unannounced = new Set<string>();
  const touched = new Set<string>();
  // One process repeats all announcements, not one for each mapping.
  const later: RepeatItem[] = [];
  const repeat = async (items: readonly RepeatItem[]): Promise<undefined> => void later.push(...items);
  const collecting = { ...host, announcer: { ...host.announcer, repeat } };
  let flushed = 0;
  let seen = observed;
  const attempt = async (part: Desired, bridges: Observed['bridges']): Promise<void> => {
    const keys = [...part.want, ...part.release].flatMap((m) => [m.guest, m.address]);
    try {
      if (keys.some((key) => touched.has(key))) {
        seen = await look();
        touched.clear();
      }
      const steps = plan(part, { ...seen, bridges });
      for (const key of steps.flatMap(addressesOf)) touched.add(key);
      const applied = await apply(collecting, steps);
      flushed += applied.flushed;
      warnings.push(...applied.warnings);
      for (const address of applied.unannounced) unannounced.add(address);
    } catch (error) {
      errors.push(toKvmIbError(error));
      for (const key of keys) failed.add(key);
    }
  };
  for (const bridge of observed.bridges) await attempt({ want: [], release: [] }, [bridge]);
  const wanted = new Set<string>(goal.want.flatMap((m) => [m.guest, m.address]));
  for (const m of goal.release) {
    if (!wanted.has(m.guest) && !wanted.has(m.address)) await attempt({ want: [], release: [m] }, []);
  }
  for (const m of goal.want) {
    const inItsWay = goal.release.filter((old) => old.guest === m.guest || old.address === m.address);
    await attempt({ want: [m], release: inItsWay }, []);
  }
  warnings.push(...(await repeatLater(host, later)));
  return { failed, flushed, warnings, unannounced, errors };
}

function addressesOf(change: Change): readonly Ipv4[] {
  if (change.kind === 'set-mtu' || change.kind === 'set-hairpin') return [];
  if (change.kind !== 'change-pairs') return [change.guest, change.address];
  return [change.remove, change.add].flatMap((e) => [
    ...[...e.guestToIb, ...e.ibToGuest].flatMap(({ guest, address }) => [guest, address]),
    ...e.macs.map(({ guest }) => guest),
    ...e.unbound,
  ]);
}
