/**
 * A transaction is a list of commands, as plain data. The kernel applies all of it or nothing. It is sent as JSON;
 * `print` shows it as a person would type it, for logs, dry runs and errors.
 */
import { NftError } from './errors.ts';
import type {
  AddTarget,
  AnonymousSet,
  Chain,
  Command,
  CounterObject,
  DeleteTarget,
  Element,
  ElementData,
  ElementKey,
  Expression,
  FlagList,
  FlushTarget,
  Log,
  NatTarget,
  NftMap,
  NftSet,
  Rule,
  RuleName,
  Statement,
  Verdict,
} from './types.ts';

export interface Transaction {
  readonly commands: readonly Command[];
}

export function transaction(...commands: readonly Command[]): Transaction {
  return { commands };
}

/** A new transaction: the commands of this one, then these. */
export function append(to: Transaction, ...commands: readonly Command[]): Transaction {
  return { commands: [...to.commands, ...commands] };
}

/** nft's own identifiers; at most 255 characters in the kernel. */
const NAME = /^[A-Za-z_][A-Za-z0-9_./-]{0,254}$/;
const NAME_KEYS: readonly string[] = ['name', 'table', 'chain', 'target'];

/** What nft's own grammar allows a comment; JSON would take more, and the listing could not be loaded again. */
const COMMENT_MAX_BYTES = 128;

/**
 * The text for `nft -j -f`.
 *
 * What is sent must parse for certain: JSON that does not is read again as nft syntax, and when standard input is a
 * pipe nft before 1.1 then sees an empty one and exits 0 with nothing done. JSON.stringify gives whole documents, but
 * two strings that are fine here are none for nft's parser: NUL, and half of a surrogate pair. Quotes and control
 * characters parse and are stored, but break the listing in nft syntax, which knows no escapes. All of them are
 * refused here, as are numbers that are not integers and names that nft syntax cannot name.
 *
 * @throws NftError `refused`, with the index of the command, when something in it cannot be sent.
 */
export function toJson(of: Transaction): string {
  of.commands.forEach((command, index) => {
    const fault = findFault(command, '');
    if (fault !== undefined) throw new NftError('refused', `Cannot send command ${index + 1}: ${fault}`, { index });
  });
  return JSON.stringify({ nftables: of.commands });
}

function findFault(value: unknown, key: string): string | undefined {
  if (typeof value === 'string') {
    if (/[\u0000-\u001f\u007f"]|\p{Surrogate}/u.test(value)) return `${key} holds a quote or a control character`;
    if (NAME_KEYS.includes(key) && !NAME.test(value)) return `${key} is not a name that nft can write`;
    if (key === 'comment' && utf8Length(value) > COMMENT_MAX_BYTES) return 'comment is longer than 128 bytes';
    return undefined;
  }
  if (typeof value === 'number') return Number.isSafeInteger(value) ? undefined : `${key} is not an integer`;
  if (value === null) return undefined;
  if (typeof value !== 'object') return `${key} is not JSON`;
  for (const [name, item] of Object.entries(value)) {
    // Places in a list are no names: what is wrong in a list is wrong in what holds the list.
    const fault = findFault(item, Array.isArray(value) ? key : name);
    if (fault !== undefined) return fault;
  }
  return undefined;
}

function utf8Length(text: string): number {
  return encodeURIComponent(text).replace(/%../g, '.').length;
}

/** The transaction in nft syntax, one command a line; with `numbered`, each line begins with its number, from 1. */
export function print(of: Transaction, options: { readonly numbered?: boolean } = {}): string {
  const width = String(of.commands.length).length;
  return of.commands
    .map((command, index) => {
      const number = options.numbered === true ? `${String(index + 1).padStart(width)}  ` : '';
      return `${number}${printCommand(command)}\n`;
    })
    .join('');
}

/** One command in nft syntax, on one line. */
export function printCommand(command: Command): string {
  if ('add' in command) return printAdd('add', command.add);
  if ('create' in command) return printAdd('create', command.create);
  if ('insert' in command) return printAdd('insert', command.insert);
  if ('replace' in command) return printAdd('replace', command.replace);
  if ('delete' in command) return printTarget('delete', command.delete);
  if ('destroy' in command) return printTarget('destroy', command.destroy);
  if ('flush' in command) return printTarget('flush', command.flush);
  return printTarget('list', command.list);
}

function printAdd(verb: string, target: AddTarget): string {
  if ('chain' in target) return `${printTarget(verb, target)}${block(chainLines(target.chain))}`;
  if ('set' in target) return `${printTarget(verb, target)}${block(setLines(target.set))}`;
  if ('map' in target) return `${printTarget(verb, target)}${block(setLines(target.map))}`;
  if ('counter' in target) return `${printTarget(verb, target)}${block(counterLines(target.counter))}`;
  return printTarget(verb, target);
}

function printTarget(verb: string, target: AddTarget | DeleteTarget | FlushTarget): string {
  if ('table' in target) return `${verb} table ${target.table.family} ${target.table.name}`;
  if ('rule' in target) return `${verb} rule ${printRule(target.rule, verb)}`;
  if ('element' in target) return `${verb} element ${printName(target.element)} ${printElements(target.element.elem)}`;
  if ('chain' in target) return `${verb} chain ${printName(target.chain)}`;
  if ('set' in target) return `${verb} set ${printName(target.set)}`;
  if ('map' in target) return `${verb} map ${printName(target.map)}`;
  return `${verb} counter ${printName(target.counter)}`;
}

function printName(of: { readonly family: string; readonly table: string; readonly name: string }): string {
  return `${of.family} ${of.table} ${of.name}`;
}

function block(lines: readonly string[]): string {
  return lines.length === 0 ? '' : ` { ${lines.map((line) => `${line};`).join(' ')} }`;
}

function chainLines(chain: Chain): string[] {
  const lines: string[] = [];
  if (chain.type !== undefined && chain.hook !== undefined) {
    const device = chain.dev === undefined ? '' : ` device ${quote(chain.dev)}`;
    lines.push(`type ${chain.type} hook ${chain.hook}${device} priority ${chain.prio ?? 0}`);
  }
  if (chain.policy !== undefined) lines.push(`policy ${chain.policy}`);
  return lines;
}

function setLines(set: NftSet | NftMap): string[] {
  const lines = [`type ${printType(set.type)}${'map' in set ? ` : ${printType(set.map)}` : ''}`];
  if (set.flags !== undefined && set.flags.length > 0) lines.push(`flags ${set.flags.join(',')}`);
  if (set.timeout !== undefined) lines.push(`timeout ${set.timeout}s`);
  if (set.size !== undefined) lines.push(`size ${set.size}`);
  if (set.stmt !== undefined && set.stmt.length > 0) lines.push('counter');
  if (set.elem !== undefined && set.elem.length > 0) lines.push(`elements = ${printElements(set.elem)}`);
  return lines;
}

function printType(type: string | readonly string[]): string {
  return typeof type === 'string' ? type : type.join(' . ');
}

function counterLines(counter: CounterObject): string[] {
  if (counter.packets === undefined && counter.bytes === undefined) return [];
  return [`packets ${counter.packets ?? 0} bytes ${counter.bytes ?? 0}`];
}

function printRule(rule: RuleName & Partial<Rule> & { readonly handle?: number }, verb: string): string {
  const words = [rule.family, rule.table, rule.chain];
  // A listed rule that is added again has one, and nft does not look at it in JSON. In its text it would.
  if (rule.handle !== undefined && verb !== 'add') words.push(`handle ${rule.handle}`);
  for (const statement of rule.expr ?? []) words.push(printStatement(statement));
  if (rule.comment !== undefined) words.push(`comment ${quote(rule.comment)}`);
  return words.join(' ');
}

/** One statement of a rule in nft syntax. */
export function printStatement(statement: Statement): string {
  if ('match' in statement) return printMatch(statement.match);
  if ('jump' in statement) return `jump ${statement.jump.target}`;
  if ('goto' in statement) return `goto ${statement.goto.target}`;
  if ('counter' in statement) {
    const { counter } = statement;
    if (counter === null) return 'counter';
    if (typeof counter === 'string') return `counter name ${quote(counter)}`;
    return `counter packets ${counter.packets} bytes ${counter.bytes}`;
  }
  if ('snat' in statement) return `snat${printNat(statement.snat)}`;
  if ('dnat' in statement) return `dnat${printNat(statement.dnat)}`;
  if ('masquerade' in statement) return `masquerade${printNat(statement.masquerade ?? {})}`;
  if ('vmap' in statement) return printLookup('vmap', statement.vmap);
  if ('reject' in statement) {
    const { reject } = statement;
    if (reject === null) return 'reject';
    if (reject.type === 'tcp reset') return 'reject with tcp reset';
    return `reject with ${reject.type} type ${reject.expr}`;
  }
  if ('log' in statement) return printLog(statement.log);
  if ('mangle' in statement) {
    return `${printExpression(statement.mangle.key)} set ${printRight(statement.mangle.key, statement.mangle.value)}`;
  }
  return Object.keys(statement)[0] ?? '';
}

function printMatch(match: { readonly op: string; readonly left: Expression; readonly right: Expression }): string {
  const implicit = match.op === 'in' || (match.op === '==' && !comparesBits(match.left));
  return `${printExpression(match.left)}${implicit ? '' : ` ${match.op}`} ${printRight(match.left, match.right)}`;
}

/** Whether leaving the `==` away would ask for "one of these bits" instead of "exactly these". */
function comparesBits(left: Expression): boolean {
  if (typeof left !== 'object') return false;
  if ('ct' in left) return ['state', 'status', 'label', 'event'].includes(left.ct.key);
  if ('payload' in left) return left.payload.field === 'flags';
  return '&' in left || '|' in left || '^' in left;
}

function printNat(target: NatTarget): string {
  const port = target.port === undefined ? '' : `:${printExpression(target.port)}`;
  const address = target.addr === undefined ? '' : printExpression(target.addr);
  const family = target.family === undefined ? '' : ` ${target.family}`;
  const to = address === '' && port === '' ? '' : `${family} to ${address}${port}`;
  const flags = [target.flags ?? []].flat();
  return `${to}${flags.length === 0 ? '' : ` ${flags.join(',')}`}`;
}

function printLog(log: Log['log']): string {
  const words = ['log'];
  if (log?.prefix !== undefined) words.push(`prefix ${quote(log.prefix)}`);
  if (log?.level !== undefined) words.push(`level ${log.level}`);
  if (log?.group !== undefined) words.push(`group ${log.group}`);
  return words.join(' ');
}

/** An expression in nft syntax. */
export function printExpression(expression: Expression): string {
  if (typeof expression === 'number') return String(expression);
  if (typeof expression === 'string') return word(expression);
  if (isList(expression)) return expression.map(printExpression).join(',');
  if ('meta' in expression) {
    return /^[io]if(?:name|type|group)?$/.test(expression.meta.key)
      ? expression.meta.key
      : `meta ${expression.meta.key}`;
  }
  if ('ct' in expression) {
    return ['ct', expression.ct.dir, expression.ct.key].filter((part) => part !== undefined).join(' ');
  }
  if ('payload' in expression) return `${expression.payload.protocol} ${expression.payload.field}`;
  if ('fib' in expression) return `fib ${expression.fib.flags.join(' . ')} ${expression.fib.result}`;
  if ('concat' in expression) return expression.concat.map(printExpression).join(' . ');
  if ('prefix' in expression) return `${expression.prefix.addr}/${expression.prefix.len}`;
  if ('range' in expression) return expression.range.map(printExpression).join('-');
  if ('set' in expression) return printElements(expression.set);
  if ('map' in expression) return printLookup('map', expression.map);
  return Object.entries(expression)
    .map(([operator, operands]) => operands.map(operand).join(` ${operator} `))
    .join('');
}

function operand(expression: Expression): string {
  if (typeof expression !== 'object') return printExpression(expression);
  if (isList(expression)) return `(${expression.map(printExpression).join(' | ')})`;
  const nested = /^[&|^<>]/.test(Object.keys(expression)[0] ?? '');
  return nested ? `(${printExpression(expression)})` : printExpression(expression);
}

function printLookup(verb: string, of: { readonly key: Expression; readonly data: string | AnonymousSet }): string {
  const data = typeof of.data === 'string' ? of.data : printElements(of.data.set, of.key);
  return `${printExpression(of.key)} ${verb} ${data}`;
}

/** What stands right of a key: interface names in quotes, as nft lists them. */
function printRight(left: Expression, right: Expression): string {
  if (typeof right === 'string') return namesInterface(left) && !right.startsWith('@') ? quote(right) : word(right);
  if (typeof right === 'object' && 'set' in right) return printElements(right.set, left);
  return printExpression(right);
}

function namesInterface(left: Expression): boolean {
  return typeof left === 'object' && 'meta' in left && /^[io]if(?:name)?$/.test(left.meta.key);
}

function printElements(elements: readonly Element[], left: Expression = ''): string {
  return `{ ${elements.map((element) => printElement(element, left)).join(', ')} }`;
}

function printElement(element: Element, left: Expression): string {
  if (isPair(element)) {
    const [key, data] = element;
    const value = typeof data === 'object' && isVerdict(data) ? printStatement(data) : printExpression(data);
    return `${printElement(key, left)} : ${value}`;
  }
  if (typeof element !== 'object' || !('elem' in element)) return printRight(left, element);
  const { val, timeout, expires, comment, counter } = element.elem;
  const words = [printRight(left, val)];
  if (timeout !== undefined) words.push(`timeout ${timeout}s`);
  if (expires !== undefined) words.push(`expires ${expires}s`);
  if (counter !== undefined) words.push(`counter packets ${counter.packets} bytes ${counter.bytes}`);
  if (comment !== undefined) words.push(`comment ${quote(comment)}`);
  return words.join(' ');
}

/** A map's element, as against a set's. */
export function isPair(element: Element): element is readonly [ElementKey, ElementData] {
  return Array.isArray(element);
}

/** A list of flags, as against an expression of one kind. */
export function isList(expression: Expression): expression is FlagList {
  return Array.isArray(expression);
}

function isVerdict(data: ElementData): data is Verdict {
  return typeof data === 'object' && !('concat' in data || 'prefix' in data || 'range' in data);
}

/** A word as it is; quoted when nft would read it as something else, or as more than one. */
function word(text: string): string {
  return /^@?[A-Za-z0-9_./:+*-]+$/.test(text) ? text : quote(text);
}

/** nft text has no escapes: what cannot stand between quotes shows as `?`. Such a string is never sent, see `toJson`. */
function quote(text: string): string {
  return `"${text.replace(/[\u0000-\u001f\u007f"]/g, '?')}"`;
}
