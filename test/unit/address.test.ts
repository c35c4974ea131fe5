import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import type { Ipv4, Range } from '../../lib/core/address.ts';
import {
  ipv4Bytes,
  ipv4FromBytes,
  ipv4FromNumber,
  ipv4ToNumber,
  macBytes,
  parseIpv4,
  parseLinkName,
  parseMac,
  printRange,
  rangeAt,
  rangeContains,
  rangeOffset,
  rangeSize,
  rangesOverlap,
  tryParseIpv4,
  tryParseLinkName,
  tryParseMac,
  tryParseRange,
} from '../../lib/core/address.ts';
import { KvmIbError } from '../../lib/core/errors.ts';

const number = fc.integer({ min: 0, max: 2 ** 32 - 1 });
const address = number.map(ipv4FromNumber);
const range: fc.Arbitrary<Range> = fc
  .tuple(number, number)
  .map(([a, b]) => ({ first: ipv4FromNumber(Math.min(a, b)), last: ipv4FromNumber(Math.max(a, b)) }));

describe('an IPv4 address', () => {
  test('of every 32-bit number is read back as that number, and is its bytes', () => {
    fc.assert(
      fc.property(number, (value) => {
        const text = ipv4FromNumber(value);
        expect(tryParseIpv4(text)).toBe(text);
        expect(ipv4ToNumber(text)).toBe(value);
        expect(ipv4FromBytes(ipv4Bytes(text))).toBe(text);
      }),
    );
  });

  test('is no other text: what is taken is what four plain decimal numbers print', () => {
    const near = fc.array(fc.constantFrom('0', '1', '25', '255', '256', '.', '..', '-', ' ', 'x', '0x1', '\n'), {
      maxLength: 9,
    });
    fc.assert(
      fc.property(
        fc.oneof(
          fc.string(),
          near.map((parts) => parts.join('')),
        ),
        (text) => {
          const taken = tryParseIpv4(text);
          if (taken !== undefined) expect(ipv4FromNumber(ipv4ToNumber(taken))).toBe(text);
        },
      ),
      { numRuns: 2000 },
    );
  });

  test.each([
    '',
    '1.2',
    '010.0.0.1',
    '1.2.3.4 ',
    ' 1.2.3.4',
    '1.2.3.4\n',
    '1.2.3.4.5',
    '256.1.1.1',
    '1.2.3.04',
    '::1',
    '::ffff:1.2.3.4',
    '1.2.3.4/32',
    '0x7f.0.0.1',
    '2130706433',
    'localhost',
    '１.2.3.4',
  ])('%j is none, and the refusal says so in printable text', (text) => {
    expect(tryParseIpv4(text)).toBeUndefined();
    expect(() => parseIpv4(`${text}\u001b[31m`, '--guest')).toThrow(KvmIbError);
    expect(() => parseIpv4(`${text}\u001b[31m`, '--guest')).toThrow(/^Cannot read --guest "[^\u0000-\u001f]*"$/);
  });
});

describe('a range', () => {
  test('in print is read back', () => {
    fc.assert(
      fc.property(range, (one) => {
        expect(tryParseRange(printRange(one))).toEqual(one);
      }),
    );
  });

  test('has each of its places once, and no other', () => {
    fc.assert(
      fc.property(range, number, address, (one, place, other) => {
        const offset = place % rangeSize(one);
        const at = rangeAt(one, offset);
        expect(rangeOffset(one, at)).toBe(offset);
        expect(rangeContains(one, at)).toBe(true);
        const inside = ipv4ToNumber(other) >= ipv4ToNumber(one.first) && ipv4ToNumber(other) <= ipv4ToNumber(one.last);
        expect(rangeContains(one, other)).toBe(inside);
      }),
    );
  });

  test('overlaps another exactly when they share an end of one of them', () => {
    fc.assert(
      fc.property(range, range, (a, b) => {
        const shared = [b.first, b.last].some((end) => rangeContains(a, end)) || rangeContains(b, a.first);
        expect(rangesOverlap(a, b)).toBe(shared);
        expect(rangesOverlap(b, a)).toBe(shared);
      }),
    );
  });

  test('as a prefix has all its addresses, and its host bits must be zero', () => {
    fc.assert(
      fc.property(number, fc.integer({ min: 0, max: 32 }), (value, length) => {
        const size = 2 ** (32 - length);
        const base = Math.floor(value / size) * size;
        const one = tryParseRange(`${ipv4FromNumber(base)}/${length}`);
        expect(one).toEqual({ first: ipv4FromNumber(base), last: ipv4FromNumber(base + size - 1) });
        if (value !== base) expect(tryParseRange(`${ipv4FromNumber(value)}/${length}`)).toBeUndefined();
      }),
    );
  });

  test.each([
    ['192.168.122.2 - 192.168.122.6', '192.168.122.2-192.168.122.6'],
    ['192.168.122.2-192.168.122.2', '192.168.122.2'],
    ['192.168.122.2', '192.168.122.2'],
    ['192.168.122.0/31', '192.168.122.0-192.168.122.1'],
  ])('%s is %s', (text, same) => {
    expect(printRange(tryParseRange(text) as Range)).toBe(same);
  });

  test.each([
    '',
    '-',
    '192.168.122.6-192.168.122.2',
    '192.168.122.2-6',
    '192.168.122.2-',
    '1.2.3.4-1.2.3.5-1.2.3.6',
    '192.168.122.1/24',
    '1.2.3.0/33',
    '1.2.3.0/',
    '1.2.3.0/+8',
    '1.2.3.0/024',
  ])('%j is none', (text) => {
    expect(tryParseRange(text)).toBeUndefined();
  });
});

describe('a hardware address', () => {
  test('is six bytes in any case, kept in lower case', () => {
    const bytes = fc.uint8Array({ minLength: 6, maxLength: 6 });
    fc.assert(
      fc.property(bytes, fc.boolean(), (value, upper) => {
        const text = Array.from(value, (byte) => byte.toString(16).padStart(2, '0')).join(':');
        const mac = parseMac(upper ? text.toUpperCase() : text);
        expect(mac).toBe(text);
        expect(macBytes(mac)).toEqual(value);
      }),
    );
  });

  test.each([
    '',
    '02:00:c0:a8:7a',
    '02:00:c0:a8:7a:02:03',
    '02-00-c0-a8-7a-02',
    '2:0:c0:a8:7a:2',
    '02:00:c0:a8:7a:0g',
    '02:00:c0:a8:7a:02\n',
    '0200c0a87a02',
  ])('%j is none', (text) => {
    expect(tryParseMac(text)).toBeUndefined();
    expect(() => parseMac(text)).toThrow(KvmIbError);
  });
});

describe('a link name', () => {
  test.each(['ib0', 'ib0.8001', 'ibp129s0f0.8001', 'virbr1', 'br-ib_0'])('%s is one', (text) => {
    expect(parseLinkName(text)).toBe(text);
  });

  test.each(['', '.', '..', 'a/b', '../ib0', 'sixteen-letters-', 'ib 0', 'ib0:1', 'ib0\n', 'ib%d', 'ïb0', "ib0'"])(
    '%j is none',
    (text) => {
      expect(tryParseLinkName(text)).toBeUndefined();
      expect(() => parseLinkName(text, 'device')).toThrow(/^Cannot read device "/);
    },
  );

  test('is never more than a plain file name of 15 bytes', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'binary', maxLength: 20 }), (text) => {
        const name = tryParseLinkName(text);
        if (name !== undefined) expect(name).toMatch(/^(?!\.{1,2}$)[\w.-]{1,15}$/);
      }),
    );
  });
});

test('a number of an address is never taken for another', () => {
  expect(ipv4ToNumber('255.255.255.255' as Ipv4)).toBe(2 ** 32 - 1);
  expect(ipv4FromNumber(0)).toBe('0.0.0.0');
});
