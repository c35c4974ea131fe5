/** The commands of a script that set rules and addresses: iptables(8), ip-address(8), ifconfig(8), on tables and links as plain data. */
import { ipv4ToNumber, tryParseIpv4 } from '../core/address.ts';
import { printable } from '../core/errors.ts';
import { parseRules, prefixLength, type Rule } from './rule.ts';
import type { ScriptAddress, TablesDraft } from './table.ts';
import { builtInChains } from './table.ts';

export function isOfInterest(name: string, args: readonly string[]): boolean {
  if (/^(?:iptables(?:-legacy|-nft)?|iptables(?:-legacy|-nft)?-restore|ifconfig|source|\.)$/.test(name)) return true;
  if (name !== 'ip') return false;
  const { words, isElsewhere } = ofIp(args);
  return !isElsewhere && words[0] !== undefined && words[0] !== '' && 'address'.startsWith(words[0]);
}

/** Arguments of `ip` without its own options, and whether they are for another network namespace. */
function ofIp(args: readonly string[]): { readonly words: readonly string[]; readonly isElsewhere: boolean } {
  let at = 0;
  let isElsewhere = false;
  for (; args[at]?.startsWith('-'); at++) {
    if (/^--?(?:n|netns)$/.test(args[at] ?? '')) isElsewhere = true;
    if (/^--?(?:n|netns|f|family|b|batch|rc|rcvbuf|l|loops)$/.test(args[at] ?? '')) at += 1;
  }
  return { words: args.slice(at), isElsewhere };
}

/** Whether a command that is not known here is given one of iptables to run. */
export function runsIptables(name: string, args: readonly string[]): boolean {
  if (/^(?:eval|sh|bash|dash|ssh|su|runuser)$/.test(name))
    return args.some((word) => /\biptables\s+-/.test(word)) || names(args);
  return (
    !/^(?:echo|printf|logger|which|type|hash|whereis|test|\[|\[\[|modprobe|systemctl|service|chkconfig|apt|apt-get|yum|dnf|man)$/.test(
      name,
    ) && names(args)
  );
}

function names(args: readonly string[]): boolean {
  const at = args.findIndex((word) => /^(?:\S*\/)?iptables(?:-legacy|-nft)?$/.test(word));
  return at >= 0 && args[at + 1]?.startsWith('-') === true;
}

/** @returns why it is passed over; undefined: it is done, or says nothing of what is wanted */
export function perform(
  draft: TablesDraft,
  links: ReturnType<typeof createLinks>,
  name: string,
  args: readonly string[],
  line: number,
): string | undefined {
  if (name === 'ip') return links.ip(args);
  if (name === 'ifconfig') return links.ifconfig(args);
  if (name === 'source' || name === '.') return 'another file is read there; give it as well';
  if (name.endsWith('-restore')) return 'the file that it loads is not read; give it as well';
  return iptables(draft, args, line);
}

const LONG: Readonly<Record<string, string>> = {
  '--append': '-A',
  '--insert': '-I',
  '--delete': '-D',
  '--replace': '-R',
  '--flush': '-F',
  '--new-chain': '-N',
  '--new': '-N',
  '--delete-chain': '-X',
  '--policy': '-P',
  '--table': '-t',
  '--rename-chain': '-E',
};

/** `--table=nat` and `-tnat` are two words in one. */
function separated(word: string): readonly string[] {
  const [, option, value] = /^(--[a-z][a-z-]*)=(.*)$/s.exec(word) ?? /^(-t)(.+)$/.exec(word) ?? [];
  return option === undefined || value === undefined ? [word] : [option, value];
}

/** One iptables command on the tables, as the kernel would have them behind it. */
function iptables(draft: TablesDraft, given: readonly string[], line: number): string | undefined {
  const args = given.flatMap(separated);
  let table = 'filter';
  let verb: string | undefined;
  const operands: string[] = [];
  const rest: string[] = [];
  for (let at = 0; at < args.length; at++) {
    const word = LONG[args[at] ?? ''] ?? args[at] ?? '';
    if (word === '-t') table = args[++at] ?? '';
    else if (word === '-w' || word === '--wait' || word === '-W' || word === '--wait-interval') {
      if (/^[0-9]+$/.test(args[at + 1] ?? '')) at += 1;
    } else if (
      /^(?:--wait|-w)=?[0-9]+$/.test(word) ||
      ['-v', '--verbose', '-n', '--numeric', '-4', '--ipv4'].includes(word)
    ) {
      // Says nothing of the rule.
    } else if (verb === undefined && /^-[AIDRFNXPEZLSC]$/.test(word)) {
      verb = word;
      while (at + 1 < args.length && !/^[-!]/.test(args[at + 1] ?? '') && operands.length < 3)
        operands.push(args[++at] ?? '');
    } else rest.push(args[at] ?? '');
  }
  const [chain, number] = operands;
  const text = rest.join(' ');
  if (verb === undefined) return rest.length === 0 ? undefined : 'it names no command such as -A';
  if (builtInChains(table).length === 0) return `there is no table "${printable(table, 20)}"`;
  const chains = draft.table(table);
  if (verb === '-F' || verb === '-X' || verb === '-Z') {
    const called = new Set(
      [...chains.values()].flatMap((one) =>
        one.rules.map(({ target }) => (target.kind === 'named' ? target.name : '')),
      ),
    );
    for (const one of [...chains.values()]) {
      if (chain !== undefined && one.name !== chain) continue;
      if (verb === '-F') one.rules = [];
      if (verb !== '-X' || builtInChains(table).includes(one.name)) continue;
      if (one.rules.length > 0 || called.has(one.name)) return `${one.name} has rules, or is called`;
      chains.delete(one.name);
    }
    return undefined;
  }
  if (verb === '-L' || verb === '-S' || verb === '-C') return undefined;
  if (chain === undefined || chain.length > 64) return 'it names no chain';
  if (verb === '-N') return void draft.chain(table, chain);
  if (verb === '-P') {
    draft.chain(table, chain).policy = number ?? 'ACCEPT';
    return undefined;
  }
  if (verb === '-E') return 'a chain is renamed there, which is not followed';
  if (!chains.has(chain) && verb === '-D') return 'the rule that it deletes is not in the script';
  const { rules } = draft.chain(table, chain);
  const place = number !== undefined && /^[0-9]{1,9}$/.test(number) ? Number(number) : undefined;
  if (verb === '-D' && place !== undefined) {
    if (rules.splice(place - 1, 1).length === 0) return `${chain} has no rule ${place}`;
    return undefined;
  }
  const made = parseRules(chain, rest, text, line);
  if (verb === '-D') {
    for (const rule of made) {
      const at = rules.findIndex((known) => sameRule(known, rule));
      if (at < 0) return 'the rule that it deletes is not in the script';
      rules.splice(at, 1);
    }
    return undefined;
  }
  if (verb === '-R') {
    if (place === undefined || place < 1 || place > rules.length) return `${chain} has no such rule to replace`;
    if (made.length > 1) return 'it would be several rules, which iptables refuses';
    rules.splice(place - 1, 1, ...made);
  } else if (verb === '-I') {
    const at = place ?? 1;
    if (at < 1 || at > rules.length + 1) return `${chain} has no place ${at}`;
    // Each goes to the same place, so the last is the first.
    rules.splice(at - 1, 0, ...[...made].reverse());
  } else rules.push(...made);
  return undefined;
}

/** As `iptables -D` compares them: by what they say, not by how it was written. */
function sameRule(a: Rule, b: Rule): boolean {
  const key = ({ match, target, comment }: Rule): string => JSON.stringify([match, target, comment]);
  return key(a) === key(b);
}

/** Addresses that a script adds, and takes off again. */
export function createLinks() {
  const addresses: ScriptAddress[] = [];
  const add = (device: string, address: string, length: number, label: string): void => {
    const known = addresses.some((a) => a.device === device && a.address === address && a.prefixLength === length);
    if (!known) addresses.push({ device, address, prefixLength: length, label });
  };
  const remove = (matches: (one: ScriptAddress) => boolean): void => {
    for (let at = addresses.length - 1; at >= 0; at--) {
      const one = addresses[at];
      if (one !== undefined && matches(one)) addresses.splice(at, 1);
    }
  };
  return {
    all: () => addresses,
    ip: (args: readonly string[]): string | undefined => {
      const { words } = ofIp(args);
      const verb = words[1] ?? 'show';
      if (!['add', 'a', 'ad', 'append', 'replace', 'change', 'del', 'delete', 'd', 'flush'].includes(verb))
        return undefined;
      let text = '';
      let device = '';
      let label: string | undefined;
      for (let at = 2; at < words.length; at++) {
        const word = words[at] ?? '';
        if (word === 'dev') device = words[++at] ?? '';
        else if (word === 'label') label = words[++at];
        else if (
          ['brd', 'broadcast', 'scope', 'peer', 'anycast', 'metric', 'valid_lft', 'preferred_lft'].includes(word)
        )
          at += 1;
        else if (word === 'local') text = words[++at] ?? '';
        else if (/^[0-9]/.test(word)) text = word;
      }
      if (verb === 'flush')
        return void remove((one) => one.device === device && (label === undefined || one.label === label));
      const [address = '', mask] = text.split('/');
      const length = mask === undefined ? 32 : prefixLength(mask);
      if (tryParseIpv4(address) === undefined || length === undefined || device === '')
        return 'address and link are not understood';
      if (verb.startsWith('d')) remove((one) => one.device === device && one.address === address);
      else add(device, address, length, label ?? device);
      return undefined;
    },
    ifconfig: (args: readonly string[]): string | undefined => {
      const [label = '', ...rest] = args;
      const device = label.split(':')[0] ?? '';
      if (rest.length === 0) return undefined;
      if (rest.includes('down')) {
        if (label !== device) remove((one) => one.device === device && one.label === label);
        return undefined;
      }
      const [first = '', mask] = (
        rest.find((word) => tryParseIpv4(word.split('/')[0] ?? '') !== undefined) ?? ''
      ).split('/');
      const address = tryParseIpv4(first);
      if (address === undefined) return undefined;
      // A label has one address, unless another is added to it.
      if (label !== device && !rest.includes('add') && !rest.includes('del'))
        remove((one) => one.device === device && one.label === label);
      if (rest.includes('del')) return void remove((one) => one.address === first);
      const netmask = rest.includes('netmask') ? rest[rest.indexOf('netmask') + 1] : mask;
      // Without a mask the class of the address gives it, as ever since.
      const classful = ipv4ToNumber(address) < 2 ** 31 ? 8 : ipv4ToNumber(address) < 0xc0000000 ? 16 : 24;
      const length = netmask === undefined ? classful : prefixLength(netmask);
      if (length === undefined) return 'the netmask is not understood';
      add(device, address, length, label);
      return undefined;
    },
  };
}
