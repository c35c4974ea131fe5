/**
 * The guest of the VM tests: a Debian kernel and an initramfs of busybox that is up in about four seconds under QEMU's
 * software emulation. It answers ping, echoes bytes over TCP (in one answer that also says from which address they came, or
 * as they come over a connection that stays open), runs shell commands sent to it, and powers off on the ACPI button. See `guest/` for what runs inside.
 */
import { createHash } from 'node:crypto';
import {
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { homedir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { runTool, waitFor } from './process.ts';

export interface GuestImage {
  /** bzImage for direct boot. */
  readonly kernel: string;
  readonly initramfs: string;
}

/** Loaded in this order: each needs the ones before it. Paths below lib/modules/<release>/kernel of Debian 12. */
const MODULES = [
  'drivers/virtio/virtio_ring.ko',
  'drivers/virtio/virtio.ko',
  'drivers/virtio/virtio_pci_modern_dev.ko',
  'drivers/virtio/virtio_pci_legacy_dev.ko',
  'drivers/virtio/virtio_pci.ko',
  'net/core/failover.ko',
  'drivers/net/net_failover.ko',
  'drivers/net/virtio_net.ko',
  'drivers/input/evdev.ko',
  'drivers/acpi/button.ko',
] as const;

/** Where each file of `guest/` goes in the initramfs. The last one is where acpid looks for the power button. */
const FILES = [
  ['init', 'init'],
  ['cgi-bin/echo', 'www/cgi-bin/echo'],
  ['cgi-bin/run', 'www/cgi-bin/run'],
  ['power-off', 'etc/acpi/PWRF/00000080'],
] as const;

const BUSYBOX = '/bin/busybox';
const source = join(dirname(fileURLToPath(import.meta.url)), 'guest');

/** Kernel command line that gives the guest its address; `mtu` only to overrule what the hypervisor offers. */
export function guestCommandLine(net: {
  readonly address: string;
  readonly prefixLength: number;
  readonly gateway: string;
  readonly mtu?: number;
}): string {
  const mtu = net.mtu === undefined ? '' : ` mtu=${net.mtu}`;
  return `console=ttyS0 quiet panic=-1 ip=${net.address}/${net.prefixLength} gw=${net.gateway}${mtu}`;
}

/**
 * Kernel and initramfs, built when what they are made of has changed (0.1 s) and kept in
 * ${XDG_CACHE_HOME:-~/.cache}/kvm-ib.
 * @throws Error when the kernel was not fetched (scripts/vm-kernel.mjs does it) or busybox-static or cpio is missing.
 */
export async function guestImage(): Promise<GuestImage> {
  const kernel = fetchedKernel();
  const modules = MODULES.map((module) => join(kernel.modules, module));
  return {
    kernel: kernel.image,
    initramfs: await cachedInitramfs([
      ...FILES.map(([from, to]): Part => [to, join(source, from), 0o755]),
      ...moduleParts(modules),
    ]),
  };
}

/** One file of an initramfs: where it goes, relative to its root, where it is now, and its mode there. */
export type Part = readonly [target: string, path: string, mode: number];

/** The modules as init finds them: below /modules, to be loaded in this order. */
export function moduleParts(paths: readonly string[]): readonly Part[] {
  return paths.map((path, n) => [`modules/${String(n).padStart(2, '0')}-${basename(path)}`, path, 0o644]);
}

/** An initramfs of busybox and these files, kept in the cache under a name that its content decides. */
async function cachedInitramfs(files: readonly Part[]): Promise<string> {
  const parts = withBusybox(files);
  const hash = createHash('sha256');
  for (const [target, path] of parts) hash.update(`${target}\0`).update(readFileSync(path));
  const initramfs = join(cacheFolder(), `initramfs-${hash.digest('hex').slice(0, 16)}.cpio`);
  if (existsSync(initramfs)) return initramfs;
  const work = mkdtempSync(join(cacheFolder(), 'build-'));
  try {
    const archive = join(work, 'initramfs');
    await writeInitramfs(files, archive);
    renameSync(archive, initramfs);
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
  return initramfs;
}

function withBusybox(files: readonly Part[]): readonly Part[] {
  if (!existsSync(BUSYBOX)) {
    throw new Error(`Cannot build the guest: ${BUSYBOX} is missing. Try: install busybox-static`);
  }
  return [['bin/busybox', BUSYBOX, 0o755], ...files];
}

function cacheFolder(): string {
  return join(process.env['XDG_CACHE_HOME'] || join(homedir(), '.cache'), 'kvm-ib');
}

/**
 * The kernel that scripts/vm-kernel.mjs fetched: its image, and the folder that its modules lie below.
 * @throws Error when it was not fetched, saying how
 */
export function fetchedKernel(): { readonly image: string; readonly modules: string } {
  const cache = cacheFolder();
  const index = join(cache, 'kernel.json');
  if (!existsSync(index)) {
    throw new Error(
      `Cannot start a guest: no kernel in ${cache}. Run \`node scripts/vm-kernel.mjs\` outside of the test's network ` +
        'namespace (`npm test` does): it downloads one from the Debian mirror.',
    );
  }
  const kernel = parseKernel(readFileSync(index, 'utf8'), index);
  if (!existsSync(kernel.image)) {
    throw new Error(`Cannot build the guest: ${kernel.image} is missing. Try: node scripts/vm-kernel.mjs --refresh`);
  }
  return kernel;
}

/**
 * Writes an initramfs of busybox and these files. Its root is made beside it meanwhile.
 * @throws Error when busybox-static or cpio is missing
 */
export async function writeInitramfs(files: readonly Part[], archive: string): Promise<void> {
  const root = `${archive}.root`;
  try {
    const names = new Set<string>();
    for (const [target, path, mode] of withBusybox(files)) {
      const directories = target.split('/').slice(0, -1);
      for (let depth = 1; depth <= directories.length; depth += 1) names.add(directories.slice(0, depth).join('/'));
      names.add(target);
      mkdirSync(dirname(join(root, target)), { recursive: true });
      copyFileSync(path, join(root, target));
      chmodSync(join(root, target), mode);
    }
    // Not compressed: unpacking is the slow part under emulation.
    writeFileSync(archive, '');
    await runTool(['/usr/bin/cpio', '--quiet', '-o', '-H', 'newc', '-R', '0:0', '-D', root, '-F', archive], {
      input: [...names].join('\n'),
    });
  } finally {
    rmSync(root, { recursive: true, force: true });
  }
}

function parseKernel(text: string, path: string): { readonly image: string; readonly modules: string } {
  const value: unknown = JSON.parse(text);
  if (typeof value === 'object' && value !== null && 'image' in value && 'modules' in value) {
    const { image, modules } = value;
    if (typeof image === 'string' && typeof modules === 'string') return { image, modules };
  }
  throw new Error(`Cannot read ${path}. Try: node scripts/vm-kernel.mjs --refresh`);
}

/** The end of a guest's console, for the message of a failed test. */
export function consoleOf(path: string): string {
  return existsSync(path) ? readFileSync(path, 'latin1').slice(-4000) : '(the guest printed nothing)';
}

/** How often the guest has come up since its QEMU was started, by its console. */
export function bootsOf(consolePath: string): number {
  return existsSync(consolePath) ? readFileSync(consolePath, 'latin1').split('guest: ready').length - 1 : 0;
}

/**
 * Waits until the guest has its address and serves, for the n-th time since its QEMU was started.
 * @throws Error with the end of its console when it does not
 */
export async function guestReady(consolePath: string, boots = 1, limit = 60_000): Promise<void> {
  const ready = () => (bootsOf(consolePath) >= boots ? true : undefined);
  try {
    await waitFor('the guest to be ready', ready, limit);
  } catch (error) {
    throw new Error(`The guest does not come up. Its console:\n${consoleOf(consolePath)}`, { cause: error });
  }
}
