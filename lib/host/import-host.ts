/** What an import needs of this host besides the rest: iptables, addresses of any kind, guests, the journal. */
import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { join } from 'node:path';
import type { Ipv4, Mac } from '../core/address.ts';
import { tryParseIpv4, tryParseMac } from '../core/address.ts';
import type { ImportHost } from '../ops/import.ts';
import { createGuests } from './domains.ts';
import { exec } from './exec.ts';
import { createJournalStore } from './import-journal.ts';
import { createIptables } from './iptables.ts';
import { createLinks } from './links.ts';

/** @param state the state directory */
export function createImportHost(state: string): ImportHost {
  return {
    iptables: createIptables(exec),
    addresses: createLinks(),
    guests: createGuests(exec, runsGuests),
    neighbours: readNeighbours,
    journal: createJournalStore(join(state, 'import')),
    foreignNat: () => foreignNat(),
  };
}

/** What has been heard by ARP, by address: /proc/net/arp, see proc(5). Incomplete entries do not count. */
function readNeighbours(): ReadonlyMap<Ipv4, ReadonlySet<Mac>> {
  const found = new Map<Ipv4, Set<Mac>>();
  let text: string;
  try {
    text = readFileSync('/proc/net/arp', 'latin1');
  } catch {
    return found;
  }
  for (const line of text.split('\n').slice(1)) {
    const [ip = '', , flags = '', hardware = ''] = line.trim().split(/\s+/);
    const address = tryParseIpv4(ip);
    const mac = tryParseMac(hardware);
    // ATF_COM
    if (address === undefined || mac === undefined || (Number(flags) & 2) === 0) continue;
    found.set(address, (found.get(address) ?? new Set<Mac>()).add(mac));
  }
  return found;
}

/** Whether any QEMU runs in this network namespace: its taps are on bridges of this host. */
function runsGuests(): boolean {
  const own = readlinkSync('/proc/self/ns/net');
  return readdirSync('/proc')
    .filter((name) => /^[0-9]+$/.test(name))
    .some((pid) => {
      try {
        const isQemu = /^(?:qemu|kvm)/.test(readFileSync(`/proc/${pid}/comm`, 'latin1'));
        return isQemu && readlinkSync(`/proc/${pid}/ns/net`) === own;
      } catch {
        return false;
      }
    });
}

/** NAT chains of nf_tables that are neither iptables' nor ours, as `family table chain`. */
async function foreignNat(): Promise<readonly string[]> {
  try {
    const { status, stdout } = await exec(['/usr/sbin/nft', '-j', 'list', 'chains'], { timeout: 10_000 });
    if (status !== 0) return [];
    const { nftables } = JSON.parse(stdout) as {
      nftables?: readonly { chain?: { family: string; table: string; name: string; type?: string } }[];
    };
    return (nftables ?? []).flatMap(({ chain }) => {
      if (chain?.type !== 'nat' || !['ip', 'inet'].includes(chain.family)) return [];
      const known =
        chain.family === 'ip' && (chain.table === 'kvm_ib' || (chain.table === 'nat' && /^[A-Z]+$/.test(chain.name)));
      return known ? [] : [`${chain.family} ${chain.table} ${chain.name}`];
    });
  } catch {
    return [];
  }
}
