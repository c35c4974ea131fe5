import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, constants, openSync, readFileSync, readSync } from 'node:fs';
import koffi from 'koffi';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { parseIpv4, parseLinkName } from '../../lib/core/address.ts';
import { createAnnouncer } from '../../lib/host/announcer.ts';
import { createLinks } from '../../lib/host/links.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const ip = (...args: readonly string[]) => execFileSync('/usr/sbin/ip', args, { encoding: 'utf8', stdio: 'pipe' });
const links = createLinks();
const address = parseIpv4('192.168.10.202');
const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');

describe('on a veth', () => {
  const device = parseLinkName('kann0');
  const announcer = createAnnouncer(links);

  beforeAll(() => {
    ip('netns', 'add', 'kannpeer');
    ip(
      'link',
      'add',
      device,
      'address',
      '02:00:c0:a8:0a:ca',
      'type',
      'veth',
      'peer',
      'name',
      'kann1',
      'netns',
      'kannpeer',
    );
    ip('link', 'set', device, 'up');
    ip('-n', 'kannpeer', 'link', 'set', 'kann1', 'up');
  });
  afterEach(() => {
    announcer.close();
  });
  afterAll(() => {
    ip('link', 'delete', device);
    ip('netns', 'delete', 'kannpeer');
  });

  /** The whole frames of the next `count` ARP packets that the peer sees while `work` runs, in hex. */
  async function capture(count: number, work: () => Promise<void>): Promise<readonly string[]> {
    const args = [
      'netns',
      'exec',
      'kannpeer',
      'timeout',
      '10',
      'tcpdump',
      '-n',
      '-i',
      'kann1',
      '-U',
      '-xx',
      '-c',
      `${count}`,
    ];
    const child = spawn('/usr/sbin/ip', [...args, 'arp'], { stdio: ['ignore', 'pipe', 'pipe'] });
    let out = '';
    child.stdout.on('data', (chunk) => {
      out += chunk;
    });
    const ended = once(child, 'close');
    for (let said = ''; !said.includes('listening on'); ) said += (await once(child.stderr, 'data'))[0];
    await work();
    await ended;
    return out
      .split(/^(?=\S)/m)
      .map((packet) => [...packet.matchAll(/^\s+0x[0-9a-f]+:((?: +[0-9a-f]+)+)/gm)].map((row) => row[1]).join(''))
      .map((packet) => packet.replaceAll(' ', ''))
      .filter((packet) => packet !== '');
  }

  const arp = (operation: string, target: string, spa: string) =>
    `ffffffffffff0200c0a80aca0806000108000604000${operation}0200c0a80aca${spa}${target}${spa}`;

  it('a neighbour gets a request and a reply for each address', async () => {
    const second = parseIpv4('192.168.10.203');
    const frames = await capture(4, async () => {
      expect(
        await announcer.announce([
          { device, address },
          { device, address: second },
        ]),
      ).toEqual([
        { device, address },
        { device, address: second },
      ]);
    });
    expect(frames).toEqual([
      arp('1', 'ffffffffffff', 'c0a80aca'),
      arp('2', '0200c0a80aca', 'c0a80aca'),
      arp('1', 'ffffffffffff', 'c0a80acb'),
      arp('2', '0200c0a80aca', 'c0a80acb'),
    ]);
  });

  it('a neighbour that knew another hardware address learns the new one', async () => {
    ip('-n', 'kannpeer', 'address', 'add', '192.168.10.1/24', 'dev', 'kann1');
    const neighbour = ['-n', 'kannpeer', 'neigh'];
    ip(...neighbour, 'replace', address, 'lladdr', '02:00:00:00:00:99', 'dev', 'kann1', 'nud', 'stale');
    await announcer.announce([{ device, address }]);
    expect(ip(...neighbour, 'show', address)).toContain('02:00:c0:a8:0a:ca');
  });

  it('what cannot be announced is reported for each, and the others are announced', async () => {
    const missing = parseLinkName('kannnone');
    const loopback = parseLinkName('lo');
    const items = [missing, loopback, device].map((name) => ({ device: name, address }));
    const frames = await capture(2, async () => {
      expect(await announcer.announce(items)).toEqual([
        { device: missing, address, error: 'there is no link kannnone' },
        { device: loopback, address, error: 'lo is of type 772, neither Ethernet (1) nor InfiniBand (32)' },
        { device, address },
      ]);
    });
    expect(frames).toHaveLength(2);
  });

  it('a link that is down is reported', async () => {
    ip('link', 'set', device, 'down');
    const [result] = await announcer.announce([{ device, address }]);
    ip('link', 'set', device, 'up');
    expect(result?.error).toContain('ENETDOWN');
  });

  it('missing rights are reported', async () => {
    process.seteuid?.(65534);
    try {
      const [result] = await announcer.announce([{ device, address }]);
      expect(result?.error).toContain('EPERM');
    } finally {
      process.seteuid?.(0);
    }
  });

  it('a look-up that fails is reported', async () => {
    const failing = createAnnouncer({ link: () => Promise.reject(new Error('netlink is gone')) });
    const [result] = await failing.announce([{ device, address }]);
    expect(result?.error).toContain('netlink is gone');
  });
});

describe('on a link of type InfiniBand', () => {
  // A tun device takes the type; its addresses stay empty, so they come from a fixture.
  const device = parseLinkName('fib0');
  const TUNSETIFF = 0x400454ca;
  const TUNSETLINK = 0x400454cd;
  const IFF_TUN_NO_PI = 0x1001;
  const fixture = JSON.parse(readFileSync(new URL('../fixtures/link/ipoib.json', import.meta.url), 'utf8')) as {
    address: string;
    broadcast: string;
  };
  const bytes = (text: string) => new Uint8Array(Buffer.from(text.replaceAll(':', ''), 'hex'));
  const own = hex(bytes(fixture.address));
  const broadcast = hex(bytes(fixture.broadcast));
  let tun: number;

  beforeAll(() => {
    const self = koffi.load(null);
    const ioctlPointer = self.func('ioctl', 'int', ['int', 'unsigned long', 'uint8_t *']);
    const ioctlNumber = self.func('ioctl', 'int', ['int', 'unsigned long', 'unsigned long']);
    tun = openSync('/dev/net/tun', constants.O_RDWR | constants.O_NONBLOCK);
    const request = Buffer.alloc(40);
    request.write(device);
    request.writeUInt16LE(IFF_TUN_NO_PI, 16);
    expect(ioctlPointer(tun, TUNSETIFF, request)).toBe(0);
    expect(ioctlNumber(tun, TUNSETLINK, 32)).toBe(0);
    // Router solicitations would come between.
    execFileSync('/usr/sbin/sysctl', ['-q', '-w', `net.ipv6.conf.${device}.disable_ipv6=1`]);
    ip('link', 'set', device, 'up');
  });
  afterAll(() => closeSync(tun));

  /** All frames that were sent on the device. */
  function sent(): readonly string[] {
    const frames: string[] = [];
    const buffer = Buffer.alloc(4096);
    for (;;) {
      try {
        frames.push(hex(buffer.subarray(0, readSync(tun, buffer))));
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code === 'EAGAIN') return frames;
        throw error;
      }
    }
  }

  it('request and reply are those of RFC 4391, byte for byte', async () => {
    const announcer = createAnnouncer({
      link: async (name) => {
        const link = await links.link(name);
        return link && { ...link, address: bytes(fixture.address), broadcast: bytes(fixture.broadcast) };
      },
    });
    expect(await announcer.announce([{ device, address }])).toEqual([{ device, address }]);
    announcer.close();
    const head = '0020' + '0800' + '14' + '04';
    expect(sent()).toEqual([
      `${head}0001${own}c0a80aca${broadcast}c0a80aca`,
      `${head}0002${own}c0a80aca${own}c0a80aca`,
    ]);
  });

  it('without a hardware address nothing is sent, and that is reported', async () => {
    expect((await links.link(device))?.type).toBe(32);
    const announcer = createAnnouncer(links);
    expect(await announcer.announce([{ device, address }])).toEqual([
      { device, address, error: 'the hardware address of fib0 has 0 bytes, 20 are needed' },
    ]);
    announcer.close();
    expect(sent()).toEqual([]);
  });
});
