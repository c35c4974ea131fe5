/** Carries out a plan: in order, each reversible change with its reversal noted first, all of it or none. */
import { KvmIbError, toKvmIbError } from '../core/errors.ts';
import type { Change } from '../core/plan.ts';
import { describe, reverse } from '../core/plan.ts';
import type { Host } from './host.ts';

export interface Applied {
  /** Conntrack entries deleted. */
  readonly flushed: number;
  /** What went wrong without failing the change. */
  readonly warnings: readonly string[];
}

/**
 * @throws KvmIbError the error of the step that failed, after all earlier steps were undone; `reversal-failed` with both
 *   reasons when undoing failed as well
 */
export async function apply(host: Host, changes: readonly Change[]): Promise<Applied> {
  const done: Change[] = [];
  const warnings: string[] = [];
  let flushed = 0;
  const announcements: Extract<Change, { kind: 'announce' }>[] = [];
  for (const change of changes) {
    if (change.kind === 'announce') {
      announcements.push(change);
      continue;
    }
    try {
      const outcome = await perform(host, change);
      flushed += outcome.flushed;
      if (outcome.changed) done.push(change);
    } catch (error) {
      await undoAll(host, done, change, error);
    }
  }
  if (announcements.length > 0) {
    for (const result of await host.announcer.announce(announcements)) {
      if (result.error !== undefined) {
        warnings.push(`${result.address} was not announced on ${result.device}: ${result.error}`);
      }
    }
  }
  return { flushed, warnings };
}

interface Outcome {
  readonly flushed: number;
  /** False: the kernel was like that already, so there is nothing to undo. */
  readonly changed: boolean;
}

async function perform(host: Host, change: Exclude<Change, { kind: 'announce' }>): Promise<Outcome> {
  switch (change.kind) {
    case 'add-alias':
      await host.links.addAlias(change.device, change.address, change.label);
      return { flushed: 0, changed: true };
    case 'delete-alias':
      return { flushed: 0, changed: await deleteAlias(host, change) };
    case 'change-pairs':
      await host.nat.change(change);
      return { flushed: 0, changed: true };
    case 'flush-mapping':
      return { flushed: await host.conntrack.flushMapping(change), changed: false };
    case 'flush-foreign': {
      const own = host.store.readTable()?.hostAddresses ?? new Map();
      const network = host.config.networks.find((n) => n.device === change.device);
      return { flushed: await host.conntrack.flushForeign(change, own.get(network?.name ?? '') ?? []), changed: false };
    }
    case 'set-mtu':
      await host.links.setMtu(change.link, change.to);
      return { flushed: 0, changed: true };
    case 'set-hairpin':
      await host.links.setHairpin(change.port, change.on);
      return { flushed: 0, changed: true };
  }
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

async function undoAll(host: Host, done: readonly Change[], failed: Change, cause: unknown): Promise<never> {
  const error = toKvmIbError(cause, `Cannot apply "${describe(failed).join('; ')}"`);
  const reversalErrors: string[] = [];
  for (const change of [...done].reverse()) {
    const back = reverse(change);
    if (back === undefined || back.kind === 'announce') continue;
    try {
      await perform(host, back);
    } catch (reversalCause) {
      const reversalError = toKvmIbError(reversalCause);
      reversalErrors.push(`${describe(back).join('; ')}: ${reversalError.message}: ${reversalError.why ?? ''}`);
    }
  }
  if (reversalErrors.length === 0) throw error;
  throw new KvmIbError('reversal-failed', error.message, {
    why: `${error.why ?? 'the step failed'}; and undoing what was done before failed too: ${reversalErrors.join(' | ')}`,
    fix: 'run `kvm-ib status` to see what differs, then `kvm-ib reconcile`',
    cause: error,
  });
}
