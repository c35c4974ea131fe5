/**
 * Rule files of many makers and ages, each with what an import has to say of it: worked out by hand from what iptables and
 * the kernel do with the rules, not from what the code prints.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import type { Ipv4, LinkName } from '../../lib/core/address.ts';
import type { Config } from '../../lib/core/mapping.ts';
import type { Comparison } from '../../lib/import/compare.ts';
import type { ImportReport } from '../../lib/import/report.ts';
import { analyseFiles } from '../../lib/ops/import.ts';

type Texts = Readonly<Record<string, Readonly<Record<string, readonly [before: string, after: string]>>>>;

/** As in the files; lists in any order. */
interface Expected {
  readonly pairs: readonly string[];
  readonly halves: readonly string[];
  readonly conflicts: readonly (readonly [guest: string, why: string])[];
  readonly left: readonly (readonly [rule: string, why: string])[];
  readonly aliases: readonly string[] | null;
  readonly skipped: readonly (readonly [line: number, why: string])[];
  /** Comparisons that differ: by case, or by case and guest where any has a blank. */
  readonly differs: readonly string[];
  /** Before and after, by address (or guest, where there is none) and case: all cases that are named, no more is checked. */
  readonly comparisons?: Texts;
  /** Other tables than nat, with the number of their rules. */
  readonly otherTables?: readonly string[];
}

const CONFIG: Config = {
  networks: [
    {
      name: 'ib',
      device: 'ib0' as LinkName,
      bridge: 'virbr1' as LinkName,
      guests: { first: '192.168.122.2' as Ipv4, last: '192.168.122.19' as Ipv4 },
      addresses: { first: '192.168.10.202' as Ipv4, last: '192.168.10.219' as Ipv4 },
      isolate: true,
    },
  ],
  static: [],
};
const FOLDER = new URL('../fixtures/import/', import.meta.url);
const files = readdirSync(FOLDER).filter((name) => !name.endsWith('.json'));

function sorted<T>(list: readonly T[]): readonly T[] {
  return [...list].sort((a, b) => (JSON.stringify(a) < JSON.stringify(b) ? -1 : 1));
}

/** What is common to a report and an expectation, in one order. */
function normal(one: Expected): Expected {
  return {
    pairs: sorted(one.pairs),
    halves: sorted(one.halves),
    conflicts: sorted(one.conflicts),
    left: sorted(one.left),
    aliases: one.aliases && sorted(one.aliases),
    skipped: sorted(one.skipped),
    differs: sorted(one.differs),
    comparisons: one.comparisons ?? {},
    otherTables: sorted(one.otherTables ?? []),
  };
}

function differing(comparisons: readonly Comparison[], byGuest: boolean): readonly string[] {
  const all = comparisons.filter(({ same }) => !same);
  return [...new Set(all.map((one) => (byGuest ? `${one.case} ${one.guest}` : one.case)))];
}

function textsOf(comparisons: readonly Comparison[], wanted: Texts): Texts {
  return Object.fromEntries(
    Object.entries(wanted).map(([key, cases]) => {
      const own = comparisons.filter((one) => (one.address ?? one.guest) === key && cases[one.case] !== undefined);
      return [key, Object.fromEntries(own.map((one) => [one.case, [one.old, one.new] as const]))];
    }),
  );
}

function summary(report: ImportReport, expected: Expected): Expected {
  return {
    pairs: report.pairs.map(({ guest, address }) => `${guest} ${address}`),
    halves: report.halves.map(({ guest, missing }) => `${guest} missing-${missing}`),
    conflicts: report.conflicts.map(({ guest, why }) => [guest, why]),
    left: report.left.map(({ rule, why }) => [rule, why]),
    aliases:
      report.aliases?.map(
        (one) => `${one.address}/${one.prefixLength} ${one.device} ${one.label} ${one.guest ?? '-'}`,
      ) ?? null,
    skipped: report.skipped.map(({ line, why }) => [line, why]),
    differs: differing(
      report.comparisons,
      expected.differs.some((one) => one.includes(' ')),
    ),
    comparisons: textsOf(report.comparisons, expected.comparisons ?? {}),
    otherTables:
      expected.otherTables === undefined ? [] : report.otherTables.map(({ table, rules }) => `${table} ${rules}`),
  };
}

test('every file has its report, and every report its file', () => {
  const reports = readdirSync(FOLDER).filter((name) => name.endsWith('.json'));
  expect(files.map((name) => name.replace(/\.[a-z]+$/, '.json')).sort()).toEqual(reports.sort());
  expect(files.length).toBeGreaterThanOrEqual(36);
});

test.each(files)('%s', (name) => {
  const text = readFileSync(new URL(name, FOLDER), 'utf8');
  const expected = JSON.parse(readFileSync(new URL(name.replace(/\.[a-z]+$/, '.json'), FOLDER), 'utf8')) as Expected;
  const { report } = analyseFiles(CONFIG, [{ name, text }]);
  expect(normal(summary(report, expected))).toEqual(normal(expected));
  // What differs is what reads differently.
  for (const one of report.comparisons) expect(one.same, one.case).toBe(one.old === one.new);
});
