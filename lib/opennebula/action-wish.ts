/**
 * What one action wants of a VM's mappings. Most of it is `wishedMappings`; what is special is the NIC or alias that
 * OpenNebula marks with ATTACH=YES, in the same way whether it comes or goes.
 *
 * The action's name tells for a NIC. For an alias no action of its own exists: OpenNebula calls prereconfigure and
 * reconfigure for attach and detach alike, and detach_nic with the alias's MAC when the attach failed. Then it is the VM's context
 * that tells: oned writes it anew before both, with `ETH<parent>_ALIAS<n>_…` when the alias comes, without when it goes (read in
 * VirtualMachineContext.cc of 5.10 to 7.4.0; 5.8, the first with aliases, writes `…_DETACH` when it goes and leaves it there
 * for the next alias of that number, so it tells nothing). A VM without network context has no such variables; there an alias that is in effect
 * goes, and one that is not comes, unless it went before, since oned never gives a NIC_ID again.
 */
import { rangeContains, tryParseIpv4 } from '../core/address.ts';
import { networkOfBridge } from '../core/config.ts';
import { KvmIbError } from '../core/errors.ts';
import type { Config, Mapping } from '../core/mapping.ts';
import type { Nic, NicAlias, Vm } from './action-data.ts';
import type { KnownAction } from './contract.ts';
import type { Wish, WishOptions } from './mappings.ts';
import { wishedMappings } from './mappings.ts';

/** What the VM has on this host, from its state file. */
export interface Held {
  readonly mappings: readonly Mapping[];
  readonly detachedAliases: readonly number[];
}

export interface ActionWish extends Wish {
  /** NICs that cannot be mapped as they are and keep what they have. */
  readonly keep: readonly number[];
  /** NICs that the action plugs in. */
  readonly attaching: readonly number[];
  /** Aliases that come with this action. */
  readonly attachedAliases: readonly number[];
  /** Aliases that go with this action. */
  readonly detachedAliases: readonly number[];
}

/** Actions before which the VM has no domain here, or a domain that wakes up: all or nothing. */
const STARTING: readonly KnownAction[] = ['deploy', 'restore'];

/** What an action does with NICs and aliases, as far as it can be told from the VM. */
export interface Marks extends Pick<WishOptions, 'addressFromMac'> {
  /** NIC_IDs of NICs and aliases that do not count. */
  readonly without: ReadonlySet<number>;
  readonly attaching: readonly number[];
  readonly attachedAliases: readonly number[];
  readonly detachedAliases: readonly number[];
  /** Whether a NIC that cannot be mapped is an error; else it keeps what it has, with a note. */
  readonly mustBeMapped: (nic: number) => boolean;
}

export interface WishOfActionOptions extends Pick<WishOptions, 'addressFromMac'> {
  /** Whether our network driver is called for NICs of this VN_MAD, before the VMM driver. */
  readonly hasNetworkDriver?: (vnMad: string) => boolean;
}

/**
 * @throws KvmIbError as `wishedMappings`, for the NIC that the action attaches and for a VM that is started; `conflict` for an
 *   alias that cannot come into effect
 */
export function wishOfAction(
  config: Config,
  vm: Vm,
  action: KnownAction,
  held: Held,
  options: WishOfActionOptions = {},
): ActionWish {
  const { hasNetworkDriver = () => false, addressFromMac = false } = options;
  const without = new Set<number>();
  const attaching: number[] = [];
  for (const { nic } of vm.nics.filter((one) => one.attach)) {
    if (action === 'attach_nic') attaching.push(nic);
    // Behind attach_nic it is held by now, behind detach_nic it is not any more.
    else if (action === 'detach_nic' || !held.mappings.some((m) => m.nic === nic)) without.add(nic);
  }
  const attachedAliases: number[] = [];
  const detachedAliases: number[] = [];
  for (const alias of vm.aliases.filter((one) => one.attach)) {
    if (action === 'detach_nic' || isLeaving(vm, alias, held, hasNetworkDriver)) detachedAliases.push(alias.nic);
    else attachedAliases.push(alias.nic);
    if (action === 'attach_nic' || detachedAliases.includes(alias.nic)) without.add(alias.nic);
  }
  const mustBeMapped = (nic: number): boolean => STARTING.includes(action) || attaching.includes(nic);
  const marks = { without, attaching, attachedAliases, detachedAliases, mustBeMapped, addressFromMac };
  const wish = wishUnder(config, vm, held, marks);
  if (action === 'prereconfigure') refuseIdleAlias(config, vm, attachedAliases, wish.mappings);
  return wish;
}

/** @throws KvmIbError as `wishedMappings`, for NICs that must be mapped */
export function wishUnder(config: Config, vm: Vm, held: Held, marks: Marks): ActionWish {
  const { without, attaching, attachedAliases, detachedAliases, mustBeMapped, addressFromMac = false } = marks;
  // A NIC whose bridge is in the configuration no more: its network is served until the VM ends.
  const isUnknown = ({ nic, bridge }: Nic) =>
    networkOfBridge(config, bridge) === undefined && held.mappings.some((m) => m.nic === nic && m.bridge === bridge);
  const keep = vm.nics.filter((nic) => !without.has(nic.nic) && isUnknown(nic)).map(({ nic }) => nic);
  const faults: string[] = [];
  const wish = wishedMappings(config, vm, {
    addressFromMac,
    without,
    onFault: ({ nic }, error) => {
      if (mustBeMapped(nic)) throw error;
      if (held.mappings.some((m) => m.nic === nic)) keep.push(nic);
      faults.push(faultNote(error));
    },
  });
  return { ...wish, notes: [...wish.notes, ...faults], keep, attaching, attachedAliases, detachedAliases };
}

/**
 * An alias in the IB range that would not come into effect, because its NIC has another: the user would see an address that
 * leads nowhere. One that is attached before the VM starts is left aside with a note; here there is somebody to tell.
 */
export function refuseIdleAlias(
  config: Config,
  vm: Vm,
  attached: readonly number[],
  mappings: readonly Mapping[],
): void {
  for (const alias of vm.aliases.filter((one) => one.external && attached.includes(one.nic))) {
    const parent = mappings.find((m) => m.nic === alias.parentId);
    const network = config.networks.find((one) => one.device === parent?.device && one.bridge === parent.bridge);
    const address = tryParseIpv4(alias.ip ?? '');
    if (parent === undefined || network === undefined || address === undefined) continue;
    if (address === parent.address || !rangeContains(network.addresses, address)) continue;
    throw new KvmIbError('conflict', `Cannot attach the alias ${alias.nic} to NIC ${parent.nic} of VM ${vm.id}`, {
      why: `the NIC has the IB address ${parent.address} by another external alias, and one NIC has one IB address`,
      fix: `detach that alias first (onevm show ${vm.id}), or attach a further NIC for ${address}`,
    });
  }
}

function isLeaving(vm: Vm, alias: NicAlias, held: Held, hasNetworkDriver: (vnMad: string) => boolean): boolean {
  const prefix = `ETH${alias.parentId}_ALIAS${alias.aliasId}_`;
  const names = [...vm.contextNames].filter((name) => name.startsWith(prefix));
  if (names.length > 0 && !names.includes(`${prefix}DETACH`)) return false;
  if (held.detachedAliases.includes(alias.nic)) return true;
  // Our network driver comes first: its `clean` has noted one that goes, its `post` has brought one that comes into effect.
  if (alias.vnMad !== null && hasNetworkDriver(alias.vnMad)) return false;
  return held.mappings.some((m) => m.nic === alias.parentId && m.address === alias.ip);
}

function faultNote(error: KvmIbError): string {
  return `${error.message}: ${error.why ?? 'it cannot be'}; what it has stays until the VM is started anew`;
}
