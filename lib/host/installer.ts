/**
 * The hands of `kvm-ib install`: finds the package, looks at what is there, puts files in place, runs programs.
 *
 * Files are written beside their place and renamed: whoever starts a program meanwhile gets the old or the new one. Below
 * a directory that is not root's, everything is done with the rights of that directory's owner: OpenNebula's user owns the
 * remotes, and a link planted there must not lead root's writing elsewhere.
 */
import { createHash, randomBytes } from 'node:crypto';
import {
  chmodSync,
  chownSync,
  closeSync,
  existsSync,
  fchmodSync,
  fchownSync,
  fsyncSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmdirSync,
  rmSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { KvmIbError, printable, toKvmIbError } from '../core/errors.ts';
import type { FileItem, Item, Observation, Operation, Seen, Step } from '../ops/install.ts';
import { exec } from './exec.ts';

const VISUDO = '/usr/sbin/visudo';

export interface Package {
  /** Every file below a folder of the package, as `folder/…`, sorted; none when it is not there. */
  list(folder: string): readonly { readonly path: string; readonly mode: number }[];
  /** `bundle/NAME`, `rulesets/…`, `drivers/…`. */
  read(path: string): Buffer;
}

/**
 * The package that this program came from: an installation (`/usr/lib/kvm-ib`, everything beside the bundle), an npm
 * package or a built checkout (bundles in `dist/`, the rest beside it). Nowhere else is looked, least of all upwards.
 * @throws KvmIbError `host-lacks` when it is incomplete
 */
export function findPackage(from: string = dirname(fileURLToPath(import.meta.url))): Package {
  // Bundle; compiled one by one; source. By the name of the folder, so that a stray bundle in /tmp trusts no neighbour.
  const checkout = /^(.*)\/(?:dist|lib\/host)$/.exec(from.replace(/\/dist\/lib\/host$/, '/dist'))?.[1];
  const roots = [
    { root: from, bundles: from },
    ...(checkout === undefined ? [] : [{ root: checkout, bundles: join(checkout, 'dist') }]),
  ];
  const whole = ({ root, bundles }: { root: string; bundles: string }): boolean =>
    existsSync(join(root, 'rulesets/kvm-ib-engine')) && existsSync(join(bundles, 'engine.mjs'));
  const found = roots.find(whole);
  if (found === undefined) {
    throw new KvmIbError('host-lacks', 'Cannot find the files to install', {
      why: `neither beside ${from} nor above it are engine.mjs and rulesets/`,
      fix: 'run `npm run build` in the checkout, or unpack the whole package',
    });
  }
  const resolve = (path: string): string =>
    path.startsWith('bundle/') ? join(found.bundles, path.slice('bundle/'.length)) : join(found.root, path);
  return {
    list: (folder) =>
      filesBelow(join(found.root, folder)).map((path) => ({
        path: join(folder, path),
        mode: (lstatSync(join(found.root, folder, path)).mode & 0o100) === 0 ? 0o644 : 0o755,
      })),
    read(path) {
      try {
        return readFileSync(resolve(path));
      } catch (cause) {
        throw new KvmIbError('host-lacks', `Cannot read ${path} of the package`, {
          why: cause instanceof Error ? cause.message : String(cause),
          fix: 'run `npm run build` in the checkout, or unpack the whole package',
          cause,
        });
      }
    },
  };
}

/** Files below a directory, relative to it, sorted; links are not followed. */
function filesBelow(directory: string, prefix = ''): readonly string[] {
  if (!existsSync(directory)) return [];
  return readdirSync(directory, { withFileTypes: true })
    .flatMap((entry) =>
      entry.isDirectory()
        ? filesBelow(join(directory, entry.name), `${prefix}${entry.name}/`)
        : entry.isFile()
          ? [`${prefix}${entry.name}`]
          : [],
    )
    .sort();
}

/** What the last installation left behind for the next one. */
export interface InstallRecord {
  readonly version: string;
  readonly files: ReadonlyMap<string, string>;
  /** Directories that were made. */
  readonly directories: readonly string[];
  /** Networks that libvirt was given. */
  readonly networks: readonly string[];
}

/** The tree that is installed into: `/`, or a directory that stands for it. */
export interface Target {
  readonly root: string;
  readonly live: boolean;
  exists(path: string): boolean;
  /** Text of a file; null when it is not there. */
  readText(path: string): string | null;
  readRecord(path: string): InstallRecord;
  observe(pack: Package, recorded: ReadonlyMap<string, string>): Observation;
  /** Everything below these directories, deepest first. */
  inside(directories: readonly string[]): readonly string[];
  /** Does `+ ~ -`. Checks first what is to be checked, so that a refused file changes nothing. @returns directories made */
  apply(operations: readonly Operation[], pack: Package): Promise<readonly string[]>;
  writeRecord(path: string, record: InstallRecord): void;
}

/** @param frontEndUser who owns what lies below OpenNebula's directories, when such a user exists */
export function openTarget(root: string, frontEndUser: string): Target {
  const live = root === '/';
  const base = root.replace(/\/+$/, '');
  const at = (path: string): string => `${base}${path}`;
  const users = readUsers(at('/etc/passwd'));
  const nameOf = (uid: number): string => [...users].find(([, user]) => user.uid === uid)?.[0] ?? String(uid);
  const oneadmin = users.get(frontEndUser);
  const asRoot = process.getuid?.() === 0;
  const ownerOf = (path: string): { readonly uid: number; readonly gid: number } =>
    (path.startsWith('/var/lib/one/') ? oneadmin : undefined) ?? { uid: 0, gid: 0 };

  /** Acts as the owner of the first directory on the way that is not root's. */
  const within = <T>(path: string, act: () => T): T => {
    const who = asRoot ? stranger(base, path) : undefined;
    if (who === undefined || process.seteuid === undefined || process.setegid === undefined) return guard(path, act);
    const groups = process.getgroups?.() ?? [];
    process.setgroups?.([who.gid]);
    process.setegid(who.gid);
    process.seteuid(who.uid);
    try {
      return guard(
        path,
        act,
        `it lies in a directory of ${nameOf(who.uid)}, with whose rights it is done: look at the owners`,
      );
    } finally {
      process.seteuid(0);
      process.setegid(0);
      process.setgroups?.(groups);
    }
  };

  const readText = (path: string): string | null =>
    within(path, () => {
      try {
        return lstatSync(at(path)).isFile() ? readFileSync(at(path), 'utf8') : null;
      } catch {
        return null;
      }
    });

  const look = (path: string): Seen =>
    within(path, () => {
      const full = at(path);
      const stat = lstatSync(full, { throwIfNoEntry: false });
      if (stat === undefined) return { kind: 'absent' };
      if (stat.isSymbolicLink()) return { kind: 'link', target: readlinkSync(full) };
      if (stat.isDirectory()) return { kind: 'directory', mode: stat.mode & 0o7777 };
      if (!stat.isFile()) return { kind: 'other' };
      const owner = asRoot ? nameOf(stat.uid) : nameOf(ownerOf(path).uid);
      return { kind: 'file', mode: stat.mode & 0o7777, owner, sha256: digest(readFileSync(full)) };
    });

  /** Parents that are not there, made; outermost first. */
  const makeParents = (path: string): readonly string[] => {
    const missing: string[] = [];
    for (let up = dirname(path); up !== '/' && look(up).kind === 'absent'; up = dirname(up)) missing.unshift(up);
    for (const directory of missing) makeDirectory(directory, 0o755);
    return missing;
  };

  const makeDirectory = (path: string, mode: number): void =>
    within(path, () => {
      mkdirSync(at(path));
      chmodSync(at(path), mode);
      if (process.geteuid?.() === 0) chownSync(at(path), ownerOf(path).uid, ownerOf(path).gid);
    });

  const place = (path: string, make: (temporary: string) => void): void =>
    within(path, () => {
      // A dot in the name: sudo does not read it, and im probes are run only when they are executable and in place.
      const temporary = join(dirname(at(path)), `.kvm-ib-${randomBytes(6).toString('hex')}.new`);
      try {
        make(temporary);
        renameSync(temporary, at(path));
      } catch (error) {
        rmSync(temporary, { force: true });
        throw error;
      }
    });

  const writeFile = (path: string, bytes: Buffer, mode: number, owner = ownerOf(path)): void =>
    place(path, (temporary) => {
      const fd = openSync(temporary, 'wx', 0o600);
      try {
        for (let done = 0; done < bytes.length; ) done += writeSync(fd, bytes, done);
        if (process.geteuid?.() === 0) fchownSync(fd, owner.uid, owner.gid);
        fchmodSync(fd, mode);
        fsyncSync(fd);
      } finally {
        closeSync(fd);
      }
    });

  const rewrite = (item: FileItem, bytes: Buffer): void => {
    requireUnchanged(item);
    const { uid, gid, mode } = lstatSync(at(item.path));
    writeFile(item.path, bytes, mode & 0o7777, { uid, gid });
  };

  const requireUnchanged = ({ path, edits }: FileItem): void => {
    if (edits === undefined || readText(path) === edits) return;
    throw new KvmIbError('conflict', `Cannot change ${path}`, {
      why: 'somebody else has changed it in this moment',
      fix: 'look at it, then run the command again',
    });
  };

  const put = (item: Item): void => {
    if (item.kind === 'directory') makeDirectory(item.path, item.mode);
    else if (item.kind === 'link') place(item.path, (temporary) => symlinkSync(item.target, temporary));
  };

  const remove = (path: string): void =>
    within(path, () => {
      const stat = lstatSync(at(path), { throwIfNoEntry: false });
      if (stat === undefined) return;
      if (!stat.isDirectory()) {
        unlinkSync(at(path));
        return;
      }
      try {
        rmdirSync(at(path));
      } catch (error) {
        // Something of somebody else is in it.
        if (!['ENOTEMPTY', 'EEXIST', 'EBUSY'].includes((error as NodeJS.ErrnoException).code ?? '')) throw error;
      }
    });

  return {
    root,
    live,
    exists: (path) => lstatSync(at(path), { throwIfNoEntry: false }) !== undefined,
    readText,
    readRecord: (path) => parseRecord(readText(path)),
    observe: (pack, recorded) => ({
      seen: look,
      content(item) {
        const bytes = bytesOf(item, pack);
        return { sha256: digest(bytes), size: bytes.length };
      },
      children: (path) =>
        within(`${path}/.`, () => {
          if (lstatSync(at(path), { throwIfNoEntry: false })?.isDirectory() !== true) return [];
          return readdirSync(at(path)).map((name) => `${path}/${name}`);
        }),
      owner: (path) => nameOf(ownerOf(path).uid),
      recorded,
    }),
    inside: (directories) =>
      directories
        .flatMap((directory) => within(`${directory}/.`, () => everythingBelow(at(directory), directory)))
        .sort((a, b) => b.split('/').length - a.split('/').length),
    async apply(operations, pack) {
      for (const { sign, item } of operations) {
        if ((sign !== '+' && sign !== '~') || item?.kind !== 'file') continue;
        requireUnchanged(item);
        if (item.check !== undefined) await visudo(item.path, bytesOf(item, pack), live);
      }
      const made: string[] = [];
      for (const { sign, path, item } of operations) {
        if (sign === '-') remove(path);
        else if (sign === '+' || sign === '~') {
          made.push(...makeParents(path));
          if (item?.kind === 'file' && item.edits !== undefined) rewrite(item, bytesOf(item, pack));
          else if (item?.kind === 'file') writeFile(path, bytesOf(item, pack), item.mode);
          else if (item !== null) {
            put(item);
            if (item.kind === 'directory') made.push(path);
          }
        }
      }
      return made;
    },
    writeRecord(path, record) {
      const text = `${JSON.stringify({ ...record, files: Object.fromEntries(record.files) }, undefined, 1)}\n`;
      if (readText(path) !== text) writeFile(path, Buffer.from(text), 0o644);
    },
  };
}

function bytesOf(item: FileItem, pack: Package): Buffer {
  return 'text' in item.source ? Buffer.from(item.source.text) : pack.read(item.source.package);
}

export function digest(bytes: Buffer): string {
  return createHash('sha256').update(bytes).digest('hex');
}

/** The owner of the first directory from `base` to the one that holds `path` that is not root's; undefined when all are. */
function stranger(base: string, path: string): { readonly uid: number; readonly gid: number } | undefined {
  let current = base;
  for (const part of path.split('/').slice(1, -1)) {
    current = `${current}/${part}`;
    const stat = lstatSync(current, { throwIfNoEntry: false });
    if (stat === undefined) return undefined;
    if (stat.uid !== 0 && (stat.isDirectory() || stat.isSymbolicLink())) return { uid: stat.uid, gid: stat.gid };
  }
  return undefined;
}

function everythingBelow(full: string, path: string): readonly string[] {
  const stat = lstatSync(full, { throwIfNoEntry: false });
  if (stat === undefined || !stat.isDirectory()) return [];
  return readdirSync(full, { withFileTypes: true }).flatMap((entry) => [
    ...(entry.isDirectory() ? everythingBelow(join(full, entry.name), `${path}/${entry.name}`) : []),
    `${path}/${entry.name}`,
  ]);
}

/** A drop-in that sudo cannot read locks every user out of sudo, so it is asked first. */
async function visudo(path: string, bytes: Buffer, required: boolean): Promise<void> {
  if (!existsSync(VISUDO)) {
    if (!required) return;
    throw new KvmIbError('host-lacks', `Cannot check ${path}`, { why: `${VISUDO} is not there`, fix: 'install sudo' });
  }
  const folder = mkdtempSync(join(tmpdir(), 'kvm-ib-'));
  try {
    const copy = join(folder, basename(path));
    writeFileSync(copy, bytes, { mode: 0o440 });
    const { status, stdout, stderr } = await exec([VISUDO, '-cf', copy]);
    if (status === 0) return;
    throw new KvmIbError('failed', `Cannot install ${path}`, {
      why: `visudo refuses it: ${printable((stderr + stdout).trim(), 300)}`,
      fix: 'report this version of sudo; nothing was changed',
    });
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

function readUsers(passwd: string): ReadonlyMap<string, { readonly uid: number; readonly gid: number }> {
  const users = new Map([['root', { uid: 0, gid: 0 }]]);
  if (!existsSync(passwd)) return users;
  for (const line of readFileSync(passwd, 'latin1').split('\n')) {
    const [name, , uid, gid] = line.split(':');
    if (name && /^\d+$/.test(uid ?? '') && /^\d+$/.test(gid ?? ''))
      users.set(name, { uid: Number(uid), gid: Number(gid) });
  }
  return users;
}

/** A record that cannot be read counts as none: files under /etc that differ are then kept. */
function parseRecord(text: string | null): InstallRecord {
  try {
    const raw = JSON.parse(text ?? '') as Record<string, unknown>;
    const files = Object.entries((raw['files'] ?? {}) as Record<string, unknown>);
    const directories = Array.isArray(raw['directories']) ? raw['directories'] : [];
    const networks: readonly unknown[] = Array.isArray(raw['networks']) ? raw['networks'] : [];
    const absolute = (path: unknown): path is string =>
      typeof path === 'string' && /^\/[^\0]*$/.test(path) && !/(^|\/)\.\.(\/|$)/.test(path);
    return {
      version: String(raw['version'] ?? ''),
      files: new Map(files.filter((e): e is [string, string] => absolute(e[0]) && typeof e[1] === 'string')),
      directories: directories.filter(absolute),
      networks: networks.filter(
        (name): name is string => typeof name === 'string' && /^kvm-ib-[A-Za-z0-9_-]{1,60}$/.test(name),
      ),
    };
  } catch {
    return { version: '', files: new Map(), directories: [], networks: [] };
  }
}

function guard<T>(path: string, act: () => T, deniedFix = 'run it as root'): T {
  try {
    return act();
  } catch (cause) {
    if (cause instanceof KvmIbError) throw cause;
    const code = (cause as NodeJS.ErrnoException).code;
    const denied = code === 'EACCES' || code === 'EPERM';
    throw new KvmIbError(denied ? 'not-permitted' : 'failed', `Cannot install or remove ${path}`, {
      why: cause instanceof Error ? cause.message : String(cause),
      fix: denied ? deniedFix : 'make room on the file system, or mount it read-write, then run it again',
      cause,
    });
  }
}

export interface StepResult extends Step {
  readonly ok: boolean;
  /** Its last words when it failed. */
  readonly said: string;
}

/** Runs programs one after the other; a failed one does not keep the next from being tried. */
export async function runSteps(steps: readonly Step[]): Promise<readonly StepResult[]> {
  const results: StepResult[] = [];
  for (const step of steps) {
    try {
      const { status, stdout, stderr } = await exec(step.argv, { timeout: 150_000 });
      const said = printable((stderr.trim() || stdout.trim()).split('\n').at(-1) ?? '', 300);
      results.push({ ...step, ok: status === 0, said: status === 0 ? '' : said || `it ended with status ${status}` });
    } catch (cause) {
      const error = toKvmIbError(cause);
      results.push({ ...step, ok: false, said: error.why ?? error.message });
    }
  }
  return results;
}

const VIRSH = '/usr/bin/virsh';
const NMCLI = '/usr/bin/nmcli';
const ASK_TIMEOUT_MS = 10_000;

/** What a program prints, without its arguments mattering to anybody; undefined when it is not there, fails or hangs. */
async function ask(...argv: readonly [string, ...string[]]): Promise<string | undefined> {
  if (!existsSync(argv[0])) return undefined;
  try {
    const { status, stdout } = await exec(argv, { timeout: ASK_TIMEOUT_MS });
    return status === 0 ? stdout : undefined;
  } catch {
    return undefined;
  }
}

export interface NetworkDump {
  readonly xml: string;
  readonly active: boolean;
  readonly autostart: boolean;
}

/** The networks of this host's libvirt; null when it does not answer. */
export async function libvirtNetworks(): Promise<readonly NetworkDump[] | null> {
  const virsh = (...args: readonly string[]): Promise<string | undefined> =>
    ask(VIRSH, '--readonly', '--connect', 'qemu:///system', ...args);
  const names = async (...args: readonly string[]): Promise<readonly string[] | undefined> =>
    (await virsh('net-list', '--name', ...args))?.split('\n').flatMap((line) => line.trim() || []);
  const all = await names('--all');
  const active = await names();
  const autostart = await names('--all', '--autostart');
  if (all === undefined || active === undefined || autostart === undefined) return null;
  const dumps: NetworkDump[] = [];
  for (const name of all) {
    const xml = await virsh('net-dumpxml', '--network', name);
    if (xml !== undefined) dumps.push({ xml, active: active.includes(name), autostart: autostart.includes(name) });
  }
  return dumps;
}

/** What NetworkManager says of each link; empty when it does not run. */
export async function networkManagerStates(): Promise<ReadonlyMap<string, string>> {
  const said = await ask(NMCLI, '--terse', '--fields', 'DEVICE,STATE', 'device');
  const lines = (said ?? '').split('\n').flatMap((line) => {
    // A link's name may hold a colon, which is then escaped; a state never does.
    const parts = /^(.+):([^:]+)$/.exec(line);
    return parts === null ? [] : [[(parts[1] ?? '').replace(/\\(.)/g, '$1'), parts[2] ?? ''] as const];
  });
  return new Map(lines);
}

/** The MTU of a link; undefined when it is not there. */
export function mtuOf(link: string): number | undefined {
  try {
    return Number(readFileSync(`/sys/class/net/${link}/mtu`, 'latin1')) || undefined;
  } catch {
    return undefined;
  }
}

/** What is attached to a bridge, but for the dummy link that older versions of libvirt put there. */
export function bridgePorts(bridge: string): readonly string[] {
  try {
    return readdirSync(`/sys/class/net/${bridge}/brif`).filter((port) => port !== `${bridge}-nic`);
  } catch {
    return [];
  }
}

/** Names of the links of this network namespace. */
export function linkNames(): ReadonlySet<string> {
  try {
    return new Set(readdirSync('/sys/class/net'));
  } catch {
    return new Set();
  }
}
