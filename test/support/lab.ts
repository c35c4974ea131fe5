/**
 * The lab: hypervisors, their guests, the IPoIB fabric, and clients, each a network namespace, joined by veth pairs.
 *
 *     out ─ ib0 ─┐            ┌─ ib0 ─ h1 ─ virbr1 ─ vnet11 ─ g11, vnet12 ─ g12 …
 *                fabric (br0) ┤
 *                             └─ ib0 ─ h2 ─ virbr1 ─ vnet21 ─ g21 …
 *
 * Guest N has 192.168.122.N, MAC 02:00:c0:a8:7a:NN, and, when mapped, the IB address 192.168.10.N. The second network
 * (`second: true`) is ib1, virbr2, br1: guest N has 192.168.123.N and 192.168.20.N. `lan` (`foreign: true`) is a
 * network that kvm-ib knows nothing of, on eth9 of h1.
 *
 * What stands for an IPoIB link is one end of a veth pair with MTU 65520: everything above the link layer is as on
 * InfiniBand; the link layer itself is not.
 */
import { type ChildProcess, fork } from 'node:child_process';
import { type Ipv4, type LinkName, type Mac, parseIpv4, parseLinkName, parseMac } from '../../lib/core/address.ts';
import type { ExecOptions, ExecResult } from '../../lib/core/exec.ts';
import type { Network } from '../../lib/core/mapping.ts';
import { servedNetworks } from '../../lib/core/served.ts';
import { exec } from '../../lib/host/exec.ts';
import type { Pair, TableSpec } from '../../lib/nat/engine.ts';
import { elementCommands, elementsOf } from '../../lib/nat/nft.ts';
import { ruleset } from '../../lib/nat/ruleset.ts';
import { createNft, type Nft } from '../../lib/nftables-json/run.ts';
import { transaction } from '../../lib/nftables-json/transaction.ts';
import { requireOwnNetns } from './netns.ts';

const IP = '/usr/sbin/ip';
const IB_MTU = 65520;

export type Protocol = 'tcp' | 'udp' | 'icmp';
export type Host = 'h1' | 'h2';

export interface LabOptions {
  /** Guests of the first network by hypervisor. Default: 11, 12, 13 on h1 and 21 on h2. */
  readonly guests?: Partial<Record<Host, readonly number[]>>;
  /** Guests of the second network; without it there is none. */
  readonly second?: Partial<Record<Host, readonly number[]>>;
  readonly foreign?: boolean;
  /** MTU of the guests. Default 1500. */
  readonly guestMtu?: number;
  /** MTU of the IPoIB links. Default 65520. */
  readonly fabricMtu?: number;
}

export interface ProbeOptions {
  /** Bytes of payload, sent and echoed. */
  readonly size?: number;
  /** Source address that the client binds. */
  readonly source?: string;
  readonly port?: number;
  /** Milliseconds. Default 3000 for what should work; give less where silence is expected. */
  readonly timeout?: number;
}

/** A packet seen on a link, or an ICMP message that arrived at a namespace. */
export interface Packet {
  readonly source: string;
  readonly destination: string;
  readonly protocol: string;
  readonly length: number;
  readonly fragment: boolean;
  readonly sourcePort?: number;
  readonly destinationPort?: number;
  /** TCP flags. */
  readonly flags?: number;
  readonly type?: number;
  readonly code?: number;
  readonly mtu?: number;
  /** Of an ICMP error: the packet that it is about. */
  readonly inner?: { readonly source: string; readonly destination: string };
}

export interface Stream {
  /** What the far side saw, as `reach` says it; of UDP, `open`. */
  readonly greeting: string;
  /** Sends and waits for the echo: `alive` (UDP: what the far side saw), `timeout`, `reset`, `refused`, `closed`. */
  exchange(options?: { readonly size?: number; readonly timeout?: number }): Promise<string>;
  close(): Promise<void>;
}

export interface Capture {
  /** What was seen since the start or the last call. */
  packets(): Promise<readonly Packet[]>;
  stop(): Promise<readonly Packet[]>;
}

export interface LoadOptions {
  /** Names of the networks that are isolated (`ib`, `ib-b`). Default: all. */
  readonly isolated?: readonly string[];
  /** False: the host has no address of its own on the link, as far as the rule set knows. */
  readonly hostAddress?: boolean;
}

export interface Lab {
  /** Runs a program in a namespace. @throws when it fails. @returns standard output. */
  exec(namespace: string, argv: readonly [string, ...string[]], options?: ExecOptions): Promise<string>;
  /** The same; a failure is a result. */
  tryExec(namespace: string, argv: readonly [string, ...string[]], options?: ExecOptions): Promise<ExecResult>;
  sysctl(namespace: string, key: string, value: string | number): Promise<void>;
  nft(host: Host): Nft;
  /** What the rule set of a hypervisor is made for. */
  spec(host: Host, options?: LoadOptions): TableSpec;
  /** Loads the rule set; mappings stay. */
  load(host: Host, options?: LoadOptions): Promise<void>;
  /** Maps guests by number, then puts their aliases on the link. */
  map(host: Host, ...pairs: readonly (number | Pair)[]): Promise<void>;
  /** Takes the alias off, then the mapping. Flows are left alone. */
  unmap(host: Host, ...pairs: readonly (number | Pair)[]): Promise<void>;
  /**
   * Sends to port 7000, or an echo request, and waits for the echo.
   * @returns who got it and with which addresses, `g11: 192.168.10.100 > 192.168.122.11`; or `timeout`, `refused`, …
   */
  reach(protocol: Protocol, from: string, to: string, options?: ProbeOptions): Promise<string>;
  /** `reach` by ICMP, TCP and UDP; one word when all three agree. */
  reachAll(from: string, to: string, options?: ProbeOptions): Promise<string>;
  stream(protocol: 'tcp' | 'udp', from: string, to: string, options?: ProbeOptions): Promise<Stream>;
  capture(namespace: string, link: string): Promise<Capture>;
  /** Sends a whole IPv4 packet from a namespace, by its routes. */
  send(namespace: string, packet: Uint8Array): Promise<void>;
  /** ICMP messages that arrived at a namespace since the last call. */
  icmpSeen(namespace: string): Promise<readonly Packet[]>;
  /** Sum of the counters of the rules whose comment has this text. */
  dropped(host: Host, comment: string): Promise<number>;
  close(): Promise<void>;
}

interface NetworkPlan {
  readonly name: string;
  readonly device: LinkName;
  readonly bridge: LinkName;
  /** First three octets. */
  readonly guestNet: string;
  readonly ibNet: string;
  readonly fabricBridge: string;
  /** Letter before the number in a guest's namespace. */
  readonly letter: string;
}

const FIRST: NetworkPlan = {
  name: 'ib',
  device: parseLinkName('ib0'),
  bridge: parseLinkName('virbr1'),
  guestNet: '192.168.122',
  ibNet: '192.168.10',
  fabricBridge: 'br0',
  letter: 'g',
};
const SECOND: NetworkPlan = {
  name: 'ib-b',
  device: parseLinkName('ib1'),
  bridge: parseLinkName('virbr2'),
  guestNet: '192.168.123',
  ibNet: '192.168.20',
  fabricBridge: 'br1',
  letter: 'k',
};
const HOST_NUMBER: Record<Host, number> = { h1: 1, h2: 2 };

function guestMac(plan: NetworkPlan, number: number): Mac {
  const bytes = [2, 0, ...plan.guestNet.split('.').map(Number), number];
  return parseMac(bytes.map((byte) => byte.toString(16).padStart(2, '0')).join(':'));
}

/** The mapping of guest N: of the second network for `second`. */
export function pairOf(number: number, options: { readonly second?: boolean; readonly mac?: Mac | null } = {}): Pair {
  const plan = options.second === true ? SECOND : FIRST;
  return {
    guest: parseIpv4(`${plan.guestNet}.${number}`),
    address: parseIpv4(`${plan.ibNet}.${number}`),
    mac: options.mac === undefined ? guestMac(plan, number) : options.mac,
    comment: `lab ${plan.letter}${number}`,
  };
}

function networkOf(plan: NetworkPlan, isolate: boolean): Network {
  const range = (net: string) => ({ first: parseIpv4(`${net}.11`), last: parseIpv4(`${net}.99`) });
  const { name, device, bridge } = plan;
  return { name, device, bridge, guests: range(plan.guestNet), addresses: range(plan.ibNet), isolate };
}

/**
 * Builds the lab in this process's namespace, which must be a throw-away one.
 * @returns the lab; `close` removes all of it
 */
export async function createLab(options: LabOptions = {}): Promise<Lab> {
  requireOwnNetns();
  const plans: readonly (readonly [NetworkPlan, Partial<Record<Host, readonly number[]>>])[] = [
    [FIRST, options.guests ?? { h1: [11, 12, 13], h2: [21] }],
    ...(options.second === undefined ? [] : [[SECOND, options.second] as const]),
  ];
  const networks = plans.map(([plan]) => plan);
  const layout = layOut(plans, options);
  const agentStarted = startAgent();
  let agent: Agent | undefined;
  try {
    await batch([], layout.links);
    agent = await agentStarted;
    for (const [namespace, settings] of layout.sysctls) {
      for (const [key, value] of settings) await agent.call('sysctl', { ns: namespace, key, value });
    }
    await Promise.all([...layout.configuration].map(([namespace, lines]) => batch(['-n', namespace], lines)));
    for (const [ns, addresses] of layout.addresses) await agent.call('serve', { ns, addresses });
  } catch (error) {
    await (agent ?? (await agentStarted)).stop();
    await batch([], layout.removal);
    throw error;
  }
  return labOf(agent, layout, networks);
}

interface Layout {
  readonly links: readonly string[];
  readonly removal: readonly string[];
  readonly sysctls: ReadonlyMap<string, readonly (readonly [string, number])[]>;
  readonly configuration: ReadonlyMap<string, readonly string[]>;
  /** Addresses that each namespace serves. */
  readonly addresses: ReadonlyMap<string, readonly string[]>;
}

function layOut(
  plans: readonly (readonly [NetworkPlan, Partial<Record<Host, readonly number[]>>])[],
  options: LabOptions,
): Layout {
  const fabricMtu = options.fabricMtu ?? IB_MTU;
  const guestMtu = options.guestMtu ?? 1500;
  const hosts: readonly Host[] = ['h1', 'h2'];
  const links: string[] = [];
  const configuration = new Map<string, string[]>();
  const addresses = new Map<string, string[]>();
  const namespace = (name: string): string[] => {
    const known = configuration.get(name);
    if (known !== undefined) return known;
    links.push(`netns add ${name}`);
    const lines = ['link set lo up'];
    configuration.set(name, lines);
    return lines;
  };
  const address = (name: string, link: string, value: string): void => {
    namespace(name).push(`address add ${value}/24 dev ${link}`);
    addresses.set(name, [...(addresses.get(name) ?? []), value]);
  };
  const veth = (a: string, linkA: string, b: string, linkB: string, mtu: number, extra = ''): void => {
    namespace(a);
    namespace(b);
    links.push(
      `link add name ${linkA} mtu ${mtu} netns ${a} ${extra} type veth peer name ${linkB} mtu ${mtu} netns ${b}`,
    );
  };
  const bridge = (name: string, link: string): void =>
    void namespace(name).push(`link add ${link} type bridge`, `link set ${link} up`);
  const port = (name: string, link: string, of: string): void =>
    void namespace(name).push(`link set ${link} master ${of} up`);

  for (const [plan, guests] of plans) {
    const { device, fabricBridge } = plan;
    bridge('fabric', fabricBridge);
    for (const name of [...hosts, 'out']) {
      veth(name, device, 'fabric', `${name}-${device}`, fabricMtu);
      port('fabric', `${name}-${device}`, fabricBridge);
      namespace(name).push(`link set ${device} up`);
    }
    address('out', device, `${plan.ibNet}.100`);
    for (const host of hosts) {
      address(host, device, `${plan.ibNet}.${HOST_NUMBER[host]}`);
      bridge(host, plan.bridge);
      namespace(host).push(`link set ${plan.bridge} mtu ${guestMtu}`);
      address(host, plan.bridge, `${plan.guestNet}.1`);
      for (const number of guests[host] ?? []) {
        const guest = `${plan.letter}${number}`;
        const tap = plan === FIRST ? `vnet${number}` : `vnetb${number}`;
        veth(guest, 'eth0', host, tap, guestMtu, `address ${guestMac(plan, number)}`);
        port(host, tap, plan.bridge);
        namespace(guest).push('link set eth0 up');
        address(guest, 'eth0', `${plan.guestNet}.${number}`);
        namespace(guest).push(`route add default via ${plan.guestNet}.1`);
      }
    }
  }
  if (options.foreign === true) {
    veth('lan', 'eth0', 'h1', 'eth9', 1500);
    for (const [name, link, value] of [
      ['lan', 'eth0', '10.9.0.2'],
      ['h1', 'eth9', '10.9.0.1'],
    ] as const) {
      namespace(name).push(`link set ${link} up`);
      address(name, link, value);
    }
    namespace('lan').push('route add default via 10.9.0.1');
  }
  const names = [...configuration.keys()];
  const sysctls = new Map(
    names.map((name) => [
      name,
      [
        ['net.ipv6.conf.all.disable_ipv6', 1],
        ['net.ipv6.conf.default.disable_ipv6', 1],
        ...(name === 'h1' || name === 'h2' ? ([['net.ipv4.ip_forward', 1]] as const) : []),
      ] as const,
    ]),
  );
  return { links, removal: names.map((name) => `netns delete ${name}`), sysctls, configuration, addresses };
}

function labOf(agent: Agent, layout: Layout, plans: readonly NetworkPlan[]): Lab {
  let ids = 0;
  const nextId = (): number => ++ids;
  const inNamespace = (namespace: string, argv: readonly [string, ...string[]]) =>
    [IP, 'netns', 'exec', namespace, ...argv] as const;
  const tryExec: Lab['tryExec'] = (namespace, argv, execOptions) => exec(inNamespace(namespace, argv), execOptions);
  const nft = (host: Host): Nft => createNft({ exec: (argv, execOptions) => tryExec(host, argv, execOptions) });
  const deviceOf = (pair: Pair): LinkName => {
    const plan = plans.find(({ ibNet }) => pair.address.startsWith(`${ibNet}.`));
    if (plan === undefined) throw new Error(`no network of the lab has ${pair.address}`);
    return plan.device;
  };
  const asPair = (pair: number | Pair): Pair => (typeof pair === 'number' ? pairOf(pair) : pair);
  const spec: Lab['spec'] = (host, { isolated, hostAddress = true } = {}) => ({
    networks: servedNetworks(
      plans.map((plan) => networkOf(plan, isolated?.includes(plan.name) ?? true)),
      [],
    ),
    hostAddresses: new Map(
      plans.map((plan): [string, readonly Ipv4[]] => [
        plan.name,
        hostAddress ? [parseIpv4(`${plan.ibNet}.${HOST_NUMBER[host]}`)] : [],
      ]),
    ),
  });

  const lab: Lab = {
    tryExec,
    exec: async (namespace, argv, execOptions) => {
      const result = await tryExec(namespace, argv, execOptions);
      if (result.status !== 0) {
        throw new Error(`${namespace}: ${argv.join(' ')}: status ${result.status}: ${result.stderr}${result.stdout}`);
      }
      return result.stdout;
    },
    sysctl: async (namespace, key, value) => void (await agent.call('sysctl', { ns: namespace, key, value })),
    nft,
    spec,
    load: (host, loadOptions) => nft(host).run(transaction(...ruleset(spec(host, loadOptions)))),
    map: async (host, ...pairs) => {
      const all = pairs.map(asPair);
      await nft(host).run(transaction(...elementCommands('add', elementsOf(all), commentsOf(all))));
      await batch(
        ['-n', host],
        all.map((pair) => `address add ${pair.address}/32 dev ${deviceOf(pair)}`),
      );
    },
    unmap: async (host, ...pairs) => {
      const all = pairs.map(asPair);
      await batch(
        ['-n', host],
        all.map((pair) => `address delete ${pair.address}/32 dev ${deviceOf(pair)}`),
      );
      await nft(host).run(transaction(...elementCommands('delete', elementsOf(all), {})));
    },
    reach: async (protocol, from, to, probe = {}) => {
      const { size = 32, source, port, timeout = 3000 } = probe;
      if (protocol === 'icmp') return text(await agent.call('icmp', { ns: from, to, source, size, timeout }));
      const stream = await lab.stream(protocol, from, to, { source, port, timeout } as ProbeOptions);
      try {
        if (protocol === 'udp')
          return stream.greeting === 'open' ? await stream.exchange({ size, timeout }) : stream.greeting;
        if (!stream.greeting.includes('>')) return stream.greeting;
        const echoed = await stream.exchange({ size, timeout });
        return echoed === 'alive' ? stream.greeting : `${stream.greeting}, then ${echoed}`;
      } finally {
        await stream.close();
      }
    },
    reachAll: async (from, to, probe) => {
      const protocols: readonly Protocol[] = ['icmp', 'tcp', 'udp'];
      const results = await Promise.all(protocols.map((protocol) => lab.reach(protocol, from, to, probe)));
      const [first] = results;
      if (first !== undefined && results.every((result) => result === first)) return first;
      return results.map((result, index) => `${protocols[index]} ${result}`).join('; ');
    },
    stream: async (protocol, from, to, probe = {}) => {
      const id = nextId();
      const { source, port, timeout = 3000 } = probe;
      const greeting = text(await agent.call('open', { id, protocol, ns: from, to, source, port, timeout }));
      return {
        greeting,
        exchange: async ({ size = 32, timeout: limit = timeout } = {}) =>
          text(await agent.call('exchange', { id, size, timeout: limit })),
        close: async () => void (await agent.call('close', { id })),
      };
    },
    capture: async (namespace, link) => {
      const id = nextId();
      await agent.call('capture', { id, ns: namespace, link });
      return {
        packets: async () => (await agent.call('captured', { id })) as readonly Packet[],
        stop: async () => (await agent.call('captured', { id, stop: true })) as readonly Packet[],
      };
    },
    send: async (namespace, packet) =>
      void (await agent.call('send', { ns: namespace, packet: Buffer.from(packet).toString('base64') })),
    icmpSeen: async (namespace) => (await agent.call('icmpSeen', { ns: namespace })) as readonly Packet[],
    dropped: async (host, comment) => {
      const listing = await nft(host).listTable('ip', 'kvm_ib');
      const rules = (listing?.rules ?? []).filter((rule) => rule.comment?.includes(comment) === true);
      if (rules.length === 0) throw new Error(`no rule of ${host} has a comment with "${comment}"`);
      return rules
        .flatMap((rule) => rule.expr)
        .reduce((sum, statement) => sum + ('counter' in statement ? packetsOf(statement.counter) : 0), 0);
    },
    close: async () => {
      await agent.stop();
      await batch([], layout.removal);
    },
  };
  return lab;
}

function packetsOf(counter: unknown): number {
  return typeof counter === 'object' && counter !== null && 'packets' in counter ? Number(counter.packets) : 0;
}

function commentsOf(pairs: readonly Pair[]): Readonly<Record<string, string>> {
  return Object.fromEntries(pairs.map((pair) => [pair.guest, pair.comment]));
}

function text(value: unknown): string {
  return typeof value === 'string' ? value : JSON.stringify(value);
}

/** Many `ip` commands in one process. @throws when one fails */
async function batch(flags: readonly string[], lines: readonly string[]): Promise<void> {
  if (lines.length === 0) return;
  const result = await exec([IP, ...flags, '-batch', '-'], { input: `${lines.join('\n')}\n` });
  if (result.status !== 0) throw new Error(`ip ${flags.join(' ')} -batch: ${result.stderr}\n${lines.join('\n')}`);
}

interface Agent {
  call(operation: string, parameters: Readonly<Record<string, unknown>>): Promise<unknown>;
  stop(): Promise<void>;
}

async function startAgent(): Promise<Agent> {
  const child: ChildProcess = fork(new URL('./echo.mjs', import.meta.url), { execArgv: [], stdio: 'inherit' });
  const waiting = new Map<number, { resolve(value: unknown): void; reject(error: Error): void }>();
  let calls = 0;
  child.on('message', (message: { call: number; result?: unknown; error?: string }) => {
    const waiter = waiting.get(message.call);
    waiting.delete(message.call);
    if (message.error === undefined) waiter?.resolve(message.result);
    else waiter?.reject(new Error(message.error));
  });
  child.on('exit', () => {
    for (const waiter of waiting.values()) waiter.reject(new Error('the echo process ended'));
  });
  await new Promise((resolve, reject) => {
    child.once('message', resolve);
    child.once('exit', () => reject(new Error('the echo process did not start')));
  });
  return {
    call: (operation, parameters) =>
      new Promise((resolve, reject) => {
        const call = ++calls;
        waiting.set(call, { resolve, reject });
        child.send({ ...parameters, call, operation });
      }),
    // Its sockets hold the namespaces: they are gone for certain once it has ended.
    stop: () =>
      new Promise((resolve) => {
        waiting.clear();
        if (child.exitCode !== null) return resolve();
        child.once('exit', () => resolve());
        child.disconnect();
      }),
  };
}
