// Debian packages that the VM tests need and that nobody's machine should get: downloaded with apt-get and unpacked into the
// cache of the tests, ${XDG_CACHE_HOME:-~/.cache}/kvm-ib. Nothing is installed. Needs a Debian mirror.
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';

export const cache = join(process.env['XDG_CACHE_HOME'] || join(homedir(), '.cache'), 'kvm-ib');

/** Without a mirror apt tries for long; it is better to say so. */
const TIME_LIMIT_MS = 5 * 60_000;
const APT = ['-o', 'APT::Sandbox::User=root', '-o', 'Acquire::Retries=1', '-o', 'Acquire::http::Timeout=20'];

export function run(cwd, program, ...args) {
  try {
    return execFileSync(program, args, {
      cwd,
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'pipe'],
      timeout: TIME_LIMIT_MS,
    });
  } catch (error) {
    const known = { ENOENT: 'it is not installed', ETIMEDOUT: `no end within ${TIME_LIMIT_MS / 60_000} minutes` };
    const said = known[error.code] ?? (String(error.stderr ?? '').trim() || error.message);
    throw new Error(`${program} ${args.join(' ')}: ${said}`);
  }
}

/** What a package depends on, by name; alternatives and virtual packages too. */
export function dependsOf(name) {
  return [...run('/', 'apt-cache', 'depends', name).matchAll(/^ [ |]Depends: (\S+)$/gm)].map((match) => match[1]);
}

export function isInstalled(name) {
  try {
    return run('/', 'dpkg-query', '-s', name).includes('Status: install ok installed');
  } catch {
    return false;
  }
}

/**
 * Unpacks packages into one folder of the cache, named after the first one's file, and writes `index`, a file of the cache,
 * when all is there.
 * @param describe given that folder and the names of the package files, returns what the index says
 */
export function unpack(names, index, describe) {
  mkdirSync(cache, { recursive: true });
  const work = mkdtempSync(join(cache, 'fetch-'));
  try {
    run(work, 'apt-get', ...APT, 'download', ...names);
    const debs = names.map((name) => {
      const deb = readdirSync(work).find((file) => file.startsWith(`${name}_`) && file.endsWith('.deb'));
      if (deb === undefined) throw new Error(`apt-get download ${name} left no package`);
      run(work, 'dpkg', '-x', deb, 'tree');
      return deb;
    });
    const target = join(cache, debs[0].slice(0, -'.deb'.length));
    rmSync(target, { recursive: true, force: true });
    renameSync(join(work, 'tree'), target);
    writeFileSync(join(work, index), `${JSON.stringify(describe(target, debs), null, 2)}\n`);
    renameSync(join(work, index), join(cache, index));
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}
