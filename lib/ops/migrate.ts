/**
 * Live migration, seen from both hosts. On the source: what the guest has, its release when the guest runs elsewhere, and
 * its way back. On the destination: the look whether the guest can come, with nothing in the kernel yet, and the moment
 * when it has come.
 *
 * In between the state file is pending and says whether the guest is here: killed at any point, reconcile asks libvirt and
 * brings each host to what it has.
 */
import type { Ipv4 } from '../core/address.ts';
import { KvmIbError, toKvmIbError } from '../core/errors.ts';
import type { Mapping } from '../core/mapping.ts';
import { domainName, ownerName } from '../core/mapping.ts';
import type { Change } from '../core/plan.ts';
import { isEmptyElements, plan } from '../core/plan.ts';
import type { Holder, StateFile } from '../core/state.ts';
import { CLAIM, isElsewhere, mappingsOf } from '../core/state.ts';
import { printHardware } from '../link/arp.ts';
import type { Flow } from '../link/ctnetlink.ts';
import type { LinkAddress } from '../link/ports.ts';
import { ARPHRD } from '../link/ports.ts';
import type { ActionRequest, VmOwner } from './actions.ts';
import { commit, release, undo, viewOf } from './actions.ts';
import type { Flush } from './apply.ts';
import { apply, flushRequests, isFlush, repeatLater } from './apply.ts';
import type { Host } from './host.ts';
import { gatewaysOf, introduce } from './introduce.ts';
import { observeMappings } from './observe.ts';
import type { Probing } from './probe.ts';
import { createProbing } from './probe.ts';
import type { SyncResult } from './sync.ts';
import {
  ensureTable,
  isPending,
  nothingDone,
  pendingBy,
  probeAhead,
  stateFile,
  syncLocked,
  wishFor,
  withDomain,
} from './sync.ts';

/** One IPoIB link of the source, for the destination to compare its own with. */
export interface SourceLink {
  /** Name of the network in the configuration. */
  readonly network: string;
  /** Hardware address, as `ip link` writes it. */
  readonly hardware: string;
  /** Of an IPoIB link the broadcast address, which holds the partition key; null on any other. */
  readonly broadcast: string | null;
  /** Bytes. */
  readonly mtu: number;
}

/** What goes from the source to the destination. */
export interface Departure {
  readonly mappings: readonly Mapping[];
  readonly links: readonly SourceLink[];
}

/**
 * On the source, before the stock script: the file is pending, the kernel is not touched.
 * @returns what the guest has; of a NIC that has nothing here, what it should have
 * @throws KvmIbError `conflict` when another action of this VM is under way
 */
export function depart(host: Host, request: ActionRequest): Promise<SyncResult & { readonly departure: Departure }> {
  const { owner, action, holder } = request;
  return withDomain(host, owner, holder, `${action} ${ownerName(owner)}`, async (domain, file) => {
    refuseUnderWay(host, owner, holder, file);
    const macs = domain.kind === 'active' ? domain.macs : undefined;
    const mappings = wishFor(request.wish.mappings, { ...viewOf(request), keep: () => true }, macs, file);
    if (file !== undefined && mappings.length > 0) {
      const phase = { name: 'pending', action, holder } as const;
      host.store.write({ ...file, phase, previous: file.phase.name === 'pending' ? file.previous : file.mappings });
    }
    return { ...nothingDone(owner), departure: { mappings, links: await linksOf(host, mappings) } };
  });
}

async function linksOf(host: Host, mappings: readonly Mapping[]): Promise<readonly SourceLink[]> {
  const found: SourceLink[] = [];
  for (const [network, device] of new Map(mappings.map((m) => [m.network, m.device]))) {
    const link = await host.links.link(device);
    if (link === undefined) continue;
    const broadcast = link.type === ARPHRD.infiniband ? printHardware(link.broadcast) : null;
    found.push({ network, hardware: printHardware(link.address), broadcast, mtu: link.mtu });
  }
  return found;
}

/**
 * On the source, when the guest has stopped there for good or runs on the destination: alias, pair and flows go, the file
 * stays pending.
 */
export function letGo(host: Host, owner: VmOwner, holder: Holder): Promise<SyncResult> {
  return host.withLock(`release ${ownerName(owner)}`, async () => {
    const file = pendingBy(host.store.read(owner), holder);
    if (file === undefined || isElsewhere(file)) return nothingDone(owner);
    const all = mappingsOf(file);
    const changes = plan({ want: [], release: all }, await observeMappings(host, [], all, file.mappings));
    host.store.write({ ...file, phase: { ...file.phase, elsewhere: true } });
    try {
      const { flushed, warnings } = await apply(host, changes);
      return { owner: ownerName(owner), changes, flushed, warnings };
    } catch (error) {
      host.store.write(file);
      throw error;
    }
  });
}

/** On the source, after the stock script succeeded. What is still here, because the domain is, stays. */
export async function departed(host: Host, request: Omit<ActionRequest, 'wish'>): Promise<SyncResult> {
  const { owner, holder, action } = request;
  if (pendingBy(host.store.read(owner), holder) === undefined) return nothingDone(owner);
  const domain = await host.domains.state(owner.vm);
  return domain.kind === 'active' ? stay(host, owner, holder, action) : release(host, request);
}

/** How long the destination may take to give an address back, in milliseconds. */
const RETURN_MS = 20_000;
const RETRY_MS = 500;

/**
 * On the source, after the stock script failed: the guest has here what it had. It is announced anew in any case, since the
 * destination may have announced it before the migration failed.
 */
export async function stay(host: Host, owner: VmOwner, holder: Holder, action: string): Promise<SyncResult> {
  const stood = host.store.read(owner);
  const end = performance.now() + RETURN_MS;
  for (;;) {
    try {
      const result = await undo(host, owner, holder, action);
      const warnings = stood === undefined ? [] : await announceStanding(host, host.store.read(owner), result);
      return { ...result, warnings: [...result.warnings, ...warnings] };
    } catch (error) {
      // The destination still answers for it.
      if (toKvmIbError(error).code !== 'conflict' || performance.now() > end) throw error;
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
}

/** Aliases that the plan found in their place were not announced by it. */
async function announceStanding(host: Host, file: StateFile | undefined, done: SyncResult): Promise<readonly string[]> {
  const announced = new Set(done.changes.flatMap((change) => (change.kind === 'announce' ? [change.address] : [])));
  const items = (file?.mappings ?? []).filter((m) => !announced.has(m.address));
  if (items.length === 0) return [];
  await host.announcer.announce(items);
  return repeatLater(host, items);
}

/** What the destination is asked. */
export interface Arrival {
  readonly owner: VmOwner;
  readonly action: string;
  /** The process that waits for the guest. */
  readonly holder: Holder;
  /** As the configuration of this host has them. */
  readonly mappings: readonly Mapping[];
  /** IB addresses that the source has for the guests where they go by the place in the range. */
  readonly expected: ReadonlyMap<Ipv4, Ipv4>;
  /** Empty: there is no source that still has them. */
  readonly links: readonly SourceLink[];
  /** True: it may be started here, or come from another host, and nobody says which. */
  readonly isUnannounced?: boolean;
}

/**
 * On the destination, before the guest moves: whether it can come. Claims the addresses in a pending file, loads the table
 * if it is not there, and leaves the kernel as it is otherwise: a guest of this host that has connections to the one that comes goes on
 * talking to the source.
 * @throws KvmIbError `conflict`, `host-lacks` or `out-of-range`, with what to do
 */
export async function expect(host: Host, arrival: Arrival): Promise<Expected> {
  const { owner, action, holder, mappings, links } = arrival;
  refuseOtherNetwork(arrival);
  await refuseUnfitLinks(host, arrival);
  const gateways = await gatewaysOf(host, mappings);
  const except = links.map(({ hardware }) => hardware);
  const probing = createProbing(host, except);
  await probeAhead(host, mappings, probing);
  return withDomain(host, owner, holder, `${action} ${ownerName(owner)}`, async (domain, file) => {
    if (domain.kind === 'unknown') {
      throw new KvmIbError('host-lacks', `Cannot take in VM ${owner.vm}`, {
        why: 'libvirt does not answer on this host',
        fix: 'look at it there: virsh -c qemu:///system list',
      });
    }
    refuseUnderWay(host, owner, holder, file);
    if (domain.kind === 'active') {
      throw new KvmIbError('conflict', `Cannot take in VM ${owner.vm}`, {
        why: `${domainName(owner.vm)} is active on this host already`,
        fix: `look at it there: virsh -c qemu:///system domstate --reason ${domainName(owner.vm)}`,
      });
    }
    // Left from a stay that no action ended.
    if (file !== undefined) await syncLocked(host, { owner, wish: [], action, holder });
    await ensureTable(host, mappings, []);
    // One that comes from another host is answered for there until it has come.
    const asked = arrival.isUnannounced ? { ...probing, refuse: () => undefined } : probing;
    const wished = { owner, wish: mappings, action, holder, dryRun: true };
    const { changes, warnings } = await syncLocked(host, wished, asked);
    const phase = { name: 'pending', action, holder, elsewhere: true } as const;
    host.store.write(stateFile(host, owner, phase, mappings));
    const answered = mappings.flatMap((m) => probing.conflictOf(m.address) ?? []).at(0);
    return { ...nothingDone(owner, ...warnings), planned: changes, gateways, answered };
  });
}

export interface Expected extends SyncResult {
  /** What it takes to put the mappings into the kernel, as it is now. */
  readonly planned: readonly Change[];
  /** The addresses of the bridges that the guest comes to. */
  readonly gateways: readonly LinkAddress[];
  /** Another host answers for one of its addresses: that of an unannounced guest which it comes from, or a second owner. */
  readonly answered: KvmIbError | undefined;
}

/** Networks are the same when they have the same name and give the guest the same address. */
function refuseOtherNetwork({ owner, mappings, expected }: Arrival): void {
  for (const { guest, address, network } of mappings) {
    const there = expected.get(guest);
    if (there === undefined || there === address) continue;
    throw new KvmIbError('conflict', `Cannot take in VM ${owner.vm}`, {
      why: `its guest ${guest} has ${there} on the source, and network ${network} of this host would give it ${address}`,
      fix: 'make the networks in /etc/kvm-ib/kvm-ib.yaml the same on both hosts',
    });
  }
}

async function refuseUnfitLinks(host: Host, { owner, mappings, links }: Arrival): Promise<void> {
  const refuse = (why: string, fix: string): KvmIbError =>
    new KvmIbError('conflict', `Cannot take in VM ${owner.vm}`, { why, fix });
  for (const { network, device } of mappings) {
    const there = links.find((link) => link.network === network);
    if (links.length === 0) continue;
    if (there === undefined) {
      throw refuse(
        `its address is of network ${network} on this host, and of another one on the source`,
        'give the network the same name in /etc/kvm-ib/kvm-ib.yaml on both hosts',
      );
    }
    const link = await host.links.link(device);
    if (link === undefined) {
      throw new KvmIbError('host-lacks', `Cannot take in VM ${owner.vm}`, {
        why: `this host has no link ${device}`,
        fix: `bring the IPoIB link up (ip link show ${device}), or correct \`device\` in the configuration`,
      });
    }
    if (link.mtu < there.mtu) {
      throw refuse(
        `${device} has an MTU of ${link.mtu} on this host, and the link of the source ${there.mtu}: its connections would stall`,
        `raise it there (ip link set ${device} mtu ${there.mtu}; beyond 4092 the IPoIB link must be in connected mode), or migrate without --live`,
      );
    }
    const broadcast = link.type === ARPHRD.infiniband ? printHardware(link.broadcast) : null;
    if (there.broadcast !== null && broadcast !== null && there.broadcast !== broadcast) {
      throw refuse(
        `${device} is in another partition (broadcast address ${broadcast}) than the link of the source (${there.broadcast})`,
        `use links with the same P_Key for network ${network}`,
      );
    }
  }
}

function refuseUnderWay(host: Host, owner: VmOwner, holder: Holder, file: StateFile | undefined): void {
  if (!isPending(file) || pendingBy(file, holder) !== undefined || !host.processes.isAlive(file.phase.holder)) return;
  if (file.phase.action === CLAIM) return;
  throw new KvmIbError('conflict', `Cannot migrate VM ${owner.vm}`, {
    why: `its ${file.phase.action} is under way on this host`,
    fix: 'wait until it has ended, then try again',
  });
}

/** The source answers until it has let go, and knows; everybody else was asked by `expect`. */
const NOT_ASKED: Probing = {
  ask: async () => undefined,
  conflictOf: () => undefined,
  refuse: () => undefined,
  warnings: () => [],
  spent: () => 0,
};

/**
 * On the destination, when the guest runs here: with nothing looked up any more, since every millisecond is one of silence.
 *
 * A packet of the guest's that meets an old entry of the same connection, without translation or with that of another host, is
 * given another port by the kernel, and its peer resets. So none passes before these are gone: on the source, which has
 * let go by then, and here, where the guest's MAC comes last (a mapped address with another MAC is dropped).
 *
 * `complete` follows. The file stays pending, and `elsewhere` until then: whoever finds it so finds out from libvirt, and from
 * the kernel what is there already.
 */
export interface CutOver {
  /** Looks for connections of this host and its guests to the one that comes. Last when the source has let go: then no new one is made. */
  refresh(): Promise<void>;
  /** Tells the guest the bridge's hardware address: it runs already, and its packets are lost until it knows. */
  greet(): Promise<void>;
  run(): Promise<SyncResult>;
}

export function cutOver(host: Host, arrival: Arrival, { planned, gateways }: Expected): CutOver {
  const { owner, action, holder } = arrival;
  const pairs = planned.filter((change) => change.kind === 'change-pairs');
  const aliases = planned.filter((change) => change.kind === 'add-alias' || change.kind === 'announce');
  // Something has to go first, as what a VM left that has ended.
  const isPlain = planned.every((change) => PLAIN.has(change.kind) && !isRemoving(change));
  const foreign = flushRequests(host, planned.filter(isFlush));
  let stale: readonly Flow[] = [];
  return {
    refresh: async () => {
      stale = await host.conntrack.find(foreign);
    },
    greet: async () => {
      await host.announcer.announce(gateways);
    },
    run: async () => {
      if (!isPlain) return takeOver(host, arrival);
      return host.withLock(`${action} ${ownerName(owner)}`, async () => {
        if (!isElsewhere(pendingBy(host.store.read(owner), holder))) return nothingDone(owner);
        await apply(host, pairs.map(withoutMacs));
        const flushed = await host.conntrack.remove(stale);
        const [{ warnings }] = await Promise.all([apply(host, aliases), apply(host, pairs.flatMap(macsAlone))]);
        return { ...nothingDone(owner, ...warnings), changes: [...pairs, ...aliases], flushed };
      });
    },
  };
}

type PairsChange = Extract<Change, { kind: 'change-pairs' }>;

function withoutMacs(change: PairsChange): PairsChange {
  return { ...change, add: { ...change.add, macs: [] } };
}

function macsAlone(change: PairsChange): readonly PairsChange[] {
  const { macs } = change.add;
  const none = { guestToIb: [], ibToGuest: [], macs: [], unbound: [] };
  return macs.length === 0 ? [] : [{ ...change, remove: none, add: { ...none, macs }, comments: {} }];
}

const PLAIN = new Set<Change['kind']>([
  'change-pairs',
  'flush-foreign',
  'set-mtu',
  'set-hairpin',
  'add-alias',
  'announce',
]);

function isRemoving(change: Change): boolean {
  return change.kind === 'change-pairs' && !isEmptyElements(change.remove);
}

/** After the cut-over: what it left out, and the file, which is pending then like that of any action. */
export async function complete(host: Host, arrival: Arrival, { gateways, planned }: Expected): Promise<SyncResult> {
  const result = await takeOver(host, arrival, planned.filter(isFlush));
  await introduce(host, arrival.mappings, gateways);
  return result;
}

function takeOver(
  host: Host,
  { owner, action, holder, mappings }: Arrival,
  flushes: readonly Flush[] = [],
): Promise<SyncResult> {
  return host.withLock(`${action} ${ownerName(owner)}`, async () => {
    const file = pendingBy(host.store.read(owner), holder);
    if (file === undefined || !isElsewhere(file)) return nothingDone(owner);
    await apply(host, flushes);
    return syncLocked(host, { owner, wish: mappings, action, holder, pending: true }, NOT_ASKED);
  });
}

/**
 * On the destination, when an unannounced guest runs here.
 * @throws KvmIbError `conflict` when it came from nowhere, and another host has its address all the same
 */
export async function refuseSecondOwner(host: Host, { owner }: Arrival, { answered }: Expected): Promise<void> {
  if (answered !== undefined && (await host.domains.cameBy(owner.vm)) !== 'migration') throw answered;
}

/** On the destination: the guest runs here, and cannot have its addresses. */
export function giveUp(host: Host, { owner, holder, action }: Arrival): Promise<SyncResult> {
  return host.withLock(`${action} ${ownerName(owner)}`, async () => {
    const own = pendingBy(host.store.read(owner), holder);
    return own === undefined ? nothingDone(owner) : syncLocked(host, { owner, wish: [], action, holder });
  });
}

/** On the destination, after the stock script succeeded. */
export async function arrived(host: Host, arrival: Arrival, { gateways }: Expected): Promise<SyncResult> {
  const taken = await takeOver(host, arrival);
  if (taken.changes.length > 0) await introduce(host, arrival.mappings, gateways);
  const done = await commit(host, arrival.owner, arrival.holder);
  return {
    ...done,
    changes: [...taken.changes, ...done.changes],
    flushed: taken.flushed + done.flushed,
    warnings: [...taken.warnings, ...done.warnings],
  };
}

/** On the destination, after the stock script failed: as before, unless the domain runs here in spite of it. */
export function notArrived(host: Host, { owner, holder, action }: Arrival): Promise<SyncResult> {
  return undo(host, owner, holder, action);
}
