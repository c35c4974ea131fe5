/**
 * What parser and engine say to each other: one JSON object a line, over the engine's standard input and output.
 *
 *   parser -> {"version":2,"verb":"sync","vm":42,"action":"deploy","mode":"start","holder":{"pid":…,"start":…},"nics":[…],…}
 *   engine -> {"version":2,"ok":true,"changes":[…],"warnings":[…]}            the kernel holds the mappings
 *   parser -> {"verb":"commit"} or {"verb":"undo"}                          after the stock script has ended
 *   engine -> {"version":2,"ok":true,…}
 *
 *   hook   -> {"version":2,"verb":"settle","vm":42}                         release it if its domain is not active
 *   engine -> {"version":2,"ok":true,…}
 *
 * The request is all that crosses from hostile input to privilege, so it is small and fixed. It names guests and may name
 * addresses; the engine holds both against its own configuration and decides links and labels itself. Without a
 * verdict (the parser died) the file stays pending and reconcile decides.
 *
 * Version 1 knew `sync` with `pending` in place of `mode`. The engine still serves it, since hosts may be upgraded first.
 */
import * as v from 'valibot';
import type { Ipv4, LinkName, Mac } from '../core/address.ts';
import { tryParseIpv4, tryParseLinkName, tryParseMac } from '../core/address.ts';
import type { ErrorReport } from '../core/errors.ts';
import { KvmIbError } from '../core/errors.ts';

export const PROTOCOL_VERSION = 2;
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

export const MODES = ['start', 'restart', 'plug', 'unplug', 'follow', 'check', 'release', 'outcome'] as const;

/**
 * What is asked for, by the state of the domain and the place of the stock script. Only the first four get a verdict.
 *
 * - `start`: before the script starts the domain: the kernel is to hold the wish.
 * - `restart`: before the script restarts a running guest: the same, for the NICs that the domain has.
 * - `plug`: before the script plugs NICs into a running domain; what its other NICs have by range stays.
 * - `unplug`: before the script takes NICs from it: the kernel is touched after `commit` only.
 * - `follow`: after the script changed a running domain.
 * - `check`: whether `follow` would succeed; changes nothing.
 * - `release`: after the script ended the domain.
 * - `outcome`: after a step that may have started, changed or ended the domain: what it has now, nothing where there is none.
 */
export type Mode = (typeof MODES)[number];

/** Whether a verdict follows the answer. */
export function awaitsVerdict(mode: Mode): boolean {
  return mode === 'start' || mode === 'restart' || mode === 'plug' || mode === 'unplug';
}

export interface SyncMessage {
  readonly version: number;
  readonly verb: 'sync';
  readonly vm: number;
  readonly action: string;
  readonly mode: Mode;
  /** The process that the outcome depends on; `start` as in /proc/PID/stat. */
  readonly holder: { readonly pid: number; readonly start: number };
  readonly nics: readonly NicMessage[];
  /** NICs that OpenNebula knows and that are to have no mapping. */
  readonly unmapped: readonly number[];
  /** NICs that cannot be mapped under the configuration of now and keep what they have. */
  readonly keep: readonly number[];
  /** NICs that this action plugs in. */
  readonly attaching: readonly number[];
  /** NIC numbers of aliases that this action detaches. */
  readonly detachedAliases: readonly number[];
}

export interface SettleMessage {
  readonly version: number;
  readonly verb: 'settle';
  readonly vm: number;
}

export type Message = SyncMessage | SettleMessage;

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
const nicNumbers = v.pipe(v.array(integer(0, MAX_NIC)), v.maxLength(MAX_NIC + 1));

const syncFields = {
  verb: v.literal('sync'),
  vm: integer(0, MAX_VM),
  action: v.pipe(v.string(), v.regex(/^[a-z_]{1,32}$/)),
  holder: v.strictObject({ pid: integer(2), start: integer(0) }),
  nics: v.pipe(v.array(nicSchema), v.maxLength(MAX_NIC + 1)),
};
const syncSchema: v.GenericSchema<unknown, SyncMessage> = v.strictObject({
  version: v.literal(PROTOCOL_VERSION),
  ...syncFields,
  mode: v.picklist(MODES),
  unmapped: nicNumbers,
  keep: nicNumbers,
  attaching: nicNumbers,
  detachedAliases: nicNumbers,
});
const firstSyncSchema = v.strictObject({ version: v.literal(1), ...syncFields, pending: v.boolean() });
const settleSchema: v.GenericSchema<unknown, SettleMessage> = v.strictObject({
  version: v.literal(PROTOCOL_VERSION),
  verb: v.literal('settle'),
  vm: integer(0, MAX_VM),
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

/** The version that a request names, to answer in; that of this engine when it names none. */
export function versionOf(line: string): number {
  try {
    return (JSON.parse(line) as { version?: unknown } | null)?.version === 1 ? 1 : PROTOCOL_VERSION;
  } catch {
    return PROTOCOL_VERSION;
  }
}

/** @throws KvmIbError `bad-input`, saying what to upgrade when the version is one that this engine does not speak */
export function parseMessage(line: string): Message {
  const raw = parseJson(line);
  const { version, verb } = (raw ?? {}) as { version?: unknown; verb?: unknown };
  if (typeof version === 'number' && version !== PROTOCOL_VERSION && version !== 1) {
    throw new KvmIbError('bad-input', 'Cannot serve the request', {
      why: `it speaks version ${version} of the protocol, this engine speaks versions 1 to ${PROTOCOL_VERSION}`,
      fix:
        version > PROTOCOL_VERSION
          ? 'upgrade kvm-ib on this host'
          : 'upgrade the driver on the front-end, then run `onehost sync --force`',
    });
  }
  if (version === 1) return fromFirstVersion(validated(firstSyncSchema, raw));
  return verb === 'settle' ? validated(settleSchema, raw) : validated(syncSchema, raw);
}

function fromFirstVersion({ pending, ...rest }: v.InferOutput<typeof firstSyncSchema>): SyncMessage {
  const mode: Mode = pending ? 'start' : rest.nics.length === 0 ? 'release' : 'follow';
  return { ...rest, mode, unmapped: [], keep: [], attaching: [], detachedAliases: [] };
}

function validated<T>(schema: v.GenericSchema<unknown, T>, raw: unknown): T {
  const result = v.safeParse(schema, raw);
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
