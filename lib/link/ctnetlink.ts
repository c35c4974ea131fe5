/**
 * The part of ctnetlink (linux/netfilter/nfnetlink_conntrack.h) that finds and deletes IPv4 connection tracking
 * entries, and which entries a mapping concerns.
 *
 * The two tuples of an entry say what NAT does to it: the original one is as its first packet came in, the reply one
 * as the answer comes in. Untranslated, they mirror each other; a rewritten source shows as the destination of the
 * reply, a rewritten destination as its source.
 */
import { type Ipv4, ipv4Bytes, ipv4FromBytes } from '../core/address.ts';
import type { FlushRequest } from './ports.ts';
import { attribute, attributes, concat, type Message, nested, u8, u16be, u32 } from './wire.ts';

const NFNL_SUBSYS_CTNETLINK = 1 << 8;
/** IPCTNL_MSG_CT_*. */
export const CT = {
  new: NFNL_SUBSYS_CTNETLINK,
  get: NFNL_SUBSYS_CTNETLINK | 1,
  delete: NFNL_SUBSYS_CTNETLINK | 2,
} as const;

const AF_INET = 2;
const NFGENMSG = 4;
const CTA = { tupleOriginal: 1, tupleReply: 2, id: 12, zone: 18, filter: 25 } as const;
const CTA_TUPLE_IP = 1;
const CTA_IP_V4 = { source: 1, destination: 2 } as const;
const CTA_FILTER = { originalFlags: 1, replyFlags: 2 } as const;
/** Bits of the filter flags: which parts of a tuple are compared. */
const FILTER = { source: 1, destination: 2 } as const;

/** Source and destination of one direction. */
export interface Tuple {
  readonly source: Ipv4;
  readonly destination: Ipv4;
}

/** An entry: what to judge it by, and the bytes that name it to the kernel. */
export interface Flow {
  readonly original: Tuple;
  readonly reply: Tuple;
  readonly wire: {
    /** CTA_TUPLE_ORIG as the kernel sent it: addresses, protocol, and what else tells flows of that protocol apart. */
    readonly original: Uint8Array;
    readonly id: Uint8Array | undefined;
    readonly zone: Uint8Array | undefined;
  };
}

/** What a dump is narrowed to: all given parts must match. */
export interface FlowFilter {
  readonly original?: Partial<Tuple>;
  readonly reply?: Partial<Tuple>;
}

function nfgenmsg(): Uint8Array {
  return concat(u8(AF_INET), u8(0), u16be(0));
}

function tuple(type: number, parts: Partial<Tuple>): Uint8Array {
  return nested(
    type,
    nested(
      CTA_TUPLE_IP,
      ...(parts.source === undefined ? [] : [attribute(CTA_IP_V4.source, ipv4Bytes(parts.source))]),
      ...(parts.destination === undefined ? [] : [attribute(CTA_IP_V4.destination, ipv4Bytes(parts.destination))]),
    ),
  );
}

function flags(parts: Partial<Tuple>): Uint8Array {
  return u32(
    (parts.source === undefined ? 0 : FILTER.source) | (parts.destination === undefined ? 0 : FILTER.destination),
  );
}

/**
 * The payload of a dump that the kernel narrows (CTA_FILTER, Linux 5.8). An older kernel does not know the attribute
 * and sends everything, so what comes is judged again here in any case. Without a filter: all IPv4 entries.
 */
export function encodeDump(filter?: FlowFilter): Uint8Array {
  if (filter === undefined) return nfgenmsg();
  const { original, reply } = filter;
  return concat(
    nfgenmsg(),
    ...(original === undefined ? [] : [tuple(CTA.tupleOriginal, original)]),
    ...(reply === undefined ? [] : [tuple(CTA.tupleReply, reply)]),
    nested(
      CTA.filter,
      ...(original === undefined ? [] : [attribute(CTA_FILTER.originalFlags, flags(original))]),
      ...(reply === undefined ? [] : [attribute(CTA_FILTER.replyFlags, flags(reply))]),
    ),
  );
}

/**
 * The payload that deletes this entry and no other: tuple and zone find it, the id makes sure that it is not a new one
 * of the same tuple. It always holds the tuple: a delete without one flushes the whole table.
 */
export function encodeDelete(flow: Flow): Uint8Array {
  const { original, id, zone } = flow.wire;
  return concat(
    nfgenmsg(),
    nested(CTA.tupleOriginal, original),
    ...(id === undefined ? [] : [attribute(CTA.id, id)]),
    ...(zone === undefined ? [] : [attribute(CTA.zone, zone)]),
  );
}

/** Undefined when the message is no IPv4 entry with both tuples. */
export function decodeFlow(message: Message): Flow | undefined {
  const { payload } = message;
  if (message.type !== CT.new || payload.length < NFGENMSG || payload[0] !== AF_INET) return undefined;
  const attrs = attributes(payload.subarray(NFGENMSG));
  const wire = attrs.get(CTA.tupleOriginal);
  const original = decodeTuple(wire);
  const reply = decodeTuple(attrs.get(CTA.tupleReply));
  if (wire === undefined || original === undefined || reply === undefined) return undefined;
  return { original, reply, wire: { original: wire, id: attrs.get(CTA.id), zone: attrs.get(CTA.zone) } };
}

function decodeTuple(bytes: Uint8Array | undefined): Tuple | undefined {
  const ip = bytes && attributes(bytes).get(CTA_TUPLE_IP);
  const addresses = ip && attributes(ip);
  const source = addresses?.get(CTA_IP_V4.source);
  const destination = addresses?.get(CTA_IP_V4.destination);
  if (source?.length !== 4 || destination?.length !== 4) return undefined;
  return { source: ipv4FromBytes(source), destination: ipv4FromBytes(destination) };
}

/** What a dump is filtered by in the kernel, and what of it is meant. */
interface Selection {
  readonly dumps: readonly FlowFilter[];
  /** Every flow that is meant begins at the guest or at the IB address, or was sent to the IB address. */
  readonly keys: readonly Ipv4[];
  readonly includes: (flow: Flow) => boolean;
}

/** All requests as one: many are no dearer to hold a flow against than one. */
export function selectionOf(requests: readonly FlushRequest[]): Omit<Selection, 'keys'> {
  const selections = requests.map((request) =>
    request.kind === 'mapping' ? mappingSelection(request) : foreignSelection(request, request.stale),
  );
  const byKey = new Map<Ipv4, Selection[]>();
  for (const selection of selections) {
    for (const key of selection.keys) byKey.set(key, [...(byKey.get(key) ?? []), selection]);
  }
  return {
    dumps: selections.flatMap(({ dumps }) => dumps),
    includes: (flow) =>
      [flow.original.source, flow.original.destination].some((key) =>
        byKey.get(key)?.some(({ includes }) => includes(flow)),
      ),
  };
}

interface MappingFlows {
  readonly guest: Ipv4;
  readonly address: Ipv4;
}

/** The entries that the mapping translates: begun by the guest, or sent to its address. */
function mappingSelection({ guest, address }: MappingFlows): Selection {
  return {
    dumps: [
      { original: { source: guest }, reply: { destination: address } },
      { original: { destination: address }, reply: { source: guest } },
    ],
    keys: [guest, address],
    includes: ({ original, reply }) =>
      (original.source === guest && reply.destination === address) ||
      (original.destination === address && reply.source === guest),
  };
}

/**
 * The entries that are not the mapping's and stand in its way, because the kernel never looks at the NAT rules again
 * for a flow that it knows: to the address but not to the guest; from the guest with no translation or with one to a
 * `stale` address; from the address itself, as when the host or a former guest used it. What another NAT did to the
 * guest's flows (a translation to any other address) is not ours and stays.
 */
function foreignSelection(flows: MappingFlows, stale: readonly Ipv4[]): Selection {
  const { guest, address } = flows;
  const { includes: isMapping } = mappingSelection(flows);
  const untranslated = new Set<Ipv4>([guest, ...stale]);
  return {
    dumps: [{ original: { destination: address } }, { original: { source: guest } }, { original: { source: address } }],
    keys: [guest, address],
    includes: (flow) => {
      const { original, reply } = flow;
      if (original.destination === address && reply.source !== guest) return true;
      if (original.source === guest && untranslated.has(reply.destination) && !isMapping(flow)) return true;
      return original.source === address && !(original.destination === address && reply.source === guest);
    },
  };
}
