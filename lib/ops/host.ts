/** Everything that an operation needs of the host it works on, behind one interface: handed in, never imported. */
import type { Ipv4, Mac } from '../core/address.ts';
import type { Config, Owner } from '../core/mapping.ts';
import type { TableRecord } from '../core/served.ts';
import type { DomainState, Holder, StateFile } from '../core/state.ts';
import type { JournalPhase } from '../import/phase.ts';
import type { Announcer, Conntrack, Links, Prober } from '../link/ports.ts';
import type { NatEngine } from '../nat/engine.ts';

export type { TableRecord };

/** What a link was like when its aliases were last announced by reconcile. */
export interface LinkRecord {
  readonly bootId: string;
  readonly index: number;
  /** Hardware address, as `ip link` writes it. */
  readonly hardware: string;
  readonly carrierChanges: number | null;
}

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
  /** By device; empty when there is no record, or none that can be read. */
  readLinks(): ReadonlyMap<string, LinkRecord>;
  writeLinks(records: ReadonlyMap<string, LinkRecord>): void;
  /** Where an import stands; undefined: there was none. */
  importPhase(): JournalPhase | undefined;
  /** Deletes all state but the lock. */
  removeAll(): void;
}

export interface Domains {
  /** Names of the active domains, paused ones included; undefined when libvirt does not answer. */
  active(): Promise<ReadonlySet<string> | undefined>;
  /** One VM's domain, and the interfaces that it has. */
  state(vm: number): Promise<DomainState>;
  /**
   * Whether a domain that is active has not begun to run here, or has stopped in order to run on another host. True as well where
   * libvirt does not say.
   */
  isMoving(vm: number): Promise<boolean>;
  /** How its domain came to run, or be about to run, on this host; `other` where libvirt says something else, or nothing. */
  cameBy(vm: number): Promise<'boot' | 'migration' | 'other'>;
  /** Hardware addresses of the interfaces of active domains, by VM; without an entry libvirt did not say. */
  interfaces(vms: readonly number[]): Promise<ReadonlyMap<number, ReadonlySet<Mac>>>;
}

export interface Processes {
  isAlive(holder: Holder): boolean;
  /** /proc/sys/kernel/random/boot_id of the boot that runs. */
  bootId(): string;
}

export interface Host {
  readonly config: Config;
  readonly nat: NatEngine;
  readonly links: Links;
  readonly conntrack: Conntrack;
  readonly announcer: Announcer;
  readonly prober: Prober;
  readonly store: Store;
  readonly domains: Domains;
  readonly processes: Processes;
  /** Runs `act` under the host lock. @throws KvmIbError `lock-not-obtained` after the time limit */
  withLock<T>(who: string, act: () => Promise<T>): Promise<T>;
  /** ISO 8601, UTC. */
  now(): string;
  /** Guests of the configuration that rules of iptables translate: asked before the table comes for the first time. */
  oldRules?(): Promise<readonly Ipv4[]>;
}
