/** The way the VM tests call a driver is the one that one_vmm_exec has; a driver that would hang it fails the test. */
import { chmodSync, mkdtempSync, readdirSync, readlinkSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { requireOwnNetns } from '../support/netns.ts';
import type { Host } from '../support/vm/host.ts';
import { startHost } from '../support/vm/host.ts';
import { callAsOneVmmExec } from '../support/vm/opennebula.ts';

requireOwnNetns();

let folder: string;
let host: Host;

beforeAll(async () => {
  folder = mkdtempSync('/run/kvm-ib/call-');
  host = await startHost({ name: 'kvmib01', folder });
});

afterAll(async () => {
  await host?.stop();
  rmSync(folder, { recursive: true, force: true });
});

function call(body: string, { stdin = '<X/>', mode = 0o755, timeout = 10_000 } = {}) {
  const script = join(folder, 'action');
  writeFileSync(script, `#!/bin/sh\n${body}\n`);
  chmodSync(script, mode);
  const args = ['one-42', '', 'two words', '$HOME'];
  return callAsOneVmmExec({ host, script, args, stdin, vmId: 42, hostName: 'kvmib01', timeout });
}

/** How many processes of the machine are in a process namespace, given as `pid:[N]`. */
function processesIn(namespace: string): number {
  const link = (pid: string) => {
    try {
      return readlinkSync(`/proc/${pid}/ns/pid`);
    } catch {
      return undefined; // it ended meanwhile, or may not be looked at
    }
  };
  return readdirSync('/proc').filter((name) => /^\d+$/.test(name) && link(name) === namespace).length;
}

test('a script gets its arguments as they are, then the VM id and the host', async () => {
  const answer = await call(`for word; do echo "[$word]"; done`);
  expect(answer).toMatchObject({
    code: 0,
    stdout: '[one-42]\n[]\n[two words]\n[$HOME]\n[42]\n[kvmib01]\n',
    stderr: '',
  });
});

test('a script gets the payload byte by byte, and one more line end', async () => {
  const payload = "<X>`id` $HOME \\ \t'é'</X>\n<Y/>";
  expect((await call('cat', { stdin: payload })).stdout).toBe(`${payload}\n`);
});

test('exit status and messages come back without the end marks', async () => {
  const answer = await call('cat > /dev/null; echo one; echo two >&2; exit 255');
  expect(answer).toMatchObject({ code: 255, stdout: 'one\n', stderr: 'two\n' });
});

test('a script that leaves its standard error in the middle of a line is reported: one_vmm_exec would hang', async () => {
  await expect(call('printf oops >&2')).rejects.toThrow('does not end with a line end');
});

test('a script that does not end is reported', async () => {
  await expect(call('exec sleep 60', { timeout: 1_000 })).rejects.toThrow('no end marks within 1000 ms');
});

test('a script that is not executable is reported', async () => {
  await expect(call('true', { mode: 0o644 })).rejects.toThrow('is not an executable file');
});

test('a host ends with every process that was started in it', async () => {
  const other = await startHost({ name: 'kvmib02', folder });
  const started = await other.run(['/bin/sh', '-c', 'setsid sleep 4242 > /dev/null 2>&1 & readlink /proc/self/ns/pid']);
  const namespace = started.trim();
  expect(processesIn(namespace)).toBe(2); // the first one, and the one left behind
  await other.stop();
  expect(processesIn(namespace)).toBe(0);
});
