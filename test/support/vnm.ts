/** How each version of OpenNebula calls a network driver: argv, standard input, and the part of the VM that it gives. */
import { childrenNamed, parseXml } from '../../lib/core/xml.ts';
import type { TestVm } from './vm/opennebula.ts';
import { vmXml } from './vm/opennebula.ts';

export interface VnmVersion {
  readonly name: string;
  /** What one_vmm_exec picks from the VM, in its order; null: the VM as it is. */
  readonly paths: readonly string[] | null;
  /** Lists below TEMPLATE of which it then takes what has VN_MAD. */
  readonly lists: readonly string[];
  readonly vmIn: 'argument' | 'stdin';
  /** Whether `post` and `clean` are told the host. */
  readonly host: boolean;
  /** Form of the deploy id. */
  readonly deployId: 'name' | 'uuid';
}

const HOST = 'HISTORY_RECORDS/HISTORY/HOSTNAME';
const MAD = 'HISTORY_RECORDS/HISTORY/VM_MAD';
const DATASTORE = 'HISTORY_RECORDS/HISTORY/DS_ID';
const RULES = 'TEMPLATE/SECURITY_GROUP_RULE';
const NICS = ['NIC', 'NIC_ALIAS', 'PCI'];
const OWN = ['TEMPLATE/CONTEXT', 'USER_TEMPLATE'];
const old = { vmIn: 'argument', host: false, deployId: 'name' } as const;

/** Read in one_vmm_exec.rb and one_vnm.rb of these releases. */
export const VNM_VERSIONS: readonly VnmVersion[] = [
  { name: '3.4', paths: null, lists: [], ...old },
  { name: '4.6', paths: ['ID', 'DEPLOY_ID', 'TEMPLATE/NIC'], lists: [], ...old },
  { name: '4.14', paths: ['ID', 'DEPLOY_ID', 'TEMPLATE/NIC', RULES, HOST], lists: [], ...old },
  { name: '5.4', paths: ['ID', 'DEPLOY_ID', RULES, HOST, MAD], lists: ['NIC', 'PCI'], ...old },
  { name: '5.8', paths: ['ID', 'DEPLOY_ID', ...OWN, RULES, HOST, MAD], lists: NICS, ...old },
  {
    name: '5.12',
    paths: ['ID', 'DEPLOY_ID', ...OWN, RULES, HOST, DATASTORE, MAD],
    lists: NICS,
    vmIn: 'stdin',
    host: false,
    deployId: 'name',
  },
  {
    name: '6.0 to 7.4',
    paths: ['ID', 'DEPLOY_ID', ...OWN, RULES, HOST, 'HISTORY_RECORDS/HISTORY/HID', DATASTORE, MAD],
    lists: NICS,
    vmIn: 'stdin',
    host: true,
    deployId: 'uuid',
  },
];

export interface NetworkStep {
  readonly vm: TestVm;
  /** DEPLOY_ID of the VM; null: it was never deployed. */
  readonly deployed: boolean;
  /** Host of the action; the source in a live migration. */
  readonly host: string;
  /** Host of the newest history record; `host` where it is not given. */
  readonly newest?: string;
}

export function deployIdOf(version: VnmVersion, vm: TestVm): string {
  return version.deployId === 'uuid' ? vm.uuid : `one-${vm.id}`;
}

/** The VM that a network driver is given. */
export function networkVm(version: VnmVersion, { vm, deployed, host, newest }: NetworkStep): string {
  return partOfVm(version, vmXml({ ...vm, uuid: deployed ? deployIdOf(version, vm) : '' }, newest ?? host));
}

/** What one_vmm_exec makes of the VM: each value in elements of its own, since REXML adds the path anew for each. */
export function partOfVm(version: VnmVersion, text: string): string {
  if (version.paths === null) return text;
  const root = parseXml(text, { roots: ['VM'], what: 'the VM' });
  const pick = (path: string, only: (text: string) => boolean = () => true): string => {
    const names = path.split('/');
    let found = [root];
    for (const name of names) found = found.flatMap((one) => childrenNamed(one, name));
    const above = names.slice(0, -1);
    const open = above.map((name) => `<${name}>`).join('');
    const close = above
      .map((name) => `</${name}>`)
      .reverse()
      .join('');
    return found
      .map(({ start, end }) => text.slice(start, end))
      .filter(only)
      .map((one) => `${open}${one}${close}`)
      .join('');
  };
  const lists = version.lists.map((name) => pick(`TEMPLATE/${name}`, (one) => one.includes('<VN_MAD>')));
  return `<VM>${[...version.paths.map((path) => pick(path)), ...lists].join('')}</VM>`;
}

/** argv and standard input of one action. Standard input null: that of the ssh session. */
export function networkCall(
  version: VnmVersion,
  action: 'pre' | 'post' | 'clean' | 'update_nic',
  step: NetworkStep,
): { readonly argv: readonly string[]; readonly stdin: string | null } {
  const xml = action === 'update_nic' ? vmXml(step.vm, step.newest ?? step.host) : networkVm(version, step);
  const encoded = Buffer.from(xml).toString('base64');
  const { host } = step;
  const own = {
    pre: [],
    post: [deployIdOf(version, step.vm), ...(version.host ? [host] : [])],
    clean: version.host ? [host] : [],
    update_nic: [deployIdOf(version, step.vm), '7'],
  }[action];
  if (version.vmIn === 'argument') return { argv: [encoded, ...own], stdin: null };
  // Of update_nic alone with line ends, as Base64.encode64 makes them.
  const text =
    action === 'update_nic' ? (encoded.match(/.{1,60}/g) ?? []).map((line) => `${line}\n`).join('') : encoded;
  return { argv: own, stdin: `${text}\n` };
}
