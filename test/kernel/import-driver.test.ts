/** The old driver replaced under running VMs: what was taken over, our actions end, move and keep as if they had made it. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, expect, test } from 'vitest';
import type { Rig } from '../support/driver.ts';
import { actionDataOf, createRig, HOST_NAME, testVm, tool, UUID } from '../support/driver.ts';
import type { LibvirtStandIn } from '../support/libvirt-stand-in.ts';
import { livelyStock, startLibvirtStandIn } from '../support/libvirt-stand-in.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const IP = '/usr/sbin/ip';
const one = testVm(42, [2]);
const two = testVm(43, [3, 4]);

let rig: Rig;
let libvirt: LibvirtStandIn;
beforeAll(async () => {
  rig = await createRig();
  libvirt = startLibvirtStandIn(rig.folder);
});
afterAll(() => {
  libvirt?.stop();
  rig?.remove();
});
beforeEach(async () => {
  rig.reset();
  libvirt.reset();
  rig.behave(livelyStock(libvirt));
  // As the scripts of the old driver left it, for each NIC of both VMs.
  const rules = [2, 3, 4].flatMap((n) => [
    `-A PREROUTING -d 192.168.10.20${n}/32 -j DNAT --to-destination 192.168.122.${n}`,
    `-A POSTROUTING -s 192.168.122.${n}/32 -o ib0 -j SNAT --to-source 192.168.10.20${n}`,
  ]);
  execFileSync('/usr/sbin/iptables-legacy-restore', { input: ['*nat', ...rules, 'COMMIT', ''].join('\n') });
  for (const n of [2, 3, 4]) tool(IP, 'address', 'add', `192.168.10.20${n}/24`, 'dev', 'ib0', 'label', `ib0:${n}`);
  for (const vm of [one, two]) {
    libvirt.set(
      vm.id,
      vm.nics.map(({ mac }) => mac),
    );
  }
  const taken = await rig.cli(['import', '--apply', '--accept', 'inbound,outbound,host,loopback']);
  expect(taken, taken.stderr).toMatchObject({ status: 0 });
});

const aliases = (): readonly string[] =>
  [
    ...tool(IP, '-o', '-4', 'address', 'show', 'dev', 'ib0').matchAll(
      /inet (\S+) .*scope global (?:secondary )?(\S+?)\\/g,
    ),
  ]
    .map((m) => `${m[1]} ${m[2]}`)
    .slice(1)
    .sort();

test('the mappings belong to the VMs, NIC by NIC', async () => {
  expect(rig.phases()).toEqual({ 'vm-42': 'active', 'vm-43': 'active' });
  expect(aliases()).toEqual(['192.168.10.202/32 ib0:42-0', '192.168.10.203/32 ib0:43-0', '192.168.10.204/32 ib0:43-1']);
  expect(await rig.cli(['status'])).toMatchObject({ status: 0, stderr: '' });
  const list = JSON.parse((await rig.cli(['list', '--json'])).stdout) as readonly { readonly mac: string }[];
  expect(list.map(({ mac }) => mac)).toEqual([...one.nics, ...two.nics].map(({ mac }) => mac));
});

test('a reboot keeps, a shutdown releases, a deploy maps again', async () => {
  const before = rig.snapshot();
  expect(await rig.ssh('reboot', [UUID, HOST_NAME], 42, actionDataOf(one))).toMatchObject({ code: 0, stderr: '' });
  expect({ ...rig.snapshot(), state: {} }).toEqual({ ...before, state: {} });
  expect(await rig.ssh('shutdown', [UUID, HOST_NAME], 42, actionDataOf(one))).toMatchObject({ code: 0, stderr: '' });
  expect(aliases()).toEqual(['192.168.10.203/32 ib0:43-0', '192.168.10.204/32 ib0:43-1']);
  expect(await rig.deploy(one)).toMatchObject({ status: 0, stderr: '' });
  expect(aliases()).toContain('192.168.10.202/32 ib0:42-0');
});

test('save and restore, and a NIC that is detached', async () => {
  const checkpoint = join(mkdtempSync('/tmp/kvm-ib-checkpoint-'), 'checkpoint');
  expect(await rig.ssh('save', [UUID, checkpoint, HOST_NAME], 42, actionDataOf(one))).toMatchObject({ code: 0 });
  expect(aliases()).not.toContain('192.168.10.202/32 ib0:42-0');
  expect(await rig.ssh('restore', [checkpoint, HOST_NAME, UUID], 42, actionDataOf(one))).toMatchObject({ code: 0 });
  expect(aliases()).toContain('192.168.10.202/32 ib0:42-0');
  rmSync(join(checkpoint, '..'), { recursive: true });
  const marked = { ...two, nics: two.nics.map((nic, n) => ({ ...nic, attach: n === 1 })) };
  const mac = two.nics[1]?.mac ?? '';
  expect(await rig.ssh('detach_nic', [UUID, mac], 43, actionDataOf(marked))).toMatchObject({ code: 0, stderr: '' });
  expect(aliases()).toEqual(['192.168.10.202/32 ib0:42-0', '192.168.10.203/32 ib0:43-0']);
});

test('where the table never was, a deploy does not load it over the old rules', async () => {
  const back = await rig.cli(['import', '--rollback']);
  expect(back, back.stderr).toMatchObject({ status: 0 });
  tool('/usr/sbin/nft', 'delete', 'table', 'ip', 'kvm_ib');
  rmSync(join(rig.state, 'table.json'));
  const answer = await rig.deploy(testVm(44, [5]));
  expect(answer.status).not.toBe(0);
  expect(answer.stderr).toContain('rules of iptables translate 3 guests still');
  expect(tool('/usr/sbin/nft', 'list', 'tables')).not.toContain('kvm_ib');
});
