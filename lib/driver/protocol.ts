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
 * In a live migration the parser of the source talks to the engines of both hosts, to that of the destination over ssh:
 *
 *   source      <- {"version":3,"verb":"sync","mode":"depart",…}            -> {"version":3,"ok":true,"departure":{…},…}
 *   destination <- {"version":3,"verb":"arrive","when":"resume",…}          -> {"version":3,"ok":true,…}
 *                        … the stock script runs …
 *   source      <- {"verb":"release"}                                       -> {"version":3,"ok":true,…}   it has stopped here
 *   destination <- {"verb":"released"}
 *   destination -> {"version":3,"event":"resumed"}                          it runs there: `release` and `released`, if they were not yet
 *   destination -> {"version":3,"event":"arrived",…}                        its mappings are in the kernel
 *   both        <- {"verb":"commit"} or {"verb":"undo"}                     -> {"version":3,"ok":true,…}
 *
 * The request is all that crosses from hostile input to privilege, so it is small and fixed. It names guests and may name
 * addresses; the engine holds both against its own configuration and decides links and labels itself. Without a
 * verdict (the parser died) the file stays pending and reconcile decides.
 *
 * Version 1 knew `sync` with `pending` in place of `mode`, version 2 no migration. The engine still serves both, since hosts
 * may be upgraded first; and a request names the oldest version that has it.
 */
import * as v from 'valibot';
import type { Ipv4, LinkName, Mac } from '../core/address.ts';
import { tryParseIpv4, tryParseLinkName, tryParseMac } from '../core/address.ts';
import type { ErrorReport } from '../core/errors.ts';
import { KvmIbError } from '../core/errors.ts';
import type { Holder } from '../core/state.ts';
import type { SourceLink } from '../ops/migrate.ts';

export const PROTOCOL_VERSION = 3;
/** The oldest version with `sync` and `settle` as they are, but for the mode `depart`. */
const SYNC_VERSION = 2;
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

export const MODES = ['start', 'restart', 'plug', 'unplug', 'follow', 'check', 'release', 'depart', 'outcome'] as const;

/**
 * What is asked for, by the state of the domain and the place of the stock script. The first four and `depart` get a verdict.
 *
 * - `start`: before the script starts the domain: the kernel is to hold the wish.
 * - `restart`: before the script restarts a running guest: the same, for the NICs that the domain has.
 * - `plug`: before the script plugs NICs into a running domain; what its other NICs have by range stays.
 * - `unplug`: before the script takes NICs from it: the kernel is touched after `commit` only.
 * - `follow`: after the script changed a running domain.
 * - `check`: whether `follow` would succeed; changes nothing.
 * - `release`: after the script ended the domain.
 * - `depart`: before the script moves the domain to another host: the kernel is touched after `release` or `commit` only.
 * - `outcome`: after a step that may have started, changed or ended the domain: what it has now, nothing where there is none.
 */
export type Mode = (typeof MODES)[number];

/** Whether a verdict follows the answer. */
export function awaitsVerdict(mode: Mode): boolean {
  return ['start', 'restart', 'plug', 'unplug', 'depart'].includes(mode);
}

/** The version that a request of this mode names. */
export function syncVersion(mode: Mode): number {
  return mode === 'depart' || mode === 'outcome' ? PROTOCOL_VERSION : SYNC_VERSION;
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

/** One guest NIC that comes to this host. */
export interface ArrivingNic extends NicMessage {
  /** The IB address that it has on the source; null: there is no source. */
  readonly held: Ipv4 | null;
}

/** The host that the guest comes from. */
export interface Source {
  /** The process there that conducts the migration. */
  readonly holder: Holder;
  readonly links: readonly SourceLink[];
}

/** A VM comes to this host. The engine itself is the holder, and goes on alone when its input ends without a verdict. */
export interface ArriveMessage {
  readonly version: number;
  readonly verb: 'arrive';
  readonly vm: number;
  readonly action: string;
  /** `now`: the kernel is to hold its mappings at once. `resume`: when the guest runs here. */
  readonly when: 'now' | 'resume';
  readonly nics: readonly ArrivingNic[];
  readonly unmapped: readonly number[];
  /** Null: with `now` nobody still has its addresses, with `resume` nobody says whether it comes from another host. */
  readonly source: Source | null;
}

export type Message = SyncMessage | SettleMessage | ArriveMessage;

/**
 * Two come before the others, in a migration: `release`, to `depart`, when the guest has stopped on the source or runs on the
 * destination; and `released`, to `arrive`, when the source has let go. The latter is not answered.
 */
export type Verdict = 'commit' | 'undo' | 'release' | 'released';

const integer = (min: number, max = Number.MAX_SAFE_INTEGER) =>
  v.pipe(v.number(), v.integer(), v.minValue(min), v.maxValue(max));
const ipv4 = v.custom<Ipv4>((value) => typeof value === 'string' && tryParseIpv4(value) !== undefined);

const nicFields = {
  nic: integer(0, MAX_NIC),
  guest: ipv4,
  address: v.nullable(ipv4),
  mac: v.custom<Mac>((value) => typeof value === 'string' && tryParseMac(value) === value),
  bridge: v.custom<LinkName>((value) => typeof value === 'string' && tryParseLinkName(value) !== undefined),
};
const nicSchema: v.GenericSchema<unknown, NicMessage> = v.strictObject(nicFields);
const nicNumbers = v.pipe(v.array(integer(0, MAX_NIC)), v.maxLength(MAX_NIC + 1));

const holderFields = { pid: integer(2), start: integer(0) };
const syncFields = {
  verb: v.literal('sync'),
  vm: integer(0, MAX_VM),
  action: v.pipe(v.string(), v.regex(/^[a-z_]{1,32}$/)),
  holder: v.strictObject(holderFields),
  nics: v.pipe(v.array(nicSchema), v.maxLength(MAX_NIC + 1)),
};
const syncSchema: v.GenericSchema<unknown, SyncMessage> = v.strictObject({
  version: integer(SYNC_VERSION, PROTOCOL_VERSION),
  ...syncFields,
  mode: v.picklist(MODES),
  unmapped: nicNumbers,
  keep: nicNumbers,
  attaching: nicNumbers,
  detachedAliases: nicNumbers,
});
const firstSyncSchema = v.strictObject({ version: v.literal(1), ...syncFields, pending: v.boolean() });
const settleSchema: v.GenericSchema<unknown, SettleMessage> = v.strictObject({
  version: integer(SYNC_VERSION, PROTOCOL_VERSION),
  verb: v.literal('settle'),
  vm: integer(0, MAX_VM),
});
/** At most 20 bytes: six on Ethernet, twenty on IPoIB. */
const hardware = v.pipe(v.string(), v.regex(/^[0-9a-f]{2}(?::[0-9a-f]{2}){0,31}$/));
const linkSchema: v.GenericSchema<unknown, SourceLink> = v.strictObject({
  network: v.pipe(v.string(), v.minLength(1), v.maxLength(100)),
  hardware,
  broadcast: v.nullable(hardware),
  mtu: integer(68, 65_536),
});
const links = v.pipe(v.array(linkSchema), v.maxLength(MAX_NIC + 1));
const arrivingNics = v.pipe(
  v.array(v.strictObject({ ...nicFields, held: v.nullable(ipv4) })),
  v.maxLength(MAX_NIC + 1),
);
const sourceSchema: v.GenericSchema<unknown, Source> = v.strictObject({
  holder: v.strictObject({ ...holderFields, bootId: v.pipe(v.string(), v.regex(/^[0-9a-f-]{1,64}$/)) }),
  links,
});
const arriveSchema: v.GenericSchema<unknown, ArriveMessage> = v.strictObject({
  version: v.literal(PROTOCOL_VERSION),
  verb: v.literal('arrive'),
  vm: syncFields.vm,
  action: syncFields.action,
  when: v.picklist(['now', 'resume']),
  nics: arrivingNics,
  unmapped: nicNumbers,
  source: v.nullable(sourceSchema),
});

const verdictSchema = v.strictObject({ verb: v.picklist(['commit', 'undo', 'release', 'released']) });

export type Answer =
  | {
      readonly version: number;
      readonly ok: true;
      readonly changes: readonly string[];
      readonly warnings: readonly string[];
      /** Of `depart`. */
      readonly departure?: DepartureMessage | undefined;
      /** Of `arrive`: this is the host that the guest is on; nothing was done. */
      readonly here?: boolean | undefined;
    }
  | { readonly version: number; readonly ok: false; readonly error: ErrorReport };

/** What a guest takes along, as the destination is to be told. */
export interface DepartureMessage {
  readonly nics: readonly ArrivingNic[];
  readonly links: readonly SourceLink[];
}

/** Said between two answers of `arrive`: the guest runs there; it has its addresses there, or could not be given them. */
export type ArrivalEvent =
  | { readonly version: number; readonly event: 'resumed' }
  | { readonly version: number; readonly event: 'arrived'; readonly warnings: readonly string[] }
  | { readonly version: number; readonly event: 'failed'; readonly error: ErrorReport };

/** The version that a request names, to answer in; that of this engine when it names none. */
export function versionOf(line: string): number {
  try {
    const version = (JSON.parse(line) as { version?: unknown } | null)?.version;
    return version === 1 || version === 2 ? version : PROTOCOL_VERSION;
  } catch {
    return PROTOCOL_VERSION;
  }
}

/** @throws KvmIbError `bad-input`, saying what to upgrade when the version is one that this engine does not speak */
export function parseMessage(line: string): Message {
  const raw = parseJson(line);
  const { version, verb } = (raw ?? {}) as { version?: unknown; verb?: unknown };
  if (typeof version === 'number' && ![1, 2, PROTOCOL_VERSION].includes(version)) {
    throw new KvmIbError('bad-input', 'Cannot serve the request', {
      why: `it speaks version ${version} of the protocol, this engine speaks versions 1 to ${PROTOCOL_VERSION}`,
      fix:
        version > PROTOCOL_VERSION
          ? 'upgrade kvm-ib on this host'
          : 'upgrade the driver on the front-end, then run `onehost sync --force`',
    });
  }
  if (version === 1) return fromFirstVersion(validated(firstSyncSchema, raw));
  if (verb === 'arrive') return validated(arriveSchema, raw);
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

const errorSchema = v.object({
  code: v.string(),
  exit: v.number(),
  message: v.string(),
  why: v.optional(v.string()),
  fix: v.optional(v.string()),
});
const answerSchema = v.variant('ok', [
  v.object({
    version: v.number(),
    ok: v.literal(true),
    changes: v.array(v.string()),
    warnings: v.array(v.string()),
    departure: v.optional(v.object({ nics: arrivingNics, links })),
    here: v.optional(v.boolean()),
  }),
  v.object({ version: v.number(), ok: v.literal(false), error: errorSchema }),
]);
const eventSchema = v.variant('event', [
  v.object({ version: v.number(), event: v.literal('resumed') }),
  v.object({ version: v.number(), event: v.literal('arrived'), warnings: v.array(v.string()) }),
  v.object({ version: v.number(), event: v.literal('failed'), error: errorSchema }),
]);

/** What the engine says of an arrival between two answers; undefined when the line is no such thing. */
export function parseEvent(line: string): ArrivalEvent | undefined {
  try {
    const result = v.safeParse(eventSchema, JSON.parse(line));
    return result.success ? (result.output as ArrivalEvent) : undefined;
  } catch {
    return undefined;
  }
}

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
