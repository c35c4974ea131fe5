/** Takes rules out of a table and puts them back, as text for iptables-restore: one transaction, all else as it is. */
import type { Chain, Table } from './table.ts';

/** A rule that was taken out. */
export interface TakenRule {
  readonly chain: string;
  /** The arguments behind the chain. */
  readonly text: string;
}

/**
 * Text for `iptables-restore --noflush` that deletes these rules, each by what it says: if one of them is not there,
 * nothing is changed at all.
 */
export function removalText(table: string, rules: readonly TakenRule[]): string {
  return restoreText(
    table,
    rules.map(({ chain, text }) => `-D ${chain} ${text}`.trimEnd()),
  );
}

export interface ReturnPlan {
  readonly text: string;
  /** Chains as they will be, by name: the arguments of their rules. */
  readonly expected: ReadonlyMap<string, readonly string[]>;
  /** How many rules come back; those that are there still do not count. */
  readonly count: number;
}

/**
 * Text that puts rules back where they were: each behind the rule that it followed, as far as that one is still there.
 * @param before chains as they were, by name
 * @param isWanted whether a rule, named by chain and arguments, is to come back if it is missing
 */
export function returnPlan(
  table: Table | undefined,
  before: ReadonlyMap<string, readonly string[]>,
  isWanted: (rule: TakenRule) => boolean,
): ReturnPlan {
  const lines: string[] = [];
  const made: string[] = [];
  const expected = new Map<string, readonly string[]>();
  let count = 0;
  for (const [chain, old] of before) {
    const standing = table?.chains.get(chain);
    const current = standing?.rules.map(({ text }) => text) ?? [];
    const places = placesOf(current);
    const result: string[] = [];
    let taken = 0;
    for (const text of old) {
      const place = places.get(text)?.find((at) => at >= taken);
      if (place !== undefined) {
        result.push(...current.slice(taken, place + 1));
        taken = place + 1;
      } else if (isWanted({ chain, text })) {
        result.push(text);
        count += 1;
        lines.push(`-I ${chain} ${result.length} ${text}`.trimEnd());
      }
    }
    result.push(...current.slice(taken));
    // ":CHAIN" makes it, and would flush it if it were there.
    if (standing === undefined && result.length > 0) made.push(`:${chain} - [0:0]`);
    expected.set(chain, result);
  }
  return { text: lines.length === 0 ? '' : restoreText(table?.name ?? 'nat', [...made, ...lines]), expected, count };
}

function placesOf(texts: readonly string[]): ReadonlyMap<string, readonly number[]> {
  const places = new Map<string, number[]>();
  texts.forEach((text, place) => {
    const known = places.get(text);
    if (known === undefined) places.set(text, [place]);
    else known.push(place);
  });
  return places;
}

function restoreText(table: string, lines: readonly string[]): string {
  return [`*${table}`, ...lines, 'COMMIT', ''].join('\n');
}

/** The arguments of a chain's rules, in order. */
export function textsOf(chain: Chain): readonly string[] {
  return chain.rules.map(({ text }) => text);
}
