/**
 * Real bonds, and children of a link as P_Key children are, in a machine with Debian's kernel: the built programs, two
 * links into one fabric, a failover between them. The links carry Ethernet; a bond of links that have the ARP type of
 * IPoIB is looked at as well, though it carries nothing.
 *
 *     kvm-ib: vnet2, vnet3 ─ virbr1    bond0 ─┬─ iba ═ fa ─┐
 *                 │                           └─ ibb ═ fb ─┴─ fab0 192.168.10.100
 *             namespace guest                         namespace fabric
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { PROTOCOL_VERSION, parseAnswer } from '../../lib/driver/protocol.ts';
import { requireOwnNetns } from '../support/netns.ts';
import type { Machine } from '../support/vm/machine.ts';
import { startMachine } from '../support/vm/machine.ts';
import type { ToolResult } from '../support/vm/process.ts';

requireOwnNetns();

const ADDRESS = '192.168.10.202';
const OUTSIDE = '192.168.10.100';
const MAC = { iba: '02:00:00:00:00:0a', ibb: '02:00:00:00:00:0b' } as const;
const MTU = 2044;

let folder: string;
let machine: Machine;

const kvmIb = (args: string): Promise<ToolResult> => machine.try(`/usr/lib/kvm-ib/kvm-ib.mjs ${args}`);

async function ok(args: string): Promise<string> {
  const result = await kvmIb(args);
  expect(result.status, `kvm-ib ${args}: ${result.stderr}${result.stdout}`).toBe(0);
  return result.stdout;
}

function configure(networks: readonly { readonly name: string; readonly device: string; readonly n: number }[]) {
  const lines = networks.map(
    ({ name, device, n }) =>
      `  - { name: ${name}, device: ${device}, bridge: virbr${n}, guests: 192.168.${121 + n}.2-192.168.${121 + n}.6, ` +
      `addresses: 192.168.${n * 10}.202-192.168.${n * 10}.206 }`,
  );
  return machine.run(`mkdir -p /etc/kvm-ib && cat > /etc/kvm-ib/kvm-ib.yaml <<'YAML'
networks:
${lines.join('\n')}
YAML`);
}

interface Frame {
  /** The fabric's end of the link that it came by. */
  readonly by: string;
  readonly from: string;
  readonly operation: string;
  readonly text: string;
}

/** ARP frames about the address that come in at these links of the fabric while the script runs. */
async function announced(address: string, links: readonly string[], script: string): Promise<readonly Frame[]> {
  const captures = links.map(
    (
      link,
    ) => `ip netns exec fabric tcpdump -Z root -lne -Q in -i ${link} arp > /tmp/arp.${link} 2> /tmp/listening.${link} &
pids="$pids $!"
until grep -q listening /tmp/listening.${link}; do
  kill -0 $! || { cat /tmp/listening.${link} >&2; exit 1; }
  sleep 0.1
done`,
  );
  const shown = await machine.run(`pids=
${captures.join('\n')}
{ ${script}; } > /tmp/said 2>&1
status=$?
sleep 1
kill $pids
wait
${links.map((link) => `sed 's/^/${link} /' /tmp/arp.${link}`).join('\n')}
[ "$status" = 0 ] || { cat /tmp/said >&2; exit "$status"; }`);
  return shown
    .split('\n')
    .filter((line) => new RegExp(`(?:who-has|Reply) ${address.replaceAll('.', '\\.')} `).test(line))
    .filter((line) => !line.includes(`tell ${OUTSIDE}`))
    .map((line) => ({
      by: line.split(' ')[0] ?? '',
      from: / ([0-9a-f:]{17}) > /.exec(line)?.[1] ?? '',
      operation: line.includes('Reply') ? 'reply' : 'request',
      text: line,
    }));
}

const pings = (from: string, to: string) =>
  machine.run(`${from === 'here' ? '' : `ip netns exec ${from} `}busybox ping -c 2 -W 5 ${to}`);
const activeSlave = async () => (await machine.run('cat /sys/class/net/bond0/bonding/active_slave')).trim();
const addresses = (device: string) => machine.run(`ip -o -4 address show dev ${device}`);

/** Everything about the bond that must be as before once kvm-ib is gone. */
const bondState = () =>
  machine.run(
    // The state of a link follows its carrier a little later.
    'for link in bond0 iba ibb; do until [ "$(cat /sys/class/net/$link/operstate)" = up ]; do sleep 0.1; done; ip -d -o link show $link; ip -o -4 address show dev $link; done; ip route; nft list ruleset',
  );

beforeAll(async () => {
  folder = mkdtempSync('/run/kvm-ib/machine-');
  machine = await startMachine(folder);
  await machine.run(`set -e
echo 1 > /proc/sys/net/ipv4/ip_forward
for which in all default; do echo 1 > /proc/sys/net/ipv6/conf/$which/disable_ipv6; done
ip netns add fabric
ip netns add guest
ip -n fabric link add fab0 mtu 65520 type bridge
for pair in iba:fa:${MAC.iba} ibb:fb:${MAC.ibb}; do
  IFS=: read -r link peer mac <<< "$pair"
  ip link add $link address $mac mtu 65520 type veth peer name $peer mtu 65520 netns fabric
  ip -n fabric link set $peer master fab0 up
done
ip -n fabric address add ${OUTSIDE}/24 dev fab0
ip -n fabric link set fab0 up
for n in 1 2; do
  ip link add virbr$n type bridge
  ip link set virbr$n up
  ip address add 192.168.$((121 + n)).1/24 dev virbr$n
done
for n in 2 3; do
  ip link add vnet$n type veth peer name eth$n netns guest
  ip link set vnet$n master virbr1 up
  ip -n guest address add 192.168.122.$n/24 dev eth$n
  ip -n guest link set eth$n up
done
ip -n guest route add default via 192.168.122.1`);
});

afterEach((context) => {
  if (context.task.result?.state === 'fail' && machine !== undefined) console.error(machine.console());
});

afterAll(async () => {
  await machine?.stop();
  if (folder !== undefined) rmSync(folder, { recursive: true, force: true });
});

describe('a bond in mode active-backup whose hardware address is that of its active slave', () => {
  let before: string;

  beforeAll(async () => {
    await machine.run(`set -e
ip link delete bond0 2>/dev/null || true
ip link add bond0 type bond mode active-backup miimon 50 fail_over_mac active
for link in iba ibb; do ip link set $link master bond0; done
ip link set bond0 mtu ${MTU} up
ip address add 192.168.10.1/24 dev bond0
until [ "$(cat /sys/class/net/bond0/carrier)" = 1 ]; do sleep 0.1; done`);
    await configure([{ name: 'ib', device: 'bond0', n: 1 }]);
    before = await bondState();
  });

  test('is a device like any other for config check and reconcile', async () => {
    expect(before).toContain(`link/ether ${MAC.iba}`);
    const check = await ok('config check');
    expect(check).toContain('bond0 is not an IPoIB link'); // these carry Ethernet
    expect(check).not.toContain('carrier');
    await ok('reconcile');
    expect(await machine.run('nft list table ip kvm_ib')).toContain('"bond0"');
    expect((await machine.run('cat /sys/class/net/virbr1/mtu')).trim()).toBe(String(MTU));
  });

  test('gets the alias with its label, and the active slave alone announces it', async () => {
    const frames = await announced(
      ADDRESS,
      ['fa', 'fb'],
      '/usr/lib/kvm-ib/kvm-ib.mjs add --guest 192.168.122.2 --vm 42 --nic 0',
    );
    expect(await addresses('bond0')).toContain(`inet ${ADDRESS}/32 scope global bond0:42-0`);
    expect(frames.map(({ operation }) => operation)).toEqual(expect.arrayContaining(['request', 'reply']));
    expect(new Set(frames.map(({ by, from }) => `${by} ${from}`))).toEqual(new Set([`fa ${MAC.iba}`]));
  });

  test('carries translated packets both ways', async () => {
    expect(await pings('fabric', ADDRESS)).toContain(' 0% packet loss');
    expect(await pings('guest', OUTSIDE)).toContain(' 0% packet loss');
    const flows = await machine.run('conntrack -L -p icmp 2>/dev/null');
    expect(flows).toMatch(/src=192\.168\.10\.100 dst=192\.168\.10\.202 .*src=192\.168\.122\.2 dst=192\.168\.10\.100/);
    expect(flows).toMatch(/src=192\.168\.122\.2 dst=192\.168\.10\.100 .*src=192\.168\.10\.100 dst=192\.168\.10\.202/);
  });

  test('the engine of the driver, with its two capabilities, maps a VM on it', async () => {
    const nic = { nic: 0, guest: '192.168.122.3', address: null, mac: '02:00:c0:a8:7a:03', bridge: 'virbr1' };
    const none = { unmapped: [], keep: [], attaching: [], detachedAliases: [] };
    const request = { version: PROTOCOL_VERSION, verb: 'sync', vm: 43, action: 'deploy', mode: 'start', ...none };
    const answers = await machine.run(`start=$(cut -d ' ' -f 22 /proc/$$/stat)
echo '${JSON.stringify({ ...request, nics: [nic] }).slice(0, -1)},"holder":{"pid":'$$',"start":'$start'}}
{"verb":"commit"}' | SUDO_UID=0 /usr/lib/kvm-ib/kvm-ib-engine`);
    expect(answers.trim().split('\n').map(parseAnswer)).toMatchObject([{ ok: true }, { ok: true }]);
    expect(await addresses('bond0')).toContain('inet 192.168.10.203/32 scope global bond0:43-0');
    await ok('remove --vm 43');
    expect(await addresses('bond0')).not.toContain('192.168.10.203');
  });

  test('a failover keeps alias, pair and an open connection; the bond itself announces the alias', async () => {
    expect(await activeSlave()).toBe('iba');
    await machine.run(`sleep 30 | ip netns exec guest busybox nc -l -p 7000 > /tmp/received & # it would end with its input
sleep 0.5
(for n in $(seq 1 30); do echo $n; sleep 0.2; done) | ip netns exec fabric busybox nc ${ADDRESS} 7000 &
sleep 1`);
    // The kernel holds the announcement back while the slaves' link events are pending: that can take seconds.
    const frames = await announced(
      ADDRESS,
      ['fa', 'fb'],
      `ip link set iba down
for n in $(seq 1 100); do grep -q 'who-has ${ADDRESS} ' /tmp/arp.fb && break; sleep 0.1; done`,
    );
    expect(await activeSlave()).toBe('ibb');
    expect(await machine.run('cat /sys/class/net/bond0/address')).toBe(`${MAC.ibb}\n`);
    // The bonding driver tells of all addresses of the bond, aliases too (num_grat_arp, 1 by default): requests only.
    expect(frames.length).toBeGreaterThan(0);
    expect(new Set(frames.map(({ by, from }) => `${by} ${from}`))).toEqual(new Set([`fb ${MAC.ibb}`]));
    const status = JSON.parse(await ok('status --json')) as { drift: unknown };
    expect(status.drift).toEqual([]);
    expect(await addresses('bond0')).toContain(`inet ${ADDRESS}/32 scope global bond0:42-0`);
    const received = await machine.run(
      'for n in $(seq 1 100); do grep -qx 30 /tmp/received && break; sleep 0.2; done; cat /tmp/received',
    );
    expect(received.trim().split('\n')).toEqual(Array.from({ length: 30 }, (_, n) => String(n + 1)));
    expect(await pings('guest', OUTSIDE)).toContain(' 0% packet loss');
  });

  test('reconcile after the failover changes nothing, and announces the alias again, by the active slave', async () => {
    const frames = await announced(
      ADDRESS,
      ['fa', 'fb'],
      '/usr/lib/kvm-ib/kvm-ib.mjs reconcile --json > /tmp/reconcile',
    );
    expect(JSON.parse(await machine.run('cat /tmp/reconcile'))).toMatchObject({
      changes: [],
      errors: [],
      announced: [{ device: 'bond0', addresses: expect.arrayContaining([ADDRESS]) }],
    });
    // The bonding driver sends requests by itself; replies are ours alone.
    expect(frames.map(({ operation }) => operation)).toContain('reply');
    expect(frames.filter(({ by, from }) => by !== 'fb' || from !== MAC.ibb)).toEqual([]);
  });

  test('without an active slave nothing drifts, config check names it, and the alias outlives it', async () => {
    await machine.run('ip link set ibb down; sleep 0.5');
    expect(await ok('config check')).toMatch(/warning: bond0 has no carrier: none of its slaves is active\n/);
    expect(await ok('status')).toContain('OK: 1 mapping');
    await machine.run(`ip link set iba up; ip link set ibb up
until [ "$(cat /sys/class/net/bond0/carrier)" = 1 ]; do sleep 0.1; done`);
    expect(await pings('fabric', ADDRESS)).toContain(' 0% packet loss');
    expect(await addresses('bond0')).toContain(`inet ${ADDRESS}/32 scope global bond0:42-0`);
  });

  test('a slave is no device for a network, and config check says which is', async () => {
    await configure([{ name: 'ib', device: 'ibb', n: 1 }]);
    const check = await kvmIb('config check');
    await configure([{ name: 'ib', device: 'bond0', n: 1 }]);
    expect(check.status).toBe(6);
    expect(check.stdout).toMatch(/^error: +ibb is a slave of bond bond0: .*\n +fix: write `device: bond0`/m);
  });

  test('teardown leaves the bond as it was', async () => {
    await ok('teardown --force');
    await machine.run(
      'echo iba > /sys/class/net/bond0/bonding/active_slave; nft delete table ip kvm_ib 2>/dev/null || true',
    );
    const counters = (text: string) => text.replace(/link_failure_count \d+/g, '');
    expect(counters(await bondState())).toBe(counters(before));
    await machine.run('ip link delete bond0');
  });
});

describe('a bond of links with the ARP type of IPoIB', () => {
  test('has that type itself, takes the hardware address of the active slave, and is an IPoIB link for config check', async () => {
    // tun devices take the type (TUNSETLINK); persistent, so that the program may end.
    await machine.run(`set -e
for link in tia tib; do perl -e '
  open(my $tun, "+<", "/dev/net/tun") or die "open: $!";
  ioctl($tun, 0x400454ca, pack("a16 S x22", $ARGV[0], 0x1001)) or die "TUNSETIFF: $!";
  ioctl($tun, 0x400454cd, 32 + 0) or die "TUNSETLINK: $!";
  ioctl($tun, 0x400454cb, 1 + 0) or die "TUNSETPERSIST: $!"' $link; done
ip link add bond1 type bond mode active-backup miimon 50
for link in tia tib; do ip link set $link master bond1; done
ip link set bond1 up`);
    expect(await machine.run('cat /sys/class/net/bond1/type /sys/class/net/bond1/bonding/fail_over_mac')).toBe(
      '32\nactive 1\n',
    );
    await configure([{ name: 'ib', device: 'bond1', n: 1 }]);
    const check = await ok('config check');
    expect(check).not.toContain('is not an IPoIB link');
    expect(check).toContain('bond1 has no carrier: none of its slaves is active');
    await machine.run('ip link delete bond1; ip link delete tia; ip link delete tib');
  });
});

describe('a child of a link that goes down with its parent, as P_Key children do', () => {
  const CHILD_ADDRESS = '192.168.20.202';
  const flags = async (link: string) =>
    (await machine.run(`ip -o link show dev ${link}`)).replace(/^.*<(.*)>.*\n/s, '$1');

  beforeAll(async () => {
    // VLAN 1 of the link stands for partition 0x8001.
    await machine.run(`set -e
ip link set iba down
ip link set ibb down # a second link on the fabric would answer ARP for the addresses of the first
ip link set iba name ib0
ip link set ib0 up
ip address add 192.168.10.1/24 dev ib0
ip link add link ib0 name ib0.8001 mtu 2000 type vlan id 1
ip link set ib0.8001 up
ip address add 192.168.20.1/24 dev ib0.8001
ip -n fabric link add link fab0 name fab0.8001 type vlan id 1
ip -n fabric link set fab0.8001 up
ip -n fabric address add 192.168.20.100/24 dev fab0.8001
ip netns add guest2
ip link add vnet4 type veth peer name eth4 netns guest2
ip link set vnet4 master virbr2 up
ip -n guest2 address add 192.168.123.2/24 dev eth4
ip -n guest2 link set eth4 up
ip -n guest2 route add default via 192.168.123.1`);
    await configure([
      { name: 'ib', device: 'ib0', n: 1 },
      { name: 'ib-8001', device: 'ib0.8001', n: 2 },
    ]);
    await ok('reconcile');
    await ok('add --guest 192.168.122.2 --vm 42 --nic 0');
  });

  test('is announced on, within its own partition, and leads its own bridge to its MTU', async () => {
    const frames = await announced(
      CHILD_ADDRESS,
      ['fab0', 'fab0.8001'],
      '/usr/lib/kvm-ib/kvm-ib.mjs add --guest 192.168.123.2 --vm 43 --nic 0',
    );
    const outside = frames.filter(({ by, text }) => by === 'fab0' && !text.includes('vlan 1,'));
    expect(outside).toEqual([]);
    expect(frames.filter(({ by }) => by === 'fab0.8001').length).toBeGreaterThanOrEqual(2);
    expect(await addresses('ib0.8001')).toContain(`inet ${CHILD_ADDRESS}/32 scope global ib0.8001:43-0`);
    expect(await machine.run('cat /sys/class/net/virbr2/mtu')).toBe('2000\n');
  });

  test('carries packets of its network only', async () => {
    expect(await pings('fabric', CHILD_ADDRESS)).toContain(' 0% packet loss');
    expect(await pings('guest2', '192.168.20.100')).toContain(' 0% packet loss');
    const across = await machine.try(`ip netns exec guest2 busybox ping -c 2 -W 1 ${OUTSIDE}`);
    expect(across.stdout).toContain('100% packet loss');
  });

  test('keeps alias and pair while the parent is down, and works again when that is up', async () => {
    await machine.run('ip link set ib0 down');
    expect(await flags('ib0.8001')).not.toMatch(/(^|,)UP(,|$)/);
    const check = await kvmIb('config check');
    expect(check.status).toBe(6);
    expect(check.stdout).toContain('ib0.8001 is down');
    expect(await ok('status')).toContain('OK: 2 mappings');
    await machine.run('ip link set ib0 up; sleep 0.5');
    expect(await addresses('ib0.8001')).toContain(`inet ${CHILD_ADDRESS}/32 scope global ib0.8001:43-0`);
    expect(await pings('fabric', CHILD_ADDRESS)).toContain(' 0% packet loss');
    expect(await pings('fabric', ADDRESS)).toContain(' 0% packet loss');
  });
});
