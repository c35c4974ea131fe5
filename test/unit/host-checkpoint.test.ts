/** The domain XML of a checkpoint: what virsh is asked, and what is said when it does not answer. */
import { expect, test } from 'vitest';
import type { Exec } from '../../lib/core/exec.ts';
import { readCheckpoint } from '../../lib/host/checkpoint.ts';
import { failureOf } from '../support/fake-host.ts';

test('is asked for by argv, and given back', async () => {
  const asked: (readonly string[])[] = [];
  const exec: Exec = async (argv, options) => {
    asked.push(argv);
    expect(options?.timeout).toBeLessThanOrEqual(20_000);
    return { status: 0, signal: null, stdout: '<domain/>', stderr: '' };
  };
  expect(await readCheckpoint(exec, '/c h; x')).toBe('<domain/>');
  expect(asked).toEqual([['/usr/bin/virsh', '--connect', 'qemu:///system', 'save-image-dumpxml', '/c h; x']]);
});

test('that virsh cannot read is refused with its words, on one line', async () => {
  const exec: Exec = async () => ({ status: 1, signal: null, stdout: '', stderr: 'error: a\nerror: b\u001b\n' });
  expect(await failureOf(readCheckpoint(exec, '/c'))).toMatchObject({
    code: 'failed',
    why: 'error: a error: b\\u001b',
  });
  const silent: Exec = async () => ({ status: null, signal: 'SIGKILL', stdout: '', stderr: '' });
  expect((await failureOf(readCheckpoint(silent, '/c'))).why).toBe('virsh ended with status null');
});

test.each(['', 'c', '--file', '-'])('%j is no path, and virsh is not asked', async (path) => {
  const exec: Exec = () => Promise.reject(new Error('asked'));
  expect(await failureOf(readCheckpoint(exec, path))).toMatchObject({ code: 'bad-input' });
});
