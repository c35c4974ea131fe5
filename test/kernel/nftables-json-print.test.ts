import { describe, expect, it } from 'vitest';
import { exec } from '../../lib/host/exec.ts';
import { type Command, createNft, print, transaction } from '../../lib/nftables-json/index.ts';
import { requireOwnNetns } from '../support/netns.ts';
import { normalise } from '../support/nft-conformance.ts';
import { CORPUS, CORPUS_TABLE } from '../support/nft-corpus.ts';

requireOwnNetns();

const nft = createNft({ exec });
const clear: readonly Command[] = [{ add: { table: CORPUS_TABLE } }, { delete: { table: CORPUS_TABLE } }];

async function byText(text: string): Promise<void> {
  const { status, stderr } = await exec(['/usr/sbin/nft', '-f', '-'], { input: text });
  expect(stderr).toBe('');
  expect(status).toBe(0);
}

async function rawListing(): Promise<unknown> {
  const { stdout } = await exec(['/usr/sbin/nft', '-j', 'list', 'table', 'ip', CORPUS_TABLE.name]);
  return JSON.parse(stdout, (key, value) => (key === 'handle' || key === 'expires' ? undefined : value));
}

describe('a printed transaction', () => {
  it('makes the same table as its JSON, for every type of the library', async () => {
    const all = transaction(...CORPUS.map(([command]) => command));
    await nft.run(transaction(...clear));
    await nft.run(all);
    const json = await rawListing();
    await nft.run(transaction(...clear));
    await byText(print(all));
    expect(await rawListing()).toEqual(json);
  });

  it('does the same as its JSON when it removes and replaces', async () => {
    const IN = { family: 'ip', table: CORPUS_TABLE.name } as const;
    const all = transaction(...CORPUS.map(([command]) => command));
    const results: unknown[] = [];
    for (const send of [nft.run, (what: Parameters<typeof nft.run>[0]) => byText(print(what))]) {
      await nft.run(transaction(...clear));
      await nft.run(all);
      const rules = (await nft.listTable('ip', CORPUS_TABLE.name))?.rules ?? [];
      const [first, second, third] = rules.filter((rule) => rule.chain === 'post').map((rule) => rule.handle);
      if (first === undefined || second === undefined || third === undefined) throw new Error('the rules are absent');
      await send(
        transaction(
          { insert: { rule: { ...IN, chain: 'post', expr: [{ accept: null }], comment: 'head' } } },
          { insert: { rule: { ...IN, chain: 'post', expr: [{ accept: null }], comment: 'before', handle: second } } },
          { replace: { rule: { ...IN, chain: 'post', expr: [{ return: null }], handle: third } } },
          { delete: { rule: { ...IN, chain: 'post', handle: first } } },
          { flush: { chain: { ...IN, name: 'fwd_c' } } },
          { flush: { map: { ...IN, name: 'paths' } } },
          { flush: { set: { ...IN, name: 'nets' } } },
          { delete: { element: { ...IN, name: 'pairs', elem: ['10.0.0.1'] } } },
          { delete: { map: { ...IN, name: 'counted' } } },
          { delete: { set: { ...IN, name: 'young' } } },
          { delete: { counter: { ...IN, name: 'total' } } },
          { delete: { chain: { ...IN, name: 'leaf' } } },
        ),
      );
      results.push(normalise(await nft.listTable('ip', CORPUS_TABLE.name)));
    }
    expect(results[0]).toEqual(results[1]);
  });

  it('is listed without a single opaque statement', async () => {
    await nft.run(transaction(...clear));
    await nft.run(transaction(...CORPUS.map(([command]) => command)));
    const listing = await nft.listTable('ip', CORPUS_TABLE.name);
    expect(listing?.others).toEqual([]);
    const statements = listing?.rules.flatMap((rule) => rule.expr) ?? [];
    expect(statements.length).toBeGreaterThan(50);
    expect(statements.filter((statement) => 'opaque' in statement)).toEqual([]);
  });

  it('comes back from its listing: what is listed can be printed, loaded, and lists the same', async () => {
    await nft.run(transaction(...clear));
    await nft.run(transaction(...CORPUS.map(([command]) => command)));
    const before = await nft.listTable('ip', CORPUS_TABLE.name);
    if (before === undefined) throw new Error('the table is absent');
    const again: Command[] = [{ add: { table: CORPUS_TABLE } }];
    for (const chain of before.chains) again.push({ add: { chain } });
    for (const counter of before.counters) again.push({ add: { counter } });
    // An element that is about to expire does not list the same a moment later.
    for (const set of before.sets.filter((item) => item.name !== 'young')) again.push({ add: { set } });
    for (const map of before.maps) again.push({ add: { map } });
    for (const { expr, ...rule } of before.rules) {
      const statements = expr.flatMap((statement) => ('opaque' in statement ? [] : [statement]));
      again.push({ add: { rule: { ...rule, expr: statements } } });
    }
    await nft.run(transaction(...clear));
    await byText(print(transaction(...again)));
    const after = await nft.listTable('ip', CORPUS_TABLE.name);
    expect(normalise(after)).toEqual(normalise({ ...before, sets: before.sets.filter((set) => set.name !== 'young') }));
  });
});
