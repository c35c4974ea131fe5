/** What can go wrong while a guest moves between the pair of hypervisors, done on purpose. Each returns its own way back. */
import type { PairGuest } from './moves.ts';
import type { Pair, PairHost } from './pair.ts';
import { SSHD_CONFIG } from './pair.ts';
import { runTool, waitFor } from './process.ts';

/** Processes of a host whose command line matches, by pid as the host numbers them. */
export async function processes(host: PairHost, pattern: string): Promise<readonly number[]> {
  const { stdout } = await host.try(['/usr/bin/pgrep', '-f', pattern]);
  return stdout.split('\n').filter(Boolean).map(Number);
}

async function kill(host: PairHost, pids: readonly number[]): Promise<void> {
  if (pids.length > 0) await host.try(['/bin/kill', '-KILL', ...pids.map(String)]);
}

const ENGINE = '^[^ ]*node /usr/lib/kvm-ib/engine\\.mjs$';

/** The engines of a host that serve a driver, by pid; not those that only repeat announcements. */
export function engines(host: PairHost): Promise<readonly number[]> {
  return processes(host, ENGINE);
}

/** Kills the engines of a host. @throws Error when there is none */
export async function killEngine(host: PairHost): Promise<void> {
  const pids = await engines(host);
  if (pids.length === 0) throw new Error(`No engine runs on ${host.name}`);
  await kill(host, pids);
}

/** Kills the driver's own process on a host, as a front-end that gives up may; what it has started goes on. */
export async function killDriver(host: PairHost): Promise<void> {
  const pids = await processes(host, '^[^ ]*node /var/tmp/one/vmm/kvm-ib/parser\\.mjs ');
  if (pids.length === 0) throw new Error(`No driver runs on ${host.name}`);
  await kill(host, pids);
}

/** Waits until an engine of the host serves a driver. */
export async function engineStarted(host: PairHost): Promise<void> {
  await waitFor(
    `an engine on ${host.name}`,
    async () => ((await engines(host)).length > 0 ? true : undefined),
    20_000,
    20,
  );
}

/** Waits until none does any more. */
export async function enginesEnded(host: PairHost, limit = 20_000): Promise<void> {
  await waitFor(
    `the engines on ${host.name} to end`,
    async () => ((await engines(host)).length === 0 ? true : undefined),
    limit,
  );
}

/** QEMU of a guest dies on a host. */
export async function killQemu(host: PairHost, { domain }: PairGuest): Promise<void> {
  const pids = await processes(host, `guest=${domain},`);
  if (pids.length === 0) throw new Error(`No QEMU of ${domain} runs on ${host.name}`);
  await kill(host, pids);
}

/** Breaks every ssh connection to a host; new ones are refused until the way back. */
export async function cutSsh(host: PairHost): Promise<() => Promise<void>> {
  await kill(host, await processes(host, 'sshd'));
  return async () => {
    await host.run(['/usr/sbin/sshd', '-f', SSHD_CONFIG]);
  };
}

/** Takes a host off the network of the machines: ssh, libvirt and QEMU's own stream stand still. The fabric stays. */
export async function unplug(host: PairHost): Promise<() => Promise<void>> {
  const link = (state: 'up' | 'down') => runTool(['/usr/sbin/ip', '-n', host.netns, 'link', 'set', 'lan0', state]);
  await link('down');
  return async () => {
    await link('up');
  };
}

/** Takes a host off the fabric. */
export async function unplugFabric(host: PairHost): Promise<() => Promise<void>> {
  const link = (state: 'up' | 'down') => runTool(['/usr/sbin/ip', '-n', host.netns, 'link', 'set', 'ib0', state]);
  await link('down');
  return async () => {
    await link('up');
  };
}

/** Makes the migration of a guest last: MiB each second. Its memory is some 100 MiB. */
export async function slowDown(host: PairHost, { domain }: PairGuest, speed: number): Promise<void> {
  await host.libvirt.virsh('migrate-setspeed', domain, String(speed));
}

/** A domain of that name is defined on a host, so that libvirt does not take the guest. */
export async function occupyName(host: PairHost, { domain }: PairGuest): Promise<() => Promise<void>> {
  const xml = `<domain type='qemu'><name>${domain}</name><memory>1024</memory><os><type arch='x86_64'>hvm</type></os></domain>`;
  const file = '/run/kvm-ib-occupied.xml';
  await host.run(['/usr/bin/tee', file], { input: xml });
  await host.libvirt.virsh('define', file);
  return async () => {
    // The stock script may have done it.
    await host.try(['/usr/bin/virsh', '-c', 'qemu:///system', 'undefine', domain]);
  };
}

/** Something listens on the port of the guest's VNC server, so that QEMU does not start there. */
export async function occupyPort(host: PairHost, { vm }: PairGuest): Promise<() => Promise<void>> {
  const port = String(5900 + vm.id);
  const listens = `^nc -l -k ${port}$`;
  await host.run(['/bin/sh', '-c', `setsid nc -l -k ${port} < /dev/null > /dev/null 2>&1 &`]);
  await waitFor(
    'the port to be taken',
    async () => ((await processes(host, listens)).length > 0 ? true : undefined),
    5_000,
    20,
  );
  return async () => kill(host, await processes(host, listens));
}

/** Ends the migration as `virsh domjobabort` does. */
export async function abortJob(host: PairHost, { domain }: PairGuest): Promise<void> {
  await host.libvirt.virsh('domjobabort', domain);
}

/** A reconcile on both hosts, as the timer has it run. */
export async function reconcileBoth(pair: Pair): Promise<void> {
  for (const host of [pair.hosts.kvmib01, pair.hosts.kvmib02]) {
    const { status, stdout, stderr } = await host.kvmIb('reconcile');
    if (status !== 0) throw new Error(`kvm-ib reconcile on ${host.name}: ${stdout}${stderr}`);
  }
}
