/** Every path between guests, hosts, fabric and outside, with real packets: what each side sees of the other. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { exec } from '../../lib/host/exec.ts';
import { createLab, type Lab } from '../support/lab.ts';
import { echoRequest, udpPacket } from '../support/packets.ts';

const IB = '192.168.10';
const GUEST = '192.168.122';

describe.each([0, 1])('with bridge-nf-call-iptables %i', (bridgeNf) => {
  let lab: Lab;

  beforeAll(async () => {
    lab = await createLab();
    for (const host of ['h1', 'h2'] as const) {
      await lab.sysctl(host, 'net.bridge.bridge-nf-call-iptables', bridgeNf);
      await lab.load(host);
    }
    await lab.map('h1', 11, 12);
    await lab.map('h2', 21);
    // Bridged frames that NAT sends back by the port they came from need it; the driver sets it where frames pass NAT.
    if (bridgeNf === 1) await lab.exec('h1', ['/usr/sbin/bridge', 'link', 'set', 'dev', 'vnet11', 'hairpin', 'on']);
  });
  afterAll(() => lab?.close());

  test.each([
    ['a guest to the outside leaves with its IB address', 'g11', `${IB}.100`, `out: ${IB}.11 > ${IB}.100`],
    ['the outside to an IB address lands on the guest', 'out', `${IB}.11`, `g11: ${IB}.100 > ${GUEST}.11`],
    ['a guest to a guest of another host', 'g11', `${IB}.21`, `g21: ${IB}.11 > ${GUEST}.21`],
    ['a guest to another guest of its host shows its IB address', 'g11', `${IB}.12`, `g12: ${IB}.11 > ${GUEST}.12`],
    ['a guest to its own IB address', 'g11', `${IB}.11`, `g11: ${IB}.11 > ${GUEST}.11`],
    ['a guest to another guest directly stays as it is', 'g11', `${GUEST}.12`, `g12: ${GUEST}.11 > ${GUEST}.12`],
    ["the host to its guest's IB address shows the host's own", 'h1', `${IB}.11`, `g11: ${IB}.1 > ${GUEST}.11`],
    ['the host to a guest of another host', 'h1', `${IB}.21`, `g21: ${IB}.1 > ${GUEST}.21`],
    ['another host to an IB address', 'h2', `${IB}.11`, `g11: ${IB}.2 > ${GUEST}.11`],
    ["a guest to the host's own IB address shows the guest's", 'g11', `${IB}.1`, `h1: ${IB}.11 > ${IB}.1`],
    ["a guest to another host's own IB address", 'g11', `${IB}.2`, `h2: ${IB}.11 > ${IB}.2`],
    ['a guest to its gateway stays as it is', 'g11', `${GUEST}.1`, `h1: ${GUEST}.11 > ${GUEST}.1`],
    ['an unmapped guest to its gateway', 'g13', `${GUEST}.1`, `h1: ${GUEST}.13 > ${GUEST}.1`],
    ['an unmapped guest to a guest directly', 'g13', `${GUEST}.12`, `g12: ${GUEST}.13 > ${GUEST}.12`],
    ['the host to a guest directly', 'h1', `${GUEST}.11`, `g11: ${GUEST}.1 > ${GUEST}.11`],
  ])('%s, by ICMP, TCP and UDP', async (_, from, to, seen) => {
    expect(await lab.reachAll(from, to)).toBe(seen);
  });

  test.each([
    ['out', `${IB}.11`, `g11: ${IB}.100 > ${GUEST}.11`],
    ['g11', `${IB}.100`, `out: ${IB}.11 > ${IB}.100`],
    ['g11', `${IB}.12`, `g12: ${IB}.11 > ${GUEST}.12`],
    ['g11', `${IB}.11`, `g11: ${IB}.11 > ${GUEST}.11`],
    ['g11', `${IB}.21`, `g21: ${IB}.11 > ${GUEST}.21`],
    ['h1', `${IB}.11`, `g11: ${IB}.1 > ${GUEST}.11`],
    ['g11', `${IB}.1`, `h1: ${IB}.11 > ${IB}.1`],
  ])('8 kB UDP datagrams of %s to %s arrive whole', async (from, to, seen) => {
    // The first large one from a link with a greater MTU finds the path's MTU, and is lost.
    await lab.reach('udp', from, to, { size: 8000, timeout: 300 });
    expect(await lab.reach('udp', from, to, { size: 8000 })).toBe(seen);
  });

  test.each([
    ['out', `${IB}.11`],
    ['g11', `${IB}.100`],
    ['g11', `${IB}.12`],
  ])('TCP of %s to %s carries 300 kB', async (from, to) => {
    const stream = await lab.stream('tcp', from, to);
    expect(await stream.exchange({ size: 300_000 })).toBe('alive');
    await stream.close();
  });

  test.each([
    ['out', `${IB}.11`],
    ['g11', `${IB}.100`],
    ['g11', `${IB}.12`],
    ['g11', `${IB}.11`],
    ['g11', `${IB}.21`],
    ['h1', `${IB}.11`],
  ])('a closed port of %s to %s is refused under the address that was asked', async (from, to) => {
    await lab.icmpSeen(from);
    expect(await lab.reach('tcp', from, to, { port: 7999 })).toBe('refused');
    expect(await lab.reach('udp', from, to, { port: 7999 })).toBe('refused');
    const errors = (await lab.icmpSeen(from)).filter((packet) => packet.type === 3);
    expect(errors.map(({ source, inner }) => [source, inner?.destination])).toContainEqual([to, to]);
  });
});

describe('path MTU and lifetime', () => {
  let lab: Lab;
  beforeAll(async () => {
    lab = await createLab({ guests: { h1: [11, 12] } });
    await lab.load('h1');
    await lab.map('h1', 11, 12);
  });
  afterAll(() => lab?.close());

  test('a packet too large for the guest is answered with its MTU, under the IB address', async () => {
    await lab.send('out', echoRequest({ source: `${IB}.100`, destination: `${IB}.11`, dontFragment: true }, 3000));
    const error = await waitForError(lab, 'out', 3);
    expect(error).toMatchObject({ code: 4, mtu: 1500, inner: { source: `${IB}.100`, destination: `${IB}.11` } });
    expect(error?.source.startsWith(GUEST)).toBe(false);
    expect(await lab.exec('out', ['/usr/sbin/ip', 'route', 'get', `${IB}.11`])).toContain('mtu 1500');
  });

  test('a packet whose lifetime ends at the host is answered without naming the guest address', async () => {
    await lab.send('out', udpPacket({ source: `${IB}.100`, destination: `${IB}.11`, ttl: 1 }, 4000, 7000));
    const error = await waitForError(lab, 'out', 11);
    expect(error?.inner).toEqual({ source: `${IB}.100`, destination: `${IB}.11` });
    expect(error?.source.startsWith(GUEST)).toBe(false);
  });

  test('a packet of the guest whose lifetime ends at the host is answered as the guest sent it', async () => {
    await lab.send('g11', udpPacket({ source: `${GUEST}.11`, destination: `${IB}.100`, ttl: 1 }, 4000, 7000));
    const error = await waitForError(lab, 'g11', 11);
    expect(error?.inner).toEqual({ source: `${GUEST}.11`, destination: `${IB}.100` });
  });
});

describe('a guest with a greater MTU than the fabric', () => {
  let lab: Lab;
  beforeAll(async () => {
    lab = await createLab({ guests: { h1: [11] }, guestMtu: 9000, fabricMtu: 4092 });
    await lab.load('h1');
    await lab.map('h1', 11);
  });
  afterAll(() => lab?.close());

  test('learns the MTU of the fabric', async () => {
    await lab.send('g11', echoRequest({ source: `${GUEST}.11`, destination: `${IB}.100`, dontFragment: true }, 6000));
    const error = await waitForError(lab, 'g11', 3);
    expect(error).toMatchObject({ code: 4, mtu: 4092, inner: { source: `${GUEST}.11`, destination: `${IB}.100` } });
  });
});

async function waitForError(lab: Lab, namespace: string, type: number) {
  for (let attempt = 0; attempt < 50; attempt++) {
    const error = (await lab.icmpSeen(namespace)).find((packet) => packet.type === type);
    if (error !== undefined) return error;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return undefined;
}

describe('a host without an address of its own on the link', () => {
  let lab: Lab;
  beforeAll(async () => {
    lab = await createLab({ guests: { h1: [11] } });
    await lab.exec('h1', ['/usr/sbin/ip', 'address', 'flush', 'dev', 'ib0']);
    await lab.load('h1', { hostAddress: false });
    await lab.map('h1', 11);
  });
  afterAll(() => lab?.close());

  test('reaches an IB address with its bridge address', async () => {
    expect(await lab.reachAll('h1', `${IB}.11`)).toBe(`g11: ${GUEST}.1 > ${GUEST}.11`);
  });
});

test('a closed lab leaves no namespace behind', async () => {
  const lab = await createLab({ guests: { h1: [11] }, second: { h1: [11] }, foreign: true });
  expect((await listNamespaces()).length).toBeGreaterThan(5);
  await lab.close();
  expect(await listNamespaces()).toEqual([]);
});

async function listNamespaces(): Promise<readonly string[]> {
  const { stdout } = await exec(['/usr/sbin/ip', 'netns', 'list']);
  return stdout.split('\n').filter((line) => line !== '');
}
