/**
 * Standard input of an action. It is not always ours to read.
 *
 * Up to 4.14 one_vmm_exec starts every action but deploy as a command of a running `bash -s` whose own standard input is the
 * stream of commands (SshStream in ssh_stream.rb), and the script inherits it: who reads there eats the next command, or waits
 * for ever. Since 5.0 the script reads from a pipe of its own (`cat << EOT | script`). Some actions go by an ssh of their own,
 * `sh -c 'if [ -x … ]; then script …'` (RemotesCommand): there the script shares the pipe with the shell as well, but the shell
 * reads no commands from it, and it ends: with data since 5.8, at once before.
 *
 * So neither argv nor the version is asked, but the kernel: whose pipe is it, and does the parent read commands from it?
 */
import { closeSync, constants, fstatSync, openSync, readFileSync, readSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { isatty } from 'node:tty';
import { KvmIbError } from '../core/errors.ts';
import { millisecondsFrom } from '../host/paths.ts';

export const STDIN_LIMIT = 64 * 1024 * 1024;
const STDIN_TIMEOUT_MS = millisecondsFrom(process.env['KVM_IB_STDIN_TIMEOUT_MS']) ?? 60_000;

export interface ReadOptions {
  /** Whether nothing at all is no error. */
  readonly mayBeEmpty?: boolean;
}

/**
 * Standard input of an action on a VM that is there.
 * @returns null where none came: it was left unread, or had ended already
 * @throws KvmIbError `bad-input` as `readStdin`
 */
export async function readActionData(action: string, { mayBeEmpty = false }: ReadOptions = {}): Promise<Buffer | null> {
  const shared = isSharedWithParent();
  if (shared && !isParentGivenItsCommands()) return null;
  const bytes = await readStdin(action, { mayBeEmpty: mayBeEmpty || shared });
  return shared && bytes.length === 0 ? null : bytes;
}

/** Whether standard input is a pipe or socket that the parent has as its own standard input, or may have. */
function isSharedWithParent(): boolean {
  try {
    const own = fstatSync(0);
    if (!own.isFIFO() && !own.isSocket()) return false;
    try {
      const parents = statSync(`/proc/${process.ppid}/fd/0`);
      return parents.dev === own.dev && parents.ino === own.ino;
    } catch {
      // A parent that may not be looked at. What is left unread does no harm.
      return true;
    }
  } catch {
    return false;
  }
}

/** Whether the parent is a shell that has its commands from an argument: `sh -c …`. */
function isParentGivenItsCommands(): boolean {
  try {
    return readFileSync(`/proc/${process.ppid}/cmdline`, 'latin1').split('\0')[1] === '-c';
  } catch {
    return false;
  }
}

/**
 * All of standard input: bounded, and never waited for without end. Before 6.6 it is empty when a value of the VM holds what the
 * host's shell cannot expand (`$(` or a lone backtick): the here document that brings it was not quoted.
 * @throws KvmIbError `bad-input`
 */
export async function readStdin(action: string, { mayBeEmpty = false }: ReadOptions = {}): Promise<Buffer> {
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

/** VERSION of OpenNebula at the root of the remotes; null when there is none, as before 4.4. */
export function readRemotesVersion(remotes: string): string | null {
  try {
    const fd = openSync(join(remotes, 'VERSION'), constants.O_RDONLY | constants.O_NONBLOCK);
    try {
      const bytes = Buffer.alloc(64);
      return bytes.toString('latin1', 0, readSync(fd, bytes, 0, bytes.length, 0));
    } finally {
      closeSync(fd);
    }
  } catch {
    return null;
  }
}
