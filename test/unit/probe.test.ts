/** When the fabric is asked for an address, and what follows from an answer: on the fake host. */
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import type { Ipv4 } from '../../lib/core/address.ts';
import type { Mapping } from '../../lib/core/mapping.ts';
import { FIXED_PATHS, pathsFrom } from '../../lib/host/paths.ts';
import { undo } from '../../lib/ops/actions.ts';
import { status } from '../../lib/ops/inspect.ts';
import { reconcile } from '../../lib/ops/reconcile.ts';
import { sync } from '../../lib/ops/sync.ts';
import type { FakeHost } from '../support/fake-host.ts';
import {
  addressOf,
  CONFIG,
  createFakeHost,
  failureOf,
  guestOf,
  holderOf,
  IB0,
  mapping,
  network,
  request,
  snapshot,
  unitsOf,
  vmOwner,
} from '../support/fake-host.ts';

let host: FakeHost;
beforeEach(async () => {
  host = createFakeHost(CONFIG);
  host.active = new Set([2, 3]);
  await reconcile(host);
  host.log.length = 0;
});
afterEach(() => {
  vi.useRealTimers();
});

const OTHER = { hardware: '02:00:00:00:00:bb', how: 'has' } as const;
const add = (...mappings: readonly Mapping[]) => sync(host, request(vmOwner(mappings[0]?.vm ?? 2), mappings));
const probes = () => host.log.filter((line) => line.startsWith('probe '));
const answer = (address: Ipv4, how: 'has' | 'probes' = 'has') => host.kernel.others.set(address, { ...OTHER, how });

describe('sync', () => {
  it('asks for all addresses in one go, before it waits for the lock', async () => {
    let free: () => void = () => undefined;
    const held = host.withLock('another', () => new Promise<void>((resolve) => (free = resolve)));
    const adding = add(mapping(2), mapping(3, { vm: 2, nic: 1 }));
    await vi.waitFor(() => expect(probes()).toEqual([`probe ${addressOf(2)}, ${addressOf(3)}`]));
    expect(host.log).toHaveLength(1);
    free();
    await held;
    const { timings } = await adding;
    expect(probes()).toHaveLength(1);
    expect(timings.total).toBeGreaterThanOrEqual(timings.probe);
  });

  it.each([
    ['has', 'answers for it'],
    ['probes', 'probes for it'],
  ] as const)('is refused where another host %s the address, and changes nothing', async (how, text) => {
    const before = snapshot(host);
    answer(addressOf(3), how);
    const failure = await failureOf(add(mapping(2), mapping(3, { vm: 2, nic: 1 })));
    expect(failure).toMatchObject({ code: 'conflict', message: `Cannot take the IB address ${addressOf(3)}` });
    expect(failure.why).toContain(`02:00:00:00:00:bb ${text}`);
    expect(failure.fix).toContain('network ib');
    expect(snapshot(host)).toEqual(before);
    expect(await failureOf(sync(host, request(vmOwner(2), [mapping(3, { vm: 2 })], { dryRun: true })))).toMatchObject({
      code: 'conflict',
    });
  });

  it('lets the host that it moves away from answer', async () => {
    answer(addressOf(2));
    await sync(host, request(vmOwner(2), [mapping(2)], { except: [OTHER.hardware] }));
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2)]));
  });

  it('asks for nothing that is there, nor for a removal, nor for another label of what is there', async () => {
    await add(mapping(2));
    host.log.length = 0;
    answer(addressOf(2));
    expect((await add(mapping(2))).timings.probe).toBe(0);
    await add(mapping(2, { nic: 3 }));
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2, { nic: 3 })]));
    await sync(host, request(vmOwner(2), []));
    expect(probes()).toEqual([]);
  });

  it('tells of a conflict on this host first', async () => {
    await add(mapping(2));
    host.kernel.addresses = [];
    answer(addressOf(2));
    expect((await failureOf(sync(host, request(vmOwner(3), [mapping(2, { vm: 3 })])))).why).toContain('vm-2');
  });

  it('asks under the lock for what was local before it, and is not any more', async () => {
    host.kernel.addresses = [{ device: IB0, address: addressOf(2), prefixLength: 32, label: 'ib0:9-0' }];
    let free: () => void = () => undefined;
    const held = host.withLock('another', () => new Promise<void>((resolve) => (free = resolve)));
    answer(addressOf(2));
    const adding = failureOf(add(mapping(2)));
    await new Promise((resolve) => setImmediate(resolve));
    expect(probes()).toEqual([]);
    host.kernel.addresses = [];
    free();
    await held;
    expect(await adding).toMatchObject({ code: 'conflict' });
    expect(probes()).toHaveLength(1);
  });

  it('asks again under the lock when it waited for it too long', async () => {
    vi.useFakeTimers();
    let free: () => void = () => undefined;
    const held = host.withLock('another', () => new Promise<void>((resolve) => (free = resolve)));
    const adding = failureOf(add(mapping(2)));
    await vi.waitFor(() => expect(probes()).toHaveLength(1));
    answer(addressOf(2));
    vi.advanceTimersByTime(11_000);
    free();
    await held;
    expect(await adding).toMatchObject({ code: 'conflict' });
    expect(probes()).toHaveLength(2);
  });

  it('asks before undo takes an earlier address again', async () => {
    await add(mapping(2));
    const pending = { action: 'deploy', holder: holderOf(50), pending: true };
    await sync(host, request(vmOwner(2), [mapping(2, { to: 5 })], pending));
    answer(addressOf(2));
    expect(await failureOf(undo(host, vmOwner(2), holderOf(50), 'deploy'))).toMatchObject({ code: 'conflict' });
  });

  it('does not ask where the network says so', async () => {
    host = createFakeHost({ ...CONFIG, networks: [{ ...network(), probe: false }] });
    answer(addressOf(2));
    await add(mapping(2));
    expect(probes()).toEqual([]);
  });

  it('that cannot ask warns, once with the announcement', async () => {
    host.probeError = 'ib0 is deaf';
    expect((await add(mapping(2))).warnings).toEqual([`${addressOf(2)} was not probed on ib0: ib0 is deaf`]);
    const dry = await sync(host, request(vmOwner(3), [mapping(3)], { dryRun: true }));
    expect(dry.warnings).toEqual([`${addressOf(3)} was not probed on ib0: ib0 is deaf`]);
    host.announcementError = 'ib0 is down';
    expect((await sync(host, request(vmOwner(3), [mapping(3)]))).warnings).toEqual([
      `${addressOf(3)} was not announced on ib0: ib0 is down`,
    ]);
  });
});

describe('reconcile', () => {
  beforeEach(async () => {
    await add(mapping(2));
    await add(mapping(3));
    host.kernel.addresses = [];
    host.log.length = 0;
  });

  it('asks for all that it adds in one go, leaves alone what is answered, and does the rest', async () => {
    answer(addressOf(2));
    const { errors, changes } = await reconcile(host);
    expect(probes()).toEqual([`probe ${addressOf(2)}, ${addressOf(3)}`]);
    expect(errors).toMatchObject([{ code: 'conflict', message: `Cannot take the IB address ${addressOf(2)}` }]);
    expect(changes.filter(({ kind }) => kind === 'add-alias')).toMatchObject([{ address: addressOf(3) }]);
    // The file stays, the pair stays, and status says what is missing.
    expect(snapshot(host).pairs).toEqual(unitsOf([mapping(2), mapping(3)]).pairs);
    expect(host.store.read(vmOwner(2))).toMatchObject({ phase: { name: 'active' } });
    host.log.length = 0;
    expect((await status(host)).drift).toMatchObject([{ guest: guestOf(2), part: 'alias' }]);
    expect(probes()).toEqual([]);
    host.kernel.others.clear();
    expect((await reconcile(host)).errors).toEqual([]);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2), mapping(3)]));
  });

  it('finds the same with --dry-run', async () => {
    answer(addressOf(2));
    host.probeError = undefined;
    const { errors } = await reconcile(host, { dryRun: true });
    expect(errors).toMatchObject([{ code: 'conflict' }]);
    expect(host.kernel.addresses).toEqual([]);
  });

  it('asks for nothing where nothing is to be added', async () => {
    await reconcile(host);
    host.log.length = 0;
    await reconcile(host);
    expect(probes()).toEqual([]);
  });

  it('that cannot ask warns and goes on', async () => {
    host.probeError = 'ib0 is deaf';
    expect((await reconcile(host, { dryRun: true })).warnings).toHaveLength(2);
    const { warnings, errors } = await reconcile(host);
    expect(errors).toEqual([]);
    expect(warnings).toEqual([2, 3].map((n) => `${addressOf(n)} was not probed on ib0: ib0 is deaf`));
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2), mapping(3)]));
  });
});

it('the window may be set for the command line of root, as its paths may', () => {
  expect(pathsFrom({ KVM_IB_PROBE_MS: '20' }).probeMs).toBe(20);
  expect(pathsFrom({ KVM_IB_PROBE_MS: 'soon' }).probeMs).toBeUndefined();
  expect(pathsFrom({}).probeMs).toBeUndefined();
  expect(FIXED_PATHS).not.toHaveProperty('probeMs');
});
