/**
 * The state hook, run by the shells that hosts have, as OpenNebula's hook executor runs it over ssh: no terminal, the VM in
 * base64 as an argument or on standard input. Engine and sudo are stand-ins that write down what they were told.
 */
import { spawn, spawnSync } from 'node:child_process';
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { afterAll, beforeEach, describe, expect, test } from 'vitest';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const HOOK = resolve(import.meta.dirname, '../../drivers/hooks/kvm-ib/vm-gone.sh');
const SHELLS = [['/usr/bin/dash'], ['/usr/bin/busybox', 'sh'], ['/usr/bin/bash', '--posix']] as const;
const OK = '{"version":2,"ok":true,"changes":[],"warnings":[]}';
const NOBODY = ['/usr/bin/setpriv', '--reuid=65534', '--regid=65534', '--clear-groups', '--'];

const folder = mkdtempSync(join(tmpdir(), 'kvm-ib-hook-'));
chmodSync(folder, 0o755);
const asked = join(folder, 'asked');
const script = join(folder, 'vm-gone.sh');
afterAll(() => rmSync(folder, { recursive: true, force: true }));

beforeEach(() => {
  rmSync(asked, { force: true });
  writeFileSync(asked, '');
  chmodSync(asked, 0o666);
  for (const path of ['lib', 'bin']) mkdirSync(join(folder, path), { recursive: true });
  program('lib/kvm-ib-engine', `read -r line\nprintf '%s\\n' "$line" >> ${asked}\necho '${OK}'`);
  program('bin/sudo', `printf 'sudo %s\\n' "$*" >> ${asked}\nshift\nexec "$@"`);
  place(1);
});

function program(path: string, body: string): void {
  writeFileSync(join(folder, path), `#!/bin/sh\n${body}\n`);
  chmodSync(join(folder, path), 0o755);
}

/** The hook with the places that it looks at moved, and less patience. */
function place(limit: number): void {
  const text = readFileSync(HOOK, 'utf8');
  const moved = text
    .replace(/^engine=.*$/m, `engine=${folder}/lib/kvm-ib-engine`)
    .replace(/^limit=.*$/m, `limit=${limit}`)
    .replace(/timeout 10 dd/, `timeout ${limit} dd`)
    .replace(/^PATH=/m, `PATH=${folder}/bin:`);
  writeFileSync(script, moved);
  chmodSync(script, 0o755);
}

const vmXml = (id: string, rest = '<UID>0</UID><NAME>one</NAME>'): string => `<VM><ID>${id}</ID>${rest}</VM>`;
const base64 = (text: string): string => Buffer.from(text).toString('base64');
const request = (vm: number): string => `{"version":2,"verb":"settle","vm":${vm}}\n`;

interface Result {
  readonly status: number | null;
  readonly stdout: string;
  readonly stderr: string;
  readonly asked: string;
}

function hook(shell: readonly string[], args: readonly string[], input = '', prefix: readonly string[] = []): Result {
  const [first = '', ...rest] = [...prefix, ...shell, script, ...args];
  const { status, stdout, stderr } = spawnSync(first, rest, {
    input,
    encoding: 'utf8',
    env: { PATH: '/usr/bin:/bin' },
    timeout: 10_000,
  });
  return { status, stdout, stderr, asked: readFileSync(asked, 'utf8') };
}

const fine = (vm: number): Result => ({ status: 0, stdout: '', stderr: '', asked: request(vm) });

describe.each(SHELLS.map((shell) => ({ name: shell.join(' '), shell })))('under $name', ({ shell }) => {
  test.each<[string, readonly string[], string]>([
    ['its id', ['42'], ''],
    ['its XML as an argument', [base64(vmXml('42'))], ''],
    ['its XML on standard input, as OpenNebula writes it', [], base64(vmXml('42'))],
    ['its XML in lines, as base64 writes it', [], `${base64(vmXml('42')).replace(/(.{20})/g, '$1\n')}\n`],
    ['its XML with a declaration', [], base64(`<?xml version="1.0"?>\n${vmXml('42')}`)],
    ['the output of `onevm show -x`', [], base64(`<VM>\n  <ID>42</ID>\n  <UID>0</UID>\n</VM>\n`)],
    ['the XML of a VM with very many attributes', [], base64(vmXml('42', '<A>x</A>'.repeat(60_000)))],
    ['another VM inside it, which is text of a user', [], base64(vmXml('42', '<T><VM><ID>7</ID></VM></T>'))],
  ])('takes the VM from %s', (_, args, input) => {
    expect(hook(shell, args, input)).toEqual(fine(42));
  });

  test.each<[string, readonly string[], string]>([
    ['nothing', [], ''],
    ['an empty argument', [''], base64(vmXml('42'))],
    ['a name', ['one-42'], ''],
    ['a number with a sign', ['-42'], ''],
    ['a number with leading zeros', ['042'], ''],
    ['a number beyond all', ['9'.repeat(11)], ''],
    ['two numbers', ['42 43;id'], ''],
    ['a command', ['$(touch x)'], ''],
    ['noise', [], '\u0000\u0001\u0000é"\'`'],
    ['XML that is not encoded', [], vmXml('42')],
    ['base64 of something else', [], base64('<HOST><ID>42</ID></HOST>')],
    ['an id that is none', [], base64(vmXml('4x2'))],
    ['an id inside another element', [], base64('<VM><TEMPLATE><ID>42</ID></TEMPLATE></VM>')],
    ['a VM below another root', [], base64('<VM_POOL><VM><ID>42</ID></VM></VM_POOL>')],
    ['a quote in the id', [], base64(vmXml('42","verb":"sync'))],
    ['XML cut off in its id', [], base64('<VM><ID>4')],
  ])('refuses %s in one line, and asks for nothing', (_, args, input) => {
    const result = hook(shell, args, input);
    expect(result).toEqual({ status: 1, stdout: '', stderr: result.stderr, asked: '' });
    expect(result.stderr).toMatch(/^kvm-ib: Cannot tell which VM is gone: [^\n]+\n$/);
  });

  test('goes through sudo without a password as OpenNebula’s user', () => {
    expect(hook(shell, ['42'], '', NOBODY)).toEqual({
      ...fine(42),
      asked: `sudo -n ${folder}/lib/kvm-ib-engine\n${request(42)}`,
    });
  });

  test('says in one line what the engine said', () => {
    const error = {
      code: 'failed',
      exit: 1,
      message: 'Cannot release "one-42"',
      why: 'libvirt\ndoes not answer,"ok":true',
      fix: 'see C:\\log \u001b[31m',
    };
    const answer = JSON.stringify({ version: 2, ok: false, error });
    writeFileSync(join(folder, 'lib/answer'), `${answer}\n`);
    program('lib/kvm-ib-engine', `cat ${folder}/lib/answer`);
    const result = hook(shell, ['42']);
    expect(result).toMatchObject({ status: 1, stdout: '' });
    expect(result.stderr).toMatch(
      /^kvm-ib: Cannot release "one-42": libvirt does not answer,"ok":true\. Remedy: see C:\\log [^\n]*\n$/,
    );
    expect(result.stderr).not.toContain('\u001b');
  });

  test.each([
    [
      'does not know the verb',
      `{"version":1,"ok":false,"error":{"code":"bad-input","exit":2,"message":"m","fix":"f"}}`,
    ],
    ['says nothing', ''],
    ['says something else', 'sudo: a password is required'],
    ['writes half a line', '{"version":2,"ok":tr'],
  ])('fails when the engine %s', (_, words) => {
    writeFileSync(join(folder, 'lib/answer'), words === '' ? '' : `${words}\n`);
    program('lib/kvm-ib-engine', `cat ${folder}/lib/answer`);
    const result = hook(shell, ['42']);
    expect(result).toMatchObject({ status: 1, stdout: '' });
    expect(result.stderr).toMatch(/^kvm-ib: [^\n]+\n$/);
  });

  test('a warning of sudo before the answer does no harm', () => {
    program('lib/kvm-ib-engine', `echo 'sudo: unable to resolve host kvmib01' >&2\necho '${OK}'`);
    expect(hook(shell, ['42'])).toMatchObject({ status: 0, stdout: '', stderr: '' });
  });

  test('does not wait for an engine that hangs, nor for a caller that never ends its input', async () => {
    program('lib/kvm-ib-engine', 'exec sleep 5');
    const began = performance.now();
    const hung = hook(shell, ['42']);
    expect(hung).toMatchObject({ status: 1, stdout: '' });
    expect(hung.stderr).toMatch(/^kvm-ib: [^\n]*no answer within 1 s\n$/);
    const [first = '', ...rest] = [...shell, script];
    const child = spawn(first, rest, { stdio: ['pipe', 'ignore', 'ignore'], env: {} });
    const status = await new Promise((settle) => child.once('close', settle));
    child.stdin.destroy();
    expect(status).toBe(1);
    expect(performance.now() - began).toBeLessThan(4500);
  });

  test('does nothing on a host without kvm-ib', () => {
    rmSync(join(folder, 'lib'), { recursive: true });
    expect(hook(shell, ['42'])).toEqual({ status: 0, stdout: '', stderr: '', asked: '' });
  });
});

test('a terminal as standard input is refused at once', () => {
  expect(existsSync('/usr/bin/script')).toBe(true);
  const { stdout } = spawnSync('/usr/bin/script', ['-qec', `/usr/bin/dash ${script}`, '/dev/null'], {
    encoding: 'utf8',
    timeout: 5000,
  });
  expect(stdout).toMatch(/^kvm-ib: Cannot tell which VM is gone: give its id/);
});

test('a hook of the site calls it with what it got itself, as the documentation shows', () => {
  const text = readFileSync(resolve(import.meta.dirname, '../../docs/install-command.md'), 'utf8');
  const example = /```sh\n(#!\/bin\/sh\n[\s\S]*?vm-gone\.sh[\s\S]*?)```/.exec(text)?.[1];
  expect(example).toBeDefined();
  const site = join(folder, 'site.sh');
  writeFileSync(site, example?.replace(/\S*\/vm-gone\.sh/, script) ?? '');
  const result = spawnSync('/usr/bin/dash', [site], { input: base64(vmXml('42')), encoding: 'utf8', env: {} });
  expect([result.status, result.stderr]).toEqual([0, '']);
  expect(readFileSync(asked, 'utf8')).toBe(request(42));
});
