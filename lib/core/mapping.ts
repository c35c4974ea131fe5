/** What a mapping is: one guest address, one IB address, and who they belong to. Plain data, as stored and printed. */
import type { Ipv4, LinkName, Mac, Range } from './address.ts';
import { rangeOffset } from './address.ts';

/** One IPoIB link, one bridge, and the ranges that pair guest addresses with IB addresses. */
export interface Network {
  readonly name: string;
  /** The IPoIB link, a P_Key child or a bond. */
  readonly device: LinkName;
  /** The host-only bridge of the guests. */
  readonly bridge: LinkName;
  readonly guests: Range;
  /** Same size as `guests`: the n-th guest address gets the n-th IB address. */
  readonly addresses: Range;
  /** False: the guard rules are off and unmapped guests are routed as the kernel would. */
  readonly isolate: boolean;
  /** False: no ARP probe before an address is taken, for a fabric where something answers for every address. */
  readonly probe?: boolean;
}

/** A network as the table serves it: as configured, with what older mappings need besides. See `served.ts`. */
export interface ServedNetwork extends Pick<Network, 'name' | 'device' | 'bridge' | 'isolate'> {
  /** Ascending, with a gap between any two; may be empty. */
  readonly guests: readonly Range[];
  readonly addresses: readonly Range[];
}

export interface StaticMapping {
  readonly guest: Ipv4;
  readonly address: Ipv4;
}

export interface Config {
  readonly networks: readonly Network[];
  /** Mappings that no VM owns. */
  readonly static: readonly StaticMapping[];
}

export interface Mapping {
  /** Name of its network. */
  readonly network: string;
  readonly device: LinkName;
  readonly bridge: LinkName;
  /** The guest NIC's own address on the bridge. */
  readonly guest: Ipv4;
  /** Its address on the IPoIB network. */
  readonly address: Ipv4;
  /** The guest NIC's hardware address; null for a mapping made by hand without one: any source MAC then passes. */
  readonly mac: Mac | null;
  readonly vm: number | null;
  readonly nic: number | null;
  /** Label of the alias on the device, at most 15 characters. */
  readonly label: string;
  /** True: the IB address was leased or asked for; false: it came by its place in the range. Files of older versions do not say. */
  readonly named?: boolean | undefined;
}

/** Who wants the mappings of one state file. */
export type Owner =
  | { readonly kind: 'vm'; readonly vm: number }
  | { readonly kind: 'manual'; readonly guest: Ipv4 }
  | { readonly kind: 'static'; readonly guest: Ipv4 };

/** The name of an owner: the name of its state file, and what messages call it. */
export function ownerName(owner: Owner): string {
  return owner.kind === 'vm' ? `vm-${owner.vm}` : `${owner.kind}-${owner.guest}`;
}

/** The libvirt name that OpenNebula gives a VM's domain. */
export function domainName(vm: number): string {
  return `one-${vm}`;
}

/** IFNAMSIZ - 1: the kernel refuses a longer IFA_LABEL with ERANGE. */
const LABEL_MAX = 15;

/**
 * The label of a mapping's alias: `<device>:<vm>-<nic>` where that fits 15 characters, else `kib:<vm>-<nic>`;
 * `kib:s<n>` for a mapping that no VM owns, n its place in the guest range. The kernel does not require the device's
 * name in a label (any string of up to 15 characters, tried on Linux 6.18).
 */
export function aliasLabel(network: Network, guest: Ipv4, vm: number | null, nic: number | null): string {
  if (vm === null || nic === null) return `kib:s${rangeOffset(network.guests, guest) ?? 0}`;
  const own = `${network.device}:${vm}-${nic}`;
  return own.length <= LABEL_MAX ? own : `kib:${vm}-${nic}`;
}

/** Whether a label is one that kvm-ib writes on this device; says nothing about which mapping it belongs to. */
export function isOurLabel(device: string, label: string): boolean {
  if (/^kib:(?:s[0-9]+|[0-9]+-[0-9]+)$/.test(label)) return true;
  return label.startsWith(`${device}:`) && /^[0-9]+-[0-9]+$/.test(label.slice(device.length + 1));
}

/** Tells one alias from another: the same address may stand on two links, or under a stranger's label. */
export function aliasKey({ device, address, label }: Record<'device' | 'address' | 'label', string>): string {
  return `${device} ${address} ${label}`;
}

export function sameMapping(a: Mapping, b: Mapping): boolean {
  return (
    a.guest === b.guest &&
    a.address === b.address &&
    a.device === b.device &&
    a.bridge === b.bridge &&
    a.label === b.label &&
    a.mac === b.mac
  );
}
