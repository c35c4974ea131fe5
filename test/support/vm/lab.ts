/**
 * The network of the VM tests: a hypervisor and an outside client, each in a network namespace of its own, joined by a
 * pair of links named ib0 with the MTU of IPoIB in connected mode. No InfiniBand here: the pair carries Ethernet.
 */
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import type { Host, Libvirt } from './host.ts';
import { startHost, startLibvirt, startNetwork } from './host.ts';
import type { ToolResult } from './process.ts';
import { runTool, tryTool, waitFor } from './process.ts';

export const FABRIC = {
  /** Connected mode: 64 kB less the 4 bytes of the IPoIB header, rounded (RFC 4755). */
  mtu: 65520,
  network: '192.168.10.0/24',
  host: '192.168.10.1',
  outside: '192.168.10.100',
} as const;

export const BRIDGE = { name: 'virbr1', address: '192.168.122.1' } as const;

/** Where the guest's `init` gives back what it gets. */
export const ECHO_PORT = 7;
const HOST_NETNS = 'kib-host';
const OUTSIDE_NETNS = 'kib-outside';
const PEER = join(dirname(fileURLToPath(import.meta.url)), 'peer.mjs');

export interface VmLab {
  readonly host: Host;
  readonly libvirt: Libvirt;
  readonly outside: Outside;
  readonly stop: () => Promise<void>;
}

/** What a client on the fabric can do. */
export interface Outside {
  /** The argv that runs `argv` there. */
  readonly argv: (argv: readonly string[]) => [string, ...string[]];
  readonly run: (argv: readonly [string, ...string[]]) => Promise<ToolResult>;
  /** Sends bytes to the guest's echo. @returns what came back, and the address that the guest saw. */
  readonly echo: (address: string, body: string) => Promise<{ readonly seen: string; readonly body: string }>;
  /** Runs a shell script in the guest behind an address. @throws Error when the guest cannot be reached. */
  readonly shell: (address: string, script: string) => Promise<{ readonly status: number; readonly output: string }>;
  /** Takes connections on a port of the outside client until `stop`. */
  readonly listen: (port: number) => Promise<Listener>;
  /** Opens a connection to the guest and talks over it without a pause until `stop`. */
  readonly hold: (address: string) => Held;
}

/** One connection of the outside client to a guest's echo service. */
export interface Held {
  /** Waits until something that is sent from now on has come back. @throws Error when nothing does, or the connection broke */
  readonly answers: (limit?: number) => Promise<void>;
  /** Closes it. @throws Error unless all that was sent has come back, in order */
  readonly stop: () => Promise<void>;
}

export interface Connection {
  readonly from: string;
  readonly bytes: number;
  readonly sha256: string;
}

export interface Listener {
  /** Every connection so far that was read to its end. */
  readonly connections: readonly Connection[];
  readonly stop: () => Promise<void>;
}

const ip = (...args: readonly string[]) => runTool(['/usr/sbin/ip', ...args]);

/** What takes a lab down again, in the order in which it was built. */
export type Undo = (() => Promise<unknown>)[];

/** Undoes all that was built, the last first. @throws AggregateError when a step failed; the others are done */
export async function takeDown(undo: Undo): Promise<void> {
  const failures: unknown[] = [];
  for (let step = undo.pop(); step !== undefined; step = undo.pop()) {
    try {
      await step();
    } catch (error) {
      failures.push(error);
    }
  }
  if (failures.length > 0) throw new AggregateError(failures, 'Cannot take the lab down');
}

/** Builds the lab, with libvirt and its network running. What was built is taken down again when a step fails. */
export async function startVmLab(): Promise<VmLab> {
  // A tmpfs that scripts/in-netns.sh mounted: it vanishes with the namespace even when this process is killed.
  const folder = mkdtempSync('/run/kvm-ib/vm-');
  const undo: Undo = [async () => rmSync(folder, { recursive: true, force: true })];
  const stop = () => takeDown(undo);
  try {
    for (const name of [HOST_NETNS, OUTSIDE_NETNS]) {
      await ip('netns', 'add', name);
      undo.push(() => ip('netns', 'delete', name));
      await ip('-n', name, 'link', 'set', 'lo', 'up');
    }
    const [a, b] = [HOST_NETNS, OUTSIDE_NETNS];
    await ip('-n', a, 'link', 'add', 'ib0', 'type', 'veth', 'peer', 'name', 'ib0', 'netns', b);
    for (const [name, address] of [
      [a, FABRIC.host],
      [b, FABRIC.outside],
    ] as const) {
      await ip('-n', name, 'link', 'set', 'ib0', 'mtu', String(FABRIC.mtu), 'up');
      await ip('-n', name, 'address', 'add', `${address}/24`, 'dev', 'ib0');
    }
    mkdirSync(join(folder, 'host'));
    const host = await startHost({ name: 'kvmib01', netns: HOST_NETNS, folder: join(folder, 'host') });
    undo.push(host.stop);
    const libvirt = await startLibvirt(host);
    undo.push(libvirt.stop);
    await startNetwork(host, libvirt, { bridge: BRIDGE.name, address: BRIDGE.address, mtu: FABRIC.mtu });
    return { host, libvirt, outside: outsideClient(OUTSIDE_NETNS), stop };
  } catch (error) {
    await stop().catch((failure: unknown) => console.error(failure));
    throw error;
  }
}

/** A client on the fabric: a network namespace with an ib0 that has the address `FABRIC.outside`. */
export function outsideClient(netns: string): Outside {
  const within = (argv: readonly string[]): [string, ...string[]] => ['/usr/sbin/ip', 'netns', 'exec', netns, ...argv];
  const post = async (address: string, path: string, body: string) => {
    const answer = await tryTool(within([process.execPath, PEER, 'post', address, path]), { input: body });
    const [seen = '', ...problems] = answer.stderr.split('\n');
    if (answer.status !== 0) throw new Error(`http://${address}${path}: ${problems.join(' ').trim() || seen}`);
    return { seen, body: answer.stdout };
  };
  return {
    argv: within,
    run: (argv) => tryTool(within(argv)),
    echo: (address, body) => post(address, '/cgi-bin/echo', body),
    shell: async (address, script) => {
      const { body } = await post(address, '/cgi-bin/run', script);
      const end = /^exit (\d+)\n$/m.exec(body);
      if (end === null) throw new Error(`The guest at ${address} did not finish: ${body}`);
      return { status: Number(end[1]), output: body.slice(0, end.index) };
    },
    hold: (address) => hold(within([process.execPath, PEER, 'hold', address, String(ECHO_PORT)])),
    listen: (port) => listen(within([process.execPath, PEER, 'listen', FABRIC.outside, String(port)])),
  };
}

async function listen(argv: readonly [string, ...string[]]): Promise<Listener> {
  const [program, ...args] = argv;
  const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'pipe'], env: { PATH: '/usr/sbin:/usr/bin' } });
  const ended = new Promise<void>((resolve) => child.once('close', () => resolve()));
  const connections: Connection[] = [];
  let said = '';
  child.stderr.on('data', (chunk: Buffer) => {
    said += chunk.toString();
  });
  await new Promise<void>((resolve, reject) => {
    createInterface({ input: child.stdout }).on('line', (line) => {
      if (line === 'listening') resolve();
      else connections.push(JSON.parse(line) as Connection);
    });
    child.once('error', reject);
    child.once('close', () => reject(new Error(`Cannot listen outside: ${said}`)));
  });
  return {
    connections,
    stop: () => {
      child.kill('SIGTERM'); // `ip netns exec` became node itself
      return ended;
    },
  };
}

function hold(argv: readonly [string, ...string[]]): Held {
  const [program, ...args] = argv;
  const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'pipe'], env: { PATH: '/usr/sbin:/usr/bin' } });
  const ended = new Promise<number | null>((resolve) => child.once('close', resolve));
  let answered = 0;
  let sent = -1;
  let said = '';
  let order = true;
  child.stderr.on('data', (chunk: Buffer) => {
    said += chunk.toString();
  });
  createInterface({ input: child.stdout }).on('line', (line) => {
    const total = /^sent (\d+)$/.exec(line);
    if (total !== null) {
      sent = Number(total[1]);
      return;
    }
    answered += 1;
    if (Number(line) !== answered) order = false;
  });
  const broken = () => (child.exitCode === null ? undefined : new Error(`The connection broke: ${said.trim()}`));
  return {
    answers: async (limit = 20_000) => {
      // What is on its way now does not count: ten of them are half a second.
      const enough = answered + 10;
      await waitFor(
        'an answer over the open connection',
        () => {
          const error = broken();
          if (error !== undefined) throw error;
          return answered >= enough ? true : undefined;
        },
        limit,
        50,
      );
    },
    stop: async () => {
      const early = broken();
      if (early !== undefined) throw early;
      child.kill('SIGTERM'); // `ip netns exec` became node itself
      const status = await ended;
      if (status !== 0 || !order || sent !== answered) {
        throw new Error(`Of ${sent} numbers ${answered} came back${order ? '' : ', not in order'}: ${said.trim()}`);
      }
    },
  };
}

/** The state of a host that a VM must not change for good: one text per part, comparable as it is. */
export async function hostState(host: Host): Promise<Readonly<Record<string, string>>> {
  const sorted = (text: string) => text.trim().split('\n').sort().join('\n');
  return {
    addresses: await host.run(['/usr/sbin/ip', '-o', '-4', 'address']),
    // Without the peers' state, which follows the guest's.
    links: sorted(
      (await host.run(['/usr/sbin/ip', '-o', 'link']))
        .replace(/^\d+: /gm, '')
        .replace(/<[^>]*>|state \S+|mode \S+|qdisc \S+/g, '')
        .replace(/link\/ether \S+/g, ''),
    ),
    // linkdown says only whether the bridge ever had a port.
    routes: (await host.run(['/usr/sbin/ip', '-4', 'route', 'show', 'table', 'all'])).replace(/ linkdown/g, ''),
    // -s: without counters.
    ruleset: await host.run(['/usr/sbin/nft', '-s', 'list', 'ruleset']),
  };
}

/** Connection tracking entries that name one of the addresses. */
export async function flowsOf(host: Host, addresses: readonly string[]): Promise<readonly string[]> {
  const entries = await host.run(['/usr/sbin/conntrack', '-L']);
  return entries.split('\n').filter((line) => addresses.some((address) => new RegExp(`=${address}(?: |$)`).test(line)));
}

export function sha256(text: string | Uint8Array): string {
  return createHash('sha256').update(text).digest('hex');
}
