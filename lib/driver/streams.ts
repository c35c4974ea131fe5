/** Standard input and error of the drivers, as one_vmm_exec has them. */
import { fstatSync, readSync, writeSync } from 'node:fs';
import { isatty } from 'node:tty';
import { KvmIbError, toKvmIbError } from '../core/errors.ts';
import { millisecondsFrom } from '../host/paths.ts';
import { failureMessage, logText } from '../opennebula/contract.ts';

/** A VM of a thousand NICs has a hundredth of this. */
export const STDIN_LIMIT = 64 * 1024 * 1024;
const STDIN_TIMEOUT_MS = millisecondsFrom(process.env['KVM_IB_STDIN_TIMEOUT_MS']) ?? 60_000;

/**
 * All of standard input: bounded, and never waited for without end. Before 6.6 it is empty when a value of the VM holds what the
 * host's shell cannot expand (`$(` or a lone backtick): the here document that brings it was not quoted.
 */
export async function readStdin(action: string, { mayBeEmpty = false } = {}): Promise<Buffer> {
  const broken = (why: string): KvmIbError =>
    new KvmIbError('bad-input', `Cannot read the standard input of ${action}`, {
      why,
      fix: 'let OpenNebula (one_vmm_exec) call it: it sends the VM there',
    });
  if (isatty(0)) throw broken('it is a terminal');
  let stat: ReturnType<typeof fstatSync>;
  try {
    stat = fstatSync(0);
  } catch {
    throw broken('it is closed');
  }
  const chunks: Buffer[] = [];
  let size = 0;
  const add = (chunk: Buffer): void => {
    size += chunk.length;
    if (size > STDIN_LIMIT) throw broken(`it is larger than ${STDIN_LIMIT} bytes`);
    chunks.push(chunk);
  };
  if (stat.isFile()) {
    for (;;) {
      const chunk = Buffer.alloc(1024 * 1024);
      const count = readSync(0, chunk, 0, chunk.length, null);
      if (count === 0) break;
      add(chunk.subarray(0, count));
    }
  } else {
    const timer = setTimeout(
      () => process.stdin.destroy(broken(`it did not end within ${STDIN_TIMEOUT_MS} ms`)),
      STDIN_TIMEOUT_MS,
    );
    try {
      for await (const chunk of process.stdin) add(chunk as Buffer);
    } catch (error) {
      throw error instanceof KvmIbError ? error : broken((error as Error).message);
    } finally {
      clearTimeout(timer);
    }
  }
  if (size === 0 && !mayBeEmpty) throw broken('it is empty');
  return Buffer.concat(chunks);
}

/** Runs the last step of an action whose outcome is decided: what goes wrong is logged and left to reconcile. */
export async function settle(step: () => Promise<readonly string[]>): Promise<void> {
  try {
    note(await step());
  } catch (cause) {
    complain(cause, 'The next kvm-ib reconcile brings it right');
  }
}

/** Logs an error that does not fail the action. */
export function complain(cause: unknown, outlook: string): undefined {
  say(logText({ level: 'error', text: `${failureMessage(toKvmIbError(cause))}. ${outlook}` }));
}

export function note(notes: readonly string[]): void {
  for (const text of notes) say(logText({ level: 'info', text }));
}

export function say(text: string): void {
  try {
    writeSync(2, text);
  } catch {
    // Nobody listens any more.
  }
}
