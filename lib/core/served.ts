/**
 * The networks that the table serves: those of the configuration, and those of mappings that were made under an older
 * one and still stand. A changed configuration cuts nobody off; what is left of the old one goes with its last mapping.
 *
 * A network is known by its two links. Each guest address that is in use belongs to the links of its mapping, the rest of
 * a range to the network of the configuration, so networks do not mix even while an old and a new one share a link.
 */
import * as v from 'valibot';
import type { Ipv4, LinkName, Range } from './address.ts';
import { ipv4FromNumber, ipv4ToNumber, printRange, rangeContains, tryParseLinkName, tryParseRange } from './address.ts';
import type { Mapping, Network, ServedNetwork } from './mapping.ts';

/** What the loaded rule set was made for. */
export interface TableRecord {
  readonly networks: readonly ServedNetwork[];
  /** The host's own addresses by network name. */
  readonly hostAddresses: ReadonlyMap<string, readonly Ipv4[]>;
  /** The networks of the configuration then, as `networksText` words them. */
  readonly configured: string;
}

interface Draft {
  readonly name: string;
  readonly device: LinkName;
  readonly bridge: LinkName;
  isolate: boolean;
  guests: Range[];
  addresses: Range[];
}

interface Links {
  readonly device: string;
  readonly bridge: string;
}

/**
 * @param mappings all that stand, or are wished: of every file, what it had before included
 * @param loaded what the table was last loaded for: it remembers whether a network was isolated that is no longer in the
 *   configuration; without it such a network is isolated
 * @param keep true: nothing of `loaded` goes, because who still needs it is not known
 */
export function servedNetworks(
  configured: readonly Network[],
  mappings: readonly Mapping[],
  loaded: readonly ServedNetwork[] = [],
  keep = false,
): readonly ServedNetwork[] {
  const drafts = configured.map(
    ({ name, device, bridge, isolate, guests, addresses }): Draft => ({
      name,
      device,
      bridge,
      isolate,
      guests: [guests],
      addresses: [addresses],
    }),
  );
  const draftOf = (of: Pick<Mapping, 'device' | 'bridge'>, wanted: string): Draft => {
    const known = drafts.find((draft) => sameLinks(draft, of));
    if (known !== undefined) return known;
    const isolate = loaded.find((network) => sameLinks(network, of))?.isolate ?? true;
    const draft = { name: freeName(drafts, wanted, of), device: of.device, bridge: of.bridge, isolate };
    drafts.push({ ...draft, guests: [], addresses: [] });
    return drafts.at(-1) as Draft;
  };

  const holders = new Map<Ipv4, Links[]>();
  for (const m of [...mappings].sort(byNetwork)) {
    holders.set(m.guest, [...(holders.get(m.guest) ?? []), m]);
    const draft = draftOf(m, m.network);
    if (!draft.guests.some((range) => rangeContains(range, m.guest))) draft.guests.push(single(m.guest));
    if (!draft.addresses.some((range) => rangeContains(range, m.address))) draft.addresses.push(single(m.address));
  }
  if (keep) {
    for (const network of loaded) {
      const draft = draftOf(network, network.name);
      draft.guests.push(...network.guests);
      draft.addresses.push(...network.addresses);
    }
  }
  for (const draft of drafts) {
    const elsewhere = [...holders].filter(([, links]) => !links.some((link) => sameLinks(link, draft)));
    draft.guests = without(
      joined(draft.guests),
      elsewhere.map(([guest]) => guest),
    );
    draft.addresses = joined(draft.addresses);
  }
  isolateTogether(drafts);
  return drafts;
}

/** Whether the table that was loaded for these networks carries this mapping. */
export function serves(networks: readonly ServedNetwork[], mapping: Mapping): boolean {
  const network = networkOfLinks(networks, mapping);
  return network?.guests.some((range) => rangeContains(range, mapping.guest)) === true;
}

export function networkOfLinks<T extends Links>(networks: readonly T[], links: Links): T | undefined {
  return networks.find((network) => sameLinks(network, links));
}

/** One text for configurations whose networks are the same. */
export function networksText(networks: readonly Network[]): string {
  return JSON.stringify(
    networks.map(({ name, device, bridge, guests, addresses, isolate }) => {
      return [name, device, bridge, printRange(guests), printRange(addresses), isolate];
    }),
  );
}

function sameLinks(a: Links, b: Links): boolean {
  return a.device === b.device && a.bridge === b.bridge;
}

/** Networks that share a link are isolated all of them or none: a guard that holds for one must not be walked round by the other. */
function isolateTogether(drafts: readonly Draft[]): void {
  const rest = new Set(drafts);
  for (const draft of drafts) {
    if (!rest.delete(draft)) continue;
    const group = [draft];
    for (const member of group) {
      for (const other of rest) {
        if (other.device !== member.device && other.bridge !== member.bridge) continue;
        rest.delete(other);
        group.push(other);
      }
    }
    const isolate = group.some((member) => member.isolate);
    for (const member of group) member.isolate = isolate;
  }
}

/** Its own name, unless another has it: a network whose links were changed stands there twice for a while. */
function freeName(drafts: readonly Draft[], wanted: string, { device, bridge }: Links): string {
  const own = /^[A-Za-z0-9_-]{1,32}$/.test(wanted) ? wanted : 'old';
  const isTaken = (name: string): boolean => drafts.some((draft) => draft.name === name);
  let name = own;
  for (let n = 1; isTaken(name); n++) name = n === 1 ? `${own}.${device}.${bridge}` : `${own}.${device}.${bridge}.${n}`;
  return name;
}

function byNetwork(a: Mapping, b: Mapping): number {
  const key = (m: Mapping): string => [m.network, m.device, m.bridge, m.guest, m.address].join(' ');
  return key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0;
}

function single(address: Ipv4): Range {
  return { first: address, last: address };
}

/** The same addresses as ascending ranges with a gap between any two. */
function joined(ranges: readonly Range[]): Range[] {
  const spans = ranges.map(({ first, last }) => [ipv4ToNumber(first), ipv4ToNumber(last)] as const);
  const out: [number, number][] = [];
  for (const [first, last] of spans.sort((a, b) => a[0] - b[0])) {
    const before = out.at(-1);
    if (before !== undefined && first <= before[1] + 1) before[1] = Math.max(before[1], last);
    else out.push([first, last]);
  }
  return out.map(([first, last]) => ({ first: ipv4FromNumber(first), last: ipv4FromNumber(last) }));
}

function without(ranges: readonly Range[], addresses: readonly Ipv4[]): Range[] {
  let rest = [...ranges];
  for (const address of addresses) {
    const n = ipv4ToNumber(address);
    rest = rest.flatMap((range) => {
      if (!rangeContains(range, address)) return [range];
      const [first, last] = [ipv4ToNumber(range.first), ipv4ToNumber(range.last)];
      return [
        ...(first < n ? [{ first: range.first, last: ipv4FromNumber(n - 1) }] : []),
        ...(n < last ? [{ first: ipv4FromNumber(n + 1), last: range.last }] : []),
      ];
    });
  }
  return rest;
}

const linkName = v.custom<LinkName>((value) => typeof value === 'string' && tryParseLinkName(value) !== undefined);
const range = v.pipe(
  v.string(),
  v.check((text) => tryParseRange(text) !== undefined),
  v.transform((text) => tryParseRange(text) as Range),
);
const recordSchema = v.object({
  networks: v.array(
    v.object({
      name: v.pipe(v.string(), v.regex(/^[A-Za-z0-9_.-]{1,100}$/)),
      device: linkName,
      bridge: linkName,
      guests: v.array(range),
      addresses: v.array(range),
      isolate: v.boolean(),
    }),
  ),
  hostAddresses: v.record(v.string(), v.array(range)),
  configured: v.string(),
});

/** The record out of its JSON text; undefined when it is none, or one of an earlier version. */
export function parseTableRecord(text: string): TableRecord | undefined {
  let raw: unknown;
  try {
    raw = JSON.parse(text);
  } catch {
    return undefined;
  }
  const result = v.safeParse(recordSchema, raw);
  if (!result.success) return undefined;
  const { networks, hostAddresses, configured } = result.output;
  const addresses = Object.entries(hostAddresses).map(
    ([name, list]) => [name, list.map(({ first }) => first)] as const,
  );
  return { networks, hostAddresses: new Map(addresses), configured };
}

export function printTableRecord({ networks, hostAddresses, configured }: TableRecord): string {
  // Every key by name: equal records have equal texts.
  const printed = networks.map(({ name, device, bridge, isolate, guests, addresses }) => {
    return { name, device, bridge, isolate, guests: guests.map(printRange), addresses: addresses.map(printRange) };
  });
  return JSON.stringify({ networks: printed, hostAddresses: Object.fromEntries(hostAddresses), configured });
}
