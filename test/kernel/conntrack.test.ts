import { execFileSync, spawn, spawnSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { parseIpv4 } from '../../lib/core/address.ts';
import { createConntrack } from '../../lib/host/conntrack.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const run = (program: string, ...args: readonly string[]) =>
  execFileSync(program, args, { encoding: 'utf8', stdio: 'pipe' });
const ip = (...args: readonly string[]) => run('/usr/sbin/ip', ...args);
const nft = (input: string) => execFileSync('/usr/sbin/nft', ['-f', '-'], { input });

const guest = parseIpv4('192.168.122.2');
const otherGuest = parseIpv4('192.168.122.3');
const address = parseIpv4('192.168.10.202');
const otherAddress = parseIpv4('192.168.10.203');
const outside = parseIpv4('192.168.10.100');
const mapping = { guest, address };

/** Lines as `conntrack -L` prints them, without what changes from one listing to the next. */
function entries(): readonly string[] {
  return run('/usr/sbin/conntrack', '-L')
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => line.replace(/^(\S+\s+\d+) \d+/, '$1').replace(/\s+/g, ' '))
    .sort();
}

interface Planted {
  readonly protocol?: 'udp' | 'tcp' | 'icmp' | 'gre' | '200';
  /** Source and destination of the first packet, then of the answer. */
  readonly tuples: readonly [string, string, string, string];
  readonly options?: string;
}

let port = 1000;
/** The entry as a line for `conntrack -R`, with ports of its own. */
function line({ protocol = 'udp', tuples: [from, to, replyFrom, replyTo], options = '' }: Planted): string {
  port += 1;
  const ports = { original: `--sport ${port} --dport 80`, reply: `--reply-port-src 80 --reply-port-dst ${port}` };
  const parts = {
    udp: ports,
    tcp: { original: `${ports.original} --state ESTABLISHED`, reply: ports.reply },
    icmp: { original: `--icmp-type 8 --icmp-code 0 --icmp-id ${port}`, reply: '' },
    gre: { original: `--srckey ${port} --dstkey 80`, reply: `--reply-key-src 80 --reply-key-dst ${port}` },
    '200': { original: '', reply: '' },
  }[protocol];
  // conntrack 1.4.7 makes the reply tuple of an untranslated entry itself; and it fills in the reply's ICMP type only
  // when that of the request comes after the reply's addresses.
  const mirrored = replyFrom === to && replyTo === from;
  const reply = mirrored ? '' : `--reply-src ${replyFrom} --reply-dst ${replyTo} ${parts.reply}`;
  return `-I -p ${protocol} -s ${from} -d ${to} ${reply} ${parts.original} -t 1000 ${options}`;
}

function plant(...planted: readonly Planted[]): void {
  writeFileSync('/run/kvm-ib/entries', planted.map((entry) => `${line(entry)}\n`).join(''));
  run('/usr/sbin/conntrack', '-R', '/run/kvm-ib/entries');
}

/** The entries that came with `plant`. */
function planting(...planted: readonly Planted[]): readonly string[] {
  const before = new Set(entries());
  plant(...planted);
  return entries().filter((entry) => !before.has(entry));
}

const conntrack = createConntrack();
beforeEach(() => {
  run('/usr/sbin/conntrack', '-F');
});
afterAll(() => {
  run('/usr/sbin/conntrack', '-F');
  conntrack.close();
});

/** Entries of others, in every shape that comes near the mapping. */
const foreign: readonly Planted[] = [
  { tuples: [otherGuest, outside, outside, otherAddress] },
  { tuples: [outside, otherAddress, otherGuest, outside] },
  { tuples: [guest, outside, outside, '10.0.0.1'] },
  { tuples: [otherGuest, guest, guest, otherGuest] },
  { protocol: 'tcp', tuples: ['10.0.0.9', '10.0.0.1', '10.0.0.1', '10.0.0.9'] },
  { protocol: 'icmp', tuples: [outside, '192.168.10.1', '192.168.10.1', outside] },
  { tuples: [otherGuest, outside, outside, otherAddress], options: '--zone 9' },
];
const translated: readonly Planted[] = [
  { tuples: [guest, outside, outside, address] },
  { protocol: 'tcp', tuples: [guest, outside, outside, address] },
  { protocol: 'icmp', tuples: [guest, outside, outside, address] },
  { protocol: 'gre', tuples: [guest, outside, outside, address] },
  { protocol: '200', tuples: [guest, outside, outside, address] },
  { tuples: [guest, outside, outside, address], options: '--zone 5' },
  { tuples: [guest, outside, outside, address], options: '--orig-zone 6' },
  { tuples: [guest, outside, outside, address], options: '--reply-zone 7' },
  { tuples: [outside, address, guest, outside] },
  { protocol: 'tcp', tuples: [outside, address, guest, outside] },
  { protocol: 'icmp', tuples: [outside, address, guest, outside] },
  { protocol: '200', tuples: [outside, address, guest, outside], options: '--zone 5' },
  { tuples: [guest, address, guest, address] },
  { tuples: [otherGuest, address, guest, otherAddress] },
  { tuples: [guest, otherAddress, otherGuest, address] },
];
const inTheWay: readonly Planted[] = [
  { tuples: [outside, address, address, outside] },
  { protocol: 'tcp', tuples: [outside, address, otherGuest, outside] },
  { protocol: 'icmp', tuples: [guest, outside, outside, guest] },
  { protocol: '200', tuples: [guest, '192.168.10.101', '192.168.10.101', guest] },
  { tuples: [guest, outside, outside, '192.168.10.209'] },
  { tuples: [guest, outside, outside, guest], options: '--zone 5' },
  { tuples: [address, outside, outside, address] },
];
const staleAddress = parseIpv4('192.168.10.209');

describe.each([
  ['few entries, read by one dump', 0],
  ['1,000 entries of others, read by the filters of the kernel', 1_000],
])('among %s', (_, crowd) => {
  const others: readonly Planted[] = Array.from({ length: crowd }, (_, n) => ({
    tuples: [`10.1.${n >> 8}.${n & 255}`, outside, outside, `10.1.${n >> 8}.${n & 255}`],
  }));

  it('a flush of a mapping deletes what the mapping translates, of every protocol and zone, and nothing else', async () => {
    const kept = planting(...others, ...foreign, ...inTheWay);
    expect(kept).toHaveLength(crowd + foreign.length + inTheWay.length);
    expect(planting(...translated)).toHaveLength(translated.length);
    expect(await conntrack.flush([{ kind: 'mapping', ...mapping }])).toBe(translated.length);
    expect(entries()).toEqual(kept);
    expect(await conntrack.flush([{ kind: 'mapping', ...mapping }])).toBe(0);
  });

  it('a flush of foreign entries deletes what stands in the way of the mapping, and neither its own nor those of others', async () => {
    const kept = planting(...others, ...foreign, ...translated);
    expect(planting(...inTheWay)).toHaveLength(inTheWay.length);
    expect(await conntrack.flush([{ kind: 'foreign', ...mapping, stale: [staleAddress] }])).toBe(inTheWay.length);
    expect(entries()).toEqual(kept);
    expect(await conntrack.flush([{ kind: 'foreign', ...mapping, stale: [staleAddress] }])).toBe(0);
  });

  it('a translation that nobody calls stale stays', async () => {
    plant(...others);
    const kept = planting({ tuples: [guest, outside, outside, staleAddress] });
    expect(await conntrack.flush([{ kind: 'foreign', ...mapping, stale: [] }])).toBe(0);
    expect(entries()).toEqual(expect.arrayContaining([...kept]));
  });
});

describe('with packets through real NAT', () => {
  const inside = (netns: string, script: string) =>
    run('/usr/sbin/ip', 'netns', 'exec', netns, '/bin/bash', '-c', script);

  beforeAll(() => {
    for (const [netns, near, far, gateway, own] of [
      ['kctguest', 'kct0', 'kct1', '192.168.122.1', guest],
      ['kctoutside', 'kct2', 'kct3', '192.168.10.1', outside],
    ] as const) {
      ip('netns', 'add', netns);
      ip('link', 'add', near, 'type', 'veth', 'peer', 'name', far, 'netns', netns);
      ip('address', 'add', `${gateway}/24`, 'dev', near);
      ip('link', 'set', near, 'up');
      ip('-n', netns, 'address', 'add', `${own}/24`, 'dev', far);
      ip('-n', netns, 'link', 'set', far, 'up');
      ip('-n', netns, 'link', 'set', 'lo', 'up');
      ip('-n', netns, 'route', 'add', 'default', 'via', gateway);
    }
    ip('address', 'add', `${address}/32`, 'dev', 'kct2');
    run('/usr/sbin/sysctl', '-q', '-w', 'net.ipv4.ip_forward=1');
  });
  afterAll(() => {
    nft('add table ip kct\ndelete table ip kct');
    for (const netns of ['kctguest', 'kctoutside']) ip('netns', 'delete', netns);
    // They go with the namespace of their peer, now or a moment later: either way there is nothing to delete any more.
    for (const link of ['kct0', 'kct2']) spawnSync('/usr/sbin/ip', ['link', 'delete', link], { stdio: 'ignore' });
  });

  /** One ping, one datagram, and one TCP connection that is accepted, whose entry stays behind in TIME_WAIT. */
  const talk = (from: string, to: string, target: string) => {
    const listener = spawn('/usr/sbin/ip', ['netns', 'exec', to, 'nc', '-l', '-p', '7000'], { stdio: 'ignore' });
    try {
      const connect = `echo x 2>/dev/null >/dev/tcp/${target}/7000`;
      inside(from, `for i in {1..100}; do ${connect} && exit 0; sleep 0.05; done; exit 1`);
      inside(from, `ping -c1 -W2 ${target} && echo x >/dev/udp/${target}/9`);
    } finally {
      listener.kill();
    }
  };
  const nat = `table ip kct {
    chain pre { type nat hook prerouting priority -105; ip daddr ${address} dnat to ${guest}; }
    chain post { type nat hook postrouting priority 95; ip saddr ${guest} oifname kct2 snat to ${address}; }
  }`;

  it('a flush of foreign entries frees the flows that were there before the mapping, so that the next packet is translated', async () => {
    nft(`add table ip kct
      delete table ip kct
      table ip kct {
        chain f { type filter hook forward priority 0; ct state invalid drop; }
      }`);
    const fixed = (port: number) => `echo x | nc -u -p ${port} -w 1 ${outside} 9 || true`;
    inside('kctguest', fixed(4001));
    const untranslated = `src=${guest} dst=${outside} sport=4001 dport=9`;
    expect(entries().filter((entry) => entry.includes(`dst=${guest} sport=9 dport=4001`))).toHaveLength(1);
    nft(nat);
    inside('kctguest', fixed(4001));
    expect(entries().filter((entry) => entry.includes(`dst=${address} sport=9 dport=4001`))).toHaveLength(0);
    expect(await conntrack.flush([{ kind: 'foreign', ...mapping, stale: [] }])).toBe(1);
    inside('kctguest', fixed(4001));
    const after = entries().filter((entry) => entry.includes(untranslated));
    expect(after).toHaveLength(1);
    expect(after[0]).toContain(`dst=${address} sport=9 dport=4001`);
  });

  it('a flush of a mapping deletes the entries of ICMP, UDP and TCP, both ways', async () => {
    nft(`add table ip kct\ndelete table ip kct\n${nat}`);
    talk('kctguest', 'kctoutside', outside);
    talk('kctoutside', 'kctguest', address);
    const kept = planting(...foreign);
    const own = entries().filter((entry) => !kept.includes(entry));
    const begun = (protocol: string, from: string, to: string) =>
      own.filter((entry) => new RegExp(`^${protocol} [^=]*src=${from} dst=${to} `).test(entry));
    for (const protocol of ['icmp', 'udp', 'tcp']) {
      expect(begun(protocol, guest, outside)).toHaveLength(1);
      expect(begun(protocol, outside, address)).toHaveLength(1);
    }
    expect(own).toHaveLength(6);
    expect(await conntrack.flush([{ kind: 'foreign', ...mapping, stale: [] }])).toBe(0);
    expect(await conntrack.flush([{ kind: 'mapping', ...mapping }])).toBe(6);
    expect(entries()).toEqual(kept);
  });
});

it('says when the rights are missing', async () => {
  const poor = createConntrack();
  process.seteuid?.(65534);
  try {
    await expect(poor.flush([{ kind: 'mapping', ...mapping }])).rejects.toMatchObject({ code: 'not-permitted' });
  } finally {
    process.seteuid?.(0);
    poor.close();
  }
});
