/** What `onehost list --xml` and `onevnet list --xml` print, of whatever size and make. */
import { describe, expect, test } from 'vitest';
import { parseHostPool, parseNetworkPool, parseNicDrivers } from '../../lib/opennebula/pools.ts';

const host = (id: number, more = ''): string =>
  `<HOST><ID>${id}</ID><NAME>host${id}</NAME><STATE>2</STATE><IM_MAD><![CDATA[kvm]]></IM_MAD>` +
  `<VM_MAD><![CDATA[kvm-ib]]></VM_MAD><CLUSTER_ID>100</CLUSTER_ID><CLUSTER>ib</CLUSTER>` +
  `<HOST_SHARE><RUNNING_VMS>3</RUNNING_VMS></HOST_SHARE><VMS><ID>1</ID></VMS>` +
  `<TEMPLATE><VM_MAD><![CDATA[other]]></VM_MAD>${more}</TEMPLATE></HOST>`;
const pool = (...hosts: string[]): string => `<HOST_POOL>${hosts.join('')}</HOST_POOL>`;

describe('hosts', () => {
  test('are read with what the probe of kvm-ib has reported', () => {
    const report = '<KVM_IB_STATUS><![CDATA[OK]]></KVM_IB_STATUS><KVM_IB_VERSION><![CDATA[0.1.0]]></KVM_IB_VERSION>';
    expect(parseHostPool(pool(host(3), host(4, report)))).toEqual([
      {
        id: 3,
        name: 'host3',
        driver: 'kvm-ib',
        clusterId: 100,
        cluster: 'ib',
        state: 2,
        runningVms: 3,
        kvmIb: null,
      },
      expect.objectContaining({ id: 4, kvmIb: { status: 'OK', version: '0.1.0', config: '' } }),
    ]);
  });

  test('of 3.4, laid out by a formatter, without a cluster', () => {
    const text = `<?xml version="1.0"?>\n<HOST_POOL>\n  <HOST>\n    <ID>\n      0\n    </ID>\n    <NAME>\n      a\n    </NAME>
    <VM_MAD>\n      vmm_kvm_ib\n    </VM_MAD>\n    <CLUSTER_ID>-1</CLUSTER_ID>\n    <CLUSTER/>\n  </HOST>\n</HOST_POOL>\n`;
    expect(parseHostPool(text)).toEqual([
      expect.objectContaining({ id: 0, name: 'a', driver: 'vmm_kvm_ib', clusterId: -1, cluster: null, runningVms: 0 }),
    ]);
  });

  test('an empty pool has none', () => {
    for (const text of ['<HOST_POOL/>', '<HOST_POOL></HOST_POOL>', '<HOST_POOL>\n</HOST_POOL>\n']) {
      expect(parseHostPool(text)).toEqual([]);
    }
  });

  test('values cannot pass for tags', () => {
    const trick = '<NOTE><![CDATA[</HOST><HOST><NAME>evil</NAME></HOST>]]></NOTE><!-- </HOST> -->';
    expect(parseHostPool(pool(host(1, trick), host(2))).map(({ name }) => name)).toEqual(['host1', 'host2']);
  });

  test.each([
    ['nothing', ''],
    ['no XML', 'error: not authorized'],
    ['another pool', '<VNET_POOL></VNET_POOL>'],
    ['cut off in a host', pool(host(1)).slice(0, 80)],
    ['cut off in CDATA', '<HOST_POOL><HOST><NAME><![CDATA[x'],
    ['a host in a host', `<HOST_POOL><HOST>${host(1)}</HOST></HOST_POOL>`],
    ['a host in something else', `<HOST_POOL><X>${host(1)}</X></HOST_POOL>`],
    ['a host beside the pool', `${pool(host(1))}${host(2)}`],
    ['a closing tag too many', '<HOST_POOL></HOST></HOST_POOL>'],
    ['crossed tags', '<HOST_POOL><HOST><A><B></A></B></HOST></HOST_POOL>'],
    ['a document type', '<!DOCTYPE x [<!ENTITY a "b">]><HOST_POOL></HOST_POOL>'],
  ])('%s is refused', (_, text) => {
    expect(() => parseHostPool(text)).toThrow(/Cannot read the output of `onehost list --xml`/);
  });

  test('five hundred large hosts are read, and in good time', () => {
    const large = `<PCI_DEVICES>${'<PCI><ADDRESS><![CDATA[0000:00:1f.0]]></ADDRESS><CLASS><![CDATA[0c05]]></CLASS></PCI>'.repeat(60)}</PCI_DEVICES>`;
    const hosts = Array.from({ length: 500 }, (_, id) => host(id, large));
    const before = performance.now();
    expect(parseHostPool(pool(...hosts))).toHaveLength(500);
    expect(performance.now() - before).toBeLessThan(20_000);
  });

  test('openings without end cost no more than their length', () => {
    const before = performance.now();
    expect(() => parseHostPool(`<HOST_POOL>${'<!--'.repeat(500_000)}`)).toThrow(/Cannot read/);
    expect(() => parseHostPool('<HOST'.repeat(500_000))).toThrow(/Cannot read/);
    expect(performance.now() - before).toBeLessThan(2000);
  });
});

test('virtual networks are read with driver, bridge and options', () => {
  const text = `<VNET_POOL><VNET><ID>7</ID><NAME>ib-guests</NAME><CLUSTERS><ID>0</ID></CLUSTERS><BRIDGE><![CDATA[virbr1]]></BRIDGE>
<VN_MAD><![CDATA[bridge]]></VN_MAD><USED_LEASES>3</USED_LEASES><TEMPLATE><CONF><![CDATA[keep_empty_bridge=true]]></CONF></TEMPLATE></VNET>
<VNET><ID>8</ID><NAME>old</NAME><BRIDGE/><VN_MAD/><TEMPLATE/></VNET></VNET_POOL>`;
  expect(parseNetworkPool(text)).toEqual([
    { id: 7, name: 'ib-guests', bridge: 'virbr1', driver: 'bridge', conf: 'keep_empty_bridge=true', usedLeases: 3 },
    { id: 8, name: 'old', bridge: null, driver: null, conf: null, usedLeases: 0 },
  ]);
});

test('the NICs of a VM are read with the driver of their virtual network', () => {
  const vm = `<VM><ID>42</ID><TEMPLATE><NIC><BRIDGE><![CDATA[virbr1]]></BRIDGE><NETWORK>ib</NETWORK><VN_MAD>bridge</VN_MAD></NIC></TEMPLATE></VM>`;
  expect(parseNicDrivers(vm)).toEqual([{ id: null, name: 'ib', bridge: 'virbr1', driver: 'bridge', conf: null }]);
  expect(() => parseNicDrivers('<VM>')).toThrow(/Cannot read the VM data/);
});
