/**
 * Announcements that last: a frame may be lost, and a neighbour that did not hear it sends to the wrong host for minutes.
 * So each is said again, twice. No action waits for that, nor does the host lock: the bundle that runs is started once
 * more, detached, with an argument of its own, and what it is to announce on its standard input.
 */
import { spawn } from 'node:child_process';
import { closeSync, fstatSync, readFileSync } from 'node:fs';
import { constants, setPriority } from 'node:os';
import { basename } from 'node:path';
import { fileURLToPath } from 'node:url';
import { tryParseIpv4, tryParseLinkName } from '../core/address.ts';
import { printable } from '../core/errors.ts';
import { aliasKey, isOurLabel } from '../core/mapping.ts';
import type { Announcer, Links, RepeatItem } from '../link/ports.ts';
import { unlinkedFile } from './exec.ts';

/** Starts a bundle as the repeating process. Nobody types it; the wrapper that sudo starts hands no arguments on. */
const ARGUMENT = '--repeat-announcements';
const BUNDLES: readonly string[] = ['kvm-ib.mjs', 'engine.mjs'];
/** The first round was the action's own. */
const LATER_ROUNDS = 2;
const INTERVAL_MS = 2_000;
const INPUT_LIMIT = 64 * 1024 * 1024;

/** The path of the program that runs, if it is one of our bundles. */
export function ownBundle(moduleUrl: string): string | undefined {
  const path = moduleUrl.startsWith('file:') ? fileURLToPath(moduleUrl) : '';
  return BUNDLES.includes(basename(path)) ? path : undefined;
}

/** @returns why it could not be started; undefined when it runs */
export async function startRepeats(program: string, items: readonly RepeatItem[]): Promise<string | undefined> {
  let input: number | undefined;
  try {
    input = unlinkedFile(JSON.stringify(items.map(({ device, address, label }) => [device, address, label])));
    // A session of its own: no hang-up or interrupt of the caller reaches it. None of the caller's descriptors goes along.
    const child = spawn(process.execPath, [program, ARGUMENT], {
      detached: true,
      stdio: [input, 'ignore', 'ignore'],
      env: { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' },
      cwd: '/',
    });
    child.unref();
    await new Promise((resolve, reject) => child.once('spawn', resolve).once('error', reject));
    lowerPriority(child.pid);
    return undefined;
  } catch (error) {
    return printable(error instanceof Error ? error.message : String(error));
  } finally {
    if (input !== undefined) closeSync(input);
  }
}

/** Lets every other process go first: many actions at once start as many of these. */
function lowerPriority(pid: number | undefined): void {
  if (pid === undefined) return;
  try {
    setPriority(pid, constants.priority.PRIORITY_BELOW_NORMAL);
  } catch {
    // It ended already, or the host does not let us: it runs as any other does.
  }
}

/** Whether this process was started by `startRepeats`. */
export function isRepeating(argv: readonly string[]): boolean {
  return argv.length === 3 && argv[2] === ARGUMENT;
}

/** What to announce, from standard input: a plain file, as `startRepeats` gives it. Anything else is nothing. */
export function readRepeats(): readonly RepeatItem[] {
  const stat = fstatSync(0);
  if (!stat.isFile() || stat.size > INPUT_LIMIT) return [];
  return parseRepeats(readFileSync(0, 'utf8'));
}

/** Entries that are no alias of ours by name are left out. */
export function parseRepeats(text: string): readonly RepeatItem[] {
  let raw: unknown;
  try {
    raw = JSON.parse(text);
  } catch {
    return [];
  }
  return (Array.isArray(raw) ? raw : []).flatMap((entry: unknown): readonly RepeatItem[] => {
    const [first, second, label] = Array.isArray(entry) ? (entry as readonly unknown[]) : [];
    const device = typeof first === 'string' ? tryParseLinkName(first) : undefined;
    const address = typeof second === 'string' ? tryParseIpv4(second) : undefined;
    if (device === undefined || address === undefined || typeof label !== 'string') return [];
    return isOurLabel(device, label) ? [{ device, address, label }] : [];
  });
}

/**
 * The later rounds. Before each the addresses of the host are read anew: what was released or moved away meanwhile, or
 * stands under another label by now, is not announced any more.
 */
export async function runRepeats(
  links: Pick<Links, 'addresses'>,
  announcer: Pick<Announcer, 'announce'>,
  items: readonly RepeatItem[],
  intervalMs = INTERVAL_MS,
): Promise<void> {
  let left = items;
  for (let round = 0; round < LATER_ROUNDS && left.length > 0; round++) {
    await new Promise((resolve) => setTimeout(resolve, intervalMs));
    const standing = new Set((await links.addresses()).filter((a) => a.prefixLength === 32).map(aliasKey));
    left = left.filter((item) => standing.has(aliasKey(item)));
    await announcer.announce(left);
  }
}
