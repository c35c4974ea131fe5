import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync, readFileSync, readlinkSync, statSync, symlinkSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';
import { KvmIbError } from '../../lib/core/errors.ts';
import { withLock } from '../../lib/host/lock.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const children: ChildProcess[] = [];
afterEach(() => {
  for (const child of children.splice(0)) child.kill('SIGKILL');
});

let count = 0;
const freshPath = () => `/run/kvm-ib/locks-${process.pid}/${count++}/lock`;
const quick = { timeoutMs: 60, who: 'a test' };

/** Another process that holds the lock until it is killed. */
async function holdElsewhere(path: string): Promise<ChildProcess> {
  const script = `exec 9<>"$0"; flock 9; printf 'pid %d, kvm-ib deploy\\n' $$ >&9; echo held; exec sleep 60`;
  const child = spawn('/bin/sh', ['-c', script, path], { stdio: ['ignore', 'pipe', 'inherit'] });
  children.push(child);
  if (child.stdout) await once(child.stdout, 'data');
  return child;
}

describe('the host lock', () => {
  it('makes the directory and a file that only its owner reads', async () => {
    const path = freshPath();
    expect(await withLock(path, quick, async () => statSync(path).mode & 0o777)).toBe(0o600);
  });

  it('gives back what the work gives, and is free after it and after its failure', async () => {
    const path = freshPath();
    expect(await withLock(path, quick, async () => 42)).toBe(42);
    await expect(withLock(path, quick, () => Promise.reject(new Error('no')))).rejects.toThrow('no');
    expect(await withLock(path, quick, async () => 43)).toBe(43);
  });

  it('lets one in at a time, in one process as well', async () => {
    const path = freshPath();
    let inside = 0;
    let most = 0;
    const visits = Array.from({ length: 8 }, () =>
      withLock(path, { timeoutMs: 5_000, who: 'a test' }, async () => {
        inside += 1;
        most = Math.max(most, inside);
        await new Promise((resolve) => setTimeout(resolve, 5));
        inside -= 1;
      }),
    );
    await Promise.all(visits);
    expect(most).toBe(1);
  });

  it('names the holder when the time is over', async () => {
    const path = freshPath();
    await withLock(path, quick, async () => undefined);
    const holder = await holdElsewhere(path);
    const error = await withLock(path, quick, async () => undefined).catch((thrown: unknown) => thrown);
    expect(error).toBeInstanceOf(KvmIbError);
    expect(error).toMatchObject({ code: 'lock-not-obtained', exit: 7 });
    expect((error as KvmIbError).why).toContain(`pid ${holder.pid}, kvm-ib deploy`);
  });

  it('names this process as the holder, with what it is doing, and makes its text safe to print', async () => {
    const path = freshPath();
    const error = await withLock(path, { timeoutMs: 50, who: 'deploy one-42\u001b[31m' }, () =>
      withLock(path, quick, async () => undefined),
    ).catch((thrown: unknown) => thrown);
    expect((error as KvmIbError).why).toContain(`pid ${process.pid}, deploy one-42\\u001b[31m`);
    expect(readFileSync(path, 'utf8')).toBe('');
  });

  it('is obtained within the time limit when the holder ends', async () => {
    const path = freshPath();
    await withLock(path, quick, async () => undefined);
    const holder = await holdElsewhere(path);
    setTimeout(() => holder.kill('SIGKILL'), 100);
    expect(await withLock(path, { timeoutMs: 10_000, who: 'a test' }, async () => 'mine')).toBe('mine');
  });

  it('is not carried on by a child that outlives the work', async () => {
    const path = freshPath();
    await withLock(path, quick, async () => {
      const child = spawn('/bin/sh', ['-c', 'echo up; exec sleep 60'], { stdio: ['ignore', 'pipe', 'ignore'] });
      children.push(child);
      if (child.stdout) await once(child.stdout, 'data');
      const open = readdirSync(`/proc/${child.pid}/fd`).map((fd) => readlinkSync(`/proc/${child.pid}/fd/${fd}`));
      expect(open).not.toContain(path);
    });
    expect(await withLock(path, quick, async () => 'mine')).toBe('mine');
  });

  it('does not follow a link that lies in its place', async () => {
    const path = freshPath();
    await withLock(path, quick, async () => undefined);
    symlinkSync('/run/kvm-ib/elsewhere', `${path}-link`);
    await expect(withLock(`${path}-link`, quick, async () => undefined)).rejects.toMatchObject({ code: 'failed' });
  });

  it('says when it may not be opened', async () => {
    const path = freshPath();
    await withLock(path, quick, async () => undefined);
    process.seteuid?.(65534);
    try {
      await expect(withLock(path, quick, async () => undefined)).rejects.toMatchObject({ code: 'not-permitted' });
    } finally {
      process.seteuid?.(0);
    }
  });
});
