/**
 * `kvm-ib doctor` on a machine that is front-end and host in one, here a copy-on-write layer over this machine's /etc,
 * /usr, /var and /run in a mount namespace that is thrown away. onehost and onevnet are stand-ins that print a file.
 */
import { chmodSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { Diagnosis } from '../../lib/ops/doctor.ts';
import { CONFIG, run } from '../support/driver.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const REPOSITORY = resolve(import.meta.dirname, '../..');
const BUNDLE = join(REPOSITORY, 'dist/kvm-ib.mjs');
const ENV = { PATH: `/usr/sbin:/usr/bin:/sbin:/bin:${dirname(process.execPath)}` };

const ONED = `VM_MAD = [ NAME = "kvm", ARGUMENTS = "-t 15 -r 0 kvm -p", TYPE = "kvm" ]
VM_MAD = [ NAME = "lxc", ARGUMENTS = "-t 15 -r 0 lxc", TYPE = "xml" ]
`;
const host = (id: number, name: string, driver: string, cluster: number, vms = 0, more = ''): string =>
  `<HOST><ID>${id}</ID><NAME>${name}</NAME><STATE>2</STATE><IM_MAD><![CDATA[kvm]]></IM_MAD><VM_MAD><![CDATA[${driver}]]></VM_MAD>` +
  `<CLUSTER_ID>${cluster}</CLUSTER_ID><CLUSTER>c${cluster}</CLUSTER><HOST_SHARE><RUNNING_VMS>${vms}</RUNNING_VMS></HOST_SHARE>` +
  `<TEMPLATE>${more}</TEMPLATE></HOST>`;
const REPORTED = '<KVM_IB_STATUS><![CDATA[OK]]></KVM_IB_STATUS>';
const pool = (...hosts: string[]): string => `<HOST_POOL>${hosts.join('')}</HOST_POOL>\n`;
const network = (driver: string): string =>
  `<VNET_POOL><VNET><ID>7</ID><NAME>ib-guests</NAME><BRIDGE><![CDATA[virbr1]]></BRIDGE><VN_MAD><![CDATA[${driver}]]></VN_MAD></VNET></VNET_POOL>\n`;
const APART = [host(0, 'kvmib01', 'kvm-ib', 100, 1, REPORTED), host(1, 'one07', 'kvm', 0), host(2, 'ct', 'lxc', 100)];

/** Answers of the stand-ins, by name; each is a file below `given`. */
const ANSWERS: Readonly<Record<string, string>> = {
  'apart.xml': pool(...APART),
  'mixed.xml': pool(...APART, host(3, 'one08', 'kvm', 100)),
  'kvm.xml': pool(host(0, 'kvmib01', 'kvm', 100, 1, REPORTED), host(1, 'one07', 'kvm', 0, 5)),
  'broken.xml': pool(...APART).slice(0, 200),
  'dummy.xml': network('dummy'),
  'bridge.xml': network('bridge'),
};
/** Prints the file that /run/NAME names; fails without one. */
const STAND_IN =
  '#!/bin/sh\nread -r file < "/run/$(basename "$0")" || { echo "Connection refused" >&2; exit 255; }\nexec cat "$file"\n';
const SYSTEMCTL = '#!/bin/sh\nexit 0\n';

const SCRIPT = `
given=$1
for directory in etc usr var; do
  mkdir -p $given/layer/$directory.upper $given/layer/$directory.work
  mount -t overlay overlay -o lowerdir=/$directory,upperdir=$given/layer/$directory.upper,workdir=$given/layer/$directory.work /$directory
done
mount -t tmpfs tmpfs /run
say() { echo "== $1"; }
try() { name=$1; shift; say "$name"; status=0; "$@" 2> /run/said || status=$?; cat /run/said; echo "status=$status"; }
doctor() { name=$1; shift; try "$name" $NODE $BUNDLE doctor "$@"; }

doctor neither
install -m 0755 $given/systemctl /usr/bin/systemctl
for name in onehost onevnet; do install -m 0755 $given/stand-in /usr/bin/$name; done
echo 'oneadmin:x:9869:9869::/var/lib/one:/bin/sh' >> /etc/passwd
echo 'oneadmin:x:9869:' >> /etc/group
echo 'oneadmin:*:19000::::::' >> /etc/shadow
install -d -o 9869 -g 9869 /var/lib/one /var/lib/one/remotes /var/lib/one/remotes/vmm /var/lib/one/remotes/vmm/kvm
echo 7.0.0 > /var/lib/one/remotes/VERSION
printf '#!/bin/sh\\n' > /var/lib/one/remotes/vmm/kvm/deploy
chmod 755 /var/lib/one/remotes/vmm/kvm/deploy
install -d -m 0750 /etc/one /etc/one/vmm_exec
install -m 0640 $given/oned.conf /etc/one/oned.conf
echo 'LIVE_DISK_SNAPSHOTS="kvm-qcow2"' > /etc/one/vmm_exec/vmm_execrc
ip link add ib0 mtu 2044 type veth peer name fabric
ip link add virbr1 mtu 2044 type bridge
for link in fabric ib0 virbr1; do ip link set $link up; done
ip address add 192.168.10.1/24 dev ib0
ip address add 192.168.122.1/24 dev virbr1
echo $given/apart.xml > /run/onehost
echo $given/dummy.xml > /run/onevnet
# A front-end alone, first as OpenNebula comes.
try put $NODE $BUNDLE install front-end --config $given/kvm-ib.yaml
doctor stock --json
try named $NODE $BUNDLE install front-end --driver-name kvm-ib
doctor front-end
doctor front-end-json --json
echo $given/mixed.xml > /run/onehost
doctor mixed
doctor mixed-json --json
echo $given/broken.xml > /run/onehost
doctor broken --json
rm /run/onehost
doctor refused --json
echo $given/apart.xml > /run/onehost
echo $given/bridge.xml > /run/onevnet
doctor deleting --json
echo $given/dummy.xml > /run/onevnet
# The name kvm is not taken back while VMs run on a host of kvm-ib, and one of a host without it does not count.
try as-kvm $NODE $BUNDLE install front-end --driver-name kvm
echo $given/kvm.xml > /run/onehost
try kvm-busy $NODE $BUNDLE uninstall front-end --driver-name kvm
sed 's|<RUNNING_VMS>1<|<RUNNING_VMS>0<|' $given/kvm.xml > $given/idle.xml
echo $given/idle.xml > /run/onehost
try kvm-back $NODE $BUNDLE uninstall front-end --driver-name kvm
echo $given/apart.xml > /run/onehost
# Then a host as well.
mkdir -p /run/systemd/system
try host $NODE $BUNDLE install host --config $given/kvm-ib.yaml
doctor not-synced --json
rm -rf /var/tmp/one
cp -a /var/lib/one/remotes /var/tmp/one
doctor both --json
doctor table
try nobody setpriv --reuid=65534 --regid=65534 --clear-groups $NODE /usr/bin/kvm-ib doctor --json
echo '// other' >> /var/tmp/one/vmm/kvm-ib/parser.mjs
mv /etc/sudoers.d/kvm-ib /etc/kvm-ib/sudoers
install -d -o 9869 -g 9869 /var/lib/one/datastores /var/lib/one/datastores/0 /var/lib/one/datastores/0/42
echo '<VM><ID>42</ID><TEMPLATE><NIC><BRIDGE>virbr1</BRIDGE><NETWORK>ib</NETWORK><VN_MAD>bridge</VN_MAD></NIC></TEMPLATE></VM>' > /var/lib/one/datastores/0/42/vm.xml
try mapped kvm-ib add --guest 192.168.122.2 --vm 42 --nic 0
doctor wrong --json
mkfifo /var/lib/one/datastores/0/42/fifo
mv /var/lib/one/datastores/0/42/fifo /var/lib/one/datastores/0/42/vm.xml
doctor fifo --json
try help $NODE $BUNDLE doctor --help
`;

const said: Record<string, string> = {};
const of = (name: string): string => said[name] ?? '';
const json = (name: string): Diagnosis & { readonly ok: boolean } => {
  const text = of(name);
  return JSON.parse(text.slice(0, text.lastIndexOf('status='))) as Diagnosis & { readonly ok: boolean };
};
const status = (name: string): number => Number(/status=([0-9]+)$/.exec(of(name))?.[1] ?? Number.NaN);
const whats = (name: string): readonly string[] => json(name).findings.map(({ level, what }) => `${level}: ${what}`);
/** ib0 is an end of a veth pair here. */
const LAB = 'warning: ib0 is not an IPoIB link';

let root: string;
beforeAll(async () => {
  root = mkdtempSync(join(tmpdir(), 'kvm-ib-doctor-'));
  chmodSync(root, 0o755);
  const files = { ...ANSWERS, script: SCRIPT, 'stand-in': STAND_IN, systemctl: SYSTEMCTL, 'oned.conf': ONED };
  for (const [name, text] of Object.entries({ ...files, 'kvm-ib.yaml': CONFIG })) {
    mkdirSync(dirname(join(root, name)), { recursive: true });
    writeFileSync(join(root, name), text);
  }
  const result = await run([join(REPOSITORY, 'scripts/in-netns.sh'), 'sh', '-eu', join(root, 'script'), root], {
    env: { ...ENV, NODE: process.execPath, BUNDLE },
    limit: 120_000,
  });
  expect([result.status, result.stderr], result.stdout).toEqual([0, '']);
  for (const part of result.stdout.split(/^== /m).slice(1)) {
    const [name = '', ...lines] = part.trimEnd().split('\n');
    said[name] = lines.join('\n');
  }
}, 180_000);
afterAll(() => rmSync(root, { recursive: true, force: true }));

test('a machine that is neither front-end nor host is told so', () => {
  expect(of('neither')).toMatch(/Cannot examine this machine {2}\[host-lacks\][\s\S]*status=6$/);
});

describe('on a front-end', () => {
  test('without our section it names that, and the command', () => {
    expect(whats('stock')).toEqual([
      'error: no section VM_MAD of /etc/one/oned.conf runs kvm-ib',
      'error: host "kvmib01" has the driver "kvm-ib", which oned.conf does not have',
    ]);
    expect(status('stock')).toBe(6);
  });

  test('set up by `install front-end --driver-name kvm-ib` it finds nothing', () => {
    expect(of('front-end')).toMatch(/\nNothing found\.\nstatus=0$/);
    expect(of('front-end')).toMatch(/^front-end +driver +ok +VM_MAD "kvm-ib" of oned\.conf$/m);
    expect(of('front-end')).toMatch(/^kvmib01 +c100 +kvm-ib +kvm-ib +1 +OK$/m);
    expect(of('front-end')).not.toContain('\u001b');
    expect(json('front-end-json')).toMatchObject({ ok: true, frontEnd: true, host: false, findings: [] });
    expect(json('front-end-json').checks.map(({ state }) => state)).toEqual(Array(6).fill('ok'));
  });

  test('a host of the stock driver in a cluster of kvm-ib is an error with the commands; the same facts as JSON', () => {
    expect(status('mixed')).toBe(4);
    expect(of('mixed')).toMatch(
      /^error: {3}host "one08" has the driver "kvm", beside 1 host of kvm-ib in cluster "c100"/m,
    );
    expect(of('mixed')).toMatch(
      /fix: as oneadmin, into another cluster: onecluster addhost CLUSTER one08; .*onehost update one08/,
    );
    expect(of('mixed')).toMatch(/\nErrors: 1, warnings: 0\.\n/);
    const { findings, hosts, ok } = json('mixed-json');
    expect([ok, findings.length, hosts.length]).toEqual([false, 1, 4]);
    for (const { what, why, fix } of findings) expect(of('mixed')).toContain(`${what}: ${why}\n         fix: ${fix}`);
  });

  test('an OpenNebula that gives no list, or half of one, is an error', () => {
    for (const name of ['broken', 'refused']) {
      expect([name, status(name), whats(name)]).toEqual([
        name,
        6,
        ['error: OpenNebula does not say which hosts it has'],
      ]);
    }
    expect(json('refused').findings[0]?.why).toBe('Connection refused');
  });

  test('a virtual network that would delete the bridge is an error', () => {
    expect(whats('deleting')).toEqual(['error: virtual network "ib-guests" has VN_MAD "bridge" on virbr1']);
    expect(status('deleting')).toBe(4);
  });

  test('the name kvm is taken back only when no VM runs on a host that has kvm-ib', () => {
    expect(of('kvm-busy')).toMatch(/VMs run on hosts of this driver: kvmib01\n[\s\S]*status=4$/);
    expect(of('kvm-back')).toMatch(/folder kvm-ib -> kvm[\s\S]*status=0$/);
  });
});

describe('on a host', () => {
  test('that OpenNebula has not copied the driver to, that is the one thing found', () => {
    expect(whats('not-synced')).toEqual([LAB, 'error: 6 files of the driver missing in /var/tmp/one']);
    expect(status('not-synced')).toBe(6);
  });

  test('that is right nothing is found, but that this is a lab; front-end and host in one answer', () => {
    expect(whats('both')).toEqual([LAB]);
    expect(json('both')).toMatchObject({ ok: true, frontEnd: true, host: true });
    expect(new Set(json('both').checks.map(({ state }) => state))).toEqual(new Set(['ok', 'warning']));
    expect(of('table')).toMatch(/^host +sudo +ok +oneadmin may start the engine$/m);
    expect(of('table')).toMatch(/\nErrors: 0, warnings: 1\.\nstatus=0$/);
  });

  test('another user is told what was not looked at, and no false alarm', () => {
    expect([status('nobody'), of('nobody')]).toEqual([0, expect.anything()]);
    expect(whats('nobody')).toEqual([LAB]);
    const left = json('nobody').checks.filter(({ state }) => state === 'skipped');
    expect(left.map(({ name }) => name)).toEqual(expect.arrayContaining(['driver', 'other firewalls', 'sudo']));
  });

  test('a driver of another version, sudo that refuses and a bridge that will be deleted are found', () => {
    expect(of('mapped')).toMatch(/status=0$/);
    expect(whats('wrong')).toEqual([
      LAB,
      'warning: the driver in /var/tmp/one is of another version than the engine in /usr/lib/kvm-ib',
      'error: oneadmin cannot start the engine by sudo',
      'error: a running VM has a NIC of "ib" with VN_MAD "bridge" on virbr1',
    ]);
    const sudo = json('wrong').findings.find(({ check }) => check === 'sudo');
    expect([sudo?.why, sudo?.fix]).toEqual([
      expect.stringContaining('password is required'),
      expect.stringContaining('kvm-ib install host'),
    ]);
  });

  test('a pipe in the place of a VM description does not hold it up', () => {
    expect(whats('fifo')).toHaveLength(3);
  });
});

test('the help begins with examples and says what the exit status means', () => {
  expect(of('help')).toMatch(/^Examples:\n {2}kvm-ib doctor\n/);
  expect(of('help')).toMatch(/Exit status: 0 nothing but warnings/);
});
