/** Whose a pair is, what is accepted, and the first configuration that is proposed. */
import { describe, expect, test } from 'vitest';
import type { Ipv4, Mac } from '../../lib/core/address.ts';
import { parseConfig } from '../../lib/core/config.ts';
import type { Comparison } from '../../lib/import/compare.ts';
import type { GuestNic, ImportFacts } from '../../lib/import/report.ts';
import { analyse, parseAcceptance, unaccepted } from '../../lib/import/report.ts';
import { parseSaved } from '../../lib/iptables/save.ts';
import { analyseFiles, suggestFromFiles } from '../../lib/ops/import.ts';
import { CONFIG, mapping } from '../support/fake-host.ts';

const pair = (n: number, address = 200 + n): string =>
  `-A PREROUTING -d 192.168.10.${address}/32 -j DNAT --to-destination 192.168.122.${n}\n` +
  `-A POSTROUTING -s 192.168.122.${n}/32 -o ib0 -j SNAT --to-source 192.168.10.${address}\n`;

function facts(rules: string, of: Partial<ImportFacts> = {}): ImportFacts {
  return {
    config: CONFIG,
    sources: [{ variant: 'legacy', name: 'iptables-legacy', tables: parseSaved(`*nat\n${rules}COMMIT\n`).tables }],
    skipped: [],
    addresses: undefined,
    nics: [],
    neighbours: new Map(),
    held: [],
    loaded: false,
    ...of,
  };
}

const nic = (vm: number | null, n: number, mac: string): GuestNic => {
  return { vm, domain: vm === null ? 'other' : `one-${vm}`, nic: n, mac: mac as Mac };
};
const heard = (guest: string, ...macs: readonly string[]) => new Map([[guest as Ipv4, new Set(macs as Mac[])]]);

describe('whose a pair is', () => {
  const made = '02:00:c0:a8:7a:02';
  const given = '52:54:00:00:00:01';
  test.each([
    [
      'the one whose hardware address OpenNebula made of it',
      [nic(7, 1, made)],
      new Map(),
      { vm: 7, nic: 1, mac: made },
    ],
    ['the one that answers for it', [nic(8, 0, given)], heard('192.168.122.2', given), { vm: 8, nic: 0, mac: given }],
    [
      'the one that answers, not the one that is called so',
      [nic(7, 0, made), nic(8, 0, given)],
      heard('192.168.122.2', given),
      { vm: 8, nic: 0, mac: given },
    ],
    [
      'nobody where two are called so',
      [nic(7, 0, made), nic(9, 0, `06${made.slice(2)}`)],
      new Map(),
      { vm: null, mac: null },
    ],
    ['nobody where nothing is known', [], new Map(), { vm: null, mac: null }],
    ['no VM where the domain is none of OpenNebula', [nic(null, 0, made)], new Map(), { vm: null, mac: made }],
  ])('%s', (_, nics, neighbours, expected) => {
    const { pairs } = analyse(facts(pair(2), { nics, neighbours })).report;
    expect(pairs[0]?.mapping).toMatchObject(expected);
    expect(pairs[0]?.owner).toEqual(
      expected.vm === null ? { kind: 'manual', guest: '192.168.122.2' } : { kind: 'vm', vm: expected.vm },
    );
  });

  test('an address out of its place is named, and said', () => {
    const { pairs } = analyse(facts(pair(2, 206), { nics: [nic(7, 0, made)] })).report;
    expect(pairs[0]?.mapping).toMatchObject({ address: '192.168.10.206', named: true });
    expect(pairs[0]?.notes.join()).toContain('set IB_IP=192.168.10.206 on the NIC of VM 7');
    expect(analyse(facts(pair(2))).report.pairs[0]?.mapping).toMatchObject({ named: false });
  });

  test('what kvm-ib has already keeps its owner; what it has otherwise is a conflict', () => {
    const held = [{ owner: { kind: 'vm', vm: 2 } as const, mapping: mapping(2) }];
    const { report, removed } = analyse(facts(pair(2) + pair(3, 202), { held }));
    expect(report.conflicts.map(({ guest, why }) => [guest, why])).toEqual([
      ['192.168.122.2', '192.168.10.202 belongs to guest 192.168.122.3 as well'],
      ['192.168.122.3', '192.168.10.202 belongs to guest 192.168.122.2 as well'],
    ]);
    expect(removed).toEqual([]);
    const same = analyse(facts(pair(2), { held }));
    expect(same.report.pairs).toMatchObject([{ mapped: true, owner: { kind: 'vm', vm: 2 } }]);
    expect(same.removed).toHaveLength(2);
    const other = analyse(facts(pair(4, 202), { held })).report;
    expect(other.conflicts[0]?.why).toBe('kvm-ib has 192.168.122.2 <-> 192.168.10.202 of vm-2 already');
  });
});

describe('what is accepted', () => {
  const differing = (kind: Comparison['case'], n: number): Comparison => {
    const [guest, address] = [`192.168.122.${n}`, `192.168.10.20${n}` as Ipv4];
    return { case: kind, network: 'ib', guest, address, old: 'a', new: 'b', same: false };
  };
  const all = [differing('host/to-guest', 2), differing('host/from-guest', 2), differing('loopback/own', 3)];
  test.each([
    ['nothing', [], [0, 1, 2]],
    ['a class', ['host'], [2]],
    ['a case', ['host/to-guest'], [1, 2]],
    ['one address', ['host@192.168.10.202', 'loopback@192.168.122.3'], []],
    ['another address', ['host@192.168.10.203'], [0, 1, 2]],
  ])('%s', (_, given, left) => {
    const accepted = given.flatMap((text) => parseAcceptance(text) ?? []);
    expect(accepted).toHaveLength(given.length);
    expect(unaccepted(all, accepted)).toEqual(left.map((index) => all[index]));
    expect(
      unaccepted(
        all.map((one) => ({ ...one, same: true })),
        [],
      ),
    ).toEqual([]);
  });

  test.each(['', 'ho', 'host/', 'host/other', 'inbound/fabric@', 'host@a@b', 'all'])('%j names nothing', (text) => {
    if (text === 'inbound/fabric@')
      expect(
        unaccepted(
          all,
          [parseAcceptance(text)].flatMap((a) => a ?? []),
        ),
      ).toEqual(all);
    else expect(parseAcceptance(text)).toBeUndefined();
  });
});

test('what `ip -4 address` prints says which addresses there are', () => {
  const listing = `2: ib0@if3: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 2044 qdisc noqueue state UP
    inet 192.168.10.1/24 brd 192.168.10.255 scope global ib0
       valid_lft forever preferred_lft forever
    inet 192.168.10.202/24 scope global secondary ib0:2
       valid_lft forever preferred_lft forever
`;
  const files = [
    { name: 'rules', text: `*nat\n${pair(2)}${pair(3)}COMMIT\n` },
    { name: 'addresses', text: listing },
  ];
  const { report } = analyseFiles(CONFIG, files);
  expect(report.aliases).toMatchObject([{ address: '192.168.10.202', label: 'ib0:2', guest: '192.168.122.2' }]);
  expect(report.pairs.map(({ aliases }) => aliases.length)).toEqual([1, 0]);
});

describe('a first configuration', () => {
  test('holds every pair, a network for each subnet of guests', () => {
    const second = (pair(5) + pair(9))
      .replaceAll('192.168.122', '192.168.123')
      .replaceAll('192.168.10', '192.168.20')
      .replaceAll('ib0', 'ib1');
    const text = `*nat\n${pair(2)}${pair(4, 206)}${second}COMMIT\n`;
    const suggestion = suggestFromFiles([{ name: 'a', text }]) ?? '';
    const networks = suggestion
      .split('  - ')
      .slice(1)
      .map(
        (part) =>
          Object.fromEntries(
            part
              .trim()
              .split(/\n\s*/)
              .map((line) => line.split(': ')),
          ) as Record<string, string>,
      );
    expect(networks).toEqual([
      {
        name: 'ib',
        device: 'ib0',
        bridge: 'virbr1',
        guests: '192.168.122.2-192.168.122.6',
        addresses: '192.168.10.202-192.168.10.206',
      },
      {
        name: 'ib2',
        device: 'ib1',
        bridge: 'virbr2',
        guests: '192.168.123.5-192.168.123.9',
        addresses: '192.168.20.205-192.168.20.209',
      },
    ]);
    const config = parseConfig({ networks }, () => 0, 'suggestion');
    expect(analyse({ ...facts(''), config, sources: facts(text.slice(5, -7)).sources }).report.pairs).toHaveLength(4);
    expect(suggestFromFiles([{ name: 'a', text: '*nat\nCOMMIT\n' }])).toBeUndefined();
  });
});
