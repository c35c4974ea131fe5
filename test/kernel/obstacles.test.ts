/** Firewalls of others that cut our guests off are named, with the command that lets our packets pass. */
import { afterEach, beforeEach, expect, test } from 'vitest';
import { parseIpv4, parseLinkName } from '../../lib/core/address.ts';
import type { Exec, ExecResult } from '../../lib/core/exec.ts';
import type { Network } from '../../lib/core/mapping.ts';
import { exec } from '../../lib/host/exec.ts';
import { obstacles } from '../../lib/ops/obstacles.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const NETWORK: Network = {
  name: 'ib',
  device: parseLinkName('ib0'),
  bridge: parseLinkName('virbr1'),
  guests: { first: parseIpv4('192.168.122.2'), last: parseIpv4('192.168.122.6') },
  addresses: { first: parseIpv4('192.168.10.202'), last: parseIpv4('192.168.10.206') },
  isolate: true,
};

async function run(argv: readonly [string, ...string[]], input?: string): Promise<void> {
  const result = await exec(argv, input === undefined ? {} : { input });
  if (result.status !== 0) throw new Error(`${argv.join(' ')}: ${result.stderr}`);
}

const nft = (text: string) => run(['/usr/sbin/nft', '-f', '-'], text);
const clean = () => nft('flush ruleset');
beforeEach(clean);
afterEach(clean);

test('a host without other firewalls has none', async () => {
  expect(await obstacles(exec, [NETWORK], [])).toEqual([]);
});

test('a forward chain of nft that drops by policy is named, with the rule to insert', async () => {
  await nft('table inet site {\n chain pass {\n type filter hook forward priority 0; policy drop;\n }\n}\n');
  const [finding, ...more] = await obstacles(exec, [NETWORK], []);
  expect(more).toEqual([]);
  expect(finding).toMatchObject({ level: 'warning', network: 'ib' });
  expect(finding?.what).toContain('chain pass of table inet site');
  expect(finding?.fix).toContain('nft insert rule inet site pass iifname virbr1 oifname ib0 accept');
  expect(finding?.fix).toContain('nft insert rule inet site pass iifname ib0 oifname virbr1 accept');
});

test.each(['iptables-nft', 'iptables-legacy'])('the FORWARD policy of %s is named', async (program) => {
  const tables = program === 'iptables-legacy' ? ['nat', 'filter'] : [];
  await run([`/usr/sbin/${program}`, '-P', 'FORWARD', 'DROP']);
  const found = await obstacles(exec, [NETWORK], tables);
  await run([`/usr/sbin/${program}`, '-P', 'FORWARD', 'ACCEPT']);
  expect(found.map((one) => one.what)).toEqual([expect.stringContaining('chain FORWARD of iptables')]);
  expect(found[0]?.fix).toContain('-I FORWARD -i virbr1 -o ib0 -j ACCEPT');
  expect(await obstacles(exec, [NETWORK], tables)).toEqual([]);
});

test('chains that accept, and drops elsewhere than in forward, are none', async () => {
  await nft(
    'table ip a {\n chain f {\n type filter hook forward priority 0; policy accept;\n }\n chain i {\n type filter hook input priority 0; policy drop;\n }\n}\n',
  );
  expect(await obstacles(exec, [NETWORK], [])).toEqual([]);
});

test.each([
  ["<network><name>n</name><bridge name='virbr1' stp='on'/></network>", 'isolated'],
  ["<network><name>n</name><forward mode='nat'><nat/></forward><bridge name='virbr1'/></network>", 'nat'],
  ["<network><name>n</name><forward mode='open'/><bridge name='virbr1'/></network>", undefined],
  ["<network><name>n</name><bridge name='virbr7'/></network>", undefined],
])('a libvirt network %s on the bridge is judged by its forward mode', async (xml, mode) => {
  const fake: Exec = async (argv): Promise<ExecResult> => {
    const stdout = argv.includes('net-list') ? 'n\n\n' : argv.includes('net-dumpxml') ? xml : '';
    return { status: stdout === '' ? 1 : 0, signal: null, stdout, stderr: '' };
  };
  const found = await obstacles(fake, [NETWORK], []);
  expect(found.map((one) => [one.level, one.what])).toEqual(
    mode === undefined ? [] : [['error', `the libvirt network n on virbr1 has forward mode ${mode}`]],
  );
});

test('a program that crashes or prints nonsense is no finding and no failure', async () => {
  const fake: Exec = async () => ({ status: 0, signal: null, stdout: '{"nftables": [', stderr: '' });
  expect(await obstacles(fake, [NETWORK], ['filter'])).toEqual([]);
});
