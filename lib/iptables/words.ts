/** Words of a line, as iptables-save quotes them and as a shell does. */

export interface Words {
  readonly words: readonly string[];
  /** True: a quote was not closed. */
  readonly broken: boolean;
}

/** iptables-save puts double quotes round what has blanks, with a backslash before quotes and backslashes. */
export function splitSaved(line: string): Words {
  const words: string[] = [];
  let word: string | undefined;
  let quoted = false;
  for (let at = 0; at < line.length; at++) {
    const c = line[at] ?? '';
    if (quoted && c === '\\' && at + 1 < line.length) word = (word ?? '') + line[++at];
    else if (c === '"') {
      quoted = !quoted;
      word ??= '';
    } else if (!quoted && (c === ' ' || c === '\t')) {
      if (word !== undefined) words.push(word);
      word = undefined;
    } else word = (word ?? '') + c;
  }
  if (word !== undefined) words.push(word);
  return { words, broken: quoted };
}

/** A piece of a shell word: text as it stands, or text in which `$NAME` and braces still have their meaning. */
export interface Piece {
  readonly text: string;
  readonly literal: boolean;
  /** It stood in quotes, so what it expands to stays one word. */
  readonly quoted: boolean;
}

export type ShellToken =
  | { readonly kind: 'word'; readonly pieces: readonly Piece[] }
  /** `;`, `&&`, `||`, `|`, `&`, `(`, `)`, `<`, `>`, `>>`, `<<`. */
  | { readonly kind: 'operator'; readonly text: string };

/**
 * Tokens of one logical line of a shell script (POSIX 2.3), comments taken off.
 * @returns undefined when a quote is not closed
 */
export function splitShell(line: string): readonly ShellToken[] | undefined {
  const tokens: ShellToken[] = [];
  let pieces: Piece[] | undefined;
  let plain = '';
  const flush = (): void => {
    if (plain !== '') pieces = [...(pieces ?? []), { text: plain, literal: false, quoted: false }];
    plain = '';
  };
  const end = (): void => {
    flush();
    if (pieces !== undefined) tokens.push({ kind: 'word', pieces });
    pieces = undefined;
  };
  for (let at = 0; at < line.length; at++) {
    const c = line[at] ?? '';
    if (c === '\\') {
      flush();
      const next = line[++at];
      if (next !== undefined) pieces = [...(pieces ?? []), { text: next, literal: true, quoted: true }];
    } else if (c === "'") {
      const close = line.indexOf("'", at + 1);
      if (close < 0) return undefined;
      flush();
      pieces = [...(pieces ?? []), { text: line.slice(at + 1, close), literal: true, quoted: true }];
      at = close;
    } else if (c === '"') {
      const close = closingQuote(line, at + 1);
      if (close < 0) return undefined;
      flush();
      const inner = line.slice(at + 1, close).replace(/\\(["\\])/g, '$1');
      pieces = [...(pieces ?? []), { text: inner, literal: inner.includes('\\$'), quoted: true }];
      at = close;
    } else if (c === '`') {
      const close = line.indexOf('`', at + 1);
      if (close < 0) return undefined;
      plain += line.slice(at, close + 1);
      at = close;
    } else if (c === '(' && line[at + 1] === '(' && plain === '' && pieces === undefined) {
      // "((n++))" is `let "n++"`.
      const close = matchingParenthesis(line, at);
      tokens.push({ kind: 'word', pieces: [{ text: 'let', literal: true, quoted: false }] });
      tokens.push({ kind: 'word', pieces: [{ text: line.slice(at + 2, close - 1), literal: true, quoted: true }] });
      at = close;
    } else if (c === '$' && line[at + 1] === '(') {
      // A command substitution is one piece, whatever stands in it: nobody runs it.
      const close = matchingParenthesis(line, at + 1);
      plain += line.slice(at, close + 1);
      at = close;
    } else if (c === '#' && plain === '' && pieces === undefined) break;
    else if (/\s/.test(c)) end();
    else if (';&|()<>'.includes(c)) {
      // "2>" and the like: the number is part of the redirection.
      if ((c === '<' || c === '>') && /^[0-9]$/.test(plain) && pieces === undefined) plain = '';
      end();
      const two = line.slice(at, at + 2);
      const text = ['&&', '||', '>>', '<<', ';;', '>&', '<&'].includes(two) ? two : c;
      tokens.push({ kind: 'operator', text });
      at += text.length - 1;
    } else plain += c;
  }
  end();
  return tokens;
}

function closingQuote(line: string, from: number): number {
  for (let at = from; at < line.length; at++) {
    if (line[at] === '\\') at += 1;
    else if (line[at] === '"') return at;
  }
  return -1;
}

function matchingParenthesis(line: string, open: number): number {
  let depth = 0;
  for (let at = open; at < line.length; at++) {
    if (line[at] === '(') depth += 1;
    else if (line[at] === ')' && --depth === 0) return at;
  }
  return line.length - 1;
}
