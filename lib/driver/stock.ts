/** Runs the stock `kvm` script as if we were not there: its argv, its stdin, our stdout and stderr, its way of ending. */
import { spawn } from 'node:child_process';
import { accessSync, closeSync, constants, readFileSync } from 'node:fs';
import { constants as os } from 'node:os';
import { KvmIbError } from '../core/errors.ts';
import { unlinkedFile } from '../host/exec.ts';

export interface Ending {
  readonly status: number | null;
  readonly signal: NodeJS.Signals | null;
}

/**
 * @param args the last arguments of this process's own command line
 * @param stdin the bytes it reads, from a file that it may also re-open as /dev/stdin (a socket, Node's own pipe, could not be)
 * @throws KvmIbError `host-lacks` when the script is not there
 */
export function runStock(script: string, args: readonly string[], stdin: Uint8Array): Promise<Ending> {
  try {
    accessSync(script, constants.X_OK);
  } catch (cause) {
    throw new KvmIbError('host-lacks', `Cannot run ${script}`, {
      why: 'the stock script of OpenNebula is not there, or may not be executed',
      fix: 'run `onehost sync --force` on the front-end',
      cause,
    });
  }
  const input = unlinkedFile(stdin);
  const [program, ...argv] = commandLine(script, args);
  const child = spawn(program, argv, { stdio: [input, 'inherit', 'inherit'] });
  closeSync(input);
  // Whoever ends us means the action; it is the script that knows how to stop, and we still have to tidy up after it.
  const forward = (signal: NodeJS.Signals): void => {
    child.kill(signal);
  };
  const ignore = (): void => undefined;
  process.on('SIGTERM', forward).on('SIGINT', forward).on('SIGHUP', ignore);
  return new Promise((resolve, reject) => {
    child.on('error', (cause) => {
      reject(new KvmIbError('host-lacks', `Cannot run ${script}`, { why: cause.message, cause }));
    });
    child.on('close', (status, signal) => {
      process.off('SIGTERM', forward).off('SIGINT', forward).off('SIGHUP', ignore);
      resolve({ status, signal });
    });
  });
}

/** A program text without a variable part: its arguments are words whose bytes are written as `\0ooo`. */
const RUN_ESCAPED = `for word do word=$(printf '%b_' "$word"); set -- "$@" "\${word%_}"; shift; done; exec "$@"`;

/**
 * Node reads and writes arguments as UTF-8, and bytes that are none become U+FFFD. An argument that has one is taken
 * from the kernel's record of our command line, and handed on by a shell, which keeps bytes.
 */
function commandLine(script: string, args: readonly string[]): readonly [string, ...string[]] {
  if (!args.some((arg) => arg.includes('\ufffd'))) return [script, ...args];
  const own = splitAtNul(readFileSync('/proc/self/cmdline')).slice(-args.length);
  const escaped = (bytes: Uint8Array): string =>
    Array.from(bytes, (byte) => `\\0${byte.toString(8).padStart(3, '0')}`).join('');
  return ['/bin/sh', '-c', RUN_ESCAPED, script, ...[Buffer.from(script), ...own].map(escaped)];
}

function splitAtNul(bytes: Buffer): readonly Buffer[] {
  const parts: Buffer[] = [];
  for (let start = 0; start < bytes.length; ) {
    const end = bytes.indexOf(0, start);
    parts.push(bytes.subarray(start, end));
    start = end + 1;
  }
  return parts;
}

export function succeeded(ending: Ending): boolean {
  return ending.status === 0;
}

/** These do not end a Node process by themselves: two are ignored, one starts the debugger. */
const NOT_DEADLY = ['SIGPIPE', 'SIGXFSZ', 'SIGUSR1'];

/** Ends this process the way the script ended; where it cannot die of the same signal, as a shell reports it. */
export function endLike(ending: Ending): never {
  const { status, signal } = ending;
  if (signal === null) process.exit(status ?? 1);
  if (!NOT_DEADLY.includes(signal)) process.kill(process.pid, signal);
  process.exit(128 + os.signals[signal]);
}
