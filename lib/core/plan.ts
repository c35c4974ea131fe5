/**
 * From what should be and what is to an ordered list of changes. Pure: a plan is data that can be printed, tested and
 * stored; `ops/apply.ts` carries it out. `plan(desired, desired)` is empty.
 *
 * The order is the safety (each line found by experiment):
 * - alias off before its pair goes, pair in before its alias comes: an alias without a pair makes the host itself
 *   answer for the guest.
 * - all pairs of one plan change in one nft transaction.
 * - conntrack entries are dropped after the pairs changed: live flows keep the translation they began with, so they
 *   would go on to the old guest, or on to the host.
 */
import type { Ipv4, LinkName, Mac } from './address.ts';
import type { Mapping } from './mapping.ts';
import { aliasKey } from './mapping.ts';

/** Elements of the table, as lists to delete or to add. */
export interface Elements {
  readonly guestToIb: readonly { readonly guest: Ipv4; readonly address: Ipv4 }[];
  readonly ibToGuest: readonly { readonly address: Ipv4; readonly guest: Ipv4 }[];
  readonly macs: readonly { readonly guest: Ipv4; readonly mac: Mac }[];
  readonly unbound: readonly Ipv4[];
}

export type Change =
  | {
      readonly kind: 'delete-alias';
      readonly device: LinkName;
      readonly address: Ipv4;
      readonly guest: Ipv4;
      readonly label: string;
    }
  | {
      readonly kind: 'change-pairs';
      /** Exactly what is deleted, with the values that were seen: their reversal needs them. */
      readonly remove: Elements;
      readonly add: Elements;
      /** Advisory comments for added guest addresses. */
      readonly comments: Readonly<Record<string, string>>;
    }
  | { readonly kind: 'flush-mapping'; readonly guest: Ipv4; readonly address: Ipv4 }
  | { readonly kind: 'flush-foreign'; readonly guest: Ipv4; readonly address: Ipv4; readonly device: LinkName }
  | { readonly kind: 'set-mtu'; readonly link: LinkName; readonly from: number; readonly to: number }
  | { readonly kind: 'set-hairpin'; readonly port: LinkName; readonly bridge: LinkName; readonly on: boolean }
  | {
      readonly kind: 'add-alias';
      readonly device: LinkName;
      readonly address: Ipv4;
      readonly guest: Ipv4;
      readonly label: string;
    }
  | {
      readonly kind: 'announce';
      readonly device: LinkName;
      readonly address: Ipv4;
      readonly guest: Ipv4;
      readonly label: string;
    };

/** An alias of ours as the kernel shows it. */
export interface ObservedAlias {
  readonly device: string;
  readonly address: Ipv4;
  readonly label: string;
}

export interface ObservedBridge {
  readonly bridge: LinkName;
  readonly device: LinkName;
  /** Null: the link is not there. */
  readonly bridgeMtu: number | null;
  readonly deviceMtu: number | null;
  /** Ports that bridged frames must be able to leave by again, because the bridge hands them to the IP firewall. */
  readonly portsToHairpin: readonly LinkName[];
}

/** What the kernel holds, as far as the mappings in question go. */
export interface Observed {
  readonly guestToIb: ReadonlyMap<Ipv4, Ipv4>;
  readonly ibToGuest: ReadonlyMap<Ipv4, Ipv4>;
  /** `guest mac` bindings. */
  readonly macs: ReadonlySet<string>;
  readonly unbound: ReadonlySet<Ipv4>;
  readonly aliases: readonly ObservedAlias[];
  readonly bridges: readonly ObservedBridge[];
}

export interface Desired {
  /** Mappings that the kernel must hold. */
  readonly want: readonly Mapping[];
  /** Mappings of ours that it must not hold; where a wanted one has the same guest or address, the wanted one wins. */
  readonly release: readonly Mapping[];
}

export function isEmptyElements(elements: Elements): boolean {
  return elements.guestToIb.length + elements.ibToGuest.length + elements.macs.length + elements.unbound.length === 0;
}

/** The ordered changes that make the kernel hold `want` and nothing of `release`. The order of the inputs does not matter. */
export function plan(desired: Desired, observed: Observed): readonly Change[] {
  const want = sorted(desired.want);
  const byGuest = new Map(want.map((m) => [m.guest, m]));
  const byAddress = new Map(want.map((m) => [m.address, m]));
  const release = sorted(desired.release);
  const aliases = new Set(observed.aliases.map(aliasKey));
  const hasAlias = (m: Mapping): boolean => aliases.has(aliasKey(m));

  const aliasesOff: Change[] = [];
  const aliasesOn: Change[] = [];
  const announcements: Change[] = [];
  const flushes: Change[] = [];
  const remove = mutableElements();
  const add = mutableElements();
  const comments: Record<string, string> = {};
  const done = new Set<string>();
  const once = (...key: readonly string[]): boolean => {
    const name = key.join(' ');
    if (done.has(name)) return false;
    done.add(name);
    return true;
  };

  const dropPair = (guest: Ipv4, address: Ipv4): void => {
    if (once('flush', guest, address)) flushes.push({ kind: 'flush-mapping', guest, address });
  };
  const removeGuest = (guest: Ipv4): void => {
    const address = observed.guestToIb.get(guest);
    if (address === undefined || !once('guest', guest)) return;
    remove.guestToIb.push({ guest, address });
    dropPair(guest, address);
  };
  const removeAddress = (address: Ipv4): void => {
    const guest = observed.ibToGuest.get(address);
    if (guest === undefined || !once('address', address)) return;
    remove.ibToGuest.push({ address, guest });
    dropPair(guest, address);
  };

  const removeUnbound = (guest: Ipv4): void => {
    if (observed.unbound.has(guest) && once('unbound', guest)) remove.unbound.push(guest);
  };

  for (const m of release) {
    const aliasWanted = byAddress.get(m.address);
    if (hasAlias(m) && !(aliasWanted && aliasKey(aliasWanted) === aliasKey(m)) && once('alias', aliasKey(m))) {
      aliasesOff.push({ kind: 'delete-alias', device: m.device, address: m.address, guest: m.guest, label: m.label });
    }
    if (!byGuest.has(m.guest)) removeGuest(m.guest);
    if (!byAddress.has(m.address)) removeAddress(m.address);
    const wanted = byGuest.get(m.guest);
    // Also when the pair is gone already: whoever removed it may have been stopped before it came to the flows. A mapping
    // without a label comes from no file, so only what was seen of it goes.
    if (m.label !== '' && wanted?.address !== m.address) dropPair(m.guest, m.address);
    if (
      m.mac !== null &&
      wanted?.mac !== m.mac &&
      observed.macs.has(`${m.guest} ${m.mac}`) &&
      once('mac', m.guest, m.mac)
    ) {
      remove.macs.push({ guest: m.guest, mac: m.mac });
    }
    if (wanted?.mac !== null) removeUnbound(m.guest);
    // The pair goes to another VM: made anew, with its comment, its counters and without the flows of the one before.
    if (m.label !== '' && wanted?.address === m.address && wanted.vm !== m.vm) removeGuest(m.guest);
  }

  for (const m of want) {
    const seenAddress = observed.guestToIb.get(m.guest);
    const seenGuest = observed.ibToGuest.get(m.address);
    if (seenAddress !== undefined && seenAddress !== m.address) {
      removeGuest(m.guest);
      if (!byAddress.has(seenAddress)) removeAddress(seenAddress);
    }
    if (seenGuest !== undefined && seenGuest !== m.guest) {
      removeAddress(m.address);
      if (!byGuest.has(seenGuest)) removeGuest(seenGuest);
    }
    const pairAdded = seenAddress !== m.address || seenGuest !== m.guest;
    const guestAdded = seenAddress !== m.address || done.has(`guest ${m.guest}`);
    if (guestAdded) add.guestToIb.push({ guest: m.guest, address: m.address });
    if (seenGuest !== m.guest) add.ibToGuest.push({ address: m.address, guest: m.guest });
    if (m.mac === null) {
      if (!observed.unbound.has(m.guest)) add.unbound.push(m.guest);
    } else {
      if (!observed.macs.has(`${m.guest} ${m.mac}`)) add.macs.push({ guest: m.guest, mac: m.mac });
      removeUnbound(m.guest);
    }
    if (guestAdded) comments[m.guest] = elementComment(m);
    const aliasAdded = !hasAlias(m);
    if (pairAdded || aliasAdded)
      flushes.push({ kind: 'flush-foreign', guest: m.guest, address: m.address, device: m.device });
    if (aliasAdded) {
      const { device, address, guest, label } = m;
      aliasesOn.push({ kind: 'add-alias', device, address, guest, label });
      announcements.push({ kind: 'announce', device, address, guest, label });
    }
  }

  const bridgeChanges = observed.bridges.flatMap((b): Change[] => [
    ...(b.bridgeMtu !== null && b.deviceMtu !== null && b.bridgeMtu !== b.deviceMtu
      ? [{ kind: 'set-mtu', link: b.bridge, from: b.bridgeMtu, to: b.deviceMtu } as const]
      : []),
    ...b.portsToHairpin.map((port) => ({ kind: 'set-hairpin', port, bridge: b.bridge, on: true }) as const),
  ]);
  const pairs: Change[] =
    isEmptyElements(remove) && isEmptyElements(add) ? [] : [{ kind: 'change-pairs', remove, add, comments }];
  return [...aliasesOff, ...pairs, ...flushes, ...bridgeChanges, ...aliasesOn, ...announcements];
}

/** The change that takes this one back, or undefined where there is nothing to take back. */
export function reverse(change: Change): Change | undefined {
  switch (change.kind) {
    case 'delete-alias':
      return { ...change, kind: 'add-alias' };
    case 'add-alias':
      return { ...change, kind: 'delete-alias' };
    case 'change-pairs':
      return { ...change, remove: change.add, add: change.remove };
    case 'set-mtu':
      return { ...change, from: change.to, to: change.from };
    case 'set-hairpin':
      return { ...change, on: !change.on };
    // A dropped conntrack entry comes back with the flow's next packet; an announcement cannot be unsaid.
    case 'flush-mapping':
    case 'flush-foreign':
    case 'announce':
      return undefined;
  }
}

/** One line for people: `+ alias 192.168.10.202/32 on ib0 (ib0:42-0)`. */
export function describe(change: Change): readonly string[] {
  switch (change.kind) {
    case 'delete-alias':
      return [`- alias     ${change.address}/32 on ${change.device} (${change.label})`];
    case 'add-alias':
      return [`+ alias     ${change.address}/32 on ${change.device} (${change.label})`];
    case 'change-pairs': {
      const lines = (sign: string, e: Elements): string[] => [
        ...e.guestToIb.map((x) => `${sign} element   guest_to_ib ${x.guest} : ${x.address}`),
        ...e.ibToGuest.map((x) => `${sign} element   ib_to_guest ${x.address} : ${x.guest}`),
        ...e.macs.map((x) => `${sign} element   guest_mac ${x.guest} . ${x.mac}`),
        ...e.unbound.map((x) => `${sign} element   guest_any_mac ${x}`),
      ];
      return [...lines('-', change.remove), ...lines('+', change.add)];
    }
    case 'flush-mapping':
      return [`- conntrack entries of ${change.guest} <-> ${change.address}`];
    case 'flush-foreign':
      return [`- conntrack entries of ${change.guest} and ${change.address} with another translation`];
    case 'set-mtu':
      return [`~ mtu       ${change.link} ${change.from} -> ${change.to}`];
    case 'set-hairpin':
      return [`~ hairpin   ${change.port} on ${change.bridge} ${change.on ? 'off -> on' : 'on -> off'}`];
    case 'announce':
      return [`+ announce  ${change.address} on ${change.device}`];
  }
}

/**
 * Advisory text beside a guest's element. The character set is fixed: nft takes quotes and line ends raw and then
 * cannot read its own listing.
 */
export function elementComment(mapping: Mapping): string {
  const who = mapping.vm === null ? 'no vm' : `one-${mapping.vm} nic ${mapping.nic}`;
  return `${who} ${mapping.network}`.replace(/[^A-Za-z0-9 ._:-]/g, '_').slice(0, 100);
}

interface MutableElements {
  guestToIb: { guest: Ipv4; address: Ipv4 }[];
  ibToGuest: { address: Ipv4; guest: Ipv4 }[];
  macs: { guest: Ipv4; mac: Mac }[];
  unbound: Ipv4[];
}

function mutableElements(): MutableElements {
  return { guestToIb: [], ibToGuest: [], macs: [], unbound: [] };
}

function sorted(mappings: readonly Mapping[]): readonly Mapping[] {
  const key = (m: Mapping): string => [m.guest, m.address, m.device, m.label, m.mac].join(' ');
  return [...mappings].sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0));
}
