#!/usr/bin/env node
/**
 * Brings an ssh server for the hosts of the VM tests into the cache: openssh-server and the libraries of it that are not
 * installed, unpacked there. It is not installed, since an installed one would serve the whole machine from the next start
 * on. Where one is installed, nothing is done. Needs the network; with a filled cache it does nothing.
 *
 * Leaves <cache>/sshd.json: { "packages", "root" }, the second an absolute path.
 * <cache> is ${XDG_CACHE_HOME:-~/.cache}/kvm-ib.
 */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { cache, dependsOf, isInstalled, unpack } from './unpack.mjs';

const PACKAGE = 'openssh-server';
const PROGRAM = '/usr/sbin/sshd';
const INDEX = 'sshd.json';

function cached() {
  const index = join(cache, INDEX);
  if (!existsSync(index)) return false;
  const { root } = JSON.parse(readFileSync(index, 'utf8'));
  return existsSync(join(root, PROGRAM));
}

try {
  if (!existsSync(PROGRAM) && (process.argv.includes('--refresh') || !cached())) {
    const libraries = dependsOf(PACKAGE).filter((name) => /^lib(?!pam-)/.test(name) && !isInstalled(name));
    unpack([PACKAGE, ...libraries], INDEX, (root, packages) => ({ packages, root }));
  }
} catch (error) {
  process.stderr.write(
    `Cannot get an ssh server for the test hosts: ${error.message}\n` +
      'Try: apt-get update, then node scripts/vm-sshd.mjs again. It needs a Debian mirror.\n',
  );
  process.exitCode = 1;
}
