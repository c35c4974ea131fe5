/**
 * Live migration, conducted from the source. The destination is asked before the guest moves; its engine waits for the
 * moment when the guest runs there, and the source lets go then. What comes of the stock script decides on both hosts.
 */
import { spawn } from 'node:child_process';
import { domainName } from '../core/mapping.ts';
import { watchDomain } from '../host/arrivals.ts';
import { millisecondsFrom } from '../host/paths.ts';
import { ownIdentity } from '../host/process.ts';
import { logText } from '../opennebula/contract.ts';
import type { Engine, WishMessage } from './engine-client.ts';
import { errorOf, startEngine } from './engine-client.ts';
import { complain, note, say, settle } from './log.ts';
import type { Ending } from './stock.ts';
import { succeeded } from './stock.ts';

const VIRSH = '/usr/bin/virsh';
/** Longer than any migration that still makes progress. */
const DEADLINE_MS = millisecondsFrom(process.env['KVM_IB_MIGRATE_DEADLINE_MS']) ?? 24 * 3_600_000;

const ABORT_MS = 1000;

type Arrival = Omit<Parameters<Engine['arrive']>[0], 'when'>;

/** Runs the stock script between an engine's answer and the verdict. */
export async function underVerdict(engine: Engine, stock: () => Promise<Ending>): Promise<Ending> {
  let ending: Ending;
  try {
    ending = await stock();
  } catch (error) {
    await settle(() => engine.verdict('undo'));
    throw error;
  }
  await settle(() => engine.verdict(succeeded(ending) ? 'commit' : 'undo'));
  return ending;
}

/**
 * @param vm its id, the action, and what it should have where it has nothing
 * @param stock runs the stock script
 */
export async function migrateTo(
  destination: string,
  { vm, action, wish }: { readonly vm: number; readonly action: string; readonly wish: WishMessage },
  stock: () => Promise<Ending>,
): Promise<Ending> {
  const here = startEngine();
  let there: Engine | undefined;
  try {
    const { departure, warnings } = await here.depart(vm, action, wish);
    note(warnings);
    if (departure.nics.length === 0) return await stock();
    there = startEngine(destination);
    const source = { holder: ownIdentity(), links: departure.links };
    const arrival: Arrival = { vm, action, nics: departure.nics, unmapped: [], source };
    const answer = await there.arrive({ ...arrival, when: 'resume' });
    noteOf(destination, answer.warnings);
    if (answer.here) return await underVerdict(here, stock);
    return await moving(destination, arrival, here, there, stock);
  } catch (cause) {
    await there?.close();
    await settle(() => here.verdict('undo'));
    throw cause;
  } finally {
    await there?.close();
    await here.close();
  }
}

/** The stock script moves the guest, both hosts follow. */
async function moving(
  destination: string,
  arrival: Arrival,
  here: Engine,
  there: Engine,
  stock: () => Promise<Ending>,
): Promise<Ending> {
  let isOver = false;
  let aborting: NodeJS.Timeout | undefined;
  const abort = (why: string): void => {
    if (isOver || aborting !== undefined) return;
    say(logText({ level: 'error', text: `${why}: the migration of VM ${arrival.vm} is aborted` }));
    // Again and again, since the stock script may not have come to it yet.
    aborting = setInterval(() => abortJob(arrival.vm), ABORT_MS);
    abortJob(arrival.vm);
  };
  const deadline = setTimeout(() => abort(`it did not end within ${DEADLINE_MS} ms`), DEADLINE_MS);
  let releasing: Promise<void> | undefined;
  const release = (): void => {
    if (isOver) return;
    releasing ??= settle(() => here.verdict('release')).then(() => there.released());
  };
  // It stops here a moment before it runs there: what it has goes in between. Without this event it goes when it runs there.
  const stopWatching = watchDomain(arrival.vm, 'Suspended Migrated', release);
  let isThere = false;
  there.listen((event) => {
    if (event === undefined) {
      // Nobody waits there any more, so the guest would come to a host where it has no address.
      if (!isThere) abort(`the kvm-ib engine of ${destination} ended`);
    } else if (event.event === 'failed') {
      complain(errorOf(event.error, destination), 'It is tried again at the end');
    } else {
      isThere = true;
      if (event.event === 'arrived') noteOf(destination, event.warnings);
      release();
    }
  });
  let ending: Ending;
  try {
    ending = await stock();
  } catch (cause) {
    await settle(() => there.verdict('undo'));
    throw cause;
  } finally {
    isOver = true;
    stopWatching();
    clearTimeout(deadline);
    clearInterval(aborting);
  }
  const isDone = succeeded(ending);
  let isHeard = true;
  try {
    noteOf(destination, await there.verdict(isDone ? 'commit' : 'undo'));
  } catch (cause) {
    isHeard = false;
    complain(
      cause,
      isDone ? 'It is asked again' : 'It gives back by itself what it holds, when it sees that no domain came',
    );
  }
  await there.close();
  await releasing;
  await settle(() => here.verdict(isDone ? 'commit' : 'undo'));
  if (isDone && !isHeard) await settle(() => arriveLate(destination, arrival));
  return ending;
}

/** The engine of the destination was lost on the way, but the guest is there. */
async function arriveLate(destination: string, arrival: Arrival): Promise<readonly string[]> {
  const there = startEngine(destination);
  try {
    const { warnings } = await there.arrive({ ...arrival, when: 'now' });
    return [...warnings, ...(await there.verdict('commit'))];
  } finally {
    await there.close();
  }
}

/** Ends the migration that libvirt is at, so that the stock script fails. When it is past that point, it goes on. */
function abortJob(vm: number): void {
  const child = spawn(VIRSH, ['--connect', 'qemu:///system', 'domjobabort', domainName(vm)], { stdio: 'ignore' });
  // Without virsh there is no migration either.
  child.on('error', () => undefined);
}

function noteOf(host: string, warnings: readonly string[]): void {
  note(warnings.map((warning) => `${host}: ${warning}`));
}
