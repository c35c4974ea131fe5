/** Where configuration and state lie. */

export const DEFAULT_CONFIG_PATH = '/etc/kvm-ib/kvm-ib.yaml';
export const DEFAULT_STATE_DIR = '/var/lib/kvm-ib';

export interface Paths {
  readonly config: string;
  readonly state: string;
}

/** Paths that the environment cannot change. */
export const FIXED_PATHS: Paths = { config: DEFAULT_CONFIG_PATH, state: DEFAULT_STATE_DIR };

/** Paths for root's own command line and for tests, which may move them. */
export function pathsFrom(env: NodeJS.ProcessEnv): Paths {
  return {
    config: env['KVM_IB_CONFIG'] ?? FIXED_PATHS.config,
    state: env['KVM_IB_STATE_DIR'] ?? FIXED_PATHS.state,
  };
}
