/**
 * Live migration between two hypervisors with real libvirt, QEMU, ssh and sudo.
 */
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { requireOwnNetns } from '../support/netns.ts';
import type { GuestImage } from '../support/vm/guest.ts';
import { guestImage } from '../support/vm/guest.ts';
import { FABRIC } from '../support/vm/lab.ts';
import {
  CLEAN,
  deployOn,
  holdings,
  migrate,
  NOTHING,
  owned,
  pairGuest,
  pairLog,
  reached,
  statuses,
} from '../support/vm/moves.ts';
import type { Pair } from '../support/vm/pair.ts';
import { startPair } from '../support/vm/pair.ts';
import { tryTool } from '../support/vm/process.ts';

requireOwnNetns();

const GUEST = pairGuest(2);

let pair: Pair;
let image: GuestImage;

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
