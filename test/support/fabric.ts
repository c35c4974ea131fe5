/**
 * Another host on the fabric of the rig: the far end of ib0 in a namespace of its own, `other`. It sees every ARP frame
 * that arrives there, holds addresses, and sends whatever ARP it is told to.
 */
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import { tool } from './driver.ts';

const IP = '/usr/sbin/ip';
export const OTHER_MAC = '02:00:00:00:00:bb';

export function makeOther(): void {
  if (spawnSync(IP, ['netns', 'exec', 'other', 'true'], { stdio: 'ignore' }).status === 0) return;
  tool(IP, 'netns', 'add', 'other');
  tool(IP, 'link', 'set', 'fabric', 'netns', 'other', 'address', OTHER_MAC);
  inOther('sysctl', '-qw', 'net.ipv6.conf.all.disable_ipv6=1');
  otherIp('link', 'set', 'fabric', 'up');
}

export function inOther(...argv: readonly string[]): string {
  return tool(IP, 'netns', 'exec', 'other', ...argv);
}

export function otherIp(...args: readonly string[]): void {
  tool(IP, '-n', 'other', ...args);
}

/** Sends ARP packets, each in hex, as broadcasts from the other host. @returns once they are sent */
export async function sendArp(packets: readonly string[]): Promise<void> {
  const script = fileURLToPath(new URL('./send-arp.mjs', import.meta.url));
  const child = spawn(IP, ['netns', 'exec', 'other', process.execPath, script, 'fabric', ...packets], {
    stdio: ['ignore', 'ignore', 'inherit'],
  });
  const [status] = await once(child, 'close');
  if (status !== 0) throw new Error(`send-arp.mjs ended with ${status}`);
}

/** An Ethernet ARP packet in hex. */
export function arpPacket(operation: 1 | 2, hardware: string, sender: string, target: string): string {
  const bytes = (address: string): string =>
    address
      .split('.')
      .map((part) => Number(part).toString(16).padStart(2, '0'))
      .join('');
  return `000108000604000${operation}${hardware.replaceAll(':', '')}${bytes(sender)}000000000000${bytes(target)}`;
}

export interface SeenArp {
  /** Seconds since the capture began. */
  readonly at: number;
  readonly from: string;
  /** `probe A`, `request A`, `reply A`: request and reply are gratuitous ones. Anything else as tcpdump words it. */
  readonly what: string;
}

export interface ArpCapture {
  frames(): readonly SeenArp[];
  stop(): Promise<readonly SeenArp[]>;
}

/** What the other host receives. */
export async function captureArp(): Promise<ArpCapture> {
  const args = [
    'netns',
    'exec',
    'other',
    'tcpdump',
    '-n',
    '-l',
    '--immediate-mode',
    '-tt',
    '-e',
    '-Q',
    'in',
    '-i',
    'fabric',
    'arp',
  ];
  const child = spawn(IP, ['netns', 'exec', 'other', 'timeout', '60', ...args.slice(3)], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let out = '';
  child.stdout.on('data', (chunk: Buffer) => {
    out += chunk.toString();
  });
  const ended = once(child, 'close');
  for (let said = ''; !said.includes('listening on'); ) said += String((await once(child.stderr, 'data'))[0]);
  const began = Date.now() / 1000;
  const frames = (): readonly SeenArp[] =>
    out.split('\n').flatMap((line): readonly SeenArp[] => {
      const match = /^(\d+\.\d+) (\S+) > .*?: (Request .*|Reply .*), length \d+$/.exec(line);
      if (match === null) return [];
      const [, time, from = '', text = ''] = match;
      return [{ at: Number(time) - began, from, what: named(text) }];
    });
  return {
    frames,
    stop: async () => {
      // What was sent just now is on its way through the program.
      await new Promise((resolve) => setTimeout(resolve, 100));
      child.kill('SIGTERM');
      await ended;
      return frames();
    },
  };
}

function named(text: string): string {
  const [, asked, teller] = /^Request who-has (\S+)(?: \(\S+\))? tell (\S+)/.exec(text) ?? [];
  if (asked !== undefined && teller === '0.0.0.0') return `probe ${asked}`;
  if (asked !== undefined && teller === asked) return `request ${asked}`;
  const [, replied] = /^Reply (\S+) is-at/.exec(text) ?? [];
  return replied === undefined ? text : `reply ${replied}`;
}
