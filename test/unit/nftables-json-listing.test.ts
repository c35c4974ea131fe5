import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { NftError, parseListing } from '../../lib/nftables-json/index.ts';

const META = { metainfo: { version: '1.0.6', release_name: 'x', json_schema_version: 1 } };
const TABLE = { table: { family: 'ip', name: 't', handle: 1 } };
const IN = { family: 'ip', table: 't', handle: 2 } as const;
const parse = (...entries: readonly unknown[]) =>
  parseListing(JSON.stringify({ nftables: [META, TABLE, ...entries] }), 'ip', 't');
const rule = (...expr: readonly unknown[]) => ({ rule: { ...IN, chain: 'c', expr } });

describe('parseListing', () => {
  it('reads an empty table', () => {
    expect(parse()).toEqual({
      table: { family: 'ip', name: 't', handle: 1, flags: [] },
      chains: [],
      sets: [],
      maps: [],
      counters: [],
      rules: [],
      others: [],
    });
  });

  it('shows a dormant table as such, however its flags are written', () => {
    for (const flags of ['dormant', ['dormant']]) {
      const text = JSON.stringify({ nftables: [META, { table: { ...TABLE.table, flags } }] });
      expect(parseListing(text, 'ip', 't').table.flags).toEqual(['dormant']);
    }
  });

  it('keeps unknown statements and known ones with something new in them as they came', () => {
    const strange = [
      { synproxy: { mss: 1460 } },
      { match: { op: '==', left: { payload: { base: 'nh', offset: 0, len: 8 } }, right: 1 } },
      { match: { op: '==', left: { meta: { key: 'mark' } }, right: 1, extra: true } },
      { log: { prefix: 'x', snaplen: 10 } },
      { dnat: { addr: '10.0.0.1', type_flags: 'prefix' } },
      { accept: { why: 'no' } },
    ];
    expect(parse(rule(...strange, { accept: null })).rules[0]?.expr).toEqual([
      ...strange.map((opaque) => ({ opaque })),
      { accept: null },
    ]);
  });

  it('keeps objects of other kinds as they came', () => {
    const quota = { family: 'ip', table: 't', name: 'q', handle: 9, bytes: 1 };
    expect(parse({ quota }).others).toEqual([{ kind: 'quota', json: quota }]);
  });

  it('reads a rule without statements, and flags that stand alone', () => {
    expect(parse({ rule: { ...IN, chain: 'c' } }).rules[0]?.expr).toEqual([]);
    expect(parse({ set: { ...IN, name: 's', type: 'ipv4_addr', flags: 'interval' } }).sets[0]?.flags).toEqual([
      'interval',
    ]);
    expect(parse(rule({ masquerade: { flags: 'random' } })).rules[0]?.expr).toEqual([
      { masquerade: { flags: ['random'] } },
    ]);
  });

  it('keeps what is nested too deeply opaque, and does not run out of stack', () => {
    const deep = `${'{"&":[1,'.repeat(100_000)}1${']}'.repeat(100_000)}`;
    const text = JSON.stringify({ nftables: [META, TABLE, rule({ match: { op: '==', left: 'DEEP', right: 1 } })] });
    const [statement] = parseListing(text.replace('"DEEP"', deep), 'ip', 't').rules[0]?.expr ?? [];
    expect(Object.keys(statement ?? {})).toEqual(['opaque']);
  });

  const set = { ...IN, name: 's', type: 'ipv4_addr' };
  const map = { ...set, map: 'ipv4_addr' };
  it.each<[string, unknown]>([
    ['an entry that is no object', 7],
    ['an entry with two kinds', { chain: {}, set: {} }],
    ['an entry without a kind', {}],
    ['an object that is null', { chain: null }],
    ['a second table', TABLE],
    ['an object of another table', { chain: { ...IN, table: 'other', name: 'c' } }],
    ['an object of another family', { chain: { ...IN, family: 'ip6', name: 'c' } }],
    ['a chain without a name', { chain: IN }],
    ['a chain without a handle', { chain: { family: 'ip', table: 't', name: 'c' } }],
    ['half a base chain', { chain: { ...IN, name: 'c', type: 'filter', hook: 'input' } }],
    ['a hook that there is not', { chain: { ...IN, name: 'c', type: 'filter', hook: 'nowhere', prio: 0 } }],
    ['a priority that is text', { chain: { ...IN, name: 'c', type: 'filter', hook: 'input', prio: 'filter' } }],
    ['a set without a type', { set: { ...IN, name: 's' } }],
    ['a set with an unknown flag', { set: { ...set, flags: ['strange'] } }],
    ['elements that are no list', { set: { ...set, elem: 'x' } }],
    ['a pair in a set', { set: { ...set, elem: [['10.0.0.1', '10.0.0.2']] } }],
    ['an element that is null', { set: { ...set, elem: [null] } }],
    ['an element that is an expression', { set: { ...set, elem: [{ meta: { key: 'mark' } }] } }],
    [
      'an element with a comment that is no text',
      { set: { ...set, elem: [{ elem: { val: '10.0.0.1', comment: 1 } }] } },
    ],
    ['a map element without a value', { map: { ...map, elem: ['10.0.0.1'] } }],
    ['a map element with two values', { map: { ...map, elem: [['a', 'b', 'c']] } }],
    ['a map without a type of values', { map: set }],
    ['a counter without values', { counter: { ...IN, name: 'k' } }],
    ['a rule without a chain', { rule: { ...IN, expr: [] } }],
    ['statements that are no list', { rule: { ...IN, chain: 'c', expr: {} } }],
    ['a statement that is null', rule(null)],
    ['a comment that is no text', { rule: { ...IN, chain: 'c', expr: [], comment: {} } }],
  ])('refuses %s', (_, entry) => {
    expect(() => parse(entry)).toThrow(NftError);
    expect(() => parse(entry)).toThrow(/^Cannot read the listing of table ip t: /);
  });

  it.each([
    ['nothing', ''],
    ['half a listing', JSON.stringify({ nftables: [META, TABLE] }).slice(0, -9)],
    ['another document', '[]'],
    ['null', 'null'],
    ['an empty list', '{"nftables":[]}'],
    ['no header', JSON.stringify({ nftables: [TABLE] })],
    ['another schema', JSON.stringify({ nftables: [{ metainfo: { json_schema_version: 2 } }, TABLE] })],
    ['a listing without its table', JSON.stringify({ nftables: [META] })],
    ['deep nesting', `${'['.repeat(200_000)}${']'.repeat(200_000)}`],
  ])('refuses %s', (_, text) => {
    expect(() => parseListing(text, 'ip', 't')).toThrow(NftError);
  });

  it('takes names of JavaScript itself as any other', () => {
    const text = `{"nftables":[${JSON.stringify(META)},${JSON.stringify(TABLE)},{"__proto__":{"family":"ip","table":"t"}}]}`;
    expect(parseListing(text, 'ip', 't').others).toEqual([{ kind: '__proto__', json: { family: 'ip', table: 't' } }]);
    expect(() => parse({ constructor: 1 })).toThrow(NftError);
  });

  it('reads or refuses any JSON at all', () => {
    const key = fc.constantFrom(
      'rule',
      'set',
      'map',
      'chain',
      'elem',
      'expr',
      'match',
      'left',
      'concat',
      'val',
      'flags',
    );
    const { tree } = fc.letrec<{ tree: unknown }>((tie) => ({
      tree: fc.oneof(
        { depthSize: 'small' },
        fc.constantFrom(null, 0, 1.5, 'ip', 't', '@t', true, IN),
        fc.array(tie('tree'), { maxLength: 4 }),
        fc.dictionary(key, tie('tree'), { maxKeys: 4 }),
        fc.dictionary(key, tie('tree'), { maxKeys: 4 }).map((extra) => ({ ...IN, name: 'x', chain: 'c', ...extra })),
      ),
    }));
    fc.assert(
      fc.property(key, tree, (kind, content) => {
        try {
          expect(parse({ [kind]: content }).table.name).toBe('t');
        } catch (error) {
          expect(error).toBeInstanceOf(NftError);
        }
      }),
      { numRuns: 2_000 },
    );
  });
});
