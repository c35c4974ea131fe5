/**
 * The life of one real guest between deploy and its end: NICs plugged in and out, an external alias, save and restore, sleep,
 * snapshots, restarts, and ends that no driver action has a part in. Each action is called as one_vmm_exec calls it, in the
 * order in which oned has it done; packets say what came of it.
 */
import { appendFileSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, afterEach, beforeAll, expect, test } from 'vitest';
import { requireOwnNetns } from '../support/netns.ts';
import type { GuestImage } from '../support/vm/guest.ts';
import { bootsOf, consoleOf, guestCommandLine, guestImage, guestReady } from '../support/vm/guest.ts';
import { startLibvirt } from '../support/vm/host.ts';
import type { VmLab } from '../support/vm/lab.ts';
import { BRIDGE, FABRIC, flowsOf, hostState, startVmLab } from '../support/vm/lab.ts';
import type { DriverAnswer, TestAlias, TestNic, TestVm } from '../support/vm/opennebula.ts';
import {
  actionData,
  CONTEXT_DEVICE,
  callAsOneVmmExec,
  domainXml,
  writeDeploymentFolder,
  writeRemotes,
  writeScript,
} from '../support/vm/opennebula.ts';
import { runTool, waitFor } from '../support/vm/process.ts';

requireOwnNetns();

const PROGRAM = fileURLToPath(new URL('../../dist/kvm-ib.mjs', import.meta.url));
const ENGINE = fileURLToPath(new URL('../../dist/engine.mjs', import.meta.url));
const HOOK = fileURLToPath(new URL('../../drivers/hooks/kvm-ib/vm-gone.sh', import.meta.url));

const UUID = '6f0a1c1e-6c0e-4d0c-9a0e-5a3b3f1d2c42';
const FIRST: TestNic = { bridge: BRIDGE.name, mac: '02:00:c0:a8:7a:02', ip: '192.168.122.2', id: 0 };
const SECOND: TestNic = { bridge: BRIDGE.name, mac: '02:00:c0:a8:7a:03', ip: '192.168.122.3', id: 1 };
const ALIAS: TestAlias = { id: 2, parent: 0, aliasId: 0, ip: '192.168.10.205', mac: '02:00:c0:a8:0a:cd' };
const VM: TestVm = { id: 42, name: 'web-42', uuid: UUID, nics: [FIRST] };
/** LCM_STATE HOTPLUG_NIC, with the NIC that comes or goes. */
const PLUGGING: TestVm = { ...VM, nics: [FIRST, { ...SECOND, attach: true }], lcmState: 25 };

const ADDRESS = '192.168.10.202';
const SECOND_ADDRESS = '192.168.10.203';
const NIC0 = `192.168.122.2 ${ADDRESS} ib0:42-0`;
const NIC1 = `192.168.122.3 ${SECOND_ADDRESS} ib0:42-1`;
const OK = { code: 0, stdout: '', stderr: '' };
/** The stock script looks for a domain of that name first; virsh complains when there is none. */
const RESTORED = { code: 0, stdout: '', stderr: expect.stringMatching(/^(error: failed to get domain 'one-42'\n)?$/) };

let image: GuestImage;
let lab: VmLab;
let drivers: string;
let home: string;
let env: Record<string, string>;
let before: Readonly<Record<string, string>>;

const file = (name: string) => join(lab.host.folder, name);
const argvOf = (args: readonly string[]): [string, ...string[]] => [
  '/usr/bin/env',
  ...Object.entries(env).map(([k, v]) => `${k}=${v}`),
  process.execPath,
  PROGRAM,
  ...args,
];
const kvmIb = (...args: readonly string[]) => lab.host.run(argvOf(args));
const drift = async () => {
  const { stdout } = await lab.host.try(argvOf(['status', '--json']));
  return (JSON.parse(stdout) as { drift: readonly { part: string }[] }).drift;
};

function call(
  action: string,
  args: readonly string[],
  vm = VM,
  { hostName = lab.host.name, stdin = actionData(vm, hostName) } = {},
): Promise<DriverAnswer> {
  const script = join(drivers, 'kvm-ib', action);
  return callAsOneVmmExec({ host: lab.host, script, args, stdin, vmId: vm.id, hostName, env });
}

async function deploy(vm = VM): Promise<void> {
  const stdin = domainXml(vm, {
    kernel: image.kernel,
    initramfs: image.initramfs,
    commandLine: guestCommandLine({ address: FIRST.ip, prefixLength: 24, gateway: BRIDGE.address }),
    console: file('console.log'),
    ...(vm.id === VM.id ? { disk: join(home, 'disk.0'), context: join(home, 'disk.1') } : {}),
    raw: "<pm><suspend-to-mem enabled='yes'/></pm>",
  });
  const args = [writeDeploymentFolder(lab.host.folder, vm, lab.host.name), lab.host.name];
  expect(await call('deploy', args, vm, { stdin })).toMatchObject({ code: 0, stdout: `${vm.uuid}\n` });
}

const attach = (vm = PLUGGING) =>
  call('attach_nic', [UUID, SECOND.mac, BRIDGE.name, 'virtio', 'dummy', vm.nics[1]?.target ?? 'one-42-1'], vm);
const detach = () => call('detach_nic', [UUID, SECOND.mac], PLUGGING);
/** What follows every attach and detach: the context CD is taken out, written anew by oned, and put in again. */
const context = async (vm: TestVm) => [
  await call('prereconfigure', [UUID, CONTEXT_DEVICE], vm),
  await call('reconfigure', [UUID, CONTEXT_DEVICE, join(home, 'disk.1')], vm),
];
const checkpoint = () => join(home, 'checkpoint');
const save = () => call('save', [UUID, checkpoint(), lab.host.name]);
const restore = (hostName = lab.host.name) => call('restore', [checkpoint(), hostName, UUID], VM, { hostName });
const inGuest = async (script: string) => {
  const { status, output } = await lab.outside.shell(ADDRESS, script);
  expect(status, output).toBe(0);
  return output;
};
/** Waits until the guest answers at an address, then says that it sees the client there and not the host. */
async function expectReached(address = ADDRESS): Promise<void> {
  const answer = await waitFor(`the guest at ${address}`, () =>
    lab.outside.echo(address, 'hello').catch(() => undefined),
  );
  expect(answer).toEqual({ seen: FABRIC.outside, body: 'hello' });
}

const guestHas = (link: string) =>
  waitFor(`the guest to have ${link}`, async () =>
    (await inGuest('ls /sys/class/net')).split('\n').includes(link) ? true : undefined,
  );
/** A client that has not heard of the address lately does not reach anybody there. */
async function expectUnreached(address: string): Promise<void> {
  await lab.outside.run(['/usr/sbin/ip', 'neighbour', 'flush', 'dev', 'ib0']);
  await expect(lab.outside.echo(address, 'hello')).rejects.toThrow('EHOSTUNREACH');
}

/** What the kernel holds for the VM: guest address, IB address and label of each mapping. */
async function mappings(): Promise<readonly string[]> {
  const links = await lab.host.run(['/usr/sbin/ip', '-o', '-4', 'address', 'show', 'dev', 'ib0']);
  const aliases = new Map([...links.matchAll(/inet (\S+)\/32 scope global (\S+?)\\/g)].map((m) => [m[1], m[2]]));
  const table = await lab.host.run(['/usr/sbin/nft', 'list', 'map', 'ip', 'kvm_ib', 'guest_to_ib']);
  const pairs = [...table.matchAll(/([0-9.]+)(?: comment "[^"]*")? : ([0-9.]+)/g)];
  expect([...aliases.keys()].sort()).toEqual(pairs.map((m) => m[2]).sort());
  return pairs.map((m) => `${m[1]} ${m[2]} ${aliases.get(m[2] ?? '')}`).sort();
}

/** The kernel holds exactly these mappings, and `status` finds no fault with them. */
async function expectMapped(...wanted: readonly string[]): Promise<void> {
  expect(await mappings()).toEqual(wanted);
  expect(await drift()).toEqual([]);
}

async function expectHostAsBefore(): Promise<void> {
  expect(await lab.libvirt.active()).toEqual([]);
  expect(await hostState(lab.host)).toEqual(before);
  expect(await flowsOf(lab.host, [FIRST.ip, ADDRESS])).toEqual([]);
  expect(stateFiles()).toEqual([]);
}

const stateFiles = () =>
  readdirSync(env['KVM_IB_STATE_DIR'] ?? '', { recursive: true }).filter((name) => String(name).includes('vm-'));
const domainState = async () => (await lab.libvirt.virsh('domstate', 'one-42')).trim();
const domainGone = () =>
  waitFor('the domain to end', async () => ((await lab.libvirt.active()).length === 0 ? true : undefined));

async function killQemu(): Promise<void> {
  await lab.host.run(['/bin/sh', '-c', 'kill -KILL "$(cat /run/libvirt/qemu/one-42.pid)"']);
  await domainGone();
}

/** A script that `restore` runs before it asks libvirt, as OpenNebula's for one way of storing images; it leaves what it saw. */
function lookBeforeRestore(): () => { readonly domains: string; readonly aliases: string } {
  const script = join(drivers, 'kvm/restore.qcow2');
  const seen = file('before-restore');
  writeScript(
    script,
    `#!/bin/sh\nvirsh list --name > ${seen}.domains\n/usr/sbin/ip -o -4 address show dev ib0 > ${seen}.aliases\n`,
  );
  return () => {
    rmSync(script);
    return {
      domains: readFileSync(`${seen}.domains`, 'utf8').trim(),
      aliases: readFileSync(`${seen}.aliases`, 'utf8'),
    };
  };
}

beforeAll(async () => {
  if (!existsSync(PROGRAM)) throw new Error(`${PROGRAM} is missing. Run: npm run build`);
  image = await guestImage();
  lab = await startVmLab();
  // Three questions for an address that nobody has: 0.6 s in place of 3.
  await lab.outside.run(['/usr/sbin/sysctl', '-qw', 'net.ipv4.neigh.ib0.retrans_time_ms=200']);
  drivers = writeRemotes(lab.host.folder);
  // One try is enough to fail here. Each that is in vain takes libvirt 5 s.
  appendFileSync(join(drivers, '../etc/vmm/kvm/kvmrc'), 'export VIRSH_RETRIES=1\n');
  home = file('datastores/0/42');
  mkdirSync(home, { recursive: true });
  // Snapshots of a running guest are kept in a disk. The guest itself uses none.
  await runTool(['/usr/bin/qemu-img', 'create', '-q', '-f', 'qcow2', join(home, 'disk.0'), '1M']);
  writeFileSync(join(home, 'disk.1'), Buffer.alloc(1024 * 1024));
  const config = file('kvm-ib.yaml');
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
  env = { KVM_IB_CONFIG: config, KVM_IB_STATE_DIR: file('state') };
  await kvmIb('reconcile'); // as the boot unit does: it loads the table
  before = await hostState(lab.host);
  await deploy();
  await guestReady(file('console.log'));
  await expectReached();
});

afterEach((run) => {
  if (run.task.result?.state !== 'fail' || lab === undefined) return;
  console.error(`Console of the guest:\n${consoleOf(file('console.log'))}\nlibvirtd:\n${lab.libvirt.log()}`);
});

afterAll(() => lab?.stop());

test('a NIC is plugged in, reached at its own address, and unplugged; a connection to the first goes on throughout', async () => {
  const held = lab.outside.hold(ADDRESS);
  await held.answers();
  const ping = async (seconds: number, size: number) => {
    const options = ['-c', '1', '-W', String(seconds), '-M', 'do', '-s', String(size)];
    return (await lab.outside.run(['/bin/ping', ...options, SECOND_ADDRESS])).status;
  };

  expect(await attach()).toMatchObject(OK);
  await expectMapped(NIC0, NIC1);
  const tap = await lab.host.run(['/usr/sbin/ip', '-o', 'link', 'show', 'one-42-1']);
  expect(tap).toContain(` mtu ${FABRIC.mtu} `);
  expect(tap).toContain(` master ${BRIDGE.name} `);
  expect(await context(PLUGGING)).toMatchObject([OK, OK]);
  await expectMapped(NIC0, NIC1);
  // The stock script asks libvirt for no MTU, so the guest is told none: GUEST_MTU of the virtual network has to.
  await inGuest(`ip link set eth1 mtu ${FABRIC.mtu} up; ip address add ${SECOND.ip}/24 dev eth1`);
  // Its answers leave by the first NIC, with that one's MAC, and are dropped.
  await waitFor('a drop', async () => {
    expect(await ping(1, 56)).toBe(1);
    const table = await lab.host.run(['/usr/sbin/nft', 'list', 'table', 'ip', 'kvm_ib']);
    return (
      /packets [1-9]\d* bytes \d+ drop comment "forged: mapped guest address with another MAC"/.test(table) || undefined
    );
  });
  await inGuest(`echo 1 > /proc/sys/net/ipv4/conf/all/arp_ignore
echo 2 > /proc/sys/net/ipv4/conf/all/arp_announce
ip rule add from ${SECOND.ip} table 100
ip route add default via ${BRIDGE.address} dev eth1 table 100`);
  await expectReached(SECOND_ADDRESS);
  expect(await ping(10, FABRIC.mtu - 28)).toBe(0);
  await held.answers();

  expect(await detach()).toMatchObject(OK);
  await expectMapped(NIC0);
  expect(await context(PLUGGING)).toMatchObject([OK, OK]);
  await expectMapped(NIC0);
  expect(await flowsOf(lab.host, [SECOND.ip, SECOND_ADDRESS])).toEqual([]);
  await expectUnreached(SECOND_ADDRESS);
  expect(await inGuest('ls /sys/class/net')).toBe('eth0\nlo\n');
  await held.answers();
  await held.stop();
});

test('a NIC that libvirt does not take is not mapped', async () => {
  const vm = { ...PLUGGING, nics: [FIRST, { ...SECOND, attach: true, target: 'one-42-0' }] };
  const answer = await attach(vm);
  expect(answer).toMatchObject({ code: 1, stdout: '' });
  expect(answer.stderr).toMatch(/^Could not attach NIC to [^\n]*\n/);
  await expectMapped(NIC0);
  await expectReached();
});

test('a NIC that the guest does not give away stays mapped until it does', async () => {
  expect(await attach()).toMatchObject(OK);
  await guestHas('eth1');
  await lab.libvirt.virsh('suspend', 'one-42');
  expect((await detach()).code).not.toBe(0);
  await expectMapped(NIC0, NIC1);
  await lab.libvirt.virsh('resume', 'one-42');
  await waitFor('the guest to give it away', async () =>
    (await lab.libvirt.virsh('domiflist', 'one-42')).includes(SECOND.mac) ? undefined : true,
  );
  // OpenNebula believes that the VM still has it, and is asked to detach it once more.
  const again = await detach();
  expect(again.code).toBe(0);
  expect(again.stderr).toMatch(/^Error detaching interface [^\n]*\n/);
  await expectMapped(NIC0);
  await expectReached();
});

test.each([
  ['a VM with network context', 2, true],
  ['a VM without', 3, false],
])('an external alias comes and goes while the guest of %s runs', async (_, id, hasContext) => {
  const vm = { ...VM, aliases: [{ ...ALIAS, id, attach: true }], lcmState: 25 };
  const coming: TestVm = hasContext ? { ...vm, context: { leaving: [] } } : vm;
  const going: TestVm = hasContext ? { ...vm, context: { leaving: [id] } } : vm;
  expect(await context(coming)).toMatchObject([OK, OK]);
  await expectMapped(`${FIRST.ip} ${ALIAS.ip} ib0:42-0`);
  await expectReached(ALIAS.ip);
  await expectUnreached(ADDRESS);

  expect(await context(going)).toMatchObject([OK, OK]);
  await expectMapped(NIC0);
  await expectReached();
  await expectUnreached(ALIAS.ip);
});

test('save leaves the host as it was; restore maps the guest before it runs, and an open connection goes on', async () => {
  await inGuest('echo kept > /tmp/value');
  const held = lab.outside.hold(ADDRESS);
  await held.answers();

  expect(await save()).toMatchObject(OK);
  expect(await lab.libvirt.active()).toEqual([]);
  expect(await hostState(lab.host)).toEqual(before);
  expect(stateFiles()).toEqual([]);

  const seen = lookBeforeRestore();
  expect(await restore()).toMatchObject(RESTORED);
  expect(seen()).toEqual({ domains: '', aliases: expect.stringContaining(`${ADDRESS}/32`) });
  expect(existsSync(checkpoint())).toBe(false);
  await expectMapped(NIC0);
  expect(await inGuest('cat /tmp/value')).toBe('kept\n');
  await held.answers();
  await held.stop();
});

test('a checkpoint is restored on a host that has never seen the VM', async () => {
  expect(await save()).toMatchObject(OK);
  await expectHostAsBefore();
  env = { ...env, KVM_IB_STATE_DIR: file('state-of-another-host') };
  expect(await restore('kvmib02')).toMatchObject(RESTORED);
  await expectMapped(NIC0);
  expect(await inGuest('cat /tmp/value')).toBe('kept\n');
});

test('a restore that libvirt refuses leaves the host as it was', async () => {
  expect(await save()).toMatchObject(OK);
  await runTool(['/bin/mv', checkpoint(), file('good')]);
  writeFileSync(checkpoint(), 'no checkpoint\n');
  const answer = await restore();
  expect(answer.code).not.toBe(0);
  expect(answer.stderr).toMatch(/\nCould not recalculate paths in [^\n]*\n$/);
  await expectHostAsBefore();
  await runTool(['/bin/mv', file('good'), checkpoint()]);
  expect(await restore()).toMatchObject(RESTORED);
  await expectMapped(NIC0);
});

test('after a snapshot is reverted the mappings are those of the NICs that the domain has', async () => {
  const created = await call('snapshot_create', [UUID, '0']);
  expect(created).toMatchObject({ code: 0, stdout: 'snap-0\n' });
  expect(await attach()).toMatchObject(OK);
  await guestHas('eth1');
  await expectMapped(NIC0, NIC1);
  const both = { ...VM, nics: [FIRST, SECOND] };
  expect(await call('snapshot_create', [UUID, '1'], both)).toMatchObject({ code: 0, stdout: 'snap-1\n' });
  await inGuest('echo changed > /tmp/value');

  // OpenNebula goes on believing in the second NIC.
  expect(await call('snapshot_revert', [UUID, 'snap-0'], both)).toMatchObject(OK);
  await expectMapped(NIC0);
  await expectReached();
  expect(await inGuest('cat /tmp/value')).toBe('kept\n');
  expect(await call('snapshot_revert', [UUID, 'snap-1'], both)).toMatchObject(OK);
  await expectMapped(NIC0, NIC1);
  await expectReached();
  expect(await inGuest('ls /sys/class/net')).toBe('eth0\neth1\nlo\n');
  expect(await detach()).toMatchObject(OK);
  await expectMapped(NIC0);
});

test.each(['reboot', 'reset'])(
  '%s brings the guest back, and with it an alias that somebody removed',
  async (action) => {
    const boots = bootsOf(file('console.log'));
    const boot = await inGuest('cat /proc/sys/kernel/random/boot_id');
    await lab.host.run(['/usr/sbin/ip', 'address', 'delete', `${ADDRESS}/32`, 'dev', 'ib0']);
    await expectUnreached(ADDRESS);
    expect(await call(action, [UUID, lab.host.name])).toMatchObject(OK);
    await expectMapped(NIC0);
    await guestReady(file('console.log'), boots + 1);
    expect(await inGuest('cat /proc/sys/kernel/random/boot_id')).not.toBe(boot);
    await expectMapped(NIC0);
  },
);

test('a guest that powers itself off is seen by status, and ended by one reconcile', async () => {
  await inGuest('(sleep 0.3; poweroff -f) > /dev/null 2>&1 &');
  await domainGone();
  expect((await drift()).map(({ part }) => part)).toEqual(expect.arrayContaining(['file', 'alias', 'map']));
  expect(JSON.parse(await kvmIb('reconcile', '--json'))).toMatchObject({ released: ['vm-42'], errors: [] });
  await expectHostAsBefore();
});

// The last before an end by force: behind its sleep QEMU's q35 hands this guest no ACPI event any more, nor does poweroff end it.
test('a guest that suspends itself stays mapped, and restore wakes it up', async () => {
  await deploy();
  await guestReady(file('console.log'));
  await expectReached();
  await inGuest('echo kept > /tmp/value; (sleep 0.3; echo mem > /sys/power/state) > /dev/null 2>&1 &');
  await waitFor('the guest to sleep', async () => ((await domainState()) === 'pmsuspended' ? true : undefined));
  expect(JSON.parse(await kvmIb('reconcile', '--json'))).toMatchObject({ released: [], errors: [] });
  await expectMapped(NIC0);
  expect(await restore()).toMatchObject(RESTORED);
  await expectMapped(NIC0);
  expect(await domainState()).toBe('running');
  expect(await inGuest('cat /tmp/value')).toBe('kept\n');
});

test('a guest whose QEMU is killed is ended at once by the state hook', async () => {
  await lab.host.run([
    '/bin/sh',
    '-euc',
    ENGINE_STAND_IN,
    'engine',
    file('layer'),
    env['KVM_IB_CONFIG'] ?? '',
    env['KVM_IB_STATE_DIR'] ?? '',
    process.execPath,
    ENGINE,
  ]);
  const hook = () => lab.host.try(['/bin/sh', HOOK, '42']);
  expect(await hook()).toMatchObject({ status: 0, stdout: '', stderr: '' });
  await expectMapped(NIC0);
  await killQemu();
  expect(await hook()).toMatchObject({ status: 0, stdout: '', stderr: '' });
  await expectHostAsBefore();
});

/** The engine at the place where the hook looks for it, told of this test's files. In the host's own mount namespace. */
const ENGINE_STAND_IN = `
mkdir "$1"
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work"
mount -t overlay overlay -o "lowerdir=/usr/lib,upperdir=$1/upper,workdir=$1/work" /usr/lib
mkdir /usr/lib/kvm-ib
printf '#!/bin/sh\\nKVM_IB_CONFIG=%s KVM_IB_STATE_DIR=%s exec %s %s\\n' "$2" "$3" "$4" "$5" > /usr/lib/kvm-ib/kvm-ib-engine
chmod 755 /usr/lib/kvm-ib/kvm-ib-engine
`;

test('the address of a VM that ended and was terminated, of which no driver hears, goes to the next one', async () => {
  await deploy();
  await killQemu();
  const nics = [{ ...FIRST, mac: '02:00:c0:a8:7a:99' }];
  const vm: TestVm = { ...VM, id: 43, name: 'web-43', uuid: '6f0a1c1e-6c0e-4d0c-9a0e-5a3b3f1d2c43', nics };
  await deploy(vm);
  await expectMapped(`${FIRST.ip} ${ADDRESS} ib0:43-0`);
  expect(await call('cancel', [vm.uuid, lab.host.name], vm)).toMatchObject(OK);
  await expectHostAsBefore();
});

test('after a restart of the host nothing is claimed before libvirt says what runs', async () => {
  await deploy();
  await killQemu();
  const path = join(env['KVM_IB_STATE_DIR'] ?? '', 'mappings/vm-42.json');
  const text = readFileSync(path, 'utf8');
  expect(text).toMatch(/"bootId": "[^"]+"/);
  writeFileSync(path, text.replace(/"bootId": "[^"]*"/, '"bootId": "the-boot-before"'));
  await lab.host.run(['/usr/sbin/ip', 'address', 'delete', `${ADDRESS}/32`, 'dev', 'ib0']);
  await lab.host.run(['/usr/sbin/nft', 'delete', 'table', 'ip', 'kvm_ib']);
  await lab.libvirt.stop();

  const early = JSON.parse(await kvmIb('reconcile', '--json')) as { left: readonly { owner: string }[] };
  expect(early.left).toMatchObject([{ owner: 'vm-42' }]);
  expect(await mappings()).toEqual([]);
  await expectUnreached(ADDRESS);

  lab = { ...lab, libvirt: await startLibvirt(lab.host) };
  expect(JSON.parse(await kvmIb('reconcile', '--json'))).toMatchObject({ released: ['vm-42'], errors: [] });
  expect(stateFiles()).toEqual([]);
  expect(await mappings()).toEqual([]);
});
