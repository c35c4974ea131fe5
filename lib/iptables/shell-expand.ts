/** What the words of a shell script come to (POSIX 2.6, and the braces of bash). What depends on more than the script is `Unknown`. */
import { printable } from '../core/errors.ts';
import type { Word } from './shell-read.ts';

/** Words that one word may come to. */
const MAX_WORDS = 100_000;

/** A word whose text depends on more than the script. */
export class Unknown extends Error {}

export interface Scope {
  /** Undefined: it is set to what the script does not say. */
  readonly variables: Map<string, string | undefined>;
  readonly positional: readonly string[];
  /** Variables of this function alone, with what they were outside; undefined: no function runs. */
  readonly outer: Map<string, string | undefined> | undefined;
}
/** The words of a command; assignments are what stands before its name, or behind a word such as `export`. */
export function wordsOf(list: readonly Word[], scope: Scope, isSure: boolean): readonly string[] {
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
export function keepOuter(words: readonly Word[], { variables, outer }: Scope): void {
  for (const word of words) {
    const name = /^[A-Za-z_][A-Za-z0-9_]*/.exec(word[0]?.text ?? '')?.[0];
    if (name !== undefined && outer !== undefined && !outer.has(name)) outer.set(name, variables.get(name));
  }
}

/**
 * Commands of the shell that change variables or `$1`.
 * @returns undefined when it is none of them
 */
export function changeScope(name: string, args: readonly string[], scope: Scope, isSure: boolean): Scope | undefined {
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
export function withoutPrefixes(words: readonly string[]): readonly string[] {
  let at = 0;
  while (PREFIXES.includes(words[at] ?? '')) {
    at += 1;
    while (words[at]?.startsWith('-')) at += 1;
  }
  return words.slice(at);
}

/** The words that one word comes to. @throws Unknown when it depends on more than the script */
export function expand(word: Word, scope: Scope): readonly string[] {
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
  if (size > MAX_WORDS) throw new Unknown('it counts further than any network has addresses');
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
