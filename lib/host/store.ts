/**
 * The state directory: what this host should have, one JSON file per owner, and an index of claims.
 *
 *   mappings/vm-42.json              written, synced and renamed into place
 *   claims/192.168.122.2 -> vm-42    who holds a guest or IB address, so that finding a rival costs one readlink
 *   table.json                       what the loaded rule set was made for
 *   links.json                       what each IPoIB link was like when its aliases were last announced
 *   import/                          what an import did, and the rules of before
 *   lock                             the host lock
 *
 * The mapping files are the truth. A claim whose file is gone or does not name the address is stale and means nothing.
 * Claims are written before the file and removed after it, so a crash leaves a claim too many, never one too few.
 */
import { randomBytes } from 'node:crypto';
import {
  closeSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  symlinkSync,
  unlinkSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import type { Ipv4 } from '../core/address.ts';
import { tryParseIpv4 } from '../core/address.ts';
import { KvmIbError } from '../core/errors.ts';
import type { Owner } from '../core/mapping.ts';
import { ownerName } from '../core/mapping.ts';
import { parseTableRecord, printTableRecord } from '../core/served.ts';
import type { StateFile } from '../core/state.ts';
import { mappingsOf, parseStateFile } from '../core/state.ts';
import type { LinkRecord, Store, TableRecord } from '../ops/host.ts';
import { readPhase } from './import-phase.ts';

/** Names of files that are being written. */
const TEMPORARY = /^\.[0-9a-f]{12}$/;

/** Opens the state directory; it is made at the first write. Reading an absent one finds nothing. */
export function createStore(directory: string): Store {
  const mappings = join(directory, 'mappings');
  const claims = join(directory, 'claims');
  const fileOf = (name: string): string => join(mappings, `${name}.json`);
  const claimOf = (address: Ipv4): string => join(claims, address);
  let made = false;

  const make = (): void => {
    if (made) return;
    guard(directory, () => {
      mkdirSync(mappings, { recursive: true, mode: 0o755 });
      mkdirSync(claims, { recursive: true, mode: 0o755 });
    });
    made = true;
  };

  const readName = (name: string): StateFile | undefined => {
    const path = fileOf(name);
    const text = guard(path, () => readIfThere(path));
    if (text === undefined) return undefined;
    const file = parseStateFile(text);
    if (file === undefined || ownerName(file.owner) !== name) {
      throw new KvmIbError('failed', `Cannot read the state file ${path}`, {
        why: 'it is not a state file of this version: cut off, edited by hand, or of a newer kvm-ib',
        fix: `look at it, move it away (mv ${path} ${path}.bad), then run \`kvm-ib reconcile\``,
      });
    }
    return file;
  };

  const keysOf = (file: StateFile | undefined): readonly Ipv4[] =>
    mappingsOf(file).flatMap((m) => [m.guest, m.address]);

  const claim = (address: Ipv4, name: string): void => {
    const path = claimOf(address);
    try {
      // Where nobody has it, which is nearly always, one call does.
      symlinkSync(name, path);
      return;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
    }
    const temporary = join(claims, `.${randomBytes(6).toString('hex')}`);
    symlinkSync(name, temporary);
    renameSync(temporary, path);
  };

  const claimant = (address: Ipv4): string | undefined => {
    try {
      return readlinkSync(claimOf(address));
    } catch (error) {
      if (['ENOENT', 'EINVAL'].includes((error as NodeJS.ErrnoException).code ?? '')) return undefined;
      throw error;
    }
  };

  const unclaim = (addresses: readonly Ipv4[], name: string): void => {
    for (const address of addresses) if (claimant(address) === name) unlinkSync(claimOf(address));
  };

  const readQuietly = (name: string): StateFile | undefined => {
    try {
      return readName(name);
    } catch {
      return undefined;
    }
  };

  return {
    directory,
    lockPath: join(directory, 'lock'),

    read: (owner: Owner) => readName(ownerName(owner)),

    write(file: StateFile): void {
      const name = ownerName(file.owner);
      make();
      guard(fileOf(name), () => {
        const before = keysOf(readQuietly(name));
        const now = new Set(keysOf(file));
        const taken: [Ipv4, string | undefined][] = [];
        try {
          for (const address of now) {
            const former = claimant(address);
            if (former === name) continue;
            taken.push([address, former]);
            claim(address, name);
          }
          replaceFile(mappings, fileOf(name), `${JSON.stringify(file, undefined, 1)}\n`);
        } catch (error) {
          // A claim that was taken over goes back, or its owner's file would have one too few.
          for (const [address, former] of taken) {
            if (former === undefined) unclaim([address], name);
            else claim(address, former);
          }
          throw error;
        }
        unclaim(
          before.filter((address) => !now.has(address)),
          name,
        );
      });
    },

    remove(owner: Owner): void {
      const name = ownerName(owner);
      guard(fileOf(name), () => {
        const before = keysOf(readQuietly(name));
        rmSync(fileOf(name), { force: true });
        syncDirectory(mappings);
        unclaim(before, name);
      });
    },

    holderOf(address: Ipv4): StateFile | undefined {
      return guard(claimOf(address), () => {
        const name = claimant(address);
        if (name === undefined) return undefined;
        const file = readName(name);
        return file !== undefined && keysOf(file).includes(address) ? file : undefined;
      });
    },

    all() {
      const names = guard(mappings, () => listIfThere(mappings)).filter((entry) => entry.endsWith('.json'));
      const files: StateFile[] = [];
      const unreadable: { path: string; why: string }[] = [];
      for (const entry of names.sort()) {
        try {
          const file = readName(entry.slice(0, -'.json'.length));
          if (file !== undefined) files.push(file);
        } catch (error) {
          if (!(error instanceof KvmIbError) || error.code === 'not-permitted') throw error;
          unreadable.push({ path: join(mappings, entry), why: error.why ?? error.message });
        }
      }
      return { files, unreadable };
    },

    repairClaims(files: readonly StateFile[]): void {
      if (files.length === 0 && listIfThere(claims).length === 0) return;
      make();
      guard(claims, () => {
        // Half-written files of processes that were killed.
        for (const folder of [directory, mappings]) {
          for (const entry of listIfThere(folder))
            if (TEMPORARY.test(entry)) rmSync(join(folder, entry), { force: true });
        }
        const wanted = new Map<Ipv4, string>();
        for (const file of files) {
          for (const address of keysOf(file)) if (!wanted.has(address)) wanted.set(address, ownerName(file.owner));
        }
        for (const [address, name] of wanted) if (claimant(address) !== name) claim(address, name);
        for (const entry of listIfThere(claims)) {
          const address = tryParseIpv4(entry);
          if (address === undefined || !wanted.has(address)) rmSync(join(claims, entry), { force: true });
        }
      });
    },

    readTable(): TableRecord | undefined {
      const text = guard(directory, () => readIfThere(join(directory, 'table.json')));
      if (text === undefined) return undefined;
      return parseTableRecord(text);
    },

    writeTable(record: TableRecord | undefined): void {
      const path = join(directory, 'table.json');
      make();
      guard(path, () => {
        if (record === undefined) rmSync(path, { force: true });
        else replaceFile(directory, path, `${printTableRecord(record)}\n`);
      });
    },

    readLinks(): ReadonlyMap<string, LinkRecord> {
      const text = guard(directory, () => readIfThere(join(directory, 'links.json')));
      if (text === undefined) return new Map();
      try {
        const raw = JSON.parse(text) as { links?: Readonly<Record<string, Partial<LinkRecord>>> };
        const entries = Object.entries(raw.links ?? {}).flatMap(([device, record]) => {
          const { bootId, index, hardware, carrierChanges } = record;
          const isRecord =
            typeof bootId === 'string' &&
            typeof index === 'number' &&
            typeof hardware === 'string' &&
            (typeof carrierChanges === 'number' || carrierChanges === null);
          return isRecord ? [[device, { bootId, index, hardware, carrierChanges }] as const] : [];
        });
        return new Map(entries);
      } catch {
        // Whatever it was: the links are announced once more, and it is written anew.
        return new Map();
      }
    },

    writeLinks(records: ReadonlyMap<string, LinkRecord>): void {
      const path = join(directory, 'links.json');
      make();
      guard(path, () =>
        replaceFile(directory, path, `${JSON.stringify({ links: Object.fromEntries(records) }, undefined, 1)}\n`),
      );
    },

    importPhase: () => guard(directory, () => readPhase(join(directory, 'import'))),

    removeAll(): void {
      guard(directory, () => {
        rmSync(join(directory, 'import'), { recursive: true, force: true });
        rmSync(mappings, { recursive: true, force: true });
        rmSync(claims, { recursive: true, force: true });
        for (const name of ['table.json', 'links.json']) rmSync(join(directory, name), { force: true });
      });
      made = false;
    },
  };
}

/** write, fsync, rename, fsync of the directory: after a power cut the file is the old one or the new one. */
function replaceFile(directory: string, path: string, text: string): void {
  const temporary = join(directory, `.${randomBytes(6).toString('hex')}`);
  const fd = openSync(temporary, 'wx', 0o644);
  try {
    const bytes = Buffer.from(text);
    for (let done = 0; done < bytes.length; ) done += writeSync(fd, bytes, done);
    fsyncSync(fd);
    renameSync(temporary, path);
  } catch (error) {
    rmSync(temporary, { force: true });
    throw error;
  } finally {
    closeSync(fd);
  }
  syncDirectory(directory);
}

function syncDirectory(directory: string): void {
  let fd: number;
  try {
    fd = openSync(directory, 'r');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return;
    throw error;
  }
  try {
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}

function readIfThere(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}

function listIfThere(directory: string): string[] {
  try {
    return readdirSync(directory);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
}

function guard<T>(path: string, act: () => T): T {
  try {
    return act();
  } catch (cause) {
    if (cause instanceof KvmIbError) throw cause;
    const code = (cause as NodeJS.ErrnoException).code;
    const denied = code === 'EACCES' || code === 'EPERM';
    throw new KvmIbError(denied ? 'not-permitted' : 'failed', `Cannot use the state at ${path}`, {
      why: cause instanceof Error ? cause.message : String(cause),
      fix: denied ? 'run it as root' : 'make room on the file system, or mount it read-write',
      cause,
    });
  }
}
