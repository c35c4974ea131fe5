/** Everything that an operation needs of the host it works on, behind one interface: handed in, never imported. */
import type { Ipv4 } from '../core/address.ts';
import type { Config, Owner } from '../core/mapping.ts';
import type { TableRecord } from '../core/served.ts';
import type { Holder, StateFile } from '../core/state.ts';
import type { Announcer, Conntrack, Links } from '../link/ports.ts';
import type { NatEngine } from '../nat/engine.ts';

export type { TableRecord };

export interface Store {
  readonly directory: string;
  readonly lockPath: string;
  /** @throws KvmIbError `failed` naming the file when it cannot be understood */
  read(owner: Owner): StateFile | undefined;
  write(file: StateFile): void;
  remove(owner: Owner): void;
  /** The file that claims a guest or IB address, by one look at the index. */
  holderOf(address: Ipv4): StateFile | undefined;
  all(): {
    readonly files: readonly StateFile[];
    readonly unreadable: readonly { readonly path: string; readonly why: string }[];
  };
  /** Makes the index of claims equal to the files, and clears away what killed writers left. */
  repairClaims(files: readonly StateFile[]): void;
  readTable(): TableRecord | undefined;
  writeTable(record: TableRecord | undefined): void;
  /** Deletes all state but the lock. */
  removeAll(): void;
}

export interface Domains {
  /** Names of the active domains, paused ones included; undefined when libvirt does not answer. */
  active(): Promise<ReadonlySet<string> | undefined>;
}

export interface Processes {
  isAlive(holder: Holder): boolean;
}

export interface Host {
  readonly config: Config;
  readonly nat: NatEngine;
  readonly links: Links;
  readonly conntrack: Conntrack;
  readonly announcer: Announcer;
  readonly store: Store;
  readonly domains: Domains;
  readonly processes: Processes;
  /** Runs `act` under the host lock. @throws KvmIbError `lock-not-obtained` after the time limit */
  withLock<T>(who: string, act: () => Promise<T>): Promise<T>;
  /** ISO 8601, UTC. */
  now(): string;
}

/** The libvirt name that OpenNebula gives a VM's domain. */
export function domainName(vm: number): string {
  return `one-${vm}`;
}
