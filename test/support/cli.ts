/** Stand-ins for programs of the host, mounted over the real ones for one run of the command line. */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import type { Result, Rig } from './driver.ts';
import { writeScript } from './driver.ts';

/**
 * The words to put before a command so that it, and what it starts, finds `text` in the place of a program.
 * @param program absolute path of a program that is there
 */
export function replaced(rig: Rig, program: string, text: string): readonly string[] {
  const script = join(rig.folder, `fake${program.replaceAll('/', '-')}`);
  writeScript(script, text);
  const mount = '/bin/mount --bind "$1" "$2" && shift 2 && exec "$@"';
  return ['/usr/bin/unshare', '--mount', '/bin/sh', '-c', mount, 'sh', script, program];
}

/** A libvirt with these active domains; undefined: one that does not answer. */
export function withDomains(rig: Rig, names: readonly string[] | undefined): readonly string[] {
  if (!existsSync('/usr/bin/virsh')) throw new Error('virsh is needed: apt-get install libvirt-clients');
  const answer = names === undefined ? 'exit 1' : `printf '%s\\n' ${names.map((name) => `'${name}'`).join(' ')} ''`;
  return replaced(rig, '/usr/bin/virsh', `#!/bin/sh\n${answer}\n`);
}

export function parsed<T>(result: Result): T {
  return JSON.parse(Buffer.from(result.stdout, 'latin1').toString('utf8')) as T;
}
