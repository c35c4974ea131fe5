/**
 * The NAT engine on nftables: changes go as one JSON transaction through an `Nft`, look-ups by key through a reader
 * that asks the kernel for single elements, since `nft get element` fetches the whole set (460 ms at 60,000 elements).
 */
import { type Ipv4, ipv4Bytes, ipv4FromBytes, type Mac, macBytes, tryParseIpv4, tryParseMac } from '../core/address.ts';
import { type ErrorCode, KvmIbError, printable } from '../core/errors.ts';
import type { Elements } from '../core/plan.ts';
import { NftError, type NftErrorCode } from '../nftables-json/errors.ts';
import type { Nft } from '../nftables-json/run.ts';
import { transaction } from '../nftables-json/transaction.ts';
import type { Command, Element, ElementData, ElementKey, TableListing } from '../nftables-json/types.ts';
import type { Count, NatEngine, ObservedPairs, Pair, TableSpec, Traffic } from './engine.ts';
import {
  COUNTING,
  differences,
  GUEST_ANY_MAC,
  GUEST_MAC,
  GUEST_RECEIVED,
  GUEST_SENT,
  GUEST_TO_IB,
  IB_TO_GUEST,
  MAPPED_ADDRESSES,
  MAPPED_GUESTS,
  ruleset,
  SCHEMA,
  SCHEMA_KEY,
  staleChains,
  TABLE,
  uncounted,
} from './ruleset.ts';

/** Reads elements of sets and maps of family `ip` by key, at a cost that does not grow with their number. */
export interface ElementReader {
  /**
   * @param keys as the kernel keeps them: each field in network order (`mark` in the host's), padded to 4 bytes
   * @returns for each key in turn the data of a map, `present` for a set, undefined when it is not there; `no-set` when
   * the table or the set is not there
   */
  get(
    table: string,
    set: string,
    keys: readonly Uint8Array[],
  ): readonly (Uint8Array | 'present' | undefined)[] | 'no-set';
}

export interface NftEngineOptions {
  readonly nft: Nft;
  readonly reader: ElementReader;
}

/** @returns the engine; its methods throw KvmIbError for what nft refuses, and what the reader throws */
export function createNftEngine({ nft: plain, reader }: NftEngineOptions): NatEngine {
  const nft: Pick<Nft, 'run' | 'listTable'> = {
    run: (commands) => plain.run(commands).catch(rethrow('Cannot change the table ip kvm_ib')),
    listTable: (family, name) => plain.listTable(family, name).catch(rethrow('Cannot list the table ip kvm_ib')),
  };
  return {
    name: 'nft',
    capabilities: { atomic: true, constantLookup: true },
    lookup: async (pairs) => lookup(reader, pairs),
    list: async (spec) => {
      const listing = await nft.listTable(TABLE.family, TABLE.name);
      if (listing === undefined)
        return { ...NOTHING, traffic: new Map(), differences: [`table ${TABLE.family} ${TABLE.name}: missing`] };
      const found = [...differences(listing, spec), ...keyDifferences(listing), ...countingDifferences(listing)];
      return { ...observe(listing), traffic: trafficOf(listing), differences: found };
    },
    change: async (change) => {
      const commands = [
        ...elementCommands('delete', change.remove, {}),
        ...elementCommands('add', change.add, change.comments),
      ];
      if (commands.length > 0) await nft.run(transaction(...commands));
    },
    load: async (spec, pairs) => {
      const listing = await plain.listTable(TABLE.family, TABLE.name).catch(ignoreUnreadable);
      if (listing === 'unreadable') {
        // What its sets look like is not known: they are taken to count, then not to.
        const emptied = COUNTING.map((name): Command => ({ flush: { set: { ...IN_TABLE, name } } }));
        await plain.run(loading(spec, pairs, [], [], emptied)).catch(async (error: unknown) => {
          if (!(error instanceof NftError) || error.code !== 'exists')
            rethrow('Cannot change the table ip kvm_ib')(error);
          await nft.run(loading(spec, pairs, [], COUNTING, []));
        });
        return;
      }
      const stale = listing === undefined ? [] : staleChains(listing, spec);
      const remade = listing === undefined ? [] : uncounted(listing);
      const guests = new Set(pairs.map(({ guest }) => guest));
      const gone = COUNTING.filter((name) => !remade.includes(name)).flatMap((name): readonly Command[] => {
        const elem = counted(listing, name).flatMap(([guest]) => (guests.has(guest) ? [] : [guest]));
        return elem.length === 0 ? [] : [{ delete: { element: { ...IN_TABLE, name, elem } } }];
      });
      await nft.run(loading(spec, pairs, stale, remade, gone));
    },
    remove: async () => {
      // `add` first: a deletion of what is not there is refused, and nft before 1.0.7 has no `destroy`.
      await nft.run(transaction({ add: { table: TABLE } }, { delete: { table: TABLE } }));
    },
  };
}

/** @param counts what becomes of the elements that count: those of the pairs stay as they are, or are added */
function loading(
  spec: TableSpec,
  pairs: readonly Pair[],
  stale: readonly string[],
  remade: readonly string[],
  counts: readonly Command[],
): ReturnType<typeof transaction> {
  const comments = Object.fromEntries(pairs.map((pair) => [pair.guest, pair.comment]));
  return transaction(
    ...ruleset(spec, stale, remade),
    ...[GUEST_TO_IB, IB_TO_GUEST].map((name): Command => ({ flush: { map: { ...IN_TABLE, name } } })),
    ...[GUEST_MAC, GUEST_ANY_MAC, MAPPED_GUESTS, MAPPED_ADDRESSES].map(
      (name): Command => ({ flush: { set: { ...IN_TABLE, name } } }),
    ),
    ...counts,
    ...elementCommands('add', elementsOf(pairs), comments),
  );
}

/** What an operator can do about each class of refusal. */
const REFUSALS: Readonly<Record<NftErrorCode, readonly [ErrorCode, string]>> = {
  'not-found': ['failed', 'somebody changed the table in between: run `kvm-ib reconcile`, then try again'],
  exists: ['conflict', 'somebody else wrote into the table: run `kvm-ib status`'],
  'not-permitted': ['not-permitted', 'run it as root'],
  'too-old': ['host-lacks', 'install nft 0.9.3 or later, built with JSON'],
  crashed: ['failed', 'another nft version has made sets that this one cannot read: use one version on a host'],
  refused: ['failed', 'run `kvm-ib status` to see what differs'],
};

/**
 * What cannot be listed can still be loaded over; only chains that are not ours any more stay, and do nothing. nft 1.0.6
 * prints broken JSON for a dormant table, which loading wakes.
 */
function ignoreUnreadable(error: unknown): 'unreadable' {
  if (error instanceof NftError && error.code === 'refused') return 'unreadable';
  return rethrow('Cannot list the table ip kvm_ib')(error);
}

function rethrow(message: string): (error: unknown) => never {
  return (error) => {
    if (!(error instanceof NftError)) throw error;
    const [code, fix] = REFUSALS[error.code];
    throw new KvmIbError(code, message, { why: printable(error.message, 400), fix, cause: error });
  };
}

const IN_TABLE = { family: TABLE.family, table: TABLE.name } as const;

const NOTHING: ObservedPairs = {
  table: false,
  tag: null,
  guestToIb: new Map(),
  ibToGuest: new Map(),
  macs: new Set(),
  unbound: new Set(),
};

/** All elements of these pairs, changed together or not at all. */
export function elementsOf(pairs: readonly Pair[]): Elements {
  return {
    guestToIb: pairs.map(({ guest, address }) => ({ guest, address })),
    ibToGuest: pairs.map(({ guest, address }) => ({ guest, address })),
    macs: pairs.flatMap(({ guest, mac }) => (mac === null ? [] : [{ guest, mac }])),
    unbound: pairs.filter(({ mac }) => mac === null).map(({ guest }) => guest),
  };
}

/**
 * Commands for the elements that are there to add or delete; a deletion goes by key, as the kernel does. The sets
 * `mapped_guests` and `mapped_addresses` go with the maps whose keys they hold. The elements that count come and go with
 * those of `guest_to_ib`; a deletion of theirs adds first, so that none need be there.
 */
export function elementCommands(
  verb: 'add' | 'delete',
  elements: Elements,
  comments: Readonly<Record<string, string>>,
): readonly Command[] {
  const named = (guest: Ipv4): ElementKey => {
    const comment = comments[guest];
    return comment === undefined || comment === '' ? guest : { elem: { val: guest, comment } };
  };
  const adds = verb === 'add';
  const lists: readonly (readonly [string, readonly Element[]])[] = [
    [GUEST_TO_IB, elements.guestToIb.map(({ guest, address }) => (adds ? [named(guest), address] : guest))],
    [IB_TO_GUEST, elements.ibToGuest.map(({ address, guest }) => (adds ? [address, guest] : address))],
    [MAPPED_GUESTS, elements.guestToIb.map(({ guest }) => guest)],
    [MAPPED_ADDRESSES, elements.ibToGuest.map(({ address }) => address)],
    [GUEST_MAC, elements.macs.map(({ guest, mac }) => ({ concat: [guest, mac] }))],
    [GUEST_ANY_MAC, elements.unbound],
  ];
  const counting = COUNTING.map((name) => [name, elements.guestToIb.map(({ guest }) => guest)] as const);
  const commands = (which: 'add' | 'delete', of: readonly (readonly [string, readonly Element[]])[]) =>
    of
      .filter(([, elem]) => elem.length > 0)
      .map(([name, elem]): Command => {
        const element = { ...IN_TABLE, name, elem };
        return which === 'add' ? { add: { element } } : { delete: { element } };
      });
  return [...commands(verb, lists), ...commands('add', counting), ...(adds ? [] : commands('delete', counting))];
}

function lookup(reader: ElementReader, pairs: readonly Pair[]): ObservedPairs {
  const tag = reader.get(TABLE.name, SCHEMA, [schemaKey()]);
  const bound = pairs.filter(isBound);
  const guests = pairs.map(({ guest }) => ipv4Bytes(guest));
  const addresses = pairs.map(({ address }) => ipv4Bytes(address));
  const guestToIb = both(reader, GUEST_TO_IB, MAPPED_GUESTS, guests);
  const ibToGuest = both(reader, IB_TO_GUEST, MAPPED_ADDRESSES, addresses);
  const macs = reader.get(
    TABLE.name,
    GUEST_MAC,
    bound.map(({ guest, mac }) => boundKey(guest, mac)),
  );
  const unbound = reader.get(TABLE.name, GUEST_ANY_MAC, guests);
  if (tag === 'no-set') return NOTHING;
  if (guestToIb === 'no-set' || ibToGuest === 'no-set' || macs === 'no-set' || unbound === 'no-set') return NOTHING;
  return {
    table: true,
    tag: tagFromBytes(tag[0]),
    guestToIb: found(pairs, guestToIb, (pair) => pair.guest),
    ibToGuest: found(pairs, ibToGuest, (pair) => pair.address),
    macs: new Set(bound.filter((_, index) => macs[index] !== undefined).map(({ guest, mac }) => `${guest} ${mac}`)),
    unbound: new Set(pairs.filter((_, index) => unbound[index] !== undefined).map(({ guest }) => guest)),
  };
}

/** The data of a map for each key that the set of its keys has as well. */
function both(reader: ElementReader, map: string, set: string, keys: readonly Uint8Array[]) {
  const data = reader.get(TABLE.name, map, keys);
  const present = reader.get(TABLE.name, set, keys);
  if (data === 'no-set' || present === 'no-set') return 'no-set';
  return data.map((value, index) => (present[index] === undefined ? undefined : value));
}

function isBound(pair: Pair): pair is Pair & { readonly mac: Mac } {
  return pair.mac !== null;
}

function found(
  pairs: readonly Pair[],
  data: readonly (Uint8Array | 'present' | undefined)[],
  key: (pair: Pair) => Ipv4,
): ReadonlyMap<Ipv4, Ipv4> {
  return new Map(
    pairs.flatMap((pair, index) => {
      const value = data[index];
      return value instanceof Uint8Array ? [[key(pair), ipv4FromBytes(value)] as const] : [];
    }),
  );
}

/** A concatenated key: each field fills whole 4-byte registers. */
function boundKey(guest: Ipv4, mac: Mac): Uint8Array {
  const key = new Uint8Array(12);
  key.set(ipv4Bytes(guest), 0);
  key.set(macBytes(mac), 4);
  return key;
}

/** Marks are kept in the byte order of the host. */
function schemaKey(): Uint8Array {
  return new Uint8Array(Uint32Array.of(SCHEMA_KEY).buffer);
}

function tagFromBytes(data: Uint8Array | 'present' | undefined): string | null {
  if (!(data instanceof Uint8Array) || data.length < 4) return null;
  return printTag(new Uint32Array(data.slice(0, 4).buffer)[0] ?? 0);
}

function printTag(tag: number): string {
  return tag.toString(16).padStart(8, '0');
}

function mapElements(listing: TableListing, name: string): readonly (readonly [ElementKey, ElementData])[] | undefined {
  return listing.maps.find((candidate) => candidate.name === name)?.elem;
}

function setElements(listing: TableListing, name: string): readonly ElementKey[] | undefined {
  return listing.sets.find((candidate) => candidate.name === name)?.elem;
}

function addressesOf(elements: readonly ElementKey[] | undefined): ReadonlySet<Ipv4> {
  return new Set((elements ?? []).flatMap((key) => address(bare(key)) ?? []));
}

/** Where `mapped_guests` or `mapped_addresses` do not hold the keys of their map; loading the table mends it. */
function keyDifferences(listing: TableListing): readonly string[] {
  return (
    [
      [GUEST_TO_IB, MAPPED_GUESTS],
      [IB_TO_GUEST, MAPPED_ADDRESSES],
    ] as const
  ).flatMap(([map, set]) => {
    const keys = new Set(addressPairs(mapElements(listing, map) ?? []).keys());
    const held = addressesOf(setElements(listing, set));
    return [
      ...[...keys].filter((key) => !held.has(key)).map((key) => `set ${set}: lacks ${key} of ${map}`),
      ...[...held].filter((key) => !keys.has(key)).map((key) => `set ${set}: ${key} is not in ${map}`),
    ];
  });
}

function observe(listing: TableListing): ObservedPairs {
  const guestToIb = mapElements(listing, GUEST_TO_IB);
  const ibToGuest = mapElements(listing, IB_TO_GUEST);
  const macs = setElements(listing, GUEST_MAC);
  const unbound = setElements(listing, GUEST_ANY_MAC);
  const guests = setElements(listing, MAPPED_GUESTS);
  const addresses = setElements(listing, MAPPED_ADDRESSES);
  const tag = mapElements(listing, SCHEMA)?.find(([key]) => bare(key) === SCHEMA_KEY)?.[1];
  return {
    table: [guestToIb, ibToGuest, macs, unbound, guests, addresses].every((elements) => elements !== undefined),
    tag: typeof tag === 'number' ? printTag(tag) : null,
    guestToIb: addressPairs(guestToIb ?? []),
    ibToGuest: addressPairs(ibToGuest ?? []),
    macs: new Set((macs ?? []).flatMap(boundOf)),
    unbound: addressesOf(unbound),
  };
}

/** The elements of a set that counts, with what they counted; undefined: nothing counts there. */
function counted(listing: TableListing | undefined, name: string): readonly (readonly [Ipv4, Count | undefined])[] {
  const elements: readonly ElementKey[] = listing?.sets.find((set) => set.name === name)?.elem ?? [];
  return elements.flatMap((key) => {
    const guest = address(bare(key));
    const extras = typeof key === 'object' && 'elem' in key ? key.elem : undefined;
    return guest === undefined ? [] : [[guest, extras?.counter] as const];
  });
}

function trafficOf(listing: TableListing): ReadonlyMap<Ipv4, Traffic> {
  const received = new Map(counted(listing, GUEST_RECEIVED));
  return new Map(
    counted(listing, GUEST_SENT).flatMap(([guest, sent]) => {
      const other = received.get(guest);
      return sent === undefined || other === undefined ? [] : [[guest, { sent, received: other }] as const];
    }),
  );
}

/** The sets that count have the guests of the pairs, no more and no less. */
function countingDifferences(listing: TableListing): readonly string[] {
  const guests = observe(listing).guestToIb;
  return COUNTING.filter((name) => listing.sets.some((set) => set.name === name)).flatMap((name) => {
    const known = new Set(counted(listing, name).map(([guest]) => guest));
    return [
      ...([...guests.keys()].every((guest) => known.has(guest))
        ? []
        : [`set ${name}: without some guest that has a pair`]),
      ...([...known].every((guest) => guests.has(guest)) ? [] : [`set ${name}: with a guest that has no pair`]),
    ];
  });
}

function bare(key: ElementKey) {
  return typeof key === 'object' && 'elem' in key ? key.elem.val : key;
}

function address(value: unknown): Ipv4 | undefined {
  return typeof value === 'string' ? tryParseIpv4(value) : undefined;
}

function addressPairs(elements: readonly (readonly [ElementKey, ElementData])[]): ReadonlyMap<Ipv4, Ipv4> {
  return new Map(
    elements.flatMap(([key, data]) => {
      const from = address(bare(key));
      const to = address(data);
      return from === undefined || to === undefined ? [] : [[from, to] as const];
    }),
  );
}

function boundOf(key: ElementKey): readonly string[] {
  const value = bare(key);
  if (typeof value !== 'object' || !('concat' in value)) return [];
  const guest = address(value.concat[0]);
  const mac = typeof value.concat[1] === 'string' ? tryParseMac(value.concat[1]) : undefined;
  return guest === undefined || mac === undefined ? [] : [`${guest} ${mac}`];
}
