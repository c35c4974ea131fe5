import { execFileSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { KvmIbError } from '../../lib/core/errors.ts';
import { interfacesOnBridge, parseDomain, spliceMtu } from '../../lib/libvirt/domain.ts';

const bytes = (name: string): Buffer => readFileSync(new URL(`../fixtures/libvirt/${name}.xml`, import.meta.url));
const fixture = (name: string): string => bytes(name).toString('latin1');
const mtus = new Map([['virbr1', 2044]]);
const MTU = "<mtu size='2044'/>";
const domain = (inside: string): string => `<domain type='kvm'><devices>${inside}</devices></domain>`;

function refusal(act: () => unknown): KvmIbError {
  try {
    act();
  } catch (error) {
    expect(error).toBeInstanceOf(KvmIbError);
    return error as KvmIbError;
  }
  throw new Error('accepted');
}

describe('parseDomain', () => {
  test('finds the bridge interfaces of every devices section, in either quotes and any order of children', () => {
    const { name, interfaces } = parseDomain(fixture('domain-7.4'));
    expect(name).toBe('one-42');
    expect(interfaces.map(({ bridge, mac, target, mtu }) => [bridge, mac, target, mtu])).toEqual([
      ['virbr1', '02:00:c0:a8:7b:0a', 'one-42-0', null],
      ['br0', '02:00:3c:11:9f:40', 'one-42-1', null],
      ['virbr1', '02:00:c0:a8:7b:0b', 'one-42-2', '1500'],
      ['virbr1', '02:00:c0:a8:7b:0c', null, null],
    ]);
  });

  test('tells the place among all interfaces, and the address that a filter lets pass', () => {
    const filter = (...ips: readonly string[]) =>
      `<filterref filter='clean-traffic'>${ips.map((ip) => `<parameter name='IP' value='${ip}'/>`).join('')}<parameter name='MAC' value='x'/></filterref>`;
    const bridged = (inside: string) => `<interface type='bridge'><source bridge='b'/>${inside}</interface>`;
    const xml = `<domain><devices><interface type='ethernet'/>${bridged(filter('10.0.0.1'))}</devices><devices>${bridged(filter('10.0.0.1', '10.0.0.2'))}${bridged(filter())}${bridged('')}</devices></domain>`;
    expect(parseDomain(xml).interfaces.map(({ place, ip }) => [place, ip])).toEqual([
      [1, '10.0.0.1'],
      [2, null],
      [3, null],
      [4, null],
    ]);
  });

  test('tells the version of OpenNebula, which 5.8 and later write into the metadata', () => {
    expect(parseDomain(fixture('domain-7.4')).openNebulaVersion).toBe('7.4.0');
    expect(parseDomain(fixture('domain-6.0')).openNebulaVersion).toBe('6.0.0');
    for (const metadata of ['', '<metadata/>', '<metadata><system_datastore>/d</system_datastore></metadata>']) {
      expect(parseDomain(`<domain>${metadata}</domain>`).openNebulaVersion).toBeNull();
    }
  });

  test('tells the interfaces of one bridge', () => {
    const found = interfacesOnBridge(parseDomain(fixture('domain-7.4')), 'br0');
    expect(found.map((one) => one.mac)).toEqual(['02:00:3c:11:9f:40']);
  });

  test('takes the raw & that OpenNebula writes into the title', () => {
    expect(fixture('domain-6.0')).toContain('<title>R&D 42</title>');
    expect(parseDomain(fixture('domain-6.0')).interfaces).toHaveLength(1);
  });

  test('looks in devices only, and at bridge interfaces that name a bridge', () => {
    const source = "<source bridge='virbr1'/>";
    const elsewhere = `<domain><metadata><interface type='bridge'>${source}</interface></metadata></domain>`;
    expect(parseDomain(elsewhere).interfaces).toEqual([]);
    expect(parseDomain(domain(`<interface type='ethernet'>${source}</interface>`)).interfaces).toEqual([]);
    expect(parseDomain(domain("<interface type='bridge'><source/></interface>")).interfaces).toEqual([]);
    expect(parseDomain(domain("<interface type='bridge'/>")).interfaces).toEqual([]);
    expect(parseDomain(domain(`<hub><interface type='bridge'>${source}</interface></hub>`)).interfaces).toEqual([]);
  });

  test.each([
    ['nothing', '', 'it is empty'],
    ['VM data', '<VM/>', 'its root element is <VM>, not <domain>'],
    ['two domains', '<domain/><domain/>', 'second root element'],
    ['an entity bomb', '<!DOCTYPE d [<!ENTITY a "b">]><domain>&a;</domain>', 'document type'],
    ['a title that closes itself', '<domain><title>a<b</title></domain>', 'malformed'],
  ])('refuses %s', (_, text, why) => {
    const error = refusal(() => parseDomain(text));
    expect(error.code).toBe('bad-input');
    expect(error.why).toContain(why);
  });

  test('refuses what is cut off, at any place', () => {
    const whole = fixture('domain-6.0').trimEnd();
    for (let length = 0; length < whole.length; length += 13) {
      expect(refusal(() => parseDomain(whole.slice(0, length))).code).toBe('bad-input');
    }
  });
});

describe('spliceMtu', () => {
  test('inserts behind the source of our interfaces and changes no other byte', () => {
    const before = fixture('domain-7.4');
    const { xml, inserted, kept } = spliceMtu(before, mtus);
    expect(inserted.map((one) => one.mac)).toEqual(['02:00:c0:a8:7b:0a', '02:00:c0:a8:7b:0c']);
    expect(kept).toEqual([{ bridge: 'virbr1', mac: '02:00:c0:a8:7b:0b', mtu: '1500' }]);
    expect(xml).toContain(`<source bridge='virbr1'/>${MTU}\n\t\t\t<mac address='02:00:c0:a8:7b:0a'/>`);
    expect(xml).toContain(`<source bridge="virbr1"/>${MTU}</interface>`);
    expect(Buffer.from(xml.replaceAll(MTU, ''), 'latin1').equals(bytes('domain-7.4'))).toBe(true);
    expect(parseDomain(xml).interfaces.map((one) => one.mtu)).toEqual(['2044', null, '1500', '2044']);
  });

  test('returns the text itself where there is nothing of ours', () => {
    expect(spliceMtu(fixture('domain-7.4'), new Map([['virbr9', 2044]])).xml).toBe(fixture('domain-7.4'));
    expect(spliceMtu(fixture('domain-7.4'), new Map()).xml).toBe(fixture('domain-7.4'));
  });

  test('gives each bridge its own MTU', () => {
    const { inserted } = spliceMtu(
      fixture('domain-7.4'),
      new Map([
        ['virbr1', 65520],
        ['br0', 4092],
      ]),
    );
    expect(inserted.map((one) => one.mtu)).toEqual(['65520', '4092', '65520']);
  });

  test.each([
    ['a source with a closing tag', "<source bridge='virbr1'>\r\n</source >"],
    ['odd blanks', "<source\r\n\tbridge\n=\t'virbr1'\r\n/>"],
    ['a > in a value before it', "<x y='>'/><source bridge='virbr1'/>"],
    [
      'a comment that holds an interface',
      "<!-- <interface type='bridge'><source bridge='virbr1'/> --><source bridge='virbr1'/>",
    ],
    ['CDATA that holds a source', "<d><![CDATA[<source bridge='virbr1'/>]]></d><source bridge='virbr1'/>"],
    ['an instruction with a lone quote', `<?x it's <source bridge='virbr1'/> ?><source bridge='virbr1'/>`],
    ['a bridge with a character reference', "<source bridge='virbr&#49;'/>"],
    ['UTF-8, read as latin1', "<d>w\u00c3\u00a9b</d><source bridge='virbr1'/>"],
    ['bytes that are no UTF-8, and no-break spaces', "<d a='\u00ff\u00a0'>\u00a0\u0085</d><source bridge='virbr1'/>"],
  ])('is not misled by %s', (_, inside) => {
    const before = `\u00ef\u00bb\u00bf<?xml version='1.0'?>\r\n${domain(`<interface type='bridge'>${inside}</interface>`)}\r\n`;
    const { xml, inserted } = spliceMtu(before, mtus);
    expect(inserted).toHaveLength(1);
    expect(xml.split(MTU)).toHaveLength(2);
    expect(xml.replace(MTU, '')).toBe(before);
    expect(xml.indexOf(MTU)).toBe(xml.lastIndexOf('</interface>') - MTU.length);
    expect(parseDomain(xml).interfaces[0]?.mtu).toBe('2044');
    expect(spliceMtu(xml, mtus)).toMatchObject({ xml, inserted: [] });
  });

  test.each([0, 67, 65536, 1500.5, Number.NaN])('refuses the MTU %s', (mtu) => {
    expect(refusal(() => spliceMtu(fixture('domain-6.0'), new Map([['virbr1', mtu]]))).code).toBe('bad-input');
  });

  test('of any domain: without what was inserted the text is as it was, and a second splice inserts nothing', () => {
    const space = fc.string({ unit: fc.constantFrom(' ', '\n', '\r\n', '\t', '\r'), maxLength: 3 });
    const noise = fc.oneof(
      space,
      fc.constantFrom(
        '<!-- <interface> -- -->',
        '<?p "?>',
        '<![CDATA[</interface>]]>',
        'R&D &amp; \u00c3\u00a9\u00ff\u00a0',
        "<x a='>'/>",
        '<model type="virtio"/>',
        "<mac address='02:00:00:00:00:01'/>",
      ),
    );
    /** Text, and how many interfaces of ours are in it. */
    interface Part {
      readonly text: string;
      readonly ours: number;
    }
    const join = (parts: readonly Part[], name: string): Part => ({
      text: `<${name}>${parts.map((part) => part.text).join('')}</${name}>`,
      ours: parts.reduce((sum, part) => sum + part.ours, 0),
    });
    const neutral = noise.map((text): Part => ({ text, ours: 0 }));
    const nic = fc
      .record({
        type: fc.constantFrom('bridge', 'bridge', 'network'),
        bridge: fc.constantFrom('virbr1', 'br0', 'virbr10'),
        quote: fc.constantFrom('"', "'"),
        blank: space,
        end: fc.constantFrom('/>', '></source>', '>\r\n</source >'),
        before: fc.array(noise, { maxLength: 3 }),
        after: fc.array(noise, { maxLength: 3 }),
      })
      .map(({ type, bridge, quote, blank, end, before, after }): Part => {
        const source = `<source${blank} bridge${blank}=${blank}${quote}${bridge}${quote}${blank}${end}`;
        return {
          text: `<interface type=${quote}${type}${quote}>${before.join('')}${source}${after.join('')}</interface>`,
          ours: type === 'bridge' && bridge === 'virbr1' ? 1 : 0,
        };
      });
    const devices = fc.array(fc.oneof(nic, neutral), { maxLength: 4 }).map((parts) => join(parts, 'devices'));
    const document = fc.array(fc.oneof(devices, neutral), { maxLength: 4 }).map((parts) => join(parts, 'domain'));
    let spliced = 0;
    fc.assert(
      fc.property(document, space, ({ text, ours }, end) => {
        const before = `${text}${end}`;
        const { xml, inserted, kept } = spliceMtu(before, mtus);
        expect(xml.replaceAll(MTU, '')).toBe(before);
        expect(inserted).toHaveLength(ours);
        expect(kept).toEqual([]);
        const again = spliceMtu(xml, mtus);
        expect(again).toMatchObject({ xml, inserted: [] });
        expect(again.kept).toHaveLength(ours);
        spliced += ours;
      }),
      { numRuns: 500 },
    );
    expect(spliced).toBeGreaterThan(50);
  });

  const schema = '/usr/share/libvirt/schemas/domain.rng';
  test.runIf(existsSync(schema) && existsSync('/usr/bin/xmllint'))('writes what the schema of libvirt takes', () => {
    // The schema knows one section of devices and no raw "&"; libvirt itself reads several sections.
    const plain = fixture('domain-6.0')
      .replace('R&D', 'RnD')
      .replace(/\t<devices>\n\t\t<channel[\s\S]*?<\/devices>\n/, '');
    const folder = mkdtempSync(join(tmpdir(), 'kvm-ib-'));
    try {
      const file = join(folder, 'domain.xml');
      writeFileSync(file, spliceMtu(plain, mtus).xml, 'latin1');
      expect(readFileSync(file, 'latin1')).toContain(MTU);
      execFileSync('/usr/bin/xmllint', ['--noout', '--relaxng', schema, file], { stdio: 'pipe' });
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
});
