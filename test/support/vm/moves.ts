/** Guests of the pair of hypervisors, the driver actions that move them, and who owns an address. */
import { chownSync } from 'node:fs';
import { join } from 'node:path';
import type { GuestImage } from './guest.ts';
import { consoleOf, guestCommandLine, guestReady } from './guest.ts';
import { BRIDGE } from './lab.ts';
import type { DriverAnswer, TestMigration, TestVm } from './opennebula.ts';
import { actionData, callAsOneVmmExec, domainXml, writeDeploymentFolder } from './opennebula.ts';
import type { HostName, Pair, PairHost } from './pair.ts';
import { ONEADMIN, PAIR_DRIVERS } from './pair.ts';
import { waitFor } from './process.ts';

export interface PairGuest {
  readonly vm: TestVm;
  /** Name of its domain. */
  readonly domain: string;
  readonly guest: string;
  readonly address: string;
  readonly mac: string;
}

/** The n-th guest of the range, n from 2 to 6: VM 40 + n. */
export function pairGuest(n: 2 | 3 | 4 | 5 | 6): PairGuest {
  const id = 40 + n;
  const mac = `02:00:c0:a8:7a:0${n}`;
  const guest = `192.168.122.${n}`;
  const uuid = `6f0a1c1e-6c0e-4d0c-9a0e-5a3b3f1d2c${id}`;
  const vm: TestVm = { id, name: `web-${id}`, uuid, nics: [{ bridge: BRIDGE.name, mac, ip: guest, id: 0 }] };
  return { vm, domain: `one-${id}`, guest, mac, address: `192.168.10.20${n}` };
}

export interface CallOptions {
  /** The driver's folder; `kvm-ib` by default. */
  readonly driver?: 'kvm-ib' | 'kvm';
  readonly timeout?: number;
  /** Added to the environment of the session. */
  readonly env?: Readonly<Record<string, string>>;
}

/** Calls an action on a host as one_vmm_exec does: by ssh as oneadmin, the agent forwarded. */
export function callOn(
  pair: Pair,
  host: HostName,
  action: string,
  { vm }: PairGuest,
  args: readonly string[],
  stdin: string,
  options: CallOptions = {},
): Promise<DriverAnswer> {
  const env = Object.entries(options.env ?? {}).map(([name, value]) => `${name}=${value}`);
  return callAsOneVmmExec({
    ssh: { argv: pair.frontEnd.ssh(host, 'env', ...env, 'bash', '-s'), env: pair.frontEnd.env },
    host: pair.hosts[host],
    script: join(PAIR_DRIVERS, options.driver ?? 'kvm-ib', action),
    args,
    stdin,
    vmId: vm.id,
    hostName: host,
    ...(options.timeout === undefined ? {} : { timeout: options.timeout }),
  });
}

/** Deploys a guest and waits until it serves. @throws Error with its console when it does not come up */
export async function deployOn(pair: Pair, host: HostName, guest: PairGuest, image: GuestImage): Promise<void> {
  const file = writeDeploymentFolder(pair.folder, guest.vm, host);
  chownSync(homeOf(pair, guest), ONEADMIN, ONEADMIN);
  const stdin = domainXml(guest.vm, {
    kernel: image.kernel,
    initramfs: image.initramfs,
    commandLine: guestCommandLine({ address: guest.guest, prefixLength: 24, gateway: BRIDGE.address }),
    console: consolePath(pair, guest),
  });
  const answer = await callOn(pair, host, 'deploy', guest, [file, host], stdin);
  if (answer.code !== 0 || answer.stdout !== `${guest.vm.uuid}\n`) {
    throw new Error(`deploy of VM ${guest.vm.id} on ${host}: ${JSON.stringify(answer)}`);
  }
  await guestReady(consolePath(pair, guest));
}

/** Ends a guest for good. */
export async function shutDown(pair: Pair, guest: PairGuest): Promise<void> {
  for (const host of Object.values(pair.hosts)) {
    if ((await holding(host, guest)).domain === undefined) continue;
    const args = [guest.vm.uuid, host.name];
    const answer = await callOn(pair, host.name, 'cancel', guest, args, actionData(guest.vm, host.name));
    if (answer.code !== 0) throw new Error(`cancel of VM ${guest.vm.id} on ${host.name}: ${JSON.stringify(answer)}`);
  }
}

export function homeOf(pair: Pair, { vm }: PairGuest): string {
  return join(pair.folder, 'datastores/0', String(vm.id));
}

/** QEMU begins it anew on the host that a guest arrives at. */
export function consolePath(pair: Pair, guest: PairGuest): string {
  return join(homeOf(pair, guest), 'console.log');
}

/** For the message of a failed test. */
export function pairLog(pair: Pair, guests: readonly PairGuest[]): string {
  return [
    ...guests.map((guest) => `Console of VM ${guest.vm.id}:\n${consoleOf(consolePath(pair, guest))}`),
    ...Object.values(pair.hosts).map((host) => `libvirtd on ${host.name}:\n${host.libvirt.log()}`),
  ].join('\n');
}

/** `migrate` on the source, as OpenNebula 6.0 to 7.x calls it. */
export function migrate(
  pair: Pair,
  guest: PairGuest,
  from: HostName,
  to: HostName,
  options: CallOptions & Pick<TestMigration, 'shared'> = {},
): Promise<DriverAnswer> {
  const { shared = true, ...call } = options;
  const stdin = actionData(guest.vm, from, { to, shared, home: homeOf(pair, guest) });
  return callOn(pair, from, 'migrate', guest, [guest.vm.uuid, to, from], stdin, { timeout: 120_000, ...call });
}

/** What one host holds of an address: alias with its label, pair of the table, file; and whether the guest runs there. */
export interface Holding {
  readonly alias: string | undefined;
  readonly pair: boolean;
  readonly file: boolean;
  readonly domain: string | undefined;
}

export const NOTHING: Holding = { alias: undefined, pair: false, file: false, domain: undefined };

/** What a host holds that owns the address of a running guest. */
export function owned(guest: PairGuest): Holding {
  return { alias: `ib0:${guest.vm.id}-0`, pair: true, file: true, domain: 'running' };
}

export async function holding(host: PairHost, guest: PairGuest): Promise<Holding> {
  const links = await host.run(['/usr/sbin/ip', '-o', '-4', 'address', 'show', 'dev', 'ib0']);
  const found = [...links.matchAll(/inet (\S+)\/32 scope global (\S+?)\\/g)].find(
    (match) => match[1] === guest.address,
  );
  const maps = [
    await host.run(['/usr/sbin/nft', 'list', 'map', 'ip', 'kvm_ib', 'guest_to_ib']),
    await host.run(['/usr/sbin/nft', 'list', 'map', 'ip', 'kvm_ib', 'ib_to_guest']),
  ];
  const named = maps.map((map) => new RegExp(`[ {]${guest.guest.replaceAll('.', '\\.')}[ ,}\\n]`).test(map));
  if (named[0] !== named[1])
    throw new Error(`${host.name} has one half of the pair of ${guest.guest}: ${maps.join('')}`);
  const file = await host.try(['/usr/bin/test', '-e', `/var/lib/kvm-ib/mappings/vm-${guest.vm.id}.json`]);
  const state = await host.try(['/usr/bin/virsh', '-r', '-c', 'qemu:///system', 'domstate', guest.domain]);
  return {
    alias: found?.[2],
    pair: named[0] === true,
    file: file.status === 0,
    domain: state.status === 0 ? state.stdout.trim() : undefined,
  };
}

export async function holdings(pair: Pair, guest: PairGuest): Promise<Readonly<Record<HostName, Holding>>> {
  const { kvmib01, kvmib02 } = pair.hosts;
  return { kvmib01: await holding(kvmib01, guest), kvmib02: await holding(kvmib02, guest) };
}

/** `kvm-ib status` of both hosts: exit status and what it says. */
export async function statuses(pair: Pair): Promise<Readonly<Record<HostName, string>>> {
  const of = async (host: PairHost) => {
    const { status, stdout, stderr } = await host.kvmIb('status');
    return status === 0 ? 'clean' : `${status}: ${stdout}${stderr}`;
  };
  return { kvmib01: await of(pair.hosts.kvmib01), kvmib02: await of(pair.hosts.kvmib02) };
}

export const CLEAN = { kvmib01: 'clean', kvmib02: 'clean' } as const;

/** Waits until the guest answers the outside client at its IB address. @returns the address that the guest saw */
export async function reached(pair: Pair, guest: PairGuest, limit = 20_000): Promise<string> {
  const answer = await waitFor(
    `the guest at ${guest.address}`,
    () => pair.outside.echo(guest.address, 'hello').catch(() => undefined),
    limit,
  );
  return answer.seen;
}

/** Runs a shell script in the guest, by way of its IB address. @throws Error when it fails */
export async function inGuest(pair: Pair, guest: PairGuest, script: string): Promise<string> {
  const { status, output } = await pair.outside.shell(guest.address, script);
  if (status !== 0) throw new Error(`In VM ${guest.vm.id}, exit ${status}: ${output}`);
  return output;
}
