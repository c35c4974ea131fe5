/**
 * The configuration or the rules change while guests run: no packet of an established flow is lost, what was mapped under
 * the older configuration goes on whole, and networks do not mix meanwhile. The real command, in a hypervisor of the lab.
 */
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { COUNTING, ruleset } from '../../lib/nat/ruleset.ts';
import { transaction } from '../../lib/nftables-json/transaction.ts';
import type { Command } from '../../lib/nftables-json/types.ts';
import type { Status } from '../../lib/ops/inspect.ts';
import { temporaryDirectory } from '../support/fake-host.ts';
import { createLab, type Lab, type Stream } from '../support/lab.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const COMMAND = resolve(import.meta.dirname, '../../dist/kvm-ib.mjs');
const A = { ib: '192.168.10', guest: '192.168.122' };
const B = { ib: '192.168.20', guest: '192.168.123' };
/** Where an answer would come within a millisecond. */
const SILENCE = { timeout: 300 };

interface NetworkText {
  readonly name: string;
  readonly device: string;
  readonly bridge: string;
  readonly guests: string;
  readonly addresses: string;
  readonly isolate?: boolean;
}
const FIRST: NetworkText = {
  name: 'ib',
  device: 'ib0',
  bridge: 'virbr1',
  guests: `${A.guest}.11-${A.guest}.19`,
  addresses: `${A.ib}.11-${A.ib}.19`,
};
const SECOND: NetworkText = {
  name: 'ib-b',
  device: 'ib1',
  bridge: 'virbr2',
  guests: `${B.guest}.11-${B.guest}.19`,
  addresses: `${B.ib}.11-${B.ib}.19`,
};

let lab: Lab;
let folder: string;
let domains: readonly number[];
beforeEach(async () => {
  folder = temporaryDirectory();
  lab = await createLab({ guests: { h1: [11, 12, 13, 14] }, second: { h1: [11, 12, 13] } });
  await lab.sysctl('h1', 'net.bridge.bridge-nf-call-iptables', 0);
  configure(FIRST, SECOND);
  runs(11, 12, 21);
  await kvmIb('reconcile');
  await add(11, A, 11);
  await add(12, A, 12);
  await add(21, B, 11);
});
afterEach(async () => {
  await lab?.close();
  rmSync(folder, { recursive: true, force: true });
});

function configure(...networks: readonly NetworkText[]): void {
  writeFileSync(join(folder, 'kvm-ib.yaml'), JSON.stringify({ networks }));
}

/** The VMs whose domains are active from now on. */
function runs(...vms: readonly number[]): void {
  domains = vms;
}

async function kvmIb(...args: readonly string[]) {
  mkdirSync(join(folder, 'bin'), { recursive: true });
  const virsh = join(folder, 'bin', 'virsh');
  writeFileSync(virsh, `#!/bin/sh\nprintf 'one-%s\\n' ${domains.join(' ')}\n`, { mode: 0o755 });
  const mounted = '/bin/mount --bind "$1" "$2" && shift 2 && exec "$@"';
  const env = [`KVM_IB_CONFIG=${folder}/kvm-ib.yaml`, `KVM_IB_STATE_DIR=${folder}/state`];
  const fake = ['/usr/bin/unshare', '--mount', '/bin/sh', '-c', mounted, 'sh', virsh, '/usr/bin/virsh'] as const;
  const result = await lab.tryExec('h1', [...fake, '/usr/bin/env', ...env, process.execPath, COMMAND, ...args]);
  return { ...result, text: result.stdout + result.stderr };
}

async function done(...args: readonly string[]): Promise<string> {
  const result = await kvmIb(...args);
  expect(result, result.text).toMatchObject({ status: 0 });
  return result.stdout;
}

const macOf = (net: typeof A, n: number): string =>
  [
    '02',
    '00',
    ...net.guest.split('.').map((octet) => Number(octet).toString(16)),
    n.toString(16).padStart(2, '0'),
  ].join(':');

/** What a deploy of this VM does. */
const add = (vm: number, net: typeof A, n: number): Promise<string> =>
  done('add', '--vm', String(vm), '--nic', '0', '--guest', `${net.guest}.${n}`, '--mac', macOf(net, n));

async function status(): Promise<Status> {
  return JSON.parse((await kvmIb('status', '--json')).stdout) as Status;
}

const table = (): Promise<string> => lab.exec('h1', ['/usr/sbin/nft', 'list', 'table', 'ip', 'kvm_ib']);

const NAMESPACES = ['out', 'g11', 'g12', 'k11'];

/** Segments of connections that were sent again; first packets of connections that are to get no answer are none of them. */
async function retransmissions(): Promise<number> {
  let sum = 0;
  for (const name of NAMESPACES) {
    const text = await lab.exec(name, ['/bin/cat', '/proc/net/snmp', '/proc/net/netstat']);
    const value = (group: string, key: string): number => {
      const lines = text.split('\n').filter((line) => line.startsWith(`${group}:`));
      const [names = [], values = []] = lines.map((line) => line.split(' '));
      const found = Number(values[names.indexOf(key)]);
      if (Number.isNaN(found)) throw new Error(`no ${group} ${key}`);
      return found;
    };
    sum += value('Tcp', 'RetransSegs') - value('TcpExt', 'TCPSynRetrans');
  }
  return sum;
}

/** Flows of every kind, of the mappings of the beginning. */
const FLOWS = [
  ['out', `${A.ib}.11`],
  ['g11', `${A.ib}.100`],
  ['g11', `${A.ib}.12`],
  ['g12', `${A.ib}.12`],
  ['h1', `${A.ib}.11`],
  ['g11', `${A.ib}.1`],
  ['out', `${B.ib}.11`],
  ['k11', `${B.ib}.100`],
] as const;

/** Sends on all flows without a pause while `act` runs. @returns packets sent, and what did not come back */
async function under(act: () => Promise<unknown>) {
  const streams: Stream[] = [];
  for (const protocol of ['tcp', 'udp'] as const) {
    for (const [from, to] of FLOWS) streams.push(await lab.stream(protocol, from, to));
  }
  // The first packet of UDP makes the flow.
  await Promise.all(streams.map((stream) => stream.exchange()));
  const before = await retransmissions();
  let running = true;
  let echoes = 0;
  const lost: string[] = [];
  const pump = async (stream: Stream, index: number): Promise<void> => {
    while (running) {
      const answer = await stream.exchange({ timeout: 2_000 });
      if (answer === 'alive' || answer.includes(' > ')) echoes += 1;
      else lost.push(`${index < FLOWS.length ? 'tcp' : 'udp'} ${FLOWS[index % FLOWS.length]?.join(' > ')}: ${answer}`);
    }
  };
  const pumps = Promise.all(streams.map(pump));
  try {
    await act();
  } finally {
    running = false;
    await pumps;
  }
  const retransmitted = (await retransmissions()) - before;
  await Promise.all(streams.map((stream) => stream.close()));
  return { echoes, lost, retransmitted };
}

async function undisturbed(act: () => Promise<unknown>): Promise<void> {
  const { echoes, lost, retransmitted } = await under(act);
  expect({ lost, retransmitted }).toEqual({ lost: [], retransmitted: 0 });
  expect(echoes).toBeGreaterThan(200);
}

/** New connections of what was mapped in the beginning, on every path. */
async function expectWhole(): Promise<void> {
  const paths = [
    ['out', `${A.ib}.11`, `g11: ${A.ib}.100 > ${A.guest}.11`],
    ['g11', `${A.ib}.100`, `out: ${A.ib}.11 > ${A.ib}.100`],
    ['g11', `${A.ib}.12`, `g12: ${A.ib}.11 > ${A.guest}.12`],
    ['g12', `${A.ib}.12`, `g12: ${A.ib}.12 > ${A.guest}.12`],
    ['h1', `${A.ib}.11`, `g11: ${A.ib}.1 > ${A.guest}.11`],
    ['g11', `${A.ib}.1`, `h1: ${A.ib}.11 > ${A.ib}.1`],
    ['out', `${B.ib}.11`, `k11: ${B.ib}.100 > ${B.guest}.11`],
    ['k11', `${B.ib}.100`, `out: ${B.ib}.11 > ${B.ib}.100`],
  ] as const;
  const seen = await Promise.all(paths.map(([from, to]) => lab.reachAll(from, to)));
  expect(seen).toEqual(paths.map(([, , expected]) => expected));
}

/** Networks do not mix, and a guest without a mapping does not get out. */
async function expectApart(...more: readonly (readonly [string, string])[]): Promise<void> {
  const tries = [
    ['g11', `${B.ib}.100`],
    ['g11', `${B.ib}.11`],
    ['g11', `${B.guest}.11`],
    ['k11', `${A.ib}.100`],
    ['k11', `${A.ib}.11`],
    ['k11', `${A.guest}.11`],
    ['g14', `${A.ib}.100`],
    ['g14', `${A.ib}.11`],
    ['k12', `${B.ib}.100`],
    ...more,
  ] as const;
  const seen = await Promise.all(tries.map(([from, to]) => lab.reachAll(from, to, SILENCE)));
  expect(seen).toEqual(tries.map(() => 'timeout'));
}

const range = (net: string, first: number, last: number): string => `${net}.${first}-${net}.${last}`;
const CHANGES: readonly (readonly [string, readonly NetworkText[], readonly number[]])[] = [
  ['a range grows', [{ ...FIRST, guests: range(A.guest, 11, 29), addresses: range(A.ib, 11, 29) }, SECOND], []],
  [
    'a range shrinks, and a running guest falls out',
    [{ ...FIRST, guests: range(A.guest, 12, 19), addresses: range(A.ib, 12, 19) }, SECOND],
    [11],
  ],
  ['the IB addresses of a range move', [{ ...FIRST, addresses: range(A.ib, 111, 119) }, SECOND], [11, 12]],
  [
    'both ranges move away',
    [{ ...FIRST, guests: range(A.guest, 13, 19), addresses: range(A.ib, 113, 119) }, SECOND],
    [11, 12],
  ],
  ['a network is removed', [SECOND], [11, 12]],
  ['the other network is removed', [FIRST], [21]],
  ['a network gets another name', [{ ...FIRST, name: 'renamed' }, SECOND], []],
  [
    'a network gets another bridge',
    [{ ...FIRST, bridge: 'virbr9', guests: range(A.guest, 12, 19), addresses: range(A.ib, 12, 19) }, SECOND],
    [11, 12],
  ],
  [
    'a network gets the link of the other, which is gone',
    [{ ...FIRST, device: 'ib1', addresses: range(B.ib, 111, 119) }],
    [11, 12, 21],
  ],
  [
    'two networks change their links',
    [
      { ...FIRST, device: 'ib1', addresses: range(B.ib, 111, 119) },
      { ...SECOND, device: 'ib0', addresses: range(A.ib, 111, 119) },
    ],
    [11, 12, 21],
  ],
];

describe.each(CHANGES)('%s', (_, networks, outdated) => {
  const checked = async (): Promise<void> => {
    await expectWhole();
    await expectApart();
    const found = await status();
    expect([...new Set(found.outdated.map(({ vm }) => vm))].sort()).toEqual([...outdated].sort());
    // Bridges that are not there are what the test took away, no fault of the change.
    expect(found.drift.filter(({ part }) => part !== 'mtu')).toEqual([]);
  };

  test('and reconcile follows', async () => {
    await undisturbed(async () => {
      configure(...networks);
      await done('reconcile');
      await done('reconcile');
    });
    await checked();
  });

  test('and a deploy comes before reconcile', async () => {
    const before = await table();
    await undisturbed(async () => {
      configure(...networks);
      const [network] = networks;
      const isFirst = network?.guests.startsWith(A.guest) === true;
      if (network?.bridge === 'virbr9')
        await lab.exec('h1', ['/usr/sbin/ip', 'link', 'add', 'virbr9', 'type', 'bridge']);
      runs(11, 12, 21, 13);
      await add(13, isFirst ? A : B, 13);
    });
    expect(await table()).not.toBe(before);
    await checked();
    await undisturbed(() => done('reconcile'));
    await checked();
  });

  test('and back', async () => {
    configure(...networks);
    await done('reconcile');
    await undisturbed(async () => {
      configure(FIRST, SECOND);
      await done('reconcile');
    });
    await checked.call(undefined).catch(() => undefined);
    await expectWhole();
    await expectApart();
    expect(await status()).toMatchObject({ ok: true, outdated: [] });
  });

  test('and its last VM ends: nothing of the older configuration is left', async () => {
    configure(...networks);
    await done('reconcile');
    runs();
    await done('reconcile');
    const left = await table();
    rmSync(join(folder, 'state'), { recursive: true });
    await lab.exec('h1', ['/usr/sbin/nft', 'delete', 'table', 'ip', 'kvm_ib']);
    await done('reconcile');
    // Chains are listed in the order of their making, and members of anonymous sets in the kernel's.
    const plain = (text: string): readonly string[] =>
      text
        .split('\n')
        .map((line) => line.replace(/\{ [^{}]* \}/g, (set) => [...set].sort().join('')))
        .sort();
    expect(plain(left)).toEqual(plain(await table()));
  });
});

describe('other changes', () => {
  test('a table of an earlier version, which did not count, gets the rules of this one', async () => {
    const spec = lab.spec('h1');
    const earlier = ruleset(spec).flatMap((command): readonly Command[] => {
      if (!('add' in command)) return [command];
      if ('set' in command.add && COUNTING.includes(command.add.set.name)) {
        const { family, table: of, name } = command.add.set;
        return [{ delete: { set: { family, table: of, name } } }];
      }
      if (!('rule' in command.add)) return [command];
      return command.add.rule.comment?.startsWith('counts') === true ? [] : [command];
    });
    await lab.nft('h1').run(transaction(...earlier));
    expect(await table()).not.toContain('guest_sent');
    await expectWhole();
    await undisturbed(() => done('reconcile'));
    expect(await table()).toContain('ip saddr @guest_sent');
    await expectWhole();
    await expectApart();
    expect(await table()).toMatch(/set guest_sent \{[^}]*192\.168\.122\.11 counter packets [1-9]/);
    expect((await status()).drift).toEqual([]);
  });

  test('isolation goes off and comes back on', async () => {
    await undisturbed(async () => {
      configure({ ...FIRST, isolate: false }, SECOND);
      await done('reconcile');
    });
    await expectWhole();
    expect(await lab.reachAll('g11', `${B.ib}.100`, SILENCE)).toBe('timeout');
    await undisturbed(async () => {
      configure(FIRST, SECOND);
      await done('reconcile');
    });
    await expectWhole();
    await expectApart();
  });

  test('a guest of the new configuration keeps apart from those of the older one, though they share a bridge', async () => {
    configure(
      { ...FIRST, device: 'ib1', addresses: range(B.ib, 111, 119) },
      { ...SECOND, device: 'ib0', addresses: range(A.ib, 111, 119) },
    );
    runs(11, 12, 21, 13);
    await add(13, A, 13);
    const works = [
      ['out', `${B.ib}.113`, `g13: ${B.ib}.100 > ${A.guest}.13`],
      ['g13', `${B.ib}.100`, `out: ${B.ib}.113 > ${B.ib}.100`],
      ['g13', `${B.ib}.1`, `h1: ${B.ib}.113 > ${B.ib}.1`],
      ['g13', `${B.ib}.113`, `g13: ${B.ib}.113 > ${A.guest}.13`],
      ['h1', `${B.ib}.113`, `g13: ${B.ib}.1 > ${A.guest}.13`],
      // On one fabric, whatever the bridge.
      ['k11', `${B.ib}.113`, `g13: ${B.ib}.11 > ${A.guest}.13`],
      ['g13', `${B.ib}.11`, `k11: ${B.ib}.113 > ${B.guest}.11`],
    ] as const;
    expect(await Promise.all(works.map(([from, to]) => lab.reachAll(from, to)))).toEqual(works.map(([, , w]) => w));
    await expectWhole();
    await expectApart(
      ['g13', `${A.ib}.100`],
      ['g13', `${A.ib}.11`],
      ['g13', `${A.ib}.1`],
      ['g11', `${B.ib}.113`],
      ['g11', `${B.ib}.1`],
      ['g13', `${B.guest}.11`],
    );
    const guests = [await lab.capture('h1', 'vnet11'), await lab.capture('h1', 'vnet13')];
    for (const link of ['ib0', 'ib1']) {
      const route = [`${link === 'ib0' ? B.ib : A.ib}.${link === 'ib0' ? 113 : 11}/32`, 'dev', link] as const;
      await lab.exec('out', ['/usr/sbin/ip', 'route', 'add', ...route, 'via', `${link === 'ib0' ? A.ib : B.ib}.1`]);
    }
    expect(await lab.reachAll('out', `${B.ib}.113`, SILENCE)).toBe('timeout');
    expect(await lab.reachAll('out', `${A.ib}.11`, SILENCE)).toBe('timeout');
    const arrived = (await Promise.all(guests.map((capture) => capture.stop()))).flat();
    expect(arrived.filter(({ source }) => source.endsWith('.100'))).toEqual([]);
  });

  test('a network that was not isolated is not isolated either after its removal', async () => {
    configure(FIRST, { ...SECOND, isolate: false });
    await done('reconcile');
    expect(await table()).not.toContain('sender_ib-b');
    configure(FIRST);
    await done('reconcile');
    expect(await table()).not.toContain('sender_ib-b');
    expect(await table()).toContain('virbr2');
  });

  test('a new network takes an address that a running VM still has: refused, and both are named', async () => {
    configure(FIRST, { ...SECOND, guests: range(B.guest, 11, 12), addresses: range(B.ib, 10, 11) });
    runs(11, 12, 21, 22);
    const result = await kvmIb('add', '--vm', '22', '--nic', '0', '--guest', `${B.guest}.12`, '--mac', macOf(B, 12));
    expect(result.status).toBe(4);
    expect(result.stderr).toContain(`Cannot give ${B.ib}.11 to vm-22`);
    expect(result.stderr).toContain('vm-21 has it');
  });

  test('the next action of the VM brings it to the new configuration, and status says what it will be', async () => {
    configure({ ...FIRST, addresses: range(A.ib, 111, 119) }, SECOND);
    await done('reconcile');
    expect(await status()).toMatchObject({
      ok: true,
      outdated: [
        { vm: 11, nic: 0, guest: `${A.guest}.11`, address: `${A.ib}.11`, now: { address: `${A.ib}.111` }, why: null },
        { vm: 12, now: { address: `${A.ib}.112` } },
      ],
    });
    const { stdout } = await kvmIb('status');
    expect(stdout).toContain(`configured now: ${A.ib}.111 on ib0, virbr1`);
    expect(stdout).toContain('at the next reboot, reset or power cycle of VM 11');
    await add(11, A, 11);
    expect((await status()).outdated).toMatchObject([{ vm: 12 }]);
    expect(await lab.reachAll('out', `${A.ib}.111`)).toBe(`g11: ${A.ib}.100 > ${A.guest}.11`);
  });
});
