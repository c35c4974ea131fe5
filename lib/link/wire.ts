/**
 * The netlink wire format (linux/netlink.h, RFC 3549), without a socket: requests out, datagrams in.
 *
 * Everything that comes in is bounds-checked here, once: a length that does not fit ends the walk or makes the reply
 * `malformed`; nothing throws and nothing loops. Nothing here knows a protocol family.
 */

/** nlmsghdr.nlmsg_type values below the families' own. */
const NLMSG_ERROR = 2;
const NLMSG_DONE = 3;

/** nlmsghdr.nlmsg_flags that are used here. */
export const NLM_F = {
  request: 0x1,
  multi: 0x2,
  ack: 0x4,
  /** The dumped list changed between two datagrams: entries may be missing (Linux 3.1). */
  dumpInterrupted: 0x10,
  /** In a reply of type error: the request's payload is not repeated. */
  capped: 0x100,
  /** In a reply of type error or done: attributes with the kernel's text follow (Linux 4.12). */
  ackTlvs: 0x200,
  dump: 0x300,
  exclusive: 0x200,
  create: 0x400,
} as const;

/** nlattr.nla_type: the two top bits are flags. */
const NLA_F_NESTED = 0x8000;
const NLA_TYPE_MASK = 0x3fff;

const NLMSGERR_ATTR_MSG = 1;
const HEADER = 16;

/** Netlink numbers are in the byte order of the host, which DataView has to be told. */
const LITTLE = new Uint8Array(Uint16Array.of(1).buffer)[0] === 1;

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

const align = (length: number): number => (length + 3) & ~3;

export function concat(...parts: readonly Uint8Array[]): Uint8Array {
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

export function sameBytes(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((byte, i) => byte === b[i]);
}

export const u8 = (value: number): Uint8Array => Uint8Array.of(value & 0xff);

function number(size: number, write: (view: DataView) => void): Uint8Array {
  const bytes = new Uint8Array(size);
  write(viewOf(bytes));
  return bytes;
}

/** Numbers in the byte order of the host. */
export const u16 = (value: number): Uint8Array => number(2, (view) => view.setUint16(0, value, LITTLE));
export const u32 = (value: number): Uint8Array => number(4, (view) => view.setUint32(0, value, LITTLE));
/** Numbers in network order. */
export const u16be = (value: number): Uint8Array => number(2, (view) => view.setUint16(0, value));
export const u32be = (value: number): Uint8Array => number(4, (view) => view.setUint32(0, value));

/** Undefined when the bytes end before the number does. By hand: a DataView for each number makes a dump twice as slow. */
export function readU16(bytes: Uint8Array, at: number): number | undefined {
  const [a, b] = [bytes[at], bytes[at + 1]];
  if (a === undefined || b === undefined) return undefined;
  return LITTLE ? a | (b << 8) : (a << 8) | b;
}
export function readI32(bytes: Uint8Array, at: number): number | undefined {
  const [a, b] = [readU16(bytes, at), readU16(bytes, at + 2)];
  if (a === undefined || b === undefined) return undefined;
  return LITTLE ? a | (b << 16) : (a << 16) | b;
}
export function readU32(bytes: Uint8Array, at: number): number | undefined {
  const value = readI32(bytes, at);
  return value === undefined ? undefined : value >>> 0;
}

/** ASCII text with the NUL at its end that kernel strings have. */
export function cString(text: string): Uint8Array {
  return Uint8Array.from([...text, '\0'], (c) => c.charCodeAt(0) & 0xff);
}

/** The text up to the first NUL, one character a byte. */
export function readCString(bytes: Uint8Array): string {
  const end = bytes.indexOf(0);
  return String.fromCharCode(...bytes.subarray(0, Math.min(end === -1 ? bytes.length : end, 4096)));
}

/** One attribute (nlattr) with its padding. */
export function attribute(type: number, payload: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(align(4 + payload.length));
  const view = viewOf(bytes);
  view.setUint16(0, 4 + payload.length, LITTLE);
  view.setUint16(2, type, LITTLE);
  bytes.set(payload, 4);
  return bytes;
}

/** An attribute that holds attributes. */
export function nested(type: number, ...attributes: readonly Uint8Array[]): Uint8Array {
  return attribute(type | NLA_F_NESTED, concat(...attributes));
}

/**
 * The attributes in `bytes` by type, without flags; of a type that is there twice, the last. A length that does not
 * fit ends the walk: what was read before it stays, as in the kernel's own nla_parse.
 */
export function attributes(bytes: Uint8Array): ReadonlyMap<number, Uint8Array> {
  const found = new Map<number, Uint8Array>();
  for (let at = 0; at + 4 <= bytes.length; ) {
    const length = readU16(bytes, at) ?? 0;
    const type = readU16(bytes, at + 2) ?? 0;
    if (length < 4 || at + length > bytes.length) break;
    found.set(type & NLA_TYPE_MASK, bytes.subarray(at + 4, at + length));
    at += align(length);
  }
  return found;
}

/** A whole request message; `payload` is the family's header and attributes. */
export function encodeRequest(type: number, flags: number, seq: number, payload: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(HEADER + payload.length);
  const view = viewOf(bytes);
  view.setUint32(0, bytes.length, LITTLE);
  view.setUint16(4, type, LITTLE);
  view.setUint16(6, flags | NLM_F.request, LITTLE);
  view.setUint32(8, seq, LITTLE);
  bytes.set(payload, HEADER);
  return bytes;
}

export interface Message {
  readonly type: number;
  readonly flags: number;
  readonly payload: Uint8Array;
}

/** The end of one request. */
export type Reply =
  | { readonly kind: 'ok'; readonly messages: readonly Message[]; readonly interrupted: boolean }
  /** The kernel refused: a positive errno, and its own words where it has some. */
  | { readonly kind: 'refused'; readonly errno: number; readonly text: string | undefined }
  | { readonly kind: 'malformed'; readonly why: string };

export interface ReplyReader {
  /** Takes the next datagram. @returns the reply when it is complete. */
  feed(datagram: Uint8Array): Reply | undefined;
}

/**
 * Collects what answers request `seq`, until an acknowledgement, an error, or the end of the dump. Messages with
 * another sequence number belong to an earlier request that was given up, and are skipped.
 */
export function createReplyReader(seq: number): ReplyReader {
  const messages: Message[] = [];
  let interrupted = false;
  return {
    feed: (datagram) => {
      for (let at = 0; at < datagram.length; ) {
        const length = readU32(datagram, at);
        if (length === undefined || length < HEADER || at + length > datagram.length) {
          return { kind: 'malformed', why: `a message of ${length ?? 0} bytes in a datagram of ${datagram.length}` };
        }
        const type = readU16(datagram, at + 4) ?? 0;
        const flags = readU16(datagram, at + 6) ?? 0;
        // A copy: the receiver uses its buffer again.
        const payload = new Uint8Array(datagram.subarray(at + HEADER, at + length));
        const mine = readU32(datagram, at + 8) === seq;
        at += align(length);
        if (!mine) continue;
        if (flags & NLM_F.dumpInterrupted) interrupted = true;
        if (type !== NLMSG_ERROR && type !== NLMSG_DONE) {
          messages.push({ type, flags, payload });
          continue;
        }
        // Old kernels end a dump without a status, so an absent one is zero there; an error always has one.
        const status = readI32(payload, 0) ?? (type === NLMSG_DONE ? 0 : undefined);
        if (status === undefined) return { kind: 'malformed', why: 'an error message without a number' };
        if (status < 0) {
          return { kind: 'refused', errno: -status, text: kernelText(type, flags, payload) };
        }
        return { kind: 'ok', messages, interrupted };
      }
      return undefined;
    },
  };
}

/** NLMSGERR_ATTR_MSG of an extended acknowledgement (Linux 4.12; the socket must ask by NETLINK_EXT_ACK). */
function kernelText(type: number, flags: number, payload: Uint8Array): string | undefined {
  if (!(flags & NLM_F.ackTlvs)) return undefined;
  // After the error number comes the header of the request, and its payload unless the reply is capped.
  const request = readU32(payload, 4) ?? HEADER;
  const skip = type === NLMSG_DONE ? 4 : 4 + (flags & NLM_F.capped ? HEADER : align(request));
  const text = attributes(payload.subarray(Math.min(skip, payload.length))).get(NLMSGERR_ATTR_MSG);
  return text === undefined ? undefined : readCString(text);
}
