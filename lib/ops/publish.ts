/**
 * What a reconcile found, for those who only look: OpenNebula's probes print it. The port `StatusSink` says where it goes.
 */
import type { Ipv4 } from '../core/address.ts';
import type { ErrorCode } from '../core/errors.ts';
import { toKvmIbError } from '../core/errors.ts';
import type { Config } from '../core/mapping.ts';
import type { Count, ObservedTable, Traffic } from '../nat/engine.ts';
import type { Host } from './host.ts';
import type { Status } from './inspect.ts';
import { inspect, list } from './inspect.ts';
import type { ReconcileResult } from './reconcile.ts';
import { reconcile } from './reconcile.ts';

export interface VmReport {
  readonly vm: number;
  /** The worst of its mappings. */
  readonly state: 'ok' | 'drift' | 'pending' | 'removing';
  readonly drift: number;
  /** How many of its mappings are of an older configuration. */
  readonly outdated: number;
  readonly addresses: readonly string[];
  /** All its mappings together, since each was made; null: not counted here. */
  readonly traffic: Traffic | null;
}

export interface StatusReport {
  /** ISO 8601, UTC. */
  readonly time: string;
  /** Why reconcile could not look; null when it could. */
  readonly error: ErrorCode | null;
  /** Differences that are left; null when reconcile could not look. */
  readonly drift: number | null;
  /** Mappings of an older configuration; null as above. */
  readonly outdated: number | null;
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
      sink.write({ time: host.now(), error: error.code, ...NOTHING_SEEN, config: host.config });
    }
    throw cause;
  }
}

const NOTHING_SEEN = { drift: null, outdated: null, ruleset: null, vms: [] } as const;

async function report(host: Host): Promise<StatusReport> {
  const { status, table } = await inspect(host);
  return {
    time: host.now(),
    error: null,
    drift: status.drift.length,
    outdated: status.outdated.length,
    config: host.config,
    ruleset: table.tag,
    vms: vmReports(host, status, table.traffic),
  };
}

function vmReports(host: Host, { drift, outdated }: Status, traffic: ObservedTable['traffic']): readonly VmReport[] {
  const byVm = new Map<number, { state: 'active' | 'pending' | 'removing'; guests: Ipv4[]; addresses: Ipv4[] }>();
  for (const { vm, guest, address, state } of list(host).entries) {
    if (vm === null) continue;
    const known = byVm.get(vm) ?? { state, guests: [], addresses: [] };
    const guests = [...known.guests, guest as Ipv4];
    byVm.set(vm, { state, guests, addresses: [...known.addresses, address as Ipv4] });
  }
  return [...byVm].map(([vm, { state, guests, addresses }]) => {
    const own = drift.filter(
      (d) => guests.includes((d.guest ?? '') as Ipv4) || addresses.includes((d.address ?? '') as Ipv4),
    );
    const worst = state !== 'active' ? state : own.length > 0 ? 'drift' : 'ok';
    const old = outdated.filter((mapping) => mapping.vm === vm).length;
    const counted = guests.flatMap((guest) => traffic.get(guest) ?? []);
    return { vm, state: worst, drift: own.length, outdated: old, addresses, traffic: sum(counted) };
  });
}

function sum(all: readonly Traffic[]): Traffic | null {
  if (all.length === 0) return null;
  const add = (a: Count, b: Count): Count => ({ packets: a.packets + b.packets, bytes: a.bytes + b.bytes });
  return all.reduce((a, b) => ({ sent: add(a.sent, b.sent), received: add(a.received, b.received) }));
}
