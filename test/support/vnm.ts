/** How each version of OpenNebula calls a network driver: argv, standard input, and the part of the VM that it gives. */
import { cpSync, mkdirSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { childrenNamed, parseXml } from '../../lib/core/xml.ts';
import { copyBundles, run, writeScript } from './driver.ts';
import type { TestVm } from './vm/opennebula.ts';
import { vmXml } from './vm/opennebula.ts';

const repository = resolve(import.meta.dirname, '../..');

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
  // NICs have no numbers before 4.0.
  if (version.paths === null) return text.replace(/<NIC_ID>.*?<\/NIC_ID>/g, '');
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

export interface SessionAnswer {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/**
 * Runs one action in the ssh session of one_vmm_exec, `bash -s`, and a command behind it: had the action read the session's
 * standard input, that would be lost.
 */
export async function callInSession(
  script: string,
  { argv, stdin }: ReturnType<typeof networkCall>,
  env: Readonly<Record<string, string>>,
): Promise<SessionAnswer> {
  const command = [script, ...argv.map((arg) => `'${arg}'`)].join(' ');
  const marks = 'echo "ExitCode: $? EOF_ERR" 1>&2; echo "EOF_OUT"';
  const text = stdin === null ? `(${command}); ${marks}\n` : `(cat << 'EOT' | ${command}); ${marks}\n${stdin}EOT\n`;
  const { stdout, stderr } = await run(['/bin/bash', '-s'], { stdin: `${text}echo next command\n`, env });
  const end = /^ExitCode: (\d+) EOF_ERR\n/m.exec(stderr);
  if (end === null || !stdout.endsWith('EOF_OUT\nnext command\n')) {
    throw new Error(`one_vmm_exec would wait for ever: ${JSON.stringify({ stdout, stderr })}`);
  }
  return {
    code: Number(end[1]),
    stdout: stdout.slice(0, stdout.indexOf('EOF_OUT\n')),
    stderr: stderr.replace(end[0], ''),
  };
}

/** Puts our network driver beside a rig's drivers, as `onehost sync` does, and hooks of it beside a driver that runs hooks. */
export function installNetworkDriver(folder: string): void {
  const ours = join(folder, 'vnm/kvm-ib');
  cpSync(join(repository, 'drivers/vnm/kvm-ib'), ours, { recursive: true });
  copyBundles(ours, ['vnm.mjs', 'engine.mjs']);
  for (const action of ['pre', 'post', 'clean']) {
    const hooks = join(folder, `vnm/dummy/${action}.d`);
    mkdirSync(hooks, { recursive: true });
    cpSync(join(ours, action), join(hooks, 'kvm-ib'));
    writeScript(join(folder, 'vnm/dummy', action), DUMMY);
  }
}

/** The driver `dummy` of 5.10 to 7.4, in its own words: nothing but hooks. */
const DUMMY = `#!/bin/bash
stdin="$(</dev/stdin)"
export PATH="\${PATH}:/bin:/sbin:/usr/bin"
for f in "$0".d/* ; do
  [ -x "$f" ] || exit 0 && echo "$stdin" | "$f" "$@"  || exit 1
done
`;
