/**
 * Reads what OpenNebula tells a driver about a VM: VMM_DRIVER_ACTION_DATA, the standard input of every action but
 * deploy since 5.0 (raw XML on one line plus one newline; before, there is none), and the bare VM element, which one_vmm_exec leaves as
 * `vm.xml` beside the deployment file (since 6.0.0). Values are CDATA or text; a value that is absent, empty or blank is
 * null here.
 *
 * Nothing is held against a configuration here, and addresses stay text: a NIC that is none of ours may hold anything.
 */
import { KvmIbError, printable } from '../core/errors.ts';
import type { XmlElement } from '../core/xml.ts';
import { childrenNamed, parseXml } from '../core/xml.ts';

/** One TEMPLATE/NIC. */
export interface Nic {
  /** NIC_ID. */
  readonly nic: number;
  readonly bridge: string | null;
  readonly ip: string | null;
  readonly mac: string | null;
  /** The tap on the host, `one-<vm>-<nic>`. */
  readonly target: string | null;
  /** Our own attribute: the IB address wished for, or `none`. */
  readonly ibIp: string | null;
  /** ATTACH=YES: the NIC that this very action attaches or detaches. */
  readonly attach: boolean;
  /** NETWORK: the virtual network's name in OpenNebula. */
  readonly networkName: string | null;
}

/** One TEMPLATE/NIC_ALIAS: a further address of a NIC. Its MAC is on no guest interface and is not read. */
export interface NicAlias {
  /** NIC_ID of the NIC that it belongs to. */
  readonly parentId: number;
  /** Its own NIC_ID, shared with the NICs' numbering. */
  readonly nic: number;
  /** ALIAS_ID: its number among the aliases of its NIC. */
  readonly aliasId: number | null;
  readonly ip: string | null;
  /** EXTERNAL=YES: the address is not configured inside the guest; something outside maps it. */
  readonly external: boolean;
  readonly attach: boolean;
  /** Name of the network driver that is called for it; null before 5.0. */
  readonly vnMad: string | null;
}

/** A network device of the VM that kvm-ib cannot serve, and why. */
export interface SkippedNic {
  readonly nic: number | null;
  readonly bridge: string | null;
  readonly reason: string;
}

export interface Vm {
  readonly id: number;
  /** Libvirt's name for the domain: its UUID since 6.0.0, `one-<id>` before; null until the first deploy succeeded. */
  readonly deployId: string | null;
  /** The user's text, unchecked: pass it through `printable` before it is shown. */
  readonly name: string | null;
  /** Host of the newest history record. In a migration that is the destination already. */
  readonly hostname: string | null;
  /** System datastore of the same record. */
  readonly datastore: number | null;
  readonly lcmState: number | null;
  readonly nics: readonly Nic[];
  readonly aliases: readonly NicAlias[];
  readonly skipped: readonly SkippedNic[];
  /** Names of the network variables (`ETH0_IP`, `ETH0_ALIAS1_IP`, …) of TEMPLATE/CONTEXT. */
  readonly contextNames: ReadonlySet<string>;
}

export interface ActionData {
  /** The host that the action runs on; the source in a migration. Null when only the VM was given. */
  readonly host: string | null;
  /** Destination of a migration. */
  readonly migrationHost: string | null;
  readonly vm: Vm;
}

/** LCM_STATE HOTPLUG_NIC_POWEROFF (since 5.12): a NIC of a VM that has no domain, where VM_MAD has COLD_NIC_ATTACH. */
export const HOTPLUG_NIC_POWEROFF = 65;

/** An alias label has 15 characters: `kib:` + 8 digits + `-` + 2 digits. */
export const VM_ID_LIMIT = 100_000_000;
export const NIC_ID_LIMIT = 100;

const ACTION_DATA = 'VMM_DRIVER_ACTION_DATA';

/**
 * @param text VMM_DRIVER_ACTION_DATA or a bare VM, decoded (UTF-8 or latin1: all that is used is ASCII).
 * @param what What the text is, for messages.
 * @throws KvmIbError `bad-input` when it is no such document, or lacks what decides which mappings the VM has.
 */
export function parseActionData(text: string, what = 'the VM data on standard input'): ActionData {
  const root = parseXml(text, { roots: [ACTION_DATA, 'VM'], what });
  if (root.name === 'VM') return { host: null, migrationHost: null, vm: readVm(root, what) };
  return {
    host: field(root, 'HOST', what),
    migrationHost: field(root, 'MIGR_HOST', what),
    vm: readVm(only(root, 'VM', what), what),
  };
}

/** @throws KvmIbError `bad-input` as `parseActionData` does. */
export function parseVm(text: string, what = 'the VM data (vm.xml)'): Vm {
  return parseActionData(text, what).vm;
}

/** Markup in which a name can stand without standing in the text letter by letter. */
const HIDDEN_TEXT = /&#|<!--|<!DOCTYPE|\0|<\?(?!xml[ \t\r\n])|\]\]>(?!<\/)|[^>]<!\[CDATA\[/;

/**
 * Whether a document may name one of these bridges: a cheap look at the text, so that a VM that has nothing to do with
 * kvm-ib costs no parse and cannot fail on one. `false` is certain. `true` is not: the name may be part of a longer one
 * or of another value, or something in the text (a character reference, a comment or instruction, CDATA glued to other
 * text, a DOCTYPE with entities of its own, the NULs of UTF-16) could hide a name from a plain search; then parse, and trust what the parser says. Bridge names are ASCII
 * letters, digits and `_.-`, so none of the five named entities can stand for a part of one.
 */
export function mayTouchBridges(text: string, bridges: readonly string[]): boolean {
  return bridges.some((bridge) => text.includes(bridge)) || HIDDEN_TEXT.test(text);
}

/** @throws KvmIbError `bad-input` as `parseActionData` does. */
export function readVm(vm: XmlElement, what: string): Vm {
  const id = numberField(vm, 'ID', what);
  if (id === null || id >= VM_ID_LIMIT) {
    throw unreadable(what, id === null ? 'the VM has no ID' : `the VM ID ${id} is not below ${VM_ID_LIMIT}`);
  }
  // No TEMPLATE must not read as "no NICs": that would release the mappings of a running VM.
  const template = only(vm, 'TEMPLATE', what);
  const nics = childrenNamed(template, 'NIC').map((nic) => readNic(nic, what));
  const aliases = childrenNamed(template, 'NIC_ALIAS').map((alias) => readAlias(alias, what));
  const seen = new Set<number>();
  for (const { nic } of [...nics, ...aliases]) {
    if (seen.has(nic)) throw unreadable(what, `two NICs have the NIC_ID ${nic}`);
    seen.add(nic);
  }

  const history = childrenNamed(vm, 'HISTORY_RECORDS').flatMap((records) => childrenNamed(records, 'HISTORY'));
  const newest = history.at(-1);
  return {
    id,
    deployId: field(vm, 'DEPLOY_ID', what),
    name: field(vm, 'NAME', what),
    hostname: newest === undefined ? null : field(newest, 'HOSTNAME', what),
    datastore: newest === undefined ? null : numberField(newest, 'DS_ID', what),
    lcmState: numberField(vm, 'LCM_STATE', what),
    nics,
    aliases,
    skipped: childrenNamed(template, 'PCI')
      .filter((pci) => field(pci, 'TYPE', what)?.toUpperCase() === 'NIC')
      .map((pci) => ({
        nic: numberField(pci, 'NIC_ID', what),
        bridge: field(pci, 'BRIDGE', what),
        reason: 'it is a passed-through PCI device: its traffic does not cross a bridge of the host',
      })),
    contextNames: new Set(
      childrenNamed(template, 'CONTEXT').flatMap(({ children }) =>
        children.map(({ name }) => name).filter((name) => /^ETH[0-9]+_/.test(name)),
      ),
    ),
  };
}

function readNic(nic: XmlElement, what: string): Nic {
  return {
    nic: requiredNumber(nic, 'NIC_ID', what),
    bridge: field(nic, 'BRIDGE', what),
    ip: field(nic, 'IP', what),
    mac: field(nic, 'MAC', what),
    target: field(nic, 'TARGET', what),
    ibIp: field(nic, 'IB_IP', what),
    attach: isYes(field(nic, 'ATTACH', what)),
    networkName: field(nic, 'NETWORK', what),
  };
}

function readAlias(alias: XmlElement, what: string): NicAlias {
  return {
    parentId: requiredNumber(alias, 'PARENT_ID', what),
    nic: requiredNumber(alias, 'NIC_ID', what),
    aliasId: numberField(alias, 'ALIAS_ID', what),
    ip: field(alias, 'IP', what),
    external: isYes(field(alias, 'EXTERNAL', what)),
    attach: isYes(field(alias, 'ATTACH', what)),
    vnMad: field(alias, 'VN_MAD', what),
  };
}

function isYes(value: string | null): boolean {
  return value?.toUpperCase() === 'YES';
}

function unreadable(what: string, why: string): KvmIbError {
  return new KvmIbError('bad-input', `Cannot read ${what}`, {
    why,
    fix: 'look at the VM with `onevm show -x`; kvm-ib serves OpenNebula 3.4 to 7.x',
  });
}

function only(parent: XmlElement, name: string, what: string): XmlElement {
  const [child, ...more] = childrenNamed(parent, name);
  if (child === undefined) throw unreadable(what, `<${parent.name}> has no <${name}>`);
  if (more.length > 0) throw unreadable(what, `<${parent.name}> has ${more.length + 1} <${name}>`);
  return child;
}

/** A value that stands once and is plain text. Two of a kind are an error: which one counts would be a guess. */
function field(parent: XmlElement, name: string, what: string): string | null {
  const [child, ...more] = childrenNamed(parent, name);
  if (child === undefined) return null;
  if (more.length > 0) throw unreadable(what, `<${parent.name}> has ${more.length + 1} <${name}>`);
  if (child.children.length > 0) throw unreadable(what, `<${name}> in <${parent.name}> holds elements, not text`);
  const value = child.text.trim();
  return value === '' ? null : value;
}

function numberField(parent: XmlElement, name: string, what: string): number | null {
  const value = field(parent, name, what);
  if (value === null) return null;
  if (!/^(?:0|[1-9][0-9]{0,9})$/.test(value)) {
    const why = `${name} in <${parent.name}> is "${printable(value, 40)}", not a number from 0 up`;
    throw unreadable(what, why);
  }
  return Number(value);
}

function requiredNumber(parent: XmlElement, name: string, what: string): number {
  const value = numberField(parent, name, what);
  if (value === null) throw unreadable(what, `a <${parent.name}> has no ${name}`);
  return value;
}
