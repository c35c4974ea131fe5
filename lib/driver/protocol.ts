/**
 * What parser and engine say to each other: one JSON object a line, over the engine's standard input and output.
 *
 *   parser -> {"version":1,"verb":"sync","vm":42,"action":"deploy","pending":true,"holder":{"pid":…,"start":…},"nics":[…]}
 *   engine -> {"version":1,"ok":true,"changes":[…],"warnings":[…]}            the kernel holds the mappings
 *   parser -> {"verb":"commit"} or {"verb":"undo"}                          after the stock script has ended
 *   engine -> {"version":1,"ok":true,…}
 *
 * The request is all that crosses from hostile input to privilege, so it is small and fixed. It names guests and may name
 * addresses; the engine holds both against its own configuration and decides links and labels itself. Without a
 * verdict (the parser died) the file stays pending and reconcile decides.
 */
import * as v from 'valibot';
import type { Ipv4, LinkName, Mac } from '../core/address.ts';
import { tryParseIpv4, tryParseLinkName, tryParseMac } from '../core/address.ts';
import type { ErrorReport } from '../core/errors.ts';
import { KvmIbError } from '../core/errors.ts';

export const PROTOCOL_VERSION = 1;
/** A VM with a hundred NICs needs a fifth of this. */
export const LINE_LIMIT = 65_536;

const MAX_VM = 99_999_999;
const MAX_NIC = 99;

/** One guest NIC that is to have an IB address. */
export interface NicMessage {
  readonly nic: number;
  readonly guest: Ipv4;
  /** Null: the one of the same place in the range. */
  readonly address: Ipv4 | null;
  readonly mac: Mac;
  readonly bridge: LinkName;
}

export interface SyncMessage {
  readonly version: typeof PROTOCOL_VERSION;
  readonly verb: 'sync';
  readonly vm: number;
  readonly action: string;
  /** True: a verdict follows. */
  readonly pending: boolean;
  /** The process that the outcome depends on; `start` as in /proc/PID/stat. */
  readonly holder: { readonly pid: number; readonly start: number };
  readonly nics: readonly NicMessage[];
}

export type Verdict = 'commit' | 'undo';

const integer = (min: number, max = Number.MAX_SAFE_INTEGER) =>
  v.pipe(v.number(), v.integer(), v.minValue(min), v.maxValue(max));
const ipv4 = v.custom<Ipv4>((value) => typeof value === 'string' && tryParseIpv4(value) !== undefined);

const nicSchema: v.GenericSchema<unknown, NicMessage> = v.strictObject({
  nic: integer(0, MAX_NIC),
  guest: ipv4,
  address: v.nullable(ipv4),
  mac: v.custom<Mac>((value) => typeof value === 'string' && tryParseMac(value) === value),
  bridge: v.custom<LinkName>((value) => typeof value === 'string' && tryParseLinkName(value) !== undefined),
});

const syncSchema: v.GenericSchema<unknown, SyncMessage> = v.strictObject({
  version: v.literal(PROTOCOL_VERSION),
  verb: v.literal('sync'),
  vm: integer(0, MAX_VM),
  action: v.pipe(v.string(), v.regex(/^[a-z_]{1,32}$/)),
  pending: v.boolean(),
  holder: v.strictObject({ pid: integer(2), start: integer(0) }),
  nics: v.pipe(v.array(nicSchema), v.maxLength(MAX_NIC + 1)),
});

const verdictSchema = v.strictObject({ verb: v.picklist(['commit', 'undo']) });

export type Answer =
  | {
      readonly version: number;
      readonly ok: true;
      readonly changes: readonly string[];
      readonly warnings: readonly string[];
    }
  | { readonly version: number; readonly ok: false; readonly error: ErrorReport };

/** @throws KvmIbError `bad-input`, saying what to upgrade when the version is another */
export function parseSyncMessage(line: string): SyncMessage {
  const raw = parseJson(line);
  const version = (raw as { version?: unknown } | null)?.version;
  if (typeof version === 'number' && version !== PROTOCOL_VERSION) {
    throw new KvmIbError('bad-input', 'Cannot serve the request', {
      why: `it speaks version ${version} of the protocol, this engine speaks version ${PROTOCOL_VERSION}`,
      fix:
        version > PROTOCOL_VERSION
          ? 'upgrade kvm-ib on this host'
          : 'upgrade the driver on the front-end, then run `onehost sync --force`',
    });
  }
  const result = v.safeParse(syncSchema, raw);
  if (!result.success) throw malformed(v.getDotPath(result.issues[0]) ?? 'request');
  return result.output;
}

export function parseVerdict(line: string): Verdict {
  const result = v.safeParse(verdictSchema, parseJson(line));
  if (!result.success) throw malformed('verdict');
  return result.output.verb;
}

const answerSchema = v.variant('ok', [
  v.object({ version: v.number(), ok: v.literal(true), changes: v.array(v.string()), warnings: v.array(v.string()) }),
  v.object({
    version: v.number(),
    ok: v.literal(false),
    error: v.object({
      code: v.string(),
      exit: v.number(),
      message: v.string(),
      why: v.optional(v.string()),
      fix: v.optional(v.string()),
    }),
  }),
]);

/** The engine's answer; undefined when the line is none. */
export function parseAnswer(line: string): Answer | undefined {
  try {
    const result = v.safeParse(answerSchema, JSON.parse(line));
    return result.success ? (result.output as Answer) : undefined;
  } catch {
    return undefined;
  }
}

function parseJson(line: string): unknown {
  try {
    return JSON.parse(line);
  } catch {
    throw malformed('JSON');
  }
}

function malformed(what: string): KvmIbError {
  return new KvmIbError('bad-input', 'Cannot read the request', {
    why: `its ${what} is malformed or missing`,
    fix: 'the engine is started by the kvm-ib driver; by hand, use the command `kvm-ib`',
  });
}
