/** The configuration file: what is taken, and that each thing wrong in it is named by line, field, value and remedy. */
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, describe, expect, test } from 'vitest';
import type { Ipv4, LinkName } from '../../lib/core/address.ts';
import { ipv4FromNumber, ipv4ToNumber, rangeContains } from '../../lib/core/address.ts';
import { bridgeAddress, resolveMapping } from '../../lib/core/config.ts';
import { KvmIbError } from '../../lib/core/errors.ts';
import type { Config } from '../../lib/core/mapping.ts';
import { readConfig } from '../../lib/host/config-file.ts';

const folder = mkdtempSync(join(tmpdir(), 'kvm-ib-config-'));
const file = join(folder, 'kvm-ib.yaml');
afterAll(() => rmSync(folder, { recursive: true, force: true }));

function read(text: string): Config {
  writeFileSync(file, text);
  return readConfig(file);
}

/** The problems in a file, one a line: `LINE: FIELD: VALUE: WHY; REMEDY`. */
function problems(text: string): readonly string[] {
  try {
    read(text);
  } catch (error) {
    expect(error).toBeInstanceOf(KvmIbError);
    const { code, exit, message, why = '', fix } = error as KvmIbError;
    expect({ code, exit, message, fix }).toEqual({
      code: 'bad-config',
      exit: 2,
      message: `Cannot use the configuration ${file}`,
      fix: expect.stringContaining('kvm-ib config check'),
    });
    expect(why).not.toMatch(/[\u0000-\u0009\u000b-\u001f\u007f]/);
    return why.split('\n').map((line) => {
      expect(line.startsWith(`${file}:`)).toBe(true);
      return line.slice(file.length + 1);
    });
  }
  throw new Error('accepted');
}

const network = (fields: Readonly<Record<string, string>> = {}): string =>
  Object.entries({
    name: 'ib',
    device: 'ib0',
    bridge: 'virbr1',
    guests: '192.168.122.2-192.168.122.6',
    addresses: '192.168.10.202-192.168.10.206',
    ...fields,
  })
    .map(([key, value], index) => `${index === 0 ? '  - ' : '    '}${key}: ${value}\n`)
    .join('');
const one = (fields: Readonly<Record<string, string>> = {}): string => `networks:\n${network(fields)}`;
const OTHER = {
  name: 'other',
  device: 'ib1',
  bridge: 'virbr2',
  guests: '192.168.123.2-192.168.123.6',
  addresses: '192.168.11.202-192.168.11.206',
};
const two = (fields: Readonly<Record<string, string>>): string => one() + network({ ...OTHER, ...fields });

describe('a configuration', () => {
  test('of one network, with what is left out at its default', () => {
    expect(read(one())).toEqual({
      networks: [
        {
          name: 'ib',
          device: 'ib0',
          bridge: 'virbr1',
          guests: { first: '192.168.122.2', last: '192.168.122.6' },
          addresses: { first: '192.168.10.202', last: '192.168.10.206' },
          isolate: true,
        },
      ],
      static: [],
    });
  });

  test('of two networks, prefixes, static mappings and comments', () => {
    const text = `# both fabrics
networks:
${network({ guests: '192.168.122.8/29', addresses: '192.168.10.208/29', isolate: 'false' })}${network(OTHER)}
static:
  - { guest: 192.168.122.9, address: 192.168.10.208 }   # not the one of its place
  - guest: 192.168.123.2
    address: 192.168.11.202
`;
    const config = read(text);
    expect(config.networks.map((n) => [n.name, n.isolate, n.guests.last])).toEqual([
      ['ib', false, '192.168.122.15'],
      ['other', true, '192.168.123.6'],
    ]);
    expect(config.static).toHaveLength(2);
  });

  test('may switch the probe off for a network', () => {
    const probe = (text: string) => read(one({ probe: text })).networks[0]?.probe;
    expect([probe('false'), probe('true')]).toEqual([false, undefined]);
    expect(problems(one({ probe: '"no"' }))).toEqual([
      expect.stringMatching(/^7: networks\[0\]\.probe: no: it is not boolean; write true or false/),
    ]);
  });

  test.each(['static:\n', 'static: []\n', 'static: ~\n'])('may have no static mappings: %j', (text) => {
    expect(read(one() + text).static).toEqual([]);
  });
});

describe('one thing wrong is named by line, field, value and remedy', () => {
  test.each<[string, string, string]>([
    [
      'unequal sizes',
      one({ addresses: '192.168.10.202-192.168.10.207' }),
      '6: networks[0].addresses: 192.168.10.202-192.168.10.207: it has 6 addresses, guests has 5; give both ranges the same size',
    ],
    [
      'a range the wrong way round',
      one({ guests: '192.168.122.6-192.168.122.2' }),
      '5: networks[0].guests: 192.168.122.6-192.168.122.2: it is not a range',
    ],
    [
      'a prefix with host bits',
      one({ guests: '192.168.122.1/29' }),
      '5: networks[0].guests: 192.168.122.1/29: it is not a range',
    ],
    ['an IPv6 range', one({ guests: '"fd00::/64"' }), '5: networks[0].guests: fd00::/64: it is not a range'],
    [
      'a range of loopback',
      one({ guests: '127.0.0.2-127.0.0.6' }),
      '5: networks[0].guests: 127.0.0.2-127.0.0.6: it contains loopback',
    ],
    [
      'a range of multicast',
      one({ addresses: '224.0.0.2-224.0.0.6' }),
      '6: networks[0].addresses: 224.0.0.2-224.0.0.6: it contains multicast',
    ],
    [
      'a range that is a slip',
      one({ guests: '10.0.0.0/8', addresses: '11.0.0.0/8' }),
      '5: networks[0].guests: 10.0.0.0/8: it has 16777216 addresses',
    ],
    [
      'ranges of one network that overlap',
      one({ addresses: '192.168.122.6-192.168.122.10' }),
      '6: networks[0].addresses: 192.168.122.6-192.168.122.10: it overlaps guests',
    ],
    [
      'guests of two networks that overlap',
      two({ guests: '192.168.122.6-192.168.122.10' }),
      '10: networks[1].guests: 192.168.122.6-192.168.122.10: it overlaps guests 192.168.122.2-192.168.122.6 of network ib; give each network ranges of its own',
    ],
    [
      'addresses of two networks that overlap',
      two({ addresses: '192.168.10.200-192.168.10.204' }),
      '11: networks[1].addresses: 192.168.10.200-192.168.10.204: it overlaps addresses',
    ],
    [
      'a name twice',
      two({ name: 'ib' }),
      '7: networks[1].name: ib: an earlier network has this name; give each network its own name',
    ],
    ['a device twice', two({ device: 'ib0' }), '8: networks[1].device: ib0: network ib has it already'],
    ['a bridge twice', two({ bridge: 'virbr1' }), '9: networks[1].bridge: virbr1: network ib has it already'],
    ['a bridge that is the device', one({ bridge: 'ib0' }), '4: networks[0].bridge: ib0: it is the device as well'],
    [
      'a network name with spaces',
      one({ name: '"a b"' }),
      '2: networks[0].name: a b: it is not a network name; give the network a name of letters',
    ],
    [
      'a device name of 16 letters',
      one({ device: 'sixteen-letters-' }),
      '3: networks[0].device: sixteen-letters-: it is not a link name',
    ],
    ['a device that is a path', one({ device: '../ib0' }), '3: networks[0].device: ../ib0: it is not a link name'],
    [
      'an unknown key of a network',
      one({ guest: '192.168.122.2' }),
      '7: networks[0].guest: 192.168.122.2: the key is not known; known keys: ',
    ],
    ['an unknown key of the file', `${one()}statics: []\n`, '7: statics: '],
    [
      'a missing key',
      one().replace(/ {4}device: .*\n/, ''),
      'networks[0].device: (absent): it is missing; name the IPoIB link',
    ],
    [
      'a switch that is text',
      one({ isolate: '"yes"' }),
      '7: networks[0].isolate: yes: it is not boolean; write true or false without quotes',
    ],
    ['a list where text belongs', one({ guests: '[192.168.122.2]' }), '5: networks[0].guests: '],
    ['no networks', 'networks: []\n', '1: networks: '],
    ['nothing', '', '1: networks: (absent): it is missing; list at least one network'],
    ['a list', '- a\n', '1: '],
    [
      'a static guest outside',
      `${one()}static:\n  - { guest: 192.168.122.7, address: 192.168.10.206 }\n`,
      '8: static[0].guest: 192.168.122.7: no network has it among its guests; write one guest address',
    ],
    [
      'a static address outside',
      `${one()}static:\n  - { guest: 192.168.122.6, address: 192.168.10.207 }\n`,
      '8: static[0].address: 192.168.10.207: it lies outside 192.168.10.202-192.168.10.206 of network ib',
    ],
    [
      'a static guest twice',
      `${one()}static:\n  - { guest: 192.168.122.6, address: 192.168.10.206 }\n  - { guest: 192.168.122.6, address: 192.168.10.205 }\n`,
      '9: static[1].guest: 192.168.122.6: an earlier static mapping has it already; remove one of the two',
    ],
    [
      'a static address twice',
      `${one()}static:\n  - { guest: 192.168.122.6, address: 192.168.10.206 }\n  - { guest: 192.168.122.5, address: 192.168.10.206 }\n`,
      '9: static[1].address: 192.168.10.206: an earlier static mapping has it already',
    ],
    [
      'a static address that is none',
      `${one()}static:\n  - { guest: x, address: 192.168.10.206 }\n`,
      '8: static[0].guest: x: it is not an IPv4 address',
    ],
    ['a key twice', `${one()}networks: []\n`, '7: YAML: DUPLICATE_KEY: '],
    ['no YAML', 'networks:\n  - {\n', 'YAML: '],
    ['a tab', 'networks:\n\t- name: ib\n', '2: YAML: '],
    ['an anchor', `a: &a x\n${one({ name: '*a' })}`, 'YAML: '],
    [
      'control characters',
      one({ device: '"\\e[31m\\n"' }),
      '3: networks[0].device: \\u001b[31m\\u000a: it is not a link name',
    ],
  ])('%s', (_, text, expected) => {
    const found = problems(text);
    expect(found.join('\n')).toContain(expected);
    for (const line of found) expect(line).toMatch(/^[1-9][0-9]*: [^:]+: .*: .+; .+$/);
  });

  test('all of them are named in one run', () => {
    const found = problems(one({ name: '"?"', device: 'a/b', guests: 'x', addresses: 'y' }));
    expect(found.map((line) => line.split(': ')[1])).toEqual(
      expect.arrayContaining(['networks[0].name', 'networks[0].device', 'networks[0].guests', 'networks[0].addresses']),
    );
  });

  test('any text is a configuration or a list of problems', () => {
    const piece = fc.constantFrom(
      'networks:',
      '\n',
      '  - ',
      'name: ',
      'ib0',
      '1.2.3.4',
      '{',
      ']',
      '&a',
      '*a',
      '!!x ',
      '? ',
      '|',
      '\t',
      ': ',
    );
    fc.assert(
      fc.property(
        fc.oneof(
          fc.string(),
          fc.array(piece).map((parts) => parts.join('')),
        ),
        (text) => {
          expect(problems(text).length).toBeGreaterThan(0);
        },
      ),
      { numRuns: 300 },
    );
  });
});

describe('the file', () => {
  test('that is not there, not plain, or too large', () => {
    expect(() => readConfig('/nowhere.yaml')).toThrow(
      expect.objectContaining({ code: 'bad-config', why: 'the file is not there' }),
    );
    expect(() => readConfig('/dev/zero')).toThrow(
      expect.objectContaining({ code: 'bad-config', why: 'it is not a plain file' }),
    );
    expect(() => readConfig(folder)).toThrow(expect.objectContaining({ code: 'bad-config' }));
    writeFileSync(file, `${one()}${'#'.repeat(1024 * 1024)}`);
    expect(() => readConfig(file)).toThrow(expect.objectContaining({ why: expect.stringContaining('larger') }));
  });

  test('that may not be read', () => {
    writeFileSync(file, one());
    chmodSync(file, 0);
    const isRoot = process.geteuid?.() === 0;
    if (isRoot) process.seteuid?.(65_534);
    try {
      expect(() => readConfig(file)).toThrow(expect.objectContaining({ code: 'not-permitted' }));
    } finally {
      if (isRoot) process.seteuid?.(0);
      chmodSync(file, 0o644);
    }
  });
});

describe('resolveMapping', () => {
  const config = read(two({ guests: '192.168.123.2-192.168.123.6' }));
  const wish = { mac: null, vm: 42, nic: 0 };

  test('gives the n-th guest the n-th address, and whatever is asked lies inside the ranges', () => {
    const near = fc.integer({ min: -3, max: 9 });
    const base = fc.constantFrom('192.168.122.2', '192.168.123.2', '192.168.10.202', '192.168.11.202');
    const address = fc.tuple(base, near).map(([from, step]) => ipv4FromNumber(ipv4ToNumber(from as Ipv4) + step));
    const bridge = fc.option(fc.constantFrom('virbr1', 'virbr2', 'ib0') as fc.Arbitrary<LinkName>, { nil: undefined });
    fc.assert(
      fc.property(address, fc.option(address, { nil: undefined }), bridge, (guest, asked, on) => {
        let mapping: ReturnType<typeof resolveMapping>;
        try {
          mapping = resolveMapping(config, { ...wish, guest, address: asked, bridge: on });
        } catch (error) {
          expect(error).toMatchObject({ code: 'out-of-range', fix: expect.any(String) });
          return;
        }
        const own = config.networks.find((n) => n.name === mapping.network);
        expect(own && rangeContains(own.guests, mapping.guest) && rangeContains(own.addresses, mapping.address)).toBe(
          true,
        );
        expect([mapping.device, mapping.bridge]).toEqual([own?.device, own?.bridge]);
        if (on !== undefined) expect(mapping.bridge).toBe(on);
        if (asked === undefined) {
          expect(mapping.address.split('.')[3]).toBe(String(Number(mapping.guest.split('.')[3]) + 200));
        }
      }),
      { numRuns: 1000 },
    );
  });

  test('a bridge address is the first that no guest has', () => {
    const [first] = config.networks;
    expect(first && bridgeAddress(first)).toBe('192.168.122.1');
    const all = read(one({ guests: '192.168.122.0/24', addresses: '192.168.10.0/24' })).networks[0];
    expect(all && bridgeAddress(all)).toBeUndefined();
  });
});
