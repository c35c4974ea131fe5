/**
 * `kvm-ib install` and `uninstall` as a site runs them: below another root, and on the running system, which here is a
 * copy-on-write layer over this machine's /etc, /usr, /var and /run in a mount namespace that is thrown away.
 */
import {
  chmodSync,
  chownSync,
  cpSync,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { CONFIG, copyBundles, domainOf, run, testVm, vmXmlOf } from '../support/driver.ts';
import { requireOwnNetns } from '../support/netns.ts';
import type { VnmVersion } from '../support/vnm.ts';
import { networkCall, VNM_VERSIONS } from '../support/vnm.ts';

requireOwnNetns();

const REPOSITORY = resolve(import.meta.dirname, '../..');
const BUNDLE = join(REPOSITORY, 'dist/kvm-ib.mjs');
const ENV = { PATH: `/usr/sbin:/usr/bin:/sbin:/bin:${dirname(process.execPath)}` };

interface Report {
  readonly changed: boolean;
  readonly operations: readonly { readonly sign: string; readonly path: string; readonly why: string }[];
  readonly notes: readonly { readonly title: string; readonly text: string }[];
  readonly steps: readonly { readonly argv: readonly string[] }[];
  readonly synced?: { readonly files: number; readonly bytes: number };
}

let root: string;
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'kvm-ib-root-'));
});
afterEach(() => rmSync(root, { recursive: true, force: true }));

async function kvmIb(args: readonly string[], program = BUNDLE): ReturnType<typeof run> {
  return run([process.execPath, program, ...args], { env: ENV });
}

async function report(args: readonly string[], program = BUNDLE): Promise<Report> {
  const result = await kvmIb([...args, '--root', root, '--json'], program);
  expect(result.stderr).toBe('');
  expect(result.status).toBe(0);
  return JSON.parse(result.stdout) as Report;
}

const at = (path: string): string => join(root, path);
const signOf = ({ operations }: Report, path: string): string | undefined =>
  operations.find((op) => op.path === path)?.sign;

function everything(directory: string, prefix = ''): readonly string[] {
  return readdirSync(directory, { withFileTypes: true }).flatMap((entry) => {
    const path = `${prefix}/${entry.name}`;
    return entry.isDirectory() ? [path, ...everything(join(directory, entry.name), path)] : [path];
  });
}

function put(path: string, text: string, mode = 0o644): void {
  mkdirSync(dirname(at(path)), { recursive: true });
  writeFileSync(at(path), text);
  chmodSync(at(path), mode);
}

describe('on a host, below another root', () => {
  test('a dry run writes nothing, the first run makes all, the second finds nothing to do', async () => {
    const plan = await report(['install', 'host', '--dry-run']);
    expect(everything(root)).toEqual([]);
    const first = await report(['install', 'host']);
    expect(first.operations).toEqual(plan.operations);
    for (const { path } of first.operations) expect(existsSync(at(path)), path).toBe(true);
    const second = await report(['install', 'host']);
    expect(second.changed).toBe(false);
    expect(new Set(second.operations.map(({ sign }) => sign))).toEqual(new Set(['=']));
  });

  test('modes and owners are those that sudo, systemd and the driver want', async () => {
    await report(['install', 'host']);
    for (const [path, mode] of [
      ['/etc/sudoers.d/kvm-ib', 0o440],
      ['/usr/lib/kvm-ib/kvm-ib-engine', 0o755],
      ['/usr/lib/kvm-ib/engine.mjs', 0o644],
      ['/usr/lib/kvm-ib', 0o755],
      ['/etc/kvm-ib/kvm-ib.yaml', 0o644],
      ['/etc/systemd/system/kvm-ib.timer', 0o644],
      ['/usr/share/man/man1/kvm-ib.1', 0o644],
    ] as const) {
      const stat = statSync(at(path));
      expect([path, stat.mode & 0o7777, stat.uid, stat.gid]).toEqual([path, mode, 0, 0]);
    }
    expect(readFileSync(at('/usr/bin/kvm-ib')).equals(readFileSync(BUNDLE))).toBe(true);
    expect(everything(root).filter((path) => /\.new$/.test(path))).toEqual([]);
  });

  test('the installed copy installs and uninstalls without the package that it came from', async () => {
    await report(['install', 'host']);
    const own = at('/usr/bin/kvm-ib');
    expect((await report(['install', 'host'], own)).changed).toBe(false);
    rmSync(at('/etc/sudoers.d/kvm-ib'));
    expect(signOf(await report(['install', 'host'], own), '/etc/sudoers.d/kvm-ib')).toBe('+');
    put('/var/lib/one/remotes/VERSION', '7.0.0\n');
    await report(['install', 'front-end'], own);
    expect(existsSync(at('/var/lib/one/remotes/vmm/kvm-ib/deploy'))).toBe(true);
    await report(['uninstall', 'front-end'], own);
    await report(['uninstall', 'host', '--purge'], own);
    expect(everything(root).filter((path) => path.includes('kvm-ib'))).toEqual([]);
  });

  test('programs of ours are brought back, what an administrator changed is kept, an unchanged older file is replaced', async () => {
    await report(['install', 'host']);
    const [engine, sysctl, timer] = [
      '/usr/lib/kvm-ib/engine.mjs',
      '/etc/sysctl.d/60-kvm-ib.conf',
      '/etc/systemd/system/kvm-ib.timer',
    ];
    writeFileSync(at(engine), 'broken');
    writeFileSync(at(sysctl), 'net.ipv4.ip_forward = 1\n');
    writeFileSync(at('/etc/kvm-ib/kvm-ib.yaml'), CONFIG);
    // As an earlier version put it there: its digest stands in the record.
    writeFileSync(at(timer), '[Timer]\nOnBootSec=1\n');
    const record = JSON.parse(readFileSync(at('/usr/lib/kvm-ib/installed.json'), 'utf8')) as {
      files: Record<string, string>;
    };
    const { createHash } = await import('node:crypto');
    record.files[timer] = createHash('sha256').update('[Timer]\nOnBootSec=1\n').digest('hex');
    writeFileSync(at('/usr/lib/kvm-ib/installed.json'), JSON.stringify(record));

    const again = await report(['install', 'host']);
    expect([engine, sysctl, timer, '/etc/kvm-ib/kvm-ib.yaml'].map((path) => signOf(again, path))).toEqual([
      '~',
      '!',
      '~',
      '=',
    ]);
    expect(readFileSync(at(engine)).equals(readFileSync(join(REPOSITORY, 'dist/engine.mjs')))).toBe(true);
    expect(readFileSync(at(sysctl), 'utf8')).toBe('net.ipv4.ip_forward = 1\n');
    expect(readFileSync(at('/etc/kvm-ib/kvm-ib.yaml'), 'utf8')).toBe(CONFIG);
  });

  test('uninstalling leaves the tree as it was, the configuration aside, and that too with --purge', async () => {
    put('/etc/sysctl.d/99-site.conf', '');
    const before = everything(root);
    await report(['install', 'host']);
    await report(['uninstall', 'host', '--dry-run']);
    expect(existsSync(at('/usr/bin/kvm-ib'))).toBe(true);
    await report(['uninstall', 'host']);
    expect(everything(root).filter((path) => !before.includes(path))).toEqual([
      '/etc/kvm-ib',
      '/etc/kvm-ib/kvm-ib.yaml',
    ]);
    await report(['uninstall', 'host', '--purge']);
    expect(everything(root)).toEqual(before);
    expect((await report(['uninstall', 'host'])).operations).toEqual([]);
  });

  test('uninstalling is refused while a VM is mapped, and while a state file cannot be read', async () => {
    await report(['install', 'host']);
    const file = '/var/lib/kvm-ib/mappings/vm-42.json';
    put(file, '{');
    const broken = await kvmIb(['uninstall', 'host', '--root', root]);
    expect([broken.status, broken.stderr]).toEqual([4, expect.stringContaining('vm-42.json')]);
    const state = {
      version: 1,
      owner: { kind: 'vm', vm: 42 },
      phase: { name: 'active' },
      mappings: [],
      previous: [],
      updated: '',
    };
    put(file, JSON.stringify(state));
    const mapped = await kvmIb(['uninstall', 'host', '--root', root]);
    expect([mapped.status, mapped.stderr]).toEqual([4, expect.stringContaining('VMs are mapped: 42')]);
    expect(existsSync(at('/usr/bin/kvm-ib'))).toBe(true);
    rmSync(at(file));
    await report(['uninstall', 'host', '--purge']);
    expect(everything(root)).toEqual(['/var', '/var/lib']);
  });

  test('a given configuration is put in place once, and a broken one not at all', async () => {
    put('/given.yaml', CONFIG);
    put('/broken.yaml', 'networks: []\n');
    const refused = await kvmIb(['install', 'host', '--root', root, '--config', at('/broken.yaml')]);
    expect(refused.status).toBe(2);
    expect(existsSync(at('/usr'))).toBe(false);
    const first = await report(['install', 'host', '--config', at('/given.yaml')]);
    expect(readFileSync(at('/etc/kvm-ib/kvm-ib.yaml'), 'utf8')).toBe(CONFIG);
    expect(first.notes.map(({ title }) => title).join()).not.toContain('names no network');
  });

  test('NetworkManager is served where it is, with the bridges of the configuration', async () => {
    mkdirSync(at('/etc/NetworkManager/dispatcher.d'), { recursive: true });
    mkdirSync(at('/etc/selinux'));
    writeFileSync(at('/etc/selinux/config'), '');
    mkdirSync(at('/etc/firewalld'));
    put('/etc/kvm-ib/kvm-ib.yaml', CONFIG);
    const { notes } = await report(['install', 'host']);
    expect(readFileSync(at('/etc/NetworkManager/conf.d/90-kvm-ib.conf'), 'utf8')).toMatch(
      /^unmanaged-devices\+=interface-name:virbr1$/m,
    );
    expect(statSync(at('/etc/NetworkManager/dispatcher.d/50-kvm-ib')).mode & 0o7777).toBe(0o755);
    const titles = notes.map(({ title }) => title).join('\n');
    expect(titles).toMatch(/SELinux/);
    expect(titles).toMatch(/firewalld/);
    // Asked for once, the link is left out for good: taken back, NetworkManager would take its addresses off.
    const settings = '/etc/NetworkManager/conf.d/90-kvm-ib.conf';
    for (const args of [['--unmanaged-device'], []]) {
      await report(['install', 'host', ...args]);
      expect(readFileSync(at(settings), 'utf8')).toMatch(
        /^unmanaged-devices\+=interface-name:virbr1;interface-name:ib0$/m,
      );
    }
    await report(['uninstall', 'host']);
    expect(existsSync(at('/etc/NetworkManager/conf.d'))).toBe(false);
    expect(existsSync(at('/etc/NetworkManager/dispatcher.d'))).toBe(true);
  });

  test('something else in the place of a file is a conflict, and nothing is written', async () => {
    mkdirSync(at('/etc/sudoers.d/kvm-ib'), { recursive: true });
    const result = await kvmIb(['install', 'host', '--root', root]);
    expect([result.status, result.stderr]).toEqual([4, expect.stringContaining('/etc/sudoers.d/kvm-ib')]);
    expect(existsSync(at('/usr'))).toBe(false);
  });

  test('the example names no network as it stands, and is right once its comment signs are taken away', async () => {
    await report(['install', 'host']);
    const path = at('/etc/kvm-ib/kvm-ib.yaml');
    const example = readFileSync(path, 'utf8');
    const check = async (): Promise<string> => {
      const { stdout, stderr } = await kvmIb(['config', 'check', '--config', path, '--json']);
      return stdout + stderr;
    };
    expect(await check()).toContain('bad-config');
    writeFileSync(path, example.replace(/^#(?=\S| {2})/gm, ''));
    const checked = JSON.parse(await check()) as { networks: readonly object[]; static: readonly object[] };
    expect(checked).toMatchObject({
      networks: [{ name: 'ib', bridge: 'virbr1', isolate: true }],
      static: [{ guest: '192.168.122.6' }],
    });
  });

  test('a drop-in that visudo refuses stops it before anything is written', async () => {
    const [bundles, rules] = [join(root, 'package/dist'), join(root, 'package/rulesets')];
    cpSync(join(REPOSITORY, 'rulesets'), rules, { recursive: true });
    cpSync(join(REPOSITORY, 'drivers'), join(root, 'package/drivers'), { recursive: true });
    mkdirSync(bundles);
    copyBundles(bundles, ['kvm-ib.mjs', 'engine.mjs', 'parser.mjs', 'vnm.mjs']);
    writeFileSync(join(rules, 'sudoers.d/kvm-ib'), 'oneadmin ALL=(root NOPASSWD: ALL\n');
    mkdirSync(at('/target'));
    const install = (): ReturnType<typeof run> =>
      kvmIb(['install', 'host', '--root', at('/target')], join(bundles, 'kvm-ib.mjs'));
    const refused = await install();
    expect([refused.status, refused.stderr]).toEqual([1, expect.stringContaining('visudo refuses it')]);
    expect(everything(at('/target'))).toEqual([]);
    rmSync(rules, { recursive: true });
    const incomplete = await install();
    expect([incomplete.status, incomplete.stderr]).toEqual([
      6,
      expect.stringContaining('Cannot find the files to install'),
    ]);
  });

  test('the running system is for root alone', async () => {
    const nobody = ['/usr/bin/setpriv', '--reuid=65534', '--regid=65534', '--clear-groups'];
    for (const args of [
      ['install', 'host'],
      ['uninstall', 'host'],
      ['install', 'front-end'],
      ['uninstall', 'front-end'],
    ]) {
      const result = await run([...nobody, process.execPath, BUNDLE, ...args], { env: ENV });
      expect([args, result.status]).toEqual([args, 5]);
    }
  });
});

describe('the dispatcher script', () => {
  const script = join(REPOSITORY, 'rulesets/networkmanager/50-kvm-ib');

  async function dispatch(
    link: string,
    action: string,
    config: string,
    shell: readonly string[],
    systemd = false,
  ): Promise<string> {
    put('/kvm-ib.yaml', config);
    put('/bin/kvm-ib', `#!/bin/sh\necho "$@" >> ${at('/calls')}\n`, 0o755);
    rmSync(at('/calls'), { force: true });
    const text = readFileSync(script, 'utf8')
      .replace('/etc/kvm-ib/kvm-ib.yaml\n\n', `${at('/kvm-ib.yaml')}\n\n`)
      .replace('/usr/bin/kvm-ib', at('/bin/kvm-ib'))
      .replace('systemctl ', `${at('/bin/kvm-ib')} systemctl `)
      .replace('/run/systemd/system', at(systemd ? '/bin' : '/none'));
    put('/dispatcher', `${text.replace(/ &$/m, '')}`, 0o755);
    const result = await run([...shell, at('/dispatcher'), link, action], { env: ENV });
    expect([result.status, result.stdout, result.stderr]).toEqual([0, '', '']);
    return existsSync(at('/calls')) ? readFileSync(at('/calls'), 'utf8') : '';
  }

  const FLOW =
    'networks: [{ name: ib, "device": "ib0.8001", bridge: virbr2, guests: 10.0.0.0/24, addresses: 10.1.0.0/24 }]\n';
  test.each([['/usr/bin/dash'], ['/usr/bin/busybox sh']])('under %s reconciles for our links alone', async (words) => {
    const shell = words.split(' ');
    const ran = 'reconcile --quiet\n';
    for (const [link, action, config, expected] of [
      ['ib0', 'up', CONFIG, ran],
      ['ib0', 'reapply', CONFIG, ran],
      ['virbr1', 'up', CONFIG, ran],
      ['ib0', 'down', CONFIG, ''],
      ['ib1', 'up', CONFIG, ''],
      ['ib', 'up', CONFIG, ''],
      ['eth0', 'up', CONFIG, ''],
      ['none', 'hostname', CONFIG, ''],
      ['', 'connectivity-change', CONFIG, ''],
      ['.*', 'up', CONFIG, ''],
      ['ib0.8001', 'up', FLOW, ran],
      ['virbr2', 'dhcp4-change', FLOW, ran],
      ['ib0', 'up', FLOW, ''],
    ] as const) {
      expect([link, action, await dispatch(link, action, config, shell)]).toEqual([link, action, expected]);
    }
  });

  test('leaves the work to the unit where systemd runs, and does not wait', async () => {
    expect(await dispatch('ib0', 'up', CONFIG, ['/usr/bin/dash'], true)).toBe(
      'systemctl --no-block reload-or-restart kvm-ib-reconcile.service\n',
    );
  });
});

describe('on a front-end, below another root', () => {
  const remotes = '/var/lib/one/remotes';
  const NOBODY = 65_534;

  beforeEach(() => {
    put(`${remotes}/VERSION`, '6.10.0\n');
    put('/etc/passwd', `root:x:0:0::/root:/bin/sh\noneadmin:x:${NOBODY}:${NOBODY}::/var/lib/one:/bin/sh\n`);
    for (const path of ['/var/lib/one', remotes, `${remotes}/VERSION`]) chownSync(at(path), NOBODY, NOBODY);
    // The user works in it, so it must get there.
    chmodSync(root, 0o755);
  });

  test('driver and probes belong to the user of OpenNebula, may be run, and are complete', async () => {
    const result = await report(['install', 'front-end']);
    const installed = everything(at(remotes)).map((path) => `${remotes}${path}`);
    for (const path of installed) expect([path, lstatSync(at(path)).uid]).toEqual([path, NOBODY]);
    const actions = readdirSync(join(REPOSITORY, 'drivers/vmm/kvm-ib')).filter((name) => !name.includes('.'));
    expect(actions.length).toBeGreaterThan(20);
    for (const path of [
      ...actions.map((action) => `vmm/kvm-ib/${action}`),
      'im/kvm-probes.d/host/system/kvm-ib.sh',
      'im/kvm-probes.d/vm/monitor/kvm-ib.sh',
      'hooks/kvm-ib/vm-gone.sh',
    ]) {
      expect([path, statSync(at(`${remotes}/${path}`)).mode & 0o7777]).toEqual([path, 0o755]);
    }
    const files = installed.filter((path) => lstatSync(at(path)).isFile() && !path.endsWith('VERSION'));
    expect(result.synced).toEqual({
      files: files.length,
      bytes: files.reduce((sum, path) => sum + statSync(at(path)).size, 0),
    });
    expect((await report(['install', 'front-end'])).changed).toBe(false);
    // What the documentation says of it, to a tenth.
    const said = /about ([0-9]+) kB in ([0-9]+) files/.exec(
      readFileSync(join(REPOSITORY, 'docs/install-command.md'), 'utf8'),
    );
    expect(Number(said?.[2])).toBe(files.length);
    expect(Math.abs(Number(said?.[1]) * 1000 - (result.synced?.bytes ?? 0)) / (result.synced?.bytes ?? 1)).toBeLessThan(
      0.1,
    );
  });

  test('the configuration is put beside once, serves later runs, and goes with --purge unless a host has it too', async () => {
    const path = '/etc/kvm-ib/kvm-ib.yaml';
    put('/given.yaml', CONFIG.replace('name: ib', 'name: fast'));
    put('/other.yaml', CONFIG.replace('name: ib', 'name: slow'));
    expect(signOf(await report(['install', 'front-end', '--config', at('/given.yaml')]), path)).toBe('+');
    expect([statSync(at(path)).uid, statSync(at(path)).mode & 0o7777]).toEqual([0, 0o644]);
    const later = await report(['install', 'front-end']);
    expect(later.notes.map(({ text }) => text).join('\n')).toContain('"fast-guests"');
    expect(signOf(await report(['install', 'front-end', '--config', at('/other.yaml')]), path)).toBe('!');
    expect(readFileSync(at(path), 'utf8')).toContain('name: fast');
    expect(signOf(await report(['uninstall', 'front-end']), path)).toBe('!');
    await report(['install', 'front-end']);
    await report(['install', 'host']);
    expect(signOf(await report(['uninstall', 'host', '--dry-run', '--purge']), path)).toBe('!');
    expect(signOf(await report(['uninstall', 'front-end', '--purge']), path)).toBe('!');
    await report(['uninstall', 'host', '--purge']);
    expect(existsSync(at('/etc/kvm-ib'))).toBe(false);
  });

  test('sections and templates are written to files that OpenNebula takes, and one that was changed is kept', async () => {
    const directory = at('/templates');
    const args = ['install', 'front-end', '--config', at('/given.yaml'), '--templates', directory];
    put('/given.yaml', CONFIG);
    await report([...args, '--dry-run']);
    expect(existsSync(directory)).toBe(false);
    const { notes } = await report(args);
    expect(readdirSync(directory).sort()).toEqual([
      'ib-addresses.net',
      'ib-guests.net',
      'ib-vm.txt',
      'kvm-ib-done.hook',
      'kvm-ib-poweroff.hook',
      'vm_mad.conf',
    ]);
    expect(readFileSync(join(directory, 'ib-guests.net'), 'utf8')).toMatch(/^VN_MAD +="? *"dummy"$/m);
    const text = notes.map((note) => note.text).join('\n');
    for (const command of [
      `onevnet create ${directory}/ib-guests.net`,
      `onevnet create ${directory}/ib-addresses.net`,
      `onehook create ${directory}/kvm-ib-done.hook`,
    ]) {
      expect(text).toContain(command);
    }
    expect((await report(args)).changed).toBe(false);
    writeFileSync(join(directory, 'ib-guests.net'), 'NAME = "mine"\n');
    expect((await report(args)).operations.find(({ path }) => path.endsWith('ib-guests.net'))?.sign).toBe('!');
    expect(readFileSync(join(directory, 'ib-guests.net'), 'utf8')).toBe('NAME = "mine"\n');
  });

  test('the network driver comes in place of the VMM driver, or beside one that is there, and goes without a trace', async () => {
    const before = everything(root);
    const vnm = `${remotes}/vnm/kvm-ib`;
    const result = await report(['install', 'front-end', '--vnm']);
    expect(existsSync(at(`${remotes}/vmm/kvm-ib`))).toBe(false);
    for (const name of ['pre', 'post', 'clean', 'update_nic', 'update_sg', 'vnet_create', 'vnet_delete']) {
      const { mode, uid } = lstatSync(at(`${vnm}/${name}`));
      expect([name, mode & 0o7777, uid]).toEqual([name, 0o755, NOBODY]);
    }
    expect(statSync(at(`${vnm}/vnm.mjs`)).size).toBeGreaterThan(10_000);
    const text = result.notes.map((note) => `${note.title}\n${note.text}`).join('\n');
    expect(text).toMatch(/VN_MAD_CONF = \[\n +NAME += "kvm-ib",\n +BRIDGE_TYPE = "linux"\n\]/);
    expect(text).toMatch(/^VN_MAD += "kvm-ib"$/m);
    expect(text).not.toMatch(/VM_MAD = \[|onehost create/);
    expect((await report(['install', 'front-end', '--vnm'])).changed).toBe(false);

    put('/etc/one/oned.conf', 'VN_MAD_CONF = [ name = "kvm-ib", BRIDGE_TYPE = "linux" ]\n');
    const registered = await report(['install', 'front-end', '--vnm']);
    expect(registered.notes.map((note) => note.text).join('\n')).not.toMatch(/VN_MAD_CONF|restart/);
    rmSync(at('/etc/one'), { recursive: true });

    // A run without the option brings both up to date.
    writeFileSync(at(`${vnm}/pre`), '#!/bin/sh\n');
    expect(signOf(await report(['install', 'front-end']), `${vnm}/pre`)).toBe('~');
    expect(existsSync(at(`${remotes}/vmm/kvm-ib/deploy`))).toBe(true);
    expect(signOf(await report(['install', 'front-end', '--vnm']), `${remotes}/vmm/kvm-ib/deploy`)).toBe('=');
    await report(['uninstall', 'front-end']);
    expect(everything(root)).toEqual([...before]);
  });

  test('as hooks of another network driver, which keeps its name', async () => {
    for (const name of ['dummy', 'bridge', 'nodeport']) put(`${remotes}/vnm/${name}/pre`, '#!/bin/sh\n', 0o755);
    for (const path of ['', ...everything(at(`${remotes}/vnm`))])
      chownSync(at(`${remotes}/vnm${path}`), NOBODY, NOBODY);
    const directory = at('/templates');
    const { notes } = await report(['install', 'front-end', '--hooks-of', 'bridge,dummy', '--templates', directory]);
    for (const name of ['bridge', 'dummy']) {
      for (const action of ['pre', 'post', 'clean']) {
        const path = at(`${remotes}/vnm/${name}/${action}.d/kvm-ib`);
        expect([path, lstatSync(path).isFile(), statSync(path).mode & 0o7777]).toEqual([path, true, 0o755]);
      }
    }
    const text = notes.map((note) => `${note.title}\n${note.text}`).join('\n');
    expect(text).not.toContain('VN_MAD_CONF');
    expect(readdirSync(directory)).not.toContain('vn_mad.conf');
    const network = readFileSync(join(directory, 'ib-guests.net'), 'utf8');
    expect(network).toMatch(/^VN_MAD += "bridge"$/m);
    expect(network).toMatch(/^CONF += "keep_empty_bridge=true"$/m);
    const hook = await run([at(`${remotes}/vnm/bridge/pre.d/kvm-ib`)], { env: { ...ENV, KVM_IB_CONFIG: at('/none') } });
    expect(hook).toMatchObject({ status: 0, stdout: '', stderr: '' });
    for (const wrong of ['ovswitch', 'nodeport', 'kvm-ib', '', '../vmm', 'dummy,none']) {
      const refused = await kvmIb(['install', 'front-end', '--root', root, '--hooks-of', wrong]);
      expect([wrong, refused.status]).toEqual([wrong, 2]);
    }
    await report(['uninstall', 'front-end']);
    expect(everything(at(`${remotes}/vnm`)).filter((path) => path.includes('kvm-ib'))).toEqual([]);
    expect(existsSync(at(`${remotes}/vnm/bridge/pre`))).toBe(true);
  });

  test('another network driver of that name is not written over', async () => {
    put(`${remotes}/vnm/kvm-ib/pre`, '#!/bin/sh\n', 0o755);
    const refused = await kvmIb(['install', 'front-end', '--root', root, '--vnm']);
    expect([refused.status, refused.stderr]).toEqual([4, expect.stringContaining(`mv ${remotes}/vnm/kvm-ib `)]);
    await report(['install', 'front-end']);
    expect(everything(at(`${remotes}/vnm`))).toEqual(['/kvm-ib', '/kvm-ib/pre']);
  });

  test('a launcher from there finds its parser and the stock script', async () => {
    await report(['install', 'front-end']);
    put(`${remotes}/vmm/kvm/poll`, '#!/bin/sh\necho "stock $*"\n', 0o755);
    const result = await run([at(`${remotes}/vmm/kvm-ib/poll`), 'one-42', 'host', '42', 'host'], { env: ENV });
    expect(result.stdout).toBe('stock one-42 host 42 host\n');
    const parsed = await run([at(`${remotes}/vmm/kvm-ib/deploy`)], { env: ENV });
    expect(parsed.status).not.toBe(0);
    expect(parsed.stderr).toMatch(/^kvm-ib: /m);
    expect(parsed.stderr).not.toContain('parser.mjs is neither');
  });

  test('a link that was planted there does not lead the writing of root elsewhere', async () => {
    mkdirSync(at('/precious'));
    mkdirSync(at(`${remotes}/vmm`));
    chownSync(at(`${remotes}/vmm`), NOBODY, NOBODY);
    symlinkSync(at('/precious'), at(`${remotes}/im`));
    const inside = await kvmIb(['install', 'front-end', '--root', root]);
    expect([inside.status, inside.stderr]).toEqual([4, expect.stringContaining('/im')]);
    rmSync(at(remotes), { recursive: true });
    symlinkSync(at('/precious'), at(remotes));
    const above = await kvmIb(['install', 'front-end', '--root', root, '--one-version', '7.0']);
    expect([above.status, above.stderr]).toEqual([5, expect.stringContaining('permission denied')]);
    expect(everything(at('/precious'))).toEqual([]);
  });

  test('uninstalling leaves what was there before', async () => {
    put(`${remotes}/im/kvm-probes.d/host/system/stock.sh`, '', 0o755);
    for (const path of everything(at(remotes))) chownSync(at(`${remotes}${path}`), NOBODY, NOBODY);
    const before = everything(root);
    await report(['install', 'front-end']);
    await report(['uninstall', 'front-end']);
    expect(everything(root)).toEqual(before);
  });

  test('an older driver of the same name is not written over, and its name stays', async () => {
    const scripts = `${remotes}/vmm/kvm-ib`;
    put(`${scripts}/deploy`, '#!/bin/sh\n', 0o755);
    put('/etc/one/oned.conf', 'VM_MAD = [ name = "vmm_kvm_ib", arguments = "-t 15 -r 0 kvm-ib", type = "kvm" ]\n');
    const refused = await kvmIb(['install', 'front-end', '--root', root]);
    expect(refused.status).toBe(4);
    expect(refused.stderr).toContain(`mv ${scripts} /var/lib/one/kvm-ib-before`);
    expect(readFileSync(at(`${scripts}/deploy`), 'utf8')).toBe('#!/bin/sh\n');
    rmSync(at(`${remotes}/vmm`), { recursive: true });
    const { notes } = await report(['install', 'front-end']);
    const text = notes.map((note) => `${note.title}\n${note.text}`).join('\n');
    expect(text).toMatch(/VM_MAD "vmm_kvm_ib" in \/etc\/one\/oned.conf up to date[\s\S]*NAME += "vmm_kvm_ib"/);
    expect(text).toContain('onehost create HOST -i kvm -v vmm_kvm_ib');
    expect((await report(['install', 'front-end'])).changed).toBe(false);
  });

  describe('the name of the driver', () => {
    const conf = '/etc/one/oned.conf';
    const execrc = '/etc/one/vmm_exec/vmm_execrc';
    const ONED = `# a site's own\nVM_MAD = [\n  NAME = "kvm",\n  ARGUMENTS = "-t 50 -r 0 kvm -p -w 900",\n  TYPE = "kvm"\n]\nX = "1"\n`;
    const WORDS = 'LIVE_DISK_SNAPSHOTS="kvm-qcow2 kvm-ssh"\n';
    const texts = (): readonly string[] => [readFileSync(at(conf), 'utf8'), readFileSync(at(execrc), 'utf8')];
    const rights = (path: string): readonly number[] => {
      const { uid, gid, mode } = statSync(at(path));
      return [uid, gid, mode & 0o7777];
    };

    beforeEach(() => {
      put(conf, ONED, 0o640);
      put(execrc, WORDS, 0o644);
      chownSync(at(conf), 0, NOBODY);
    });

    test('kvm-ib is written into both files with their rights, shown before, and taken out again', async () => {
      const args = ['install', 'front-end', '--driver-name', 'kvm-ib'];
      const plan = await report([...args, '--dry-run']);
      expect([signOf(plan, conf), signOf(plan, execrc)]).toEqual(['~', '~']);
      expect(plan.notes.find(({ title }) => title === `Lines of ${execrc}`)?.text).toBe(
        `- ${WORDS}+ ${WORDS.replace('ssh', 'ssh kvm-ib-qcow2 kvm-ib-ssh')}`.trim(),
      );
      expect(texts()).toEqual([ONED, WORDS]);
      expect((await report(args)).operations).toEqual(plan.operations);
      expect(texts()[0]).toMatch(/^# a site's own\n[\s\S]*X = "1"\n[\s\S]*NAME +\S* *= "kvm-ib"/);
      expect([rights(conf), rights(execrc)]).toEqual([
        [0, NOBODY, 0o640],
        [0, 0, 0o644],
      ]);
      expect((await report(args)).changed).toBe(false);
      expect((await report(['install', 'front-end'])).notes.map(({ text }) => text).join()).not.toContain('VM_MAD = [');
      await report(['uninstall', 'front-end', '--dry-run']);
      expect(texts()[0]).not.toBe(ONED);
      await report(['uninstall', 'front-end']);
      expect(texts()).toEqual([ONED, WORDS]);
      expect(rights(conf)).toEqual([0, NOBODY, 0o640]);
    });

    test('kvm is one word, the rest of its ARGUMENTS stays; from there to kvm-ib and back', async () => {
      const kvm = ONED.replace('0 kvm -p', '0 kvm-ib -p');
      const first = await report(['install', 'front-end', '--driver-name', 'kvm']);
      expect(texts()).toEqual([kvm, WORDS]);
      const told = first.notes.map(({ title, text }) => `${title}\n${text}`).join('\n');
      expect(told).toMatch(/Have kvm-ib on every host of the driver "kvm" before the restart/);
      expect(told).toContain('onehost create HOST -i kvm -v kvm -c CLUSTER');
      await report(['install', 'front-end', '--templates', at('/templates')]);
      expect(readdirSync(at('/templates'))).not.toContain('vm_mad.conf');
      const second = await report(['install', 'front-end', '--driver-name', 'kvm-ib']);
      expect(second.notes.map(({ text }) => text).join()).toContain('uninstall front-end --driver-name kvm');
      expect(texts()[0]).toMatch(/0 kvm-ib -p[\s\S]*"kvm-ib"/);
      await report(['uninstall', 'front-end', '--driver-name', 'kvm']);
      expect(texts()[0]).toMatch(/0 kvm -p[\s\S]*"kvm-ib"/);
      // A name alone leaves the driver where it is.
      expect(existsSync(at(`${remotes}/vmm/kvm-ib/deploy`))).toBe(true);
      await report(['uninstall', 'front-end', '--driver-name', 'kvm-ib']);
      expect(texts()).toEqual([ONED, WORDS]);
      expect((await report(['uninstall', 'front-end', '--driver-name', 'kvm-ib'])).changed).toBe(false);
    });

    test('nothing is written, the driver neither, where that cannot be done without harm', async () => {
      const install = (name: string): ReturnType<typeof run> =>
        kvmIb(['install', 'front-end', '--root', root, '--driver-name', name]);
      for (const [name, text, status, said] of [
        ['kvm', ONED.replace('0 kvm ', '0 site '), 4, 'runs the folder "site" now'],
        ['kvm', 'VM_MAD = [ NAME = "x" ]\n', 6, 'no section VM_MAD of that name'],
        ['qemu', ONED, 2, 'kvm-ib, kvm'],
      ] as const) {
        put(conf, text);
        const refused = await install(name);
        expect([refused.status, refused.stderr]).toEqual([status, expect.stringContaining(said)]);
        expect(readFileSync(at(conf), 'utf8')).toBe(text);
      }
      writeFileSync(at(conf), Buffer.from(`# caf\u00e9\n${ONED}`, 'latin1'));
      const latin = await install('kvm');
      expect([latin.status, latin.stderr]).toEqual([4, expect.stringContaining('not in UTF-8')]);
      rmSync(at(conf));
      put('/precious', ONED);
      symlinkSync(at('/precious'), at(conf));
      const link = await install('kvm');
      expect([link.status, link.stderr]).toEqual([6, expect.stringContaining('no plain file')]);
      expect(readFileSync(at('/precious'), 'utf8')).toBe(ONED);
      expect(existsSync(at(`${remotes}/vmm`))).toBe(false);
    });

    test('without a choice both are explained, and nothing is written', async () => {
      const { notes } = await report(['install', 'front-end']);
      expect(notes[0]?.title).toContain('First choose the name of the driver');
      expect(notes[0]?.text).toContain('--driver-name kvm --dry-run');
      expect(texts()).toEqual([ONED, WORDS]);
    });
  });

  test('texts follow the installed version, what is in oned.conf already, and the configuration that is given', async () => {
    put('/etc/one/oned.conf', 'VM_MAD = [\n  NAME = "kvm",\n  IMPORTED_VMS_ACTIONS = "terminate, resume"\n]\n');
    put('/given.yaml', CONFIG.replace('name: ib', 'name: fast'));
    const texts = async (...args: string[]): Promise<string> =>
      (await report(['install', 'front-end', ...args])).notes.map(({ title, text }) => `${title}\n${text}`).join('\n');
    const six = await texts('--config', at('/given.yaml'), '--mtu', '4092');
    expect(six).toContain('IMPORTED_VMS_ACTIONS = "terminate, resume"');
    expect(six).toContain('GUEST_MTU       = "4092"');
    expect(six).toContain('NAME            = "fast-guests"');
    expect(six).not.toContain('an example');
    expect(await texts('--one-version', '7.0')).not.toContain('IMPORTED_VMS_ACTIONS');
    put('/etc/one/oned.conf', 'VM_MAD = [\n  NAME = "kvm-ib",\n  TYPE = "kvm"\n]\n');
    expect(await texts()).not.toContain('VM_MAD = [');
    for (const wrong of [
      ['--one-version', '5.12'],
      ['--one-version', 'x'],
      ['--mtu', '0'],
      ['--mtu', '1e3'],
    ]) {
      expect((await kvmIb(['install', 'front-end', '--root', root, ...wrong])).status).not.toBe(0);
    }
  });
});

describe('on the running system', () => {
  /** systemctl as far as the installer knows it; what it was told stands in /run/systemctl. */
  const SYSTEMCTL = `#!/bin/sh
echo "$*" >> /run/systemctl
case "$*" in
  *is-enabled* | *is-active*) [ -e /run/enabled ] ;;
  enable*) : > /run/enabled ;;
  disable*) rm -f /run/enabled ;;
esac
`;
  /** onehost of a front-end with one host of each driver; fails unless /run/running says how many VMs run. */
  const ONEHOST = `#!/bin/sh
read -r running < /run/running || exit 255
host() { echo "<HOST><NAME>$1</NAME><VM_MAD><![CDATA[$2]]></VM_MAD><HOST_SHARE><RUNNING_VMS>$3</RUNNING_VMS></HOST_SHARE></HOST>"; }
echo '<HOST_POOL>'
host other kvm 7
host kvmib01 kvm-ib "$running"
echo '</HOST_POOL>'
`;
  /** onevnet of a front-end with one virtual network of our driver, and one of another. */
  const ONEVNET = `#!/bin/sh
read -r leases < /run/leases || exit 255
vnet() { echo "<VNET><ID>$1</ID><NAME>$2</NAME><VN_MAD><![CDATA[$3]]></VN_MAD><USED_LEASES>$4</USED_LEASES><TEMPLATE/></VNET>"; }
echo '<VNET_POOL>'
vnet 1 other dummy 7
vnet 2 ib-guests kvm-ib "$leases"
echo '</VNET_POOL>'
`;
  /** nmcli where NetworkManager runs both links by profiles of its own. */
  const NMCLI = "#!/bin/sh\nprintf '%s\\n' ib0:connected virbr1:connected lo:unmanaged\n";
  const SCRIPT = `
given=$1
for directory in etc usr var; do
  mkdir -p $given/layer/$directory.upper $given/layer/$directory.work
  mount -t overlay overlay -o lowerdir=/$directory,upperdir=$given/layer/$directory.upper,workdir=$given/layer/$directory.work /$directory
done
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system
install -m 0755 $given/systemctl /usr/bin/systemctl
echo 'oneadmin:x:9869:9869::/var/lib/one:/bin/sh' >> /etc/passwd
echo 'oneadmin:x:9869:' >> /etc/group
echo 'oneadmin:*:19000::::::' >> /etc/shadow
install -d -o 9869 -g 9869 /var/lib/one /var/lib/one/remotes /var/lib/one/remotes/vmm /var/lib/one/remotes/vmm/kvm
echo 7.0.0 > /var/lib/one/remotes/VERSION
printf '#!/bin/sh\\ncat > /dev/null\\necho %s\\n' one-42 > /var/lib/one/remotes/vmm/kvm/deploy
cp /var/lib/one/remotes/vmm/kvm/deploy /var/lib/one/remotes/vmm/kvm/cancel
chmod 755 /var/lib/one/remotes/vmm/kvm/*
for action in pre post clean; do mkdir -p /var/lib/one/remotes/vnm/dummy/$action.d; done
chown -R 9869:9869 /var/lib/one/remotes/vnm
ip link add ib0 mtu 2044 type veth peer name fabric
ip link add virbr1 type bridge
for link in fabric ib0 virbr1; do ip link set $link up; done
ip address add 192.168.10.1/24 dev ib0
ip address add 192.168.122.1/24 dev virbr1

files() { (cd $given/layer && find . -path '*.work' -prune -o ! -type d -print | sort); }
say() { echo "== $1"; }
# KEY=status, and what it printed.
try() { name=$1; shift; say "$name"; status=0; "$@" 2>&1 || status=$?; echo "status=$status"; }
as() { runuser -u oneadmin -- "$@"; }

# Every place that an installation touches, directories too.
tree() { (find /etc /usr/bin /usr/share/man /var/lib/one -xdev; ls -d /usr/lib/* /var/lib/*) | sort; }

iptables-legacy -t nat -A PREROUTING -d 192.168.10.202 -j DNAT --to-destination 192.168.122.2
iptables-legacy -t nat -A POSTROUTING -s 192.168.122.2 -o ib0 -j SNAT --to-source 192.168.10.202
try old-rules $NODE $BUNDLE install host --config $given/kvm-ib.yaml
iptables-legacy -t nat -F

files > $given/before
tree > $given/tree-before
try install $NODE $BUNDLE install host --config $given/kvm-ib.yaml
try again kvm-ib install host
try told cat /run/systemctl
try sysctl cat /proc/sys/net/ipv4/ip_forward
try sudo as sudo -n /usr/lib/kvm-ib/kvm-ib-engine < /dev/null
try front-end kvm-ib install front-end
try deploy as /var/lib/one/remotes/vmm/kvm-ib/deploy $given/datastores/42/deployment.0 host 42 host < $given/domain.xml
try reconcile kvm-ib reconcile
try alias ip -o -4 address show dev ib0
try host-probe as /var/lib/one/remotes/im/kvm-probes.d/host/system/kvm-ib.sh kvm 3 kvmib01
try vm-probe as /var/lib/one/remotes/im/kvm-probes.d/vm/monitor/kvm-ib.sh kvm 3 kvmib01
# As an older version: one program and one unit differ, and both are what it put there.
kernel() { nft -a list table ip kvm_ib; ip -4 address show dev ib0; cat /var/lib/kvm-ib/mappings/*; }
kernel > $given/kernel-before
echo '// older' > /usr/lib/kvm-ib/engine.mjs
echo '# older' >> /etc/systemd/system/kvm-ib.timer
$NODE -e '
const fs = require("fs"), path = "/usr/lib/kvm-ib/installed.json", unit = "/etc/systemd/system/kvm-ib.timer";
const record = JSON.parse(fs.readFileSync(path, "utf8"));
record.files[unit] = require("crypto").createHash("sha256").update(fs.readFileSync(unit)).digest("hex");
delete record.networks;
fs.writeFileSync(path, JSON.stringify(record));'
rm -f /run/systemctl
try upgrade $NODE $BUNDLE install host
try told-at-upgrade cat /run/systemctl
try reconciled kvm-ib reconcile
kernel > $given/kernel-after
try kernel-difference diff $given/kernel-before $given/kernel-after
mkdir /etc/NetworkManager
install -m 0755 $given/nmcli /usr/bin/nmcli
try nm-runs-it kvm-ib install host --unmanaged-device
try nm-bridge kvm-ib install host --dry-run
rm -r /etc/NetworkManager /usr/bin/nmcli
try refused kvm-ib uninstall host
try still-there kvm-ib list
try cut-off kvm-ib remove --vm 42
try network-driver kvm-ib install front-end --hooks-of dummy
network() { as /var/lib/one/remotes/vnm/"$1" < $given/network-vm; }
try network-pre network dummy/pre.d/kvm-ib
try network-alias ip -o -4 address show dev ib0
try network-gone kvm-ib remove --vm 43
install -m 0755 $given/onevnet /usr/bin/onevnet
echo 2 > /run/leases
install -m 0755 $given/onehost /usr/bin/onehost
echo 1 > /run/running
try busy kvm-ib uninstall front-end
rm /run/running
try silent kvm-ib uninstall front-end
echo 0 > /run/running
try leased kvm-ib uninstall front-end
echo 0 > /run/leases
try uninstall-front-end kvm-ib uninstall front-end
rm /usr/bin/onehost /usr/bin/onevnet
rm -f /run/systemctl
try uninstall kvm-ib uninstall host --purge
try told-again cat /run/systemctl
try tables nft list tables
try nothing $NODE $BUNDLE uninstall host --purge
try left sh -c "ls -d /var/lib/kvm-ib /run/kvm-ib /usr/lib/kvm-ib /etc/kvm-ib /usr/bin/kvm-ib 2> /dev/null"
files > $given/after
try difference diff $given/before $given/after
tree > $given/tree-after
try tree-difference diff $given/tree-before $given/tree-after
`;

  test('installed, the driver maps a VM through sudo, probes show it; uninstalled, nothing is left', async () => {
    const vm = testVm(42);
    chmodSync(root, 0o755);
    put('/script', SCRIPT);
    put('/systemctl', SYSTEMCTL);
    put('/onehost', ONEHOST);
    put('/onevnet', ONEVNET);
    const version = VNM_VERSIONS.at(-1) as VnmVersion;
    const call = networkCall(version, 'pre', { vm: testVm(43, [3]), deployed: false, host: 'host' });
    put('/network-vm', call.stdin ?? '');
    put('/nmcli', NMCLI);
    put('/kvm-ib.yaml', CONFIG);
    put('/domain.xml', `${domainOf(vm)}\n`);
    put('/datastores/42/vm.xml', `${vmXmlOf(vm)}\n`);
    const result = await run([join(REPOSITORY, 'scripts/in-netns.sh'), 'sh', '-eu', at('/script'), root], {
      env: { ...ENV, NODE: process.execPath, BUNDLE },
      limit: 60_000,
    });
    expect([result.status, result.stderr], result.stdout).toEqual([0, '']);
    const said: Record<string, string> = {};
    for (const part of result.stdout.split(/^== /m).slice(1)) {
      const [name = '', ...lines] = part.trimEnd().split('\n');
      said[name] = lines.join('\n');
    }
    const of = (name: string): string => said[name] ?? '';
    const done = (name: string): void => expect(`${name}: ${of(name)}`).toMatch(/status=0$/);

    expect(of('old-rules')).toMatch(
      /rules of iptables translate 192\.168\.122\.2 still[\s\S]* import --config [\s\S]*status=4$/,
    );
    done('install');
    expect(of('install')).toContain('+ file /etc/sudoers.d/kvm-ib (0440, root');
    done('again');
    expect(of('again')).toMatch(/^Nothing to change\.$/m);
    expect(
      of('told')
        .split('\n')
        .filter((line) => !line.startsWith('--quiet')),
    ).toEqual(['daemon-reload', 'enable --now kvm-ib-reconcile.service kvm-ib.timer', 'status=0']);
    expect(of('sysctl')).toBe('1\nstatus=0');
    expect(of('sudo')).toBe('status=0');
    done('front-end');
    expect(of('front-end')).toMatch(/`onehost sync` copies [0-9]+ kB in [0-9]+ files more to each host/);
    expect(of('deploy')).toBe('one-42\nstatus=0');
    done('reconcile');
    expect(of('alias')).toContain('192.168.10.202/32');
    expect(of('host-probe')).toMatch(
      /^KVM_IB_STATUS="OK"\nKVM_IB_DRIFT="0"\nKVM_IB_OUTDATED="0"\nKVM_IB_CONFIG="[0-9a-f]{16}"\nKVM_IB_RULESET="[0-9a-f]{8}"\n/,
    );
    const monitor = /^VM = \[ ID="42", MONITOR="([^"]*)" \]\nstatus=0$/.exec(of('vm-probe'))?.[1] ?? '';
    expect(Buffer.from(monitor, 'base64').toString().split('\n')).toEqual([
      'KVM_IB_STATE="OK"',
      'KVM_IB_DRIFT="0"',
      'KVM_IB_OUTDATED="0"',
      ...['RX_PACKETS', 'RX_BYTES', 'TX_PACKETS', 'TX_BYTES'].map((key) => `KVM_IB_${key}="0"`),
      'KVM_IB_ADDRESSES="192.168.10.202"',
      '',
    ]);
    done('upgrade');
    expect(of('upgrade')).toContain('~ file /usr/lib/kvm-ib/engine.mjs');
    expect(of('upgrade')).toContain('~ file /etc/systemd/system/kvm-ib.timer');
    expect(
      of('told-at-upgrade')
        .split('\n')
        .filter((line) => !line.startsWith('--quiet')),
    ).toEqual(['daemon-reload', 'reload-or-restart kvm-ib-reconcile.service', 'status=0']);
    done('reconciled');
    expect(of('kernel-difference')).toBe('status=0');
    expect(of('nm-runs-it')).toMatch(/Cannot take ib0 from NetworkManager[\s\S]*status=4$/);
    expect(of('nm-bridge')).toMatch(/NetworkManager runs the bridge virbr1 by a profile of its own/);
    expect(of('refused')).toMatch(/VMs are mapped: 42[\s\S]*status=4$/);
    expect(of('still-there')).toContain('192.168.10.202');
    expect(of('busy')).toMatch(/VMs run on hosts of this driver: kvmib01\n[\s\S]*status=4$/);
    expect(of('silent')).toMatch(/does not say which hosts use it[\s\S]*status=4$/);
    // The network driver, by sudo too; its engine stays behind until the claim is gone.
    done('network-driver');
    expect(of('network-pre')).toBe('status=0');
    expect(of('network-alias')).toMatch(/192\.168\.10\.203\/32 scope global ib0:43-0/);
    done('network-gone');
    expect(of('leased')).toMatch(/virtual networks with this driver have leases: ib-guests\n[\s\S]*status=4$/);
    for (const name of ['cut-off', 'uninstall-front-end', 'uninstall']) done(name);
    expect(of('told-again')).toBe('disable --now kvm-ib.timer kvm-ib-reconcile.service\ndaemon-reload\nstatus=0');
    expect(of('tables')).toBe('status=0');
    expect(of('nothing')).toBe('Nothing to change.\nstatus=0');
    expect(of('left')).toBe('status=2');
    expect(of('difference')).toBe('status=0');
    expect(of('tree-difference')).toBe('status=0');
  });
});
