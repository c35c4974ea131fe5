import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { parseIpv4 } from '../../lib/core/address.ts';
import { decodeElement } from '../../lib/host/nf-tables-read.ts';
import { CT, decodeFlow, encodeDelete, encodeDump, type Flow, selectionOf } from '../../lib/link/ctnetlink.ts';
import {
  decodeAddress,
  decodeLink,
  decodeRouteIsLocal,
  encodeAlias,
  encodeSetHairpin,
  RTM,
} from '../../lib/link/rtnetlink.ts';
import {
  attribute,
  attributes,
  concat,
  createReplyReader,
  cString,
  encodeRequest,
  NLM_F,
  nested,
  readCString,
  sameBytes,
  u8,
  u16,
  u32,
} from '../../lib/link/wire.ts';

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
const i32 = (value: number) => u32(value >>> 0);
/** Random bytes; and bytes that often look like attributes, so that the inner readers are reached. */
const anyBytes = fc.uint8Array({ maxLength: 400 });
const attributeBytes = fc.letrec<{ list: Uint8Array }>((tie) => ({
  list: fc
    .array(
      fc.tuple(
        fc.integer({ min: 0, max: 30 }),
        fc.oneof({ depthSize: 'small', maxDepth: 4 }, fc.uint8Array({ maxLength: 24 }), tie('list')),
        fc.boolean(),
      ),
      { maxLength: 6 },
    )
    .map((parts) => concat(...parts.map(([type, payload, nest]) => (nest ? nested : attribute)(type, payload)))),
})).list;
const cutOrWhole = fc
  .tuple(fc.uint8Array({ minLength: 0, maxLength: 20 }), attributeBytes, fc.nat(64))
  .map(([head, body, cut]) => {
    const all = concat(head, body);
    return all.subarray(0, Math.max(0, all.length - cut));
  });
const hostile = fc.oneof(anyBytes, cutOrWhole);

describe('the reply reader', () => {
  it('ends an acknowledged request with what came before the acknowledgement', () => {
    const reader = createReplyReader(7);
    expect(reader.feed(encodeRequest(RTM.newLink, 0, 7, u32(1)))).toBeUndefined();
    const reply = reader.feed(encodeRequest(2, 0, 7, concat(i32(0), new Uint8Array(16))));
    expect(reply).toMatchObject({ kind: 'ok', interrupted: false, messages: [{ type: RTM.newLink }] });
  });

  it('gives errno and the text of the kernel when the request was refused', () => {
    const echoed = encodeRequest(RTM.newAddress, NLM_F.ack, 7, u32(1));
    const text = attribute(1, cString('ipv4: Address already assigned'));
    const refusal = encodeRequest(2, NLM_F.ackTlvs, 7, concat(i32(-17), echoed, text));
    const expected = { kind: 'refused', errno: 17, text: 'ipv4: Address already assigned' };
    expect(createReplyReader(7).feed(refusal)).toEqual(expected);
    const capped = encodeRequest(2, NLM_F.ackTlvs | NLM_F.capped, 7, concat(i32(-17), echoed.subarray(0, 16), text));
    expect(createReplyReader(7).feed(capped)).toEqual(expected);
  });

  it('notices an interrupted dump whichever message carries the flag', () => {
    for (const place of [0, 1, 2]) {
      const flag = (at: number) => NLM_F.multi | (at === place ? NLM_F.dumpInterrupted : 0);
      const datagram = concat(
        encodeRequest(RTM.newAddress, flag(0), 7, u32(1)),
        encodeRequest(RTM.newAddress, flag(1), 7, u32(1)),
        encodeRequest(3, flag(2), 7, i32(0)),
      );
      expect(createReplyReader(7).feed(datagram)).toMatchObject({ kind: 'ok', interrupted: true });
    }
  });

  it('reports an error at the end of a dump, as it would one at its start', () => {
    expect(createReplyReader(7).feed(encodeRequest(3, 0, 7, i32(-16)))).toMatchObject({ kind: 'refused', errno: 16 });
  });

  it('skips what answers an earlier request', () => {
    expect(createReplyReader(7).feed(encodeRequest(2, 0, 6, i32(-17)))).toBeUndefined();
  });

  it('calls a length that does not fit malformed', () => {
    const short = encodeRequest(2, 0, 7, i32(0)).subarray(0, 17);
    expect(createReplyReader(7).feed(short)).toMatchObject({ kind: 'malformed' });
    expect(createReplyReader(7).feed(encodeRequest(2, 0, 7, new Uint8Array()))).toMatchObject({ kind: 'malformed' });
    expect(createReplyReader(7).feed(new Uint8Array(16))).toMatchObject({ kind: 'malformed' });
  });
});

describe('attributes', () => {
  it('come back as they were written', () => {
    const distinct = fc.uniqueArray(fc.tuple(fc.integer({ min: 0, max: 0x3fff }), fc.uint8Array({ maxLength: 40 })), {
      selector: ([type]) => type,
    });
    fc.assert(
      fc.property(distinct, (list) => {
        const read = attributes(concat(...list.map(([type, payload]) => attribute(type, payload))));
        expect(read.size).toBe(list.length);
        for (const [type, payload] of list) expect(sameBytes(read.get(type) ?? u8(0), payload)).toBe(true);
      }),
    );
  });

  it('stop at a length of zero and at one beyond the end', () => {
    expect(attributes(new Uint8Array(64)).size).toBe(0);
    expect([...attributes(concat(attribute(1, u32(5)), u16(400), u16(2), u32(0))).keys()]).toEqual([1]);
  });
});

describe('no bytes make a decoder throw or loop', () => {
  it('neither the reply reader', () => {
    fc.assert(
      fc.property(fc.array(hostile, { maxLength: 4 }), fc.nat(3), (datagrams, seq) => {
        const reader = createReplyReader(seq);
        for (const datagram of datagrams) {
          expect([undefined, 'ok', 'refused', 'malformed']).toContain(reader.feed(datagram)?.kind);
        }
      }),
      { numRuns: 500 },
    );
  });

  it('nor the reader of a refusal with hostile attributes', () => {
    fc.assert(
      fc.property(hostile, fc.constantFrom(2, 3), fc.constantFrom(0x100, 0x200, 0x300), (payload, type, flags) => {
        expect(() => createReplyReader(1).feed(encodeRequest(type, flags, 1, payload))).not.toThrow();
      }),
      { numRuns: 500 },
    );
  });

  it('nor the decoders of links, addresses, routes, entries and elements', () => {
    const type = fc.constantFrom(RTM.newLink, RTM.newAddress, RTM.newRoute, CT.new, (10 << 8) | 12, 0);
    fc.assert(
      fc.property(type, fc.constantFrom(0, 2), hostile, (type, family, bytes) => {
        const message = { type, flags: 0, payload: bytes.length === 0 ? bytes : concat(u8(family), bytes.subarray(1)) };
        const flow = decodeFlow(message);
        if (flow !== undefined) expect(encodeDelete(flow).length).toBeGreaterThan(8);
        const address = decodeAddress(message);
        if (address !== undefined) parseIpv4(address.address);
        decodeLink(message);
        decodeRouteIsLocal(message);
        decodeElement(message, Uint8Array.of(1, 2, 3, 4));
        readCString(bytes);
      }),
      { numRuns: 2000 },
    );
  });
});

describe('rtnetlink requests', () => {
  it('name address, prefix length and label of an alias, so that a delete can hit nothing else', () => {
    const local = '08000200' + 'c0a80aca';
    const peer = '08000100' + 'c0a80aca';
    const label = `0d000300${Buffer.from('ib0:42-1\0').toString('hex')}000000`;
    expect(hex(encodeAlias(5, parseIpv4('192.168.10.202'), 'ib0:42-1'))).toBe(
      `0220000005000000${local}${peer}${label}`,
    );
  });

  it('set hairpin mode inside a nested attribute', () => {
    expect(hex(encodeSetHairpin(5, true))).toBe(
      '07000000' + '05000000' + '00000000' + '00000000' + '0c000c80' + '05000400' + '01000000',
    );
  });
});

describe('which connection tracking entries a mapping concerns', () => {
  const guest = parseIpv4('192.168.122.2');
  const address = parseIpv4('192.168.10.202');
  const stale = parseIpv4('192.168.10.203');
  const outside = parseIpv4('192.168.10.100');
  const gateway = parseIpv4('192.168.122.1');
  const otherGuest = parseIpv4('192.168.122.3');
  const otherAddress = parseIpv4('192.168.10.204');
  const hostAddress = parseIpv4('10.0.0.1');
  const flow = (from: string, to: string, replyFrom: string, replyTo: string): Flow => ({
    original: { source: parseIpv4(from), destination: parseIpv4(to) },
    reply: { source: parseIpv4(replyFrom), destination: parseIpv4(replyTo) },
    wire: { original: new Uint8Array(), id: undefined, zone: undefined },
  });
  const mapping = selectionOf([{ kind: 'mapping', guest, address }]);
  const foreign = selectionOf([{ kind: 'foreign', guest, address, stale: [stale, address] }]);

  it.each<[string, Flow, 'mapping' | 'foreign' | 'both' | 'neither']>([
    ['guest to outside through the mapping', flow(guest, outside, outside, address), 'mapping'],
    ['outside to the address', flow(outside, address, guest, outside), 'mapping'],
    ['the guest to its own address', flow(guest, address, guest, address), 'mapping'],
    ['the guest to its own address, source kept', flow(guest, address, guest, guest), 'mapping'],
    ['the guest to another guest', flow(guest, otherAddress, otherGuest, address), 'mapping'],
    ['another guest to the address', flow(otherGuest, address, guest, otherAddress), 'mapping'],
    ['the host to the address', flow(gateway, address, guest, gateway), 'mapping'],
    ['the address itself to the guest through the mapping', flow(address, address, guest, address), 'mapping'],
    ['outside to the address, ended on the host', flow(outside, address, address, outside), 'foreign'],
    ['outside to the address, sent to another guest', flow(outside, address, otherGuest, outside), 'foreign'],
    ['guest to outside, untranslated', flow(guest, outside, outside, guest), 'foreign'],
    ['guest to outside, with a stale translation', flow(guest, outside, outside, stale), 'foreign'],
    ['the guest to another address, not translated', flow(guest, otherAddress, otherGuest, guest), 'foreign'],
    ['the host as the address to outside', flow(address, outside, outside, address), 'foreign'],
    ['the host as the address to another address', flow(address, otherAddress, otherGuest, address), 'foreign'],
    // Half a translation: the guest's own, to an address that still leads to another guest.
    ['the guest to its own address, sent to another guest', flow(guest, address, otherGuest, address), 'both'],
    ['guest to outside through a foreign NAT', flow(guest, outside, outside, hostAddress), 'neither'],
    ['another guest to outside', flow(otherGuest, outside, outside, otherAddress), 'neither'],
    ['outside to another guest', flow(outside, otherAddress, otherGuest, outside), 'neither'],
    ['another guest to the guest behind a bridge', flow(otherGuest, guest, guest, otherGuest), 'neither'],
    ['a translation of another guest to the stale address', flow(otherGuest, outside, outside, stale), 'neither'],
  ])('%s', (_, entry, whose) => {
    const is = (one: string): boolean => whose === one || whose === 'both';
    expect([mapping.includes(entry), foreign.includes(entry)]).toEqual([is('mapping'), is('foreign')]);
  });

  it('each entry that counts passes one of the filters of its dumps', () => {
    const some = fc.constantFrom(guest, address, stale, outside, gateway, otherGuest, otherAddress);
    fc.assert(
      fc.property(some, some, some, some, (a, b, c, d) => {
        const entry = flow(a, b, c, d);
        for (const selection of [mapping, foreign]) {
          const dumped = selection.dumps.some(({ original = {}, reply = {} }) =>
            [
              [original.source, a],
              [original.destination, b],
              [reply.source, c],
              [reply.destination, d],
            ].every(([wanted, found]) => wanted === undefined || wanted === found),
          );
          if (selection.includes(entry)) expect(dumped).toBe(true);
        }
      }),
    );
  });

  it('asks the kernel for it by a filter on the two tuples', () => {
    const tuple = (type: string, part: string, value: string) => `1000${type}800c0001800800${part}00${value}`;
    expect(hex(encodeDump(mapping.dumps[0]))).toBe(
      '02000000' +
        tuple('01', '01', 'c0a87a02') +
        tuple('02', '02', 'c0a80aca') +
        ('14001980' + '08000100' + '01000000' + '08000200' + '02000000'),
    );
    expect(hex(encodeDump())).toBe('02000000');
  });

  it('deletes by the tuple, never without one', () => {
    const entry = flow(guest, outside, outside, address);
    const bytes = encodeDelete({ ...entry, wire: { original: u32(9), id: u32(1), zone: u16(2) } });
    expect([...attributes(bytes.subarray(4)).keys()]).toEqual([1, 12, 18]);
  });
});
