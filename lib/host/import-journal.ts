/** The journal of an import, below the state directory: what it did, where it stands, and the rules of before. */
import { closeSync, fsyncSync, mkdirSync, openSync, readFileSync, renameSync, rmSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { KvmIbError } from '../core/errors.ts';
import { parseJournal, printJournal } from '../import/journal.ts';
import type { JournalStore } from '../ops/import.ts';
import { readPhase } from './import-phase.ts';

export function createJournalStore(directory: string): JournalStore {
  const path = join(directory, 'journal.json');
  const put = (name: string, text: string): void => {
    mkdirSync(directory, { recursive: true, mode: 0o700 });
    const temporary = join(directory, `.${name}`);
    const fd = openSync(temporary, 'w', 0o600);
    try {
      const bytes = Buffer.from(text);
      for (let done = 0; done < bytes.length; ) done += writeSync(fd, bytes, done);
      fsyncSync(fd);
    } finally {
      closeSync(fd);
    }
    renameSync(temporary, join(directory, name));
    const folder = openSync(directory, 'r');
    try {
      fsyncSync(folder);
    } finally {
      closeSync(folder);
    }
  };
  const guard = <T>(act: () => T): T => {
    try {
      return act();
    } catch (cause) {
      if (cause instanceof KvmIbError) throw cause;
      throw new KvmIbError('failed', `Cannot use the journal of the import at ${path}`, {
        why: cause instanceof Error ? cause.message : String(cause),
        fix: 'make room on the file system, or mount it read-write',
        cause,
      });
    }
  };
  return {
    path,
    read: () =>
      guard(() => {
        const phase = readPhase(directory);
        if (phase === undefined) return undefined;
        const journal = parseJournal(readFileSync(path, 'utf8'));
        if (journal !== undefined) return { phase, journal };
        throw new KvmIbError('failed', `Cannot read the journal of the import at ${path}`, {
          why: 'it is cut off, edited by hand, or of another version',
          fix: `the rules of before are beside it, in ${directory}; when the host is as it should be: rm -r ${directory}`,
        });
      }),
    write: (journal) => guard(() => put('journal.json', printJournal(journal))),
    setPhase: (phase) => guard(() => put('phase', `${phase}\n`)),
    backup: (variant, journal, text) => guard(() => put(`${variant}-${journal.started}.rules`, text)),
    keep: (journal) => guard(() => put(`journal-${journal.started}.json`, printJournal(journal))),
    restore: (started) =>
      guard(() => {
        const kept = join(directory, `journal-${started}.json`);
        put('journal.json', readFileSync(kept, 'utf8'));
        rmSync(kept, { force: true });
      }),
    remove: () => guard(() => rmSync(directory, { recursive: true, force: true })),
  };
}
