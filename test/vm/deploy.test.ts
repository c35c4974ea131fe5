/**
 * A real guest, from the domain XML that OpenNebula writes to packets on the fabric and back to a clean host: libvirt,
 * QEMU (software emulation), the kvm-ib driver called as one_vmm_exec calls it.
 */
import { existsSync, mkdirSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, afterEach, beforeAll, expect, test } from 'vitest';
import { requireOwnNetns } from '../support/netns.ts';
import { callInStream, domainFor, RELEASES } from '../support/one-releases.ts';
import type { GuestImage } from '../support/vm/guest.ts';
import { consoleOf, guestCommandLine, guestImage, guestReady } from '../support/vm/guest.ts';
import type { VmLab } from '../support/vm/lab.ts';
import { BRIDGE, FABRIC, flowsOf, hostState, sha256, startVmLab } from '../support/vm/lab.ts';
import type { DriverAnswer, TestVm } from '../support/vm/opennebula.ts';
import {
  actionData,
  callAsOneVmmExec,
  domainXml,
  writeDeploymentFolder,
  writeRemotes,
  writeScript,
} from '../support/vm/opennebula.ts';

requireOwnNetns();

const PROGRAM = fileURLToPath(new URL('../../dist/kvm-ib.mjs', import.meta.url));
const GUEST = '192.168.122.2';
const ADDRESS = '192.168.10.202';
/** IPv4 and ICMP headers. */
const PING_OVERHEAD = 28;
const FULL_PING = String(FABRIC.mtu - PING_OVERHEAD);

const VM: TestVm = {
  id: 42,
  name: 'web-42',
  uuid: '6f0a1c1e-6c0e-4d0c-9a0e-5a3b3f1d2c42',
  nics: [{ bridge: BRIDGE.name, mac: '02:00:c0:a8:7a:02', ip: GUEST }],
};

let image: GuestImage;
let lab: VmLab;
let drivers: string;
let env: Record<string, string>;
let before: Readonly<Record<string, string>>;
let consolePath: string;
let stateFolder: string;

const kvmIb = (...args: readonly string[]) =>
  lab.host.run([
    '/usr/bin/env',
    ...Object.entries(env).map(([k, v]) => `${k}=${v}`),
    process.execPath,
    PROGRAM,
    ...args,
  ]);

function call(action: string, args: readonly string[], stdin: string): Promise<DriverAnswer> {
  const script = join(drivers, 'kvm-ib', action);
  return callAsOneVmmExec({ host: lab.host, script, args, stdin, vmId: VM.id, hostName: lab.host.name, env });
}

const domainOf = (kernel = image.kernel) =>
  domainXml(VM, {
    kernel,
    initramfs: image.initramfs,
    commandLine: guestCommandLine({ address: GUEST, prefixLength: 24, gateway: BRIDGE.address }),
    console: consolePath,
  });

/** `kernel` overrides the guest's, to make libvirt refuse the domain. */
async function deploy(kernel?: string): Promise<DriverAnswer> {
  const xml = domainOf(kernel);
  const file = writeDeploymentFolder(lab.host.folder, VM, lab.host.name);
  return call('deploy', [file, lab.host.name], xml);
}

const end = (action: 'shutdown' | 'cancel') => call(action, [VM.uuid, lab.host.name], actionData(VM, lab.host.name));

async function expectHostAsBefore(): Promise<void> {
  expect(await hostState(lab.host)).toEqual(before);
  expect(await flowsOf(lab.host, [GUEST, ADDRESS])).toEqual([]);
  expect(readdirSync(stateFolder, { recursive: true }).filter((name) => name.includes('vm-'))).toEqual([]);
  expect(await kvmIb('list', '--json')).toBe('[]\n');
}

beforeAll(async () => {
  if (!existsSync(PROGRAM)) throw new Error(`${PROGRAM} is missing. Run: npm run build`);
  image = await guestImage();
  lab = await startVmLab();
  drivers = writeRemotes(lab.host.folder);
  consolePath = join(lab.host.folder, 'console.log');
  stateFolder = join(lab.host.folder, 'state');
  const config = join(lab.host.folder, 'kvm-ib.yaml');
  writeFileSync(
    config,
    `networks:
  - name: ib
    device: ib0
    bridge: ${BRIDGE.name}
    guests: 192.168.122.2-192.168.122.6
    addresses: 192.168.10.202-192.168.10.206
`,
    { mode: 0o600 },
  );
  env = { KVM_IB_CONFIG: config, KVM_IB_STATE_DIR: stateFolder };
  await kvmIb('reconcile'); // as the boot unit does: it loads the table
  before = await hostState(lab.host);
  expect(before['ruleset']).toContain('table ip kvm_ib {');
});

afterEach((context) => {
  if (context.task.result?.state !== 'fail' || lab === undefined) return;
  console.error(`Console of the guest:\n${consoleOf(consolePath)}\nlibvirtd:\n${lab.libvirt.log()}`);
});

afterAll(() => lab?.stop());

test('deploy starts the domain and prints its UUID, one word on one line', async () => {
  const answer = await deploy();
  expect(answer).toMatchObject({ code: 0, stdout: `${VM.uuid}\n` });
  expect(await lab.libvirt.active()).toEqual(['one-42']);
  await guestReady(consolePath);
});

test('the mapping of the VM is listed, and nothing has drifted', async () => {
  const list: unknown = JSON.parse(await kvmIb('list', '--json'));
  expect(list).toEqual([expect.objectContaining({ network: 'ib', guest: GUEST, address: ADDRESS, vm: 42, nic: 0 })]);
  expect(JSON.parse(await kvmIb('status', '--json'))).toMatchObject({ ok: true, drift: [] });
});

test("the guest and its tap have the IPoIB link's MTU without being told by hand", async () => {
  const link = await lab.host.run(['/usr/sbin/ip', '-o', 'link', 'show', 'one-42-0']);
  expect(link).toContain(` mtu ${FABRIC.mtu} `);
  const guest = await lab.outside.shell(ADDRESS, 'cat /sys/class/net/eth0/mtu');
  expect(guest).toEqual({ status: 0, output: `${FABRIC.mtu}\n` });
});

test("packets of the link's MTU pass unfragmented in both directions", async () => {
  const inwards = await lab.outside.run([
    '/bin/ping',
    '-c',
    '2',
    '-i',
    '0.2',
    '-W',
    '5',
    '-M',
    'do',
    '-s',
    FULL_PING,
    ADDRESS,
  ]);
  expect(inwards).toMatchObject({ status: 0, stdout: expect.stringContaining(' 0% packet loss') });
  const outwards = await lab.outside.shell(ADDRESS, `ping -c 2 -W 5 -s ${FULL_PING} ${FABRIC.outside}`);
  expect(outwards).toMatchObject({ status: 0, output: expect.stringContaining(' 0% packet loss') });
  // A guest of MTU 1500 would answer such a ping too, in pieces: FragCreates of /proc/net/snmp counts them.
  const fragments = await lab.outside.shell(ADDRESS, "awk '/^Ip: [0-9]/ { print $NF }' /proc/net/snmp");
  expect(fragments.output).toBe('0\n');
});

test('a client on the fabric reaches the guest by TCP, and the guest sees the client', async () => {
  const body = 'kvm-ib\n'.repeat(300_000);
  const answer = await lab.outside.echo(ADDRESS, body);
  expect(answer.seen).toBe(FABRIC.outside);
  expect(sha256(answer.body)).toBe(sha256(body));
});

test('the guest reaches the fabric by TCP, and is seen there by its IB address', async () => {
  const listener = await lab.outside.listen(7000);
  try {
    const sent = await lab.outside.shell(
      ADDRESS,
      `dd if=/dev/urandom of=/tmp/data bs=64k count=32 2>/dev/null
sha256sum /tmp/data | cut -d' ' -f1
nc -w 10 ${FABRIC.outside} 7000 < /tmp/data`,
    );
    expect(sent.status).toBe(0);
    const [hash, seen] = sent.output.split('\n');
    expect(seen).toBe(ADDRESS);
    expect(listener.connections).toEqual([{ from: ADDRESS, bytes: 32 * 64 * 1024, sha256: hash }]);
  } finally {
    await listener.stop();
  }
});

test('shutdown lets the guest power itself off, and leaves the host as it was', async () => {
  expect(await flowsOf(lab.host, [GUEST, ADDRESS])).not.toEqual([]);
  const answer = await end('shutdown');
  expect(answer.code, answer.stderr).toBe(0);
  expect(consoleOf(consolePath)).toContain('guest: power button');
  expect(await lab.libvirt.active()).toEqual([]);
  await expectHostAsBefore();
});

test('a deploy that libvirt refuses fails, prints no deploy id, and leaves the host as it was', async () => {
  const answer = await deploy('/nonexistent/vmlinuz');
  expect(answer.code).not.toBe(0);
  expect(answer.stdout.trim()).toBe('');
  expect(answer.stderr).toContain('Could not create domain');
  expect(await lab.libvirt.active()).toEqual([]);
  await expectHostAsBefore();
});

test('cancel ends a guest that is still booting, and leaves the host as it was', async () => {
  expect(await deploy()).toMatchObject({ code: 0, stdout: `${VM.uuid}\n` });
  const answer = await end('cancel');
  expect(answer.code, answer.stderr).toBe(0);
  expect(await lab.libvirt.active()).toEqual([]);
  await expectHostAsBefore();
});

test('reconcile keeps the mapping of a paused guest, and ends that of a guest that no action ended', async () => {
  expect(await deploy()).toMatchObject({ code: 0, stdout: `${VM.uuid}\n` });
  await lab.libvirt.virsh('suspend', 'one-42');
  await kvmIb('reconcile');
  expect(JSON.parse(await kvmIb('list', '--json'))).toMatchObject([{ vm: 42, state: 'active' }]);
  await lab.libvirt.virsh('destroy', 'one-42');
  expect(JSON.parse(await kvmIb('reconcile', '--json'))).toMatchObject({ released: ['vm-42'], errors: [] });
  await expectHostAsBefore();
});

/** What the stock scripts of 3.4 do, which read no standard input but that of deploy. */
const STOCK_OF_3_4 = {
  deploy: `cat > "$1"; virsh -c qemu:///system create "$1" | sed -n "s/^Domain '\\(.*\\)' created from .*/\\1/p"`,
  save: 'touch "$2"; chmod 666 "$2"; virsh -c qemu:///system save "$1" "$2" > /dev/null',
  restore: 'virsh -c qemu:///system restore "$1" > /dev/null',
};

test('OpenNebula 3.4: no vm.xml, no data: MAC and checkpoint tell the address, and the shell keeps its commands', async () => {
  const [first] = RELEASES;
  if (first?.name !== '3.4.4') throw new Error('the first release is another');
  for (const [name, body] of Object.entries(STOCK_OF_3_4))
    writeScript(join(drivers, 'kvm', name), `#!/bin/sh\n${body}\n`);
  const { name: hostName } = lab.host;
  const old = (action: string, args: readonly string[], payload = '') => {
    const script = join(drivers, 'kvm-ib', action);
    return callInStream(first, { script, args, vmId: VM.id, hostName, payload, env, inside: lab.host.inside });
  };
  const said = `INFO: kvm-ib: NIC 0 has ${GUEST} <-> ${ADDRESS} by its MAC 02:00:c0:a8:7a:02: this OpenNebula (before 6.0) tells no more of VM 42 here. IB_IP and external aliases need VN_MAD kvm-ib (docs/install.md)\n`;
  const home = join(lab.host.folder, 'datastore-3.4');
  mkdirSync(home);
  const checkpoint = join(home, 'checkpoint');

  const deployed = await old('deploy', [join(home, 'deployment.0'), hostName], domainFor(first, domainOf(), VM));
  expect(deployed).toMatchObject({ code: 0, stdout: 'one-42\n', stderr: said, next: true });
  await guestReady(consolePath);
  expect((await lab.outside.echo(ADDRESS, 'hello')).body).toBe('hello');

  expect(await old('save', ['one-42', checkpoint, hostName])).toMatchObject({ code: 0, stderr: '', next: true });
  await expectHostAsBefore();
  expect(await old('restore', [checkpoint, hostName])).toMatchObject({ code: 0, stderr: said, next: true });
  expect((await lab.outside.echo(ADDRESS, 'again')).body).toBe('again');

  expect(await old('cancel', ['one-42', hostName])).toMatchObject({ code: 0, stderr: '', next: true });
  await expectHostAsBefore();
});
