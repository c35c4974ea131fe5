/** How pure code asks for a program to be run; `host/exec.ts` is the one that does it. */

export interface ExecResult {
  /** Exit status; null when a signal ended it. */
  readonly status: number | null;
  readonly signal: string | null;
  readonly stdout: string;
  readonly stderr: string;
}

export interface ExecOptions {
  /** Standard input, as a seekable file that the program may re-open; absent: empty. */
  readonly input?: string;
  /** Milliseconds until the program is killed. */
  readonly timeout?: number;
}

/**
 * Runs a program by argv: no shell, an absolute path, the C locale. Resolves also on failure; rejects with a
 * KvmIbError `host-lacks` when the program is not there and `failed` when the time limit passed.
 */
export type Exec = (argv: readonly [string, ...string[]], options?: ExecOptions) => Promise<ExecResult>;
