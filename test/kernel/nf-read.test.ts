import { execFileSync } from 'node:child_process';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { ipv4Bytes, parseIpv4, parseMac } from '../../lib/core/address.ts';
import { createElementReader, type ElementReader, ipv4MacKey } from '../../lib/host/nf-tables-read.ts';
import { u32 } from '../../lib/link/wire.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const nft = (input: string) => execFileSync('/usr/sbin/nft', ['-f', '-'], { input });
const ip = (text: string) => ipv4Bytes(parseIpv4(text));

describe('reading elements by key', () => {
  let reader: ElementReader;

  beforeAll(async () => {
    nft(`
      table ip kread {
        map m { type ipv4_addr : ipv4_addr; }
        map counted { type ipv4_addr : ipv4_addr; counter; }
        set pairs { type ipv4_addr . ether_addr; }
        map marks { type mark : ipv4_addr; }
        set plain { type ipv4_addr; }
      }
      add element ip kread m { 10.0.0.1 comment "ib0:42-1 one" : 192.168.10.1, 10.0.0.2 : 192.168.10.2 }
      add element ip kread counted { 10.0.0.1 comment "x" : 192.168.10.1 }
      add element ip kread pairs { 10.0.0.1 . 02:00:0a:00:00:01 comment "ib0:42-1" }
      add element ip kread marks { 0x12345678 : 192.168.10.9 }
      add element ip kread plain { 10.0.0.1 comment "y" }
    `);
    reader = await createElementReader();
  });
  afterAll(() => {
    reader.close();
    nft('delete table ip kread');
  });

  it('gives what a map has for each key, in order, and undefined for what it has not', () => {
    expect(reader.get('kread', 'm', [ip('10.0.0.2'), ip('10.0.0.3'), ip('10.0.0.1'), ip('10.0.0.2')])).toEqual([
      ip('192.168.10.2'),
      undefined,
      ip('192.168.10.1'),
      ip('192.168.10.2'),
    ]);
  });

  it('reads maps whose elements count', () => {
    expect(reader.get('kread', 'counted', [ip('10.0.0.1'), ip('10.0.0.2')])).toEqual([ip('192.168.10.1'), undefined]);
  });

  it('tells members of a set from others', () => {
    expect(reader.get('kread', 'plain', [ip('10.0.0.2'), ip('10.0.0.1')])).toEqual([undefined, 'present']);
  });

  it('finds address and MAC of a concatenated key together only', () => {
    const key = (address: string, mac: string) => ipv4MacKey(parseIpv4(address), parseMac(mac));
    expect(
      reader.get('kread', 'pairs', [
        key('10.0.0.1', '02:00:0a:00:00:01'),
        key('10.0.0.1', '02:00:0a:00:00:02'),
        key('10.0.0.2', '02:00:0a:00:00:01'),
      ]),
    ).toEqual(['present', undefined, undefined]);
  });

  it('reads a map by mark', () => {
    expect(reader.get('kread', 'marks', [u32(0x12345678), u32(0x78563412)])).toEqual([ip('192.168.10.9'), undefined]);
  });

  it('tells a missing table or set from a missing element', () => {
    expect(reader.get('kread', 'none', [ip('10.0.0.1')])).toBe('no-set');
    expect(reader.get('none', 'm', [ip('10.0.0.1')])).toBe('no-set');
    expect(reader.get('kread', 'none', [])).toBe('no-set');
    expect(reader.get('kread', 'm', [])).toEqual([]);
  });

  it('sees a change at once', () => {
    nft('add element ip kread m { 10.0.0.7 : 192.168.10.7 }');
    expect(reader.get('kread', 'm', [ip('10.0.0.7')])).toEqual([ip('192.168.10.7')]);
    nft('delete element ip kread m { 10.0.0.7 }');
    expect(reader.get('kread', 'm', [ip('10.0.0.7')])).toEqual([undefined]);
  });

  it('names map and table when the kernel refuses a key', () => {
    expect(() => reader.get('kread', 'm', [new Uint8Array(12)])).toThrowError(
      'Cannot read an element of m of table ip kread',
    );
  });

  it('says when the rights are missing', async () => {
    process.seteuid?.(65534);
    try {
      const poor = await createElementReader();
      expect(() => poor.get('kread', 'm', [ip('10.0.0.1')])).toThrowError(
        expect.objectContaining({ code: 'not-permitted' }),
      );
      poor.close();
    } finally {
      process.seteuid?.(0);
    }
  });

  it('finds each of 20,000 commented elements', () => {
    const keys = Array.from({ length: 20_000 }, (_, n) => `10.1.${n >> 8}.${n & 255}`);
    const value = (n: number) => `172.16.${n >> 8}.${n & 255}`;
    nft(`add element ip kread m { ${keys.map((key, n) => `${key} comment "e ${n}" : ${value(n)}`).join(', ')} }`);
    expect(reader.get('kread', 'm', keys.map(ip))).toEqual(keys.map((_, n) => ip(value(n))));
  });
});
