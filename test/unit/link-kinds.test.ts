/** Links as rtnetlink describes them: P_Key children and bonds of IPoIB links, what is read of them, and the ARP made of it. */
import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { parseIpv4, parseLinkName, tryParseRange } from '../../lib/core/address.ts';
import type { Network } from '../../lib/core/mapping.ts';
import { aliasLabel, isOurLabel } from '../../lib/core/mapping.ts';
import { broadcastSockaddr, gratuitousArp, whyNoArp } from '../../lib/link/arp.ts';
import type { Link } from '../../lib/link/ports.ts';
import { decodeLink, RTM } from '../../lib/link/rtnetlink.ts';
import { attribute, concat, cString, nested, u8, u16, u32 } from '../../lib/link/wire.ts';

const fixture = JSON.parse(readFileSync(new URL('../fixtures/link/pkey.json', import.meta.url), 'utf8')) as Record<
  'parent' | 'child' | 'bond',
  { readonly name: string; readonly address: string; readonly broadcast: string }
>;
const bytes = (text: string) => new Uint8Array(Buffer.from(text.replaceAll(':', ''), 'hex'));
const hex = (of: Uint8Array) => Buffer.from(of).toString('hex');
const address = parseIpv4('192.168.10.202');

const IFF = { up: 0x1, running: 0x40 } as const;
const IFLA = { address: 1, broadcast: 2, ifname: 3, mtu: 4, link: 5, master: 10, linkinfo: 18 } as const;
const INFO = { kind: 1, data: 2, slaveKind: 4 } as const;

/** RTM_NEWLINK of a link of type InfiniBand: the attributes that matter, as the kernel of Linux 6.1 orders them. */
function newLink(
  which: keyof typeof fixture,
  { flags = IFF.up | IFF.running, master, kind }: { flags?: number; master?: number; kind: string },
): Link | undefined {
  const { name, address: own, broadcast } = fixture[which];
  const payload = concat(
    concat(u8(0), u8(0), u16(32), u32(7), u32(flags), u32(0)),
    attribute(IFLA.ifname, cString(name)),
    attribute(IFLA.mtu, u32(2044)),
    ...(master === undefined ? [] : [attribute(IFLA.master, u32(master))]),
    // Not a nested attribute by its flag: the kernel leaves that out here.
    attribute(
      IFLA.linkinfo,
      concat(
        attribute(INFO.kind, cString(kind)),
        nested(INFO.data, attribute(1, u16(0x8001))),
        ...(master === undefined ? [] : [attribute(INFO.slaveKind, cString('bond'))]),
      ),
    ),
    attribute(IFLA.address, bytes(own)),
    attribute(IFLA.broadcast, bytes(broadcast)),
    ...(which === 'child' ? [attribute(IFLA.link, u32(3))] : []),
  );
  return decodeLink({ type: RTM.newLink, flags: 0, payload });
}

function need<T>(value: T | undefined): T {
  if (value === undefined) throw new Error('no link');
  return value;
}

describe('a P_Key child', () => {
  const child = need(newLink('child', { kind: 'ipoib' }));

  it('is read with its dotted name, its own hardware address and the broadcast address of its partition', () => {
    expect(child).toMatchObject({ name: 'ib0.8001', type: 32, up: true, running: true, kind: 'ipoib', master: null });
    expect(child.address).toEqual(bytes(fixture.child.address));
    expect(child.broadcast).toEqual(bytes(fixture.child.broadcast));
    expect(hex(child.broadcast).slice(16, 20)).toBe('8001');
  });

  it('is announced to its own partition, never to that of its parent', () => {
    const parent = need(newLink('parent', { kind: 'ipoib' }));
    expect(whyNoArp(child)).toBeUndefined();
    const own = hex(child.address);
    const all = hex(child.broadcast);
    expect(hex(gratuitousArp('request', child, address))).toBe(`0020080014040001${own}c0a80aca${all}c0a80aca`);
    expect(hex(gratuitousArp('reply', child, address))).toBe(`0020080014040002${own}c0a80aca${own}c0a80aca`);
    expect(hex(broadcastSockaddr(child))).toMatch(new RegExp(`0014${all}$`));
    expect(hex(broadcastSockaddr(child))).not.toBe(hex(broadcastSockaddr(parent)));
    expect(own).not.toBe(hex(parent.address));
  });
});

describe('a bond of IPoIB links', () => {
  it('is of type 32 and has the hardware address of its active slave', () => {
    const bond = need(newLink('bond', { kind: 'bond' }));
    expect(bond).toMatchObject({ name: 'bond0', type: 32, kind: 'bond', running: true });
    expect(whyNoArp(bond)).toBeUndefined();
    expect(hex(gratuitousArp('request', bond, address))).toContain(hex(bytes(fixture.bond.address)));
  });

  it('without an active slave is up and not running', () => {
    expect(newLink('bond', { kind: 'bond', flags: IFF.up })).toMatchObject({ up: true, running: false });
  });

  it('is the master of its slaves, whose own kind stays theirs', () => {
    expect(newLink('child', { kind: 'ipoib', master: 9 })).toMatchObject({ master: 9, kind: 'ipoib' });
  });
});

describe('labels', () => {
  const range = (text: string) => need(tryParseRange(text));
  const on = (device: string): Network => ({
    name: 'ib',
    device: parseLinkName(device),
    bridge: parseLinkName('virbr1'),
    guests: range('192.168.122.2-192.168.122.6'),
    addresses: range('192.168.10.202-192.168.10.206'),
    isolate: true,
  });

  it.each([
    ['ib0', 42, 0, 'ib0:42-0'],
    ['ib0.8001', 42, 0, 'ib0.8001:42-0'],
    ['ib0.8001', 4242, 0, 'ib0.8001:4242-0'],
    ['ib0.8001', 42424, 0, 'kib:42424-0'],
    ['ibp129s0f0.8001', 42, 0, 'kib:42-0'],
    ['bond0', 42, 0, 'bond0:42-0'],
    ['ibp129s0f0.8001', 99_999_999, 9, 'kib:99999999-9'],
  ])('on %s of VM %i, NIC %i it is %s', (device, vm, nic, label) => {
    expect(aliasLabel(on(device), parseIpv4('192.168.122.2'), vm, nic)).toBe(label);
    expect(label.length).toBeLessThanOrEqual(15);
    expect(isOurLabel(device, label)).toBe(true);
  });

  it('of a child are none of its parent, nor the other way round', () => {
    expect(isOurLabel('ib0', 'ib0.8001:42-0')).toBe(false);
    expect(isOurLabel('ib0.8001', 'ib0:42-0')).toBe(false);
  });
});
