/**
 * One process that has sockets in every namespace of the lab: setns(2) moves the main thread, and a socket stays in
 * the namespace that it was made in. So a probe costs a millisecond, not a process. Driven by messages from lab.ts;
 * plain JavaScript, because Node 20 runs no TypeScript.
 */
import dgram from 'node:dgram';
import { openSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import koffi from 'koffi';

const AF_INET = 2;
const AF_PACKET = 17;
const SOCK_RAW_NONBLOCK = 3 | 0o4000 | 0o2000000;
const IPPROTO_ICMP = 1;
const IPPROTO_RAW = 255;
const ETH_P_ALL = 3;
const PORT = 7000;

const self = koffi.load(null);
const setns = self.func('int setns(int fd, int nstype)');
const socket = self.func('int socket(int domain, int type, int protocol)');
const bind = self.func('int bind(int fd, const uint8_t *address, uint32_t length)');
const recv = self.func('long recv(int fd, _Out_ uint8_t *data, size_t size, int flags)');
const sendto = self.func(
  'long sendto(int fd, const uint8_t *data, size_t size, int flags, const uint8_t *address, uint32_t length)',
);
const ifIndex = self.func('unsigned int if_nametoindex(const char *name)');
const closeFd = self.func('int close(int fd)');

const home = openSync('/proc/self/ns/net', 'r');
const namespaces = new Map();
const captures = new Map();
const streams = new Map();
const buffer = Buffer.alloc(256 * 1024);

function checked(result, what) {
  if (result < 0) throw new Error(`${what}: errno ${koffi.errno()}`);
  return result;
}

/** Runs `act` in a namespace, one at a time: Node makes some sockets only in a later tick. */
let last = Promise.resolve();
/**
 * Source ports of UDP, below those that the kernel gives (ip_local_port_range): never one twice, since a flow that ended is tracked
 * for half a minute, and another with its ports would get its translation.
 */
let sourcePort = 10_000;
function within(name, act) {
  const result = last.then(async () => {
    const entry = namespaces.get(name) ?? { fd: openSync(`/run/netns/${name}`, 'r'), name };
    namespaces.set(name, entry);
    checked(setns(entry.fd, 0), `setns ${name}`);
    try {
      return await act(entry);
    } finally {
      checked(setns(home, 0), 'setns back');
    }
  });
  last = result.catch(() => undefined);
  return result;
}

const ip = (bytes, at) => bytes.subarray(at, at + 4).join('.');
const addressOf = (text) => Buffer.from([AF_INET, 0, 0, 0, ...text.split('.').map(Number), 0, 0, 0, 0, 0, 0, 0, 0]);

function* datagrams(fd) {
  for (;;) {
    const length = Number(recv(fd, buffer, buffer.length, 0));
    if (length < 0) return;
    yield Buffer.from(buffer.subarray(0, length));
  }
}

function readPacket(bytes) {
  const header = (bytes[0] & 15) * 4;
  const fragment = bytes.readUInt16BE(6);
  const packet = {
    source: ip(bytes, 12),
    destination: ip(bytes, 16),
    protocol: { 1: 'icmp', 6: 'tcp', 17: 'udp' }[bytes[9]] ?? String(bytes[9]),
    length: bytes.readUInt16BE(2),
    fragment: (fragment & 0x3fff) !== 0,
  };
  const rest = bytes.subarray(header);
  if ((fragment & 0x1fff) !== 0 || rest.length < 8) return packet;
  if (packet.protocol === 'icmp') {
    const icmp = { ...packet, type: rest[0], code: rest[1], id: rest.readUInt16BE(4), mtu: rest.readUInt16BE(6) };
    const isError = [3, 11].includes(rest[0]) && rest.length >= 28;
    return isError ? { ...icmp, inner: { source: ip(rest, 20), destination: ip(rest, 24) } } : icmp;
  }
  const ports = { sourcePort: rest.readUInt16BE(0), destinationPort: rest.readUInt16BE(2) };
  return packet.protocol === 'tcp' && rest.length >= 14
    ? { ...packet, ...ports, flags: rest[13] }
    : { ...packet, ...ports };
}

/** Reads what has arrived at the raw sockets; the kernel keeps it until then. */
function pump() {
  for (const entry of namespaces.values()) {
    if (entry.icmp === undefined) continue;
    for (const bytes of datagrams(entry.icmp)) entry.seen.push(readPacket(bytes));
  }
  for (const capture of captures.values()) {
    for (const frame of datagrams(capture.fd)) {
      const type = frame.readUInt16BE(12);
      if (type === 0x0800) capture.packets.push(readPacket(frame.subarray(14)));
      if (type === 0x0806) {
        const arp = { protocol: 'arp', source: ip(frame, 28), destination: ip(frame, 38) };
        capture.packets.push({ ...arp, length: frame.length, fragment: false });
      }
    }
  }
}
setInterval(pump, 20).unref();

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const codes = { ECONNREFUSED: 'refused', ECONNRESET: 'reset', EHOSTUNREACH: 'unreachable', ENETUNREACH: 'unreachable' };
const word = (error) => codes[error.code] ?? `error ${error.code ?? error.message}`;

const operations = {
  sysctl: ({ ns, key, value }) =>
    within(ns, () => writeFileSync(`/proc/sys/${key.replace(/\./g, '/')}`, String(value))),

  /** TCP on every address of the namespace; UDP on each named one, since a reply must come from the address asked. */
  serve: ({ ns, addresses }) =>
    within(ns, async (entry) => {
      entry.icmp = checked(socket(AF_INET, SOCK_RAW_NONBLOCK, IPPROTO_ICMP), 'socket icmp');
      entry.raw = checked(socket(AF_INET, SOCK_RAW_NONBLOCK, IPPROTO_RAW), 'socket raw');
      entry.seen = [];
      const tcp = net.createServer((peer) => {
        peer.on('error', () => peer.destroy());
        peer.write(`${ns}: ${peer.remoteAddress} > ${peer.localAddress}\n`);
        peer.pipe(peer);
      });
      await new Promise((resolve, reject) => tcp.on('error', reject).listen(PORT, '0.0.0.0', resolve));
      for (const address of addresses) {
        const udp = dgram.createSocket('udp4');
        udp.on('message', (data, from) => {
          udp.send(
            Buffer.concat([Buffer.from(`${ns}: ${from.address} > ${address}\n`), data]),
            from.port,
            from.address,
          );
        });
        await new Promise((resolve, reject) => udp.on('error', reject).bind(PORT, address, resolve));
        // An ICMP error about a reply that nobody wants any more is no fault of the server.
        udp.removeAllListeners('error').on('error', () => undefined);
      }
    }),

  open: ({ id, protocol, ns, to, source, port, timeout }) =>
    protocol === 'tcp' ? openTcp(id, ns, to, source, port ?? PORT, timeout) : openUdp(id, ns, to, source, port ?? PORT),

  exchange: ({ id, size, timeout }) => {
    const stream = streams.get(id);
    return stream === undefined ? 'closed' : stream.exchange(size, timeout);
  },

  close: ({ id }) => {
    streams.get(id)?.close();
    streams.delete(id);
  },

  /** One echo request. Who saw it is found in the ICMP that the servers have seen. */
  icmp: async ({ ns, to, source, size, timeout }) => {
    const id = 1 + Math.floor(Math.random() * 65534);
    const message = Buffer.alloc(8 + size);
    message.writeUInt8(8, 0);
    message.writeUInt16BE(id, 4);
    message.writeUInt16BE(checksum(message), 2);
    const failed = await within(ns, () => {
      const fd = checked(socket(AF_INET, SOCK_RAW_NONBLOCK, IPPROTO_ICMP), 'socket');
      try {
        if (source !== undefined) checked(bind(fd, addressOf(source), 16), 'bind');
        const address = addressOf(to);
        return Number(sendto(fd, message, message.length, 0, address, 16)) < 0;
      } finally {
        closeFd(fd);
      }
    });
    if (failed) return 'unreachable';
    const until = Date.now() + timeout;
    do {
      await pause(2);
      pump();
      const of = (type) => (packet) => packet.type === type && packet.id === id;
      const answer = namespaces.get(ns).seen.find(of(0));
      if (answer === undefined) continue;
      if (answer.source !== to) return `answered by ${answer.source}`;
      for (const { name, seen = [] } of namespaces.values()) {
        const request = seen.find(of(8));
        if (request !== undefined) return `${name}: ${request.source} > ${request.destination}`;
      }
    } while (Date.now() < until);
    return 'timeout';
  },

  /** A whole IPv4 packet; the kernel fills in identification and header checksum, and routes it. */
  send: ({ ns, packet }) =>
    within(ns, (entry) => {
      const bytes = Buffer.from(packet, 'base64');
      checked(Number(sendto(entry.raw, bytes, bytes.length, 0, addressOf(ip(bytes, 16)), 16)), 'sendto');
    }),

  icmpSeen: ({ ns }) => {
    pump();
    return namespaces.get(ns)?.seen.splice(0) ?? [];
  },

  capture: ({ id, ns, link }) =>
    within(ns, () => {
      const fd = checked(socket(AF_PACKET, SOCK_RAW_NONBLOCK, 0), 'socket');
      const index = ifIndex(link);
      if (index === 0) throw new Error(`no link ${link} in ${ns}`);
      const address = Buffer.alloc(20);
      address.writeUInt16LE(AF_PACKET, 0);
      address.writeUInt16BE(ETH_P_ALL, 2);
      address.writeInt32LE(index, 4);
      checked(bind(fd, address, address.length), 'bind');
      captures.set(id, { fd, packets: [] });
    }),

  captured: ({ id, stop }) => {
    pump();
    const capture = captures.get(id);
    if (stop) {
      closeFd(capture.fd);
      captures.delete(id);
    }
    return capture.packets.splice(0);
  },
};

function checksum(bytes) {
  let sum = 0;
  for (let at = 0; at + 1 < bytes.length; at += 2) sum += bytes.readUInt16BE(at);
  if (bytes.length % 2 === 1) sum += bytes[bytes.length - 1] << 8;
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  return ~sum & 0xffff;
}

function openTcp(id, ns, to, source, port, timeout) {
  let peer;
  let received = Buffer.alloc(0);
  let failure;
  const waiting = new Set();
  const wake = () => {
    for (const look of [...waiting]) look();
  };
  /** Resolves with what `look` finds; with the failure, or `timeout`. */
  const until = (look, milliseconds) =>
    new Promise((resolve) => {
      const finish = (result) => {
        clearTimeout(timer);
        waiting.delete(again);
        resolve(result);
      };
      const again = () => {
        const result = look() ?? failure;
        if (result !== undefined) finish(result);
      };
      const timer = setTimeout(() => finish('timeout'), milliseconds);
      waiting.add(again);
      again();
    });
  const stream = {
    exchange: async (size, milliseconds) => {
      if (failure !== undefined) return failure;
      received = Buffer.alloc(0);
      peer.write(Buffer.alloc(size, 0x2e));
      return until(() => (received.length >= size ? 'alive' : undefined), milliseconds);
    },
    close: () => peer.resetAndDestroy(),
  };
  streams.set(id, stream);
  return within(ns, async () => {
    peer = net.connect({ host: to, port, ...(source === undefined ? {} : { localAddress: source }) });
    peer.on('data', (data) => {
      received = Buffer.concat([received, data]);
      wake();
    });
    peer.on('error', (error) => {
      failure = word(error);
      wake();
    });
    peer.on('close', () => {
      failure ??= 'closed';
      wake();
    });
    await new Promise(setImmediate);
  }).then(() =>
    until(() => {
      const end = received.indexOf(0x0a);
      return end < 0 ? undefined : received.subarray(0, end).toString();
    }, timeout),
  );
}

function openUdp(id, ns, to, source, port) {
  const udp = dgram.createSocket('udp4');
  let answer = () => undefined;
  let expected = -1;
  // Connected, so that ICMP errors arrive and an answer from another address does not.
  udp.on('message', (data) => {
    const end = data.indexOf(0x0a);
    // A late answer to an earlier datagram has another size.
    if (data.length - end - 1 === expected) answer(data.subarray(0, end).toString());
  });
  udp.on('error', (error) => answer(word(error)));
  streams.set(id, {
    exchange: (size, timeout) =>
      new Promise((resolve) => {
        const timer = setTimeout(() => answer('timeout'), timeout);
        answer = (result) => {
          clearTimeout(timer);
          answer = () => undefined;
          resolve(result);
        };
        expected = size;
        udp.send(Buffer.alloc(size, 0x2e), (error) => {
          if (error) answer(word(error));
        });
      }),
    close: () => udp.close(),
  });
  return within(ns, async () => {
    sourcePort = sourcePort === 32_767 ? 10_000 : sourcePort + 1;
    await new Promise((resolve) => udp.bind(sourcePort, source ?? '0.0.0.0', resolve));
    return new Promise((resolve) => udp.connect(port, to, (error) => resolve(error ? word(error) : 'open')));
  });
}

process.on('message', async ({ call, operation, ...parameters }) => {
  try {
    process.send({ call, result: await operations[operation](parameters) });
  } catch (error) {
    process.send({ call, error: `${operation}: ${error.message}` });
  }
});
process.on('disconnect', () => process.exit(0));
process.send({ ready: true });
