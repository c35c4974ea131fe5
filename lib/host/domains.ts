/** What libvirt says of domains, by `virsh`: a read-only connection; names and hardware addresses only. */
import type { Mac } from '../core/address.ts';
import { tryParseMac } from '../core/address.ts';
import type { Exec } from '../core/exec.ts';
import { domainName } from '../core/mapping.ts';
import type { DomainState } from '../core/state.ts';
import type { Domains } from '../ops/host.ts';

const VIRSH = ['/usr/bin/virsh', '--readonly', '--connect', 'qemu:///system'] as const;
/** A hung libvirtd must not hold up an action, or the host lock, for longer than this. */
const TIMEOUT_MS = 10_000;

export function createDomains(exec: Exec): Domains {
  /** What a command printed; undefined when libvirt does not answer, or refuses. */
  const ask = async (...args: readonly string[]): Promise<string | undefined> => {
    try {
      const result = await exec([...VIRSH, ...args], { timeout: TIMEOUT_MS });
      return result.status === 0 ? result.stdout : undefined;
    } catch {
      return undefined;
    }
  };
  const active = async (): Promise<ReadonlySet<string> | undefined> => {
    const names = await ask('list', '--name');
    return names === undefined ? undefined : new Set(lines(names));
  };
  return {
    active,
    async state(vm): Promise<DomainState> {
      const names = await active();
      if (names === undefined) return { kind: 'unknown' };
      if (!names.has(domainName(vm))) return { kind: 'inactive' };
      const interfaces = await ask('domiflist', domainName(vm));
      return { kind: 'active', macs: interfaces === undefined ? undefined : macsIn(interfaces) };
    },
  };
}

/** The last word of each line that is a hardware address: `vnet0  bridge  virbr1  virtio  02:00:c0:a8:7a:02`. */
function macsIn(table: string): ReadonlySet<Mac> {
  return new Set(lines(table).flatMap((line) => tryParseMac(line.split(/\s+/).at(-1) ?? '') ?? []));
}

function lines(text: string): readonly string[] {
  return text
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '');
}
