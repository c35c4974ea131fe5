/**
 * The driver as OpenNebula's user, with the sudoers file and the wrapper that we ship and the real sudo. User, files and
 * folders are mounts in this test's own mount namespace.
 */
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmdirSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { Result, Rig } from '../support/driver.ts';
import {
  actionDataOf,
  CONFIG,
  copyBundles,
  createRig,
  domainOf,
  eventually,
  HOST_NAME,
  run,
  testVm,
  tool,
  UUID,
} from '../support/driver.ts';
import { captureArp, makeOther } from '../support/fabric.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const repository = join(dirname(fileURLToPath(import.meta.url)), '../..');
const MOUNT = '/bin/mount';
const ENGINE = '/usr/lib/kvm-ib/kvm-ib-engine';
const STATE = '/var/lib/kvm-ib';
const UID = 9869;

const mounts: string[] = [];
const made: string[] = [];
let rig: Rig;

function mountFolder(path: string): void {
  if (!existsSync(path)) {
    mkdirSync(path);
    made.push(path);
  }
  tool(MOUNT, '-t', 'tmpfs', '-o', 'mode=0755', 'none', path);
  mounts.push(path);
}

function mountFile(path: string, text: string, mode: string): void {
  const copy = join(rig.folder, path.replaceAll('/', '_'));
  writeFileSync(copy, text);
  tool('/bin/chmod', mode, copy);
  tool(MOUNT, '--bind', copy, path);
  mounts.push(path);
}

beforeAll(async () => {
  rig = await createRig();
  makeOther();
  for (const [file, entry, mode] of [
    ['passwd', `oneadmin:x:${UID}:${UID}::/nonexistent:/bin/sh`, '0644'],
    ['group', `oneadmin:x:${UID}:`, '0644'],
    ['shadow', 'oneadmin:*:19000:0:99999:7:::', '0640'],
  ] as const) {
    const others = readFileSync(`/etc/${file}`, 'utf8').split('\n');
    const text = [...others.filter((line) => line !== '' && !line.startsWith('oneadmin:')), entry, ''].join('\n');
    mountFile(`/etc/${file}`, text, mode);
  }
  for (const path of ['/etc/sudoers.d', '/usr/lib/kvm-ib', '/etc/kvm-ib', STATE]) mountFolder(path);
  // As docs and packages install them.
  copyFileSync(join(repository, 'rulesets/sudoers.d/kvm-ib'), '/etc/sudoers.d/kvm-ib');
  tool('/bin/chmod', '0440', '/etc/sudoers.d/kvm-ib');
  copyFileSync(join(repository, 'rulesets/kvm-ib-engine'), ENGINE);
  tool('/bin/chmod', '0755', ENGINE);
  copyBundles(dirname(ENGINE), ['engine.mjs']);
  writeFileSync('/etc/kvm-ib/kvm-ib.yaml', CONFIG);
  if (!existsSync('/usr/bin/node') && !existsSync('/usr/local/bin/node')) {
    mountFolder('/usr/local/bin');
    tool('/bin/ln', '-s', process.execPath, '/usr/local/bin/node');
  }
});

afterAll(() => {
  for (const path of mounts.reverse()) tool('/bin/umount', '--lazy', path);
  for (const path of made) rmdirSync(path);
  rig?.remove();
});

beforeEach(() => {
  rig.reset();
  for (const entry of readdirSync(STATE)) tool('/bin/rm', '-rf', join(STATE, entry));
});

const vm = testVm(42);
const env = { PATH: `/usr/local/bin:/usr/bin:/bin:${dirname(process.execPath)}`, LANG: 'C' };

function asOneadmin(
  argv: readonly string[],
  stdin?: string,
  more: Readonly<Record<string, string>> = {},
): Promise<Result> {
  const drop = ['/usr/bin/setpriv', `--reuid=${UID}`, `--regid=${UID}`, '--clear-groups', '--bounding-set=+all'];
  return run([...drop, ...argv], { env: { ...env, ...more }, stdin });
}

const deploy = (more: Readonly<Record<string, string>> = {}) =>
  asOneadmin([join(rig.drivers, 'deploy'), rig.place(vm), HOST_NAME, '42', HOST_NAME], domainOf(vm), more);

const aliases = () => tool('/usr/sbin/ip', '-o', '-4', 'addr', 'show', 'dev', 'ib0');
const stateOf = (name: string) => JSON.parse(readFileSync(`${STATE}/mappings/${name}.json`, 'utf8'));

/** Processes of this network namespace that run the installed engine: as it is, or as that which repeats announcements. */
function engines(argument?: string): readonly number[] {
  const own = readlinkSync('/proc/self/ns/net');
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => {
      try {
        const argv = readFileSync(`/proc/${pid}/cmdline`, 'latin1').split('\0');
        const isMeant = argv[1] === '/usr/lib/kvm-ib/engine.mjs' && (argv[2] || undefined) === argument;
        return isMeant && readlinkSync(`/proc/${pid}/ns/net`) === own;
      } catch {
        return false; // it ended meanwhile
      }
    });
}

describe("OpenNebula's user", () => {
  test('deploys and shuts down by sudo', async () => {
    expect(await deploy()).toMatchObject({ status: 0, stdout: `${UUID}\n`, stderr: '' });
    expect(aliases()).toContain('192.168.10.202/32 scope global ib0:42-0');
    expect(stateOf('vm-42')).toMatchObject({ phase: { name: 'active' } });
    const shutdown = [join(rig.drivers, 'shutdown'), UUID, HOST_NAME, '42', HOST_NAME];
    expect(await asOneadmin(shutdown, actionDataOf(vm))).toMatchObject({ status: 0, stderr: '' });
    expect(aliases()).not.toContain('/32');
    expect(readdirSync(`${STATE}/mappings`)).toEqual([]);
  });

  test('has the mapping undone when the stock script fails', async () => {
    rig.behave('echo broken >&2; exit 3');
    expect(await deploy()).toMatchObject({ status: 3, stdout: '', stderr: 'broken\n' });
    expect(aliases()).not.toContain('/32');
    expect(readdirSync(`${STATE}/mappings`)).toEqual([]);
  });

  test('is told what the engine says', async () => {
    writeFileSync('/etc/kvm-ib/kvm-ib.yaml', CONFIG.replace('virbr1', 'virbr9'));
    const other = join(rig.folder, 'other.yaml');
    writeFileSync(other, CONFIG);
    const result = await deploy({ KVM_IB_CONFIG: other });
    writeFileSync('/etc/kvm-ib/kvm-ib.yaml', CONFIG);
    expect(result).toMatchObject({ status: 2, stdout: '' });
    expect(result.stderr).toMatch(/^kvm-ib: Cannot map NIC 0 of VM 42: [^\n]*\n$/);
    expect(rig.runs()).toEqual([]);
  });

  test('starts an engine that has two capabilities and none of the environment', async () => {
    rig.behave(`cat > /dev/null; until [ -e "$record/go" ]; do sleep 0.05; done; echo ${UUID}`);
    const elsewhere = join(rig.folder, 'elsewhere');
    const deploying = deploy({
      KVM_IB_STATE_DIR: elsewhere,
      NODE_OPTIONS: '--require=/nowhere.js',
      LD_PRELOAD: '',
      SUDO_UID: '0',
    });
    await eventually('the stock script runs', () => rig.runs().includes('deploy'));
    const [pid, ...more] = engines();
    expect(more).toEqual([]);
    const status = readFileSync(`/proc/${pid}/status`, 'latin1');
    const field = (name: string) => new RegExp(`^${name}:\\s*(.*)$`, 'm').exec(status)?.[1];
    const both = ((1 << 12) | (1 << 13)).toString(16).padStart(16, '0');
    const none = '0'.padStart(16, '0');
    expect(['CapEff', 'CapPrm', 'CapBnd', 'CapInh', 'CapAmb', 'NoNewPrivs'].map(field)).toEqual([
      both,
      both,
      both,
      none,
      none,
      '1',
    ]);
    expect(field('Uid')).toBe('0\t0\t0\t0');
    const environment = readFileSync(`/proc/${pid}/environ`, 'latin1').split('\0').slice(0, -1).sort();
    expect(environment).toEqual(['LC_ALL=C', 'PATH=/usr/sbin:/usr/bin:/sbin:/bin', `SUDO_UID=${UID}`]);
    writeFileSync(join(rig.record, 'go'), '');
    expect(await deploying).toMatchObject({ status: 0, stderr: '' });
    expect(existsSync(elsewhere)).toBe(false);
    expect(stateOf('vm-42')).toMatchObject({ phase: { name: 'active' } });
    expect(engines()).toEqual([]);
  });

  test('gets the whole probe whatever the environment says, and announcements are repeated after sudo has ended', async () => {
    const noRepeats = () => engines('--repeat-announcements').length === 0;
    await eventually('those of earlier tests have ended', noRepeats);
    const capture = await captureArp();
    expect(await deploy({ KVM_IB_PROBE_MS: '0' })).toMatchObject({ status: 0 });
    const [pid] = engines('--repeat-announcements');
    const status = readFileSync(`/proc/${pid}/status`, 'latin1');
    expect(/^CapEff:\s*(\S+)$/m.exec(status)?.[1]).toBe('0000000000003000');
    expect(/^NoNewPrivs:\s*1$/m.test(status)).toBe(true);
    await new Promise((resolve) => setTimeout(resolve, 4_500));
    await eventually('the repeats have ended', noRepeats);
    const frames = (await capture.stop()).filter(({ what }) => what.endsWith('192.168.10.202'));
    const probes = frames.filter(({ what }) => what.startsWith('probe'));
    expect(probes).toHaveLength(3);
    expect((probes[2]?.at ?? 0) - (probes[0]?.at ?? 0)).toBeGreaterThan(0.19);
    expect(frames.filter(({ what }) => what.startsWith('request'))).toHaveLength(3);
  });

  test.each([
    ['an argument', [ENGINE, '--help']],
    ['the argument of the repeats', [ENGINE, '--repeat-announcements']],
    ['an empty argument', [ENGINE, '']],
    ['a variable', ['KVM_IB_CONFIG=/tmp/x', ENGINE]],
    ['the engine without its wrapper', [process.execPath, '/usr/lib/kvm-ib/engine.mjs']],
    ['another program', ['/usr/bin/id']],
    ['the wrapper by a detour', ['/usr/lib/kvm-ib/../kvm-ib/../../../tmp/kvm-ib-engine']],
  ])('may not run %s', async (_, argv) => {
    const result = await asOneadmin(['/usr/bin/sudo', '-n', ...argv]);
    expect(result).toMatchObject({ status: 1, stdout: '' });
    expect(result.stderr).toMatch(/password is required|not allowed/);
  });

  test('without our sudoers file is told what to install', async () => {
    tool('/bin/mv', '/etc/sudoers.d/kvm-ib', '/etc/sudoers.d/kvm-ib~');
    const result = await deploy();
    tool('/bin/mv', '/etc/sudoers.d/kvm-ib~', '/etc/sudoers.d/kvm-ib');
    expect(result).toMatchObject({ status: 5, stdout: '' });
    expect(result.stderr).toMatch(/^kvm-ib: Cannot start the kvm-ib engine: [^\n]*sudoers\.d\/kvm-ib[^\n]*\n$/);
    expect(rig.runs()).toEqual([]);
  });

  test('without an installed engine is told what to install', async () => {
    tool('/bin/mv', ENGINE, `${ENGINE}~`);
    const result = await deploy();
    tool('/bin/mv', `${ENGINE}~`, ENGINE);
    expect(result).toMatchObject({ status: 6, stdout: '' });
    expect(result.stderr).toMatch(/^kvm-ib: Cannot start the kvm-ib engine: [^\n]*install[^\n]*\n$/);
    expect(rig.runs()).toEqual([]);
  });
});

test('visudo accepts the sudoers file', () => {
  expect(tool('/usr/sbin/visudo', '-cf', '/etc/sudoers.d/kvm-ib')).toContain('parsed OK');
});
