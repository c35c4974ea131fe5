import { describe, expect, it } from 'vitest';
import { createFakeNft, transaction } from '../../lib/nftables-json/index.ts';
import { addElements, addMap, addTable, nftConformance, TABLE } from '../support/nft-conformance.ts';

nftConformance('the fake nft', async () => createFakeNft());

describe('the fake nft alone', () => {
  it('destroys what is there and passes over what is not', async () => {
    const nft = createFakeNft();
    const IN = { family: 'ip', table: TABLE.name } as const;
    await nft.run(transaction(addTable, addMap, addElements('m', ['10.0.0.1', '10.0.1.1'], ['10.0.0.2', '10.0.1.2'])));
    await nft.run(
      transaction(
        { destroy: { element: { ...IN, name: 'm', elem: ['10.0.0.9', '10.0.0.1'] } } },
        { destroy: { chain: { ...IN, name: 'nope' } } },
      ),
    );
    expect((await nft.listTable('ip', TABLE.name))?.maps[0]?.elem).toEqual([['10.0.0.2', '10.0.1.2']]);
    await nft.run(transaction({ destroy: { table: TABLE } }, { destroy: { table: TABLE } }));
    expect(await nft.listTable('ip', TABLE.name)).toBeUndefined();
  });

  it('gives listings that later transactions do not change', async () => {
    const nft = createFakeNft();
    await nft.run(transaction(addTable, addMap));
    const before = await nft.listTable('ip', TABLE.name);
    await nft.run(transaction(addElements('m', ['10.0.0.1', '10.0.1.1'])));
    expect(before?.maps[0]?.elem).toEqual([]);
  });

  it('holds one kernel each', async () => {
    await createFakeNft().run(transaction(addTable));
    expect(await createFakeNft().listTable('ip', TABLE.name)).toBeUndefined();
  });
});
