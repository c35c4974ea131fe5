/** The switch from old iptables rules to our table and back, on a hypervisor of the lab, with the real command. */
import { spawn } from 'node:child_process';
import { cpSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
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
    const { stdout, stderr } = await host.kvmIb('status');
    expect(stderr).toContain('the old rules are in force');
    expect(stdout).not.toContain('kvm-ib reconcile');
    expect(await lab.reachAll('out', `${IB}.11`)).toBe(`g11: ${IB}.100 > ${GUESTS}.11`);
  });

  test('ten times over and back: streams lose nothing', { timeout: 240_000 }, async () => {
    // Aliases as wide as the subnet, or as ours are, which cannot stand beside.
    const same = [11, 12, 13].map((n) => `${IB}.${n}/32 dev ib0`);
    const host = await old({ variant, addresses: variant === 'legacy' ? ALIASES : same });
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

test.each([0, 1])(
  'flows between guests of the host and with the host itself live too, bridge-nf-call-iptables=%i',
  async (nf) => {
    await lab.sysctl('h1', 'net.bridge.bridge-nf-call-iptables', nf);
    const rules = [11, 12, 13].flatMap((n) => [
      `-A PREROUTING -d ${IB}.${n}/32 -j DNAT --to-destination ${GUESTS}.${n}`,
      `-A OUTPUT -d ${IB}.${n}/32 -j DNAT --to-destination ${GUESTS}.${n}`,
      `-A POSTROUTING -s ${GUESTS}.${n}/32 -j SNAT --to-source ${IB}.${n}`,
    ]);
    const host = await old({ rules });
    const flows = [...FLOWS, ['g11', `${IB}.12`], ['g12', `${IB}.13`], ['h1', `${IB}.11`], ['g13', `${IB}.1`]] as const;
    const { lost, retransmitted } = await under(async () => {
      for (let round = 0; round < 3; round++) {
        await done(host, 'import', '--apply', '--accept', `${ACCEPT},outbound/other-link`);
        await done(host, 'import', '--rollback');
      }
    }, flows);
    expect({ lost, retransmitted }).toEqual({ lost: [], retransmitted: 0 });
  },
);

test('a VM that ended since stays away at the way back; one that came since holds it up', async () => {
  const host = await old();
  const before = { nat: await host.nat(), addresses: await host.addresses() };
  await done(host, 'import', '--apply', '--accept', ACCEPT);
  await done(host, 'remove', '--vm', '11');
  await done(host, 'add', '--guest', `${GUESTS}.14`);
  expect(await refused(host, 4, 'import', '--rollback')).toContain(`kvm-ib remove --guest ${GUESTS}.14`);
  await done(host, 'remove', '--guest', `${GUESTS}.14`);
  expect(await done(host, 'import', '--rollback', '--dry-run')).toContain('Nothing was changed');
  expect(await done(host, 'import', '--rollback')).toContain(`not restored: ${GUESTS}.11 <-> ${IB}.11 of vm-11`);
  const isGone = (text: string): boolean => text.includes(`${IB}.11`);
  expect(await host.nat()).toEqual(before.nat.filter((rule) => !isGone(rule)));
  expect(await host.addresses()).toEqual(before.addresses.filter((address) => !isGone(address)));
  expect(await refused(host, 4, 'import', '--rollback')).toContain('rolled back already');
});

test('what others put into the chains meanwhile stays where it is, over and back', async () => {
  const host = await old();
  const before = await host.nat();
  await done(host, 'import', '--apply', '--accept', ACCEPT);
  const iptables = '/usr/sbin/iptables-legacy';
  await lab.exec('h1', [iptables, '-t', 'nat', '-I', 'PREROUTING', '1', '-i', 'eth9', '-j', 'ACCEPT']);
  await lab.exec('h1', [iptables, '-t', 'nat', '-A', 'POSTROUTING', '-o', 'eth8', '-j', 'ACCEPT']);
  await done(host, 'import', '--rollback');
  const now = await host.nat();
  expect(now.filter((rule) => before.includes(rule))).toEqual(before);
  expect(now).toHaveLength(before.length + 2);
  expect(now).toContain('-A PREROUTING -i eth9 -j ACCEPT');
  expect(now.at(-1)).toBe('-A POSTROUTING -o eth8 -j ACCEPT');
});

test('libvirt that is silent while guests run: nothing is taken for a manual mapping unless told so', async () => {
  const guest = join(folder, 'qemu-kvm');
  cpSync('/bin/sleep', guest);
  const qemu = spawn('/usr/sbin/ip', ['netns', 'exec', 'h1', guest, '60'], { stdio: 'ignore' });
  try {
    const host = await old({ libvirt: false });
    const before = await host.nat();
    expect(await refused(host, 4, 'import', '--apply', '--accept', ACCEPT)).toContain('--manual');
    expect(await host.nat()).toEqual(before);
    await done(host, 'import', '--apply', '--manual', '--accept', ACCEPT);
    expect(JSON.parse(await done(host, 'list', '--json'))).toMatchObject([{ owner: 'manual' }, {}, {}]);
  } finally {
    qemu.kill();
  }
});

test('a pair without an alias gets one, unless another host has the address', async () => {
  const host = await old({ addresses: ALIASES.slice(0, 2), probeMs: 1000 });
  await lab.exec('out', ['/usr/sbin/ip', 'address', 'add', `${IB}.13/24`, 'dev', 'ib0']);
  const before = { nat: await host.nat(), addresses: await host.addresses() };
  const accept = `${ACCEPT},inbound/fabric@${IB}.13`;
  expect(await refused(host, 4, 'import', '--apply', '--accept', accept)).toContain(`${IB}.13`);
  expect({ nat: await host.nat(), addresses: await host.addresses() }).toEqual(before);
  await lab.exec('out', ['/usr/sbin/ip', 'address', 'delete', `${IB}.13/24`, 'dev', 'ib0']);
  await done(host, 'import', '--apply', '--accept', accept);
  expect(await lab.reachAll('out', `${IB}.13`)).toBe(`g13: ${IB}.100 > ${GUESTS}.13`);
});

test("the host's only address of the fabric is no alias to take", async () => {
  const host = await old();
  await lab.exec('h1', ['/usr/sbin/ip', 'address', 'flush', 'dev', 'ib0']);
  await lab.exec('h1', ['/usr/sbin/ip', 'address', 'add', `${IB}.11/24`, 'dev', 'ib0']);
  const { conflicts } = await reportOf(host);
  expect(conflicts).toMatchObject([
    { guest: `${GUESTS}.11`, why: expect.stringContaining('its route to the fabric') as unknown },
  ]);
});

test('both parts of iptables at once, aliases on another link and as /32', async () => {
  const addresses = [`${IB}.11/32 dev ib0 label ib0:x`, `${IB}.12/32 dev lo label lo:12`];
  const host = await old({ rules: pairRules(11), addresses });
  await lab.exec('h1', ['/usr/sbin/iptables-nft-restore'], {
    input: ['*nat', ...pairRules(12), 'COMMIT', ''].join('\n'),
  });
  const nft = async (): Promise<readonly string[]> =>
    (await lab.exec('h1', ['/usr/sbin/iptables-nft-save'])).split('\n').filter((line) => line.startsWith('-A'));
  const loopback = (): Promise<string> => lab.exec('h1', ['/usr/sbin/ip', '-4', 'address', 'show', 'dev', 'lo']);
  const before = [await host.nat(), await nft(), await host.addresses()];
  await done(host, 'import', '--apply', '--accept', ACCEPT);
  expect([await host.nat(), await nft()]).toEqual([[], []]);
  expect((await host.addresses()).slice(1)).toEqual([`${IB}.11/32 ib0:11-0`, `${IB}.12/32 ib0:12-0`]);
  expect(await loopback()).not.toContain(`${IB}.12`);
  expect(await lab.reachAll('out', `${IB}.12`)).toBe(`g12: ${IB}.100 > ${GUESTS}.12`);
  await done(host, 'import', '--rollback');
  expect([await host.nat(), await nft(), await host.addresses()]).toEqual(before);
  expect(await loopback()).toContain(`${IB}.12/32 scope global lo:12`);
});

/** As somebody lays them by hand, beside what is there. */
async function lay(...numbers: readonly number[]): Promise<void> {
  const input = ['*nat', ...numbers.flatMap(pairRules), 'COMMIT', ''].join('\n');
  await lab.exec('h1', ['/usr/sbin/iptables-legacy-restore', '--noflush'], { input });
  for (const n of numbers) {
    const address = ['address', 'add', `${IB}.${n}/24`, 'dev', 'ib0', 'label', `ib0:${n}`];
    await lab.exec('h1', ['/usr/sbin/ip', ...address]);
  }
}

test('beside mappings of kvm-ib: they stay, and so does the table at the way back', async () => {
  const host = await old({ rules: [], addresses: [] });
  await done(host, 'add', '--guest', `${GUESTS}.13`);
  await lay(11, 12);
  const before = { nat: await host.nat(), addresses: await host.addresses() };
  await done(host, 'import', '--apply', '--accept', `${ACCEPT},outbound,inbound`);
  await expectOurs();
  await done(host, 'import', '--rollback');
  expect({ nat: await host.nat(), addresses: await host.addresses() }).toEqual(before);
  expect(JSON.parse(await done(host, 'list', '--json'))).toMatchObject([{ guest: `${GUESTS}.13` }]);
  expect(await lab.reachAll('out', `${IB}.13`)).toBe(`g13: ${IB}.100 > ${GUESTS}.13`);
  // kvm-ib was in service before, and is.
  await done(host, 'reconcile');
  expect(await done(host, 'status')).toContain('OK: 1 mapping');
});

test('one import after another: each goes back by itself, the last first', async () => {
  const host = await old({ rules: withForeign(11, 12), addresses: ALIASES.slice(0, 2) });
  const first = { nat: await host.nat(), addresses: await host.addresses() };
  await done(host, 'import', '--apply', '--accept', ACCEPT);
  await lay(13);
  const second = { nat: await host.nat(), addresses: await host.addresses() };
  await done(host, 'import', '--apply', '--accept', `${ACCEPT},inbound,outbound`);
  expect(await done(host, 'status')).toContain('OK: 3 mappings');
  await done(host, 'import', '--rollback');
  expect({ nat: await host.nat(), addresses: await host.addresses() }).toEqual(second);
  await done(host, 'reconcile');
  expect((await host.kvmIb('status')).stdout).toContain('OK: 2 mappings');
  await lab.exec('h1', [
    '/usr/sbin/iptables-legacy',
    '-t',
    'nat',
    '-D',
    ...(pairRules(13)[0] ?? '').split(' ').slice(1),
  ]);
  await lab.exec('h1', [
    '/usr/sbin/iptables-legacy',
    '-t',
    'nat',
    '-D',
    ...(pairRules(13)[1] ?? '').split(' ').slice(1),
  ]);
  await lab.exec('h1', ['/usr/sbin/ip', 'address', 'delete', `${IB}.13/24`, 'dev', 'ib0']);
  await done(host, 'import', '--rollback');
  expect({ nat: await host.nat(), addresses: await host.addresses() }).toEqual(first);
  expect(await refused(host, 4, 'import', '--rollback')).toContain('rolled back already');
});

test('where the table never was, nothing loads it over old rules', async () => {
  const host = await old();
  for (const args of [['reconcile'], ['add', '--guest', `${GUESTS}.14`]]) {
    expect(await refused(host, 4, ...args)).toContain('rules of iptables translate 3 guests still');
  }
  expect(await lab.nft('h1').listTable('ip', 'kvm_ib')).toBeUndefined();
});

test("an alias without a pair stays; the host's own address in the range holds the switch up before it begins", async () => {
  const host = await old();
  await lab.exec('h1', ['/usr/sbin/ip', 'address', 'add', `${IB}.15/24`, 'dev', 'ib0']);
  await lab.exec('h1', ['/usr/sbin/ip', 'address', 'add', `${IB}.16/32`, 'dev', 'ib0']);
  const spare = ((await reportOf(host)).aliases ?? []).filter(({ guest }) => guest === null);
  expect(spare.map(({ address }) => address).sort()).toEqual([`${IB}.15`, `${IB}.16`]);
  await done(host, 'import', '--apply', '--accept', ACCEPT);
  expect(await done(host, 'status')).toContain('OK: 3 mappings');
  const now = await host.addresses();
  for (const one of [`${IB}.15/24 ib0`, `${IB}.16/32 ib0`]) expect(now).toContain(one);
  await done(host, 'import', '--rollback');

  await lab.exec('h1', ['/usr/sbin/ip', 'address', 'add', `${IB}.17/25`, 'dev', 'ib0']);
  const before = { nat: await host.nat(), addresses: await host.addresses() };
  expect(await refused(host, 4, 'import', '--apply', '--accept', ACCEPT)).toContain(`${IB}.17`);
  expect({ nat: await host.nat(), addresses: await host.addresses() }).toEqual(before);
});

test('a guest outside the ranges, but on the bridge, counts: our guards would cut it off', async () => {
  const host = await old({ rules: withForeign(11, 25), addresses: [ALIASES[0] ?? '', `${IB}.25/24 dev ib0`] });
  const { comparisons, left } = await reportOf(host);
  expect(left.filter(({ rule }) => rule.includes(`${GUESTS}.25`))).toHaveLength(2);
  const differing = comparisons.filter(({ same, guest }) => !same && guest === `${GUESTS}.25`);
  expect(differing.map((one) => one.case)).toEqual(['inbound/fabric', 'outbound/fabric']);
  const error = await refused(host, 4, 'import', '--apply', '--accept', ACCEPT);
  expect(error).toContain(`outbound/fabric@${IB}.25`);
  expect(await refused(host, 2, 'import', '--apply', '--accept', `host@${IB}.77`)).toContain(
    'no comparison is of that',
  );
});

test('bridge and ports are as before after the way back', async () => {
  await lab.sysctl('h1', 'net.bridge.bridge-nf-call-iptables', 1);
  await lab.exec('h1', ['/usr/sbin/ip', 'link', 'set', 'virbr1', 'mtu', '1400']);
  const ports = async (): Promise<string> =>
    (await lab.exec('h1', ['/usr/sbin/bridge', '-d', 'link', 'show'])).replace(/^.*?(?=hairpin)/gm, '') +
    (await lab.exec('h1', ['/bin/cat', '/sys/class/net/virbr1/mtu']));
  const host = await old();
  const before = await ports();
  const plan = await done(host, 'import', '--dry-run');
  for (const line of ['~ mtu       virbr1 1400 -> 65520', '~ hairpin   vnet11 on virbr1 off -> on']) {
    expect(plan).toContain(`${line}\n`);
  }
  await done(host, 'import', '--apply', '--accept', ACCEPT);
  expect(await ports()).not.toBe(before);
  await done(host, 'import', '--rollback');
  expect(await ports()).toBe(before);
});

test('stopped half-way, every command says how to go on, and nothing else is advised', async () => {
  const host = await old();
  // As one that was killed in the middle: it is done but for its end and one alias.
  await done(host, 'import', '--apply', '--accept', ACCEPT);
  writeFileSync(join(folder, 'state/import/phase'), 'switching\n');
  await lab.exec('h1', ['/usr/sbin/ip', 'address', 'delete', `${IB}.11/32`, 'dev', 'ib0']);
  const { stdout, stderr } = await host.kvmIb('import');
  expect(stderr).toContain('an import was stopped half-way');
  expect(stdout).not.toContain('To go over');
  expect(await refused(host, 4, 'add', '--guest', `${GUESTS}.14`)).toContain('kvm-ib import --resume');
  const status = JSON.parse((await host.kvmIb('status', '--json')).stdout) as { drift: readonly { fix: string }[] };
  expect(status.drift.length).toBeGreaterThan(0);
  for (const { fix } of status.drift) expect(fix).toContain('kvm-ib import --resume');
  await done(host, 'import', '--resume');
  expect(await done(host, 'status')).toContain('OK: 3 mappings');
});

test('a dry run that would be refused is one document, and tells how the command was called', async () => {
  const host = await old();
  const { status, stdout } = await host.kvmIb('import', '--apply', '--dry-run', '--json');
  expect(status).toBe(4);
  const { refused: error } = JSON.parse(stdout) as { readonly refused: { readonly fix: string } };
  expect(error.fix).toMatch(/: node \S*kvm-ib\.mjs import --apply --accept inbound\/other-link,/);
  expect((await host.kvmIb('status')).stdout).toMatch(/kvm-ib import$/m);
});

test('two networks at once, each with its link, its bridge and its ranges', async () => {
  await lab.close();
  lab = await createLab({ guests: { h1: [11, 12] }, second: { h1: [11, 12] } });
  await lab.sysctl('h1', 'net.bridge.bridge-nf-call-iptables', 0);
  const inSecond = (text: string): string =>
    text.replaceAll(IB, '192.168.20').replaceAll(GUESTS, '192.168.123').replaceAll('ib0', 'ib1');
  const second = { ...CONFIG.networks[0], name: 'ib-b', device: 'ib1', bridge: 'virbr2' };
  const host = await old({
    rules: [11, 12].flatMap(pairRules).flatMap((rule) => [rule, inSecond(rule)]),
    addresses: ALIASES.slice(0, 2).flatMap((address) => [address, inSecond(address)]),
    config: {
      networks: [
        ...CONFIG.networks,
        { ...second, guests: '192.168.123.11-192.168.123.19', addresses: '192.168.20.11-192.168.20.19' },
      ],
    },
  });
  const before = await host.nat();
  const { pairs, comparisons } = await reportOf(host);
  expect(pairs.map(({ mapping }) => `${mapping.network} ${mapping.guest}`).sort()).toEqual([
    'ib 192.168.122.11',
    'ib 192.168.122.12',
    'ib-b 192.168.123.11',
    'ib-b 192.168.123.12',
  ]);
  // Before, the host routed from one network to the other; a guest's own source came along.
  const apart = [
    ['k11', `${IB}.11`, `g11: 192.168.123.11 > ${GUESTS}.11`],
    ['g11', '192.168.20.11', `k11: ${GUESTS}.11 > 192.168.123.11`],
  ] as const;
  for (const [from, to, seen] of apart) expect(await lab.reachAll(from, to)).toBe(seen);
  const mixed = comparisons.filter((one) => one.case === 'inbound/other-network');
  expect(mixed).toHaveLength(8);
  for (const one of mixed) expect([one.same, one.new]).toEqual([false, 'dropped']);
  expect(mixed[0]?.old).toBe(`reaches ${mixed[0]?.guest} from a guest of network ib-b`);
  await done(host, 'import', '--apply', '--accept', `${ACCEPT},inbound/other-network`);
  for (const [from, to] of apart) expect(await lab.reachAll(from, to, { timeout: 300 })).toBe('timeout');
  expect(await host.nat()).toEqual([]);
  expect(await done(host, 'status')).toContain('OK: 4 mappings');
  expect(await lab.reachAll('out', '192.168.20.11')).toBe('k11: 192.168.20.100 > 192.168.123.11');
  expect(await lab.reachAll('g11', `${IB}.12`)).toBe(`g12: ${IB}.11 > ${GUESTS}.12`);
  await done(host, 'import', '--rollback');
  expect(await host.nat()).toEqual(before);
  expect(await lab.reachAll('out', '192.168.20.11')).toBe('k11: 192.168.20.100 > 192.168.123.11');
});

test('killed by a signal at any time, then on and back: streams live', { timeout: 240_000 }, async () => {
  const host = await old();
  const before = { nat: await host.nat(), addresses: await host.addresses() };
  const result = await under(async () => {
    for (let round = 0; round < 20; round++) {
      await host.killed(150 + round * 12, 'import', '--apply', '--accept', ACCEPT);
      await host.kvmIb('import', '--resume');
      await host.killed(120 + round * 8, 'import', '--rollback');
      const rolled = await host.kvmIb('import', '--rollback');
      // 4: it was killed before it began, or had come to its end.
      expect([0, 4], rolled.stderr).toContain(rolled.status);
      expect({ nat: await host.nat(), addresses: await host.addresses() }).toEqual(before);
    }
  });
  expect(result).toMatchObject({ lost: [], retransmitted: 0 });
});

test('guests that old rules serve are named by config check; the dry run shows each step', async () => {
  const host = await old();
  expect((await host.kvmIb('config', 'check')).stdout).toContain('rules of iptables translate 3 guests');
  const text = await done(host, 'import', '--dry-run');
  for (const line of [
    `+ element   guest_to_ib ${GUESTS}.11 : ${IB}.11`,
    `+ alias     ${IB}.11/32 on ib0 (ib0:11-0)`,
    `- alias     ${IB}.11/24 on ib0 (ib0:11)`,
    `- rule      iptables-legacy -t nat ${pairRules(11)[0]}`,
    '+ table     ip kvm_ib',
    'Nothing was changed.',
  ]) {
    expect(text).toContain(`${line}\n`);
  }
});

test('where there is no pair there is nothing to import, whatever differs', async () => {
  const host = await old({ rules: pairRules(11).slice(1), addresses: [] });
  for (const more of [['--dry-run'], []]) await done(host, 'import', '--apply', ...more);
  expect(await done(host, 'import', '--apply')).toContain('Nothing to import');
  expect(await lab.nft('h1').listTable('ip', 'kvm_ib')).toBeUndefined();
});

test('what cannot be meant is refused, and changes nothing', async () => {
  const host = await old();
  expect(await refused(host, 2, 'import', '--apply', '/etc/hostname')).toContain('Cannot use --apply with files');
  expect(await refused(host, 2, 'import', '--apply', '--accept', 'everything')).toContain('Cannot accept "everything"');
  expect(await refused(host, 2, 'import', '/etc/hostname')).toContain('neither what iptables-save prints');
  expect(await refused(host, 2, 'import', '/etc')).toContain('it is a directory');
  expect(await refused(host, 2, 'import', '/nowhere')).toContain('it is not there');
  expect(await refused(host, 2, 'import', '/bin/true')).toContain('it is not a text');
  expect(await refused(host, 2, 'import', '--apply', '--accept', 'host', 'loopback')).toContain(
    '--accept host,loopback',
  );
  expect(await refused(host, 4, 'import', '--resume')).toContain('there was none');
  expect(await refused(host, 4, 'import', '--rollback')).toContain('there was none');
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
async function under(act: () => Promise<unknown>, flows: readonly (readonly [string, string])[] = FLOWS) {
  const streams: (readonly [string, Stream])[] = [];
  for (const protocol of ['tcp', 'udp'] as const) {
    for (const [from, to] of flows) streams.push([`${protocol} ${from} > ${to}`, await lab.stream(protocol, from, to)]);
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
