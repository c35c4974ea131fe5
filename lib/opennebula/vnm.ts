/**
 * The contract of OpenNebula's network drivers (VN_MAD, "VNM"), 3.4 to 7.x, as one_vmm_exec.rb and one_vnm.rb of these
 * versions call them; and what each action wants of a VM's mappings.
 *
 * | | the VM | further arguments |
 * |---|---|---|
 * | 3.4 to 5.8 | base64 as first argument; **standard input is the ssh command stream, never to be read** | `post`: deploy id |
 * | 5.10, 5.12 | base64 on standard input | `post`: deploy id |
 * | 6.0 and later | the same | `post`: deploy id, host; `clean`: host; `update_nic` (6.6): deploy id, id of the virtual network |
 *
 * In a live migration the host that `post` and `clean` get is the source, and the newest history record names the destination.
 *
 * The VM is a part of what the other drivers get, put together by XPath: each value stands in an element TEMPLATE, or
 * HISTORY_RECORDS, of its own. NICs without VN_MAD are not in it, LCM_STATE neither. Up to 4.4 it is the whole VM.
 */
import { KvmIbError, printable } from '../core/errors.ts';
import type { Config } from '../core/mapping.ts';
import type { XmlElement } from '../core/xml.ts';
import { childrenNamed, parseXml } from '../core/xml.ts';
import type { Vm } from './action-data.ts';
import { readVm } from './action-data.ts';
import type { ActionWish, Held } from './action-wish.ts';
import { refuseIdleAlias, wishUnder } from './action-wish.ts';

/** What has work for us. `update_sg`, `vnet_create` and `vnet_delete` have none. */
export const NETWORK_ACTIONS = ['pre', 'post', 'clean', 'update_nic'] as const;

export type NetworkAction = (typeof NETWORK_ACTIONS)[number];

export interface NetworkCall {
  readonly action: NetworkAction;
  readonly deployId: string | undefined;
  /** The VM in base64 as it came as argument; null: it comes on standard input. */
  readonly vm: string | null;
  /** Host that the action says it is for; the source in a live migration. Null where this version does not say. */
  readonly host: string | null;
}

/** Base64 of `<VM>` and the start of what follows. */
const ENCODED_VM = /^PFZNP[g-v]/;
/** Longest part of a host name between dots (RFC 1035), and longer than a deploy id. */
const LONGEST_LABEL = 63;

/**
 * Reads one call. That the first argument is a VM decides; a broken one is still no host and no deploy id, so that standard
 * input is not read in its place.
 *
 * @throws KvmIbError `usage` for another name
 */
export function parseNetworkCall(action: string, argv: readonly string[]): NetworkCall {
  const known = NETWORK_ACTIONS.find((name) => name === action);
  if (known === undefined) {
    throw new KvmIbError('usage', `Cannot run ${printable(action, 60)}`, {
      why: `a network driver has the actions ${NETWORK_ACTIONS.join(', ')}`,
      fix: 'let OpenNebula (one_vmm_exec) call it',
    });
  }
  const [first = '', ...rest] = argv;
  const isVm = ENCODED_VM.test(first) && first.length > LONGEST_LABEL;
  const own = isVm ? rest : argv;
  const host = (known === 'post' ? own[1] : known === 'clean' ? own[0] : undefined) ?? '';
  const deployId = known === 'post' || known === 'update_nic' ? own[0] : undefined;
  return { action: known, deployId, vm: isVm ? first : null, host: host === '' ? null : host };
}

/**
 * @param text base64, perhaps with line ends
 * @throws KvmIbError `bad-input` when it is not
 */
export function requireBase64(text: string, what: string): string {
  const packed = text.replace(/\s+/g, '');
  if (packed !== '' && packed.length % 4 === 0 && /^[A-Za-z0-9+/]+={0,2}$/.test(packed)) return packed;
  throw new KvmIbError('bad-input', `Cannot read ${what}`, {
    why: packed === '' ? 'it is empty' : 'it is not base64, or cut off',
    fix: 'let OpenNebula (one_vmm_exec) call it: it sends the VM in base64',
  });
}

/** @throws KvmIbError `bad-input` as `parseVm` */
export function parseNetworkVm(text: string, what: string): Vm {
  return readVm(gathered(parseXml(text, { roots: ['VM'], what })), what);
}

/** The VM with one TEMPLATE and one HISTORY, as oned had it. */
function gathered(vm: XmlElement): XmlElement {
  const templates = childrenNamed(vm, 'TEMPLATE');
  const records = childrenNamed(vm, 'HISTORY_RECORDS');
  const [template] = templates;
  const [record] = records;
  const [history] = records.flatMap((one) => childrenNamed(one, 'HISTORY'));
  const rest = vm.children.filter(({ name }) => name !== 'TEMPLATE' && name !== 'HISTORY_RECORDS');
  const children = [...rest];
  if (template !== undefined) {
    children.push({ ...template, children: numbered(templates.flatMap((one) => one.children)) });
  }
  if (record !== undefined && history !== undefined && records.length > 1) {
    const values = records.flatMap((one) => childrenNamed(one, 'HISTORY')).flatMap((one) => one.children);
    children.push({ ...record, children: [{ ...history, children: values }] });
  } else children.push(...records);
  return { ...vm, children };
}

/** NICs have numbers since 4.0. Before, none came or went while a VM ran, so that their place is one. */
function numbered(children: readonly XmlElement[]): readonly XmlElement[] {
  const hasNumbers = children.some(
    ({ name, children: own }) => name === 'NIC' && own.some((one) => one.name === 'NIC_ID'),
  );
  if (hasNumbers) return children;
  let place = 0;
  return children.map((child) => {
    if (child.name !== 'NIC') return child;
    const number = { ...child, name: 'NIC_ID', attributes: new Map(), children: [], text: String(place) };
    place += 1;
    return { ...child, children: [...child.children, number] };
  });
}

/** Whether a NIC or an alias of this VM is being attached to it, or detached: OpenNebula marks it either way. */
export function isHotplug({ nics, aliases }: Vm): boolean {
  return [...nics, ...aliases].some(({ attach }) => attach);
}

/**
 * What one action wants of a VM's mappings. Other than the actions on a domain, these tell by their name whether the NIC or
 * alias that is marked comes (`pre`, `post`) or goes (`clean`).
 *
 * @throws KvmIbError as `wishedMappings`, for what is attached and for a VM that is started; `conflict` for an alias that
 *   cannot come into effect
 */
export function wishOfNetworkAction(config: Config, vm: Vm, action: NetworkAction, held: Held): ActionWish {
  const marked = vm.nics.filter(({ attach }) => attach).map(({ nic }) => nic);
  const markedAliases = vm.aliases.filter(({ attach }) => attach).map(({ nic }) => nic);
  const goes = action === 'clean';
  const comes = action === 'pre' || action === 'post';
  const starts = action === 'pre' && !isHotplug(vm);
  const wish = wishUnder(config, vm, held, {
    without: new Set(goes ? [...marked, ...markedAliases] : []),
    attaching: action === 'pre' ? marked : [],
    attachedAliases: comes ? markedAliases : [],
    detachedAliases: goes ? markedAliases : [],
    mustBeMapped: (nic) => starts || (comes && marked.includes(nic)),
  });
  if (comes) refuseIdleAlias(config, vm, wish.attachedAliases, wish.mappings);
  return wish;
}
