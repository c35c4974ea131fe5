/**
 * What a host should have, as files: one JSON file per owner. Pure: shapes and the decision what an interrupted or
 * stale file means; `host/store.ts` reads and writes them.
 */
import * as v from 'valibot';
import type { Ipv4, LinkName, Mac } from './address.ts';
import { tryParseIpv4, tryParseLinkName, tryParseMac } from './address.ts';
import type { Mapping, Owner } from './mapping.ts';
import { sameMapping } from './mapping.ts';

export const STATE_VERSION = 1;

/** The process that works on a pending file; pid alone is not an identity, pids are used again. */
export interface Holder {
  readonly pid: number;
  /** Start time of the process in clock ticks since boot: /proc/PID/stat field 22, see proc(5). */
  readonly start: number;
  /** /proc/sys/kernel/random/boot_id. */
  readonly bootId: string;
}

/**
 * pending: the wish is written, the kernel may lag, and whether it stays is not decided before `holder` ends.
 * removing: it is to go; the file is deleted last.
 */
export type Phase =
  | {
      readonly name: 'pending';
      readonly action: string;
      readonly holder: Holder;
      /** A shutdown or cancel came in between: whether the domain is there decides at the action's end. */
      readonly overtaken?: boolean | undefined;
      /** Its guest runs on another host, not here yet or no more here: the kernel of this host holds nothing of it. */
      readonly elsewhere?: boolean | undefined;
    }
  | {
      readonly name: 'active';
      /** The boot in which its domain was last known to be active; absent in files of older versions. */
      readonly bootId?: string | undefined;
    }
  | { readonly name: 'removing' };

export interface StateFile {
  readonly version: typeof STATE_VERSION;
  readonly owner: Owner;
  readonly phase: Phase;
  /** The wish. */
  readonly mappings: readonly Mapping[];
  /** While pending: what the owner had before, to go back to. */
  readonly previous: readonly Mapping[];
  /** While pending: what an earlier action that did not end may have left in the kernel; never gone back to. */
  readonly leftovers: readonly Mapping[];
  /** NIC numbers of aliases that were detached. OpenNebula never gives a number again, so none of them comes back. */
  readonly detachedAliases: readonly number[];
  /** ISO 8601, UTC. */
  readonly updated: string;
}

/**
 * The action of the network driver that claims a VM's addresses before anybody else begins to work on it; it has seen the whole
 * VM. Who comes after it takes the claim over.
 */
export const CLAIM = 'pre';

/** Every mapping that a file may still have in the kernel. */
export function mappingsOf(file: StateFile | undefined): readonly Mapping[] {
  if (file === undefined) return [];
  const all: Mapping[] = [];
  for (const m of [...file.mappings, ...file.previous, ...file.leftovers]) {
    if (!all.some((other) => sameMapping(m, other))) all.push(m);
  }
  return all;
}

/** Whether the guest of a file runs on another host: then its mappings are claimed, and not in the kernel. */
export function isElsewhere(file: StateFile | undefined): boolean {
  return file?.phase.name === 'pending' && file.phase.elsewhere === true;
}

/** The mappings of a file that the kernel is to hold. */
export function presentMappings(file: StateFile): readonly Mapping[] {
  return isElsewhere(file) ? [] : file.mappings;
}

const ipv4 = v.custom<Ipv4>((value) => typeof value === 'string' && tryParseIpv4(value) !== undefined);
const mac = v.custom<Mac>((value) => typeof value === 'string' && tryParseMac(value) === value);
const linkName = v.custom<LinkName>((value) => typeof value === 'string' && tryParseLinkName(value) !== undefined);
const id = v.pipe(v.number(), v.integer(), v.minValue(0));
/** The shape of a mapping. */
export const mappingSchema = v.object({
  network: v.string(),
  device: linkName,
  bridge: linkName,
  guest: ipv4,
  address: ipv4,
  mac: v.nullable(mac),
  vm: v.nullable(id),
  nic: v.nullable(id),
  label: v.pipe(v.string(), v.regex(/^[A-Za-z0-9._:-]{1,15}$/)),
  named: v.optional(v.boolean()),
});
/** The shape of an owner. */
export const ownerSchema = v.variant('kind', [
  v.object({ kind: v.literal('vm'), vm: id }),
  v.object({ kind: v.literal('manual'), guest: ipv4 }),
  v.object({ kind: v.literal('static'), guest: ipv4 }),
]);
const stateSchema = v.object({
  version: v.literal(STATE_VERSION),
  owner: ownerSchema,
  phase: v.variant('name', [
    v.object({
      name: v.literal('pending'),
      action: v.string(),
      holder: v.object({ pid: id, start: v.number(), bootId: v.string() }),
      overtaken: v.optional(v.boolean()),
      elsewhere: v.optional(v.boolean()),
    }),
    v.object({ name: v.literal('active'), bootId: v.optional(v.string()) }),
    v.object({ name: v.literal('removing') }),
  ]),
  mappings: v.array(mappingSchema),
  previous: v.array(mappingSchema),
  leftovers: v.optional(v.array(mappingSchema), []),
  detachedAliases: v.optional(v.array(id), []),
  updated: v.string(),
});

/** A state file out of its JSON text; undefined when it is not one (cut off, edited, of another version). */
export function parseStateFile(text: string): StateFile | undefined {
  let raw: unknown;
  try {
    raw = JSON.parse(text);
  } catch {
    return undefined;
  }
  const result = v.safeParse(stateSchema, raw);
  return result.success ? result.output : undefined;
}

/** What reconcile is to do with one file. */
export type Verdict =
  /** Make the kernel hold the wish, and the file active. */
  | 'keep'
  /** Take everything of it out of the kernel, then delete the file. */
  | 'release'
  /** An action is still at work on it, or nobody can know: touch neither kernel nor file. */
  | 'leave';

/**
 * Decides what an owner's file means now.
 * @param holderAlive whether the process of a pending file still lives
 * @param domainActive whether the VM's domain is among libvirt's active ones (paused counts); undefined: libvirt did
 *   not answer, so nothing may be concluded from its silence
 * @param bootId the boot that runs
 * @param moving whether the domain is on its way between two hosts, and runs on neither or on the other one
 */
export function verdictOf(
  file: StateFile,
  holderAlive: boolean,
  domainActive: boolean | undefined,
  bootId: string,
  moving = false,
): Verdict {
  if (file.phase.name === 'removing') return 'release';
  if (file.phase.name === 'pending' && (holderAlive || moving)) return 'leave';
  if (file.owner.kind !== 'vm') return 'keep';
  if (domainActive === undefined) return file.phase.name === 'active' && isOfBoot(file, bootId) ? 'keep' : 'leave';
  return domainActive ? 'keep' : 'release';
}

/**
 * False for a VM that was last seen in another boot of this host: its domain ended with that boot, and may run elsewhere
 * by now. A file of an older version does not say, and counts as one of this boot.
 */
export function isOfBoot(file: StateFile, bootId: string): boolean {
  if (file.owner.kind !== 'vm' || file.phase.name === 'removing') return true;
  const seen = file.phase.name === 'pending' ? file.phase.holder.bootId : file.phase.bootId;
  return seen === undefined || seen === bootId;
}

/** What libvirt says of a VM's domain. */
export type DomainState =
  /** libvirt does not answer. */
  | { readonly kind: 'unknown' }
  | { readonly kind: 'inactive' }
  /** Running or paused. `macs` are the hardware addresses of its interfaces; undefined: it did not say. */
  | { readonly kind: 'active'; readonly macs: ReadonlySet<Mac> | undefined };

/** What a VM should have, as OpenNebula describes it. */
export interface VmWish {
  readonly mappings: readonly Mapping[];
  /** NICs that OpenNebula knows and that are to have no mapping. */
  readonly unmapped: readonly number[];
  /** NICs that this very action plugs in: the domain does not have them yet. */
  readonly attaching: readonly number[];
}

/**
 * What the wish comes to for the domain as it is. Where OpenNebula and libvirt disagree (a step of an attach or detach
 * failed), libvirt is right: a NIC that the domain lacks gets nothing, and one that it has keeps what it had, although
 * OpenNebula has forgotten it.
 * @param held mappings that the VM has had
 * @param macs hardware addresses of the domain's interfaces; undefined: not known, so the wish stands
 */
export function wishOfDomain(
  wish: VmWish,
  held: readonly Mapping[],
  macs: ReadonlySet<Mac> | undefined,
): readonly Mapping[] {
  if (macs === undefined) return wish.mappings;
  const plugged = (m: Mapping): boolean => m.mac === null || macs.has(m.mac);
  const coming = (m: Mapping): boolean => m.nic !== null && wish.attaching.includes(m.nic);
  const kept = wish.mappings.filter((m) => plugged(m) || coming(m));
  const known = new Set<number | null>([...wish.mappings.map((m) => m.nic), ...wish.unmapped]);
  const forgotten: Mapping[] = [];
  for (const m of held) {
    const taken = [...kept, ...forgotten].some(
      (k) => k.nic === m.nic || k.mac === m.mac || k.guest === m.guest || k.address === m.address,
    );
    if (m.mac !== null && macs.has(m.mac) && !known.has(m.nic) && !taken) forgotten.push(m);
  }
  return [...kept, ...forgotten];
}
