/**
 * reconcile: make the kernel equal to the files, and end what no driver action ends: guests that powered themselves off,
 * crashed, or whose host was lost. It runs at boot, after a firewall reload and on a timer.
 */
import type { Ipv4, LinkName } from '../core/address.ts';
import { rangeContains } from '../core/address.ts';
import { resolveMapping } from '../core/config.ts';
import type { KvmIbError } from '../core/errors.ts';
import { toKvmIbError } from '../core/errors.ts';
import type { Mapping, Owner } from '../core/mapping.ts';
import { ownerName } from '../core/mapping.ts';
import type { Change, Observed } from '../core/plan.ts';
import { plan } from '../core/plan.ts';
import type { StateFile, Verdict } from '../core/state.ts';
import { mappingsOf, verdictOf } from '../core/state.ts';
import { apply } from './apply.ts';
import type { Host } from './host.ts';
import { domainName } from './host.ts';
import type { HostView } from './observe.ts';
import { observeHost, ownAddressInRange, pairOf } from './observe.ts';
import { distinctPairs, stateFile } from './sync.ts';

export interface ReconcileResult {
  /** What was done, or with `dryRun` what would be. */
  readonly changes: readonly Change[];
  /** Why the table was loaded anew; empty when it was left. */
  readonly table: readonly string[];
  /** Owners whose mappings were released. */
  readonly released: readonly string[];
  /** Owners left alone, with the reason. */
  readonly left: readonly { readonly owner: string; readonly why: string }[];
  readonly warnings: readonly string[];
  /** What could not be brought right. The rest was. */
  readonly errors: readonly KvmIbError[];
  readonly flushed: number;
}

/** What each file means, and with it what the kernel should hold. Shared by reconcile and status. */
export interface Intent {
  readonly entries: readonly { readonly file: StateFile; readonly verdict: Verdict; readonly why: string }[];
  readonly want: readonly Mapping[];
  readonly release: readonly Mapping[];
  /** Guest and IB addresses that an action is at work on: neither wanted nor stray. */
  readonly left: ReadonlySet<Ipv4>;
  readonly unreadable: readonly { readonly path: string; readonly why: string }[];
  readonly warnings: readonly string[];
}

/** Reads the files, asks libvirt once, and decides. Static mappings of the configuration count as files. */
export async function readIntent(host: Host): Promise<Intent> {
  const { files: stored, unreadable } = host.store.all();
  const files = withStatics(host, stored);
  const warnings: string[] = [];
  const vmFiles = files.filter((file) => file.owner.kind === 'vm');
  const active = vmFiles.length > 0 ? await host.domains.active() : new Set<string>();
  if (active === undefined) {
    warnings.push('libvirt does not answer: no mapping of a VM is released until it does');
  }
  const entries = files.map((file) => {
    const alive = file.phase.name === 'pending' && host.processes.isAlive(file.phase.holder);
    const running = file.owner.kind === 'vm' ? active?.has(domainName(file.owner.vm)) : undefined;
    const gone = file.owner.kind === 'static' && !isConfigured(host, file.owner);
    const verdict = gone ? 'release' : verdictOf(file, alive, active === undefined ? undefined : (running ?? false));
    return {
      file,
      verdict,
      why: gone ? 'it is no longer under `static` in the configuration' : reason(file, verdict, alive),
    };
  });
  const of = (verdict: Verdict): readonly StateFile[] =>
    entries.filter((e) => e.verdict === verdict).map((e) => e.file);
  const want = of('keep').flatMap((file) => file.mappings);
  const kept = distinctPairs(want);
  for (const m of want) {
    if (!kept.includes(m))
      warnings.push(`${m.guest} <-> ${m.address} (${m.label}) is claimed twice; the first claim stands`);
  }
  const dropped = of('keep').flatMap((file) => mappingsOf(file).filter((m) => !file.mappings.includes(m)));
  return {
    entries,
    want: kept,
    release: [...of('release').flatMap(mappingsOf), ...dropped],
    left: new Set(of('leave').flatMap((file) => mappingsOf(file).flatMap((m) => [m.guest, m.address]))),
    unreadable,
    warnings,
  };
}

function reason(file: StateFile, verdict: Verdict, holderAlive: boolean): string {
  if (file.phase.name === 'removing') return 'its removal was not finished';
  if (verdict === 'leave')
    return holderAlive ? 'its action is under way' : 'its action ended half-way, and libvirt does not answer';
  if (verdict === 'release' && file.owner.kind === 'vm') return `${domainName(file.owner.vm)} is not active`;
  return 'it is wanted';
}

function isConfigured(host: Host, owner: Extract<Owner, { kind: 'static' }>): boolean {
  return host.config.static.some((entry) => entry.guest === owner.guest);
}

/** The stored files, with those of the static mappings made or brought up to date with the configuration. */
function withStatics(host: Host, stored: readonly StateFile[]): readonly StateFile[] {
  const byName = new Map(stored.map((file) => [ownerName(file.owner), file]));
  for (const { guest, address } of host.config.static) {
    const owner: Owner = { kind: 'static', guest };
    const mapping = resolveMapping(host.config, { guest, address, mac: null, vm: null, nic: null });
    const known = byName.get(ownerName(owner));
    const same = known?.phase.name === 'active' && known.mappings[0]?.address === address;
    if (!same) byName.set(ownerName(owner), stateFile(host, owner, { name: 'active' }, [mapping], mappingsOf(known)));
  }
  return [...byName.values()];
}

/** @throws KvmIbError when not even the look at the kernel or the files succeeded; else errors are in the result */
export function reconcile(host: Host, options: { readonly dryRun?: boolean } = {}): Promise<ReconcileResult> {
  return host.withLock('reconcile', () => reconcileLocked(host, options.dryRun ?? false));
}

async function reconcileLocked(host: Host, dryRun: boolean): Promise<ReconcileResult> {
  const intent = await readIntent(host);
  let view = await observeHost(host);
  const errors: KvmIbError[] = [];
  const unusable = unusableNetworks(host, view, errors);
  const usable = (m: Mapping): boolean => !unusable.has(m.network);
  const want = intent.want.filter(usable);

  const table = tableDifferences(view);
  const missing = plan({ want, release: [] }, view.observed).filter((change) => change.kind === 'flush-foreign');
  if (table.length > 0 && !dryRun) {
    const keep = distinctPairs([
      ...intent.want,
      ...intent.entries.filter((e) => e.verdict === 'leave').flatMap((e) => e.file.mappings),
    ]);
    // What is to be released keeps its pair until its alias is off: the plan below sees to that order.
    const going = distinctPairs([
      ...keep,
      ...intent.release.filter((m) => view.observed.guestToIb.get(m.guest) === m.address),
    ]);
    await host.nat.load(view.spec, going.map(pairOf));
    view = await observeHost(host);
  }
  const strays = intent.unreadable.length > 0 ? [] : strayPairs(host, intent, view.observed);
  const release = [...intent.release, ...strays];
  // Loading the table brought missing pairs back as well: flows that began without them go on without them.
  const again = table.length > 0 && !dryRun ? missing : [];
  const changes = [...again, ...plan({ want, release }, view.observed)];
  const summary = {
    changes,
    table,
    released: intent.entries.filter((e) => e.verdict === 'release').map((e) => ownerName(e.file.owner)),
    left: intent.entries
      .filter((e) => e.verdict === 'leave')
      .map((e) => ({ owner: ownerName(e.file.owner), why: e.why })),
    warnings: [
      ...intent.warnings,
      ...intent.unreadable.map((u) => `${u.path}: ${u.why}; nothing unknown is removed while it is there`),
    ],
  };
  if (dryRun) return { ...summary, errors, flushed: 0 };

  host.store.writeTable({ hostAddresses: view.spec.hostAddresses });
  writeFiles(host, intent, 'before');
  const outcome = await applyResiliently(host, { want, release }, changes, view.observed, errors);
  const failedOwners = outcome.failed;
  writeFiles(host, intent, 'after', failedOwners, usable);
  if (intent.unreadable.length === 0) host.store.repairClaims(host.store.all().files);
  return { ...summary, warnings: [...summary.warnings, ...outcome.warnings], errors, flushed: outcome.flushed };
}

/** Why the table must be loaded anew. */
export function tableDifferences(view: HostView): readonly string[] {
  if (!view.table.table) return ['the table ip kvm_ib is not there'];
  return view.table.differences;
}

function unusableNetworks(host: Host, view: HostView, errors: KvmIbError[]): ReadonlySet<string> {
  const unusable = new Set<string>();
  for (const network of host.config.networks) {
    const own = ownAddressInRange(network, view.spec.hostAddresses.get(network.name) ?? []);
    if (own !== undefined) errors.push(own);
    const bridge = view.observed.bridges.find((b) => b.bridge === network.bridge);
    // A missing bridge is normal before libvirt starts its network; without the link there is nowhere to put an alias.
    if (own !== undefined || bridge?.deviceMtu === null) unusable.add(network.name);
  }
  return unusable;
}

/** Pairs in our table that no file knows. The table is ours alone, so they go. */
function strayPairs(host: Host, intent: Intent, observed: Observed): readonly Mapping[] {
  const known = new Set<string>(intent.left);
  for (const m of [...intent.want, ...intent.release]) known.add(m.guest).add(m.address);
  const macs = new Map([...observed.macs].map((entry) => entry.split(' ') as [Ipv4, Mapping['mac']]));
  const stray = (guest: Ipv4, address: Ipv4): Mapping => {
    const network = host.config.networks.find((n) => rangeContains(n.addresses, address));
    return {
      network: network?.name ?? '',
      device: network?.device ?? ('lo' as LinkName),
      bridge: network?.bridge ?? ('lo' as LinkName),
      guest,
      address,
      mac: macs.get(guest) ?? null,
      vm: null,
      nic: null,
      // No label: an alias is ours by file and label, and there is no file.
      label: '',
    };
  };
  const found: Mapping[] = [];
  for (const [guest, address] of observed.guestToIb) if (!known.has(guest)) found.push(stray(guest, address));
  for (const [address, guest] of observed.ibToGuest) if (!known.has(address)) found.push(stray(guest, address));
  const none = '0.0.0.0' as Ipv4;
  for (const guest of [...macs.keys(), ...observed.unbound]) {
    if (!known.has(guest) && !observed.guestToIb.has(guest)) found.push(stray(guest, none));
  }
  return found;
}

interface ResilientOutcome {
  readonly failed: ReadonlySet<string>;
  readonly flushed: number;
  readonly warnings: readonly string[];
}

/** All at once; when a step fails, mapping by mapping, so that one that cannot be helped does not hold up the rest. */
async function applyResiliently(
  host: Host,
  desired: { want: readonly Mapping[]; release: readonly Mapping[] },
  changes: readonly Change[],
  observed: Observed,
  errors: KvmIbError[],
): Promise<ResilientOutcome> {
  const failed = new Set<string>();
  try {
    return { failed, ...(await apply(host, changes)) };
  } catch (error) {
    if (desired.want.length + desired.release.length <= 1) {
      errors.push(toKvmIbError(error));
      for (const m of [...desired.want, ...desired.release]) failed.add(m.guest);
      return { failed, flushed: 0, warnings: [] };
    }
  }
  let flushed = 0;
  const warnings: string[] = [];
  const single = async (part: { want: readonly Mapping[]; release: readonly Mapping[] }): Promise<void> => {
    try {
      const applied = await apply(host, plan(part, observed));
      flushed += applied.flushed;
      warnings.push(...applied.warnings);
    } catch (error) {
      errors.push(toKvmIbError(error));
      for (const m of [...part.want, ...part.release]) failed.add(m.guest);
    }
  };
  const wanted = new Set<string>(desired.want.flatMap((m) => [m.guest, m.address]));
  for (const m of desired.release)
    if (!wanted.has(m.guest) && !wanted.has(m.address)) await single({ want: [], release: [m] });
  for (const m of desired.want) {
    const inItsWay = desired.release.filter((old) => old.guest === m.guest || old.address === m.address);
    await single({ want: [m], release: inItsWay });
  }
  return { failed, flushed, warnings };
}

function writeFiles(
  host: Host,
  intent: Intent,
  when: 'before' | 'after',
  failed: ReadonlySet<string> = new Set(),
  usable: (m: Mapping) => boolean = () => true,
): void {
  for (const { file, verdict } of intent.entries) {
    const clean = !mappingsOf(file).some((m) => failed.has(m.guest) || !usable(m));
    if (verdict === 'release') {
      if (when === 'before' && file.phase.name !== 'removing') {
        host.store.write({
          ...file,
          phase: { name: 'removing' },
          mappings: mappingsOf(file),
          previous: [],
          updated: host.now(),
        });
      }
      if (when === 'after' && !mappingsOf(file).some((m) => failed.has(m.guest))) host.store.remove(file.owner);
    }
    if (verdict !== 'keep') continue;
    const stored = when === 'before' && file.owner.kind === 'static' ? host.store.read(file.owner) : file;
    if (when === 'before' && stored === undefined) host.store.write(file);
    if (when === 'after' && clean && (file.phase.name !== 'active' || file.previous.length > 0)) {
      host.store.write({ ...file, phase: { name: 'active' }, previous: [], updated: host.now() });
    }
  }
}
