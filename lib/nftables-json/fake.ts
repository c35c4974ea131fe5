/**
 * An nft in memory for tests: what it accepts, refuses and lists is held to nft 1.0.6 and the kernel by a suite that
 * runs on both. A transaction works on a copy, which takes the place of the state only when every command succeeded.
 *
 * It knows names, references, keys and values. It does not know types, so a word that is no address passes; an
 * interval is a value like any other (no overlap is seen); it does not follow jumps, so it takes a loop. Rules are
 * listed as they were written, without the rewriting that nft does. Nothing expires and nothing counts. `destroy` is
 * known, and is the one command that is not held to nft 1.0.6, which lacks it.
 */
import type { NftErrorCode } from './errors.ts';
import { NftError } from './errors.ts';
import { type Nft, refusal } from './run.ts';
import { isPair, type Transaction, toJson } from './transaction.ts';
import type {
  AddTarget,
  Chain,
  Command,
  CounterObject,
  DeleteTarget,
  Element,
  ElementData,
  ElementKey,
  Elements,
  Family,
  FlushTarget,
  Listed,
  ListedMap,
  ListedRule,
  ListedSet,
  NftMap,
  NftSet,
  Rule,
  Statement,
  TableListing,
} from './types.ts';

/** Elements by key, in the canonical form of `canon`. */
type FakeSet = {
  readonly kind: 'set' | 'map';
  readonly object: Listed<NftSet | NftMap>;
  readonly elements: Map<string, readonly [ElementKey, ElementData | null]>;
};

interface FakeTable {
  readonly family: Family;
  readonly name: string;
  readonly handle: number;
  /** The kernel numbers all objects of a table from one counter. */
  handles: number;
  readonly chains: Map<string, { readonly object: Listed<Chain>; readonly rules: readonly Listed<Rule>[] }>;
  readonly sets: Map<string, FakeSet>;
  readonly counters: Map<string, Listed<Required<CounterObject>>>;
}

/** What a command is refused for. */
class Refusal extends Error {
  readonly code: NftErrorCode;
  constructor(code: NftErrorCode, why: string) {
    super(why);
    this.code = code;
  }
}

/** The kernel's words, as strerror(3) has them. */
const notFound = () => new Refusal('not-found', 'No such file or directory');
const exists = () => new Refusal('exists', 'File exists');
const busy = () => new Refusal('refused', 'Device or resource busy');
const unsupported = () => new Refusal('refused', 'Operation not supported');
const invalid = () => new Refusal('refused', 'Invalid argument');

/** An empty kernel with an nft before it. Same interface, errors and listings as `createNft`. */
export function createFakeNft(): Nft {
  let tables: ReadonlyMap<string, FakeTable> = new Map();
  let tableHandles = 0;

  function attempt(what: Transaction): ReadonlyMap<string, FakeTable> {
    toJson(what);
    if (what.commands.length === 0) throw new NftError('refused', 'Cannot run an empty transaction');
    const copy = new Map([...tables].map(([key, table]) => [key, copyTable(table)]));
    what.commands.forEach((command, index) => {
      try {
        apply(copy, command, () => ++tableHandles);
      } catch (error) {
        if (error instanceof Refusal) throw refusal(what, error.code, error.message, index, error.message);
        throw error;
      }
    });
    return copy;
  }

  return {
    async run(what) {
      tables = attempt(what);
    },
    async check(what) {
      attempt(what);
    },
    async listTable(family, name) {
      toJson({ commands: [{ list: { table: { family, name } } }] });
      const table = tables.get(`${family} ${name}`);
      return table === undefined ? undefined : list(table);
    },
  };
}

function copyTable(table: FakeTable): FakeTable {
  return {
    ...table,
    chains: new Map(table.chains),
    sets: new Map([...table.sets].map(([key, set]) => [key, { ...set, elements: new Map(set.elements) }])),
    counters: new Map(table.counters),
  };
}

type Tables = Map<string, FakeTable>;

function apply(tables: Tables, command: Command, tableHandle: () => number): void {
  if ('add' in command) add(tables, command.add, false, tableHandle);
  else if ('create' in command) add(tables, command.create, true, tableHandle);
  else if ('insert' in command) place(tables, command.insert.rule, 'insert');
  else if ('replace' in command) place(tables, command.replace.rule, 'replace');
  else if ('delete' in command) remove(tables, command.delete);
  else if ('flush' in command) flush(tables, command.flush);
  else if ('list' in command) tableOf(tables, command.list.table.family, command.list.table.name);
  else destroy(tables, command.destroy);
}

function tableOf(tables: Tables, family: Family, name: string): FakeTable {
  const table = tables.get(`${family} ${name}`);
  if (table === undefined) throw notFound();
  return table;
}

function found<T>(value: T | undefined): T {
  if (value === undefined) throw notFound();
  return value;
}

// Adding ------------------------------------------------------------------------------------------------------------

function add(tables: Tables, target: AddTarget, create: boolean, tableHandle: () => number): void {
  if ('table' in target) {
    const { family, name } = target.table;
    const key = `${family} ${name}`;
    if (tables.has(key) && create) throw exists();
    if (tables.has(key)) return;
    const handle = tableHandle();
    tables.set(key, { family, name, handle, handles: 0, chains: new Map(), sets: new Map(), counters: new Map() });
  } else if ('chain' in target)
    addChain(tableOf(tables, target.chain.family, target.chain.table), target.chain, create);
  else if ('set' in target) addSet(tableOf(tables, target.set.family, target.set.table), 'set', target.set, create);
  else if ('map' in target) addSet(tableOf(tables, target.map.family, target.map.table), 'map', target.map, create);
  else if ('rule' in target) place(tables, target.rule, 'add');
  else if ('element' in target) addElements(tables, target.element, create);
  else {
    const table = tableOf(tables, target.counter.family, target.counter.table);
    const present = table.counters.has(target.counter.name);
    if (present && create) throw exists();
    // An `add` of a present counter does not set its values.
    if (present) return;
    table.counters.set(target.counter.name, { packets: 0, bytes: 0, ...target.counter, handle: ++table.handles });
  }
}

function addChain(table: FakeTable, chain: Chain, create: boolean): void {
  const present = table.chains.get(chain.name);
  if (present === undefined) {
    const policy = chain.hook === undefined ? {} : { policy: chain.policy ?? ('accept' as const) };
    table.chains.set(chain.name, { object: { ...chain, ...policy, handle: ++table.handles }, rules: [] });
    return;
  }
  if (create) throw exists();
  const old = present.object;
  if (chain.hook === undefined) return;
  if (old.hook === undefined) throw chain.policy === undefined ? exists() : unsupported();
  if (old.hook !== chain.hook || old.type !== chain.type || old.prio !== chain.prio) throw unsupported();
  // The policy is the one thing that an `add` changes.
  if (chain.policy !== undefined)
    table.chains.set(chain.name, { ...present, object: { ...old, policy: chain.policy } });
}

function addSet(table: FakeTable, kind: 'set' | 'map', set: NftSet | NftMap, create: boolean): void {
  const { elem, ...object } = set;
  const present = table.sets.get(set.name);
  if (present === undefined) {
    table.sets.set(set.name, { kind, object: { ...object, handle: ++table.handles }, elements: new Map() });
  } else if (create || present.kind !== kind || shape(present.object) !== shape(set)) throw exists();
  if (elem !== undefined && elem.length > 0) insertElements(table, set.name, elem, false);
}

/** What has to be equal for an `add` of a present set to be no change. */
function shape(set: NftSet | NftMap): string {
  const values = 'map' in set ? [set.map].flat() : null;
  return JSON.stringify([[set.type].flat(), values, [...(set.flags ?? [])].sort(), set.stmt ?? []]);
}

function addElements(tables: Tables, of: Elements, create: boolean): void {
  insertElements(tableOf(tables, of.family, of.table), of.name, of.elem, create);
}

function insertElements(table: FakeTable, name: string, elements: readonly Element[], create: boolean): void {
  const set = found(table.sets.get(name));
  if (elements.length === 0) throw invalid();
  for (const element of elements) {
    const [key, data] = isPair(element) ? element : [element, null];
    checkArity(set, key);
    if ((data !== null) !== (set.kind === 'map')) throw invalid();
    const target = data === null ? undefined : targetOf(data);
    // Packets enter a base chain by its hook only.
    if (target !== undefined && found(table.chains.get(target)).object.hook !== undefined) throw unsupported();
    const known = set.elements.get(canon(keyValue(key)));
    if (known === undefined) set.elements.set(canon(keyValue(key)), [key, data]);
    // The same value again is no change; its comment is not looked at and stays the old one.
    else if (create || canon(known[1]) !== canon(data)) throw exists();
  }
}

function checkArity(set: FakeSet, key: ElementKey): void {
  const value = keyValue(key);
  const length = typeof value === 'object' && 'concat' in value ? value.concat.length : 1;
  if (length !== [set.object.type].flat().length) throw invalid();
}

function keyValue(key: ElementKey) {
  return typeof key === 'object' && 'elem' in key ? key.elem.val : key;
}

/** One text for one value: hardware addresses compare without regard to case, interface names with it. */
function canon(value: unknown): string {
  const isMac = (text: string) => /^[0-9a-f]{2}(?::[0-9a-f]{2})+$/i.test(text);
  return JSON.stringify(value, (_, item) => (typeof item === 'string' && isMac(item) ? item.toLowerCase() : item));
}

function place(tables: Tables, rule: Rule & { readonly handle?: number }, how: 'add' | 'insert' | 'replace'): void {
  const table = tableOf(tables, rule.family, rule.table);
  const chain = found(table.chains.get(rule.chain));
  const known = how === 'add' ? undefined : rule.handle;
  const at = known === undefined ? undefined : chain.rules.findIndex((other) => other.handle === known);
  if (at === -1) throw notFound();
  for (const name of setsOf(rule)) found(table.sets.get(name));
  for (const name of countersOf(rule)) found(table.counters.get(name));
  for (const name of targetsOf(rule)) {
    if (found(table.chains.get(name)).object.hook !== undefined) throw unsupported();
  }
  const rules = [...chain.rules];
  rules.splice(at ?? (how === 'insert' ? 0 : rules.length), how === 'replace' ? 1 : 0, {
    ...rule,
    handle: ++table.handles,
  });
  table.chains.set(rule.chain, { ...chain, rules });
}

// Removing ----------------------------------------------------------------------------------------------------------

function remove(tables: Tables, target: DeleteTarget): void {
  if ('table' in target) {
    tableOf(tables, target.table.family, target.table.name);
    tables.delete(`${target.table.family} ${target.table.name}`);
  } else if ('chain' in target) {
    const table = tableOf(tables, target.chain.family, target.chain.table);
    const { name } = target.chain;
    found(table.chains.get(name));
    // Its own rules go with the chain; those of others that lead to it keep it.
    if (rulesOf(table).some((rule) => targetsOf(rule).includes(name))) throw busy();
    if (dataOf(table).some((data) => targetOf(data) === name)) throw busy();
    table.chains.delete(name);
  } else if ('rule' in target) {
    const table = tableOf(tables, target.rule.family, target.rule.table);
    const chain = found(table.chains.get(target.rule.chain));
    const rules = chain.rules.filter((rule) => rule.handle !== target.rule.handle);
    if (rules.length === chain.rules.length) throw notFound();
    table.chains.set(target.rule.chain, { ...chain, rules });
  } else if ('element' in target) {
    const { family, table, name, elem } = target.element;
    const set = found(tableOf(tables, family, table).sets.get(name));
    if (elem.length === 0) throw invalid();
    for (const element of elem) {
      const key = isPair(element) ? element[0] : element;
      checkArity(set, key);
      if (!set.elements.delete(canon(keyValue(key)))) throw notFound();
    }
  } else if ('counter' in target) {
    const table = tableOf(tables, target.counter.family, target.counter.table);
    found(table.counters.get(target.counter.name));
    if (rulesOf(table).some((rule) => countersOf(rule).includes(target.counter.name))) throw busy();
    table.counters.delete(target.counter.name);
  } else {
    // The kernel has one kind of both: a map may be deleted as a set.
    const { family, table: tableName, name } = 'set' in target ? target.set : target.map;
    const table = tableOf(tables, family, tableName);
    found(table.sets.get(name));
    if (rulesOf(table).some((rule) => setsOf(rule).includes(name))) throw busy();
    table.sets.delete(name);
  }
}

function destroy(tables: Tables, target: DeleteTarget): void {
  // Element by element, as each may be absent.
  const targets = 'element' in target ? target.element.elem.map((item) => withOne(target.element, item)) : [target];
  for (const one of targets) {
    try {
      remove(tables, one);
    } catch (error) {
      if (!(error instanceof Refusal && error.code === 'not-found')) throw error;
    }
  }
}

function withOne(of: Elements, item: Element): DeleteTarget {
  return { element: { ...of, elem: [item] } };
}

function flush(tables: Tables, target: FlushTarget): void {
  if ('table' in target) {
    const table = tableOf(tables, target.table.family, target.table.name);
    for (const [name, chain] of table.chains) table.chains.set(name, { ...chain, rules: [] });
  } else if ('chain' in target) {
    const table = tableOf(tables, target.chain.family, target.chain.table);
    table.chains.set(target.chain.name, { ...found(table.chains.get(target.chain.name)), rules: [] });
  } else {
    const kind = 'set' in target ? 'set' : 'map';
    const { family, table, name } = 'set' in target ? target.set : target.map;
    const set = found(tableOf(tables, family, table).sets.get(name));
    if (set.kind !== kind) throw notFound();
    set.elements.clear();
  }
}

// References --------------------------------------------------------------------------------------------------------

function rulesOf(table: FakeTable): readonly Rule[] {
  return [...table.chains.values()].flatMap((chain) => chain.rules);
}

function dataOf(table: FakeTable): readonly ElementData[] {
  return [...table.sets.values()].flatMap((set) => [...set.elements.values()].flatMap(([, data]) => data ?? []));
}

/** The chain that a verdict leads to. */
function targetOf(data: ElementData | Statement): string | undefined {
  if (typeof data !== 'object') return undefined;
  if ('jump' in data) return data.jump.target;
  return 'goto' in data ? data.goto.target : undefined;
}

function setsOf(rule: Rule): readonly string[] {
  return strings(rule.expr)
    .filter((text) => text.startsWith('@'))
    .map((text) => text.slice(1));
}

function countersOf(rule: Rule): readonly string[] {
  return rule.expr.flatMap((statement) =>
    'counter' in statement && typeof statement.counter === 'string' ? [statement.counter] : [],
  );
}

function targetsOf(rule: Rule): readonly string[] {
  return rule.expr.flatMap((statement) => {
    const anonymous = 'vmap' in statement && typeof statement.vmap.data === 'object' ? statement.vmap.data.set : [];
    const data = anonymous.flatMap((element) => (isPair(element) ? [element[1]] : []));
    return [statement, ...data].flatMap((item) => targetOf(item) ?? []);
  });
}

/** Every string anywhere in a value. */
function strings(value: unknown): readonly string[] {
  if (typeof value === 'string') return [value];
  return typeof value === 'object' && value !== null ? Object.values(value).flatMap(strings) : [];
}

// Listing -----------------------------------------------------------------------------------------------------------

function list(table: FakeTable): TableListing {
  const { family, name, handle } = table;
  const sets: ListedSet[] = [];
  const maps: ListedMap[] = [];
  for (const { object, elements } of table.sets.values()) {
    const elem = [...elements.values()].map(([key, data]) => [listKey(object, key), data] as const);
    if ('map' in object)
      maps.push({ ...object, elem: elem.flatMap(([key, data]) => (data === null ? [] : [[key, data]])) });
    else sets.push({ ...object, elem: elem.map(([key]) => key) });
  }
  const chains = [...table.chains.values()];
  return {
    table: { family, name, handle, flags: [] },
    chains: chains.map((chain) => chain.object),
    sets,
    maps,
    counters: [...table.counters.values()],
    rules: chains.flatMap((chain) => chain.rules.map(listRule)),
    others: [],
  };
}

/** With a counter where the set has one for every element. */
function listKey(set: NftSet, key: ElementKey): ElementKey {
  if (set.stmt === undefined || set.stmt.length === 0) return key;
  const extras = typeof key === 'object' && 'elem' in key ? key.elem : { val: key };
  return { elem: { ...extras, counter: { packets: 0, bytes: 0 } } };
}

function listRule(rule: Listed<Rule>): ListedRule {
  const expr = rule.expr.map((statement) =>
    'counter' in statement && statement.counter === null ? { counter: { packets: 0, bytes: 0 } } : statement,
  );
  return { ...rule, expr };
}
