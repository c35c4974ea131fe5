/**
 * From a VM as OpenNebula describes it to the mappings that it should have. Pure arithmetic on the configuration: nothing
 * is known here about what the kernel holds or what other VMs claim.
 */
import type { Ipv4, Mac } from '../core/address.ts';
import {
  ipv4FromNumber,
  macBytes,
  printRange,
  rangeAt,
  rangeContains,
  rangeOffset,
  tryParseIpv4,
  tryParseMac,
} from '../core/address.ts';
import { networkOfBridge } from '../core/config.ts';
import { KvmIbError, printable } from '../core/errors.ts';
import type { Config, Mapping, Network } from '../core/mapping.ts';
import { aliasLabel } from '../core/mapping.ts';
import type { Nic, NicAlias, Vm } from './action-data.ts';
import { NIC_ID_LIMIT } from './action-data.ts';

/** Which rule gave a NIC its IB address, in the order in which they are tried. */
export type AddressSource = 'external-alias' | 'nic-attribute' | 'range';

export interface WishedMapping {
  readonly mapping: Mapping;
  readonly source: AddressSource;
}

export interface Wish {
  readonly mappings: readonly Mapping[];
  /** The same mappings with the rule behind each address, for `explain` and logs. */
  readonly sources: readonly WishedMapping[];
  /** Networks on whose bridge the VM has a NIC, mapped or not; empty: kvm-ib has nothing to do with this VM. */
  readonly networksTouched: readonly Network[];
  /** NICs on our bridges that are to have no mapping: they opt out. */
  readonly unmapped: readonly number[];
  /** What was left out, and why; one sentence each, safe to print. */
  readonly notes: readonly string[];
}

export interface WishOptions {
  /** NIC_IDs of NICs and aliases to leave out, as after a detach. */
  readonly without?: ReadonlySet<number>;
  /** Takes the error of a NIC that cannot be mapped, instead of throwing it; the NIC is left out. */
  readonly onFault?: (nic: Nic, error: KvmIbError) => void;
  /**
   * Take the guest address from the last four bytes of the MAC where there is no IP: for OpenNebula that tells no more (deploy
   * before 6.0). Off by default: the two differ when the address range has a MAC of its own, SHARED=yes or MAC_GLOBAL_SPACE.
   * A MAC that was made from no address nearly always reads as one outside `guests`, and is refused.
   */
  readonly addressFromMac?: boolean;
}

/**
 * The mappings of a VM: one for each NIC on a bridge of ours that does not opt out.
 *
 * @throws KvmIbError `bad-input` (address or MAC missing or malformed), `out-of-range` (guest address or IB_IP outside
 *   the network's range) or `conflict` (two NICs of this VM with one address); the message names VM and NIC.
 */
export function wishedMappings(config: Config, vm: Vm, options: WishOptions = {}): Wish {
  const { without = new Set<number>(), onFault } = options;
  const keep = ({ nic }: { readonly nic: number }) => !without.has(nic);
  const aliases = vm.aliases.filter(keep);
  const sources: WishedMapping[] = [];
  const unmapped: number[] = [];
  const touched = new Set<Network>();
  const notes: string[] = [];

  for (const nic of vm.nics) {
    const network = networkOfBridge(config, nic.bridge);
    if (network === undefined) continue;
    touched.add(network);
    if (!keep(nic)) continue;
    try {
      const wished = mappingOf(network, vm, nic, aliases, options, notes);
      if (wished === null) unmapped.push(nic.nic);
      else sources.push(wished);
    } catch (error) {
      if (onFault === undefined || !(error instanceof KvmIbError)) throw error;
      onFault(nic, error);
    }
  }
  for (const skipped of vm.skipped) {
    const network = networkOfBridge(config, skipped.bridge);
    if (network === undefined) continue;
    notes.push(`NIC ${skipped.nic ?? '?'} of VM ${vm.id} gets no IB address: ${skipped.reason}`);
  }
  const mappings = sources.map((one) => one.mapping);
  refuseDuplicates(vm, mappings, 'guest');
  refuseDuplicates(vm, mappings, 'address');
  return { mappings, sources, networksTouched: [...touched], unmapped, notes };
}

/** 02:00:c0:a8:7a:0a is 192.168.122.10 where OpenNebula made the MAC from the address; see `addressFromMac` above. */
export function addressFromMac(mac: Mac): Ipv4 {
  return ipv4FromNumber(
    macBytes(mac)
      .subarray(2)
      .reduce((sum, byte) => sum * 256 + byte, 0),
  );
}

function mappingOf(
  network: Network,
  vm: Vm,
  nic: Nic,
  aliases: readonly NicAlias[],
  options: WishOptions,
  notes: string[],
): WishedMapping | null {
  const who = `NIC ${nic.nic} of VM ${vm.id}`;
  if (nic.nic >= NIC_ID_LIMIT) {
    throw new KvmIbError('bad-input', `Cannot map ${who}`, {
      why: `NIC numbers from ${NIC_ID_LIMIT} on do not fit the 15 characters of an alias label`,
      fix: 'create the VM anew: NIC numbers grow with each attach and are not used again',
    });
  }
  const chosen = chooseAddress(network, vm, nic, aliases, notes);
  if (chosen === 'opted-out') return null;

  const mac = guestMac(who, nic);
  const guest = guestAddress(network, who, nic, mac, options);
  const offset = rangeOffset(network.guests, guest);
  if (offset === undefined && nic.ip === null) {
    throw new KvmIbError('out-of-range', `Cannot map ${who}`, {
      why: `OpenNebula tells no address of it, and its MAC ${mac} reads as ${guest}, which is outside the guests ${printRange(network.guests)} of network "${network.name}"`,
      fix: 'let the VNM driver of kvm-ib tell its address (VN_MAD kvm-ib: docs/install.md), or lease it an address of that range whose MAC OpenNebula makes from the address',
    });
  }
  if (offset === undefined) {
    throw new KvmIbError('out-of-range', `Cannot map ${who}${onNetwork(nic)}`, {
      why: `its address ${guest} is outside the guests ${printRange(network.guests)} of network "${network.name}"`,
      fix: `lease it an address of that range, widen the range, or set IB_IP=none on the NIC to do without an IB address`,
    });
  }
  return {
    mapping: {
      network: network.name,
      device: network.device,
      bridge: network.bridge,
      guest,
      address: chosen?.address ?? rangeAt(network.addresses, offset),
      mac,
      vm: vm.id,
      nic: nic.nic,
      label: aliasLabel(network, guest, vm.id, nic.nic),
      named: chosen !== null,
    },
    source: chosen?.source ?? 'range',
  };
}

interface Chosen {
  readonly address: Ipv4;
  readonly source: AddressSource;
}

/** The IB address that OpenNebula or the user asked for; null: by the range. */
function chooseAddress(
  network: Network,
  vm: Vm,
  nic: Nic,
  aliases: readonly NicAlias[],
  notes: string[],
): Chosen | 'opted-out' | null {
  const range = printRange(network.addresses);
  let leased: Chosen | null = null;
  for (const alias of aliases) {
    if (alias.parentId !== nic.nic) continue;
    const address = tryParseIpv4(alias.ip ?? '');
    const inside = address !== undefined && rangeContains(network.addresses, address);
    const name = `the alias ${alias.nic} (${printable(alias.ip ?? 'no IP', 60)}) of NIC ${nic.nic} of VM ${vm.id}`;
    if (inside && alias.external && leased === null) leased = { address, source: 'external-alias' };
    else if (inside && alias.external)
      notes.push(`${name} is not used: a NIC has one IB address, the first alias gives it`);
    else if (inside) notes.push(`${name} is not used: only an alias with EXTERNAL=YES gives an IB address`);
    else if (alias.external)
      notes.push(`${name} is not used: it is outside the addresses ${range} of "${network.name}"`);
  }
  if (leased !== null) return leased;
  if (nic.ibIp === null) return null;
  if (nic.ibIp.toLowerCase() === 'none') {
    notes.push(`NIC ${nic.nic} of VM ${vm.id} gets no IB address: its IB_IP is none`);
    return 'opted-out';
  }
  const message = `Cannot give NIC ${nic.nic} of VM ${vm.id} the address of its IB_IP`;
  const fix = `set IB_IP to an address of ${range}, to none, or remove it`;
  const address = tryParseIpv4(nic.ibIp);
  if (address === undefined) {
    const why = `"${printable(nic.ibIp, 60)}" is ${notIpv4(nic.ibIp)}`;
    throw new KvmIbError('bad-input', message, { why, fix });
  }
  if (!rangeContains(network.addresses, address)) {
    const why = `${address} is outside the addresses ${range} of network "${network.name}"`;
    throw new KvmIbError('out-of-range', message, { why, fix });
  }
  return { address, source: 'nic-attribute' };
}

function guestAddress(network: Network, who: string, nic: Nic, mac: Mac, options: WishOptions): Ipv4 {
  if (nic.ip === null && options.addressFromMac) return addressFromMac(mac);
  const address = tryParseIpv4(nic.ip ?? '');
  if (address !== undefined) return address;
  throw new KvmIbError('bad-input', `Cannot map ${who}${onNetwork(nic)}`, {
    why: nic.ip === null ? 'it has no IP' : `its IP "${printable(nic.ip, 60)}" is ${notIpv4(nic.ip)}`,
    fix: `lease it an IPv4 address of ${printRange(network.guests)} from a virtual network on ${network.bridge}, or set IB_IP=none on the NIC`,
  });
}

function guestMac(who: string, nic: Nic): Mac {
  const mac = tryParseMac(nic.mac ?? '');
  const why = macFault(nic.mac, mac);
  if (mac !== undefined && why === undefined) return mac;
  throw new KvmIbError('bad-input', `Cannot map ${who}${onNetwork(nic)}`, {
    ...(why === undefined ? {} : { why }),
    fix: 'give the NIC a unicast hardware address, or let OpenNebula choose one by leaving MAC out',
  });
}

function macFault(text: string | null, mac: Mac | undefined): string | undefined {
  if (text === null) return 'it has no MAC';
  if (mac === undefined) return `its MAC "${printable(text, 60)}" is not a hardware address of six bytes`;
  // The lowest bit of the first byte marks a group address (IEEE 802); no frame comes from one.
  if (((macBytes(mac)[0] ?? 0) & 1) === 1) return `its MAC ${mac} is a group address`;
  return mac === '00:00:00:00:00:00' ? 'its MAC is all zeros' : undefined;
}

function notIpv4(text: string): string {
  return text.includes(':') ? 'not an IPv4 address (kvm-ib maps no IPv6)' : 'not an IPv4 address';
}

function onNetwork(nic: Nic): string {
  return nic.networkName === null ? '' : ` (virtual network "${printable(nic.networkName, 60)}")`;
}

function refuseDuplicates(vm: Vm, mappings: readonly Mapping[], key: 'guest' | 'address'): void {
  const first = new Map<Ipv4, Mapping>();
  for (const mapping of mappings) {
    const other = first.get(mapping[key]);
    if (other === undefined) {
      first.set(mapping[key], mapping);
      continue;
    }
    throw new KvmIbError('conflict', `Cannot map NIC ${mapping.nic} of VM ${vm.id}`, {
      why: `its ${key === 'guest' ? 'address' : 'IB address'} ${mapping[key]} is also that of NIC ${other.nic}`,
      fix: 'give each NIC its own address',
    });
  }
}
