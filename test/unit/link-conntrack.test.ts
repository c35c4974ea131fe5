import { describe, expect, it } from 'vitest';
import { ipv4Bytes, parseIpv4 } from '../../lib/core/address.ts';
import { createConntrack } from '../../lib/host/conntrack.ts';
import { CT } from '../../lib/link/ctnetlink.ts';
import {
  attribute,
  attributes,
  concat,
  type Message,
  nested,
  type Reply,
  u8,
  u16be,
  u32,
} from '../../lib/link/wire.ts';

const guest = parseIpv4('192.168.122.2');
const address = parseIpv4('192.168.10.202');
const outside = parseIpv4('192.168.10.100');
const other = parseIpv4('10.0.0.1');

const tuple = (type: number, from: typeof guest, to: typeof guest) =>
  nested(type, nested(1, attribute(1, ipv4Bytes(from)), attribute(2, ipv4Bytes(to))));
const entry = (id: number, ...[from, to, replyFrom, replyTo]: readonly [...(typeof guest)[]]): Message => ({
  type: CT.new,
  flags: 2,
  payload: concat(
    concat(u8(2), u8(0), u16be(0)),
    tuple(1, from ?? other, to ?? other),
    tuple(2, replyFrom ?? other, replyTo ?? other),
    attribute(12, u32(id)),
  ),
});

const CTA_TUPLE_ORIG = 1;
const CTA_FILTER = 25;

/** A kernel whose table has `table`, answers filtered dumps by `filtered`, and deletes by `deleted`. */
function kernel(table: readonly Message[], filtered: Reply, deleted: Reply, entryCount: number) {
  const calls: string[] = [];
  const conntrack = createConntrack({
    entryCount: () => entryCount,
    open: async () => ({
      dump: (_, payload) => {
        const isFiltered = attributes(payload.subarray(4)).has(CTA_FILTER);
        calls.push(isFiltered ? 'filtered dump' : 'dump');
        return isFiltered ? filtered : { kind: 'ok', messages: table, interrupted: false };
      },
      request: (type, _, payload) => {
        expect(type).toBe(CT.delete);
        expect(attributes(payload.subarray(4)).has(CTA_TUPLE_ORIG)).toBe(true);
        calls.push('delete');
        return deleted;
      },
      close: () => undefined,
    }),
  });
  return { conntrack, calls };
}

const table = [
  entry(1, guest, outside, outside, address),
  entry(2, outside, address, guest, outside),
  entry(3, other, outside, outside, other),
];
const ok: Reply = { kind: 'ok', messages: [], interrupted: false };
const refused = (errno: number): Reply => ({ kind: 'refused', errno, text: undefined });

describe('conntrack', () => {
  it('dumps without a filter where the kernel refuses one, and judges the entries itself', async () => {
    const { conntrack, calls } = kernel(table, refused(22), ok, 5_000);
    expect(await conntrack.flush([{ kind: 'mapping', guest, address }])).toBe(2);
    expect(calls).toEqual(['filtered dump', 'dump', 'filtered dump', 'dump', 'delete', 'delete']);
  });

  it('judges the entries itself where an old kernel ignores the filter', async () => {
    const { conntrack, calls } = kernel(table, { kind: 'ok', messages: table, interrupted: false }, ok, 5_000);
    expect(await conntrack.flush([{ kind: 'mapping', guest, address }])).toBe(2);
    expect(calls).toEqual(['filtered dump', 'filtered dump', 'delete', 'delete']);
  });

  it('asks once for everything where there is little', async () => {
    const { conntrack, calls } = kernel(table, refused(22), ok, 3);
    expect(await conntrack.flush([{ kind: 'mapping', guest, address }])).toBe(2);
    expect(calls).toEqual(['dump', 'delete', 'delete']);
  });

  it('does not count what was gone before it was deleted', async () => {
    const { conntrack } = kernel(table, ok, refused(2), 3);
    expect(await conntrack.flush([{ kind: 'mapping', guest, address }])).toBe(0);
  });

  it('reports what the kernel refuses to delete', async () => {
    const { conntrack } = kernel(table, ok, refused(1), 3);
    await expect(conntrack.flush([{ kind: 'mapping', guest, address }])).rejects.toMatchObject({
      code: 'not-permitted',
      message: 'Cannot delete the connection tracking entry of 192.168.122.2 to 192.168.10.100',
    });
  });
});
