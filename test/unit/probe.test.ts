/** When the fabric is asked for an address, and what follows from an answer: on the fake host. */
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import type { Ipv4 } from '../../lib/core/address.ts';
import { KvmIbError } from '../../lib/core/errors.ts';
import type { Mapping } from '../../lib/core/mapping.ts';
import { FIXED_PATHS, pathsFrom } from '../../lib/host/paths.ts';
import { undo } from '../../lib/ops/actions.ts';
import { announce } from '../../lib/ops/announce.ts';
import { status } from '../../lib/ops/inspect.ts';
import { reconcile } from '../../lib/ops/reconcile.ts';
import { sync } from '../../lib/ops/sync.ts';
import type { FakeHost } from '../support/fake-host.ts';
import {
  addressOf,
  CONFIG,
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
    // The file stays. The pair goes, or the guest would still send from an address that is another host's.
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(3)]));
    expect(host.store.read(vmOwner(2))).toMatchObject({ phase: { name: 'active' } });
    host.log.length = 0;
    // status says what is missing, and who has it; reconcile does nothing any more.
    const [drift, ...others] = (await status(host)).drift;
    expect(others).toEqual([]);
    expect(drift).toMatchObject({ guest: guestOf(2), part: 'alias' });
    expect(drift?.observed).toContain(OTHER.hardware);
    expect(drift?.fix).toContain('virsh destroy one-2 here');
    expect(probes()).toEqual([`probe ${addressOf(2)}`]);
    expect(await reconcile(host)).toMatchObject({ changes: [], errors: [{ code: 'conflict' }] });
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

describe('an alias that stands on a link that was away', () => {
  const ib0 = () => host.kernel.links.get('ib0') ?? expect.fail('no ib0');
  const away = () => void Object.assign(ib0(), { carrierChanges: (ib0().carrierChanges ?? 2) + 2 });
  const said = () => host.log.filter((line) => /^(?:announce|repeat|record links)/.test(line));
  beforeEach(async () => {
    await add(mapping(2));
    await add(mapping(3));
    await reconcile(host);
    host.log.length = 0;
  });

  it('is asked for before it is announced again', async () => {
    away();
    await reconcile(host);
    expect(host.log.filter((line) => /^(?:probe|announce)/.test(line))).toEqual([
      `probe ${addressOf(2)}, ${addressOf(3)}`,
      `announce ${addressOf(2)}`,
      `announce ${addressOf(3)}`,
    ]);
  });

  it('and that another host answers for goes, with its pair and flows, is not announced, and its file stays', async () => {
    away();
    answer(addressOf(2));
    const { errors, announced, changes } = await reconcile(host);
    expect(errors).toMatchObject([{ code: 'conflict', message: `Cannot keep the IB address ${addressOf(2)}` }]);
    expect(errors[0]?.why).toMatch(/02:00:00:00:00:bb answers for it; one-2 is active on this host/);
    expect(errors[0]?.fix).toContain('virsh destroy one-2');
    expect(announced).toEqual([{ device: 'ib0', why: 'the link was down', addresses: [addressOf(3)] }]);
    expect(changes.map(({ kind }) => kind)).toEqual(['delete-alias', 'change-pairs', 'flush-mapping']);
    expect(said().filter((line) => line.includes(addressOf(2)))).toEqual([]);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(3)]));
    expect(host.store.read(vmOwner(2))).toMatchObject({ phase: { name: 'active' }, mappings: [mapping(2)] });
    // And so it stays, also when the table is loaded anew; until the other one is gone.
    expect(await reconcile(host)).toMatchObject({ changes: [], announced: [] });
    await flushRuleset(host.kernel);
    await reconcile(host);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(3)]));
    host.kernel.others.clear();
    host.log.length = 0;
    expect((await reconcile(host)).errors).toEqual([]);
    expect(said()).toContain(`announce ${addressOf(2)}`);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2), mapping(3)]));
    expect((await status(host)).ok).toBe(true);
  });

  it('goes also while libvirt does not answer; and for good once its domain has ended', async () => {
    away();
    answer(addressOf(2));
    host.active = undefined;
    expect((await reconcile(host)).errors).toMatchObject([{ code: 'conflict' }]);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(3)]));
    host.active = new Set([3]);
    expect(await reconcile(host)).toMatchObject({ errors: [], released: ['vm-2'] });
    expect(host.store.read(vmOwner(2))).toBeUndefined();
  });

  it('with --dry-run it is only said', async () => {
    away();
    answer(addressOf(2));
    const { errors, announced, changes } = await reconcile(host, { dryRun: true });
    expect(errors).toHaveLength(1);
    expect(announced).toMatchObject([{ addresses: [addressOf(3)] }]);
    expect(changes.map(({ kind }) => kind)).toContain('delete-alias');
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2), mapping(3)]));
    expect(said()).toEqual([]);
  });

  it('and that another host only probes for stays: the kernel answers that host', async () => {
    away();
    host.kernel.others.set(addressOf(2), { ...OTHER, how: 'probes' });
    expect(await reconcile(host)).toMatchObject({
      errors: [],
      announced: [{ addresses: [addressOf(2), addressOf(3)] }],
    });
  });

  it('of an action that is under way is left to it, not announced, and looked at again', async () => {
    await sync(host, request(vmOwner(2), [mapping(2)], { action: 'reboot', holder: holderOf(50), pending: true }));
    away();
    answer(addressOf(2));
    for (let n = 0; n < 2; n++) {
      host.log.length = 0;
      const { errors, announced } = await reconcile(host);
      expect(errors).toMatchObject([{ code: 'conflict' }]);
      expect(announced).toMatchObject([{ addresses: [addressOf(3)] }]);
      expect(said()).toEqual([`announce ${addressOf(3)}`, `repeat ${addressOf(3)} ib0:3-0`]);
      expect(snapshot(host)).toMatchObject(unitsOf([mapping(2), mapping(3)]));
    }
    host.dead.add(50);
    await reconcile(host);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(3)]));
    expect(said()).toContain('record links');
  });

  it('and that cannot be taken off is looked at again', async () => {
    away();
    answer(addressOf(2));
    const { deleteAlias } = host.links;
    const links: FakeHost['links'] = {
      ...host.links,
      deleteAlias: async (device, address, label) => {
        if (address === addressOf(2)) throw new KvmIbError('failed', 'Cannot remove it');
        await deleteAlias(device, address, label);
      },
    };
    expect((await reconcile({ ...host, links })).errors).toHaveLength(2);
    expect(said()).not.toContain('record links');
    await reconcile(host);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(3)]));
  });

  it('is not asked for where the network says so', async () => {
    const config = { ...CONFIG, networks: CONFIG.networks.map((one) => ({ ...one, probe: false })) };
    const deaf = restarted(host, config);
    away();
    answer(addressOf(2));
    expect(await reconcile(deaf)).toMatchObject({
      errors: [],
      announced: [{ addresses: [addressOf(2), addressOf(3)] }],
    });
  });

  it('says nothing while the link has no carrier, and asks when it is back', async () => {
    host.kernel.links.set('ib0', { ...ib0(), carrierChanges: 3, running: false });
    answer(addressOf(2));
    expect(await reconcile(host)).toMatchObject({ announced: [], errors: [] });
    expect(probes()).toEqual([]);
    host.kernel.links.set('ib0', { ...ib0(), carrierChanges: 4, running: true });
    expect((await reconcile(host)).errors).toHaveLength(1);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(3)]));
  });

  it('`announce` does not announce what another host answers for, and says who', async () => {
    answer(addressOf(2));
    const { announced, errors } = await announce(host, { kind: 'all' });
    expect(announced).toMatchObject([{ address: addressOf(3) }]);
    expect(errors).toMatchObject([{ code: 'conflict', message: `Cannot announce ${addressOf(2)}` }]);
    expect(errors[0]?.why).toContain(OTHER.hardware);
    expect(said()).toEqual([`announce ${addressOf(3)}`, `repeat ${addressOf(3)} ib0:3-0`]);
    expect((await announce(host, { kind: 'vm', vm: 2 }, { dryRun: true })).errors).toHaveLength(1);
  });
});

describe('two hosts that ask at the same time', () => {
  /** The other one asks too, as long as it does not give up. */
  const asks = (hardware: string, rounds: number): void => {
    const { probe } = host.prober;
    let left = rounds;
    Object.assign(host, {
      prober: {
        probe: async (items: Parameters<typeof probe>[0]) => {
          if (left > 0) host.kernel.others.set(addressOf(2), { hardware, how: 'probes' });
          else host.kernel.others.delete(addressOf(2));
          left -= 1;
          return probe(items);
        },
      },
    });
  };
  beforeEach(async () => {
    await add(mapping(2));
    host.kernel.addresses = [];
    host.log.length = 0;
  });
  const own = `${'00:'.repeat(19)}01`;
  const [lower, higher] = ['00', '02'].map((end) => own.replace(/01$/, end));

  it('do not both give up: the one with the lower hardware address asks once more, and takes it', async () => {
    asks(higher ?? '', 1);
    expect((await reconcile(host)).errors).toEqual([]);
    expect(probes()).toHaveLength(2);
    expect(snapshot(host)).toMatchObject(unitsOf([mapping(2)]));
  });

  it('nor both take it', async () => {
    asks(lower ?? '', 1);
    expect((await reconcile(host)).errors[0]?.why).toContain('is about to take it');
    expect(probes()).toHaveLength(1);
    expect(snapshot(host).aliases).toEqual([]);
  });

  it('nor does it take it from one that asks on', async () => {
    asks(higher ?? '', 2);
    expect((await reconcile(host)).errors).toHaveLength(1);
    expect(snapshot(host).aliases).toEqual([]);
  });

  it('the flags of an IPoIB address do not count', async () => {
    asks(`80${lower?.slice(2)}`, 1);
    expect((await reconcile(host)).errors).toHaveLength(1);
    expect(probes()).toHaveLength(1);
  });
});

it('the window may be set for the command line of root, as its paths may', () => {
  expect(pathsFrom({ KVM_IB_PROBE_MS: '20' }).probeMs).toBe(20);
  expect(pathsFrom({ KVM_IB_PROBE_MS: 'soon' }).probeMs).toBeUndefined();
  expect(pathsFrom({}).probeMs).toBeUndefined();
  expect(FIXED_PATHS).not.toHaveProperty('probeMs');
});
