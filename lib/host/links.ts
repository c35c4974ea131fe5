/**
 * Links and addresses of this host. rtnetlink goes through npm `netlink`, which version 0.3.0 makes safe to use only
 * within limits that this file keeps: it aborts the process when its socket overflows, when a listener throws, when
 * an error has no listener, and when the process ends while data waits on an open socket. So a socket lives for one
 * operation, carries one request at a time, is closed on every path, and no two are open at once. Only its raw socket
 * is used (13 ms less at start than its typed layer); the bytes are ours, which shows NLM_F_DUMP_INTR, which its own
 * reader drops.
 *
 * Route look-ups and bridge port settings go over our own socket, for the kernel's text with an error.
 */
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Ipv4, LinkName } from '../core/address.ts';
import { KvmIbError, printable, toKvmIbError } from '../core/errors.ts';
import type { AddressTable, BridgePort, Link, Links, StandingAddress } from '../link/ports.ts';
import {
  decodeAddress,
  decodeLink,
  decodeRouteIsLocal,
  encodeAddress,
  encodeAlias,
  encodeGetAddresses,
  encodeGetLink,
  encodeGetRoute,
  encodeSetHairpin,
  encodeSetMtu,
  RTM,
} from '../link/rtnetlink.ts';
import { concat, createReplyReader, encodeRequest, NLM_F, type Reply } from '../link/wire.ts';
import { ERRNO, interruptedError, messagesOf, NETLINK_ROUTE, openNetlink } from './netlink-socket.ts';

const TIMEOUT_MS = 5_000;
/** Room for a dump of many thousand addresses; the system's net.core.rmem_max cuts it. */
const RECEIVE_BYTES = 4 * 1024 * 1024;
const DUMP_ATTEMPTS = 10;
const LABEL_LIMIT = 15;
const SYS_NET = '/sys/class/net';

/** Sends one request over a socket and resolves with the whole answer. */
type Request = (type: number, flags: number, payload: Uint8Array) => Promise<Reply>;

/** Sends some requests of one type in one datagram. The kernel carries them out and answers them one by one, in order. */
type RequestAll = (type: number, flags: number, payloads: readonly Uint8Array[]) => Promise<readonly Reply[]>;

export function createLinks(): Links & AddressTable {
  let last: Promise<unknown> = Promise.resolve();
  /** Runs `use` with a socket of its own, after all earlier ones are closed. */
  const withSocket = <T>(use: (request: Request, requestAll: RequestAll) => Promise<T>): Promise<T> => {
    const run = last.then(() => openAndUse(use));
    last = run.catch(() => undefined);
    return run;
  };

  const change = async (message: string, type: number, flags: number, device: LinkName, payload: Payload) => {
    await withSocket(async (request) => {
      const link = await getLink(request, { name: device });
      if (link === undefined) throw noLink(message, device);
      messagesOf(await request(type, flags | NLM_F.ack, payload(link.index)), message);
    });
  };

  return {
    link: (name) => withSocket((request) => getLink(request, { name })),
    linkAt: (index) => withSocket((request) => getLink(request, { index })),
    addresses: async () => {
      const found = await withSocket(dumpAddresses);
      return found.map(({ device, address, prefixLength, label, secondary }) => {
        return { device, address, prefixLength, label, ...(secondary ? { secondary } : {}) };
      });
    },
    standing: () => withSocket(dumpAddresses),
    isLocal,
    addAlias: async (device, address, label) => {
      const message = `Cannot add ${address}/32 to ${device}`;
      checkLabel(message, label);
      await change(message, RTM.newAddress, NLM_F.create | NLM_F.exclusive, device, (index) =>
        encodeAlias(index, address, label),
      );
    },
    deleteAlias: async (device, address, label) => {
      const message = `Cannot remove ${address}/32 from ${device}`;
      checkLabel(message, label);
      await change(message, RTM.deleteAddress, 0, device, (index) => encodeAlias(index, address, label));
    },
    put: (list) => withSocket((request, all) => changeAddresses(request, all, list, 'add')),
    take: (list) => withSocket((request, all) => changeAddresses(request, all, list, 'remove')),
    promotesSecondaries: (device) => ['all', device].some((name) => readFlag(promoteSecondaries(name))),
    setPromotesSecondaries: (device, on) => {
      try {
        writeFileSync(promoteSecondaries(device), on ? '1' : '0');
      } catch (cause) {
        throw new KvmIbError('host-lacks', `Cannot set promote_secondaries of ${device}`, {
          why: cause instanceof Error ? cause.message : String(cause),
          fix: `set it by hand: sysctl -w net.ipv4.conf.${device.replaceAll('.', '/')}.promote_secondaries=1`,
          cause,
        });
      }
    },
    setMtu: (name, mtu) =>
      change(`Cannot set the MTU of ${name} to ${mtu}`, RTM.setLink, 0, name, (index) => encodeSetMtu(index, mtu)),
    bridgeCallsIptables: async (bridge) =>
      // The module br_netfilter, if it is there, takes the frames of all bridges or of one.
      readFlag('/proc/sys/net/bridge/bridge-nf-call-iptables') ||
      readFlag(join(SYS_NET, bridge, 'bridge', 'nf_call_iptables')),
    bridgePorts: async (bridge) => readBridgePorts(bridge),
    setHairpin: async (port, on) => {
      const message = `Cannot turn hairpin mode of ${port} ${on ? 'on' : 'off'}`;
      const link = await withSocket((request) => getLink(request, { name: port }));
      if (link === undefined) throw noLink(message, port);
      const socket = await openNetlink(NETLINK_ROUTE);
      try {
        messagesOf(socket.request(RTM.setLink, 0, encodeSetHairpin(link.index, on)), message);
      } finally {
        socket.close();
      }
    },
  };
}

type Payload = (index: number) => Uint8Array;

function noLink(message: string, device: string): KvmIbError {
  return new KvmIbError('host-lacks', message, {
    why: `there is no link ${device} on this host`,
    fix: `look at \`ip link\`, and load the driver or correct the name`,
  });
}

function promoteSecondaries(device: string): string {
  return `/proc/sys/net/ipv4/conf/${device}/promote_secondaries`;
}

/** Requests in one datagram: their answers must fit into the receive buffer. */
const AT_ONCE = 50;

/** Many addresses over one socket. What is there, or gone, already is passed over. */
async function changeAddresses(
  request: Request,
  requestAll: RequestAll,
  list: readonly StandingAddress[],
  what: 'add' | 'remove',
): Promise<void> {
  const [type, flags, passes] =
    what === 'add'
      ? [RTM.newAddress, NLM_F.create | NLM_F.exclusive | NLM_F.ack, [ERRNO.EEXIST]]
      : [RTM.deleteAddress, NLM_F.ack, [ERRNO.EADDRNOTAVAIL, ERRNO.ENODEV]];
  const indexes = new Map<string, number | undefined>();
  for (let at = 0; at < list.length; at += AT_ONCE) {
    const batch: { readonly message: string; readonly payload: Uint8Array }[] = [];
    for (const one of list.slice(at, at + AT_ONCE)) {
      const { device, address, prefixLength, label } = one;
      const message = `Cannot ${what} ${address}/${prefixLength} ${what === 'add' ? 'to' : 'from'} ${device}`;
      checkLabel(message, label);
      if (!indexes.has(device)) indexes.set(device, (await getLink(request, { name: device }))?.index);
      const index = indexes.get(device);
      if (index !== undefined) batch.push({ message, payload: encodeAddress(index, one) });
      else if (what === 'add') throw noLink(message, device);
    }
    if (batch.length === 0) continue;
    const replies = await requestAll(
      type,
      flags,
      batch.map(({ payload }) => payload),
    );
    replies.forEach((reply, place) => {
      const isPassed = reply.kind === 'refused' && passes.some((errno) => errno === reply.errno);
      if (!isPassed) messagesOf(reply, batch[place]?.message ?? '');
    });
  }
}

/** The kernel cuts no label: more than 15 characters are ERANGE, and an empty one becomes the device's name. */
function checkLabel(message: string, label: string): void {
  if (label === '' || label.length > LABEL_LIMIT || !/^[\x21-\x7e]+$/.test(label)) {
    throw new KvmIbError('bad-input', message, {
      why: `"${printable(label, 40)}" is no label: it takes 1 to ${LABEL_LIMIT} printable ASCII characters`,
    });
  }
}

async function getLink(
  request: Request,
  by: { readonly name: string } | { readonly index: number },
): Promise<Link | undefined> {
  const reply = await request(RTM.getLink, NLM_F.ack, encodeGetLink(by));
  if (reply.kind === 'refused' && reply.errno === ERRNO.ENODEV) return undefined;
  const message = `Cannot read link ${'name' in by ? by.name : by.index}`;
  for (const answer of messagesOf(reply, message)) {
    const link = decodeLink(answer);
    if (link !== undefined) return link;
  }
  throw new KvmIbError('failed', message, { why: 'the kernel answered without a link' });
}

async function dumpAddresses(request: Request): Promise<readonly StandingAddress[]> {
  const message = 'Cannot list the addresses of this host';
  for (let i = 0; i < DUMP_ATTEMPTS; i++) {
    const reply = await request(RTM.getAddress, NLM_F.dump, encodeGetAddresses());
    const found = messagesOf(reply, message).flatMap((answer) => decodeAddress(answer) ?? []);
    if (reply.kind === 'ok' && reply.interrupted) continue;
    // Few links carry IPv4 addresses: asking for each is cheaper than a dump of every tap of the host.
    const names = new Map<number, string | undefined>();
    for (const { index } of found) {
      if (!names.has(index)) names.set(index, (await getLink(request, { index }))?.name);
    }
    return found.flatMap(({ index, label, ...rest }) => {
      const device = names.get(index);
      // A link that went away since has taken its addresses along.
      return device === undefined ? [] : [{ ...rest, device, label: label ?? device }];
    });
  }
  throw interruptedError(DUMP_ATTEMPTS);
}

/** What the kernel says for a destination that it has no route to, or one of type unreachable, prohibit, blackhole. */
const NO_ROUTE: readonly number[] = [ERRNO.ENETUNREACH, ERRNO.EHOSTUNREACH, ERRNO.EACCES, ERRNO.EINVAL];

async function isLocal(address: Ipv4): Promise<boolean> {
  const socket = await openNetlink(NETLINK_ROUTE);
  try {
    const reply = socket.request(RTM.getRoute, 0, encodeGetRoute(address));
    if (reply.kind === 'refused' && NO_ROUTE.includes(reply.errno)) return false;
    const message = `Cannot look up the route to ${address}`;
    const answers = messagesOf(reply, message).flatMap((answer) => decodeRouteIsLocal(answer) ?? []);
    if (answers[0] === undefined) {
      throw new KvmIbError('failed', message, { why: 'the kernel answered without a route' });
    }
    return answers[0];
  } finally {
    socket.close();
  }
}

async function openAndUse<T>(use: (request: Request, requestAll: RequestAll) => Promise<T>): Promise<T> {
  const { RawNetlinkSocket } = await import('netlink/dist/raw.js');
  const failed = 'Cannot talk to the kernel over rtnetlink';
  let socket: InstanceType<typeof RawNetlinkSocket>;
  try {
    socket = new RawNetlinkSocket(NETLINK_ROUTE, { recvBufferSize: RECEIVE_BYTES, sendBufferSize: 0 });
  } catch (error) {
    throw toKvmIbError(error, failed);
  }
  let seq = 0;
  /** What the next datagram or error of the socket is for. */
  let onDatagram: (datagram: Uint8Array) => void = () => undefined;
  let onError: (error: unknown) => void = () => undefined;
  socket.on('message', (datagram, from) => {
    // Only port 0 is the kernel. The handler must not throw: the addon would abort the process.
    if (from.port === 0) onDatagram(datagram);
  });
  socket.on('truncatedMessage', () => onError(new Error('a datagram was cut')));
  socket.on('error', (error) => onError(error));

  const requestAll: RequestAll = (type, flags, payloads) =>
    new Promise((resolve, reject) => {
      const readers = payloads.map((_, place) => createReplyReader(seq + 1 + place));
      const bytes = concat(...payloads.map((payload, place) => encodeRequest(type, flags, seq + 1 + place, payload)));
      seq += payloads.length;
      const replies: Reply[] = [];
      const fail = (why: string, cause?: unknown) => {
        clearTimeout(timer);
        reject(new KvmIbError('failed', failed, { why, cause }));
      };
      const timer = setTimeout(() => fail(`no answer within ${TIMEOUT_MS} ms`), TIMEOUT_MS);
      onError = (error) => fail(error instanceof Error ? error.message : String(error), error);
      onDatagram = (datagram) => {
        // One datagram may have the answers to several.
        for (let reader = readers[replies.length]; reader !== undefined; reader = readers[replies.length]) {
          const reply = reader.feed(datagram);
          if (reply === undefined) return;
          replies.push(reply);
        }
        clearTimeout(timer);
        resolve(replies);
      };
      socket.send(bytes, {}, (error) => {
        if (error) onError(error);
      });
    });
  const request: Request = async (type, flags, payload) => {
    const [reply] = await requestAll(type, flags, [payload]);
    if (reply === undefined) throw new KvmIbError('failed', failed, { why: 'nothing was asked' });
    return reply;
  };

  try {
    return await use(request, requestAll);
  } finally {
    onDatagram = () => undefined;
    onError = () => undefined;
    socket.close();
  }
}

/** Hardware addresses of all links of this host, as `ip link` writes them. */
export function stations(): readonly string[] {
  try {
    return readdirSync(SYS_NET).flatMap((name) => {
      try {
        return [readFileSync(join(SYS_NET, name, 'address'), 'latin1').trim()].filter((text) => text !== '');
      } catch {
        // It went away since, or is no link at all (bonding_masters).
        return [];
      }
    });
  } catch {
    return [];
  }
}

/** True when the file is there and its content starts with a number other than 0. */
function readFlag(path: string): boolean {
  try {
    return Number.parseInt(readFileSync(path, 'latin1'), 10) > 0;
  } catch {
    // No such file: the kernel has no br_netfilter, or there is no such bridge.
    return false;
  }
}

function readBridgePorts(bridge: LinkName): readonly BridgePort[] {
  let names: readonly string[];
  try {
    names = readdirSync(join(SYS_NET, bridge, 'brif'));
  } catch (cause) {
    throw new KvmIbError('host-lacks', `Cannot list the ports of ${bridge}`, {
      why: 'it is not there, or it is not a bridge',
      fix: 'look at `ip -d link`, and correct the name or make the bridge',
      cause,
    });
  }
  return names.map((name) => ({ name, hairpin: readFlag(join(SYS_NET, name, 'brport', 'hairpin_mode')) }));
}
