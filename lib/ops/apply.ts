/** Carries out a plan: in order, each reversible change with its reversal noted first, all of it or none. */
import { KvmIbError, toKvmIbError } from '../core/errors.ts';
import type { Change } from '../core/plan.ts';
import { describe, reverse } from '../core/plan.ts';
import type { FlushRequest, RepeatItem } from '../link/ports.ts';
import type { Host } from './host.ts';

export interface Applied {
  /** Conntrack entries deleted. */
  readonly flushed: number;
  /** What went wrong without failing the change. */
  readonly warnings: readonly string[];
  /** IB addresses that are on their link now, but of which a warning says that they were not announced. */
  readonly unannounced: ReadonlySet<string>;
}

/**
 * @param finish the last step, which writes the files: when it fails, the changes are undone as for any other step
 * @throws KvmIbError the error of the step that failed, after all earlier steps were undone; `reversal-failed` with both
 *   reasons when undoing failed as well
 */
export async function apply(
  host: Host,
  changes: readonly Change[],
  finish: () => void | Promise<void> = () => undefined,
): Promise<Applied> {
  const done: Change[] = [];
  const warnings: string[] = [];
  let flushed = 0;
  for (const step of stepsOf(changes)) {
    try {
      const outcome = await perform(host, step);
      flushed += outcome.flushed;
      if (outcome.changed) done.push(...step);
    } catch (error) {
      throw await undoAll(host, done, `Cannot apply "${step.flatMap(describe).join('; ')}"`, error);
    }
  }
  try {
    await finish();
  } catch (error) {
    throw await undoAll(host, done, 'Cannot finish', error);
  }
  const announced = await announceAll(
    host,
    changes.filter((change) => change.kind === 'announce'),
  );
  return { flushed, warnings: [...warnings, ...announced.warnings], unannounced: announced.failed };
}

/** Announces aliases at once, and has it repeated later. What goes wrong is told and fails nothing. */
export async function announceAll(
  host: Pick<Host, 'announcer'>,
  items: readonly RepeatItem[],
): Promise<{ readonly warnings: readonly string[]; readonly failed: ReadonlySet<string> }> {
  if (items.length === 0) return { warnings: [], failed: new Set() };
  const warnings: string[] = [];
  const failed = new Set<string>();
  for (const { address, device, error } of await host.announcer.announce(items)) {
    if (error === undefined) continue;
    warnings.push(`${address} was not announced on ${device}: ${error}`);
    failed.add(address);
  }
  warnings.push(
    ...(await repeatLater(
      host,
      items.filter(({ address }) => !failed.has(address)),
    )),
  );
  return { warnings, failed };
}

/** @returns a warning when it cannot be done */
export async function repeatLater(
  host: Pick<Host, 'announcer'>,
  items: readonly RepeatItem[],
): Promise<readonly string[]> {
  const why = items.length === 0 ? undefined : await host.announcer.repeat(items);
  return why === undefined ? [] : [`the announcement will not be repeated: ${why}`];
}

/** Changes that one call carries out: a run of conntrack flushes costs one look at the table, anything else stands alone. */
type Step = readonly [StepChange, ...StepChange[]];
type StepChange = Exclude<Change, { kind: 'announce' }>;
export type Flush = Extract<Change, { kind: 'flush-mapping' | 'flush-foreign' }>;

function stepsOf(changes: readonly Change[]): readonly Step[] {
  const steps: [StepChange, ...StepChange[]][] = [];
  for (const change of changes) {
    if (change.kind === 'announce') continue;
    const last = steps.at(-1);
    if (last !== undefined && isFlush(last[0]) && isFlush(change)) last.push(change);
    else steps.push([change]);
  }
  return steps;
}

export function isFlush(change: Change): change is Flush {
  return change.kind === 'flush-mapping' || change.kind === 'flush-foreign';
}

interface Outcome {
  readonly flushed: number;
  /** False: the kernel was like that already, or there is nothing to undo. */
  readonly changed: boolean;
}

async function perform(host: Host, step: Step): Promise<Outcome> {
  const [change] = step;
  switch (change.kind) {
    case 'add-alias':
      await host.links.addAlias(change.device, change.address, change.label);
      return { flushed: 0, changed: true };
    case 'delete-alias':
      return { flushed: 0, changed: await deleteAlias(host, change) };
    case 'change-pairs':
      await host.nat.change(change);
      return { flushed: 0, changed: true };
    case 'set-mtu':
      await host.links.setMtu(change.link, change.to);
      return { flushed: 0, changed: true };
    case 'set-hairpin':
      await host.links.setHairpin(change.port, change.on);
      return { flushed: 0, changed: true };
    case 'flush-mapping':
    case 'flush-foreign':
      return { flushed: await host.conntrack.flush(flushRequests(host, step.filter(isFlush))), changed: false };
  }
}

/** What a guest's flow to the fabric may have been translated to before the mapping: the host's own address, by a masquerade. */
export function flushRequests(host: Pick<Host, 'store'>, flushes: readonly Flush[]): readonly FlushRequest[] {
  const table = host.store.readTable();
  const staleOn = new Map((table?.networks ?? []).map((n) => [n.device, table?.hostAddresses.get(n.name) ?? []]));
  return flushes.map((flush): FlushRequest => {
    const { guest, address } = flush;
    if (flush.kind === 'flush-mapping') return { kind: 'mapping', guest, address };
    return { kind: 'foreign', guest, address, stale: staleOn.get(flush.device) ?? [] };
  });
}

/** An alias that somebody removed in between is as gone as one that we removed. */
async function deleteAlias(host: Host, change: Extract<Change, { kind: 'delete-alias' }>): Promise<boolean> {
  try {
    await host.links.deleteAlias(change.device, change.address, change.label);
    return true;
  } catch (error) {
    if (error instanceof KvmIbError && error.code === 'host-lacks') return false;
    throw error;
  }
}

function addedPairs(change: Extract<Change, { kind: 'change-pairs' }>): readonly FlushRequest[] {
  return change.add.guestToIb.map(({ guest, address }) => ({ kind: 'mapping', guest, address }));
}

/** @returns what to throw: the cause, or `reversal-failed` */
async function undoAll(host: Host, done: readonly Change[], message: string, cause: unknown): Promise<KvmIbError> {
  const error = toKvmIbError(cause, message);
  const reversalErrors: string[] = [];
  const attempt = async (what: string, act: () => Promise<unknown>): Promise<boolean> => {
    try {
      await act();
      return true;
    } catch (reversalCause) {
      const { message: failed, why } = toKvmIbError(reversalCause);
      reversalErrors.push(`${what}: ${failed}${why === undefined ? '' : `: ${why}`}`);
      return false;
    }
  };
  for (const change of [...done].reverse()) {
    const back = reverse(change);
    if (back === undefined || back.kind === 'announce') continue;
    // After one that failed none is tried: every prefix of a plan is safe, any other subset is not (an alias would come
    // back whose pair did not).
    if (!(await attempt(describe(back).join('; '), () => perform(host, [back])))) break;
    // Flows that began while the pair was in keep their translation; they must not outlive it.
    if (change.kind === 'change-pairs') {
      await attempt('conntrack entries of the undone pairs', () => host.conntrack.flush(addedPairs(change)));
    }
  }
  return reversalErrors.length === 0 ? error : reversalFailed(error, reversalErrors);
}

/** The error for a failure after which not everything could be undone. */
export function reversalFailed(error: KvmIbError, reasons: readonly string[]): KvmIbError {
  return new KvmIbError('reversal-failed', error.message, {
    why: `${error.why ?? 'the step failed'}; and undoing what was done before failed too: ${reasons.join(' | ')}`,
    fix: 'run `kvm-ib status` to see what differs, then `kvm-ib reconcile`',
    cause: error,
  });
}
