/**
 * Two hypervisors on one fabric, each with links, firewall, mounts and processes of its own, the real driver and command,
 * a state directory, and a libvirt stand-in; and a client on the fabric, `out`. A host can be cut off from the fabric, and lose
 * its power: what it has on disk is all that is left.
 *
 *     out ─ ib0 ─┐             ┌─ ib0 ─ h1 ─ virbr1 ─ guests 192.168.122.2 …
 *                fabric (br0) ─┤
 *                              └─ ib0 ─ h2 ─ virbr1 ─ guests 192.168.122.2 …
 *
 * Each host has every guest, ready to answer: which of them is reached is a matter of mappings alone.
 */
import type { ChildProcess } from 'node:child_process';
import { spawn, spawnSync } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Result } from './driver.ts';
import { ACTIONS_WITH_STOCK, CONFIG, copyBundles, LINK_MTU, run, STOCK, tool, writeScript } from './driver.ts';
import type { LibvirtStandIn } from './libvirt-stand-in.ts';
import { livelyStock, writeLibvirtStandIn } from './libvirt-stand-in.ts';
import { requireOwnNetns } from './netns.ts';
import type { Host } from './vm/host.ts';
import type { DriverAnswer } from './vm/opennebula.ts';
import { callAsOneVmmExec } from './vm/opennebula.ts';

const repository = join(dirname(fileURLToPath(import.meta.url)), '../..');
const IP = '/usr/sbin/ip';
const NFT = '/usr/sbin/nft';
/** Guests by the last octet of their address. */
const GUESTS = [2, 3] as const;
/** Long enough for an answer on a busy machine. */
const PROBE_MS = '150';

export type HostName = 'h1' | 'h2';
const NUMBER: Record<HostName, number> = { h1: 1, h2: 2 };

export interface Hypervisor {
  readonly name: HostName;
  /** As OpenNebula knows it. */
  readonly hostName: string;
  /** Hardware address of ib0. */
  readonly station: string;
  readonly folder: string;
  readonly libvirt: Omit<LibvirtStandIn, 'stop'>;
  /** Calls a driver script as one_vmm_exec does. */
  action(action: string, args: readonly string[], vmId: number, stdin: string): Promise<DriverAnswer>;
  cli(...args: readonly string[]): Promise<Result>;
  /** Shell text for the stock scripts instead of what they usually do; undefined: that again. */
  behave(text: string | undefined): void;
  /** Names of the stock scripts that ran, in order. */
  runs(): readonly string[];
  /** IB addresses of ib0 that are not the host's own, and pairs of the table, one text each. */
  kernel(): readonly string[];
  /** `owner -> phase` of every state file. */
  files(): Readonly<Record<string, string>>;
  /** Takes the carrier from ib0, or gives it back. */
  carrier(on: boolean): void;
  /** Takes its port out of the fabric, or puts it back: ib0 does not notice. */
  reached(on: boolean): void;
  hasPower(): boolean;
  /** Ends the processes that repeat its announcements: what a test does in a second takes longer than that elsewhere. */
  endRepeats(): void;
  /** Whether it reaches the fabric. */
  isOnFabric(): boolean;
  /** Ends every process and all that the kernel holds, without a word to anybody. */
  powerOff(): Promise<void>;
  /** Another boot, on which nothing has been reconciled yet. */
  powerOn(): Promise<void>;
}

export interface Hosts {
  readonly h1: Hypervisor;
  readonly h2: Hypervisor;
  readonly folder: string;
  /** Which host the client's packets to an IB address come to, by its answer; undefined: nobody answers. */
  answering(address: string): HostName | 'another' | undefined;
  remove(): Promise<void>;
}

export async function createHosts(): Promise<Hosts> {
  requireOwnNetns();
  const folder = mkdtempSync('/tmp/kvm-ib-hosts-');
  ip('netns', 'add', 'fabric');
  quiet('fabric');
  ip('-n', 'fabric', 'link', 'add', 'br0', 'mtu', String(LINK_MTU), 'type', 'bridge', 'forward_delay', '0');
  ip('-n', 'fabric', 'link', 'set', 'br0', 'up');
  ip('netns', 'add', 'out');
  quiet('out');
  plug('out', '02:00:00:00:0f:01');
  ip('-n', 'out', 'address', 'add', '192.168.10.100/24', 'dev', 'ib0');
  const hosts = { h1: createHypervisor('h1', folder), h2: createHypervisor('h2', folder) };
  for (const host of Object.values(hosts)) await host.powerOn();
  return {
    ...hosts,
    folder,
    answering(address) {
      const ping = ['-n', '-c', '1', '-W', '0.5', address];
      const { status } = spawnSync(IP, ['netns', 'exec', 'out', '/usr/bin/ping', ...ping], { stdio: 'ignore' });
      if (status !== 0) return undefined;
      const neighbour = ip('-n', 'out', 'neighbour', 'show', 'to', address);
      return Object.values(hosts).find(({ station }) => neighbour.includes(station))?.name ?? 'another';
    },
    async remove() {
      for (const host of Object.values(hosts)) await host.powerOff();
      for (const name of ['out', 'fabric']) ip('netns', 'delete', name);
      rmSync(folder, { recursive: true, force: true });
    },
  };
}

function ip(...args: readonly string[]): string {
  return tool(IP, ...args);
}

/** IPv6 addresses come and go by themselves. */
function quiet(netns: string): void {
  const off = ['net.ipv6.conf.all.disable_ipv6=1', 'net.ipv6.conf.default.disable_ipv6=1'];
  ip('netns', 'exec', netns, 'sysctl', '-qw', ...off);
  ip('-n', netns, 'link', 'set', 'lo', 'up');
}

/** Joins ib0 of a namespace with the fabric. */
function plug(netns: string, station: string): void {
  const mtu = ['mtu', String(LINK_MTU)];
  const peer = ['peer', 'name', `to-${netns}`, 'netns', 'fabric', ...mtu];
  ip('link', 'add', 'ib0', 'netns', netns, 'address', station, ...mtu, 'type', 'veth', ...peer);
  ip('-n', 'fabric', 'link', 'set', `to-${netns}`, 'master', 'br0', 'up');
  ip('-n', netns, 'link', 'set', 'ib0', 'up');
}

// bash as process 1 of its own process namespace, which ends with it: see test/support/vm/host.ts.
const INIT = `
set -e
mount --bind "$1" /usr/bin/virsh
mount --bind "$2" /proc/sys/kernel/random/boot_id
echo up
exec 1>&-
while read -r _; do :; done
`;

function createHypervisor(name: HostName, base: string): Hypervisor {
  const folder = join(base, name);
  const [drivers, stock, record, state] = ['vmm/kvm-ib', 'vmm/kvm', 'record', 'state'].map((at) =>
    join(folder, at),
  ) as [string, string, string, string];
  const behaviour = join(folder, 'behaviour');
  for (const path of [drivers, stock, record, state]) mkdirSync(path, { recursive: true });
  cpSync(join(repository, 'drivers/vmm/kvm-ib'), drivers, { recursive: true });
  copyBundles(drivers, ['parser.mjs', 'engine.mjs']);
  copyBundles(folder, ['kvm-ib.mjs']);
  for (const action of ACTIONS_WITH_STOCK) writeScript(join(stock, action), STOCK(record, behaviour));
  writeFileSync(join(folder, 'kvm-ib.yaml'), CONFIG);
  const { script, ...libvirt } = writeLibvirtStandIn(join(folder, 'libvirt'));
  const env = {
    KVM_IB_CONFIG: join(folder, 'kvm-ib.yaml'),
    KVM_IB_STATE_DIR: state,
    KVM_IB_PROBE_MS: PROBE_MS,
  };
  const hostName = `kvmib0${NUMBER[name]}`;
  const station = `02:00:00:00:00:0${NUMBER[name]}`;
  let init: ChildProcess | undefined;
  let [hasCarrier, isPlugged] = [true, true];

  const inside = (argv: readonly [string, ...string[]]): [string, ...string[]] => {
    if (init === undefined) throw new Error(`${name} has no power`);
    const ns = `/proc/${init.pid}/ns`;
    const spaces = [`--mount=${ns}/mnt`, `--net=${ns}/net`, `--pid=${ns}/pid_for_children`];
    return ['/usr/bin/nsenter', ...spaces, '--', ...argv];
  };

  const host: Hypervisor = {
    name,
    hostName,
    station,
    folder,
    libvirt,
    action: (action, args, vmId, stdin) =>
      callAsOneVmmExec({
        host: { inside } as unknown as Host,
        script: join(drivers, action),
        args,
        stdin,
        vmId,
        hostName,
        env,
      }),
    cli: (...args) =>
      run(inside([process.execPath, join(folder, 'kvm-ib.mjs'), ...args]), {
        env: { ...env, PATH: '/usr/bin:/bin', LANG: 'C' },
      }),
    behave: (text) => writeFileSync(behaviour, text ?? livelyStock(libvirt)),
    runs: () => {
      const path = join(record, 'runs');
      return existsSync(path) ? readFileSync(path, 'latin1').trim().split('\n') : [];
    },
    kernel() {
      if (init === undefined) return [];
      const aliases = [...ip('-n', name, '-o', '-4', 'address', 'show', 'dev', 'ib0').matchAll(/inet (\S+)\/32 /g)];
      // After a boot there is none.
      const list = ['netns', 'exec', name, NFT, 'list', 'table', 'ip', 'kvm_ib'];
      const table = spawnSync(IP, list, { encoding: 'latin1' }).stdout;
      const pairs = [
        ...table.matchAll(/(192\.168\.\d+\.\d+)(?: counter[^:,}]*)?(?: comment "[^"]*")? : (192\.168\.\d+\.\d+)/g),
      ];
      return [
        ...aliases.map(([, address]) => `${address}`),
        ...pairs.map(([, key, data]) => `${key} : ${data}`),
      ].sort();
    },
    files() {
      const mappings = join(state, 'mappings');
      const names = existsSync(mappings) ? readdirSync(mappings).filter((file) => file.endsWith('.json')) : [];
      return Object.fromEntries(
        names.map((file) => {
          const { phase } = JSON.parse(readFileSync(join(mappings, file), 'utf8')) as { phase: { name: string } };
          return [file.slice(0, -'.json'.length), phase.name];
        }),
      );
    },
    carrier(on) {
      ip('-n', 'fabric', 'link', 'set', `to-${name}`, on ? 'up' : 'down');
      hasCarrier = on;
    },
    reached(on) {
      ip('-n', 'fabric', 'link', 'set', `to-${name}`, ...(on ? ['master', 'br0'] : ['nomaster']));
      isPlugged = on;
    },
    endRepeats() {
      for (const pid of readdirSync('/proc').filter((entry) => /^\d+$/.test(entry))) {
        try {
          const line = readFileSync(`/proc/${pid}/cmdline`, 'latin1');
          if (line.includes(folder) && line.includes('--repeat-announcements')) process.kill(Number(pid));
        } catch {
          // It has ended by itself.
        }
      }
    },
    hasPower: () => init !== undefined,
    isOnFabric: () => init !== undefined && hasCarrier && isPlugged,
    async powerOff() {
      if (init === undefined) return;
      const ended = once(init, 'close');
      init.kill('SIGKILL');
      init = undefined;
      await ended;
      libvirt.reset();
      ip('-n', name, 'link', 'delete', 'ib0');
      for (const n of GUESTS) ip('netns', 'delete', `${name}-g${n}`);
      ip('netns', 'delete', name);
    },
    async powerOn() {
      ip('netns', 'add', name);
      quiet(name);
      ip('netns', 'exec', name, 'sysctl', '-qw', 'net.ipv4.ip_forward=1', 'net.netfilter.nf_conntrack_tcp_loose=1');
      plug(name, station);
      [hasCarrier, isPlugged] = [true, true];
      ip('-n', name, 'address', 'add', `192.168.10.${NUMBER[name]}/24`, 'dev', 'ib0');
      ip('-n', name, 'link', 'add', 'virbr1', 'mtu', String(LINK_MTU), 'type', 'bridge', 'forward_delay', '0');
      ip('-n', name, 'link', 'set', 'virbr1', 'up');
      ip('-n', name, 'address', 'add', '192.168.122.1/24', 'dev', 'virbr1');
      for (const n of GUESTS) addGuest(name, n);
      const bootId = join(folder, 'boot-id');
      writeFileSync(bootId, `${randomUUID()}\n`);
      const unshare = ['/usr/bin/unshare', '--mount', '--pid', '--fork', '--kill-child', '--mount-proc'];
      const child = spawn(
        IP,
        ['netns', 'exec', name, ...unshare, '/bin/bash', '--norc', '-c', INIT, name, script, bootId],
        {
          stdio: ['pipe', 'pipe', 'inherit'],
          env: { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' },
        },
      );
      await Promise.race([
        once(child.stdout, 'data'),
        once(child, 'close').then(() => Promise.reject(new Error(`${name} does not start`))),
      ]);
      init = child;
    },
  };
  host.behave(undefined);
  return host;
}

function addGuest(name: HostName, n: number): void {
  const guest = `${name}-g${n}`;
  ip('netns', 'add', guest);
  quiet(guest);
  const station = `02:00:c0:a8:7a:0${n}`;
  const mtu = ['mtu', String(LINK_MTU)];
  const peer = ['peer', 'name', `vnet${n}`, 'netns', name, ...mtu];
  ip('link', 'add', 'eth0', 'netns', guest, 'address', station, ...mtu, 'type', 'veth', ...peer);
  ip('-n', name, 'link', 'set', `vnet${n}`, 'master', 'virbr1', 'up');
  ip('-n', guest, 'link', 'set', 'eth0', 'up');
  ip('-n', guest, 'address', 'add', `192.168.122.${n}/24`, 'dev', 'eth0');
  ip('-n', guest, 'route', 'add', 'default', 'via', '192.168.122.1');
}

/** Whether a guest of a host reaches the client. */
export function guestReachesOut(name: HostName, n: number): boolean {
  const ping = ['-n', '-c', '1', '-W', '0.5', '192.168.10.100'];
  return spawnSync(IP, ['netns', 'exec', `${name}-g${n}`, '/usr/bin/ping', ...ping], { stdio: 'ignore' }).status === 0;
}
