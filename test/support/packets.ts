/** Packets that no honest socket sends: forged sources, TCP flags out of the blue. */
import { ipv4Bytes, parseIpv4 } from '../../lib/core/address.ts';

export const TCP = { fin: 0x01, syn: 0x02, rst: 0x04, psh: 0x08, ack: 0x10 } as const;

export interface IpHeader {
  readonly source: string;
  readonly destination: string;
  readonly ttl?: number;
  readonly dontFragment?: boolean;
}

/** An IPv4 packet; identification and header checksum are left to the kernel (raw(7), IP_HDRINCL). */
function ipv4(header: IpHeader, protocol: number, payload: Uint8Array): Uint8Array {
  const packet = Buffer.alloc(20 + payload.length);
  packet[0] = 0x45;
  packet.writeUInt16BE(packet.length, 2);
  packet.writeUInt16BE(header.dontFragment === true ? 0x4000 : 0, 6);
  packet[8] = header.ttl ?? 64;
  packet[9] = protocol;
  packet.set(ipv4Bytes(parseIpv4(header.source)), 12);
  packet.set(ipv4Bytes(parseIpv4(header.destination)), 16);
  packet.set(payload, 20);
  return packet;
}

export function udpPacket(header: IpHeader, sourcePort: number, destinationPort: number, size = 8): Uint8Array {
  const datagram = Buffer.alloc(8 + size);
  datagram.writeUInt16BE(sourcePort, 0);
  datagram.writeUInt16BE(destinationPort, 2);
  datagram.writeUInt16BE(datagram.length, 4);
  // Checksum 0: none (RFC 768).
  return ipv4(header, 17, datagram);
}

/** A TCP segment with a right checksum: only its flags are wrong for the connection. */
export function tcpPacket(header: IpHeader, sourcePort: number, destinationPort: number, flags: number): Uint8Array {
  const segment = Buffer.alloc(20);
  segment.writeUInt16BE(sourcePort, 0);
  segment.writeUInt16BE(destinationPort, 2);
  segment.writeUInt32BE(0x12345678, 4);
  segment.writeUInt32BE((flags & TCP.ack) === 0 ? 0 : 0x2468ace0, 8);
  segment[12] = 0x50;
  segment[13] = flags;
  segment.writeUInt16BE(1024, 14);
  const pseudo = Buffer.from([
    ...ipv4Bytes(parseIpv4(header.source)),
    ...ipv4Bytes(parseIpv4(header.destination)),
    0,
    6,
    0,
    segment.length,
  ]);
  segment.writeUInt16BE(checksum(Buffer.concat([pseudo, segment])), 16);
  return ipv4(header, 6, segment);
}

export function echoRequest(header: IpHeader, size: number, id = 0x4b49): Uint8Array {
  const message = Buffer.alloc(8 + size);
  message[0] = 8;
  message.writeUInt16BE(id, 4);
  message.writeUInt16BE(checksum(message), 2);
  return ipv4(header, 1, message);
}

/** The Internet checksum (RFC 1071) of an even number of bytes. */
function checksum(bytes: Buffer): number {
  let sum = 0;
  for (let at = 0; at < bytes.length; at += 2) sum += bytes.readUInt16BE(at);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  return ~sum & 0xffff;
}
