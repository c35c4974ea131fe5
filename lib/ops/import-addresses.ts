/** The addresses of an import: the old ones off and our aliases on, and back. Each step can be done again. */
import type { Mapping } from '../core/mapping.ts';
import { aliasKey } from '../core/mapping.ts';
import type { Journal } from '../import/journal.ts';
import { groupBy } from '../import/report.ts';
import type { StandingAddress } from '../link/ports.ts';
import type { ImportHost, Progress } from './import.ts';

/** Addresses that are changed in one go. */
const PART = 250;

/**
 * Our aliases beside the old addresses, then the old ones off. An old one that differs from ours by its label alone cannot
 * stand beside it: it goes first, which no packet notices, since what is translated is not looked up as the host's.
 * @returns aliases of addresses that the host did not have
 */
export async function adopt(
  ports: ImportHost,
  journal: Journal,
  standing: readonly Mapping[],
  all: readonly StandingAddress[],
  progress: Progress,
): Promise<readonly Mapping[]> {
  const { addresses } = ports;
  const present = new Set(all.map((one) => addressKey(one)));
  const wide: StandingAddress[] = [];
  const inTheWay = new Map<string, StandingAddress>();
  for (const one of journal.addresses) {
    if (!present.has(addressKey(one))) continue;
    if (one.prefixLength === 32) inTheWay.set(`${one.device} ${one.address}`, one);
    else wide.push(one);
  }
  const local = new Set<string>(all.map(({ address }) => address));
  const known = new Set(all.filter((one) => one.prefixLength === 32).map(aliasKey));
  const missing = standing.filter((mapping) => !known.has(aliasKey(mapping)));
  for (const mapping of missing) {
    const key = `${mapping.device} ${mapping.address}`;
    const before = inTheWay.get(key);
    if (before === undefined) continue;
    inTheWay.delete(key);
    await addresses.take([before]);
    await addresses.put([aliasOf(mapping)]);
  }
  // By parts: what the kernel needs for an address grows with how many there are.
  const plain = new Map<string, StandingAddress[]>();
  for (const one of wide.filter(({ secondary }) => secondary))
    plain.set(one.address, [...(plain.get(one.address) ?? []), one]);
  for (let at = 0; at < missing.length; at += PART) {
    const part = missing.slice(at, at + PART);
    await addresses.put(part.map(aliasOf));
    await addresses.take(part.flatMap(({ address }) => plain.get(address) ?? []));
    for (const { address } of part) plain.delete(address);
    progress(at, missing.length);
  }
  const rest = [...plain.values()].flat();
  const first = wide.filter(({ secondary }) => !secondary);
  await takeAddresses(ports, [...rest, ...first, ...inTheWay.values()], journal.promoting);
  return missing.filter((mapping) => !local.has(mapping.address));
}

/** Secondary ones first. Where the first of a subnet goes and others stay, they must not go with it. */
async function takeAddresses(
  ports: ImportHost,
  list: readonly StandingAddress[],
  promoting: readonly string[],
): Promise<void> {
  const { addresses } = ports;
  const set = promoting.filter((device) => !addresses.promotesSecondaries(device));
  for (const device of set) addresses.setPromotesSecondaries(device, true);
  try {
    await addresses.take([...list].sort((a, b) => Number(b.secondary) - Number(a.secondary)));
  } finally {
    for (const device of set) addresses.setPromotesSecondaries(device, false);
  }
}

function aliasOf({ device, address, label }: Mapping): StandingAddress {
  return { device, address, label, prefixLength: 32, secondary: false, broadcast: null, scope: 0 };
}

export function addressKey({ device, address, prefixLength, label }: StandingAddress): string {
  return `${device} ${address}/${prefixLength} ${label}`;
}

/** The old addresses on, our aliases off. The first of a subnet comes first, so that the others are secondary to it again. */
export async function giveBack(
  ports: ImportHost,
  list: readonly StandingAddress[],
  ours: readonly Mapping[],
): Promise<void> {
  const { addresses } = ports;
  await addresses.put(list.filter(({ secondary, prefixLength }) => !secondary && prefixLength !== 32));
  const byAddress = groupBy(list, ({ address }) => address);
  for (let at = 0; at < ours.length; at += PART) {
    const part = ours.slice(at, at + PART);
    const old = part.flatMap(({ address }) => byAddress.get(address) ?? []);
    await addresses.put(old.filter(({ prefixLength }) => prefixLength !== 32));
    await addresses.take(part.map(aliasOf));
    // What differs from ours by its label alone can only come when ours is gone.
    await addresses.put(old.filter(({ prefixLength }) => prefixLength === 32));
  }
}
