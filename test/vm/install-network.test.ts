/**
 * `kvm-ib install host` and Debian's own libvirtd: the network of the guests' bridge is made once, left alone when it is
 * somebody else's, and taken away again unless a guest is on it. /etc, /usr and /var are copy-on-write layers.
 */
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { requireOwnNetns } from '../support/netns.ts';
import type { Host, Libvirt } from '../support/vm/host.ts';
import { startHost, startLibvirt } from '../support/vm/host.ts';
import type { ToolResult } from '../support/vm/process.ts';

requireOwnNetns();

const BUNDLE = fileURLToPath(new URL('../../dist/kvm-ib.mjs', import.meta.url));
const CONFIG =
  'networks:\n  - { name: ib, device: ib0, bridge: virbr1, guests: 192.168.222.2-192.168.222.6, addresses: 192.168.10.202-192.168.10.206 }\n';
const NETWORK = 'kvm-ib-ib';
const XML = `/usr/lib/kvm-ib/networks/${NETWORK}.xml`;
/** In the host's own mount namespace, before its libvirtd is started. */
const LAYERS = `
mount -t tmpfs tmpfs "$1"
for directory in etc usr var; do
  mkdir "$1/$directory.upper" "$1/$directory.work"
  mount -t overlay overlay -o "lowerdir=/$directory,upperdir=$1/$directory.upper,workdir=$1/$directory.work" "/$directory"
done
for directory in /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt; do
  mount -t tmpfs tmpfs "$directory"
done
`;

let folder: string;
let host: Host;
let libvirt: Libvirt;

beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), 'kvm-ib-install-'));
  host = await startHost({ name: 'kvmib01', folder });
  mkdirSync(join(folder, 'layer'));
  await host.run(['/bin/sh', '-euc', LAYERS, 'layers', join(folder, 'layer')]);
  libvirt = await startLibvirt(host);
  await host.run(['/usr/sbin/ip', 'link', 'add', 'ib0', 'mtu', '2044', 'type', 'veth', 'peer', 'name', 'fabric']);
  await host.run(['/usr/sbin/ip', 'address', 'add', '192.168.10.1/24', 'dev', 'ib0']);
  await host.run(['/usr/sbin/ip', 'link', 'set', 'ib0', 'up']);
  writeFileSync(join(folder, 'kvm-ib.yaml'), CONFIG);
});

afterAll(async () => {
  await host?.stop();
  rmSync(folder, { recursive: true, force: true });
});

const kvmIb = (...args: readonly string[]): Promise<ToolResult> =>
  host.try([process.execPath, BUNDLE, ...args], { timeout: 60_000 });
const install = (...args: readonly string[]): Promise<ToolResult> =>
  kvmIb('install', 'host', '--config', join(folder, 'kvm-ib.yaml'), ...args);
const networks = async (): Promise<string> => (await libvirt.virsh('net-list', '--all', '--name')).trim();
const programs = (result: ToolResult): readonly string[] =>
  result.stdout.split('\n').filter((line) => line.startsWith('$ /usr/bin/virsh'));
const virsh = (...args: readonly string[]): string => ['$ /usr/bin/virsh --connect qemu:///system', ...args].join(' ');

test('a dry run says what it would tell libvirt, and tells it nothing', async () => {
  const result = await install('--dry-run');
  expect([result.status, result.stderr]).toEqual([0, '']);
  expect(programs(result)).toEqual([
    virsh('net-define', XML),
    virsh('net-start', NETWORK),
    virsh('net-autostart', NETWORK),
  ]);
  expect(await networks()).toBe('');
  const without = await install('--dry-run', '--no-libvirt-network');
  expect(programs(without)).toEqual([]);
  expect(without.stdout).toContain('virsh net-define net.xml');
});

test('the network is made, open, with the MTU of the link, starts with libvirt, and is then left alone', async () => {
  const result = await install();
  expect([result.status, result.stderr]).toEqual([0, '']);
  expect(await libvirt.virsh('net-info', NETWORK)).toMatch(/Active: +yes[\s\S]*Autostart: +yes/);
  const dump = await libvirt.virsh('net-dumpxml', NETWORK);
  expect(dump).toContain("<forward mode='open'/>");
  expect(dump).toContain("<mtu size='2044'/>");
  expect(await host.run(['/usr/sbin/ip', '-4', '-brief', 'address', 'show', 'dev', 'virbr1'])).toContain(
    '192.168.222.1/29',
  );
  expect(await host.run(['/usr/bin/stat', '-c', '%a %U', XML])).toBe('644 root\n');
  const again = await kvmIb('install', 'host');
  expect(again.stdout).toMatch(/^Nothing to change\.$/m);
});

test('one that was stopped is started again', async () => {
  await libvirt.virsh('net-destroy', NETWORK);
  await libvirt.virsh('net-autostart', NETWORK, '--disable');
  expect(programs(await kvmIb('install', 'host'))).toEqual([
    virsh('net-start', NETWORK),
    virsh('net-autostart', NETWORK),
  ]);
  expect(await libvirt.virsh('net-info', NETWORK)).toMatch(/Active: +yes[\s\S]*Autostart: +yes/);
});

test('uninstalling leaves it while a guest is on the bridge, and says who', async () => {
  await host.run(['/usr/sbin/ip', 'tuntap', 'add', 'one-42-0', 'mode', 'tap']);
  await host.run(['/usr/sbin/ip', 'link', 'set', 'one-42-0', 'master', 'virbr1']);
  const result = await kvmIb('uninstall', 'host', '--dry-run');
  expect(programs(result)).toEqual([]);
  expect(result.stdout).toContain(`the libvirt network ${NETWORK}, since guests are on virbr1: one-42-0`);
  await host.run(['/usr/sbin/ip', 'link', 'delete', 'one-42-0']);
});

test('uninstalling takes it away', async () => {
  const result = await kvmIb('uninstall', 'host', '--purge');
  expect([result.status, result.stderr]).toEqual([0, '']);
  expect(programs(result)).toEqual([virsh('net-destroy', NETWORK), virsh('net-undefine', NETWORK)]);
  expect(await networks()).toBe('');
  expect((await host.try(['/usr/sbin/ip', 'link', 'show', 'dev', 'virbr1'])).status).not.toBe(0);
  expect((await host.try(['/bin/ls', '/usr/lib/kvm-ib'])).status).not.toBe(0);
});

test('an isolated network with that bridge is somebody else’s: left, named, and never taken away', async () => {
  const file = join(folder, 'other.xml');
  writeFileSync(
    file,
    "<network><name>site</name><bridge name='virbr1'/><dns enable='no'/><ip address='192.168.223.1' netmask='255.255.255.0'/></network>",
  );
  await libvirt.virsh('net-define', file);
  const result = await install();
  expect(result.status).toBe(0);
  expect(programs(result)).toEqual([]);
  expect(result.stdout).toContain(
    "libvirt's network site has the bridge virbr1, with the wrong forward mode: isolated",
  );
  await kvmIb('uninstall', 'host', '--purge');
  expect(await networks()).toBe('site');
  expect(readFileSync(file, 'utf8')).toContain('site');
});
