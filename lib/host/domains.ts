/** libvirt's active domains, by `virsh`: a read-only connection, names only. */
import type { Exec } from '../core/exec.ts';
import type { Domains } from '../ops/host.ts';

const VIRSH = '/usr/bin/virsh';
/** A hung libvirtd must not hold the host lock for longer than this. */
const TIMEOUT_MS = 10_000;

export function createDomains(exec: Exec): Domains {
  return {
    async active() {
      try {
        const result = await exec([VIRSH, '--readonly', '--connect', 'qemu:///system', 'list', '--name'], {
          timeout: TIMEOUT_MS,
        });
        if (result.status !== 0) return undefined;
        return new Set(
          result.stdout
            .split('\n')
            .map((line) => line.trim())
            .filter((line) => line !== ''),
        );
      } catch {
        return undefined;
      }
    },
  };
}
