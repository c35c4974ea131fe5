/** The engine while a VM comes to this host: checks, waits for the guest, cuts over, and goes on alone when nobody asks any more. */

import type { LinkName } from '../core/address.ts';
import { resolveMapping } from '../core/config.ts';
import { errorReport, toKvmIbError } from '../core/errors.ts';
import { watchArrival } from '../host/arrivals.ts';
import type { createLineReader } from '../host/lines.ts';
import { ownIdentity } from '../host/process.ts';
import { commit, start, undo } from '../ops/actions.ts';
import type { Host } from '../ops/host.ts';
import type { Arrival, CutOver } from '../ops/migrate.ts';
import { arrived, complete, cutOver, expect, giveUp, notArrived, refuseSecondOwner } from '../ops/migrate.ts';
import type { SyncResult } from '../ops/sync.ts';
import { pendingBy } from '../ops/sync.ts';
import type { ArriveMessage, Verdict } from './protocol.ts';
import { parseVerdict } from './protocol.ts';

/** Between two looks at the domain, when no verdict will come. */
const LOOK_MS = 500;
/** A domain that has not come until then does not come: its deploy failed, or its migration never began. */
const GRACE_MS = 300_000;
/** One that is still on its way then is left to reconcile. */
const LIMIT_MS = 24 * 3_600_000;

type Told =
  | { readonly event: 'resumed' }
  | { readonly event: 'arrived'; readonly warnings: readonly string[] }
  | { readonly event: 'failed'; readonly error: object };

/** What the engine says on the way. */
export interface Voice {
  accept(result: SyncResult): void;
  here(): void;
  event(event: Told): void;
}

export async function serveArrival(
  host: Host,
  message: ArriveMessage,
  lines: ReturnType<typeof createLineReader>,
  voice: Voice,
): Promise<void> {
  const arrival = arrivalOf(host, message);
  const { owner } = arrival;
  if (message.source !== null && pendingBy(host.store.read(owner), message.source.holder) !== undefined) {
    voice.here();
    return;
  }
  if (message.when === 'now') return serveNow(host, arrival, message, lines, voice);

  const expected = await expect(host, arrival);
  const taps = arrival.mappings.flatMap(({ vm, nic }) => (nic === null ? [] : [`one-${vm}-${nic}` as LinkName]));
  const watch = watchArrival(host.links, owner.vm, taps);
  const change = cutOver(host, arrival, expected);
  await change.refresh();
  const refreshing = keepFresh(change, () => watch.hasTap());
  const source = sourceOf(change);
  let changing: Promise<unknown> = Promise.resolve();
  let isTaken = false;
  void watch.arrived.then(() => {
    refreshing.stop();
    voice.event({ event: 'resumed' });
    changing = refuseSecondOwner(host, arrival, expected)
      .then(() => change.greet())
      // Of an unannounced guest nobody says it.
      .then(() => (arrival.isUnannounced ? undefined : source.letGo()))
      .then(() => change.run())
      .then(async ({ warnings }) => {
        isTaken = true;
        voice.event({ event: 'arrived', warnings });
        await complete(host, arrival, expected);
      })
      .catch((cause: unknown) => voice.event({ event: 'failed', error: errorReport(toKvmIbError(cause)) }));
  });
  try {
    voice.accept(expected);
    await conclude(lines, voice, () => watch.close(), {
      released: () => source.said(),
      commit: async () => {
        await changing;
        if (!isTaken) {
          await refuseSecondOwner(host, arrival, expected).catch(async (cause: unknown) => {
            await giveUp(host, arrival);
            throw cause;
          });
        }
        return arrived(host, arrival, expected);
      },
      undo: async () => {
        await changing;
        return notArrived(host, arrival);
      },
      state: () => stateOf(host, arrival),
      hasBegun: () => watch.hasTap(),
    });
  } finally {
    refreshing.stop();
    watch.close();
  }
}

/** The source lets go when the guest stops there, 50 ms and more before it runs here; waited for no longer than this when it does not. */
const RELEASE_MS = 300;

function sourceOf(change: CutOver): { said(): void; letGo(): Promise<void> } {
  let tell: () => void = () => undefined;
  const told = new Promise<void>((resolve) => {
    tell = resolve;
  });
  // After that no connection to the guest is made any more.
  const known = told.then(() => change.refresh()).catch(() => undefined);
  return {
    said: () => tell(),
    letGo: async () => {
      let timer: NodeJS.Timeout | undefined;
      const late = new Promise<void>((resolve) => {
        timer = setTimeout(resolve, RELEASE_MS);
      });
      await Promise.race([known, late]);
      clearTimeout(timer);
    },
  };
}

const REFRESH_MS = 2000;
/** Of the time, at most this part is spent on it: a table of connection tracking may be large. */
const REFRESH_SHARE = 50;

/** While the domain comes. What began after the last look is found by `complete`. */
function keepFresh(change: CutOver, isComing: () => boolean): { stop(): void } {
  let timer: NodeJS.Timeout;
  let isOver = false;
  const wait = (ms: number): void => {
    timer = setTimeout(() => void look(), ms);
  };
  const look = async (): Promise<void> => {
    const began = performance.now();
    if (isComing()) await change.refresh().catch(() => undefined);
    if (!isOver) wait(Math.max(REFRESH_MS, (performance.now() - began) * REFRESH_SHARE));
  };
  wait(REFRESH_MS);
  return {
    stop: () => {
      isOver = true;
      clearTimeout(timer);
    },
  };
}

async function serveNow(
  host: Host,
  { owner, action, holder, mappings, links }: Arrival,
  { unmapped }: ArriveMessage,
  lines: ReturnType<typeof createLineReader>,
  voice: Voice,
): Promise<void> {
  const except = links.map(({ hardware }) => hardware);
  voice.accept(await start(host, { owner, action, holder, wish: { mappings, unmapped, attaching: [] } }, except));
  await conclude(lines, voice, () => undefined, {
    commit: () => commit(host, owner, holder, mappings),
    undo: () => undo(host, owner, holder, action),
    released: () => undefined,
    state: () => stateOf(host, { owner, holder }),
    hasBegun: () => false,
  });
}

/** `lost`: somebody else decides by now. `refused`: gone, and it will not come. */
type State = 'here' | 'moving' | 'gone' | 'unknown' | 'lost' | 'refused';

interface Ends {
  /** The source has let go, or nobody will say so any more. */
  released(): void;
  commit(): Promise<SyncResult>;
  undo(): Promise<SyncResult>;
  state(): Promise<State>;
  /** Whether the domain was seen to come before. */
  hasBegun(): boolean;
}

/** Waits for the verdict; without one libvirt decides. */
async function conclude(
  lines: ReturnType<typeof createLineReader>,
  voice: Voice,
  stopWatching: () => void,
  ends: Ends,
): Promise<void> {
  let verdict: Verdict | undefined;
  do {
    const line = await lines.next();
    if (line !== undefined) verdict = parseVerdict(line);
    if (line === undefined || verdict === 'released') ends.released();
    if (line === undefined) verdict = await withoutVerdict(ends);
  } while (verdict === 'released');
  stopWatching();
  if (verdict === undefined) return;
  voice.accept(await (verdict === 'undo' ? ends.undo() : ends.commit()));
}

/** @returns undefined when nobody can tell: the file stays pending, and reconcile decides */
async function withoutVerdict(ends: Ends): Promise<'commit' | 'undo' | undefined> {
  const began = performance.now();
  let wasThere = false;
  for (;;) {
    // Before the look at the domain, which is there as long as its tap is.
    wasThere ||= ends.hasBegun();
    const state = await ends.state();
    const waited = performance.now() - began;
    if (state === 'here') return 'commit';
    if (state === 'lost') return undefined;
    if (state === 'refused') return 'undo';
    if (state === 'gone' && (wasThere || waited > GRACE_MS)) return 'undo';
    if (waited > (state === 'moving' ? LIMIT_MS : GRACE_MS)) return undefined;
    if (state === 'moving') wasThere = true;
    await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
  }
}

async function stateOf(host: Host, { owner, holder }: Pick<Arrival, 'owner' | 'holder'>): Promise<State> {
  const file = pendingBy(host.store.read(owner), holder);
  if (file === undefined) return 'lost';
  const { kind } = await host.domains.state(owner.vm);
  if (kind === 'unknown') return 'unknown';
  if (kind === 'inactive') return file.phase.overtaken ? 'refused' : 'gone';
  return (await host.domains.isMoving(owner.vm)) ? 'moving' : 'here';
}

/** The request held against the configuration of this host. */
function arrivalOf(host: Host, { vm, action, when, nics, source }: ArriveMessage): Arrival {
  const mappings = nics.map(({ held: _, ...nic }) =>
    resolveMapping(host.config, { ...nic, address: nic.address ?? undefined, vm }),
  );
  return {
    owner: { kind: 'vm', vm },
    action,
    holder: ownIdentity(),
    mappings,
    expected: new Map(nics.flatMap(({ guest, held }) => (held === null ? [] : [[guest, held] as const]))),
    links: source?.links ?? [],
    isUnannounced: when === 'resume' && source === null,
  };
}
