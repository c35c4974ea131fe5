/**
 * What happened when during one migration: libvirt's events on both hosts, and the frames on their links, all by one clock.
 *
 *   suspended          libvirt: the guest stands still on the source
 *   resumed            it runs on the destination: the first frame that QEMU sends for it, or libvirt's event
 *   announced          the destination's first ARP for the address, on its ib0
 *   arrived            the first packet that came in by the destination's ib0 and went to the guest's tap
 *   guest              the guest's first own packet there, on its tap
 *   answered           its first packet with its IB address, on the destination's ib0
 *
 * QEMU's part of the silence is suspended to resumed. Ours is resumed to the first packet through the destination, whichever
 * way; how soon the guest answers is its own affair, and under emulation it takes its time. The silence itself is what the
 * outside client sees: the longest time without an answer to the pings that it sends all the time.
 */
import type { ChildProcess } from 'node:child_process';
import { spawn } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { FABRIC } from './lab.ts';
import type { PairGuest } from './moves.ts';
import type { HostName, Pair } from './pair.ts';
import { runTool, waitFor } from './process.ts';

/** Times in ms since 1970, with fractions; undefined: it did not happen. */
export interface Timeline {
  readonly suspended: number | undefined;
  readonly rarp: number | undefined;
  readonly event: number | undefined;
  readonly announced: number | undefined;
  readonly arrived: number | undefined;
  readonly guest: number | undefined;
  readonly answered: number | undefined;
  /** The guest's last packet on the source's ib0. */
  readonly lastAtSource: number | undefined;
  /** The longest gap between two answers that the outside client got, and how many of its pings were lost. */
  readonly silence: { readonly from: number; readonly to: number; readonly unanswered: number } | undefined;
}

export interface Watch {
  /** Waits for an event of the guest's domain, such as `Started Migrated`. Those of before count. */
  readonly until: (host: HostName, event: string, limit?: number) => Promise<number>;
  /** Events of the guest's domain so far. */
  readonly events: (host: HostName) => readonly string[];
  readonly stop: () => Promise<Timeline>;
}

/** Between two pings of the outside client, ms. */
const PING_MS = 5;
const TCPDUMP = '/usr/bin/tcpdump';
let watches = 0;

export async function watchMove(pair: Pair, guest: PairGuest, from: HostName, to: HostName): Promise<Watch> {
  watches += 1;
  const folder = join(pair.folder, `watch-${watches}`);
  mkdirSync(folder);
  const [source, destination] = [pair.hosts[from], pair.hosts[to]];
  const captures = {
    // Begins when libvirt makes the tap. Not on the bridge: there only what is addressed to the host is seen.
    tap: captureTap(destination.netns, `one-${guest.vm.id}-0`, folder, `ether host ${guest.mac}`),
    // What goes out only: the guest talks with guests of the destination while it is on the source.
    arriving: await capture(destination.netns, 'ib0', folder, `src host ${guest.address} or arp`, 'out'),
    leaving: await capture(source.netns, 'ib0', folder, `ip src ${guest.address}`, 'out'),
    outside: await capture('kib-outside', 'ib0', folder, `icmp and host ${guest.address}`),
  };
  const seen = { [from]: await watchEvents(pair, from, guest), [to]: await watchEvents(pair, to, guest) } as Record<
    HostName,
    Events
  >;
  const options = ['-q', '-i', String(PING_MS / 1000), '-s', '16'];
  const ping = background(pair.outside.argv(['/bin/ping', ...options, guest.address]));
  await new Promise((resolve) => setTimeout(resolve, 300));

  return {
    events: (host) => seen[host].events.map(({ text }) => text),
    until: async (host, wanted, limit = 60_000) => {
      const find = () => seen[host].events.find(({ text }) => text === wanted)?.at;
      return waitFor(`the event ${wanted} of ${guest.domain} on ${host}`, find, limit, 5);
    },
    stop: async () => {
      // The client has heard again for a while, or never will.
      await new Promise((resolve) => setTimeout(resolve, 500));
      await end(ping, 'SIGINT');
      for (const each of Object.values(captures)) await end(each.child, 'SIGINT');
      for (const host of [from, to]) await end(seen[host].child, 'SIGTERM');
      const event = (host: HostName, text: RegExp) => seen[host].events.find((each) => text.test(each.text))?.at;
      const address = guest.address;
      return {
        suspended: event(from, /^Suspended /),
        event: event(to, /^Resumed /),
        rarp: await first(captures.tap.file, 'ether proto 0x8035'),
        announced: await first(captures.arriving.file, `arp and arp[14:4] = ${hex(address)}`),
        arrived: await first(captures.tap.file, `ip and ether dst ${guest.mac} and net ${FABRIC.network}`),
        guest: await first(captures.tap.file, `ip and ether src ${guest.mac}`),
        answered: await first(captures.arriving.file, `ip src ${address}`),
        lastAtSource: (await times(captures.leaving.file, 'ip')).at(-1),
        silence: longest(
          await times(captures.outside.file, 'icmp[icmptype] = icmp-echoreply'),
          await times(captures.outside.file, 'icmp[icmptype] = icmp-echo'),
        ),
      };
    },
  };
}

/** The first sign that the guest runs on the destination. */
export function resumed({ rarp, event }: Timeline): number | undefined {
  return rarp !== undefined && event !== undefined ? Math.min(rarp, event) : (rarp ?? event);
}

export interface Split {
  readonly silence: number;
  /** Suspended to resumed: QEMU's part. */
  readonly qemu: number;
  /** Resumed to the first packet through the destination: our part. */
  readonly ours: number;
  /** Resumed to the announcement of the address, to the guest's first own packet, to its first packet that left the host. */
  readonly announced: number;
  readonly guest: number;
  readonly answered: number;
}

/** Milliseconds. @throws Error naming what is missing from the timeline */
export function split(timeline: Timeline): Split {
  const { suspended, announced, arrived, guest, answered, silence } = timeline;
  const began = resumed(timeline);
  if (suspended === undefined || began === undefined || answered === undefined || silence === undefined) {
    throw new Error(`The migration was not seen as a whole: ${JSON.stringify(timeline)}`);
  }
  const round = (ms: number) => Math.round(ms * 10) / 10;
  const after = (at: number | undefined) => round((at ?? Number.NaN) - began);
  return {
    silence: round(silence.to - silence.from),
    qemu: round(began - suspended),
    ours: after(Math.min(arrived ?? answered, answered)),
    announced: after(announced),
    guest: after(guest),
    answered: after(answered),
  };
}

export function describeSplit({ silence, qemu, ours, announced, guest, answered }: Split): string {
  return (
    `silence ${silence} ms: QEMU's part ${qemu}, ours ${ours} ` +
    `(after the resume: address announced ${announced}, guest's first packet ${guest}, its first to leave the host ${answered})`
  );
}

/** The middle one. */
export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)] ?? Number.NaN;
}

interface Events {
  readonly child: ChildProcess;
  readonly events: readonly { readonly at: number; readonly text: string }[];
}

async function watchEvents(pair: Pair, host: HostName, { domain }: PairGuest): Promise<Events> {
  const virsh = ['/usr/bin/virsh', '--readonly', '-c', 'qemu:///system'] as const;
  const child = background(
    pair.hosts[host].inside([...virsh, 'event', '--event', 'lifecycle', '--loop', '--timestamp']),
  );
  const events: { at: number; text: string }[] = [];
  if (child.stdout === null) throw new Error('virsh event without standard output');
  createInterface({ input: child.stdout }).on('line', (line) => {
    const match = /^(\S+ \S+): event 'lifecycle' for domain '([^']*)': (.*)$/.exec(line);
    if (match?.[2] === domain)
      events.push({ at: Date.parse((match[1] ?? '').replace(' ', 'T')), text: match[3] ?? '' });
  });
  return { child, events };
}

// -U: what was seen is in the file when it ends. -Z: the file is root's. -p: with a bridge in promiscuous mode frames that are
// translated while they are bridged arrive twice.
const CAPTURE = ['-n', '-s', '96', '-U', '-Z', 'root', '-p', '--immediate-mode'];

async function capture(netns: string, link: string, folder: string, filter: string, direction = 'inout') {
  const file = join(folder, `${netns}-${link}.pcap`);
  const argv = ['/usr/sbin/ip', 'netns', 'exec', netns, TCPDUMP, ...CAPTURE, '-Q', direction, '-i', link, '-w', file];
  const child = background([...argv, filter]);
  let said = '';
  child.stderr?.on('data', (chunk: Buffer) => {
    said += chunk.toString();
  });
  await waitFor(
    `tcpdump on ${link} of ${netns}`,
    () => {
      if (child.exitCode !== null) throw new Error(`tcpdump: ${said}`);
      return said.includes('listening on') || undefined;
    },
    10_000,
    20,
  );
  return { child, file };
}

/** As `capture`, of a link that is not there yet. */
function captureTap(netns: string, link: string, folder: string, filter: string) {
  const file = join(folder, `${netns}-${link}.pcap`);
  const script = `until [ -e "/sys/class/net/$1" ]; do sleep 0.02; done; shift; exec "$@"`;
  const argv = ['/usr/sbin/ip', 'netns', 'exec', netns, '/bin/sh', '-c', script, 'wait', link];
  return { child: background([...argv, TCPDUMP, ...CAPTURE, '-i', link, '-w', file, filter]), file };
}

async function first(file: string, filter: string): Promise<number | undefined> {
  return (await times(file, filter))[0];
}

/** When each frame of a capture that the filter takes was seen. */
async function times(file: string, filter: string): Promise<readonly number[]> {
  if (!existsSync(file)) return [];
  const text = await runTool([TCPDUMP, '-n', '-tt', '-q', '-r', file, filter]);
  return text.split('\n').flatMap((line) => {
    const seconds = /^(\d+\.\d+) /.exec(line)?.[1];
    return seconds === undefined ? [] : [Number(seconds) * 1000];
  });
}

function longest(answers: readonly number[], questions: readonly number[]): Timeline['silence'] {
  let found: { from: number; to: number } | undefined;
  answers.forEach((to, n) => {
    const from = answers[n - 1];
    if (from !== undefined && (found === undefined || to - from > found.to - found.from)) found = { from, to };
  });
  if (found === undefined) return undefined;
  return { ...found, unanswered: questions.length - answers.length };
}

function hex(address: string): string {
  const bytes = address.split('.').map((part) => Number(part).toString(16).padStart(2, '0'));
  return `0x${bytes.join('')}`;
}

/** Ends when this process does, in whatever way. */
function background(argv: readonly string[]): ChildProcess {
  return spawn('/usr/bin/setpriv', ['--pdeathsig', 'KILL', '--', ...argv], {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' },
  });
}

/** Ends a program. `nsenter` has it as its child, and would leave it behind; others became the program itself. */
async function end(child: ChildProcess, signal: 'SIGINT' | 'SIGTERM'): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const ended = new Promise((resolve) => child.once('exit', resolve));
  const below = readFileSync(`/proc/${child.pid}/task/${child.pid}/children`, 'utf8').split(' ').filter(Boolean);
  for (const pid of below.map(Number)) process.kill(pid, signal);
  if (below.length === 0) child.kill(signal);
  await ended;
}
