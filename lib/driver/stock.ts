/** Runs the stock `kvm` script as if we were not there: its argv, its stdin, our stdout and stderr, its way of ending. */
import { spawn } from 'node:child_process';
import { accessSync, closeSync, constants } from 'node:fs';
import { constants as os } from 'node:os';
import { KvmIbError } from '../core/errors.ts';
import { unlinkedFile } from '../host/exec.ts';

export interface Ending {
  readonly status: number | null;
  readonly signal: NodeJS.Signals | null;
}

/**
 * @param stdin the bytes it reads, from a file that it may also re-open as /dev/stdin (a socket, Node's own pipe, could not be);
 *   null: our own standard input, which was left unread
 * @throws KvmIbError `host-lacks` when the script is not there, `bad-input` for an argument that is not UTF-8
 */
export function runStock(script: string, args: readonly string[], stdin: Uint8Array | null): Promise<Ending> {
  try {
    accessSync(script, constants.X_OK);
  } catch (cause) {
    throw new KvmIbError('host-lacks', `Cannot run ${script}`, {
      why: 'the stock script of OpenNebula is not there, or may not be executed',
      fix: 'run `onehost sync --force` on the front-end',
      cause,
    });
  }
  if (args.some((arg) => arg.includes('\ufffd'))) {
    throw new KvmIbError('bad-input', `Cannot hand the arguments on to ${script}`, {
      why: 'one of them is not UTF-8, and Node cannot pass its bytes on as they came',
      fix: 'use names in UTF-8 for hosts, datastores and files',
    });
  }
  const input = stdin === null ? ('inherit' as const) : unlinkedFile(stdin);
  const child = spawn(script, args, { stdio: [input, 'inherit', 'inherit'] });
  if (input !== 'inherit') closeSync(input);
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
