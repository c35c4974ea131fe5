/**
 * Beside the rules of others: chains as libvirt, Docker and administrators have them, by iptables-legacy and
 * iptables-nft, loaded before our table and after it. Ours wins for mapped guests; theirs go on as before.
 */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { createLab, type Lab, pairOf } from '../support/lab.ts';

const IB = '192.168.10';
const GUEST = '192.168.122';
const SILENCE = { timeout: 300 };

/** libvirt's network in nat mode, and port forwardings as Docker and administrators make them. */
const NAT = `*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s ${GUEST}.0/24 -d 224.0.0.0/24 -j RETURN
-A POSTROUTING -s ${GUEST}.0/24 ! -d ${GUEST}.0/24 -p tcp -j MASQUERADE --to-ports 1024-65535
-A POSTROUTING -s ${GUEST}.0/24 ! -d ${GUEST}.0/24 -p udp -j MASQUERADE --to-ports 1024-65535
-A POSTROUTING -s ${GUEST}.0/24 ! -d ${GUEST}.0/24 -j MASQUERADE
-A POSTROUTING -s ${GUEST}.0/24 -d ${GUEST}.13/32 -p tcp --dport 7000 -j MASQUERADE
-A DOCKER -d ${IB}.11/32 -p tcp --dport 7000 -j DNAT --to-destination ${GUEST}.13:7000
-A DOCKER -i eth9 -p tcp --dport 8022 -j DNAT --to-destination ${GUEST}.13:7000
-A DOCKER -d ${GUEST}.1/32 -p tcp --dport 8023 -j DNAT --to-destination ${GUEST}.13:7000
COMMIT
`;
const FILTER = `*filter
:FORWARD ACCEPT [0:0]
:DOCKER-USER - [0:0]
:LIBVIRT_FWI - [0:0]
:LIBVIRT_FWO - [0:0]
:LIBVIRT_FWX - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j LIBVIRT_FWX
-A FORWARD -j LIBVIRT_FWI
-A FORWARD -j LIBVIRT_FWO
-A DOCKER-USER -j RETURN
-A LIBVIRT_FWO -s ${GUEST}.0/24 -i virbr1 -j ACCEPT
-A LIBVIRT_FWX -i virbr1 -o virbr1 -j ACCEPT
COMMIT
`;

describe.each([
  ['legacy', 'before'],
  ['legacy', 'after'],
  ['nft', 'before'],
  ['nft', 'after'],
] as const)('rules of iptables-%s, loaded %s ours', (kind, order) => {
  let lab: Lab;
  let theirs: string;
  const iptables = (...words: readonly string[]) => lab.exec('h1', [`/usr/sbin/iptables-${kind}`, ...words]);
  /** All of their rules, without counts. */
  const save = async () =>
    (await lab.exec('h1', [`/usr/sbin/iptables-${kind}-save`])).replace(/^#.*\n/gm, '').replace(/\[\d+:\d+\]/g, '');
  const loadTheirs = async () => {
    await lab.exec('h1', [`/usr/sbin/iptables-${kind}-restore`], { input: NAT + FILTER });
    theirs = await save();
  };

  beforeAll(async () => {
    lab = await createLab({ guests: { h1: [11, 12, 13, 14], h2: [21] }, foreign: true });
    if (order === 'before') await loadTheirs();
    await lab.load('h1');
    await lab.load('h2');
    await lab.map('h1', 11, 12);
    await lab.map('h2', 21);
    if (order === 'after') await loadTheirs();
  });
  afterAll(() => lab?.close());

  test.each([
    ['a mapped guest is not masqueraded', 'g11', `${IB}.100`, `out: ${IB}.11 > ${IB}.100`],
    [
      'a port forwarding for its IB address does not take its traffic',
      'out',
      `${IB}.11`,
      `g11: ${IB}.100 > ${GUEST}.11`,
    ],
    ['a guest of another host is reached', 'g11', `${IB}.21`, `g21: ${IB}.11 > ${GUEST}.21`],
    ['a guest of its own host is reached by IB address', 'g11', `${IB}.12`, `g12: ${IB}.11 > ${GUEST}.12`],
    ['the host reaches its guest by IB address', 'h1', `${IB}.11`, `g11: ${IB}.1 > ${GUEST}.11`],
    ['their masquerading of unmapped guests on other links works', 'g13', '10.9.0.2', 'lan: 10.9.0.1 > 10.9.0.2'],
    ['and that of mapped guests on other links', 'g11', '10.9.0.2', 'lan: 10.9.0.1 > 10.9.0.2'],
  ])('%s', async (_, from, to, seen) => {
    expect(await lab.reachAll(from, to)).toBe(seen);
  });

  test('their port forwarding to an unmapped guest works', async () => {
    expect(await lab.reach('tcp', 'lan', '10.9.0.1', { port: 8022 })).toBe(`g13: 10.9.0.2 > ${GUEST}.13`);
  });

  test.each(['g12', 'g14'])(
    'their port forwarding between guests of our bridge keeps its source for %s',
    async (from) => {
      expect(await lab.reach('tcp', from, `${GUEST}.1`, { port: 8023 })).toBe(`g13: ${GUEST}.1 > ${GUEST}.13`);
    },
  );

  test('their masquerading does not take an unmapped guest onto the fabric', async () => {
    expect(await lab.reachAll('g13', `${IB}.100`, SILENCE)).toBe('timeout');
  });

  test('their rules are as they were', async () => {
    expect(await save()).toBe(theirs);
    await lab.load('h1');
    await lab.map('h1', pairOf(14));
    await lab.unmap('h1', pairOf(14));
    expect(await save()).toBe(theirs);
  });

  test('what they reject stays rejected, until they let it pass', async () => {
    await iptables('-A', 'FORWARD', '-o', 'virbr1', '-j', 'REJECT');
    expect(await lab.reach('tcp', 'out', `${IB}.12`)).toBe('refused');
    await iptables(
      '-I',
      'FORWARD',
      '1',
      '-i',
      'ib0',
      '-o',
      'virbr1',
      '-m',
      'conntrack',
      '--ctstate',
      'DNAT',
      '-j',
      'ACCEPT',
    );
    expect(await lab.reachAll('out', `${IB}.12`)).toBe(`g12: ${IB}.100 > ${GUEST}.12`);
  });

  test('without our table theirs work as if it had never been', async () => {
    await lab.exec('h1', ['/usr/sbin/nft', 'delete', 'table', 'ip', 'kvm_ib']);
    await iptables('-D', 'FORWARD', '-o', 'virbr1', '-j', 'REJECT');
    expect(await lab.reachAll('g13', `${IB}.100`)).toBe(`out: ${IB}.1 > ${IB}.100`);
    expect(await lab.reach('tcp', 'out', `${IB}.11`)).toBe(`g13: ${IB}.100 > ${GUEST}.13`);
  });
});
