/** How results look: tables and plans for people, with colour only on a terminal. */
import { printable } from '../core/errors.ts';
import type { Change } from '../core/plan.ts';
import { describe } from '../core/plan.ts';

export interface Column<T> {
  readonly title: string;
  readonly value: (row: T) => string | number | null;
}

/** Left-aligned columns under their titles; control characters are made visible, null is `-`. */
export function table<T>(rows: readonly T[], columns: readonly Column<T>[]): string {
  const cells = [
    columns.map((c) => c.title),
    ...rows.map((row) => columns.map((c) => printable(String(c.value(row) ?? '-'), 120))),
  ];
  const widths = columns.map((_, index) => Math.max(...cells.map((line) => line[index]?.length ?? 0)));
  return cells
    .map(
      (line) =>
        `${line
          .map((cell, i) => cell.padEnd(widths[i] ?? 0))
          .join('  ')
          .trimEnd()}\n`,
    )
    .join('');
}

const COLOURS: Readonly<Record<string, string>> = { '+': '32', '-': '31', '~': '33' };

/** Whether to colour: a terminal, and nobody said no (https://no-color.org). */
export function wantsColour(stream: { readonly isTTY?: boolean }, env: NodeJS.ProcessEnv): boolean {
  return stream.isTTY === true && (env['NO_COLOR'] ?? '') === '' && env['TERM'] !== 'dumb';
}

/** A plan, a change a line, with `+ ~ -` in front. */
export function renderPlan(changes: readonly Change[], colour: boolean): string {
  return changes
    .flatMap(describe)
    .map((line) => {
      const code = COLOURS[line[0] ?? ''];
      return colour && code !== undefined ? `\u001b[${code}m${line}\u001b[0m\n` : `${line}\n`;
    })
    .join('');
}
