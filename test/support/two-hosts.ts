/**
 * The two hypervisors of the lab with the driver on both: launchers, engine, configuration and state of each its own, an
 * `ssh` that runs the engine of the other, and a libvirt that is a folder. VM 42 is guest 11; its stock `migrate` moves its tap
 * from one host to the other, so that its connections are those of one and the same guest.
 */
import type { ChildProcess } from 'node:child_process';
import { spawn } from 'node:child_process';
import { chmodSync, cpSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { copyBundles, writeScript } from './driver.ts';
import type { Host, Lab } from './lab.ts';
import { pairOf } from './lab.ts';
import { actionData } from './vm/opennebula.ts';
import type { VnmVersion } from './vnm.ts';
import { installNetworkDriver, networkCall, VNM_VERSIONS } from './vnm.ts';

const repository = fileURLToPath(new URL('../..', import.meta.url));
export const VM = 42;
export const TAP = `one-${VM}-0`;
const UUID = '6f0a1c1e-6c0e-4d0c-9a0e-5a3b3f1d2c42';

export const CONFIG = `networks:
  - name: ib
    device: ib0
    bridge: virbr1
    guests: 192.168.122.11-192.168.122.99
    addresses: 192.168.10.11-192.168.10.99
`;

export interface Result {
  readonly status: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

export interface TwoHosts {
  readonly folder: string;
  /** The driver script as one_vmm_exec calls it on a host. */
  migrate(options?: {
    readonly from?: Host;
    readonly to?: string;
    readonly env?: Readonly<Record<string, string>>;
  }): Running;
  /** The stock script alone, as a site calls it that has only our network driver. */
  stockMigrate(): Running;
  /** The network driver on a host, as in a live migration from h1 to h2. */
  network(host: Host, action: 'pre' | 'post' | 'clean'): Promise<Result>;
  /** The same as OpenNebula before 5.0 calls it: by a command of a running shell, whose standard input is no data. */
  migrateWithoutData(): Running;
  kvmIb(host: Host, ...args: readonly string[]): Promise<Result>;
  /** Shell text of the stock migrate: `$from`, `$to` are set; functions in `MOVES`. */
  behave(text: string): void;
  configure(host: Host, text: string): void;
  domain(host: Host, state: string | undefined): void;
  domainState(host: Host): string | undefined;
  /** What a host has of the VM: alias, pair, phase of the state file. */
  holds(host: Host): Promise<{ readonly alias: boolean; readonly pair: boolean; readonly phase: string | undefined }>;
  /** A file that the stock script may wait for, or make. */
  flag(name: string): string;
  /** Pids of engines that serve an arrival on a host. */
  engines(host: Host): readonly number[];
}

export interface Running {
  readonly child: ChildProcess;
  readonly ended: Promise<Result>;
}

/** What the stock script may do, each a step of a live migration. */
const MOVES = (folder: string): string => `
domains() { echo '${folder}'/$1/domains; }
state() { f=$(domains $1)/one-${VM}; { echo "$2"; [ -e "$f" ] && sed 1d "$f" || sed 1d "$(domains $from)/one-${VM}"; } > "$f.new"; mv "$f.new" "$f"; }
comes() { ip -n $to link add ${TAP} type veth peer name comes 2> /dev/null; state $to 'paused (starting up)'; sleep 0.1; state $to 'paused (migrating)'; }
pauses() { state $from 'paused (migrating)'; echo "event 'lifecycle' for domain 'one-${VM}': Suspended Migrated" >> "$(domains $from)/../events"; sleep 0.1; }
moves() {
  ip -n $to link delete ${TAP}
  ip -n $from link set ${TAP} netns $to
  ip -n $to link set ${TAP} master virbr1 up
}
resumes() {
  state $to 'running (migrated)'
  echo "event 'lifecycle' for domain 'one-${VM}': Resumed Migrated" >> "$(domains $to)/../events"
  ip netns exec g11 ${process.execPath} '${repository}/test/support/send-arp.mjs' 2>/dev/null
  ip netns exec g11 ping -c 1 -W 0.01 192.168.122.1 > /dev/null
}
goes() { rm -f "$(domains $from)/one-${VM}"; }
back() { ip -n $to link set ${TAP} netns $from; ip -n $from link set ${TAP} master virbr1 up; state $from 'running (booted)'; rm -f "$(domains $to)/one-${VM}"; }
wait_for() { for n in $(seq 400); do [ -e '${folder}'/flags/$1 ] && return; sleep 0.025; done; echo "no $1" >&2; exit 9; }
`;

export const MIGRATES = 'comes; pauses; moves; resumes; sleep 0.4; goes';

const VIRSH = (host: string): string => `#!/bin/sh
[ -e '${host}/silent' ] && { echo 'error: failed to connect to the hypervisor' >&2; exit 1; }
cd '${host}/domains' || exit 1
[ "$1" = --readonly ] && shift
shift 2
one() {
  case $1 in
    list) ls; echo ;;
    echo) echo "$2" ;;
    domstate) [ -e "$3" ] || { echo "error: failed to get domain '$3'" >&2; return 1; }; head -n 1 "$3"; echo ;;
    domjobabort) touch ../aborted ;;
    event) exec tail -n 0 -s 0.02 -f ../events ;;
    domiflist)
      [ -e "$2" ] || { echo "error: failed to get domain '$2'" >&2; return 1; }
      echo ' Interface   Type     Source   Model    MAC'
      sed 1d "$2" | while read -r mac; do echo " ${TAP}   bridge   virbr1   virtio   $mac"; done ;;
    *) return 1 ;;
  esac
}
case $1 in
  *';'*) IFS=';'; for command in $1; do IFS=' '; one $command; done ;;
  *) one "$@" ;;
esac
`;

export async function createTwoHosts(lab: Lab, folder: string): Promise<TwoHosts> {
  const drivers = join(folder, 'vmm/kvm-ib');
  const stock = join(folder, 'vmm/kvm');
  for (const path of [stock, join(folder, 'flags'), ...['h1', 'h2'].map((host) => join(folder, host, 'domains'))]) {
    mkdirSync(path, { recursive: true });
  }
  cpSync(join(repository, 'drivers/vmm/kvm-ib'), drivers, { recursive: true });
  copyBundles(drivers, ['parser.mjs', 'engine.mjs']);
  installNetworkDriver(folder);
  copyBundles(folder, ['kvm-ib.mjs']);
  writeScript(
    join(stock, 'migrate'),
    `#!/bin/sh\n[ -n "$NO_DATA" ] || cat > /dev/null\nto=$2 from=$3\n${MOVES(folder)}. '${folder}/behaviour'\n`,
  );
  for (const host of ['h1', 'h2']) {
    writeFileSync(join(folder, host, 'kvm-ib.yaml'), CONFIG);
    writeFileSync(join(folder, host, 'events'), '');
    writeScript(join(folder, host, 'virsh'), VIRSH(join(folder, host)));
  }
  const environment = (host: string): readonly string[] => [
    `KVM_IB_CONFIG=${folder}/${host}/kvm-ib.yaml`,
    `KVM_IB_STATE_DIR=${folder}/${host}/state`,
    'KVM_IB_PROBE_MS=40',
    'PATH=/usr/sbin:/usr/bin:/sbin:/bin',
  ];
  const mounting = 'mount --bind "$1" /usr/bin/virsh && mount --bind "$2" /usr/bin/ssh && shift 2 && exec "$@"';
  const on = (host: string, argv: readonly string[], more: readonly string[] = []): readonly string[] => [
    ...['/usr/sbin/ip', 'netns', 'exec', host, '/usr/bin/unshare', '--mount', '/bin/sh', '-c', mounting, 'sh'],
    ...[join(folder, host, 'virsh'), join(folder, 'ssh')],
    ...['/usr/bin/env', '-i', ...environment(host), ...more, ...argv],
  ];
  const engineOf = (host: string): readonly string[] => on(host, [process.execPath, join(drivers, 'engine.mjs')]);
  // It ends with the engine; killed, it leaves the engine alone with closed pipes, as a connection that is cut does.
  writeScript(
    join(folder, 'ssh'),
    `#!${process.execPath}
const { spawn } = require('node:child_process');
const { existsSync, writeFileSync } = require('node:fs');
const [host, command] = process.argv.slice(process.argv.indexOf('--') + 1);
const fail = (status, text) => { process.stderr.write(text + '\\n'); process.exit(status); };
if (command !== 'sudo -n /usr/lib/kvm-ib/kvm-ib-engine') fail(1, 'not ours: ' + command);
if (existsSync('${folder}/flags/unreachable')) fail(255, 'ssh: connect to host ' + host + ' port 22: No route to host');
if (existsSync('${folder}/flags/no-kvm-ib')) fail(1, 'sudo: /usr/lib/kvm-ib/kvm-ib-engine: command not found');
writeFileSync('${folder}/flags/ssh.pid', String(process.pid));
const engines = ${JSON.stringify({ h1: engineOf('h1'), h2: engineOf('h2') })};
const [program, ...args] = engines[host] ?? engines.h1;
const child = spawn(program, args, { stdio: ['pipe', 'pipe', 'pipe'] });
process.stdin.pipe(child.stdin);
child.stdin.on('error', () => undefined);
child.stdout.pipe(process.stdout);
child.stderr.pipe(process.stderr);
child.on('exit', (status) => setTimeout(() => process.exit(status ?? 255), 20));
`,
  );
  // What it is bound over has to be there.
  for (const program of ['/usr/bin/virsh', '/usr/bin/ssh'])
    if (!existsSync(program)) throw new Error(`${program} is missing`);

  const { mac } = pairOf(11);
  const domainFile = (host: Host): string => join(folder, host, 'domains', `one-${VM}`);
  const hosts: TwoHosts = {
    folder,
    migrate: ({ from = 'h1', to = 'h2', env = {} } = {}) => {
      const more = Object.entries(env).map(([name, value]) => `${name}=${value}`);
      const argv = on(from, [join(drivers, 'migrate'), UUID, to, from, String(VM), from], more);
      const vm = {
        id: VM,
        name: 'web-42',
        uuid: UUID,
        nics: [{ bridge: 'virbr1', mac: mac ?? '', ip: '192.168.122.11' }],
      };
      return start(argv, `${actionData(vm, from)}\n`);
    },
    stockMigrate: () => start(on('h1', [join(stock, 'migrate'), UUID, 'h2', 'h1', String(VM), 'h1']), ''),
    network: (host, action) => {
      const nics = [{ bridge: 'virbr1', mac: mac ?? '', ip: '192.168.122.11' }];
      const vm = { id: VM, name: 'web-42', uuid: UUID, nics };
      const version = VNM_VERSIONS.at(-1) as VnmVersion;
      const { argv, stdin } = networkCall(version, action, { vm, deployed: true, host: 'h1', newest: 'h2' });
      return start(on(host, [join(folder, 'vnm/kvm-ib', action), ...argv]), stdin ?? '').ended;
    },
    migrateWithoutData: () => {
      const command = [join(drivers, 'migrate'), `one-${VM}`, 'h2', 'h1', String(VM), 'h1'].join(' ');
      return start(on('h1', ['/bin/bash', '-s'], ['NO_DATA=1']), `(${command}); echo "$?"\necho next\n`);
    },
    kvmIb: (host, ...args) => start(on(host, [process.execPath, join(folder, 'kvm-ib.mjs'), ...args]), '').ended,
    behave: (text) => writeFileSync(join(folder, 'behaviour'), `${text}\n`),
    configure: (host, text) => writeFileSync(join(folder, host, 'kvm-ib.yaml'), text),
    domain: (host, state) =>
      state === undefined
        ? rmSync(domainFile(host), { force: true })
        : writeFileSync(domainFile(host), `${state}\n${mac}\n`),
    domainState: (host) =>
      existsSync(domainFile(host)) ? readFileSync(domainFile(host), 'utf8').split('\n')[0] : undefined,
    holds: async (host) => {
      const addresses = await lab.exec(host, ['/usr/sbin/ip', '-o', '-4', 'address', 'show', 'dev', 'ib0']);
      const table = await lab.tryExec(host, ['/usr/sbin/nft', 'list', 'map', 'ip', 'kvm_ib', 'ib_to_guest']);
      const file = join(folder, host, 'state/mappings', `vm-${VM}.json`);
      return {
        alias: addresses.includes('192.168.10.11/32'),
        pair: table.stdout.includes('192.168.10.11'),
        phase: existsSync(file)
          ? (JSON.parse(readFileSync(file, 'utf8')) as { phase: { name: string } }).phase.name
          : undefined,
      };
    },
    flag: (name) => join(folder, 'flags', name),
    engines: (host) =>
      readdirSync('/proc').flatMap((pid) => {
        try {
          const argv = readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0');
          const environ = readFileSync(`/proc/${pid}/environ`, 'utf8');
          const isEngine = argv[1] === join(drivers, 'engine.mjs') && argv.length === 3;
          return isEngine && environ.includes(`${folder}/${host}/state`) ? [Number(pid)] : [];
        } catch {
          return [];
        }
      }),
  };
  chmodSync(folder, 0o755);
  await lab.exec('h1', ['/usr/sbin/ip', 'link', 'set', 'vnet11', 'down']);
  await lab.exec('h1', ['/usr/sbin/ip', 'link', 'set', 'vnet11', 'name', TAP, 'up']);
  // As libvirt does: else a bridge has the address of one of its ports, and another one when that goes.
  for (const [n, host] of (['h1', 'h2'] as const).entries()) {
    await lab.exec(host, ['/usr/sbin/ip', 'link', 'set', 'virbr1', 'address', `52:54:00:00:00:0${n + 1}`]);
  }
  hosts.domain('h1', 'running (booted)');
  hosts.behave(MIGRATES);
  for (const host of ['h1', 'h2'] as const) {
    const { status, stderr } = await hosts.kvmIb(host, 'reconcile');
    if (status !== 0) throw new Error(`reconcile on ${host}: ${stderr}`);
  }
  return hosts;
}

function start(argv: readonly string[], stdin: string): Running {
  const [program = '', ...args] = argv;
  const child = spawn(program, args, { stdio: ['pipe', 'pipe', 'pipe'] });
  let stdout = '';
  let stderr = '';
  child.stdout.on('data', (chunk: Buffer) => {
    stdout += chunk.toString();
  });
  child.stderr.on('data', (chunk: Buffer) => {
    stderr += chunk.toString();
  });
  child.stdin.on('error', () => undefined).end(stdin);
  const ended = new Promise<Result>((resolve) => child.once('close', (status) => resolve({ status, stdout, stderr })));
  return { child, ended };
}
