/** What kvm-ib asks of the kernel about links, addresses, connection tracking and announcements. `host` implements it. */
import type { Ipv4, LinkName } from '../core/address.ts';

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
}

/** One IPv4 address on a link. */
export interface InetAddress {
  readonly device: string;
  readonly address: Ipv4;
  readonly prefixLength: number;
  /** IFA_LABEL; the device's own name for an ordinary address. */
  readonly label: string;
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
}

export interface AnnounceResult {
  readonly address: Ipv4;
  readonly device: string;
  /** Undefined when both frames were sent. */
  readonly error?: string;
}

export interface Announcer {
  /** Sends a gratuitous ARP request and reply for each address, all over one socket. Never throws. */
  announce(items: readonly { readonly device: LinkName; readonly address: Ipv4 }[]): Promise<readonly AnnounceResult[]>;
}
