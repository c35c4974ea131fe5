/**
 * The few libc calls that Node does not offer, through koffi: sockets of other families and flock(2). Loaded at the
 * first use, because koffi costs 5-9 ms at start.
 *
 * A wrong signature here corrupts memory silently; each one is written beside the man page it comes from.
 */

import { getSystemErrorName } from 'node:util';

/** Constants of the Linux ABI that all of Node's Linux platforms share (asm-generic). */
export const AF_NETLINK = 16;
export const AF_PACKET = 17;
export const SOCK_DGRAM = 2;
export const SOCK_RAW = 3;
/** With the type of a socket: a receive that would wait fails with EAGAIN. */
export const SOCK_NONBLOCK = 0o4000;
const SOCK_CLOEXEC = 0o2000000;
const SOL_SOCKET = 1;
const SO_RCVTIMEO = 20;
const SO_RCVBUFFORCE = 33;
/** recv: return the real length of a datagram that was cut. */
const MSG_TRUNC = 0x20;
const EINTR = 4;
const EMSGSIZE = 90;
export const LOCK_EX = 2;
export const LOCK_NB = 4;

/** A libc call failed; `errno` is positive. */
export class ErrnoError extends Error {
  override readonly name = 'ErrnoError';
  readonly errno: number;
  readonly code: string;

  constructor(call: string, errno: number) {
    const code = getSystemErrorName(-errno);
    super(`${call}: ${code}`);
    this.errno = errno;
    this.code = code;
  }
}

export interface Libc {
  /** A socket that children do not inherit. @throws ErrnoError */
  socket(family: number, type: number, protocol: number): number;
  bind(fd: number, address: Uint8Array): void;
  sendto(fd: number, data: Uint8Array, address: Uint8Array): void;
  /** One datagram into `buffer`. @returns its length and the sender's address. @throws ErrnoError EAGAIN on time-out, EMSGSIZE when cut. */
  recvfrom(fd: number, buffer: Uint8Array, address: Uint8Array): number;
  setsockopt(fd: number, level: number, option: number, value: Uint8Array): void;
  /** SO_RCVTIMEO: a receive that waits longer fails with EAGAIN. */
  receiveTimeout(fd: number, milliseconds: number): void;
  /** SO_RCVBUFFORCE where the rights allow it; the system's limit otherwise. */
  receiveBuffer(fd: number, bytes: number): void;
  /** @returns false when LOCK_NB was given and another holds the lock. */
  flock(fd: number, operation: number): boolean;
  close(fd: number): void;
}

let loaded: Promise<Libc> | undefined;

/** The process's own C library. */
export function libc(): Promise<Libc> {
  loaded ??= load();
  return loaded;
}

async function load(): Promise<Libc> {
  const { default: koffi } = await import('koffi');
  // The program itself: Node is linked against its libc, whichever that is.
  const self = koffi.load(null);
  // koffi has no ssize_t; int64_t is the same on 64-bit Linux, and long on all.
  const socket = self.func('int socket(int domain, int type, int protocol)');
  const bind = self.func('int bind(int fd, const uint8_t *address, uint32_t length)');
  const sendto = self.func(
    'long sendto(int fd, const uint8_t *data, size_t size, int flags, const uint8_t *address, uint32_t length)',
  );
  const recvfrom = self.func(
    'long recvfrom(int fd, _Out_ uint8_t *data, size_t size, int flags, _Out_ uint8_t *address, _Inout_ uint32_t *length)',
  );
  const setsockopt = self.func('int setsockopt(int fd, int level, int option, const uint8_t *value, uint32_t length)');
  const flock = self.func('int flock(int fd, int operation)');
  const close = self.func('int close(int fd)');

  /** Runs a call until a signal does not interrupt it; errno is read before anything else can change it. */
  function attempt(name: string, call: () => number): number {
    for (;;) {
      const result = call();
      if (result >= 0) return result;
      const errno = koffi.errno();
      if (errno !== EINTR) throw new ErrnoError(name, errno);
    }
  }
  const setOption = (fd: number, level: number, option: number, value: Uint8Array) => {
    attempt('setsockopt', () => setsockopt(fd, level, option, value, value.length));
  };

  return {
    socket: (family, type, protocol) => attempt('socket', () => socket(family, type | SOCK_CLOEXEC, protocol)),
    bind: (fd, address) => {
      attempt('bind', () => bind(fd, address, address.length));
    },
    sendto: (fd, data, address) => {
      attempt('sendto', () => sendto(fd, data, data.length, 0, address, address.length));
    },
    recvfrom: (fd, buffer, address) => {
      const length = attempt('recvfrom', () =>
        Number(recvfrom(fd, buffer, buffer.length, MSG_TRUNC, address, [address.length])),
      );
      if (length > buffer.length) throw new ErrnoError('recvfrom', EMSGSIZE);
      return length;
    },
    setsockopt: setOption,
    receiveTimeout: (fd, milliseconds) => {
      // struct timeval: two longs.
      const long = koffi.sizeof('long');
      const value = Buffer.alloc(2 * long);
      value.writeUInt32LE(Math.floor(milliseconds / 1000), 0);
      value.writeUInt32LE((milliseconds % 1000) * 1000, long);
      setOption(fd, SOL_SOCKET, SO_RCVTIMEO, value);
    },
    receiveBuffer: (fd, bytes) => {
      const value = Buffer.alloc(4);
      value.writeInt32LE(bytes, 0);
      try {
        setOption(fd, SOL_SOCKET, SO_RCVBUFFORCE, value);
      } catch (error) {
        // Without CAP_NET_ADMIN the default buffer stays; a full one is then an error of the receive, not a loss.
        if (!(error instanceof ErrnoError)) throw error;
      }
    },
    flock: (fd, operation) => {
      try {
        attempt('flock', () => flock(fd, operation));
        return true;
      } catch (error) {
        if (error instanceof ErrnoError && error.code === 'EAGAIN') return false;
        throw error;
      }
    },
    close: (fd) => {
      // Not retried: after EINTR the descriptor is gone on Linux, and its number may be another's by now.
      close(fd);
    },
  };
}
