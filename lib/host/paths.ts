/** Where configuration and state lie. */

export const DEFAULT_CONFIG_PATH = '/etc/kvm-ib/kvm-ib.yaml';
export const DEFAULT_STATE_DIR = '/var/lib/kvm-ib';
export const DEFAULT_RUN_DIR = '/run/kvm-ib';

export interface Paths {
  readonly config: string;
  readonly state: string;
  /** Where `status` is written for OpenNebula's probes; undefined: nowhere, since state that was moved is not this host's. */
  readonly run?: string | undefined;
  /** Milliseconds to wait for the host lock; undefined: the usual limit. */
  readonly lockTimeoutMs?: number | undefined;
  /** Milliseconds to wait for another holder of an address to answer; undefined: as long as it is worth. */
  readonly probeMs?: number | undefined;
}

/** Paths that the environment cannot change. */
export const FIXED_PATHS: Paths = {
  config: DEFAULT_CONFIG_PATH,
  state: DEFAULT_STATE_DIR,
  run: DEFAULT_RUN_DIR,
};

/**
 * Paths for root's own command line and for tests, which may move them. KVM_IB_LOCK_TIMEOUT_MS and KVM_IB_PROBE_MS go with
 * them.
 */
export function pathsFrom(env: NodeJS.ProcessEnv): Paths {
  return {
    config: env['KVM_IB_CONFIG'] ?? FIXED_PATHS.config,
    state: env['KVM_IB_STATE_DIR'] ?? FIXED_PATHS.state,
    run: env['KVM_IB_RUN_DIR'] ?? (env['KVM_IB_STATE_DIR'] === undefined ? FIXED_PATHS.run : undefined),
    lockTimeoutMs: millisecondsFrom(env['KVM_IB_LOCK_TIMEOUT_MS']),
    probeMs: millisecondsFrom(env['KVM_IB_PROBE_MS']),
  };
}

/** A time limit out of the environment; undefined when there is none, or when it is no number of up to an hour. */
export function millisecondsFrom(text: string | undefined): number | undefined {
  if (text === undefined || !/^[0-9]{1,7}$/.test(text)) return undefined;
  return Math.min(Number(text), 3_600_000);
}
