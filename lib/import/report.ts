/** What an import finds and would do: pairs, halves, conflicts, what stays, and how packets fare before and after. Pure. */
import type { Ipv4, Mac } from '../core/address.ts';
import { ipv4ToNumber, rangeContains } from '../core/address.ts';
import { networkOfGuest, resolveMapping } from '../core/config.ts';
import type { Config, Mapping, Network, Owner } from '../core/mapping.ts';
import { isOurLabel, ownerName } from '../core/mapping.ts';
import type { LinkMatch, Span } from '../iptables/rule.ts';
import type { Skipped } from '../iptables/table.ts';
import type { StandingAddress } from '../link/ports.ts';
import type { Case, Comparison, NetworkFacts } from './compare.ts';
import { CASES, compare } from './compare.ts';
import type { Candidate, FoundRule, RuleSource, Translating } from './pairs.ts';
import { findPairs } from './pairs.ts';

/** A network interface of an active domain. */
export interface GuestNic {
  /** Null: the domain is none of OpenNebula. */
  readonly vm: number | null;
  readonly domain: string;
  readonly nic: number;
  readonly mac: Mac;
}

export interface ImportFacts {
  readonly config: Config;
  readonly sources: readonly RuleSource[];
  readonly skipped: readonly (Skipped & { readonly source: string })[];
  /** Undefined: nothing says which addresses the host has. */
  readonly addresses: readonly StandingAddress[] | undefined;
  /** Undefined: libvirt was not asked, or does not answer. */
  readonly nics: readonly GuestNic[] | undefined;
  /** What guests answer to ARP on the bridges. */
  readonly neighbours: ReadonlyMap<Ipv4, ReadonlySet<Mac>>;
  /** Mappings that kvm-ib has on this host, with their owners. */
  readonly held: readonly { readonly owner: Owner; readonly mapping: Mapping }[];
  /** The table of kvm-ib is there. */
  readonly loaded: boolean;
}

export interface RuleReport {
  /** `iptables-legacy`, `iptables-nft`, or a file. */
  readonly source: string;
  readonly table: string;
  readonly line: number;
  /** `-A CHAIN …` */
  readonly rule: string;
}

export interface PairReport {
  readonly guest: Ipv4;
  readonly address: Ipv4;
  readonly mapping: Mapping;
  readonly owner: Owner;
  /** kvm-ib has it already: only the old rules go. */
  readonly mapped: boolean;
  /** The address as it is on this host now; empty: it is added. */
  readonly aliases: readonly StandingAddress[];
  readonly rules: readonly RuleReport[];
  readonly notes: readonly string[];
}

export interface AliasReport {
  readonly device: string;
  readonly address: Ipv4;
  readonly prefixLength: number;
  readonly label: string;
  /** Of the pair that it belongs to; null: no rule translates it. */
  readonly guest: Ipv4 | null;
  /** One of kvm-ib. */
  readonly ours: boolean;
}

export interface ImportReport {
  readonly pairs: readonly PairReport[];
  readonly halves: readonly {
    readonly guest: Ipv4;
    readonly address: Ipv4;
    readonly missing: 'dnat' | 'snat';
    readonly rules: readonly RuleReport[];
  }[];
  readonly conflicts: readonly {
    readonly guest: Ipv4;
    readonly address: Ipv4;
    readonly why: string;
    readonly rules: readonly RuleReport[];
  }[];
  readonly left: readonly (RuleReport & { readonly why: string })[];
  readonly otherTables: readonly { readonly source: string; readonly table: string; readonly rules: number }[];
  /** Null: nothing says which addresses there are. */
  readonly aliases: readonly AliasReport[] | null;
  /** Lines of the input that were passed over. */
  readonly skipped: readonly (Skipped & { readonly source: string })[];
  readonly comparisons: readonly Comparison[];
  readonly warnings: readonly string[];
}

/** The report, and what of it is not for printing. */
export interface Analysis {
  readonly report: ImportReport;
  /** The rules that go, of all pairs. */
  readonly removed: readonly Translating[];
}

/** @throws KvmIbError `unsupported` when the rules cannot be followed */
export function analyse(facts: ImportFacts, progress?: (done: number, all: number) => void): Analysis {
  const found = findPairs(facts.sources);
  const left = found.left.map(({ why, ...rule }) => ({ ...ruleReport(rule), why }));
  const leave = (rules: readonly Translating[], why: string): void => {
    for (const rule of unique(rules)) left.push({ ...ruleReport(rule), why });
  };
  const clash = clashes(found.candidates.filter(({ has }) => has.dnat && has.snat));
  const addresses = facts.addresses ?? [];
  const standing = groupBy(addresses, (one) => one.address);
  const placed = found.candidates.map((candidate) => ({ candidate, place: placeOf(facts.config, candidate) }));
  /** Addresses that may be taken for aliases: those of pairs. */
  const translated = new Set<string>(
    placed.flatMap(({ candidate, place }) =>
      typeof place === 'string' || !isPair(candidate) ? [] : [candidate.address],
    ),
  );
  const nics = byMac(facts.nics ?? []);
  const pairs: PairReport[] = [];
  const halves: ImportReport['halves'][number][] = [];
  const conflicts: ImportReport['conflicts'][number][] = [];
  const unmapped: { guest: Ipv4; address: Ipv4; network: string }[] = [];
  const removed: Translating[] = [];
  const byKey = heldByKey(facts);

  for (const { candidate, place } of placed) {
    const { guest, address } = candidate;
    const rules = unique(candidate.rules).map(ruleReport);
    if (typeof place === 'string') {
      leave(candidate.rules, place);
      // On the bridge of a network our guards see it all the same.
      const near = networkNear(facts.config, guest);
      if (near !== undefined) unmapped.push({ guest, address, network: near.name });
      continue;
    }
    if (!isPair(candidate)) {
      halves.push({ guest, address, missing: candidate.has.dnat ? 'snat' : 'dnat', rules });
      unmapped.push({ guest, address, network: place.name });
      continue;
    }
    const own = held(byKey, guest, address);
    const why =
      clash.get(`${guest} ${address}`) ??
      (own === undefined || own === 'same' ? undefined : own) ??
      routeAtStake(standing.get(address) ?? [], addresses, translated);
    if (why !== undefined) {
      conflicts.push({ guest, address, why, rules });
      unmapped.push({ guest, address, network: place.name });
      continue;
    }
    const known = byKey.get(guest);
    const nic = own === 'same' ? undefined : nicOf(facts, nics, guest);
    const mapping = own === 'same' && known !== undefined ? known.mapping : mappingOf(facts.config, candidate, nic);
    pairs.push({
      guest,
      address,
      mapping,
      owner: own === 'same' && known !== undefined ? known.owner : ownerOf(mapping),
      mapped: own === 'same',
      aliases: (standing.get(address) ?? []).filter((one) => !isOurs(one, mapping)),
      rules,
      notes: notesOf(facts.config, mapping, candidate, nic),
    });
    removed.push(...unique(candidate.rules));
  }
  const gone = new Set(removed.map(({ rule }) => rule));
  const comparisons = compare(
    {
      networks: facts.config.networks.map((network) => networkFacts(network, addresses, translated)),
      sources: facts.sources,
      local: new Set<string>(
        facts.addresses === undefined ? pairs.map((pair) => pair.address) : addresses.map((one) => one.address),
      ),
      preferredSources: preferredSources(addresses),
      mappings: [
        ...facts.held.map(({ mapping }) => mapping),
        ...pairs.filter((pair) => !pair.mapped).map((pair) => pair.mapping),
      ],
      coming: pairs.filter((pair) => !pair.mapped).map((pair) => pair.mapping),
      unmapped,
      removed: gone,
      loaded: facts.loaded,
    },
    progress,
  );
  const report: ImportReport = {
    pairs,
    halves,
    conflicts,
    left,
    otherTables: found.otherTables.map(({ source, ...rest }) => ({ ...rest, source: source.name })),
    aliases: facts.addresses === undefined ? null : aliasesOf(facts, pairs),
    skipped: facts.skipped,
    comparisons,
    warnings: [],
  };
  return { report, removed };
}

/** Guest addresses of a configuration that rules translate both ways: our guards would cut them off. */
export function translatedGuests(config: Config, sources: readonly RuleSource[]): readonly Ipv4[] {
  const pairs = findPairs(sources).candidates.filter((one) => isPair(one) && typeof placeOf(config, one) !== 'string');
  return [...new Set(pairs.map(({ guest }) => guest))];
}

/** Differences that nobody has accepted, by case. */
export function unaccepted(comparisons: readonly Comparison[], accepted: readonly Acceptance[]): readonly Comparison[] {
  return comparisons.filter((one) => !one.same && !accepted.some((a) => accepts(a, one)));
}

/** What `--accept` names: a class (`host`) or a case (`host/to-guest`), of all addresses or of one. */
export interface Acceptance {
  readonly what: string;
  readonly address: string | undefined;
}

/** @returns undefined when it names no class or case */
export function parseAcceptance(text: string): Acceptance | undefined {
  const [what = '', address, ...more] = text.split('@');
  const known = CASES.some((one) => one === what || one.startsWith(`${what}/`));
  return known && what !== '' && more.length === 0 ? { what, address } : undefined;
}

function accepts(acceptance: Acceptance, one: Comparison): boolean {
  const fits = one.case === acceptance.what || one.case.startsWith(`${acceptance.what}/`);
  return fits && isOf(acceptance, one);
}

/** Whether a comparison is of the address that an acceptance names, if it names one. */
export function isOf({ address }: Acceptance, one: Comparison): boolean {
  return address === undefined || one.address === address || one.guest === address;
}

/** Addresses that are named one by one. */
const FEW = 4;

/** The words that accept just these: a case where it differs everywhere, or the addresses where it differs on a few. */
export function acceptanceFor(open: readonly Comparison[], all: readonly Comparison[]): readonly string[] {
  return differingCases(open).flatMap((kind) => {
    const differing = open.filter((one) => one.case === kind && !one.same);
    const everywhere = all.every((one) => one.case !== kind || !one.same);
    const named = differing.flatMap(({ address }) => address ?? []);
    const few = !everywhere && named.length === differing.length && named.length <= FEW;
    return few ? named.map((address) => `${kind}@${address}`) : [kind];
  });
}

/** The cases that differ, in their usual order. */
export function differingCases(comparisons: readonly Comparison[]): readonly Case[] {
  const differing = new Set(comparisons.filter(({ same }) => !same).map((one) => one.case));
  return CASES.filter((one) => differing.has(one));
}

function isPair({ has }: Candidate): boolean {
  return has.dnat && has.snat;
}

/** One rule that several chains lead to is one rule. */
function unique(rules: readonly Translating[]): readonly Translating[] {
  return [...new Map(rules.map((one) => [one.rule, one])).values()];
}

export function ruleReport({ source, table, rule }: FoundRule): RuleReport {
  return { source: source.name, table, line: rule.line, rule: `-A ${rule.chain} ${rule.text}`.trimEnd() };
}

/** The network that a candidate belongs to, or why there is none. */
function placeOf(config: Config, { guest, address, rules }: Candidate): Network | string {
  const network = networkOfGuest(config, guest);
  if (network === undefined) return `no network of the configuration has the guest address ${guest}`;
  if (!rangeContains(network.addresses, address)) {
    return `${address} lies outside \`addresses\` of network ${network.name}`;
  }
  const links = [network.device, network.bridge];
  const stranger = rules.flatMap((rule) => rule.links).find((link) => !links.some((name) => covers(link, name)));
  if (stranger !== undefined) {
    return `it is for ${stranger.negated ? 'links other than ' : ''}${stranger.name}, and network ${network.name} has ${network.device} and ${network.bridge}`;
  }
  return network;
}

/** The network on whose bridge a guest hangs, by its subnet: of a guest outside the ranges. */
function networkNear(config: Config, guest: Ipv4): Network | undefined {
  const subnet = (address: Ipv4): string => address.slice(0, address.lastIndexOf('.'));
  return config.networks.find(({ guests }) => [guests.first, guests.last].some((one) => subnet(one) === subnet(guest)));
}

function covers({ name, negated }: LinkMatch, link: string): boolean {
  const is = name.endsWith('+') ? link.startsWith(name.slice(0, -1)) : name === link;
  return is !== negated;
}

/** Pairs that share a guest or an IB address with another: why, by pair. */
function clashes(pairs: readonly Candidate[]): ReadonlyMap<string, string> {
  const byGuest = groupBy(pairs, (p) => p.guest);
  const byAddress = groupBy(pairs, (p) => p.address);
  const why = new Map<string, string>();
  for (const { guest, address } of pairs) {
    const others = (byGuest.get(guest) ?? []).filter((one) => one.address !== address).map((one) => one.address);
    const guests = (byAddress.get(address) ?? []).filter((one) => one.guest !== guest).map((one) => one.guest);
    if (others.length > 0)
      why.set(`${guest} ${address}`, `guest ${guest} has ${others.join(', ')} as well; a guest has one IB address`);
    else if (guests.length > 0)
      why.set(`${guest} ${address}`, `${address} belongs to guest ${guests.join(', ')} as well`);
  }
  return why;
}

/** Items by a key, in their order. */
export function groupBy<T>(items: readonly T[], key: (item: T) => string): ReadonlyMap<string, readonly T[]> {
  const groups = new Map<string, T[]>();
  for (const item of items) {
    const group = groups.get(key(item));
    if (group === undefined) groups.set(key(item), [item]);
    else group.push(item);
  }
  return groups;
}

type Held = ImportFacts['held'][number];

function heldByKey({ held: list }: ImportFacts): ReadonlyMap<string, Held> {
  return new Map(list.flatMap((one) => [[one.mapping.guest, one] as const, [one.mapping.address, one] as const]));
}

/** @returns `same` when kvm-ib has just this pair, a reason when it has another, undefined when it has none */
function held(byKey: ReadonlyMap<string, Held>, guest: Ipv4, address: Ipv4): string | undefined {
  const known = byKey.get(guest) ?? byKey.get(address);
  if (known === undefined) return undefined;
  const { mapping, owner } = known;
  if (mapping.guest === guest && mapping.address === address) return 'same';
  return `kvm-ib has ${mapping.guest} <-> ${mapping.address} of ${ownerName(owner)} already`;
}

/**
 * Why an address cannot be taken off its link; undefined: it can.
 * @param standing where it stands
 */
function routeAtStake(
  standing: readonly StandingAddress[],
  all: readonly StandingAddress[],
  translated: ReadonlySet<string>,
): string | undefined {
  for (const one of standing) {
    if (one.secondary || one.prefixLength >= 31) continue;
    const subnet = subnetOf(one);
    const others = all.filter((other) => other.device === one.device && other.prefixLength === one.prefixLength);
    const keeps = others.some((other) => !translated.has(other.address) && subnetOf(other).first === subnet.first);
    if (!keeps) {
      return `${one.address}/${one.prefixLength} gives ${one.device} its route to the fabric, and no other address does: give the host an address of its own first`;
    }
  }
  return undefined;
}

function subnetOf({ address, prefixLength }: StandingAddress): Span {
  const size = 2 ** (32 - prefixLength);
  const first = Math.floor(ipv4ToNumber(address) / size) * size;
  return { first, last: first + size - 1 };
}

/** What the kernel takes as source towards each secondary address: see `Comparable`. */
function preferredSources(addresses: readonly StandingAddress[]): ReadonlyMap<string, string> {
  const key = (one: StandingAddress): string => `${one.device} ${one.prefixLength} ${subnetOf(one).first}`;
  const first = new Map(addresses.filter(({ secondary }) => !secondary).map((one) => [key(one), one.address]));
  return new Map(addresses.filter(({ secondary }) => secondary).map((one) => [one.address, first.get(key(one)) ?? '']));
}

/** The alias as kvm-ib would have it. */
function isOurs(one: StandingAddress, mapping: Mapping): boolean {
  return one.prefixLength === 32 && one.device === mapping.device && one.label === mapping.label;
}

function ownerOf(mapping: Mapping): Owner {
  return mapping.vm === null ? { kind: 'manual', guest: mapping.guest } : { kind: 'vm', vm: mapping.vm };
}

function byMac(nics: readonly GuestNic[]): ReadonlyMap<Mac, GuestNic> {
  return new Map(nics.map((nic) => [nic.mac, nic]));
}

/**
 * The interface that has a guest address: the one that answers for it on the bridge, or, where none has been heard of, the
 * one whose hardware address OpenNebula made of it (its last four bytes).
 */
function nicOf(facts: ImportFacts, nics: ReadonlyMap<Mac, GuestNic>, guest: Ipv4): GuestNic | undefined {
  const heard = [...(facts.neighbours.get(guest) ?? [])].flatMap((mac) => nics.get(mac) ?? []);
  if (heard.length === 1) return heard[0];
  const end = guest
    .split('.')
    .map((octet) => Number(octet).toString(16).padStart(2, '0'))
    .join(':');
  const made = (facts.nics ?? []).filter(({ mac }) => mac.endsWith(end));
  return made.length === 1 ? made[0] : undefined;
}

/** Named only where the configuration would give the guest another address. */
function mappingOf(config: Config, { guest, address }: Candidate, nic: GuestNic | undefined): Mapping {
  const vm = nic?.vm ?? null;
  const wish = { guest, mac: nic?.mac ?? null, vm, nic: vm === null ? null : (nic?.nic ?? null) };
  const usual = resolveMapping(config, wish);
  return usual.address === address ? usual : resolveMapping(config, { ...wish, address });
}

function notesOf(config: Config, mapping: Mapping, { rules }: Candidate, nic: GuestNic | undefined): readonly string[] {
  const usual = resolveMapping(config, { ...mapping, address: undefined });
  const conditions = new Set(rules.flatMap((rule) => rule.conditions));
  return [
    ...(usual.address === mapping.address
      ? []
      : [
          `the configuration would give ${mapping.guest} the address ${usual.address}: ${
            mapping.vm === null
              ? 'it is kept because it is named'
              : `set IB_IP=${mapping.address} on the NIC of VM ${mapping.vm}, or it changes with its next action`
          }`,
        ]),
    ...(conditions.size === 0 ? [] : [`the old rules hold only for ${[...conditions].join(', ')}`]),
    ...(nic !== undefined && nic.vm === null ? [`the guest is domain ${nic.domain}, which is none of OpenNebula`] : []),
  ];
}

/** The host's own addresses are those that no pair translates and that are not aliases of kvm-ib. */
function networkFacts(
  network: Network,
  addresses: readonly StandingAddress[],
  translated: ReadonlySet<string>,
): NetworkFacts {
  const onDevice = addresses.filter((one) => one.device === network.device && !translated.has(one.address));
  const own = onDevice.filter(
    (one) => !isOurLabel(network.device, one.label) && !rangeContains(network.addresses, one.address),
  );
  return {
    network,
    own: own.map((one) => one.address),
    subnets: [...new Map(own.map((one) => subnetOf(one)).map((span) => [span.first, span])).values()],
  };
}

function aliasesOf(facts: ImportFacts, pairs: readonly PairReport[]): readonly AliasReport[] {
  const byAddress = new Map<string, PairReport>(pairs.map((pair) => [pair.address, pair]));
  return (facts.addresses ?? []).flatMap((one): readonly AliasReport[] => {
    const pair = byAddress.get(one.address);
    const network = facts.config.networks.find(
      (n) => n.device === one.device && rangeContains(n.addresses, one.address),
    );
    if (pair === undefined && network === undefined) return [];
    const { device, address, prefixLength, label } = one;
    return [
      {
        device,
        address,
        prefixLength,
        label,
        guest: pair?.guest ?? null,
        ours: prefixLength === 32 && isOurLabel(device, label),
      },
    ];
  });
}
