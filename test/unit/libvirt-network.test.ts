import { execFileSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { parseIpv4, parseLinkName } from '../../lib/core/address.ts';
import { KvmIbError } from '../../lib/core/errors.ts';
import type { Network } from '../../lib/core/mapping.ts';
import { type NetworkXmlOptions, networkXml } from '../../lib/libvirt/network.ts';

const network: Network = {
  name: 'ib',
  device: parseLinkName('ib0'),
  bridge: parseLinkName('virbr1'),
  guests: { first: parseIpv4('192.168.122.2'), last: parseIpv4('192.168.122.6') },
  addresses: { first: parseIpv4('192.168.10.202'), last: parseIpv4('192.168.10.206') },
  isolate: true,
};
const options: NetworkXmlOptions = { mtu: 2044, bridgeAddress: parseIpv4('192.168.122.1') };

function refusal(changes: Partial<NetworkXmlOptions>, on: Network = network): KvmIbError {
  try {
    networkXml(on, { ...options, ...changes });
  } catch (error) {
    expect(error).toBeInstanceOf(KvmIbError);
    return error as KvmIbError;
  }
  throw new Error('accepted');
}

describe('networkXml', () => {
  test('writes an open network with bridge, MTU and the smallest subnet', () => {
    expect(networkXml(network, options)).toBe(`<network>
  <name>kvm-ib-ib</name>
  <forward mode='open'/>
  <bridge name='virbr1' stp='off' delay='0'/>
  <mac address='52:54:00:a8:7a:01'/>
  <mtu size='2044'/>
  <dns enable='no'/>
  <ip address='192.168.122.1' netmask='255.255.255.248'/>
</network>
`);
  });

  test('takes a prefix length and a name', () => {
    const xml = networkXml(network, { ...options, prefixLength: 24, name: 'ib-guests' });
    expect(xml).toContain("netmask='255.255.255.0'");
    expect(xml).toContain('<name>ib-guests</name>');
  });

  test('never takes a subnet whose first or last address is somebody\u2019s', () => {
    const guests = { first: parseIpv4('192.168.122.2'), last: parseIpv4('192.168.122.7') };
    expect(networkXml({ ...network, guests }, options)).toContain("netmask='255.255.255.240'");
  });

  test.each([
    ['a bridge address among the guests', { bridgeAddress: parseIpv4('192.168.122.4') }, 'out-of-range'],
    ['a subnet that leaves out guests', { prefixLength: 30 }, 'out-of-range'],
    [
      'a subnet whose broadcast address is the bridge\u2019s',
      { bridgeAddress: parseIpv4('192.168.122.7'), prefixLength: 29 },
      'out-of-range',
    ],
    ['a prefix length that is none', { prefixLength: 33 }, 'bad-input'],
    ['an MTU that is none', { mtu: 70_000 }, 'bad-input'],
    ['markup in the name', { name: "a'/><ip/>" }, 'bad-input'],
  ] as const)('refuses %s', (_, changes, code) => {
    const error = refusal(changes);
    expect(error.code).toBe(code);
    expect(error.why).toBeTruthy();
    expect(error.fix).toBeTruthy();
  });

  const schema = '/usr/share/libvirt/schemas/network.rng';
  test.runIf(existsSync(schema) && existsSync('/usr/bin/xmllint'))('writes what the schema of libvirt takes', () => {
    const folder = mkdtempSync(join(tmpdir(), 'kvm-ib-'));
    try {
      const file = join(folder, 'network.xml');
      writeFileSync(file, networkXml(network, { ...options, mtu: 65_520 }));
      execFileSync('/usr/bin/xmllint', ['--noout', '--relaxng', schema, file], { stdio: 'pipe' });
      writeFileSync(file, networkXml(network, options).replace("mode='open'", "mode='ajar'"));
      expect(() =>
        execFileSync('/usr/bin/xmllint', ['--noout', '--relaxng', schema, file], { stdio: 'pipe' }),
      ).toThrow();
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
});
