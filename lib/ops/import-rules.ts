/** The rules of an import: out of iptables in one transaction, each by what it says, and nothing else of it touched. */
import { KvmIbError } from '../core/errors.ts';
import type { Journal } from '../import/journal.ts';
import { removalText, textsOf } from '../iptables/change.ts';
import { parseSaved } from '../iptables/save.ts';
import type { Table, Variant } from '../iptables/table.ts';
import type { ImportHost } from './import.ts';

/** The table that the pairs are in. */
export const NAT = 'nat';

export async function readNat(ports: ImportHost, variant: Variant): Promise<Table | undefined> {
  const { saved } = await ports.iptables.save();
  const text = saved.find((one) => one.variant === variant)?.text;
  return text === undefined ? undefined : parseSaved(text).tables.get(NAT);
}

/** @returns how many rules went */
export async function takeRules(ports: ImportHost, journal: Journal): Promise<number> {
  let count = 0;
  for (const { variant, removed } of journal.rules) {
    const table = await readNat(ports, variant);
    // What is there of them still: each as often as it was found.
    const there = new Map<string, number>();
    for (const chain of table?.chains.values() ?? []) {
      for (const text of textsOf(chain))
        there.set(ruleKey(chain.name, text), (there.get(ruleKey(chain.name, text)) ?? 0) + 1);
    }
    const due = removed.filter(({ chain, text }) => {
      const left = there.get(ruleKey(chain, text)) ?? 0;
      there.set(ruleKey(chain, text), left - 1);
      return left > 0;
    });
    if (due.length === 0) continue;
    const expected = new Map(
      [...(table?.chains.values() ?? [])].map((chain) => [chain.name, without(textsOf(chain), due, chain.name)]),
    );
    await ports.iptables.restore(variant, removalText(NAT, due));
    count += due.length;
    verify(variant, await readNat(ports, variant), expected);
  }
  return count;
}

export function ruleKey(chain: string, text: string): string {
  return `${chain} ${text}`;
}

/** The texts of a chain without those that go, of equal ones the first: as -D does it. */
function without(
  texts: readonly string[],
  due: readonly { readonly chain: string; readonly text: string }[],
  chain: string,
): readonly string[] {
  const going = new Map<string, number>();
  for (const rule of due) if (rule.chain === chain) going.set(rule.text, (going.get(rule.text) ?? 0) + 1);
  return texts.filter((text) => {
    const left = going.get(text) ?? 0;
    going.set(text, left - 1);
    return left <= 0;
  });
}

/** @throws KvmIbError `failed` when a rule of somebody else is not where it was */
export function verify(
  variant: Variant,
  table: Table | undefined,
  expected: ReadonlyMap<string, readonly string[]>,
): void {
  for (const [name, texts] of expected) {
    const chain = table?.chains.get(name);
    const found = chain === undefined ? [] : textsOf(chain);
    if (found.length === texts.length && found.every((text, place) => text === texts[place])) continue;
    throw new KvmIbError('failed', `Cannot verify chain ${name} of iptables-${variant}`, {
      why: 'its rules are not those that were expected: somebody else changes them at the same time',
      fix: 'stop what writes rules (a firewall that reloads, an old driver), and try again',
    });
  }
}
