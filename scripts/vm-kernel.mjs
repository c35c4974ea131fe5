#!/usr/bin/env node
/**
 * Brings the kernel of the test guests into the cache: the package that Debian's linux-image-cloud-amd64 depends on,
 * downloaded with apt-get and unpacked there. Nothing is installed. Needs the network, so it runs before the tests
 * enter their network namespace; with a filled cache it does nothing. `--refresh` looks for a newer kernel.
 *
 * Leaves <cache>/kernel.json: { "package", "image", "modules" }, the last two as absolute paths.
 * <cache> is ${XDG_CACHE_HOME:-~/.cache}/kvm-ib.
 */
import { execFileSync } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';

const META_PACKAGE = 'linux-image-cloud-amd64';
const cache = join(process.env['XDG_CACHE_HOME'] || join(homedir(), '.cache'), 'kvm-ib');
const index = join(cache, 'kernel.json');
/** Without a mirror apt tries for long; it is better to say so. */
const TIME_LIMIT_MS = 5 * 60_000;
const APT = ['-o', 'APT::Sandbox::User=root', '-o', 'Acquire::Retries=1', '-o', 'Acquire::http::Timeout=20'];

function run(cwd, program, ...args) {
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

function cached() {
  if (!existsSync(index)) return false;
  const kernel = JSON.parse(readFileSync(index, 'utf8'));
  return existsSync(kernel.image) && existsSync(kernel.modules);
}

function fetchKernel() {
  const depends = run('/', 'apt-cache', 'depends', META_PACKAGE);
  const name = /Depends: (linux-image-[0-9]\S*)/.exec(depends)?.[1];
  if (name === undefined) throw new Error(`apt-cache knows no ${META_PACKAGE}: run apt-get update first`);
  mkdirSync(cache, { recursive: true });
  const work = mkdtempSync(join(cache, 'fetch-'));
  try {
    run(work, 'apt-get', ...APT, 'download', name);
    const deb = readdirSync(work).find((file) => file.endsWith('.deb'));
    if (deb === undefined) throw new Error(`apt-get download ${name} left no package`);
    run(work, 'dpkg', '-x', deb, 'tree');
    const release = name.slice('linux-image-'.length);
    const target = join(cache, deb.slice(0, -'.deb'.length));
    rmSync(target, { recursive: true, force: true });
    renameSync(join(work, 'tree'), target);
    const kernel = {
      package: deb,
      image: join(target, 'boot', `vmlinuz-${release}`),
      modules: join(target, 'lib', 'modules', release, 'kernel'),
    };
    writeFileSync(join(work, 'kernel.json'), `${JSON.stringify(kernel, null, 2)}\n`);
    renameSync(join(work, 'kernel.json'), index);
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}

try {
  if (process.argv.includes('--refresh') || !cached()) fetchKernel();
} catch (error) {
  process.stderr.write(
    `Cannot get a kernel for the test guest: ${error.message}\n` +
      `Try: apt-get update, then node scripts/vm-kernel.mjs again. It needs a Debian mirror, amd64.\n`,
  );
  process.exitCode = 1;
}
