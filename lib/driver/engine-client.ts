/** The parser's side of the engine: starts it, by sudo unless root, and speaks the protocol with it. */
import type { ChildProcess } from 'node:child_process';
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { ErrorCode, ErrorReport } from '../core/errors.ts';
import { KvmIbError, printable } from '../core/errors.ts';
import { createLineReader } from '../host/lines.ts';
import { ownIdentity } from '../host/process.ts';
import type {
  Answer,
  ArrivalEvent,
  ArriveMessage,
  DepartureMessage,
  Mode,
  NicMessage,
  SettleMessage,
  SyncMessage,
  Verdict,
} from './protocol.ts';
import { PROTOCOL_VERSION, parseAnswer, parseEvent, syncVersion } from './protocol.ts';

const SUDO = '/usr/bin/sudo';
const SSH = '/usr/bin/ssh';
/**
 * No question is asked, and no connection is shared: a master that is started for it would keep our pipes open. One that is
 * cut is found out within 15 s.
 */
const SSH_OPTIONS = [
  ...['BatchMode=yes', 'ConnectTimeout=10', 'ServerAliveInterval=5', 'ServerAliveCountMax=3'],
  ...['ControlMaster=no', 'ControlPath=none'],
].flatMap((option) => ['-o', option]);
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
  /** The first step of a live migration, on the source. @returns what the guest takes along, and warnings */
  depart(
    vm: number,
    action: string,
    wish: WishMessage,
  ): Promise<{ readonly departure: DepartureMessage; readonly warnings: readonly string[] }>;
  /** The VM comes to the engine's host. @returns `here`: it is there already, and nothing was done */
  arrive(
    request: Omit<ArriveMessage, 'version' | 'verb'>,
  ): Promise<{ readonly here: boolean; readonly warnings: readonly string[] }>;
  /** What is told after `arrive`, as it comes; undefined: the engine has ended. */
  listen(told: (event: ArrivalEvent | undefined) => void): void;
  /** Says that the source has let go; it is not answered. */
  released(): void;
  /** The verdict on a pending sync. @returns warnings */
  verdict(verdict: Verdict): Promise<readonly string[]>;
  /** Ends it; a pending sync without a verdict is then left to reconcile. */
  close(): Promise<void>;
}

/** @param on the host whose engine it is, by ssh; undefined: this one's */
export function startEngine(on?: string): Engine {
  const [program, ...args] = on === undefined ? command() : commandOn(on);
  // ssh needs what its session has: the agent, the home, the locale. It is the very program that the stock script runs.
  const env = on === undefined ? environment() : process.env;
  const child = spawn(program, args, { stdio: ['pipe', 'pipe', 'pipe'], env });
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
  let happened: (event: ArrivalEvent | undefined) => void = () => undefined;

  /** The next answer. What is told before it is passed on. */
  const hear = async (timeoutMs?: number): Promise<Answer | undefined> => {
    for (;;) {
      const line = await lines.next(timeoutMs);
      if (line === undefined) return undefined;
      const told = parseEvent(line);
      if (told === undefined) return parseAnswer(line);
      happened(told);
    }
  };
  /** After `arrive` somebody has to listen; what comes is the answer to the question that is asked next. */
  let listening: Promise<Answer | undefined> | undefined;
  const ask = async (message: object): Promise<Extract<Answer, { ok: true }>> => {
    stdin.write(`${JSON.stringify(message)}\n`);
    const answer = await inTime(listening ?? hear(ANSWER_TIMEOUT_MS));
    listening = undefined;
    if (answer === undefined) {
      await ended;
      throw unheard(child, program, complaint, failure, on);
    }
    if (!answer.ok) throw errorOf(answer.error, on);
    return answer;
  };
  const warningsOf = async (message: object): Promise<readonly string[]> => (await ask(message)).warnings;
  return {
    sync(vm, action, mode, wish) {
      const { pid, start } = ownIdentity();
      return warningsOf(syncMessage(vm, action, mode, { pid, start }, wish));
    },
    async depart(vm, action, wish) {
      const { pid, start } = ownIdentity();
      const answer = await ask(syncMessage(vm, action, 'depart', { pid, start }, wish));
      return { departure: answer.departure ?? { nics: [], links: [] }, warnings: answer.warnings };
    },
    async arrive(request) {
      const message: ArriveMessage = { version: PROTOCOL_VERSION, verb: 'arrive', ...request };
      const { here = false, warnings } = await ask(message);
      listening = hear().catch(() => undefined);
      return { here, warnings };
    },
    listen(told) {
      happened = told;
      void ended.then(() => told(undefined));
    },
    released() {
      stdin.write(`${JSON.stringify({ verb: 'released' })}\n`);
    },
    settle(vm) {
      const message: SettleMessage = { version: syncVersion('follow'), verb: 'settle', vm };
      return warningsOf(message);
    },
    verdict: (verdict) => warningsOf({ verb: verdict }),
    async close() {
      stdin.end();
      await ended;
    },
  };
}

function syncMessage(
  vm: number,
  action: string,
  mode: Mode,
  holder: SyncMessage['holder'],
  wish: WishMessage,
): SyncMessage {
  return { version: syncVersion(mode), verb: 'sync', vm, action, mode, holder, ...wish };
}

function inTime<T>(promise: Promise<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    const late = (): void =>
      reject(
        new KvmIbError('failed', 'Cannot hear the kvm-ib engine', {
          why: `no answer came within ${ANSWER_TIMEOUT_MS} ms`,
        }),
      );
    const timer = setTimeout(late, ANSWER_TIMEOUT_MS);
    promise.then(resolve, reject).finally(() => clearTimeout(timer));
  });
}

/** The argv is words for a shell on the other side, so it is fixed but for the host, which ssh takes as one argument. */
function commandOn(host: string): readonly [string, ...string[]] {
  if (!/^[A-Za-z0-9_][A-Za-z0-9._:-]{0,252}$/.test(host)) {
    throw new KvmIbError('bad-input', `Cannot reach the host "${printable(host, 100)}"`, {
      why: 'that is no name of a host',
      fix: 'give the host in OpenNebula a name or address that ssh takes',
    });
  }
  return [SSH, ...SSH_OPTIONS, '--', host, `sudo -n ${INSTALLED_ENGINE}`];
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

/** What an engine said, as the error that it was there. */
export function errorOf({ code, message, why, fix }: ErrorReport, on?: string): KvmIbError {
  return new KvmIbError(code as ErrorCode, on === undefined ? message : `${on}: ${message}`, {
    ...(why === undefined ? {} : { why }),
    ...(fix === undefined ? {} : { fix }),
  });
}

function unheard(
  child: ChildProcess,
  program: string,
  complaint: string,
  failure: Error | undefined,
  on: string | undefined,
): KvmIbError {
  // Ours ends it with a full stop.
  const said = printable(complaint.trim().split('\n').at(-1) ?? '', 300).replace(/\.$/, '');
  if (on !== undefined) return unheardFrom(on, child, complaint, said);
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

/** Exit status of ssh itself, ssh(1). */
const SSH_FAILED = 255;

function unheardFrom(on: string, child: ChildProcess, complaint: string, said: string): KvmIbError {
  const message = `Cannot start the kvm-ib engine of ${on}`;
  if (/command not found|No such file/.test(complaint)) {
    return new KvmIbError('host-lacks', message, {
      why: `${on} has no kvm-ib: ${said}`,
      fix: `install kvm-ib on ${on} (docs/install.md), or migrate the VM to a host that has it`,
    });
  }
  if (/password is required|not allowed|may not run|no tty/.test(complaint)) {
    return new KvmIbError('not-permitted', message, {
      why: `${on}: ${said}`,
      fix: `put rulesets/sudoers.d/kvm-ib into /etc/sudoers.d/kvm-ib on ${on}`,
    });
  }
  if (child.exitCode === SSH_FAILED) {
    return new KvmIbError('failed', `Cannot reach ${on}`, {
      why: said === '' ? 'the ssh connection broke' : said,
      fix: `as oneadmin on this host: ssh ${on} true. The action needs its key or agent: \`-d migrate\` in ARGUMENTS of VM_MAD forwards the agent`,
    });
  }
  return new KvmIbError('failed', `Cannot hear the kvm-ib engine of ${on}`, {
    why: said === '' ? `it ended with status ${child.exitCode ?? child.signalCode} and said nothing` : said,
    fix: `run \`kvm-ib status\` on ${on}, then try again`,
  });
}
