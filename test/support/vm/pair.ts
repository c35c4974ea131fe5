/**
 * Two hypervisors, kvmib01 and kvmib02, as a site has them: kvm-ib installed by its own command, OpenNebula's user oneadmin
 * who may start the engine by sudo and nothing else, libvirt, sshd, the drivers in /var/tmp/one, a datastore that both see.
 *
 *   ib0   the fabric: both hosts and an outside client on one switch, with the MTU of IPoIB in connected mode
 *   lan0  the network of the machines: ssh, libvirt and QEMU's own migration, and the front-end
 *
 * The front-end is a place to type ssh from, with an agent that holds oneadmin's key; the hosts themselves have no key.
 */
import { spawn } from 'node:child_process';
import { chmodSync, chownSync, existsSync, mkdirSync, mkdtempSync, readFileSync, writeFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Host, Libvirt } from './host.ts';
import { startHost, startLibvirt, startNetwork } from './host.ts';
import type { Outside, Undo } from './lab.ts';
import { BRIDGE, FABRIC, outsideClient, takeDown } from './lab.ts';
import { writeStock } from './opennebula.ts';
import type { ToolResult } from './process.ts';
import { runTool, tryTool, waitFor } from './process.ts';

export type HostName = 'kvmib01' | 'kvmib02';

export interface PairHost extends Host {
  readonly name: HostName;
  /** Network namespace, for programs that run outside of the host and see its links. */
  readonly netns: string;
  /** Addresses on `ib0` and `lan0`. */
  readonly fabric: string;
  readonly lan: string;
  /** Hardware address of the bridge of the guests. */
  readonly bridgeMac: string;
  readonly libvirt: Libvirt;
  /** The installed command, as root. */
  readonly kvmIb: (...args: readonly string[]) => Promise<ToolResult>;
}

export interface FrontEnd {
  /** The argv that runs a command line as oneadmin on a host, with the agent forwarded as `-d` of the VM_MAD has it. */
  readonly ssh: (host: HostName, ...command: readonly string[]) => [string, ...string[]];
  /** Environment that the argv needs: where the agent is. */
  readonly env: Readonly<Record<string, string>>;
}

export interface Pair {
  readonly hosts: Readonly<Record<HostName, PairHost>>;
  readonly outside: Outside;
  readonly frontEnd: FrontEnd;
  /** Both hosts and the test see it; oneadmin may write below `datastores`. */
  readonly folder: string;
  readonly stop: () => Promise<void>;
}

export interface PairOptions {
  /** True: both bridges have one hardware address. By default each has its own, as libvirt makes them. */
  readonly sameBridgeMac?: boolean;
  /** MTU of ib0 and of the guests' bridge, by host; that of `FABRIC` where it is not given. */
  readonly mtu?: Readonly<Partial<Record<HostName, number>>>;
  /** Configuration of kvm-ib, by host; `PAIR_CONFIG` where it is not given. */
  readonly config?: Readonly<Partial<Record<HostName, string>>>;
}

export const PAIR_CONFIG = `networks:
  - name: ib
    device: ib0
    bridge: ${BRIDGE.name}
    guests: 192.168.122.2-192.168.122.6
    addresses: 192.168.10.202-192.168.10.206
`;

/** Where the drivers are on both hosts. */
export const PAIR_DRIVERS = '/var/tmp/one/vmm';

/** uid and gid of oneadmin, as OpenNebula's packages make it. */
export const ONEADMIN = 9869;
const HOME = '/var/lib/one';
export const SSHD_CONFIG = '/etc/ssh/kvm-ib-lab.conf';

const SWITCH = 'kib-switch';
const OUTSIDE = 'kib-outside';
const FRONT_END = '10.148.0.254';
const NAMES: readonly HostName[] = ['kvmib01', 'kvmib02'];
const PLACES: Readonly<Record<HostName, Pick<PairHost, 'netns' | 'fabric' | 'lan' | 'bridgeMac'>>> = {
  kvmib01: { netns: 'kib-host1', fabric: FABRIC.host, lan: '10.148.0.1', bridgeMac: '52:54:00:00:7a:01' },
  kvmib02: { netns: 'kib-host2', fabric: '192.168.10.2', lan: '10.148.0.2', bridgeMac: '52:54:00:00:7a:02' },
};

const PROGRAM = fileURLToPath(new URL('../../../dist/kvm-ib.mjs', import.meta.url));

const ip = (...args: readonly string[]) => runTool(['/usr/sbin/ip', ...args]);

/** Builds the pair. What was built is taken down again when a step fails. */
export async function startPair(options: PairOptions = {}): Promise<Pair> {
  if (!existsSync(PROGRAM)) throw new Error(`${PROGRAM} is missing. Run: npm run build`);
  const packages = sshdRoot();
  const folder = mkdtempSync('/run/kvm-ib/pair-');
  chmodSync(folder, 0o755);
  const undo: Undo = [() => runTool(['/bin/rm', '-rf', folder])];
  const stop = () => takeDown(undo);
  try {
    await startSwitches(undo, options.mtu ?? {});
    const keys = await makeKeys(folder);
    const frontEnd = await startFrontEnd(undo, keys);
    const remotes = await writeFrontEndRemotes(folder);
    mkdirSync(join(folder, 'datastores'));
    chownSync(join(folder, 'datastores'), ONEADMIN, ONEADMIN);

    const start = async (name: HostName): Promise<PairHost> => {
      const place = PLACES[name];
      const bridgeMac = options.sameBridgeMac ? PLACES.kvmib01.bridgeMac : place.bridgeMac;
      const own = join(folder, name);
      mkdirSync(own);
      const addresses = Object.fromEntries(NAMES.map((each) => [each, PLACES[each].lan]));
      const { netns } = place;
      const host = await startHost({ name, netns, folder: own, shared: folder, addresses, layers: packages });
      undo.push(host.stop);
      await host.run(['/bin/bash', '-eu', '-c', SET_UP, 'set-up', keys, name, remotes, process.execPath]);
      const libvirt = await startLibvirt(host);
      undo.push(libvirt.stop);
      const mtu = options.mtu?.[name] ?? FABRIC.mtu;
      await startNetwork(host, libvirt, { bridge: BRIDGE.name, address: BRIDGE.address, mtu, mac: bridgeMac });
      const config = join(own, 'kvm-ib.yaml');
      writeFileSync(config, options.config?.[name] ?? PAIR_CONFIG);
      await host.run([process.execPath, PROGRAM, 'install', 'host', '--config', config]);
      await host.run(['/usr/bin/kvm-ib', 'reconcile']); // as its unit does at boot
      await host.run(['/usr/sbin/sshd', '-f', SSHD_CONFIG]);
      await waitFor(`sshd on ${name}`, async () => {
        const answer = await tryTool(frontEnd.ssh(name, 'true'), { env: frontEnd.env });
        return answer.status === 0 ? true : undefined;
      });
      const kvmIb = (...args: readonly string[]) => host.try(['/usr/bin/kvm-ib', ...args]);
      return { ...host, ...place, name, bridgeMac, libvirt, kvmIb };
    };
    const hosts = { kvmib01: await start('kvmib01'), kvmib02: await start('kvmib02') };
    return { hosts, outside: outsideClient(OUTSIDE), frontEnd, folder, stop };
  } catch (error) {
    await stop().catch((failure: unknown) => console.error(failure));
    throw error;
  }
}

/** Both switches in one namespace, which is also where the front-end is; a port for each host and for the client. */
async function startSwitches(undo: Undo, mtu: Readonly<Partial<Record<HostName, number>>>): Promise<void> {
  for (const netns of [SWITCH, OUTSIDE, ...NAMES.map((name) => PLACES[name].netns)]) {
    await ip('netns', 'add', netns);
    undo.push(() => ip('netns', 'delete', netns));
    await ip('-n', netns, 'link', 'set', 'lo', 'up');
  }
  for (const name of ['ib', 'lan']) {
    await ip('-n', SWITCH, 'link', 'add', name, 'type', 'bridge', 'forward_delay', '0', 'mcast_snooping', '0');
    await ip('-n', SWITCH, 'link', 'set', name, 'up');
  }
  const plug = async (netns: string, link: string, bridge: string, address: string, size: number) => {
    const port = `${bridge}-${netns.slice('kib-'.length)}`;
    await ip('-n', netns, 'link', 'add', link, 'type', 'veth', 'peer', 'name', port, 'netns', SWITCH);
    // The switch carries whatever is sent; what a host takes, its own link says.
    await ip('-n', SWITCH, 'link', 'set', port, 'mtu', String(FABRIC.mtu), 'master', bridge, 'up');
    await ip('-n', netns, 'link', 'set', link, 'mtu', String(size), 'up');
    await ip('-n', netns, 'address', 'add', `${address}/24`, 'dev', link);
  };
  await plug(OUTSIDE, 'ib0', 'ib', FABRIC.outside, FABRIC.mtu);
  for (const name of NAMES) {
    const { netns, fabric, lan } = PLACES[name];
    await plug(netns, 'ib0', 'ib', fabric, mtu[name] ?? FABRIC.mtu);
    await plug(netns, 'lan0', 'lan', lan, 1500);
  }
  await ip('-n', SWITCH, 'link', 'set', 'lan', 'mtu', '1500');
  await ip('-n', SWITCH, 'address', 'add', `${FRONT_END}/24`, 'dev', 'lan');
}

/** A key of oneadmin and one of each host's sshd. @returns their folder, with `known_hosts` */
async function makeKeys(folder: string): Promise<string> {
  const keys = join(folder, 'keys');
  mkdirSync(keys, { mode: 0o700 });
  for (const name of ['oneadmin', ...NAMES]) {
    await runTool(['/usr/bin/ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', name, '-f', join(keys, name)]);
  }
  const known = NAMES.map((name) => `${name},${PLACES[name].lan} ${readFileSync(join(keys, `${name}.pub`), 'utf8')}`);
  writeFileSync(join(keys, 'known_hosts'), known.join(''));
  return keys;
}

/**
 * In the host: OpenNebula's user as its package makes it, with its public key and those of the hosts; sshd's own user and
 * key; what `onehost sync` copies; a node that oneadmin may run. Arguments: keys, host name, remotes, node.
 */
const SET_UP = `
keys=$1 name=$2 remotes=$3 node=$4
login() {
  sed -i "/^$1:/d" /etc/passwd /etc/group /etc/shadow
  echo "$1:x:$2:$2::$3:$4" >> /etc/passwd
  echo "$1:x:$2:" >> /etc/group
  echo "$1:*:19000:0:99999:7:::" >> /etc/shadow
}
login oneadmin ${ONEADMIN} ${HOME} /bin/bash
login sshd 9868 /run/sshd /usr/sbin/nologin
own=(-o ${ONEADMIN} -g ${ONEADMIN})
install -d -m 0755 /run/sshd
install -d "\${own[@]}" -m 0750 ${HOME}
install -d "\${own[@]}" -m 0700 ${HOME}/.ssh
install "\${own[@]}" -m 0600 "$keys/oneadmin.pub" ${HOME}/.ssh/authorized_keys
install "\${own[@]}" -m 0644 "$keys/known_hosts" ${HOME}/.ssh/known_hosts
mkdir -p /etc/ssh
install -m 0600 "$keys/$name" /etc/ssh/kvm-ib-lab.key
printf '%s\\n' 'HostKey /etc/ssh/kvm-ib-lab.key' 'PidFile /run/sshd.pid' 'AllowUsers oneadmin' \
  'PasswordAuthentication no' 'UsePAM no' 'UseDNS no' 'MaxStartups 100' > ${SSHD_CONFIG}
mkdir -p /var/tmp/one
cp -r "$remotes/." /var/tmp/one
chown -R ${ONEADMIN}:${ONEADMIN} /var/tmp/one
[ -x /usr/bin/node ] || [ -x /usr/local/bin/node ] || install -m 0755 "$node" /usr/local/bin/node
`;

/** The front-end's remotes, with the driver put there by `kvm-ib install front-end`. @returns what is copied to the hosts */
async function writeFrontEndRemotes(folder: string): Promise<string> {
  const root = join(folder, 'front-end');
  const remotes = join(root, HOME, 'remotes');
  writeStock(remotes);
  writeFileSync(join(remotes, 'VERSION'), '7.0.0\n');
  const config = join(folder, 'front-end.yaml');
  writeFileSync(config, PAIR_CONFIG);
  await runTool([process.execPath, PROGRAM, 'install', 'front-end', '--root', root, '--config', config]);
  return remotes;
}

async function startFrontEnd(undo: Undo, keys: string): Promise<FrontEnd> {
  const config = join(keys, 'config');
  const lines = [
    ...NAMES.flatMap((name) => [`Host ${name}`, `HostName ${PLACES[name].lan}`, `HostKeyAlias ${name}`]),
    ...['Host *', 'User oneadmin', `UserKnownHostsFile ${join(keys, 'known_hosts')}`, 'GlobalKnownHostsFile none'],
    ...['IdentityFile none', 'BatchMode yes', 'ConnectTimeout 10'],
    // As SshStream of OpenNebula sets them for an action that -d names.
    ...['ForwardAgent yes', 'ControlMaster no', 'ControlPath none'],
  ];
  writeFileSync(config, `${lines.join('\n')}\n`);
  const socket = join(keys, 'agent');
  const env = { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C', SSH_AUTH_SOCK: socket };
  const agent = spawn('/usr/bin/ssh-agent', ['-D', '-a', socket], { stdio: 'ignore', env });
  const ended = new Promise((resolve) => agent.once('close', resolve));
  undo.push(async () => {
    agent.kill('SIGTERM');
    await ended;
  });
  await waitFor('ssh-agent', () => existsSync(socket) || undefined, 5_000, 20);
  await runTool(['/usr/bin/ssh-add', '-q', join(keys, 'oneadmin')], { env });
  return {
    env,
    ssh: (host, ...command) => {
      return ['/usr/sbin/ip', 'netns', 'exec', SWITCH, '/usr/bin/ssh', '-F', config, host, '--', ...command];
    },
  };
}

/** Where scripts/vm-sshd.mjs unpacked an ssh server; '' where the machine has one. @throws Error when there is none */
function sshdRoot(): string {
  if (existsSync('/usr/sbin/sshd')) return '';
  const index = join(process.env['XDG_CACHE_HOME'] || join(homedir(), '.cache'), 'kvm-ib/sshd.json');
  if (existsSync(index)) {
    const value: unknown = JSON.parse(readFileSync(index, 'utf8'));
    if (typeof value === 'object' && value !== null && 'root' in value && typeof value.root === 'string') {
      if (existsSync(join(value.root, 'usr/sbin/sshd'))) return value.root;
    }
  }
  throw new Error(
    "Cannot start a host: no ssh server. Run `node scripts/vm-sshd.mjs` outside of the test's network namespace.",
  );
}
