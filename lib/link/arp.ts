/**
 * ARP (RFC 826; on InfiniBand RFC 4391) as far as kvm-ib speaks it: the gratuitous one, "this address is now at this
 * hardware address", and the probe of RFC 5227, "has anybody this address?".
 * Hardware addresses are handed in as the kernel has them: an IPoIB address (flags, queue pair, GID) and its broadcast
 * address (which holds the partition key) cannot be derived from anything.
 */
import { type Ipv4, ipv4Bytes, ipv4FromBytes } from '../core/address.ts';
import { ARPHRD, type Link, type OtherHolder } from './ports.ts';
import { concat, u8, u16, u16be, u32 } from './wire.ts';

const AF_PACKET = 17;
const ETH_P_ALL = 0x0003;
const ETH_P_IP = 0x0800;
const ETH_P_ARP = 0x0806;
const OPERATION = { request: 1, reply: 2 } as const;
const SOCKADDR_LL = 20;
const SOCKADDR_LL_HEADER = 12;

/** Bytes of a hardware address by ARPHRD_*. */
const ADDRESS_LENGTH: Readonly<Record<number, number>> = { [ARPHRD.ether]: 6, [ARPHRD.infiniband]: 20 };

/** Why no ARP can be sent on this link; undefined when it can. */
export function whyNoArp(link: Link): string | undefined {
  const length = ADDRESS_LENGTH[link.type];
  if (length === undefined) return `${link.name} is of type ${link.type}, neither Ethernet (1) nor InfiniBand (32)`;
  for (const [what, bytes] of [
    ['hardware', link.address],
    ['broadcast', link.broadcast],
  ] as const) {
    if (bytes.length !== length) {
      return `the ${what} address of ${link.name} has ${bytes.length} bytes, ${length} are needed`;
    }
  }
  return undefined;
}

/**
 * The ARP packet without the link's own header: 28 bytes on Ethernet, 56 on IPoIB. Sender and target protocol address
 * are both `address`. In a request the target hardware address means nothing (RFC 5227 §2.3) and is the broadcast
 * address; in a reply it is the sender's (RFC 5944 §4.6). Hosts differ in which of the two they heed.
 */
export function gratuitousArp(operation: 'request' | 'reply', link: Link, address: Ipv4): Uint8Array {
  const protocol = ipv4Bytes(address);
  return concat(
    u16be(link.type),
    u16be(ETH_P_IP),
    u8(link.address.length),
    u8(protocol.length),
    u16be(OPERATION[operation]),
    link.address,
    protocol,
    operation === 'request' ? link.broadcast : link.address,
    protocol,
  );
}

/**
 * The ARP probe (RFC 5227 §2.1.1): a request without a sender protocol address, so that nobody's cache learns from it. The
 * target hardware address is zero.
 */
export function arpProbe(link: Link, address: Ipv4): Uint8Array {
  return concat(
    u16be(link.type),
    u16be(ETH_P_IP),
    u8(link.address.length),
    u8(4),
    u16be(OPERATION.request),
    link.address,
    new Uint8Array(4),
    new Uint8Array(link.address.length),
    ipv4Bytes(address),
  );
}

/** An ARP packet for IPv4, from whoever sent it. */
export interface ArpPacket {
  readonly operation: 'request' | 'reply';
  /** ARPHRD_*. */
  readonly type: number;
  readonly senderHardware: Uint8Array;
  readonly sender: Ipv4;
  readonly target: Ipv4;
}

const ARP_HEADER = 8;

/** Reads what a packet socket of type SOCK_DGRAM received. Undefined when it is cut off, or is no request or reply for IPv4. */
export function decodeArp(bytes: Uint8Array): ArpPacket | undefined {
  if (bytes.length < ARP_HEADER) return undefined;
  const at = (offset: number): number => ((bytes[offset] ?? 0) << 8) | (bytes[offset + 1] ?? 0);
  const hardwareLength = bytes[4] ?? 0;
  const operation = at(6);
  if (at(2) !== ETH_P_IP || bytes[5] !== 4 || hardwareLength === 0) return undefined;
  if (operation !== OPERATION.request && operation !== OPERATION.reply) return undefined;
  const sender = ARP_HEADER + hardwareLength;
  const target = sender + 4 + hardwareLength;
  // An Ethernet frame is padded to 60 bytes: more than that is no fault.
  if (bytes.length < target + 4) return undefined;
  return {
    operation: operation === OPERATION.request ? 'request' : 'reply',
    type: at(0),
    senderHardware: bytes.slice(ARP_HEADER, sender),
    sender: ipv4FromBytes(bytes.subarray(sender, sender + 4)),
    target: ipv4FromBytes(bytes.subarray(target, target + 4)),
  };
}

/**
 * The address that somebody else on this link has or is about to take, as this packet shows it; undefined: it shows none.
 * @param except hardware addresses that do not count, besides the link's own
 */
export function claimIn(
  packet: ArpPacket,
  link: Link,
  except: readonly string[] = [],
): (OtherHolder & { readonly address: Ipv4 }) | undefined {
  if (packet.type !== link.type || packet.senderHardware.length !== link.address.length) return undefined;
  const sender = identity(link.type, packet.senderHardware);
  if (sender === identity(link.type, link.address)) return undefined;
  if (except.some((text) => identity(link.type, hardwareBytes(text)) === sender)) return undefined;
  const hardware = printHardware(packet.senderHardware);
  if (packet.sender !== NO_ADDRESS) return { address: packet.sender, hardware, how: 'has' };
  return packet.operation === 'request' ? { address: packet.target, hardware, how: 'probes' } : undefined;
}

const NO_ADDRESS = '0.0.0.0';

/** A hardware address as `ip link` writes it. */
export function printHardware(bytes: Uint8Array): string {
  return [...bytes].map((byte) => byte.toString(16).padStart(2, '0')).join(':');
}

/**
 * Of two hosts that ask for one address at the same time, whether this one is to go on asking. Each decides alike, so that
 * not both give up, time and again.
 * @param hardware the other's hardware address, as `ip link` writes it
 */
export function goesFirst(link: Link, hardware: string): boolean {
  return identity(link.type, link.address) < identity(link.type, hardwareBytes(hardware));
}

function hardwareBytes(text: string): Uint8Array {
  return Uint8Array.from(text.split(':'), (part) => Number.parseInt(part, 16));
}

/** What tells two stations apart. The first octet of an IPoIB address is flags (RFC 4391 §9.1.1), which do not. */
function identity(type: number, address: Uint8Array): string {
  return printHardware(type === ARPHRD.infiniband ? address.subarray(1) : address);
}

/** struct sockaddr_ll (packet(7)) to bind a socket to what ARP arrives on the link. */
export function arpSockaddr(link: Link): Uint8Array {
  return concat(u16(AF_PACKET), u16be(ETH_P_ARP), u32(link.index), new Uint8Array(SOCKADDR_LL - 8));
}

/** struct sockaddr_ll (packet(7)) to bind a socket to every frame of a link. */
export function everySockaddr(index: number): Uint8Array {
  return concat(u16(AF_PACKET), u16be(ETH_P_ALL), u32(index), new Uint8Array(SOCKADDR_LL - 8));
}

/**
 * struct sockaddr_ll (packet(7)) for a broadcast on the link. It is longer than the declared 20 bytes when the
 * hardware address is longer than 8: the kernel wants the whole address and answers EINVAL to less.
 */
export function broadcastSockaddr(link: Link): Uint8Array {
  const address = new Uint8Array(Math.max(SOCKADDR_LL, SOCKADDR_LL_HEADER + link.broadcast.length));
  address.set(
    concat(
      u16(AF_PACKET),
      u16be(ETH_P_ARP),
      u32(link.index),
      u16(link.type),
      u8(0),
      u8(link.broadcast.length),
      link.broadcast,
    ),
  );
  return address;
}
