/** The parser's side of the engine: starts it, by sudo unless root, and speaks the protocol with it. */
import type { ChildProcess } from 'node:child_process';
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { ErrorCode } from '../core/errors.ts';
import { KvmIbError, printable } from '../core/errors.ts';
import { createLineReader } from '../host/lines.ts';
import { ownIdentity } from '../host/process.ts';
import type { Answer, Mode, NicMessage, SettleMessage, SyncMessage } from './protocol.ts';
import { PROTOCOL_VERSION, parseAnswer } from './protocol.ts';

const SUDO = '/usr/bin/sudo';
/** What sudoers names: root-owned, outside the tree that OpenNebula copies over hosts. */
const INSTALLED_ENGINE = '/usr/lib/kvm-ib/kvm-ib-engine';
const ANSWER_LIMIT = 8 * 1024 * 1024;
/** The engine waits up to a minute for the host lock. */
const ANSWER_TIMEOUT_MS = 120_000;

/** What a VM should have, as the parser sends it. */
export interface WishMessage {
  readonly nics: readonly NicMessage[];
  readonly unmapped: readonly number[];
  readonly keep: readonly number[];
  readonly attaching: readonly number[];
  readonly detachedAliases: readonly number[];
}

export const NO_WISH: WishMessage = { nics: [], unmapped: [], keep: [], attaching: [], detachedAliases: [] };

export interface Engine {
  /** @returns warnings. @throws KvmIbError what the engine said, or why it could not be asked */
  sync(vm: number, action: string, mode: Mode, wish: WishMessage): Promise<readonly string[]>;
  /** Releases the VM if its domain is not active. @returns warnings */
  settle(vm: number): Promise<readonly string[]>;
  /** The verdict on a pending sync. @returns warnings */
  verdict(verdict: 'commit' | 'undo'): Promise<readonly string[]>;
  /** Ends it; a pending sync without a verdict is then left to reconcile. */
  close(): Promise<void>;
}

export function startEngine(): Engine {
  const [program, ...args] = command();
  const child = spawn(program, args, { stdio: ['pipe', 'pipe', 'pipe'], env: environment() });
  const { stdin, stdout, stderr } = child;
  let complaint = '';
  let failure: Error | undefined;
  child.on('error', (error) => {
    failure = error;
  });
  stdin.on('error', () => undefined);
  stderr.on('data', (chunk: Buffer) => {
    if (complaint.length < 4096) complaint += chunk.toString();
  });
  const ended = new Promise<void>((resolve) => child.on('close', () => resolve()));
  child.on('error', () => stdout.destroy());
  const lines = createLineReader(stdout, ANSWER_LIMIT);

  const ask = async (message: object): Promise<readonly string[]> => {
    stdin.write(`${JSON.stringify(message)}\n`);
    const line = await lines.next(ANSWER_TIMEOUT_MS);
    if (line === undefined) await ended;
    const answer = line === undefined ? undefined : parseAnswer(line);
    if (answer === undefined) throw unheard(child, program, complaint, failure);
    if (!answer.ok) throw fromAnswer(answer);
    return answer.warnings;
  };
  return {
    sync(vm, action, mode, wish) {
      const { pid, start } = ownIdentity();
      const holder = { pid, start };
      const message: SyncMessage = { version: PROTOCOL_VERSION, verb: 'sync', vm, action, mode, holder, ...wish };
      return ask(message);
    },
    settle(vm) {
      const message: SettleMessage = { version: PROTOCOL_VERSION, verb: 'settle', vm };
      return ask(message);
    },
    verdict: (verdict) => ask({ verb: verdict }),
    async close() {
      stdin.end();
      await ended;
    },
  };
}

/** As root: the engine beside this bundle, or the installed one. Else the installed one through sudo. */
function command(): readonly [string, ...string[]] {
  if (process.getuid?.() !== 0) return [SUDO, '-n', INSTALLED_ENGINE];
  const beside = join(dirname(fileURLToPath(import.meta.url)), 'engine.mjs');
  return existsSync(beside) ? [process.execPath, beside] : [INSTALLED_ENGINE];
}

function environment(): NodeJS.ProcessEnv {
  const kept = ['KVM_IB_CONFIG', 'KVM_IB_STATE_DIR', 'KVM_IB_LOCK_TIMEOUT_MS', 'KVM_IB_PROBE_MS'].flatMap((name) => {
    const value = process.env[name];
    return value === undefined ? [] : [[name, value] as const];
  });
  return { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C', ...Object.fromEntries(kept) };
}

function fromAnswer(answer: Extract<Answer, { ok: false }>): KvmIbError {
  const { code, message, why, fix } = answer.error;
  return new KvmIbError(code as ErrorCode, message, {
    ...(why === undefined ? {} : { why }),
    ...(fix === undefined ? {} : { fix }),
  });
}

function unheard(child: ChildProcess, program: string, complaint: string, failure: Error | undefined): KvmIbError {
  const said = printable(complaint.trim().split('\n').at(-1) ?? '', 300);
  if (failure !== undefined) {
    return new KvmIbError('host-lacks', 'Cannot start the kvm-ib engine', {
      why: failure.message,
      fix: program === SUDO ? 'install sudo on this host' : 'install kvm-ib on this host (docs/install.md)',
      cause: failure,
    });
  }
  if (program === SUDO && /password is required|not allowed|may not run|no tty/.test(complaint)) {
    return new KvmIbError('not-permitted', 'Cannot start the kvm-ib engine', {
      why: said,
      fix: 'put rulesets/sudoers.d/kvm-ib into /etc/sudoers.d/kvm-ib on this host',
    });
  }
  if (program === SUDO && /command not found/.test(complaint)) {
    return new KvmIbError('host-lacks', 'Cannot start the kvm-ib engine', {
      why: said,
      fix: 'install kvm-ib on this host (docs/install.md)',
    });
  }
  return new KvmIbError('failed', 'Cannot hear the kvm-ib engine', {
    why: said === '' ? `it ended with status ${child.exitCode ?? child.signalCode} and said nothing` : said,
    fix: 'run `kvm-ib status` on this host, then try again',
  });
}
