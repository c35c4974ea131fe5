/**
 * The one error class of kvm-ib. Each error says what failed, why, and what to type next; its code is stable
 * and decides the exit status. A code exists only where some caller or operator acts on it.
 */

/** Exit status by meaning. Documented in `kvm-ib --help` and the man page; never renumbered. */
export const EXIT = {
  done: 0,
  failed: 1,
  usage: 2,
  drift: 3,
  conflict: 4,
  notPermitted: 5,
  hostLacks: 6,
  lockNotObtained: 7,
  reversalFailed: 8,
} as const;

export type ExitStatus = (typeof EXIT)[keyof typeof EXIT];

/** Every error code with the exit status that it ends in. */
export const ERROR_EXIT = {
  /** A step failed; what had been done was undone. */
  failed: EXIT.failed,
  /** Wrong use of the command line. */
  usage: EXIT.usage,
  /** The configuration does not hold. */
  'bad-config': EXIT.usage,
  /** XML, a request, or another input is malformed or hostile. */
  'bad-input': EXIT.usage,
  /** A guest NIC or an address lies outside the configured ranges. */
  'out-of-range': EXIT.usage,
  /** What was asked for is not built or not supported by design. */
  unsupported: EXIT.failed,
  /** Address, guest or alias belongs to somebody else. */
  conflict: EXIT.conflict,
  /** The kernel or the file system said EPERM or EACCES. */
  'not-permitted': EXIT.notPermitted,
  /** A link, a program, a kernel feature or a file that the host needs is missing. */
  'host-lacks': EXIT.hostLacks,
  /** The host lock was held by another for longer than the time limit. */
  'lock-not-obtained': EXIT.lockNotObtained,
  /** A step failed and undoing the earlier ones failed as well: look at `kvm-ib status`. */
  'reversal-failed': EXIT.reversalFailed,
} as const satisfies Record<string, ExitStatus>;

export type ErrorCode = keyof typeof ERROR_EXIT;

export interface ErrorDetails {
  /** Why it failed: the state met, the kernel's own words. */
  readonly why?: string;
  /** What the reader should do or type next. */
  readonly fix?: string;
  /** The error below this one. */
  readonly cause?: unknown;
}

/** An error with a stable code, a reason and a remedy. `message` is "Cannot <verb> <object>", one line, no full stop. */
export class KvmIbError extends Error {
  override readonly name = 'KvmIbError';
  readonly code: ErrorCode;
  readonly why: string | undefined;
  readonly fix: string | undefined;

  constructor(code: ErrorCode, message: string, details: ErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.code = code;
    this.why = details.why;
    this.fix = details.fix;
  }

  get exit(): ExitStatus {
    return ERROR_EXIT[this.code];
  }
}

/** Any thrown value as a KvmIbError; a foreign one becomes `failed` with its own message as the reason. */
export function toKvmIbError(error: unknown, message = 'Cannot finish'): KvmIbError {
  if (error instanceof KvmIbError) return error;
  const why = error instanceof Error ? error.message : String(error);
  return new KvmIbError('failed', message, { why, cause: error });
}

/** The plain form of an error: what `--json` prints and the engine answers. */
export interface ErrorReport {
  readonly code: ErrorCode;
  readonly exit: ExitStatus;
  readonly message: string;
  readonly why?: string;
  readonly fix?: string;
}

export function errorReport(error: KvmIbError): ErrorReport {
  return {
    code: error.code,
    exit: error.exit,
    message: error.message,
    ...(error.why === undefined ? {} : { why: error.why }),
    ...(error.fix === undefined ? {} : { fix: error.fix }),
  };
}

/**
 * Untrusted text made safe for a terminal, a log line or OpenNebula's message: control characters, bidi overrides
 * and line ends become visible escapes; longer than `limit` characters is cut.
 */
export function printable(text: string, limit = 200): string {
  const cut = text.length > limit ? `${text.slice(0, limit)}…` : text;
  return cut.replace(
    /[\u0000-\u001f\u007f-\u009f\u2028\u2029\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g,
    (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`,
  );
}

export function assertNever(value: never): never {
  throw new TypeError(`Unexpected value: ${JSON.stringify(value)}`);
}
