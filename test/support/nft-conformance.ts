/** What every nft must do, as one suite: it runs on the fake and on the real one. */
import { beforeEach, describe, expect, it } from 'vitest';
import {
  append,
  type Command,
  type Element,
  type ElementKey,
  type Expression,
  type Nft,
  NftError,
  type Statement,
  type TableListing,
  transaction,
} from '../../lib/nftables-json/index.ts';

export const TABLE = { family: 'ip', name: 'suite' } as const;
const IN = { family: 'ip', table: TABLE.name } as const;
const saddr: Expression = { payload: { protocol: 'ip', field: 'saddr' } };

/** `ok`, or the code of the error with the place of the command at fault. */
export async function outcome(nft: Nft, ...commands: readonly Command[]): Promise<string> {
  try {
    await nft.run(transaction(...commands));
    return 'ok';
  } catch (error) {
    if (error instanceof NftError) return `${error.code} at ${error.index}`;
    throw error;
  }
}

/** A listing in which equal tables are equal: no handles, no counts, and an order for what has none. */
export function normalise(listing: TableListing | undefined): unknown {
  if (listing === undefined) return undefined;
  const sorted = (items: readonly unknown[]) => items.map(plain).sort((a, b) => compare(canon(a), canon(b)));
  const elements = <T extends { readonly elem: readonly unknown[] }>(set: T) => ({ ...set, elem: sorted(set.elem) });
  return {
    table: plain(listing.table),
    chains: sorted(listing.chains),
    sets: sorted(listing.sets.map(elements)),
    maps: sorted(listing.maps.map(elements)),
    counters: sorted(listing.counters),
    // Stable: rules keep their order within a chain.
    rules: listing.rules.map(plain).sort((a, b) => compare(chainOf(a), chainOf(b))),
    others: listing.others,
  };
}

function plain(value: unknown): unknown {
  return JSON.parse(
    JSON.stringify(value, (key, item) => {
      if (key === 'handle') return undefined;
      return key === 'packets' || key === 'bytes' ? 0 : item;
    }),
  );
}

function canon(value: unknown): string {
  return JSON.stringify(value, (_, item) =>
    typeof item === 'object' && item !== null && !Array.isArray(item)
      ? Object.fromEntries(Object.entries(item).sort(([a], [b]) => compare(a, b)))
      : item,
  );
}

const chainOf = (rule: unknown) => String((rule as { chain?: unknown }).chain);
const compare = (a: string, b: string) => (a < b ? -1 : a > b ? 1 : 0);

export const addTable: Command = { add: { table: TABLE } };
export const addMap: Command = { add: { map: { ...IN, name: 'm', type: 'ipv4_addr', map: 'ipv4_addr' } } };
export const addPairs: Command = { add: { set: { ...IN, name: 's', type: ['ipv4_addr', 'ether_addr'] } } };
export const addVerdicts: Command = { add: { map: { ...IN, name: 'v', type: 'ipv4_addr', map: 'verdict' } } };
export const addChain = (name: string): Command => ({ add: { chain: { ...IN, name } } });
export const addBase: Command = {
  add: { chain: { ...IN, name: 'base', type: 'filter', hook: 'input', prio: 10, policy: 'accept' } },
};
export const addRule = (chain: string, ...expr: readonly Statement[]): Command => ({
  add: { rule: { ...IN, chain, expr } },
});
export const addElements = (name: string, ...elem: readonly Element[]): Command => ({
  add: { element: { ...IN, name, elem } },
});
export const createElements = (name: string, ...elem: readonly Element[]): Command => ({
  create: { element: { ...IN, name, elem } },
});
export const deleteElements = (name: string, ...elem: readonly Element[]): Command => ({
  delete: { element: { ...IN, name, elem } },
});
export const flushMap = (name: string): Command => ({ flush: { map: { ...IN, name } } });
export const flushChain = (name: string): Command => ({ flush: { chain: { ...IN, name } } });
export const deleteChain = (name: string): Command => ({ delete: { chain: { ...IN, name } } });
export const deleteMap = (name: string): Command => ({ delete: { map: { ...IN, name } } });

/**
 * @param name what is under test
 * @param fresh gives an nft in whose kernel the table `ip suite` does not exist
 */
export function nftConformance(name: string, fresh: () => Promise<Nft>): void {
  describe(name, () => {
    let nft: Nft;
    const run = (...commands: readonly Command[]) => outcome(nft, ...commands);
    const listing = async () => {
      const found = await nft.listTable(TABLE.family, TABLE.name);
      if (found === undefined) throw new Error('the table is absent');
      return found;
    };
    const mapped = async () => [...((await listing()).maps.find((map) => map.name === 'm')?.elem ?? [])].sort();

    beforeEach(async () => {
      nft = await fresh();
    });

    it('lists an absent table as undefined', async () => {
      expect(await nft.listTable('ip', TABLE.name)).toBeUndefined();
      expect(await nft.listTable('ip6', TABLE.name)).toBeUndefined();
    });

    it('refuses an empty transaction', async () => {
      expect(await run()).toBe('refused at undefined');
    });

    it('refuses a table name that is more than a name', async () => {
      await expect(nft.listTable('ip', 'suite; flush ruleset')).rejects.toMatchObject({ code: 'refused' });
    });

    it('adds again what is there, and creates it only once', async () => {
      const all = [addTable, addMap, addPairs, addChain('c'), addBase];
      expect(await run(...all)).toBe('ok');
      const before = normalise(await listing());
      expect(await run(...all)).toBe('ok');
      expect(normalise(await listing())).toEqual(before);
      expect(await run({ create: { table: TABLE } })).toBe('exists at 0');
      expect(await run({ create: { chain: { ...IN, name: 'c' } } })).toBe('exists at 0');
      expect(await run(addTable, { create: { set: { ...IN, name: 's', type: ['ipv4_addr', 'ether_addr'] } } })).toBe(
        'exists at 1',
      );
    });

    it('calls every absent object not found', async () => {
      const absent = { ...IN, name: 'nope' };
      expect(await run({ delete: { table: TABLE } })).toBe('not-found at 0');
      expect(await run(addMap)).toBe('not-found at 0');
      expect(await run(addTable)).toBe('ok');
      for (const target of [{ chain: absent }, { set: absent }, { map: absent }, { counter: absent }]) {
        expect(await run(addTable, { delete: target })).toBe('not-found at 1');
      }
      for (const target of [{ chain: absent }, { set: absent }, { map: absent }]) {
        expect(await run(addTable, { flush: target })).toBe('not-found at 1');
      }
      expect(await run(addElements('nope', '1.1.1.1'))).toBe('not-found at 0');
      expect(await run(addRule('nope', { accept: null }))).toBe('not-found at 0');
    });

    it('adds the same pair again, and calls another value for the key exists', async () => {
      expect(await run(addTable, addMap, addElements('m', ['10.0.0.1', '10.0.1.1']))).toBe('ok');
      expect(await run(addElements('m', ['10.0.0.1', '10.0.1.1']))).toBe('ok');
      expect(await run(addElements('m', ['10.0.0.1', '10.0.1.2']))).toBe('exists at 0');
      expect(await run(createElements('m', ['10.0.0.1', '10.0.1.1']))).toBe('exists at 0');
      expect(await mapped()).toEqual([['10.0.0.1', '10.0.1.1']]);
    });

    it('takes a key twice in one command when the values agree', async () => {
      expect(await run(addTable, addMap)).toBe('ok');
      expect(await run(addElements('m', ['10.0.0.1', '10.0.1.1'], ['10.0.0.1', '10.0.1.1']))).toBe('ok');
      expect(await run(addElements('m', ['10.0.0.2', '10.0.1.1'], ['10.0.0.2', '10.0.1.2']))).toBe('exists at 0');
      expect(await mapped()).toEqual([['10.0.0.1', '10.0.1.1']]);
    });

    it('deletes by key, whatever the value', async () => {
      expect(await run(addTable, addMap)).toBe('ok');
      expect(await run(addElements('m', ['10.0.0.1', '10.0.1.1'], ['10.0.0.2', '10.0.1.2']))).toBe('ok');
      expect(await run(deleteElements('m', ['10.0.0.1', '9.9.9.9']))).toBe('ok');
      expect(await run(deleteElements('m', '10.0.0.2'))).toBe('ok');
      expect(await run(deleteElements('m', '10.0.0.2'))).toBe('not-found at 0');
      expect(await mapped()).toEqual([]);
    });

    it('replaces a pair by delete and add in one transaction', async () => {
      expect(await run(addTable, addMap, addElements('m', ['10.0.0.1', '10.0.1.1']))).toBe('ok');
      expect(await run(deleteElements('m', '10.0.0.1'), addElements('m', ['10.0.0.1', '10.0.1.2']))).toBe('ok');
      expect(await mapped()).toEqual([['10.0.0.1', '10.0.1.2']]);
    });

    it('undoes the whole transaction when its last command is refused', async () => {
      expect(await run(addTable, addMap, addChain('c'), addRule('c', { accept: null }))).toBe('ok');
      const before = normalise(await listing());
      const last = await run(
        addElements('m', ['10.0.0.1', '10.0.1.1']),
        flushChain('c'),
        addChain('d'),
        { add: { counter: { ...IN, name: 'k' } } },
        deleteElements('m', '10.0.0.9'),
      );
      expect(last).toBe('not-found at 4');
      expect(normalise(await listing())).toEqual(before);
    });

    it('names the first of several refused commands', async () => {
      expect(await run(addTable, addMap, addElements('m', ['10.0.0.1', '10.0.1.1']))).toBe('ok');
      const wrong = [addElements('m', ['10.0.0.1', '10.0.1.2']), deleteElements('m', '10.0.0.9'), deleteMap('nope')];
      expect(await run(addTable, ...wrong, flushMap('nope'))).toBe('exists at 1');
    });

    it('answers a check like a run and changes nothing', async () => {
      await nft.check(transaction(addTable, addMap));
      expect(await nft.listTable('ip', TABLE.name)).toBeUndefined();
      await expect(nft.check(transaction(addTable, deleteMap('m')))).rejects.toMatchObject({
        code: 'not-found',
        index: 1,
        command: 'delete map ip suite m',
      });
    });

    it('keeps comments on the key, and keeps the first one when the element is added again', async () => {
      const commented = (comment: string): Element => [{ elem: { val: '10.0.0.1', comment } }, '10.0.1.1'];
      expect(await run(addTable, addMap, addElements('m', commented('vm 5 nic 0')))).toBe('ok');
      expect(await run(addElements('m', commented('vm 6')))).toBe('ok');
      expect(await mapped()).toEqual([commented('vm 5 nic 0')]);
      expect(await run(deleteElements('m', '10.0.0.1'), addElements('m', commented('vm 6')))).toBe('ok');
      expect(await mapped()).toEqual([commented('vm 6')]);
    });

    it('holds concatenations', async () => {
      const key: ElementKey = { concat: ['10.0.0.1', '02:00:00:00:00:01'] };
      const other: ElementKey = { elem: { val: { concat: ['10.0.0.2', '02:00:00:00:00:02'] }, comment: 'second' } };
      expect(await run(addTable, addPairs, addElements('s', key, other))).toBe('ok');
      expect((await listing()).sets[0]?.elem).toHaveLength(2);
      expect(await run(addElements('s', '10.0.0.1'))).toBe('refused at 0');
      expect(await run(deleteElements('s', { concat: ['10.0.0.2', '02:00:00:00:00:02'] }))).toBe('ok');
      expect((await listing()).sets[0]?.elem).toEqual([key]);
    });

    it('tells interface names apart by case, and hardware addresses not', async () => {
      const links: Command = { add: { set: { ...IN, name: 'x', type: 'ifname' } } };
      expect(await run(addTable, addPairs, links, addElements('x', 'ib0'), createElements('x', 'IB0'))).toBe('ok');
      expect(await run(addElements('s', { concat: ['10.0.0.1', '02:00:00:00:00:0a'] }))).toBe('ok');
      expect(await run(createElements('s', { concat: ['10.0.0.1', '02:00:00:00:00:0A'] }))).toBe('exists at 0');
    });

    it('counts by element where the map says so', async () => {
      const map = { ...IN, name: 'm', type: 'ipv4_addr', map: 'ipv4_addr', stmt: [{ counter: null }] } as const;
      const commented: ElementKey = { elem: { val: '10.0.0.1', comment: 'one' } };
      expect(await run(addTable, { add: { map } }, addElements('m', [commented, '10.0.1.1']))).toBe('ok');
      expect(await mapped()).toEqual([
        [{ elem: { val: '10.0.0.1', comment: 'one', counter: { packets: 0, bytes: 0 } } }, '10.0.1.1'],
      ]);
    });

    it('refuses a key without a value in a map, and a pair in a set', async () => {
      expect(await run(addTable, addMap, { add: { set: { ...IN, name: 'x', type: 'ipv4_addr' } } })).toBe('ok');
      expect(await run(addElements('m', '10.0.0.1'))).toBe('refused at 0');
      expect(await run(addElements('x', ['10.0.0.1', '10.0.0.2']))).toBe('refused at 0');
      expect(await run(addElements('x'))).toBe('refused at 0');
    });

    it('refuses to delete what a rule or a verdict leads to', async () => {
      const uses = addRule('c', { match: { op: '==', left: saddr, right: '@m' } }, { jump: { target: 'd' } });
      expect(await run(addTable, addMap, addVerdicts, addChain('c'), addChain('d'), addChain('e'), uses)).toBe('ok');
      expect(await run(addElements('v', ['10.0.0.1', { goto: { target: 'e' } }]))).toBe('ok');
      for (const kept of [deleteMap('m'), deleteChain('d'), deleteChain('e')])
        expect(await run(kept)).toBe('refused at 0');
      expect(await run(flushChain('c'), deleteMap('m'), deleteChain('d'), flushMap('v'), deleteChain('e'))).toBe('ok');
    });

    it('refuses a rule or verdict that leads nowhere or to a base chain', async () => {
      expect(await run(addTable, addVerdicts, addChain('c'), addBase)).toBe('ok');
      expect(await run(addRule('c', { jump: { target: 'nope' } }))).toBe('not-found at 0');
      expect(await run(addRule('c', { jump: { target: 'base' } }))).toBe('refused at 0');
      expect(await run(addRule('c', { match: { op: '==', left: saddr, right: '@nope' } }))).toBe('not-found at 0');
      expect(await run(addElements('v', ['10.0.0.1', { jump: { target: 'nope' } }]))).toBe('not-found at 0');
      expect(await run(addElements('v', ['10.0.0.1', { jump: { target: 'base' } }]))).toBe('refused at 0');
      expect(await run(addRule('c', { counter: 'nope' }))).toBe('not-found at 0');
    });

    it('calls another map of the same name exists', async () => {
      expect(await run(addTable, addMap)).toBe('ok');
      const same = { ...IN, name: 'm', type: 'ipv4_addr', map: 'ipv4_addr' } as const;
      expect(await run({ add: { map: { ...same, map: 'ether_addr' } } })).toBe('exists at 0');
      expect(await run({ add: { map: { ...same, stmt: [{ counter: null }] } } })).toBe('exists at 0');
      expect(await run({ add: { set: { ...IN, name: 'm', type: 'ipv4_addr' } } })).toBe('exists at 0');
      expect(await run({ flush: { set: { ...IN, name: 'm' } } })).toBe('not-found at 0');
    });

    it('changes of a base chain only its policy', async () => {
      const base = { ...IN, name: 'base', type: 'filter', hook: 'input', prio: 10 } as const;
      expect(await run(addTable, addBase, addChain('c'))).toBe('ok');
      expect(await run({ add: { chain: { ...base, policy: 'drop' } } })).toBe('ok');
      expect(await run(addChain('base'))).toBe('ok');
      expect((await listing()).chains.find((chain) => chain.name === 'base')?.policy).toBe('drop');
      expect(await run({ add: { chain: { ...base, prio: 11 } } })).toBe('refused at 0');
      expect(await run({ add: { chain: { ...base, name: 'c' } } })).toBe('exists at 0');
      expect(await run({ add: { chain: { ...base, name: 'c', policy: 'drop' } } })).toBe('refused at 0');
    });

    it('orders rules by add, insert and the handle of a rule to stand before', async () => {
      const marked = (comment: string, handle?: number) => ({
        rule: { ...IN, chain: 'c', comment, expr: [{ accept: null }], ...(handle === undefined ? {} : { handle }) },
      });
      const handleOf = async (comment: string) =>
        (await listing()).rules.find((rule) => rule.comment === comment)?.handle ?? -1;
      const order = async () => (await listing()).rules.map((rule) => rule.comment);
      expect(await run(addTable, addChain('c'), { add: marked('1') }, { add: marked('2') })).toBe('ok');
      expect(await run({ insert: marked('0') })).toBe('ok');
      expect(await run({ insert: marked('0.5', await handleOf('1')) })).toBe('ok');
      expect(await order()).toEqual(['0', '0.5', '1', '2']);
      const handle = await handleOf('1');
      expect(await run({ replace: { rule: { ...marked('one').rule, handle } } })).toBe('ok');
      expect(await run({ delete: { rule: { ...IN, chain: 'c', handle: await handleOf('0') } } })).toBe('ok');
      expect(await order()).toEqual(['0.5', 'one', '2']);
      expect(await run({ delete: { rule: { ...IN, chain: 'c', handle: 9999 } } })).toBe('not-found at 0');
      expect(await run({ replace: { rule: { ...marked('x').rule, handle: 9999 } } })).toBe('not-found at 0');
    });

    it('keeps named counters while a rule counts with them', async () => {
      const k = { ...IN, name: 'k' };
      expect(await run(addTable, addChain('c'), { add: { counter: k } }, addRule('c', { counter: 'k' }))).toBe('ok');
      expect(await run({ add: { counter: k } })).toBe('ok');
      expect(await run({ create: { counter: k } })).toBe('exists at 0');
      expect(await run({ delete: { counter: k } })).toBe('refused at 0');
      expect(await run({ flush: { table: TABLE } }, { delete: { counter: k } })).toBe('ok');
    });

    it('empties a table of its rules only, and deletes it with all it holds', async () => {
      const pair = addElements('m', ['10.0.0.1', '10.0.1.1']);
      expect(await run(addTable, addMap, pair, addChain('c'), addRule('c', { drop: null }))).toBe('ok');
      expect(await run({ flush: { table: TABLE } })).toBe('ok');
      expect((await listing()).rules).toEqual([]);
      expect(await mapped()).toHaveLength(1);
      expect(await run({ delete: { table: TABLE } })).toBe('ok');
      expect(await nft.listTable('ip', TABLE.name)).toBeUndefined();
    });

    it('lists a whole table as it was written', async () => {
      const rule = addRule(
        'base',
        { match: { op: 'in', left: { ct: { key: 'state' } }, right: ['established', 'related'] } },
        { counter: null },
        { accept: null },
      );
      const verdict = addElements('v', ['10.0.0.1', { jump: { target: 'c' } }], ['10.0.0.2', { drop: null }]);
      const built = append(transaction(addTable, addMap, addPairs, addVerdicts, addChain('c'), addBase), rule, verdict);
      await nft.run(append(built, addElements('m', ['10.0.0.2', '10.0.1.2'], ['10.0.0.1', '10.0.1.1'])));
      expect(normalise(await listing())).toEqual({
        table: { family: 'ip', name: 'suite', flags: [] },
        chains: [
          { ...IN, name: 'base', type: 'filter', hook: 'input', prio: 10, policy: 'accept' },
          { ...IN, name: 'c' },
        ],
        sets: [{ ...IN, name: 's', type: ['ipv4_addr', 'ether_addr'], elem: [] }],
        maps: [
          {
            ...IN,
            name: 'm',
            type: 'ipv4_addr',
            map: 'ipv4_addr',
            elem: [
              ['10.0.0.1', '10.0.1.1'],
              ['10.0.0.2', '10.0.1.2'],
            ],
          },
          {
            ...IN,
            name: 'v',
            type: 'ipv4_addr',
            map: 'verdict',
            elem: [
              ['10.0.0.1', { jump: { target: 'c' } }],
              ['10.0.0.2', { drop: null }],
            ],
          },
        ],
        counters: [],
        rules: [
          {
            ...IN,
            chain: 'base',
            expr: [
              { match: { op: 'in', left: { ct: { key: 'state' } }, right: ['established', 'related'] } },
              { counter: { packets: 0, bytes: 0 } },
              { accept: null },
            ],
          },
        ],
        others: [],
      });
    });

    it('says which command was refused, in nft syntax', async () => {
      expect(await run(addTable, addMap)).toBe('ok');
      const refused = nft.run(transaction(addTable, deleteElements('m', '10.0.0.7')));
      await expect(refused).rejects.toMatchObject({
        name: 'NftError',
        code: 'not-found',
        index: 1,
        command: 'delete element ip suite m { 10.0.0.7 }',
        message: 'Cannot run command 2 of 2, "delete element ip suite m { 10.0.0.7 }": No such file or directory',
      });
    });
  });
}
