/**
 * Actions at once, in any order: a randomized test over 500 interleavings on the real kernel, and rounds of 15 real driver
 * processes. After each the kernel, the files and the domains must say the same.
 *
 * One interleaving is a handful of VMs, each with actions as OpenNebula sends them (one after the other, except for a cancel or the
 * same action once more, which may come in between), and beside them reconciles, guests that end by themselves, state hooks, and
 * drivers that die between two steps. The seed of a failure is in its message.
 */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { Mapping } from '../../lib/core/mapping.ts';
import type { Holder } from '../../lib/core/state.ts';
import type { ActionRequest } from '../../lib/ops/actions.ts';
import { commit, finish, mark, prepare, release, settle, start, undo } from '../../lib/ops/actions.ts';
import { reconcile } from '../../lib/ops/reconcile.ts';
import { sync } from '../../lib/ops/sync.ts';
import type { Rig } from '../support/driver.ts';
import { actionDataOf, createRig, HOST_NAME, testVm, UUID } from '../support/driver.ts';
import { holderOf, mapping, vmOwner } from '../support/fake-host.ts';
import type { RealHost } from '../support/kernel-host.ts';
import { createRealHost, ip, makeLinks, nft, removeLinks } from '../support/kernel-host.ts';
import type { LibvirtStandIn } from '../support/libvirt-stand-in.ts';
import { livelyStock, startLibvirtStandIn } from '../support/libvirt-stand-in.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const INTERLEAVINGS = 500;
const VMS = [1, 2, 3] as const;

/** mulberry32: small, and the same on every machine. */
function random(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return Math.floor((((t ^ (t >>> 14)) >>> 0) / 2 ** 32) * below);
  };
}

/** NIC 0 of VM n has guest address n + 1, NIC 1 has n + 5. */
const nicOf = (vm: number, nic: number): Mapping => mapping(nic === 0 ? vm + 1 : vm + 5, { vm, nic });

/** What the kernel has, one text each: pairs of both maps, aliases. */
function kernelSays(): readonly string[] {
  const elements = (map: string) =>
    [...nft('list', 'map', 'ip', 'kvm_ib', map).matchAll(/(\d+\.\d+\.\d+\.\d+)[^:,{}]*: (\d+\.\d+\.\d+\.\d+)/g)].map(
      ([, key, value]) => `${map} ${key} ${value}`,
    );
  const aliases = [
    ...ip('-o', '-4', 'address', 'show', 'dev', 'ib0').matchAll(/inet (\S+) scope global (kib\S+|ib0:\S+?)\\/g),
  ].map(([, address, label]) => `${address} ${label}`);
  return [...elements('guest_to_ib'), ...elements('ib_to_guest'), ...aliases].sort();
}

function wantedOf(mappings: readonly Mapping[]): readonly string[] {
  return mappings
    .flatMap((m) => [
      `guest_to_ib ${m.guest} ${m.address}`,
      `ib_to_guest ${m.address} ${m.guest}`,
      `${m.address}/32 ${m.label}`,
    ])
    .sort();
}

describe('500 interleavings', () => {
  let host: RealHost;
  let nextPid = 1000;
  /** VM -> NICs of its domain. */
  const domains = new Map<number, Set<number>>();
  /** What happened in this interleaving, for the message of a failure. */
  let trace: string[] = [];

  beforeAll(async () => {
    makeLinks();
    // Nobody is on the fabric, and the peer of ib0 is in this very namespace: probes have tests of their own.
    host = Object.assign(await createRealHost(), { prober: { probe: async () => [] } });
    await reconcile(host);
  });
  afterAll(removeLinks);

  function tellLibvirt(): void {
    host.active = new Set(domains.keys());
    host.interfaces.clear();
    for (const [vm, nics] of domains)
      host.interfaces.set(
        vm,
        [...nics].map((nic) => nicOf(vm, nic).mac ?? ''),
      );
  }

  /** The part that the stock script has: waits, then changes the domain or fails. */
  async function stock(pause: number, change: () => boolean): Promise<boolean> {
    await new Promise((resolve) => setTimeout(resolve, pause));
    const ok = change();
    tellLibvirt();
    return ok;
  }

  /** One step of ours, written down. */
  async function step(what: string, request: ActionRequest, act: Promise<unknown>): Promise<void> {
    const name = `${what} ${request.action} of ${request.owner.vm} by ${request.holder.pid}`;
    trace.push(`> ${name}`);
    await act;
    trace.push(`< ${name}: domains ${[...domains].map(([vm, nics]) => `${vm}:${[...nics]}`).join(' ')}`);
  }

  interface Chances {
    readonly pick: (below: number) => number;
  }

  function requestOf(
    vm: number,
    action: string,
    nics: readonly number[],
    attaching: readonly number[] = [],
  ): ActionRequest {
    const holder: Holder = holderOf(nextPid++);
    const wish = { mappings: nics.map((nic) => nicOf(vm, nic)), unmapped: [], attaching };
    return { owner: vmOwner(vm), action, holder, wish };
  }

  /** Once in a while the driver dies before its next step, and the stock script with it. */
  function dies({ pick }: Chances, request: ActionRequest): boolean {
    if (pick(15) > 0) return false;
    host.dead.add(request.holder.pid);
    trace.push(`${request.action} of ${request.owner.vm} by ${request.holder.pid} dies`);
    return true;
  }

  async function conclude(request: ActionRequest, ok: boolean, onSuccess: () => Promise<unknown>): Promise<void> {
    if (ok) await step('success', request, onSuccess());
    else await step('undo', request, undo(host, request.owner, request.holder, request.action));
  }

  async function startVm(chances: Chances, vm: number): Promise<void> {
    const request = requestOf(vm, 'deploy', vm === 3 ? [0, 1] : [0]);
    await step('start', request, start(host, request));
    if (dies(chances, request)) return;
    const fails = chances.pick(6) === 0;
    const ok = await stock(chances.pick(12), () => {
      if (fails || domains.has(vm)) return false;
      domains.set(vm, new Set(request.wish.mappings.map((m) => m.nic ?? 0)));
      return true;
    });
    if (dies(chances, request)) return;
    await conclude(request, ok, () => commit(host, request.owner, request.holder, request.wish.mappings));
  }

  async function endVm(chances: Chances, vm: number, action: string): Promise<void> {
    const request = requestOf(vm, action, []);
    const fails = chances.pick(8) === 0;
    const ok = await stock(chances.pick(12), () => {
      if (fails) return false;
      domains.delete(vm);
      return true;
    });
    if (dies(chances, request)) return;
    if (ok) await step('release', request, release(host, request));
    else await step('settle', request, settle(host, request.owner, request.holder));
  }

  async function plug(chances: Chances, vm: number): Promise<void> {
    const request = requestOf(vm, 'attach_nic', [0, 1], [1]);
    await step('prepare', request, prepare(host, request));
    if (dies(chances, request)) return;
    const fails = chances.pick(5) === 0;
    const ok = await stock(chances.pick(12), () => {
      const nics = domains.get(vm);
      if (fails || nics === undefined || nics.has(1)) return false;
      nics.add(1);
      return true;
    });
    if (dies(chances, request)) return;
    await conclude(request, ok, () => commit(host, request.owner, request.holder));
  }

  async function unplug(chances: Chances, vm: number): Promise<void> {
    const request = requestOf(vm, 'detach_nic', [0]);
    await step('mark', request, mark(host, request));
    if (dies(chances, request)) return;
    const fails = chances.pick(5) === 0;
    const ok = await stock(chances.pick(12), () => !fails && domains.get(vm)?.delete(1) === true);
    if (dies(chances, request)) return;
    await conclude(request, ok, () => finish(host, request));
  }

  async function reboot(chances: Chances, vm: number): Promise<void> {
    // OpenNebula may know a NIC that the domain lacks, and the other way round.
    const request = requestOf(vm, 'reboot', chances.pick(2) === 0 ? [0] : [0, 1]);
    await step('prepare', request, prepare(host, request));
    if (dies(chances, request)) return;
    const ok = await stock(chances.pick(6), () => domains.has(vm));
    if (dies(chances, request)) return;
    await conclude(request, ok, () => commit(host, request.owner, request.holder));
  }

  const ACTIONS = [startVm, startVm, endCalled('shutdown'), endCalled('save'), plug, unplug, reboot] as const;

  function endCalled(action: string) {
    return (chances: Chances, vm: number) => endVm(chances, vm, action);
  }

  async function interleaving(seed: number): Promise<void> {
    const pick = random(seed);
    const chances = { pick };
    trace = [];
    domains.clear();
    for (const vm of VMS) if (pick(2) === 0) domains.set(vm, new Set([0]));
    tellLibvirt();
    await reconcile(host);
    for (const vm of domains.keys()) await sync(host, { ...requestOf(vm, 'deploy', [0]), wish: [nicOf(vm, 0)] });
    const later = async (act: () => Promise<unknown>) => {
      await new Promise((resolve) => setTimeout(resolve, pick(25)));
      await act();
    };
    const vms = VMS.map(async (vm) => {
      for (let n = 1 + pick(3); n > 0; n -= 1) {
        const action = ACTIONS[pick(ACTIONS.length)] ?? startVm;
        const twice = pick(6) === 0 ? [later(() => action(chances, vm))] : [];
        const cancelled = pick(5) === 0 ? [later(() => endVm(chances, vm, 'cancel'))] : [];
        await Promise.all([action(chances, vm), ...twice, ...cancelled]);
      }
    });
    const beside = [
      ...(pick(2) === 0 ? [later(() => step('reconcile', requestOf(0, '', []), reconcile(host)))] : []),
      ...(pick(3) === 0
        ? [
            later(async () => {
              const vm = VMS[pick(VMS.length)] ?? 1;
              trace.push(`${vm} powers itself off`);
              domains.delete(vm);
              tellLibvirt();
            }),
          ]
        : []),
      ...(pick(3) === 0 ? [later(() => settle(host, vmOwner(VMS[pick(VMS.length)] ?? 1), holderOf(nextPid++)))] : []),
    ];
    await Promise.all([...vms, ...beside]);
    await reconcile(host);
    check(seed);
  }

  function check(seed: number): void {
    const said = `seed ${seed}:\n${trace.join('\n')}\n`;
    const { files, unreadable } = host.store.all();
    expect(unreadable, said).toEqual([]);
    const held = files.flatMap((file) => file.mappings);
    expect(
      files.map((file) => `${file.phase.name} ${file.previous.length}`),
      said,
    ).toEqual(files.map(() => 'active 0'));
    const had = [...domains].flatMap(([vm, nics]) => [...nics].map((nic) => nicOf(vm, nic)));
    const names = (mappings: readonly Mapping[]) => mappings.map((m) => `${m.vm}-${m.nic} ${m.guest}`).sort();
    expect(names(held), `${said}: files and domains`).toEqual(names(had));
    expect(kernelSays(), `${said}: kernel and domains`).toEqual(wantedOf(had));
  }

  const base = Number(process.env['KVM_IB_TEST_SEED'] ?? 20_261_125);
  test(`end with kernel, files and domains in agreement (seeds from ${base})`, { timeout: 300_000 }, async () => {
    for (let n = 0; n < INTERLEAVINGS; n += 1) await interleaving(base + n);
  });
});

describe('15 drivers at once', () => {
  let rig: Rig;
  let libvirt: LibvirtStandIn;
  beforeAll(async () => {
    rig = await createRig();
    libvirt = startLibvirtStandIn(rig.folder);
    const wide =
      '  - { name: ib, device: ib0, bridge: virbr1, guests: 192.168.122.2-192.168.122.21, addresses: 192.168.10.202-192.168.10.221 }\n';
    writeFileSync(rig.config, `networks:\n${wide}`);
    rig.behave(livelyStock(libvirt));
    expect(await rig.cli(['reconcile'])).toMatchObject({ status: 0 });
  });
  afterAll(() => {
    libvirt?.stop();
    rig?.remove();
  });

  const vms = Array.from({ length: 15 }, (_, n) => testVm(100 + n, [n + 2]));
  const wanted = (running: readonly number[]) =>
    running
      .flatMap((id) => {
        const [guest, address] = [`192.168.122.${id - 98}`, `192.168.10.${id + 102}`];
        return [`guest_to_ib ${guest} ${address}`, `ib_to_guest ${address} ${guest}`, `${address}/32 ib0:${id}-0`];
      })
      .sort();

  test('deploy, reboot, save, restore, shut down, with reconciles in between', { timeout: 120_000 }, async () => {
    const checkpoint = (id: number) => join(rig.folder, `checkpoint-${id}`);
    const call = (action: string, args: readonly string[], vm: (typeof vms)[number]) =>
      rig.call(action, args, vm.id, { stdin: `${actionDataOf(vm)}\n`, limit: 60_000 });
    const all = async (act: (vm: (typeof vms)[number]) => Promise<{ status: number | null; stderr: string }>) => {
      const reconciles = [rig.cli(['reconcile'], { limit: 60_000 }), rig.cli(['reconcile'], { limit: 60_000 })];
      const results = await Promise.all(vms.map(act));
      expect(results.map((r) => `${r.status} ${r.stderr}`)).toEqual(vms.map(() => '0 '));
      for (const { status, stderr } of await Promise.all(reconciles)) expect(`${status} ${stderr}`).toBe('0 ');
    };
    const ids = vms.map((vm) => vm.id);
    await all((vm) => rig.deploy(vm));
    expect(kernelSays()).toEqual(wanted(ids));
    await all((vm) => (vm.id % 2 ? call('reboot', [UUID, HOST_NAME], vm) : call('reset', [UUID, HOST_NAME], vm)));
    expect(kernelSays()).toEqual(wanted(ids));
    await all((vm) => call('save', [UUID, checkpoint(vm.id), HOST_NAME], vm));
    expect(kernelSays()).toEqual([]);
    await all((vm) => call('restore', [checkpoint(vm.id), HOST_NAME, UUID], vm));
    expect(kernelSays()).toEqual(wanted(ids));
    expect([...libvirt.domains().keys()].sort()).toEqual(ids);
    await all((vm) => call('shutdown', [UUID, HOST_NAME], vm));
    expect(kernelSays()).toEqual([]);
    expect(rig.phases()).toEqual({});
  });
});
