/** The table as the kernel holds it: rulesets/kvm-ib.nft, what the code loads, and the engine that reads and changes it. */
import { readFileSync } from 'node:fs';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { type Ipv4, parseIpv4, parseLinkName, parseMac, type Range, tryParseRange } from '../../lib/core/address.ts';
import type { Network } from '../../lib/core/mapping.ts';
import { servedNetworks } from '../../lib/core/served.ts';
import { exec } from '../../lib/host/exec.ts';
import { createElementReader, type ElementReader } from '../../lib/host/nf-tables-read.ts';
import type { NatEngine, Pair, TableSpec } from '../../lib/nat/engine.ts';
import { createNftEngine, elementCommands, elementsOf } from '../../lib/nat/nft.ts';
import { differences, ruleset, rulesetTag, staleChains } from '../../lib/nat/ruleset.ts';
import { createNft } from '../../lib/nftables-json/run.ts';
import { print, transaction } from '../../lib/nftables-json/transaction.ts';
import type { Command } from '../../lib/nftables-json/types.ts';
import { createLab, type Lab } from '../support/lab.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const NFT = '/usr/sbin/nft';
const nft = createNft({ exec });

function range(text: string): Range {
  const parsed = tryParseRange(text);
  if (parsed === undefined) throw new Error(text);
  return parsed;
}

const EXAMPLE: Network = {
  name: 'ib',
  device: parseLinkName('ib0'),
  bridge: parseLinkName('virbr1'),
  guests: range('192.168.122.2-192.168.122.6'),
  addresses: range('192.168.10.202-192.168.10.206'),
  isolate: true,
};
const OTHER: Network = {
  name: 'tenant-b',
  device: parseLinkName('ib0.8001'),
  bridge: parseLinkName('virbr2'),
  guests: range('192.168.124.0/24'),
  addresses: range('192.168.20.0/24'),
  isolate: true,
};

function specOf(networks: readonly Network[], host: Readonly<Record<string, readonly string[]>> = {}): TableSpec {
  const addresses = Object.entries(host).map(([name, list]): [string, readonly Ipv4[]] => [
    name,
    list.map((address) => parseIpv4(address)),
  ]);
  return { networks: servedNetworks(networks, []), hostAddresses: new Map(addresses) };
}

const ONE = specOf([EXAMPLE], { ib: ['192.168.10.1'] });
const TWO = specOf([EXAMPLE, OTHER], { ib: ['192.168.10.1', '192.168.11.1'], 'tenant-b': ['192.168.20.1'] });
const SPECS: readonly (readonly [string, TableSpec])[] = [
  ['one network', ONE],
  ['one network whose host has no address', specOf([EXAMPLE])],
  ['one network without isolation', specOf([{ ...EXAMPLE, isolate: false }], { ib: ['192.168.10.1'] })],
  ['one network of one guest', specOf([{ ...EXAMPLE, guests: range('10.0.0.9'), addresses: range('10.1.0.9') }])],
  ['two networks', TWO],
  ['two networks, one isolated', specOf([EXAMPLE, { ...OTHER, isolate: false }], { ib: ['192.168.10.1'] })],
  ['no network', specOf([])],
];

async function load(spec: TableSpec): Promise<void> {
  await nft.run(transaction(...ruleset(spec)));
}

async function listing() {
  const listed = await nft.listTable('ip', 'kvm_ib');
  if (listed === undefined) throw new Error('no table');
  return listed;
}

async function nftText(text: string): Promise<void> {
  const result = await exec([NFT, '-f', '-'], { input: text });
  expect(result).toMatchObject({ status: 0, stderr: '' });
}

async function listText(): Promise<string> {
  return (await exec([NFT, 'list', 'table', 'ip', 'kvm_ib'])).stdout;
}

/** The listing with the members of anonymous sets, whose order is the kernel's, sorted. */
function sorted(text: string): string {
  return text.replace(/(iifname|oifname|vmap) \{ (.*?) \}/g, (_, key: string, members: string) => {
    return `${key} { ${members.split(', ').sort().join(', ')} }`;
  });
}

describe('the table', () => {
  afterEach(async () => {
    await exec([NFT, 'delete', 'table', 'ip', 'kvm_ib']);
  });

  test('rulesets/kvm-ib.nft lists as what the code loads for the same network, schema tag included', async () => {
    const path = new URL('../../rulesets/kvm-ib.nft', import.meta.url);
    const byHand = readFileSync(path, 'utf8');
    await nftText(byHand);
    expect(differences(await listing(), ONE)).toEqual([]);
    const handText = sorted(await listText());
    await exec([NFT, 'delete', 'table', 'ip', 'kvm_ib']);
    await load(ONE);
    // Chains are listed in the order of their making, so the texts compare only if that is the same, too.
    expect(handText).toBe(sorted(await listText()));
  });

  test('rulesets/kvm-ib.nft may be loaded again: no rule doubles, mappings stay', async () => {
    const byHand = readFileSync(new URL('../../rulesets/kvm-ib.nft', import.meta.url), 'utf8');
    await nftText(byHand);
    await nftText('add element ip kvm_ib guest_to_ib { 192.168.122.2 : 192.168.10.202 }');
    const before = await listText();
    await nftText(byHand);
    expect(sorted(await listText())).toBe(sorted(before));
    expect(before).toContain('192.168.122.2 : 192.168.10.202');
  });

  test.each(SPECS)('loads for %s, again without change, and lists without a difference', async (_, spec) => {
    await load(spec);
    expect(differences(await listing(), spec)).toEqual([]);
    await load(spec);
    expect(differences(await listing(), spec)).toEqual([]);
    const schema = (await listing()).maps.find(({ name }) => name === 'schema');
    expect(schema?.elem).toEqual([[1, Number.parseInt(rulesetTag(spec), 16)]]);
  });

  test.each(SPECS)('loads for %s as nft text too, with the same result', async (_, spec) => {
    await nftText(print(transaction(...ruleset(spec))));
    expect(differences(await listing(), spec)).toEqual([]);
  });

  test('has another tag for every other rule set, and the same for the same', () => {
    const tags = SPECS.map(([, spec]) => rulesetTag(spec));
    expect(new Set(tags).size).toBe(SPECS.length);
    for (const tag of tags) expect(tag).toMatch(/^[0-9a-f]{8}$/);
    expect(rulesetTag({ ...ONE, hostAddresses: new Map(ONE.hostAddresses) })).toBe(rulesetTag(ONE));
  });

  test('no rule compares with a map: kernels such as Linux 6.1 refuse that', () => {
    const maps = ruleset(TWO).flatMap((command) =>
      'add' in command && 'map' in command.add ? command.add.map.name : [],
    );
    expect(maps).toContain('ib_to_guest');
    const compared = [...JSON.stringify(ruleset(TWO)).matchAll(/"right":"@([a-z_]+)"/g)].map(([, name]) => name);
    expect(compared).toContain('mapped_addresses');
    expect(compared.filter((name) => maps.includes(name ?? ''))).toEqual([]);
  });

  test('every rule has a comment that is unique in its chain and short enough for the kernel', () => {
    const long = { ...OTHER, name: 'n'.repeat(32) };
    for (const command of ruleset(specOf([EXAMPLE, long], { ib: ['192.168.10.1'], [long.name]: ['192.168.20.1'] }))) {
      if (!('add' in command) || !('rule' in command.add)) continue;
      // NFT_USERDATA of a rule holds 256 bytes, nft takes 128 of them for a comment.
      expect(command.add.rule.comment?.length).toBeLessThan(128);
    }
    const named = ruleset(TWO).flatMap((command) =>
      'add' in command && 'rule' in command.add ? [`${command.add.rule.chain}: ${command.add.rule.comment}`] : [],
    );
    expect(new Set(named).size).toBe(named.length);
  });

  describe('once loaded and then changed by somebody', () => {
    beforeEach(() => load(ONE));

    test.each([
      ['flush chain ip kvm_ib output', ['chain output, rule "host to an IB address: on to its guest": missing']],
      ['add rule ip kvm_ib output accept comment "mine"', ['chain output, rule "mine": unknown']],
      ['add chain ip kvm_ib extra', ['chain extra: unknown']],
      ['add set ip kvm_ib extra { type inet_service; }', ['set extra: unknown']],
      ['add map ip kvm_ib extra { type mark : mark; }', ['map extra: unknown']],
      ['add counter ip kvm_ib extra', ['counter extra: unknown']],
      ['add chain ip kvm_ib guard_input { policy drop; }', ['chain guard_input: changed']],
      ['add element ip kvm_ib guest_to_ib { 192.168.122.2 comment "one-1 nic 0" : 192.168.10.202 }', []],
    ])('%s: differences name it', async (command, expected) => {
      await nftText(command);
      expect(differences(await listing(), ONE)).toEqual(expected);
    });

    test('a dormant table is a difference', async () => {
      const listed = await listing();
      const dormant = { ...listed, table: { ...listed.table, flags: ['dormant'] } };
      expect(differences(dormant, ONE)).toEqual(['table: has a flag; a dormant table does nothing']);
    });

    test('a rule of no comment is named by its handle', async () => {
      await nftText('add rule ip kvm_ib output accept');
      expect(differences(await listing(), ONE)).toEqual([
        expect.stringMatching(/^chain output, rule of handle \d+: unknown$/),
      ]);
    });

    test('a changed rule is named by its comment', async () => {
      const rule = (await listing()).rules.find(({ chain }) => chain === 'output');
      await nftText(
        `replace rule ip kvm_ib output handle ${rule?.handle} accept comment "host to an IB address: on to its guest"`,
      );
      expect(differences(await listing(), ONE)).toEqual([
        'chain output, rule "host to an IB address: on to its guest": changed',
      ]);
    });

    test('doubled rules are found', async () => {
      await nftText(
        'add rule ip kvm_ib output dnat to ip daddr map @ib_to_guest comment "host to an IB address: on to its guest"',
      );
      expect(differences(await listing(), ONE)).toEqual(['chain output: rules doubled or in another order']);
    });

    test('another network, or another address of the host, is a difference', async () => {
      expect(differences(await listing(), TWO)).toContain('chain between_networks: missing');
      const moved = specOf([EXAMPLE], { ib: ['192.168.10.9'] });
      expect(differences(await listing(), moved)).toEqual([
        'chain input, rule "ib: guest to the host: host sees the IB address": changed',
        'chain postrouting, rule "ib: host to an IB address: guest sees the host": changed',
      ]);
    });

    test('chains of a network that is gone, and those with another hook, are stale', async () => {
      expect(staleChains(await listing(), ONE)).toEqual([]);
      expect(staleChains(await listing(), specOf([{ ...EXAMPLE, name: 'renamed' }]))).toEqual([
        'sender_ib',
        'by_address_ib',
        'to_fabric_ib',
        'to_guests_ib',
        'between_guests_ib',
        'through_ib',
        'to_host_ib',
      ]);
      await nftText('delete chain ip kvm_ib output; add chain ip kvm_ib output { type nat hook output priority 7; }');
      expect(staleChains(await listing(), ONE)).toEqual(['output']);
    });
  });
});

describe('the engine', () => {
  let reader: ElementReader;
  let engine: NatEngine;
  beforeAll(async () => {
    reader = await createElementReader();
    engine = createNftEngine({ nft, reader });
  });
  afterAll(() => reader.close());
  afterEach(() => engine.remove());

  const bound: Pair = {
    guest: parseIpv4('192.168.122.2'),
    address: parseIpv4('192.168.10.202'),
    mac: parseMac('02:00:c0:a8:7a:02'),
    comment: 'one-42 nic 0 ib',
  };
  const free: Pair = { ...bound, guest: parseIpv4('192.168.122.3'), address: parseIpv4('192.168.10.203'), mac: null };
  const nothing = { remove: { guestToIb: [], ibToGuest: [], macs: [], unbound: [] }, comments: {} };

  test('says that there is no table', async () => {
    expect(await engine.lookup([bound])).toMatchObject({ table: false, tag: null });
    expect(await engine.lookup([])).toMatchObject({ table: false });
    expect(await engine.list(ONE)).toMatchObject({ table: false, differences: ['table ip kvm_ib: missing'] });
    await engine.remove();
  });

  test('loads pairs with the table, and reads them by key as by listing', async () => {
    await engine.load(ONE, [bound, free]);
    const expected = {
      table: true,
      tag: rulesetTag(ONE),
      guestToIb: new Map([
        [bound.guest, bound.address],
        [free.guest, free.address],
      ]),
      ibToGuest: new Map([
        [bound.address, bound.guest],
        [free.address, free.guest],
      ]),
      macs: new Set([`${bound.guest} ${bound.mac}`]),
      unbound: new Set([free.guest]),
    };
    expect(await engine.lookup([bound, free])).toEqual(expected);
    const none = { packets: 0, bytes: 0 };
    const traffic = new Map([bound.guest, free.guest].map((guest) => [guest, { sent: none, received: none }]));
    expect(await engine.list(ONE)).toEqual({ ...expected, traffic, differences: [] });
    expect(await listText()).toContain('192.168.122.2 comment "one-42 nic 0 ib" : 192.168.10.202');
    expect(await engine.lookup([{ ...bound, mac: parseMac('02:00:00:00:00:01') }])).toMatchObject({ macs: new Set() });
  });

  test('load replaces the pairs, the rules and the chains of networks that are gone', async () => {
    await engine.load(TWO, [bound]);
    expect((await engine.list(TWO)).differences).toEqual([]);
    await engine.load(ONE, [free]);
    const observed = await engine.list(ONE);
    expect(observed.differences).toEqual([]);
    expect(observed.tag).toBe(rulesetTag(ONE));
    expect([...observed.guestToIb.keys()]).toEqual([free.guest]);
    expect(observed.macs.size).toBe(0);
  });

  describe('what counts', () => {
    const old = (commands: readonly Command[]): readonly Command[] =>
      commands.map((command) => {
        if (!('add' in command) || !('set' in command.add)) return command;
        const { stmt: _, ...set } = command.add.set;
        return { add: { set } };
      });
    const number = (guest: string, packets: number) =>
      nftText(
        `delete element ip kvm_ib guest_sent { ${guest} }; add element ip kvm_ib guest_sent { ${guest} counter packets ${packets} bytes 1000 }`,
      );

    test('goes on through a load, and ends with its pair', async () => {
      await engine.load(ONE, [bound, free]);
      await number(bound.guest, 7);
      await engine.load(TWO, [bound]);
      await engine.load(ONE, [bound]);
      const { traffic, differences: found } = await engine.list(ONE);
      expect({ traffic: [...traffic], found }).toMatchObject({
        traffic: [[bound.guest, { sent: { packets: 7, bytes: 1000 } }]],
        found: [],
      });
      const mapping = { guest: bound.guest, address: bound.address };
      const pair = { guestToIb: [mapping], ibToGuest: [mapping], macs: [], unbound: [] };
      await engine.change({ remove: pair, add: nothing.remove, comments: {} });
      expect([...(await engine.list(ONE)).traffic]).toEqual([]);
      await engine.change({ remove: nothing.remove, add: pair, comments: {} });
      expect((await engine.list(ONE)).traffic.get(bound.guest)?.sent.packets).toBe(0);
    });

    test('a pair goes in spite of elements that somebody took away, and load brings them back', async () => {
      await engine.load(ONE, [bound, free]);
      await nftText(`delete element ip kvm_ib guest_sent { ${bound.guest} }`);
      await nftText(`add element ip kvm_ib guest_received { 192.168.122.6 }`);
      expect((await engine.list(ONE)).differences).toEqual([
        'set guest_sent: without some guest that has a pair',
        'set guest_received: with a guest that has no pair',
      ]);
      const mapping = { guest: bound.guest, address: bound.address };
      const pair = { guestToIb: [mapping], ibToGuest: [mapping], macs: [], unbound: [] };
      await engine.change({ remove: pair, add: nothing.remove, comments: {} });
      await engine.load(ONE, [bound, free]);
      expect((await engine.list(ONE)).differences).toEqual([]);
    });

    test('begins with the first load after nft can do it, and a table of an nft that cannot is no difference', async () => {
      await engine.load(ONE, [bound]);
      await engine.remove();
      await nft.run(transaction(...old(ruleset(ONE)), ...elementCommands('add', elementsOf([bound]), {})));
      const before = await engine.list(ONE);
      expect([before.differences, [...before.traffic]]).toEqual([[], []]);
      await engine.load(ONE, [bound]);
      expect([...(await engine.list(ONE)).traffic.keys()]).toEqual([bound.guest]);
    });

    test('a dormant table whose sets do not count is loaded all the same', async () => {
      await nft.run(transaction(...old(ruleset(ONE))));
      await nftText('add table ip kvm_ib { flags dormant; }');
      await engine.load(ONE, [bound]);
      expect((await engine.list(ONE)).differences).toEqual([]);
    });
  });

  test('load brings back a chain that has another hook, and a changed rule', async () => {
    await engine.load(ONE, [bound]);
    await nftText('delete chain ip kvm_ib output; add chain ip kvm_ib output { type nat hook output priority 7; }');
    await nftText('flush chain ip kvm_ib sender_ib; add chain ip kvm_ib mine; add rule ip kvm_ib mine jump sender_ib');
    await engine.load(ONE, [bound]);
    expect((await engine.list(ONE)).differences).toEqual([]);
  });

  test('keys that a set and its map do not share are differences, and load mends them', async () => {
    await engine.load(ONE, [bound, free]);
    await nftText('delete element ip kvm_ib mapped_guests { 192.168.122.2 }');
    await nftText('add element ip kvm_ib mapped_addresses { 192.168.10.206 }');
    expect((await engine.list(ONE)).differences).toEqual([
      'set mapped_guests: lacks 192.168.122.2 of guest_to_ib',
      'set mapped_addresses: 192.168.10.206 is not in ib_to_guest',
    ]);
    expect((await engine.lookup([bound])).guestToIb.size).toBe(0);
    await engine.load(ONE, [bound, free]);
    expect((await engine.list(ONE)).differences).toEqual([]);
    expect((await engine.lookup([bound])).guestToIb.size).toBe(1);
  });

  test('load wakes a dormant table', async () => {
    await engine.load(ONE, [bound]);
    await nftText('add table ip kvm_ib { flags dormant; }');
    expect(await listText()).toContain('dormant');
    await engine.load(ONE, [bound]);
    expect(await listText()).not.toContain('dormant');
    expect((await engine.list(ONE)).differences).toEqual([]);
  });

  test('changes pairs in one transaction: all or nothing', async () => {
    await engine.load(ONE, [bound]);
    const mapping = { guest: bound.guest, address: bound.address };
    const moved = { guest: free.guest, address: bound.address };
    const remove = { guestToIb: [mapping], ibToGuest: [mapping], macs: [], unbound: [] };
    const add = { guestToIb: [moved], ibToGuest: [moved], macs: [], unbound: [free.guest] };
    await engine.change({ remove: nothing.remove, add: nothing.remove, comments: {} });
    await expect(engine.change({ ...nothing, add })).rejects.toMatchObject({ code: 'conflict' });
    expect(await engine.lookup([free])).toMatchObject({ guestToIb: new Map(), unbound: new Set() });
    await engine.change({ remove, add, comments: { [free.guest]: 'one-43 nic 1 ib' } });
    expect((await engine.list(ONE)).guestToIb).toEqual(new Map([[free.guest, bound.address]]));
    expect((await engine.list(ONE)).ibToGuest).toEqual(new Map([[bound.address, free.guest]]));
    await expect(engine.change({ ...nothing, remove, add: nothing.remove })).rejects.toMatchObject({
      code: 'failed',
    });
  });
});

describe('loading the rule set again under traffic', () => {
  let lab: Lab;
  beforeAll(async () => {
    lab = await createLab();
    await lab.sysctl('h1', 'net.bridge.bridge-nf-call-iptables', 0);
    await lab.load('h1');
    await lab.load('h2');
    await lab.map('h1', 11, 12);
    await lab.map('h2', 21);
  });
  afterAll(() => lab?.close());

  test('running connections of every kind go on', async () => {
    const ends = [
      ['out', '192.168.10.11'],
      ['g11', '192.168.10.100'],
      ['g11', '192.168.10.12'],
      ['g11', '192.168.10.11'],
      ['g11', '192.168.10.21'],
      ['g11', '192.168.10.1'],
      ['h1', '192.168.10.11'],
    ] as const;
    const streams = await Promise.all(ends.map(([from, to]) => lab.stream('tcp', from, to)));
    expect(streams.map(({ greeting }) => greeting)).toEqual(ends.map(() => expect.stringContaining(' > ')));
    for (let round = 0; round < 10; round++) {
      await lab.load('h1', round % 2 === 0 ? { hostAddress: false } : {});
      const alive = await Promise.all(streams.map((stream) => stream.exchange()));
      expect(alive).toEqual(ends.map(() => 'alive'));
    }
    await Promise.all(streams.map((stream) => stream.close()));
  });
});
