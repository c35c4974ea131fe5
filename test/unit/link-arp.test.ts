import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { parseIpv4 } from '../../lib/core/address.ts';
import { broadcastSockaddr, gratuitousArp, whyNoArp } from '../../lib/link/arp.ts';
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
