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
import { createIptables, guestsUnderOldRules } from './iptables.ts';
import { createLinks } from './links.ts';
import { withLock } from './lock.ts';
import { createElementReader } from './nf-tables-read.ts';
import type { Paths } from './paths.ts';
import { createProber } from './prober.ts';
import { bootId, isAlive } from './process.ts';
import { isRepeating, ownBundle, readRepeats, runRepeats } from './repeats.ts';
import { createStore } from './store.ts';

/** Longer than 15 actions at once and a reconcile of ten thousand mappings need. */
const LOCK_TIMEOUT_MS = 60_000;

/**
 * @param program `import.meta.url` of the program: one of our bundles is run again for the repeats of announcements;
 *   anything else, as under a test, repeats nothing
 */
export async function createHost(
  paths: Paths,
  config: Config = readConfig(paths.config),
  program?: string,
): Promise<Host> {
  const links = createLinks();
  const store = createStore(paths.state);
  return {
    config,
    nat: createNftEngine({ nft: createNft({ exec }), reader: await createElementReader() }),
    links,
    conntrack: createConntrack(),
    announcer: createAnnouncer(links, program === undefined ? undefined : ownBundle(program)),
    prober: createProber(links, paths.probeMs),
    store,
    domains: createDomains(exec),
    processes: { isAlive, bootId },
    withLock: (who, act) => withLock(store.lockPath, { timeoutMs: paths.lockTimeoutMs ?? LOCK_TIMEOUT_MS, who }, act),
    now: () => new Date().toISOString(),
    // A program that is missing or broken is no old rule; import itself says what is wrong with it.
    oldRules: () => guestsUnderOldRules(config, createIptables(exec)).catch(() => []),
  };
}

/**
 * The program's other life: started by `Announcer.repeat`, it announces the later rounds and nothing else.
 * @returns false when this process was not started for that
 */
export async function repeatAnnouncements(argv: readonly string[]): Promise<boolean> {
  if (!isRepeating(argv)) return false;
  const links = createLinks();
  const announcer = createAnnouncer(links);
  try {
    await runRepeats(links, announcer, readRepeats());
  } finally {
    announcer.close();
  }
  return true;
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
