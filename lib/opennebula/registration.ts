/**
 * How OpenNebula is told of the driver: sections and templates as text, for the version that is installed. Pure. The
 * differences between versions are those of `oned.conf` and `vmm_execrc` of 6.0 to 7.x.
 */
import type { Ipv4 } from '../core/address.ts';
import { ipv4FromNumber, ipv4ToNumber, rangeSize } from '../core/address.ts';
import { KvmIbError, printable } from '../core/errors.ts';
import type { Network } from '../core/mapping.ts';
import type { VmMad } from './oned-conf.ts';
import { vmMads } from './oned-conf.ts';

/** Name of the driver: of the VM_MAD and of its folder. */
export const DRIVER = 'kvm-ib';
/** Name of OpenNebula's own driver, and of its folder. */
export const STOCK = 'kvm';

export interface OneVersion {
  readonly major: number;
  readonly minor: number;
  readonly text: string;
}

/**
 * @param text content of `/var/lib/one/remotes/VERSION`, or what the operator says
 * @throws KvmIbError `bad-input` when it is no version; `unsupported` below 6.0, whose sections are not known here
 */
export function parseOneVersion(text: string): OneVersion {
  const parts = /^\s*(\d{1,3})\.(\d{1,3})((?:\.\d{1,5}){0,3})(?:[-+~][A-Za-z0-9.]{0,20})?\s*$/.exec(text);
  if (parts === null) {
    throw new KvmIbError('bad-input', `Cannot read the OpenNebula version "${printable(text.trim(), 40)}"`, {
      why: 'it is not of the form 6.10 or 7.0.1',
      fix: 'give it: --one-version 6.10',
    });
  }
  const version = { major: Number(parts[1]), minor: Number(parts[2]), text: text.trim() };
  if (version.major >= 6) return version;
  throw new KvmIbError('unsupported', `Cannot set OpenNebula ${version.text} up`, {
    why: 'the driver does, but before 6.0 it is registered by hand',
    fix: 'follow docs/install.md, "OpenNebula before 6.0"',
  });
}

/** What is read from the front-end's own files; null when a file is not there. */
export interface FrontEndFiles {
  /** /etc/one/oned.conf */
  readonly onedConf: string | null;
  /** /etc/one/vmm_exec/vmm_execrc */
  readonly vmmExecrc: string | null;
}

/**
 * The VM_MAD section. KEEP_SNAPSHOTS and LIVE_RESIZE as for stock kvm; IMPORTED_VMS_ACTIONS, which exists up to 6.10,
 * is that of the stock section, which is to stay.
 */
export function vmMadSection(
  version: OneVersion,
  files: Pick<FrontEndFiles, 'onedConf'>,
  name: string = DRIVER,
): string {
  const lines: [string, string][] = [
    ['NAME', `"${name}"`],
    ['SUNSTONE_NAME', '"KVM with IPoIB addresses"'],
    ['EXECUTABLE', '"one_vmm_exec"'],
    // -p: several actions at once on one host. The engine has a lock of its own.
    ['ARGUMENTS', `"-t 15 -r 0 ${DRIVER} -p"`],
    ['DEFAULT', '"vmm_exec/vmm_exec_kvm.conf"'],
    ['TYPE', '"kvm"'],
    ['KEEP_SNAPSHOTS', '"yes"'],
    ['LIVE_RESIZE', '"yes"'],
    ['SUPPORT_SHAREABLE', '"yes"'],
  ];
  const comments: string[] = [];
  if (version.major < 7) {
    const stock = attribute(vmMadOf(files.onedConf, STOCK), 'IMPORTED_VMS_ACTIONS');
    if (stock !== undefined) lines.push(['IMPORTED_VMS_ACTIONS', `"${stock}"`]);
    else comments.push('# Copy IMPORTED_VMS_ACTIONS from the section of "kvm" into this one.');
  }
  const width = Math.max(...lines.map(([key]) => key.length));
  const body = lines.map(([key, value]) => `    ${key.padEnd(width)} = ${value}`).join(',\n');
  return [...comments, 'VM_MAD = [', body, ']', ''].join('\n');
}

/** Whether `oned.conf` has our section. */
export function isRegistered(onedConf: string | null): boolean {
  return vmMadOf(onedConf, DRIVER) !== undefined;
}

/**
 * Other names under which `oned.conf` runs our folder: `kvm` where the site wanted that, or vmm_kvm_ib, as the driver of
 * 2012 called itself.
 */
export function otherNames(onedConf: string | null): readonly string[] {
  return vmMads(onedConf).flatMap(({ name, directory }) => {
    const usable = name !== DRIVER && /^[A-Za-z0-9_.-]{1,64}$/.test(name);
    return usable && directory === DRIVER ? [name] : [];
  });
}

/** Whether the section of this name says all that `vmMadSection` would. That of `kvm` is OpenNebula's: its folder counts. */
export function isCurrent(version: OneVersion, files: Pick<FrontEndFiles, 'onedConf'>, name: string): boolean {
  const section = vmMadOf(files.onedConf, name);
  if (section === undefined) return false;
  if (name === STOCK) return section.directory === DRIVER;
  const wanted = vmMadSection(version, files, name).matchAll(/^ +([A-Z_]+) *= "([^"]*)"/gm);
  return [...wanted].every(([, key = '', value]) => attribute(section, key) === value);
}

function vmMadOf(onedConf: string | null, name: string): VmMad | undefined {
  return vmMads(onedConf).find((section) => section.name === name);
}

function attribute(section: VmMad | undefined, key: string): string | undefined {
  return section?.attributes.get(key)?.text.replace(/\s+/g, ' ').trim();
}

const STOCK_LIVE_SNAPSHOTS = ['kvm-qcow2', 'kvm-ceph', 'kvm-shared', 'kvm-ssh'];

/**
 * The words that `vmm_execrc` lacks for live disk snapshots: OpenNebula looks for `<name of the driver>-<TM_MAD>` there.
 * @param names under which our driver is registered
 */
export function missingLiveSnapshots(
  version: OneVersion,
  files: Pick<FrontEndFiles, 'vmmExecrc'>,
  names: readonly string[] = [DRIVER],
): { readonly present: readonly string[]; readonly missing: readonly string[] } {
  const line = /^[ \t]*LIVE_DISK_SNAPSHOTS[ \t]*=[ \t]*["']?([^"'\n]*)["']?/m.exec(files.vmmExecrc ?? '')?.[1];
  // From 7.0 on the stock ssh drivers are called local.
  const stock = version.major >= 7 ? [...STOCK_LIVE_SNAPSHOTS, 'kvm-local'] : STOCK_LIVE_SNAPSHOTS;
  const present = line?.split(/\s+/).filter((word) => /^[\w.-]+$/.test(word)) ?? stock;
  const ours = names.flatMap((name) =>
    present
      .filter((word) => word.startsWith(`${STOCK}-`) && !word.startsWith(`${DRIVER}-`))
      .map((word) => `${name}-${word.slice(`${STOCK}-`.length)}`),
  );
  return { present, missing: ours.filter((word) => !present.includes(word)) };
}

/** The line of `vmm_execrc` that keeps live disk snapshots. @returns undefined when it is right already */
export function liveSnapshotsLine(
  version: OneVersion,
  files: Pick<FrontEndFiles, 'vmmExecrc'>,
  names: readonly string[] = [DRIVER],
): string | undefined {
  const { present, missing } = missingLiveSnapshots(version, files, names);
  return missing.length === 0 ? undefined : `LIVE_DISK_SNAPSHOTS="${[...present, ...missing].join(' ')}"`;
}

export interface NetworkTemplateOptions {
  /** The host's address on the bridge, the guests' gateway. */
  readonly gateway: Ipv4;
  /** Prefix length of the bridge's subnet. */
  readonly prefixLength: number;
  /** MTU of the IPoIB link in bytes. */
  readonly mtu: number;
}

/** For the end of `oned.conf`, since 5.8. */
export function vnMadSection(): string {
  return ['VN_MAD_CONF = [', `    NAME        = "${DRIVER}",`, '    BRIDGE_TYPE = "linux"', ']', ''].join('\n');
}

/** Whether `oned.conf` has that section. */
export function isNetworkDriverRegistered(onedConf: string | null): boolean {
  const text = (onedConf ?? '').slice(0, 1024 * 1024).replace(/^[ \t]*#.*$/gm, '');
  const sections = text.match(/^[ \t]*VN_MAD_CONF[ \t]*=[ \t]*\[[^\]]*\]/gim) ?? [];
  return sections.some((section) => new RegExp(`[\\[,\\s]NAME\\s*=\\s*"${DRIVER}"`, 'i').test(section));
}

/** The lines of a guests' network that say which network driver is called for it. */
function vnMadLines(vnMad: string, bridge: string): readonly string[] {
  const line = `VN_MAD          = "${vnMad}"`;
  switch (vnMad) {
    case DRIVER:
      return [line];
    case 'dummy':
      return [
        '# Not "bridge": with the last guest of a host that driver deletes the bridge, and with it the network of libvirt.',
        line,
      ];
    default:
      return [
        line,
        `# Else ${vnMad} deletes ${bridge} with the last guest of a host, and with it the network of libvirt.`,
        'CONF            = "keep_empty_bridge=true"',
      ];
  }
}

/** Virtual network of the guests: for `onevnet create`. */
export function guestNetworkTemplate(network: Network, options: NetworkTemplateOptions, vnMad = 'dummy'): string {
  const size = 2 ** (32 - options.prefixLength);
  const base = Math.floor(ipv4ToNumber(options.gateway) / size) * size;
  return [
    `NAME            = "${network.name}-guests"`,
    ...vnMadLines(vnMad, network.bridge),
    `BRIDGE          = "${network.bridge}"`,
    `NETWORK_ADDRESS = "${ipv4FromNumber(base)}"`,
    `NETWORK_MASK    = "${ipv4FromNumber(2 ** 32 - size)}"`,
    `GATEWAY         = "${options.gateway}"`,
    `# Of ${network.device}; contextualization sets it inside the guest.`,
    `GUEST_MTU       = "${options.mtu}"`,
    `AR = [ TYPE = "IP4", IP = "${network.guests.first}", SIZE = "${rangeSize(network.guests)}" ]`,
    '',
  ].join('\n');
}

/**
 * Virtual network of the IB addresses: OpenNebula leases from it what a NIC gets on the fabric. BRIDGE is there because
 * the `dummy` driver wants one; nothing is attached to it.
 */
export function addressNetworkTemplate(network: Network): string {
  return [
    `NAME     = "${network.name}-addresses"`,
    'VN_MAD   = "dummy"',
    `BRIDGE   = "${network.bridge}"`,
    "# For aliases of a NIC alone: contextualization then leaves these addresses out of the guest's own configuration.",
    'EXTERNAL = "YES"',
    `AR = [ TYPE = "IP4", IP = "${network.addresses.first}", SIZE = "${rangeSize(network.addresses)}" ]`,
    '',
  ].join('\n');
}

/**
 * How a VM template uses both. Up to 6.2 the alias inherits EXTERNAL from the virtual network (INHERIT_VNET_ATTR), and in
 * 6.0 users outside the group oneadmin may not write it; from 6.4 on it is not inherited.
 */
export function nicExample(network: Network, version: OneVersion): string {
  const inherited = version.major === 6 && version.minor < 3;
  return [
    `NIC       = [ NAME = "NIC0", NETWORK = "${network.name}-guests" ]`,
    `NIC_ALIAS = [ PARENT = "NIC0", NETWORK = "${network.name}-addresses"${inherited ? '' : ', EXTERNAL = "YES"'} ]`,
    '',
  ].join('\n');
}

/** The state hook, below the remotes. */
export const HOOK_COMMAND = `${DRIVER}/vm-gone.sh`;

/**
 * For `onehook create`: the two states that a VM may reach without any driver action. Both have no LCM state but LCM_INIT.
 * The VM goes to standard input, since one argument may have 128 KiB at most and base64 of a large VM is longer. TIMEOUT
 * is more than the script gives itself.
 */
export function hookTemplates(): readonly { readonly name: string; readonly text: string }[] {
  const template = (name: string, on: readonly string[]): { readonly name: string; readonly text: string } => ({
    name,
    text: [
      `NAME            = "${name}"`,
      'TYPE            = "state"',
      'RESOURCE        = "VM"',
      ...on,
      `COMMAND         = "${HOOK_COMMAND}"`,
      'ARGUMENTS       = "$TEMPLATE"',
      'ARGUMENTS_STDIN = "YES"',
      'REMOTE          = "YES"',
      'TIMEOUT         = "120"',
      '',
    ].join('\n'),
  });
  return [
    template(`${DRIVER}-poweroff`, [
      'ON              = "CUSTOM"',
      'STATE           = "POWEROFF"',
      'LCM_STATE       = "LCM_INIT"',
    ]),
    template(`${DRIVER}-done`, ['ON              = "DONE"']),
  ];
}
