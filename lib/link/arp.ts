/**
 * Gratuitous ARP (RFC 826, RFC 5227; on InfiniBand RFC 4391): "this address is now at this hardware address".
 * Hardware addresses are handed in as the kernel has them: an IPoIB address (flags, queue pair, GID) and its broadcast
 * address (which holds the partition key) cannot be derived from anything.
 */
import { type Ipv4, ipv4Bytes } from '../core/address.ts';
import { ARPHRD, type Link } from './ports.ts';
import { concat, u8, u16, u16be, u32 } from './wire.ts';

const AF_PACKET = 17;
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
