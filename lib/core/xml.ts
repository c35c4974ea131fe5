/**
 * Reads XML that somebody else wrote. fast-xml-parser builds the tree, but it takes broken documents as they come
 * (unclosed and crossed tags, two roots, a cut-off end), and its validator refuses the raw `&` that OpenNebula writes
 * into `<title>`. So a strict scan of our own goes first, in linear time, and the tree is then compared with it element
 * by element: where the two disagree, the document is refused, never guessed at.
 *
 * Not done here: DOCTYPE and entities of one's own (refused), names outside ASCII (refused), namespaces (a prefix stays
 * part of the name), encodings (the caller decodes; latin1 keeps every byte, and markup is ASCII either way).
 */
import { XMLParser } from 'fast-xml-parser';
import { KvmIbError, printable } from './errors.ts';

/** An element with its place in the text, so that callers can insert text without writing the rest anew. */
export interface XmlElement {
  readonly name: string;
  /** Values with entities decoded, as strings. */
  readonly attributes: ReadonlyMap<string, string>;
  readonly children: readonly XmlElement[];
  /** Its own character data: text with entities decoded and CDATA as written, joined; children's text is not in it. */
  readonly text: string;
  /** Index of its `<` in the source text. */
  readonly start: number;
  /** Index behind its last `>`. */
  readonly end: number;
}

export interface XmlOptions {
  /** Names that the root element may have. */
  readonly roots: readonly string[];
  /** What the text is, for messages: "the VM XML on standard input". */
  readonly what: string;
  /** Longest text, in UTF-16 units; 16 Mi by default. A VM XML has some ten thousand. */
  readonly maxLength?: number;
  /** Deepest nesting; 256 by default. OpenNebula and libvirt stay below 20. */
  readonly maxDepth?: number;
}

const MAX_LENGTH = 16 * 1024 * 1024;
const MAX_DEPTH = 256;
/** Real documents have a few thousand elements and a dozen attributes at most; the parser's memory grows with them. */
const MAX_ELEMENTS = 100_000;
const MAX_ATTRIBUTES = 256;
/**
 * Tags, plain text and processing instructions together; what is inside CDATA and comments is not counted.
 * fast-xml-parser copies these character by character (10 million took 2 to 4 s); OpenNebula writes every long value as
 * CDATA.
 */
const MAX_MARKUP = 2 * 1024 * 1024;

/** What the scan found: enough to check the tree against. */
interface Outline {
  readonly names: readonly string[];
  readonly starts: readonly number[];
  readonly ends: readonly number[];
  /** Processing instructions, as pairs of start and end. */
  readonly instructions: readonly number[];
}

/**
 * Reads one document with exactly one root.
 *
 * @throws KvmIbError `bad-input` that names `what`, the reason and, where there is one, the line and column.
 */
export function parseXml(text: string, options: XmlOptions): XmlElement {
  const outline = scan(text, options);
  return buildTree(text, outline, options);
}

/** The children of this name, in order. */
export function childrenNamed(element: XmlElement, name: string): XmlElement[] {
  return element.children.filter((child) => child.name === name);
}

function refuse(options: XmlOptions, why: string, fix: string, cause?: unknown): KvmIbError {
  return new KvmIbError('bad-input', `Cannot read ${options.what}`, { why, fix, cause });
}

/** "line 3, column 14", counted in characters from 1. */
function position(text: string, index: number): string {
  let line = 1;
  let lineStart = 0;
  for (let at = text.indexOf('\n'); at !== -1 && at < index; at = text.indexOf('\n', at + 1)) {
    line += 1;
    lineStart = at + 1;
  }
  return `line ${line}, column ${index - lineStart + 1}`;
}

function isSpace(code: number): boolean {
  return code === 32 || code === 10 || code === 9 || code === 13;
}

function skipSpace(text: string, from: number): number {
  let at = from;
  while (isSpace(text.charCodeAt(at))) at += 1;
  return at;
}

function isNameChar(code: number, first: boolean): boolean {
  const letter = (code >= 97 && code <= 122) || (code >= 65 && code <= 90) || code === 95 || code === 58;
  return letter || (!first && ((code >= 48 && code <= 57) || code === 45 || code === 46));
}

function skipName(text: string, from: number): number {
  let at = from;
  while (isNameChar(text.charCodeAt(at), at === from)) at += 1;
  return at;
}

/** One pass over the text. Every search goes forward only and a failed one ends the scan, so time is linear. */
function scan(text: string, options: XmlOptions): Outline {
  const maxLength = options.maxLength ?? MAX_LENGTH;
  const maxDepth = options.maxDepth ?? MAX_DEPTH;
  const bad = (at: number, why: string, fix = 'send the document whole, as it was written') =>
    refuse(options, `${why} (${position(text, at)})`, fix);

  if (text.length > maxLength) {
    throw refuse(options, `it has ${text.length} characters; the limit is ${maxLength}`, 'send only what is asked for');
  }
  const nul = text.indexOf('\0');
  if (nul !== -1) throw bad(nul, 'there is a NUL character in it, so it is not XML text', 'send it in UTF-8');

  const names: string[] = [];
  const starts: number[] = [];
  const ends: number[] = [];
  const instructions: number[] = [];
  /** Indices into `names` of the elements that are open. */
  const open: number[] = [];
  let at = skipByteOrderMark(text);
  /** Characters inside CDATA sections and comments; their delimiters count as markup. */
  let opaque = 0;

  while (at < text.length) {
    const tag = text.indexOf('<', at);
    const textEnd = tag === -1 ? text.length : tag;
    if (open.length === 0) {
      const stray = skipSpace(text, at);
      if (stray < textEnd)
        throw bad(stray, `there is text ${names.length === 0 ? 'before' : 'behind'} the root element`);
    }
    if (tag === -1) break;

    const next = text.charCodeAt(tag + 1);
    if (next === 47 /* / */) {
      const nameEnd = skipName(text, tag + 2);
      const close = skipSpace(text, nameEnd);
      const element = open.pop();
      const name = text.slice(tag + 2, nameEnd);
      if (text.charCodeAt(close) !== 62) throw bad(tag, 'a closing tag is malformed or cut off');
      if (element === undefined) throw bad(tag, `</${clip(name)}> closes nothing`);
      if (names[element] !== name) throw bad(tag, `</${clip(name)}> closes <${clip(names[element] ?? '')}>`);
      at = close + 1;
      ends[element] = at;
    } else if (next === 33 /* ! */) {
      if (text.startsWith('<!--', tag)) {
        const end = text.indexOf('-->', tag + 4);
        if (end === -1) throw bad(tag, 'a comment is not closed');
        at = end + 3;
        opaque += end - tag - 4;
      } else if (open.length > 0 && text.startsWith('<![CDATA[', tag)) {
        const end = text.indexOf(']]>', tag + 9);
        if (end === -1) throw bad(tag, 'a CDATA section is not closed');
        at = end + 3;
        opaque += end - tag - 9;
      } else {
        throw bad(
          tag,
          'it declares a document type or entities, or a CDATA section stands outside the root',
          'remove it',
        );
      }
    } else if (next === 63 /* ? */) {
      const end = text.indexOf('?>', tag + 2);
      if (end === -1) throw bad(tag, 'a processing instruction is not closed');
      at = end + 2;
      instructions.push(tag, at);
    } else {
      if (open.length === 0 && names.length > 0) throw bad(tag, 'there is a second root element');
      if (names.length >= MAX_ELEMENTS) throw bad(tag, `it has more than ${MAX_ELEMENTS} elements`);
      const nameEnd = skipName(text, tag + 1);
      if (nameEnd === tag + 1) throw bad(tag, 'a tag has no name, or "<" is not written as "&lt;"');
      const name = text.slice(tag + 1, nameEnd);
      if (names.length === 0 && !options.roots.includes(name)) {
        throw bad(tag, `its root element is <${clip(name)}>, not <${options.roots.join('> or <')}>`);
      }
      const tail = scanAttributes(text, nameEnd, bad);
      const index = names.push(name) - 1;
      starts.push(tag);
      at = tail.end;
      if (tail.empty) {
        ends[index] = at;
      } else {
        if (open.length >= maxDepth) throw bad(tag, `elements are nested deeper than ${maxDepth}`);
        open.push(index);
      }
    }
  }

  if (text.length - opaque > MAX_MARKUP) {
    const why = `it has ${text.length - opaque} characters outside CDATA sections; the limit is ${MAX_MARKUP}`;
    throw refuse(options, why, 'write long values as CDATA, as OpenNebula does');
  }
  const unclosed = open.at(-1);
  if (unclosed !== undefined) {
    const why = `<${clip(names[unclosed] ?? '')}> is not closed; the text ends after ${text.length} characters`;
    throw bad(starts[unclosed] ?? 0, why);
  }
  if (names.length === 0) {
    const why = text.length === 0 ? 'it is empty' : 'there is no element in it';
    throw refuse(options, why, `send one <${options.roots.join('> or <')}> element`);
  }
  return { names, starts, ends, instructions };
}

/** The mark of UTF-8, decoded or read as latin1. */
function skipByteOrderMark(text: string): number {
  if (text.startsWith('\ufeff')) return 1;
  return text.startsWith('\u00ef\u00bb\u00bf') ? 3 : 0;
}

function clip(name: string): string {
  return printable(name, 60);
}

/** Reads from behind a tag's name to behind its `>`. */
function scanAttributes(
  text: string,
  from: number,
  bad: (at: number, why: string) => KvmIbError,
): { readonly end: number; readonly empty: boolean } {
  const seen = new Set<string>();
  let at = from;
  for (;;) {
    const here = skipSpace(text, at);
    const code = text.charCodeAt(here);
    if (code === 62 /* > */) return { end: here + 1, empty: false };
    if (code === 47 /* / */ && text.charCodeAt(here + 1) === 62) return { end: here + 2, empty: true };
    if (here >= text.length) throw bad(from, 'a tag is not closed; the text is cut off');
    const nameEnd = skipName(text, here);
    if (here === at || nameEnd === here) throw bad(here, 'a tag is malformed');
    const name = text.slice(here, nameEnd);
    const equals = skipSpace(text, nameEnd);
    const quoteAt = skipSpace(text, equals + 1);
    const quote = text.charAt(quoteAt);
    if (text.charAt(equals) !== '=' || (quote !== '"' && quote !== "'")) {
      throw bad(here, `the attribute ${clip(name)} has no quoted value`);
    }
    const end = text.indexOf(quote, quoteAt + 1);
    if (end === -1) throw bad(quoteAt, `the value of the attribute ${clip(name)} is not closed`);
    if (text.slice(quoteAt, end).includes('<'))
      throw bad(quoteAt, `the value of the attribute ${clip(name)} has a "<"`);
    if (seen.has(name)) throw bad(here, `the attribute ${clip(name)} is given twice`);
    if (seen.size >= MAX_ATTRIBUTES) throw bad(here, `an element has more than ${MAX_ATTRIBUTES} attributes`);
    seen.add(name);
    at = end + 1;
  }
}

const PREFIX = '@_';
const TEXT = '#text';
const CDATA = '#cdata';
const META = XMLParser.getMetaDataSymbol() as unknown as symbol;

/** A node of fast-xml-parser with `preserveOrder`: a key named as the tag, `:@` for attributes, a symbol for its place. */
type RawNode = { readonly [key: string]: unknown } & { readonly [key: symbol]: unknown };

function buildTree(text: string, outline: Outline, options: XmlOptions): XmlElement {
  const parser = new XMLParser({
    preserveOrder: true,
    captureMetaData: true,
    ignoreAttributes: false,
    attributeNamePrefix: PREFIX,
    textNodeName: TEXT,
    cdataPropName: CDATA,
    parseTagValue: false,
    parseAttributeValue: false,
    trimValues: false,
    // Its decoder treats text and attributes alike and knows documents' own entities; ours has the five and numbers.
    processEntities: false,
    maxNestedTags: (options.maxDepth ?? MAX_DEPTH) + 1,
    jPath: false,
    onDangerousProperty: (name: string) => name,
  });
  let nodes: unknown;
  try {
    nodes = parser.parse(blank(text, outline.instructions));
  } catch (error) {
    const why = error instanceof Error ? printable(error.message) : 'the parser gave up';
    throw refuse(options, why, 'remove what the reason names', error);
  }
  const disagreement = () =>
    refuse(
      options,
      'it is written in a way that two readers understand differently',
      'write it plainly and send it again',
    );

  let seen = 0;
  const convert = (node: RawNode): XmlElement => {
    const index = seen;
    seen += 1;
    const name = Object.keys(node).find((key) => key !== ':@');
    const place = node[META] as { readonly startIndex?: number; readonly endIndex?: number } | undefined;
    const start = outline.starts[index];
    const end = outline.ends[index];
    if (name === undefined || start === undefined || end === undefined) throw disagreement();
    if (outline.names[index] !== name || place?.startIndex !== start || place.endIndex !== end) throw disagreement();

    const attributes = new Map<string, string>();
    for (const [key, value] of Object.entries((node[':@'] ?? {}) as Record<string, unknown>)) {
      attributes.set(key.slice(PREFIX.length), decodeEntities(String(value)));
    }
    const children: XmlElement[] = [];
    const pieces: string[] = [];
    for (const child of node[name] as readonly RawNode[]) {
      const raw = child[TEXT];
      const cdata = child[CDATA] as readonly RawNode[] | undefined;
      if (typeof raw === 'string') pieces.push(decodeEntities(raw.replaceAll('\0', '')));
      else if (cdata !== undefined) pieces.push(String(cdata[0]?.[TEXT] ?? ''));
      else children.push(convert(child));
    }
    return { name, attributes, children, text: pieces.join(''), start, end };
  };

  const roots = Array.isArray(nodes) ? (nodes as readonly RawNode[]) : [];
  const root = roots[0];
  if (root === undefined || roots.length !== 1) throw disagreement();
  const tree = convert(root);
  if (seen !== outline.names.length) throw disagreement();
  return tree;
}

/**
 * The text with its processing instructions overwritten by as many NUL characters; the scan has excluded NUL elsewhere.
 * fast-xml-parser reads quotes inside an instruction as those of attributes and would run past its end.
 */
function blank(text: string, instructions: readonly number[]): string {
  if (instructions.length === 0) return text;
  const pieces: string[] = [];
  let at = 0;
  for (let index = 0; index < instructions.length; index += 2) {
    const start = instructions[index] ?? 0;
    const end = instructions[index + 1] ?? start;
    pieces.push(text.slice(at, start), '\0'.repeat(end - start));
    at = end;
  }
  pieces.push(text.slice(at));
  return pieces.join('');
}

const NAMED = new Map([
  ['lt', '<'],
  ['gt', '>'],
  ['amp', '&'],
  ['quot', '"'],
  ['apos', "'"],
]);

/** Decodes the five predefined entities and character references, once; any other `&` stays as it is. */
function decodeEntities(text: string): string {
  if (!text.includes('&')) return text;
  return text.replace(
    /&(?:#x([0-9A-Fa-f]{1,6})|#([0-9]{1,7})|(lt|gt|amp|quot|apos));/g,
    (whole, hex, decimal, name) => {
      if (name !== undefined) return NAMED.get(name) ?? whole;
      const code = hex === undefined ? Number.parseInt(decimal, 10) : Number.parseInt(hex, 16);
      return code > 0 && code <= 0x10ffff ? String.fromCodePoint(code) : whole;
    },
  );
}

/** Text made safe inside an element or an attribute value in either quotes. */
export function escapeXml(text: string): string {
  return text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
}
