/** Which networks the table serves while a changed configuration and older mappings stand side by side. */
import { describe, expect, it } from 'vitest';
import { printRange } from '../../lib/core/address.ts';
import type { Config, Mapping, Network, ServedNetwork } from '../../lib/core/mapping.ts';
import { parseTableRecord, printTableRecord, servedNetworks, serves } from '../../lib/core/served.ts';
import { rulesetTag } from '../../lib/nat/ruleset.ts';
import { mapping, network } from '../support/fake-host.ts';

const shown = (networks: readonly ServedNetwork[]) =>
  networks.map((n) => `${n.name} ${n.device} ${n.bridge} ${n.isolate} ${n.guests.map(printRange).join(',')}`);
const OLD = network();
const old: Config = { networks: [OLD], static: [] };
const m = (n: number): Mapping => mapping(n, { config: old });

describe('servedNetworks', () => {
  it('is the configuration, where all mappings are of it', () => {
    expect(shown(servedNetworks([OLD], [m(2), m(3)]))).toEqual(['ib ib0 virbr1 true 192.168.122.2-192.168.122.9']);
  });

  it('has guests that fell out of the range besides, neighbours as one range', () => {
    const shrunk = network({ guests: '192.168.122.7-192.168.122.9', addresses: '192.168.10.207-192.168.10.209' });
    expect(shown(servedNetworks([shrunk], [m(4), m(2), m(3)]))).toEqual([
      'ib ib0 virbr1 true 192.168.122.2-192.168.122.4,192.168.122.7-192.168.122.9',
    ]);
  });

  it('has a removed network as long as it has a mapping, isolated as it was', () => {
    expect(servedNetworks([], [])).toEqual([]);
    expect(shown(servedNetworks([], [m(3)]))).toEqual(['ib ib0 virbr1 true 192.168.122.3']);
    const loaded = servedNetworks([{ ...OLD, isolate: false }], [m(3)]);
    expect(shown(servedNetworks([], [m(3)], loaded))).toEqual(['ib ib0 virbr1 false 192.168.122.3']);
  });

  it('gives a guest address to the links of its mapping, and takes it from all other networks', () => {
    const moved = network({ device: 'ib1' });
    expect(shown(servedNetworks([moved], [m(3)]))).toEqual([
      'ib ib1 virbr1 true 192.168.122.2,192.168.122.4-192.168.122.9',
      'ib.ib0.virbr1 ib0 virbr1 true 192.168.122.3',
    ]);
  });

  it('gives it to both while a mapping goes from one to the other', () => {
    const moved = network({ device: 'ib1' });
    const next = mapping(3, { config: { networks: [moved], static: [] } });
    const served = servedNetworks([moved], [m(3), next]);
    expect(served.map(({ guests }) => guests.map(printRange))).toEqual([
      ['192.168.122.2-192.168.122.9'],
      ['192.168.122.3'],
    ]);
    expect([m(3), next].map((one) => serves(served, one))).toEqual([true, true]);
    expect(serves(served, m(4))).toBe(false);
  });

  it('isolates networks that share a link together', () => {
    const open: Network = { ...network({ device: 'ib1' }), isolate: false };
    const other: Network = { ...network({ name: 'b', device: 'ib0', bridge: 'virbr2', guests: '10.9.0.0/24' }) };
    expect(servedNetworks([open], [m(3)]).map(({ isolate }) => isolate)).toEqual([true, true]);
    const loaded = servedNetworks([{ ...OLD, isolate: false }], []);
    expect(servedNetworks([open], [m(3)], loaded).map(({ isolate }) => isolate)).toEqual([false, false]);
    expect(servedNetworks([open, other], [m(3)], loaded).map(({ isolate }) => isolate)).toEqual([true, true, true]);
  });

  it('keeps all that was loaded while not every mapping is known', () => {
    const loaded = servedNetworks([OLD], []);
    expect(shown(servedNetworks([], [], loaded, true))).toEqual(shown(loaded));
  });

  it('makes one rule set of the same mappings, in whatever order they come', () => {
    const moved = network({ device: 'ib1', guests: '192.168.122.5-192.168.122.9', addresses: '10.8.0.5-10.8.0.9' });
    const tag = (mappings: readonly Mapping[]) =>
      rulesetTag({ networks: servedNetworks([moved], mappings), hostAddresses: new Map() });
    expect(tag([m(2), m(6), m(3)])).toBe(tag([m(6), m(3), m(2)]));
  });

  it('takes a name from a file only if it is one', () => {
    const [one, two] = servedNetworks(
      [],
      [
        { ...m(2), network: 'x { }\n' },
        { ...m(3), network: 'old', device: 'ib7' as Mapping['device'] },
      ],
    );
    expect([one?.name, two?.name]).toEqual(['old', 'old.ib0.virbr1']);
  });
});

describe('the record of the table', () => {
  it('is read as it was written', () => {
    const record = {
      networks: servedNetworks([network({ device: 'ib1' })], [m(3)]),
      hostAddresses: new Map([['ib', [m(2).address]]]),
      configured: 'x',
    };
    expect(parseTableRecord(printTableRecord(record))).toEqual(record);
  });

  it.each(['{}', '{"hostAddresses":{}}', '{"networks":[{"name":"a b"}],"hostAddresses":{},"configured":""}'])(
    'is none in %s',
    (text) => {
      expect(parseTableRecord(text)).toBeUndefined();
    },
  );
});
