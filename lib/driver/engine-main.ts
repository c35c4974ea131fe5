/**
 * The engine: the only part of the driver that has rights. It reads one small request, brings the host to it, answers,
 * and where the outcome depends on the stock script waits for the verdict on it. Started by sudo without arguments; its
 * paths are then fixed.
 */
import { writeSync } from 'node:fs';
import { resolveMapping } from '../core/config.ts';
import { errorReport, KvmIbError, toKvmIbError } from '../core/errors.ts';
import type { Mapping } from '../core/mapping.ts';
import { describe } from '../core/plan.ts';
import type { Holder } from '../core/state.ts';
import { createLineReader } from '../host/lines.ts';
import { FIXED_PATHS, pathsFrom } from '../host/paths.ts';
import { bootId, ownIdentity } from '../host/process.ts';
import { createHost, repeatAnnouncements, requireRights } from '../host/this-host.ts';
import type { ActionRequest } from '../ops/actions.ts';
import { check, commit, finish, follow, mark, outcome, prepare, release, settle, start, undo } from '../ops/actions.ts';
import type { Host } from '../ops/host.ts';
import type { Departure } from '../ops/migrate.ts';
import { depart, departed, letGo, stay } from '../ops/migrate.ts';
import type { SyncResult } from '../ops/sync.ts';
import { serveArrival } from './arrival.ts';
import type { DepartureMessage, Mode, SyncMessage, Verdict } from './protocol.ts';
import { awaitsVerdict, LINE_LIMIT, PROTOCOL_VERSION, parseMessage, parseVerdict, versionOf } from './protocol.ts';

const REQUEST_TIMEOUT_MS = 30_000;

if (await repeatAnnouncements(process.argv)) process.exit(0);

// A change that has begun is finished or undone: a hang-up of the ssh session must not cut it in half.
for (const signal of ['SIGHUP', 'SIGINT', 'SIGTERM', 'SIGPIPE'] as const) process.on(signal, () => undefined);

const BEGIN: Readonly<Record<Mode, (host: Host, request: ActionRequest) => Promise<SyncResult>>> = {
  start: (host, request) => start(host, request),
  restart: prepare,
  plug: prepare,
  unplug: mark,
  follow,
  check,
  release,
  outcome,
  depart,
};

let version = PROTOCOL_VERSION;
process.exit(await main());

async function main(): Promise<number> {
  try {
    return await serve();
  } catch (cause) {
    const error = toKvmIbError(cause, 'Cannot serve the request');
    answer({ version, ok: false, error: errorReport(error) });
    return error.exit;
  }
}

async function serve(): Promise<number> {
  const lines = createLineReader(process.stdin, LINE_LIMIT);
  const line = await lines.next(REQUEST_TIMEOUT_MS);
  // Started ahead of need and not needed: nothing was read or changed.
  if (line === undefined) return 0;
  version = versionOf(line);
  const message = parseMessage(line);
  requireRights('Cannot map a VM', 'let sudo start the engine as root: see rulesets/sudoers.d/kvm-ib');
  const paths = process.env['SUDO_UID'] === undefined ? pathsFrom(process.env) : FIXED_PATHS;
  const host = await createHost(paths, undefined, import.meta.url);
  if (message.verb === 'settle') {
    accept(await settle(host, { kind: 'vm', vm: message.vm }, ownIdentity()));
    return 0;
  }
  if (message.verb === 'arrive') {
    const here = { version, ok: true, here: true, changes: [], warnings: [] };
    await serveArrival(host, message, lines, {
      accept,
      here: () => answer(here),
      event: (event) => answer({ version, ...event }),
    });
    return 0;
  }
  const request = requestOf(host, message);
  accept(await BEGIN[message.mode](host, request));
  if (!awaitsVerdict(message.mode)) return 0;
  for (;;) {
    const line = await lines.next();
    if (line === undefined) return 0;
    const verdict = parseVerdict(line);
    if (verdict !== 'release' || message.mode !== 'depart') {
      accept(await conclude(host, message.mode, request, verdict));
      return 0;
    }
    // The guest runs elsewhere; how the stock script ends is another question.
    try {
      accept(await letGo(host, request.owner, request.holder));
    } catch (cause) {
      answer({ version, ok: false, error: errorReport(toKvmIbError(cause)) });
    }
  }
}

async function conclude(host: Host, mode: Mode, request: ActionRequest, verdict: Verdict): Promise<SyncResult> {
  const { owner, action, holder, wish } = request;
  if (verdict === 'release' || verdict === 'released') {
    throw new KvmIbError('bad-input', 'Cannot read the request', { why: `"${verdict}" is no verdict on ${mode}` });
  }
  if (mode === 'depart') {
    return verdict === 'commit' ? departed(host, request) : stay(host, owner, holder, action);
  }
  if (verdict === 'undo') return undo(host, owner, holder, action);
  if (mode === 'unplug') return finish(host, request);
  return commit(host, owner, holder, mode === 'start' ? wish.mappings : []);
}

/** The request held against the configuration of this host: link, label and ranges are decided here. */
function requestOf(host: Host, message: SyncMessage): ActionRequest {
  const { vm, action, mode, nics, unmapped, attaching, detachedAliases } = message;
  const kept = new Set<number | null>(message.keep);
  const keep = (held: Mapping): boolean => kept.has(held.nic) || (mode !== 'restart' && isAsBefore(held, message));
  return {
    owner: { kind: 'vm', vm },
    action,
    holder: identify(host, message),
    wish: {
      mappings: nics.map((nic) => resolveMapping(host.config, { ...nic, address: nic.address ?? undefined, vm })),
      unmapped,
      attaching,
    },
    keep,
    detachedAliases,
  };
}

/**
 * A NIC of a running guest that has its address by range, then and now: it keeps it, whatever the range has become. Flows
 * go on, and the next restart of the guest brings it to the new range.
 */
function isAsBefore(held: Mapping, { nics, attaching }: SyncMessage): boolean {
  return (
    held.named === false &&
    nics.some(
      (nic) =>
        nic.nic === held.nic &&
        nic.address === null &&
        nic.guest === held.guest &&
        nic.mac === held.mac &&
        nic.bridge === held.bridge &&
        !attaching.includes(nic.nic),
    )
  );
}

function identify(host: Host, request: SyncMessage): Holder {
  const holder: Holder = { ...request.holder, bootId: bootId() };
  if (host.processes.isAlive(holder)) return holder;
  throw new KvmIbError('bad-input', 'Cannot serve the request', {
    why: `the process ${holder.pid} that it names as its holder does not live`,
    fix: 'the engine is started by the kvm-ib driver; by hand, use the command `kvm-ib`',
  });
}

function accept(result: SyncResult & { readonly departure?: Departure }): void {
  const { changes, warnings, departure } = result;
  const more = departure === undefined ? {} : { departure: departureMessage(departure) };
  answer({ version, ok: true, changes: changes.flatMap(describe), warnings, ...more });
}

/** What the parser is to tell the destination. An address by range is the destination's to compute, and to compare. */
function departureMessage({ mappings, links }: Departure): DepartureMessage {
  const nics = mappings.flatMap(({ nic, guest, address, mac, bridge, named }) =>
    nic === null || mac === null
      ? []
      : [{ nic, guest, address: named === false ? null : address, mac, bridge, held: address }],
  );
  return { nics, links };
}

function answer(message: object): void {
  try {
    writeSync(1, `${JSON.stringify(message)}\n`);
  } catch {
    // The parser is gone; what it would have heard stands in the state file.
  }
}
