/** The folder drivers/vmm/kvm-ib: a launcher for each action of the contract, none beside them, all of them plain sh. */
import { execFileSync } from 'node:child_process';
import {
  chmodSync,
  cpSync,
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
