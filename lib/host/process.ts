/** Which process is meant, for longer than it lives: pids come back, a pid with its start time and boot id does not. */
import { readFileSync } from 'node:fs';

export interface ProcessIdentity {
  readonly pid: number;
  /** Clock ticks from boot to its start: field 22 of /proc/PID/stat (proc(5)). */
  readonly start: number;
  /** The boot that the ticks count from. */
  readonly bootId: string;
}

/** The random id of this boot (random(4)), the same for every process and container of the host. */
export function bootId(): string {
  return readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim();
}

/** This process. */
export function ownIdentity(): ProcessIdentity {
  return { pid: process.pid, start: startTime(process.pid) ?? 0, bootId: bootId() };
}

/** Start time of a process in clock ticks since boot; undefined when there is no such process. */
export function startTime(pid: number): number | undefined {
  return readStat(pid)?.start;
}

/** False when it ended (a zombie has ended), when its pid is another's by now, or when the host was booted since. */
export function isAlive(identity: ProcessIdentity): boolean {
  if (identity.bootId !== bootId()) return false;
  const stat = readStat(identity.pid);
  if (stat === undefined) return existsUnseen(identity.pid);
  return stat.start === identity.start && !'ZXx'.includes(stat.state);
}

/**
 * /proc mounted with hidepid shows no processes of others to whom lacks CAP_SYS_PTRACE; kill(2) still says that the pid
 * is taken. By whom cannot be told then, so it counts as the one that was meant.
 */
function existsUnseen(pid: number): boolean {
  if (!Number.isSafeInteger(pid) || pid <= 0) return false;
  try {
    return process.kill(pid, 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}

function readStat(pid: number): { readonly state: string; readonly start: number } | undefined {
  if (!Number.isSafeInteger(pid) || pid <= 0) return undefined;
  try {
    return parseStat(readFileSync(`/proc/${pid}/stat`, 'latin1'));
  } catch {
    // ENOENT, or ESRCH when it ended while being read.
    return undefined;
  }
}

/**
 * State and start time out of the text of /proc/PID/stat. The second field, the command in parentheses, may itself
 * hold spaces and parentheses, so counting starts after the last one.
 */
export function parseStat(text: string): { readonly state: string; readonly start: number } | undefined {
  const end = text.lastIndexOf(')');
  if (end === -1) return undefined;
  const fields = text
    .slice(end + 1)
    .trim()
    .split(/\s+/);
  // fields[0] is field 3.
  const [state, start] = [fields[0], fields[22 - 3]];
  if (state === undefined || start === undefined || !/^[0-9]+$/.test(start)) return undefined;
  return { state, start: Number(start) };
}
