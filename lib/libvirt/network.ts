/**
 * The libvirt network that owns the guests' bridge. `forward mode='open'` (libvirt since 2.2.0) makes libvirt add no
 * firewall rules for the bridge; an isolated or NAT network gets REJECT rules that cut the guests off from the IPoIB link.
 */
import type { Ipv4 } from '../core/address.ts';
import { ipv4Bytes, ipv4FromNumber, ipv4ToNumber, printRange } from '../core/address.ts';
import { KvmIbError } from '../core/errors.ts';
import type { Network } from '../core/mapping.ts';
import { childrenNamed, escapeXml, parseXml } from '../core/xml.ts';

export interface NetworkXmlOptions {
  /** MTU of the bridge in bytes: that of the IPoIB link. */
  readonly mtu: number;
  /** The host's own address on the bridge, the guests' gateway; not one of the guests' addresses. */
  readonly bridgeAddress: Ipv4;
  /** Default: the smallest subnet that holds the bridge address and all guests. */
  readonly prefixLength?: number;
  /** Name in libvirt, default `kvm-ib-<network>`. */
  readonly name?: string;
}

/**
 * Network XML for `virsh net-define`. No DHCP and no DNS: OpenNebula's contextualization configures the guests, and
 * without either libvirt starts no dnsmasq on the bridge.
 *
 * @throws KvmIbError `bad-input` for an MTU or a prefix length that cannot be one, `out-of-range` when the bridge
 *   address is a guest's, or the subnet does not hold the bridge address and every guest as host addresses.
 */
export function networkXml(network: Network, options: NetworkXmlOptions): string {
  const { mtu, bridgeAddress } = options;
  const name = options.name ?? libvirtName(network);
  const refuse = (code: 'bad-input' | 'out-of-range', why: string, fix: string) =>
    new KvmIbError(code, `Cannot write the libvirt network for "${network.name}"`, { why, fix });

  if (!/^[A-Za-z0-9_.-]{1,63}$/.test(name)) {
    throw refuse(
      'bad-input',
      'its name has characters that libvirt or a shell may refuse',
      'use letters, digits, "_", "." and "-"',
    );
  }
  if (!Number.isInteger(mtu) || mtu < 68 || mtu > 65_535) {
    throw refuse(
      'bad-input',
      `the MTU ${mtu} is not a whole number from 68 to 65535`,
      'give that of the IPoIB link: 2044, 4092, 65520',
    );
  }
  const guests = [ipv4ToNumber(network.guests.first), ipv4ToNumber(network.guests.last)] as const;
  const own = ipv4ToNumber(bridgeAddress);
  if (own >= guests[0] && own <= guests[1]) {
    const why = `the bridge address ${bridgeAddress} lies in the guests ${printRange(network.guests)}`;
    throw refuse('out-of-range', why, 'give the host an address of the same subnet outside that range');
  }
  const lowest = Math.min(guests[0], own);
  const highest = Math.max(guests[1], own);
  const length = options.prefixLength ?? smallestPrefix(lowest, highest);
  if (!Number.isInteger(length) || length < 1 || length > 30) {
    throw refuse('bad-input', `the prefix length ${length} is not one of 1 to 30`, 'give one, for example 24');
  }
  if (!holds(length, lowest, highest)) {
    const why = `/${length} does not hold ${bridgeAddress} and ${printRange(network.guests)} between its first and last address`;
    throw refuse('out-of-range', why, 'take a shorter prefix length or another bridge address');
  }
  return [
    '<network>',
    `  <name>${escapeXml(name)}</name>`,
    "  <forward mode='open'/>",
    `  <bridge name='${escapeXml(network.bridge)}' stp='off' delay='0'/>`,
    `  <mac address='${hardwareAddress(bridgeAddress)}'/>`,
    `  <mtu size='${mtu}'/>`,
    "  <dns enable='no'/>",
    `  <ip address='${bridgeAddress}' netmask='${ipv4FromNumber(2 ** 32 - 2 ** (32 - length))}'/>`,
    '</network>',
    '',
  ].join('\n');
}

/**
 * The same on every host with that address: a guest that moves from one to the other knows it then. libvirt would make one up
 * for each. 52:54:00 is what libvirt and QEMU begin with.
 */
function hardwareAddress(bridgeAddress: Ipv4): string {
  const bytes = ipv4Bytes(bridgeAddress).slice(1);
  return `52:54:00:${[...bytes].map((byte) => byte.toString(16).padStart(2, '0')).join(':')}`;
}

/** A network that libvirt has. */
export interface LibvirtNetwork {
  readonly name: string;
  /** Its bridge; null for one without. */
  readonly bridge: string | null;
  /** `open`, `nat`, `route`, `bridge` …; null: isolated. */
  readonly forward: string | null;
}

/**
 * @param xml what `virsh net-dumpxml` says
 * @throws KvmIbError `bad-input` when it is no network
 */
export function parseNetwork(xml: string): LibvirtNetwork {
  const root = parseXml(xml, { roots: ['network'], what: 'the network XML of libvirt' });
  const [forward] = childrenNamed(root, 'forward');
  return {
    name: childrenNamed(root, 'name')[0]?.text.trim() ?? '',
    bridge: childrenNamed(root, 'bridge')[0]?.attributes.get('name') ?? null,
    // Without a mode it is nat (formatnetwork).
    forward: forward === undefined ? null : (forward.attributes.get('mode') ?? 'nat'),
  };
}

/** Name in libvirt of the network that kvm-ib makes. */
export function libvirtName(network: Pick<Network, 'name'>): string {
  return `kvm-ib-${network.name}`;
}

/**
 * What the firewall rules do that libvirt 9 adds for a network with this forward mode (tried): with `open` and with modes in which
 * libvirt makes no bridge there are none; with `route` the network's own subnet passes and all else is rejected; `nat` and
 * `isolated`, which stands for a network without <forward>, cut guests off from the IPoIB link.
 */
export function rulesOfForwardMode(mode: string): 'none' | 'own-subnet' | 'in-the-way' {
  if (mode === 'route') return 'own-subnet';
  return ['open', 'bridge', 'private', 'vepa', 'passthrough', 'hostdev'].includes(mode) ? 'none' : 'in-the-way';
}

/** Prefix length of the smallest subnet that holds a bridge address and all guests: the one that `networkXml` takes. */
export function subnetOf(network: Network, bridgeAddress: Ipv4): number {
  const own = ipv4ToNumber(bridgeAddress);
  const { first, last } = network.guests;
  return smallestPrefix(Math.min(ipv4ToNumber(first), own), Math.max(ipv4ToNumber(last), own));
}

/** Whether both lie in one subnet of this length, its network and broadcast address excluded. */
function holds(length: number, lowest: number, highest: number): boolean {
  const size = 2 ** (32 - length);
  const base = Math.floor(lowest / size) * size;
  return lowest > base && highest < base + size - 1;
}

function smallestPrefix(lowest: number, highest: number): number {
  for (let length = 30; length > 1; length -= 1) {
    if (holds(length, lowest, highest)) return length;
  }
  return 1;
}
