/** What an import did, so that it can go on after it was stopped, and back. Pure: shape and text. */
import * as v from 'valibot';
import type { Ipv4, LinkName } from '../core/address.ts';
import { tryParseIpv4, tryParseLinkName } from '../core/address.ts';
import type { Mapping, Owner } from '../core/mapping.ts';
import { mappingSchema, ownerSchema } from '../core/state.ts';
import type { Variant } from '../iptables/table.ts';
import type { StandingAddress } from '../link/ports.ts';

export const JOURNAL_VERSION = 1;

export interface JournalRules {
  readonly variant: Variant;
  /** Chains of table nat as they were, by name: the arguments of their rules. */
  readonly before: Readonly<Record<string, readonly string[]>>;
  /** What goes. */
  readonly removed: readonly { readonly chain: string; readonly text: string; readonly guest: Ipv4 }[];
}

export type BridgeSetting =
  | { readonly kind: 'mtu'; readonly link: LinkName; readonly mtu: number }
  | { readonly kind: 'hairpin'; readonly port: LinkName; readonly on: boolean };

export interface JournalMapping {
  readonly owner: Owner;
  readonly mapping: Mapping;
  /** kvm-ib had it before the import. */
  readonly mapped: boolean;
}

export interface Journal {
  readonly version: typeof JOURNAL_VERSION;
  /** ISO 8601, UTC. */
  readonly started: string;
  /** When the import before it was started, whose journal is kept; null: there was none that stands. */
  readonly earlier: string | null;
  /** The table of kvm-ib was there before. */
  readonly loaded: boolean;
  readonly mappings: readonly JournalMapping[];
  readonly rules: readonly JournalRules[];
  /** Addresses that go. */
  readonly addresses: readonly StandingAddress[];
  /** Settings of bridges and their ports that the import changed, as they were. */
  readonly settings: readonly BridgeSetting[];
  /** Links whose promote_secondaries is set for the while. */
  readonly promoting: readonly string[];
}

const ipv4 = v.custom<Ipv4>((value) => typeof value === 'string' && tryParseIpv4(value) !== undefined);
const link = v.custom<LinkName>((value) => typeof value === 'string' && tryParseLinkName(value) !== undefined);
/** One line: it is handed to iptables-restore. */
const line = v.pipe(v.string(), v.regex(/^[^\n\r]*$/));
const chain = v.pipe(v.string(), v.regex(/^[^\s:]{1,64}$/));
const journalSchema = v.object({
  version: v.literal(JOURNAL_VERSION),
  started: v.pipe(v.string(), v.regex(/^[0-9TZ:.-]{10,40}$/)),
  earlier: v.nullable(v.pipe(v.string(), v.regex(/^[0-9TZ:.-]{10,40}$/))),
  loaded: v.boolean(),
  mappings: v.array(
    v.object({
      owner: ownerSchema,
      mapping: mappingSchema,
      mapped: v.boolean(),
    }),
  ),
  rules: v.array(
    v.object({
      variant: v.picklist(['legacy', 'nft']),
      before: v.record(chain, v.array(line)),
      removed: v.array(v.object({ chain, text: line, guest: ipv4 })),
    }),
  ),
  addresses: v.array(
    v.object({
      device: link,
      address: ipv4,
      prefixLength: v.pipe(v.number(), v.integer(), v.minValue(0), v.maxValue(32)),
      label: v.pipe(v.string(), v.regex(/^[\x21-\x7e]{1,15}$/)),
      secondary: v.boolean(),
      broadcast: v.nullable(ipv4),
      scope: v.pipe(v.number(), v.integer(), v.minValue(0), v.maxValue(255)),
    }),
  ),
  settings: v.array(
    v.variant('kind', [
      v.object({ kind: v.literal('mtu'), link, mtu: v.pipe(v.number(), v.integer(), v.minValue(68)) }),
      v.object({ kind: v.literal('hairpin'), port: link, on: v.boolean() }),
    ]),
  ),
  promoting: v.array(link),
});

/** The journal out of its text; undefined when it is none, or one of another version. */
export function parseJournal(text: string): Journal | undefined {
  let raw: unknown;
  try {
    raw = JSON.parse(text);
  } catch {
    return undefined;
  }
  const result = v.safeParse(journalSchema, raw);
  return result.success ? result.output : undefined;
}

export function printJournal(journal: Journal): string {
  return `${JSON.stringify(journal, undefined, 1)}\n`;
}
