/** Announces aliases by gratuitous ARP. The kernel does not: `arp_notify` fires on device up, never on a new address. */
import { type KvmIbError, printable, toKvmIbError } from '../core/errors.ts';
import { broadcastSockaddr, gratuitousArp, whyNoArp } from '../link/arp.ts';
import type { AnnounceResult, Announcer, Link, Links } from '../link/ports.ts';
import { AF_PACKET, type Libc, libc, SOCK_DGRAM } from './libc.ts';
import { socketError } from './netlink-socket.ts';
import { startRepeats } from './repeats.ts';

/** Addresses announced without a pause. */
const BURST = 256;
const PAUSE_MS = 20;

export interface HostAnnouncer extends Announcer {
  /** Closes the socket, which costs 11-15 ms in the kernel (synchronize_net); the next announcement opens another. */
  close(): void;
}

/**
 * Sends through one packet socket of type SOCK_DGRAM, so that the driver of the link writes its own header (14 bytes on
 * Ethernet, 24 on IPoIB). The socket is opened at the first announcement and kept.
 *
 * @param links where index, type, hardware and broadcast address of a link are read
 * @param program the bundle of ours that is run again for the repeats; undefined: there is none, and nothing is repeated
 */
export function createAnnouncer(links: Pick<Links, 'link'>, program?: string): HostAnnouncer {
  let socket: { readonly c: Libc; readonly fd: number } | undefined;

  const open = async () => {
    const c = await libc();
    // Protocol 0: it sends, and no packet is ever queued to it.
    socket ??= { c, fd: c.socket(AF_PACKET, SOCK_DGRAM, 0) };
    return socket;
  };

  const send = async (link: Link, address: AnnounceResult['address']) => {
    const { c, fd } = await open();
    const to = broadcastSockaddr(link);
    c.sendto(fd, gratuitousArp('request', link, address), to);
    c.sendto(fd, gratuitousArp('reply', link, address), to);
  };

  return {
    announce: async (items) => {
      const seen = new Map<string, Link | undefined | KvmIbError>();
      const results: AnnounceResult[] = [];
      for (const [n, { device, address }] of items.entries()) {
        if (n > 0 && n % BURST === 0) await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
        try {
          if (!seen.has(device)) {
            seen.set(device, await links.link(device).catch((error: unknown) => toKvmIbError(error)));
          }
          const link = seen.get(device);
          if (link === undefined) results.push({ address, device, error: `there is no link ${device}` });
          else if (link instanceof Error) results.push({ address, device, error: errorText(link) });
          else {
            const error = whyNoArp(link);
            if (error === undefined) await send(link, address);
            results.push({ address, device, ...(error === undefined ? {} : { error }) });
          }
        } catch (error) {
          results.push({ address, device, error: errorText(toKvmIbError(socketError('Cannot send ARP', error))) });
        }
      }
      return results;
    },
    repeat: async (items) => (program === undefined ? undefined : startRepeats(program, items)),
    close: () => {
      if (socket !== undefined) socket.c.close(socket.fd);
      socket = undefined;
    },
  };
}

/** An error in one line, for a result that is not thrown. */
export function errorText(error: KvmIbError): string {
  return printable(error.why === undefined ? error.message : `${error.message}: ${error.why}`);
}
