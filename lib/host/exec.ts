/**
 * Runs programs: argv arrays, absolute paths, a fixed environment, time limits, bounded output.
 *
 * Standard input is an unlinked temporary file, not a pipe: Node gives a child a socket, which `nft -j -f -` cannot
 * read, because in JSON mode it re-opens /dev/stdin and a socket refuses that with ENXIO (nft 1.0.6, Node 20).
 */
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { closeSync, openSync, unlinkSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { KvmIbError } from '../core/errors.ts';
import type { Exec, ExecResult } from '../core/exec.ts';

const DEFAULT_TIMEOUT_MS = 30_000;
const OUTPUT_LIMIT = 256 * 1024 * 1024;

/** An open, unlinked, private file that holds `content`; the offset is at its start. The caller closes it. */
export function unlinkedFile(content: string | Uint8Array): number {
  const path = join(tmpdir(), `.kvm-ib-${randomBytes(12).toString('hex')}`);
  const writer = openSync(path, 'wx', 0o600);
  try {
    const bytes = typeof content === 'string' ? Buffer.from(content) : content;
    for (let done = 0; done < bytes.length; ) done += writeSync(writer, bytes, done);
    return openSync(path, 'r');
  } finally {
    closeSync(writer);
    unlinkSync(path);
  }
}

export const exec: Exec = async (argv, options = {}) => {
  const [program, ...args] = argv;
  const stdin = options.input === undefined ? ('ignore' as const) : unlinkedFile(options.input);
  try {
    return await run(program, args, stdin, options.timeout ?? DEFAULT_TIMEOUT_MS);
  } finally {
    if (typeof stdin === 'number') closeSync(stdin);
  }
};

function run(program: string, args: readonly string[], stdin: number | 'ignore', timeout: number): Promise<ExecResult> {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, {
      stdio: [stdin, 'pipe', 'pipe'],
      env: { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' },
      cwd: '/',
    });
    const out: Buffer[] = [];
    const err: Buffer[] = [];
    let size = 0;
    let timedOut = false;
    const timer = setTimeout(() => {
      timedOut = true;
      child.kill('SIGKILL');
    }, timeout);
    const collect = (into: Buffer[]) => (chunk: Buffer) => {
      size += chunk.length;
      if (size > OUTPUT_LIMIT) child.kill('SIGKILL');
      else into.push(chunk);
    };
    child.stdout?.on('data', collect(out));
    child.stderr?.on('data', collect(err));
    child.on('error', (cause: NodeJS.ErrnoException) => {
      clearTimeout(timer);
      const absent = cause.code === 'ENOENT';
      reject(
        new KvmIbError(absent ? 'host-lacks' : 'failed', `Cannot run ${program}`, {
          why: absent ? 'the program is not there' : cause.message,
          ...(absent ? { fix: `install the package that has ${program}` } : {}),
          cause,
        }),
      );
    });
    child.on('close', (status, signal) => {
      clearTimeout(timer);
      if (timedOut) {
        reject(new KvmIbError('failed', `Cannot finish ${program}`, { why: `it did not end within ${timeout} ms` }));
        return;
      }
      if (size > OUTPUT_LIMIT) {
        reject(
          new KvmIbError('failed', `Cannot read ${program}`, { why: `it printed more than ${OUTPUT_LIMIT} bytes` }),
        );
        return;
      }
      resolve({ status, signal, stdout: Buffer.concat(out).toString(), stderr: Buffer.concat(err).toString() });
    });
  });
}
