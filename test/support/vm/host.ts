/**
 * A hypervisor of its own inside this machine: mount, UTS and process namespaces round a network namespace, with
 * libvirt's folders and /run on tmpfs, so that libvirtd runs here without seeing or changing the machine's own.
 *
 * Everything in it descends from one process that ends when this process closes its standard input, or dies in
 * whatever way; the kernel then kills the rest of the process namespace (pid_namespaces(7)). So nothing stays behind.
 */
import type { ChildProcess } from 'node:child_process';
import { spawn } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { ToolOptions, ToolResult } from './process.ts';
import { runTool, tryTool, waitFor } from './process.ts';

type Argv = readonly [string, ...string[]];

export interface Host {
  readonly name: string;
  /** A folder that this host and the test both see; libvirt's log is in it. */
  readonly folder: string;
  /** The argv that runs `argv` in this host. */
  readonly inside: (argv: Argv) => [string, ...string[]];
  /** Standard output of a program run in this host. @throws Error when it fails. */
  readonly run: (argv: Argv, options?: ToolOptions) => Promise<string>;
  readonly try: (argv: Argv, options?: ToolOptions) => Promise<ToolResult>;
  /** Ends every process of this host; its mounts vanish with them. A network namespace given by name stays. */
  readonly stop: () => Promise<void>;
}

export interface HostOptions {
  /** Host name, also inside. */
  readonly name: string;
  /** Name of a network namespace (`ip netns add`); absent: that of this process. */
  readonly netns?: string;
  /** An existing empty folder. */
  readonly folder: string;
  /** A folder round `folder` that the host sees too, at the same path: several hosts have the same one. */
  readonly shared?: string;
  /** Addresses by name, for /etc/hosts; absent: its own name is 127.0.0.1. */
  readonly addresses?: Readonly<Record<string, string>>;
  /**
   * Puts copy-on-write layers over /etc, /usr, /var and /tmp, so that kvm-ib and others can be installed here. Value: the root
   * of unpacked packages that are seen as if they were installed, or ''.
   */
  readonly layers?: string;
}

const PATH = '/usr/sbin:/usr/bin:/sbin:/bin';

/** Folders that libvirt writes; the packages made them. */
const LIBVIRT_FOLDERS = ['/etc/libvirt', '/var/lib/libvirt', '/var/log/libvirt', '/var/cache/libvirt'] as const;

// bash as process 1: unlike dash it reaps the orphans that fall to it while it waits in `read`. Without that a killed
// qemu stays a zombie, and libvirt waits for it as for a living process. The test's folder may lie below /run.
const INIT = `
set -e
hostname "$1"
mount --bind "$2" /mnt
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /run/kvm-ib "$2"
mount --move /mnt "$2"
printf '%s' "$3" > /run/hosts
if [ "$4" = layers ]; then
  for name in etc usr var tmp; do
    mkdir -p "/run/layers/$name" "/run/layers/$name.work"
    chmod --reference="/$name" "/run/layers/$name"
    lower=/$name
    [ -z "$5" ] || [ ! -d "$5/$name" ] || lower=$5/$name:/$name
    mount -t overlay overlay -o "lowerdir=$lower,upperdir=/run/layers/$name,workdir=/run/layers/$name.work" "/$name"
  done
fi
mount --bind /run/hosts /etc/hosts
shift 5
for folder; do mount -t tmpfs tmpfs "$folder"; done
echo up
exec 1>&-
while read -r _; do :; done
`;

/** Makes a host. Needs root, and a mount namespace in which mounts do not propagate (scripts/in-netns.sh). */
export async function startHost(options: HostOptions): Promise<Host> {
  for (const folder of LIBVIRT_FOLDERS) {
    if (!existsSync(folder))
      throw new Error(`Cannot start a host: ${folder} is missing. Install libvirt-daemon-system`);
  }
  const enter = options.netns === undefined ? [] : ['/usr/sbin/ip', 'netns', 'exec', options.netns];
  const unshare = ['/usr/bin/unshare', '--mount', '--uts', '--pid', '--fork', '--kill-child', '--mount-proc'];
  const hosts = Object.entries(options.addresses ?? { [options.name]: '127.0.0.1' });
  const init = [
    ...['/bin/bash', '-c', INIT, 'host', options.name, options.shared ?? options.folder],
    ['127.0.0.1 localhost\n', ...hosts.map(([name, address]) => `${address} ${name}\n`)].join(''),
    ...(options.layers === undefined ? ['', ''] : ['layers', options.layers]),
    ...LIBVIRT_FOLDERS,
  ];
  const [program = '', ...args] = [...enter, ...unshare, ...init];
  const child = spawn(program, args, {
    stdio: ['pipe', 'pipe', 'pipe'],
    env: { PATH, LC_ALL: 'C' },
  });
  await untilUp(child);
  // `ip netns exec` and `unshare` replaced each other in one process: the namespaces are its own, except that of
  // processes, which begins with its child.
  const ns = `/proc/${child.pid}/ns`;
  const inside = (argv: Argv): [string, ...string[]] => [
    '/usr/bin/nsenter',
    `--mount=${ns}/mnt`,
    `--net=${ns}/net`,
    `--uts=${ns}/uts`,
    `--pid=${ns}/pid_for_children`,
    '--',
    ...argv,
  ];
  return {
    name: options.name,
    folder: options.folder,
    inside,
    run: (argv, toolOptions) => runTool(inside(argv), toolOptions),
    try: (argv, toolOptions) => tryTool(inside(argv), toolOptions),
    stop: async () => {
      const ended = new Promise((resolve) => child.once('close', resolve));
      if (child.exitCode !== null || child.signalCode !== null) return;
      child.stdin?.end();
      await ended;
    },
  };
}

function untilUp(child: ChildProcess): Promise<void> {
  return new Promise((resolve, reject) => {
    let said = '';
    child.stderr?.on('data', (chunk: Buffer) => {
      said += chunk.toString();
    });
    child.stdout?.once('data', () => resolve());
    child.once('error', reject);
    child.once('close', (status) => reject(new Error(`Cannot start a host (exit ${status}): ${said}`)));
  });
}

export interface Libvirt {
  /** `virsh` in this host. @throws Error when it fails. */
  readonly virsh: (...args: readonly string[]) => Promise<string>;
  /** Names of the active domains. */
  readonly active: () => Promise<readonly string[]>;
  /** What libvirtd logged at level warning and above. */
  readonly log: () => string;
  /** Ends libvirtd by its pid, and waits for it. Guests go on; `Host.stop` ends them. */
  readonly stop: () => Promise<void>;
}

const PID_FILE = '/run/libvirtd.pid';

/**
 * Starts libvirtd in the host and waits until virsh gets an answer. qemu runs as root, without a security
 * driver or cgroups, and writes its console files itself, so virtlogd is not needed.
 */
export async function startLibvirt(host: Host): Promise<Libvirt> {
  const logFile = join(host.folder, 'libvirtd.log');
  const uuid = await host.run(['/bin/cat', '/proc/sys/kernel/random/uuid']);
  const files: Record<string, readonly string[]> = {
    // Two hosts on one machine need different ids, else libvirt refuses to migrate from one to the other.
    '/etc/libvirt/libvirtd.conf': [
      `host_uuid = "${uuid.trim()}"`,
      'auth_unix_ro = "none"',
      'auth_unix_rw = "none"',
      'unix_sock_rw_perms = "0777"',
      `log_outputs = "3:file:${logFile}"`,
    ],
    '/etc/libvirt/qemu.conf': [
      'security_driver = "none"',
      'user = "root"',
      'group = "root"',
      'cgroup_controllers = []',
      'namespaces = []',
      'remember_owner = 0',
      'stdio_handler = "file"',
    ],
  };
  for (const [path, lines] of Object.entries(files)) {
    await host.run(['/usr/bin/tee', path], { input: `${lines.join('\n')}\n` });
  }
  await host.run(['/usr/sbin/libvirtd', '--daemon', '--pid-file', PID_FILE]);
  const log = () => (existsSync(logFile) ? readFileSync(logFile, 'utf8') : '');
  const virsh = (...args: readonly string[]) => host.run(['/usr/bin/virsh', '-c', 'qemu:///system', ...args]);
  try {
    await waitFor('libvirtd to answer', () => virsh('list', '--name').catch(() => undefined), 20_000);
  } catch (error) {
    throw new Error(`libvirtd does not answer\n${log()}`, { cause: error });
  }
  return {
    virsh,
    log,
    active: async () => (await virsh('list', '--name')).split('\n').filter((name) => name !== ''),
    stop: async () => {
      await host.try(['/bin/sh', '-c', `kill "$(cat ${PID_FILE})"`]);
      const gone = ['/bin/sh', '-c', `! kill -0 "$(cat ${PID_FILE} 2>/dev/null)" 2>/dev/null`] as const;
      await waitFor('libvirtd to end', async () => ((await host.try(gone)).status === 0 ? true : undefined), 10_000);
    },
  };
}

/**
 * Starts a host-only network as kvm-ib wants it: `forward mode='open'`, which adds no firewall rule, and an MTU.
 * DNS is off, so no dnsmasq is needed.
 */
export async function startNetwork(
  host: Host,
  libvirt: Libvirt,
  net: { readonly bridge: string; readonly address: string; readonly mtu: number; readonly mac?: string },
): Promise<void> {
  const path = '/run/kvm-ib-network.xml';
  const xml = `<network>
  <name>kvm-ib</name>
  <forward mode='open'/>
  <bridge name='${net.bridge}' stp='off' delay='0'/>${net.mac === undefined ? '' : `\n  <mac address='${net.mac}'/>`}
  <mtu size='${net.mtu}'/>
  <dns enable='no'/>
  <ip address='${net.address}' netmask='255.255.255.0'/>
</network>
`;
  await host.run(['/usr/bin/tee', path], { input: xml });
  await libvirt.virsh('net-create', path);
}
