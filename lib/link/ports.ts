/** What kvm-ib asks of the kernel about links, addresses, connection tracking and announcements. `host` implements it. */
import type { Ipv4, LinkName } from '../core/address.ts';
import type { Flow } from './ctnetlink.ts';

/** ARPHRD_* values that matter here (linux/if_arp.h). */
export const ARPHRD = { ether: 1, infiniband: 32 } as const;

export interface Link {
  readonly index: number;
  readonly name: string;
  /** ARPHRD_*: 1 Ethernet, 32 InfiniBand. */
  readonly type: number;
  readonly mtu: number;
  /** IFF_UP. */
  readonly up: boolean;
  /** IFF_RUNNING: it has a carrier; of a bond, an active slave. */
  readonly running: boolean;
  /** What `ip -d link` calls it: bond, bridge, veth, ipoib; null where the driver gives no name. */
  readonly kind: string | null;
  /** Hardware address: 6 bytes on Ethernet, 20 on IPoIB; empty where the device has none. */
  readonly address: Uint8Array;
  readonly broadcast: Uint8Array;
  /** Index of the bridge or bond that it belongs to. */
  readonly master: number | null;
  /** How often the carrier came or went since the link was made; a link that is set down and up counts as well. */
  readonly carrierChanges: number | null;
}

/** One IPv4 address on a link. */
export interface InetAddress {
  readonly device: string;
  readonly address: Ipv4;
  readonly prefixLength: number;
  /** IFA_LABEL; the device's own name for an ordinary address. */
  readonly label: string;
  /** IFA_F_SECONDARY: it came after another one of its subnet, and goes with that one unless the kernel promotes it then. */
  readonly secondary?: boolean;
}

/** An address with all that it takes to put it there again. */
export interface StandingAddress extends InetAddress {
  readonly secondary: boolean;
  readonly broadcast: Ipv4 | null;
  /** RT_SCOPE_*: 0 everywhere, 253 link, 254 host. */
  readonly scope: number;
}

/** Addresses of any kind, for an import and its way back. */
export interface AddressTable {
  standing(): Promise<readonly StandingAddress[]>;
  /**
   * Adds addresses as they are given, in order; one that is there already is left. One socket for all.
   * @throws KvmIbError as `Links.addAlias`, but never conflict; the earlier ones are then there
   */
  put(addresses: readonly StandingAddress[]): Promise<void>;
  /** Removes addresses with just this prefix length and label, in order; one that is not there is gone already. */
  take(addresses: readonly StandingAddress[]): Promise<void>;
  /** True: when the first address of a subnet goes, the next takes its place (promote_secondaries, of the system or the link). */
  promotesSecondaries(device: string): boolean;
  setPromotesSecondaries(device: string, on: boolean): void;
}

export interface BridgePort {
  readonly name: string;
  readonly hairpin: boolean;
}

export interface Links {
  link(name: LinkName): Promise<Link | undefined>;
  linkAt(index: number): Promise<Link | undefined>;
  /** Every IPv4 address of the host, by one complete dump. An interrupted dump is repeated, never returned short. */
  addresses(): Promise<readonly InetAddress[]>;
  /** Whether the address is one of this host's own, by one route lookup: cost does not grow with the addresses. */
  isLocal(address: Ipv4): Promise<boolean>;
  /** Adds `address`/32 with the label. @throws KvmIbError conflict (EEXIST), host-lacks (no such link), not-permitted. */
  addAlias(device: LinkName, address: Ipv4, label: string): Promise<void>;
  /** Removes `address`/32 with this label. @throws KvmIbError host-lacks when it is not there. */
  deleteAlias(device: LinkName, address: Ipv4, label: string): Promise<void>;
  setMtu(name: LinkName, mtu: number): Promise<void>;
  /** True when bridged frames pass the IP firewall (bridge-nf-call-iptables, of the system or of this bridge). */
  bridgeCallsIptables(bridge: LinkName): Promise<boolean>;
  bridgePorts(bridge: LinkName): Promise<readonly BridgePort[]>;
  setHairpin(port: LinkName, on: boolean): Promise<void>;
}

/** Which connection tracking entries are to go. */
export type FlushRequest =
  /** Exactly those that this mapping translates, both directions, all protocols and zones. */
  | { readonly kind: 'mapping'; readonly guest: Ipv4; readonly address: Ipv4 }
  /**
   * Those that are older than the mapping and would go on without it: to the IB address but not to the guest; from the
   * guest and untranslated, or translated to one of `stale`; from the IB address itself.
   */
  | { readonly kind: 'foreign'; readonly guest: Ipv4; readonly address: Ipv4; readonly stale: readonly Ipv4[] };

export interface Conntrack {
  /** Deletes the entries that any of the requests names. @returns how many were deleted */
  flush(requests: readonly FlushRequest[]): Promise<number>;
  /** Those entries, to be deleted later without a walk through the table, which takes 11 ms or more. */
  find(requests: readonly FlushRequest[]): Promise<readonly Flow[]>;
  /** Deletes entries that were found. @returns how many were there still */
  remove(flows: readonly Flow[]): Promise<number>;
}

export interface LinkAddress {
  readonly device: LinkName;
  readonly address: Ipv4;
}

export interface AnnounceResult {
  readonly address: Ipv4;
  readonly device: string;
  /** Undefined when both frames were sent. */
  readonly error?: string;
}

export interface Announcer {
  /**
   * Sends a gratuitous ARP request and reply for each address, all over one socket, with a pause now and then where
   * there are many. Never throws.
   */
  announce(items: readonly LinkAddress[]): Promise<readonly AnnounceResult[]>;
  /**
   * Has them announced again a little later, by a process of its own that holds no lock and looks before each round
   * whether the alias is still there. Does not wait for it, never throws.
   * @returns why it could not be started
   */
  repeat(items: readonly RepeatItem[]): Promise<string | undefined>;
}

/** An alias that is announced as long as it stands. */
export interface RepeatItem extends LinkAddress {
  readonly label: string;
}

export interface ProbeResult {
  readonly address: Ipv4;
  readonly device: string;
  /** Who else has the address, or is about to take it; undefined: nobody answered. */
  readonly other?: OtherHolder;
  /** Why it could not be asked; nobody knows then. */
  readonly error?: string;
}

export interface OtherHolder {
  /** Its hardware address, as `ip link` writes it. */
  readonly hardware: string;
  /** It has the address, or it probes for it at the same time (RFC 5227 §2.1.1). */
  readonly how: 'has' | 'probes';
}

export interface ProbeOptions {
  /** Hardware addresses that may have it, as `ip link` writes them: the host that it moves away from. */
  readonly except?: readonly string[];
}

export interface Prober {
  /**
   * Asks on each link, by ARP probes (RFC 5227), whether another host has the address. All are asked in one window of
   * time, by one socket for each link. Never throws.
   */
  probe(items: readonly LinkAddress[], options?: ProbeOptions): Promise<readonly ProbeResult[]>;
}
