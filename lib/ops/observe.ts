/** Reads from the kernel what a plan needs: by key for the mappings of one change, or everything for reconcile and status. */
import type { Ipv4, LinkName, Mac } from '../core/address.ts';
import { rangeContains } from '../core/address.ts';
import { KvmIbError } from '../core/errors.ts';
import type { Config, Mapping, Network, ServedNetwork } from '../core/mapping.ts';
import { aliasKey, isOurLabel } from '../core/mapping.ts';
import type { Observed, ObservedAlias, ObservedBridge } from '../core/plan.ts';
import { elementComment } from '../core/plan.ts';
import type { TableRecord } from '../core/served.ts';
import { networkOfLinks, networksText, servedNetworks, serves } from '../core/served.ts';
import type { InetAddress } from '../link/ports.ts';
import type { ObservedPairs, ObservedTable, Pair, TableSpec } from '../nat/engine.ts';
import type { Host } from './host.ts';

export function pairOf(mapping: Mapping): Pair {
  return { guest: mapping.guest, address: mapping.address, mac: mapping.mac, comment: elementComment(mapping) };
}

/** The pairs that a table holds both ways, each with its binding to a source MAC, or to none where it is unbound. */
export function observedPairs(observed: ObservedPairs): readonly Pair[] {
  const macs = new Map([...observed.macs].map((entry) => entry.split(' ') as [Ipv4, Mac]));
  return [...observed.guestToIb].flatMap(([guest, address]): readonly Pair[] => {
    const mac = macs.get(guest) ?? null;
    const bound = mac !== null || observed.unbound.has(guest);
    return bound && observed.ibToGuest.get(address) === guest ? [{ guest, address, mac, comment: '' }] : [];
  });
}

/**
 * Observes just these mappings, at a cost that does not grow with how many others there are.
 * @param want mappings that are to be there: their links must exist, and their addresses must be free or ours
 * @param before mappings that this owner has had, or that are to be released
 * @param trusted mappings of active files: an address of theirs that is local is taken to be our alias without dumping
 *   all addresses
 * @throws KvmIbError `conflict` when an address is held by an alias or link that is not ours, `host-lacks` when a link is missing
 */
export async function observeMappings(
  host: Host,
  want: readonly Mapping[],
  before: readonly Mapping[],
  trusted: readonly Mapping[],
): Promise<Observed> {
  const all = [...want, ...before];
  const pairs = await lookupPairs(host, all);
  const aliases = await observeAliases(host, want, before, trusted);
  const bridges: ObservedBridge[] = [];
  for (const [bridge, device] of new Map(want.map((m) => [m.bridge, m.device]))) {
    const observed = await observeBridge(host, bridge, device);
    requireLinks(observed);
    bridges.push(observed);
  }
  return { ...pairs, aliases, bridges };
}

/** The pairs of these mappings, and of whatever else the kernel holds under their keys. */
async function lookupPairs(host: Host, mappings: readonly Mapping[]): Promise<ObservedPairs> {
  const first = await host.nat.lookup(mappings.map(pairOf));
  const known = new Set(mappings.flatMap((m) => [m.guest, m.address]));
  const strangers = [
    ...[...first.guestToIb].filter(([, address]) => !known.has(address)),
    ...[...first.ibToGuest]
      .filter(([, guest]) => !known.has(guest))
      .map(([address, guest]) => [guest, address] as const),
  ].map(([guest, address]): Pair => ({ guest, address, mac: null, comment: '' }));
  if (strangers.length === 0) return first;
  const second = await host.nat.lookup(strangers);
  return {
    ...first,
    guestToIb: new Map([...second.guestToIb, ...first.guestToIb]),
    ibToGuest: new Map([...second.ibToGuest, ...first.ibToGuest]),
  };
}

async function observeAliases(
  host: Host,
  want: readonly Mapping[],
  before: readonly Mapping[],
  trusted: readonly Mapping[],
): Promise<readonly ObservedAlias[]> {
  const found: ObservedAlias[] = [];
  let dump: readonly InetAddress[] | undefined;
  const all = [...want, ...before];
  const wanted = new Set(want.map((m) => m.address));
  for (const address of new Set(all.map((m) => m.address))) {
    if (!(await host.links.isLocal(address))) continue;
    const known = trusted.find((m) => m.address === address);
    if (known !== undefined) {
      found.push({ device: known.device, address, label: known.label });
      continue;
    }
    dump ??= await host.links.addresses();
    const stranger = strangersOf(dump, all).get(address);
    if (stranger !== undefined && wanted.has(address)) throw foreignAlias(address, stranger);
    found.push(...aliasesIn(dump).filter((alias) => alias.address === address));
  }
  return found;
}

/** What may be an alias of ours: a plan compares device and label as well, and touches no other. */
function aliasesIn(addresses: readonly InetAddress[]): readonly ObservedAlias[] {
  return addresses
    .filter((entry) => entry.prefixLength === 32)
    .map(({ device, address, label }) => ({ device, address, label }));
}

function foreignAlias(address: Ipv4, holder: InetAddress): KvmIbError {
  return new KvmIbError('conflict', `Cannot take the IB address ${address}`, {
    why: `this host has ${address}/${holder.prefixLength} on ${holder.device} already, labelled "${holder.label}", and that is not an alias of this mapping`,
    fix: `if nobody needs it: ip address del ${address}/${holder.prefixLength} dev ${holder.device}`,
  });
}

/** MTU and ports of one bridge and its IPoIB link; a link that is missing is null, not an error. */
export async function observeBridge(
  host: Pick<Host, 'links'>,
  bridge: LinkName,
  device: LinkName,
): Promise<ObservedBridge> {
  const bridgeLink = await host.links.link(bridge);
  const deviceLink = await host.links.link(device);
  const ports =
    bridgeLink !== undefined && (await host.links.bridgeCallsIptables(bridge))
      ? await host.links.bridgePorts(bridge)
      : [];
  return {
    bridge,
    device,
    bridgeMtu: bridgeLink?.mtu ?? null,
    deviceMtu: deviceLink?.mtu ?? null,
    portsToHairpin: ports.filter((port) => !port.hairpin).map((port) => port.name as LinkName),
  };
}

/** @throws KvmIbError `host-lacks` when a link that these mappings need is missing */
export async function refuseMissingLinks(host: Host, want: readonly Mapping[]): Promise<void> {
  for (const [bridge, device] of new Map(want.map((m) => [m.bridge, m.device]))) {
    requireLinks(await observeBridge(host, bridge, device));
  }
}

function requireLinks(observed: ObservedBridge): void {
  if (observed.deviceMtu === null) throw noDevice(observed.device);
  if (observed.bridgeMtu === null) {
    throw new KvmIbError('host-lacks', `Cannot map on ${observed.bridge}`, {
      why: `this host has no bridge ${observed.bridge}`,
      fix: `start its libvirt network, made from \`kvm-ib network-xml\` (virsh net-list --all), or correct \`bridge\` in the configuration`,
    });
  }
}

function noDevice(device: LinkName): KvmIbError {
  return new KvmIbError('host-lacks', `Cannot map on ${device}`, {
    why: `this host has no link ${device}`,
    fix: `bring the IPoIB link up (ip link show ${device}), or correct \`device\` in the configuration`,
  });
}

/** Everything of ours in the kernel, and the addresses that are not. */
export interface HostView {
  readonly table: ObservedTable;
  /** What the table is held against. */
  readonly spec: TableSpec;
  /** Devices and bridges that are not there. */
  readonly absent: ReadonlySet<string>;
  readonly observed: Observed;
  /** Every IPv4 address of the host. */
  readonly addresses: readonly InetAddress[];
}

/**
 * @param mappings all that stand, or are wished
 * @param keep true: not all of them are known
 */
export async function observeHost(host: Host, mappings: readonly Mapping[], keep: boolean): Promise<HostView> {
  const addresses = await host.links.addresses();
  const record = host.store.readTable();
  const needed = neededSpec(host, mappings, addresses, keep);
  // What it serves beyond the need is no fault of it: the last mapping of an older configuration has just ended.
  const isEnough =
    record !== undefined && isLoadedFor(record, host.config, mappings) && sameHostAddresses(record, needed);
  const spec = isEnough ? record : needed;
  const table = await host.nat.list(spec);
  const bridges: ObservedBridge[] = [];
  const absent = new Set<string>();
  for (const { bridge, device } of spec.networks) {
    const seen = await observeBridge(host, bridge, device);
    if (seen.bridgeMtu === null) absent.add(bridge);
    if (seen.deviceMtu === null) absent.add(device);
    // A bridge that two networks share for a while follows the link of the configuration, which is named first.
    if (!bridges.some((known) => known.bridge === bridge)) bridges.push(seen);
  }
  return { table, spec, absent, observed: { ...table, aliases: aliasesIn(addresses), bridges }, addresses };
}

/** What the table must serve: the configuration, and what mappings of an older one need besides. */
export function neededSpec(
  host: Pick<Host, 'config' | 'store'>,
  mappings: readonly Mapping[],
  addresses: readonly InetAddress[],
  keep: boolean,
): TableSpec {
  const loaded = host.store.readTable()?.networks ?? [];
  return tableSpec(servedNetworks(host.config.networks, mappings, loaded, keep), addresses);
}

/** Whether the table was loaded for this configuration, and carries these mappings. */
export function isLoadedFor(record: TableRecord, config: Config, mappings: readonly Mapping[]): boolean {
  return record.configured === networksText(config.networks) && mappings.every((m) => serves(record.networks, m));
}

/** By device, since a network of an older configuration may have had another name. */
function sameHostAddresses(record: TableSpec, needed: TableSpec): boolean {
  const known = new Map(record.networks.map(({ device, name }) => [device, record.hostAddresses.get(name)?.join()]));
  return needed.networks.every(({ device, name }) => known.get(device) === needed.hostAddresses.get(name)?.join());
}

/**
 * What keeps a wanted mapping from being made on this host; undefined: nothing.
 * @param strangers addresses of this host that are no aliases of ours, see `strangersOf`
 * @returns `host-lacks` without its link, `conflict` when the host's own address lies in the range or somebody else has
 *   its IB address
 */
export function hindranceOf(
  config: Config,
  mapping: Mapping,
  view: HostView,
  strangers: ReadonlyMap<Ipv4, InetAddress>,
): KvmIbError | undefined {
  const { device, address } = mapping;
  const network = networkOfLinks(config.networks, mapping);
  const own = network && ownAddressInRange(network, view.spec.hostAddresses.get(network.name) ?? []);
  if (own !== undefined) return own;
  if (view.absent.has(device)) return noDevice(device);
  const stranger = strangers.get(address);
  return stranger === undefined ? undefined : foreignAlias(address, stranger);
}

/** Who has addresses of this host that are no alias of any of these mappings, by address. */
export function strangersOf(
  addresses: readonly InetAddress[],
  mappings: readonly Mapping[],
): ReadonlyMap<Ipv4, InetAddress> {
  const ours = new Set(mappings.map(aliasKey));
  const strangers = addresses.filter((entry) => entry.prefixLength !== 32 || !ours.has(aliasKey(entry)));
  return new Map(strangers.map((entry) => [entry.address, entry]));
}

/** What the rule set depends on: the networks, and the host's own addresses on each IPoIB link. */
export function tableSpec(networks: readonly ServedNetwork[], addresses: readonly InetAddress[]): TableSpec {
  const own = (network: ServedNetwork): readonly Ipv4[] =>
    addresses
      .filter((entry) => entry.device === network.device && !isOurLabel(network.device, entry.label))
      // Somebody's alias in the IB range is in the way of that one address, not the host's own.
      .filter((entry) => !hasAddress(network, entry.address) || !isAlias(entry, addresses))
      .map((entry) => entry.address);
  return { networks, hostAddresses: new Map(networks.map((n) => [n.name, own(n)])) };
}

/** One that came beside an address that the link had: by its label, by the kernel's word, or as a /32 beside a subnet. */
function isAlias(entry: InetAddress, all: readonly InetAddress[]): boolean {
  if (entry.label !== entry.device || entry.secondary === true) return true;
  return entry.prefixLength === 32 && all.some((one) => one.device === entry.device && one.prefixLength < 32);
}

/** Whether an IB address is one of the network's. */
export function hasAddress(network: ServedNetwork, address: Ipv4): boolean {
  return network.addresses.some((range) => rangeContains(range, address));
}

/**
 * The host's own address inside a network's IB range: some guest would be promised the host's address.
 * @returns undefined when there is none
 */
export function ownAddressInRange(network: Network, own: readonly Ipv4[]): KvmIbError | undefined {
  const inside = own.find((address) => rangeContains(network.addresses, address));
  if (inside === undefined) return undefined;
  return new KvmIbError('conflict', `Cannot serve network ${network.name}`, {
    why: `${inside} is this host's own address on ${network.device} and lies inside \`addresses\` of the network`,
    fix: 'move the host to an address outside `addresses`, or change the ranges in the configuration',
  });
}
