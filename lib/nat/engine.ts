/**
 * What kvm-ib asks of a NAT engine: intent in, six methods. nftables is the engine; differences between engines are
 * declared in `capabilities`, never asked by name above this line.
 */
import type { Ipv4, Mac } from '../core/address.ts';
import type { ServedNetwork } from '../core/mapping.ts';
import type { Elements } from '../core/plan.ts';

/** One mapping as the packet path knows it. */
export interface Pair {
  readonly guest: Ipv4;
  readonly address: Ipv4;
  /** The source MAC that the guest address may be used with; null: any. */
  readonly mac: Mac | null;
  /** Advisory text beside the element, of `[A-Za-z0-9 ._:-]` only, at most 100 characters; not compared. */
  readonly comment: string;
}

/** What the kernel holds for the keys that were asked for. */
export interface ObservedPairs {
  /** False: the table, or one of its maps, is not there. */
  readonly table: boolean;
  /** Tag of the rule set that the table was loaded with; null when the table is absent or carries none. */
  readonly tag: string | null;
  readonly guestToIb: ReadonlyMap<Ipv4, Ipv4>;
  readonly ibToGuest: ReadonlyMap<Ipv4, Ipv4>;
  /** Guest addresses bound to a source MAC, as `guest mac`; of a lookup, only the bindings that were asked for. */
  readonly macs: ReadonlySet<string>;
  /** Guest addresses that may be used with any source MAC. */
  readonly unbound: ReadonlySet<Ipv4>;
}

/**
 * What the host has forwarded for one pair since it was made: between guest and fabric, and between guests of this host
 * by IB address. Above 2^53 the numbers are rounded.
 */
export interface Traffic {
  readonly sent: Count;
  readonly received: Count;
}

export interface Count {
  readonly packets: number;
  readonly bytes: number;
}

/** The whole table, as `status`, `list` and `reconcile` read it. */
export interface ObservedTable extends ObservedPairs {
  /** What was counted, by guest address; empty where the engine cannot count. */
  readonly traffic: ReadonlyMap<Ipv4, Traffic>;
  /** Rules, chains or sets that differ from what the engine would load for this `TableSpec`; empty: as loaded. */
  readonly differences: readonly string[];
}

/** Everything the rule set depends on. Pairs are not part of it. */
export interface TableSpec {
  readonly networks: readonly ServedNetwork[];
  /** The host's own IPv4 addresses on each network's device (aliases of ours excluded), by network name; may be empty. */
  readonly hostAddresses: ReadonlyMap<string, readonly Ipv4[]>;
}

/** Elements to delete and to add in one transaction; what is deleted must be in the kernel, what is added may be. */
export interface PairChange {
  readonly remove: Elements;
  readonly add: Elements;
  /** Advisory comments by guest address, for added `guestToIb` elements; of `[A-Za-z0-9 ._:-]` only, at most 100 characters. */
  readonly comments: Readonly<Record<string, string>>;
}

export interface NatCapabilities {
  /** The whole change is one kernel transaction. */
  readonly atomic: boolean;
  /** A pair can be read by key at a cost that does not grow with the number of pairs. */
  readonly constantLookup: boolean;
}

export interface NatEngine {
  readonly name: string;
  readonly capabilities: NatCapabilities;
  /** Reads by key; never lists. */
  lookup(pairs: readonly Pair[]): Promise<ObservedPairs>;
  /** Reads the whole table; for inspection and reconcile only. */
  list(spec: TableSpec): Promise<ObservedTable>;
  /** One transaction: all of it or nothing. @throws NftError (see nftables-json) classed. */
  change(change: PairChange): Promise<void>;
  /** Creates the table or brings it to this rule set with exactly these pairs, in one transaction; live flows go on. */
  load(spec: TableSpec, pairs: readonly Pair[]): Promise<void>;
  /** Deletes the table; nothing else. Absent is fine. */
  remove(): Promise<void>;
}
