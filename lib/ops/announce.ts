/**
 * Announcements besides that of a new alias: after a link was down or has another hardware address, and on command. A
 * neighbour that keeps the old hardware address reaches nobody.
 */
import type { Ipv4 } from '../core/address.ts';
import { KvmIbError } from '../core/errors.ts';
import type { Mapping } from '../core/mapping.ts';
import { aliasKey } from '../core/mapping.ts';
import { printHardware, whyNoArp } from '../link/arp.ts';
import type { InetAddress, Link, RepeatItem } from '../link/ports.ts';
import { announceAll, repeatLater } from './apply.ts';
import type { Host, LinkRecord } from './host.ts';
import { createProbing } from './probe.ts';

/** Aliases of one link that were announced again, or with `dryRun` would be. */
export interface Announced {
  readonly device: string;
  readonly why: string;
  readonly addresses: readonly Ipv4[];
}

/** A link that is up, and how it differs from the record of the last announcement. */
interface SeenLink {
  readonly link: Link;
  readonly record: LinkRecord;
  /** Undefined: it does not differ. */
  readonly why: string | undefined;
}

/** The IPoIB links as they are, beside what is known of them. Read before anything is announced: what changes then is seen the next time. */
export async function seenLinks(host: Host): Promise<readonly SeenLink[]> {
  const known = host.store.readLinks();
  const bootId = host.processes.bootId();
  const seen: SeenLink[] = [];
  for (const { device } of host.config.networks) {
    const link = await host.links.link(device);
    // Of one that is down, or reaches nobody, the old record stays, so that its return is noticed.
    if (link === undefined || !link.up || !link.running) continue;
    const { index, carrierChanges } = link;
    const record = { bootId, index, hardware: printHardware(link.address), carrierChanges };
    seen.push({ link, record, why: difference(known.get(device), record) });
  }
  return seen;
}

function difference(known: LinkRecord | undefined, now: LinkRecord): string | undefined {
  if (known === undefined) return 'no earlier announcement is known';
  if (known.bootId !== now.bootId) return 'the host was booted';
  if (known.index !== now.index) return 'the link was made anew';
  if (known.hardware !== now.hardware) return 'its hardware address changed';
  return known.carrierChanges === now.carrierChanges ? undefined : 'the link was down';
}

/** Those of these mappings' aliases that stand on their link. */
export function standing(mappings: readonly Mapping[], addresses: readonly InetAddress[]): readonly RepeatItem[] {
  const there = new Set(addresses.filter((entry) => entry.prefixLength === 32).map(aliasKey));
  const found = mappings.filter((m) => there.has(aliasKey(m)));
  return [
    ...new Map(found.map((m) => [aliasKey(m), { device: m.device, address: m.address, label: m.label }])).values(),
  ];
}

/** What to announce again, link by link. */
export function againOn(seen: readonly SeenLink[], aliases: readonly RepeatItem[]): readonly Announced[] {
  return seen.flatMap(({ link, why }): readonly Announced[] => {
    const addresses = aliases.filter(({ device }) => device === link.name).map(({ address }) => address);
    return why === undefined || addresses.length === 0 ? [] : [{ device: link.name, why, addresses }];
  });
}

/** These announcements, alias by alias. */
export function itemsOf(again: readonly Announced[], aliases: readonly RepeatItem[]): readonly RepeatItem[] {
  const due = new Set(again.map(({ device }) => device));
  return aliases.filter(({ device }) => due.has(device));
}

/**
 * Announces what `againOn` names, then keeps the record of the links, if it changed.
 * @param unsettled aliases that stay although another host answers for them: their link is looked at again the next time
 * @returns warnings
 */
export async function announceAgain(
  host: Host,
  seen: readonly SeenLink[],
  again: readonly Announced[],
  aliases: readonly RepeatItem[],
  unsettled: readonly RepeatItem[],
): Promise<readonly string[]> {
  const { warnings, failed } = await announceAll(host, itemsOf(again, aliases));
  const known = host.store.readLinks();
  const records = new Map(known);
  for (const { link, record } of seen) {
    const isFailed =
      aliases.some(({ device, address }) => device === link.name && failed.has(address)) ||
      unsettled.some(({ device }) => device === link.name);
    // What failed is tried again the next time, unless this link cannot do ARP at all.
    if (!isFailed || whyNoArp(link) !== undefined) records.set(link.name, record);
  }
  const differs = [...records].some(([device, record]) => difference(known.get(device), record) !== undefined);
  if (differs) host.store.writeLinks(records);
  return warnings;
}

/** Which aliases to announce: all of them, those of a VM, or those with these guest or IB addresses. */
export type Selection =
  | { readonly kind: 'all' }
  | { readonly kind: 'vm'; readonly vm: number }
  | { readonly kind: 'addresses'; readonly addresses: readonly Ipv4[] };

export interface AnnounceOutcome {
  /** Announced, or with `dryRun` what would be. */
  readonly announced: readonly RepeatItem[];
  readonly warnings: readonly string[];
  /** What could not be announced. The rest was. */
  readonly errors: readonly KvmIbError[];
}

/**
 * Announces aliases of ours that are really on their link, now and twice more; none that another host answers for.
 * @throws KvmIbError `failed` before anything is sent, when one that is named has no mapping or no alias
 */
export function announce(
  host: Host,
  selection: Selection,
  options: { readonly dryRun?: boolean } = {},
): Promise<AnnounceOutcome> {
  return host.withLock('announce', async () => {
    const chosen = choose(host, selection);
    const items = standing(chosen, await host.links.addresses());
    const there = new Set(items.map(({ address }) => address));
    const absent = chosen.filter(({ address }) => !there.has(address));
    const [missing] = absent;
    if (missing !== undefined && selection.kind !== 'all') {
      throw new KvmIbError('failed', `Cannot announce ${missing.address}`, {
        why: `its alias ${missing.label} is not on ${missing.device}`,
        fix: 'bring it back first: kvm-ib reconcile',
      });
    }
    const left = absent.map((m) => `${m.address} is not announced: its alias is not on ${m.device}; kvm-ib reconcile`);
    const probing = createProbing(host);
    await probing.askOthers(items);
    const refused = items.flatMap(({ address }) => unannounceable(address, probing.conflictOf(address)) ?? []);
    const free = items.filter(({ address }) => probing.conflictOf(address) === undefined);
    const warnings = [...left, ...probing.warnings(new Set())];
    if (options.dryRun) return { announced: free, warnings, errors: refused };
    const results = await host.announcer.announce(free);
    const reasons = new Map<string, Ipv4[]>();
    for (const { device, address, error } of results) {
      if (error === undefined) continue;
      const key = JSON.stringify([device, error]);
      reasons.set(key, [...(reasons.get(key) ?? []), address]);
    }
    const failed = new Set([...reasons.values()].flat());
    const announced = free.filter(({ address }) => !failed.has(address));
    const unheard = [...reasons].map(([key, addresses]) => unsent(...(JSON.parse(key) as [string, string]), addresses));
    return {
      announced,
      warnings: [...left, ...probing.warnings(failed), ...(await repeatLater(host, announced))],
      errors: [...refused, ...unheard],
    };
  });
}

/** With two hosts at it, neighbours would go by whoever spoke last. */
function unannounceable(address: Ipv4, conflict: KvmIbError | undefined): KvmIbError | undefined {
  if (conflict === undefined) return undefined;
  return new KvmIbError('conflict', `Cannot announce ${address}`, {
    ...(conflict.why === undefined ? {} : { why: conflict.why }),
    fix:
      `two hosts have it: end one of the two guests, or \`kvm-ib remove\` it there (ip -4 address shows ${address} on both); ` +
      `then, on the host that keeps it: kvm-ib announce ${address}`,
  });
}

function unsent(device: string, error: string, addresses: readonly Ipv4[]): KvmIbError {
  const what = addresses.length === 1 ? addresses[0] : `${addresses.length} addresses`;
  return new KvmIbError('host-lacks', `Cannot announce ${what} on ${device}`, {
    why: error,
    fix: `look at the link (ip link show ${device}), bring it up, then: kvm-ib announce`,
  });
}

function choose(host: Host, selection: Selection): readonly Mapping[] {
  if (selection.kind === 'all') return host.store.all().files.flatMap(wished);
  if (selection.kind === 'vm') {
    const mappings = wished(host.store.read({ kind: 'vm', vm: selection.vm }));
    if (mappings.length === 0) throw noMapping(`VM ${selection.vm}`, 'no VM of that number has a mapping');
    return mappings;
  }
  return selection.addresses.map((given) => {
    const found = wished(host.store.holderOf(given)).find((m) => m.guest === given || m.address === given);
    if (found === undefined) throw noMapping(given, 'no mapping of this host has that guest or IB address');
    return found;
  });
}

function wished(file: ReturnType<Host['store']['read']>): readonly Mapping[] {
  return file === undefined || file.phase.name === 'removing' ? [] : file.mappings;
}

function noMapping(what: string, why: string): KvmIbError {
  return new KvmIbError('failed', `Cannot announce ${what}`, { why, fix: 'see `kvm-ib list`' });
}
