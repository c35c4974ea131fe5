/**
 * A hypervisor's driver folder for black-box tests: our launchers with the built bundles beside them, stock-shaped
 * scripts in `../kvm` that record how they were called, an IPoIB-like link and a bridge, and a state directory of its own.
 */
import type { ChildProcess } from 'node:child_process';
import { execFileSync, spawn, spawnSync } from 'node:child_process';
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import type { Readable } from 'node:stream';
import { fileURLToPath } from 'node:url';
import type { Host } from './vm/host.ts';
import type { DriverAnswer, TestVm } from './vm/opennebula.ts';
import { actionData, callAsOneVmmExec, domainXml, vmXml } from './vm/opennebula.ts';

const repository = join(dirname(fileURLToPath(import.meta.url)), '../..');
const IP = '/usr/sbin/ip';
const NFT = '/usr/sbin/nft';

export const HOST_NAME = 'kvmib01';
export const UUID = '6f0a1c1e-6c0e-4d0c-9a0e-5a3b3f1d2c42';
/** Not a multiple of anything that a default would have. */
export const LINK_MTU = 4092;

export const CONFIG = `networks:
  - name: ib
    device: ib0
    bridge: virbr1
    guests: 192.168.122.2-192.168.122.6
    addresses: 192.168.10.202-192.168.10.206
`;

/** A VM with one NIC for each guest number: 192.168.122.N on virbr1, or on a bridge that is none of ours. */
export function testVm(id: number, guests: readonly number[] = [2], bridge = 'virbr1'): TestVm {
  return {
    id,
    name: `web-${id}`,
    uuid: UUID,
    nics: guests.map((n) => ({
      bridge,
      mac: `02:00:c0:a8:7a:${n.toString(16).padStart(2, '0')}`,
      ip: `192.168.122.${n}`,
    })),
  };
}

/** The domain XML that oned writes for it. */
export function domainOf(vm: TestVm): string {
  return domainXml(vm, { kernel: '/k', initramfs: '/i', commandLine: 'c', console: '/dev/null' });
}

export const vmXmlOf = (vm: TestVm): string => vmXml(vm, HOST_NAME);
export const actionDataOf = (vm: TestVm): string => actionData(vm, HOST_NAME);

export interface Result {
  readonly status: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stdout: string;
  readonly stderr: string;
  /** Milliseconds. */
  readonly took: number;
}

export interface RunOptions {
  readonly env?: Readonly<Record<string, string>>;
  /** What it reads; undefined: /dev/null. `open`: a pipe that is never closed. A number: that descriptor. */
  readonly stdin?: string | Uint8Array | 'open' | number | undefined;
  readonly cwd?: string;
  /** Milliseconds after which it is killed and the call fails; 20 s by default. */
  readonly limit?: number;
  /** Called with the process once it runs. */
  readonly started?: (child: ChildProcess) => void;
}

/** Runs a program with just this environment. Output is latin1: a character a byte. */
export function run(argv: readonly string[], options: RunOptions = {}): Promise<Result> {
  const [program = '', ...args] = argv;
  const { stdin, limit = 20_000 } = options;
  const began = performance.now();
  const piped = typeof stdin === 'string' || stdin instanceof Uint8Array;
  const child = spawn(program, args, {
    stdio: [piped ? 'pipe' : typeof stdin === 'number' ? stdin : 'ignore', 'pipe', 'pipe'],
    env: { ...options.env },
    cwd: options.cwd ?? '/',
  });
  options.started?.(child);
  if (stdin !== 'open' && piped) child.stdin?.on('error', () => undefined).end(stdin);
  const collect = (stream: Readable | null): (() => string) => {
    const chunks: Buffer[] = [];
    stream?.on('data', (chunk: Buffer) => chunks.push(chunk));
    return () => Buffer.concat(chunks).toString('latin1');
  };
  const [out, err] = [collect(child.stdout), collect(child.stderr)];
  return new Promise((resolve, reject) => {
    let late = false;
    const timer = setTimeout(() => {
      late = true;
      child.kill('SIGKILL');
    }, limit);
    child.on('error', reject);
    child.on('close', (status, signal) => {
      clearTimeout(timer);
      const took = performance.now() - began;
      if (late) reject(new Error(`${argv.join(' ').slice(0, 200)}: no end within ${limit} ms; ${out()}${err()}`));
      else resolve({ status, signal, stdout: out(), stderr: err(), took });
    });
  });
}

/** What one run of a stock script was given. */
export interface StockRun {
  readonly argv: readonly string[];
  readonly stdin: string;
  readonly cwd: string;
}

/** Everything that a refused action must leave as it was. */
export interface Snapshot {
  readonly rules: string;
  readonly addresses: string;
  readonly links: string;
  /** Path below the state directory → content; the lock is left out. */
  readonly state: Readonly<Record<string, string>>;
}

export interface Rig {
  readonly folder: string;
  /** `vmm/kvm-ib`. */
  readonly drivers: string;
  /** `vmm/kvm`. */
  readonly stock: string;
  readonly record: string;
  readonly config: string;
  readonly state: string;
  readonly env: Readonly<Record<string, string>>;
  /** Shell text for the stock scripts: `$action` and `$record` are set. */
  behave(text: string): void;
  /** Writes vm.xml. @returns path of the deployment file */
  place(vm: TestVm, text?: string | Uint8Array): string;
  /** Starts a launcher directly. VM id and host follow the arguments unless `bare`. */
  call(
    action: string,
    args: readonly string[],
    vmId: number | null,
    options?: RunOptions & { readonly prefix?: readonly string[] },
  ): Promise<Result>;
  /** Calls it as one_vmm_exec does. */
  ssh(action: string, args: readonly string[], vmId: number, stdin: string): Promise<DriverAnswer>;
  deploy(vm: TestVm): Promise<Result>;
  cli(args: readonly string[], options?: RunOptions & { readonly prefix?: readonly string[] }): Promise<Result>;
  /** Names of the stock scripts that ran, in order. */
  runs(): readonly string[];
  stockRun(action: string): StockRun;
  snapshot(): Snapshot;
  /** `owner -> phase` of every state file. */
  phases(): Readonly<Record<string, string>>;
  /** No mapping, no record, default behaviour, default configuration; the table stands, as after boot. */
  reset(): void;
  remove(): void;
}

export const ACTIONS_WITH_STOCK = readdirSync(join(repository, 'drivers/vmm/kvm-ib')).filter(
  (name) => !name.includes('.') && name !== 'README',
);

/** Builds it. The links are made in this process's network namespace, and stay. */
export async function createRig(): Promise<Rig> {
  const folder = mkdtempSync('/tmp/kvm-ib-driver-');
  chmodSync(folder, 0o755);
  const drivers = join(folder, 'vmm/kvm-ib');
  const stock = join(folder, 'vmm/kvm');
  const record = join(folder, 'record');
  const config = join(folder, 'kvm-ib.yaml');
  const state = join(folder, 'state');
  const behaviour = join(folder, 'behaviour');
  for (const path of [stock, record]) mkdirSync(path, { recursive: true });
  chmodSync(record, 0o777);
  cpSync(join(repository, 'drivers/vmm/kvm-ib'), drivers, { recursive: true });
  copyBundles(drivers, ['parser.mjs', 'engine.mjs']);
  for (const action of ACTIONS_WITH_STOCK) writeScript(join(stock, action), STOCK(record, behaviour));

  const env = {
    PATH: `/usr/local/bin:/usr/bin:/bin:${dirname(process.execPath)}`,
    LANG: 'C',
    KVM_IB_CONFIG: config,
    KVM_IB_STATE_DIR: state,
    // Nobody is on the fabric who could answer.
    KVM_IB_PROBE_MS: '3',
  };
  const baseline = join(folder, 'baseline');
  const rig: Rig = {
    folder,
    drivers,
    stock,
    record,
    config,
    state,
    env,
    behave: (text) => writeFileSync(behaviour, text),
    place(vm, text = `${vmXmlOf(vm)}\n`) {
      const home = join(folder, 'datastores', String(vm.id));
      mkdirSync(home, { recursive: true });
      rmSync(join(home, 'vm.xml'), { recursive: true, force: true });
      writeFileSync(join(home, 'vm.xml'), text);
      return join(home, 'deployment.0');
    },
    call(action, args, vmId, options = {}) {
      const argv = [...(options.prefix ?? []), join(drivers, action), ...args];
      if (vmId !== null) argv.push(String(vmId), HOST_NAME);
      return run(argv, { ...options, env: { ...env, ...options.env } });
    },
    ssh(action, args, vmId, stdin) {
      // The session is of this host; nothing but `inside` is asked of it.
      const here = { inside: (argv: readonly string[]) => argv } as unknown as Host;
      const vars = { KVM_IB_CONFIG: config, KVM_IB_STATE_DIR: state, KVM_IB_PROBE_MS: '3' };
      const script = join(drivers, action);
      return callAsOneVmmExec({ host: here, script, args, stdin, vmId, hostName: HOST_NAME, env: vars });
    },
    deploy: (vm) => rig.call('deploy', [rig.place(vm), HOST_NAME], vm.id, { stdin: `${domainOf(vm)}\n` }),
    cli(args, options = {}) {
      const argv = [...(options.prefix ?? []), process.execPath, join(folder, 'kvm-ib.mjs'), ...args];
      return run(argv, { ...options, env: { ...env, ...options.env } });
    },
    runs: () => {
      const path = join(record, 'runs');
      return existsSync(path) ? readFileSync(path, 'latin1').trim().split('\n') : [];
    },
    stockRun(action) {
      const read = (what: string) => readFileSync(join(record, `${action}.${what}`), 'latin1');
      return { argv: read('argv').split('\0').slice(0, -1), stdin: read('stdin'), cwd: read('cwd').trim() };
    },
    snapshot: () => ({
      rules: tool(NFT, '-s', 'list', 'ruleset'),
      addresses: tool(IP, '-o', 'addr'),
      links: tool(IP, '-o', 'link'),
      state: readTree(state),
    }),
    phases: () =>
      Object.fromEntries(
        Object.entries(readTree(join(state, 'mappings'))).map(([name, text]) => [
          name.replace(/\.json$/, ''),
          (JSON.parse(text) as { phase: { name: string } }).phase.name,
        ]),
      ),
    reset() {
      const elements = ['map ip kvm_ib guest_to_ib', 'map ip kvm_ib ib_to_guest', 'set ip kvm_ib guest_mac'];
      const names = ['guest_any_mac', 'mapped_guests', 'mapped_addresses', 'guest_sent', 'guest_received'];
      const sets = names.map((name) => `set ip kvm_ib ${name}`);
      const flush = [...elements, ...sets].map((set) => `flush ${set}`).join('; ');
      // The table may be gone: then there is nothing to flush.
      spawnSync(NFT, [flush], { stdio: 'ignore' });
      const addresses = 'address flush dev ib0 scope global\naddress add 192.168.10.1/24 dev ib0\n';
      execFileSync(IP, ['-batch', '-'], { input: addresses });
      rmSync(state, { recursive: true, force: true });
      rmSync(record, { recursive: true, force: true });
      mkdirSync(record);
      chmodSync(record, 0o777);
      if (existsSync(baseline)) cpSync(baseline, state, { recursive: true });
      writeFileSync(config, CONFIG);
      rig.behave(`cat > "$record/$action.stdin"\necho ${UUID}\n`);
    },
    remove: () => rmSync(folder, { recursive: true, force: true }),
  };
  copyBundles(folder, ['kvm-ib.mjs']);
  makeLinks();
  rig.reset();
  const made = await rig.cli(['reconcile']);
  if (made.status !== 0) throw new Error(`reconcile: ${made.stderr}`);
  cpSync(state, baseline, { recursive: true });
  return rig;
}

/** A stock script that writes down how it was called, then does what the file `behaviour` says. */
export const STOCK = (record: string, behaviour: string): string => `#!/bin/sh
action=\${0##*/}
record='${record}'
echo "$action" >> "$record/runs"
for arg do printf '%s\\0' "$arg"; done > "$record/$action.argv"
pwd > "$record/$action.cwd"
. '${behaviour}'
`;

export function writeScript(path: string, text: string): void {
  writeFileSync(path, text);
  chmodSync(path, 0o755);
}

/** Bundles and the addons that they load, as an installation has them. */
export function copyBundles(to: string, bundles: readonly string[]): void {
  const dist = join(repository, 'dist');
  if (!existsSync(join(dist, 'parser.mjs'))) throw new Error('dist/ is not built: run `npm run build` first');
  for (const name of [...bundles, 'koffi.node', 'netlink.node']) cpSync(join(dist, name), join(to, name));
}

/** One plain line as one_vmm_exec wants it: no control character, ended by a full stop and a line end. */
export const ONE_LINE = /^kvm-ib: [^\u0000-\u001f\u007f-\u009f]+\.\n$/;

export function tool(program: string, ...args: readonly string[]): string {
  return execFileSync(program, args, { encoding: 'latin1', stdio: ['ignore', 'pipe', 'pipe'] });
}

function makeLinks(): void {
  // Addresses of IPv6 come and go by themselves and would blur comparisons.
  for (const name of ['all', 'default']) writeFileSync(`/proc/sys/net/ipv6/conf/${name}/disable_ipv6`, '1');
  const links = tool(IP, '-o', 'link');
  if (links.includes(' virbr1:')) return;
  tool(IP, 'link', 'add', 'ib0', 'mtu', String(LINK_MTU), 'type', 'veth', 'peer', 'name', 'fabric');
  tool(IP, 'link', 'add', 'virbr1', 'type', 'bridge');
  for (const link of ['fabric', 'ib0', 'virbr1']) tool(IP, 'link', 'set', link, 'up');
  tool(IP, 'address', 'add', '192.168.122.1/24', 'dev', 'virbr1');
}

function readTree(directory: string, prefix = ''): Record<string, string> {
  if (!existsSync(directory)) return {};
  const found: Record<string, string> = {};
  for (const entry of readdirSync(directory, { withFileTypes: true })) {
    const path = join(directory, entry.name);
    const name = `${prefix}${entry.name}`;
    if (name === 'lock') continue;
    if (entry.isDirectory()) Object.assign(found, readTree(path, `${name}/`));
    else found[name] = entry.isSymbolicLink() ? `-> ${readlinkSync(path)}` : readFileSync(path, 'latin1');
  }
  return found;
}

/** Waits until something is so. */
export async function eventually(what: string, holds: () => boolean, limit = 10_000): Promise<void> {
  for (const end = Date.now() + limit; !holds(); ) {
    if (Date.now() > end) throw new Error(`not within ${limit} ms: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

export function isExecutable(path: string): boolean {
  return (statSync(path).mode & 0o111) === 0o111;
}
