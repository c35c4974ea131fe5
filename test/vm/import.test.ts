/**
 * The old driver replaced under a running VM: a real guest that old rules serve, a connection to it that stays open while
 * the host goes over, back and over again, and our driver that ends the VM.
 */
import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, afterEach, beforeAll, expect, test } from 'vitest';
import type { ImportReport } from '../../lib/import/report.ts';
import { requireOwnNetns } from '../support/netns.ts';
import type { GuestImage } from '../support/vm/guest.ts';
import { consoleOf, guestCommandLine, guestImage, guestReady } from '../support/vm/guest.ts';
import type { Held, VmLab } from '../support/vm/lab.ts';
import { BRIDGE, FABRIC, startVmLab } from '../support/vm/lab.ts';
import type { DriverAnswer, TestVm } from '../support/vm/opennebula.ts';
import {
  actionData,
  callAsOneVmmExec,
  domainXml,
  writeDeploymentFolder,
  writeRemotes,
} from '../support/vm/opennebula.ts';

requireOwnNetns();

const PROGRAM = fileURLToPath(new URL('../../dist/kvm-ib.mjs', import.meta.url));
const GUEST = '192.168.122.2';
const ADDRESS = '192.168.10.202';
const ACCEPT = 'inbound/other-link,inbound/guest-address,host,loopback';
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
let consolePath: string;
let held: Held;

const kvmIb = (...args: readonly string[]) =>
  lab.host.run([
    '/usr/bin/env',
    ...Object.entries(env).map(([key, value]) => `${key}=${value}`),
    process.execPath,
    PROGRAM,
    ...args,
  ]);

function call(driver: 'kvm' | 'kvm-ib', action: string, args: readonly string[], stdin: string): Promise<DriverAnswer> {
  const script = join(drivers, driver, action);
  return callAsOneVmmExec({ host: lab.host, script, args, stdin, vmId: VM.id, hostName: lab.host.name, env });
}

const aliases = (): Promise<string> => lab.host.run(['/usr/sbin/ip', '-o', '-4', 'address', 'show', 'dev', 'ib0']);
const rules = (): Promise<string> => lab.host.run(['/usr/sbin/iptables-legacy', '-t', 'nat', '-S']);

beforeAll(async () => {
  if (!existsSync(PROGRAM)) throw new Error(`${PROGRAM} is missing. Run: npm run build`);
  image = await guestImage();
  lab = await startVmLab();
  drivers = writeRemotes(lab.host.folder);
  consolePath = join(lab.host.folder, 'console.log');
  const network = {
    name: 'ib',
    device: 'ib0',
    bridge: BRIDGE.name,
    guests: '192.168.122.2-192.168.122.6',
    addresses: '192.168.10.202-192.168.10.206',
  };
  const config = join(lab.host.folder, 'kvm-ib.yaml');
  writeFileSync(config, JSON.stringify({ networks: [network] }));
  env = { KVM_IB_CONFIG: config, KVM_IB_STATE_DIR: join(lab.host.folder, 'state') };
  // What the old driver did at a deploy; the domain itself comes from the stock script.
  for (const command of [
    `/usr/sbin/iptables-legacy -t nat -A PREROUTING -d ${ADDRESS} -j DNAT --to-destination ${GUEST}`,
    `/usr/sbin/iptables-legacy -t nat -A POSTROUTING -s ${GUEST} -o ib0 -j SNAT --to-source ${ADDRESS}`,
    `/usr/sbin/ip address add ${ADDRESS}/24 dev ib0 label ib0:1`,
  ]) {
    const [program = '', ...args] = command.split(' ');
    await lab.host.run([program, ...args]);
  }
  const xml = domainXml(VM, {
    kernel: image.kernel,
    initramfs: image.initramfs,
    commandLine: guestCommandLine({ address: GUEST, prefixLength: 24, gateway: BRIDGE.address }),
    console: consolePath,
  });
  const file = writeDeploymentFolder(lab.host.folder, VM, lab.host.name);
  expect(await call('kvm', 'deploy', [file, lab.host.name], xml)).toMatchObject({ code: 0 });
  await guestReady(consolePath);
  held = lab.outside.hold(ADDRESS);
  await held.answers();
});

afterEach((context) => {
  if (context.task.result?.state !== 'fail' || lab === undefined) return;
  console.error(`Console of the guest:\n${consoleOf(consolePath)}\nlibvirtd:\n${lab.libvirt.log()}`);
});

afterAll(() => lab?.stop());

test('the pair belongs to the VM, by what libvirt says of its NIC', async () => {
  const { report } = JSON.parse(await kvmIb('import', '--json')) as { readonly report: ImportReport };
  expect(report.pairs).toMatchObject([
    { guest: GUEST, address: ADDRESS, owner: { kind: 'vm', vm: 42 }, mapping: { nic: 0, mac: '02:00:c0:a8:7a:02' } },
  ]);
});

test('over, back and over again, while a connection stays open', async () => {
  await kvmIb('import', '--apply', '--accept', ACCEPT);
  await held.answers();
  expect(await rules()).not.toContain(GUEST);
  expect(await aliases()).toContain(`${ADDRESS}/32 scope global ib0:42-0`);
  expect(JSON.parse(await kvmIb('status', '--json'))).toMatchObject({ ok: true, mappings: 1 });
  await kvmIb('import', '--rollback');
  await held.answers();
  expect(await rules()).toContain(`-A POSTROUTING -s ${GUEST}/32 -o ib0 -j SNAT --to-source ${ADDRESS}`);
  expect(await aliases()).toContain(`${ADDRESS}/24 scope global secondary ib0:1`);
  await kvmIb('import', '--apply', '--accept', ACCEPT);
  await held.answers();
  await held.stop();
});

test('new connections work both ways, as the IB address', async () => {
  expect((await lab.outside.echo(ADDRESS, 'kvm-ib')).seen).toBe(FABRIC.outside);
  const listener = await lab.outside.listen(7000);
  try {
    await lab.outside.shell(ADDRESS, `echo hello | nc -w 10 ${FABRIC.outside} 7000`);
    expect(listener.connections).toMatchObject([{ from: ADDRESS }]);
  } finally {
    await listener.stop();
  }
});

test('our driver shuts the VM down, and its address ends with it', async () => {
  const answer = await call('kvm-ib', 'shutdown', [VM.uuid, lab.host.name], actionData(VM, lab.host.name));
  expect(answer.code, answer.stderr).toBe(0);
  expect(await lab.libvirt.active()).toEqual([]);
  expect(await aliases()).not.toContain(ADDRESS);
  expect(await kvmIb('list', '--json')).toBe('[]\n');
});
