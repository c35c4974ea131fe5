/**
 * What a VM should have where OpenNebula does not describe it: a deploy before 6.0 (no vm.xml), and every other action before
 * 5.0 (no standard input). NICs come from the domain XML or from argv, addresses from a filter parameter or the MAC, as the
 * driver of 2012 had them. What cannot be seen so (IB_IP, external aliases) comes by the VNM driver's `pre`, or is said to be
 * unseen; an address that lies in no range is refused.
 */
import { networkOfBridge } from '../core/config.ts';
import { KvmIbError, printable } from '../core/errors.ts';
import type { Config, Mapping, Network } from '../core/mapping.ts';
import { domainName } from '../core/mapping.ts';
import type { StateFile } from '../core/state.ts';
import { CLAIM } from '../core/state.ts';
import type { Nic, Vm } from './action-data.ts';
import type { ActionWish, Held } from './action-wish.ts';
import { wishOfAction } from './action-wish.ts';
import type { OwnCall } from './contract.ts';
import type { WishedMapping } from './mappings.ts';

/** One interface of a domain, in the order of its XML. */
export interface DomainNic {
  readonly bridge: string;
  readonly mac: string | null;
  /** Name of the tap. */
  readonly target: string | null;
  /** The address that a filter of the interface lets pass. */
  readonly ip: string | null;
  /** Its place among all interfaces of the domain, from 0. */
  readonly place: number;
}

export interface DomainDescription {
  /** `one-<id>`. */
  readonly name: string | null;
  readonly interfaces: readonly DomainNic[];
}

/**
 * What a domain that is to start on this host should have, by its XML alone.
 *
 * @param note the VM's state file: one that `pre` left says what it saw, and counts
 * @throws KvmIbError `out-of-range` or `bad-input` naming NIC, MAC and remedy; `bad-input` when XML or note are another VM's
 */
export function wishOfDomainXml(
  config: Config,
  call: Pick<OwnCall, 'vmId' | 'action'>,
  domain: DomainDescription,
  note: StateFile | undefined,
): ActionWish {
  const { vmId, action } = call;
  if (domain.name !== domainName(vmId)) {
    throw new KvmIbError('bad-input', `Cannot ${action} VM ${vmId}`, {
      why: `the domain XML is that of ${domain.name === null ? 'a domain without a name' : `"${printable(domain.name, 60)}"`}, not of ${domainName(vmId)}`,
      fix: 'let OpenNebula (one_vmm_exec) call it; a VM that was imported into OpenNebula cannot be mapped',
    });
  }
  const vm = vmOfInterfaces(vmId, domain.interfaces);
  if (note?.phase.name === 'pending' && note.phase.action === CLAIM) {
    return wishOfNote(config, call, vm, note.mappings);
  }
  const wish = wishOfAction(config, vm, action, { mappings: [], detachedAliases: [] }, { addressFromMac: true });
  return { ...wish, notes: [...wish.notes, ...unseen(vm, wish.sources)] };
}

/**
 * What an action on a VM that is there comes to, by argv and the VM's state file: what it has stays, but for the NIC that the
 * action attaches or detaches.
 *
 * @returns undefined when the VM has nothing to do with kvm-ib
 * @throws KvmIbError as `wishOfDomainXml`, for the NIC that is attached
 */
export function wishWithoutData(config: Config, call: OwnCall, held: Held | undefined): ActionWish | undefined {
  const { vmId, action, args } = call;
  const mappings = held?.mappings ?? [];
  const mac = (args['mac'] ?? '').toLowerCase();
  const network = action === 'attach_nic' ? networkNamedBy(config, call) : undefined;
  if (network === undefined) {
    if (held === undefined) return undefined;
    return keeping(mappings.filter((m) => action !== 'detach_nic' || m.mac !== mac));
  }
  const staying = mappings.filter((m) => m.mac !== mac);
  const again = mappings.find((m) => m.mac === mac);
  // Before 5.0 the number of the NIC is not said. The alias label only needs one that no other NIC of the VM has.
  const nic = again?.nic ?? Math.max(0, ...staying.map((m) => (m.nic ?? 0) + 1));
  const vm = bareVm(vmId, [nicOf(nic, { bridge: network.bridge, mac, target: null, ip: null })]);
  const attached = { ...vm, nics: vm.nics.map((one) => ({ ...one, attach: true })) };
  const wish = wishOfAction(config, attached, action, { mappings, detachedAliases: [] }, { addressFromMac: true });
  return { ...wish, keep: keeping(staying).keep, notes: [...wish.notes, ...unseen(vm, wish.sources)] };
}

/**
 * NICs that run with an address read from their MAC, while OpenNebula now says another: one sentence each. For versions that
 * do not say it at deploy but do say it later (5.0 to 5.12).
 */
export function correctedAddresses(held: Held | undefined, wish: Pick<ActionWish, 'sources'>): readonly string[] {
  return wish.sources.flatMap(({ mapping, source }) => {
    const old = held?.mappings.find((m) => m.nic === mapping.nic && m.named === false);
    if (source === 'range' || old === undefined || old.address === mapping.address) return [];
    const by = source === 'nic-attribute' ? 'IB_IP' : 'external alias';
    return [
      `NIC ${mapping.nic} of VM ${mapping.vm} had ${old.address}, since this OpenNebula does not tell its ${by} at deploy; it gets ${mapping.address} now. To have it from the start: VN_MAD kvm-ib (docs/install.md)`,
    ];
  });
}

/**
 * The network whose bridge an attach_nic names.
 * @throws KvmIbError `usage` where the bridge stands in another place than its own: an empty argument vanished before it
 */
function networkNamedBy(config: Config, { vmId, action, args }: OwnCall): Network | undefined {
  const words = Object.values(args);
  const network = config.networks.find(({ bridge }) => words.includes(bridge));
  if (network === undefined || args['bridge'] === network.bridge) return network;
  throw new KvmIbError('usage', `Cannot run ${action} for VM ${vmId}`, {
    why: `the bridge ${network.bridge} is not its third argument, so an empty one is missing before it`,
    fix: `look at the deploy id of the VM: onevm show -x ${vmId}`,
  });
}

function wishOfNote(
  config: Config,
  { vmId, action }: Pick<OwnCall, 'vmId' | 'action'>,
  vm: Vm,
  noted: readonly Mapping[],
): ActionWish {
  const ours = vm.nics.flatMap((nic) => {
    const network = networkOfBridge(config, nic.bridge);
    return network === undefined ? [] : [{ nic, network }];
  });
  for (const m of noted) {
    if (ours.some(({ nic }) => nic.bridge === m.bridge && nic.mac?.toLowerCase() === m.mac)) continue;
    throw new KvmIbError('bad-input', `Cannot ${action} VM ${vmId}`, {
      why: `the VNM driver's pre has noted NIC ${m.nic} (${m.mac}) on ${m.bridge}, which the domain XML does not have`,
      fix: `look at \`kvm-ib list\`; when the note is stale: kvm-ib remove --vm ${vmId}, then try again`,
    });
  }
  const numbers = new Set(noted.map((m) => m.nic));
  const macs = new Set<string | null>(noted.map((m) => m.mac));
  // It saw the whole VM: a NIC that it did not map opts out.
  const unmapped = ours.map(({ nic }) => nic).filter((nic) => !macs.has(nic.mac?.toLowerCase() ?? null));
  return {
    mappings: noted,
    sources: noted.map((mapping) => ({ mapping, source: mapping.named === false ? 'range' : 'nic-attribute' })),
    networksTouched: [...new Set(ours.map(({ network }) => network))],
    unmapped: unmapped.map(({ nic }) => nic).filter((nic) => !numbers.has(nic)),
    notes: [],
    ...NOTHING_SPECIAL,
  };
}

const NOTHING_SPECIAL = { keep: [], attaching: [], attachedAliases: [], detachedAliases: [] } as const;

function keeping(mappings: readonly Mapping[]): ActionWish {
  return {
    mappings: [],
    sources: [],
    networksTouched: [],
    unmapped: [],
    notes: [],
    ...NOTHING_SPECIAL,
    keep: mappings.flatMap((m) => (m.nic === null ? [] : [m.nic])),
  };
}

/** The one line that says what could not be seen. */
function unseen(vm: Vm, sources: readonly WishedMapping[]): readonly string[] {
  if (sources.length === 0) return [];
  const pairs = sources.map(({ mapping: m }) => {
    const isFiltered = vm.nics.find((nic) => nic.nic === m.nic)?.ip !== null;
    return `NIC ${m.nic} has ${m.guest} <-> ${m.address} by its ${isFiltered ? 'filter' : `MAC ${m.mac}`}`;
  });
  return [
    `${pairs.join(', ')}: this OpenNebula (before 6.0) tells no more of VM ${vm.id} here. IB_IP and external aliases need VN_MAD kvm-ib (docs/install.md)`,
  ];
}

function vmOfInterfaces(id: number, interfaces: readonly DomainNic[]): Vm {
  const named = interfaces.map((one) => nicNumberIn(one.target, id));
  // Taps named by OpenNebula (since 5.0) carry the number. Numbers of the two kinds may not be mixed: they could meet.
  const areNamed = named.every((n) => n !== undefined) && new Set(named).size === named.length;
  return bareVm(
    id,
    interfaces.map((one, index) => nicOf((areNamed ? named[index] : undefined) ?? one.place, one)),
  );
}

function nicNumberIn(target: string | null, vm: number): number | undefined {
  const parts = /^one-([0-9]+)-([0-9]{1,2})$/.exec(target ?? '');
  return parts !== null && Number(parts[1]) === vm ? Number(parts[2]) : undefined;
}

function nicOf(nic: number, { bridge, mac, target, ip }: Omit<DomainNic, 'place'>): Nic {
  return { nic, bridge, ip, mac, target, ibIp: null, attach: false, networkName: null };
}

function bareVm(id: number, nics: readonly Nic[]): Vm {
  return {
    id,
    deployId: null,
    name: null,
    hostname: null,
    datastore: null,
    lcmState: null,
    nics,
    aliases: [],
    skipped: [],
    contextNames: new Set(),
  };
}
