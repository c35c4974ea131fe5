/** Reads a shell script into commands, loops and functions (POSIX 2.9), as far as scripts that set addresses and rules use it. */
import { printable } from '../core/errors.ts';
import type { Skipped } from './table.ts';
import { type Piece, type ShellToken, splitShell } from './words.ts';

const MAX_DEPTH = 40;

export type Word = readonly Piece[];
export type Node =
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

/** @param skipped takes lines that cannot be read */
export function readShell(text: string, skipped: Skipped[]): readonly Node[] {
  return createReader(tokensOf(text, skipped)).nodes();
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

export function plainText(word: Word): string {
  return word.map((piece) => piece.text).join('');
}

/** The word, if nothing of it is quoted: a keyword of the shell, or the beginning of an assignment. */
export function bare(word: Word | undefined): string | undefined {
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
