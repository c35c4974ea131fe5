#!/usr/bin/env node
/**
 * Brings the kernel of the test guests into the cache: the package that Debian's linux-image-cloud-amd64 depends on,
 * downloaded with apt-get and unpacked there. Nothing is installed. Needs the network, so it runs before the tests
 * enter their network namespace; with a filled cache it does nothing. `--refresh` looks for a newer kernel.
 *
 * Leaves <cache>/kernel.json: { "package", "image", "modules" }, the last two as absolute paths.
 * <cache> is ${XDG_CACHE_HOME:-~/.cache}/kvm-ib.
 */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { cache, dependsOf, unpack } from './unpack.mjs';

const META_PACKAGE = 'linux-image-cloud-amd64';
const INDEX = 'kernel.json';

function cached() {
  const index = join(cache, INDEX);
  if (!existsSync(index)) return false;
  const kernel = JSON.parse(readFileSync(index, 'utf8'));
  return existsSync(kernel.image) && existsSync(kernel.modules);
}

function fetchKernel() {
  const name = dependsOf(META_PACKAGE).find((depend) => /^linux-image-[0-9]/.test(depend));
  if (name === undefined) throw new Error(`apt-cache knows no ${META_PACKAGE}: run apt-get update first`);
  const release = name.slice('linux-image-'.length);
  unpack([name], INDEX, (tree, [deb]) => ({
    package: deb,
    image: join(tree, 'boot', `vmlinuz-${release}`),
    modules: join(tree, 'lib', 'modules', release, 'kernel'),
  }));
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
