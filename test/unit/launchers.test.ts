/** The folders drivers/vmm/kvm-ib and drivers/vnm/kvm-ib: a launcher for each action of the contract, none beside them, all plain sh. */
import { execFileSync, spawnSync } from 'node:child_process';
import {
  chmodSync,
  cpSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { ACTIONS, treatmentOf } from '../../lib/opennebula/contract.ts';
import { NETWORK_ACTIONS } from '../../lib/opennebula/vnm.ts';

const FOLDER = join(import.meta.dirname, '../../drivers/vmm/kvm-ib');
const files = readdirSync(FOLDER);
const launchers = files.filter((name) => !name.includes('.') && name !== 'README');
const SHELLS = ['/bin/dash', '/bin/bash'];

test('every action of the contract has a launcher, and every launcher an action', () => {
  expect(launchers.sort()).toEqual(Object.keys(ACTIONS).sort());
});

test.each(launchers)('%s is an executable file, not a link, and reads as the others do', (name) => {
  const path = join(FOLDER, name);
  const stat = statSync(path);
  expect(stat.isFile() && (stat.mode & 0o111) === 0o111).toBe(true);
  expect(readFileSync(path, 'utf8')).toBe(readFileSync(join(FOLDER, 'deploy'), 'utf8'));
  expect(readFileSync(path, 'utf8')).toMatch(/^#!\/bin\/sh\n/);
});

test('what the launchers share is not taken for an action', () => {
  expect(statSync(join(FOLDER, 'launch.sh')).mode & 0o111).toBe(0);
});

test.each(['launch.sh', 'deploy'])('%s is sound in sh, dash and bash', (name) => {
  for (const shell of ['/bin/sh', ...SHELLS]) {
    expect(execFileSync(shell, ['-n', join(FOLDER, name)], { encoding: 'utf8', stdio: 'pipe' })).toBe('');
  }
});

describe.each(SHELLS)('run by %s', (shell) => {
  let folder: string;
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), 'kvm-ib-launchers-'));
    cpSync(FOLDER, join(folder, 'vmm/kvm-ib'), { recursive: true });
    mkdirSync(join(folder, 'vmm/kvm'));
    // In the parser's place: prints its arguments, so that what goes to it shows.
    writeFileSync(join(folder, 'vmm/kvm-ib/parser.mjs'), 'console.log(["parser", ...process.argv.slice(2)].join("|"))');
    for (const action of launchers) {
      const path = join(folder, 'vmm/kvm', action);
      writeFileSync(path, '#!/bin/sh\nprintf "stock"; printf "|%s" "$0" "$@"; echo\n');
      chmodSync(path, 0o755);
    }
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  test.each(launchers)('%s goes where its treatment says, with its arguments as they are', (action) => {
    const path = join(folder, 'vmm/kvm-ib', action);
    const args = ['a  b', '', '*', '$HOME', "'"];
    const env = { PATH: `/usr/bin:/bin:${join(process.execPath, '..')}`, NODE_OPTIONS: '--nonsense' };
    const answer = execFileSync(shell, [path, ...args], { encoding: 'utf8', env, cwd: '/' });
    const stock = join(folder, 'vmm/kvm-ib/../kvm', action).replace('kvm-ib/../', '');
    const said = answer.trimEnd().replace('kvm-ib/../', '');
    const start = treatmentOf(action) === 'pass' ? ['stock', stock] : ['parser', action, stock];
    expect(said).toBe([...start, ...args].join('|'));
  });

  test('a launcher called from its own folder finds its files', () => {
    const env = { PATH: `/usr/bin:/bin:${join(process.execPath, '..')}` };
    const answer = execFileSync(shell, ['./poll', 'x'], { encoding: 'utf8', env, cwd: join(folder, 'vmm/kvm-ib') });
    expect(answer).toMatch(/^stock\|.*\/kvm\/poll\|x\n$/);
  });
});

describe('the network driver', () => {
  const VNM = join(import.meta.dirname, '../../drivers/vnm/kvm-ib');
  const IDLE = ['update_sg', 'vnet_create', 'vnet_delete'];
  const names = readdirSync(VNM).filter((name) => !name.includes('.'));

  test('has the launchers that OpenNebula looks for, all alike, executable and no links', () => {
    expect(names.sort()).toEqual([...NETWORK_ACTIONS, ...IDLE].sort());
    for (const name of names) {
      const path = join(VNM, name);
      expect([name, lstatSync(path).isFile(), lstatSync(path).mode & 0o111]).toEqual([name, true, 0o111]);
      expect(readFileSync(path, 'utf8')).toBe(readFileSync(join(VNM, 'pre'), 'utf8'));
    }
    expect(statSync(join(VNM, 'launch.sh')).mode & 0o111).toBe(0);
  });

  describe.each(SHELLS)('run by %s', (shell) => {
    let folder: string;
    const env = { PATH: `/usr/bin:/bin:${join(process.execPath, '..')}` };
    const config = () => join(folder, 'kvm-ib.yaml');
    beforeAll(() => {
      folder = mkdtempSync(join(tmpdir(), 'kvm-ib-vnm-launchers-'));
      cpSync(VNM, join(folder, 'vnm/kvm-ib'), { recursive: true });
      writeFileSync(
        join(folder, 'vnm/kvm-ib/vnm.mjs'),
        'console.log([process.env.NODE_OPTIONS, ...process.argv.slice(2)].join("|"))',
      );
      for (const hooks of ['bridge/pre.d', 'bridge/post.d', 'dummy/clean.d']) {
        mkdirSync(join(folder, 'vnm', hooks), { recursive: true });
        // What rsync -L makes of a link into our folder.
        cpSync(join(VNM, 'pre'), join(folder, 'vnm', hooks, 'kvm-ib'));
      }
      writeFileSync(join(folder, 'kvm-ib.yaml'), '');
    });
    afterAll(() => rmSync(folder, { recursive: true, force: true }));
    const run = (path: string, args: readonly string[], more: object = {}) =>
      spawnSync(shell, [join(folder, 'vnm', path), ...args], { encoding: 'utf8', env: { ...env, ...more }, cwd: '/' });

    test.each(NETWORK_ACTIONS)('%s goes to the parser, with its arguments as they are', (action) => {
      const args = ['a  b', '', '*', '$HOME', "'"];
      const { stdout, stderr } = run(`kvm-ib/${action}`, args, { NODE_OPTIONS: '--nonsense' });
      expect([stdout, stderr]).toEqual([`${['', action, ...args].join('|')}\n`, '']);
    });

    test.each(IDLE)('%s does nothing', (action) => {
      expect(run(`kvm-ib/${action}`, ['x'])).toMatchObject({ status: 0, stdout: '', stderr: '' });
    });

    test.each([
      ['bridge/pre.d', 'pre'],
      ['bridge/post.d', 'post'],
      ['dummy/clean.d', 'clean'],
    ])('a hook in %s is %s', (hooks, action) => {
      const { stdout } = run(`${hooks}/kvm-ib`, ['kvmib01'], { KVM_IB_CONFIG: config() });
      expect(stdout).toBe(`|${action}|kvmib01\n`);
    });

    test('a hook does nothing on a host without kvm-ib; the driver says what is missing', () => {
      const without = { KVM_IB_CONFIG: join(folder, 'none.yaml') };
      expect(run('bridge/pre.d/kvm-ib', [], without)).toMatchObject({ status: 0, stdout: '', stderr: '' });
      expect(run('kvm-ib/pre', [], without).stdout).toBe('|pre\n');
    });

    test('without the bundle all fail but clean, which must not keep a VM from ending', () => {
      rmSync(join(folder, 'vnm/kvm-ib/vnm.mjs'));
      const failed = run('kvm-ib/pre', []);
      expect(failed).toMatchObject({ status: 6, stdout: '' });
      expect(failed.stderr).toMatch(/^kvm-ib: Cannot run pre: vnm\.mjs is neither in [^\n]+\.\n$/);
      const passed = run('dummy/clean.d/kvm-ib', [], { KVM_IB_CONFIG: config() });
      expect(passed).toMatchObject({ status: 0, stdout: '' });
      expect(passed.stderr).toMatch(/^ERROR: kvm-ib: Cannot run clean: [^\n]+\n$/);
    });
  });
});
