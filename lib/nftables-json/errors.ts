/** The one error class of this folder, and the reading of what nft writes when it refuses. */

/**
 * - `not-found`: a table, chain, set, element or rule that a command names is not there. The kernel says the same when
 *   it lacks a module, such as NAT.
 * - `exists`: it is there already: `create` of a present one, or `add` of a present one with another value.
 * - `not-permitted`: no CAP_NET_ADMIN in this network namespace.
 * - `too-old`: this nft knows neither the command nor the object, or was built without JSON.
 * - `crashed`: nft was ended by a signal. nft 0.9.8 to 1.0.6 do that when they list a set made by nft 1.1.2 or later.
 * - `refused`: anything else that nft or the kernel said no to (a set still in use, a wrong type), a transaction that
 *   cannot be sent, or a listing that cannot be read.
 */
export type NftErrorCode = 'not-found' | 'exists' | 'not-permitted' | 'too-old' | 'crashed' | 'refused';

export interface NftErrorDetails {
  /** What nft wrote, whole. */
  readonly stderr?: string;
  /** Place of the refused command in its transaction, from 0. */
  readonly index?: number;
  /** The refused command in nft syntax. */
  readonly command?: string;
}

export class NftError extends Error {
  override readonly name = 'NftError';
  readonly code: NftErrorCode;
  readonly stderr: string;
  readonly index: number | undefined;
  readonly command: string | undefined;

  constructor(code: NftErrorCode, message: string, details: NftErrorDetails = {}) {
    super(message);
    this.code = code;
    this.stderr = details.stderr ?? '';
    this.index = details.index;
    this.command = details.command;
  }
}

/** How a run of nft ended. */
export interface NftExit {
  readonly status: number | null;
  readonly signal: string | null;
  readonly stderr: string;
}

/** Status of a child killed by a signal when a shell or sudo stands between: 128 + SIGABRT, SIGSEGV. */
const CRASH_STATUS: readonly (number | null)[] = [134, 139];

/**
 * What a failed run of nft means. Only the text tells, since the status is 1 for every refusal; the words are
 * strerror(3) of the C locale, so nft must run in that. Of several complaints the first counts.
 */
export function classify(exit: NftExit): NftErrorCode {
  if (exit.signal !== null || CRASH_STATUS.includes(exit.status)) return 'crashed';
  const text = exit.stderr;
  if (/Operation not permitted|Permission denied/.test(text)) return 'not-permitted';
  if (/JSON support not compiled-in|Unknown (?:object|command) passed|Unknown command /.test(text)) return 'too-old';
  const first = reason(exit);
  // nft may go on with a guess: "…; did you mean chain ‘c’ in table ip ‘t’?"
  if (/File exists(?:;|$)/.test(first)) return 'exists';
  if (/No such file or directory(?:;|$)/.test(first)) return 'not-found';
  return 'refused';
}

/** The first complaint of nft without its position, which is `internal:0:0-0` for all JSON. */
export function reason(exit: NftExit): string {
  if (exit.signal !== null) return `nft was ended by ${exit.signal}`;
  if (CRASH_STATUS.includes(exit.status)) return `nft crashed (status ${exit.status})`;
  const line = exit.stderr.split('\n').find((candidate) => candidate.trim() !== '');
  if (line === undefined) return `nft ended with status ${exit.status} and said nothing`;
  return line
    .trim()
    .replace(/^.*?Error: /, '')
    .replace(/^Could not process rule: /, '');
}
