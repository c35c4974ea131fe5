/**
 * What the actions of OpenNebula come to, in steps of `sync`: most begin before the stock script and end with its verdict.
 * Between the two the state file is pending, so that reconcile, other actions and whoever comes after a crash know.
 *
 * Where the domain is there, what libvirt says of it counts for more than what OpenNebula says.
 */
import type { Ipv4 } from '../core/address.ts';
import type { Mapping, Owner } from '../core/mapping.ts';
import { domainName, ownerName, sameMapping } from '../core/mapping.ts';
import type { ObservedBridge } from '../core/plan.ts';
import { plan } from '../core/plan.ts';
import type { DomainState, Holder, StateFile, VmWish } from '../core/state.ts';
import { CLAIM, mappingsOf, wishOfDomain } from '../core/state.ts';
import { apply } from './apply.ts';
import type { Host } from './host.ts';
import { gatewaysOf, introduce } from './introduce.ts';
import { observeBridge, observeMappings } from './observe.ts';
import { createProbing } from './probe.ts';
import type { DomainView, PendingFile, SyncRequest, SyncResult } from './sync.ts';
import {
  activeFile,
  isPending,
  nothingDone,
  pendingBy,
  probeAhead,
  sync,
  syncLocked,
  wishFor,
  withDomain,
} from './sync.ts';

export type VmOwner = Extract<Owner, { kind: 'vm' }>;

export interface ActionRequest {
  readonly owner: VmOwner;
  /** `deploy`, `attach_nic`, … */
  readonly action: string;
  /** The process that the outcome depends on. */
  readonly holder: Holder;
  readonly wish: VmWish;
  /** Whether a mapping that the VM has stays as it is, whatever the wish says of that NIC. */
  readonly keep?: (held: Mapping) => boolean;
  /** NIC numbers of aliases that this action detaches. */
  readonly detachedAliases?: readonly number[];
}

/**
 * Before the stock script starts the domain: the kernel holds the wish, the file is pending.
 * @param except hardware addresses of hosts that may still have the addresses, as `ip link` writes them
 */
export function start(host: Host, request: ActionRequest, except: readonly string[] = []): Promise<SyncResult> {
  return sync(host, { ...plain(request), pending: true, except });
}

/** Before the stock script changes a running domain: as `start`, for the NICs that it has and those that are attached. */
export function prepare(host: Host, request: ActionRequest): Promise<SyncResult> {
  return sync(host, { ...plain(request), domain: viewOf(request), pending: true });
}

/** What `prepare` would do. @throws KvmIbError as `sync` would */
export function check(host: Host, request: ActionRequest): Promise<SyncResult> {
  return sync(host, { ...plain(request), domain: viewOf(request), dryRun: true });
}

/** After the stock script changed a running domain. */
export function follow(host: Host, request: ActionRequest): Promise<SyncResult> {
  return sync(host, { ...plain(request), domain: viewOf(request) });
}

/**
 * Before the stock script takes NICs from a running domain: the file is pending, the kernel is not touched. Should nobody
 * bring the verdict, reconcile asks the domain.
 */
export function mark(host: Host, { owner, action, holder }: ActionRequest): Promise<SyncResult> {
  return host.withLock(`${action} ${ownerName(owner)}`, async () => {
    const file = host.store.read(owner);
    if (file !== undefined && file.phase.name !== 'removing') {
      const previous = file.phase.name === 'pending' ? file.previous : file.mappings;
      const phase = { name: 'pending', action, holder } as const;
      host.store.write({ ...file, phase, previous, updated: host.now() });
    }
    return nothingDone(owner);
  });
}

/** After `mark`, when the stock script succeeded: what the domain has now; nothing, when it has gone. */
export function finish(host: Host, request: ActionRequest): Promise<SyncResult> {
  const { owner, action, holder } = request;
  return withDomain(host, owner, holder, `finish ${action} of ${ownerName(owner)}`, async (domain, file) => {
    // Another action began meanwhile, and brings it right.
    if (otherUnderWay(host, file, holder)) return nothingDone(owner);
    if (domain.kind === 'inactive') return syncLocked(host, { owner, wish: [], action, holder });
    const macs = domain.kind === 'active' ? domain.macs : undefined;
    const wish = (prior: StateFile | undefined) => wishFor(request.wish.mappings, viewOf(request), macs, prior);
    return syncLocked(host, { ...plain(request), wish });
  });
}

/**
 * After `start` or `prepare`, when the stock script succeeded: the file becomes active.
 * @param wish what the action mapped: taken up again when its file is gone but the domain is there, as after a
 *   `kvm-ib remove` that came in between
 */
export async function commit(
  host: Host,
  owner: VmOwner,
  holder: Holder,
  wish: readonly Mapping[] = [],
): Promise<SyncResult> {
  let greeted: readonly Mapping[] = [];
  const result = await host.withLock(`commit ${ownerName(owner)}`, async () => {
    const file = host.store.read(owner);
    const own = pendingBy(file, holder);
    if (own !== undefined) {
      // It may have been saved on another host. The lock is not held for it.
      if (own.phase.action === 'restore' || own.phase.action === CLAIM) greeted = own.mappings;
      const isGone = own.phase.overtaken === true && (await host.domains.state(owner.vm)).kind === 'inactive';
      return isGone ? syncLocked(host, { owner, wish: [], action: 'commit', holder }) : activate(host, own);
    }
    const other = otherUnderWay(host, file, holder);
    if (other !== undefined) {
      // Another action of this VM took over. Should that one fail, this is what it goes back to.
      if (wish.length > 0) host.store.write({ ...other, previous: wish });
      return nothingDone(owner);
    }
    if (file !== undefined) return nothingDone(owner);
    if (wish.length === 0) return tendBridges(host, owner);
    const isActive = (await host.domains.state(owner.vm)).kind === 'active';
    return isActive ? syncLocked(host, { owner, wish, action: 'commit', holder }) : nothingDone(owner);
  });
  await greet(host, owner, greeted);
  return result;
}

/** The bridges introduce themselves to a guest that has come with its memory. */
async function greet(host: Host, { vm }: VmOwner, mappings: readonly Mapping[]): Promise<void> {
  if (mappings.length === 0 || (await host.domains.cameBy(vm)) === 'boot') return;
  await introduce(host, mappings, await gatewaysOf(host, mappings));
}

/** A VM without a mapping, as one whose only NIC has IB_IP=none, has no file; but its taps are ports of our bridges. */
async function tendBridges(host: Host, owner: VmOwner): Promise<SyncResult> {
  const bridges: ObservedBridge[] = [];
  for (const { bridge, device } of host.config.networks) bridges.push(await observeBridge(host, bridge, device));
  const none = { guestToIb: new Map(), ibToGuest: new Map(), macs: new Set<string>(), unbound: new Set<Ipv4>() };
  const changes = plan({ want: [], release: [] }, { ...none, aliases: [], bridges });
  const { flushed, warnings } = await apply(host, changes);
  return { owner: ownerName(owner), changes, flushed, warnings };
}

async function activate(host: Host, file: StateFile): Promise<SyncResult> {
  const { owner, mappings } = file;
  // The taps exist only now: the action's own sync could not see them.
  const observed = await observeMappings(host, mappings, [], mappings);
  const changes = plan({ want: mappings, release: [] }, observed);
  const { flushed, warnings } = await apply(host, changes, () =>
    host.store.write(activeFile(host, owner, mappings, file.detachedAliases)),
  );
  return { owner: ownerName(owner), changes, flushed, warnings };
}

/**
 * After `start`, `prepare` or `mark`, when the stock script failed: back to what the owner had before, as far as the domain
 * still has it. What the domain has in spite of the failure, as when a late step of the script failed, stays mapped. Nothing is
 * done when another action took over.
 */
export function undo(host: Host, owner: VmOwner, holder: Holder, action: string): Promise<SyncResult> {
  return withDomain(host, owner, holder, `undo ${ownerName(owner)}`, async (domain, stored) => {
    const file = pendingBy(stored, holder);
    if (file === undefined) return nothingDone(owner);
    const wish = wishAfterFailure(file, domain);
    const result = await syncLocked(host, { owner, wish, action: `undo ${action}`, holder });
    const stays = wish.filter((m) => !file.previous.some((old) => sameMapping(m, old)));
    if (stays.length === 0) return result;
    const pairs = stays.map((m) => `${m.guest} <-> ${m.address}`).join(', ');
    const warning = `${action} failed, but the domain of ${ownerName(owner)} is active and has ${pairs}: that stays`;
    return { ...result, warnings: [...result.warnings, warning] };
  });
}

function wishAfterFailure(file: StateFile, domain: DomainState): readonly Mapping[] {
  const { mappings, previous } = file;
  switch (domain.kind) {
    case 'unknown':
      return previous;
    case 'inactive':
      return [];
    case 'active':
      if (domain.macs !== undefined) {
        return wishOfDomain({ mappings: previous, unmapped: [], attaching: [] }, mappingsOf(file), domain.macs);
      }
      return previous.length > 0 ? previous : mappings;
  }
}

/**
 * After the stock script ended the domain: nothing is mapped any more. A pending action of the same VM that is under way
 * decides by itself at its end, and is told to look; and where the domain is active, because the VM was deployed anew
 * meanwhile, nothing is released.
 */
export function release(host: Host, { owner, action, holder }: Omit<ActionRequest, 'wish'>): Promise<SyncResult> {
  return withDomain(host, owner, holder, `${action} ${ownerName(owner)}`, async (domain, file) => {
    const other = otherUnderWay(host, file, holder);
    if (other !== undefined) {
      host.store.write({ ...other, phase: { ...other.phase, overtaken: true } });
      return nothingDone(owner, `${other.phase.action} of ${ownerName(owner)} is under way and decides at its end`);
    }
    if (domain.kind === 'active') {
      return nothingDone(owner, `${domainName(owner.vm)} is active: its mappings stay`);
    }
    return syncLocked(host, { owner, wish: [], action, holder });
  });
}

/** Releases a VM whose domain is not active, and nothing else: for state hooks, and after a stock script that failed. */
export function settle(host: Host, owner: VmOwner, holder: Holder): Promise<SyncResult> {
  return withDomain(host, owner, holder, `settle ${ownerName(owner)}`, async (domain, file) => {
    if (file === undefined) return nothingDone(owner);
    if (domain.kind === 'unknown') {
      return nothingDone(owner, `libvirt does not answer: ${ownerName(owner)} is left to reconcile`);
    }
    if (domain.kind === 'active' || otherUnderWay(host, file, holder)) return nothingDone(owner);
    return syncLocked(host, { owner, wish: [], action: 'settle', holder });
  });
}

/**
 * After a step of which only the domain tells what came of it, as the network driver sees them all: what the domain has, and
 * nothing where there is none. An action that is under way decides by itself at its end.
 */
export async function outcome(host: Host, request: ActionRequest): Promise<SyncResult> {
  const { owner, action, holder, wish } = request;
  const probing = createProbing(host);
  await probeAhead(host, wish.mappings, probing);
  let greeted: readonly Mapping[] = [];
  const result = await withDomain(host, owner, holder, `${action} ${ownerName(owner)}`, async (domain, file) => {
    const other = otherUnderWay(host, file, holder);
    if (other !== undefined && other.phase.action !== CLAIM) {
      if (domain.kind === 'inactive') host.store.write({ ...other, phase: { ...other.phase, overtaken: true } });
      return nothingDone(owner, `${other.phase.action} of ${ownerName(owner)} is under way and decides at its end`);
    }
    switch (domain.kind) {
      case 'unknown':
        return nothingDone(owner, `libvirt does not answer: ${ownerName(owner)} is left to reconcile`);
      case 'inactive':
        return syncLocked(host, { owner, wish: [], action, holder });
      case 'active': {
        if (file === undefined && wish.mappings.length === 0) return tendBridges(host, owner);
        if (isPending(file) && file.phase.action === CLAIM) greeted = file.mappings;
        const now = (prior: StateFile | undefined) => wishFor(wish.mappings, viewOf(request), domain.macs, prior);
        return syncLocked(host, { ...plain(request), wish: now }, probing);
      }
    }
  });
  await greet(host, owner, greeted);
  return result;
}

function plain({ owner, action, holder, wish, detachedAliases = [] }: ActionRequest): SyncRequest {
  return { owner, action, holder, wish: wish.mappings, detachedAliases };
}

export function viewOf({ owner, wish, keep = () => false }: ActionRequest): DomainView {
  return { vm: owner.vm, unmapped: wish.unmapped, attaching: wish.attaching, keep };
}

/** The file, if another action is at work on it. */
function otherUnderWay(host: Host, file: StateFile | undefined, holder: Holder): PendingFile | undefined {
  if (!isPending(file) || pendingBy(file, holder) !== undefined) return undefined;
  return host.processes.isAlive(file.phase.holder) ? file : undefined;
}
