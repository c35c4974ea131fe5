/**
 * A whole machine under QEMU with Debian's kernel in which the programs of this repository run: for what the kernel of
 * the test's own machine may lack (bonding, VLANs). Its root is an initramfs of busybox, Node, nft, iproute2 and the
 * built programs; it is up in a few seconds and runs commands that come over a virtio port.
 */
import { spawn } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, realpathSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import type { Part } from './guest.ts';
import { consoleOf, fetchedKernel, moduleParts, writeInitramfs } from './guest.ts';
import type { ToolResult } from './process.ts';
import { runTool } from './process.ts';

const QEMU = '/usr/bin/qemu-system-x86_64';
const SETPRIV = '/usr/bin/setpriv';
const MEMORY_MB = 768;
const BOOT_LIMIT_MS = 60_000;
/** Of one command; init gives up earlier, with what was printed until then. */
const COMMAND_LIMIT_MS = 100_000;
const repository = join(dirname(fileURLToPath(import.meta.url)), '../../..');

/** Programs of the machine beside busybox: where they lie here, and there when that is elsewhere. */
const PROGRAMS: readonly (readonly [path: string, target?: string])[] = [
  [process.execPath, '/usr/bin/node'],
  ['/usr/sbin/ip'],
  ['/usr/sbin/nft'],
  ['/usr/sbin/conntrack'],
  ['/usr/bin/tcpdump'],
  ['/usr/bin/setpriv'],
  ['/usr/bin/env'],
  ['/usr/bin/bash'],
  ['/usr/bin/perl'],
];

/** Our programs as docs/install.md puts them. */
const OURS: readonly Part[] = [
  ['usr/lib/kvm-ib/kvm-ib.mjs', 'dist/kvm-ib.mjs', 0o755],
  ['usr/lib/kvm-ib/engine.mjs', 'dist/engine.mjs', 0o644],
  ['usr/lib/kvm-ib/koffi.node', 'dist/koffi.node', 0o644],
  ['usr/lib/kvm-ib/netlink.node', 'dist/netlink.node', 0o644],
  ['usr/lib/kvm-ib/kvm-ib-engine', 'rulesets/kvm-ib-engine', 0o755],
];

const MODULES = [
  'virtio_pci',
  'virtio_console',
  'bonding',
  'veth',
  'bridge',
  'tun',
  '8021q',
  'nf_tables',
  'nft_chain_nat',
  'nft_ct',
  'nft_nat',
  'nft_fib_ipv4',
  'nf_conntrack_netlink',
] as const;

export interface Machine {
  /** Runs a shell script in the machine; scripts run one after the other. @throws Error when its exit status is not 0 */
  readonly run: (script: string) => Promise<string>;
  /** The same; a failure is a result. */
  readonly try: (script: string) => Promise<ToolResult>;
  readonly console: () => string;
  readonly stop: () => Promise<void>;
}

/**
 * Boots the machine. It ends with this process, however that ends.
 * @param folder for its image and console; must exist
 * @throws Error with what is missing, or with the end of its console when it does not come up
 */
export async function startMachine(folder: string): Promise<Machine> {
  for (const [path, fix] of [
    [QEMU, 'install qemu-system-x86'],
    [SETPRIV, 'install util-linux'],
  ] as const) {
    if (!existsSync(path)) throw new Error(`Cannot start the machine: ${path} is missing. Try: ${fix}`);
  }
  const kernel = fetchedKernel();
  // Not kept in the cache: it is large, and another one after each build.
  const initramfs = join(folder, 'initramfs.cpio');
  await writeInitramfs(
    [
      ['init', join(dirname(fileURLToPath(import.meta.url)), 'machine/init'), 0o755],
      ...moduleParts(withDependencies(kernel.modules, MODULES)),
      ...(await programParts()),
    ],
    initramfs,
  );
  const console = join(folder, 'console.log');
  const qemu = [
    ...[QEMU, '-no-user-config', '-nodefaults', '-display', 'none', '-no-reboot', '-accel', 'tcg,thread=multi'],
    ...['-cpu', 'max', '-smp', '2', '-m', String(MEMORY_MB)],
    ...['-kernel', kernel.image, '-initrd', initramfs, '-append', 'console=ttyS0 quiet panic=-1 mitigations=off'],
    ...['-serial', `file:${console}`, '-device', 'virtio-serial-pci'],
    ...['-chardev', 'stdio,id=commands,signal=off', '-device', 'virtserialport,chardev=commands,name=kvm-ib-test'],
  ];
  const child = spawn(SETPRIV, ['--pdeathsig', 'KILL', '--', ...qemu], {
    stdio: ['pipe', 'pipe', 'pipe'],
    env: { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' },
  });
  let said = '';
  child.stderr.on('data', (chunk: Buffer) => {
    said += chunk.toString();
  });
  child.stdin.on('error', () => undefined);
  const ended = new Promise<void>((resolve) => child.once('close', () => resolve()));
  const answers = createInterface({ input: child.stdout });
  const stop = async () => {
    child.kill('SIGKILL');
    await ended;
  };

  /** The next line that the machine says. */
  const next = (what: string, limit: number) =>
    new Promise<string>((resolve, reject) => {
      const settle = (act: () => void) => {
        clearTimeout(timer);
        answers.off('line', onLine);
        child.off('close', onClose);
        act();
      };
      const onLine = (line: string) => settle(() => resolve(line));
      const fail = (why: string) => {
        child.kill('SIGKILL'); // whatever it says now would be taken for another answer
        settle(() => reject(new Error(`${what}: ${why}\n${said}Its console:\n${consoleOf(console)}`)));
      };
      const onClose = () => fail('the machine ended');
      const timer = setTimeout(() => fail(`no answer within ${limit} ms`), limit);
      answers.on('line', onLine);
      child.on('close', onClose);
    });

  try {
    await next('The machine does not come up', BOOT_LIMIT_MS);
  } catch (error) {
    await stop();
    throw error;
  }

  let last: Promise<unknown> = Promise.resolve();
  const exchange = async (script: string): Promise<ToolResult> => {
    const answer = next(script, COMMAND_LIMIT_MS);
    child.stdin.write(`${Buffer.from(script).toString('base64')}\n`);
    const [status, stdout = '', stderr = ''] = (await answer).split(' ');
    const text = (base64: string) => Buffer.from(base64, 'base64').toString('utf8');
    return { status: Number(status), stdout: text(stdout), stderr: text(stderr) };
  };
  const tryIt = (script: string): Promise<ToolResult> => {
    const result = last.then(() => exchange(script));
    last = result.catch(() => undefined);
    return result;
  };
  return {
    try: tryIt,
    run: async (script) => {
      const result = await tryIt(script);
      if (result.status === 0) return result.stdout;
      throw new Error(`${script}\nexited with ${result.status}\n${result.stderr}${result.stdout}`);
    },
    console: () => consoleOf(console),
    stop,
  };
}

/** Programs and addons with every library that they load. */
async function programParts(): Promise<readonly Part[]> {
  const ours = OURS.map(([target, path, mode]): Part => [target, join(repository, path), mode]);
  const parts = new Map<string, Part>(ours.map((part) => [part[0], part]));
  for (const [, path] of parts.values()) {
    if (!existsSync(path)) throw new Error(`Cannot build the machine: ${path} is missing. Run: npm run build`);
  }
  for (const [path, target = path] of PROGRAMS) {
    if (!existsSync(path)) throw new Error(`Cannot build the machine: ${path} is missing`);
    parts.set(target, [target.slice(1), path, 0o755]);
  }
  const binaries = [...parts.values()].map(([, path]) => path).filter(isElf);
  const listing = await runTool(['/usr/bin/ldd', ...binaries]);
  for (const [, path = ''] of listing.matchAll(/(?:=> |^\s+)(\/\S+) \(0x/gm)) {
    parts.set(path, [path.slice(1), realpathSync(path), 0o755]);
  }
  return [...parts.values()];
}

function isElf(path: string): boolean {
  return readFileSync(path).subarray(0, 4).toString('latin1') === '\u007fELF';
}

/** Paths of these modules and of what they depend on, in the order in which they load. */
function withDependencies(folder: string, names: readonly string[]): readonly string[] {
  // A module is called with "_" where its file may have "-".
  const nameOf = (path: string) => basename(path).replace(/\.ko$/, '').replaceAll('-', '_');
  const files = readdirSync(folder, { recursive: true, encoding: 'utf8' }).filter((path) => path.endsWith('.ko'));
  const paths = new Map(files.map((path) => [nameOf(path), join(folder, path)]));
  const ordered = new Set<string>();
  const visit = (name: string) => {
    const path = paths.get(name);
    if (path === undefined) throw new Error(`Cannot build the machine: the kernel in ${folder} has no module ${name}`);
    if (ordered.has(path)) return;
    const depends = /\0depends=([^\0]*)\0/.exec(readFileSync(path, 'latin1'))?.[1] ?? '';
    for (const needed of depends.split(',').filter((one) => one !== '')) visit(needed);
    ordered.add(path);
  };
  for (const name of names) visit(name);
  return [...ordered];
}
