/** OpenNebula's own commands, as its user: they find that user's credentials by themselves. Only lists are asked for. */
import { existsSync } from 'node:fs';
import { KvmIbError, printable, toKvmIbError } from '../core/errors.ts';
import type { Exec } from '../core/exec.ts';

const RUNUSER = '/usr/sbin/runuser';
/** A pool of thousands takes the core of OpenNebula some seconds. */
const TIMEOUT_MS = 60_000;

export const ONEHOST = '/usr/bin/onehost';
export const ONEVNET = '/usr/bin/onevnet';

/** @returns what it printed, or why it did not */
export async function listXml(exec: Exec, program: string, user: string): Promise<string | KvmIbError> {
  const list = [program, 'list', '--xml'] as const;
  if (!existsSync(program)) {
    return new KvmIbError('host-lacks', `Cannot run ${program}`, {
      why: 'the program is not there',
      fix: 'install the command line tools of OpenNebula',
    });
  }
  const root = process.getuid?.() === 0;
  try {
    const asked = await exec(root ? [RUNUSER, '-u', user, '--', ...list] : list, { timeout: TIMEOUT_MS });
    if (asked.status === 0) return asked.stdout;
    const said = printable((asked.stderr.trim() || asked.stdout.trim()).split('\n').at(-1) ?? '', 200);
    return new KvmIbError('failed', `Cannot run ${list.join(' ')}`, {
      why: said === '' ? `it ended with status ${asked.status}` : said,
      fix: `as ${user}: ${list.join(' ')}; systemctl status opennebula`,
    });
  } catch (cause) {
    return toKvmIbError(cause);
  }
}
