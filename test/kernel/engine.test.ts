/** The engine by itself: what it answers to requests that no parser of ours would write, and when it is left alone. */
import type { ChildProcessWithoutNullStreams } from 'node:child_process';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { ownIdentity, startTime } from '../../lib/host/process.ts';
import type { Rig } from '../support/driver.ts';
import { CONFIG, createRig, tool } from '../support/driver.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

let rig: Rig;
const started: ChildProcessWithoutNullStreams[] = [];
beforeAll(async () => {
  rig = await createRig();
});
afterAll(() => rig?.remove());
beforeEach(() => rig.reset());
afterEach(() => {
  for (const child of started.splice(0)) child.kill('SIGKILL');
});

interface Answer {
  readonly version: number;
  readonly ok: boolean;
  readonly changes?: readonly string[];
  readonly error?: {
    readonly code: string;
    readonly exit: number;
    readonly message: string;
    readonly why?: string;
    readonly fix?: string;
  };
}

interface Running {
  readonly child: ChildProcessWithoutNullStreams;
  say(what: object | string): void;
  /** The next line that it answers; undefined when it ended without one. */
  hear(): Promise<Answer | undefined>;
  /** Closes its input. @returns exit status */
  end(): Promise<number | null>;
}

function engine(env: Readonly<Record<string, string>> = {}): Running {
  const child = spawn(process.execPath, [join(rig.drivers, 'engine.mjs')], { env: { ...rig.env, ...env } });
  started.push(child);
  child.stdin.on('error', () => undefined);
  const lines = createInterface(child.stdout)[Symbol.asyncIterator]();
  const closed = once(child, 'close');
  return {
    child,
    say: (what) => void child.stdin.write(typeof what === 'string' ? what : `${JSON.stringify(what)}\n`),
    hear: async () => {
      const { value, done } = await lines.next();
      return done ? undefined : (JSON.parse(value as string) as Answer);
    },
    end: async () => {
      child.stdin.end();
      await closed;
      return child.exitCode;
    },
  };
}

const holder = { pid: ownIdentity().pid, start: ownIdentity().start };
const nic = { nic: 0, guest: '192.168.122.2', address: null, mac: '02:00:c0:a8:7a:02', bridge: 'virbr1' };
const none = { unmapped: [], keep: [], attaching: [], detachedAliases: [] };
const request = { version: 2, verb: 'sync', vm: 42, action: 'deploy', mode: 'start', holder, nics: [nic], ...none };
const aliases = () => tool('/usr/sbin/ip', '-o', '-4', 'addr', 'show', 'dev', 'ib0');

/** One request that must be refused with nothing changed. */
async function refused(what: object | string, env: Readonly<Record<string, string>> = {}) {
  const before = rig.snapshot();
  const one = engine(env);
  one.say(what);
  const answer = await one.hear();
  // In the version that the request names, where one can be read; else in its own.
  expect(answer).toMatchObject({
    ok: false,
    version: expect.toSatisfy((version: unknown) => version === 2 || version === 3),
  });
  expect(await one.hear()).toBeUndefined();
  expect(await one.end()).toBe(answer?.error?.exit);
  expect(rig.snapshot()).toEqual(before);
  return answer?.error;
}

describe('a request', () => {
  test('maps, says so, waits for the verdict, and is active after "commit"', async () => {
    const one = engine();
    one.say(request);
    const answer = await one.hear();
    expect(answer).toMatchObject({ version: 2, ok: true, warnings: [] });
    expect(answer?.changes).toContain('+ alias     192.168.10.202/32 on ib0 (ib0:42-0)');
    expect(rig.phases()).toEqual({ 'vm-42': 'pending' });
    one.say({ verb: 'commit' });
    expect(await one.hear()).toMatchObject({ ok: true });
    expect(await one.end()).toBe(0);
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });
  });

  test('of version 1, from a driver that is older than the engine, is served in its version', async () => {
    const one = engine();
    one.say({ version: 1, verb: 'sync', vm: 42, action: 'deploy', pending: true, holder, nics: [nic] });
    expect(await one.hear()).toMatchObject({ version: 1, ok: true, warnings: [] });
    one.say({ verb: 'commit' });
    expect(await one.hear()).toMatchObject({ version: 1, ok: true });
    expect(await one.end()).toBe(0);
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });
  });

  test('leaves nothing after "undo"', async () => {
    const before = rig.snapshot();
    const one = engine();
    one.say(request);
    expect(await one.hear()).toMatchObject({ ok: true });
    one.say({ verb: 'undo' });
    expect(await one.hear()).toMatchObject({ ok: true });
    expect(await one.end()).toBe(0);
    expect(rig.snapshot()).toEqual(before);
  });

  test.each([
    ['no JSON', 'deploy 42\n'],
    ['a cut JSON line', `${JSON.stringify(request).slice(0, -5)}\n`],
    ['null', 'null\n'],
    ['a list', '[]\n'],
    ['a number', '1e999\n'],
    ['bytes', '\u0000\u0001\u001b[31m\n'],
    ['deep nesting', `${'['.repeat(30_000)}\n`],
    ['no version', { ...request, version: undefined }],
    ['a version that is no number', { ...request, version: '1' }],
    ['another verb', { ...request, verb: 'teardown' }],
    ['a verdict first', { verb: 'commit' }],
    ['an unknown key', { ...request, force: true }],
    ['an unknown key of a NIC', { ...request, nics: [{ ...nic, label: 'ib0:1-1' }] }],
    ['__proto__', JSON.stringify(request).replace('{', '{"__proto__":{"x":1},').concat('\n')],
    ['a VM that is no number', { ...request, vm: '42' }],
    ['a negative VM', { ...request, vm: -1 }],
    ['a VM too large for a label', { ...request, vm: 100_000_000 }],
    ['a fraction of a VM', { ...request, vm: 4.2 }],
    ['an action that is a path', { ...request, action: '../../etc' }],
    ['a NIC too large for a label', { ...request, nics: [{ ...nic, nic: 100 }] }],
    ['101 NICs', { ...request, nics: Array.from({ length: 101 }, () => nic) }],
    ['no MAC', { ...request, nics: [{ ...nic, mac: null }] }],
    ['a MAC in capitals', { ...request, nics: [{ ...nic, mac: '02:00:C0:A8:7A:02' }] }],
    ['a host name as guest', { ...request, nics: [{ ...nic, guest: 'localhost' }] }],
    ['a guest with a prefix', { ...request, nics: [{ ...nic, guest: '192.168.122.2/24' }] }],
    ['nft syntax as address', { ...request, nics: [{ ...nic, address: '1.2.3.4 } ; flush ruleset' }] }],
    ['a path as bridge', { ...request, nics: [{ ...nic, bridge: '../virbr1' }] }],
    ['init as holder', { ...request, holder: { pid: 1, start: 0 } }],
  ] as const)('that is, or has, %s is refused', async (_, what) => {
    expect(await refused(what)).toMatchObject({ code: 'bad-input', exit: 2 });
  });

  test('longer than 64 kB is refused, also when its line never ends', async () => {
    expect(await refused({ ...request, action: 'a'.repeat(70_000) })).toMatchObject({ code: 'bad-input' });
    expect(await refused('x'.repeat(1_000_000))).toMatchObject({
      code: 'bad-input',
      why: expect.stringContaining('65536'),
    });
  });

  const source = { holder: { ...holder, bootId: 'b' }, links: [] };
  const arrive = {
    version: 3,
    verb: 'arrive',
    vm: 42,
    action: 'migrate',
    when: 'resume',
    nics: [{ ...nic, held: null }],
    unmapped: [],
    source,
  };
  test.each([
    ['in version 2', { ...arrive, version: 2 }],
    ['with another when', { ...arrive, when: 'later' }],
    ['without what is held', { ...arrive, nics: [nic] }],
    ['with nft syntax as what is held', { ...arrive, nics: [{ ...nic, held: '1.2.3.4 }' }] }],
    ['with a path as boot id', { ...arrive, source: { ...source, holder: { ...holder, bootId: '../x' } } }],
    [
      'with a hardware address that is none',
      { ...arrive, source: { ...source, links: [{ network: 'ib', hardware: '$(id)', broadcast: null, mtu: 2044 }] } },
    ],
    [
      'with an MTU that is none',
      { ...arrive, source: { ...source, links: [{ network: 'ib', hardware: 'aa', broadcast: null, mtu: 1e9 }] } },
    ],
    ['with more than it has', { ...arrive, device: 'eth0' }],
  ])('of an arrival, %s, is refused', async (_, what) => {
    expect(await refused(what)).toMatchObject({ code: 'bad-input', exit: 2 });
  });

  test('of an arrival outside of the ranges is refused', async () => {
    const nics = [{ ...nic, guest: '192.168.122.7', held: null }];
    expect(await refused({ ...arrive, nics })).toMatchObject({ code: 'out-of-range', exit: 2 });
  });

  test('of another version is answered with what to upgrade', async () => {
    expect((await refused({ ...request, version: 4 }))?.fix).toContain('upgrade kvm-ib on this host');
    expect((await refused({ ...request, version: 0 }))?.fix).toContain('onehost sync');
  });

  test.each([
    ['a guest outside the range', { guest: '192.168.122.7' }, 'outside 192.168.122.2-192.168.122.6'],
    ["the bridge's own address", { guest: '192.168.122.1' }, 'outside'],
    ['an IB address as guest', { guest: '192.168.10.202' }, 'outside'],
    ["the host's IB address", { address: '192.168.10.1' }, 'outside 192.168.10.202-192.168.10.206'],
    ['an address of elsewhere', { address: '10.0.0.1' }, 'outside'],
    ['a bridge that is none of ours', { bridge: 'br0' }, 'no network'],
    ['the IPoIB link as bridge', { bridge: 'ib0' }, 'no network'],
  ])('for %s is refused', async (_, change, why) => {
    const error = await refused({ ...request, nics: [{ ...nic, ...change }] });
    expect(error).toMatchObject({ code: 'out-of-range', exit: 2 });
    expect(error?.why).toContain(why);
  });

  test("for another network's bridge is refused, by name", async () => {
    const second = CONFIG.replace('networks:\n', '')
      .replace('name: ib', 'name: other')
      .replace('ib0', 'ib1')
      .replace('virbr1', 'virbr2')
      .replaceAll('192.168.122', '192.168.123')
      .replaceAll('192.168.10', '192.168.11');
    writeFileSync(rig.config, CONFIG + second);
    const error = await refused({ ...request, nics: [{ ...nic, bridge: 'virbr2' }] });
    expect(error?.why).toContain('outside 192.168.123.2-192.168.123.6 of network other');
  });

  test('for one address twice is refused', async () => {
    const twice = [nic, { ...nic, nic: 1, mac: '02:00:c0:a8:7a:03' }];
    expect(await refused({ ...request, nics: twice })).toMatchObject({ code: 'conflict', exit: 4 });
  });

  test('of a holder that is dead, or whose pid is another process by now, is refused', async () => {
    const child = spawn('/bin/true');
    await once(child, 'close');
    expect((await refused({ ...request, holder: { pid: child.pid, start: 1 } }))?.why).toContain('does not live');
    const recycled = { ...holder, start: holder.start - 1 };
    expect((await refused({ ...request, holder: recycled }))?.why).toContain('does not live');
  });
});

describe('the time after the request', () => {
  test('without a request it ends and has read nothing', async () => {
    const one = engine({ KVM_IB_CONFIG: '/nowhere' });
    expect(await one.end()).toBe(0);
    expect(await one.hear()).toBeUndefined();
  });

  test('the end of its input instead of a verdict leaves the file pending', async () => {
    const one = engine();
    one.say(request);
    expect(await one.hear()).toMatchObject({ ok: true });
    expect(await one.end()).toBe(0);
    expect(rig.phases()).toEqual({ 'vm-42': 'pending' });
    expect(aliases()).toContain('192.168.10.202/32');
  });

  test('a verdict that is none is refused and leaves the file pending', async () => {
    const one = engine();
    one.say(request);
    await one.hear();
    one.say({ verb: 'commit', vm: 43 });
    expect(await one.hear()).toMatchObject({ ok: false, error: { code: 'bad-input' } });
    expect(await one.end()).toBe(2);
    expect(rig.phases()).toEqual({ 'vm-42': 'pending' });
  });

  test('of two verdicts the first counts', async () => {
    const one = engine();
    one.say(request);
    await one.hear();
    one.say('{"verb":"commit"}\n{"verb":"undo"}\n');
    expect(await one.hear()).toMatchObject({ ok: true });
    expect(await one.hear()).toBeUndefined();
    expect(await one.end()).toBe(0);
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });
  });

  test.each(['commit', 'undo'])('"%s" does nothing when another action took over meanwhile', async (verb) => {
    const one = engine();
    one.say(request);
    await one.hear();
    const other = spawn('/bin/sleep', ['30']);
    started.push(other);
    const otherHolder = { pid: other.pid ?? 0, start: startTime(other.pid ?? 0) ?? 0 };
    const two = engine();
    two.say({ ...request, holder: otherHolder });
    expect(await two.hear()).toMatchObject({ ok: true, changes: [] });
    one.say({ verb });
    expect(await one.hear()).toMatchObject({ ok: true, changes: [] });
    expect(rig.phases()).toEqual({ 'vm-42': 'pending' });
    expect(aliases()).toContain('192.168.10.202/32');
    two.say({ verb: 'commit' });
    expect(await two.hear()).toMatchObject({ ok: true });
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });
    await Promise.all([one.end(), two.end()]);
  });

  test('signals of a session that ends do not cut it short', async () => {
    const one = engine();
    one.say(request);
    await one.hear();
    for (const signal of ['SIGHUP', 'SIGINT', 'SIGTERM'] as const) one.child.kill(signal);
    one.say({ verb: 'commit' });
    expect(await one.hear()).toMatchObject({ ok: true });
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });
  });
});

describe('paths', () => {
  test('come from the environment for root alone', async () => {
    // Through sudo: the fixed configuration, which is not there, whatever the environment says.
    const fixed = '/etc/kvm-ib/kvm-ib.yaml';
    if (existsSync(fixed)) tool('/bin/mount', '-t', 'tmpfs', 'none', '/etc/kvm-ib');
    const error = await refused(request, { SUDO_UID: '9869' });
    expect(error).toMatchObject({ code: 'bad-config', message: expect.stringContaining(fixed) });
    // The wrapper that sudoers names sets it always, empty when root calls it by hand.
    expect((await refused(request, { SUDO_UID: '' }))?.message).toContain(fixed);
  });

  test('a state directory that is a file is said', async () => {
    const file = join(rig.folder, 'a-file');
    writeFileSync(file, '');
    mkdirSync(rig.state, { recursive: true });
    expect(await refused(request, { KVM_IB_STATE_DIR: file })).toMatchObject({ code: 'failed', exit: 1 });
  });
});
