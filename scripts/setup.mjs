// Brings a bare machine to where a script of this project can run: Debian packages, node_modules, dist/. Plain Node, no dependency.
// Does nothing where all is there already; says what it does where it is not.
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = dirname(dirname(fileURLToPath(import.meta.url)));
export const isRoot = process.getuid?.() === 0;

/** Packages by what they are needed for. The demo needs `lab`; the tests need all. */
export const PACKAGES = {
  lab: ['nftables', 'iproute2', 'iputils-ping', 'util-linux'],
  kernel: [
    'iptables',
    'conntrack',
    'tcpdump',
    'iputils-arping',
    'netcat-openbsd',
    'sudo',
    'libxml2-utils',
    'bridge-utils',
  ],
  // No openssh-server, which would serve the whole machine: scripts/vm-sshd.mjs unpacks one.
  vm: [
    'libvirt-daemon-system',
    'libvirt-clients',
    'qemu-system-x86',
    'qemu-utils',
    'busybox-static',
    'cpio',
    'openssh-client',
  ],
};

/** Environment for children: no loader options of the caller, and the directories of system programs. */
export const environment = {
  ...process.env,
  NODE_EXTRA_CA_CERTS: '',
  NODE_OPTIONS: '',
  PATH: `${process.env.PATH}:/usr/sbin:/sbin`,
};

/** Runs a program with our streams; ends this process with its status when it fails. */
export function run(argv, options = {}) {
  const [program, ...args] = argv;
  const result = spawnSync(program, args, { stdio: 'inherit', cwd: root, env: environment, ...options });
  if (result.error) fail(`${program}: ${result.error.message}`);
  if (result.status !== 0) process.exit(result.status ?? 1);
}

export function fail(message) {
  console.error(`error: ${message}`);
  process.exit(6);
}

function quiet(argv) {
  const [program, ...args] = argv;
  return spawnSync(program, args, { encoding: 'utf8', env: environment });
}

/** Installs the Debian packages that are missing. @returns those that are still missing (not root, not Debian) */
export function installPackages(wanted) {
  if (quiet(['dpkg-query', '--version']).status !== 0) return wanted;
  const missing = wanted.filter(
    (name) => !quiet(['dpkg-query', '-s', name]).stdout?.includes('Status: install ok installed'),
  );
  if (missing.length === 0 || !isRoot) return missing;
  console.log(`installing ${missing.join(' ')}`);
  const apt = { env: { ...environment, DEBIAN_FRONTEND: 'noninteractive' } };
  run(['apt-get', 'update', '-qq'], apt);
  run(['apt-get', 'install', '-y', '-qq', ...missing], { ...apt, stdio: ['ignore', 'ignore', 'inherit'] });
  return [];
}

/** node_modules as the lockfile says. Install scripts are not needed: every addon comes prebuilt. */
export function installModules() {
  const stamp = join(root, 'node_modules/.package-lock.json');
  if (existsSync(stamp) && statSync(stamp).mtimeMs >= statSync(join(root, 'package-lock.json')).mtimeMs) return;
  console.log('installing node_modules (npm ci)');
  // The caller's own environment: its registry may need certificates of its own.
  run(['npm', 'ci', '--ignore-scripts', '--no-audit', '--no-fund', '--loglevel=error'], { env: process.env });
}

function newest(path) {
  const stat = statSync(path);
  if (!stat.isDirectory()) return stat.mtimeMs;
  return Math.max(stat.mtimeMs, ...readdirSync(path).map((name) => newest(join(path, name))));
}

/** dist/ newer than what it is made of. */
export function buildIfStale() {
  const made = join(root, 'dist/kvm-ib.mjs');
  const sources = ['lib', 'scripts/build.mjs', 'package.json'].map((name) => newest(join(root, name)));
  if (existsSync(made) && existsSync(join(root, 'dist/lib/index.js')) && statSync(made).mtimeMs > Math.max(...sources))
    return;
  console.log('building dist/');
  run([process.execPath, 'scripts/build.mjs']);
}

export function requireNode() {
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number);
  if (major < 20 || (major === 20 && minor < 11))
    fail(`Node ${process.versions.node} is too old: install Node 20.11 or later`);
}
