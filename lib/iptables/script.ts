/**
 * Reads shell scripts that set NAT up: `iptables -t nat -A …`, `ip addr add …`, `ifconfig ib0:1 …`, with variables, `for`
 * loops, functions and simple arithmetic (POSIX 2, and the braces of bash). Nothing is run. What depends on anything but
 * the text itself (an `if`, the output of a program) is passed over and named.
 */
import { ipv4ToNumber, tryParseIpv4 } from '../core/address.ts';
import { KvmIbError, printable } from '../core/errors.ts';
import { parseRules, prefixLength, type Rule } from './rule.ts';
import type { Parsed, ScriptAddress, Skipped, TablesDraft } from './table.ts';
import { builtInChains, draftTables } from './table.ts';
import { type Piece, type ShellToken, splitShell } from './words.ts';

/** Commands that one script may come to, loops counted out. */
const MAX_COMMANDS = 100_000;
const MAX_DEPTH = 40;
/** Words that one word with braces may come to. */
const MAX_WORDS = 70_000;

type Word = readonly Piece[];
type Node =
  | {
      readonly kind: 'command';
      readonly line: number;
      readonly words: readonly Word[];
      readonly maybe: string | undefined;
      /** It stands behind `&&`. */
      readonly chained: boolean;
    }
  | {
      readonly kind: 'for';
      readonly line: number;
      readonly name: string;
      readonly words: readonly Word[];
      readonly body: readonly Node[];
    }
  | { readonly kind: 'function'; readonly line: number; readonly name: string; readonly body: readonly Node[] };

/** @throws KvmIbError `bad-input` when the script comes to more commands than anybody writes */
export function parseScript(text: string): Parsed {
  const skipped: Skipped[] = [];
  const reader = createReader(tokensOf(text, skipped));
  const nodes = reader.nodes();
  const run = createRun(skipped);
  run.all(nodes);
  return { tables: run.draft.tables(), skipped, addresses: run.addresses() };
}

type Token = { readonly line: number } & (ShellToken | { readonly kind: 'newline' });

function tokensOf(text: string, skipped: Skipped[]): readonly Token[] {
  const tokens: Token[] = [];
  const lines = text.split('\n');
  for (let at = 0; at < lines.length; at++) {
    const line = at + 1;
    let logical = (lines[at] ?? '').replace(/\r$/, '');
    // A comment ends with its line, whatever stands there.
    while (/(?:^|[^\\])\\$/.test(logical) && !/^\s*#/.test(logical) && at + 1 < lines.length) {
      logical = `${logical.slice(0, -1)} ${(lines[++at] ?? '').replace(/\r$/, '')}`;
    }
    const found = splitShell(logical);
    if (found === undefined) {
      if (/iptables|\bip\b|ifconfig/.test(logical)) {
        skipped.push({ line, text: printable(logical.trim(), 120), why: 'a quote is not closed on the line' });
      }
      continue;
    }
    for (const token of found) tokens.push({ ...token, line });
    tokens.push({ kind: 'newline', line });
    // A here-document is input of its command, not part of the script.
    const here = found.findIndex((token) => token.kind === 'operator' && token.text === '<<');
    const after = found[here + 1];
    if (here >= 0 && after?.kind === 'word') {
      const delimiter = plainText(after.pieces).replace(/^-/, '');
      while (at + 1 < lines.length && lines[at + 1]?.trim() !== delimiter) at += 1;
      at += 1;
    }
  }
  return tokens;
}

function plainText(word: Word): string {
  return word.map((piece) => piece.text).join('');
}

/** The word, if nothing of it is quoted: a keyword of the shell, or the beginning of an assignment. */
function bare(word: Word | undefined): string | undefined {
  return word?.length === 1 && word[0]?.quoted === false ? word[0].text : undefined;
}

const OPENERS: Readonly<Record<string, string>> = {
  if: 'fi',
  while: 'done',
  until: 'done',
  case: 'esac',
  select: 'done',
};

function createReader(tokens: readonly Token[]) {
  let at = 0;
  const isEnd = (): boolean => at >= tokens.length;
  const keyword = (): string | undefined => {
    const token = tokens[at];
    return token?.kind === 'word' ? bare(token.pieces) : undefined;
  };

  /** Nodes until one of the keywords, which is taken as well. */
  const nodes = (until: readonly string[] = [], maybe?: string, depth = 0): readonly Node[] => {
    const found: Node[] = [];
    while (!isEnd()) {
      const token = tokens[at];
      if (token === undefined) break;
      if (token.kind !== 'word') {
        at += 1;
        if (token.kind === 'operator' && until.includes(token.text)) break;
        continue;
      }
      const word = keyword() ?? '';
      if (until.includes(word)) {
        at += 1;
        break;
      }
      if (['then', 'else', 'elif', 'do', '{', '!'].includes(word)) at += 1;
      else if (depth > MAX_DEPTH) at += 1;
      else if (word === 'for') found.push(...loop(token.line, maybe, depth));
      else if (OPENERS[word] !== undefined) {
        at += 1;
        const why = `it stands in \`${word}\`: whether it runs is not known`;
        found.push(...nodes([OPENERS[word]], maybe ?? why, depth + 1));
      } else {
        const name = functionName();
        if (name === undefined) found.push(...command(maybe));
        else found.push({ kind: 'function', line: token.line, name, body: nodes(['}'], maybe, depth + 1) });
      }
    }
    return found;
  };

  const functionName = (): string | undefined => {
    const first = keyword() ?? '';
    const second = tokens[at + 1];
    const third = tokens[at + 2];
    if (first === 'function' && second?.kind === 'word') {
      const name = bare(second.pieces);
      at += 2;
      while (!isEnd() && keyword() !== '{') at += 1;
      at += 1;
      return name;
    }
    const opens =
      second?.kind === 'operator' && second.text === '(' && third?.kind === 'operator' && third.text === ')';
    if (!opens || !/^[A-Za-z_][A-Za-z0-9_]*$/.test(first)) return undefined;
    at += 3;
    while (!isEnd() && keyword() !== '{') at += 1;
    at += 1;
    return first;
  };

  const loop = (line: number, maybe: string | undefined, depth: number): readonly Node[] => {
    at += 1;
    const name = keyword() ?? '';
    at += 1;
    const words: Word[] = [];
    let isList = false;
    while (!isEnd() && keyword() !== 'do') {
      const token = tokens[at++];
      if (token?.kind !== 'word') continue;
      if (isList) words.push(token.pieces);
      else if (bare(token.pieces) === 'in') isList = true;
    }
    at += 1;
    const unclear =
      isList && /^[A-Za-z_][A-Za-z0-9_]*$/.test(name) ? undefined : 'it stands in a `for` that is not understood';
    const body = nodes(['done'], maybe ?? unclear, depth + 1);
    return unclear === undefined ? [{ kind: 'for', line, name, words, body }] : body;
  };

  /** One command and what follows it on `&&`, `||` and pipes. */
  const command = (maybe: string | undefined): readonly Node[] => {
    const found: Node[] = [];
    let words: Word[] = [];
    let line = tokens[at]?.line ?? 0;
    let why = maybe;
    let chained = false;
    let isOpen = false;
    const end = (): void => {
      if (words.length > 0) found.push({ kind: 'command', line, words, maybe: why, chained });
      words = [];
      chained = true;
    };
    while (!isEnd()) {
      const token = tokens[at];
      if (token === undefined || (token.kind === 'newline' && !isOpen)) break;
      at += 1;
      // Behind "&&" and "||" the next line belongs to it.
      if (token.kind === 'newline') continue;
      isOpen = token.kind === 'operator' && (token.text === '&&' || token.text === '||');
      if (token.kind === 'word') {
        if (words.length === 0) line = token.line;
        words.push(token.pieces);
        continue;
      }
      if (['<', '>', '>>', '<<', '>&', '<&'].includes(token.text)) {
        // The file, or the delimiter, is no argument.
        if (tokens[at]?.kind === 'word') at += 1;
        continue;
      }
      end();
      // Behind "&&" it runs if the one before it succeeds, which such scripts expect; behind "||" if it fails, which they do not.
      // "-C … || -A …" is a rule that is there in either case.
      if (token.text === '||' && !isCheck(found.at(-1))) why ??= 'it stands behind `||`: whether it runs is not known';
      else if (token.text === '||') continue;
      else if (token.text !== '&&') break;
    }
    end();
    return found;
  };

  return { nodes: () => nodes() };
}

/** `iptables -C …` asks whether a rule is there. */
function isCheck(node: Node | undefined): boolean {
  if (node?.kind !== 'command') return false;
  const text = node.words.map(plainText).join(' ');
  return /(?:iptables|ipt)\S* .*(?:-C|--check) /i.test(text);
}

/** A word whose text depends on more than the script. */
class Unknown extends Error {}

interface Scope {
  /** Undefined: it is set to what the script does not say. */
  readonly variables: Map<string, string | undefined>;
  readonly positional: readonly string[];
  /** Variables of this function alone, with what they were outside; undefined: no function runs. */
  readonly outer: Map<string, string | undefined> | undefined;
}

function createRun(skipped: Skipped[]) {
  const draft = draftTables();
  const scope: { current: Scope } = { current: { variables: new Map(), positional: [], outer: undefined } };
  const functions = new Map<string, readonly Node[]>();
  const links = createLinks();
  let commands = 0;
  let isOver = false;

  const all = (nodes: readonly Node[], depth = 0): void => {
    for (const node of nodes) one(node, depth);
  };

  const one = (node: Node, depth: number): void => {
    if (isOver) return;
    if (++commands > MAX_COMMANDS) {
      throw new KvmIbError('bad-input', 'Cannot read the script', {
        why: `it comes to more than ${MAX_COMMANDS} commands`,
        fix: 'run it on a test host, and give what `iptables-save` prints there',
      });
    }
    if (node.kind === 'function') {
      functions.set(node.name, node.body);
      return;
    }
    if (node.kind === 'for') {
      let values: readonly string[];
      try {
        values = node.words.flatMap((word) => expand(word, scope.current));
      } catch (error) {
        if (!(error instanceof Unknown)) throw error;
        scope.current.variables.set(node.name, undefined);
        skipAll(node.body, `it stands in a loop over what is not known: ${error.message}`);
        return;
      }
      for (const value of values) {
        scope.current.variables.set(node.name, value);
        all(node.body, depth);
      }
      return;
    }
    const shown = (): string => printable(node.words.map(plainText).join(' '), 120);
    const isSure = node.maybe === undefined;
    try {
      if (['local', 'declare', 'typeset'].includes(bare(node.words[0]) ?? ''))
        keepOuter(node.words.slice(1), scope.current);
      const [first, ...rest] = withoutPrefixes(wordsOf(node.words, scope.current, isSure));
      const body = first === undefined ? undefined : functions.get(first);
      if (body !== undefined) {
        if (node.maybe !== undefined || depth >= MAX_DEPTH) {
          skipAll(body, node.maybe ?? 'functions call each other too deeply');
          return;
        }
        const outer = scope.current;
        const kept = new Map<string, string | undefined>();
        scope.current = { variables: outer.variables, positional: rest, outer: kept };
        all(body, depth + 1);
        for (const [name, value] of kept) outer.variables.set(name, value);
        scope.current = outer;
        return;
      }
      if (first === undefined) return;
      if (first === 'exit' && isSure && !node.chained) {
        isOver = true;
        return;
      }
      const changed = changeScope(first, rest, scope.current, isSure);
      if (changed !== undefined) {
        scope.current = changed;
        return;
      }
      const name = first.slice(first.lastIndexOf('/') + 1);
      if (!isOfInterest(name, rest)) {
        if (runsIptables(name, rest)) {
          skipped.push({
            line: node.line,
            text: shown(),
            why: `what \`${printable(name, 40)}\` does with it is not known`,
          });
        }
        return;
      }
      const why = node.maybe ?? perform(draft, links, name, rest, node.line);
      if (why !== undefined) skipped.push({ line: node.line, text: shown(), why });
    } catch (error) {
      if (!(error instanceof Unknown)) throw error;
      const why = node.maybe ?? error.message;
      const body = functions.get(bare(node.words[0]) ?? '');
      if (body !== undefined) skipAll(body, why);
      else if (isTelling(node.words)) skipped.push({ line: node.line, text: shown(), why });
    }
  };

  const passed = new Set<string>();
  /** Passes over commands that may run or not; what they set is not known then. */
  const skipAll = (nodes: readonly Node[], why: string, depth = 0): void => {
    const { variables } = scope.current;
    for (const node of nodes) {
      if (node.kind === 'function') continue;
      if (node.kind === 'for') {
        variables.set(node.name, undefined);
        skipAll(node.body, why, depth);
        continue;
      }
      for (const word of node.words) {
        const name = word[0]?.quoted === false ? /^([A-Za-z_][A-Za-z0-9_]*)\+?=/.exec(word[0].text)?.[1] : undefined;
        if (name === undefined) break;
        variables.set(name, undefined);
      }
      const [first, ...rest] = node.words.map(plainText);
      if (first !== undefined) scope.current = changeScope(first, rest, scope.current, false) ?? scope.current;
      const body = functions.get(bare(node.words[0]) ?? '');
      const key = `${node.line} ${why}`;
      if (body !== undefined && depth < MAX_DEPTH) {
        if (!passed.has(key)) skipAll(body, why, depth + 1);
      } else if (isTelling(node.words) && !passed.has(key)) {
        skipped.push({ line: node.line, text: printable(node.words.map(plainText).join(' '), 120), why });
      }
      passed.add(key);
    }
  };

  return { draft, all, addresses: links.all };
}

/** Whether a command that cannot be followed may be one that is looked for; its name may be in a variable. */
function isTelling(words: readonly Word[]): boolean {
  const text = words.map(plainText).join(' ');
  return /iptables|\bip\s+(?:-\S+\s+)*a|ifconfig/i.test(text) || /^\$.* -(?:[AIDRFXNPj]|t ?nat)(?: |$)/.test(text);
}

/** The words of a command; assignments are what stands before its name, or behind a word such as `export`. */
function wordsOf(list: readonly Word[], scope: Scope, isSure: boolean): readonly string[] {
  let isNamed = false;
  return list.flatMap((word) => {
    if (isNamed) return expand(word, scope);
    const words = assignmentOrWords(word, scope, isSure);
    isNamed = words.some((one) => !one.startsWith('-') && !PREFIXES.includes(one));
    return words;
  });
}

/**
 * An assignment is kept and gives no word.
 * @param isSure false: it may not be made at all, so nobody knows what the variable is then
 */
function assignmentOrWords(word: Word, scope: Scope, isSure: boolean): readonly string[] {
  const head = word[0];
  const assignment = head?.quoted === false ? /^([A-Za-z_][A-Za-z0-9_]*)(\+?)=/.exec(head.text) : null;
  if (assignment === null || head === undefined) return expand(word, scope);
  const [prefix = '', name = '', plus] = assignment;
  const value = [{ ...head, text: head.text.slice(prefix.length) }, ...word.slice(1)];
  let made: string | undefined;
  try {
    made = expand(
      value.map((piece) => ({ ...piece, quoted: true })),
      scope,
    ).join(' ');
    if (plus === '+' && scope.variables.has(name)) {
      const before = scope.variables.get(name);
      made = before === undefined ? undefined : before + made;
    }
  } catch (error) {
    if (!(error instanceof Unknown)) throw error;
  }
  scope.variables.set(name, isSure ? made : undefined);
  return [];
}

/** `local`: what these variables are is forgotten when the function ends. */
function keepOuter(words: readonly Word[], { variables, outer }: Scope): void {
  for (const word of words) {
    const name = /^[A-Za-z_][A-Za-z0-9_]*/.exec(word[0]?.text ?? '')?.[0];
    if (name !== undefined && outer !== undefined && !outer.has(name)) outer.set(name, variables.get(name));
  }
}

/**
 * Commands of the shell that change variables or `$1`.
 * @returns undefined when it is none of them
 */
function changeScope(name: string, args: readonly string[], scope: Scope, isSure: boolean): Scope | undefined {
  if (name === 'let') letAll(args, scope, isSure);
  else if (name === 'read' || name === 'unset') for (const one of args) scope.variables.set(one, undefined);
  else if (name === 'shift') {
    const count = Number(args[0] ?? '1');
    return { ...scope, positional: isSure && Number.isInteger(count) ? scope.positional.slice(count) : [] };
  } else if (name === 'set') {
    const at = args.indexOf('--');
    return at < 0 ? scope : { ...scope, positional: isSure ? args.slice(at + 1) : [] };
  } else return undefined;
  return scope;
}

/** `let n++`, `let n+=2`, `let n=m+1`; what else it may be makes all that it names unknown. */
function letAll(expressions: readonly string[], scope: Scope, isSure: boolean): void {
  for (const expression of expressions) {
    const text = expression.replace(/\s+/g, '');
    const step = /^(?:([A-Za-z_][A-Za-z0-9_]*)(\+\+|--)|(\+\+|--)([A-Za-z_][A-Za-z0-9_]*))$/.exec(text);
    const assignment = /^([A-Za-z_][A-Za-z0-9_]*)([-+]?)=([^=].*)$/.exec(text);
    const name = step?.[1] ?? step?.[4] ?? assignment?.[1];
    let made: string | undefined;
    try {
      if (step !== null) made = String(calculate(`${name}${(step[2] ?? step[3] ?? '').charAt(0)}1`, scope));
      else if (assignment !== null) {
        const [, , sign = '', value = ''] = assignment;
        const right = calculate(value, scope);
        made = String(sign === '' ? right : calculate(`${name}`, scope) + (sign === '-' ? -right : right));
      }
    } catch (error) {
      if (!(error instanceof Unknown)) throw error;
    }
    // A comparison sets nothing.
    const sets = name !== undefined || /\+\+|--|(?:^|[^=!<>])=(?!=)|<<=|>>=/.test(text);
    const names = name === undefined ? (text.match(/[A-Za-z_][A-Za-z0-9_]*/g) ?? []) : [name];
    if (!sets) continue;
    for (const one of names) scope.variables.set(one, isSure ? made : undefined);
  }
}

const PREFIXES: readonly string[] = [
  'sudo',
  'exec',
  'command',
  'nohup',
  'time',
  'export',
  'local',
  'readonly',
  'env',
  'declare',
  'typeset',
];

/** What only says how a command is run. */
function withoutPrefixes(words: readonly string[]): readonly string[] {
  let at = 0;
  while (PREFIXES.includes(words[at] ?? '')) {
    at += 1;
    while (words[at]?.startsWith('-')) at += 1;
  }
  return words.slice(at);
}

/** The words that one word comes to. @throws Unknown when it depends on more than the script */
function expand(word: Word, scope: Scope): readonly string[] {
  let spread: Word[] = [[]];
  for (const piece of word) {
    const texts = piece.quoted || piece.literal ? [piece.text] : braces(piece.text);
    if (spread.length * texts.length > MAX_WORDS) throw new Unknown('braces make too many words of it');
    spread = spread.flatMap((before) => texts.map((text) => [...before, { ...piece, text }]));
  }
  return spread.flatMap((one) => fields(one, scope));
}

/** A word without braces; only what is not quoted is split at blanks. */
function fields(word: Word, scope: Scope): readonly string[] {
  const words: string[] = [];
  let open: string | undefined;
  for (const piece of word) {
    const text = piece.literal ? piece.text : substitute(piece.text, scope);
    const [first = '', ...more] = piece.quoted ? [text] : text.split(/[\t\n ]+/);
    if (piece.quoted || first !== '') open = (open ?? '') + first;
    for (const part of more) {
      if (open !== undefined) words.push(open);
      open = part === '' ? undefined : part;
    }
  }
  return open === undefined ? words : [...words, open];
}

/** `{2..6}` and `{a,b}` of bash, which come before variables: `{2..$n}` and `${n}` are none. */
function braces(text: string): readonly string[] {
  for (const match of text.matchAll(/(?<!\$)\{([^{}]*)\}/g)) {
    const [whole, inner = ''] = match;
    const range = /^(-?[0-9]{1,9})\.\.(-?[0-9]{1,9})$/.exec(inner);
    const plain = inner.includes(',') ? inner.split(',') : undefined;
    const list = range === null ? plain : sequence(Number(range[1]), 1, Number(range[2]));
    if (list === undefined) continue;
    const ends = braces(text.slice(match.index + whole.length));
    if (list.length * ends.length > MAX_WORDS) throw new Unknown('braces make too many words of it');
    return list.flatMap((value) => ends.map((rest) => text.slice(0, match.index) + value + rest));
  }
  return [text];
}

function sequence(first: number, step: number, last: number): readonly string[] {
  const size = Math.floor(Math.abs(last - first) / Math.max(1, Math.abs(step))) + 1;
  if (size > MAX_COMMANDS) throw new Unknown('it counts further than any network has addresses');
  const direction = last < first ? -1 : 1;
  return Array.from({ length: size }, (_, n) => String(first + direction * n * Math.abs(step || 1)));
}

/** Variables, arithmetic and `seq`, in a piece that is not literal. */
function substitute(text: string, scope: Scope): string {
  let out = '';
  let rest = text;
  while (rest !== '') {
    const at = rest.search(/[$`]/);
    if (at < 0) return out + rest;
    out += rest.slice(0, at);
    rest = rest.slice(at);
    const arithmetic = /^\$\(\((.*?)\)\)/s.exec(rest);
    const command = /^\$\(([^()]*)\)/s.exec(rest) ?? /^`([^`]*)`/s.exec(rest);
    const name =
      /^\$\{([A-Za-z_][A-Za-z0-9_]*|[0-9]{1,2})(?::?-([^{}$]*))?\}/.exec(rest) ??
      /^\$([A-Za-z_][A-Za-z0-9_]*|[0-9])/.exec(rest);
    if (arithmetic !== null) {
      out += String(calculate(arithmetic[1] ?? '', scope));
      rest = rest.slice(arithmetic[0].length);
    } else if (command !== null) {
      out += ofProgram(command[1] ?? '', scope);
      rest = rest.slice(command[0].length);
    } else if (name !== null) {
      const [whole, variable = '', otherwise] = name;
      const value = /^[0-9]/.test(variable) ? scope.positional[Number(variable) - 1] : scope.variables.get(variable);
      if (value === undefined && (otherwise === undefined || scope.variables.has(variable)))
        throw new Unknown(`the script does not say what $${variable} is`);
      out += value ?? otherwise;
      rest = rest.slice(whole.length);
    } else if (rest === '$') return `${out}$`;
    else throw new Unknown(`"${printable(rest, 40)}" is not understood`);
    if (out.length > 65_536) throw new Unknown('it becomes too long');
  }
  return out;
}

function ofProgram(text: string, scope: Scope): string {
  const words = substitute(text, scope).trim().split(/\s+/);
  const numbers = words.slice(1).map((word) => (/^-?[0-9]{1,9}$/.test(word) ? Number(word) : Number.NaN));
  const [first = Number.NaN, second = first, third] = numbers;
  if (words[0] === 'seq' && numbers.length <= 3 && numbers.every((n) => !Number.isNaN(n))) {
    const [from, step, to] =
      numbers.length === 1 ? [1, 1, first] : third === undefined ? [first, 1, second] : [first, second, third];
    if (step === 0) throw new Unknown('it counts in steps of 0');
    // Unlike braces it never turns round by itself.
    return to !== from && to > from !== step > 0 ? '' : sequence(from, step, to).join(' ');
  }
  // Where a program lies does not matter.
  const found = /^(?:which|command -v|type -p) (\S*iptables\S*|ip|ifconfig)(?: 2>\/dev\/null)?$/.exec(
    words.join(' '),
  )?.[1];
  if (found !== undefined) return found;
  throw new Unknown(`it depends on what \`${printable(words[0] ?? '', 40)}\` prints`);
}

/** Sums, differences and products of whole numbers and variables, without parentheses. */
function calculate(text: string, scope: Scope): number {
  const tokens = text.match(/[0-9]+|\$?\{?[A-Za-z_][A-Za-z0-9_]*\}?|\$\{?[0-9]\}?|[-+*]|\S/g) ?? [];
  const value = (token: string | undefined): number => {
    const name = (token ?? '').replace(/[${}]/g, '');
    const positional =
      token?.startsWith('$') === true && /^[0-9]$/.test(name) ? scope.positional[Number(name) - 1] : undefined;
    const found = positional ?? (/^[0-9]+$/.test(name) ? name : scope.variables.get(name));
    if (found === undefined || !/^-?[0-9]{1,10}$/.test(found))
      throw new Unknown(`"${printable(text, 40)}" cannot be calculated`);
    return Number(found);
  };
  let sum = 0;
  let product = value(tokens[0]);
  let sign = 1;
  for (let at = 1; at < tokens.length; at += 2) {
    const operator = tokens[at];
    if (operator === '*') product *= value(tokens[at + 1]);
    else if (operator === '+' || operator === '-') {
      sum += sign * product;
      sign = operator === '+' ? 1 : -1;
      product = value(tokens[at + 1]);
    } else throw new Unknown(`"${printable(text, 40)}" cannot be calculated`);
  }
  return sum + sign * product;
}

function isOfInterest(name: string, args: readonly string[]): boolean {
  if (/^(?:iptables(?:-legacy|-nft)?|iptables(?:-legacy|-nft)?-restore|ifconfig|source|\.)$/.test(name)) return true;
  if (name !== 'ip') return false;
  const { words, isElsewhere } = ofIp(args);
  return !isElsewhere && words[0] !== undefined && words[0] !== '' && 'address'.startsWith(words[0]);
}

/** Arguments of `ip` without its own options, and whether they are for another network namespace. */
function ofIp(args: readonly string[]): { readonly words: readonly string[]; readonly isElsewhere: boolean } {
  let at = 0;
  let isElsewhere = false;
  for (; args[at]?.startsWith('-'); at++) {
    if (/^--?(?:n|netns)$/.test(args[at] ?? '')) isElsewhere = true;
    if (/^--?(?:n|netns|f|family|b|batch|rc|rcvbuf|l|loops)$/.test(args[at] ?? '')) at += 1;
  }
  return { words: args.slice(at), isElsewhere };
}

/** Whether a command that is not known here is given one of iptables to run. */
function runsIptables(name: string, args: readonly string[]): boolean {
  if (/^(?:eval|sh|bash|dash|ssh|su|runuser)$/.test(name))
    return args.some((word) => /\biptables\s+-/.test(word)) || names(args);
  return (
    !/^(?:echo|printf|logger|which|type|hash|whereis|test|\[|\[\[|modprobe|systemctl|service|chkconfig|apt|apt-get|yum|dnf|man)$/.test(
      name,
    ) && names(args)
  );
}

function names(args: readonly string[]): boolean {
  const at = args.findIndex((word) => /^(?:\S*\/)?iptables(?:-legacy|-nft)?$/.test(word));
  return at >= 0 && args[at + 1]?.startsWith('-') === true;
}

/** @returns why it is passed over; undefined: it is done, or says nothing of what is wanted */
function perform(
  draft: TablesDraft,
  links: ReturnType<typeof createLinks>,
  name: string,
  args: readonly string[],
  line: number,
): string | undefined {
  if (name === 'ip') return links.ip(args);
  if (name === 'ifconfig') return links.ifconfig(args);
  if (name === 'source' || name === '.') return 'another file is read there; give it as well';
  if (name.endsWith('-restore')) return 'the file that it loads is not read; give it as well';
  return iptables(draft, args, line);
}

const LONG: Readonly<Record<string, string>> = {
  '--append': '-A',
  '--insert': '-I',
  '--delete': '-D',
  '--replace': '-R',
  '--flush': '-F',
  '--new-chain': '-N',
  '--new': '-N',
  '--delete-chain': '-X',
  '--policy': '-P',
  '--table': '-t',
  '--rename-chain': '-E',
};

/** `--table=nat` and `-tnat` are two words in one. */
function separated(word: string): readonly string[] {
  const [, option, value] = /^(--[a-z][a-z-]*)=(.*)$/s.exec(word) ?? /^(-t)(.+)$/.exec(word) ?? [];
  return option === undefined || value === undefined ? [word] : [option, value];
}

/** One iptables command on the tables, as the kernel would have them behind it. */
function iptables(draft: TablesDraft, given: readonly string[], line: number): string | undefined {
  const args = given.flatMap(separated);
  let table = 'filter';
  let verb: string | undefined;
  const operands: string[] = [];
  const rest: string[] = [];
  for (let at = 0; at < args.length; at++) {
    const word = LONG[args[at] ?? ''] ?? args[at] ?? '';
    if (word === '-t') table = args[++at] ?? '';
    else if (word === '-w' || word === '--wait' || word === '-W' || word === '--wait-interval') {
      if (/^[0-9]+$/.test(args[at + 1] ?? '')) at += 1;
    } else if (
      /^(?:--wait|-w)=?[0-9]+$/.test(word) ||
      ['-v', '--verbose', '-n', '--numeric', '-4', '--ipv4'].includes(word)
    ) {
      // Says nothing of the rule.
    } else if (verb === undefined && /^-[AIDRFNXPEZLSC]$/.test(word)) {
      verb = word;
      while (at + 1 < args.length && !/^[-!]/.test(args[at + 1] ?? '') && operands.length < 3)
        operands.push(args[++at] ?? '');
    } else rest.push(args[at] ?? '');
  }
  const [chain, number] = operands;
  const text = rest.join(' ');
  if (verb === undefined) return rest.length === 0 ? undefined : 'it names no command such as -A';
  if (builtInChains(table).length === 0) return `there is no table "${printable(table, 20)}"`;
  const chains = draft.table(table);
  if (verb === '-F' || verb === '-X' || verb === '-Z') {
    const called = new Set(
      [...chains.values()].flatMap((one) =>
        one.rules.map(({ target }) => (target.kind === 'named' ? target.name : '')),
      ),
    );
    for (const one of [...chains.values()]) {
      if (chain !== undefined && one.name !== chain) continue;
      if (verb === '-F') one.rules = [];
      if (verb !== '-X' || builtInChains(table).includes(one.name)) continue;
      if (one.rules.length > 0 || called.has(one.name)) return `${one.name} has rules, or is called`;
      chains.delete(one.name);
    }
    return undefined;
  }
  if (verb === '-L' || verb === '-S' || verb === '-C') return undefined;
  if (chain === undefined || chain.length > 64) return 'it names no chain';
  if (verb === '-N') return void draft.chain(table, chain);
  if (verb === '-P') {
    draft.chain(table, chain).policy = number ?? 'ACCEPT';
    return undefined;
  }
  if (verb === '-E') return 'a chain is renamed there, which is not followed';
  if (!chains.has(chain) && verb === '-D') return 'the rule that it deletes is not in the script';
  const { rules } = draft.chain(table, chain);
  const place = number !== undefined && /^[0-9]{1,9}$/.test(number) ? Number(number) : undefined;
  if (verb === '-D' && place !== undefined) {
    if (rules.splice(place - 1, 1).length === 0) return `${chain} has no rule ${place}`;
    return undefined;
  }
  const made = parseRules(chain, rest, text, line);
  if (verb === '-D') {
    for (const rule of made) {
      const at = rules.findIndex((known) => sameRule(known, rule));
      if (at < 0) return 'the rule that it deletes is not in the script';
      rules.splice(at, 1);
    }
    return undefined;
  }
  if (verb === '-R') {
    if (place === undefined || place < 1 || place > rules.length) return `${chain} has no such rule to replace`;
    if (made.length > 1) return 'it would be several rules, which iptables refuses';
    rules.splice(place - 1, 1, ...made);
  } else if (verb === '-I') {
    const at = place ?? 1;
    if (at < 1 || at > rules.length + 1) return `${chain} has no place ${at}`;
    // Each goes to the same place, so the last is the first.
    rules.splice(at - 1, 0, ...[...made].reverse());
  } else rules.push(...made);
  return undefined;
}

/** As `iptables -D` compares them: by what they say, not by how it was written. */
function sameRule(a: Rule, b: Rule): boolean {
  const key = ({ match, target, comment }: Rule): string => JSON.stringify([match, target, comment]);
  return key(a) === key(b);
}

/** Addresses that a script adds, and takes off again. */
function createLinks() {
  const addresses: ScriptAddress[] = [];
  const add = (device: string, address: string, length: number, label: string): void => {
    const known = addresses.some((a) => a.device === device && a.address === address && a.prefixLength === length);
    if (!known) addresses.push({ device, address, prefixLength: length, label });
  };
  const remove = (matches: (one: ScriptAddress) => boolean): void => {
    for (let at = addresses.length - 1; at >= 0; at--) {
      const one = addresses[at];
      if (one !== undefined && matches(one)) addresses.splice(at, 1);
    }
  };
  return {
    all: () => addresses,
    ip: (args: readonly string[]): string | undefined => {
      const { words } = ofIp(args);
      const verb = words[1] ?? 'show';
      if (!['add', 'a', 'ad', 'append', 'replace', 'change', 'del', 'delete', 'd', 'flush'].includes(verb))
        return undefined;
      let text = '';
      let device = '';
      let label: string | undefined;
      for (let at = 2; at < words.length; at++) {
        const word = words[at] ?? '';
        if (word === 'dev') device = words[++at] ?? '';
        else if (word === 'label') label = words[++at];
        else if (
          ['brd', 'broadcast', 'scope', 'peer', 'anycast', 'metric', 'valid_lft', 'preferred_lft'].includes(word)
        )
          at += 1;
        else if (word === 'local') text = words[++at] ?? '';
        else if (/^[0-9]/.test(word)) text = word;
      }
      if (verb === 'flush')
        return void remove((one) => one.device === device && (label === undefined || one.label === label));
      const [address = '', mask] = text.split('/');
      const length = mask === undefined ? 32 : prefixLength(mask);
      if (tryParseIpv4(address) === undefined || length === undefined || device === '')
        return 'address and link are not understood';
      if (verb.startsWith('d')) remove((one) => one.device === device && one.address === address);
      else add(device, address, length, label ?? device);
      return undefined;
    },
    ifconfig: (args: readonly string[]): string | undefined => {
      const [label = '', ...rest] = args;
      const device = label.split(':')[0] ?? '';
      if (rest.length === 0) return undefined;
      if (rest.includes('down')) {
        if (label !== device) remove((one) => one.device === device && one.label === label);
        return undefined;
      }
      const [first = '', mask] = (
        rest.find((word) => tryParseIpv4(word.split('/')[0] ?? '') !== undefined) ?? ''
      ).split('/');
      const address = tryParseIpv4(first);
      if (address === undefined) return undefined;
      // A label has one address, unless another is added to it.
      if (label !== device && !rest.includes('add') && !rest.includes('del'))
        remove((one) => one.device === device && one.label === label);
      if (rest.includes('del')) return void remove((one) => one.address === first);
      const netmask = rest.includes('netmask') ? rest[rest.indexOf('netmask') + 1] : mask;
      // Without a mask the class of the address gives it, as ever since.
      const classful = ipv4ToNumber(address) < 2 ** 31 ? 8 : ipv4ToNumber(address) < 0xc0000000 ? 16 : 24;
      const length = netmask === undefined ? classful : prefixLength(netmask);
      if (length === undefined) return 'the netmask is not understood';
      add(device, address, length, label);
      return undefined;
    },
  };
}
