import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { KvmIbError } from '../../lib/core/errors.ts';
import {
  LINE_LIMIT,
  MODES,
  PROTOCOL_VERSION,
  parseAnswer,
  parseMessage,
  parseVerdict,
  versionOf,
} from '../../lib/driver/protocol.ts';

const hex = fc.integer({ min: 0, max: 255 }).map((byte) => byte.toString(16).padStart(2, '0'));
const ipv4 = fc.ipV4();
const numbers = fc.array(fc.integer({ min: 0, max: 99 }), { maxLength: 100 });
const message = fc.record({
  version: fc.constant(PROTOCOL_VERSION),
  verb: fc.constant('sync'),
  vm: fc.integer({ min: 0, max: 99_999_999 }),
  action: fc.constantFrom('deploy', 'shutdown', 'cancel', 'attach_nic'),
  mode: fc.constantFrom(...MODES),
  holder: fc.record({ pid: fc.integer({ min: 2, max: 4_194_304 }), start: fc.nat() }),
  nics: fc.array(
    fc.record({
      nic: fc.integer({ min: 0, max: 99 }),
      guest: ipv4,
      address: fc.option(ipv4),
      mac: fc.array(hex, { minLength: 6, maxLength: 6 }).map((bytes) => bytes.join(':')),
      bridge: fc.constantFrom('virbr1', 'ib0.8001', 'fifteen-letters'),
    }),
    { maxLength: 100 },
  ),
  unmapped: numbers,
  keep: numbers,
  attaching: numbers,
  detachedAliases: numbers,
});

describe('a request', () => {
  test('is read back as it was written, and fits a line', () => {
    fc.assert(
      fc.property(message, (one) => {
        const line = JSON.stringify(one);
        expect(line.length).toBeLessThan(LINE_LIMIT);
        expect(parseMessage(line)).toEqual(one);
      }),
    );
  });

  test('with any value replaced by garbage is refused or is the same request', () => {
    fc.assert(
      fc.property(message, fc.jsonValue(), fc.nat(), (one, garbage, which) => {
        const keys = Object.keys(one);
        const key = keys[which % keys.length] ?? 'vm';
        const line = JSON.stringify({ ...one, [key]: garbage });
        try {
          expect(parseMessage(line)).toEqual(JSON.parse(line));
        } catch (error) {
          expect(error).toBeInstanceOf(KvmIbError);
          expect(error).toMatchObject({ code: 'bad-input', fix: expect.any(String) });
        }
      }),
      { numRuns: 500 },
    );
  });

  test('that is any text is refused as bad input, never otherwise', () => {
    fc.assert(
      fc.property(fc.oneof(fc.string(), fc.json()), (text) => {
        for (const parse of [parseMessage, parseVerdict]) {
          expect(() => parse(text)).toThrow(expect.objectContaining({ code: 'bad-input' }));
        }
      }),
    );
  });

  test.each([
    [PROTOCOL_VERSION + 1, 'upgrade kvm-ib on this host'],
    [0, 'upgrade the driver on the front-end'],
  ])('of version %i says what to upgrade', (version, fix) => {
    const line = JSON.stringify({ version, verb: 'something new' });
    expect(() => parseMessage(line)).toThrow(
      expect.objectContaining({ code: 'bad-input', fix: expect.stringContaining(fix) }),
    );
  });
});

test('a request of version 1, from a driver that is upgraded after the host, is served', () => {
  const nics = [{ nic: 0, guest: '192.168.122.2', address: null, mac: '02:00:c0:a8:7a:02', bridge: 'virbr1' }];
  const old = { version: 1, verb: 'sync', vm: 42, action: 'deploy', holder: { pid: 2, start: 1 } };
  const none = { unmapped: [], keep: [], attaching: [], detachedAliases: [] };
  const read = (request: object) => parseMessage(JSON.stringify(request));
  expect(read({ ...old, nics, pending: true })).toEqual({ ...old, nics, mode: 'start', ...none });
  expect(read({ ...old, nics: [], pending: false })).toEqual({ ...old, nics: [], mode: 'release', ...none });
  expect(versionOf(JSON.stringify(old))).toBe(1);
  for (const line of ['', 'null', '{}', '{"version":"1"}', '[1]', '{"version":7}']) {
    expect(versionOf(line)).toBe(PROTOCOL_VERSION);
  }
});

test('settle names a VM and nothing else', () => {
  const line = (more: object) => JSON.stringify({ version: PROTOCOL_VERSION, verb: 'settle', ...more });
  expect(parseMessage(line({ vm: 42 }))).toEqual({ version: PROTOCOL_VERSION, verb: 'settle', vm: 42 });
  for (const more of [{}, { vm: -1 }, { vm: '42' }, { vm: 42, nics: [] }, { vm: 1e9 }]) {
    expect(() => parseMessage(line(more))).toThrow(expect.objectContaining({ code: 'bad-input' }));
  }
});

test('a verdict is one of two', () => {
  expect(parseVerdict('{"verb":"commit"}')).toBe('commit');
  expect(parseVerdict(' {"verb": "undo"} ')).toBe('undo');
  for (const line of ['{"verb":"sync"}', '{"verb":"commit","x":1}', '"commit"', 'commit', '']) {
    expect(() => parseVerdict(line)).toThrow(KvmIbError);
  }
});

describe('an answer', () => {
  test('of either kind is read', () => {
    const ok = { version: 1, ok: true, changes: ['+ alias'], warnings: [] };
    expect(parseAnswer(JSON.stringify(ok))).toEqual(ok);
    const failed = {
      version: 1,
      ok: false,
      error: { code: 'conflict', exit: 4, message: 'Cannot', why: 'w', fix: 'f' },
    };
    expect(parseAnswer(JSON.stringify(failed))).toEqual(failed);
  });

  test('that is anything else is none', () => {
    fc.assert(
      fc.property(fc.oneof(fc.string(), fc.json()), (text) => {
        expect(parseAnswer(text)).toBeUndefined();
      }),
    );
    for (const text of ['{"ok":true}', '{"ok":false}', '{"version":1,"ok":false,"error":{"code":"x"}}']) {
      expect(parseAnswer(text)).toBeUndefined();
    }
  });
});
