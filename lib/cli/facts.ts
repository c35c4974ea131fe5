/** What several commands look at: this host beside its configuration, and what OpenNebula lists. */
import { readFileSync } from 'node:fs';
import type { KvmIbError } from '../core/errors.ts';
import { toKvmIbError } from '../core/errors.ts';
import type { Config } from '../core/mapping.ts';
import { exec } from '../host/exec.ts';
import { createIptables, guestsUnderOldRules, legacyTables } from '../host/iptables.ts';
import { createLinks } from '../host/links.ts';
import { listXml, ONEHOST, ONEVNET } from '../host/one-command.ts';
import type { OneHost, OneNetwork } from '../opennebula/pools.ts';
import { parseHostPool, parseNetworkPool } from '../opennebula/pools.ts';
import type { Finding } from '../ops/check.ts';
import { checkConfig } from '../ops/check.ts';
import { FRONT_END_USER } from '../ops/install-front-end.ts';
import { obstacles, oldRulesFinding } from '../ops/obstacles.ts';

export function configFindings(config: Config): Promise<readonly Finding[]> {
  return checkConfig({ config, links: createLinks() }, { read: readSysctl });
}

/** What other firewalls and older rules do to guests; without rights nothing of it is seen. */
export async function firewallFindings(config: Config): Promise<readonly Finding[]> {
  return [
    ...(await obstacles(exec, config.networks, legacyTables())),
    ...oldRulesFinding(await guestsUnderOldRules(config, createIptables(exec)).catch(() => [])),
  ];
}

function readSysctl(name: string): string | undefined {
  // As sysctl(8): the name of a link may have dots, which are then written as slashes.
  const path = `/proc/sys/${name.replace(/[./]/g, (c) => (c === '.' ? '/' : '.'))}`;
  try {
    return readFileSync(path, 'latin1').trim();
  } catch {
    return undefined;
  }
}

/** The hosts that OpenNebula knows, or why it does not say. */
export function oneHosts(): Promise<readonly OneHost[] | KvmIbError> {
  return listed(ONEHOST, parseHostPool);
}

/** Its virtual networks, or why it does not say. */
export function oneNetworks(): Promise<readonly OneNetwork[] | KvmIbError> {
  return listed(ONEVNET, parseNetworkPool);
}

async function listed<T>(program: string, parse: (text: string) => T): Promise<T | KvmIbError> {
  const text = await listXml(exec, program, FRONT_END_USER);
  if (typeof text !== 'string') return text;
  try {
    return parse(text);
  } catch (cause) {
    return toKvmIbError(cause);
  }
}
