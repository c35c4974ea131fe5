/**
 * Live migration between two hypervisors with real libvirt, QEMU, ssh and sudo: that no connection is lost, how long the
 * guest is not heard, and who has the address after every failure on the way.
 */
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { requireOwnNetns } from '../support/netns.ts';
import {
  abortJob,
  cutSsh,
  enginesEnded,
  killDriver,
  killEngine,
  killQemu,
  occupyName,
  occupyPort,
  reconcileBoth,
  slowDown,
} from '../support/vm/faults.ts';
import type { GuestImage } from '../support/vm/guest.ts';
import { guestImage } from '../support/vm/guest.ts';
import { FABRIC } from '../support/vm/lab.ts';
import type { Connection } from '../support/vm/load.ts';
import { lostOf, startLoad, summary } from '../support/vm/load.ts';
import type { CallOptions } from '../support/vm/moves.ts';
import {
  CLEAN,
  deployOn,
  holding,
  holdings,
  migrate,
  NOTHING,
  owned,
  pairGuest,
  pairLog,
  reached,
  shutDown,
  statuses,
} from '../support/vm/moves.ts';
import type { DriverAnswer } from '../support/vm/opennebula.ts';
import type { HostName, Pair } from '../support/vm/pair.ts';
import { startPair } from '../support/vm/pair.ts';
import { tryTool, waitFor } from '../support/vm/process.ts';
import type { Split, Timeline } from '../support/vm/watch.ts';
import { describeSplit, median, split, watchMove } from '../support/vm/watch.ts';

requireOwnNetns();

const GUEST = pairGuest(2);
/** One on each host, that talk with it. */
const [FIRST_PEER, SECOND_PEER] = [pairGuest(3), pairGuest(4)];
const THERE = ['kvmib01', 'kvmib02'] as const;
const BACK = ['kvmib02', 'kvmib01'] as const;
const MOVED = { code: 0, stderr: '' };

let pair: Pair;
let image: GuestImage;

/** What the hosts hold of the guest when it runs on one of them and all is well. */
function at(host: HostName) {
  return { kvmib01: NOTHING, kvmib02: NOTHING, [host]: owned(GUEST) };
}

const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

beforeAll(async () => {
  image = await guestImage();
  pair = await startPair();
});

afterAll(() => pair?.stop());

afterEach((run) => {
  if (run.task.result?.state === 'fail' && pair !== undefined) console.error(pairLog(pair, [GUEST]));
});

/** A command line typed on the front-end: ssh as oneadmin, with its agent. */
const onHost = (host: 'kvmib01' | 'kvmib02', command: string) =>
  tryTool(pair.frontEnd.ssh(host, command), { env: pair.frontEnd.env });

describe('the hosts', () => {
  test('are two, and kvm-ib is installed on both', async () => {
    const { kvmib01, kvmib02 } = pair.hosts;
    const identify = ['/usr/bin/virsh', '-r', '-c', 'qemu:///system', 'capabilities'] as const;
    const ids = await Promise.all(
      [kvmib01, kvmib02].map(async (host) => /<uuid>([^<]*)</.exec(await host.run([...identify]))?.[1]),
    );
    expect(new Set(ids).size).toBe(2);
    expect(await statuses(pair)).toEqual(CLEAN);
    expect(await kvmib01.run(['/bin/cat', '/sys/class/net/virbr1/address'])).toBe('52:54:00:00:7a:01\n');
    expect(await kvmib02.run(['/bin/cat', '/sys/class/net/virbr1/address'])).toBe('52:54:00:00:7a:02\n');
  });

  test('oneadmin reaches one from the other by the agent alone, and may start the engine and nothing else as root', async () => {
    const other = "ssh kvmib02 'hostname; id -un; virsh -c qemu:///system list --name'";
    expect(await onHost('kvmib01', other)).toMatchObject({ status: 0, stdout: 'kvmib02\noneadmin\n\n' });
    expect((await onHost('kvmib01', `SSH_AUTH_SOCK= ${other}`)).stderr).toContain('Permission denied');
    const engine = 'sudo -n /usr/lib/kvm-ib/kvm-ib-engine < /dev/null';
    expect(await onHost('kvmib02', engine)).toMatchObject({ status: 0 });
    expect(await onHost('kvmib02', 'sudo -n /usr/bin/id')).toMatchObject({ status: 1, stdout: '' });
  });
});

describe('the stock driver', () => {
  test('moves a guest there and back, and leaves the address where it was', async () => {
    await deployOn(pair, 'kvmib01', GUEST, image);
    expect(await reached(pair, GUEST)).toBe(FABRIC.outside);
    expect(await holdings(pair, GUEST)).toEqual({ kvmib01: owned(GUEST), kvmib02: NOTHING });
    const call = { driver: 'kvm' } as const;
    expect(await migrate(pair, GUEST, 'kvmib01', 'kvmib02', call)).toMatchObject({ code: 0, stderr: '' });
    expect(await holdings(pair, GUEST)).toEqual({
      kvmib01: { ...owned(GUEST), domain: undefined },
      kvmib02: { ...NOTHING, domain: 'running' },
    });
    // With disks of its own it arrives paused and is resumed by the script.
    const copied = { ...call, shared: false };
    expect(await migrate(pair, GUEST, 'kvmib02', 'kvmib01', copied)).toMatchObject({ code: 0, stderr: '' });
    expect(await holdings(pair, GUEST)).toEqual({ kvmib01: owned(GUEST), kvmib02: NOTHING });
    expect(await reached(pair, GUEST)).toBe(FABRIC.outside);
  });

  test('cleans up on the destination when libvirt refuses', async () => {
    const answer = await migrate(pair, { ...GUEST, vm: { ...GUEST.vm, uuid: 'one-99' } }, 'kvmib01', 'kvmib02', {
      driver: 'kvm',
    });
    expect(answer.code).toBe(1);
    expect(answer.stderr).toMatch(/failed to get domain 'one-99'\n[\s\S]*Could not migrate one-99 to kvmib02\n$/);
    expect(await holdings(pair, GUEST)).toEqual({ kvmib01: owned(GUEST), kvmib02: NOTHING });
  });
});

describe('a guest with 200 connections', () => {
  const MOVES = 4;

  test(`moves ${MOVES} times, and none is lost`, async () => {
    await Promise.all([deployOn(pair, 'kvmib01', FIRST_PEER, image), deployOn(pair, 'kvmib02', SECOND_PEER, image)]);
    const guests = { moving: GUEST, source: FIRST_PEER, destination: SECOND_PEER };
    const load = await startLoad(pair, guests, { each: 50 });
    let connections: readonly Connection[] = [];
    try {
      for (let move = 0; move < MOVES; move += 1) {
        const [from, to] = move % 2 === 0 ? THERE : BACK;
        const watch = await watchMove(pair, GUEST, from, to);
        try {
          expect(await migrate(pair, GUEST, from, to)).toMatchObject(MOVED);
          await load.answers();
        } finally {
          console.log(`under load, ${from} to ${to}: ${describeSplit(split(await watch.stop()))}`);
        }
        expect(await holdings(pair, GUEST)).toEqual(at(to));
        expect(await statuses(pair)).toEqual(CLEAN);
      }
    } finally {
      connections = await load.stop();
      console.log(summary(connections));
    }
    expect(connections).toHaveLength(200);
    expect(lostOf(connections)).toEqual([]);
    for (const peer of [FIRST_PEER, SECOND_PEER]) await shutDown(pair, peer);
  }, 300_000);
});

describe('the silence', () => {
  const MOVES = 5;

  test("of a guest that moves is QEMU's, and for a moment ours", async () => {
    const splits: Split[] = [];
    for (let move = 0; move < MOVES; move += 1) {
      const [from, to] = move % 2 === 0 ? THERE : BACK;
      const watch = await watchMove(pair, GUEST, from, to);
      let timeline: Timeline;
      try {
        expect(await migrate(pair, GUEST, from, to)).toMatchObject(MOVED);
        expect(await reached(pair, GUEST)).toBe(FABRIC.outside);
      } finally {
        timeline = await watch.stop();
      }
      const found = split(timeline);
      splits.push(found);
      console.log(`${from} to ${to}: ${describeSplit(found)}`);
      // The source let go before its own guests could hear the guest from elsewhere.
      expect(await holdings(pair, GUEST)).toEqual(at(to));
    }
    const ours = median(splits.map((each) => each.ours));
    console.log(
      `median of ${MOVES}: silence ${median(splits.map((each) => each.silence))} ms, ` +
        `QEMU's part ${median(splits.map((each) => each.qemu))}, ours ${ours}`,
    );
    // On a quiet machine it is below 50 ms; here other tests run beside it, and a guest without KVM takes its time to wake up.
    expect(ours).toBeLessThan(1000);
    if (MOVES % 2 === 1) expect(await migrate(pair, GUEST, ...BACK)).toMatchObject(MOVED);
  }, 300_000);

  test('of a guest that arrives paused lasts until the stock script has it resumed', async () => {
    const watch = await watchMove(pair, GUEST, ...THERE);
    try {
      expect(await migrate(pair, GUEST, ...THERE, { shared: false })).toMatchObject(MOVED);
      expect(await reached(pair, GUEST)).toBe(FABRIC.outside);
    } finally {
      console.log(`arriving paused: ${describeSplit(split(await watch.stop()))}`);
    }
    expect(watch.events('kvmib02')).toEqual(['Started Migrated', 'Suspended Paused', 'Resumed Unpaused']);
    expect(await holdings(pair, GUEST)).toEqual(at('kvmib02'));
    expect(await statuses(pair)).toEqual(CLEAN);
    expect(await migrate(pair, GUEST, ...BACK)).toMatchObject(MOVED);
  });
});

describe('nothing moves', () => {
  afterEach(async () => {
    expect(await holdings(pair, GUEST)).toEqual(at('kvmib01'));
    expect(await statuses(pair)).toEqual(CLEAN);
    expect(await reached(pair, GUEST)).toBe(FABRIC.outside);
  });

  test('within one host', async () => {
    expect(await migrate(pair, GUEST, 'kvmib01', 'kvmib01')).toMatchObject({ code: 0, stderr: '' });
  });

  test('to a host without kvm-ib', async () => {
    const { kvmib02 } = pair.hosts;
    await kvmib02.run(['/bin/mv', '/usr/lib/kvm-ib/kvm-ib-engine', '/usr/lib/kvm-ib/away']);
    const answer = await migrate(pair, GUEST, ...THERE);
    await kvmib02.run(['/bin/mv', '/usr/lib/kvm-ib/away', '/usr/lib/kvm-ib/kvm-ib-engine']);
    expect(answer).toMatchObject({ code: expect.any(Number), stdout: '' });
    expect(answer.code).not.toBe(0);
    expect(answer.stderr).toMatch(/^kvm-ib: [^\n]*kvmib02[^\n]*install[^\n]*\n$/);
  });

  test('to a host whose link has a smaller MTU', async () => {
    const { kvmib02 } = pair.hosts;
    const mtu = (bytes: number) => kvmib02.run(['/usr/sbin/ip', 'link', 'set', 'ib0', 'mtu', String(bytes)]);
    await mtu(2044);
    const answer = await migrate(pair, GUEST, ...THERE);
    await mtu(FABRIC.mtu);
    expect(answer.code).not.toBe(0);
    expect(answer.stderr).toMatch(/^kvm-ib: kvmib02: [^\n]*2044[^\n]*65520[^\n]*\n$/);
  });

  test('where a third host answers for the address', async () => {
    const address = (verb: 'add' | 'delete') =>
      pair.outside.run(['/usr/sbin/ip', 'address', verb, `${GUEST.address}/32`, 'dev', 'ib0']);
    await address('add');
    const answer = await migrate(pair, GUEST, ...THERE);
    await address('delete');
    expect(answer.code).not.toBe(0);
    expect(answer.stderr).toMatch(/^kvm-ib: kvmib02: [^\n]*192\.168\.10\.202[^\n]*\n$/);
  });
});

/** MiB each second; the guest has some 100 MiB to move. */
const SLOW = 8;
const FAST = 32_768;

/**
 * Moves the guest from kvmib01 to kvmib02; `strike` is called on the destination's event. `Started Migrated`: its memory flows,
 * and will for long enough. `Resumed Migrated`: it runs there.
 */
async function struck(
  event: 'Started Migrated' | 'Resumed Migrated',
  strike: () => Promise<unknown>,
  options: CallOptions = {},
): Promise<DriverAnswer> {
  const onTheWay = event === 'Started Migrated';
  if (onTheWay) await slowDown(pair.hosts.kvmib01, GUEST, SLOW);
  const watch = await watchMove(pair, GUEST, ...THERE);
  try {
    const migrating = migrate(pair, GUEST, ...THERE, options);
    // Looked at below, whatever comes first.
    migrating.catch(() => undefined);
    await watch.until('kvmib02', event);
    if (onTheWay) await sleep(1_000);
    await strike();
    return await migrating;
  } finally {
    await watch.stop();
  }
}

describe('a migration that fails', () => {
  afterEach(async () => {
    // Wherever it is, exactly one host has it, and the guest is reached there.
    await enginesEnded(pair.hosts.kvmib01);
    await enginesEnded(pair.hosts.kvmib02);
    const found = await holdings(pair, GUEST);
    const host = found.kvmib01.domain === undefined ? 'kvmib02' : 'kvmib01';
    expect(found).toEqual(at(host));
    expect(await statuses(pair)).toEqual(CLEAN);
    expect(await reached(pair, GUEST)).toBe(FABRIC.outside);
    await slowDown(pair.hosts[host], GUEST, FAST);
    if (host === 'kvmib02') expect(await migrate(pair, GUEST, ...BACK)).toMatchObject(MOVED);
  });

  const staysOnSource = async () => expect(await holdings(pair, GUEST)).toEqual(at('kvmib01'));

  test('because QEMU does not start on the destination', async () => {
    const back = await occupyPort(pair.hosts.kvmib02, GUEST);
    const answer = await migrate(pair, GUEST, ...THERE);
    await back();
    expect(answer.code).not.toBe(0);
    expect(answer.stderr).toContain(`Could not migrate ${GUEST.vm.uuid} to kvmib02\n`);
    await staysOnSource();
  });

  test('because libvirt has a domain of that name there', async () => {
    const back = await occupyName(pair.hosts.kvmib02, GUEST);
    const answer = await migrate(pair, GUEST, ...THERE);
    await back();
    expect(answer.code).not.toBe(0);
    await staysOnSource();
  });

  test('because QEMU dies on the destination', async () => {
    const answer = await struck('Started Migrated', () => killQemu(pair.hosts.kvmib02, GUEST));
    expect(answer.code).not.toBe(0);
    await staysOnSource();
  });

  test('because somebody aborts it', async () => {
    const answer = await struck('Started Migrated', () => abortJob(pair.hosts.kvmib01, GUEST));
    expect(answer.code).not.toBe(0);
    await staysOnSource();
  });

  test('because it takes too long', async () => {
    const env = { KVM_IB_MIGRATE_DEADLINE_MS: '2500' };
    const answer = await struck('Started Migrated', async () => undefined, { env });
    expect(answer.code).not.toBe(0);
    expect(answer.stderr).toMatch(/2500 ms[^\n]*aborted/);
    await staysOnSource();
  });

  test('because the engine of the destination dies while it waits', async () => {
    const answer = await struck('Started Migrated', () => killEngine(pair.hosts.kvmib02));
    expect(answer.code).not.toBe(0);
    // It could not take its file away; the timer does.
    await reconcileBoth(pair);
    await staysOnSource();
  });

  test('because ssh to the destination breaks on the way', async () => {
    let back = async () => {};
    const answer = await struck('Started Migrated', async () => {
      back = await cutSsh(pair.hosts.kvmib02);
    });
    await back();
    expect(answer.code).not.toBe(0);
    await enginesEnded(pair.hosts.kvmib02);
    await staysOnSource();
  });
});

describe('a migration that succeeds in spite of', () => {
  afterEach(async () => {
    await enginesEnded(pair.hosts.kvmib01);
    await enginesEnded(pair.hosts.kvmib02);
    expect(await holdings(pair, GUEST)).toEqual(at('kvmib02'));
    expect(await statuses(pair)).toEqual(CLEAN);
    expect(await reached(pair, GUEST)).toBe(FABRIC.outside);
    expect(await migrate(pair, GUEST, ...BACK)).toMatchObject(MOVED);
  });

  test.each([
    ['the engine of the destination when the guest has come', 'Resumed Migrated', 'kvmib02'],
    ['the engine of the source when the guest has come', 'Resumed Migrated', 'kvmib01'],
    ['the engine of the source on the way', 'Started Migrated', 'kvmib01'],
  ] as const)('the death of %s', async (_, event, host) => {
    const answer = await struck(event, async () => {
      await killEngine(pair.hosts[host]);
      await slowDown(pair.hosts.kvmib01, GUEST, FAST).catch(() => undefined); // it may be gone
    });
    expect(answer.code).toBe(0);
    // What that engine alone could have done is done by the timer.
    await reconcileBoth(pair);
  });

  test('the death of the driver, which the stock script outlives', async () => {
    const { kvmib01, kvmib02 } = pair.hosts;
    const strike = async () => {
      await killDriver(kvmib01);
      await slowDown(kvmib01, GUEST, FAST);
    };
    await struck('Started Migrated', strike).catch(() => undefined); // nobody answers
    await waitFor(
      'the guest to have come',
      async () => (await holding(kvmib01, GUEST)).domain === undefined || undefined,
    );
    await enginesEnded(kvmib02);
    await reconcileBoth(pair);
  });
});
