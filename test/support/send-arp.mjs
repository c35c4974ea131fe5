// Sends ARP packets as broadcasts. usage: send-arp.mjs LINK HEX...
import { readFileSync } from 'node:fs';
import koffi from 'koffi';

const [link, ...packets] = process.argv.slice(2);
const self = koffi.load(null);
const socket = self.func('int socket(int domain, int type, int protocol)');
const sendto = self.func(
  'long sendto(int fd, const uint8_t *data, size_t size, int flags, const uint8_t *address, uint32_t length)',
);
// `ip netns exec` mounts a /sys of the namespace.
const index = Number(readFileSync(`/sys/class/net/${link}/ifindex`, 'latin1'));
const to = Buffer.alloc(20);
to.writeUInt16LE(17, 0);
to.writeUInt16BE(0x0806, 2);
to.writeUInt32LE(index, 4);
to.writeUInt8(6, 11);
to.fill(0xff, 12, 18);
const fd = socket(17, 2, 0);
for (const packet of packets) {
  const bytes = Buffer.from(packet, 'hex');
  if (sendto(fd, bytes, bytes.length, 0, to, to.length) < 0) throw new Error(`sendto: errno ${koffi.errno()}`);
}
