/**
 * What a chain decides about a packet, where parts of the packet may stand for many (any address of the fabric, any port).
 * Each rule matches, does not, or may: then both ways are followed, and what each depends on is kept.
 */
import { KvmIbError } from '../core/errors.ts';
import type { Match, Rule, Span, Translation } from './rule.ts';
import type { Chain, Table } from './table.ts';

/** Addresses that a packet may have there; ascending. */
export type AddressSet = readonly Span[];

/** A link: by name, or one that is none of some. */
export type PacketLink =
  | { readonly kind: 'named'; readonly name: string }
  | { readonly kind: 'other-than'; readonly names: readonly string[] };

export interface Packet {
  /** Undefined: it comes from the host itself, or the hook does not say. */
  readonly in: PacketLink | undefined;
  readonly out: PacketLink | undefined;
  readonly source: AddressSet;
  readonly destination: AddressSet;
  readonly protocol: 'tcp' | 'udp' | 'icmp' | 'other';
  /** What `--ctstate` calls it: NEW, and DNAT or SNAT once it has been translated. */
  readonly states: readonly string[];
  /** Whether the host has the destination address itself. */
  readonly toLocal: boolean;
}

export type Decision =
  /** The end of the chain, or an ACCEPT: no translation here. */
  | { readonly kind: 'none' }
  | { readonly kind: 'drop' | 'masquerade' | 'notrack' }
  | { readonly kind: 'dnat' | 'snat'; readonly to: Translation }
  /** A target that rewrites in its own way, or that is not known. */
  | { readonly kind: 'unknown'; readonly name: string };

export interface Branch {
  readonly decision: Decision;
  /** The rule that decided; undefined: none did. */
  readonly rule: Rule | undefined;
  /** What it depends on, as conditions of rules are written; empty: it is so for every packet. */
  readonly conditions: readonly string[];
}

/** Targets of the nat and raw tables that only note something, and let the packet go on. */
const GOES_ON = new Set([
  'LOG',
  'NFLOG',
  'ULOG',
  'MARK',
  'CONNMARK',
  'TRACE',
  'SET',
  'CLASSIFY',
  'AUDIT',
  'IDLETIMER',
  'LED',
  'CT',
]);
const MAX_BRANCHES = 16;
/** Rules that one packet may be held against; chains that call each other can multiply. */
const MAX_STEPS = 50_000;
const MAX_DEPTH = 32;

type Answer = 'yes' | 'no' | 'maybe';

/**
 * Every way that the packet may go through a chain of a table; a chain that is not there decides nothing.
 * @param without rules that are taken to be gone
 * @param onProtocol called when a rule that may match asks for the protocol
 */
export function walk(
  table: Table | undefined,
  chain: string,
  packet: Packet,
  without: ReadonlySet<Rule> = NOTHING,
  onProtocol: () => void = () => undefined,
): readonly Branch[] {
  const found = table?.chains.get(chain);
  if (table === undefined || found === undefined) return [NO_DECISION];
  const walker: Walker = { table, packet, without, onProtocol, steps: 0 };
  const branches = walkChain(walker, found, [], 0);
  return distinct(branches.map((way) => ('decision' in way ? way : { ...NO_DECISION, conditions: way.fellThrough })));
}

const NOTHING: ReadonlySet<Rule> = new Set();
const NO_DECISION: Branch = { decision: { kind: 'none' }, rule: undefined, conditions: [] };

interface Walker {
  readonly table: Table;
  readonly packet: Packet;
  readonly without: ReadonlySet<Rule>;
  readonly onProtocol: () => void;
  steps: number;
}

/** What a chain decided, or on which conditions it decided nothing. */
type Way = Branch | { readonly fellThrough: readonly string[] };

function walkChain(walker: Walker, chain: Chain, conditions: readonly string[], depth: number): readonly Way[] {
  const ways: Way[] = [];
  let held = conditions;
  for (const rule of candidates(chain, walker.packet)) {
    if (walker.without.has(rule)) continue;
    walker.steps += 1;
    if (walker.steps > MAX_STEPS || ways.length > MAX_BRANCHES || depth > MAX_DEPTH) return [...ways, tooMany(rule)];
    const doubts: string[] = [];
    const answer = matches(rule.match, walker.packet, doubts, walker.onProtocol);
    if (answer === 'no') continue;
    const then = answer === 'maybe' ? [...held, ...doubts] : held;
    const { target } = rule;
    const sub = target.kind === 'named' ? walker.table.chains.get(target.name) : undefined;
    if (target.kind === 'named' && sub === undefined && GOES_ON.has(target.name)) continue;
    if (target.kind === 'none') continue;
    /** Conditions of the packets that are left: those that the rule did not match, or that came back from its chain. */
    const left = answer === 'maybe' ? [[...held, notAll(doubts)]] : [];
    if (sub !== undefined && target.kind === 'named') {
      for (const way of walkChain(walker, sub, then, depth + 1)) {
        if ('decision' in way) ways.push(way);
        else if (!target.goto) left.push([...way.fellThrough]);
        else ways.push(chain.policy === undefined ? way : { ...ofPolicy(chain), conditions: way.fellThrough });
      }
    } else if (target.kind === 'return') {
      ways.push(chain.policy === undefined ? { fellThrough: then } : { ...ofPolicy(chain), conditions: then });
    } else ways.push({ decision: decisionOf(rule), rule, conditions: then });
    const [first, ...more] = left;
    if (first === undefined) return ways;
    held = more.reduce(common, first);
  }
  if (chain.policy === undefined) return [...ways, { fellThrough: held }];
  return [...ways, { ...ofPolicy(chain), conditions: held }];
}

function ofPolicy(chain: Chain): Branch {
  return chain.policy === 'DROP' ? { ...NO_DECISION, decision: { kind: 'drop' } } : NO_DECISION;
}

function tooMany(rule: Rule): Branch {
  return { decision: { kind: 'unknown', name: 'more ways than can be followed' }, rule, conditions: [] };
}

function decisionOf({ target }: Rule): Decision {
  switch (target.kind) {
    case 'dnat':
    case 'snat':
      return { kind: target.kind, to: target.to };
    case 'drop':
    case 'masquerade':
    case 'notrack':
      return { kind: target.kind };
    case 'named':
      return { kind: 'unknown', name: target.name };
    default:
      return { kind: 'none' };
  }
}

/** Conditions that two ways share: what the one or the other depends on. */
function common(one: readonly string[], other: readonly string[]): string[] {
  return one.filter((condition) => other.includes(condition));
}

function notAll(conditions: readonly string[]): string {
  return conditions.length === 1 ? `not ${conditions[0]}` : `not (${conditions.join(' and ')})`;
}

/** Ways that end alike are one, and depend only on what all of them do. */
function distinct(branches: readonly Branch[]): readonly Branch[] {
  const found = new Map<string, Branch>();
  for (const branch of branches) {
    const key = JSON.stringify(branch.decision);
    const known = found.get(key);
    const conditions = known === undefined ? branch.conditions : common(known.conditions, branch.conditions);
    found.set(key, { ...(known ?? branch), conditions });
  }
  return [...found.values()];
}

function matches(match: Match, packet: Packet, doubts: string[], onProtocol: () => void): Answer {
  let answer: Answer = 'yes';
  const take = (one: Answer, what: () => string): boolean => {
    if (one === 'no') return false;
    if (one === 'maybe') {
      answer = 'maybe';
      doubts.push(what());
    }
    return true;
  };
  for (const span of match.destinations) {
    if (!take(negate(within(packet.destination, span), span.negated), () => condition('-d', span))) return 'no';
  }
  for (const span of match.sources) {
    if (!take(negate(within(packet.source, span), span.negated), () => condition('-s', span))) return 'no';
  }
  for (const [option, wanted, link] of [
    ['-i', match.in, packet.in],
    ['-o', match.out, packet.out],
  ] as const) {
    if (wanted === undefined) continue;
    const said = `${wanted.negated ? '! ' : ''}${option} ${wanted.name}`;
    if (!take(negate(onLink(link, wanted.name), wanted.negated), () => said)) return 'no';
  }
  if (match.protocol !== undefined) {
    onProtocol();
    const { names, negated } = match.protocol;
    const is: Answer = names.includes(packet.protocol)
      ? 'yes'
      : packet.protocol === 'other' && isOther(names)
        ? 'maybe'
        : 'no';
    if (!take(negate(is, negated), () => `-p ${names.join()}`)) return 'no';
  }
  for (const { names, negated } of match.states) {
    // Only the first packet of a connection is asked about; that of an expected one is RELATED.
    const is: Answer = packet.states.some((state) => names.includes(state))
      ? 'yes'
      : names.includes('RELATED')
        ? 'maybe'
        : 'no';
    if (!take(negate(is, negated), () => `--ctstate ${names.join()}`)) return 'no';
  }
  if (match.toLocal !== undefined && match.toLocal !== packet.toLocal) return 'no';
  for (const other of match.other) take('maybe', () => other);
  return answer;
}

function isOther(names: readonly string[]): boolean {
  return !names.some((name) => name === 'tcp' || name === 'udp' || name === 'icmp');
}

function condition(option: string, span: Span & { readonly negated: boolean }): string {
  const size = span.last - span.first;
  const first = [24, 16, 8, 0].map((shift) => Math.floor(span.first / 2 ** shift) % 256).join('.');
  return `${span.negated ? '! ' : ''}${option} ${first}${size === 0 ? '' : ` and ${size} more`}`;
}

function negate(answer: Answer, negated: boolean): Answer {
  if (!negated || answer === 'maybe') return answer;
  return answer === 'yes' ? 'no' : 'yes';
}

function within(set: AddressSet, { first, last }: Span): Answer {
  let inside = false;
  let outside = false;
  for (const span of set) {
    if (span.last < first || span.first > last) outside = true;
    else if (span.first >= first && span.last <= last) inside = true;
    else return 'maybe';
  }
  return inside && outside ? 'maybe' : inside ? 'yes' : 'no';
}

function onLink(link: PacketLink | undefined, name: string): Answer {
  if (link === undefined) return 'no';
  const covers = (one: string): boolean => (name.endsWith('+') ? one.startsWith(name.slice(0, -1)) : one === name);
  if (name === '+') return 'yes';
  if (link.kind === 'named') return covers(link.name) ? 'yes' : 'no';
  return !name.endsWith('+') && link.names.includes(name) ? 'no' : 'maybe';
}

/** The rules of a chain that may match, found without a look at each: most rules of such hosts name one address. */
function candidates(chain: Chain, packet: Packet): Iterable<Rule> {
  if (chain.rules.length < 64) return chain.rules;
  const index = indexOf(chain);
  const places = [
    ...index.general,
    ...placesOf(index.byDestination, index.destinationKeys, packet.destination),
    ...placesOf(index.bySource, index.sourceKeys, packet.source),
  ].sort((a, b) => a - b);
  if (places.length > MAX_STEPS * 4) {
    throw new KvmIbError('unsupported', `Cannot compare the rules of chain ${chain.name}`, {
      why: `${places.length} of its rules may match one packet, more than can be followed`,
      fix: 'take rules that are not needed out of it',
    });
  }
  return places.flatMap((place) => chain.rules[place] ?? []);
}

interface ChainIndex {
  readonly general: readonly number[];
  readonly byDestination: ReadonlyMap<number, readonly number[]>;
  readonly destinationKeys: readonly number[];
  readonly bySource: ReadonlyMap<number, readonly number[]>;
  readonly sourceKeys: readonly number[];
}

const indexes = new WeakMap<readonly Rule[], ChainIndex>();

function indexOf({ rules }: Chain): ChainIndex {
  const known = indexes.get(rules);
  if (known !== undefined) return known;
  const general: number[] = [];
  const byDestination = new Map<number, number[]>();
  const bySource = new Map<number, number[]>();
  const put = (map: Map<number, number[]>, key: number, place: number): void => {
    const places = map.get(key);
    if (places === undefined) map.set(key, [place]);
    else places.push(place);
  };
  rules.forEach(({ match }, place) => {
    const destination = exact(match.destinations);
    const source = exact(match.sources);
    if (destination !== undefined) put(byDestination, destination, place);
    else if (source !== undefined) put(bySource, source, place);
    else general.push(place);
  });
  const keysOf = (map: ReadonlyMap<number, unknown>): readonly number[] => [...map.keys()].sort((a, b) => a - b);
  const made = {
    general,
    byDestination,
    destinationKeys: keysOf(byDestination),
    bySource,
    sourceKeys: keysOf(bySource),
  };
  indexes.set(rules, made);
  return made;
}

function exact(list: readonly (Span & { readonly negated: boolean })[]): number | undefined {
  return list.find(({ first, last, negated }) => first === last && !negated)?.first;
}

function placesOf(
  map: ReadonlyMap<number, readonly number[]>,
  keys: readonly number[],
  set: AddressSet,
): readonly number[] {
  const places: number[] = [];
  for (const { first, last } of set) {
    if (first === last) places.push(...(map.get(first) ?? []));
    else {
      for (let at = lowerBound(keys, first); at < keys.length && (keys[at] ?? 0) <= last; at++) {
        for (const place of map.get(keys[at] ?? 0) ?? []) places.push(place);
      }
    }
  }
  return places;
}

function lowerBound(keys: readonly number[], value: number): number {
  let low = 0;
  let high = keys.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((keys[middle] ?? 0) < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Addresses of `set` that are none of `taken`. Both may be in any order. */
export function without(set: AddressSet, taken: readonly Span[]): AddressSet {
  const holes = [...taken].sort((a, b) => a.first - b.first);
  const rest: Span[] = [];
  for (const { first, last } of [...set].sort((a, b) => a.first - b.first)) {
    let from = first;
    for (const hole of holes) {
      if (hole.last < from) continue;
      if (hole.first > last) break;
      if (hole.first > from) rest.push({ first: from, last: hole.first - 1 });
      from = Math.max(from, hole.last + 1);
      if (from > last) break;
    }
    if (from <= last) rest.push({ first: from, last });
  }
  return rest;
}
