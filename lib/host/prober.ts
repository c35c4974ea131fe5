/**
 * Asks by ARP probes (RFC 5227) whether another host has an address that is about to be taken. One packet socket of type
 * SOCK_DGRAM for each link, bound to the ARP that arrives there; closing it costs 11-15 ms in the kernel
 * (synchronize_net). Receiving is in short turns that do not wait, so that the event loop goes on.
 */
import { type KvmIbError, toKvmIbError } from '../core/errors.ts';
import { arpProbe, arpSockaddr, broadcastSockaddr, claimIn, decodeArp, whyNoArp } from '../link/arp.ts';
import type { Link, LinkAddress, Links, OtherHolder, ProbeOptions, ProbeResult, Prober } from '../link/ports.ts';
import { errorText } from './announcer.ts';
import { AF_PACKET, ErrnoError, type Libc, libc, SOCK_DGRAM, SOCK_NONBLOCK } from './libc.ts';
import { stations } from './links.ts';
import { socketError } from './netlink-socket.ts';

/** Answers on a fabric that works come within a few milliseconds. */
const WINDOW_MS = 300;
/** One may be lost, as the first packet after a path look-up of IPoIB may be. */
const ROUNDS = 3;
/** Between two looks at the socket. */
const TURN_MS = 10;
/** Frames read in one turn: a flood of ARP does not hold the process. */
const TURN_FRAMES = 512;
/** Addresses asked for in one go; answers are read in between. */
const BURST = 256;
const RECEIVE_BYTES = 1024 * 1024;
/** Longer than any ARP packet: two addresses of 255 bytes. */
const FRAME_BYTES = 1024;

export function createProber(links: Pick<Links, 'link'>, windowMs = WINDOW_MS): Prober {
  return {
    probe: async (items, options = {}) => {
      const devices = [...new Set(items.map(({ device }) => device))];
      const groups = await Promise.all(
        devices.map((device) =>
          probeGroup(
            links,
            windowMs,
            items.filter((item) => item.device === device),
            options,
          ),
        ),
      );
      return groups.flat();
    },
  };
}

/** Addresses of one link. */
async function probeGroup(
  links: Pick<Links, 'link'>,
  windowMs: number,
  items: readonly LinkAddress[],
  options: ProbeOptions,
): Promise<readonly ProbeResult[]> {
  const [first] = items;
  if (first === undefined) return [];
  const all = (error: string): readonly ProbeResult[] => items.map((item) => ({ ...item, error }));
  try {
    const link = await links.link(first.device);
    if (link === undefined) return all(`there is no link ${first.device}`);
    const why = whyNoArp(link) ?? (link.up ? undefined : `${link.name} is down`);
    if (why !== undefined) return all(why);
    const found = await listen(await libc(), link, windowMs, items, options);
    return items.map((item) => {
      const other = found.get(item.address);
      return other === undefined ? item : { ...item, other };
    });
  } catch (error) {
    return all(errorText(explained(error)));
  }
}

function explained(error: unknown): KvmIbError {
  return toKvmIbError(socketError('Cannot probe by ARP', error));
}

async function listen(
  c: Libc,
  link: Link,
  windowMs: number,
  items: readonly LinkAddress[],
  { except = [] }: ProbeOptions,
): Promise<ReadonlyMap<string, OtherHolder>> {
  const found = new Map<string, OtherHolder>();
  const addresses = [...new Set(items.map(({ address }) => address))];
  const wanted = new Set<string>(addresses);
  const to = broadcastSockaddr(link);
  const frame = Buffer.alloc(FRAME_BYTES);
  const from = Buffer.alloc(128);
  // Protocol 0 until it is bound, or it would hold what arrived on other links.
  const fd = c.socket(AF_PACKET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
  let own: readonly string[] | undefined;

  const readTurn = (): void => {
    for (let n = 0; n < TURN_FRAMES; n++) {
      let length: number;
      try {
        length = c.recvfrom(fd, frame, from);
      } catch (error) {
        if (error instanceof ErrnoError && error.code === 'EAGAIN') return;
        // Longer than any ARP packet.
        if (error instanceof ErrnoError && error.code === 'EMSGSIZE') continue;
        throw error;
      }
      const packet = decodeArp(frame.subarray(0, length));
      const claim = packet && claimIn(packet, link, except);
      if (packet === undefined || claim === undefined || !wanted.has(claim.address)) continue;
      // Linux answers on each link for every address of the host: a second link on the same fabric is no other host.
      own ??= stations();
      if (claimIn(packet, link, own) === undefined) continue;
      const { address, hardware, how } = claim;
      // Who has it counts for more than who also asks.
      if (found.get(address)?.how !== 'has') found.set(address, { hardware, how });
    }
  };
  /** Reads until then, but not on once it is known of every address. */
  const readUntil = async (end: number): Promise<void> => {
    for (;;) {
      readTurn();
      const left = end - performance.now();
      if (left <= 0 || found.size === wanted.size) return;
      await sleep(Math.min(TURN_MS, left));
    }
  };

  try {
    c.receiveBuffer(fd, RECEIVE_BYTES);
    c.bind(fd, arpSockaddr(link));
    for (let round = 0; round < ROUNDS; round++) {
      for (let start = 0; start < addresses.length; start += BURST) {
        if (start > 0) await readUntil(performance.now() + TURN_MS);
        for (const address of addresses.slice(start, start + BURST)) {
          if (!found.has(address)) c.sendto(fd, arpProbe(link, address), to);
        }
      }
      await readUntil(performance.now() + windowMs / ROUNDS);
      if (found.size === wanted.size) break;
    }
    return found;
  } finally {
    c.close(fd);
  }
}

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
