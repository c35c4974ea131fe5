/**
 * Finds 1-to-1 NAT in iptables rules: a DNAT of one address to one guest, and the SNAT of that guest back. Chains are
 * followed from the hooks, so it does not matter where a rule stands, in which order, or how it is written.
 */
import type { Ipv4 } from '../core/address.ts';
import { KvmIbError } from '../core/errors.ts';
import type { AddressMatch, LinkMatch, Match, Rule } from '../iptables/rule.ts';
import { ANY, printSpan, singleAddress } from '../iptables/rule.ts';
import type { Chain, Table, Tables, Variant } from '../iptables/table.ts';

/** Rules that were read in one piece. */
export interface RuleSource {
  /** Which part of the kernel has them; null: a file. */
  readonly variant: Variant | null;
  /** As messages call it: `iptables-legacy`, or a file. */
  readonly name: string;
  readonly tables: Tables;
}

/** A rule, and where it was found. */
export interface FoundRule {
  readonly source: RuleSource;
  readonly table: string;
  readonly rule: Rule;
}

/** A rule that rewrites one address to one other. */
export interface Translating extends FoundRule {
  readonly kind: 'dnat' | 'snat';
  readonly hook: string;
  readonly guest: Ipv4;
  readonly address: Ipv4;
  /** Links that it is limited to, along the chains that lead to it. */
  readonly links: readonly LinkMatch[];
  /** What else limits it, as written. */
  readonly conditions: readonly string[];
}

export interface LeftAlone extends FoundRule {
  readonly why: string;
}

/** All rules for one guest and one address. */
export interface Candidate {
  readonly guest: Ipv4;
  readonly address: Ipv4;
  readonly rules: readonly Translating[];
  /** DNAT for what comes in, SNAT for what goes out: with both it is a pair, with one a half. */
  readonly has: { readonly dnat: boolean; readonly snat: boolean };
}

export interface Found {
  readonly candidates: readonly Candidate[];
  readonly left: readonly LeftAlone[];
  /** Rules of other tables than nat: they go on as they are. */
  readonly otherTables: readonly { readonly source: RuleSource; readonly table: string; readonly rules: number }[];
}

/** Visits of rules, chains that are reached several ways counted each time. */
const MAX_VISITS = 2_000_000;
const MAX_DEPTH = 32;
/** Port matches make a rule a port forwarding, not a mapping of a whole address. */
const PORTS =
  /^(?:! )?(?:--(?:dport|sport|dports|sports|ports|destination-ports?|source-ports?|icmp-type)\b|-m multiport\b)/;

/** @throws KvmIbError `unsupported` when chains call each other too often to be followed */
export function findPairs(sources: readonly RuleSource[]): Found {
  const entries: Translating[] = [];
  const reasons = new Map<Rule, LeftAlone>();
  const otherTables: { source: RuleSource; table: string; rules: number }[] = [];
  for (const source of sources) {
    for (const table of source.tables.values()) {
      const rules = [...table.chains.values()].reduce((sum, { rules: list }) => sum + list.length, 0);
      if (table.name !== 'nat') {
        if (rules > 0) otherTables.push({ source, table: table.name, rules });
        continue;
      }
      collect(source, table, entries, reasons);
    }
  }
  const candidates = grouped(entries);
  return { candidates, left: [...reasons.values()], otherTables };
}

interface Context {
  readonly hook: string;
  readonly match: Match;
}

function collect(source: RuleSource, table: Table, entries: Translating[], reasons: Map<Rule, LeftAlone>): void {
  const found = new Map<Rule, Translating[]>();
  const whys = new Map<Rule, string>();
  let visits = 0;
  const visit = (chain: Chain, context: Context, depth: number): void => {
    for (const rule of chain.rules) {
      visits += 1;
      if (visits > MAX_VISITS || depth > MAX_DEPTH) {
        throw new KvmIbError('unsupported', `Cannot follow the chains of table nat of ${source.name}`, {
          why: depth > MAX_DEPTH ? `chains call each other ${MAX_DEPTH} deep` : 'chains call each other too often',
          fix: 'take rules that are not needed out of it',
        });
      }
      const match = both(context.match, rule.match);
      const sub = rule.target.kind === 'named' ? table.chains.get(rule.target.name) : undefined;
      if (sub !== undefined && sub.policy === undefined) {
        if (!whys.has(rule)) whys.set(rule, 'it calls a chain');
        visit(sub, { ...context, match }, depth + 1);
        continue;
      }
      const one = translating(source, table, context.hook, rule, match);
      if (typeof one === 'string') whys.set(rule, one);
      else found.set(rule, [...(found.get(rule) ?? []), one]);
    }
  };
  for (const chain of table.chains.values()) {
    if (chain.policy !== undefined) visit(chain, { hook: chain.name, match: ANY }, 0);
  }
  for (const chain of table.chains.values()) {
    for (const rule of chain.rules) {
      const own = found.get(rule);
      const addresses = new Set(own?.map(({ guest, address }) => `${guest} ${address}`));
      if (own !== undefined && addresses.size === 1 && !whys.has(rule)) entries.push(...own);
      else {
        const several = own === undefined ? undefined : 'the chains that lead to it make it several translations';
        const why = several ?? whys.get(rule) ?? 'no hook leads to its chain';
        reasons.set(rule, { source, table: table.name, rule, why });
      }
    }
  }
}

/** @returns why it is none */
function translating(source: RuleSource, table: Table, hook: string, rule: Rule, match: Match): Translating | string {
  const { target } = rule;
  if (target.kind === 'masquerade') return 'it masquerades: many addresses behind one';
  if (target.kind === 'named') return namedTarget(target.name);
  if (target.kind !== 'dnat' && target.kind !== 'snat') return 'it translates nothing';
  if (target.to.ports !== undefined) return 'it forwards to a port, not to an address';
  const to = singleAddress(target.to);
  if (to === undefined) return `it translates to ${printSpan(target.to)}, not to one address`;
  const spans = target.kind === 'dnat' ? match.destinations : match.sources;
  const from = onlyAddress(spans);
  const which = target.kind === 'dnat' ? 'destination' : 'source';
  if (from === 'none') return `no ${which} fits all its conditions`;
  if (from === undefined) return `it has no single ${which} address`;
  const ports = match.other.find((condition) => PORTS.test(condition));
  if (ports !== undefined) return `it is for some ports only (${ports})`;
  if (match.states.some(({ names, negated }) => (negated ? names.includes('NEW') : !names.some(isSeen)))) {
    return 'its states are never seen in table nat, which has only first packets';
  }
  const rest = target.kind === 'dnat' ? match.sources : match.destinations;
  const links = [match.in, match.out].filter((link): link is LinkMatch => link !== undefined);
  const conditions = [
    ...rest.map((span) => `${span.negated ? '! ' : ''}${target.kind === 'dnat' ? '-s' : '-d'} ${printSpan(span)}`),
    ...match.states
      .filter(({ names, negated }) => !negated && !names.includes('NEW'))
      .map(({ names }) => `--ctstate ${names.join()}`),
    ...(match.protocol === undefined ? [] : [`${match.protocol.negated ? '! ' : ''}-p ${match.protocol.names.join()}`]),
    ...match.other,
  ];
  const [guest, address] = target.kind === 'dnat' ? [to, from] : [from, to];
  return { source, table: table.name, rule, kind: target.kind, hook, guest, address, links, conditions };
}

/** Of a first packet conntrack may also say that it has been translated. */
function isSeen(state: string): boolean {
  return state === 'NEW' || state === 'DNAT' || state === 'SNAT';
}

function namedTarget(name: string): string {
  if (name === 'NETMAP') return 'NETMAP translates a whole prefix: write it as a network of the configuration';
  if (name === 'REDIRECT') return 'it redirects to the host itself';
  if (name === 'DNAT' || name === 'SNAT') return 'what it translates to is not understood';
  return `its target ${name} translates nothing that is known`;
}

/** Conditions of a calling rule and of the rule that it leads to. */
function both(outer: Match, inner: Match): Match {
  const differ = (a: LinkMatch | undefined, b: LinkMatch | undefined): boolean =>
    a !== undefined && b !== undefined && (a.name !== b.name || a.negated !== b.negated);
  const link = (a: LinkMatch | undefined, b: LinkMatch | undefined): LinkMatch | undefined =>
    b?.negated ? (a ?? b) : (b ?? a);
  const said = (option: string, l: LinkMatch | undefined): string =>
    `${l?.negated ? '! ' : ''}${option} ${l?.name ?? ''}`;
  const protocols = outer.protocol !== undefined && inner.protocol !== undefined;
  return {
    sources: [...outer.sources, ...inner.sources],
    destinations: [...outer.destinations, ...inner.destinations],
    in: link(outer.in, inner.in),
    out: link(outer.out, inner.out),
    protocol: inner.protocol ?? outer.protocol,
    states: [...outer.states, ...inner.states],
    toLocal: inner.toLocal ?? outer.toLocal,
    other: [
      ...outer.other,
      ...inner.other,
      ...(differ(outer.in, inner.in) ? [said('-i', outer.in)] : []),
      ...(differ(outer.out, inner.out) ? [said('-o', outer.out)] : []),
      ...(protocols && outer.protocol ? [`-p ${outer.protocol.names.join()}`] : []),
    ],
  };
}

/** The one address that fits all; undefined: there are several; `none`: there is none. */
function onlyAddress(spans: readonly AddressMatch[]): Ipv4 | 'none' | undefined {
  let first = 0;
  let last = 2 ** 32 - 1;
  for (const span of spans) {
    if (span.negated) continue;
    first = Math.max(first, span.first);
    last = Math.min(last, span.last);
  }
  if (first > last) return 'none';
  if (first !== last) return undefined;
  if (spans.some((span) => span.negated && span.first <= first && span.last >= first)) return 'none';
  return singleAddress({ first, last });
}

function grouped(entries: readonly Translating[]): readonly Candidate[] {
  const groups = new Map<string, Translating[]>();
  for (const entry of entries) {
    const key = `${entry.guest} ${entry.address}`;
    const group = groups.get(key);
    if (group === undefined) groups.set(key, [entry]);
    else group.push(entry);
  }
  return [...groups.values()].flatMap((rules): readonly Candidate[] => {
    const [first] = rules;
    if (first === undefined) return [];
    const has = {
      dnat: rules.some(({ kind, hook }) => kind === 'dnat' && hook === 'PREROUTING'),
      snat: rules.some(({ kind, hook }) => kind === 'snat' && hook === 'POSTROUTING'),
    };
    return [{ guest: first.guest, address: first.address, rules, has }];
  });
}
