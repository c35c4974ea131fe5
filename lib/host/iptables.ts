/**
 * iptables of this host: the part of the kernel that is called legacy and the one in nf_tables, each by its own programs.
 * Which is which is asked of the programs, never taken from a name that a distribution may point elsewhere.
 */
import { existsSync, readFileSync } from 'node:fs';
import type { Ipv4 } from '../core/address.ts';
import { KvmIbError, printable } from '../core/errors.ts';
import type { Exec } from '../core/exec.ts';
import type { Config } from '../core/mapping.ts';
import { translatedGuests } from '../import/report.ts';
import type { Iptables, SavedRules } from '../iptables/port.ts';
import { parseSaved } from '../iptables/save.ts';
import type { Variant } from '../iptables/table.ts';

const FOLDERS = ['/usr/sbin', '/sbin'];
const TIMEOUT_MS = 60_000;

export function createIptables(exec: Exec): Iptables {
  /** A program of that part, such as `save`; undefined: there is none. */
  const program = async (variant: Variant, verb: 'save' | 'restore'): Promise<string | undefined> => {
    for (const name of [`iptables-${variant}-${verb}`, `iptables-${verb}`]) {
      const path = FOLDERS.map((folder) => `${folder}/${name}`).find((candidate) => existsSync(candidate));
      if (path === undefined) continue;
      // "iptables-save v1.8.9 (nf_tables)"; before 1.8 there was but one.
      const { stdout, stderr } = await exec([path, '-V'], { timeout: TIMEOUT_MS });
      const isNft = /\(nf_tables\)/.test(stdout + stderr);
      if (isNft === (variant === 'nft')) return path;
    }
    return undefined;
  };

  const read = async (variant: Variant, path: string): Promise<SavedRules> => {
    const { status, signal, stdout, stderr } = await exec([path], { timeout: TIMEOUT_MS });
    if (status !== 0) {
      throw new KvmIbError('failed', `Cannot read the rules of iptables-${variant}`, {
        why: `${path} ended with ${signal ?? status}: ${printable(stderr.trim(), 300)}`,
        fix: `run it by hand: ${path}`,
      });
    }
    return { variant, text: stdout };
  };

  return {
    save: async () => {
      const saved: SavedRules[] = [];
      const warnings: string[] = [];
      // To ask for a table makes it: only those that are there are read.
      if (legacyTables().length > 0) {
        const path = await program('legacy', 'save');
        if (path === undefined) {
          throw new KvmIbError('host-lacks', 'Cannot read the rules of iptables-legacy', {
            why: `the kernel has tables of it (${legacyTables().join(', ')}), but this host has no iptables-legacy-save`,
            fix: 'install the package that has it (iptables, or iptables-legacy)',
          });
        }
        saved.push(await read('legacy', path));
      }
      const path = await program('nft', 'save');
      if (path !== undefined) {
        const found = await read('nft', path);
        const foreign = [...found.text.matchAll(/^# Table `([a-z]+)' is incompatible/gm)].map((match) => match[1]);
        if (foreign.length > 0)
          warnings.push(`table ip ${foreign.join(', ')} is not of iptables: its rules are not read`);
        if (/^\*/m.test(found.text)) saved.push(found);
      }
      return { saved, warnings };
    },

    restore: async (variant, text) => {
      const path = await program(variant, 'restore');
      if (path === undefined) {
        throw new KvmIbError('host-lacks', `Cannot change the rules of iptables-${variant}`, {
          why: `this host has no iptables-${variant}-restore`,
          fix: 'install the package that has it',
        });
      }
      let result = await exec([path, '-w', '10', '--noflush'], { input: text, timeout: TIMEOUT_MS });
      // Before 1.6.2 it knows no -w: then the lock is not waited for, but the kernel still takes all or nothing.
      if (result.status !== 0 && /(?:invalid|unrecognized) option|unknown option/.test(result.stderr)) {
        result = await exec([path, '--noflush'], { input: text, timeout: TIMEOUT_MS });
      }
      if (result.status === 0) return;
      throw new KvmIbError('failed', `Cannot change the rules of iptables-${variant}`, {
        why: `${path} ended with ${result.signal ?? result.status}: ${printable(result.stderr.trim(), 300)}`,
        fix: 'nothing was changed by it; look whether somebody else changed the rules meanwhile, and try again',
      });
    },
  };
}

/** Tables that iptables-legacy has in use in this network namespace. */
export function legacyTables(): readonly string[] {
  try {
    return readFileSync('/proc/net/ip_tables_names', 'latin1')
      .split('\n')
      .filter((name) => name !== '');
  } catch {
    // The kernel has no such part.
    return [];
  }
}

/**
 * Guests of this host that rules of iptables translate still. Where the table of kvm-ib is not loaded yet, it would cut
 * them off.
 */
export async function guestsUnderOldRules(config: Config, iptables: Iptables): Promise<readonly Ipv4[]> {
  const { saved } = await iptables.save();
  return translatedGuests(
    config,
    saved.map(({ variant, text }) => ({ variant, name: variant, tables: parseSaved(text).tables })),
  );
}
