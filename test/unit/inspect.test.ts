/** list and status: every way in which files, configuration and kernel can differ is named, with what to type. */
import { truncateSync } from 'node:fs';
import { join } from 'node:path';
import { beforeEach, describe, expect, it } from 'vitest';
import type { Config, Mapping } from '../../lib/core/mapping.ts';
import { checkConfig } from '../../lib/ops/check.ts';
import type { Drift } from '../../lib/ops/inspect.ts';
import { list, status } from '../../lib/ops/inspect.ts';
import { reconcile } from '../../lib/ops/reconcile.ts';
import { sync } from '../../lib/ops/sync.ts';
import type { FakeHost } from '../support/fake-host.ts';
import {
  addressOf,
  CONFIG,
  createFakeHost,
  flushRuleset,
  guestOf,
  holderOf,
  IB0,
  mapping,
  request,
  restarted,
  snapshot,
  vmOwner,
} from '../support/fake-host.ts';

let host: FakeHost;
beforeEach(async () => {
  host = createFakeHost(CONFIG);
  await reconcile(host);
  await add(mapping(2));
  await add(mapping(3));
  host.active = new Set([2, 3]);
});

const add = (m: Mapping) => sync(host, request(vmOwner(m.vm ?? 0), [m]));
const NONE = { guestToIb: [], ibToGuest: [], macs: [], unbound: [] };
const RECONCILE = 'kvm-ib reconcile';

/** What status says, which must change nothing. */
async function drift(): Promise<readonly Drift[]> {
  const before = snapshot(host);
  const result = await status(host);
  expect(snapshot(host)).toEqual(before);
  expect(result.ok).toBe(result.drift.length === 0);
  for (const item of result.drift) expect(item.fix).not.toBe('');
  return result.drift;
}

async function expectCured(): Promise<void> {
  expect((await reconcile(host)).errors).toEqual([]);
  expect(await drift()).toEqual([]);
}

describe('list', () => {
  it('shows every mapping with its owner and state, from the files alone', async () => {
    await sync(host, request({ kind: 'manual', guest: guestOf(5) }, [mapping(5, { vm: null, mac: null })]));
    await sync(host, request(vmOwner(3), [mapping(3)], { action: 'deploy', holder: holderOf(9), pending: true }));
    const { entries, unreadable } = list(host);
    expect(unreadable).toEqual([]);
    const common = { network: 'ib', device: 'ib0' };
    expect(entries).toEqual([
      {
        ...common,
        guest: guestOf(5),
        address: addressOf(5),
        vm: null,
        nic: null,
        mac: null,
        label: 'kib:s3',
        owner: 'manual',
        state: 'active',
      },
      {
        ...common,
        guest: guestOf(2),
        address: addressOf(2),
        vm: 2,
        nic: 0,
        mac: '02:00:c0:a8:7a:02',
        label: 'ib0:2-0',
        owner: 'vm',
        state: 'active',
      },
      {
        ...common,
        guest: guestOf(3),
        address: addressOf(3),
        vm: 3,
        nic: 0,
        mac: '02:00:c0:a8:7a:03',
        label: 'ib0:3-0',
        owner: 'vm',
        state: 'pending',
      },
    ]);
  });

  it('names a file that cannot be read', () => {
    const path = join(host.store.directory, 'mappings', 'vm-2.json');
    truncateSync(path, 9);
    expect(list(host)).toMatchObject({ entries: [{ vm: 3 }], unreadable: [{ path }] });
  });
});

describe('status', () => {
  it('is ok when all agree', async () => {
    expect(await status(host)).toEqual({ ok: true, mappings: 2, drift: [], outdated: [], warnings: [] });
  });

  it('tells of a missing table, and of every pair with it', async () => {
    await flushRuleset(host.kernel);
    const items = await drift();
    expect(items[0]).toEqual({
      guest: null,
      address: null,
      part: 'table',
      expected: 'the table as kvm-ib loads it',
      observed: 'the table ip kvm_ib is not there',
      fix: RECONCILE,
    });
    expect(items.filter((item) => item.part === 'map')).toHaveLength(6);
    await expectCured();
  });

  it('tells of a changed table', async () => {
    await host.nat.load(
      { networks: [], hostAddresses: new Map() },
      [mapping(2), mapping(3)].map((m) => ({ ...m, comment: '' })),
    );
    const items = await drift();
    expect(items.length).toBeGreaterThan(0);
    expect(new Set(items.map((item) => item.part))).toEqual(new Set(['table']));
    await expectCured();
  });

  it('tells of a missing pair, one way or both', async () => {
    await host.nat.change({ remove: { ...NONE, ibToGuest: [mapping(2)] }, add: NONE, comments: {} });
    expect(await drift()).toEqual([
      {
        guest: guestOf(2),
        address: addressOf(2),
        part: 'map',
        expected: `ib_to_guest ${addressOf(2)} : ${guestOf(2)}`,
        observed: 'absent',
        fix: RECONCILE,
      },
    ]);
    await expectCured();
  });

  it('tells of a pair that leads elsewhere', async () => {
    await host.nat.change({
      remove: { ...NONE, guestToIb: [mapping(2)] },
      add: { ...NONE, guestToIb: [mapping(2, { to: 7 })] },
      comments: {},
    });
    expect(await drift()).toMatchObject([
      {
        guest: guestOf(2),
        part: 'map',
        expected: `guest_to_ib ${guestOf(2)} : ${addressOf(2)}`,
        observed: addressOf(7),
      },
    ]);
    await expectCured();
  });

  it('tells of strays in the table: a pair, a binding, a guest without one', async () => {
    const mac = mapping(9).mac;
    if (mac === null) throw new Error('no MAC');
    await host.nat.change({
      remove: NONE,
      add: {
        guestToIb: [mapping(5)],
        ibToGuest: [mapping(5)],
        macs: [{ guest: guestOf(2), mac }],
        unbound: [guestOf(3)],
      },
      comments: {},
    });
    expect((await drift()).map(({ part, expected, observed }) => [part, expected, observed])).toEqual([
      ['map', 'absent', `guest_to_ib ${guestOf(5)} : ${addressOf(5)}`],
      ['map', 'absent', `ib_to_guest ${addressOf(5)} : ${guestOf(5)}`],
      ['map', 'absent', `guest_mac ${guestOf(2)} . ${mac}`],
      ['map', 'absent', `guest_any_mac ${guestOf(3)}`],
    ]);
    await expectCured();
  });

  it('tells of a missing alias', async () => {
    host.kernel.addresses = host.kernel.addresses.filter((entry) => entry.address !== addressOf(2));
    expect(await drift()).toEqual([
      {
        guest: guestOf(2),
        address: addressOf(2),
        part: 'alias',
        expected: `${addressOf(2)}/32 on ib0 labelled ib0:2-0`,
        observed: 'absent',
        fix: RECONCILE,
      },
    ]);
    await expectCured();
  });

  it('tells of an alias that looks like ours and that no file knows, which reconcile leaves', async () => {
    host.kernel.addresses.push({ device: IB0, address: addressOf(7), prefixLength: 32, label: 'ib0:7-0' });
    const orphan = {
      guest: null,
      address: addressOf(7),
      part: 'alias',
      expected: 'absent: no file has it',
      observed: `${addressOf(7)}/32 on ib0 labelled ib0:7-0`,
      fix: `ip address del ${addressOf(7)}/32 dev ib0`,
    };
    expect(await drift()).toEqual([orphan]);
    expect((await reconcile(host)).changes).toEqual([]);
    expect(await drift()).toEqual([orphan]);
  });

  it('tells of a mapped address that somebody else has put on a link', async () => {
    host.kernel.addresses.push({ device: 'eth0', address: addressOf(2), prefixLength: 24, label: 'eth0' });
    expect(await drift()).toMatchObject([
      {
        guest: guestOf(2),
        address: addressOf(2),
        part: 'alias',
        fix: expect.stringContaining(`ip address del ${addressOf(2)}/24 dev eth0`),
      },
    ]);
  });

  it("tells of the host's own address in the range", async () => {
    host.kernel.addresses.push({ device: IB0, address: addressOf(9), prefixLength: 24, label: 'ib0' });
    const items = (await drift()).filter((item) => item.part === 'alias');
    expect(items).toContainEqual(expect.objectContaining({ expected: 'no address of the host in the IB range' }));
  });

  it('tells of a bridge with another MTU', async () => {
    host.kernel.links.set('virbr1', { mtu: 1500, up: true, type: 1 });
    expect(await drift()).toEqual([
      { guest: null, address: null, part: 'mtu', expected: 'virbr1 2044', observed: 'virbr1 1500', fix: RECONCILE },
    ]);
    await expectCured();
  });

  it('tells of a port without hairpin mode where the bridge calls the firewall', async () => {
    host.kernel.callsIptables = true;
    host.kernel.ports.push({ bridge: 'virbr1', name: 'vnet2', hairpin: false });
    expect(await drift()).toMatchObject([{ part: 'hairpin', observed: 'vnet2 off', fix: RECONCILE }]);
    await expectCured();
  });

  it('tells of a missing link, and of what waits for it', async () => {
    host.kernel.links.delete('ib0');
    host.kernel.addresses = [];
    const items = await drift();
    expect(items).toContainEqual(
      expect.objectContaining({ part: 'mtu', expected: 'link ib0 with its MTU', observed: 'absent' }),
    );
    expect(items.filter((item) => item.part === 'alias').map((item) => item.guest)).toEqual([guestOf(2), guestOf(3)]);
  });

  it('tells of a file whose VM is gone, with alias and pairs that are to go', async () => {
    host.active = new Set([3]);
    const items = await drift();
    expect(items).toContainEqual({
      guest: guestOf(2),
      address: addressOf(2),
      part: 'file',
      expected: 'no file of vm-2: one-2 is not active',
      observed: 'active',
      fix: RECONCILE,
    });
    expect(new Set(items.map((item) => item.part))).toEqual(new Set(['file', 'alias', 'map']));
    await expectCured();
  });

  it('tells of an action that died half-way, and not of one that is under way', async () => {
    await sync(host, request(vmOwner(3), [mapping(3)], { action: 'deploy', holder: holderOf(9), pending: true }));
    expect(await drift()).toEqual([]);
    host.dead.add(9);
    expect(await drift()).toMatchObject([{ guest: guestOf(3), part: 'file', observed: 'pending', fix: RECONCILE }]);
    await expectCured();
  });

  it('tells of static mappings that are new, changed and gone', async () => {
    const at = (n: number): Config => ({ ...CONFIG, static: [{ guest: guestOf(8), address: addressOf(n) }] });
    const files = async () => (await drift()).filter((item) => item.part === 'file');
    host = restarted(host, at(8));
    expect(await files()).toMatchObject([{ guest: guestOf(8), address: addressOf(8), observed: 'absent' }]);
    await expectCured();
    host = restarted(host, at(9));
    expect(await files()).toMatchObject([
      { address: addressOf(9), observed: `active: ${guestOf(8)} <-> ${addressOf(8)}` },
    ]);
    await expectCured();
    host = restarted(host, CONFIG);
    expect(await files()).toMatchObject([
      { address: addressOf(9), expected: expect.stringContaining('no longer under `static`') },
    ]);
    await expectCured();
  });

  it('tells of a file that cannot be read, and takes nothing of the unknown for a stray', async () => {
    const path = join(host.store.directory, 'mappings', 'vm-2.json');
    truncateSync(path, 9);
    const items = await drift();
    expect(items[0]).toMatchObject({
      part: 'file',
      expected: `a state file at ${path}`,
      fix: expect.stringContaining('mv '),
    });
    expect(items.slice(1)).toMatchObject([
      { part: 'alias', address: addressOf(2), fix: 'see to the state file that cannot be read first' },
    ]);
  });

  it('says when libvirt does not answer', async () => {
    host.active = undefined;
    expect(await status(host)).toMatchObject({
      ok: true,
      warnings: [expect.stringContaining('libvirt does not answer')],
    });
  });
});

describe('the configuration held against the host', () => {
  const fine = new Map([
    ['net.ipv4.ip_forward', '1'],
    ['net.netfilter.nf_conntrack_tcp_loose', '1'],
  ]);
  const check = (settings = fine) => checkConfig(host, { read: (name) => settings.get(name) });
  const own = (n: number) => ({ device: 'ib0', address: addressOf(n), prefixLength: 24, label: 'ib0' });

  it('has no finding on a host that fits', async () => {
    host.kernel.addresses.push(own(50));
    expect(await check()).toEqual([]);
  });

  it("names the host's own address in the range as a conflict", async () => {
    host.kernel.addresses.push(own(9));
    expect(await check()).toMatchObject([{ level: 'error', code: 'conflict', network: 'ib' }]);
  });

  it('warns of a host without an address on the link, of another MTU, of a link that is no IPoIB', async () => {
    host.kernel.links.set('ib0', { mtu: 4092, up: true, type: 1 });
    expect((await check()).map(({ level, what }) => [level, what])).toEqual([
      ['warning', 'ib0 is not an IPoIB link'],
      ['warning', 'MTU of virbr1 is 2044, of ib0 4092'],
      ['warning', 'ib0 has no address of its own'],
    ]);
  });

  it.each([
    ['bond', 'slave'],
    ['bridge', 'port'],
  ])('a link that is a %s %s is refused, and the master is named', async (kind, role) => {
    host.kernel.addresses.push(own(50));
    host.kernel.links.set('master0', { mtu: 2044, up: true, type: 32, kind });
    host.kernel.links.set('ib0', { mtu: 2044, up: true, type: 32, master: 'master0' });
    expect(await check()).toMatchObject([
      {
        level: 'error',
        code: 'host-lacks',
        network: 'ib',
        what: `ib0 is a ${role} of ${kind} master0`,
        fix: expect.stringContaining('device: master0'),
      },
    ]);
  });

  it('a link in a VRF is no finding', async () => {
    host.kernel.addresses.push(own(50));
    host.kernel.links.set('red', { mtu: 65575, up: true, type: 1, kind: 'vrf' });
    host.kernel.links.set('ib0', { mtu: 2044, up: true, type: 32, master: 'red' });
    expect(await check()).toEqual([]);
  });

  it('a bond of IPoIB links is a fine device, and without an active slave it is named', async () => {
    host.kernel.addresses.push(own(50));
    host.kernel.links.set('ib0', { mtu: 2044, up: true, type: 32, kind: 'bond' });
    expect(await check()).toEqual([]);
    host.kernel.links.set('ib0', { mtu: 2044, up: true, type: 32, kind: 'bond', running: false });
    expect(await check()).toMatchObject([
      { level: 'warning', what: 'ib0 has no carrier', why: 'none of its slaves is active' },
    ]);
    host.kernel.links.set('ib0', { mtu: 2044, up: true, type: 32, running: false });
    expect(await check()).toMatchObject([{ level: 'warning', why: expect.stringContaining('subnet manager') }]);
  });

  it('names missing links, a link that is down, and settings of the kernel', async () => {
    host.kernel.addresses.push(own(50));
    host.kernel.links.set('ib0', { mtu: 2044, up: false, type: 32 });
    host.kernel.links.delete('virbr1');
    const settings = new Map([['net.netfilter.nf_conntrack_tcp_loose', '0']]);
    expect((await check(settings)).map(({ level, what }) => [level, what])).toEqual([
      ['error', 'ib0 is down'],
      ['error', 'there is no bridge virbr1'],
      ['error', 'IPv4 forwarding is off'],
      ['warning', 'nf_conntrack_tcp_loose is 0'],
    ]);
    host.kernel.links.delete('ib0');
    expect((await check()).map(({ what }) => what)).toContain('there is no link ib0');
  });
});
