/**
 * Reads what `nft -j list table` prints. Nothing of it is trusted: every field is looked at, and what is not as
 * libnftables-json(5) has it makes an error, never half a listing. Unknown statements and objects are no error: they
 * are kept as they came.
 */
import { NftError } from './errors.ts';
import { isList } from './transaction.ts';
import type {
  Chain,
  CounterObject,
  CounterValues,
  ElementData,
  ElementKey,
  ElementValue,
  Expression,
  Family,
  Listed,
  ListedMap,
  ListedRule,
  ListedSet,
  ListedTable,
  MatchOperator,
  NatFlag,
  NatTarget,
  OpaqueStatement,
  Statement,
  TableListing,
  Verdict,
} from './types.ts';

/** Says what is wrong and where; becomes an NftError at the door. */
class Malformed extends Error {}

/** Deeper nesting than any rule of nft has; it bounds the recursion here. */
const DEPTH_LIMIT = 32;

/**
 * @param text what nft printed
 * @returns the listing; all of it belongs to the table that was asked for
 * @throws NftError `refused` when the text is no such listing
 */
export function parseListing(text: string, family: Family, name: string): TableListing {
  const where = `the listing of table ${family} ${name}`;
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch {
    throw new NftError('refused', `Cannot read ${where}: it is not JSON`);
  }
  try {
    return readListing(json, family, name);
  } catch (error) {
    if (error instanceof Malformed) throw new NftError('refused', `Cannot read ${where}: ${error.message}`);
    throw error;
  }
}

function readListing(json: unknown, family: Family, name: string): TableListing {
  const entries = array(object(json, 'the top'), 'nftables');
  const info = object(object(entries[0], 'the first entry')['metainfo'], 'metainfo');
  if (info['json_schema_version'] !== 1) throw new Malformed('json_schema_version is not 1');

  let table: ListedTable | undefined;
  const chains: Listed<Chain>[] = [];
  const sets: ListedSet[] = [];
  const maps: ListedMap[] = [];
  const counters: Listed<Required<CounterObject>>[] = [];
  const rules: ListedRule[] = [];
  const others: { kind: string; json: unknown }[] = [];

  entries.slice(1).forEach((entry, index) => {
    const [kind, content] = only(entry, `entry ${index + 1}`);
    const at = `${kind} in entry ${index + 1}`;
    const of = object(content, at);
    if (of['family'] !== family) throw new Malformed(`${at} is of another family`);
    if (of[kind === 'table' ? 'name' : 'table'] !== name) throw new Malformed(`${at} is of another table`);
    if (kind === 'table') {
      if (table !== undefined) throw new Malformed('it has two tables');
      table = { family, name, handle: integer(of, 'handle', at), flags: strings(of['flags'] ?? [], `${at}: flags`) };
    } else if (kind === 'chain') chains.push(readChain(of, family, name, at));
    else if (kind === 'set') sets.push(readSet(of, family, name, at));
    else if (kind === 'map') maps.push(readMap(of, family, name, at));
    else if (kind === 'counter') counters.push(readCounter(of, family, name, at));
    else if (kind === 'rule') rules.push(readRule(of, family, name, at));
    else others.push({ kind, json: content });
  });
  if (table === undefined) throw new Malformed('it has no table');
  return { table, chains, sets, maps, counters, rules, others };
}

function readChain(of: Json, family: Family, table: string, at: string): Listed<Chain> {
  const named = { family, table, name: string(of, 'name', at), handle: integer(of, 'handle', at) };
  if (of['type'] === undefined && of['hook'] === undefined) return named;
  return {
    ...named,
    type: oneOf(of, 'type', ['filter', 'nat', 'route'] as const, at),
    hook: oneOf(
      of,
      'hook',
      ['prerouting', 'input', 'forward', 'output', 'postrouting', 'ingress', 'egress'] as const,
      at,
    ),
    prio: integer(of, 'prio', at),
    ...(of['dev'] === undefined ? {} : { dev: string(of, 'dev', at) }),
    ...(of['policy'] === undefined ? {} : { policy: oneOf(of, 'policy', ['accept', 'drop'] as const, at) }),
  };
}

function readSetHead(of: Json, family: Family, table: string, at: string): Omit<ListedSet, 'elem'> {
  const flags = strings(of['flags'] ?? [], `${at}: flags`).map((flag) =>
    oneOf({ flag }, 'flag', ['constant', 'interval', 'timeout', 'dynamic'] as const, at),
  );
  return {
    family,
    table,
    name: string(of, 'name', at),
    handle: integer(of, 'handle', at),
    type: readType(of['type'], `${at}: type`),
    ...(flags.length === 0 ? {} : { flags }),
    ...(of['timeout'] === undefined ? {} : { timeout: integer(of, 'timeout', at) }),
    ...(of['size'] === undefined ? {} : { size: integer(of, 'size', at) }),
    ...(of['stmt'] === undefined ? {} : { stmt: array(of, 'stmt').map((item) => readSetStatement(item, at)) }),
  };
}

function readSetStatement(json: unknown, at: string): { counter: null } {
  // nft of later versions lists the counter of a set with its (meaningless) values.
  if (only(json, `${at}: stmt`)[0] !== 'counter') throw new Malformed(`${at}: stmt is not a counter`);
  return { counter: null };
}

function readSet(of: Json, family: Family, table: string, at: string): ListedSet {
  const elem = elements(of, at).map((item) => readKey(item, at));
  return { ...readSetHead(of, family, table, at), elem };
}

function readMap(of: Json, family: Family, table: string, at: string): ListedMap {
  const elem = elements(of, at).map((item) => readPair(item, at));
  return { ...readSetHead(of, family, table, at), map: readType(of['map'], `${at}: map`), elem };
}

function elements(of: Json, at: string): readonly unknown[] {
  const elem = of['elem'] ?? [];
  if (!Array.isArray(elem)) throw new Malformed(`${at}: elem is not a list`);
  return elem;
}

function readType(json: unknown, at: string): string | readonly string[] {
  return typeof json === 'string' ? json : strings(json, at);
}

function readCounter(of: Json, family: Family, table: string, at: string): Listed<Required<CounterObject>> {
  const named = { family, table, name: string(of, 'name', at), handle: integer(of, 'handle', at) };
  return { ...named, ...readCounterValues(of, at) };
}

function readCounterValues(of: Json, at: string): CounterValues {
  return { packets: integer(of, 'packets', at), bytes: integer(of, 'bytes', at) };
}

function readRule(of: Json, family: Family, table: string, at: string): ListedRule {
  // A rule without statements is possible, and nft lists it without `expr`.
  const expr = of['expr'] === undefined ? [] : array(of, 'expr');
  return {
    family,
    table,
    chain: string(of, 'chain', at),
    handle: integer(of, 'handle', at),
    expr: expr.map((item) => readStatement(item, at)),
    ...(of['comment'] === undefined ? {} : { comment: string(of, 'comment', at) }),
  };
}

// Elements ----------------------------------------------------------------------------------------------------------

function readPair(json: unknown, at: string): readonly [ElementKey, ElementData] {
  if (!Array.isArray(json) || json.length !== 2) throw new Malformed(`${at}: an element is not a pair`);
  return [readKey(json[0], at), readData(json[1], at)];
}

function readKey(json: unknown, at: string): ElementKey {
  if (!isObject(json) || json['elem'] === undefined) return readElementValue(json, at);
  const of = object(json['elem'], `${at}: elem`);
  const counter = of['counter'];
  return {
    elem: {
      val: readElementValue(of['val'], at),
      ...(of['comment'] === undefined ? {} : { comment: string(of, 'comment', at) }),
      ...(of['timeout'] === undefined ? {} : { timeout: integer(of, 'timeout', at) }),
      ...(of['expires'] === undefined ? {} : { expires: integer(of, 'expires', at) }),
      ...(counter === undefined ? {} : { counter: readCounterValues(object(counter, `${at}: counter`), at) }),
    },
  };
}

function readData(json: unknown, at: string): ElementData {
  return isObject(json) ? (readVerdict(json) ?? readElementValue(json, at)) : readElementValue(json, at);
}

function readElementValue(json: unknown, at: string): ElementValue {
  const value = readExpression(json, 0);
  if (typeof value !== 'object') return value;
  if (!isList(value) && ('concat' in value || 'prefix' in value || 'range' in value)) return value;
  throw new Malformed(`${at}: an element is not a value`);
}

// Statements --------------------------------------------------------------------------------------------------------

function readStatement(json: unknown, at: string): Statement | OpaqueStatement {
  object(json, `${at}: a statement`);
  try {
    return readKnownStatement(json) ?? { opaque: json };
  } catch (error) {
    // A statement of a known kind with something new inside it, such as a raw payload.
    if (error instanceof Malformed) return { opaque: json };
    throw error;
  }
}

function readVerdict(json: Json): Verdict | undefined {
  const [kind, content] = only(json, 'a verdict');
  if (kind === 'jump') return { jump: { target: string(object(content, kind), 'target', kind) } };
  if (kind === 'goto') return { goto: { target: string(object(content, kind), 'target', kind) } };
  if (content !== null) return undefined;
  if (kind === 'accept') return { accept: null };
  if (kind === 'drop') return { drop: null };
  if (kind === 'continue') return { continue: null };
  if (kind === 'return') return { return: null };
  return undefined;
}

const OPERATORS = ['==', '!=', '<', '>', '<=', '>=', 'in'] as const satisfies readonly MatchOperator[];

/** Undefined or Malformed: not one of ours. */
function readKnownStatement(json: unknown): Statement | undefined {
  const [kind, content] = only(json, 'a statement');
  const verdict = readVerdict(object(json, kind));
  if (verdict !== undefined) return verdict;
  if (kind === 'notrack' && content === null) return { notrack: null };
  if (kind === 'masquerade') {
    if (content === null) return { masquerade: null };
    const { port, flags } = readNat(exact(content, ['port', 'flags']));
    return { masquerade: { ...(port === undefined ? {} : { port }), ...(flags === undefined ? {} : { flags }) } };
  }
  if (kind === 'counter') {
    if (typeof content === 'string' || content === null) return { counter: content };
    return { counter: readCounterValues(exact(content, ['packets', 'bytes']), kind) };
  }
  if (kind === 'reject') return content === null ? { reject: null } : readReject(exact(content, ['type', 'expr']));
  if (kind === 'log') return content === null ? { log: null } : readLog(exact(content, ['prefix', 'level', 'group']));
  if (kind === 'snat') return { snat: readNat(exact(content, ['addr', 'family', 'port', 'flags'])) };
  if (kind === 'dnat') return { dnat: readNat(exact(content, ['addr', 'family', 'port', 'flags'])) };
  if (kind === 'vmap') return { vmap: readLookup(content, 0) };
  if (kind === 'match') {
    const of = exact(content, ['op', 'left', 'right']);
    const op = oneOf(of, 'op', OPERATORS, kind);
    return { match: { op, left: readExpression(of['left'], 0), right: readExpression(of['right'], 0) } };
  }
  if (kind === 'mangle') {
    const of = exact(content, ['key', 'value']);
    return { mangle: { key: readExpression(of['key'], 0), value: readExpression(of['value'], 0) } };
  }
  return undefined;
}

function readReject(of: Json): Statement {
  if (of['type'] === 'tcp reset' && of['expr'] === undefined) return { reject: { type: 'tcp reset' } };
  const type = oneOf(of, 'type', ['icmp', 'icmpv6', 'icmpx'] as const, 'reject');
  return { reject: { type, expr: string(of, 'expr', 'reject') } };
}

function readLog(of: Json): Statement {
  return {
    log: {
      ...(of['prefix'] === undefined ? {} : { prefix: string(of, 'prefix', 'log') }),
      ...(of['level'] === undefined ? {} : { level: string(of, 'level', 'log') }),
      ...(of['group'] === undefined ? {} : { group: integer(of, 'group', 'log') }),
    },
  };
}

function readNat(of: Json): NatTarget {
  const flags = strings(of['flags'] ?? [], 'flags').map(
    (flag): NatFlag => oneOf({ flag }, 'flag', ['random', 'fully-random', 'persistent'] as const, 'flags'),
  );
  return {
    ...(of['addr'] === undefined ? {} : { addr: readExpression(of['addr'], 0) }),
    ...(of['family'] === undefined ? {} : { family: oneOf(of, 'family', ['ip', 'ip6'] as const, 'family') }),
    ...(of['port'] === undefined ? {} : { port: readExpression(of['port'], 0) }),
    ...(flags.length === 0 ? {} : { flags }),
  };
}

// Expressions -------------------------------------------------------------------------------------------------------

function readExpression(json: unknown, depth: number): Expression {
  if (depth > DEPTH_LIMIT) throw new Malformed('an expression is nested too deeply');
  if (typeof json === 'string') return json;
  if (typeof json === 'number') return integer({ json }, 'json', 'a number');
  if (Array.isArray(json)) return json.map(readImmediate);
  const [kind, content] = only(json, 'an expression');
  const next = (item: unknown) => readExpression(item, depth + 1);
  if (kind === 'meta') return { meta: { key: string(exact(content, ['key']), 'key', kind) } };
  if (kind === 'ct') {
    const of = exact(content, ['key', 'dir']);
    const key = string(of, 'key', kind);
    if (of['dir'] === undefined) return { ct: { key } };
    return { ct: { key, dir: oneOf(of, 'dir', ['original', 'reply'] as const, kind) } };
  }
  if (kind === 'payload') {
    const of = exact(content, ['protocol', 'field']);
    return { payload: { protocol: string(of, 'protocol', kind), field: string(of, 'field', kind) } };
  }
  if (kind === 'fib') {
    const of = exact(content, ['result', 'flags']);
    const result = oneOf(of, 'result', ['oif', 'oifname', 'type'] as const, kind);
    return { fib: { result, flags: strings(of['flags'], kind) } };
  }
  if (kind === 'concat') return { concat: list(content, kind).map(next) };
  if (kind === 'prefix') {
    const of = exact(content, ['addr', 'len']);
    return { prefix: { addr: string(of, 'addr', kind), len: integer(of, 'len', kind) } };
  }
  if (kind === 'range') {
    const [from, to] = pair(content, kind);
    return { range: [readImmediate(from), readImmediate(to)] };
  }
  if (kind === 'set') return readAnonymousSet(content);
  if (kind === 'map') return { map: readLookup(content, depth + 1) };
  if (kind === '&' || kind === '|' || kind === '^' || kind === '<<' || kind === '>>') {
    const [left, right] = pair(content, kind);
    const operands = [next(left), next(right)] as const;
    if (kind === '&') return { '&': operands };
    if (kind === '|') return { '|': operands };
    if (kind === '^') return { '^': operands };
    return kind === '<<' ? { '<<': operands } : { '>>': operands };
  }
  throw new Malformed(`an expression is of the unknown kind ${JSON.stringify(kind.slice(0, 40))}`);
}

function readImmediate(json: unknown): string | number {
  if (typeof json === 'string') return json;
  return integer({ json }, 'json', 'a value');
}

function readAnonymousSet(content: unknown) {
  const items = Array.isArray(content) ? content : [content];
  return { set: items.map((item) => (Array.isArray(item) ? readPair(item, 'set') : readKey(item, 'set'))) };
}

function readLookup(content: unknown, depth: number) {
  const of = exact(content, ['key', 'data']);
  const key = readExpression(of['key'], depth + 1);
  if (typeof of['data'] === 'string') return { key, data: of['data'] };
  return { key, data: readAnonymousSet(exact(of['data'], ['set'])['set']) };
}

// JSON --------------------------------------------------------------------------------------------------------------

type Json = { readonly [key: string]: unknown };

function isObject(json: unknown): json is Json {
  return typeof json === 'object' && json !== null && !Array.isArray(json);
}

function object(json: unknown, what: string): Json {
  if (!isObject(json)) throw new Malformed(`${what} is not an object`);
  return json;
}

/** An object with no other keys than these: a key that is not known may change what the known ones mean. */
function exact(json: unknown, keys: readonly string[]): Json {
  const of = object(json, 'a part of a statement');
  if (!Object.keys(of).every((key) => keys.includes(key))) throw new Malformed('a part of a statement is unknown');
  return of;
}

/** The one key of an object, and what it holds. */
function only(json: unknown, what: string): readonly [string, unknown] {
  const entries = Object.entries(object(json, what));
  const [entry] = entries;
  if (entry === undefined || entries.length !== 1) throw new Malformed(`${what} has not exactly one key`);
  return entry;
}

function list(json: unknown, what: string): readonly unknown[] {
  if (!Array.isArray(json)) throw new Malformed(`${what} is not a list`);
  return json;
}

function pair(json: unknown, what: string): readonly [unknown, unknown] {
  const [first, second, ...rest] = list(json, what);
  if (first === undefined || second === undefined || rest.length > 0) throw new Malformed(`${what} is not a pair`);
  return [first, second];
}

function array(of: Json, key: string): readonly unknown[] {
  return list(of[key], key);
}

function string(of: Json, key: string, at: string): string {
  const value = of[key];
  if (typeof value !== 'string') throw new Malformed(`${at}: ${key} is not a string`);
  return value;
}

function integer(of: Json, key: string, at: string): number {
  const value = of[key];
  if (typeof value !== 'number' || !Number.isInteger(value)) throw new Malformed(`${at}: ${key} is not an integer`);
  return value;
}

/** A list of strings; a single one may stand alone, as later versions of nft print it. */
function strings(json: unknown, what: string): string[] {
  return (Array.isArray(json) ? json : [json]).map((item) => string({ item }, 'item', what));
}

function oneOf<const T extends string>(of: Json, key: string, values: readonly T[], at: string): T {
  const found = values.find((value) => value === of[key]);
  if (found === undefined) throw new Malformed(`${at}: ${key} is not one that nft has`);
  return found;
}
