/** The switch from old iptables rules to our table and back, on a hypervisor of the lab, with the real command. */
import { rmSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { ImportReport } from '../../lib/import/report.ts';
import { temporaryDirectory } from '../support/fake-host.ts';
import { createLab, type Lab, type Stream } from '../support/lab.ts';
import { requireOwnNetns } from '../support/netns.ts';
import {
  CONFIG,
  createOldHost,
  GUESTS,
  IB,
  type OldHost,
  type OldHostOptions,
  pairRules,
  withForeign,
} from '../support/old-deployment.ts';

requireOwnNetns();

const ACCEPT = 'inbound/other-link,inbound/guest-address,host,loopback';
const ALIASES = [11, 12, 13].map((n) => `${IB}.${n}/24 brd + dev ib0 label ib0:${n}`);

let lab: Lab;
let folder: string;
beforeEach(async () => {
  folder = temporaryDirectory();
  lab = await createLab({ guests: { h1: [11, 12, 13, 14] }, foreign: true });
  await lab.sysctl('h1', 'net.bridge.bridge-nf-call-iptables', 0);
});
afterEach(async () => {
  await lab?.close();
  rmSync(folder, { recursive: true, force: true });
});

const old = (options: Partial<OldHostOptions> = {}): Promise<OldHost> =>
  createOldHost(lab, folder, {
    variant: 'legacy',
    rules: withForeign(11, 12, 13),
    addresses: ALIASES,
    vms: [11, 12],
    ...options,
  });

async function done(host: OldHost, ...args: readonly string[]): Promise<string> {
  const result = await host.kvmIb(...args);
  expect(result, result.stdout + result.stderr).toMatchObject({ status: 0 });
  return result.stdout;
}

async function refused(host: OldHost, status: number, ...args: readonly string[]): Promise<string> {
  const result = await host.kvmIb(...args);
  expect(result, result.stdout + result.stderr).toMatchObject({ status });
  return result.stderr;
}

async function reportOf(host: OldHost): Promise<ImportReport> {
  return (JSON.parse(await done(host, 'import', '--json')) as { report: ImportReport }).report;
}

const foreignOnly = (rules: readonly string[]): readonly string[] =>
  rules.filter((rule) => ![11, 12, 13].some((n) => rule.includes(`${IB}.${n}`)));

/** New connections as our table makes them. */
async function expectOurs(): Promise<void> {
  const paths = [
    ['out', `${IB}.11`, `g11: ${IB}.100 > ${GUESTS}.11`],
    ['g11', `${IB}.100`, `out: ${IB}.11 > ${IB}.100`],
    ['g11', `${IB}.12`, `g12: ${IB}.11 > ${GUESTS}.12`],
    ['h1', `${IB}.13`, `g13: ${IB}.1 > ${GUESTS}.13`],
  ] as const;
  const seen = await Promise.all(paths.map(([from, to]) => lab.reachAll(from, to)));
  expect(seen).toEqual(paths.map(([, , expected]) => expected));
}

describe.each(['legacy', 'nft'] as const)('iptables-%s', (variant) => {
  test('goes over: pairs and aliases are ours, rules of others keep place and order; and back', async () => {
    const host = await old({ variant });
    const before = { nat: await host.nat(), addresses: await host.addresses() };
    const report = await reportOf(host);
    expect(report.pairs.map(({ guest, owner }) => [guest, owner])).toEqual([
      [`${GUESTS}.11`, { kind: 'vm', vm: 11 }],
      [`${GUESTS}.12`, { kind: 'vm', vm: 12 }],
      [`${GUESTS}.13`, { kind: 'manual', guest: `${GUESTS}.13` }],
    ]);
    expect({ nat: await host.nat(), addresses: await host.addresses() }).toEqual(before);

    expect(await refused(host, 4, 'import', '--apply')).toContain('--accept');
    expect({ nat: await host.nat(), addresses: await host.addresses() }).toEqual(before);

    await done(host, 'import', '--apply', '--accept', ACCEPT);
    expect(await host.nat()).toEqual(foreignOnly(before.nat));
    expect(await host.addresses()).toEqual([
      before.addresses[0],
      `${IB}.11/32 ib0:11-0`,
      `${IB}.12/32 ib0:12-0`,
      `${IB}.13/32 kib:s2`,
    ]);
    expect(await done(host, 'status')).toContain('OK: 3 mappings');
    await expectOurs();
    expect(await done(host, 'import', '--apply')).toContain('Nothing to import');

    await done(host, 'import', '--rollback');
    expect({ nat: await host.nat(), addresses: await host.addresses() }).toEqual(before);
    expect(await lab.nft('h1').listTable('ip', 'kvm_ib')).toBeUndefined();
    expect(await refused(host, 4, 'reconcile')).toContain('rolled back');
    expect(await lab.reachAll('out', `${IB}.11`)).toBe(`g11: ${IB}.100 > ${GUESTS}.11`);
  });

  test('ten times over and back: streams lose nothing', { timeout: 240_000 }, async () => {
    const host = await old({ variant });
    const before = { nat: await host.nat(), addresses: await host.addresses() };
    const control = await under(() => new Promise((resolve) => setTimeout(resolve, 3_000)));
    const switched = await under(async () => {
      for (let round = 0; round < 10; round++) {
        await done(host, 'import', '--apply', '--accept', ACCEPT);
        await done(host, 'import', '--rollback');
      }
    });
    process.stdout.write(`iptables-${variant}: ${JSON.stringify({ control, switched })}\n`);
    expect(control).toMatchObject({ lost: [] });
    expect(switched).toMatchObject({ lost: [] });
    expect(switched.retransmitted).toBeLessThanOrEqual(control.retransmitted);
    expect(switched.echoes).toBeGreaterThan(1_000);
    expect({ nat: await host.nat(), addresses: await host.addresses() }).toEqual(before);
  });
});

const FLOWS = [
  ['out', `${IB}.11`],
  ['out', `${IB}.12`],
  ['g11', `${IB}.100`],
  ['g12', `${IB}.100`],
  ['g13', `${IB}.100`],
] as const;

async function retransmissions(): Promise<number> {
  let sum = 0;
  for (const name of ['out', 'g11', 'g12', 'g13']) {
    const [names = [], values = []] = (await lab.exec(name, ['/bin/cat', '/proc/net/snmp']))
      .split('\n')
      .filter((line) => line.startsWith('Tcp:'))
      .map((line) => line.split(' '));
    sum += Number(values[names.indexOf('RetransSegs')]);
  }
  return sum;
}

/** Sends on all flows without a pause while `act` runs. */
async function under(act: () => Promise<unknown>) {
  const streams: (readonly [string, Stream])[] = [];
  for (const protocol of ['tcp', 'udp'] as const) {
    for (const [from, to] of FLOWS) streams.push([`${protocol} ${from} > ${to}`, await lab.stream(protocol, from, to)]);
  }
  await Promise.all(streams.map(([, stream]) => stream.exchange()));
  const before = await retransmissions();
  let running = true;
  let echoes = 0;
  const lost: string[] = [];
  const pumps = Promise.all(
    streams.map(async ([name, stream]) => {
      while (running) {
        const answer = await stream.exchange({ timeout: 2_000 });
        if (answer === 'alive' || answer.includes(' > ')) echoes += 1;
        else lost.push(`${name}: ${answer}`);
      }
    }),
  );
  try {
    await act();
  } finally {
    running = false;
    await pumps;
  }
  const retransmitted = (await retransmissions()) - before;
  await Promise.all(streams.map(([, stream]) => stream.close()));
  return { echoes, lost, retransmitted };
}

void CONFIG;
void pairRules;
