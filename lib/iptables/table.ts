/** The rules of a host as iptables keeps them: tables of chains of rules. */
import type { Rule } from './rule.ts';

/** iptables has two kernel parts that know nothing of each other; each has programs of its own. */
export type Variant = 'legacy' | 'nft';

export interface Chain {
  readonly name: string;
  /** Of a built-in chain; undefined: a chain that somebody made. */
  readonly policy: string | undefined;
  readonly rules: readonly Rule[];
}

export interface Table {
  readonly name: string;
  readonly chains: ReadonlyMap<string, Chain>;
}

/** By name of the table. */
export type Tables = ReadonlyMap<string, Table>;

/** A line that was passed over, and why that is. */
export interface Skipped {
  readonly line: number;
  readonly text: string;
  readonly why: string;
}

/** An address that a script puts on a link. */
export interface ScriptAddress {
  readonly device: string;
  readonly address: string;
  readonly prefixLength: number;
  readonly label: string;
}

export interface Parsed {
  readonly tables: Tables;
  readonly skipped: readonly Skipped[];
  /** Addresses as they are on the links once the script has run; empty where the input says nothing of them. */
  readonly addresses: readonly ScriptAddress[];
}

const BUILT_IN: Readonly<Record<string, readonly string[]>> = {
  filter: ['INPUT', 'FORWARD', 'OUTPUT'],
  nat: ['PREROUTING', 'INPUT', 'OUTPUT', 'POSTROUTING'],
  mangle: ['PREROUTING', 'INPUT', 'FORWARD', 'OUTPUT', 'POSTROUTING'],
  raw: ['PREROUTING', 'OUTPUT'],
  security: ['INPUT', 'FORWARD', 'OUTPUT'],
};

export function builtInChains(table: string): readonly string[] {
  return BUILT_IN[table] ?? [];
}

interface DraftChain {
  name: string;
  policy: string | undefined;
  rules: Rule[];
}

/** Tables that are being read. */
export interface TablesDraft {
  /** The chains of a table, made with its built-in chains if it is not there. */
  table(name: string): Map<string, DraftChain>;
  /** The chain, made if it is not there. */
  chain(table: string, name: string): DraftChain;
  tables(): Tables;
}

export function draftTables(): TablesDraft {
  const all = new Map<string, Map<string, DraftChain>>();
  const table = (name: string): Map<string, DraftChain> => {
    const known = all.get(name);
    if (known !== undefined) return known;
    const chains = new Map<string, DraftChain>(
      builtInChains(name).map((chain) => [chain, { name: chain, policy: 'ACCEPT', rules: [] }]),
    );
    all.set(name, chains);
    return chains;
  };
  return {
    table,
    chain: (of, name) => {
      const chains = table(of);
      const known = chains.get(name);
      if (known !== undefined) return known;
      const made: DraftChain = { name, policy: undefined, rules: [] };
      chains.set(name, made);
      return made;
    },
    tables: () => new Map([...all].map(([name, chains]) => [name, { name, chains }])),
  };
}
