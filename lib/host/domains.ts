/** What libvirt says of domains, by `virsh`: a read-only connection; names and hardware addresses only. */
import type { Mac } from '../core/address.ts';
import { tryParseMac } from '../core/address.ts';
import { KvmIbError } from '../core/errors.ts';
import type { Exec } from '../core/exec.ts';
import { domainName } from '../core/mapping.ts';
import type { DomainState } from '../core/state.ts';
import type { GuestNic } from '../import/report.ts';
import type { Domains } from '../ops/host.ts';
import type { Guests } from '../ops/import.ts';

const VIRSH = ['/usr/bin/virsh', '--readonly', '--connect', 'qemu:///system'] as const;
/** A hung libvirtd must not hold up an action, or the host lock, for longer than this. */
const TIMEOUT_MS = 10_000;
/** Domains that one virsh is asked about. */
const AT_ONCE = 200;

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
  /** One program for many domains: virsh takes several commands as one argument, and each name is ours to write. */
  const interfaces = async (vms: readonly number[]): Promise<ReadonlyMap<number, ReadonlySet<Mac>>> => {
    const found = new Map<number, ReadonlySet<Mac>>();
    for (let at = 0; at < vms.length; at += AT_ONCE) {
      const batch = vms.slice(at, at + AT_ONCE);
      const commands = batch.map((vm) => `echo ${domainName(vm)}; domiflist ${domainName(vm)}`);
      const tables = tablesIn((await ask(commands.join('; '))) ?? '');
      for (const vm of batch) {
        const macs = tables.get(domainName(vm));
        if (macs !== undefined) found.set(vm, macs);
      }
    }
    return found;
  };
  return {
    active,
    async state(vm): Promise<DomainState> {
      const names = await active();
      if (names === undefined) return { kind: 'unknown' };
      if (!names.has(domainName(vm))) return { kind: 'inactive' };
      return { kind: 'active', macs: (await interfaces([vm])).get(vm) };
    },
    // Seen of libvirt 9.0: "starting up" for as long as a domain is prepared, then "migrating"; on the source "migrating" from the
    // switch-over on.
    async isMoving(vm) {
      const said = await ask('domstate', '--reason', domainName(vm));
      // No answer: it may have gone in between. Whoever takes it to be here then, takes an address that another host has.
      return said === undefined || /^paused \((?:migrating|starting up)\)$/m.test(said);
    },
    async cameBy(vm) {
      const said = (await ask('domstate', '--reason', domainName(vm)))?.trim() ?? '';
      if (said === 'running (booted)') return 'boot';
      return /^(?:paused \(migrating\)|running \(migrated\)|(?:running|paused) \(post-copy\))$/.test(said)
        ? 'migration'
        : 'other';
    },
    interfaces,
  };
}

/**
 * The interfaces of all active domains, OpenNebula's or not.
 * @param runsGuests whether any guest runs on this machine, for when libvirt does not answer
 */
export function createGuests(exec: Exec, runsGuests: () => boolean): Guests {
  const ask = async (...args: readonly string[]): Promise<string | undefined> => {
    const result = await exec([...VIRSH, ...args], { timeout: TIMEOUT_MS });
    return result.status === 0 ? result.stdout : undefined;
  };
  return async () => {
    let names: string | undefined;
    try {
      names = await ask('list', '--name');
    } catch (error) {
      if (!(error instanceof KvmIbError)) throw error;
      if (error.code === 'host-lacks') return { kind: 'absent' };
    }
    if (names === undefined) return { kind: runsGuests() ? 'silent' : 'absent' };
    const nics: GuestNic[] = [];
    for (const domain of lines(names)) {
      // Any other name is no argument for virsh; such a domain is none of OpenNebula.
      if (!/^[A-Za-z0-9_][A-Za-z0-9_.+:-]{0,200}$/.test(domain)) continue;
      const table = await ask('domiflist', domain);
      if (table === undefined) continue;
      const vm = /^one-(0|[1-9][0-9]{0,7})$/.exec(domain)?.[1];
      let place = 0;
      for (const line of lines(table)) {
        const words = line.split(/\s+/);
        const mac = tryParseMac(words.at(-1) ?? '');
        if (mac === undefined) continue;
        // OpenNebula calls the tap one-<vm>-<nic>; of others the place in the domain has to do.
        const own = words[0]?.startsWith(`${domain}-`) ? /-([0-9]{1,2})$/.exec(words[0])?.[1] : undefined;
        nics.push({
          vm: vm === undefined ? null : Number(vm),
          domain,
          nic: own === undefined ? place : Number(own),
          mac,
        });
        place += 1;
      }
    }
    return { kind: 'asked', nics };
  };
}

/**
 * The tables of `domiflist`, each behind the name of its domain. One with its heading says what the domain has, also
 * nothing: `vnet0  bridge  virbr1  virtio  02:00:c0:a8:7a:02`. One without is an error that virsh has gone on after.
 */
function tablesIn(text: string): ReadonlyMap<string, ReadonlySet<Mac>> {
  const tables = new Map<string, Set<Mac>>();
  let name = '';
  for (const line of lines(text)) {
    const words = line.split(/\s+/);
    const last = words.at(-1) ?? '';
    if (words.length === 1 && /^one-[0-9]+$/.test(last)) name = last;
    else if (words[0] === 'Interface' && last === 'MAC') tables.set(name, new Set());
    else {
      const mac = tryParseMac(last);
      if (mac !== undefined) tables.get(name)?.add(mac);
    }
  }
  return tables;
}

function lines(text: string): readonly string[] {
  return text
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '');
}
