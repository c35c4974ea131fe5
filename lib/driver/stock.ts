/** Runs the stock `kvm` script as if we were not there: its argv, its stdin, our stdout and stderr, its way of ending. */
import { spawn } from 'node:child_process';
import { accessSync, closeSync, constants } from 'node:fs';
import { KvmIbError } from '../core/errors.ts';
import { unlinkedFile } from '../host/exec.ts';

export interface Ending {
  readonly status: number | null;
  readonly signal: NodeJS.Signals | null;
}

/**
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
  const child = spawn(script, args, { stdio: [input, 'inherit', 'inherit'] });
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

export function succeeded(ending: Ending): boolean {
  return ending.status === 0;
}

/** Ends this process the way the script ended. */
export function endLike(ending: Ending): never {
  if (ending.signal !== null) {
    process.kill(process.pid, ending.signal);
    // The default action of the signal ends us; a signal that does not kill is reported as a shell would.
    setTimeout(() => process.exit(128), 1000);
  }
  process.exit(ending.status ?? 1);
}
