/**
 * Reads elements of nf_tables maps and sets by key, over nfnetlink (linux/netfilter/nf_tables.h). One look-up in the
 * kernel for each key, whatever the size: `nft get element` and `nft list` fetch the whole set. Family ip only; reading
 * needs CAP_NET_ADMIN. Nothing is ever written here.
 */
import { type Ipv4, ipv4Bytes, type Mac, macBytes } from '../core/address.ts';
import { attribute, attributes, concat, cString, type Message, nested, sameBytes, u8, u16be } from '../link/wire.ts';
import { ERRNO, messagesOf, NETLINK_NETFILTER, openNetlink } from './netlink-socket.ts';

const NFNL_SUBSYS_NFTABLES = 10 << 8;
const NFT_MSG = {
  getSet: NFNL_SUBSYS_NFTABLES | 10,
  newSetElement: NFNL_SUBSYS_NFTABLES | 12,
  getSetElement: NFNL_SUBSYS_NFTABLES | 13,
} as const;
const NFPROTO_IPV4 = 2;
const NFGENMSG = 4;
const NFTA_SET = { table: 1, name: 2 } as const;
const NFTA_SET_ELEM_LIST = { table: 1, set: 2, elements: 3 } as const;
const NFTA_LIST_ELEM = 1;
const NFTA_SET_ELEM = { key: 1, data: 2 } as const;
const NFTA_DATA_VALUE = 1;

/** What a key has: the bytes that a map gives for it, `present` in a set, undefined when it is not there. */
export type Element = Uint8Array | 'present' | undefined;

export interface ElementReader {
  /**
   * The elements of the keys, in their order. Keys are bytes as the kernel compares them: `ipv4Bytes`,
   * `ipv4MacKey`, a mark as four bytes in host order.
   * @returns `no-set` when there is no such table, or no such map or set in it
   * @throws KvmIbError `not-permitted`; `failed` when a key has the wrong length
   */
  get(table: string, set: string, keys: readonly Uint8Array[]): readonly Element[] | 'no-set';
  close(): void;
}

export async function createElementReader(): Promise<ElementReader> {
  const socket = await openNetlink(NETLINK_NETFILTER);
  const setExists = (table: string, set: string): boolean => {
    const reply = socket.request(NFT_MSG.getSet, 0, encodeGetSet(table, set));
    if (reply.kind === 'refused' && reply.errno === ERRNO.ENOENT) return false;
    messagesOf(reply, `Cannot read the set ${set} of table ip ${table}`);
    return true;
  };
  return {
    get: (table, set, keys) => {
      const elements: Element[] = [];
      // ENOENT means that element, set or table is missing: which, is asked only once.
      let known = false;
      for (const key of keys) {
        const reply = socket.request(NFT_MSG.getSetElement, 0, encodeGetElement(table, set, key));
        if (reply.kind === 'refused' && reply.errno === ERRNO.ENOENT) {
          if (!known && !setExists(table, set)) return 'no-set';
          elements.push(undefined);
        } else {
          const messages = messagesOf(reply, `Cannot read an element of ${set} of table ip ${table}`);
          elements.push(messages.map((message) => decodeElement(message, key)).find((found) => found !== undefined));
        }
        known = true;
      }
      if (!known && !setExists(table, set)) return 'no-set';
      return elements;
    },
    close: () => socket.close(),
  };
}

/** The key of `ipv4_addr . ether_addr`: each part is filled up to four bytes. */
export function ipv4MacKey(address: Ipv4, mac: Mac): Uint8Array {
  return concat(ipv4Bytes(address), macBytes(mac), new Uint8Array(2));
}

function nfgenmsg(): Uint8Array {
  return concat(u8(NFPROTO_IPV4), u8(0), u16be(0));
}

function encodeGetSet(table: string, set: string): Uint8Array {
  return concat(nfgenmsg(), attribute(NFTA_SET.table, cString(table)), attribute(NFTA_SET.name, cString(set)));
}

function encodeGetElement(table: string, set: string, key: Uint8Array): Uint8Array {
  return concat(
    nfgenmsg(),
    attribute(NFTA_SET_ELEM_LIST.table, cString(table)),
    attribute(NFTA_SET_ELEM_LIST.set, cString(set)),
    nested(
      NFTA_SET_ELEM_LIST.elements,
      nested(NFTA_LIST_ELEM, nested(NFTA_SET_ELEM.key, attribute(NFTA_DATA_VALUE, key))),
    ),
  );
}

/** The element of `key` in the answer; undefined when it holds another, or none. Pure; for the tests. */
export function decodeElement(message: Message, key: Uint8Array): Element {
  if (message.type !== NFT_MSG.newSetElement || message.payload.length < NFGENMSG) return undefined;
  const list = attributes(message.payload.subarray(NFGENMSG)).get(NFTA_SET_ELEM_LIST.elements);
  const element = list && attributes(list).get(NFTA_LIST_ELEM);
  const parts = element && attributes(element);
  const answered = parts?.get(NFTA_SET_ELEM.key);
  const answeredKey = answered && attributes(answered).get(NFTA_DATA_VALUE);
  if (parts === undefined || answeredKey === undefined || !sameBytes(answeredKey, key)) return undefined;
  const data = parts.get(NFTA_SET_ELEM.data);
  if (data === undefined) return 'present';
  return attributes(data).get(NFTA_DATA_VALUE);
}
