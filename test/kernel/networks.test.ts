/** Two networks on one host: each works, and nothing gets from one to the other. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { createLab, type Lab, pairOf } from '../support/lab.ts';
import { udpPacket } from '../support/packets.ts';

const A = { ib: '192.168.10', guest: '192.168.122' } as const;
const B = { ib: '192.168.20', guest: '192.168.123' } as const;
const SILENCE = { timeout: 300 };

async function twoNetworks(): Promise<Lab> {
  return createLab({ guests: { h1: [11, 12, 13], h2: [21] }, second: { h1: [11, 12, 13], h2: [21] } });
}

async function mapAll(lab: Lab): Promise<void> {
  const second = { second: true } as const;
  await lab.map('h1', 11, 12, pairOf(11, second), pairOf(12, { ...second, mac: null }));
  await lab.map('h2', 21, pairOf(21, second));
}

describe.each([0, 1])('two isolated networks, with bridge-nf-call-iptables %i', (bridgeNf) => {
  let lab: Lab;
  beforeAll(async () => {
    lab = await twoNetworks();
    for (const host of ['h1', 'h2'] as const) {
      await lab.sysctl(host, 'net.bridge.bridge-nf-call-iptables', bridgeNf);
      await lab.load(host);
    }
    await mapAll(lab);
  });
  afterAll(() => lab?.close());

  test.each([
    ['g11', `${A.ib}.100`, `out: ${A.ib}.11 > ${A.ib}.100`],
    ['k11', `${B.ib}.100`, `out: ${B.ib}.11 > ${B.ib}.100`],
    ['out', `${A.ib}.11`, `g11: ${A.ib}.100 > ${A.guest}.11`],
    ['out', `${B.ib}.11`, `k11: ${B.ib}.100 > ${B.guest}.11`],
    ['g11', `${A.ib}.12`, `g12: ${A.ib}.11 > ${A.guest}.12`],
    ['k11', `${B.ib}.12`, `k12: ${B.ib}.11 > ${B.guest}.12`],
    ['k11', `${B.ib}.21`, `k21: ${B.ib}.11 > ${B.guest}.21`],
    ['h1', `${A.ib}.11`, `g11: ${A.ib}.1 > ${A.guest}.11`],
    ['h1', `${B.ib}.11`, `k11: ${B.ib}.1 > ${B.guest}.11`],
    ['g11', `${A.ib}.1`, `h1: ${A.ib}.11 > ${A.ib}.1`],
    ['k11', `${B.ib}.1`, `h1: ${B.ib}.11 > ${B.ib}.1`],
    ['k11', `${B.guest}.12`, `k12: ${B.guest}.11 > ${B.guest}.12`],
  ])('%s reaches %s of its own network', async (from, to, seen) => {
    expect(await lab.reachAll(from, to)).toBe(seen);
  });

  test.each([
    ['the outside', '100'],
    ['a mapped guest of the same host', '11'],
    ['a mapped guest of another host', '21'],
    ["the host's own address", '1'],
    ['another host', '2'],
  ])('no guest of one network reaches %s of the other by IB address', async (_, number) => {
    const tries = [
      ['g11', B],
      ['k11', A],
      ['g13', B],
      ['k13', A],
    ] as const;
    const fabric = await Promise.all([lab.capture('fabric', 'h1-ib0'), lab.capture('fabric', 'h1-ib1')]);
    const results = await Promise.all(tries.map(([from, { ib }]) => lab.reachAll(from, `${ib}.${number}`, SILENCE)));
    expect(results).toEqual(tries.map(() => 'timeout'));
    const seen = (await Promise.all(fabric.map((capture) => capture.stop()))).flat();
    expect(seen.filter(({ protocol }) => ['icmp', 'tcp', 'udp'].includes(protocol))).toEqual([]);
  });

  test('no guest reaches a guest address of the other bridge', async () => {
    const tries = [
      ['g11', `${B.guest}.11`],
      ['k11', `${A.guest}.11`],
      ['g13', `${B.guest}.13`],
    ] as const;
    const results = await Promise.all(tries.map(([from, to]) => lab.reachAll(from, to, SILENCE)));
    expect(results).toEqual(tries.map(() => 'timeout'));
    expect(await lab.dropped('h1', 'networks do not mix')).toBeGreaterThanOrEqual(9);
  });

  test.each([
    ['IB', B.ib, `${A.ib}.1`],
    ['IB', A.ib, `${B.ib}.1`],
    ['guest', B.guest, `${A.ib}.1`],
    ['guest', A.guest, `${B.ib}.1`],
  ])('an %s address (%s.11) is not served through the link of the other network (by %s)', async (_, net, via) => {
    const route = [`${net}.11/32`, 'via', via] as const;
    await lab.exec('out', ['/usr/sbin/ip', 'route', 'add', ...route]);
    expect(await lab.reachAll('out', `${net}.11`, SILENCE)).toBe('timeout');
    await lab.exec('out', ['/usr/sbin/ip', 'route', 'delete', ...route]);
  });

  test('a mapped address of one network is no source on the other, even where any MAC may use it', async () => {
    const far = [await lab.capture('out', 'ib0'), await lab.capture('h1', 'vnet12')];
    for (const destination of [`${A.ib}.100`, `${A.ib}.12`, `${A.ib}.1`]) {
      await lab.send('g11', udpPacket({ source: `${B.guest}.12`, destination }, 4242, 4242));
    }
    await lab.reach('udp', 'g11', `${A.ib}.100`);
    await lab.reach('udp', 'g11', `${A.ib}.12`);
    const seen = (await Promise.all(far.map((capture) => capture.stop()))).flat();
    expect(seen.filter(({ destinationPort }) => destinationPort === 7000).length).toBeGreaterThanOrEqual(2);
    expect(seen.filter(({ destinationPort }) => destinationPort === 4242)).toEqual([]);
    expect(await lab.dropped('h1', 'source is no guest address of network ib')).toBe(3);
  });
});

describe('an isolated network beside one that is not', () => {
  let lab: Lab;
  beforeAll(async () => {
    lab = await twoNetworks();
    await lab.load('h1', { isolated: ['ib'] });
    await lab.load('h2');
    await mapAll(lab);
  });
  afterAll(() => lab?.close());

  test('does not mix with it, either way', async () => {
    const tries = [
      ['g11', `${B.ib}.100`],
      ['g11', `${B.ib}.11`],
      ['g11', `${B.guest}.11`],
      ['k11', `${A.ib}.100`],
      ['k11', `${A.ib}.11`],
      ['k13', `${A.guest}.11`],
    ] as const;
    const results = await Promise.all(tries.map(([from, to]) => lab.reachAll(from, to, SILENCE)));
    expect(results).toEqual(tries.map(() => 'timeout'));
  });

  test('both work', async () => {
    expect(await lab.reachAll('g11', `${A.ib}.100`)).toBe(`out: ${A.ib}.11 > ${A.ib}.100`);
    expect(await lab.reachAll('k11', `${B.ib}.100`)).toBe(`out: ${B.ib}.11 > ${B.ib}.100`);
    expect(await lab.reachAll('g13', `${A.ib}.100`, SILENCE)).toBe('timeout');
  });

  test('without isolation on both, the kernel routes between them', async () => {
    await lab.load('h1', { isolated: [] });
    expect(await lab.reachAll('g13', `${B.guest}.13`)).toBe(`k13: ${A.guest}.13 > ${B.guest}.13`);
  });
});
