/** What an action says on standard error, for OpenNebula's log of the VM. */
import { writeSync } from 'node:fs';
import { toKvmIbError } from '../core/errors.ts';
import { failureMessage, logText } from '../opennebula/contract.ts';

/** Runs the last step of an action whose outcome is decided: what goes wrong is logged and left to reconcile. */
export async function settle(step: () => Promise<readonly string[]>): Promise<void> {
  try {
    note(await step());
  } catch (cause) {
    complain(cause, 'The next kvm-ib reconcile brings it right');
  }
}

/** Logs an error that does not fail the action. */
export function complain(cause: unknown, outlook: string): undefined {
  say(logText({ level: 'error', text: `${failureMessage(toKvmIbError(cause))}. ${outlook}` }));
}

export function note(notes: readonly string[]): void {
  for (const text of notes) say(logText({ level: 'info', text }));
}

export function say(text: string): void {
  try {
    writeSync(2, text);
  } catch {
    // Nobody listens any more.
  }
}
