/** Before an IB address is taken, the fabric is asked whether another host has it: by the real command, over a real link. */
import { closeSync, constants, openSync, readFileSync, readSync, writeFileSync, writeSync } from 'node:fs';
import koffi from 'koffi';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { parseIpv4, parseLinkName } from '../../lib/core/address.ts';
import { EXIT } from '../../lib/core/errors.ts';
import { createLinks } from '../../lib/host/links.ts';
import { createProber } from '../../lib/host/prober.ts';
import { parsed } from '../support/cli.ts';
import type { Result, Rig } from '../support/driver.ts';
import { CONFIG, createRig, domainOf, ONE_LINE, testVm, tool } from '../support/driver.ts';
import { arpPacket, captureArp, inOther, makeOther, OTHER_MAC, otherIp, sendArp } from '../support/fabric.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const IP = '/usr/sbin/ip';
const ADDRESS = '192.168.10.202';
const THIRD_MAC = '02:00:00:00:00:cc';

let rig: Rig;
beforeAll(async () => {
  rig = await createRig();
  makeOther();
});
beforeEach(() => {
  tool(IP, 'link', 'set', 'ib0', 'up');
  rig.reset();
});
afterEach(() => otherIp('address', 'flush', 'dev', 'fabric'));
afterAll(() => rig.remove());

/** The whole window, as an operator has it. */
const real = { env: { KVM_IB_PROBE_MS: '300' } };
const add = (...more: readonly string[]): Promise<Result> =>
  rig.cli(['add', '--guest', '192.168.122.2', ...more], real);
interface Failed {
  readonly error: { readonly code: string; readonly exit: number; readonly why: string; readonly fix: string };
}

describe('another host that has the address', () => {
  beforeEach(() => otherIp('address', 'add', `${ADDRESS}/24`, 'dev', 'fabric'));

  it('answers, and add is refused with its hardware address; nothing is changed', async () => {
    const before = rig.snapshot();
    const result = await add('--json');
    expect(result).toMatchObject({ status: EXIT.conflict, stderr: '' });
    const { error } = parsed<Failed>(result);
    expect(error).toMatchObject({ code: 'conflict', message: `Cannot take the IB address ${ADDRESS}` });
    expect(error.why).toContain(OTHER_MAC);
    expect(error.fix).toContain('kvm-ib reconcile');
    expect(error.fix).toContain('probe: false');
    expect(rig.snapshot()).toEqual(before);
  });

  it('is found by --dry-run as well', async () => {
    const result = await add('--dry-run');
    expect(result.status).toBe(EXIT.conflict);
    expect(result.stderr).toContain(OTHER_MAC);
  });

  it('fails a deploy with one line for OpenNebula, and the stock script does not run', async () => {
    const before = rig.snapshot();
    const result = await rig.call('deploy', [rig.place(testVm(42)), 'host'], 42, {
      ...real,
      stdin: domainOf(testVm(42)),
    });
    expect(result.status).toBe(EXIT.conflict);
    expect(result.stderr).toMatch(ONE_LINE);
    expect(result.stderr).toContain(OTHER_MAC);
    expect(rig.runs()).toEqual([]);
    expect(rig.snapshot()).toEqual(before);
  });

  it('is not asked where the network says `probe: false`', async () => {
    writeFileSync(rig.config, CONFIG.replace('bridge: virbr1', 'bridge: virbr1\n    probe: false'));
    const capture = await captureArp();
    const result = await add('--json');
    expect(result.status).toBe(EXIT.done);
    expect(parsed<{ timings: object }>(result).timings).toMatchObject({ probe: 0 });
    expect((await capture.stop()).filter(({ what }) => what.startsWith('probe'))).toEqual([]);
  });

  it('keeps reconcile from adding that alias, and only that; it is added once the other has gone', async () => {
    const config = `${CONFIG}static:\n  - { guest: 192.168.122.2, address: ${ADDRESS} }\n  - { guest: 192.168.122.3, address: 192.168.10.203 }\n`;
    writeFileSync(rig.config, config);
    const result = await rig.cli(['reconcile', '--json'], real);
    expect(result.status).toBe(EXIT.conflict);
    const { errors, plan } = parsed<{ errors: readonly { why: string }[]; plan: readonly string[] }>(result);
    expect(errors).toHaveLength(1);
    expect(errors[0]?.why).toContain(OTHER_MAC);
    expect(plan.filter((line) => line.startsWith('+ alias'))).toEqual([
      '+ alias     192.168.10.203/32 on ib0 (kib:s1)',
    ]);
    expect(tool(IP, '-o', '-4', 'address', 'show', 'dev', 'ib0')).not.toContain(ADDRESS);
    // It stays wanted, and status shows what is missing.
    expect(Object.keys(rig.phases())).toContain('static-192.168.122.2');
    const status = await rig.cli(['status', '--json']);
    expect(status.status).toBe(EXIT.drift);
    const drift = parsed<{ drift: readonly { address: string; part: string }[] }>(status).drift;
    expect(drift).toContainEqual(expect.objectContaining({ address: ADDRESS, part: 'alias' }));

    otherIp('address', 'flush', 'dev', 'fabric');
    expect((await rig.cli(['reconcile'])).status).toBe(EXIT.done);
    expect((await rig.cli(['status'])).status).toBe(EXIT.done);
  });

  it('may be excepted by its hardware address', async () => {
    const links = createLinks();
    const item = { device: parseLinkName('ib0'), address: parseIpv4(ADDRESS) };
    const prober = createProber(links, 60);
    const other = { hardware: OTHER_MAC, how: 'has' };
    expect(await prober.probe([item])).toEqual([{ ...item, other }]);
    expect(await prober.probe([item], { except: [OTHER_MAC] })).toEqual([item]);
    expect(await prober.probe([item], { except: [THIRD_MAC] })).toEqual([{ ...item, other }]);
  });
});

describe('what else is on the fabric', () => {
  const slow = { env: { KVM_IB_PROBE_MS: '1800' } };
  const whileProbing = async (...packets: readonly string[]): Promise<Result> => {
    const capture = await captureArp();
    const adding = rig.cli(['add', '--guest', '192.168.122.2', '--json'], slow);
    while (!capture.frames().some(({ what }) => what === `probe ${ADDRESS}`)) {
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    await sendArp(packets);
    await capture.stop();
    return adding;
  };

  it.each([
    ['a gratuitous request', arpPacket(1, THIRD_MAC, ADDRESS, ADDRESS), 'answers for it'],
    ['a gratuitous reply', arpPacket(2, THIRD_MAC, ADDRESS, ADDRESS), 'answers for it'],
    ['a request for somebody else', arpPacket(1, THIRD_MAC, ADDRESS, '192.168.10.77'), 'answers for it'],
    ['a probe for the same address', arpPacket(1, THIRD_MAC, '0.0.0.0', ADDRESS), 'probes for it'],
  ])('%s in the window is a conflict', async (_, packet, how) => {
    const before = rig.snapshot();
    const result = await whileProbing(packet);
    expect(result.status).toBe(EXIT.conflict);
    expect(parsed<Failed>(result).error.why).toContain(`${THIRD_MAC} ${how}`);
    expect(rig.snapshot()).toEqual(before);
  });

  it('our own frames coming back, ARP of others and broken packets are none', async () => {
    const [own = ''] = /(?:[0-9a-f]{2}:){5}[0-9a-f]{2}/.exec(tool(IP, '-o', 'link', 'show', 'ib0')) ?? [];
    const result = await whileProbing(
      arpPacket(1, own, '0.0.0.0', ADDRESS),
      arpPacket(2, own, ADDRESS, ADDRESS),
      arpPacket(1, THIRD_MAC, '192.168.10.77', '192.168.10.78'),
      arpPacket(1, THIRD_MAC, '0.0.0.0', '192.168.10.78'),
      arpPacket(1, THIRD_MAC, '192.168.10.77', ADDRESS),
      '00',
      '0001',
      arpPacket(2, THIRD_MAC, ADDRESS, ADDRESS).slice(0, 40),
      arpPacket(2, THIRD_MAC, ADDRESS, ADDRESS).replace('00010800', '00010801'),
      arpPacket(2, THIRD_MAC, ADDRESS, ADDRESS).replace('0604', 'ff04'),
      'ff'.repeat(1400),
    );
    expect(result.status, result.stdout).toBe(EXIT.done);
  });
});

describe('with nobody there', () => {
  it('three probes go out, the address is taken, and the time is told apart', async () => {
    const capture = await captureArp();
    const result = await add('--json');
    const frames = (await capture.stop()).map(({ what }) => what);
    expect(result.status).toBe(EXIT.done);
    expect(frames.slice(0, 5)).toEqual([
      ...Array.from({ length: 3 }, () => `probe ${ADDRESS}`),
      `request ${ADDRESS}`,
      `reply ${ADDRESS}`,
    ]);
    const { timings } = parsed<{ timings: { probe: number; total: number } }>(result);
    expect(timings.probe).toBeGreaterThanOrEqual(300);
    expect(timings.total).toBeGreaterThanOrEqual(timings.probe);
    console.info(`add: ${JSON.stringify(timings)}`);
  });

  it('the text of add has one line about it', async () => {
    const lines = (await add()).stdout.split('\n');
    expect(lines.at(-2)).toMatch(/^Took \d+ ms, and 3\d\d ms for the probe\.$/);
  });

  it('what is there already is not asked for', async () => {
    await rig.cli(['add', '--guest', '192.168.122.2']);
    // The link was set up for this test: whether it missed something meanwhile is asked once.
    await rig.cli(['reconcile']);
    const capture = await captureArp();
    const again = await add('--json');
    expect((await rig.cli(['reconcile'], real)).status).toBe(EXIT.done);
    expect((await rig.cli(['remove', '--guest', '192.168.122.2', '--json'], real)).status).toBe(EXIT.done);
    expect((await capture.stop()).filter(({ what }) => what.startsWith('probe'))).toEqual([]);
    expect(parsed<{ timings: object }>(again).timings).toMatchObject({ probe: 0 });
  });

  it('fifteen at once wait side by side', async () => {
    const guests = Array.from({ length: 15 }, (_, n) => `192.168.122.${n + 2}`);
    writeFileSync(
      rig.config,
      CONFIG.replace('122.6', '122.40').replace('10.202-192.168.10.206', '10.102-192.168.10.140'),
    );
    expect((await rig.cli(['reconcile'])).status).toBe(EXIT.done);
    const window = { env: { KVM_IB_PROBE_MS: '1000' } };
    const began = performance.now();
    const results = await Promise.all(guests.map((guest) => rig.cli(['add', '--guest', guest], window)));
    const took = performance.now() - began;
    expect(results.filter(({ status }) => status !== EXIT.done)).toEqual([]);
    console.info(`15 adds at once with a window of 1000 ms: ${Math.round(took)} ms`);
    expect(took).toBeLessThan(8_000);
  });
});

describe('a link that cannot be asked', () => {
  it('being down is one warning, and the address is taken', async () => {
    tool(IP, 'link', 'set', 'ib0', 'down');
    const result = await add();
    expect(result.status).toBe(EXIT.done);
    expect(result.stderr.trim().split('\n')).toHaveLength(1);
    expect(result.stderr).toContain('was not announced on ib0');
    expect(result.stdout).toMatch(/^Took \d+ ms, without a probe\.$|for the probe/m);
  });

  it('is named by the prober, each for its own reason, and a missing right too', async () => {
    const prober = createProber(createLinks(), 3);
    const address = parseIpv4(ADDRESS);
    const ask = (device: string) => prober.probe([{ device: parseLinkName(device), address }]);
    expect(await ask('absent0')).toMatchObject([{ error: 'there is no link absent0' }]);
    expect(await ask('lo')).toMatchObject([{ error: 'lo is of type 772, neither Ethernet (1) nor InfiniBand (32)' }]);
    process.seteuid?.(65534);
    try {
      expect((await ask('ib0'))[0]?.error).toContain('EPERM');
    } finally {
      process.seteuid?.(0);
    }
    tool(IP, 'link', 'set', 'ib0', 'down');
    expect(await ask('ib0')).toMatchObject([{ error: 'ib0 is down' }]);
  });

  it('a thousand addresses are asked for in one window, by bursts', async () => {
    inOther('sysctl', '-qw', 'net.ipv4.conf.all.arp_ignore=0');
    const items = Array.from({ length: 1000 }, (_, n) => ({
      device: parseLinkName('ib0'),
      address: parseIpv4(`10.1.${n >> 8}.${n & 255}`),
    }));
    otherIp('address', 'add', '10.1.3.231/32', 'dev', 'fabric');
    const began = performance.now();
    const results = await createProber(createLinks()).probe(items);
    const took = performance.now() - began;
    expect(results.filter(({ other }) => other !== undefined)).toEqual([
      { ...items[999], other: { hardware: OTHER_MAC, how: 'has' } },
    ]);
    console.info(`1000 probed in ${Math.round(took)} ms`);
    expect(took).toBeLessThan(2_000);
  });
});

describe('on a link of type InfiniBand', () => {
  // A tun device takes the type; its addresses stay empty, so they come from a fixture. With packet information (no
  // IFF_NO_PI) what is written to it arrives as the protocol that stands in front.
  const device = parseLinkName('fib1');
  const address = parseIpv4(ADDRESS);
  const fixture = JSON.parse(readFileSync(new URL('../fixtures/link/ipoib.json', import.meta.url), 'utf8')) as {
    address: string;
    broadcast: string;
  };
  const bytes = (text: string) => new Uint8Array(Buffer.from(text.replaceAll(':', ''), 'hex'));
  const own = fixture.address.replaceAll(':', '');
  const other = '80000209fe80000000000000e41d2d03005fffff';
  let tun: number;

  beforeAll(() => {
    const self = koffi.load(null);
    const ioctlPointer = self.func('ioctl', 'int', ['int', 'unsigned long', 'uint8_t *']);
    const ioctlNumber = self.func('ioctl', 'int', ['int', 'unsigned long', 'unsigned long']);
    tun = openSync('/dev/net/tun', constants.O_RDWR | constants.O_NONBLOCK);
    const request = Buffer.alloc(40);
    request.write(device);
    request.writeUInt16LE(0x0001, 16);
    expect(ioctlPointer(tun, 0x400454ca, request)).toBe(0);
    expect(ioctlNumber(tun, 0x400454cd, 32)).toBe(0);
    tool(IP, 'link', 'set', device, 'up');
  });
  afterAll(() => closeSync(tun));

  const links = createLinks();
  const prober = createProber(
    {
      link: async (name) => {
        const link = await links.link(name);
        return link && { ...link, address: bytes(fixture.address), broadcast: bytes(fixture.broadcast) };
      },
    },
    90,
  );
  const head = `0020${'0800'}${'14'}${'04'}`;

  function sent(): readonly string[] {
    const frames: string[] = [];
    const buffer = Buffer.alloc(4096);
    for (;;) {
      try {
        frames.push(buffer.subarray(0, readSync(tun, buffer)).toString('hex'));
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code === 'EAGAIN') return frames;
        throw error;
      }
    }
  }

  it('the probe has addresses of 20 bytes, without a sender, and its answer is understood', async () => {
    sent();
    const probing = prober.probe([{ device, address }]);
    setTimeout(() => {
      const reply = `${head}0002${other}c0a80aca${own}00000000`;
      writeSync(tun, Buffer.from(`00000806${reply}`, 'hex'));
    }, 45);
    const hardware = '80:00:02:09:fe:80:00:00:00:00:00:00:e4:1d:2d:03:00:5f:ff:ff';
    expect(await probing).toEqual([{ device, address, other: { hardware, how: 'has' } }]);
    expect(sent()[0]).toBe(`00000806${head}0001${own}00000000${'00'.repeat(20)}c0a80aca`);
  });

  it('its own address with other flags is its own', async () => {
    const probing = prober.probe([{ device, address }]);
    setTimeout(() => {
      const reply = `${head}0002${`00${own.slice(2)}`}c0a80aca${own}00000000`;
      writeSync(tun, Buffer.from(`00000806${reply}`, 'hex'));
    }, 20);
    expect(await probing).toEqual([{ device, address }]);
  });
});
