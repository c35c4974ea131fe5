/**
 * Every changing step of every operation fails in turn, or the process stops there. The old state stands, or where that
 * cannot be, the next reconcile ends it.
 */
import { describe, expect, it } from 'vitest';
import { KvmIbError } from '../../lib/core/errors.ts';
import type { Config, Mapping } from '../../lib/core/mapping.ts';
import { mappingsOf } from '../../lib/core/state.ts';
import type { Links } from '../../lib/link/ports.ts';
import { commit, undo } from '../../lib/ops/actions.ts';
import type { Host } from '../../lib/ops/host.ts';
import { reconcile } from '../../lib/ops/reconcile.ts';
import { sync } from '../../lib/ops/sync.ts';
import { teardown } from '../../lib/ops/teardown.ts';
import type { FakeHost, Snapshot } from '../support/fake-host.ts';
import {
  addressOf,
  CONFIG,
  claimsFor,
  createFakeHost,
  createFakeKernel,
  flushRuleset,
  guestOf,
  holderOf,
  mapping,
  request,
  restarted,
  snapshot,
  unitsOf,
  vmOwner,
  withFaults,
} from '../support/fake-host.ts';

const HOLDER = 77;
const holder = holderOf(HOLDER);
const vm = vmOwner(2);

interface Case {
  /** What the host is like before. */
  readonly prepare: (host: FakeHost) => Promise<unknown>;
  readonly act: (host: Host) => Promise<unknown>;
}

const add = (host: Host, m: Mapping, more = {}) => sync(host, request(vmOwner(m.vm ?? 0), [m], { holder, ...more }));
const deploy = { action: 'deploy', pending: true };
/** Of another VM that is active all the time, so that there is something to be spared. */
const bystander = mapping(7);

const CASES: Readonly<Record<string, Case>> = {
  'an addition': {
    prepare: async () => undefined,
    act: (host) => add(host, mapping(2)),
  },
  'an addition that changes MTU and hairpin mode': {
    prepare: async (host) => {
      host.kernel.links.set('virbr1', { mtu: 1500, up: true, type: 1 });
      host.kernel.callsIptables = true;
      host.kernel.ports.push({ bridge: 'virbr1', name: 'vnet2', hairpin: false });
    },
    act: (host) => add(host, mapping(2)),
  },
  'a removal': {
    prepare: (host) => add(host, mapping(2)),
    act: (host) => sync(host, request(vm, [], { action: 'remove', holder })),
  },
  'a change of address': {
    prepare: (host) => add(host, mapping(2)),
    act: (host) => add(host, mapping(2, { to: 5, mac: 9 })),
  },
  'a deploy': {
    prepare: async () => undefined,
    act: (host) => add(host, mapping(2), deploy),
  },
  'a deploy over the leftovers of one that died': {
    prepare: async (host) => {
      await add(host, mapping(2));
      await add(host, mapping(2, { to: 5 }), { ...deploy, holder: holderOf(50) });
      host.dead.add(50);
    },
    act: (host) => add(host, mapping(2, { to: 6 }), deploy),
  },
  'a commit': {
    prepare: async (host) => {
      await add(host, mapping(2), deploy);
      host.kernel.callsIptables = true;
      host.kernel.ports.push({ bridge: 'virbr1', name: 'vnet2', hairpin: false });
    },
    act: (host) => commit(host, vm, holder),
  },
  'an undo': {
    prepare: (host) => add(host, mapping(2), deploy),
    act: (host) => undo(host, vm, holder, 'deploy'),
  },
  'an undo that goes back to another address': {
    prepare: async (host) => {
      await add(host, mapping(2));
      await add(host, mapping(2, { to: 5 }), deploy);
    },
    act: (host) => undo(host, vm, holder, 'deploy'),
  },
  'an addition without a table': {
    prepare: (host) => flushRuleset(host.kernel),
    act: (host) => add(host, mapping(2)),
  },
  'an addition that releases a stale rival': {
    prepare: async (host) => {
      const rival = [mapping(2, { vm: 3 }), mapping(4, { vm: 3, nic: 1 })];
      await sync(host, request(vmOwner(3), rival, { holder }));
    },
    act: (host) => add(host, mapping(2)),
  },
  'a removal of a mapping made by hand': {
    prepare: (host) =>
      sync(host, request({ kind: 'manual', guest: guestOf(3) }, [mapping(3, { vm: null, mac: null })])),
    act: (host) => sync(host, request({ kind: 'manual', guest: guestOf(3) }, [], { holder })),
  },
};

async function start(of: Case): Promise<FakeHost> {
  const host = createFakeHost(CONFIG, { kernel: createFakeKernel(CONFIG) });
  host.active = new Set([7]);
  await reconcile(host);
  await sync(host, request(vmOwner(7), [bystander]));
  await of.prepare(host);
  return host;
}

/** Runs the operation with its n-th changing call failing. @returns undefined when it has fewer calls than that */
async function fail(of: Case, host: FakeHost, n: number, mode: 'once' | 'on'): Promise<KvmIbError | undefined> {
  const faulty = withFaults(host, n, mode);
  const error = await of.act(faulty).then(
    () => undefined,
    (thrown: unknown) => thrown,
  );
  if (faulty.calls.length < n) {
    expect(error).toBeUndefined();
    return undefined;
  }
  if (!(error instanceof KvmIbError)) throw new Error(`fault ${n} of ${faulty.calls.join(', ')}: ${String(error)}`);
  return error;
}

/** Without the table and the pairs of others, which an operation that found no table may have brought back. */
function essence({ table: _, pairs, macs, counted, ...rest }: Snapshot): object {
  const others = new Set(Object.values(unitsOf([bystander])).flat());
  const own = (elements: readonly string[]) => elements.filter((element) => !others.has(element));
  return { ...rest, pairs: own(pairs), macs: own(macs), counted: own(counted) };
}

function expectConsistent(host: FakeHost, mappings: readonly Mapping[]): void {
  const seen = snapshot(host);
  expect(seen).toMatchObject(unitsOf(mappings));
  expect(seen.claims).toEqual(claimsFor(seen.files));
  expect(seen.files.filter((file) => file.phase.name !== 'active')).toEqual([]);
  const held = seen.files.flatMap(mappingsOf).map((m) => `${m.guest} ${m.address}`);
  expect(held.sort()).toEqual(mappings.map((m) => `${m.guest} ${m.address}`).sort());
}

const MOST_CALLS = 40;

describe.each(Object.entries(CASES))('%s', (_, of) => {
  it('of which one step fails leaves the old state, and says so with exit code 1', async () => {
    let failures = 0;
    for (let n = 1; n < MOST_CALLS; n++) {
      const host = await start(of);
      const before = snapshot(host);
      const error = await fail(of, host, n, 'once');
      if (error === undefined) break;
      failures += 1;
      expect(error, `fault ${n}`).toMatchObject({ code: 'failed', exit: 1, why: `fault ${n}` });
      expect(essence(snapshot(host)), `fault ${n}`).toEqual(essence(before));
      // What failed for a passing reason succeeds when it is tried again.
      await of.act(host);
    }
    expect(failures).toBeGreaterThan(0);
    expect(failures).toBeLessThan(MOST_CALLS - 1);
  });

  it('of which one step and every later one fails tells it with exit code 8, and the next reconcile repairs', async () => {
    const codes = new Set<string>();
    for (let n = 1; n < MOST_CALLS; n++) {
      const host = await start(of);
      const before = snapshot(host);
      const error = await fail(of, host, n, 'on');
      if (error === undefined) break;
      codes.add(error.code);
      const unchanged = JSON.stringify(essence(snapshot(host))) === JSON.stringify(essence(before));
      expect(error.exit, `fault ${n}: ${error.why}`).toSatisfy((exit) => exit === 8 || (exit === 1 && unchanged));
      host.dead.add(HOLDER);
      await reconcile(host);
      expectConsistent(host, [bystander, ...manualOf(host)]);
    }
    expect(codes).toContain('reversal-failed');
  });

  it.each([
    ['while the domain is active, ends mapped and active', true],
    ['while the domain is not active, ends with nothing left', false],
  ])('that is stopped at any step, %s', async (__, active) => {
    for (let n = 1; n < MOST_CALLS; n++) {
      const host = await start(of);
      const faulty = withFaults(host, n, 'on');
      const stopped = await of.act(faulty).then(
        () => false,
        () => true,
      );
      if (!stopped) break;
      const after = restarted(host);
      after.dead.add(HOLDER);
      if (active) after.active = new Set([7, 2]);
      const wish = after.store.read(vm);
      const { errors } = await reconcile(after);
      expect(errors).toEqual([]);
      // Before its first file is written an operation has not begun; a removal that has, is finished in any case.
      const mapped = active && wish !== undefined && wish.phase.name !== 'removing' ? wish.mappings : [];
      expectConsistent(after, [bystander, ...mapped, ...manualOf(after)]);
      const log = after.log.length;
      expect(await reconcile(after)).toMatchObject({ changes: [], table: [], released: [] });
      expect(after.log.slice(log).filter((line) => /^(?:write|remove|nat\.)/.test(line))).toEqual([]);
    }
  });

  it('succeeds when nothing fails, and is ended by reconcile when its VM is gone', async () => {
    const host = await start(of);
    await of.act(host);
    host.dead.add(HOLDER);
    const manual = manualOf(host);
    await reconcile(host);
    expectConsistent(host, [bystander, ...manual]);
  });
});

describe('a reconcile of many', () => {
  const config: Config = { ...CONFIG, static: [{ guest: guestOf(8), address: addressOf(8) }] };
  const want = [
    mapping(3),
    mapping(4, { to: 9 }),
    mapping(6, { vm: null, mac: null }),
    mapping(8, { vm: null, mac: null, config }),
    bystander,
  ];

  /** VM 2 is gone; 3 lost its alias; 4 died while its address changed; 5 is half removed; 6 is by hand; 8 is static and new. */
  async function startMany(): Promise<FakeHost> {
    const before = createFakeHost(CONFIG);
    before.active = new Set([7]);
    await reconcile(before);
    for (const n of [2, 3, 4, 5, 7]) await add(before, mapping(n));
    await sync(before, request({ kind: 'manual', guest: guestOf(6) }, [mapping(6, { vm: null, mac: null })]));
    await add(before, mapping(4, { to: 9 }), deploy);
    await sync(withFaults(before, 3, 'on'), request(vmOwner(5), [])).catch(() => undefined);
    before.kernel.addresses = before.kernel.addresses.filter((entry) => entry.address !== addressOf(3));
    const host = restarted(before, config);
    host.active = new Set([3, 4, 7]);
    host.dead.add(HOLDER);
    return host;
  }

  it('brings all of it right at once', async () => {
    const host = await startMany();
    const result = await reconcile(host);
    expect(result).toMatchObject({ errors: [], released: ['vm-2', 'vm-5'], left: [] });
    expectConsistent(host, want);
  });

  it.each(['once', 'on'] as const)('ends right after the next one, when a step fails (%s)', async (mode) => {
    let faults = 0;
    for (let n = 1; n < MOST_CALLS; n++) {
      const host = await startMany();
      const faulty = withFaults(host, n, mode);
      const outcome = await reconcile(faulty).then(
        ({ errors }) => errors,
        (error: unknown) => [error],
      );
      if (faulty.calls.length < n) break;
      faults += 1;
      for (const error of outcome) expect(error).toBeInstanceOf(KvmIbError);
      // Nobody who is well loses anything, whatever fails.
      const seen = snapshot(host);
      const well = unitsOf([bystander, mapping(6, { vm: null, mac: null })]);
      for (const part of ['pairs', 'macs', 'counted', 'aliases'] as const)
        expect(seen[part]).toEqual(expect.arrayContaining([...well[part]]));
      expect(seen.files.map((file) => file.owner)).toEqual(
        expect.arrayContaining([vmOwner(7), { kind: 'manual', guest: guestOf(6) }]),
      );
      const next = restarted(host);
      expect((await reconcile(next)).errors).toEqual([]);
      expectConsistent(next, want);
    }
    expect(faults).toBeGreaterThan(8);
  });

  it('does the rest when one mapping cannot be helped', async () => {
    const host = await startMany();
    const links: Links = {
      ...host.links,
      addAlias: async (device, address, label) => {
        if (address === addressOf(3)) throw new KvmIbError('failed', 'Cannot add the alias', { why: 'no reason' });
        return host.links.addAlias(device, address, label);
      },
    };
    const result = await reconcile({ ...host, links });
    expect(result.errors.map((error) => error.why)).toEqual(['no reason']);
    const seen = snapshot(host);
    const rest = unitsOf(want.filter((m) => m.guest !== guestOf(3)));
    expect(seen.aliases).toEqual(rest.aliases);
    expect(seen.files.every((file) => file.phase.name === 'active')).toBe(true);
    expect((await reconcile(host)).errors).toEqual([]);
    expectConsistent(host, want);
  });

  it('does the mappings when the MTU of the bridge cannot be set', async () => {
    const host = await startMany();
    host.kernel.links.set('virbr1', { mtu: 1500, up: true, type: 1 });
    const links: Links = {
      ...host.links,
      setMtu: () => Promise.reject(new KvmIbError('failed', 'Cannot set the MTU', { why: 'EINVAL' })),
    };
    expect((await reconcile({ ...host, links })).errors.map((error) => error.why)).toEqual(['EINVAL']);
    expectConsistent(host, want);
  });
});

describe('a teardown', () => {
  it('of which a step fails leaves everything as it was', async () => {
    let faults = 0;
    for (let n = 1; n < MOST_CALLS; n++) {
      const host = createFakeHost(CONFIG);
      await reconcile(host);
      await add(host, mapping(2));
      await add(host, mapping(3));
      const before = snapshot(host);
      const faulty = withFaults(host, n);
      const error = await teardown(faulty, { force: true }).then(
        () => undefined,
        (thrown: unknown) => thrown,
      );
      if (faulty.calls.length < n) break;
      faults += 1;
      const last = faulty.calls[n - 1] === 'store.removeAll';
      // With the table gone there is no way back; what is left is state that says `removing`.
      expect(error, `fault ${n}`).toMatchObject(last ? { code: 'reversal-failed' } : { code: 'failed' });
      if (!last) expect(snapshot(host), `fault ${n}`).toEqual(before);
      await teardown(host, { force: true });
      expect(snapshot(host)).toMatchObject({ table: false, aliases: [], files: [], claims: [] });
    }
    expect(faults).toBeGreaterThan(5);
  });
});

function manualOf(host: FakeHost): readonly Mapping[] {
  return host.store.all().files.flatMap((file) => (file.owner.kind === 'manual' ? file.mappings : []));
}
