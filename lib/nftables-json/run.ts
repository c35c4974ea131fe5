/** Sends transactions to the kernel through the nft program, and reads a table back. */
import { classify, NftError, reason } from './errors.ts';
import { parseListing } from './listing.ts';
import { printCommand, type Transaction, toJson, transaction } from './transaction.ts';
import type { Family, TableListing } from './types.ts';

/** What an nft does, real or fake. Each method is one attempt: nothing is retried. */
export interface Nft {
  /**
   * Applies all of the transaction, or nothing and throws.
   *
   * @throws NftError; it names the refused command where that could be found out. An empty transaction is `refused`:
   * nft would exit 0, and an empty one comes from a mistake.
   */
  run(what: Transaction): Promise<void>;
  /** What `run` would answer, with nothing changed. Takes 8 to 32 ms: the kernel waits for readers when it gives up. */
  check(what: Transaction): Promise<void>;
  /**
   * The whole table; undefined when it is not there. Takes a time that grows with the number of elements.
   *
   * @throws NftError `refused` when what nft prints is not a listing of this table, `crashed` when nft dies of it.
   */
  listTable(family: Family, name: string): Promise<TableListing | undefined>;
}

/** Runs a program by argv and resolves with how it ended, also when it failed. */
export type NftExec = (
  argv: readonly [string, ...string[]],
  options?: { readonly input?: string; readonly timeout?: number },
) => Promise<{
  readonly status: number | null;
  readonly signal: string | null;
  readonly stdout: string;
  readonly stderr: string;
}>;

export interface NftOptions {
  /**
   * Runs nft, with the C locale. `input` must become a standard input that can be opened again by its /dev/stdin, such
   * as a file (unlinked is fine): in JSON mode nft does so, and a socket, which is what Node gives, refuses it. What
   * this function throws (nft is absent, the time is over) goes to the caller as it is.
   */
  readonly exec: NftExec;
  /** Default `/usr/sbin/nft`. */
  readonly program?: string;
  /** Milliseconds for one run of nft; default: what `exec` has. */
  readonly timeout?: number;
}

/** An nft that changes the kernel of the network namespace that `exec` runs in. Needs CAP_NET_ADMIN there. */
export function createNft(options: NftOptions): Nft {
  const program = options.program ?? '/usr/sbin/nft';
  const limit = options.timeout === undefined ? {} : { timeout: options.timeout };

  async function send(what: Transaction, flags: readonly string[]) {
    const input = toJson(what);
    if (what.commands.length === 0) throw new NftError('refused', 'Cannot run an empty transaction');
    return await options.exec([program, ...flags, '-j', '-f', '-'], { input, ...limit });
  }

  async function apply(what: Transaction, flags: readonly string[]): Promise<void> {
    const exit = await send(what, flags);
    if (exit.status !== 0) throw await explain(what, exit);
  }

  /** Names the command that was refused. Costs a few checks, and only after a refusal. */
  async function explain(what: Transaction, exit: Exit): Promise<NftError> {
    const code = classify(exit);
    if (code === 'crashed' || code === 'not-permitted') return failure(what, exit);
    if (what.commands.length === 1) return failure(what, exit, 0);
    const unparsed = /Parsing command array at index (\d+) failed/.exec(exit.stderr)?.[1];
    if (unparsed !== undefined) return failure(what, exit, Number(unparsed));
    const found = await bisect(what);
    if (found !== undefined) return failure(what, found.exit, found.index);
    const why = `${reason(exit)}, and a check of the same commands passed afterwards`;
    return refusal(what, code, why, undefined, exit.stderr);
  }

  /**
   * The shortest prefix that nft refuses ends in the command at fault, and its own complaint is the right one: of the
   * whole list nft reports first what it can see without the kernel. A refused prefix stays refused when it grows.
   * Undefined when the same list is not refused any more: somebody else changed the tables meanwhile.
   */
  async function bisect(what: Transaction): Promise<{ readonly index: number; readonly exit: Exit } | undefined> {
    let passes = 0;
    let fails = what.commands.length;
    let exit: Exit = await send(what, ['-c']);
    if (exit.status === 0) return undefined;
    while (fails - passes > 1) {
      const middle = Math.floor((passes + fails) / 2);
      const tried = await send(transaction(...what.commands.slice(0, middle)), ['-c']);
      if (tried.status === 0) passes = middle;
      else {
        fails = middle;
        exit = tried;
      }
    }
    return { index: fails - 1, exit };
  }

  return {
    run: (what) => apply(what, []),
    check: (what) => apply(what, ['-c']),
    async listTable(family, name) {
      const what = transaction({ list: { table: { family, name } } });
      const exit = await send(what, []);
      if (exit.status === 0) return parseListing(exit.stdout, family, name);
      const error = failure(what, exit, 0);
      if (error.code === 'not-found') return undefined;
      throw error;
    },
  };
}

type Exit = Awaited<ReturnType<NftExec>>;

function failure(what: Transaction, exit: Exit, index?: number): NftError {
  return refusal(what, classify(exit), reason(exit), index, exit.stderr);
}

/** The error for a transaction that was refused, with the command at fault where it is known. */
export function refusal(
  what: Transaction,
  code: NftError['code'],
  why: string,
  index: number | undefined,
  stderr: string,
): NftError {
  const count = what.commands.length;
  const command = index === undefined ? undefined : what.commands[index];
  if (index === undefined || command === undefined) {
    return new NftError(code, `Cannot run a transaction of ${count} commands: ${why}`, { stderr });
  }
  const text = printCommand(command);
  const short = text.length > 160 ? `${text.slice(0, 160)}…` : text;
  const message = `Cannot run command ${index + 1} of ${count}, "${short}": ${why}`;
  return new NftError(code, message, { stderr, index, command: text });
}
