/** One host in this process's own throw-away namespace: ib0 and eth0 as veth ends, virbr1 with the port vnet2. */
import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import type { Config } from '../../lib/core/mapping.ts';
import { createAnnouncer } from '../../lib/host/announcer.ts';
import { createConntrack } from '../../lib/host/conntrack.ts';
import { exec } from '../../lib/host/exec.ts';
import { createLinks } from '../../lib/host/links.ts';
import { withLock } from '../../lib/host/lock.ts';
import { createElementReader } from '../../lib/host/nf-tables-read.ts';
import { createProber } from '../../lib/host/prober.ts';
import { createStore } from '../../lib/host/store.ts';
import { createNftEngine } from '../../lib/nat/nft.ts';
import { createNft } from '../../lib/nftables-json/index.ts';
import type { Host } from '../../lib/ops/host.ts';
import type { FakeFlow } from './fake-host.ts';
import { BOOT, CONFIG, interfacesOf, stateOf, temporaryDirectory } from './fake-host.ts';
import type { HostUnderTest } from './host-conformance.ts';
import { requireOwnNetns } from './netns.ts';

requireOwnNetns();

const run = (program: string, ...args: readonly string[]): string =>
  execFileSync(program, args, { encoding: 'utf8', stdio: 'pipe' });
export const ip = (...args: readonly string[]): string => run('/usr/sbin/ip', ...args);
export const nft = (...args: readonly string[]): string => run('/usr/sbin/nft', ...args);

const MTU = '2044';
/** Nobody is on the fabric who could answer. */
const PROBE_MS = 3;
const CALLS_IPTABLES = '/proc/sys/net/bridge/bridge-nf-call-iptables';
/** As other test files of this namespace know it; undefined: the kernel has no br_netfilter. */
const callsIptables = existsSync(CALLS_IPTABLES) ? readFileSync(CALLS_IPTABLES, 'latin1') : undefined;

export function makeLinks(): void {
  removeLinks();
  ip('link', 'add', 'ib0', 'mtu', MTU, 'type', 'veth', 'peer', 'name', 'fabric0', 'mtu', MTU);
  ip('link', 'add', 'eth0', 'type', 'veth', 'peer', 'name', 'wire0');
  ip('link', 'add', 'virbr1', 'type', 'bridge');
  ip('link', 'add', 'vnet2', 'mtu', MTU, 'type', 'veth', 'peer', 'name', 'guest2', 'mtu', MTU);
  ip('link', 'set', 'vnet2', 'master', 'virbr1');
  ip('link', 'set', 'virbr1', 'mtu', MTU);
  for (const link of ['ib0', 'fabric0', 'eth0', 'wire0', 'virbr1', 'vnet2', 'guest2']) ip('link', 'set', link, 'up');
  if (callsIptables !== undefined) writeFileSync(CALLS_IPTABLES, '0');
}

export function removeLinks(): void {
  for (const link of ['ib0', 'eth0', 'virbr1', 'vnet2', 'ib1', 'virbr2']) {
    try {
      ip('link', 'delete', link);
    } catch {
      // It was not there.
    }
  }
  nft('flush', 'ruleset');
  run('/usr/sbin/conntrack', '-F');
  if (callsIptables !== undefined) writeFileSync(CALLS_IPTABLES, callsIptables);
}

let port = 1000;

/** One UDP entry for each flow, with ports of its own. */
export function plant(...flows: readonly FakeFlow[]): void {
  for (const { original, reply } of flows) {
    port += 1;
    const isPlain = reply.source === original.destination && reply.destination === original.source;
    const back = ['--reply-src', reply.source, '--reply-dst', reply.destination];
    const ports = ['--reply-port-src', '80', '--reply-port-dst', String(port)];
    // conntrack 1.4.7 makes the reply of an untranslated entry itself.
    const answer = isPlain ? [] : [...back, ...ports];
    const from = ['-s', original.source, '-d', original.destination];
    run(
      '/usr/sbin/conntrack',
      '-I',
      '-p',
      'udp',
      ...from,
      ...answer,
      '--sport',
      String(port),
      '--dport',
      '80',
      '-t',
      '1000',
    );
  }
}

/** What connection tracking has of UDP to port 80. */
export function flows(): readonly FakeFlow[] {
  return run('/usr/sbin/conntrack', '-L', '-p', 'udp', '--dport', '80')
    .split('\n')
    .flatMap((line) => {
      const [a, b, c, d] = [...line.matchAll(/(?:src|dst)=(\S+)/g)].map((match) => match[1]);
      if (a === undefined || b === undefined || c === undefined || d === undefined) return [];
      return [{ original: { source: a, destination: b }, reply: { source: c, destination: d } }];
    });
}

export async function createKernelHost(): Promise<HostUnderTest> {
  makeLinks();
  return {
    links: createLinks(),
    nat: createNftEngine({ nft: createNft({ exec }), reader: await createElementReader() }),
    conntrack: createConntrack(),
    plant,
    flows,
    addAddress: (device, cidr, label) => void ip('address', 'add', cidr, 'dev', device, 'label', label),
    flushRuleset: async () => void nft('flush', 'ruleset'),
  };
}

export interface RealHost extends Host {
  /** Active domains by VM id; undefined: libvirt does not answer. */
  active: Set<number> | undefined;
  readonly interfaces: Map<number, readonly string[]>;
  /** VMs on their way between two hosts. */
  readonly moving: Set<number>;
  /** Pids that are taken to be dead. */
  readonly dead: Set<number>;
  /** Every command that reached nft: its JSON, or its arguments. */
  readonly nftInput: string[];
}

/** The real host on this namespace, with libvirt and processes as the test has them. */
export async function createRealHost(config: Config = CONFIG, directory = temporaryDirectory()): Promise<RealHost> {
  const links = createLinks();
  const store = createStore(directory);
  const nftInput: string[] = [];
  const dead = new Set<number>();
  const host: RealHost = {
    config,
    active: new Set(),
    interfaces: new Map(),
    moving: new Set(),
    dead,
    nftInput,
    nat: createNftEngine({
      nft: createNft({
        exec: (argv, options) => {
          nftInput.push(options?.input ?? argv.join(' '));
          return exec(argv, options);
        },
      }),
      reader: await createElementReader(),
    }),
    links,
    conntrack: createConntrack(),
    announcer: createAnnouncer(links),
    prober: createProber(links, PROBE_MS),
    store,
    domains: {
      active: async () => (host.active === undefined ? undefined : new Set([...host.active].map((vm) => `one-${vm}`))),
      state: async (vm) => stateOf(host, vm),
      isMoving: async (vm) => host.moving.has(vm),
      cameBy: async (vm) => (host.moving.has(vm) ? 'migration' : 'boot'),
      interfaces: async (vms) => interfacesOf(host, vms),
    },
    processes: { isAlive: (holder) => !dead.has(holder.pid), bootId: () => BOOT },
    withLock: (who, act) => withLock(store.lockPath, { timeoutMs: 5_000, who }, act),
    now: () => new Date().toISOString(),
  };
  return host;
}
