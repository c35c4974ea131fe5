/** The fake host does what the kernel does: the same suite runs on both. */
import { parseIpv4 } from '../../lib/core/address.ts';
import { CONFIG, createFakeHost, flushRuleset } from '../support/fake-host.ts';
import { hostConformance } from '../support/host-conformance.ts';

hostConformance('the fake host', async () => {
  const host = createFakeHost(CONFIG);
  const { kernel } = host;
  kernel.ports.push({ bridge: 'virbr1', name: 'vnet2', hairpin: false });
  return {
    ...host,
    plant: (...flows) => {
      kernel.flows = [...kernel.flows, ...flows];
    },
    flows: () => kernel.flows,
    addAddress: (device, cidr, label) => {
      const [address = '', length] = cidr.split('/');
      kernel.addresses.push({ device, address: parseIpv4(address), prefixLength: Number(length), label });
    },
    flushRuleset: () => flushRuleset(kernel),
  };
});
