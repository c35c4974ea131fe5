import { spawn } from 'node:child_process';
import { once } from 'node:events';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { bootId, isAlive, ownIdentity, parseStat, startTime } from '../../lib/host/process.ts';

describe('the identity of a process', () => {
  it('says that this process is alive', () => {
    const own = ownIdentity();
    expect(own.pid).toBe(process.pid);
    expect(own.start).toBeGreaterThan(0);
    expect(isAlive(own)).toBe(true);
  });

  it('tells it from another of the same pid, and from one before the last boot', () => {
    const own = ownIdentity();
    expect(isAlive({ ...own, start: own.start - 1 })).toBe(false);
    expect(isAlive({ ...own, bootId: '00000000-0000-0000-0000-000000000000' })).toBe(false);
  });

  it('says that a process has ended', async () => {
    const child = spawn('/bin/sleep', ['60'], { stdio: 'ignore' });
    const pid = child.pid ?? 0;
    const identity = { pid, start: startTime(pid) ?? 0, bootId: bootId() };
    expect(isAlive(identity)).toBe(true);
    child.kill('SIGKILL');
    await once(child, 'close');
    expect(isAlive(identity)).toBe(false);
    expect(startTime(pid)).toBeUndefined();
  });

  it('says that a zombie has ended', async () => {
    // The shell becomes tail, which never waits for the child that the shell started.
    const child = spawn('/bin/sh', ['-c', 'sleep 0.05 & echo $!; exec tail -f /dev/null'], {
      stdio: ['ignore', 'pipe', 'ignore'],
    });
    const pid = Number(String((await once(child.stdout, 'data'))[0]));
    const identity = { pid, start: startTime(pid) ?? 0, bootId: bootId() };
    await expect.poll(() => isAlive(identity), { timeout: 5_000 }).toBe(false);
    expect(startTime(pid)).toBe(identity.start);
    child.kill('SIGKILL');
  });

  it('takes no pid that is none', () => {
    for (const pid of [0, -1, 1.5, Number.NaN, 2 ** 40]) expect(startTime(pid)).toBeUndefined();
  });
});

describe('/proc/PID/stat', () => {
  const fields = Array.from({ length: 49 }, (_, i) => String(i + 4)).join(' ');

  it.each(['node', 'a b', '((x) y', ') S 1 2 3', ''])('is read with the command (%s)', (command) => {
    expect(parseStat(`42 (${command}) S ${fields}\n`)).toEqual({ state: 'S', start: 22 });
  });

  it('gives nothing when it is cut or is something else', () => {
    expect(parseStat('42 (node) S 1 2 3')).toBeUndefined();
    expect(parseStat('')).toBeUndefined();
    fc.assert(
      fc.property(
        fc.string(),
        (text) => parseStat(text) === undefined || /^[0-9]/.test(String(parseStat(text)?.start)),
      ),
    );
  });
});
