/**
 * What a reconcile found, for those who only look: OpenNebula's probes print it. The port `StatusSink` says where it goes.
 */
import type { Ipv4 } from '../core/address.ts';
import type { ErrorCode } from '../core/errors.ts';
import { toKvmIbError } from '../core/errors.ts';
import type { Config } from '../core/mapping.ts';
import type { Host } from './host.ts';
import type { Drift } from './inspect.ts';
import { list, status } from './inspect.ts';
import type { ReconcileResult } from './reconcile.ts';
import { reconcile } from './reconcile.ts';

export interface VmReport {
  readonly vm: number;
  /** The worst of its mappings. */
  readonly state: 'ok' | 'drift' | 'pending' | 'removing';
  readonly drift: number;
  readonly addresses: readonly string[];
}

export interface StatusReport {
  /** ISO 8601, UTC. */
  readonly time: string;
  /** Why reconcile could not look; null when it could. */
  readonly error: ErrorCode | null;
  /** Differences that are left; null when reconcile could not look. */
  readonly drift: number | null;
  readonly config: Config;
  /** Tag of the rule set in the kernel; null when the table is absent or not known. */
  readonly ruleset: string | null;
  readonly vms: readonly VmReport[];
}

/** Takes the report; never throws. @returns a warning when it could not be kept */
export interface StatusSink {
  write(report: StatusReport): string | undefined;
}

/**
 * Reconciles, then reports what is left, to `sink` if there is one. A dry run reports nothing.
 * @throws KvmIbError as `reconcile`; it is reported first, unless only the lock was not obtained: then another is at work
 */
export async function reconcileAndPublish(
  host: Host,
  sink: StatusSink | undefined,
  options: { readonly dryRun?: boolean } = {},
): Promise<ReconcileResult> {
  if (sink === undefined || options.dryRun) return reconcile(host, options);
  try {
    const result = await reconcile(host, options);
    const warning = sink.write(await report(host));
    return warning === undefined ? result : { ...result, warnings: [...result.warnings, warning] };
  } catch (cause) {
    const error = toKvmIbError(cause);
    if (error.code !== 'lock-not-obtained') {
      sink.write({ time: host.now(), error: error.code, drift: null, config: host.config, ruleset: null, vms: [] });
    }
    throw cause;
  }
}

async function report(host: Host): Promise<StatusReport> {
  const { drift } = await status(host);
  const { tag } = await host.nat.lookup([]);
  return {
    time: host.now(),
    error: null,
    drift: drift.length,
    config: host.config,
    ruleset: tag,
    vms: vmReports(host, drift),
  };
}

function vmReports(host: Host, drift: readonly Drift[]): readonly VmReport[] {
  const byVm = new Map<number, { state: 'active' | 'pending' | 'removing'; guests: string[]; addresses: Ipv4[] }>();
  for (const { vm, guest, address, state } of list(host).entries) {
    if (vm === null) continue;
    const known = byVm.get(vm) ?? { state, guests: [], addresses: [] };
    byVm.set(vm, { state, guests: [...known.guests, guest], addresses: [...known.addresses, address as Ipv4] });
  }
  return [...byVm].map(([vm, { state, guests, addresses }]) => {
    const own = drift.filter((d) => guests.includes(d.guest ?? '') || addresses.includes((d.address ?? '') as Ipv4));
    const worst = state !== 'active' ? state : own.length > 0 ? 'drift' : 'ok';
    return { vm, state: worst, drift: own.length, addresses };
  });
}
