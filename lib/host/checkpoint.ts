/** The domain XML inside a checkpoint, by `virsh save-image-dumpxml`, which libvirt refuses on a read-only connection. */
import { KvmIbError, printable } from '../core/errors.ts';
import type { Exec } from '../core/exec.ts';

const VIRSH = ['/usr/bin/virsh', '--connect', 'qemu:///system'] as const;
/** It reads the head of the file only, but the file may lie on a share that hangs. */
const TIMEOUT_MS = 20_000;

/**
 * @param path absolute path of the checkpoint
 * @throws KvmIbError `bad-input` when it is no absolute path, `failed` when it cannot be read
 */
export async function readCheckpoint(exec: Exec, path: string): Promise<string> {
  const refuse = (code: 'bad-input' | 'failed', why: string): KvmIbError =>
    new KvmIbError(code, `Cannot read the NICs of the VM from its checkpoint ${printable(path, 200)}`, {
      why,
      fix: `look at what \`virsh -c qemu:///system save-image-dumpxml ${printable(path, 200)}\` says as oneadmin, then restore again`,
    });
  if (!path.startsWith('/') || path.includes('\0')) throw refuse('bad-input', 'it is not an absolute path');
  const { status, stdout, stderr } = await exec([...VIRSH, 'save-image-dumpxml', path], { timeout: TIMEOUT_MS });
  if (status === 0) return stdout;
  throw refuse(
    'failed',
    printable(stderr.trim().replace(/\s*\n\s*/g, ' '), 300) || `virsh ended with status ${status}`,
  );
}
