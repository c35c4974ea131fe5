// `npm run demo`: the main job in a throw-away lab of network namespaces, in under two minutes, with nothing but Node beforehand.
// Two guests are deployed through the real driver entry, exactly as OpenNebula calls it; what stands for libvirt is a small script that
// plugs a namespace into the bridge. Everything lives in one namespace that vanishes at the end.
import { spawnSync } from 'node:child_process';
import { cpSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  buildIfStale,
  environment,
  fail,
  installModules,
  installPackages,
  isRoot,
  PACKAGES,
  requireNode,
  root,
  run,
} from './setup.mjs';

const IP = '/usr/sbin/ip';
const HOST = 'kvmib01';
const GUESTS = [
  { vm: 1, name: 'alpha', guest: '192.168.122.2', address: '192.168.10.202', mac: '02:00:c0:a8:7a:02' },
  { vm: 2, name: 'beta', guest: '192.168.122.3', address: '192.168.10.203', mac: '02:00:c0:a8:7a:03' },
];
const bold = (text) => (process.stdout.isTTY && !process.env.NO_COLOR ? `\u001b[1m${text}\u001b[0m` : text);

if (process.env.KVM_IB_TEST_NETNS !== '1') {
  requireNode();
  if (!isRoot) fail('the lab needs root for network namespaces: sudo npm run demo');
  const missing = installPackages(PACKAGES.lab);
  if (missing.length > 0) fail(`install these first: ${missing.join(' ')}`);
  installModules();
  buildIfStale();
  run([join(root, 'scripts/in-netns.sh'), process.execPath, join(root, 'scripts/demo.mjs')]);
  process.exit(0);
}

const work = mkdtempSync(join(tmpdir(), 'kvm-ib-demo-'));
const demo = { ...environment, KVM_IB_CONFIG: join(work, 'kvm-ib.yaml'), KVM_IB_STATE_DIR: join(work, 'state') };
let failures = 0;
try {
  buildLab();
  say(
    'Two guests are deployed, as OpenNebula does it: one_vmm_exec calls the driver with the domain XML on standard input.',
  );
  for (const guest of GUESTS) deploy(guest);

  say('The outside reaches each guest at its own IB address, and sees the guests by it.');
  ping('outside', '192.168.10.202', 'outside -> alpha');
  ping('outside', '192.168.10.203', 'outside -> beta');
  ping('one-1', '192.168.10.100', 'alpha -> outside');
  ping('one-1', '192.168.10.203', 'alpha -> beta, by its IB address, on the same host');
  ping('hypervisor', '192.168.10.202', 'the host itself -> alpha');

  say('What the hypervisor holds for that (no libvirt runs in this lab, and status says so):');
  show('hypervisor', ['nft', 'list', 'table', 'ip', 'kvm_ib']);
  show('hypervisor', [IP, '-4', '-brief', 'address', 'show', 'dev', 'ib0']);
  show('hypervisor', [join(root, 'dist/kvm-ib.mjs'), 'list'], 'kvm-ib list');
  show('hypervisor', [join(root, 'dist/kvm-ib.mjs'), 'status'], 'kvm-ib status');

  say('alpha is suspended: its address leaves the host with it. Resumed, it is reachable again.');
  const checkpoint = join(work, 'checkpoint');
  running('save', GUESTS[0], [`one-${GUESTS[0].vm}`, checkpoint, HOST]);
  if (ok('outside', ['ping', '-c', '1', '-W', '1', '192.168.10.202'])) problem('192.168.10.202 still answers');
  running('restore', GUESTS[0], [checkpoint, HOST, `one-${GUESTS[0].vm}`]);
  ping('outside', '192.168.10.202', 'outside -> alpha');

  say('Both guests are shut down. Nothing of theirs is left.');
  for (const guest of GUESTS) running('shutdown', guest, [`one-${guest.vm}`, HOST]);
  show('hypervisor', [join(root, 'dist/kvm-ib.mjs'), 'list'], 'kvm-ib list');
  show('hypervisor', [IP, '-4', '-brief', 'address', 'show', 'dev', 'ib0']);
  if (ok('outside', ['ping', '-c', '1', '-W', '1', '192.168.10.202'])) problem('192.168.10.202 still answers');
  show('hypervisor', [join(root, 'dist/kvm-ib.mjs'), 'teardown'], 'kvm-ib teardown');
} finally {
  for (const name of ['one-1', 'one-2', 'outside', 'hypervisor']) spawnSync(IP, ['netns', 'delete', name]);
  rmSync(work, { recursive: true, force: true });
}
console.log(failures === 0 ? bold('\nThe demo is done; the lab is gone.') : `\n${failures} steps of the demo failed.`);
process.exit(failures === 0 ? 0 : 1);

function buildLab() {
  say('A lab: one hypervisor with ib0 and virbr1, an outside client on the same IPoIB network, two guests.');
  batch([
    'netns add hypervisor',
    'netns add outside',
    'netns add one-1',
    'netns add one-2',
    'link add ib0 mtu 65520 netns hypervisor type veth peer name ib0 mtu 65520 netns outside',
  ]);
  inside('hypervisor', [
    'link set lo up',
    'link set ib0 up',
    'address add 192.168.10.1/24 dev ib0',
    'link add virbr1 type bridge',
    'link set virbr1 up',
    'address add 192.168.122.1/24 dev virbr1',
  ]);
  inside('outside', ['link set lo up', 'link set ib0 up', 'address add 192.168.10.100/24 dev ib0']);
  netns('hypervisor', ['/bin/sh', '-c', 'echo 1 > /proc/sys/net/ipv4/ip_forward']);
  writeFileSync(
    demo.KVM_IB_CONFIG,
    `networks:
  - name: ib
    device: ib0
    bridge: virbr1
    guests: 192.168.122.2-192.168.122.6
    addresses: 192.168.10.202-192.168.10.206
`,
  );
  cpSync(join(root, 'drivers/vmm/kvm-ib'), join(work, 'vmm/kvm-ib'), { recursive: true });
  for (const file of ['parser.mjs', 'engine.mjs', 'koffi.node', 'netlink.node']) {
    cpSync(join(root, 'dist', file), join(work, 'vmm/kvm-ib', file));
  }
  mkdirSync(join(work, 'vmm/kvm'));
  // Stands for OpenNebula's stock scripts: `virsh create` and `virsh shutdown` become a veth pair on the bridge.
  const plug = [
    'address="192.168.122.$((vm + 1))"',
    `${IP} link add "one-$vm-0" mtu 65520 type veth peer name eth0 mtu 65520 address "02:00:c0:a8:7a:0$((vm + 1))" netns "one-$vm"`,
    `${IP} link set "one-$vm-0" master virbr1 up`,
    `${IP} -n "one-$vm" link set eth0 up`,
    `${IP} -n "one-$vm" address add "$address/24" dev eth0`,
    `${IP} -n "one-$vm" route add default via 192.168.122.1`,
  ];
  stock('deploy', ['cat > "$1"', 'vm=$3', ...plug, 'echo "00000000-0000-4000-8000-00000000000$vm"']);
  stock('restore', ['cat > /dev/null', 'vm=$4', ...plug]);
  stock('save', ['cat > /dev/null', `exec ${IP} link delete "one-$4-0"`]);
  stock('shutdown', ['cat > /dev/null', `exec ${IP} link delete "one-$3-0"`]);
}

function stock(action, lines) {
  writeFileSync(join(work, 'vmm/kvm', action), `#!/bin/sh -e\n${lines.join('\n')}\n`, { mode: 0o755 });
}

function vmXml({ vm, name, guest, mac }) {
  return `<VM><ID>${vm}</ID><NAME>${name}</NAME><TEMPLATE><NIC><BRIDGE><![CDATA[virbr1]]></BRIDGE><IP><![CDATA[${guest}]]></IP><MAC><![CDATA[${mac}]]></MAC><NIC_ID><![CDATA[0]]></NIC_ID><TARGET><![CDATA[one-${vm}-0]]></TARGET></NIC></TEMPLATE></VM>`;
}

function deploy(guest) {
  const folder = join(work, `datastore-${guest.vm}`);
  mkdirSync(folder);
  writeFileSync(join(folder, 'vm.xml'), vmXml(guest));
  const domain = `<domain type='kvm'><name>one-${guest.vm}</name><title>${guest.name}</title><devices><interface type='bridge'><source bridge='virbr1'/><mac address='${guest.mac}'/><target dev='one-${guest.vm}-0'/><model type='virtio'/></interface></devices></domain>`;
  driver('deploy', [join(folder, 'deployment.0'), HOST, String(guest.vm), HOST], domain);
}

/** Any action on a VM that is there. */
function running(action, guest, args) {
  const data = `<VMM_DRIVER_ACTION_DATA>${vmXml(guest)}</VMM_DRIVER_ACTION_DATA>`;
  driver(action, [...args, String(guest.vm), HOST], data);
}

/** The call of one_vmm_exec: a here-document into the script, its arguments in single quotes. */
function driver(action, args, stdin) {
  const script = join(work, 'vmm/kvm-ib', action);
  const line = `cat << 'EOT' | ${script} ${args.map((arg) => `'${arg}'`).join(' ')}`;
  console.log(`$ ${action} ${args.slice(0, 1).join(' ').replace(work, '…')}`);
  const started = performance.now();
  const result = spawnSync(IP, ['netns', 'exec', 'hypervisor', 'bash', '-s'], {
    input: `${line}\n${stdin}\nEOT\n`,
    encoding: 'utf8',
    env: demo,
  });
  const time = `${Math.round(performance.now() - started)} ms`;
  if (result.status === 0) console.log(`  ${result.stdout.trim() || 'done'} (${time})`);
  else problem(`${action}: status ${result.status}: ${result.stderr}`);
}

function ping(from, to, what) {
  const result = netns(from, ['ping', '-c', '2', '-i', '0.2', '-W', '2', to]);
  const time = /= [\d.]+\/([\d.]+)\//.exec(result.stdout)?.[1];
  if (result.status === 0) console.log(`  ok    ${what} (${to}): ${time} ms`);
  else problem(`${what} (${to}): no answer\n${result.stdout}`);
}

function show(namespace, argv, name = argv.join(' ').replace(`${IP} `, 'ip ')) {
  console.log(bold(`$ ${name}`));
  const result = netns(namespace, argv);
  console.log(`${result.stdout}${result.stderr}`);
  if (result.status !== 0) problem(`${name}: status ${result.status}`);
}

function netns(namespace, argv) {
  return spawnSync(IP, ['netns', 'exec', namespace, ...argv], { encoding: 'utf8', env: demo });
}

function ok(namespace, argv) {
  return netns(namespace, argv).status === 0;
}

function inside(namespace, lines) {
  batch(lines, ['-n', namespace]);
}

function batch(lines, flags = []) {
  const result = spawnSync(IP, [...flags, '-batch', '-'], { input: `${lines.join('\n')}\n`, encoding: 'utf8' });
  if (result.status !== 0) throw new Error(`ip: ${result.stderr}`);
}

function say(text) {
  console.log(`\n${bold(text)}`);
}

function problem(text) {
  failures += 1;
  console.error(`  FAILED ${text}`);
}
