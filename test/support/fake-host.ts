/**
 * A host in memory: links, addresses, bridge ports, connection tracking and nft that behave, with the state directory,
 * the NAT engine and the rule set of the real one. What it does is held to the kernel by `host-conformance.ts`.
 */
import { mkdtempSync, readdirSync, readlinkSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll } from 'vitest';
import type { Ipv4, LinkName, Mac } from '../../lib/core/address.ts';
import { ipv4Bytes, macBytes, parseIpv4, parseLinkName, parseMac, tryParseRange } from '../../lib/core/address.ts';
import { resolveMapping } from '../../lib/core/config.ts';
import { KvmIbError } from '../../lib/core/errors.ts';
import type { Config, Mapping, Network, Owner } from '../../lib/core/mapping.ts';
import { ownerName } from '../../lib/core/mapping.ts';
import type { DomainState, Holder, StateFile } from '../../lib/core/state.ts';
import { mappingsOf } from '../../lib/core/state.ts';
import { createStore } from '../../lib/host/store.ts';
import type { Flow } from '../../lib/link/ctnetlink.ts';
import type { BridgePort, FlushRequest, InetAddress, Link, OtherHolder } from '../../lib/link/ports.ts';
import type { ElementReader } from '../../lib/nat/nft.ts';
import { createNftEngine } from '../../lib/nat/nft.ts';
import type { ElementData, ElementKey, Nft, TableListing } from '../../lib/nftables-json/index.ts';
import { createFakeNft } from '../../lib/nftables-json/index.ts';
import type { VmOwner } from '../../lib/ops/actions.ts';
import type { Host, Store } from '../../lib/ops/host.ts';
import type { SyncRequest } from '../../lib/ops/sync.ts';

/** A connection tracking entry: the first packet, and the answer to it. */
export interface FakeFlow {
  readonly original: { readonly source: string; readonly destination: string };
  readonly reply: { readonly source: string; readonly destination: string };
}

export interface FakeLink {
  mtu: number;
  up: boolean;
  readonly type: number;
  /** Last octet of the hardware address. */
  station?: number;
  carrierChanges?: number;
  /** False: it is up without a carrier. */
  readonly running?: boolean;
  readonly kind?: string;
  /** Name of the bond or bridge that it belongs to. */
  readonly master?: string;
}

/** What the kernel of a host holds. Tests write into it what others would do to it. */
export interface FakeKernel {
  readonly links: Map<string, FakeLink>;
  addresses: InetAddress[];
  ports: { readonly bridge: string; readonly name: string; hairpin: boolean }[];
  callsIptables: boolean;
  flows: FakeFlow[];
  /** Other hosts of the fabric, by the IB address that they answer for. */
  readonly others: Map<string, OtherHolder>;
  readonly nft: Nft;
  /** The table as it is, for readers that cannot wait. */
  table: TableListing | undefined;
}

export interface FakeHost extends Host {
  readonly kernel: FakeKernel;
  /** Every call that changes something or reads more than one thing by its key, in order. */
  readonly log: string[];
  /** Active domains by VM id; undefined: libvirt does not answer. */
  active: Set<number> | undefined;
  /** Hardware addresses of the interfaces of a domain; without an entry libvirt does not say. */
  readonly interfaces: Map<number, readonly string[]>;
  /** VMs on their way between two hosts. */
  readonly moving: Set<number>;
  bootId: string;
  readonly dead: Set<number>;
  announcementError: string | undefined;
  /** Why the process that repeats announcements cannot be started. */
  repeatError: string | undefined;
  probeError: string | undefined;
}

const IB_MTU = 2044;
/** The boot that runs. */
export const BOOT = 'boot';

export function createFakeKernel(config: Config): FakeKernel {
  const links = new Map<string, FakeLink>();
  for (const network of config.networks) {
    links.set(network.device, { mtu: IB_MTU, up: true, type: 32 });
    links.set(network.bridge, { mtu: IB_MTU, up: true, type: 1 });
  }
  links.set('eth0', { mtu: 1500, up: true, type: 1 });
  return {
    links,
    addresses: [],
    ports: [],
    callsIptables: false,
    flows: [],
    others: new Map(),
    nft: createFakeNft(),
    table: undefined,
  };
}

const directories: string[] = [];
afterAll(() => {
  for (const directory of directories.splice(0)) rmSync(directory, { recursive: true, force: true });
});

/** A fresh state directory, in memory where there is such a place: property tests write many files. Gone after the tests. */
export function temporaryDirectory(): string {
  const base = readdirSync('/dev').includes('shm') ? '/dev/shm' : tmpdir();
  const directory = mkdtempSync(join(base, 'kvm-ib-test-'));
  directories.push(directory);
  return directory;
}

export interface FakeHostOptions {
  readonly kernel?: FakeKernel;
  readonly directory?: string;
}

export function createFakeHost(config: Config, options: FakeHostOptions = {}): FakeHost {
  const kernel = options.kernel ?? createFakeKernel(config);
  const log: string[] = [];
  const dead = new Set<number>();
  let clock = 0;
  let queue: Promise<unknown> = Promise.resolve();
  const engine = createNftEngine({ nft: watched(kernel, log), reader: readerOf(kernel) });
  const host: FakeHost = {
    config,
    kernel,
    log,
    dead,
    active: new Set(),
    interfaces: new Map(),
    moving: new Set(),
    bootId: BOOT,
    announcementError: undefined,
    repeatError: undefined,
    probeError: undefined,
    nat: {
      ...engine,
      change: (change) => logged(log, 'nat.change', () => engine.change(change)),
      load: (spec, pairs) => logged(log, 'nat.load', () => engine.load(spec, pairs)),
      remove: () => logged(log, 'nat.remove', () => engine.remove()),
    },
    links: {
      link: async (name) => linkOf(kernel, name),
      linkAt: async (index) => linkOf(kernel, [...kernel.links.keys()][index - 1] ?? ''),
      addresses: async () => {
        log.push('addresses');
        return kernel.addresses;
      },
      isLocal: async (address) => kernel.addresses.some((entry) => entry.address === address),
      addAlias: async (device, address, label) => {
        log.push(`addAlias ${address} ${label}`);
        requireLink(kernel, `Cannot add ${address}/32 to ${device}`, device);
        // The kernel allows an address again on another link, and with another prefix.
        if (kernel.addresses.some((e) => e.device === device && e.address === address && e.prefixLength === 32)) {
          throw new KvmIbError('conflict', `Cannot add ${address}/32 to ${device}`, { why: 'EEXIST' });
        }
        kernel.addresses = [...kernel.addresses, { device, address, prefixLength: 32, label }];
      },
      deleteAlias: async (device, address, label) => {
        log.push(`deleteAlias ${address} ${label}`);
        requireLink(kernel, `Cannot remove ${address}/32 from ${device}`, device);
        const rest = kernel.addresses.filter(
          (e) => !(e.device === device && e.address === address && e.prefixLength === 32 && e.label === label),
        );
        if (rest.length === kernel.addresses.length) {
          throw new KvmIbError('host-lacks', `Cannot remove ${address}/32 from ${device}`, { why: 'EADDRNOTAVAIL' });
        }
        kernel.addresses = rest;
      },
      setMtu: async (name, mtu) => {
        log.push(`setMtu ${name} ${mtu}`);
        requireLink(kernel, `Cannot set the MTU of ${name} to ${mtu}`, name).mtu = mtu;
      },
      bridgeCallsIptables: async () => kernel.callsIptables,
      bridgePorts: async (bridge): Promise<readonly BridgePort[]> => {
        requireLink(kernel, `Cannot list the ports of ${bridge}`, bridge);
        return kernel.ports.filter((port) => port.bridge === bridge).map(({ name, hairpin }) => ({ name, hairpin }));
      },
      setHairpin: async (name, on) => {
        log.push(`setHairpin ${name} ${on}`);
        const port = kernel.ports.find((candidate) => candidate.name === name);
        if (port === undefined) throw new KvmIbError('host-lacks', `Cannot turn hairpin mode of ${name} on`);
        port.hairpin = on;
      },
    },
    conntrack: {
      flush: async (requests) => {
        log.push(`flush ${requests.map((r) => `${r.kind} ${r.guest} ${r.address}`).join(', ')}`);
        const rest = kernel.flows.filter((flow) => !requests.some((request) => concerns(request, flow)));
        const flushed = kernel.flows.length - rest.length;
        kernel.flows = rest;
        return flushed;
      },
      // What is found is only handed back.
      find: async (requests) =>
        kernel.flows.filter((flow) =>
          requests.some((request) => concerns(request, flow)),
        ) as unknown as readonly Flow[],
      remove: async (flows) => {
        log.push(`remove flows ${flows.length}`);
        const gone = new Set<unknown>(flows);
        const rest = kernel.flows.filter((flow) => !gone.has(flow));
        const removed = kernel.flows.length - rest.length;
        kernel.flows = rest;
        return removed;
      },
    },
    announcer: {
      announce: async (items) => {
        for (const { address } of items) log.push(`announce ${address}`);
        const error = host.announcementError;
        return items.map(({ device, address }) => ({ device, address, ...(error === undefined ? {} : { error }) }));
      },
      repeat: async (items) => {
        log.push(`repeat ${items.map(({ address, label }) => `${address} ${label}`).join(', ')}`);
        return host.repeatError;
      },
    },
    prober: {
      probe: async (items, { except = [] } = {}) => {
        log.push(`probe ${items.map(({ address }) => address).join(', ')}`);
        return items.map(({ device, address }) => {
          if (host.probeError !== undefined) return { device, address, error: host.probeError };
          const other = kernel.others.get(address);
          return { device, address, ...(other === undefined || except.includes(other.hardware) ? {} : { other }) };
        });
      },
    },
    store: loggedStore(createStore(options.directory ?? temporaryDirectory()), log),
    domains: {
      active: async () => {
        log.push('domains');
        return host.active === undefined ? undefined : new Set([...host.active].map((vm) => `one-${vm}`));
      },
      state: async (vm) => {
        log.push(`domain ${vm}`);
        return stateOf(host, vm);
      },
      isMoving: async (vm) => host.moving.has(vm),
      cameBy: async (vm) => (host.moving.has(vm) ? 'migration' : 'boot'),
      interfaces: async (vms) => interfacesOf(host, vms),
    },
    processes: { isAlive: (holder) => !dead.has(holder.pid), bootId: () => host.bootId },
    withLock: (_, act) => {
      const run = queue.then(act);
      queue = run.catch(() => undefined);
      return run;
    },
    now: () => new Date(++clock).toISOString(),
  };
  return host;
}

/** What `Domains.state` says of a host whose libvirt is told by hand. */
export function stateOf({ active, interfaces }: Pick<FakeHost, 'active' | 'interfaces'>, vm: number): DomainState {
  if (active === undefined) return { kind: 'unknown' };
  if (!active.has(vm)) return { kind: 'inactive' };
  const macs = interfaces.get(vm);
  return { kind: 'active', macs: macs && new Set(macs.map((mac) => parseMac(mac))) };
}

/** What `Domains.interfaces` says of it. */
export function interfacesOf(
  host: Pick<FakeHost, 'active' | 'interfaces'>,
  vms: readonly number[],
): ReadonlyMap<number, ReadonlySet<Mac>> {
  const states = vms.map((vm) => [vm, stateOf(host, vm)] as const);
  return new Map(
    states.flatMap(([vm, state]) =>
      state.kind === 'active' && state.macs !== undefined ? [[vm, state.macs] as const] : [],
    ),
  );
}

/** The same host after its process ended and another began: same kernel, same files. */
export function restarted(host: FakeHost, config: Config = host.config): FakeHost {
  const fresh = createFakeHost(config, { kernel: host.kernel, directory: host.store.directory });
  fresh.active = host.active;
  fresh.bootId = host.bootId;
  for (const [vm, macs] of host.interfaces) fresh.interfaces.set(vm, macs);
  for (const pid of host.dead) fresh.dead.add(pid);
  return fresh;
}

function logged<T>(log: string[], what: string, act: () => Promise<T>): Promise<T> {
  log.push(what);
  return act();
}

function loggedStore(store: Store, log: string[]): Store {
  return {
    ...store,
    write: (file) => {
      log.push(`write ${ownerName(file.owner)} ${file.phase.name}`);
      store.write(file);
    },
    remove: (owner) => {
      log.push(`remove ${ownerName(owner)}`);
      store.remove(owner);
    },
    writeTable: (record) => {
      log.push(record === undefined ? 'forget table' : 'record table');
      store.writeTable(record);
    },
    writeLinks: (records) => {
      log.push('record links');
      store.writeLinks(records);
    },
    all: () => {
      log.push('all files');
      return store.all();
    },
  };
}

function linkOf(kernel: FakeKernel, name: string): Link | undefined {
  const link = kernel.links.get(name);
  if (link === undefined) return undefined;
  const indexOf = (of: string) => [...kernel.links.keys()].indexOf(of) + 1;
  const { mtu, up, type, running = up, kind = null, master, station = 1, carrierChanges = 2 } = link;
  const length = type === 32 ? 20 : 6;
  return {
    index: indexOf(name),
    name,
    type,
    mtu,
    up,
    running,
    kind,
    address: new Uint8Array(length).fill(station, length - 1),
    broadcast: new Uint8Array(length).fill(255),
    master: master === undefined ? null : indexOf(master),
    carrierChanges,
  };
}

function requireLink(kernel: FakeKernel, message: string, name: string): { mtu: number } {
  const link = kernel.links.get(name);
  if (link === undefined) throw new KvmIbError('host-lacks', message, { why: `there is no link ${name}` });
  return link;
}

/** `FlushRequest` as `link/ports.ts` words it. */
function concerns(request: FlushRequest, { original, reply }: FakeFlow): boolean {
  const { guest, address } = request;
  const isMapping =
    (original.source === guest && reply.destination === address) ||
    (original.destination === address && reply.source === guest);
  if (request.kind === 'mapping') return isMapping;
  if (original.destination === address) return reply.source !== guest;
  if (original.source === address) return true;
  const translatedTo = reply.destination;
  return original.source === guest && (translatedTo === guest || request.stale.some((own) => own === translatedTo));
}

function watched(kernel: FakeKernel, log: string[]): Nft {
  return {
    ...kernel.nft,
    run: async (what) => {
      await kernel.nft.run(what);
      kernel.table = await kernel.nft.listTable('ip', 'kvm_ib');
    },
    listTable: (family, name) => {
      log.push('nft list');
      return kernel.nft.listTable(family, name);
    },
  };
}

function readerOf(kernel: FakeKernel): ElementReader {
  return {
    get: (table, set, keys) => {
      const listing = kernel.table?.table.name === table ? kernel.table : undefined;
      const map = mapElements(listing, set);
      const plain = setElements(listing, set);
      if (map === undefined && plain === undefined) return 'no-set';
      const elements = new Map<string, Uint8Array | 'present'>([
        ...(map ?? []).map(([key, data]) => [String(keyBytes(key)), dataBytes(data)] as const),
        ...(plain ?? []).map((key) => [String(keyBytes(key)), 'present'] as const),
      ]);
      return keys.map((key) => elements.get(String(key)));
    },
  };
}

function mapElements(
  listing: TableListing | undefined,
  name: string,
): readonly (readonly [ElementKey, ElementData])[] | undefined {
  return listing?.maps.find((map) => map.name === name)?.elem;
}

function setElements(listing: TableListing | undefined, name: string): readonly ElementKey[] | undefined {
  return listing?.sets.find((set) => set.name === name)?.elem;
}

function keyBytes(key: ElementKey): Uint8Array {
  const value = typeof key === 'object' && 'elem' in key ? key.elem.val : key;
  if (typeof value === 'object' && 'concat' in value) {
    const bytes = new Uint8Array(12);
    bytes.set(ipv4Bytes(parseIpv4(String(value.concat[0]))), 0);
    bytes.set(macBytes(parseMac(String(value.concat[1]))), 4);
    return bytes;
  }
  return dataBytes(value as ElementData);
}

function dataBytes(data: ElementData): Uint8Array {
  if (typeof data === 'number') return new Uint8Array(Uint32Array.of(data).buffer);
  return ipv4Bytes(parseIpv4(String(data)));
}

/** Empties the kernel's nft, as `nft flush ruleset` does. */
export async function flushRuleset(kernel: FakeKernel): Promise<void> {
  const table = { family: 'ip', name: 'kvm_ib' } as const;
  await kernel.nft.run({ commands: [{ add: { table } }, { delete: { table } }] });
  kernel.table = undefined;
}

// Faults ------------------------------------------------------------------------------------------------------------

export interface FaultyHost extends Host {
  /** The changing calls that were made, the failed ones included. */
  readonly calls: string[];
}

/**
 * The host with its n-th changing call failing, from 1: before it does anything.
 * @param mode `once`: later ones succeed; `on`: every later one fails as well, which is what a crash looks like too
 */
export function withFaults(host: Host, n: number, mode: 'once' | 'on' = 'once'): FaultyHost {
  const calls: string[] = [];
  const gate = (what: string): void => {
    calls.push(what);
    if (calls.length === n || (mode === 'on' && calls.length > n)) {
      throw new KvmIbError('failed', `Cannot ${what}`, { why: `fault ${n}` });
    }
  };
  const wrap =
    <A extends readonly unknown[], R>(what: string, act: (...args: A) => Promise<R>) =>
    async (...args: A): Promise<R> => {
      gate(what);
      return act(...args);
    };
  const wrapSync =
    <A extends readonly unknown[], R>(what: string, act: (...args: A) => R) =>
    (...args: A): R => {
      gate(what);
      return act(...args);
    };
  const { nat, links, conntrack, store } = host;
  return {
    ...host,
    calls,
    nat: {
      ...nat,
      change: wrap('nat.change', nat.change),
      load: wrap('nat.load', nat.load),
      remove: wrap('nat.remove', nat.remove),
    },
    links: {
      ...links,
      addAlias: wrap('addAlias', links.addAlias),
      deleteAlias: wrap('deleteAlias', links.deleteAlias),
      setMtu: wrap('setMtu', links.setMtu),
      setHairpin: wrap('setHairpin', links.setHairpin),
    },
    conntrack: {
      ...conntrack,
      flush: wrap('conntrack.flush', conntrack.flush),
      remove: wrap('conntrack.remove', conntrack.remove),
    },
    store: {
      ...store,
      write: wrapSync('store.write', store.write),
      remove: wrapSync('store.remove', store.remove),
      writeTable: wrapSync('store.writeTable', store.writeTable),
      writeLinks: wrapSync('store.writeLinks', store.writeLinks),
      removeAll: wrapSync('store.removeAll', store.removeAll),
    },
  };
}

// What tests say ----------------------------------------------------------------------------------------------------

export function network(
  overrides: Partial<Record<'name' | 'device' | 'bridge' | 'guests' | 'addresses', string>> = {},
): Network {
  const range = (text: string) => {
    const parsed = tryParseRange(text);
    if (parsed === undefined) throw new Error(`not a range: ${text}`);
    return parsed;
  };
  return {
    name: overrides.name ?? 'ib',
    device: parseLinkName(overrides.device ?? 'ib0'),
    bridge: parseLinkName(overrides.bridge ?? 'virbr1'),
    guests: range(overrides.guests ?? '192.168.122.2-192.168.122.9'),
    addresses: range(overrides.addresses ?? '192.168.10.202-192.168.10.209'),
    isolate: true,
  };
}

export const CONFIG: Config = { networks: [network()], static: [] };

export const guestOf = (n: number): Ipv4 => parseIpv4(`192.168.122.${n}`);
export const addressOf = (n: number): Ipv4 => parseIpv4(`192.168.10.${200 + n}`);
export const IB0: LinkName = parseLinkName('ib0');
export const VIRBR1: LinkName = parseLinkName('virbr1');

/** The mapping of guest n; its IB address is that of the same number unless another is given. */
export function mapping(
  n: number,
  of: {
    readonly vm?: number | null;
    readonly nic?: number;
    readonly to?: number;
    readonly mac?: number | null;
    readonly config?: Config;
  } = {},
): Mapping {
  const vm = of.vm === undefined ? n : of.vm;
  const mac = of.mac === null ? null : parseMac(`02:00:c0:a8:7a:${(of.mac ?? n).toString(16).padStart(2, '0')}`);
  return resolveMapping(of.config ?? CONFIG, {
    guest: guestOf(n),
    address: addressOf(of.to ?? n),
    mac,
    vm,
    nic: vm === null ? null : (of.nic ?? 0),
  });
}

export const vmOwner = (vm: number): VmOwner => ({ kind: 'vm', vm });
export const holderOf = (pid: number): Holder => ({ pid, start: 1, bootId: BOOT });

export function request(owner: Owner, wish: readonly Mapping[], more: Partial<SyncRequest> = {}): SyncRequest {
  return { owner, wish, action: 'add', holder: holderOf(1), ...more };
}

/** The kernel and the files, as plain values in which equal hosts are equal. */
export interface Snapshot {
  readonly table: boolean;
  readonly pairs: readonly string[];
  readonly macs: readonly string[];
  /** Guests that are counted. */
  readonly counted: readonly string[];
  readonly aliases: readonly string[];
  readonly mtus: readonly string[];
  readonly ports: readonly string[];
  readonly files: readonly StateFile[];
  readonly claims: readonly string[];
}

export function snapshot(host: Pick<FakeHost, 'kernel' | 'store'>): Snapshot {
  const { kernel, store } = host;
  const { files } = store.all();
  return {
    table: kernel.table !== undefined,
    ...elementsOf(kernel.table),
    aliases: kernel.addresses.map((e) => `${e.device} ${e.address}/${e.prefixLength} ${e.label}`).sort(),
    mtus: [...kernel.links].map(([name, link]) => `${name} ${link.mtu}`).sort(),
    ports: kernel.ports.map((port) => `${port.name} ${port.hairpin}`).sort(),
    files: files.map((file) => ({ ...file, updated: '' })),
    claims: claimsOf(store.directory),
  };
}

/** Pairs and MAC bindings of a listed table, one text each, in an order of their own. */
export function elementsOf(table: TableListing | undefined): Pick<Snapshot, 'pairs' | 'macs' | 'counted'> {
  const key = (element: ElementKey): string => {
    const value = typeof element === 'object' && 'elem' in element ? element.elem.val : element;
    return typeof value === 'object' && 'concat' in value ? value.concat.join(' ') : String(value);
  };
  const map = (name: string): readonly string[] =>
    (mapElements(table, name) ?? []).map(([k, data]) => `${name} ${key(k)} ${String(data)}`);
  const set = (name: string): readonly string[] => (setElements(table, name) ?? []).map((k) => `${name} ${key(k)}`);
  return {
    pairs: [...map('guest_to_ib'), ...map('ib_to_guest')].sort(),
    macs: [...set('guest_mac'), ...set('guest_any_mac')].sort(),
    counted: [...set('guest_sent'), ...set('guest_received')].sort(),
  };
}

/** What the kernel must hold for these mappings. */
export function unitsOf(mappings: readonly Mapping[]): Pick<Snapshot, 'pairs' | 'macs' | 'counted' | 'aliases'> {
  return {
    pairs: mappings
      .flatMap((m) => [`guest_to_ib ${m.guest} ${m.address}`, `ib_to_guest ${m.address} ${m.guest}`])
      .sort(),
    macs: mappings.map((m) => (m.mac === null ? `guest_any_mac ${m.guest}` : `guest_mac ${m.guest} ${m.mac}`)).sort(),
    counted: mappings.flatMap((m) => [`guest_sent ${m.guest}`, `guest_received ${m.guest}`]).sort(),
    aliases: mappings.map((m) => `${m.device} ${m.address}/32 ${m.label}`).sort(),
  };
}

/** The index of claims that these files must have. */
export function claimsFor(files: readonly StateFile[]): readonly string[] {
  const all = files.flatMap((file) =>
    mappingsOf(file).flatMap((m) => [m.guest, m.address].map((a) => `${a} ${ownerName(file.owner)}`)),
  );
  return [...new Set(all)].sort();
}

/** The index of claims as it is, one text each. */
export function claimsOf(directory: string): readonly string[] {
  const claims = join(directory, 'claims');
  if (!readdirSync(directory).includes('claims')) return [];
  return readdirSync(claims)
    .map((name) => `${name} ${readlinkSync(join(claims, name))}`)
    .sort();
}

/** What `work` throws, which must be a KvmIbError. */
export async function failureOf(work: Promise<unknown>): Promise<KvmIbError> {
  const error = await work.then(
    () => undefined,
    (thrown: unknown) => thrown,
  );
  if (!(error instanceof KvmIbError)) throw new Error(`expected a KvmIbError, got ${String(error)}`);
  return error;
}
