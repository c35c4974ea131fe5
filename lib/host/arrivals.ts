/**
 * Tells when a guest begins to run on this host, while its domain is coming in: by the first frame that its tap lets in
 * (QEMU sends RARP for it when it has arrived, and the guest its own packets), or by libvirt's event, whichever is first.
 * Before that moment neither can be there: on the source it is paused, here it has not run.
 */
import { spawn } from 'node:child_process';
import type { LinkName } from '../core/address.ts';
import { domainName } from '../core/mapping.ts';
import { everySockaddr } from '../link/arp.ts';
import type { Links } from '../link/ports.ts';
import { AF_PACKET, ErrnoError, libc, SOCK_DGRAM, SOCK_NONBLOCK } from './libc.ts';
import { createLineReader } from './lines.ts';

const VIRSH = '/usr/bin/virsh';
const EVENTS = ['--readonly', '--connect', 'qemu:///system', 'event', '--event', 'lifecycle', '--loop'];
const LINE_LIMIT = 4096;
/** Between two looks for the tap, which comes when libvirt prepares the domain; the guest comes a second later, or hours. */
const TAP_MS = 50;
/** Between two looks at the socket: half of it is what a cut-over waits on average. */
const FRAME_MS = 2;
const SOL_PACKET = 263;
/** Linux 4.20: what the host sends by the tap is not heard. */
const PACKET_IGNORE_OUTGOING = 23;
const PACKET_OUTGOING = 4;
/** sll_pkttype of struct sockaddr_ll, packet(7). */
const PKTTYPE_AT = 10;

export interface ArrivalWatch {
  /** Never rejects; does not resolve after `close`. */
  readonly arrived: Promise<'frame' | 'event'>;
  /** Whether the domain has begun to come: it has a tap, or had one. */
  hasTap(): boolean;
  close(): void;
}

/** @param taps names of the domain's taps, as OpenNebula gives them; one that never comes is no error: the event counts then */
export function watchArrival(links: Pick<Links, 'link'>, vm: number, taps: readonly LinkName[]): ArrivalWatch {
  const stops: (() => void)[] = [];
  let over = false;
  let tapSeen = false;
  const close = (): void => {
    over = true;
    for (const stop of stops.splice(0)) stop();
  };
  const arrived = new Promise<'frame' | 'event'>((resolve) => {
    const tell = (how: 'frame' | 'event'): void => {
      if (over) return;
      close();
      resolve(how);
    };
    stops.push(watchDomain(vm, 'Resumed', () => tell('event')));
    for (const tap of taps) {
      void watchTap(
        links,
        tap,
        () => over,
        (how) => {
          tapSeen = true;
          if (how === 'frame') tell('frame');
        },
      );
    }
  });
  return { arrived, hasTap: () => tapSeen, close };
}

/**
 * Tells of libvirt's lifecycle events of a domain that begin like this, such as `Suspended Migrated`.
 * @returns ends it
 */
export function watchDomain(vm: number, event: string, tell: () => void): () => void {
  const child = spawn(VIRSH, EVENTS, {
    stdio: ['ignore', 'pipe', 'ignore'],
    env: { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' },
    cwd: '/',
  });
  // Without virsh the frames count.
  child.on('error', () => child.stdout.destroy());
  const wanted = new RegExp(`for domain '?${domainName(vm)}'?(?: \\([^)]*\\))?: ${event}`);
  void (async () => {
    const lines = createLineReader(child.stdout, LINE_LIMIT);
    for (let line = await lines.next(); line !== undefined; line = await lines.next()) if (wanted.test(line)) tell();
  })().catch(() => undefined);
  return () => child.kill('SIGKILL');
}

async function watchTap(
  links: Pick<Links, 'link'>,
  tap: LinkName,
  isOver: () => boolean,
  tell: (what: 'tap' | 'frame') => void,
): Promise<void> {
  for (; !isOver(); await sleep(TAP_MS)) {
    try {
      const link = await links.link(tap);
      if (link === undefined) continue;
      tell('tap');
      await watchFrames(link.index, isOver, () => tell('frame'));
    } catch {
      // The tap went, or could not be listened on: it may come anew, and there is the event.
    }
  }
}

async function watchFrames(index: number, isOver: () => boolean, tell: () => void): Promise<void> {
  const c = await libc();
  const frame = Buffer.alloc(64);
  const from = Buffer.alloc(128);
  // Protocol 0 until it is bound, or it would hold what arrived on other links.
  const fd = c.socket(AF_PACKET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
  try {
    try {
      c.setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, Buffer.from([1, 0, 0, 0]));
    } catch {
      // An older kernel: what goes out is told apart below.
    }
    c.bind(fd, everySockaddr(index));
    for (; !isOver(); await sleep(FRAME_MS)) {
      while (hears()) {
        if (from[PKTTYPE_AT] === PACKET_OUTGOING) continue;
        tell();
        return;
      }
    }
  } finally {
    c.close(fd);
  }

  function hears(): boolean {
    try {
      c.recvfrom(fd, frame, from);
      return true;
    } catch (error) {
      // Longer than the buffer: it came all the same.
      if (error instanceof ErrnoError && error.code === 'EMSGSIZE') return true;
      if (error instanceof ErrnoError && error.code === 'EAGAIN') return false;
      throw error;
    }
  }
}

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
