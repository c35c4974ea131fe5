/**
 * Addresses and names, parsed once at the door and branded. Strict on purpose: nft hands what is not an address to
 * the resolver, and `inet_aton` forms ("1.2", "010.0.0.1") mean different things to different programs.
 */
import { KvmIbError, printable } from './errors.ts';

declare const brand: unique symbol;

/** A dotted-quad IPv4 address in canonical form. */
export type Ipv4 = string & { readonly [brand]: 'Ipv4' };
/** A 6-byte hardware address, lower case, colon-separated. */
export type Mac = string & { readonly [brand]: 'Mac' };
/** A link name that the kernel takes and that is safe in nft, sysfs paths and XML. */
export type LinkName = string & { readonly [brand]: 'LinkName' };

/** An inclusive range of IPv4 addresses. */
export interface Range {
  readonly first: Ipv4;
  readonly last: Ipv4;
}

const OCTET = '(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])';
const IPV4 = new RegExp(`^${OCTET}(?:\\.${OCTET}){3}$`);
const MAC = /^[0-9a-f]{2}(?::[0-9a-f]{2}){5}$/;
const LINK_NAME = /^[A-Za-z0-9_.-]{1,15}$/;

export function tryParseIpv4(text: string): Ipv4 | undefined {
  return IPV4.test(text) ? (text as Ipv4) : undefined;
}

/** @throws KvmIbError `bad-input` naming `what` when `text` is not a dotted quad. */
export function parseIpv4(text: string, what = 'address'): Ipv4 {
  const address = tryParseIpv4(text);
  if (address === undefined) {
    throw new KvmIbError('bad-input', `Cannot read ${what} "${printable(text, 60)}"`, {
      why: 'it is not an IPv4 address in dotted-quad form',
      fix: 'write it as four decimal numbers, for example 192.168.122.2',
    });
  }
  return address;
}

export function tryParseMac(text: string): Mac | undefined {
  const lower = text.toLowerCase();
  return MAC.test(lower) ? (lower as Mac) : undefined;
}

/** @throws KvmIbError `bad-input` naming `what`. */
export function parseMac(text: string, what = 'MAC'): Mac {
  const mac = tryParseMac(text);
  if (mac === undefined) {
    throw new KvmIbError('bad-input', `Cannot read ${what} "${printable(text, 60)}"`, {
      why: 'it is not a hardware address of six bytes',
      fix: 'write it as 02:00:c0:a8:7a:02',
    });
  }
  return mac;
}

export function tryParseLinkName(text: string): LinkName | undefined {
  return LINK_NAME.test(text) && text !== '.' && text !== '..' ? (text as LinkName) : undefined;
}

/** @throws KvmIbError `bad-input` naming `what`. Link names have at most 15 characters (IFNAMSIZ - 1). */
export function parseLinkName(text: string, what = 'link'): LinkName {
  const name = tryParseLinkName(text);
  if (name === undefined) {
    throw new KvmIbError('bad-input', `Cannot read ${what} "${printable(text, 60)}"`, {
      why: 'a link name has 1 to 15 letters, digits, ".", "_" or "-"',
      fix: 'give the name as `ip link` shows it, for example ib0 or ib0.8001',
    });
  }
  return name;
}

const DOT = 46;
const ZERO = 48;

/** The address as an unsigned 32-bit number. */
export function ipv4ToNumber(address: Ipv4): number {
  // Without a list of parts: an import of ten thousand pairs asks a million times.
  let sum = 0;
  let octet = 0;
  for (let at = 0; at < address.length; at++) {
    const code = address.charCodeAt(at);
    if (code === DOT) {
      sum = sum * 256 + octet;
      octet = 0;
    } else octet = octet * 10 + code - ZERO;
  }
  return sum * 256 + octet;
}

/** The address of an unsigned 32-bit number. */
export function ipv4FromNumber(value: number): Ipv4 {
  return [24, 16, 8, 0].map((shift) => Math.floor(value / 2 ** shift) % 256).join('.') as Ipv4;
}

/** The four bytes of an address, network order. */
export function ipv4Bytes(address: Ipv4): Uint8Array {
  return Uint8Array.from(address.split('.'), Number);
}

export function ipv4FromBytes(bytes: Uint8Array): Ipv4 {
  return Array.from(bytes.subarray(0, 4)).join('.') as Ipv4;
}

export function macBytes(mac: Mac): Uint8Array {
  return Uint8Array.from(mac.split(':'), (byte) => Number.parseInt(byte, 16));
}

/**
 * A range written "first-last", as a CIDR prefix, or as one address. A prefix means every address in it, the first
 * and last included: it is a set of addresses here, not a subnet.
 */
export function tryParseRange(text: string): Range | undefined {
  const dash = text.split('-').map((part) => part.trim());
  if (dash.length === 2) {
    const first = tryParseIpv4(dash[0] ?? '');
    const last = tryParseIpv4(dash[1] ?? '');
    if (first === undefined || last === undefined || ipv4ToNumber(first) > ipv4ToNumber(last)) return undefined;
    return { first, last };
  }
  const cidr = /^([0-9.]+)\/([0-9]{1,2})$/.exec(text.trim());
  if (cidr) {
    const base = tryParseIpv4(cidr[1] ?? '');
    const length = Number(cidr[2]);
    if (base === undefined || length > 32) return undefined;
    const count = 2 ** (32 - length);
    const start = ipv4ToNumber(base);
    if (start % count !== 0) return undefined;
    return { first: base, last: ipv4FromNumber(start + count - 1) };
  }
  const single = tryParseIpv4(text.trim());
  return single === undefined ? undefined : { first: single, last: single };
}

export function rangeSize(range: Range): number {
  return ipv4ToNumber(range.last) - ipv4ToNumber(range.first) + 1;
}

/** The place of an address in the range, from 0; undefined when it lies outside. */
export function rangeOffset(range: Range, address: Ipv4): number | undefined {
  const offset = ipv4ToNumber(address) - ipv4ToNumber(range.first);
  return offset >= 0 && offset < rangeSize(range) ? offset : undefined;
}

export function rangeAt(range: Range, offset: number): Ipv4 {
  return ipv4FromNumber(ipv4ToNumber(range.first) + offset);
}

export function rangeContains(range: Range, address: Ipv4): boolean {
  return rangeOffset(range, address) !== undefined;
}

export function rangesOverlap(a: Range, b: Range): boolean {
  return ipv4ToNumber(a.first) <= ipv4ToNumber(b.last) && ipv4ToNumber(b.first) <= ipv4ToNumber(a.last);
}

export function printRange(range: Range): string {
  return range.first === range.last ? range.first : `${range.first}-${range.last}`;
}
