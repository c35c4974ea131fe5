/**
 * Reads shell scripts that set NAT up: `iptables -t nat -A …`, `ip addr add …`, `ifconfig ib0:1 …`, with variables, `for`
 * loops, functions and simple arithmetic (POSIX 2, and the braces of bash). Nothing is run. What depends on anything but
 * the text itself (an `if`, the output of a program) is passed over and named.
 */
import { KvmIbError, printable } from '../core/errors.ts';
import { createLinks, isOfInterest, perform, runsIptables } from './script-commands.ts';
import type { Scope } from './shell-expand.ts';
import { changeScope, expand, keepOuter, Unknown, withoutPrefixes, wordsOf } from './shell-expand.ts';
import type { Node, Word } from './shell-read.ts';
import { bare, plainText, readShell } from './shell-read.ts';
import type { Parsed, Skipped } from './table.ts';
import { draftTables } from './table.ts';

/** Commands that one script may come to, loops counted out. */
const MAX_COMMANDS = 100_000;
const MAX_DEPTH = 40;

/** @throws KvmIbError `bad-input` when the script comes to more commands than anybody writes */
export function parseScript(text: string): Parsed {
  const skipped: Skipped[] = [];
  const run = createRun(skipped);
  run.all(readShell(text, skipped));
  return { tables: run.draft.tables(), skipped, addresses: run.addresses() };
}

function createRun(skipped: Skipped[]) {
  const draft = draftTables();
  const scope: { current: Scope } = { current: { variables: new Map(), positional: [], outer: undefined } };
  const functions = new Map<string, readonly Node[]>();
  const links = createLinks();
  let commands = 0;
  let isOver = false;

  const all = (nodes: readonly Node[], depth = 0): void => {
    for (const node of nodes) one(node, depth);
  };

  const one = (node: Node, depth: number): void => {
    if (isOver) return;
    if (++commands > MAX_COMMANDS) {
      throw new KvmIbError('bad-input', 'Cannot read the script', {
        why: `it comes to more than ${MAX_COMMANDS} commands`,
        fix: 'run it on a test host, and give what `iptables-save` prints there',
      });
    }
    if (node.kind === 'function') {
      functions.set(node.name, node.body);
      return;
    }
    if (node.kind === 'for') {
      let values: readonly string[];
      try {
        values = node.words.flatMap((word) => expand(word, scope.current));
      } catch (error) {
        if (!(error instanceof Unknown)) throw error;
        scope.current.variables.set(node.name, undefined);
        skipAll(node.body, `it stands in a loop over what is not known: ${error.message}`);
        return;
      }
      for (const value of values) {
        scope.current.variables.set(node.name, value);
        all(node.body, depth);
      }
      return;
    }
    const shown = (): string => printable(node.words.map(plainText).join(' '), 120);
    const isSure = node.maybe === undefined;
    try {
      if (['local', 'declare', 'typeset'].includes(bare(node.words[0]) ?? ''))
        keepOuter(node.words.slice(1), scope.current);
      const [first, ...rest] = withoutPrefixes(wordsOf(node.words, scope.current, isSure));
      const body = first === undefined ? undefined : functions.get(first);
      if (body !== undefined) {
        if (node.maybe !== undefined || depth >= MAX_DEPTH) {
          skipAll(body, node.maybe ?? 'functions call each other too deeply');
          return;
        }
        const outer = scope.current;
        const kept = new Map<string, string | undefined>();
        scope.current = { variables: outer.variables, positional: rest, outer: kept };
        all(body, depth + 1);
        for (const [name, value] of kept) outer.variables.set(name, value);
        scope.current = outer;
        return;
      }
      if (first === undefined) return;
      if (first === 'exit' && isSure && !node.chained) {
        isOver = true;
        return;
      }
      const changed = changeScope(first, rest, scope.current, isSure);
      if (changed !== undefined) {
        scope.current = changed;
        return;
      }
      const name = first.slice(first.lastIndexOf('/') + 1);
      if (!isOfInterest(name, rest)) {
        if (runsIptables(name, rest)) {
          skipped.push({
            line: node.line,
            text: shown(),
            why: `what \`${printable(name, 40)}\` does with it is not known`,
          });
        }
        return;
      }
      const why = node.maybe ?? perform(draft, links, name, rest, node.line);
      if (why !== undefined) skipped.push({ line: node.line, text: shown(), why });
    } catch (error) {
      if (!(error instanceof Unknown)) throw error;
      const why = node.maybe ?? error.message;
      const body = functions.get(bare(node.words[0]) ?? '');
      if (body !== undefined) skipAll(body, why);
      else if (isTelling(node.words)) skipped.push({ line: node.line, text: shown(), why });
    }
  };

  const passed = new Set<string>();
  /** Passes over commands that may run or not; what they set is not known then. */
  const skipAll = (nodes: readonly Node[], why: string, depth = 0): void => {
    const { variables } = scope.current;
    for (const node of nodes) {
      if (node.kind === 'function') continue;
      if (node.kind === 'for') {
        variables.set(node.name, undefined);
        skipAll(node.body, why, depth);
        continue;
      }
      for (const word of node.words) {
        const name = word[0]?.quoted === false ? /^([A-Za-z_][A-Za-z0-9_]*)\+?=/.exec(word[0].text)?.[1] : undefined;
        if (name === undefined) break;
        variables.set(name, undefined);
      }
      const [first, ...rest] = node.words.map(plainText);
      if (first !== undefined) scope.current = changeScope(first, rest, scope.current, false) ?? scope.current;
      const body = functions.get(bare(node.words[0]) ?? '');
      const key = `${node.line} ${why}`;
      if (body !== undefined && depth < MAX_DEPTH) {
        if (!passed.has(key)) skipAll(body, why, depth + 1);
      } else if (isTelling(node.words) && !passed.has(key)) {
        skipped.push({ line: node.line, text: printable(node.words.map(plainText).join(' '), 120), why });
      }
      passed.add(key);
    }
  };

  return { draft, all, addresses: links.all };
}

/** Whether a command that cannot be followed may be one that is looked for; its name may be in a variable. */
function isTelling(words: readonly Word[]): boolean {
  const text = words.map(plainText).join(' ');
  return /iptables|\bip\s+(?:-\S+\s+)*a|ifconfig/i.test(text) || /^\$.* -(?:[AIDRFXNPj]|t ?nat)(?: |$)/.test(text);
}
