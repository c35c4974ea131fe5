/**
 * The engine: the only part of the driver that has rights. It reads one small request, brings the host to it, answers,
 * and where the request is pending waits for the verdict on the stock script. Started by sudo without arguments; its paths
 * are then fixed.
 */
import { writeSync } from 'node:fs';
import { resolveMapping } from '../core/config.ts';
import { errorReport, KvmIbError, toKvmIbError } from '../core/errors.ts';
import type { Owner } from '../core/mapping.ts';
import { describe } from '../core/plan.ts';
import type { Holder } from '../core/state.ts';
import { createLineReader } from '../host/lines.ts';
import { FIXED_PATHS, pathsFrom } from '../host/paths.ts';
import { bootId } from '../host/process.ts';
import { createHost, repeatAnnouncements, requireRights } from '../host/this-host.ts';
import type { Host } from '../ops/host.ts';
import type { SyncResult } from '../ops/sync.ts';
import { commit, sync, undo } from '../ops/sync.ts';
import type { SyncMessage } from './protocol.ts';
import { LINE_LIMIT, PROTOCOL_VERSION, parseSyncMessage, parseVerdict } from './protocol.ts';

const REQUEST_TIMEOUT_MS = 30_000;

if (await repeatAnnouncements(process.argv)) process.exit(0);

// A change that has begun is finished or undone: a hang-up of the ssh session must not cut it in half.
for (const signal of ['SIGHUP', 'SIGINT', 'SIGTERM', 'SIGPIPE'] as const) process.on(signal, () => undefined);

process.exit(await main());

async function main(): Promise<number> {
  try {
    return await serve();
  } catch (cause) {
    const error = toKvmIbError(cause, 'Cannot serve the request');
    answer({ version: PROTOCOL_VERSION, ok: false, error: errorReport(error) });
    return error.exit;
  }
}

async function serve(): Promise<number> {
  const lines = createLineReader(process.stdin, LINE_LIMIT);
  const line = await lines.next(REQUEST_TIMEOUT_MS);
  // Started ahead of need and not needed: nothing was read or changed.
  if (line === undefined) return 0;
  const request = parseSyncMessage(line);
  requireRights('Cannot map a VM', 'let sudo start the engine as root: see rulesets/sudoers.d/kvm-ib');
  const paths = process.env['SUDO_UID'] === undefined ? pathsFrom(process.env) : FIXED_PATHS;
  const host = await createHost(paths, undefined, import.meta.url);
  const owner: Owner = { kind: 'vm', vm: request.vm };
  const holder = identify(host, request);
  const wish = request.nics.map((nic) =>
    resolveMapping(host.config, { ...nic, address: nic.address ?? undefined, vm: request.vm }),
  );
  accept(await sync(host, { owner, wish, action: request.action, holder, pending: request.pending }));
  if (!request.pending) return 0;
  const verdict = await lines.next();
  if (verdict === undefined) return 0;
  accept(
    parseVerdict(verdict) === 'commit'
      ? await commit(host, owner, holder, wish)
      : await undo(host, owner, holder, request.action),
  );
  return 0;
}

function identify(host: Host, request: SyncMessage): Holder {
  const holder: Holder = { ...request.holder, bootId: bootId() };
  if (host.processes.isAlive(holder)) return holder;
  throw new KvmIbError('bad-input', 'Cannot serve the request', {
    why: `the process ${holder.pid} that it names as its holder does not live`,
    fix: 'the engine is started by the kvm-ib driver; by hand, use the command `kvm-ib`',
  });
}

function accept(result: SyncResult): void {
  answer({ version: PROTOCOL_VERSION, ok: true, changes: result.changes.flatMap(describe), warnings: result.warnings });
}

function answer(message: object): void {
  try {
    writeSync(1, `${JSON.stringify(message)}\n`);
  } catch {
    // The parser is gone; what it would have heard stands in the state file.
  }
}
