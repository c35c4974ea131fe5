/**
 * How each OpenNebula from 3.4 to 7.4 calls a driver script, and what it makes of the answer: facts of OpenNebulaDriver.rb,
 * ssh_stream.rb, CommandManager.rb, DriverExecHelper.rb and one_vmm_exec.rb at the release tags.
 */
import { spawn } from 'node:child_process';
import { dirname } from 'node:path';
import type { TestVm } from './vm/opennebula.ts';

export interface Release {
  readonly name: string;
  /** Arguments stand in single quotes: since 4.2. */
  readonly quoted: boolean;
  /** The here document with the VM data, which every action of an ssh stream gets since 5.0; quoted since 6.6. */
  readonly data: 'none' | 'here' | 'quoted-here';
  /** Whether a command that goes by an ssh of its own (reboot, reset, snapshot_revert) has the VM data as well: since 5.8. */
  readonly remoteData: boolean;
  /** Form of the deploy id: a UUID since 6.0.0. */
  readonly id: 'one' | 'uuid';
  /** vm.xml lies beside the deployment file: since 6.0.0. */
  readonly vmXml: boolean;
  /** restore has the deploy id as third argument: since 4.4. */
  readonly restoreId: boolean;
  /** Own arguments of attach_nic; null: there is none. */
  readonly attachNic: readonly ('id' | 'mac' | 'bridge' | 'model' | 'driver' | 'target')[] | null;
  /** VERSION lies at the root of the remotes: since 4.4. */
  readonly version: boolean;
  /** What becomes of standard error when the script fails. */
  readonly error: 'block' | 'all' | 'plain-lines';
  /** What the domain XML has that older ones lack. */
  readonly domain: { readonly targets: boolean; readonly metadata: 'none' | 'datastore' | 'version' };
}

const first: Release = {
  name: '3.4.4',
  quoted: false,
  data: 'none',
  remoteData: false,
  id: 'one',
  vmXml: false,
  restoreId: false,
  attachNic: null,
  version: false,
  error: 'block',
  domain: { targets: false, metadata: 'none' },
};
const nic40 = { attachNic: ['id', 'mac', 'bridge', 'model'] } as const;
const nic44 = { attachNic: ['id', 'mac', 'bridge', 'model', 'driver'] } as const;
const nic50 = { attachNic: ['id', 'mac', 'bridge', 'model', 'driver', 'target'] } as const;

function since(earlier: Release, name: string, changes: Partial<Release> = {}): Release {
  return { ...earlier, ...changes, name };
}

const r38 = since(first, '3.8.5');
const r40 = since(r38, '4.0.1', nic40);
const r42 = since(r40, '4.2', { quoted: true });
const r44 = since(r42, '4.4.1', { ...nic44, restoreId: true, version: true });
const r414 = since(r44, '4.14.2', { domain: { targets: false, metadata: 'datastore' } });
const r50 = since(r414, '5.0.2', { ...nic50, data: 'here', domain: { targets: true, metadata: 'datastore' } });
const r54 = since(r50, '5.4.15');
const r58 = since(r54, '5.8.5', { remoteData: true, domain: { targets: true, metadata: 'version' } });
const r510 = since(r58, '5.10.5');
const r512 = since(r510, '5.12.13');
const r600 = since(r512, '6.0.0', { id: 'uuid', vmXml: true });
const r602 = since(r600, '6.0.2');
const r603 = since(r602, '6.0.3', { error: 'all' });
const r610 = since(r603, '6.10.5', { data: 'quoted-here' });
const r74 = since(r610, '7.4.0', { error: 'plain-lines' });

export const RELEASES: readonly Release[] = [
  ...[first, r38, r40, r42, r44, r414],
  ...[r50, r54, r58, r510, r512],
  ...[r600, r602, r603, r610, r74],
];

/** The domain XML as this release writes it, out of one of 7.4. */
export function domainFor(release: Release, domain: string, vm: TestVm): string {
  const { targets, metadata } = release.domain;
  let xml = domain;
  if (release.id === 'one') xml = xml.replace(/\t<uuid>.*<\/uuid>\n/, '');
  if (!targets) xml = xml.replaceAll(/\t\t\t<target dev='one-[^']*'\/>\n/g, '');
  if (metadata !== 'version') {
    const old = `\t<metadata>\n\t\t<system_datastore>/var/lib/one//datastores/0/${vm.id}</system_datastore>\n\t</metadata>\n`;
    xml = xml.replace(/\t<metadata>[\s\S]*<\/metadata>\n/, metadata === 'none' ? '' : old);
  }
  return xml.replace('7.4.0', release.name);
}

export interface OneCall {
  /** Path of the script. */
  readonly script: string;
  /** Its own arguments; VM id and host follow. */
  readonly args: readonly string[];
  readonly vmId: number;
  readonly hostName: string;
  /** Of deploy the domain XML, of all others the VM data; not sent where the release sends none. */
  readonly payload: string;
  readonly env: Readonly<Record<string, string>>;
  /** Puts a program into another host; absent: it runs here. */
  readonly inside?: (argv: [string, ...string[]]) => readonly string[];
}

export interface OneAnswer {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
  /** What the user is shown of a failure. */
  readonly message: string;
  /** Whether the command that was sent behind was run: false where the script ate it. */
  readonly next: boolean;
}

/** How `bash -s` gets its commands. sshd gives a session a pipe or, built otherwise, a socket. */
export type Stream = 'pipe' | 'socket';

/** As SshStream does: one command of a running `bash -s`. The one behind it is there before it begins. */
export async function callInStream(release: Release, call: OneCall, stream: Stream = 'pipe'): Promise<OneAnswer> {
  const hasPayload = release.data !== 'none' || call.script.endsWith('/deploy');
  const command = commandOf(release, call);
  const mark = release.data === 'quoted-here' ? "'EOT'" : 'EOT';
  const here = hasPayload ? `cat << ${mark} | ${command}` : command;
  const payload = hasPayload ? `${call.payload}\nEOT\n` : '';
  const text = `(${here}); echo "ExitCode: $? EOF_ERR" 1>&2; echo "EOF_OUT"\n${payload}echo next\nexit\n`;
  // Node gives its children sockets; behind cat it is a pipe.
  const shell: [string, ...string[]] =
    stream === 'socket' ? ['/bin/bash', '-s'] : ['/bin/sh', '-c', 'cat | /bin/bash -s'];
  const { stdout, stderr } = await converse(call.inside?.(shell) ?? shell, call.env, text);
  const end = /^ExitCode: (\d*) EOF_ERR\n/m.exec(stderr);
  const at = stdout.indexOf('EOF_OUT\n');
  if (end === null || at === -1) throw new Error(`no end marks: ${JSON.stringify({ stdout, stderr })}`);
  const code = Number(end[1]);
  const said = stderr.replace(end[0], '');
  return {
    code,
    stdout: stdout.slice(0, at),
    stderr: said,
    message: code === 0 ? '' : messageOf(release, `${said}ExitCode: ${code}`),
    next: stdout.slice(at) === 'EOF_OUT\nnext\n',
  };
}

/** As RemotesCommand does: an ssh of its own, `ssh -n` where there are no data. */
export async function callByItself(release: Release, call: OneCall): Promise<OneAnswer> {
  const text = `if [ -x "${call.script}" ]; then ${commandOf(release, call)}; else exit 42; fi`;
  const argv = ['/bin/bash', '-c', text];
  const { code, stdout, stderr } = await converse(argv, call.env, release.remoteData ? call.payload : '');
  return { code, stdout, stderr, message: code === 0 ? '' : messageOf(release, stderr), next: true };
}

function commandOf(release: Release, { script, args, vmId, hostName }: OneCall): string {
  const own = release.quoted ? args.map((arg) => `'${arg}'`) : args;
  return `${script} ${own.join(' ')} ${vmId} ${hostName}`;
}

function messageOf(release: Release, stderr: string): string {
  switch (release.error) {
    case 'block': {
      const block = /^ERROR MESSAGE --8<------\n([\s\S]*?)ERROR MESSAGE ------>8--$/m.exec(stderr);
      return block?.[1]?.trim() ?? '-';
    }
    case 'all':
      return stderr.replaceAll('\n', ' ').trim() || '-';
    case 'plain-lines': {
      const plain = stderr
        .split('\n')
        .filter((line) => !/^(ERROR|INFO|WARN|DEBUG):\s+(\d+)?\s*(.*)$/.test(line.trim()));
      return plain.map((line) => line.trim()).join('') || '-';
    }
  }
}

function converse(
  argv: readonly string[],
  env: Readonly<Record<string, string>>,
  input: string,
): Promise<{ readonly code: number; readonly stdout: string; readonly stderr: string }> {
  const [program = '', ...args] = argv;
  const path = `/usr/local/bin:/usr/bin:/bin:${dirname(process.execPath)}`;
  const child = spawn(program, args, { stdio: 'pipe', env: { PATH: path, LANG: 'C', HOME: '/', ...env }, cwd: '/' });
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('latin1').on('data', (text: string) => {
    stdout += text;
  });
  child.stderr.setEncoding('latin1').on('data', (text: string) => {
    stderr += text;
  });
  child.stdin.on('error', () => undefined).end(input);
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => {
      child.kill('SIGKILL');
      reject(new Error(`no end: ${JSON.stringify({ stdout, stderr })}`));
    }, 60_000);
    child.on('error', reject);
    child.on('close', (code) => {
      clearTimeout(timer);
      resolve({ code: code ?? -1, stdout, stderr });
    });
  });
}
