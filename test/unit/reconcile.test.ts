/** reconcile and teardown on the fake host, and the laws that hold after any sequence of operations. */
import { renameSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { beforeEach, describe, expect, it } from 'vitest';
import { parseIpv4 } from '../../lib/core/address.ts';
import { resolveMapping } from '../../lib/core/config.ts';
import type { Config, Mapping, Owner } from '../../lib/core/mapping.ts';
import { commit, undo } from '../../lib/ops/actions.ts';
import { status } from '../../lib/ops/inspect.ts';
import { reconcile } from '../../lib/ops/reconcile.ts';
import { sync } from '../../lib/ops/sync.ts';
import { teardown } from '../../lib/ops/teardown.ts';
import type { FakeHost } from '../support/fake-host.ts';
import {
  addressOf,
  BOOT,
  CONFIG,
  claimsFor,
  createFakeHost,
  failureOf,
  flushRuleset,
  guestOf,
  holderOf,
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
  await reconcile(host);
});

const add = (m: Mapping) => sync(host, request(vmOwner(m.vm ?? 0), [m]));
const manual = (n: number): Owner => ({ kind: 'manual', guest: guestOf(n) });
const addManual = (n: number) => sync(host, request(manual(n), [mapping(n, { vm: null })]));
const deploy = (m: Mapping, pid: number) =>
  sync(host, request(vmOwner(m.vm ?? 0), [m], { action: 'deploy', holder: holderOf(pid), pending: true }));
const owners = () => host.store.all().files.map((file) => file.owner);

function expectHeld(...mappings: readonly Mapping[]): void {
  const seen = snapshot(host);
  expect(seen).toMatchObject(unitsOf(mappings));
  expect(seen.claims).toEqual(claimsFor(seen.files));
}

describe('the first reconcile', () => {
  it('loads the table, and the second one does nothing', async () => {
    const fresh = createFakeHost(CONFIG);
    expect(await reconcile(fresh)).toMatchObject({ table: ['the table ip kvm_ib is not there'], errors: [] });
    expect(snapshot(fresh)).toMatchObject({ table: true, pairs: [], files: [] });
    fresh.log.length = 0;
    expect(await reconcile(fresh)).toMatchObject({ table: [], changes: [], warnings: [] });
    expect(fresh.log.filter((line) => /^(?:write|remove|nat|record|forget)/.test(line))).toEqual([]);
  });

  it('does not need libvirt where no VM is mapped', async () => {
    host.active = undefined;
    await addManual(2);
    expect(await reconcile(host)).toMatchObject({ warnings: [] });
  });
});

describe('a VM', () => {
  it('whose domain is gone is released: alias, pair, conntrack, file', async () => {
    await add(mapping(2));
    host.log.length = 0;
    expect(await reconcile(host)).toMatchObject({ released: ['vm-2'], errors: [] });
    expect(host.log.filter((line) => /^(?:write|remove|nat\.|flush|delete)/.test(line))).toEqual([
      'write vm-2 removing',
      `deleteAlias ${addressOf(2)} ib0:2-0`,
      'nat.change',
      `flush mapping ${guestOf(2)} ${addressOf(2)}`,
      'remove vm-2',
    ]);
    expectHeld();
  });

  it('whose domain is active stays', async () => {
    await add(mapping(2));
    host.active = new Set([2]);
    expect(await reconcile(host)).toMatchObject({ changes: [], released: [] });
    expectHeld(mapping(2));
  });

  it('is not released while libvirt does not answer, and that is said', async () => {
    await add(mapping(2));
    host.active = undefined;
    const { released, warnings } = await reconcile(host);
    expect(released).toEqual([]);
    expect(warnings).toEqual(['libvirt does not answer: no mapping of a VM is released until it does']);
    expectHeld(mapping(2));
  });

  it('whose action is under way is left alone, mapped or not', async () => {
    await deploy(mapping(2), 50);
    host.kernel.addresses = [];
    const before = snapshot(host);
    const { left, changes } = await reconcile(host);
    expect(left).toEqual([{ owner: 'vm-2', why: 'its action is under way' }]);
    expect(changes).toEqual([]);
    expect(snapshot(host)).toEqual(before);
  });

  it('whose action died is kept with its domain, and released without it', async () => {
    await deploy(mapping(2), 50);
    await deploy(mapping(3), 50);
    host.dead.add(50);
    host.active = new Set([3]);
    expect(await reconcile(host)).toMatchObject({ released: ['vm-2'], left: [] });
    expectHeld(mapping(3));
    expect(host.store.read(vmOwner(3))?.phase).toEqual({ name: 'active', bootId: BOOT });
  });

  it('loses what its domain has no NIC for, detached by hand or let go late, and only that', async () => {
    const [first, second] = [mapping(2), mapping(3, { vm: 2, nic: 1 })];
    await sync(host, request(vmOwner(2), [first, second]));
    host.active = new Set([2]);
    expect(await reconcile(host)).toMatchObject({ changes: [], released: [] });
    host.interfaces.set(2, [first.mac ?? '']);
    expect((await status(host)).drift.length).toBeGreaterThan(0);
    expect(await reconcile(host)).toMatchObject({ released: [], errors: [] });
    expectHeld(first);
    expect((await status(host)).ok).toBe(true);
    host.interfaces.set(2, []);
    expect(await reconcile(host)).toMatchObject({ released: ['vm-2'], errors: [] });
    expectHeld();
  });

  it('keeps a mapping that was made without a MAC, whatever NICs its domain has', async () => {
    const bare = mapping(2, { mac: null });
    await sync(host, request(vmOwner(2), [bare]));
    host.active = new Set([2]);
    host.interfaces.set(2, []);
    expect(await reconcile(host)).toMatchObject({ changes: [], released: [] });
    expectHeld(bare);
  });

  it('whose action died is left alone while libvirt does not answer', async () => {
    await deploy(mapping(2), 50);
    host.dead.add(50);
    host.active = undefined;
    expect((await reconcile(host)).left).toEqual([
      { owner: 'vm-2', why: 'its action ended half-way, and libvirt does not answer' },
    ]);
    expectHeld(mapping(2));
  });

  it('whose removal was begun is released although its domain is active', async () => {
    await add(mapping(2));
    const file = host.store.read(vmOwner(2));
    if (file === undefined) throw new Error('no file');
    host.store.write({ ...file, phase: { name: 'removing' } });
    host.active = new Set([2]);
    await reconcile(host);
    expectHeld();
    expect(owners()).toEqual([]);
  });

  it('that lost its pair before the flows were dropped has them dropped', async () => {
    await add(mapping(2));
    const flow = {
      original: { source: guestOf(2), destination: '192.168.10.100' },
      reply: { source: '192.168.10.100', destination: addressOf(2) },
    };
    await flushRuleset(host.kernel);
    host.kernel.flows = [flow];
    await reconcile(host);
    expect(host.kernel.flows).toEqual([]);
  });
});

describe('mappings that no VM owns', () => {
  const config: Config = { ...CONFIG, static: [{ guest: guestOf(8), address: addressOf(8) }] };
  const fixed = mapping(8, { vm: null, mac: null, config });

  it('made by hand are never released by domains', async () => {
    await addManual(2);
    expect(await reconcile(host)).toMatchObject({ released: [], changes: [] });
    expectHeld(mapping(2, { vm: null }));
  });

  it('of the configuration are made, changed and removed by reconcile', async () => {
    host = restarted(host, config);
    await reconcile(host);
    expectHeld(fixed);
    expect(owners()).toEqual([{ kind: 'static', guest: guestOf(8) }]);

    const moved: Config = { ...CONFIG, static: [{ guest: guestOf(8), address: addressOf(9) }] };
    host = restarted(host, moved);
    await reconcile(host);
    expectHeld(mapping(8, { vm: null, mac: null, to: 9 }));
    expect(host.store.all().files).toMatchObject([{ phase: { name: 'active' }, previous: [] }]);

    host = restarted(host, CONFIG);
    expect(await reconcile(host)).toMatchObject({ released: [`static-${guestOf(8)}`] });
    expectHeld();
    expect(owners()).toEqual([]);
  });

  it('of the configuration yield to a VM that has the address, until it is gone', async () => {
    await add(mapping(8));
    host.active = new Set([8]);
    host = restarted(host, config);
    const { errors } = await reconcile(host);
    expect(errors).toMatchObject([{ code: 'conflict', why: 'vm-8 has it' }]);
    expect(errors[0]?.message).toContain('static-192.168.122.8');
    expectHeld(mapping(8));
    host.active = new Set();
    await reconcile(host);
    expectHeld(fixed);
  });

  it('of the configuration are refused to a VM', async () => {
    host = restarted(host, config);
    await reconcile(host);
    expect((await failureOf(add(mapping(8)))).fix).toContain('`static`');
    expectHeld(fixed);
  });

  it('of the configuration follow their network to another link', async () => {
    host = restarted(host, config);
    await reconcile(host);
    const other: Config = { ...config, networks: [network({ device: 'ib1' })] };
    host.kernel.links.set('ib1', { mtu: 2044, up: true, type: 32 });
    host = restarted(host, other);
    await reconcile(host);
    expectHeld(mapping(8, { vm: null, mac: null, config: other }));
  });
});

describe('the table', () => {
  beforeEach(async () => {
    for (const n of [2, 3]) await add(mapping(n));
    host.active = new Set([2, 3]);
  });

  it('that was flushed comes back with every pair, and flows that began without it are dropped', async () => {
    await flushRuleset(host.kernel);
    const foreign = {
      original: { source: guestOf(3), destination: '192.168.10.100' },
      reply: { source: '192.168.10.100', destination: guestOf(3) },
    };
    host.kernel.flows = [foreign];
    expect(await reconcile(host)).toMatchObject({ table: ['the table ip kvm_ib is not there'], flushed: 1 });
    expectHeld(mapping(2), mapping(3));
    expect(host.kernel.flows).toEqual([]);
  });

  it('of another configuration is brought to this one, and nothing else changes', async () => {
    const second = network({
      name: 'b',
      device: 'ib1',
      bridge: 'virbr2',
      guests: '10.9.0.0/24',
      addresses: '10.8.0.0/24',
    });
    host.kernel.links.set('ib1', { mtu: 2044, up: true, type: 32 }).set('virbr2', { mtu: 2044, up: true, type: 1 });
    host = restarted(host, { ...CONFIG, networks: [...CONFIG.networks, second] });
    const before = snapshot(host);
    const { table, changes } = await reconcile(host);
    expect(table.length).toBeGreaterThan(0);
    expect(changes).toEqual([]);
    expect(snapshot(host)).toEqual(before);
    expect(await reconcile(host)).toMatchObject({ table: [], changes: [] });
  });

  it('that was changed while VMs went keeps their pairs until their aliases are off', async () => {
    host.active = new Set([3]);
    host = restarted(host, { ...CONFIG, networks: CONFIG.networks.map((n) => ({ ...n, isolate: false })) });
    host.log.length = 0;
    await reconcile(host);
    expectHeld(mapping(3));
    const log = host.log.filter((line) => /^(?:nat\.|deleteAlias)/.test(line));
    expect(log).toEqual(['nat.load', `deleteAlias ${addressOf(2)} ib0:2-0`, 'nat.change']);
  });

  it('has strays taken out: pairs and bindings that no file knows', async () => {
    const stray = mapping(5);
    await host.nat.change({
      remove: { guestToIb: [], ibToGuest: [], macs: [], unbound: [] },
      add: {
        guestToIb: [stray],
        ibToGuest: [stray],
        macs: [
          { guest: stray.guest, mac: stray.mac ?? mapping(2).mac ?? never() },
          { guest: guestOf(2), mac: mapping(9).mac ?? never() },
          { guest: guestOf(6), mac: mapping(6).mac ?? never() },
        ],
        unbound: [guestOf(3), guestOf(7)],
      },
      comments: {},
    });
    const { errors } = await reconcile(host);
    expect(errors).toEqual([]);
    expectHeld(mapping(2), mapping(3));
  });

  it('keeps the pair of an alias whose file was lost, for the host would answer there', async () => {
    host.store.removeAll();
    const { errors } = await reconcile(host);
    expect(errors).toEqual([]);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2), mapping(3)]));
    await add(mapping(2));
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2), mapping(3)]));
  });

  it('is loaded anew when it is not known what it was loaded for', async () => {
    host.store.writeTable(undefined);
    expect(await reconcile(host)).toMatchObject({ table: ['it is not known what it was loaded for'] });
    expect(host.store.readTable()).toBeDefined();
    expect(await reconcile(host)).toMatchObject({ table: [] });
  });
});

function never(): never {
  throw new Error('a mapping of the test has no MAC');
}

describe('a state file that cannot be read', () => {
  const path = () => join(host.store.directory, 'mappings', 'vm-2.json');
  beforeEach(async () => {
    for (const n of [2, 3]) await add(mapping(n));
    host.active = new Set([3]);
    truncateSync(path(), 30);
  });

  it('is reported, and nothing unknown is removed while it is there', async () => {
    const { warnings, errors } = await reconcile(host);
    expect(errors).toEqual([]);
    expect(warnings.join()).toContain(path());
    expect(warnings.join()).toContain('nothing unknown is removed');
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2), mapping(3)]));
  });

  it('does not lose its pair when the table is loaded for another configuration', async () => {
    host = restarted(host, { ...CONFIG, networks: CONFIG.networks.map((n) => ({ ...n, isolate: false })) });
    await reconcile(host);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2), mapping(3)]));
    host = restarted(host, CONFIG);
    await add(mapping(4));
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2), mapping(3), mapping(4)]));
  });

  it('keeps its addresses from others', async () => {
    expect(await failureOf(add(mapping(2, { vm: 9 })))).toMatchObject({ code: 'failed' });
  });

  it('that is moved away leaves pair and alias, which nothing proves ours; the pair goes with the alias', async () => {
    renameSync(path(), `${path()}.bad`);
    await reconcile(host);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2), mapping(3)]));
    host.kernel.addresses = host.kernel.addresses.filter((entry) => entry.address !== addressOf(2));
    await reconcile(host);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(3)]));
  });

  it('of a static mapping is not written over', async () => {
    const config: Config = { ...CONFIG, static: [{ guest: guestOf(8), address: addressOf(8) }] };
    host = restarted(host, config);
    await reconcile(host);
    const broken = join(host.store.directory, 'mappings', `static-${guestOf(8)}.json`);
    writeFileSync(broken, '{');
    const { warnings, errors } = await reconcile(host);
    expect(errors).toEqual([]);
    expect(warnings.join()).toContain(broken);
    expect(host.store.all().unreadable).toHaveLength(2);
  });
});

describe('what stands in the way', () => {
  it('of a missing link is said; its mappings wait, and come with it', async () => {
    await add(mapping(2));
    host.active = new Set([2]);
    host.kernel.links.delete('ib0');
    host.kernel.addresses = [];
    const { errors, warnings } = await reconcile(host);
    expect(errors).toEqual([]);
    expect(warnings).toEqual([`${guestOf(2)} <-> ${addressOf(2)} waits: this host has no link ib0`]);
    host.kernel.links.set('ib0', { mtu: 2044, up: true, type: 32 });
    await reconcile(host);
    expectHeld(mapping(2));
  });

  it('of a missing bridge does not hold up its mappings', async () => {
    await add(mapping(2));
    host.active = new Set([2]);
    host.kernel.links.delete('virbr1');
    host.kernel.addresses = [];
    await reconcile(host);
    expectHeld(mapping(2));
  });

  it.each([
    ['another link', { device: 'eth0', prefixLength: 24, label: 'eth0' }],
    ['a wider prefix', { device: 'ib0', prefixLength: 24, label: 'ib0:x' }],
    ['another label', { device: 'ib0', prefixLength: 32, label: 'ib0:x' }],
  ])('as an address of somebody else, on %s, is reported and stays; the rest is done', async (_, entry) => {
    await add(mapping(2));
    await add(mapping(3));
    host.active = new Set([2, 3]);
    const foreign = { ...entry, address: addressOf(2) };
    host.kernel.addresses = [foreign];
    const { errors } = await reconcile(host);
    expect(errors).toMatchObject([{ code: 'conflict', message: `Cannot take the IB address ${addressOf(2)}` }]);
    expect(host.kernel.addresses).toEqual([
      foreign,
      { device: IB0, address: addressOf(3), prefixLength: 32, label: 'ib0:3-0' },
    ]);
    host.kernel.addresses = host.kernel.addresses.slice(1);
    expect((await reconcile(host)).errors).toEqual([]);
    expectHeld(mapping(2), mapping(3));
  });

  it("as the host's own address in the range is an error, and what is there stays", async () => {
    await add(mapping(2));
    host.active = new Set([2]);
    host.kernel.addresses.push({ device: IB0, address: addressOf(9), prefixLength: 24, label: 'ib0' });
    expect((await reconcile(host)).errors).toMatchObject([{ code: 'conflict', message: 'Cannot serve network ib' }]);
    expect(snapshot(host).pairs).toEqual(unitsOf([mapping(2)]).pairs);
    expect(await failureOf(add(mapping(3)))).toMatchObject({ code: 'conflict' });
  });

  it('is not a configuration that no longer has the network: it is served until its last mapping ends', async () => {
    await add(mapping(2));
    host.active = new Set([2]);
    host = restarted(host, { networks: [network({ name: 'new', guests: '10.9.0.2-10.9.0.9' })], static: [] });
    expect(await reconcile(host)).toMatchObject({ errors: [], changes: [] });
    expect(await reconcile(host)).toMatchObject({ errors: [], changes: [], table: [] });
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2)]));
    const { ok, outdated } = await status(host);
    expect({ ok, outdated }).toMatchObject({ ok: true, outdated: [{ vm: 2, guest: guestOf(2), now: null }] });
    // What an action costs does not depend on it.
    host.log.length = 0;
    const config: Config = { networks: host.config.networks, static: [] };
    const next = resolveMapping(config, { guest: parseIpv4('10.9.0.3'), mac: null, vm: 3, nic: 0 });
    await sync(host, request(vmOwner(3), [next]));
    await sync(host, request(vmOwner(3), []));
    expect(host.log.filter((call) => ['all files', 'nft list', 'nat.load'].includes(call))).toEqual([]);
    // Repaired as any other.
    host.kernel.addresses = [];
    await reconcile(host);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2)]));
    host.active = new Set();
    expect((await reconcile(host)).table).toHaveLength(1);
    expectHeld();
    expect((await reconcile(host)).table).toEqual([]);
  });
});

describe('two claims on one address', () => {
  it('leave the later one as it is, and say so', async () => {
    await addManual(2);
    const other = mapping(2, { vm: 9 });
    host.store.write({
      version: 1,
      owner: vmOwner(9),
      phase: { name: 'active' },
      mappings: [other],
      previous: [],
      leftovers: [],
      detachedAliases: [],
      updated: '',
    });
    host.active = new Set([9]);
    const { errors } = await reconcile(host);
    expect(errors).toMatchObject([{ code: 'conflict', why: `manual-${guestOf(2)} has it` }]);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2, { vm: null })]));
  });
});

describe('a dry run', () => {
  it('says what would be done and changes nothing', async () => {
    for (const n of [2, 3]) await add(mapping(n));
    host.active = new Set([3]);
    host.kernel.addresses = [];
    await flushRuleset(host.kernel);
    const before = snapshot(host);
    const result = await reconcile(host, { dryRun: true });
    expect(result).toMatchObject({ released: ['vm-2'], table: ['the table ip kvm_ib is not there'] });
    expect(result.changes.map((c) => c.kind)).toContain('add-alias');
    expect(snapshot(host)).toEqual(before);
    expect(host.kernel.table).toBeUndefined();
  });
});

describe('a teardown', () => {
  it('is refused while VMs are mapped', async () => {
    await add(mapping(2));
    const before = snapshot(host);
    expect(await failureOf(teardown(host, {}))).toMatchObject({ code: 'conflict', why: 'VMs are mapped: 2' });
    expect(snapshot(host)).toEqual(before);
  });

  it('is refused while a state file cannot be read', async () => {
    await addManual(2);
    truncateSync(join(host.store.directory, 'mappings', `manual-${guestOf(2)}.json`), 30);
    expect(await failureOf(teardown(host, {}))).toMatchObject({ code: 'conflict' });
  });

  it('takes all that is ours and nothing else: aliases and pairs first, the table last', async () => {
    const others = { device: 'ib0', address: addressOf(9), prefixLength: 32, label: 'ib0:vip' };
    host.kernel.addresses = [others];
    await addManual(2);
    await add(mapping(3));
    host.log.length = 0;
    await teardown(host, { force: true });
    expect(snapshot(host)).toMatchObject({
      table: false,
      files: [],
      claims: [],
      aliases: ['ib0 192.168.10.209/32 ib0:vip'],
    });
    const log = host.log.filter((line) => /^(?:nat|deleteAlias|flush)/.test(line)).map((line) => line.split(' ')[0]);
    expect(log).toEqual(['deleteAlias', 'deleteAlias', 'nat.change', 'flush', 'nat.remove']);
  });

  it('shows in a dry run what it would take, and takes nothing', async () => {
    await addManual(2);
    const before = snapshot(host);
    const { changes, table } = await teardown(host, { dryRun: true });
    expect(table).toBe(true);
    expect(changes.map((c) => c.kind)).toEqual(['delete-alias', 'change-pairs', 'flush-mapping']);
    expect(snapshot(host)).toEqual(before);
  });

  it('of a host that has nothing is fine', async () => {
    await teardown(host, {});
    await teardown(host, {});
    expect(snapshot(host)).toMatchObject({ table: false, files: [] });
  });
});

// Sequences -----------------------------------------------------------------------------------------------------------

type Operation =
  | {
      readonly kind: 'sync';
      readonly vm: number;
      readonly wish: readonly [number, number, number | null][];
      readonly pending: boolean;
    }
  | { readonly kind: 'manual'; readonly guest: number; readonly to: number | null }
  | { readonly kind: 'commit' | 'undo' | 'die' | 'start' | 'stop'; readonly vm: number }
  | { readonly kind: 'reconcile' | 'flush' | 'silence' };

const few = fc.integer({ min: 2, max: 5 });
const vmNumber = fc.integer({ min: 1, max: 3 });
const wish = fc.array(fc.tuple(few, few, fc.option(fc.integer({ min: 1, max: 2 }))), { maxLength: 2 });
const operation: fc.Arbitrary<Operation> = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({ kind: fc.constant('sync' as const), vm: vmNumber, wish, pending: fc.boolean() }),
  },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('manual' as const), guest: few, to: fc.option(few) }) },
  {
    weight: 6,
    arbitrary: fc.record({ kind: fc.constantFrom('commit', 'undo', 'die', 'start', 'stop'), vm: vmNumber }),
  },
  { weight: 3, arbitrary: fc.record({ kind: fc.constantFrom('reconcile', 'flush', 'silence') }) },
);

/** Each VM's actions have a process of their own. */
const pidOf = (vm: number) => 100 + vm;

async function perform(on: FakeHost, op: Operation): Promise<unknown> {
  switch (op.kind) {
    case 'sync': {
      on.dead.delete(pidOf(op.vm));
      const mappings = op.wish.map(([guest, to, mac], nic) => mapping(guest, { vm: op.vm, nic, to, mac }));
      return sync(
        on,
        request(vmOwner(op.vm), mappings, {
          holder: holderOf(pidOf(op.vm)),
          pending: op.pending && mappings.length > 0,
        }),
      );
    }
    case 'manual': {
      const mappings = op.to === null ? [] : [mapping(op.guest, { vm: null, to: op.to })];
      return sync(on, request(manual(op.guest), mappings, { holder: holderOf(99) }));
    }
    case 'commit':
      return commit(on, vmOwner(op.vm), holderOf(pidOf(op.vm)));
    case 'undo':
      return undo(on, vmOwner(op.vm), holderOf(pidOf(op.vm)), 'deploy');
    case 'die':
      return on.dead.add(pidOf(op.vm));
    case 'start':
      return on.active?.add(op.vm);
    case 'stop':
      return on.active?.delete(op.vm);
    case 'silence':
      on.active = on.active === undefined ? new Set([1]) : undefined;
      return undefined;
    case 'flush':
      return flushRuleset(on.kernel);
    case 'reconcile':
      return reconcile(on);
  }
}

/** The kernel holds the union of the files, no address is there twice, and the index leads to the right file. */
function expectLawful(on: FakeHost, table: boolean): void {
  const seen = snapshot(on);
  const mappings = seen.files.flatMap((file) => file.mappings);
  const addresses = mappings.flatMap((m) => [m.guest, m.address]);
  expect(new Set(addresses).size).toBe(addresses.length);
  expect(seen.files.some((file) => file.phase.name === 'removing')).toBe(false);
  const { aliases, ...elements } = unitsOf(mappings);
  expect(seen.aliases).toEqual(aliases);
  if (table) expect(seen).toMatchObject(elements);
  expect(seen.claims).toEqual(claimsFor(seen.files));
}

describe('after any sequence of operations', () => {
  it('kernel, files and index agree; what failed changed nothing; a repetition does nothing', async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(operation, { minLength: 1, maxLength: 14 }), async (operations) => {
        const on = createFakeHost(CONFIG);
        await reconcile(on);
        let table = true;
        for (const op of operations) {
          const before = snapshot(on);
          const outcome = await perform(on, op).then(
            () => 'done',
            (error: unknown) => String(error),
          );
          if (op.kind === 'flush') table = false;
          // Whoever found no table and did something has made it whole.
          else table ||= on.kernel.table !== undefined;
          if (outcome !== 'done') {
            const after = snapshot(on);
            expect(table ? after : { ...after, table: before.table }).toEqual(
              table && !before.table ? { ...before, ...pick(after, 'table', 'pairs', 'macs') } : before,
            );
          }
          expectLawful(on, table);
          if (op.kind === 'sync' && outcome === 'done' && !op.pending) {
            on.log.length = 0;
            expect(await perform(on, op)).toMatchObject({ changes: [] });
            expect(on.log.filter((line) => /^(?:write|remove|nat|flush)/.test(line))).toEqual([]);
          }
        }
        // All domains and processes end: nothing of the VMs is left.
        on.active = new Set();
        for (const vm of [1, 2, 3]) on.dead.add(pidOf(vm));
        expect((await reconcile(on)).errors).toEqual([]);
        expectLawful(on, true);
        expect(on.store.all().files.filter((file) => file.owner.kind === 'vm')).toEqual([]);
        expect(await reconcile(on)).toMatchObject({ changes: [], table: [], released: [], left: [] });
      }),
      { numRuns: 150 },
    );
  }, 60_000);
});

function pick<T extends object, K extends keyof T>(of: T, ...keys: readonly K[]): Pick<T, K> {
  return Object.fromEntries(keys.map((key) => [key, of[key]])) as Pick<T, K>;
}
