import { readFileSync } from 'node:fs';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ipv4FromNumber, ipv4ToNumber, parseIpv4, parseLinkName, parseMac, rangeAt } from '../../lib/core/address.ts';
import { KvmIbError } from '../../lib/core/errors.ts';
import type { Config } from '../../lib/core/mapping.ts';
import { mayTouchBridges, parseActionData, parseVm } from '../../lib/opennebula/action-data.ts';
import { addressFromMac, type WishOptions, wishedMappings } from '../../lib/opennebula/mappings.ts';

const fixture = (name: string): string =>
  readFileSync(new URL(`../fixtures/opennebula/${name}.xml`, import.meta.url), 'utf8');

const range = (first: string, last: string) => ({ first: parseIpv4(first), last: parseIpv4(last) });

const config: Config = {
  networks: [
    {
      name: 'ib',
      device: parseLinkName('ib0'),
      bridge: parseLinkName('virbr1'),
      guests: range('192.168.123.2', '192.168.123.101'),
      addresses: range('10.148.0.2', '10.148.0.101'),
      isolate: true,
    },
    {
      name: 'ib-8001',
      device: parseLinkName('ibp129s0f0.8001'),
      bridge: parseLinkName('virbr2'),
      guests: range('192.168.124.2', '192.168.124.11'),
      addresses: range('10.149.0.2', '10.149.0.11'),
      isolate: true,
    },
  ],
  static: [],
};

type Fields = Readonly<Record<string, string>>;
const element = (name: string, fields: Fields): string =>
  `<${name}>${Object.entries(fields)
    .map(([key, value]) => `<${key}><![CDATA[${value}]]></${key}>`)
    .join('')}</${name}>`;
const nicXml = (fields: Fields): string =>
  element('NIC', {
    NIC_ID: '0',
    BRIDGE: 'virbr1',
    IP: '192.168.123.10',
    MAC: '02:00:c0:a8:7b:0a',
    NETWORK: 'ib-nat',
    ...fields,
  });
const aliasXml = (fields: Fields): string =>
  element('NIC_ALIAS', { NIC_ID: '2', PARENT_ID: '0', IP: '10.148.0.50', EXTERNAL: 'YES', ...fields });
const vmXml = (inside: string, id = '42'): string => `<VM><ID>${id}</ID><TEMPLATE>${inside}</TEMPLATE></VM>`;
const wish = (inside: string, options?: WishOptions) => wishedMappings(config, parseVm(vmXml(inside)), options);

function refusal(act: () => unknown): KvmIbError {
  try {
    act();
  } catch (error) {
    expect(error).toBeInstanceOf(KvmIbError);
    return error as KvmIbError;
  }
  throw new Error('accepted');
}

describe('parseActionData reads the shape of', () => {
  test('6.0: shutdown of a VM with one NIC', () => {
    const { host, migrationHost, vm } = parseActionData(fixture('shutdown-6.0'));
    expect({ host, migrationHost }).toEqual({ host: 'kvmib01', migrationHost: null });
    expect(vm).toEqual({
      id: 42,
      deployId: '6f0a1c1e-6c0e-4d0c-9a0e-5a3b3f1d2c42',
      name: `web "42" 'one'`,
      hostname: 'kvmib01',
      datastore: 0,
      lcmState: 12,
      nics: [
        {
          nic: 0,
          bridge: 'virbr1',
          ip: '192.168.123.10',
          mac: '02:00:c0:a8:7b:0a',
          target: 'one-42-0',
          ibIp: null,
          attach: false,
          networkName: 'ib-nat',
        },
      ],
      aliases: [],
      skipped: [],
      contextNames: new Set(),
    });
  });

  test('6.2: an external alias', () => {
    const { vm } = parseActionData(fixture('cancel-6.2'));
    expect(vm.name).toBe('web\n42');
    expect(vm.aliases).toEqual([
      { parentId: 0, nic: 2, aliasId: 0, ip: '10.148.0.50', external: true, attach: false, vnMad: 'dummy' },
    ]);
  });

  test('6.10: the NIC that is being attached, and one without an address', () => {
    const { vm } = parseActionData(fixture('attach_nic-6.10'));
    expect(vm.name).toMatch(/^\$\(reboot\); `id` && echo \$\{HOME\} \| sh #$/);
    expect(vm.nics.map(({ nic, attach, ip }) => ({ nic, attach, ip }))).toEqual([
      { nic: 0, attach: false, ip: '192.168.123.10' },
      { nic: 1, attach: true, ip: '192.168.123.11' },
      { nic: 2, attach: false, ip: null },
    ]);
  });

  test('7.0: IB_IP on the NIC, escape sequences in the name', () => {
    const { vm } = parseActionData(fixture('save-7.0'));
    expect(vm.name).toContain('\u001b[2J');
    expect(vm.nics[0]?.ibIp).toBe('10.148.0.77');
  });

  test('7.2: a migration, whose newest history record is the destination', () => {
    const { host, migrationHost, vm } = parseActionData(fixture('migrate-7.2'));
    expect({ host, migrationHost, newest: vm.hostname }).toEqual({
      host: 'kvmib01',
      migrationHost: 'kvmib02',
      newest: 'kvmib02',
    });
    expect(vm.name).toBe('a]]>b <c> & d');
  });

  test('7.4: a passed-through PCI NIC is kept apart, with the reason', () => {
    const { vm } = parseActionData(fixture('detach_nic-7.4'));
    expect(vm.nics.map((nic) => nic.attach)).toEqual([false, true]);
    expect(vm.skipped).toEqual([{ nic: 3, bridge: 'br0', reason: expect.stringContaining('PCI') }]);
  });

  test.each(['vm-6.0', 'vm-7.4'])('%s, the bare VM beside the deployment file', (name) => {
    const data = parseActionData(fixture(name));
    expect(data.host).toBeNull();
    expect(data.vm).toMatchObject({ id: 42, deployId: null, lcmState: 2, name: 'web-42' });
  });

  test('latin1 as well: nothing that counts is outside ASCII', () => {
    const bytes = readFileSync(new URL('../fixtures/opennebula/detach_nic-7.4.xml', import.meta.url));
    expect(parseVm(bytes.toString('latin1')).nics).toEqual(parseVm(bytes.toString('utf8')).nics);
  });
});

describe('parseActionData refuses', () => {
  test.each([
    ['nothing at all', '', 'it is empty'],
    ['a domain XML', '<domain/>', 'its root element is <domain>'],
    ['action data without a VM', '<VMM_DRIVER_ACTION_DATA><HOST>h</HOST></VMM_DRIVER_ACTION_DATA>', 'has no <VM>'],
    ['two VMs', '<VMM_DRIVER_ACTION_DATA><VM/><VM/></VMM_DRIVER_ACTION_DATA>', 'has 2 <VM>'],
    ['a VM without ID', '<VM><TEMPLATE/></VM>', 'the VM has no ID'],
    ['two IDs', '<VM><ID>1</ID><ID>2</ID><TEMPLATE/></VM>', 'has 2 <ID>'],
    ['a negative ID', vmXml('', '-1'), 'ID in <VM> is "-1"'],
    ['an ID in octal', vmXml('', '042'), 'ID in <VM> is "042"'],
    ['an ID with shell syntax', vmXml('', '1; reboot'), 'ID in <VM> is "1; reboot"'],
    ['an ID too large for a label', vmXml('', '100000000'), 'not below 100000000'],
    ['an ID too large for a number', vmXml('', '9'.repeat(400)), 'not a number'],
    ['a VM without TEMPLATE, which is not a VM without NICs', '<VM><ID>1</ID></VM>', 'has no <TEMPLATE>'],
    ['a NIC without NIC_ID', vmXml('<NIC><BRIDGE>virbr1</BRIDGE></NIC>'), 'a <NIC> has no NIC_ID'],
    ['two NICs with one NIC_ID', vmXml(nicXml({}) + nicXml({})), 'two NICs have the NIC_ID 0'],
    ['an alias without PARENT_ID', vmXml('<NIC_ALIAS><NIC_ID>1</NIC_ID></NIC_ALIAS>'), 'has no PARENT_ID'],
    ['two IPs in a NIC', vmXml('<NIC><NIC_ID>0</NIC_ID><IP>1.2.3.4</IP><IP>1.2.3.5</IP></NIC>'), 'has 2 <IP>'],
    ['elements in a value', vmXml('<NIC><NIC_ID>0</NIC_ID><IP><b>1.2.3.4</b></IP></NIC>'), 'holds elements'],
  ])('%s', (_, text, why) => {
    const error = refusal(() => parseActionData(text));
    expect(error.code).toBe('bad-input');
    expect(error.why).toContain(why);
  });

  test('what is cut off, at any place', () => {
    const whole = fixture('cancel-6.2').trimEnd();
    for (let length = 0; length < whole.length; length += 37) {
      expect(refusal(() => parseActionData(whole.slice(0, length))).code).toBe('bad-input');
    }
  });

  test('tens of thousands of NICs in good time', () => {
    const nics = Array.from({ length: 24_000 }, (_, n) => `<NIC><NIC_ID>${n}</NIC_ID><IP>x</IP></NIC>`).join('');
    const start = performance.now();
    expect(parseVm(vmXml(nics)).nics).toHaveLength(24_000);
    expect(performance.now() - start).toBeLessThan(2000);
  });
});

describe('mayTouchBridges', () => {
  test('says no only where no bridge of ours can be named', () => {
    expect(mayTouchBridges(fixture('shutdown-6.0'), ['virbr2'])).toBe(false);
    expect(mayTouchBridges(fixture('shutdown-6.0'), ['virbr2', 'virbr1'])).toBe(true);
    expect(mayTouchBridges(fixture('shutdown-6.0'), [])).toBe(false);
  });

  test.each([
    ['<BRIDGE>virbr&#49;</BRIDGE>'],
    ['<BRIDGE>virbr&#x31;</BRIDGE>'],
    ['<BRIDGE><![CDATA[vir]]><![CDATA[br1]]></BRIDGE>'],
    ['<BRIDGE>vir<![CDATA[br1]]></BRIDGE>'],
    ['<BRIDGE><![CDATA[vir]]>br1</BRIDGE>'],
    ['<BRIDGE>vir<!-- -->br1</BRIDGE>'],
    ['<BRIDGE>vir<?x?>br1</BRIDGE>'],
  ])('does not miss %s', (bridge) => {
    const text = vmXml(`<NIC><NIC_ID>0</NIC_ID>${bridge}</NIC>`);
    expect(parseVm(text).nics[0]?.bridge).toBe('virbr1');
    expect(mayTouchBridges(text, ['virbr1'])).toBe(true);
  });
});

describe('wishedMappings', () => {
  test('gives the n-th guest address the n-th IB address, with MAC and label', () => {
    const { mappings, sources, networksTouched, notes } = wishedMappings(config, parseVm(fixture('vm-7.4')));
    expect(mappings).toEqual([
      {
        network: 'ib',
        device: 'ib0',
        bridge: 'virbr1',
        guest: '192.168.123.10',
        address: '10.148.0.10',
        mac: '02:00:c0:a8:7b:0a',
        vm: 42,
        nic: 0,
        label: 'ib0:42-0',
        named: false,
      },
    ]);
    expect(sources.map((one) => one.source)).toEqual(['range']);
    expect(networksTouched).toEqual([config.networks[0]]);
    expect(notes).toEqual([]);
  });

  test('takes the range for any address of it', () => {
    const [network] = config.networks;
    if (network === undefined) throw new Error('no network');
    fc.assert(
      fc.property(fc.nat(99), (offset) => {
        const guest = rangeAt(network.guests, offset);
        const [mapping] = wish(nicXml({ IP: guest })).mappings;
        expect(ipv4ToNumber(mapping?.address ?? guest) - ipv4ToNumber(network.addresses.first)).toBe(offset);
      }),
    );
  });

  test('maps the NICs of several networks, and a label that would be too long takes the short form', () => {
    const second = nicXml({ NIC_ID: '1', BRIDGE: 'virbr2', IP: '192.168.124.11', MAC: '02:00:c0:a8:7c:0b' });
    const { mappings, networksTouched } = wish(nicXml({}) + second);
    expect(mappings.map(({ address, label }) => `${address} ${label}`)).toEqual([
      '10.148.0.10 ib0:42-0',
      '10.149.0.11 kib:42-1',
    ]);
    expect(networksTouched.map((network) => network.name)).toEqual(['ib', 'ib-8001']);
  });

  test('leaves NICs on other bridges alone, whatever they hold', () => {
    const foreign = nicXml({ BRIDGE: 'virbr10', IP: 'fe80::1', MAC: 'x', NIC_ID: '1234' });
    const without = element('NIC', { NIC_ID: '7' });
    expect(wish(foreign + without)).toEqual({
      mappings: [],
      sources: [],
      networksTouched: [],
      unmapped: [],
      notes: [],
    });
  });

  test('takes the address that OpenNebula leased as an external alias first', () => {
    const { mappings, sources } = wishedMappings(config, parseVm(fixture('cancel-6.2')));
    expect(mappings[0]?.address).toBe('10.148.0.50');
    expect(sources[0]?.source).toBe('external-alias');
    expect(wish(nicXml({ IB_IP: '10.148.0.77' }) + aliasXml({})).mappings[0]?.address).toBe('10.148.0.50');
    expect(wish(nicXml({ IB_IP: 'none' }) + aliasXml({})).mappings[0]?.address).toBe('10.148.0.50');
  });

  test.each([
    ['outside the addresses', { IP: '10.9.9.9' }, 'it is outside the addresses 10.148.0.2-10.148.0.101 of "ib"'],
    ['not an address', { IP: 'x\u001b[0m' }, 'x\\u001b[0m'],
    ['not external', { EXTERNAL: 'NO' }, 'only an alias with EXTERNAL=YES gives an IB address'],
  ])('leaves out an alias that is %s, and says so', (_, fields, note) => {
    const { mappings, notes } = wish(nicXml({}) + aliasXml(fields));
    expect(mappings[0]?.address).toBe('10.148.0.10');
    expect(notes).toEqual([expect.stringContaining(note)]);
  });

  test('leaves out the alias of another NIC, and a second one of the same', () => {
    expect(wish(nicXml({}) + aliasXml({ PARENT_ID: '5' })).mappings[0]?.address).toBe('10.148.0.10');
    const two = wish(nicXml({}) + aliasXml({}) + aliasXml({ NIC_ID: '3', IP: '10.148.0.51' }));
    expect(two.mappings[0]?.address).toBe('10.148.0.50');
    expect(two.notes).toEqual([expect.stringContaining('the first alias gives it')]);
  });

  test('takes IB_IP next, and none opts the NIC out even where its own address is outside', () => {
    const own = wishedMappings(config, parseVm(fixture('save-7.0')));
    expect(own.sources).toMatchObject([{ source: 'nic-attribute', mapping: { address: '10.148.0.77' } }]);
    const out = wish(nicXml({ IB_IP: 'None', IP: '172.16.0.1' }));
    expect(out.mappings).toEqual([]);
    expect(out.networksTouched).toHaveLength(1);
    expect(out.notes).toEqual(['NIC 0 of VM 42 gets no IB address: its IB_IP is none']);
  });

  test('leaves out what it is told to', () => {
    const vm = parseVm(fixture('attach_nic-6.10'));
    expect(wishedMappings(config, vm).mappings.map((one) => one.nic)).toEqual([0, 1]);
    expect(wishedMappings(config, vm, { without: new Set([1]) }).mappings.map((one) => one.nic)).toEqual([0]);
    const last = wish(nicXml({ ATTACH: 'YES' }), { without: new Set([0]) });
    expect(last).toMatchObject({ mappings: [], networksTouched: [{ name: 'ib' }] });
    const detached = wish(nicXml({}) + aliasXml({ ATTACH: 'YES' }), { without: new Set([2]) });
    expect(detached.mappings[0]?.address).toBe('10.148.0.10');
  });

  test('reads no address from the MAC, unless told to', () => {
    const bare = element('NIC', { NIC_ID: '0', BRIDGE: 'virbr1', MAC: '02:00:c0:a8:7b:0a' });
    expect(refusal(() => wish(bare)).why).toBe('it has no IP');
    expect(wish(bare, { addressFromMac: true }).mappings[0]?.guest).toBe('192.168.123.10');
    expect(addressFromMac(parseMac('02:00:c0:a8:7a:0a'))).toBe('192.168.122.10');
    fc.assert(
      fc.property(fc.integer({ min: 0, max: 2 ** 32 - 1 }), (value) => {
        const bytes = [24, 16, 8, 0].map((shift) => ((value >>> shift) & 255).toString(16).padStart(2, '0'));
        expect(addressFromMac(parseMac(`02:00:${bytes.join(':')}`))).toBe(ipv4FromNumber(value));
      }),
    );
  });

  test('mentions a passed-through NIC on our bridge', () => {
    const { mappings, notes } = wish(element('PCI', { TYPE: 'NIC', NIC_ID: '4', BRIDGE: 'virbr1' }));
    expect(mappings).toEqual([]);
    expect(notes).toEqual([expect.stringContaining('NIC 4 of VM 42 gets no IB address')]);
  });

  test.each([
    ['no IP', { IP: '' }, 'bad-input', 'it has no IP'],
    ['an IPv6 address', { IP: '2001:db8::1' }, 'bad-input', 'maps no IPv6'],
    ['garbage', { IP: '$(reboot)' }, 'bad-input', '"$(reboot)" is not an IPv4 address'],
    ['an address in octal', { IP: '192.168.123.010' }, 'bad-input', 'not an IPv4 address'],
    ['escape sequences', { IP: '\u001b[2J\u001b]0;x\u0007' }, 'bad-input', '\\u001b[2J'],
    ['an address below the guests', { IP: '192.168.123.1' }, 'out-of-range', '192.168.123.2-192.168.123.101'],
    ['an address above the guests', { IP: '192.168.123.102' }, 'out-of-range', 'is outside the guests'],
    ['no MAC', { MAC: '' }, 'bad-input', 'it has no MAC'],
    ['a MAC that is none', { MAC: '02:00:c0:a8:7b' }, 'bad-input', 'not a hardware address'],
    ['a group MAC', { MAC: '03:00:c0:a8:7b:0a' }, 'bad-input', 'a group address'],
    ['the broadcast MAC', { MAC: 'FF:FF:FF:FF:FF:FF' }, 'bad-input', 'a group address'],
    ['a MAC of zeros', { MAC: '00:00:00:00:00:00' }, 'bad-input', 'all zeros'],
    ['an IB_IP outside the addresses', { IB_IP: '10.148.0.1' }, 'out-of-range', 'outside the addresses'],
    ['an IB_IP that is no address', { IB_IP: 'yes' }, 'bad-input', '"yes" is not an IPv4 address'],
    ['an IB_IP of IPv6', { IB_IP: '::1' }, 'bad-input', 'maps no IPv6'],
    ['a NIC_ID too large for a label', { NIC_ID: '100' }, 'bad-input', 'from 100 on'],
  ])('refuses a NIC with %s and names VM and NIC', (_, fields: Fields, code, why) => {
    const error = refusal(() => wish(nicXml(fields)));
    expect(error.code).toBe(code);
    expect(error.message).toMatch(/NIC (?:0|100) of VM 42/);
    expect(error.why).toContain(why);
    expect(error.fix).toBeTruthy();
    expect(`${error.message}${error.why}`).not.toMatch(/[\u0000-\u001f]/);
  });

  test('refuses two NICs with one guest address, and two with one IB address', () => {
    const second = (fields: Fields) => nicXml({ NIC_ID: '1', MAC: '02:00:c0:a8:7b:0b', ...fields });
    expect(refusal(() => wish(nicXml({}) + second({})))).toMatchObject({
      code: 'conflict',
      message: 'Cannot map NIC 1 of VM 42',
      why: 'its address 192.168.123.10 is also that of NIC 0',
    });
    expect(refusal(() => wish(nicXml({}) + second({ IP: '192.168.123.11', IB_IP: '10.148.0.10' })))).toMatchObject({
      code: 'conflict',
      why: 'its IB address 10.148.0.10 is also that of NIC 0',
    });
  });
});
