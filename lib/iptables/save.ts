/** Reads what iptables-save prints, of 1.4.x to 1.8.x (iptables-save(8)). */
import { printable } from '../core/errors.ts';
import { parseRules } from './rule.ts';
import type { Parsed, Skipped } from './table.ts';
import { draftTables } from './table.ts';
import { splitSaved } from './words.ts';

/** Whether a text is of iptables-save rather than of a shell: a line begins a table, and no here-document begins before. */
export function looksSaved(text: string): boolean {
  const begin = text.slice(0, 65_536);
  const table = /^\s*\*[a-z]+\s*$/m.exec(begin);
  return table !== null && !/^[^#\n]*<</m.test(begin.slice(0, table.index));
}

/** Lines that are not understood are passed over and named; a rule is never guessed. */
export function parseSaved(text: string): Parsed {
  const draft = draftTables();
  const skipped: Skipped[] = [];
  let table: string | undefined;
  let number = 0;
  for (const raw of text.split('\n')) {
    number += 1;
    const line = raw.trim();
    const skip = (why: string): void => void skipped.push({ line: number, text: printable(line, 120), why });
    if (line === '' || line.startsWith('#')) continue;
    const opens = /^\*([a-z]{1,32})$/.exec(line)?.[1];
    if (opens !== undefined) {
      table = opens;
      draft.table(opens);
    } else if (line === 'COMMIT') {
      table = undefined;
    } else if (table === undefined) skip('it stands outside a table');
    else if (line.startsWith(':')) {
      const chain = /^:(\S{1,64}) (\S+)/.exec(line);
      if (chain === null) skip('it is no chain');
      else {
        const [, name = '', policy] = chain;
        draft.chain(table, name).policy = policy === '-' ? undefined : policy;
      }
    } else {
      // "[12:720] -A …": counters, with -c.
      const rule = /^(?:\[[0-9]+:[0-9]+\] )?-A (\S{1,64})(?: (.*))?$/.exec(line);
      if (rule === null) {
        skip('it is no rule');
        continue;
      }
      const [, chain = '', rest = ''] = rule;
      const { words, broken } = splitSaved(rest);
      if (broken) skip('a quote is not closed');
      else draft.chain(table, chain).rules.push(...parseRules(chain, words, rest.trim(), number));
    }
  }
  return { tables: draft.tables(), skipped, addresses: [] };
}
