/** How results look: tables and plans for people, with colour only on a terminal. */
import { printable } from '../core/errors.ts';
import type { Change } from '../core/plan.ts';
import { describe } from '../core/plan.ts';
import type { Finding } from '../ops/check.ts';
import type { CheckState, Diagnosis } from '../ops/doctor.ts';

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

/** Findings of `config check` and `doctor`, each with what to do. */
export function renderFindings(findings: readonly Pick<Finding, 'level' | 'what' | 'why' | 'fix'>[]): string {
  return findings
    .map(({ level, what, why, fix }) => {
      return `${level === 'error' ? 'error:  ' : 'warning:'} ${what}: ${why}\n         fix: ${fix}\n`;
    })
    .join('');
}

const STATE_COLOURS: Readonly<Record<CheckState, string | undefined>> = {
  ok: '32',
  warning: '33',
  error: '31',
  skipped: undefined,
};

/** What `doctor` looked at, the hosts that OpenNebula knows, and what was found. */
export function renderDiagnosis({ checks, hosts, findings }: Diagnosis, colour: boolean): string {
  const [title = '', ...rows] = table(checks, [
    { title: 'WHERE', value: (c) => c.where },
    { title: 'CHECK', value: (c) => c.name },
    { title: 'RESULT', value: (c) => c.state },
    { title: 'SEEN', value: (c) => c.seen },
  ])
    .split('\n')
    .filter((line) => line !== '');
  const lines = rows.map((row, index) => {
    const code = STATE_COLOURS[checks[index]?.state ?? 'skipped'];
    return colour && code !== undefined ? `\u001b[${code}m${row}\u001b[0m` : row;
  });
  const parts = [[title, ...lines, ''].join('\n')];
  if (hosts.length > 0) {
    parts.push(
      table(hosts, [
        { title: 'HOST', value: (h) => h.name },
        { title: 'CLUSTER', value: (h) => h.cluster },
        { title: 'DRIVER', value: (h) => h.driver },
        { title: 'FOLDER', value: (h) => h.folder },
        { title: 'VMS', value: (h) => h.vms },
        { title: 'KVM-IB', value: (h) => h.kvmIb },
      ]),
    );
  }
  if (findings.length > 0) parts.push(renderFindings(findings));
  return parts.join('\n');
}
