/**
 * The host lock: flock(2) on a file. The kernel drops it when the process ends in any way, so there is no stale lock;
 * the file stays, because removing it would let two processes lock two files of one name.
 */
import { closeSync, constants, ftruncateSync, mkdirSync, openSync, readSync, writeSync } from 'node:fs';
import { dirname } from 'node:path';
import { KvmIbError, printable } from '../core/errors.ts';
import { LOCK_EX, LOCK_NB, libc } from './libc.ts';

export interface LockOptions {
  /** Milliseconds to wait for another holder. */
  readonly timeoutMs: number;
  /** What this process is doing, for the message of those who wait in vain. */
  readonly who: string;
}

const FIRST_PAUSE_MS = 2;
const LONGEST_PAUSE_MS = 50;
const HOLDER_LIMIT = 300;

/**
 * Runs `work` while this process alone holds the lock on `path`. Two calls in one process exclude each other as well.
 * Node opens files with O_CLOEXEC, so children do not carry the lock on.
 *
 * @throws KvmIbError `lock-not-obtained` naming the holder; `not-permitted` or `failed` when the file cannot be opened
 */
export async function withLock<T>(path: string, options: LockOptions, work: () => Promise<T>): Promise<T> {
  const { flock } = await libc();
  const fd = openLockFile(path);
  try {
    const deadline = performance.now() + options.timeoutMs;
    for (let pause = FIRST_PAUSE_MS; !flock(fd, LOCK_EX | LOCK_NB); pause = Math.min(pause * 2, LONGEST_PAUSE_MS)) {
      const left = deadline - performance.now();
      if (left <= 0) throw notObtained(path, options.timeoutMs, readHolder(fd));
      await new Promise((resolve) => setTimeout(resolve, Math.min(pause, left)));
    }
    writeHolder(fd, `pid ${process.pid}, ${printable(options.who, HOLDER_LIMIT / 2)}`);
    try {
      return await work();
    } finally {
      ftruncateSync(fd);
    }
  } finally {
    closeSync(fd);
  }
}

function openLockFile(path: string): number {
  try {
    mkdirSync(dirname(path), { recursive: true, mode: 0o755 });
    return openSync(path, constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW, 0o600);
  } catch (cause) {
    const error = cause as NodeJS.ErrnoException;
    const denied = error.code === 'EACCES' || error.code === 'EPERM';
    throw new KvmIbError(denied ? 'not-permitted' : 'failed', `Cannot open the lock ${path}`, {
      why: error.message,
      fix: denied ? 'run it as root' : 'see that its directory can be written',
      cause,
    });
  }
}

function writeHolder(fd: number, holder: string): void {
  ftruncateSync(fd);
  writeSync(fd, `${holder}\n`, 0);
}

function readHolder(fd: number): string {
  const bytes = Buffer.alloc(HOLDER_LIMIT);
  return printable(bytes.toString('utf8', 0, readSync(fd, bytes, 0, HOLDER_LIMIT, 0)).trim(), HOLDER_LIMIT);
}

function notObtained(path: string, timeoutMs: number, holder: string): KvmIbError {
  return new KvmIbError('lock-not-obtained', `Cannot lock ${path}`, {
    why: `after ${timeoutMs} ms it is still held by ${holder === '' ? 'a process that has not written its name' : holder}`,
    fix: 'wait until that process has ended, or end it, and try again',
  });
}
