/** Where an import stands, as the file that says so: read on every action, so it costs one look. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { JournalPhase } from '../import/phase.ts';
import { parsePhase } from '../import/phase.ts';

/** Where an import stands; undefined: there is none. Read on every action, so it is a file of its own. */
export function readPhase(directory: string): JournalPhase | undefined {
  try {
    return parsePhase(readFileSync(join(directory, 'phase'), 'latin1'));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}
