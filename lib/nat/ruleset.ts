/**
 * The rule set of table `ip kvm_ib`: what rulesets/kvm-ib.nft explains for one network, as commands for any number of
 * them. Static chains and rules, dynamic maps: a mapping is elements only, so no rule is written when a guest comes.
 *
 * Every expression here is paid by every packet that gets that far. Rules are ordered so that what most packets need
 * comes first, and the many pairs of links are one lookup.
 */
import { ipv4ToNumber, type Range, rangeSize } from '../core/address.ts';
import type { ServedNetwork } from '../core/mapping.ts';
import type {
  Chain,
  Command,
  ElementValue,
  Expression,
  NftMap,
  NftSet,
  Rule,
  Statement,
  TableListing,
} from '../nftables-json/types.ts';
import type { TableSpec } from './engine.ts';

export const TABLE = { family: 'ip', name: 'kvm_ib' } as const;
const IN_TABLE = { family: TABLE.family, table: TABLE.name } as const;

export const GUEST_TO_IB = 'guest_to_ib';
export const IB_TO_GUEST = 'ib_to_guest';
export const GUEST_MAC = 'guest_mac';
export const GUEST_ANY_MAC = 'guest_any_mac';
/** The keys of the two maps once more: Linux 6.1 takes no map where a rule only asks whether an address is in it. */
export const MAPPED_GUESTS = 'mapped_guests';
export const MAPPED_ADDRESSES = 'mapped_addresses';
/**
 * Count, for each guest address that has a pair, what the host forwards from it and to it. No rule decides by them: the
 * look-up that finds the element counts, and that is all. nft before 1.0.6 ignores the counter, so nothing counts there.
 */
export const GUEST_SENT = 'guest_sent';
export const GUEST_RECEIVED = 'guest_received';
/** They keep their elements, and with these their counts, when the table is loaded anew. */
export const COUNTING: readonly string[] = [GUEST_SENT, GUEST_RECEIVED];
/** Holds the tag of the rule set under this key: read in the time of one lookup, replaced with the rules. */
export const SCHEMA = 'schema';
export const SCHEMA_KEY = 1;

/** The names that `PairChange` and the listing know the maps and sets by. All are hashes: a change is flat in their size. */
const MAPS: readonly NftMap[] = [
  { ...IN_TABLE, name: SCHEMA, type: 'mark', map: 'mark' },
  { ...IN_TABLE, name: GUEST_TO_IB, type: 'ipv4_addr', map: 'ipv4_addr' },
  { ...IN_TABLE, name: IB_TO_GUEST, type: 'ipv4_addr', map: 'ipv4_addr' },
];
const SETS: readonly NftSet[] = [
  { ...IN_TABLE, name: GUEST_MAC, type: ['ipv4_addr', 'ether_addr'] },
  { ...IN_TABLE, name: GUEST_ANY_MAC, type: 'ipv4_addr' },
  { ...IN_TABLE, name: MAPPED_GUESTS, type: 'ipv4_addr' },
  { ...IN_TABLE, name: MAPPED_ADDRESSES, type: 'ipv4_addr' },
  { ...IN_TABLE, name: GUEST_SENT, type: 'ipv4_addr', stmt: [{ counter: null }] },
  { ...IN_TABLE, name: GUEST_RECEIVED, type: 'ipv4_addr', stmt: [{ counter: null }] },
];

/**
 * NAT sits 5 before iptables' and libvirt's (dstnat -100, srcnat 100): the first decision about a connection wins, at
 * equal priority that of whoever came last. The guards come before the FORWARD and INPUT chains of others, so that
 * their counters name the reason; the last one comes after all source NAT.
 */
const BASE_CHAINS: readonly Chain[] = [
  base('prerouting', 'nat', 'prerouting', -105),
  base('output', 'nat', 'output', -105),
  base('input', 'nat', 'input', 95),
  base('postrouting', 'nat', 'postrouting', 95),
  base('guard_forward', 'filter', 'forward', -5),
  base('guard_input', 'filter', 'input', -5),
  base('guard_postrouting', 'filter', 'postrouting', 300),
];

function base(name: string, type: 'nat' | 'filter', hook: NonNullable<Chain['hook']>, prio: number): Chain {
  return { ...IN_TABLE, name, type, hook, prio, policy: 'accept' };
}

const IIFNAME: Expression = { meta: { key: 'iifname' } };
const OIFNAME: Expression = { meta: { key: 'oifname' } };
const SADDR: Expression = { payload: { protocol: 'ip', field: 'saddr' } };
const DADDR: Expression = { payload: { protocol: 'ip', field: 'daddr' } };
/** The link that the routing table sends the packet to. */
const WAY_OUT: Expression = { fib: { result: 'oifname', flags: ['daddr'] } };
/** Multicast, broadcast and what is reserved. */
const NO_UNICAST: Expression = { prefix: { addr: '224.0.0.0', len: 3 } };
const ORIGINAL_DADDR: Expression = { ct: { key: 'ip daddr', dir: 'original' } };

const ACCEPT: Statement = { accept: null };
const RETURN: Statement = { return: null };
/** Drops are counted, so that a look at the table says why something does not get through; accepts are not: it costs. */
const DROP: readonly Statement[] = [{ counter: null }, { drop: null }];
const DNAT_BY_MAP: Statement = { dnat: { addr: { map: { key: DADDR, data: `@${IB_TO_GUEST}` } } } };
const SNAT_BY_MAP: Statement = { snat: { addr: { map: { key: SADDR, data: `@${GUEST_TO_IB}` } } } };
const WAS_DNAT: Statement = { match: { op: 'in', left: { ct: { key: 'status' } }, right: 'dnat' } };
/**
 * The flow was sent to an IB address of this host. DNAT alone does not say so: port forwardings of others on the same
 * bridge have it too, and are left alone.
 */
const WAS_SENT_TO_IB: readonly Statement[] = [WAS_DNAT, is(ORIGINAL_DADDR, `@${MAPPED_ADDRESSES}`)];

const TRANSLATED: Statement = { match: { op: 'in', left: { ct: { key: 'status' } }, right: ['snat', 'dnat'] } };
const COUNT_SENT: Statement = { match: { op: '==', left: SADDR, right: `@${GUEST_SENT}` } };
const COUNT_RECEIVED: Statement = { match: { op: '==', left: DADDR, right: `@${GUEST_RECEIVED}` } };

function is(left: Expression, right: Expression): Statement {
  return { match: { op: '==', left, right } };
}

function isNot(left: Expression, right: Expression): Statement {
  return { match: { op: '!=', left, right } };
}

/** nft lists an anonymous set of one value as the value, from some version on: so no such set is written. */
function oneOf(values: readonly string[]): Expression {
  const [first, ...more] = values;
  return first !== undefined && more.length === 0 ? first : { set: values };
}

/** nft lists a whole prefix as such; other ranges stay ranges. */
function rangeOf(range: Range): Expression {
  const size = rangeSize(range);
  if (size === 1) return range.first;
  const aligned = Number.isInteger(Math.log2(size)) && ipv4ToNumber(range.first) % size === 0;
  if (aligned) return { prefix: { addr: range.first, len: 32 - Math.log2(size) } };
  return { range: [range.first, range.last] };
}

/** Some ranges as the right side of a comparison; undefined: there is none. */
function rangesOf(ranges: readonly Range[]): Expression | undefined {
  const [first, ...more] = ranges;
  if (first === undefined) return undefined;
  // Such a set is written only while mappings of an older configuration stand.
  return more.length === 0 ? rangeOf(first) : { set: ranges.map((range) => rangeOf(range) as ElementValue) };
}

/** No statement where the set is empty: a comparison with it would always hold. */
function outside(left: Expression, ranges: readonly Range[]): readonly Statement[] {
  const set = rangesOf(ranges);
  return set === undefined ? [] : [isNot(left, set)];
}

/** The table without its elements. */
interface RuleSet {
  readonly maps: readonly NftMap[];
  readonly sets: readonly NftSet[];
  readonly chains: readonly Chain[];
  readonly rules: readonly Rule[];
}

function build(spec: TableSpec): RuleSet {
  const { networks } = spec;
  const isolated = networks.filter((network) => network.isolate);
  const bridges = distinct(networks.map((network) => network.bridge));
  const devices = distinct(networks.map((network) => network.device));
  const hostOf = (network: ServedNetwork) => spec.hostAddresses.get(network.name) ?? [];
  const onBridge = (bridge: string) => networks.filter((network) => network.bridge === bridge);
  const sharesBridge = (network: ServedNetwork): boolean => onBridge(network.bridge).length > 1;

  const chains: Chain[] = [];
  const rules: Rule[] = [];
  const chain = (name: string): void => void chains.push({ ...IN_TABLE, name });
  const rule = (of: string, comment: string, ...expr: readonly Statement[]): void =>
    void rules.push({ ...IN_TABLE, chain: of, expr, comment });
  if (networks.length === 0) return { maps: MAPS, sets: SETS, chains: BASE_CHAINS, rules };

  // Regular chains first: nft before 1.0 wants a chain to be there when a verdict names it.
  for (const network of isolated) {
    const { name } = network;
    chain(`sender_${name}`);
    rule(`sender_${name}`, `source is no guest address of network ${name}`, ...outside(SADDR, network.guests), ...DROP);
    const pair: Expression = { concat: [SADDR, { payload: { protocol: 'ether', field: 'saddr' } }] };
    rule(`sender_${name}`, 'mapped guest with its own MAC', is(pair, `@${GUEST_MAC}`), RETURN);
    rule(`sender_${name}`, 'mapped guest, mapping without a MAC', is(SADDR, `@${GUEST_ANY_MAC}`), RETURN);
    rule(`sender_${name}`, 'forged: mapped guest address with another MAC', is(SADDR, `@${MAPPED_GUESTS}`), ...DROP);
    rule(`sender_${name}`, 'guest without a mapping', ...DROP);

    chain(`by_address_${name}`);
    rule(`by_address_${name}`, 'the source decides', { jump: { target: `sender_${name}` } });
    rule(`by_address_${name}`, 'counts what the guest sends', COUNT_SENT);
    rule(`by_address_${name}`, 'counts what the guest receives', COUNT_RECEIVED);
  }
  for (const network of isolated) {
    const { name } = network;
    const goSender: Statement = { goto: { target: `sender_${name}` } };
    chain(`to_fabric_${name}`);
    const invalid: Statement = { match: { op: 'in', left: { ct: { key: 'state' } }, right: 'invalid' } };
    rule(`to_fabric_${name}`, 'NAT skips invalid packets: guest address would leave', invalid, ...DROP);
    rule(`to_fabric_${name}`, 'the source decides', { jump: { target: `sender_${name}` } });
    rule(`to_fabric_${name}`, 'counts what the guest sends', COUNT_SENT);

    chain(`to_guests_${name}`);
    if (sharesBridge(network)) {
      rule(`to_guests_${name}`, 'guest of another network', ...outside(DADDR, network.guests), ...DROP);
    }
    rule(`to_guests_${name}`, 'counts what the guest receives', TRANSLATED, COUNT_RECEIVED, ACCEPT);
    rule(`to_guests_${name}`, 'translated: sent to an IB address, or an answer', TRANSLATED, ACCEPT);
    rule(`to_guests_${name}`, 'guest address used directly from the fabric', ...DROP);

    if (onBridge(network.bridge)[0] === network) {
      chain(`between_guests_${name}`);
      if (!sharesBridge(network)) {
        const target: Statement = { goto: { target: `by_address_${name}` } };
        rule(`between_guests_${name}`, 'by IB address only; bridged frames pass', ...WAS_SENT_TO_IB, target);
      } else {
        for (const one of onBridge(network.bridge)) {
          const guests = rangesOf(one.guests);
          if (guests === undefined) continue;
          const within = [...WAS_SENT_TO_IB, is(SADDR, guests), is(DADDR, guests)];
          const target: Statement = { goto: { target: `by_address_${one.name}` } };
          rule(`between_guests_${name}`, `within network ${one.name}`, ...within, target);
        }
        rule(`between_guests_${name}`, 'networks do not mix', ...WAS_SENT_TO_IB, ...DROP);
      }
      // A guest that has just come from another host sends so, until it knows this bridge. Let pass, the frame would be tracked
      // without translation, and its connection would go on like that.
      rule(
        `between_guests_${name}`,
        'flooded: the way to its destination is not by this bridge',
        isNot(DADDR, NO_UNICAST),
        isNot(WAY_OUT, network.bridge),
        ...DROP,
      );
    }

    if (isolated.find((one) => one.device === network.device) === network) {
      chain(`through_${name}`);
      // Who asked for the address before its guest moved may still send to this host. Passed on, the packet would be tracked
      // without translation, and the guest's connection would go on like that when it comes to this host.
      for (const one of networks.filter(({ device }) => device === network.device)) {
        const addresses = rangesOf(one.addresses);
        if (addresses === undefined) continue;
        rule(`through_${name}`, 'IB address of a guest that is not here', is(DADDR, addresses), ...DROP);
      }
    }

    chain(`to_host_${name}`);
    const others = distinct(networks.filter((other) => other.device !== network.device).flatMap(hostOf));
    if (others.length > 0) {
      rule(`to_host_${name}`, "the host's address on another network", is(DADDR, oneOf(others)), ...DROP);
    }
    rule(`to_host_${name}`, 'a mapped source must not be forged', is(SADDR, `@${MAPPED_GUESTS}`), goSender);
  }
  for (const bridge of bridges) {
    const [first, ...more] = onBridge(bridge).filter((network) => network.isolate);
    if (first === undefined || more.length === 0) continue;
    chain(toHost(bridge, networks));
    for (const network of more) {
      const guests = rangesOf(network.guests);
      if (guests === undefined) continue;
      const target: Statement = { goto: { target: `to_host_${network.name}` } };
      rule(toHost(bridge, networks), `guest of network ${network.name}`, is(SADDR, guests), target);
    }
    rule(toHost(bridge, networks), 'the others', { goto: { target: `to_host_${first.name}` } });
  }
  const moved = isolated.flatMap((from) =>
    isolated.filter((to) => to.device === from.device && to.bridge !== from.bridge).map((to) => [from, to] as const),
  );
  if (moved.length > 0) {
    chain('between_bridges');
    for (const [from, to] of moved) {
      const guests = rangesOf(to.guests);
      if (guests === undefined) continue;
      const links = [is(IIFNAME, from.bridge), is(OIFNAME, to.bridge)];
      rule(
        'between_bridges',
        `${from.name} to ${to.name}: on one fabric`,
        ...links,
        ...WAS_SENT_TO_IB,
        is(DADDR, guests),
        {
          goto: { target: `by_address_${from.name}` },
        },
      );
    }
    rule('between_bridges', 'networks do not mix', ...DROP);
  }
  if (isolated.length > 0 && networks.length > 1) {
    chain('between_networks');
    rule('between_networks', 'networks do not mix', ...DROP);
  }
  if (isolated.length < networks.length) {
    // The source of a first packet is translated later only, so its connection does not say so yet.
    for (const [name, when, counts] of [
      ['open_to_fabric', [], [COUNT_SENT]],
      ['open_to_guests', [TRANSLATED], [COUNT_RECEIVED]],
      ['open_between_guests', WAS_SENT_TO_IB, [COUNT_SENT, COUNT_RECEIVED]],
    ] as const) {
      chain(name);
      for (const count of counts) {
        rule(name, `counts what the guest ${count === COUNT_SENT ? 'sends' : 'receives'}`, ...when, count);
      }
    }
  }
  chain('not_for_host');
  const answer = is({ ct: { key: 'direction' } }, 'reply');
  rule('not_for_host', 'answer to the host itself, which used an IB address', answer, ACCEPT);
  rule(
    'not_for_host',
    'foreign link, invalid, or flow older than its mapping: host never answers for a guest',
    ...DROP,
  );

  rule('prerouting', 'to an IB address: on to its guest', is(IIFNAME, oneOf([...devices, ...bridges])), DNAT_BY_MAP);
  rule('output', 'host to an IB address: on to its guest', DNAT_BY_MAP);
  for (const network of networks) {
    const own = hostOf(network);
    if (own.length === 0) continue;
    const toOwn = [is(IIFNAME, network.bridge), is(DADDR, oneOf(own))];
    rule('input', `${network.name}: guest to the host: host sees the IB address`, ...toOwn, SNAT_BY_MAP);
  }
  rule('postrouting', 'guest to the fabric: leaves with its IB address', is(OIFNAME, oneOf(devices)), SNAT_BY_MAP);
  const loopback = [is(OIFNAME, oneOf(bridges)), ...WAS_SENT_TO_IB];
  rule('postrouting', 'guest to a guest here by IB address: seen with its own', ...loopback, SNAT_BY_MAP);
  for (const network of networks) {
    // The host picks the IB address itself as source, since the alias makes it local.
    const guests = sharesBridge(network) ? rangesOf(network.guests) : undefined;
    const toGuests = guests === undefined ? [] : [is(DADDR, guests)];
    const fromHost = [is(OIFNAME, network.bridge), WAS_DNAT, is(SADDR, `@${MAPPED_ADDRESSES}`), ...toGuests];
    const own = hostOf(network)[0];
    const seenAs: Statement = own === undefined ? { masquerade: null } : { snat: { addr: own } };
    rule('postrouting', `${network.name}: host to an IB address: guest sees the host`, ...fromHost, seenAs);
  }

  const key: Expression = { concat: [IIFNAME, OIFNAME] };
  rule('guard_forward', 'from where to where', { vmap: { key, data: { set: verdictsByLinks(networks) } } });
  if (isolated.length > 0) {
    const guarded = is(OIFNAME, oneOf(distinct(isolated.map((network) => network.bridge))));
    // Not by the miss in the look-up above alone: while rules are replaced a packet may find the map of the old ones empty.
    const foreign = isNot(IIFNAME, oneOf([...devices, ...bridges]));
    rule('guard_forward', 'IB address used through a foreign link', foreign, guarded, ...WAS_SENT_TO_IB, ...DROP);
  }
  const toMapped = [isNot(IIFNAME, 'lo'), is(DADDR, `@${MAPPED_ADDRESSES}`)];
  rule('guard_input', 'packet for a guest that was not translated', ...toMapped, { goto: { target: 'not_for_host' } });
  if (isolated.length > 0) {
    const byBridge = distinct(isolated.map(({ bridge }) => bridge)).map(
      (bridge) => [bridge, { goto: { target: toHost(bridge, networks) } }] as const,
    );
    rule('guard_input', 'guest to the host', { vmap: { key: IIFNAME, data: { set: byBridge } } });
    const guarded = is(OIFNAME, oneOf(distinct(isolated.map((network) => network.device))));
    for (const network of networks) {
      const guests = rangesOf(network.guests);
      if (guests === undefined) continue;
      const comment = `guest address of network ${network.name} on the fabric: must stay 0`;
      rule('guard_postrouting', comment, guarded, is(SADDR, guests), ...DROP);
    }
  }
  return { maps: MAPS, sets: SETS, chains: [...chains, ...BASE_CHAINS], rules };
}

function distinct<T>(values: readonly T[]): readonly T[] {
  return [...new Set(values)];
}

/** Where packets from a bridge to the host go. */
function toHost(bridge: string, networks: readonly ServedNetwork[]): string {
  const [first, ...more] = networks.filter((network) => network.bridge === bridge);
  // A network name has no dot in front.
  return more.length === 0 ? `to_host_${first?.name}` : `to_host_.${bridge}`;
}

/**
 * One element for each pair of our links that a packet may come and go by. Not listed, so untouched: one link to another,
 * which is the host's own routing, and networks without isolation among themselves. Networks share a link only while
 * the configuration of one was changed under running guests.
 */
function verdictsByLinks(networks: readonly ServedNetwork[]) {
  const verdicts = new Map<string, readonly [{ concat: readonly string[] }, { goto: { target: string } }]>();
  const to = (from: string, out: string, target: string): void => {
    const key = `${from} ${out}`;
    if (!verdicts.has(key)) verdicts.set(key, [{ concat: [from, out] }, { goto: { target } }]);
  };
  for (const { name, bridge, device, isolate } of networks) {
    if (!isolate) {
      to(bridge, device, 'open_to_fabric');
      to(device, bridge, 'open_to_guests');
      to(bridge, bridge, 'open_between_guests');
      continue;
    }
    to(bridge, device, `to_fabric_${name}`);
    to(device, bridge, `to_guests_${name}`);
    to(bridge, bridge, `between_guests_${name}`);
    // Of networks that share a device the first one comes first here as well.
    to(device, device, `through_${name}`);
  }
  const others = networks.flatMap((one) =>
    networks.flatMap((other) => (one !== other && (one.isolate || other.isolate) ? [[one, other] as const] : [])),
  );
  for (const [one, other] of others) {
    if (one.device === other.device) to(one.bridge, other.bridge, 'between_bridges');
  }
  for (const [one, other] of others) {
    to(one.bridge, other.bridge, 'between_networks');
    to(one.bridge, other.device, 'between_networks');
    to(other.device, one.bridge, 'between_networks');
  }
  return [...verdicts.values()];
}

/**
 * The commands, for one transaction, that create the table or bring it to this rule set. Elements and running flows
 * stay: the table is flushed of its rules, never deleted, because with the last rule that uses connection tracking its
 * hooks go, and every translated flow dies.
 * @param stale chains to delete, from `staleChains`; the transaction fails when one is not there
 * @param remade sets to delete and make anew, from `uncounted`; the same
 */
export function ruleset(
  spec: TableSpec,
  stale: readonly string[] = [],
  remade: readonly string[] = [],
): readonly Command[] {
  const { maps, sets, chains, rules } = build(spec);
  const schema = { ...IN_TABLE, name: SCHEMA } as const;
  const tag: [number, number] = [SCHEMA_KEY, Number.parseInt(rulesetTag(spec), 16)];
  return [
    { add: { table: TABLE } },
    { flush: { table: TABLE } },
    ...stale.map((name): Command => ({ delete: { chain: { ...IN_TABLE, name } } })),
    ...remade.map((name): Command => ({ delete: { set: { ...IN_TABLE, name } } })),
    ...maps.map((map): Command => ({ add: { map } })),
    ...sets.map((set): Command => ({ add: { set } })),
    ...chains.map((chain): Command => ({ add: { chain } })),
    ...rules.map((rule): Command => ({ add: { rule } })),
    { flush: { map: schema } },
    { add: { element: { ...schema, elem: [tag] } } },
  ];
}

/** Chains of a listed table that this rule set does not have, or not with this hook and priority: to be deleted first. */
export function staleChains(listing: TableListing, spec: TableSpec): readonly string[] {
  const wanted = new Map(build(spec).chains.map((chain) => [chain.name, canonical(chain)]));
  return listing.chains.filter((chain) => wanted.get(chain.name) !== canonical(chain)).map((chain) => chain.name);
}

/**
 * Sets of a listed table that are to count and do not, as after an upgrade of nft: the kernel refuses to add a set that
 * is there with other statements. Where nft cannot make them count they are made anew at each load, which does no harm.
 */
export function uncounted(listing: TableListing): readonly string[] {
  return listing.sets.filter(({ name, stmt }) => COUNTING.includes(name) && stmt === undefined).map(({ name }) => name);
}

/** A 32-bit tag of the rule set as 8 hex digits (FNV-1a of its canonical form): equal for equal rules, else all but surely not. */
export function rulesetTag(spec: TableSpec): string {
  let hash = 0x811c9dc5;
  for (const char of canonical(build(spec))) {
    hash = Math.imul(hash ^ char.charCodeAt(0), 0x01000193);
  }
  return (hash >>> 0).toString(16).padStart(8, '0');
}

/**
 * What is different in a listed table from what `ruleset` loads, one line each; elements are not looked at. Empty: as loaded.
 * Counts, handles and the order within anonymous sets do not matter.
 */
export function differences(listing: TableListing, spec: TableSpec): readonly string[] {
  const wanted = build(spec);
  const found: string[] = [];
  // Any flag: nft 1.0.6 prints another word, or broken JSON, where it means `dormant`.
  if (listing.table.flags.length > 0) found.push('table: has a flag; a dormant table does nothing');
  compareNamed('map', wanted.maps, listing.maps, found);
  compareNamed('set', wanted.sets, listing.sets, found);
  compareNamed('chain', wanted.chains, listing.chains, found);
  for (const other of listing.counters) found.push(`counter ${other.name}: unknown`);
  for (const other of listing.others) found.push(`${other.kind}: unknown`);

  for (const { name } of wanted.chains) {
    if (!listing.chains.some((chain) => chain.name === name)) continue;
    const expected = wanted.rules.filter((rule) => rule.chain === name);
    const actual = listing.rules.filter((rule) => rule.chain === name);
    const expectedForms = expected.map(canonical);
    const actualForms = actual.map(canonical);
    const before = found.length;
    expected.forEach((rule, index) => {
      if (actualForms.includes(expectedForms[index] ?? '')) return;
      const changed = actual.some((other) => other.comment === rule.comment);
      found.push(`chain ${name}, rule "${rule.comment}": ${changed ? 'changed' : 'missing'}`);
    });
    actual.forEach((rule, index) => {
      if (expectedForms.includes(actualForms[index] ?? '')) return;
      if (expected.some((other) => other.comment === rule.comment)) return;
      found.push(
        `chain ${name}, rule ${rule.comment === undefined ? `of handle ${rule.handle}` : `"${rule.comment}"`}: unknown`,
      );
    });
    if (found.length === before && expectedForms.join() !== actualForms.join()) {
      found.push(`chain ${name}: rules doubled or in another order`);
    }
  }
  return found;
}

type Named = { readonly name: string };

function compareNamed(kind: string, wanted: readonly Named[], listed: readonly Named[], found: string[]): void {
  const listedForms = new Map(listed.map((item) => [item.name, canonical(item)]));
  for (const item of wanted) {
    const form = listedForms.get(item.name);
    if (form === undefined) found.push(`${kind} ${item.name}: missing`);
    else if (form !== canonical(item)) found.push(`${kind} ${item.name}: changed`);
    listedForms.delete(item.name);
  }
  for (const name of listedForms.keys()) found.push(`${kind} ${name}: unknown`);
}

/** What a kernel adds to an object, what does not belong to the rule set, and the counter of a set, which old nft leaves out. */
const NOT_COMPARED: readonly string[] = ['handle', 'elem', 'stmt'];

/** One text for all forms of the same thing: keys sorted, counters at zero, anonymous sets and flags in one order. */
function canonical(value: unknown): string {
  return JSON.stringify(normal(value));
}

function normal(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(normal);
  if (typeof value !== 'object' || value === null) return value;
  const entries = Object.entries(value).filter(([key]) => !NOT_COMPARED.includes(key));
  entries.sort(([a], [b]) => (a < b ? -1 : 1));
  return Object.fromEntries(entries.map(([key, item]) => [key, normalField(key, item)]));
}

function normalField(key: string, item: unknown): unknown {
  if (key === 'counter') return null;
  if ((key === 'set' || key === 'right') && Array.isArray(item)) {
    const forms = item.map((element) => canonical(element)).sort();
    return forms;
  }
  return normal(item);
}
