/**
 * The proof before the switch: what the old rules do to a packet, and what the new table and the rules that stay do to
 * it, for every kind of packet that an address meets. A model of the hooks of both; the tests hold it to real packets.
 */
import type { Ipv4 } from '../core/address.ts';
import { ipv4FromNumber, ipv4ToNumber, rangeContains } from '../core/address.ts';
import type { Mapping, Network } from '../core/mapping.ts';
import type { Rule, Span } from '../iptables/rule.ts';
import { printSpan } from '../iptables/rule.ts';
import type { AddressSet, Branch, Decision, Packet, PacketLink } from '../iptables/walk.ts';
import { walk, without } from '../iptables/walk.ts';
import type { RuleSource } from './pairs.ts';

/**
 * Kinds of packets, by class and case: what `--accept` names.
 * inbound: from the fabric to the IB address; by another link; from another network of the configuration; from the fabric to
 * the guest address itself.
 * outbound: from the guest to the fabric; by another link; from guests of the subnet that get no mapping.
 * host: from this host to the IB address; from the guest to the host's address on the link.
 * loopback: from another mapped guest of this host to the IB address; from the guest to its own.
 */
export const CASES = [
  'inbound/fabric',
  'inbound/other-link',
  'inbound/other-network',
  'inbound/guest-address',
  'outbound/fabric',
  'outbound/other-link',
  'outbound/unmapped',
  'host/to-guest',
  'host/from-guest',
  'loopback/other-guest',
  'loopback/own',
] as const;
export type Case = (typeof CASES)[number];

export interface Comparison {
  readonly case: Case;
  readonly network: string;
  readonly guest: string;
  /** Null: there is none, as for guests without a mapping. */
  readonly address: Ipv4 | null;
  readonly old: string;
  readonly new: string;
  readonly same: boolean;
}

/** What is known of one network on the host. */
export interface NetworkFacts {
  readonly network: Network;
  /** Addresses of the link's subnets; empty: not known. */
  readonly subnets: readonly Span[];
  /** The host's own addresses on the link, aliases excluded. */
  readonly own: readonly Ipv4[];
}

export interface Comparable {
  readonly networks: readonly NetworkFacts[];
  readonly sources: readonly RuleSource[];
  /** Addresses that the host has before the switch. */
  readonly local: ReadonlySet<string>;
  /**
   * What the kernel takes as source for a packet of the host to an address of its own: of a secondary address the first
   * one of its subnet, empty where that is not known. An address that is not in it is its own source.
   */
  readonly preferredSources: ReadonlyMap<string, string>;
  /** Mappings of the new table, those that it has already included. */
  readonly mappings: readonly Pick<Mapping, 'guest' | 'address' | 'network'>[];
  /** Mappings that come new: they are compared. */
  readonly coming: readonly Pick<Mapping, 'guest' | 'address' | 'network'>[];
  /** Guest and IB addresses that rules name and that get no mapping. */
  readonly unmapped: readonly { readonly guest: Ipv4; readonly address: Ipv4; readonly network: string }[];
  /** Rules that go. */
  readonly removed: ReadonlySet<Rule>;
  /** The table of kvm-ib is loaded already. */
  readonly loaded: boolean;
}

interface World {
  readonly sources: readonly RuleSource[];
  readonly without: ReadonlySet<Rule>;
  readonly isLocal: (address: string) => boolean;
  readonly ours: Ours | undefined;
}

interface Ours {
  readonly guestToIb: ReadonlyMap<string, Ipv4>;
  readonly ibToGuest: ReadonlyMap<string, Ipv4>;
}

/** One end of a packet's way. */
interface End {
  readonly text: string;
  readonly conditions: readonly string[];
}

type Hook = 'PREROUTING' | 'INPUT' | 'OUTPUT' | 'POSTROUTING';
const PROTOCOLS = ['tcp', 'udp', 'icmp', 'other'] as const;

/** @param progress called now and then with how many addresses are done */
export function compare(
  facts: Comparable,
  progress: (done: number, all: number) => void = () => undefined,
): readonly Comparison[] {
  const ours = {
    guestToIb: new Map(facts.mappings.map((m) => [m.guest as string, m.address])),
    ibToGuest: new Map(facts.mappings.map((m) => [m.address as string, m.guest])),
  };
  const coming = new Set<string>(facts.coming.map((m) => m.address));
  // With nothing in it the table of before has no say in these addresses, but its guards hold.
  const before = facts.mappings.filter((m) => !coming.has(m.address));
  const oldOurs = facts.loaded
    ? {
        guestToIb: new Map(before.map((m) => [m.guest as string, m.address])),
        ibToGuest: new Map(before.map((m) => [m.address as string, m.guest])),
      }
    : undefined;
  const old: World = {
    sources: facts.sources,
    without: new Set(),
    isLocal: (address) => facts.local.has(address),
    ours: oldOurs,
  };
  const next: World = {
    sources: facts.sources,
    without: facts.removed,
    isLocal: (address) => facts.local.has(address) || ours.ibToGuest.has(address),
    ours,
  };
  const all = facts.networks;
  const results: Comparison[] = [];
  const total = facts.coming.length + facts.unmapped.length;
  let done = 0;
  for (const one of all) {
    const { network } = one;
    const scene = createScene(one, all);
    const add = (kind: Case, guest: string, address: Ipv4 | null, flow: Flow, before = flow): void => {
      const was = endsOf(old, scene, before);
      const is = endsOf(next, scene, flow);
      const same = sameEnds(was, is);
      results.push({ case: kind, network: network.name, guest, address, old: said(was), new: said(is), same });
    };
    const own = facts.coming.filter((m) => m.network === network.name);
    own.forEach((m, index) => {
      const { guest, address } = m;
      const other = own[(index + 1) % own.length];
      const flows: readonly (readonly [Case, Flow | undefined])[] = [
        ['inbound/fabric', { in: scene.device, source: scene.peer, destination: address }],
        ['inbound/other-link', { in: scene.elsewhere, source: scene.anybody, destination: address }],
        ['inbound/guest-address', { in: scene.device, source: scene.peer, destination: guest }],
        ['outbound/fabric', { in: scene.bridge, source: guest, destination: scene.peer }],
        ['outbound/other-link', { in: scene.bridge, source: guest, destination: scene.anybody }],
        ['host/from-guest', one.own[0] && { in: scene.bridge, source: guest, destination: one.own[0] }],
        [
          'loopback/other-guest',
          other === m || other === undefined
            ? undefined
            : { in: scene.bridge, source: other.guest, destination: address },
        ],
        ['loopback/own', { in: scene.bridge, source: guest, destination: address }],
      ];
      for (const [kind, flow] of flows) if (flow !== undefined) add(kind, guest, address, flow);
      for (const other of scene.others)
        add('inbound/other-network', guest, address, { ...other, destination: address });
      // Our alias stands for itself, so it is its own source.
      const toGuest = { in: undefined, source: address, destination: address };
      const preferred = facts.preferredSources.get(address);
      add('host/to-guest', guest, address, toGuest, {
        ...toGuest,
        source: preferred === '' ? scene.host : (preferred ?? address),
      });
      done += 1;
      if (done % 500 === 0) progress(done, total);
    });
    for (const { guest, address } of facts.unmapped.filter((m) => m.network === network.name)) {
      // The IB address may be another guest's, which is compared as that one's.
      if (!ours.ibToGuest.has(address)) {
        add('inbound/fabric', guest, address, { in: scene.device, source: scene.peer, destination: address });
      }
      if (!ours.guestToIb.has(guest)) {
        add('outbound/fabric', guest, address, { in: scene.bridge, source: guest, destination: scene.peer });
      }
      done += 1;
    }
    // Guests that no rule names one by one, but that a rule such as a masquerade serves.
    const named = [...ours.guestToIb.keys(), ...facts.unmapped.map((m) => m.guest as string)].map(spanOf);
    const rest = without([surrounding(rangeSpan(network.guests))], named);
    if (rest.length > 0) {
      const flow: Flow = { in: scene.bridge, source: { set: rest, name: 'the guest' }, destination: scene.peer };
      const served = endsOf(old, scene, flow).some(({ text }) => !text.endsWith('from the guest') && text !== DROPPED);
      if (served) add('outbound/unmapped', 'other guests', null, flow);
    }
  }
  progress(total, total);
  return results;
}

function sameEnds(a: readonly End[], b: readonly End[]): boolean {
  const isSame = (one: End, other: End | undefined): boolean =>
    one.text === other?.text &&
    one.conditions.length === other.conditions.length &&
    one.conditions.every((condition, place) => condition === other.conditions[place]);
  return a.length === b.length && a.every((one, place) => isSame(one, b[place]));
}

/** Somebody in a packet: one address, or a set of them under a name. */
type Party = string | { readonly set: AddressSet; readonly name: string };

interface Flow {
  /** Undefined: the host itself sends it. */
  readonly in: PacketLink | undefined;
  readonly source: Party;
  readonly destination: Party;
}

interface Scene {
  readonly facts: NetworkFacts;
  readonly device: PacketLink;
  readonly bridge: PacketLink;
  /** A link that is none of any network. */
  readonly elsewhere: PacketLink;
  /** Any other host of the fabric. */
  readonly peer: Party;
  /** Any host that is not on the fabric. */
  readonly anybody: Party;
  /** This host, where its address is not known. */
  readonly host: Party;
  /** The two sides of each other network, and who sends there. */
  readonly others: readonly { readonly in: PacketLink; readonly source: Party; readonly isolate: boolean }[];
}

const DROPPED = 'dropped';
const EVERYTHING: Span = { first: 0, last: 2 ** 32 - 1 };
/** Not unicast, or not routed. */
const NEVER: readonly Span[] = [
  { first: 0, last: 0x00ffffff },
  { first: 0x7f000000, last: 0x7fffffff },
  { first: 0xe0000000, last: EVERYTHING.last },
];

function createScene(facts: NetworkFacts, all: readonly NetworkFacts[]): Scene {
  const { network } = facts;
  const links = all.flatMap((one) => [one.network.device, one.network.bridge]);
  const ranges = all.flatMap((one) => [rangeSpan(one.network.guests), rangeSpan(one.network.addresses)]);
  const ours = [...ranges, ...all.flatMap((one) => one.own.map(spanOf))];
  const fabric = facts.subnets.length > 0 ? facts.subnets : [surrounding(rangeSpan(network.addresses))];
  const subnets = [
    ...all.flatMap((one) => one.subnets),
    ...fabric,
    ...all.map((one) => surrounding(rangeSpan(one.network.guests))),
  ];
  return {
    facts,
    device: { kind: 'named', name: network.device },
    bridge: { kind: 'named', name: network.bridge },
    elsewhere: { kind: 'other-than', names: links },
    peer: { set: without(fabric, [...ours, surrounding(rangeSpan(network.guests))]), name: 'the other host' },
    others: all.flatMap((one) => {
      if (one === facts) return [];
      const { name, device, bridge, guests, isolate } = one.network;
      const peers = one.subnets.length > 0 ? one.subnets : [surrounding(rangeSpan(one.network.addresses))];
      return [
        {
          in: { kind: 'named', name: bridge } as const,
          source: { set: [rangeSpan(guests)], name: `a guest of network ${name}` },
          isolate,
        },
        {
          in: { kind: 'named', name: device } as const,
          source: { set: without(peers, ours), name: `a host of network ${name}` },
          isolate,
        },
      ];
    }),
    host: { set: without([EVERYTHING], [...NEVER, ...ranges]), name: "the host's own address" },
    anybody: { set: without([EVERYTHING], [...NEVER, ...ours, ...subnets]), name: 'the other host' },
  };
}

function rangeSpan({ first, last }: { readonly first: Ipv4; readonly last: Ipv4 }): Span {
  return { first: ipv4ToNumber(first), last: ipv4ToNumber(last) };
}

/** The /24s that a range lies in: as good as any guess where the subnet is not known. */
function surrounding({ first, last }: Span): Span {
  return { first: first - (first % 256), last: last - (last % 256) + 255 };
}

function spanOf(address: string): Span {
  const n = ipv4ToNumber(address as Ipv4);
  return { first: n, last: n };
}

/** Where the packet may end, for all protocols together. */
function endsOf(world: World, scene: Scene, flow: Flow): readonly End[] {
  const mattered = { protocol: false };
  const first = ends(world, scene, flow, 'tcp', mattered);
  if (!mattered.protocol) return first;
  const byText = new Map<string, string[]>();
  const results = PROTOCOLS.map(
    (protocol) => [protocol, protocol === 'tcp' ? first : ends(world, scene, flow, protocol, mattered)] as const,
  );
  for (const [protocol, found] of results) {
    const key = JSON.stringify(found);
    byText.set(key, [...(byText.get(key) ?? []), protocol]);
  }
  if (byText.size === 1) return first;
  return [...byText].flatMap(([key, protocols]) =>
    (JSON.parse(key) as readonly End[]).map(({ text, conditions }) => ({
      text,
      conditions: [`protocol ${protocols.join(', ')}`, ...conditions],
    })),
  );
}

function said(list: readonly End[]): string {
  if (list.length === 1 && list[0]?.conditions.length === 0) return list[0].text;
  return list
    .map(({ text, conditions }) =>
      conditions.length === 0 ? `otherwise ${text}` : `${text} (if ${conditions.join(' and ')})`,
    )
    .join('; ');
}

/** What a packet has become on its way. */
interface State {
  readonly source: Party;
  readonly destination: Party;
  readonly dnat: boolean;
  readonly snat: boolean;
  readonly conditions: readonly string[];
}

interface Step extends State {
  /** It ends here. */
  readonly end?: string;
}

type Protocol = (typeof PROTOCOLS)[number];
interface Mattered {
  protocol: boolean;
}

function ends(world: World, scene: Scene, flow: Flow, protocol: Protocol, mattered: Mattered): readonly End[] {
  const { network } = scene.facts;
  const begin: State = { source: flow.source, destination: flow.destination, dnat: false, snat: false, conditions: [] };
  const found: End[] = [];
  const end = (state: State, text: string): void => void found.push({ text, conditions: state.conditions });
  const hook = (
    name: Hook,
    state: State,
    incoming: PacketLink | undefined,
    out: PacketLink | undefined,
  ): readonly Step[] => decide(world, scene, name, state, incoming, out, flow, protocol, mattered);

  const leave = (state: State, out: PacketLink): void => {
    if (world.ours !== undefined && isGuarded(world.ours, scene, flow, state, out)) {
      end(state, DROPPED);
      return;
    }
    // Bridged or not, POSTROUTING knows no link that it came in by.
    for (const step of hook('POSTROUTING', state, undefined, out)) {
      const leaks = network.isolate && out === scene.device && isGuest(network, step.source);
      if (step.end !== undefined) end(step, step.end);
      else if (world.ours !== undefined && leaks) end(step, DROPPED);
      else end(step, reaches(world, scene, flow, step, out));
    }
  };
  const arrive = (state: State): void => {
    const mapped = typeof state.destination === 'string' && world.ours?.ibToGuest.has(state.destination);
    if (mapped && flow.in !== undefined) {
      end(state, DROPPED);
      return;
    }
    for (const step of hook('INPUT', state, flow.in, undefined)) {
      end(step, step.end ?? `ends on this host, from ${nameOf(step.source)}`);
    }
  };
  const route = (state: State): void => {
    const { destination } = state;
    if (typeof destination === 'string' && world.isLocal(destination)) arrive(state);
    else leave(state, linkTo(scene, destination));
  };

  const before = flow.in === undefined ? 'OUTPUT' : 'PREROUTING';
  for (const step of hook(before, begin, flow.in, undefined)) {
    if (step.end !== undefined) end(step, step.end);
    else route(step);
  }
  return merged(found);
}

/** Ways that end alike are one, on the conditions that they share. */
function merged(list: readonly End[]): readonly End[] {
  const [sole] = list;
  if (sole !== undefined && list.length === 1) return [{ ...sole, conditions: [] }];
  const byText = new Map<string, End>();
  for (const one of list) {
    const known = byText.get(one.text);
    const conditions = known?.conditions.filter((condition) => one.conditions.includes(condition));
    byText.set(one.text, conditions === undefined ? one : { ...one, conditions });
  }
  const [only, ...more] = byText.values();
  return only !== undefined && more.length === 0 ? [{ ...only, conditions: [] }] : [...byText.values()];
}

/** Where a packet to somebody who is not this host leaves. */
function linkTo(scene: Scene, party: Party): PacketLink {
  if (party === scene.anybody) return scene.elsewhere;
  const { network, subnets } = scene.facts;
  const [span = EVERYTHING] = setOf(party);
  const within = ({ first, last }: Span): boolean => span.first >= first && span.last <= last;
  if (within(rangeSpan(network.guests))) return scene.bridge;
  if (party === scene.peer || within(rangeSpan(network.addresses)) || subnets.some(within)) return scene.device;
  return within(surrounding(rangeSpan(network.guests))) ? scene.bridge : scene.elsewhere;
}

function reaches(world: World, scene: Scene, flow: Flow, state: State, out: PacketLink): string {
  // What a guest sends must have a mapping, an answer too.
  const { network } = scene.facts;
  const { destination } = state;
  const isUnmapped = typeof destination === 'string' && world.ours?.guestToIb.has(destination) === false;
  const mute =
    network.isolate && flow.in === scene.device && out === scene.bridge && isUnmapped
      ? ', whose answer is dropped'
      : '';
  const past =
    state.dnat && flow.in === scene.bridge && out === scene.bridge && isGuest(scene.facts.network, state.source)
      ? ', whose answer then goes past this host'
      : '';
  const by = out === scene.elsewhere ? ' by another link' : '';
  return `reaches ${nameOf(state.destination)}${by} from ${nameOf(state.source)}${past}${mute}`;
}

function nameOf(party: Party): string {
  return typeof party === 'string' ? party : party.name;
}

function isGuest(network: Network, party: Party): boolean {
  if (typeof party === 'string') return rangeContains(network.guests, party as Ipv4);
  return party.name === 'the guest';
}

/** The guards of our table for what is forwarded. @returns true when it is dropped */
function isGuarded(ours: Ours, scene: Scene, flow: Flow, state: State, out: PacketLink): boolean {
  const { network } = scene.facts;
  const { in: incoming } = flow;
  // Two networks are routed as the kernel would only if neither is isolated.
  const other = scene.others.find((one) => one.in === incoming);
  if (other !== undefined) return network.isolate || other.isolate;
  if (!network.isolate) return false;
  const mapped = typeof state.source === 'string' && ours.guestToIb.has(state.source);
  const sentToIb = state.dnat && typeof flow.destination === 'string' && ours.ibToGuest.has(flow.destination);
  if (incoming === scene.bridge && out === scene.device) return !mapped;
  if (incoming === scene.device && out === scene.bridge) return !state.dnat;
  if (incoming === scene.bridge && out === scene.bridge) return sentToIb && !mapped;
  return incoming === scene.elsewhere && out === scene.bridge && sentToIb;
}

function decide(
  world: World,
  scene: Scene,
  hook: Hook,
  state: State,
  incoming: PacketLink | undefined,
  out: PacketLink | undefined,
  flow: Flow,
  protocol: Protocol,
  mattered: Mattered,
): readonly Step[] {
  const first = (hook === 'PREROUTING' || hook === 'OUTPUT') && !state.dnat;
  const packet = (): Packet => ({
    in: incoming,
    out,
    source: setOf(state.source),
    destination: setOf(state.destination),
    protocol,
    states: ['NEW', ...(state.dnat ? ['DNAT'] : []), ...(state.snat ? ['SNAT'] : [])],
    toLocal: typeof state.destination === 'string' && world.isLocal(state.destination),
  });
  const ask = (table: string, source: RuleSource): readonly Branch[] => {
    const asked = packet();
    const branches = walk(source.tables.get(table), hook, asked, world.without, () => (mattered.protocol = true));
    return branches;
  };
  const raws = first
    ? world.sources.flatMap((source) => ask('raw', source)).filter((b) => b.decision.kind !== 'none')
    : [];
  const untracked = raws.find(({ decision }) => decision.kind === 'notrack' || decision.kind === 'drop');
  if (untracked !== undefined && untracked.conditions.length === 0) {
    return [
      untracked.decision.kind === 'drop'
        ? { ...state, end: DROPPED }
        : { ...state, end: 'not tracked, so not translated' },
    ];
  }
  const doubtful: readonly Step[] =
    untracked === undefined
      ? []
      : [
          {
            ...state,
            end: 'not tracked, so not translated',
            conditions: [...state.conditions, ...untracked.conditions],
          },
        ];

  const ours = world.ours && decidedByOurs(world.ours, scene, hook, state, incoming, out, flow);
  if (ours !== undefined) return [...doubtful, ours];
  // Two parts of iptables at one priority: who was there first is asked first.
  const orders = world.sources.length > 1 ? [world.sources, [...world.sources].reverse()] : [world.sources];
  const steps = orders.flatMap((sources) => sequence(sources, state, (source) => ask('nat', source), scene));
  return [...doubtful, ...distinctSteps(steps)];
}

function sequence(
  sources: readonly RuleSource[],
  state: State,
  ask: (source: RuleSource) => readonly Branch[],
  scene: Scene,
): readonly Step[] {
  const [source, ...rest] = sources;
  if (source === undefined) return [state];
  return ask(source).flatMap(({ decision, conditions }): readonly Step[] => {
    const after: State = { ...state, conditions: [...state.conditions, ...conditions] };
    const goesOn = decision.kind === 'none' || decision.kind === 'notrack';
    return goesOn ? sequence(rest, after, ask, scene) : [decided(after, decision, scene)];
  });
}

function decided(state: State, decision: Decision, scene: Scene): Step {
  if (decision.kind === 'drop') return { ...state, end: DROPPED };
  if (decision.kind === 'unknown' && decision.name === 'REDIRECT')
    return { ...state, end: 'is redirected to this host' };
  if (decision.kind === 'unknown') return { ...state, end: `what ${decision.name} does is not known` };
  if (decision.kind === 'masquerade') return { ...state, source: scene.host, snat: true };
  if (decision.kind !== 'dnat' && decision.kind !== 'snat') return state;
  const { to } = decision;
  const name = printSpan(to) + (to.ports === undefined ? '' : `:${to.ports}`);
  const single = to.first === to.last && to.ports === undefined;
  const party: Party = single ? ipv4FromNumber(to.first) : { set: [to], name };
  return decision.kind === 'dnat'
    ? { ...state, destination: party, dnat: true }
    : { ...state, source: party, snat: true };
}

function distinctSteps(steps: readonly Step[]): readonly Step[] {
  if (steps.length === 1) return steps;
  const key = ({ source, destination, end, dnat, snat, conditions }: Step): string =>
    JSON.stringify([nameOf(source), nameOf(destination), end, dnat, snat, conditions]);
  return [...new Map(steps.map((step) => [key(step), step])).values()];
}

/** The NAT chains of our table, which are asked before iptables. @returns undefined when they decide nothing */
function decidedByOurs(
  ours: Ours,
  scene: Scene,
  hook: Hook,
  state: State,
  incoming: PacketLink | undefined,
  out: PacketLink | undefined,
  flow: Flow,
): State | undefined {
  const { source, destination } = state;
  const { own } = scene.facts;
  const address = typeof source === 'string' ? ours.guestToIb.get(source) : undefined;
  if (hook === 'PREROUTING' || hook === 'OUTPUT') {
    const guest = typeof destination === 'string' ? ours.ibToGuest.get(destination) : undefined;
    if (guest === undefined || (hook === 'PREROUTING' && incoming === scene.elsewhere)) return undefined;
    return { ...state, destination: guest, dnat: true };
  }
  if (hook === 'INPUT') {
    const toOwn = incoming === scene.bridge && own.some((one) => one === destination);
    return toOwn && address !== undefined ? { ...state, source: address, snat: true } : undefined;
  }
  if (out === scene.device && address !== undefined) return { ...state, source: address, snat: true };
  if (out !== scene.bridge || !state.dnat) return undefined;
  const sentToIb = typeof flow.destination === 'string' && ours.ibToGuest.has(flow.destination);
  if (sentToIb && address !== undefined) return { ...state, source: address, snat: true };
  if (typeof source === 'string' && ours.ibToGuest.has(source)) {
    return { ...state, source: own[0] ?? scene.host, snat: true };
  }
  return undefined;
}

const sets = new Map<string, AddressSet>();

function setOf(party: Party): AddressSet {
  if (typeof party !== 'string') return party.set;
  const known = sets.get(party);
  if (known !== undefined) return known;
  if (sets.size > 200_000) sets.clear();
  const made = [spanOf(party)];
  sets.set(party, made);
  return made;
}
