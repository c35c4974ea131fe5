import { readFileSync } from 'node:fs';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { parseIpv4 } from '../../lib/core/address.ts';
import {
  arpProbe,
  arpSockaddr,
  broadcastSockaddr,
  claimIn,
  decodeArp,
  gratuitousArp,
  printHardware,
  whyNoArp,
} from '../../lib/link/arp.ts';
import type { Link } from '../../lib/link/ports.ts';

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
const bytes = (text: string) => new Uint8Array(Buffer.from(text.replace(/[: \n]/g, ''), 'hex'));

const ethernet: Link = {
  index: 3,
  name: 'eth0',
  type: 1,
  mtu: 1500,
  up: true,
  running: true,
  kind: null,
  address: bytes('02:00:c0:a8:0a:ca'),
  broadcast: bytes('ff:ff:ff:ff:ff:ff'),
  master: null,
  carrierChanges: 2,
};
const fixture = JSON.parse(readFileSync(new URL('../fixtures/link/ipoib.json', import.meta.url), 'utf8'));
const ipoib: Link = {
  ...ethernet,
  index: 0x0102,
  name: 'ib0',
  type: fixture.type,
  mtu: fixture.mtu,
  address: bytes(fixture.address),
  broadcast: bytes(fixture.broadcast),
};
const address = parseIpv4('192.168.10.202');

describe('gratuitous ARP on Ethernet', () => {
  it('is a request from and for the address, of 28 bytes', () => {
    expect(hex(gratuitousArp('request', ethernet, address))).toBe(
      '0001' + '0800' + '06' + '04' + '0001' + '0200c0a80aca' + 'c0a80aca' + 'ffffffffffff' + 'c0a80aca',
    );
  });

  it('is a reply whose target is its sender', () => {
    expect(hex(gratuitousArp('reply', ethernet, address))).toBe(
      '0001' + '0800' + '06' + '04' + '0002' + '0200c0a80aca' + 'c0a80aca' + '0200c0a80aca' + 'c0a80aca',
    );
  });

  it('goes to a sockaddr_ll of 20 bytes', () => {
    expect(hex(broadcastSockaddr(ethernet))).toBe(
      '1100' + '0806' + '03000000' + '0100' + '00' + '06' + 'ffffffffffff' + '0000',
    );
  });
});

describe('gratuitous ARP on IPoIB', () => {
  const own = '80000208' + 'fe80000000000000e41d2d03005fa1b2';
  const all = '00ffffff' + 'ff12401b8001000000000000ffffffff';

  it('is a request with hardware type 32 and 20-byte addresses, of 56 bytes', () => {
    const frame = gratuitousArp('request', ipoib, address);
    expect(hex(frame)).toBe(`0020${'0800'}${'14'}${'04'}${'0001'}${own}c0a80aca${all}c0a80aca`);
    expect(frame).toHaveLength(56);
  });

  it('is a reply whose target is its sender', () => {
    expect(hex(gratuitousArp('reply', ipoib, address))).toBe(
      `0020${'0800'}${'14'}${'04'}${'0002'}${own}c0a80aca${own}c0a80aca`,
    );
  });

  it('goes to a sockaddr_ll of 32 bytes that holds the whole broadcast address', () => {
    expect(hex(broadcastSockaddr(ipoib))).toBe(`1100${'0806'}02010000${'2000'}${'00'}${'14'}${all}`);
  });
});

const arpFixture = JSON.parse(readFileSync(new URL('../fixtures/link/arp.json', import.meta.url), 'utf8')) as Readonly<
  Record<string, string>
>;
const packetOf = (name: string): Uint8Array => bytes(arpFixture[name] ?? '');

describe('the probe', () => {
  it('on Ethernet asks without a sender address, for a target without a hardware address', () => {
    expect(hex(arpProbe(ethernet, address))).toBe(
      '0001' + '0800' + '06' + '04' + '0001' + '0200c0a80aca' + '00000000' + '000000000000' + 'c0a80aca',
    );
  });

  it('on IPoIB has 56 bytes', () => {
    const frame = arpProbe(ipoib, address);
    const own = hex(ipoib.address);
    expect(hex(frame)).toBe(`0020${'0800'}${'14'}${'04'}${'0001'}${own}00000000${'00'.repeat(20)}c0a80aca`);
    expect(frame).toHaveLength(56);
  });

  it('is heard on a socket bound to ARP and the link', () => {
    expect(hex(arpSockaddr(ipoib))).toBe(`1100${'0806'}02010000${'00'.repeat(12)}`);
  });
});

describe('a received ARP packet', () => {
  it('on Ethernet is read, padding or not', () => {
    const expected = {
      operation: 'reply',
      type: 1,
      senderHardware: bytes('02:00:00:00:00:bb'),
      sender: '192.168.10.202',
      target: '0.0.0.0',
    };
    expect(decodeArp(packetOf('ethernet reply to a probe'))).toEqual(expected);
    expect(decodeArp(bytes(`${arpFixture['ethernet reply to a probe']}${'00'.repeat(18)}`))).toEqual(expected);
  });

  it('on IPoIB has addresses of 20 bytes', () => {
    expect(decodeArp(packetOf('ipoib reply to a probe'))).toEqual({
      operation: 'reply',
      type: 32,
      senderHardware: bytes('80:00:02:09:fe:80:00:00:00:00:00:00:e4:1d:2d:03:00:5f:ff:ff'),
      sender: '192.168.10.202',
      target: '0.0.0.0',
    });
  });

  it('reads back what is sent', () => {
    for (const link of [ethernet, ipoib]) {
      const common = { type: link.type, senderHardware: link.address, target: address };
      expect(decodeArp(arpProbe(link, address))).toEqual({ ...common, operation: 'request', sender: '0.0.0.0' });
      for (const operation of ['request', 'reply'] as const) {
        expect(decodeArp(gratuitousArp(operation, link, address))).toEqual({ ...common, operation, sender: address });
      }
    }
  });

  it.each([
    'cut off',
    'for another protocol',
    'with a wrong address length',
    'a reverse request',
    'with hardware addresses longer than itself',
    'without hardware addresses',
  ])('%s is none', (name) => {
    expect(packetOf(name).length).toBeGreaterThan(0);
    expect(decodeArp(packetOf(name))).toBeUndefined();
  });

  it('of any bytes never throws, and what is read lies inside of them', () => {
    const header = fc.tuple(
      fc.constantFrom(1, 32),
      fc.constantFrom(0x0800, 0x86dd),
      fc.integer({ min: 0, max: 255 }),
      fc.constantFrom(4, 6),
      fc.integer({ min: 0, max: 3 }),
      fc.uint8Array({ maxLength: 600 }),
    );
    const framed = header.map(([type, protocol, length, protocolLength, operation, rest]) => {
      const packet = new Uint8Array(8 + rest.length);
      packet.set([type >> 8, type, protocol >> 8, protocol, length, protocolLength, 0, operation]);
      packet.set(rest, 8);
      return packet;
    });
    fc.assert(
      fc.property(fc.oneof(fc.uint8Array({ maxLength: 100 }), framed), (packet) => {
        const read = decodeArp(packet);
        if (read === undefined) return;
        expect(read.senderHardware).toHaveLength(packet[4] ?? 0);
        expect(packet.length).toBeGreaterThanOrEqual(16 + 2 * read.senderHardware.length);
        for (const link of [ethernet, ipoib]) claimIn(read, link, ['02:00:c0:a8:0a:ca', 'zz', '']);
      }),
      { numRuns: 2_000 },
    );
  });
});

describe('who claims an address', () => {
  const stranger = '02:00:00:00:00:bb';
  const from = (hardware: string, operation: 'request' | 'reply', sender: string, target: string) => ({
    operation,
    type: 1,
    senderHardware: bytes(hardware),
    sender: parseIpv4(sender),
    target: parseIpv4(target),
  });

  it('is the sender of a request or reply with a sender address', () => {
    for (const operation of ['request', 'reply'] as const) {
      expect(claimIn(from(stranger, operation, address, '192.168.10.1'), ethernet)).toEqual({
        address,
        hardware: stranger,
        how: 'has',
      });
    }
  });

  it('is another that probes, but not the target of a reply without a sender', () => {
    expect(claimIn(from(stranger, 'request', '0.0.0.0', address), ethernet)).toEqual({
      address,
      hardware: stranger,
      how: 'probes',
    });
    expect(claimIn(from(stranger, 'reply', '0.0.0.0', address), ethernet)).toBeUndefined();
  });

  it('is never the link itself, nor one that is excepted, nor a packet of another kind of link', () => {
    expect(claimIn(from('02:00:c0:a8:0a:ca', 'reply', address, address), ethernet)).toBeUndefined();
    expect(claimIn(from(stranger, 'reply', address, address), ethernet, [stranger])).toBeUndefined();
    expect(claimIn(from(stranger, 'reply', address, address), ethernet, ['02:00:00:00:00:cc'])).toBeDefined();
    expect(claimIn(from(stranger, 'reply', address, address), ipoib)).toBeUndefined();
  });

  it('on IPoIB the flags in front do not make another of it', () => {
    const own = `00${hex(ipoib.address).slice(2)}`;
    const packet = { operation: 'reply', type: 32, sender: address, target: address } as const;
    expect(claimIn({ ...packet, senderHardware: bytes(own) }, ipoib)).toBeUndefined();
    const other = `${hex(ipoib.address).slice(0, 38)}ff`;
    const claim = { address, hardware: printHardware(bytes(other)), how: 'has' };
    expect(claimIn({ ...packet, senderHardware: bytes(other) }, ipoib)).toEqual(claim);
    const plain = `00${claim.hardware.slice(2)}`;
    expect(claimIn({ ...packet, senderHardware: bytes(other) }, ipoib, [plain])).toBeUndefined();
  });
});

describe('whyNoArp', () => {
  it('has nothing against Ethernet and IPoIB', () => {
    expect(whyNoArp(ethernet)).toBeUndefined();
    expect(whyNoArp(ipoib)).toBeUndefined();
  });

  it.each([
    ['a device without an address', { ...ipoib, address: new Uint8Array() }, 'hardware address of ib0 has 0 bytes'],
    [
      'a broadcast of another length',
      { ...ipoib, broadcast: ethernet.broadcast },
      'broadcast address of ib0 has 6 bytes',
    ],
    ['another type of link', { ...ethernet, name: 'lo', type: 772 }, 'lo is of type 772'],
  ])('names the reason for %s', (_, link, reason) => {
    expect(whyNoArp(link)).toContain(reason);
  });
});
