/** What is counted for each mapped guest, packet by packet, and how it reaches the status that the probes print. */
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { parseIpv4 } from '../../lib/core/address.ts';
import { formatStatus } from '../../lib/host/status-file.ts';
import type { StatusReport } from '../../lib/ops/publish.ts';
import { reconcileAndPublish } from '../../lib/ops/publish.ts';
import { sync } from '../../lib/ops/sync.ts';
import { guestOf, mapping, request, vmOwner } from '../support/fake-host.ts';
import type { RealHost } from '../support/kernel-host.ts';
import { createRealHost, makeLinks, nft, removeLinks } from '../support/kernel-host.ts';
import { createLab, type Lab } from '../support/lab.ts';
import { udpPacket } from '../support/packets.ts';

const IB = '192.168.10';
const GUEST = '192.168.122';
const SILENCE = { timeout: 300 };
/** An echo request of 32 bytes, and its answer. */
const PING = { packets: 1, bytes: 20 + 8 + 32 };
const NONE = { packets: 0, bytes: 0 };

describe.each([
  [0, true],
  [1, true],
  [0, false],
  [1, false],
])('with bridge-nf-call-iptables %i, isolated: %s', (bridgeNf, isolate) => {
  let lab: Lab;
  beforeAll(async () => {
    lab = await createLab({ guests: { h1: [11, 12, 13] } });
    await lab.sysctl('h1', 'net.bridge.bridge-nf-call-iptables', bridgeNf);
    await lab.load('h1', { isolated: isolate ? ['ib'] : [] });
    await lab.map('h1', 11, 12);
  });
  afterAll(() => lab?.close());
  beforeEach(async () => {
    for (const set of ['guest_sent', 'guest_received']) {
      await lab.exec('h1', ['/usr/sbin/nft', 'flush', 'set', 'ip', 'kvm_ib', set]);
      const elements = `{ ${GUEST}.11, ${GUEST}.12 }`;
      await lab.exec('h1', ['/usr/sbin/nft', 'add', 'element', 'ip', 'kvm_ib', set, elements]);
    }
  });

  async function counted(number: number) {
    const listing = await lab.nft('h1').listTable('ip', 'kvm_ib');
    const of = (name: string) => {
      const set = listing?.sets.find((candidate) => candidate.name === name);
      const keys = (set?.elem ?? []) as readonly { elem: { val: string; counter: unknown } }[];
      return keys.find(({ elem }) => elem.val === parseIpv4(`${GUEST}.${number}`))?.elem.counter;
    };
    return { sent: of('guest_sent'), received: of('guest_received') };
  }

  test.each([
    ['out', `${IB}.11`],
    ['g11', `${IB}.100`],
  ])('%s to %s: a packet each way, whoever began', async (from, to) => {
    expect(await lab.reach('icmp', from, to)).toContain(' > ');
    expect(await counted(11)).toEqual({ sent: PING, received: PING });
    expect(await counted(12)).toEqual({ sent: NONE, received: NONE });
  });

  test('every packet of a connection, not the first alone', async () => {
    const stream = await lab.stream('udp', 'out', `${IB}.11`);
    for (let n = 0; n < 10; n++) await stream.exchange({ size: 100 });
    await stream.close();
    const { sent, received } = await counted(11);
    expect(received).toEqual({ packets: 10, bytes: 10 * (20 + 8 + 100) });
    expect(sent).toMatchObject({ packets: 10 });
  });

  test('guest to guest of one host by IB address: each counts its own', async () => {
    expect(await lab.reach('icmp', 'g11', `${IB}.12`)).toBe(`g12: ${IB}.11 > ${GUEST}.12`);
    expect(await counted(11)).toEqual({ sent: PING, received: PING });
    expect(await counted(12)).toEqual({ sent: PING, received: PING });
  });

  test('not: on the bridge itself, and between a guest and its own host', async () => {
    expect(await lab.reach('icmp', 'g11', `${GUEST}.12`)).toContain(' > ');
    expect(await lab.reach('icmp', 'g11', `${IB}.1`)).toContain(' > ');
    expect(await lab.reach('icmp', 'h1', `${IB}.11`)).toContain(' > ');
    expect(await counted(11)).toEqual({ sent: NONE, received: NONE });
    expect(await counted(12)).toEqual({ sent: NONE, received: NONE });
  });

  test('not: what a guest without a mapping sends, and, with isolation, what the guards drop', async () => {
    await lab.reach('icmp', 'g13', `${IB}.100`, SILENCE);
    if (isolate) {
      await lab.send('g12', udpPacket({ source: `${GUEST}.11`, destination: `${IB}.100` }, 4242, 4242));
      await lab.reach('icmp', 'g13', `${IB}.11`, SILENCE);
    }
    expect(await counted(11)).toEqual({ sent: NONE, received: NONE });
    expect(await counted(12)).toEqual({ sent: NONE, received: NONE });
  });
});

describe('in what reconcile reports', () => {
  let host: RealHost;
  beforeEach(async () => {
    makeLinks();
    host = await createRealHost();
    host.active = new Set([2, 3, 9]);
  });
  afterAll(removeLinks);

  async function report(): Promise<StatusReport> {
    const reports: StatusReport[] = [];
    await reconcileAndPublish(host, { write: (one) => void reports.push(one) });
    const [one] = reports;
    if (one === undefined) throw new Error('nothing was reported');
    return one;
  }
  const count = (set: string, n: number, packets: number) => {
    nft('delete', 'element', 'ip', 'kvm_ib', set, `{ ${guestOf(n)} }`);
    nft('add', 'element', 'ip', 'kvm_ib', set, `{ ${guestOf(n)} counter packets ${packets} bytes ${packets * 100} }`);
  };
  const trafficOf = async (vm: number) => (await report()).vms.find((one) => one.vm === vm)?.traffic;

  test('a VM has the sum of its mappings, and one VM not what another had', async () => {
    const both = [mapping(2, { vm: 2 }), mapping(3, { vm: 2, nic: 1 })];
    await sync(host, request(vmOwner(2), both));
    count('guest_sent', 2, 5);
    count('guest_sent', 3, 7);
    count('guest_received', 3, 1);
    expect(await trafficOf(2)).toEqual({ sent: { packets: 12, bytes: 1_200 }, received: { packets: 1, bytes: 100 } });
    const text = formatStatus(await report(), { version: '1', uptime: 1 });
    const lines = Buffer.from(/^vm 2 (.*)$/m.exec(text)?.[1] ?? '', 'base64').toString();
    expect(lines).toContain('KVM_IB_TX_BYTES="1200"\n');
    // A change that leaves the pair alone leaves the count.
    await sync(host, request(vmOwner(2), [mapping(2, { vm: 2, mac: 9 }), mapping(3, { vm: 2, nic: 1 })]));
    expect(await trafficOf(2)).toMatchObject({ sent: { packets: 12 } });
    // Its VM is gone, and another gets the same guest and IB address before reconcile comes.
    host.active = new Set([9]);
    await sync(host, request(vmOwner(9), [mapping(2, { vm: 9 })]));
    expect(await trafficOf(9)).toEqual({ sent: NONE, received: NONE });
    expect(nft('list', 'map', 'ip', 'kvm_ib', 'guest_to_ib')).toContain('one-9 nic 0 ib');
  });

  test('where nothing counts, nothing is said', async () => {
    await sync(host, request(vmOwner(2), [mapping(2)]));
    const listed = host.nat.list;
    const blind = {
      ...host,
      nat: { ...host.nat, list: async (spec: never) => ({ ...(await listed(spec)), traffic: new Map() }) },
    };
    host = blind as unknown as RealHost;
    const { vms } = await report();
    expect(vms).toMatchObject([{ vm: 2, traffic: null }]);
    const text = formatStatus({ ...(await report()) }, { version: '1', uptime: 1 });
    expect(Buffer.from(/^vm 2 (.*)$/m.exec(text)?.[1] ?? '', 'base64').toString()).not.toContain('RX');
  });
});
