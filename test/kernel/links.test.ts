import { execFileSync, spawn } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { parseIpv4, parseLinkName } from '../../lib/core/address.ts';
import { KvmIbError } from '../../lib/core/errors.ts';
import { createLinks } from '../../lib/host/links.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const ip = (...args: readonly string[]) => execFileSync('/usr/sbin/ip', args, { encoding: 'utf8', stdio: 'pipe' });
const links = createLinks();
const device = parseLinkName('klink0');
const bridge = parseLinkName('klinkbr');
const absent = parseLinkName('klinknone');
const address = parseIpv4('198.51.100.7');

/** What `work` throws, which must be a KvmIbError. */
async function failureOf(work: Promise<unknown>): Promise<KvmIbError> {
  const error = await work.then(
    () => undefined,
    (thrown: unknown) => thrown,
  );
  if (!(error instanceof KvmIbError)) throw new Error(`expected a KvmIbError, got ${String(error)}`);
  return error;
}

/** The addresses on `device` as `ip` prints them: ADDRESS/LENGTH LABEL. */
function shown(): readonly string[] {
  const [link] = JSON.parse(ip('-j', '-4', 'address', 'show', 'dev', device)) as [
    { addr_info?: { local: string; prefixlen: number; label: string }[] }?,
  ];
  return (link?.addr_info ?? []).map((info) => `${info.local}/${info.prefixlen} ${info.label}`);
}

/** Runs `work` without the rights of root, as a process would that has no capabilities. */
async function unprivileged<T>(work: () => Promise<T>): Promise<T> {
  process.seteuid?.(65534);
  try {
    return await work();
  } finally {
    process.seteuid?.(0);
  }
}

beforeAll(() => {
  ip('link', 'add', device, 'type', 'veth', 'peer', 'name', 'klink1');
  ip('link', 'add', bridge, 'type', 'bridge');
  ip('link', 'set', 'klink1', 'master', bridge);
  for (const name of [device, 'klink1', bridge]) ip('link', 'set', name, 'up');
});
afterAll(() => {
  ip('link', 'delete', device);
  ip('link', 'delete', bridge);
});

describe('links', () => {
  it('reads a link with its addresses, MTU and master', async () => {
    const link = await links.link(device);
    expect(link).toMatchObject({ name: device, type: 1, mtu: 1500, up: true, master: null });
    expect(link?.broadcast).toEqual(new Uint8Array(6).fill(255));
    const mac = (JSON.parse(ip('-j', 'link', 'show', device)) as [{ address: string }])[0].address;
    expect(Buffer.from(link?.address ?? []).toString('hex')).toBe(mac.replaceAll(':', ''));
    const port = await links.link(parseLinkName('klink1'));
    expect(port?.master).toBe((await links.link(bridge))?.index);
  });

  it('finds no link of an unknown name', async () => {
    expect(await links.link(absent)).toBeUndefined();
  });

  it('sets the MTU', async () => {
    await links.setMtu(device, 4092);
    expect((await links.link(device))?.mtu).toBe(4092);
  });

  it('names link and reason when the kernel refuses an MTU', async () => {
    const refused = await failureOf(links.setMtu(device, 10));
    expect(refused).toMatchObject({ code: 'failed', message: `Cannot set the MTU of ${device} to 10` });
    expect(refused.why).toContain('EINVAL');
    expect(await failureOf(links.setMtu(absent, 1500))).toMatchObject({ code: 'host-lacks' });
  });

  it('serves many callers at once', async () => {
    const found = await Promise.all(Array.from({ length: 50 }, (_, i) => links.link(i % 2 ? device : absent)));
    expect(found.map((link) => link?.name)).toEqual(found.map((_, i) => (i % 2 ? device : undefined)));
  });

  it('reads and sets hairpin mode of a bridge port', async () => {
    const port = parseLinkName('klink1');
    expect(await links.bridgePorts(bridge)).toEqual([{ name: port, hairpin: false }]);
    await links.setHairpin(port, true);
    expect(await links.bridgePorts(bridge)).toEqual([{ name: port, hairpin: true }]);
    await links.setHairpin(port, false);
    expect(await links.bridgePorts(bridge)).toEqual([{ name: port, hairpin: false }]);
  });

  it('refuses ports of what is no bridge, and hairpin mode of what is no port', async () => {
    expect(await failureOf(links.bridgePorts(device))).toMatchObject({ code: 'host-lacks' });
    expect(await failureOf(links.setHairpin(absent, true))).toMatchObject({ code: 'host-lacks' });
    const refused = await failureOf(links.setHairpin(device, true));
    expect(refused.message).toContain(device);
    expect(refused.why).toContain('the kernel says');
  });

  it('tells whether bridged frames pass the IP firewall', async () => {
    // Where the kernel has no br_netfilter neither file is there, and the answer is no.
    writeFileSync(`/sys/class/net/${bridge}/bridge/nf_call_iptables`, '0');
    execFileSync('/usr/sbin/sysctl', ['-q', '-e', '-w', 'net.bridge.bridge-nf-call-iptables=0']);
    expect(await links.bridgeCallsIptables(bridge)).toBe(false);
    writeFileSync(`/sys/class/net/${bridge}/bridge/nf_call_iptables`, '1');
    expect(await links.bridgeCallsIptables(bridge)).toBe(true);
    writeFileSync(`/sys/class/net/${bridge}/bridge/nf_call_iptables`, '0');
    expect(await links.bridgeCallsIptables(absent)).toBe(false);
  });
});

describe('aliases', () => {
  it('are added as /32 with their label, listed, local, and removed', async () => {
    expect(await links.isLocal(address)).toBe(false);
    await links.addAlias(device, address, 'klink0:42-1');
    expect(shown()).toEqual([`${address}/32 klink0:42-1`]);
    expect(await links.addresses()).toContainEqual({ device, address, prefixLength: 32, label: 'klink0:42-1' });
    expect(await links.isLocal(address)).toBe(true);
    await links.deleteAlias(device, address, 'klink0:42-1');
    expect(shown()).toEqual([]);
    expect(await links.isLocal(address)).toBe(false);
  });

  it('take a label of 15 characters and refuse one of 16', async () => {
    await links.addAlias(device, address, 'kib:123456789-1');
    expect(shown()).toEqual([`${address}/32 kib:123456789-1`]);
    await links.deleteAlias(device, address, 'kib:123456789-1');
    expect(await failureOf(links.addAlias(device, address, 'kib:1234567890-1'))).toMatchObject({ code: 'bad-input' });
    expect(shown()).toEqual([]);
  });

  it('conflict when they are there already, whatever the label', async () => {
    await links.addAlias(device, address, 'klink0:1-0');
    const conflict = await failureOf(links.addAlias(device, address, 'klink0:2-0'));
    expect(conflict).toMatchObject({ code: 'conflict', message: `Cannot add ${address}/32 to ${device}` });
    expect(shown()).toEqual([`${address}/32 klink0:1-0`]);
    await links.deleteAlias(device, address, 'klink0:1-0');
  });

  it('are not removed under another label', async () => {
    await links.addAlias(device, address, 'klink0:1-0');
    expect(await failureOf(links.deleteAlias(device, address, 'klink0:2-0'))).toMatchObject({ code: 'host-lacks' });
    expect(await failureOf(links.deleteAlias(device, address, 'klink0:1'))).toMatchObject({ code: 'host-lacks' });
    expect(await failureOf(links.deleteAlias(device, address, device))).toMatchObject({ code: 'host-lacks' });
    expect(shown()).toEqual([`${address}/32 klink0:1-0`]);
    await links.deleteAlias(device, address, 'klink0:1-0');
  });

  it('are told from a wider prefix of the same address and label, which stays', async () => {
    ip('address', 'add', `${address}/24`, 'dev', device, 'label', 'klink0:1-0');
    expect(await failureOf(links.deleteAlias(device, address, 'klink0:1-0'))).toMatchObject({ code: 'host-lacks' });
    expect(shown()).toEqual([`${address}/24 klink0:1-0`]);
    await links.addAlias(device, address, 'klink0:1-0');
    await links.deleteAlias(device, address, 'klink0:1-0');
    expect(shown()).toEqual([`${address}/24 klink0:1-0`]);
    ip('address', 'delete', `${address}/24`, 'dev', device);
  });

  it('leave the others alone when the first of a range goes', async () => {
    const all = [1, 2, 3].map((n) => parseIpv4(`198.51.100.${n}`));
    for (const one of all) await links.addAlias(device, one, 'klink0:9-9');
    await links.deleteAlias(device, parseIpv4('198.51.100.1'), 'klink0:9-9');
    expect(shown()).toEqual(['198.51.100.2/32 klink0:9-9', '198.51.100.3/32 klink0:9-9']);
    for (const one of all.slice(1)) await links.deleteAlias(device, one, 'klink0:9-9');
  });

  it('say which link is missing', async () => {
    const missing = await failureOf(links.addAlias(absent, address, 'x:1'));
    expect(missing).toMatchObject({ code: 'host-lacks', message: `Cannot add ${address}/32 to ${absent}` });
    expect(missing.why).toContain(absent);
    expect(await failureOf(links.deleteAlias(absent, address, 'x:1'))).toMatchObject({ code: 'host-lacks' });
  });

  it('say when the rights are missing, and reading needs none', async () => {
    await unprivileged(async () => {
      expect(await failureOf(links.addAlias(device, address, 'x:1'))).toMatchObject({ code: 'not-permitted' });
      expect(await failureOf(links.deleteAlias(device, address, 'x:1'))).toMatchObject({ code: 'not-permitted' });
      expect(await failureOf(links.setMtu(device, 1500))).toMatchObject({ code: 'not-permitted' });
      expect(await failureOf(links.setHairpin(parseLinkName('klink1'), true))).toMatchObject({ code: 'not-permitted' });
      expect(await links.link(device)).toMatchObject({ name: device });
      expect(await links.isLocal(parseIpv4('127.0.0.1'))).toBe(true);
    });
    expect(shown()).toEqual([]);
  });

  it('are not local where the route is prohibited, unreachable or a blackhole', async () => {
    for (const type of ['prohibit', 'unreachable', 'blackhole']) {
      ip('route', 'add', type, `${address}/32`);
      expect(await links.isLocal(address)).toBe(false);
      ip('route', 'delete', type, `${address}/32`);
    }
  });
});

describe('with 10,000 addresses', () => {
  const many = Array.from({ length: 10_000 }, (_, n) => `10.77.${n >> 8}.${n & 255}`);

  beforeAll(() => {
    writeFileSync(
      '/run/kvm-ib/addresses',
      many.map((a, n) => `address add ${a}/32 dev ${device} label k:${n}\n`).join(''),
    );
    ip('-batch', '/run/kvm-ib/addresses');
  });
  afterAll(() => {
    ip('-4', 'address', 'flush', 'dev', device);
  });

  const ours = (list: Awaited<ReturnType<typeof links.addresses>>) =>
    list.flatMap((a) => (/^k:[0-9]+$/.test(a.label) && a.device === device ? [`${a.address} ${a.label}`] : []));
  const expected = many.map((a, n) => `${a} k:${n}`).sort();

  it('the list is complete', async () => {
    expect(ours(await links.addresses()).sort()).toEqual(expected);
  });

  /** Runs `work` while a child changes addresses. */
  async function amidst(argv: readonly [string, ...string[]], work: () => Promise<void>): Promise<void> {
    const [program, ...args] = argv;
    const child = spawn(program, args, { stdio: 'ignore', detached: true });
    try {
      await work();
    } finally {
      if (child.pid !== undefined) process.kill(-child.pid);
    }
  }

  it('the list is complete when an address comes or goes now and then', async () => {
    const change = `ip address add 203.0.113.9/32 dev ${device}; sleep 0.2; ip address delete 203.0.113.9/32 dev ${device}`;
    await amidst(['/bin/sh', '-c', `while :; do ${change}; sleep 0.2; done`], async () => {
      for (let i = 0; i < 8; i++) expect(ours(await links.addresses()).sort()).toEqual(expected);
    });
  });

  it('there is an error and no short list when addresses change all the time', async () => {
    const change = ['add', 'delete'].map((verb) => `address ${verb} 203.0.113.10/32 dev ${device}\n`).join('');
    writeFileSync('/run/kvm-ib/churn', change.repeat(200_000));
    let interrupted = 0;
    await amidst(['/usr/sbin/ip', '-batch', '/run/kvm-ib/churn'], async () => {
      for (let i = 0; i < 10 && interrupted === 0; i++) {
        const result = await links.addresses().catch((error: unknown) => error);
        if (result instanceof Error) {
          expect(result).toMatchObject({ code: 'failed', message: 'Cannot get a complete list from the kernel' });
          interrupted += 1;
        } else {
          expect(ours(result as Awaited<ReturnType<typeof links.addresses>>).sort()).toEqual(expected);
        }
      }
    });
    expect(interrupted).toBe(1);
    expect(ours(await links.addresses()).sort()).toEqual(expected);
  });
});

it('no socket is left open, whatever failed', async () => {
  const { readdirSync, readlinkSync } = await import('node:fs');
  const sockets = () =>
    readdirSync('/proc/self/fd').filter((fd) => {
      try {
        return readlinkSync(`/proc/self/fd/${fd}`).startsWith('socket:');
      } catch {
        return false;
      }
    }).length;
  const before = sockets();
  for (let i = 0; i < 20; i++) {
    await links.link(device);
    await links.isLocal(address);
    await failureOf(links.addAlias(absent, address, 'x:1'));
    await failureOf(links.setHairpin(device, true));
  }
  expect(sockets()).toBe(before);
});
