/**
 * The part of libnftables-json(5) that a tool with a table of its own needs, with the names of the manual page.
 *
 * The types are the JSON itself: a value of these types is sent as it stands, and a listing is read back into them.
 * Every union is told apart by its one key (`{accept: null}`, `{jump: {target}}`, `{add: {rule: …}}`).
 *
 * Left out on purpose: comments of tables, chains and sets (nft before 1.0.8 ignores them silently in JSON; use a rule
 * or element comment as a tag), flow tables, limits, quotas, raw payloads, and `reset`, `rename`, `replace` of anything
 * but a rule.
 */

export type Family = 'ip' | 'ip6' | 'inet' | 'arp' | 'bridge' | 'netdev';

// Expressions -------------------------------------------------------------------------------------------------------

/**
 * A value. A string is taken as nft takes a word: an address, an interface name, a symbol such as `established`, and
 * `@name` is a reference to a set or map. nft asks the resolver about a word that should be an address and is none
 * ("localhost" is accepted), so check addresses before they get here.
 */
export type Immediate = string | number;

export type Meta = { readonly meta: { readonly key: string } };

/** `key` may carry the layer, as in `{key: 'ip daddr', dir: 'original'}`. */
export type Ct = { readonly ct: { readonly key: string; readonly dir?: 'original' | 'reply' } };

export type Payload = { readonly payload: { readonly protocol: string; readonly field: string } };

/** A lookup in the routing tables, as in `fib daddr type`. */
export type Fib = { readonly fib: { readonly result: 'oif' | 'oifname' | 'type'; readonly flags: readonly string[] } };

export type Concat = { readonly concat: readonly Expression[] };

export type Prefix = { readonly prefix: { readonly addr: string; readonly len: number } };

export type Range = { readonly range: readonly [Immediate, Immediate] };

/** An anonymous set, or, with pairs, an anonymous map. nft lists a set of one value as that value. */
export type AnonymousSet = { readonly set: readonly Element[] };

/** The value that `key` has in `data`: `@name` or an anonymous map. */
export type MapLookup = { readonly map: { readonly key: Expression; readonly data: string | AnonymousSet } };

export type BitOperation =
  | { readonly '&': readonly [Expression, Expression] }
  | { readonly '|': readonly [Expression, Expression] }
  | { readonly '^': readonly [Expression, Expression] }
  | { readonly '<<': readonly [Expression, Expression] }
  | { readonly '>>': readonly [Expression, Expression] };

/** A list is for flags only, as in `ct state established,related`. */
export type FlagList = readonly Immediate[];

export type Expression =
  | Immediate
  | FlagList
  | Meta
  | Ct
  | Payload
  | Fib
  | Concat
  | Prefix
  | Range
  | AnonymousSet
  | MapLookup
  | BitOperation;

// Elements ----------------------------------------------------------------------------------------------------------

/**
 * A key with what belongs to it. The comment (at most 128 bytes) stands on the key, also in a map; on the value it is an
 * error. `counter` and `expires` are for listings; nft ignores a counter here unless the
 * set has one in `stmt`.
 */
export type ElementWithExtras = {
  readonly elem: {
    readonly val: ElementValue;
    readonly comment?: string;
    /** Seconds. */
    readonly timeout?: number;
    /** Seconds. */
    readonly expires?: number;
    readonly counter?: CounterValues;
  };
};

export type ElementValue = Immediate | Concat | Prefix | Range;

export type ElementKey = ElementValue | ElementWithExtras;

/** What a map gives for a key; a verdict in a verdict map. */
export type ElementData = ElementValue | Verdict;

/** `key` in a set, `[key, data]` in a map. A deletion goes by the key alone: the kernel does not compare the data. */
export type Element = ElementKey | readonly [ElementKey, ElementData];

// Statements --------------------------------------------------------------------------------------------------------

export type Verdict =
  | { readonly accept: null }
  | { readonly drop: null }
  | { readonly continue: null }
  | { readonly return: null }
  | { readonly jump: { readonly target: string } }
  | { readonly goto: { readonly target: string } };

/** `in` is the implicit comparison of flags (`ct status dnat`: one of these bits is set); elsewhere use `==`. */
export type MatchOperator = '==' | '!=' | '<' | '>' | '<=' | '>=' | 'in';

export type Match = {
  readonly match: { readonly op: MatchOperator; readonly left: Expression; readonly right: Expression };
};

export type CounterValues = { readonly packets: number; readonly bytes: number };

/** Null: an anonymous counter from zero. A string: the counter object of that name. */
export type Counter = { readonly counter: null | string | CounterValues };

export type NatFlag = 'random' | 'fully-random' | 'persistent';

export type NatTarget = {
  readonly addr?: Expression;
  /** In an inet table only: the family of `addr`. */
  readonly family?: 'ip' | 'ip6';
  readonly port?: Expression;
  readonly flags?: NatFlag | readonly NatFlag[];
};

export type Nat = { readonly snat: NatTarget } | { readonly dnat: NatTarget };

export type Masquerade = {
  readonly masquerade: null | { readonly port?: Expression; readonly flags?: NatFlag | readonly NatFlag[] };
};

export type VerdictMap = { readonly vmap: { readonly key: Expression; readonly data: string | AnonymousSet } };

export type Reject = {
  readonly reject:
    | null
    | { readonly type: 'tcp reset' }
    | { readonly type: 'icmp' | 'icmpv6' | 'icmpx'; readonly expr: string };
};

export type Log = {
  readonly log: null | { readonly prefix?: string; readonly level?: string; readonly group?: number };
};

/** Writes a packet or connection field, as in `meta mark set 5`. */
export type Mangle = { readonly mangle: { readonly key: Expression; readonly value: Expression } };

export type Notrack = { readonly notrack: null };

export type Statement = Verdict | Match | Counter | Nat | Masquerade | VerdictMap | Reject | Log | Mangle | Notrack;

// Objects -----------------------------------------------------------------------------------------------------------

export type TableName = { readonly family: Family; readonly name: string };

/** Names a chain, set, map or counter: anything that lives in a table. */
export type ObjectName = { readonly family: Family; readonly table: string; readonly name: string };

export type Hook = 'prerouting' | 'input' | 'forward' | 'output' | 'postrouting' | 'ingress' | 'egress';

/** A regular chain. With `type`, `hook` and `prio`: a base chain, which packets enter by themselves. */
export type Chain = ObjectName & {
  readonly type?: 'filter' | 'nat' | 'route';
  readonly hook?: Hook;
  readonly prio?: number;
  /** The device of an ingress or egress chain. */
  readonly dev?: string;
  readonly policy?: 'accept' | 'drop';
};

export type SetFlag = 'constant' | 'interval' | 'timeout' | 'dynamic';

/**
 * A set. Without flags it is a hash, where a change costs the same at any size. With `interval` nft 1.0.6 reads all
 * elements for every change: keep that for what seldom changes.
 */
export type NftSet = ObjectName & {
  /** `ipv4_addr`, or a list for a concatenation. */
  readonly type: string | readonly string[];
  readonly flags?: readonly SetFlag[];
  /** Seconds. */
  readonly timeout?: number;
  readonly size?: number;
  readonly elem?: readonly Element[];
  /** A counter for every element. JSON from nft 1.0.6, kernel 5.12; older nft ignores it silently. */
  readonly stmt?: readonly { readonly counter: null }[];
};

export type NftMap = NftSet & {
  /** Type of the values; `verdict` for a verdict map. */
  readonly map: string | readonly string[];
};

export type CounterObject = ObjectName & { readonly packets?: number; readonly bytes?: number };

export type RuleName = { readonly family: Family; readonly table: string; readonly chain: string };

export type Rule = RuleName & {
  readonly expr: readonly Statement[];
  readonly comment?: string;
};

export type Elements = ObjectName & { readonly elem: readonly Element[] };

// Commands ----------------------------------------------------------------------------------------------------------

export type AddTarget =
  | { readonly table: TableName }
  | { readonly chain: Chain }
  | { readonly set: NftSet }
  | { readonly map: NftMap }
  | { readonly counter: CounterObject }
  | { readonly rule: Rule }
  | { readonly element: Elements };

/** Sets without elements: nft 1.0.6 takes a `create` of a set with elements, exits 0 and leaves the set empty. */
export type CreateTarget =
  | Exclude<AddTarget, { readonly set: NftSet } | { readonly map: NftMap } | { readonly rule: Rule }>
  | { readonly set: NftSet & { readonly elem?: never } }
  | { readonly map: NftMap & { readonly elem?: never } };

export type DeleteTarget =
  | { readonly table: TableName }
  | { readonly chain: ObjectName }
  | { readonly set: ObjectName }
  | { readonly map: ObjectName }
  | { readonly counter: ObjectName }
  | { readonly rule: RuleName & { readonly handle: number } }
  | { readonly element: Elements };

export type FlushTarget =
  | { readonly table: TableName }
  | { readonly chain: ObjectName }
  | { readonly set: ObjectName }
  | { readonly map: ObjectName };

export type Command =
  /** Makes it unless it is there; the same name with another content is an error, except for rules. */
  | { readonly add: AddTarget }
  /** Makes it; being there already is an error. */
  | { readonly create: CreateTarget }
  /** A rule at the head of its chain, or before `handle`. (`add` has none: nft 1.0.6 ignores it and appends.) */
  | { readonly insert: { readonly rule: Rule & { readonly handle?: number } } }
  | { readonly replace: { readonly rule: Rule & { readonly handle: number } } }
  /** Removes it; being absent is an error. Elements go by key only: a wrong value deletes all the same. */
  | { readonly delete: DeleteTarget }
  /** Removes it if it is there. nft 1.0.7, kernel 6.3; older nft: error `too-old`. */
  | { readonly destroy: DeleteTarget }
  /** Empties: a table or chain of its rules, a set or map of its elements. */
  | { readonly flush: FlushTarget }
  /** Prints; changes nothing. `listTable` is the way to use it. */
  | { readonly list: { readonly table: TableName } };

// Listings ----------------------------------------------------------------------------------------------------------

/** A statement of a kind, or in a form, that these types do not have; `opaque` is its JSON as it came. */
export type OpaqueStatement = { readonly opaque: unknown };

export type Listed<T> = T & { readonly handle: number };

export type ListedTable = Listed<TableName> & {
  /** `dormant`: the table is there and does nothing. */
  readonly flags: readonly string[];
};

export type ListedRule = Listed<RuleName> & {
  readonly expr: readonly (Statement | OpaqueStatement)[];
  readonly comment?: string;
};

export type ListedSet = Listed<NftSet> & { readonly elem: readonly ElementKey[] };

export type ListedMap = Listed<NftMap> & { readonly elem: readonly (readonly [ElementKey, ElementData])[] };

/** One table as the kernel holds it. Orders are the kernel's: rules as they run, elements as they happen to lie. */
export interface TableListing {
  readonly table: ListedTable;
  readonly chains: readonly Listed<Chain>[];
  readonly sets: readonly ListedSet[];
  readonly maps: readonly ListedMap[];
  readonly counters: readonly Listed<Required<CounterObject>>[];
  readonly rules: readonly ListedRule[];
  /** Objects of other kinds (flow tables, quotas, …) by kind, as they came. */
  readonly others: readonly { readonly kind: string; readonly json: unknown }[];
}
