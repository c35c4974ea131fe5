/** The operations on a real kernel, with the real nft: what the unit tests prove on the fake, where the kernel has a say. */
import { afterAll, beforeEach, describe, expect, it } from 'vitest';
import type { Mapping } from '../../lib/core/mapping.ts';
import { exec } from '../../lib/host/exec.ts';
import { TABLE } from '../../lib/nat/ruleset.ts';
import { createNft } from '../../lib/nftables-json/index.ts';
import { commit, undo } from '../../lib/ops/actions.ts';
import { status } from '../../lib/ops/inspect.ts';
import { reconcile } from '../../lib/ops/reconcile.ts';
import { sync } from '../../lib/ops/sync.ts';
import { teardown } from '../../lib/ops/teardown.ts';
import {
  addressOf,
  CONFIG,
  claimsFor,
  claimsOf,
  elementsOf,
  failureOf,
  guestOf,
  holderOf,
  mapping,
  network,
  request,
  unitsOf,
  vmOwner,
  withFaults,
} from '../support/fake-host.ts';
import type { RealHost } from '../support/kernel-host.ts';
import { createRealHost, flows, ip, makeLinks, nft, plant, removeLinks } from '../support/kernel-host.ts';

let host: RealHost;
beforeEach(async () => {
  makeLinks();
  host = await createRealHost();
  await reconcile(host);
});
afterAll(removeLinks);

const add = (m: Mapping, on = host) => sync(on, request(vmOwner(m.vm ?? 0), [m]));
const remove = (vm: number) => sync(host, request(vmOwner(vm), []));
const OUTSIDE = '192.168.10.100';
const flow = (source: string, destination: string, back: string, to: string) => {
  return { original: { source, destination }, reply: { source: back, destination: to } };
};

/** What the kernel holds, read by `ip` and `nft` and not by the code under test. */
async function kernel() {
  const links = JSON.parse(ip('-j', '-4', 'address', 'show')) as readonly {
    readonly ifname: string;
    readonly addr_info: readonly { readonly local: string; readonly prefixlen: number; readonly label: string }[];
  }[];
  const aliases = links
    .filter(({ ifname }) => ifname !== 'lo')
    .flatMap(({ ifname, addr_info }) => addr_info.map((a) => `${ifname} ${a.local}/${a.prefixlen} ${a.label}`))
    .sort();
  const listing = await createNft({ exec }).listTable(TABLE.family, TABLE.name);
  return { table: listing !== undefined, ...elementsOf(listing), aliases };
}

async function expectHeld(...mappings: readonly Mapping[]): Promise<void> {
  expect(await kernel()).toEqual({ table: true, ...unitsOf(mappings) });
  const { files } = host.store.all();
  expect(
    files
      .flatMap((file) => file.mappings)
      .map((m) => m.guest)
      .sort(),
  ).toEqual(mappings.map((m) => m.guest).sort());
  expect(claimsOf(host.store.directory)).toEqual(claimsFor(files));
}

describe('sync on the kernel', () => {
  it('maps, changes and unmaps', async () => {
    await add(mapping(2));
    await add(mapping(3, { mac: null }));
    await expectHeld(mapping(2), mapping(3, { mac: null }));
    await add(mapping(2, { to: 5, mac: 9, nic: 1 }));
    await expectHeld(mapping(2, { to: 5, mac: 9, nic: 1 }), mapping(3, { mac: null }));
    await remove(2);
    await remove(3);
    await expectHeld();
  });

  it('swaps addresses within one VM', async () => {
    await sync(host, request(vmOwner(7), [mapping(2, { vm: 7 }), mapping(3, { vm: 7, nic: 1 })]));
    const swapped = [mapping(2, { vm: 7, to: 3 }), mapping(3, { vm: 7, nic: 1, to: 2 })];
    await sync(host, request(vmOwner(7), swapped));
    await expectHeld(...swapped);
  });

  it('drops the flows that it must, and no other', async () => {
    const neighbour = flow(guestOf(3), OUTSIDE, OUTSIDE, addressOf(3));
    plant(
      flow(guestOf(2), OUTSIDE, OUTSIDE, guestOf(2)),
      flow(OUTSIDE, addressOf(2), addressOf(2), OUTSIDE),
      neighbour,
    );
    expect((await add(mapping(2))).flushed).toBe(2);
    expect(flows()).toEqual([neighbour]);
    plant(flow(guestOf(2), OUTSIDE, OUTSIDE, addressOf(2)), flow(OUTSIDE, addressOf(2), guestOf(2), OUTSIDE));
    expect((await add(mapping(2))).flushed).toBe(0);
    expect(flows()).toHaveLength(3);
    expect((await remove(2)).flushed).toBe(2);
    expect(flows()).toEqual([neighbour]);
  });

  it('has one command of nft for a change, none when nothing changes, and never lists', async () => {
    for (let n = 3; n < 10; n++) await add(mapping(n));
    const commands = async (act: Promise<unknown>): Promise<readonly string[]> => {
      host.nftInput.length = 0;
      await act;
      return [...host.nftInput];
    };
    const seen = [
      await commands(add(mapping(2))),
      await commands(add(mapping(2))),
      await commands(add(mapping(2, { mac: 9 }))),
      await commands(remove(2)),
    ];
    expect(seen.map((list) => list.length)).toEqual([1, 0, 1, 1]);
    expect(seen.flat().filter((input) => /"list"|get element/.test(input))).toEqual([]);
    // The size of what is sent does not depend on how many others there are.
    const { length } = seen[0]?.[0] ?? '';
    expect(length).toBeGreaterThan(0);
    expect(length).toBeLessThan(1_000);
  });

  it('makes the bridge follow the MTU of the link', async () => {
    ip('link', 'set', 'ib0', 'mtu', '1900');
    await add(mapping(2));
    expect(ip('link', 'show', 'virbr1')).toContain('mtu 1900');
  });

  it('makes the table on the way when it is missing', async () => {
    await add(mapping(2));
    nft('flush', 'ruleset');
    await add(mapping(3));
    await expectHeld(mapping(2), mapping(3));
    expect(host.nftInput.some((input) => input.includes('"chain"'))).toBe(true);
  });

  it('brings the table of another configuration to this one', async () => {
    await add(mapping(2));
    ip('link', 'add', 'ib1', 'mtu', '2044', 'type', 'veth', 'peer', 'name', 'fabric1', 'mtu', '2044');
    ip('link', 'add', 'virbr2', 'mtu', '2044', 'type', 'bridge');
    const second = network({
      name: 'b',
      device: 'ib1',
      bridge: 'virbr2',
      guests: '10.9.0.0/24',
      addresses: '10.8.0.0/24',
    });
    const wider = await createRealHost({ ...CONFIG, networks: [...CONFIG.networks, second] }, host.store.directory);
    expect(nft('list', 'table', 'ip', 'kvm_ib')).not.toContain('virbr2');
    await add(mapping(3), wider);
    expect(nft('list', 'table', 'ip', 'kvm_ib')).toContain('virbr2');
    await expectHeld(mapping(2), mapping(3));
    wider.active = new Set([2, 3]);
    expect(await reconcile(wider)).toMatchObject({ table: [], changes: [], errors: [] });
  });
});

describe('what the kernel refuses', () => {
  it.each([
    ['with another label', ['192.168.10.202/32', 'dev', 'ib0', 'label', 'ib0:vip']],
    ['with another prefix', ['192.168.10.202/24', 'dev', 'ib0', 'label', 'ib0:2-0']],
    ['on another link', ['192.168.10.202/32', 'dev', 'eth0']],
  ])('an address of somebody else %s is a conflict and stays', async (_, args) => {
    ip('address', 'add', ...args);
    const before = await kernel();
    expect(await failureOf(add(mapping(2)))).toMatchObject({ code: 'conflict', exit: 4 });
    expect(await kernel()).toEqual(before);
    expect(host.store.all().files).toEqual([]);
  });

  it("the host's own address in the range refuses the network", async () => {
    ip('address', 'add', '192.168.10.205/24', 'dev', 'ib0');
    await reconcile(host);
    expect(await failureOf(add(mapping(2)))).toMatchObject({ code: 'conflict', message: 'Cannot serve network ib' });
  });

  it.each(['ib0', 'virbr1'])('a missing %s refuses a mapping and changes nothing', async (link) => {
    ip('link', 'delete', link);
    const before = await kernel();
    expect(await failureOf(add(mapping(2)))).toMatchObject({ code: 'host-lacks', exit: 6 });
    expect(await kernel()).toEqual(before);
    expect(host.store.all().files).toEqual([]);
  });

  it('a step that fails leaves the old state, whichever it is', async () => {
    await add(mapping(2));
    const before = await kernel();
    const files = JSON.stringify(host.store.all().files);
    let failures = 0;
    for (let n = 1; n < 20; n++) {
      const faulty = withFaults(host, n);
      const work = sync(faulty, request(vmOwner(2), [mapping(2, { to: 6, mac: 9 })]));
      const error = await work.then(
        () => undefined,
        (thrown: unknown) => thrown,
      );
      if (error === undefined) break;
      failures += 1;
      expect(error).toMatchObject({ code: 'failed', exit: 1 });
      expect(await kernel(), faulty.calls.join(', ')).toEqual(before);
      expect(JSON.stringify(host.store.all().files)).toBe(files);
    }
    expect(failures).toBe(6);
    await expectHeld(mapping(2, { to: 6, mac: 9 }));
  });

  it('a process that is stopped at any step is followed by one that ends it', async () => {
    for (let n = 1; n < 20; n++) {
      const faulty = withFaults(host, n, 'on');
      const work = sync(faulty, request(vmOwner(2), [mapping(2)], { holder: holderOf(50) }));
      const stopped = await work.then(
        () => false,
        () => true,
      );
      if (!stopped) break;
      const next = await createRealHost(CONFIG, host.store.directory);
      next.dead.add(50);
      expect((await reconcile(next)).errors).toEqual([]);
      await expectHeld();
    }
    await expectHeld(mapping(2));
  });
});

describe('a deploy on the kernel', () => {
  it('is committed with hairpin mode for its tap, where bridged frames pass the firewall', async () => {
    const holder = holderOf(77);
    await sync(host, request(vmOwner(2), [mapping(2)], { action: 'deploy', holder, pending: true }));
    ip('link', 'set', 'virbr1', 'type', 'bridge', 'nf_call_iptables', '1');
    await commit(host, vmOwner(2), holder);
    expect(ip('-d', 'link', 'show', 'vnet2')).toContain('hairpin on');
    await expectHeld(mapping(2));
    expect(host.store.read(vmOwner(2))?.phase.name).toBe('active');
  });

  it('is undone to nothing', async () => {
    const holder = holderOf(77);
    await sync(host, request(vmOwner(2), [mapping(2)], { action: 'deploy', holder, pending: true }));
    await undo(host, vmOwner(2), holder, 'deploy');
    await expectHeld();
  });
});

describe('reconcile on the kernel', () => {
  it('after `nft flush ruleset` brings all of it back, and drops flows that began meanwhile', async () => {
    await add(mapping(2));
    await add(mapping(3));
    host.active = new Set([2, 3]);
    nft('flush', 'ruleset');
    plant(flow(guestOf(2), OUTSIDE, OUTSIDE, guestOf(2)));
    expect((await status(host)).drift.map((item) => item.part)).toContain('table');
    expect(await reconcile(host)).toMatchObject({ errors: [], table: ['the table ip kvm_ib is not there'] });
    await expectHeld(mapping(2), mapping(3));
    expect(flows()).toEqual([]);
    expect(await status(host)).toMatchObject({ ok: true, drift: [] });
  });

  it('releases the VM that is gone and keeps the one that is there', async () => {
    await add(mapping(2));
    await add(mapping(3));
    host.active = new Set([3]);
    expect(await reconcile(host)).toMatchObject({ released: ['vm-2'] });
    await expectHeld(mapping(3));
  });

  it('brings right what was changed behind its back: rule, pair, alias, MTU', async () => {
    await add(mapping(2));
    host.active = new Set([2]);
    nft('add', 'rule', 'ip', 'kvm_ib', 'prerouting', 'counter');
    nft('delete', 'element', 'ip', 'kvm_ib', 'ib_to_guest', '{ 192.168.10.202 }');
    nft('add', 'element', 'ip', 'kvm_ib', 'guest_any_mac', '{ 192.168.122.2 }');
    ip('address', 'del', '192.168.10.202/32', 'dev', 'ib0');
    ip('link', 'set', 'virbr1', 'mtu', '1500');
    const parts = (await status(host)).drift.map((item) => item.part);
    expect([...new Set(parts)].sort()).toEqual(['alias', 'map', 'mtu', 'table']);
    expect((await reconcile(host)).errors).toEqual([]);
    await expectHeld(mapping(2));
    expect(await status(host)).toMatchObject({ ok: true, drift: [] });
  });

  it('waits for a link that is missing, and maps when it comes', async () => {
    await add(mapping(2));
    host.active = new Set([2]);
    ip('link', 'delete', 'ib0');
    const { errors, warnings } = await reconcile(host);
    expect(errors).toEqual([]);
    expect(warnings.join()).toContain('no link ib0');
    ip('link', 'add', 'ib0', 'mtu', '2044', 'type', 'veth', 'peer', 'name', 'fabric0', 'mtu', '2044');
    ip('link', 'set', 'ib0', 'up');
    expect((await reconcile(host)).errors).toEqual([]);
    await expectHeld(mapping(2));
  });
});

describe('teardown on the kernel', () => {
  it('takes all that is ours and nothing else', async () => {
    nft('add', 'table', 'ip', 'others');
    ip('address', 'add', '192.168.10.209/32', 'dev', 'ib0', 'label', 'ib0:vip');
    await add(mapping(2));
    await teardown(host, { force: true });
    expect(await kernel()).toMatchObject({ table: false, aliases: ['ib0 192.168.10.209/32 ib0:vip'] });
    expect(nft('list', 'tables')).toBe('table ip others\n');
  });
});
