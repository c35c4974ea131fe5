/** A first configuration out of what an older deployment has, for a host that has none yet. Pure. */
import type { Ipv4 } from '../core/address.ts';
import { ipv4FromNumber, ipv4ToNumber } from '../core/address.ts';
import type { Candidate, RuleSource } from './pairs.ts';
import { findPairs } from './pairs.ts';
import { groupBy } from './report.ts';

/**
 * The text of a configuration that holds all pairs and halves, a network for each guest subnet (/24) with a pair.
 * @param aliases addresses and the links that they are on, as far as they are known
 * @returns undefined when there is no pair
 */
export function suggestConfig(
  sources: readonly RuleSource[],
  aliases: readonly { readonly device: string; readonly address: Ipv4 }[],
): string | undefined {
  // With halves: they are on the bridge too, and are to be seen.
  const all = [
    ...groupBy(findPairs(sources).candidates, ({ guest }) => guest.slice(0, guest.lastIndexOf('.'))).values(),
  ];
  const groups = all.filter((group) => group.some(({ has }) => has.dnat && has.snat));
  if (groups.length === 0) return undefined;
  const devices = new Map<string, string>(aliases.map(({ address, device }) => [address, device]));
  const networks = groups.map((group, index) => {
    const guests = spanOf(group.map(({ guest }) => guest));
    const addresses = spanOf(group.map(({ address }) => address));
    const size = Math.max(guests.size, addresses.size);
    return [
      `  - name: ib${index === 0 ? '' : index + 1}`,
      `    device: ${deviceOf(group, devices) ?? `ib${index}`}`,
      `    bridge: virbr${index + 1}`,
      `    guests: ${rangeText(guests.first, size)}`,
      `    addresses: ${rangeText(addresses.first, size)}`,
    ].join('\n');
  });
  return ['networks:', ...networks].join('\n');
}

function spanOf(list: readonly Ipv4[]): { readonly first: number; readonly size: number } {
  const numbers = list.map(ipv4ToNumber);
  const first = numbers.reduce((a, b) => Math.min(a, b));
  return { first, size: numbers.reduce((a, b) => Math.max(a, b)) - first + 1 };
}

function rangeText(first: number, size: number): string {
  return `${ipv4FromNumber(first)}-${ipv4FromNumber(first + size - 1)}`;
}

/** The link that most rules of a group name, or that has one of its addresses. */
function deviceOf(group: readonly Candidate[], devices: ReadonlyMap<string, string>): string | undefined {
  const named = group.flatMap(({ rules }) =>
    rules.flatMap(({ links }) => links.filter(({ negated, name }) => !negated && /^[\w.-]+$/.test(name))),
  );
  const counts = [...groupBy(named, ({ name }) => name).values()].sort((a, b) => b.length - a.length);
  return counts[0]?.[0]?.name ?? group.map(({ address }) => devices.get(address)).find((found) => found !== undefined);
}
