import fc from 'fast-check';
import { beforeAll, describe, expect, it } from 'vitest';
import { exec } from '../../lib/host/exec.ts';
import {
  type Command,
  createFakeNft,
  createNft,
  type Nft,
  NftError,
  type Statement,
  transaction,
} from '../../lib/nftables-json/index.ts';
import { requireOwnNetns } from '../support/netns.ts';
import {
  addBase,
  addChain,
  addElements,
  addMap,
  addRule,
  addTable,
  addVerdicts,
  createElements,
  deleteChain,
  deleteElements,
  deleteMap,
  flushChain,
  flushMap,
  nftConformance,
  normalise,
  outcome,
  TABLE,
} from '../support/nft-conformance.ts';

requireOwnNetns();

async function freshNft(): Promise<Nft> {
  const nft = createNft({ exec });
  // `destroy` is younger than the nft under test: add makes sure that there is something to delete.
  await nft.run(transaction(addTable, { delete: { table: TABLE } }));
  return nft;
}

nftConformance('nft and the kernel', freshNft);

const IN = { family: 'ip', table: TABLE.name } as const;
const saddr = { payload: { protocol: 'ip', field: 'saddr' } } as const;

/** Commands over few names, so that they meet. Jumps lead to `leaf` or `base` only: the fake takes loops. */
const command = fc.oneof(
  fc.constantFrom<Command>(
    addTable,
    { create: { table: TABLE } },
    { delete: { table: TABLE } },
    { flush: { table: TABLE } },
    addMap,
    { create: { map: { ...IN, name: 'm', type: 'ipv4_addr', map: 'ipv4_addr' } } },
    { add: { map: { ...IN, name: 'm', type: 'ipv4_addr', map: 'ipv4_addr', flags: ['timeout'] } } },
    { add: { set: { ...IN, name: 'm', type: 'ipv4_addr' } } },
    { add: { set: { ...IN, name: 's', type: 'ipv4_addr' } } },
    { delete: { set: { ...IN, name: 's' } } },
    { flush: { set: { ...IN, name: 's' } } },
    deleteMap('m'),
    flushMap('m'),
    addVerdicts,
    deleteMap('v'),
    flushMap('v'),
    addBase,
    { add: { chain: { ...IN, name: 'base', type: 'filter', hook: 'input', prio: 10, policy: 'drop' } } },
    { add: { chain: { ...IN, name: 'base', type: 'filter', hook: 'input', prio: 20 } } },
    { create: { chain: { ...IN, name: 'c' } } },
    { add: { counter: { ...IN, name: 'k' } } },
    { create: { counter: { ...IN, name: 'k' } } },
    { delete: { counter: { ...IN, name: 'k' } } },
  ),
  fc
    .constantFrom('base', 'c', 'leaf')
    .chain((name) => fc.constantFrom(addChain(name), deleteChain(name), flushChain(name))),
  fc
    .record({
      chain: fc.constantFrom('base', 'c'),
      verb: fc.constantFrom('add' as const, 'insert' as const),
      expr: fc.constantFrom<readonly Statement[]>(
        [{ accept: null }],
        [{ counter: null }, { drop: null }],
        [{ counter: 'k' }],
        [{ jump: { target: 'leaf' } }],
        [{ goto: { target: 'base' } }],
        [{ match: { op: '==', left: saddr, right: '@s' } }, { accept: null }],
        [{ match: { op: '!=', left: saddr, right: '@m' } }, { return: null }],
        [{ vmap: { key: saddr, data: '@v' } }],
      ),
    })
    .map(
      ({ chain, verb, expr }): Command =>
        verb === 'add' ? addRule(chain, ...expr) : { insert: { rule: { ...IN, chain, expr } } },
    ),
  fc
    .record({
      name: fc.constantFrom('m', 'm', 's', 'v'),
      verb: fc.constantFrom('add', 'add', 'create', 'delete'),
      keys: fc.array(fc.constantFrom('10.0.0.1', '10.0.0.2', '10.0.0.3'), { minLength: 1, maxLength: 2 }),
      value: fc.constantFrom('10.1.0.1', '10.1.0.2'),
      verdict: fc.constantFrom({ drop: null }, { jump: { target: 'leaf' } }, { jump: { target: 'base' } }),
      comment: fc.option(fc.constantFrom('one', 'two')),
    })
    .map(({ name, verb, keys, value, verdict, comment }): Command => {
      if (verb === 'delete') return deleteElements(name, ...keys);
      const items = keys.map((key) => {
        const commented = comment === null ? key : { elem: { val: key, comment } };
        if (name === 's') return commented;
        return [commented, name === 'v' ? verdict : value] as const;
      });
      return verb === 'add' ? addElements(name, ...items) : createElements(name, ...items);
    }),
);

describe('the fake and nft', () => {
  beforeAll(freshNft);

  it('give the same outcomes and the same listings for any sequence of transactions', async () => {
    const start = [addTable, addMap, addVerdicts, addBase, addChain('c'), addChain('leaf')];
    const sequence = fc.array(fc.array(command, { minLength: 1, maxLength: 4 }), { minLength: 1, maxLength: 8 });
    const seen = new Map<string, number>();
    await fc.assert(
      fc.asyncProperty(sequence, async (transactions) => {
        const [real, fake] = [await freshNft(), createFakeNft()];
        for (const commands of [start, ...transactions]) {
          const expected = await outcome(real, ...commands);
          seen.set(expected, (seen.get(expected) ?? 0) + 1);
          expect(await outcome(fake, ...commands)).toBe(expected);
          const listings = await Promise.all([real, fake].map((nft) => nft.listTable(TABLE.family, TABLE.name)));
          expect(normalise(listings[1])).toEqual(normalise(listings[0]));
        }
      }),
      { numRuns: 40, interruptAfterTimeLimit: 20_000 },
    );
    // The property says nothing if all of it was refused, or nothing was.
    for (const kind of ['ok', 'exists at 0', 'not-found at 0', 'refused at 0'])
      expect(seen.get(kind)).toBeGreaterThan(0);
  }, 60_000);
});

describe('nft', () => {
  it('is given an unlinked file as standard input and reads all of a large transaction', async () => {
    const nft = await freshNft();
    const pairs = Array.from({ length: 20_000 }, (_, n) => [`10.0.${n >> 8}.${n & 255}`, '10.1.0.1'] as const);
    await nft.run(transaction(addTable, addMap, addElements('m', ...pairs)));
    expect((await nft.listTable('ip', TABLE.name))?.maps[0]?.elem).toHaveLength(20_000);
  });

  it('finds the one wrong command of several hundred', async () => {
    const nft = await freshNft();
    const many = Array.from({ length: 400 }, (_, n) => addElements('m', [`10.0.${n >> 8}.${n & 255}`, '10.1.0.1']));
    const wrong = [...many.slice(0, 357), deleteElements('m', '10.9.9.9'), ...many.slice(357)];
    expect(await outcome(nft, addTable, addMap, ...wrong)).toBe('not-found at 359');
  });

  it('says not-permitted without CAP_NET_ADMIN', async () => {
    const unprivileged = createNft({
      exec: (argv, options) => exec(['/usr/bin/setpriv', '--reuid=65534', '--clear-groups', ...argv], options),
    });
    await expect(unprivileged.run(transaction(addTable))).rejects.toMatchObject({ code: 'not-permitted' });
    await expect(unprivileged.listTable('ip', TABLE.name)).rejects.toBeInstanceOf(NftError);
  });

  it('says too-old, or knows the command destroy', async () => {
    const nft = await freshNft();
    const version = (await exec(['/usr/sbin/nft', '--version'])).stdout;
    const [, major = 0, minor = 0, patch = 0] = (/v(\d+)\.(\d+)\.(\d+)/.exec(version) ?? []).map(Number);
    const knows = major * 10_000 + minor * 100 + patch >= 10_007;
    const result = await outcome(nft, addTable, { destroy: { chain: { ...IN, name: 'nope' } } });
    expect(result).toBe(knows ? 'ok' : 'too-old at 1');
  });
});
