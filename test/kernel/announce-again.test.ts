/** Announcements that last: repeats by a process of its own, again after link events, and on command. */
import { closeSync, openSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { EXIT } from '../../lib/core/errors.ts';
import { withLock } from '../../lib/host/lock.ts';
import { parsed } from '../support/cli.ts';
import type { Rig } from '../support/driver.ts';
import { createRig, eventually, testVm, tool } from '../support/driver.ts';
import type { SeenArp } from '../support/fabric.ts';
import { captureArp, makeOther } from '../support/fabric.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const IP = '/usr/sbin/ip';
const A2 = '192.168.10.202';
const A3 = '192.168.10.203';
const FIRST_MAC = '02:00:00:00:00:01';
const SECOND_MAC = '02:00:00:00:00:02';

let rig: Rig;
beforeAll(async () => {
  rig = await createRig();
  makeOther();
});
beforeEach(async () => {
  rig.reset();
  tool(IP, 'link', 'set', 'ib0', 'up', 'address', FIRST_MAC);
  await ok('reconcile');
  await endRepeats();
});
afterAll(() => rig.remove());

async function ok(...args: readonly string[]) {
  const result = await rig.cli(args);
  expect(result, `${args.join(' ')}: ${result.stderr}`).toMatchObject({ status: EXIT.done });
  return result;
}

const wait = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

/** The processes that repeat announcements for this rig. */
function repeating(): readonly { readonly pid: number; readonly line: string }[] {
  return readdirSync('/proc').flatMap((pid) => {
    try {
      const line = readFileSync(`/proc/${pid}/cmdline`, 'latin1').split('\0').join(' ');
      return line.includes(rig.folder) && line.includes('--repeat-announcements') ? [{ pid: Number(pid), line }] : [];
    } catch {
      return [];
    }
  });
}

const noRepeats = (): Promise<void> => eventually('the repeats have ended', () => repeating().length === 0);

/** Ends those of what a test prepared, so that it sees its own only. */
async function endRepeats(): Promise<void> {
  for (const { pid } of repeating()) process.kill(pid);
  await noRepeats();
}

/** The announcements of an address in the order seen, by seconds since the first. */
function rounds(frames: readonly SeenArp[], address: string): readonly number[] {
  const found = frames.filter(({ what }) => what === `request ${address}`);
  const replies = frames.filter(({ what }) => what === `reply ${address}`);
  expect(replies).toHaveLength(found.length);
  return found.map(({ at }) => at - (found[0]?.at ?? 0));
}

/** Without the probes: it is asked before anything is said. */
const saidOf = (frames: readonly SeenArp[]): readonly SeenArp[] =>
  frames.filter(({ what }) => !what.startsWith('probe '));

function expectThreeRounds(frames: readonly SeenArp[], address: string): void {
  const times = rounds(frames, address);
  expect(times).toHaveLength(3);
  // Under load a round comes later, never earlier.
  for (const [n, time] of times.entries()) expect(time).toBeGreaterThan(2 * n - 0.3);
  expect(times[2]).toBeLessThan(8);
}

describe('a new alias', () => {
  it('is announced three times, 2 s apart; add ends before the second, and the lock is free', async () => {
    const capture = await captureArp();
    const { took } = await ok('add', '--guest', '192.168.122.2');
    expect(rounds(capture.frames(), A2).length).toBeLessThanOrEqual(1);
    expect(took).toBeLessThan(1_900);
    // The process is there, and no lock is held: taken without waiting, again and again.
    expect(repeating()).toHaveLength(1);
    for (let n = 0; n < 45; n++) {
      await withLock(join(rig.state, 'lock'), { timeoutMs: 0, who: 'a test' }, async () => undefined);
      await wait(100);
    }
    await noRepeats();
    const frames = await capture.stop();
    expectThreeRounds(frames, A2);
    console.info(`add took ${Math.round(took)} ms; rounds at ${rounds(frames, A2).map((t) => t.toFixed(2))}`);
  });

  it('that is released is not announced any more, the other one is; under another label it is not either', async () => {
    const capture = await captureArp();
    await ok('add', '--guest', '192.168.122.2', '--vm', '42', '--nic', '0');
    await ok('add', '--guest', '192.168.122.3');
    await ok('add', '--guest', '192.168.122.4');
    await ok('remove', '--vm', '42');
    tool(IP, 'address', 'del', '192.168.10.204/32', 'dev', 'ib0');
    tool(IP, 'address', 'add', '192.168.10.204/32', 'dev', 'ib0', 'label', 'ib0:mine');
    await wait(5_000);
    await noRepeats();
    const frames = await capture.stop();
    expect(rounds(frames, A2)).toHaveLength(1);
    expect(rounds(frames, '192.168.10.204')).toHaveLength(1);
    expectThreeRounds(frames, A3);
  });

  it('of a deploy is announced by the engine, which runs on as long as the stock script and not for the repeats', async () => {
    const capture = await captureArp();
    const { status, took } = await rig.deploy(testVm(42));
    expect(status).toBe(0);
    expect(took).toBeLessThan(1_900);
    expect(repeating()[0]?.line).toContain('engine.mjs');
    await wait(4_500);
    await noRepeats();
    expectThreeRounds(await capture.stop(), A2);
  });
});

interface Reconciled {
  readonly announced: readonly {
    readonly device: string;
    readonly why: string;
    readonly addresses: readonly string[];
  }[];
  readonly changes: readonly unknown[];
}

const reconciled = async (...more: readonly string[]): Promise<Reconciled> =>
  parsed<Reconciled>(await ok('reconcile', '--json', ...more));

describe('a link event', () => {
  beforeEach(async () => {
    await ok('add', '--guest', '192.168.122.2');
    await ok('add', '--guest', '192.168.122.3');
    await endRepeats();
  });

  it('without one nothing is announced, and nothing written', async () => {
    const before = rig.snapshot();
    const capture = await captureArp();
    expect((await reconciled()).announced).toEqual([]);
    expect(await capture.stop()).toEqual([]);
    expect(rig.snapshot()).toEqual(before);
  });

  it('down and up: all aliases of the link again, three times, and once only', async () => {
    tool(IP, 'link', 'set', 'ib0', 'down');
    // Nothing can be said now, and it is not forgotten.
    expect((await reconciled()).announced).toEqual([]);
    tool(IP, 'link', 'set', 'ib0', 'up');
    const expected = [{ device: 'ib0', why: 'the link was down', addresses: [A2, A3] }];
    const capture = await captureArp();
    expect((await reconciled('--dry-run')).announced).toEqual(expected);
    expect((await ok('reconcile', '--dry-run')).stdout).toContain(
      'would announce 2 addresses on ib0 again: the link was down\n',
    );
    expect(saidOf(capture.frames())).toEqual([]);
    expect(await reconciled()).toMatchObject({ announced: expected, changes: [] });
    expect((await reconciled()).announced).toEqual([]);
    await wait(4_300);
    await noRepeats();
    const frames = await capture.stop();
    expectThreeRounds(frames, A2);
    expectThreeRounds(frames, A3);
    const first = frames.findIndex(({ what }) => what === `request ${A2}`);
    expect(frames.slice(0, first).map(({ what }) => what)).toContain(`probe ${A2}`);
  });

  it('a carrier that went and came is one too', async () => {
    tool(IP, '-n', 'other', 'link', 'set', 'fabric', 'down');
    tool(IP, '-n', 'other', 'link', 'set', 'fabric', 'up');
    expect((await ok('reconcile', '--quiet')).stdout).toBe('announced 2 addresses on ib0 again: the link was down\n');
    expect((await ok('reconcile', '--quiet')).stdout).toBe('');
  });

  it('another hardware address: the repeats carry the newest', async () => {
    tool(IP, 'link', 'set', 'ib0', 'address', SECOND_MAC);
    const capture = await captureArp();
    expect((await reconciled()).announced).toEqual([
      { device: 'ib0', why: 'its hardware address changed', addresses: [A2, A3] },
    ]);
    await wait(1_000);
    tool(IP, 'link', 'set', 'ib0', 'address', FIRST_MAC);
    await wait(3_500);
    await noRepeats();
    const frames = (await capture.stop()).filter(({ what }) => what === `request ${A3}`);
    expect(frames.map(({ from }) => from)).toEqual([SECOND_MAC, FIRST_MAC, FIRST_MAC]);
  });

  it('another boot, and a record that cannot be read, count as one', async () => {
    const path = join(rig.state, 'links.json');
    const record = readFileSync(path, 'utf8');
    for (const [text, why] of [
      [record.replace(/"bootId": "[^"]*"/, '"bootId": "another"'), 'the host was booted'],
      [record.replace(/"index": \d+/, '"index": 9999'), 'the link was made anew'],
      ['{"links":{"ib0":{"index":"x"}}}', 'no earlier announcement is known'],
      ['[', 'no earlier announcement is known'],
    ] as const) {
      writeFileSync(path, text);
      expect((await reconciled()).announced).toMatchObject([{ why }]);
      expect(readFileSync(path, 'utf8')).toBe(record);
    }
  });
});

describe('kvm-ib announce', () => {
  beforeEach(async () => {
    await ok('add', '--guest', '192.168.122.2', '--vm', '42', '--nic', '0');
    await ok('add', '--guest', '192.168.122.3');
    await endRepeats();
  });

  it.each([
    [[], [A3, A2]],
    [['--all'], [A3, A2]],
    [['--vm', '42'], [A2]],
    [['192.168.122.3'], [A3]],
    [
      [A3, '192.168.122.2'],
      [A3, A2],
    ],
  ])('%j', async (args, addresses) => {
    const capture = await captureArp();
    const lines = addresses.map((address) => `+ announce  ${address} on ib0\n`).join('');
    expect((await ok('announce', '--dry-run', ...args)).stdout).toBe(`${lines}Nothing was announced (--dry-run).\n`);
    expect(saidOf(capture.frames())).toEqual([]);
    expect((await ok('announce', ...args)).stdout).toBe(lines);
    await wait(200);
    const frames = await capture.stop();
    for (const address of [A2, A3]) expect(rounds(frames, address)).toHaveLength(addresses.includes(address) ? 1 : 0);
    expect(repeating()).toHaveLength(1);
  });

  it('--json', async () => {
    expect(parsed(await ok('announce', '--vm', '42', '--json'))).toEqual({
      announced: [{ device: 'ib0', address: A2, label: 'ib0:42-0' }],
      warnings: [],
      errors: [],
      dryRun: false,
    });
  });

  it.each([
    [['192.168.122.9'], EXIT.failed, /192\.168\.122\.9[\s\S]*kvm-ib list/],
    [['--vm', '43'], EXIT.failed, /VM 43[\s\S]*kvm-ib list/],
    [['--vm', '42', '--all'], EXIT.usage, /all/],
    [['--vm', 'x'], EXIT.usage, /--vm "x"/],
    [[A2, '--all'], EXIT.usage, /--all/],
    [['ib0'], EXIT.usage, /"ib0"/],
  ])('%j is refused, and nothing is sent', async (args, status, message) => {
    const capture = await captureArp();
    const result = await rig.cli(['announce', ...args]);
    expect(result).toMatchObject({ status, stdout: '' });
    expect(result.stderr).toMatch(message);
    expect(await capture.stop()).toEqual([]);
  });

  it('an alias that is not on its link: an error when it is named, a warning among all', async () => {
    tool(IP, 'address', 'del', `${A2}/32`, 'dev', 'ib0');
    const named = await rig.cli(['announce', A3, A2]);
    expect(named).toMatchObject({ status: EXIT.failed, stdout: '' });
    expect(named.stderr).toContain('kvm-ib reconcile');
    const all = await ok('announce');
    expect(all.stdout).toBe(`+ announce  ${A3} on ib0\n`);
    expect(all.stderr).toContain(`${A2} is not announced`);
  });

  it('a link that is down is named with what to type, exit code 6', async () => {
    tool(IP, 'link', 'set', 'ib0', 'down');
    const result = await rig.cli(['announce']);
    expect(result).toMatchObject({ status: EXIT.hostLacks, stdout: '' });
    expect(result.stderr).toMatch(/2 addresses on ib0[\s\S]*ENETDOWN[\s\S]*ip link show ib0/);
    expect(repeating()).toEqual([]);
  });

  it('nothing of ours there is no error', async () => {
    await ok('remove', '--vm', '42');
    await ok('remove', '--guest', '192.168.122.3');
    expect((await ok('announce')).stdout).toBe('Nothing to announce.\n');
  });
});

it('the bundle run by hand as its repeating self announces only what stands as an alias of ours', async () => {
  expect((await rig.cli(['--repeat-announcements', 'now'])).status).toBe(EXIT.usage);
  await ok('add', '--guest', '192.168.122.2');
  await endRepeats();
  const capture = await captureArp();
  const hostile = [
    ['ib0', '192.168.10.1', 'ib0'],
    ['ib0', '192.168.10.1', 'kib:s1'],
    ['../x', A2, 'kib:s0'],
    [],
    null,
    7,
  ];
  for (const [n, text] of [JSON.stringify(hostile), '{', '', JSON.stringify({ length: 3 })].entries()) {
    const path = join(rig.folder, `items-${n}`);
    writeFileSync(path, text);
    const fd = openSync(path, 'r');
    expect(await rig.cli(['--repeat-announcements'], { stdin: fd })).toMatchObject({ status: EXIT.done, stdout: '' });
    closeSync(fd);
  }
  expect((await rig.cli(['--repeat-announcements'])).status).toBe(EXIT.done);
  expect(await capture.stop()).toEqual([]);
});
