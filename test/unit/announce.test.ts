/** Repeats, and announcements after link events: on the fake host. */
import { beforeEach, describe, expect, it } from 'vitest';
import { createAnnouncer } from '../../lib/host/announcer.ts';
import { isRepeating, ownBundle, parseRepeats, runRepeats, startRepeats } from '../../lib/host/repeats.ts';
import type { InetAddress, RepeatItem } from '../../lib/link/ports.ts';
import { announce } from '../../lib/ops/announce.ts';
import { reconcile } from '../../lib/ops/reconcile.ts';
import { sync } from '../../lib/ops/sync.ts';
import type { FakeHost } from '../support/fake-host.ts';
import {
  addressOf,
  CONFIG,
  createFakeHost,
  failureOf,
  guestOf,
  IB0,
  mapping,
  network,
  request,
  restarted,
  snapshot,
  unitsOf,
  vmOwner,
} from '../support/fake-host.ts';

let host: FakeHost;
beforeEach(async () => {
  host = createFakeHost(CONFIG);
  host.active = new Set([2, 3]);
  await reconcile(host);
  for (const n of [2, 3]) await sync(host, request(vmOwner(n), [mapping(n)]));
  host.log.length = 0;
});

const said = () => host.log.filter((line) => /^(?:announce|repeat|record links)/.test(line));
const BOTH = [addressOf(2), addressOf(3)];
const ib0 = () => {
  const link = host.kernel.links.get('ib0');
  if (link === undefined) throw new Error('no ib0');
  return link;
};

describe('a new alias', () => {
  it('is announced, then handed on to be repeated with its label', async () => {
    await sync(host, request(vmOwner(4), [mapping(4)]));
    expect(said()).toEqual([`announce ${addressOf(4)}`, `repeat ${addressOf(4)} ib0:4-0`]);
  });

  it('whose repeats cannot be started is a warning', async () => {
    host.repeatError = 'ENOENT';
    const { warnings } = await sync(host, request(vmOwner(4), [mapping(4)]));
    expect(warnings).toEqual(['the announcement will not be repeated: ENOENT']);
  });

  it('that could not be announced is not repeated', async () => {
    host.announcementError = 'the link is down';
    await sync(host, request(vmOwner(4), [mapping(4)]));
    expect(said()).toEqual([`announce ${addressOf(4)}`]);
  });
});

describe('reconcile', () => {
  it('announces nothing again where nothing happened, and writes no record', async () => {
    expect((await reconcile(host)).announced).toEqual([]);
    expect(said()).toEqual([]);
  });

  it.each([
    ['was down', { carrierChanges: 4 }, 'the link was down'],
    ['has another hardware address', { station: 7, carrierChanges: 4 }, 'its hardware address changed'],
  ])('announces all aliases of a link that %s, once', async (_, event, why) => {
    Object.assign(ib0(), event);
    const expected = [{ device: 'ib0', why, addresses: BOTH }];
    expect((await reconcile(host, { dryRun: true })).announced).toEqual(expected);
    expect(said()).toEqual([]);
    expect((await reconcile(host)).announced).toEqual(expected);
    expect(said()).toEqual([
      `announce ${addressOf(2)}`,
      `announce ${addressOf(3)}`,
      `repeat ${addressOf(2)} ib0:2-0, ${addressOf(3)} ib0:3-0`,
      'record links',
    ]);
    expect((await reconcile(restarted(host))).announced).toEqual([]);
  });

  it('says nothing on a link that is down, and remembers', async () => {
    Object.assign(ib0(), { up: false, carrierChanges: 3 });
    expect((await reconcile(host)).announced).toEqual([]);
    Object.assign(ib0(), { up: true, carrierChanges: 4 });
    expect((await reconcile(host)).announced).toMatchObject([{ addresses: BOTH }]);
  });

  it('does not announce twice what it adds, nor what it releases, nor what is not there', async () => {
    await sync(host, request(vmOwner(4), [mapping(4)]));
    await sync(host, request(vmOwner(5), [mapping(5)]));
    host.active = new Set([2, 3, 4]);
    host.kernel.addresses = host.kernel.addresses.filter(({ address }) => address !== addressOf(4));
    host.log.length = 0;
    ib0().carrierChanges = 4;
    expect((await reconcile(host)).announced).toMatchObject([{ addresses: BOTH }]);
    const announcements = said().filter((line) => line.startsWith('announce'));
    expect(announcements.sort()).toEqual([2, 3, 4].map((n) => `announce ${addressOf(n)}`));
  });

  it('announces on the link of the event only', async () => {
    const second = network({
      name: 'b',
      device: 'ib1',
      bridge: 'virbr2',
      guests: '192.168.123.2-192.168.123.9',
      addresses: '192.168.20.2-192.168.20.9',
    });
    host = createFakeHost({ ...CONFIG, networks: [...CONFIG.networks, second] });
    host.active = new Set([2, 3]);
    await reconcile(host);
    await sync(host, request(vmOwner(2), [mapping(2)]));
    Object.assign(host.kernel.links.get('ib1') ?? {}, { carrierChanges: 9 });
    host.log.length = 0;
    expect((await reconcile(host)).announced).toEqual([]);
    // Nothing is on it, but it is known as it is now.
    expect(said()).toEqual(['record links']);
  });

  it('that goes on mapping by mapping starts one process for all repeats', async () => {
    for (const n of [4, 5]) await sync(host, request(vmOwner(n), [mapping(n)]));
    host.active = new Set([2, 3, 4, 5]);
    host.kernel.addresses = [];
    host.log.length = 0;
    const { addAlias } = host.links;
    const links: FakeHost['links'] = {
      ...host.links,
      addAlias: async (device, address, label) => {
        if (address === addressOf(3)) throw new Error('no');
        await addAlias(device, address, label);
      },
    };
    expect((await reconcile({ ...host, links })).errors).toHaveLength(1);
    expect(said().filter((line) => line.startsWith('repeat'))).toEqual([
      `repeat ${[2, 4, 5].map((n) => `${addressOf(n)} ib0:${n}-0`).join(', ')}`,
    ]);
  });

  it('tries again what could not be sent', async () => {
    ib0().carrierChanges = 4;
    host.announcementError = 'ENOBUFS';
    expect((await reconcile(host)).warnings).toHaveLength(2);
    host.announcementError = undefined;
    expect((await reconcile(host)).announced).toMatchObject([{ addresses: BOTH }]);
    expect((await reconcile(host)).announced).toEqual([]);
  });

  it('whose record cannot be written has done the rest, and says so', async () => {
    ib0().carrierChanges = 4;
    host.kernel.addresses = host.kernel.addresses.filter(({ address }) => address !== addressOf(3));
    const broken = {
      ...host,
      store: {
        ...host.store,
        writeLinks: () => {
          throw new Error('no space');
        },
      },
    };
    expect((await reconcile(broken)).errors).toMatchObject([{ message: 'Cannot write the state', why: 'no space' }]);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2), mapping(3)]));
  });
});

describe('announce', () => {
  it('takes every alias that stands, those of a VM, or those that are named', async () => {
    const chosen = async (selection: Parameters<typeof announce>[1]) =>
      (await announce(host, selection)).announced.map(({ address }) => address);
    expect(await chosen({ kind: 'all' })).toEqual(BOTH);
    expect(await chosen({ kind: 'vm', vm: 3 })).toEqual([addressOf(3)]);
    expect(await chosen({ kind: 'addresses', addresses: [guestOf(3), addressOf(3), addressOf(2)] })).toEqual([
      addressOf(3),
      addressOf(2),
    ]);
  });

  it('sends nothing when one of those named is not there', async () => {
    host.kernel.addresses = host.kernel.addresses.filter(({ address }) => address !== addressOf(3));
    for (const addresses of [BOTH, [addressOf(2), addressOf(9)]]) {
      expect(await failureOf(announce(host, { kind: 'addresses', addresses }))).toMatchObject({ code: 'failed' });
    }
    expect(await failureOf(announce(host, { kind: 'vm', vm: 9 }))).toMatchObject({ code: 'failed' });
    expect(said()).toEqual([]);
    const { announced, warnings } = await announce(host, { kind: 'all' });
    expect(announced).toMatchObject([{ address: addressOf(2) }]);
    expect(warnings).toHaveLength(1);
  });

  it('names a link that sends nothing once, however many aliases it has', async () => {
    host.announcementError = 'ib0 is down';
    const { announced, errors } = await announce(host, { kind: 'all' });
    expect(announced).toEqual([]);
    expect(errors).toMatchObject([{ code: 'host-lacks', message: 'Cannot announce 2 addresses on ib0' }]);
    expect(said().filter((line) => line.startsWith('repeat'))).toEqual([]);
  });
});

describe('the process that repeats', () => {
  const items: readonly RepeatItem[] = [2, 3].map((n) => ({ device: IB0, address: addressOf(n), label: `ib0:${n}-0` }));
  const there = (...all: readonly RepeatItem[]): readonly InetAddress[] =>
    all.map((item) => ({ ...item, prefixLength: 32 }));
  const run = async (...looks: readonly (readonly InetAddress[])[]) => {
    const rounds: (readonly string[])[] = [];
    let n = 0;
    await runRepeats(
      { addresses: async () => looks[n++] ?? [] },
      {
        announce: async (announced) => {
          rounds.push(announced.map(({ address }) => address));
          return [];
        },
      },
      items,
      1,
    );
    return rounds;
  };

  it('announces two rounds more of what still stands under its label, and what left does not come back', async () => {
    const [first, second] = there(...items);
    if (first === undefined || second === undefined) throw new Error('two items');
    expect(await run([first, second], [first, second])).toEqual([BOTH, BOTH]);
    expect(await run([first], [first, second])).toEqual([[addressOf(2)], [addressOf(2)]]);
    expect(
      await run(
        [
          { ...first, label: 'ib0:7-0' },
          { ...second, prefixLength: 24 },
        ],
        [first, second],
      ),
    ).toEqual([[]]);
    expect(await run([{ ...first, device: 'ib1' }])).toEqual([[]]);
  });

  it('takes nothing that is no alias of ours by name', () => {
    const good = ['ib0', addressOf(2), 'ib0:2-0'];
    const bad = [
      ['../x', addressOf(2), 'kib:s1'],
      ['ib0', '1.2.3', 'kib:s1'],
      ['ib0', addressOf(2), 'ib0'],
      [1],
      null,
      'x',
    ];
    expect(parseRepeats(JSON.stringify([good, ...bad]))).toEqual([items[0]]);
    for (const text of ['', '{', 'null', '{"length":1}', '7']) expect(parseRepeats(text)).toEqual([]);
  });

  it('is one of our bundles, started with the one argument', () => {
    expect(ownBundle('file:///usr/lib/kvm-ib/engine.mjs')).toBe('/usr/lib/kvm-ib/engine.mjs');
    expect(ownBundle('file:///usr/lib/kvm-ib/kvm-ib.mjs')).toBe('/usr/lib/kvm-ib/kvm-ib.mjs');
    expect(ownBundle(import.meta.url)).toBeUndefined();
    expect(ownBundle('node:fs')).toBeUndefined();
    expect(isRepeating(['node', 'engine.mjs', '--repeat-announcements'])).toBe(true);
    expect(isRepeating(['node', 'engine.mjs', '--repeat-announcements', 'x'])).toBe(false);
    expect(isRepeating(['node', 'engine.mjs'])).toBe(false);
  });

  it('that cannot be started is a reason, not an exception; without a bundle there is none', async () => {
    const node = process.execPath;
    process.execPath = '/nowhere/node';
    try {
      expect(await startRepeats('/nowhere/engine.mjs', items)).toContain('ENOENT');
    } finally {
      process.execPath = node;
    }
    expect(await createAnnouncer({ link: async () => undefined }).repeat(items)).toBeUndefined();
  });
});
