/**
 * A load of TCP connections through one guest, in the four directions that a migration may break: from outside, to outside,
 * with a guest of the host that it leaves, with a guest of the host that it comes to. Numbers go over each of them all the
 * time and come back; what is lost, reset or silent is seen per connection.
 *
 * Guests have busybox only. So all numbers come from the outside client and are given back by `cat` in a guest: a connection
 * between two guests is one leg of three, outside - guest - guest, joined by `nc` in the middle one.
 */
import { spawn } from 'node:child_process';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { ECHO_PORT, FABRIC } from './lab.ts';
import type { PairGuest } from './moves.ts';
import { inGuest } from './moves.ts';
import type { Pair } from './pair.ts';
import { waitFor } from './process.ts';

export const DIRECTIONS = ['in', 'out', 'guest of the source', 'guest of the destination'] as const;
export type Direction = (typeof DIRECTIONS)[number];

export interface Connection {
  readonly group: string;
  readonly sent: number;
  readonly back: number;
  /** The longest time without an answer since all were open, ms, and when it began (ms since 1970). */
  readonly silence: number;
  readonly silenceAt: number;
  /** How long the last answer is ago, ms. */
  readonly quiet: number;
  /** What broke it. */
  readonly problem: string | null;
}

export interface Load {
  readonly now: () => Promise<readonly Connection[]>;
  /** Waits until something has come back over every connection after this call. @throws Error naming those that are silent */
  readonly answers: (limit?: number) => Promise<void>;
  /** Sends no more, waits for what is on its way. @returns every connection; none was lost where `lostOf` finds none */
  readonly stop: () => Promise<readonly Connection[]>;
}

export interface LoadOptions {
  /** Connections in each direction. */
  readonly each: number;
  /** Milliseconds between two numbers of one connection. */
  readonly interval?: number;
}

const OUT_PORT = 9000;
/** In a guest: what arrives here goes on to a guest that is somewhere else. */
const RELAY = { toMoving: 70, toSource: 71, toDestination: 72 } as const;

/**
 * Opens the connections. All guests run, each direction has half of its connections between guests opened by either side.
 * @throws Error when one of them cannot be opened
 */
export async function startLoad(
  pair: Pair,
  guests: { readonly moving: PairGuest; readonly source: PairGuest; readonly destination: PairGuest },
  { each, interval = 400 }: LoadOptions,
): Promise<Load> {
  const { moving, source, destination } = guests;
  await relay(pair, source, RELAY.toMoving, moving);
  await relay(pair, destination, RELAY.toMoving, moving);
  await relay(pair, moving, RELAY.toSource, source);
  await relay(pair, moving, RELAY.toDestination, destination);
  const half = Math.ceil(each / 2);
  const [IN, OUT, SOURCE, DESTINATION] = DIRECTIONS;
  const spec = {
    interval,
    groups: [
      { name: OUT, count: each, listen: OUT_PORT, on: FABRIC.outside },
      { name: IN, count: each, address: moving.address, port: ECHO_PORT },
      { name: SOURCE, count: half, address: source.address, port: RELAY.toMoving },
      { name: SOURCE, count: each - half, address: moving.address, port: RELAY.toSource },
      { name: DESTINATION, count: half, address: destination.address, port: RELAY.toMoving },
      { name: DESTINATION, count: each - half, address: moving.address, port: RELAY.toDestination },
    ],
  };
  const peer = join(import.meta.dirname, 'load-peer.mjs');
  const [program, ...args] = pair.outside.argv([process.execPath, peer, JSON.stringify(spec)]);
  const child = spawn(program, args, { stdio: ['pipe', 'pipe', 'pipe'], env: { PATH: '/usr/sbin:/usr/bin' } });
  const ended = new Promise((resolve) => child.once('close', resolve));
  let listening = false;
  let open: number | undefined;
  let said = '';
  const reports: (readonly Connection[])[] = [];
  child.stderr.on('data', (chunk: Buffer) => {
    said += chunk.toString();
  });
  createInterface({ input: child.stdout }).on('line', (line) => {
    const value = JSON.parse(line) as { listening?: true; open?: number; connections?: readonly Connection[] };
    if (value.listening !== undefined) listening = true;
    if (value.open !== undefined) open = value.open;
    if (value.connections !== undefined) reports.push(value.connections);
  });
  const whileAlive = <T>(value: T | undefined): T | undefined => {
    if (value === undefined && child.exitCode !== null) throw new Error(`The load has ended: ${said}`);
    return value;
  };
  const report = async (ask: () => void) => {
    whileAlive(undefined);
    const before = reports.length;
    ask();
    return waitFor('a report of the load', () => whileAlive(reports[before]), 40_000, 20);
  };
  const now = () => report(() => child.stdin.write('\n'));
  const stop = async () => {
    const last = await report(() => child.stdin.end());
    await ended;
    return last;
  };
  try {
    await waitFor('the load to listen', () => whileAlive(listening || undefined), 10_000, 20);
    await inGuest(
      pair,
      moving,
      `n=0
while [ $n -lt ${each} ]; do nc ${FABRIC.outside} ${OUT_PORT} -e cat < /dev/null > /dev/null 2>&1 & n=$((n + 1)); done`,
    );
    await waitFor('the connections to be open', () => whileAlive(open), 90_000);
    const wanted = 4 * each;
    if (open !== wanted) {
      const problems = new Set((await now()).map(({ group, problem }) => `${group}: ${problem ?? 'open'}`));
      throw new Error(`Of ${wanted} connections ${open} are open: ${[...problems].join('; ')}`);
    }
  } catch (error) {
    child.kill('SIGKILL');
    throw error;
  }
  return {
    now,
    stop,
    answers: async (limit = 30_000) => {
      const before = await now();
      const silent = async () => {
        const after = await now();
        return after.filter(
          (connection, n) => connection.problem === null && connection.back <= (before[n]?.sent ?? 0),
        );
      };
      let left: readonly Connection[] = before;
      try {
        await waitFor(
          'an answer over every connection',
          async () => {
            left = await silent();
            return left.length === 0 ? true : undefined;
          },
          limit,
        );
      } catch (cause) {
        throw new Error(`${left.length} connections are silent: ${summary(left)}`, { cause });
      }
    },
  };
}

/** Takes connections on a port of a guest and joins each to the echo of another one. */
async function relay(pair: Pair, guest: PairGuest, port: number, to: PairGuest): Promise<void> {
  await inGuest(pair, guest, `nc -ll -p ${port} -e nc ${to.address} ${ECHO_PORT} < /dev/null > /dev/null 2>&1 &`);
}

/** Connections that broke; after `stop` also those over which something did not come back. */
export function lostOf(connections: readonly Connection[]): readonly Connection[] {
  return connections.filter(({ problem }) => problem !== null);
}

/** One line per direction: how many there are, how many were lost and of what, the longest silences. */
export function summary(connections: readonly Connection[]): string {
  return [...new Set(connections.map(({ group }) => group))]
    .map((group) => {
      const own = connections.filter((connection) => connection.group === group);
      const silences = own.map(({ silence }) => silence).sort((a, b) => a - b);
      const lost = lostOf(own);
      const why = [...new Set(lost.map(({ problem }) => problem))].join(', ');
      const median = silences[Math.floor(silences.length / 2)];
      return `${group}: ${own.length} connections, ${lost.length} lost${why && ` (${why})`}, silence median ${median} ms, longest ${silences.at(-1)} ms`;
    })
    .join('\n');
}
