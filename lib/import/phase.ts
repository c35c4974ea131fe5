/** Where an import stands. Apart from the journal, since every action looks at it. */

/**
 * applying: the state files are being written. switching: they are written, a mapping without one has ended since.
 * applied: done. rolling-back: on its way back. rolled-back: the old rules are in force.
 */
export const JOURNAL_PHASES = ['applying', 'switching', 'applied', 'rolling-back', 'rolled-back'] as const;
export type JournalPhase = (typeof JOURNAL_PHASES)[number];

/** The phase out of its file; undefined when it is none. */
export function parsePhase(text: string): JournalPhase | undefined {
  return JOURNAL_PHASES.find((phase) => phase === text.trim());
}
