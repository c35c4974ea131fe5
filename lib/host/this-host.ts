/** The real host: every port of `ops/host.ts` on this kernel, this libvirt and this state directory. */
import { readFileSync } from 'node:fs';
import { KvmIbError } from '../core/errors.ts';
import type { Config } from '../core/mapping.ts';
import { createNftEngine } from '../nat/nft.ts';
import { createNft } from '../nftables-json/index.ts';
import type { Host } from '../ops/host.ts';
import { createAnnouncer } from './announcer.ts';
import { readConfig } from './config-file.ts';
import { createConntrack } from './conntrack.ts';
import { createDomains } from './domains.ts';
import { exec } from './exec.ts';
import { createLinks } from './links.ts';
import { withLock } from './lock.ts';
import { createElementReader } from './nf-tables-read.ts';
import type { Paths } from './paths.ts';
import { bootId, isAlive } from './process.ts';
import { createStore } from './store.ts';

/** Longer than 15 actions at once and a reconcile of ten thousand mappings need. */
const LOCK_TIMEOUT_MS = 60_000;

export async function createHost(paths: Paths, config: Config = readConfig(paths.config)): Promise<Host> {
  const links = createLinks();
  const store = createStore(paths.state);
  return {
    config,
    nat: createNftEngine({ nft: createNft({ exec }), reader: await createElementReader() }),
    links,
    conntrack: createConntrack(),
    announcer: createAnnouncer(links),
    store,
    domains: createDomains(exec),
    processes: { isAlive, bootId },
    withLock: (who, act) => withLock(store.lockPath, { timeoutMs: paths.lockTimeoutMs ?? LOCK_TIMEOUT_MS, who }, act),
    now: () => new Date().toISOString(),
  };
}

/** @throws KvmIbError `not-permitted` unless this process may change links and firewall */
export function requireRights(message: string, fix: string): void {
  const line = /^CapEff:\s*([0-9a-f]+)$/m.exec(readFileSync('/proc/self/status', 'latin1'))?.[1] ?? '0';
  const CAP_NET_ADMIN = 12n;
  const CAP_NET_RAW = 13n;
  const effective = BigInt(`0x${line}`);
  if ((effective >> CAP_NET_ADMIN) & (effective >> CAP_NET_RAW) & 1n) return;
  throw new KvmIbError('not-permitted', message, {
    why: 'this process has not the capabilities CAP_NET_ADMIN and CAP_NET_RAW',
    fix,
  });
}
