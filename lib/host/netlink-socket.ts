/**
 * A netlink socket of our own over libc, for what npm `netlink` cannot do: kernel texts with errors, filtered dumps,
 * nfnetlink. Synchronous, because the kernel answers a request before `sendto` returns, and a dump batch within
 * `recvfrom`; the time limit is for a kernel that does not.
 */
import { KvmIbError } from '../core/errors.ts';
import { createReplyReader, encodeRequest, type Message, NLM_F, type Reply, readU32, u32 } from '../link/wire.ts';
import { AF_NETLINK, ErrnoError, libc, SOCK_RAW } from './libc.ts';

export const NETLINK_ROUTE = 0;
export const NETLINK_NETFILTER = 12;

const SOL_NETLINK = 270;
/** Errors carry the kernel's text (Linux 4.12). */
const NETLINK_EXT_ACK = 11;
/** Dumps honour the filter in their header (Linux 4.20). */
const NETLINK_GET_STRICT_CHK = 12;

const TIMEOUT_MS = 5_000;
const BUFFER_BYTES = 8 * 1024 * 1024;
/** The kernel fills at most 32 KiB a datagram of a dump. */
const DATAGRAM = 128 * 1024;
const DUMP_ATTEMPTS = 10;
const SOCKADDR_NL = 12;

export interface NetlinkSocket {
  /** One request, acknowledged. @throws KvmIbError when the socket fails; a refusal is returned. */
  request(type: number, flags: number, payload: Uint8Array): Reply;
  /** A complete dump. An interrupted one is repeated; @throws KvmIbError `failed` when every attempt was interrupted. */
  dump(type: number, payload: Uint8Array): Reply;
  close(): void;
}

/** The address of the kernel: family, padding, port 0, no groups. */
function kernelAddress(): Uint8Array {
  const address = new Uint8Array(SOCKADDR_NL);
  new Uint16Array(address.buffer)[0] = AF_NETLINK;
  return address;
}

/** Opens a socket of the protocol; it needs no right by itself. @throws KvmIbError `host-lacks` when the kernel has no such protocol. */
export async function openNetlink(protocol: number): Promise<NetlinkSocket> {
  const c = await libc();
  const kernel = kernelAddress();
  const fd = attempt('Cannot open a netlink socket', () => c.socket(AF_NETLINK, SOCK_RAW, protocol));
  try {
    c.bind(fd, kernel);
    c.receiveTimeout(fd, TIMEOUT_MS);
    c.receiveBuffer(fd, BUFFER_BYTES);
    for (const option of [NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK]) {
      try {
        c.setsockopt(fd, SOL_NETLINK, option, u32(1));
      } catch (error) {
        // An older kernel does without.
        if (!(error instanceof ErrnoError)) throw error;
      }
    }
  } catch (error) {
    c.close(fd);
    throw socketError('Cannot prepare a netlink socket', error);
  }

  let open = true;
  let seq = 0;
  const buffer = new Uint8Array(DATAGRAM);
  const sender = new Uint8Array(SOCKADDR_NL);

  const exchange = (type: number, flags: number, payload: Uint8Array): Reply => {
    if (!open) throw new KvmIbError('failed', 'Cannot use a netlink socket', { why: 'it is closed' });
    seq = (seq % 0x7fffffff) + 1;
    const request = encodeRequest(type, flags, seq, payload);
    const reader = createReplyReader(seq);
    return attempt('Cannot talk to the kernel over netlink', () => {
      c.sendto(fd, request, kernel);
      for (;;) {
        const length = c.recvfrom(fd, buffer, sender);
        // Only port 0 is the kernel; another process could send to our port.
        if (readU32(sender, 4) !== 0) continue;
        const reply = reader.feed(buffer.subarray(0, length));
        if (reply !== undefined) return reply;
      }
    });
  };

  return {
    request: (type, flags, payload) => exchange(type, flags | NLM_F.ack, payload),
    dump: (type, payload) => {
      for (let i = 0; i < DUMP_ATTEMPTS; i++) {
        const reply = exchange(type, NLM_F.dump, payload);
        if (reply.kind !== 'ok' || !reply.interrupted) return reply;
      }
      throw interruptedError(DUMP_ATTEMPTS);
    },
    close: () => {
      if (open) c.close(fd);
      open = false;
    },
  };
}

/** The messages of a reply. @throws KvmIbError that says `message`, why, and what to do, when the kernel refused. */
export function messagesOf(reply: Reply, message: string): readonly Message[] {
  if (reply.kind === 'ok') return reply.messages;
  if (reply.kind === 'refused') throw kernelError(message, reply.errno, reply.text);
  throw new KvmIbError('failed', message, { why: `the kernel's answer makes no sense: ${reply.why}` });
}

export function interruptedError(attempts: number): KvmIbError {
  return new KvmIbError('failed', 'Cannot get a complete list from the kernel', {
    why: `it changed during each of ${attempts} attempts`,
    fix: 'try again when fewer changes are being made on this host',
  });
}

/** errno values that decide an error's code (asm-generic/errno-base.h, errno.h). */
export const ERRNO = {
  EPERM: 1,
  ENOENT: 2,
  EAGAIN: 11,
  EACCES: 13,
  EEXIST: 17,
  ENODEV: 19,
  EINVAL: 22,
  ERANGE: 34,
  EADDRNOTAVAIL: 99,
  EOPNOTSUPP: 95,
  ENETUNREACH: 101,
  EHOSTUNREACH: 113,
} as const;

const WORDS: Readonly<Record<number, string>> = {
  1: 'operation not permitted (EPERM)',
  2: 'no such entry (ENOENT)',
  13: 'permission denied (EACCES)',
  16: 'device or resource busy (EBUSY)',
  17: 'it exists already (EEXIST)',
  19: 'no such device (ENODEV)',
  22: 'invalid argument (EINVAL)',
  34: 'out of range (ERANGE)',
  95: 'operation not supported (EOPNOTSUPP)',
  99: 'no such address on the device (EADDRNOTAVAIL)',
  105: 'no buffer space (ENOBUFS)',
};

/** What a refusal of the kernel means to the operator. `errno` is positive. */
export function kernelError(message: string, errno: number, text?: string): KvmIbError {
  const word = WORDS[errno] ?? `error ${errno}`;
  const why = `the kernel says: ${text === undefined ? word : `${text}, ${word}`}`;
  switch (errno) {
    case ERRNO.EEXIST:
      return new KvmIbError('conflict', message, {
        why,
        fix: 'see who uses it with `ip -4 address`, and free it or choose another',
      });
    case ERRNO.ENODEV:
    case ERRNO.EADDRNOTAVAIL:
      return new KvmIbError('host-lacks', message, { why, fix: 'look at `ip address` and at the configuration' });
    case ERRNO.EPERM:
    case ERRNO.EACCES:
      return new KvmIbError('not-permitted', message, {
        why,
        fix: 'run it as root or with CAP_NET_ADMIN and CAP_NET_RAW',
      });
    default:
      return new KvmIbError('failed', message, { why });
  }
}

function attempt<T>(message: string, run: () => T): T {
  try {
    return run();
  } catch (error) {
    throw socketError(message, error);
  }
}

export function socketError(message: string, error: unknown): unknown {
  if (!(error instanceof ErrnoError)) return error;
  if (error.code === 'EAGAIN') {
    return new KvmIbError('failed', message, { why: `no answer within ${TIMEOUT_MS} ms`, cause: error });
  }
  if (error.code === 'EPROTONOSUPPORT' || error.code === 'EAFNOSUPPORT') {
    return new KvmIbError('host-lacks', message, {
      why: `${error.message}: the kernel has no such protocol`,
      cause: error,
    });
  }
  const known = kernelError(message, error.errno);
  return new KvmIbError(known.code, message, {
    why: error.message,
    ...(known.fix === undefined ? {} : { fix: known.fix }),
    cause: error,
  });
}
