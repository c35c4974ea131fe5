/** The part of rtnetlink (rtnetlink(7), linux/rtnetlink.h, if_link.h, if_addr.h) that kvm-ib speaks, as bytes. */
import { type Ipv4, ipv4Bytes, ipv4FromBytes } from '../core/address.ts';
import type { Link } from './ports.ts';
import {
  attribute,
  attributes,
  concat,
  cString,
  type Message,
  nested,
  readCString,
  readI32,
  readU16,
  readU32,
  u8,
  u16,
  u32,
} from './wire.ts';

export const RTM = {
  newLink: 16,
  getLink: 18,
  setLink: 19,
  newAddress: 20,
  deleteAddress: 21,
  getAddress: 22,
  newRoute: 24,
  getRoute: 26,
} as const;

const AF_INET = 2;
const AF_BRIDGE = 7;

const IFF_UP = 1;
const IFF_RUNNING = 0x40;
const IFLA = {
  address: 1,
  broadcast: 2,
  ifname: 3,
  mtu: 4,
  master: 10,
  protinfo: 12,
  linkinfo: 18,
  extMask: 29,
  carrierChanges: 35,
} as const;
const IFLA_INFO_KIND = 1;
const IFLA_BRPORT_MODE = 4;
/** Leave the statistics out of the answer. */
const RTEXT_FILTER_SKIP_STATS = 8;
const IFA = { address: 1, local: 2, label: 3, broadcast: 4 } as const;
const IFA_F_SECONDARY = 1;
const RTA_DST = 1;
const RTN_LOCAL = 2;

const IFINFOMSG = 16;
const IFADDRMSG = 8;
const RTMSG = 12;

/** struct ifinfomsg. */
function linkHeader(family: number, index: number): Uint8Array {
  return concat(u8(family), u8(0), u16(0), u32(index), u32(0), u32(0));
}

export function encodeGetLink(by: { readonly name: string } | { readonly index: number }): Uint8Array {
  const skip = attribute(IFLA.extMask, u32(RTEXT_FILTER_SKIP_STATS));
  return 'name' in by
    ? concat(linkHeader(0, 0), attribute(IFLA.ifname, cString(by.name)), skip)
    : concat(linkHeader(0, by.index), skip);
}

export function encodeSetMtu(index: number, mtu: number): Uint8Array {
  return concat(linkHeader(0, index), attribute(IFLA.mtu, u32(mtu)));
}

/** Hairpin mode of a bridge port: frames may leave by the port that they came in by. */
export function encodeSetHairpin(index: number, on: boolean): Uint8Array {
  // Without the flag of a nested attribute the kernel reads it as the old one-byte port state.
  return concat(linkHeader(AF_BRIDGE, index), nested(IFLA.protinfo, attribute(IFLA_BRPORT_MODE, u8(on ? 1 : 0))));
}

/** Undefined when the message is no link, or lacks index or name. */
export function decodeLink(message: Message): Link | undefined {
  const { payload } = message;
  if (message.type !== RTM.newLink || payload.length < IFINFOMSG) return undefined;
  const attrs = attributes(payload.subarray(IFINFOMSG));
  const index = readI32(payload, 4);
  const name = attrs.get(IFLA.ifname);
  const flags = readU32(payload, 8) ?? 0;
  const kind = attributes(attrs.get(IFLA.linkinfo) ?? new Uint8Array()).get(IFLA_INFO_KIND);
  if (index === undefined || index <= 0 || name === undefined) return undefined;
  return {
    index,
    name: readCString(name),
    type: readU16(payload, 2) ?? 0,
    mtu: readU32(attrs.get(IFLA.mtu) ?? new Uint8Array(), 0) ?? 0,
    up: (flags & IFF_UP) !== 0,
    running: (flags & IFF_RUNNING) !== 0,
    kind: kind === undefined ? null : readCString(kind),
    address: attrs.get(IFLA.address) ?? new Uint8Array(),
    broadcast: attrs.get(IFLA.broadcast) ?? new Uint8Array(),
    master: readU32(attrs.get(IFLA.master) ?? new Uint8Array(), 0) ?? null,
    carrierChanges: readU32(attrs.get(IFLA.carrierChanges) ?? new Uint8Array(), 0) ?? null,
  };
}

/** struct ifaddrmsg for an IPv4 address. */
function addressHeader(prefixLength: number, index: number, scope = 0): Uint8Array {
  return concat(u8(AF_INET), u8(prefixLength), u8(0), u8(scope), u32(index));
}

/**
 * An address on the link with its label: the payload both to add and to delete it. For a delete the kernel compares
 * every part that is given (inet_rtm_deladdr): local address, label, and address with prefix length. So a wider
 * prefix, or another label, of the same address is not touched.
 */
export function encodeAddress(index: number, one: Omit<WireAddress, 'index' | 'secondary'>): Uint8Array {
  const bytes = ipv4Bytes(one.address);
  return concat(
    addressHeader(one.prefixLength, index, one.scope),
    attribute(IFA.local, bytes),
    attribute(IFA.address, bytes),
    ...(one.broadcast === null ? [] : [attribute(IFA.broadcast, ipv4Bytes(one.broadcast))]),
    ...(one.label === undefined ? [] : [attribute(IFA.label, cString(one.label))]),
  );
}

/** `address`/32 with the label: see `encodeAddress`. */
export function encodeAlias(index: number, address: Ipv4, label: string): Uint8Array {
  return encodeAddress(index, { address, prefixLength: 32, label, broadcast: null, scope: 0 });
}

/** The payload of a dump of all IPv4 addresses. */
export function encodeGetAddresses(): Uint8Array {
  return addressHeader(0, 0);
}

export interface WireAddress {
  readonly index: number;
  readonly address: Ipv4;
  readonly prefixLength: number;
  /** IFA_LABEL; undefined when the kernel sent none. */
  readonly label: string | undefined;
  readonly secondary: boolean;
  readonly broadcast: Ipv4 | null;
  readonly scope: number;
}

/** Undefined when the message is no IPv4 address. */
export function decodeAddress(message: Message): WireAddress | undefined {
  const { payload } = message;
  if (message.type !== RTM.newAddress || payload.length < IFADDRMSG || payload[0] !== AF_INET) return undefined;
  const attrs = attributes(payload.subarray(IFADDRMSG));
  // On a point-to-point link IFA_ADDRESS is the peer's; IFA_LOCAL is always ours.
  const local = attrs.get(IFA.local) ?? attrs.get(IFA.address);
  const index = readU32(payload, 4);
  if (local?.length !== 4 || index === undefined) return undefined;
  const label = attrs.get(IFA.label);
  const broadcast = attrs.get(IFA.broadcast);
  return {
    index,
    address: ipv4FromBytes(local),
    prefixLength: payload[1] ?? 0,
    label: label === undefined ? undefined : readCString(label),
    secondary: ((payload[2] ?? 0) & IFA_F_SECONDARY) !== 0,
    broadcast: broadcast?.length === 4 ? ipv4FromBytes(broadcast) : null,
    scope: payload[3] ?? 0,
  };
}

/** struct rtmsg and the destination: "how would a packet to this address be routed?" */
export function encodeGetRoute(address: Ipv4): Uint8Array {
  const header = new Uint8Array(RTMSG);
  header[0] = AF_INET;
  header[1] = 32;
  return concat(header, attribute(RTA_DST, ipv4Bytes(address)));
}

/** Whether the route in the message ends on this host (RTN_LOCAL). Undefined when the message is no route. */
export function decodeRouteIsLocal(message: Message): boolean | undefined {
  if (message.type !== RTM.newRoute || message.payload.length < RTMSG) return undefined;
  return message.payload[7] === RTN_LOCAL;
}
