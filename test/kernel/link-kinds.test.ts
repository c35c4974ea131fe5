/**
 * Links with dots in their names, as P_Key children have them, beside their parent: command line, engine, driver, table,
 * aliases, announcements and packets. Ends of veth pairs with these names stand for the links; that a child goes down
 * with its parent is tried in test/vm/bond.test.ts, on VLANs.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { EXIT } from '../../lib/core/errors.ts';
import { parsed } from '../support/cli.ts';
import type { Result, Rig } from '../support/driver.ts';
import { createRig, LINK_MTU, testVm, tool } from '../support/driver.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const ip = (...args: readonly string[]) => tool('/usr/sbin/ip', ...args);

/** Network n: guests 192.168.(121+n).2 to .6 on virbr<n>, addresses 192.168.(10n).202 to .206; out<n> is outside, g<n> a guest. */
const LINKS = [
  { n: 1, name: 'ib', device: 'ib0', mtu: LINK_MTU },
  { n: 2, name: 'ib-8001', device: 'ib0.8001', mtu: 2044 },
  { n: 3, name: 'long', device: 'ibp129s0f0.8001', mtu: 1980 },
] as const;
type Which = (typeof LINKS)[number];
const [PARENT, CHILD, LONG] = LINKS;

const guestOf = ({ n }: Which) => `192.168.${121 + n}.2`;
const addressOf = ({ n }: Which) => `192.168.${10 * n}.202`;
const outsideOf = ({ n }: Which) => `192.168.${10 * n}.100`;

const CONFIG = `networks:
${LINKS.map(
  ({ n, name, device }) =>
    `  - { name: ${name}, device: ${device}, bridge: virbr${n}, guests: 192.168.${121 + n}.2-192.168.${121 + n}.6, ` +
    `addresses: 192.168.${10 * n}.202-192.168.${10 * n}.206 }\n`,
).join('')}`;

let rig: Rig;

async function ok(...args: readonly string[]): Promise<Result> {
  const result = await rig.cli(args);
  expect(result, args.join(' ')).toMatchObject({ status: EXIT.done });
  return result;
}

const aliasesOf = ({ device }: Which) =>
  [...ip('-o', '-4', 'address', 'show', 'dev', device).matchAll(/inet (\S+)\/32 scope global (\S+?)\\/g)].map(
    ([, address, label]) => `${address} ${label}`,
  );

function pings(from: string, to: string, wait = '1'): boolean {
  try {
    ip('netns', 'exec', from, 'ping', '-c', '1', '-W', wait, to);
    return true;
  } catch {
    return false;
  }
}

/** Sender addresses of the ARP frames that come out of each link while `work` runs. */
async function announced(work: () => Promise<unknown>): Promise<readonly (readonly [device: string, text: string])[]> {
  const captures = await Promise.all(
    LINKS.map(async ({ n, device }) => {
      const argv = ['netns', 'exec', `out${n}`, 'tcpdump', '-Z', 'root', '-lnqtt', '-i', `fabric${n}`, 'arp'];
      const child = spawn('/usr/sbin/ip', argv, { stdio: ['ignore', 'pipe', 'pipe'] });
      let out = '';
      child.stdout.on('data', (chunk) => {
        out += chunk;
      });
      for (let said = ''; !said.includes('listening on'); ) said += (await once(child.stderr, 'data'))[0];
      const ended = once(child, 'close');
      return async () => {
        child.kill('SIGTERM'); // `ip netns exec` became tcpdump itself
        await ended;
        return [...out.matchAll(/(?:who-has|Reply) (\S+)/g)].map(([, address = '']) => [device, address] as const);
      };
    }),
  );
  await work();
  await new Promise((resolve) => setTimeout(resolve, 300));
  return (await Promise.all(captures.map((stop) => stop()))).flat();
}

beforeAll(async () => {
  rig = await createRig(); // makes ib0, its peer `fabric`, and virbr1
  ip('link', 'delete', 'ib0');
  writeFileSync('/proc/sys/net/ipv4/ip_forward', '1');
  for (const { n, device, mtu } of LINKS) {
    for (const name of [`out${n}`, `g${n}`]) ip('netns', 'add', name);
    const fabric = `fabric${n}`;
    ip('link', 'add', device, 'mtu', `${mtu}`, 'type', 'veth', 'peer', 'name', fabric, 'netns', `out${n}`);
    ip('-n', `out${n}`, 'link', 'set', fabric, 'mtu', `${mtu}`, 'up');
    ip('-n', `out${n}`, 'address', 'add', `192.168.${10 * n}.100/24`, 'dev', fabric);
    ip('-n', `out${n}`, 'route', 'add', 'default', 'via', `192.168.${10 * n}.1`);
    ip('link', 'set', device, 'up');
    ip('address', 'add', `192.168.${10 * n}.1/24`, 'dev', device);
    if (n > 1) {
      ip('link', 'add', `virbr${n}`, 'type', 'bridge');
      ip('link', 'set', `virbr${n}`, 'up');
      ip('address', 'add', `192.168.${121 + n}.1/24`, 'dev', `virbr${n}`);
    }
    ip('link', 'add', `vnet${n}`, 'type', 'veth', 'peer', 'name', 'eth0', 'netns', `g${n}`);
    ip('link', 'set', `vnet${n}`, 'master', `virbr${n}`, 'up');
    ip('-n', `g${n}`, 'link', 'set', 'eth0', 'up');
    ip('-n', `g${n}`, 'address', 'add', `192.168.${121 + n}.2/24`, 'dev', 'eth0');
    ip('-n', `g${n}`, 'route', 'add', 'default', 'via', `192.168.${121 + n}.1`);
  }
  writeFileSync(rig.config, CONFIG);
  await ok('reconcile');
});

afterAll(() => {
  rig?.remove();
  for (const { n, device } of LINKS) {
    ip('link', 'delete', device);
    for (const name of [`out${n}`, `g${n}`]) ip('netns', 'delete', name);
  }
});

describe('links with dots in their names', () => {
  test('fit config check, each with the MTU of its own bridge', async () => {
    const { findings } = parsed<{ findings: readonly { what: string }[] }>(await ok('config', 'check', '--json'));
    // They carry Ethernet here; nothing else is found.
    expect(findings.map(({ what }) => what)).toEqual(LINKS.map(({ device }) => `${device} is not an IPoIB link`));
    for (const { n, mtu } of LINKS) {
      expect(readFileSync(`/sys/class/net/virbr${n}/mtu`, 'latin1').trim()).toBe(`${mtu}`);
    }
  });

  test('stand in the table by their whole names', () => {
    const table = tool('/usr/sbin/nft', 'list', 'table', 'ip', 'kvm_ib');
    for (const { device } of LINKS) expect(table).toContain(`"${device}"`);
  });

  test.each(LINKS)('network-xml of $name has the MTU of $device', async ({ n, name, mtu }) => {
    const { stdout } = await ok('network-xml', '--network', name);
    expect(stdout).toContain(`<name>kvm-ib-${name}</name>`);
    expect(stdout).toContain(`<bridge name='virbr${n}'`);
    expect(stdout).toContain(`<mtu size='${mtu}'/>`);
  });

  test.each([
    { ...PARENT, which: PARENT, label: 'ib0:42-0' },
    { ...CHILD, which: CHILD, label: 'ib0.8001:43-0' },
    { ...LONG, which: LONG, label: 'kib:44-0' },
  ])('$device: the alias has the label $label, and no other link announces it', async ({ which, label }) => {
    const vm = ['--vm', `${41 + which.n}`, '--nic', '0'];
    const frames = await announced(() => ok('add', '--guest', guestOf(which), ...vm));
    expect(aliasesOf(which)).toEqual([`${addressOf(which)} ${label}`]);
    const ours = frames.filter(([, address]) => address === addressOf(which));
    expect(ours.length).toBeGreaterThanOrEqual(2);
    expect(new Set(ours.map(([device]) => device))).toEqual(new Set([which.device]));
  });

  test('agree with files and kernel', async () => {
    expect(parsed(await ok('status', '--json'))).toMatchObject({ ok: true, mappings: 3, drift: [] });
  });

  test('carry packets of their own network, both ways', () => {
    for (const which of LINKS) {
      expect(pings(`out${which.n}`, addressOf(which)), `to ${which.device}`).toBe(true);
      expect(pings(`g${which.n}`, outsideOf(which)), `from ${which.device}`).toBe(true);
    }
  });

  test('carry none of another network, neither from a guest nor from outside', () => {
    for (const from of LINKS) {
      for (const to of LINKS) {
        if (from === to) continue;
        expect(pings(`g${from.n}`, outsideOf(to), '0.3'), `guest of ${from.name} to ${to.name}`).toBe(false);
        expect(pings(`g${from.n}`, addressOf(to), '0.3'), `guest of ${from.name} to ${to.name}`).toBe(false);
        expect(pings(`out${from.n}`, addressOf(to), '0.3'), `outside of ${from.name} to ${to.name}`).toBe(false);
      }
    }
  });

  test('the driver deploys a guest on the child, with the MTU of the child in its domain', async () => {
    const vm = {
      ...testVm(77),
      nics: [{ bridge: 'virbr2', mac: '02:00:c0:a8:7b:03', ip: '192.168.123.3' }],
    };
    const result = await rig.deploy(vm);
    expect(result.status, result.stderr).toBe(0);
    expect(rig.stockRun('deploy').stdin).toContain(`<mtu size='${CHILD.mtu}'/>`);
    expect(aliasesOf(CHILD)).toContain('192.168.20.203 ib0.8001:77-0');
    expect(aliasesOf(PARENT)).toHaveLength(1);
    await ok('remove', '--vm', '77');
    expect(aliasesOf(CHILD)).toEqual([`${addressOf(CHILD)} ib0.8001:43-0`]);
  });

  test('that go down and come up keep alias and pair, and config check says which is down', async () => {
    for (const { device } of [PARENT, CHILD]) ip('link', 'set', device, 'down');
    const check = await rig.cli(['config', 'check']);
    expect(check.status).toBe(EXIT.hostLacks);
    expect(check.stdout).toContain('error:   ib0.8001 is down');
    expect(aliasesOf(CHILD)).toHaveLength(1);
    for (const { device } of [PARENT, CHILD]) ip('link', 'set', device, 'up');
    await ok('status');
    for (const which of [PARENT, CHILD]) expect(pings(`g${which.n}`, outsideOf(which))).toBe(true);
  });

  test('that lose their carrier are named', async () => {
    ip('-n', 'out2', 'link', 'set', 'fabric2', 'down');
    const check = await ok('config', 'check');
    ip('-n', 'out2', 'link', 'set', 'fabric2', 'up');
    ip('-n', 'out2', 'route', 'add', 'default', 'via', '192.168.20.1');
    expect(check.stdout).toMatch(/^warning: ib0\.8001 has no carrier: /m);
    expect(check.stdout).not.toContain('ib0 has no carrier');
  });

  test('that are ports of a bridge are refused by config check, which names the bridge', async () => {
    ip('link', 'add', 'br9', 'type', 'bridge');
    ip('link', 'set', 'ib0.8001', 'master', 'br9');
    const check = await rig.cli(['config', 'check']);
    ip('link', 'set', 'ib0.8001', 'nomaster');
    ip('link', 'delete', 'br9');
    expect(check.status).toBe(EXIT.hostLacks);
    expect(check.stdout).toMatch(/^error: +ib0\.8001 is a port of bridge br9: .*\n +fix: write `device: br9`/m);
  });

  test('are in the remedies for a firewall that drops, in a form that nft takes', async () => {
    const chain = '{ type filter hook forward priority 0; policy drop; }';
    tool('/usr/sbin/nft', `add table ip other; add chain ip other stop ${chain}`);
    const { stdout } = await ok('config', 'check');
    const remedy =
      /fix: let them pass, both ways: (nft insert rule \S+ \S+ \S+ iifname virbr2 [^;]*); (nft [^\n]*)/.exec(stdout);
    for (const command of [remedy?.[1], remedy?.[2]]) {
      expect(command).toContain('ib0.8001');
      tool('/usr/sbin/nft', (command ?? '').replace('nft ', ''));
    }
    expect(pings('g2', outsideOf(CHILD))).toBe(true);
    tool('/usr/sbin/nft', 'delete table ip other');
  });

  test('a manual mapping is labelled by its place in the range', async () => {
    await ok('add', '--guest', '192.168.123.5');
    expect(aliasesOf(CHILD)).toContain('192.168.20.205 kib:s3');
    await ok('remove', '--guest', '192.168.123.5');
  });

  test('are free of us after teardown', async () => {
    await ok('teardown', '--force');
    for (const which of LINKS) expect(aliasesOf(which)).toEqual([]);
    expect(tool('/usr/sbin/nft', 'list', 'tables')).not.toContain('kvm_ib');
  });
});

test('the configuration names what is wrong with a link name', async () => {
  const path = join(rig.folder, 'bad.yaml');
  for (const name of ['ib0.8001.80010000', 'ib0/8001', 'ib0:1', '..']) {
    writeFileSync(path, CONFIG.replace('device: ib0.8001', `device: "${name}"`));
    const result = await rig.cli(['config', 'check', '--config', path]);
    expect(result.status).toBe(EXIT.usage);
    expect(result.stderr).toContain(`networks[1].device: ${name}`);
  }
});
