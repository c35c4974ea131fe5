/**
 * One iptables rule as data: what it matches and what it does, out of its arguments (iptables(8), iptables-extensions(8)).
 * What is not understood is kept as text in `other`: a rule is never taken to match more or less than it says.
 */
import type { Ipv4 } from '../core/address.ts';
import { ipv4FromNumber, ipv4ToNumber, tryParseIpv4 } from '../core/address.ts';

/** An inclusive range of addresses as unsigned 32-bit numbers. */
export interface Span {
  readonly first: number;
  readonly last: number;
}

export interface AddressMatch extends Span {
  readonly negated: boolean;
}

export interface LinkMatch {
  /** A name, or the beginning of one where it ends in "+". */
  readonly name: string;
  readonly negated: boolean;
}

export interface NameMatch {
  readonly names: readonly string[];
  readonly negated: boolean;
}

export interface Match {
  readonly sources: readonly AddressMatch[];
  readonly destinations: readonly AddressMatch[];
  readonly in: LinkMatch | undefined;
  readonly out: LinkMatch | undefined;
  readonly protocol: NameMatch | undefined;
  /** Of `state` and `conntrack --ctstate`. */
  readonly states: readonly NameMatch[];
  /** `addrtype --dst-type LOCAL`: true, with "!" false. */
  readonly toLocal: boolean | undefined;
  /** Conditions that are not understood, each as it was written: `-m mark --mark 0x1`, `--dport 80`. */
  readonly other: readonly string[];
}

/** What an address is rewritten to. */
export interface Translation extends Span {
  /** Ports or another part behind the address, as written; undefined: none. */
  readonly ports: string | undefined;
}

export type Target =
  /** No `-j`: counts only. */
  | { readonly kind: 'none' }
  | { readonly kind: 'accept' | 'drop' | 'return' | 'masquerade' | 'notrack' }
  | { readonly kind: 'dnat' | 'snat'; readonly to: Translation }
  /** A chain of the same table, or an extension, which of the two only the table knows. */
  | { readonly kind: 'named'; readonly name: string; readonly goto: boolean; readonly options: string };

export interface Rule {
  readonly chain: string;
  /** Line in the input, from 1. */
  readonly line: number;
  /** The arguments behind the chain, as they were read; of iptables-save, what `-D` takes. */
  readonly text: string;
  readonly match: Match;
  readonly target: Target;
  readonly comment: string | undefined;
}

export const ANY: Match = {
  sources: [],
  destinations: [],
  in: undefined,
  out: undefined,
  protocol: undefined,
  states: [],
  toLocal: undefined,
  other: [],
};

const LAST_ADDRESS = 2 ** 32 - 1;
/** Options with an argument that have long names; iptables takes any unambiguous beginning of one, scripts use these. */
const SHORT: Readonly<Record<string, string>> = {
  '--source': '-s',
  '--src': '-s',
  '--dest': '-d',
  '--destination': '-d',
  '--dst': '-d',
  '--in-interface': '-i',
  '--out-interface': '-o',
  '--protocol': '-p',
  '--proto': '-p',
  '--jump': '-j',
  '--goto': '-g',
  '--match': '-m',
};
/** Modules that say nothing by themselves, or whose options are all understood or kept. */
const TRANSPARENT = new Set(['tcp', 'udp', 'icmp', 'sctp', 'comment', 'state', 'conntrack', 'iprange', 'addrtype']);
/** Options of tcp, udp and icmp, which iptables loads with `-p`: they are none of the module or target before them. */
const PROTOCOL_OPTIONS = /^--(?:[ds]port|(?:destination|source)-port|icmp-type|syn|tcp-flags|tcp-option)$/;
const NAT_OPTIONS = new Set(['--random', '--random-fully', '--persistent']);
const PROTOCOL_NAMES: Readonly<Record<string, string>> = { '1': 'icmp', '6': 'tcp', '17': 'udp' };

/**
 * The rules that arguments such as `-s 10.0.0.1 -j DROP` make, without `-A CHAIN`: several where `-s` or `-d` has a list.
 * @param words arguments, quotes taken off
 * @param text the same as it is written
 */
export function parseRules(chain: string, words: readonly string[], text: string, line: number): readonly Rule[] {
  const sources: (AddressMatch | undefined)[][] = [];
  const destinations: (AddressMatch | undefined)[][] = [];
  let link: Pick<Match, 'in' | 'out'> = { in: undefined, out: undefined };
  let protocol: NameMatch | undefined;
  const states: NameMatch[] = [];
  let toLocal: boolean | undefined;
  const other: string[][] = [];
  let comment: string | undefined;
  let target: { name: string; goto: boolean } | undefined;
  let translation: Translation | undefined;
  const targetOptions: string[] = [];
  /** True: further words of an option that is not known belong to it. */
  let open: string[] | undefined;
  let negated = false;
  const keep = (...kept: readonly string[]): void => void other.push([...(negated ? ['!'] : []), ...kept]);

  for (let at = 0; at < words.length; at++) {
    const word = words[at] ?? '';
    if (word === '!') {
      negated = true;
      continue;
    }
    const option = SHORT[word] ?? word;
    // "-s ! 10.0.0.1" is how versions before 1.4.3 wrote it.
    const value = (): string => {
      at += 1;
      if (words[at] === '!') {
        negated = !negated;
        at += 1;
      }
      return words[at] ?? '';
    };
    if (option === '-s' || option === '-d') {
      const list = value();
      const spans = list.split(',').map((part) => parseSpan(part));
      const into = option === '-s' ? sources : destinations;
      if (spans.some((span) => span === undefined)) keep(option, list);
      else if (spans.length > 1 && negated) {
        for (const span of spans) if (span !== undefined) into.push([{ ...span, negated }]);
      } else into.push(spans.map((span) => span && { ...span, negated }));
    } else if (option === '-i' || option === '-o') {
      const name = value();
      link = { ...link, [option === '-i' ? 'in' : 'out']: { name, negated } };
    } else if (option === '-p') {
      const name = value().toLowerCase();
      const names = [PROTOCOL_NAMES[name] ?? name];
      if (name === 'all' || name === '0') {
        if (negated) keep('-p', name);
      } else protocol = { names, negated };
    } else if (option === '-j' || option === '-g') {
      target = { name: value(), goto: option === '-g' };
    } else if (option === '-m') {
      const name = value();
      if (!TRANSPARENT.has(name)) {
        keep('-m', name);
        open = other.at(-1);
        negated = false;
        continue;
      }
    } else if (word === '-c' || word === '--set-counters') at += 2;
    else if (word === '--comment') comment = value();
    else if (word === '--state' || word === '--ctstate') states.push({ names: value().split(','), negated });
    else if (word === '--src-range' || word === '--dst-range') {
      const range = value();
      const span = parseSpan(range);
      if (span === undefined) keep(word, range);
      else (word === '--src-range' ? sources : destinations).push([{ ...span, negated }]);
    } else if (word === '--dst-type' && words[at + 1] === 'LOCAL') {
      value();
      toLocal = !negated;
    } else if (target !== undefined && open === undefined && !negated && isTargetOption(target.name, word)) {
      const name = translationOption(target.name);
      if (name?.startsWith(word)) translation = parseTranslation(value()) ?? translation;
      targetOptions.push(word);
    } else if (word === '--notrack') targetOptions.push(word);
    else if (word.startsWith('-')) {
      if (open?.[0] === '-m' && !PROTOCOL_OPTIONS.test(word)) open.push(...(negated ? ['!'] : []), word);
      else {
        keep(word);
        open = other.at(-1);
      }
      negated = false;
      continue;
    } else if (open !== undefined) {
      open.push(...(negated ? ['!'] : []), word);
      negated = false;
      continue;
    } else if (target !== undefined) targetOptions.push(word);
    else keep(word);
    negated = false;
    open = undefined;
  }
  const match = {
    ...link,
    protocol,
    states,
    toLocal,
    other: other.map((kept) => kept.join(' ')),
  };
  const made = targetOf(target, translation, targetOptions);
  const size = [...sources, ...destinations].reduce((product, list) => product * Math.max(1, list.length), 1);
  if (size > MAX_PRODUCT) {
    // Not followed one by one: it may match anything.
    const much = {
      ...match,
      sources: [],
      destinations: [],
      other: [...match.other, `a list of ${size} pairs of addresses`],
    };
    return [{ chain, line, text, match: much, target: made, comment }];
  }
  return product(sources).flatMap((from) =>
    product(destinations).map((to): Rule => {
      return { chain, line, text, match: { ...match, sources: from, destinations: to }, target: made, comment };
    }),
  );
}

/** All ways of taking one of each list: a list is one rule for each of its addresses. */
function product(lists: readonly (readonly (AddressMatch | undefined)[])[]): readonly (readonly AddressMatch[])[] {
  let all: readonly (readonly AddressMatch[])[] = [[]];
  for (const list of lists) {
    // A condition that every address meets is none.
    const real = list.filter((one): one is AddressMatch => one !== undefined);
    const choices = real.some((one) => !one.negated && isEverything(one)) ? [[]] : real.map((one) => [one]);
    all = all.flatMap((before) => choices.map((one) => [...before, ...one]));
  }
  return all;
}

/** More addresses in lists than that nobody writes; a kernel makes a rule of each combination. */
const MAX_PRODUCT = 4096;

function isEverything({ first, last }: Span): boolean {
  return first === 0 && last === LAST_ADDRESS;
}

function targetOf(
  target: { readonly name: string; readonly goto: boolean } | undefined,
  to: Translation | undefined,
  options: readonly string[],
): Target {
  switch (target?.name) {
    case undefined:
      return { kind: 'none' };
    case 'ACCEPT':
      return { kind: 'accept' };
    case 'DROP':
    case 'REJECT':
      return { kind: 'drop' };
    case 'RETURN':
      return { kind: 'return' };
    case 'MASQUERADE':
      return { kind: 'masquerade' };
    case 'NOTRACK':
      return { kind: 'notrack' };
    case 'CT':
      return options.includes('--notrack')
        ? { kind: 'notrack' }
        : { kind: 'named', name: 'CT', goto: false, options: options.join(' ') };
    case 'DNAT':
    case 'SNAT':
      if (to !== undefined) return { kind: target.name === 'DNAT' ? 'dnat' : 'snat', to };
  }
  return { kind: 'named', name: target?.name ?? '', goto: target?.goto ?? false, options: options.join(' ') };
}

/** Matches may stand behind the target as well; of a target that is not known here, what is not a port is its own. */
function isTargetOption(target: string, word: string): boolean {
  if (!word.startsWith('--') || PROTOCOL_OPTIONS.test(word)) return false;
  const name = translationOption(target);
  return name === undefined || (word.length > 3 && name.startsWith(word)) || NAT_OPTIONS.has(word);
}

/** iptables takes any beginning of it: `--to`, `--to-s`. */
function translationOption(target: string): string | undefined {
  return target === 'DNAT' ? '--to-destination' : target === 'SNAT' ? '--to-source' : undefined;
}

function parseTranslation(text: string): Translation | undefined {
  const [addresses = '', ...ports] = text.split(':');
  const span = parseSpan(addresses);
  return span && { ...span, ports: ports.length === 0 ? undefined : ports.join(':') };
}

/**
 * An address, a prefix with a length or a contiguous mask, or "first-last". Host bits are cut off, and octets that are not
 * said are 0 ("10/8"), as iptables does.
 */
export function parseSpan(text: string): Span | undefined {
  const [from, to, ...more] = text.split('-');
  if (more.length > 0) return undefined;
  if (to !== undefined) {
    const first = tryParseIpv4(from ?? '');
    const last = tryParseIpv4(to);
    if (first === undefined || last === undefined) return undefined;
    const span = { first: ipv4ToNumber(first), last: ipv4ToNumber(last) };
    return span.first <= span.last ? span : undefined;
  }
  const [base = '', mask, ...rest] = text.split('/');
  const address = tryParseIpv4(base + '.0'.repeat(Math.max(0, 4 - base.split('.').length)));
  if (address === undefined || rest.length > 0) return undefined;
  const length = mask === undefined ? 32 : prefixLength(mask);
  if (length === undefined) return undefined;
  const size = 2 ** (32 - length);
  const first = Math.floor(ipv4ToNumber(address) / size) * size;
  return { first, last: first + size - 1 };
}

/** Of "24" or "255.255.255.0"; undefined when it is neither, or a mask with holes. */
export function prefixLength(mask: string): number | undefined {
  if (/^[0-9]{1,2}$/.test(mask)) return Number(mask) <= 32 ? Number(mask) : undefined;
  const dotted = tryParseIpv4(mask);
  if (dotted === undefined) return undefined;
  const size = 2 ** 32 - ipv4ToNumber(dotted);
  const length = 32 - Math.log2(size);
  return Number.isInteger(length) ? length : undefined;
}

/** The one address of a span; undefined when it has several. */
export function singleAddress({ first, last }: Span): Ipv4 | undefined {
  return first === last ? ipv4FromNumber(first) : undefined;
}

export function printSpan({ first, last }: Span): string {
  const size = last - first + 1;
  if (size === 1) return ipv4FromNumber(first);
  const isPrefix = Number.isInteger(Math.log2(size)) && first % size === 0;
  return isPrefix
    ? `${ipv4FromNumber(first)}/${32 - Math.log2(size)}`
    : `${ipv4FromNumber(first)}-${ipv4FromNumber(last)}`;
}
