/** `kvm-ib import`: what an older deployment has, how packets fare before and after, the switch and the way back. */
import { closeSync, existsSync, fstatSync, openSync, readFileSync } from 'node:fs';
import type { Command } from 'commander';
import { Option } from 'commander';
import type { ExitStatus } from '../core/errors.ts';
import { errorReport, KvmIbError, printable, toKvmIbError } from '../core/errors.ts';
import { ownerName } from '../core/mapping.ts';
import { readConfig } from '../host/config-file.ts';
import { createImportHost } from '../host/import-host.ts';
import { pathsFrom } from '../host/paths.ts';
import type { Comparison } from '../import/compare.ts';
import type { Acceptance, ImportReport, PairReport, RuleReport } from '../import/report.ts';
import { acceptanceFor, parseAcceptance, unaccepted } from '../import/report.ts';
import type { Host } from '../ops/host.ts';
import { analyseFiles, analyseHost, MAX_INPUT, suggestFromFiles, suggestFromHost } from '../ops/import.ts';
import type { RollbackResult, SwitchResult, SwitchStep } from '../ops/import-switch.ts';
import { importApply, importResume, importRollback, refuseUnaccepted, switchPlan } from '../ops/import-switch.ts';
import { table } from './render.ts';

interface ImportOptions {
  readonly config?: string;
  readonly json?: boolean;
  readonly dryRun?: boolean;
  readonly apply?: boolean;
  readonly resume?: boolean;
  readonly rollback?: boolean;
  readonly accept?: string;
  readonly manual?: boolean;
  readonly all?: boolean;
}

/** What the program hands to its parts. */
export interface Shell {
  readonly colour: boolean;
  readonly command: (
    parent: Command,
    name: string,
    description: string,
    also: readonly 'dry-run'[],
    examples: readonly string[],
  ) => Command;
  readonly open: (options: { readonly config?: string; readonly json?: boolean }, what: string) => Promise<Host>;
  readonly useJson: (wanted: boolean) => void;
  readonly exit: (status: ExitStatus) => void;
  readonly out: (text: string) => void;
  readonly warn: (warnings: readonly string[]) => void;
  readonly json: (value: unknown) => void;
}

/** Addresses that are shown one by one without `--all`. */
const SHOWN = 40;

export function addImportCommand(root: Command, shell: Shell): void {
  shell
    .command(
      root,
      'import',
      'Take over the NAT pairs of an older deployment from iptables: without an option it reports and changes nothing',
      ['dry-run'],
      [
        'kvm-ib import                                   what is on this host, and what would change for packets',
        'kvm-ib import iptables.save old-guide.sh        the same from files',
        'kvm-ib import --apply --dry-run                 each step of the switch',
        'kvm-ib import --apply --accept host,loopback    go over, where these may differ',
        'kvm-ib import --rollback                        back to the old rules',
      ],
    )
    .argument('[file...]', 'output of iptables-save, or shell scripts; "-" is standard input. Without any: this host')
    .addOption(new Option('--apply', 'go over to the table of kvm-ib').conflicts(['resume', 'rollback']))
    .addOption(new Option('--resume', 'go on with an import that was stopped').conflicts(['rollback', 'dryRun']))
    .option('--rollback', 'put the old rules and addresses back')
    .option(
      '--accept <cases>',
      'differences that are meant, by comma: a case (host/to-guest), a class (host), one address (host@192.168.10.202)',
    )
    .option('--manual', 'do not ask libvirt: every pair becomes a mapping that only `kvm-ib remove` ends')
    .option('--all', `show each comparison also where there are more than ${SHOWN} pairs`)
    .action((files: readonly string[], options: ImportOptions) => run(shell, files, options));
}

async function run(shell: Shell, files: readonly string[], options: ImportOptions): Promise<void> {
  shell.useJson(options.json ?? false);
  const accepted = acceptances(options.accept);
  const command = ownCommand(options);
  if (files.length > 0) {
    const given = (['apply', 'resume', 'rollback'] as const).find((name) => options[name]);
    if (given !== undefined) {
      throw new KvmIbError('usage', `Cannot use --${given} with files`, {
        why: 'the switch is made on this host, from the rules that its kernel has',
        fix: files.every((file) => parseAcceptance(file) !== undefined)
          ? `write a comma between what is accepted: --accept ${[options.accept, ...files].join(',')}`
          : `leave the files out: ${command} --${given}${given === 'apply' ? '; to map by hand: kvm-ib add --guest … --address …' : ''}`,
      });
    }
    showFiles(shell, files, options);
    return;
  }
  const path = options.config ?? pathsFrom(process.env).config;
  // Without rights it cannot be read either, which is then said first.
  if (!existsSync(path) && process.getuid?.() === 0) {
    throw noConfig(path, await suggestFromHost(createImportHost(pathsFrom(process.env).state)));
  }
  const host = await shell.open(options, 'import');
  const ports = createImportHost(host.store.directory);
  const progress = createProgress(options.json ?? false);
  try {
    if (options.rollback) {
      const result = await importRollback(host, ports, { dryRun: options.dryRun ?? false });
      progress.end();
      showRollback(shell, result, options);
    } else if (options.resume) {
      const result = await importResume(host, ports, { onStep: progress.step });
      progress.end();
      showDone(shell, result, options);
    } else if (options.apply && !options.dryRun) {
      const result = await importApply(host, ports, {
        accepted,
        manual: options.manual ?? false,
        command,
        onStep: progress.step,
      });
      progress.end();
      if (options.json) shell.json({ dryRun: false, ...result, reconciled: undefined });
      else if (result.reconciled === undefined) shell.out('Nothing to import.\n');
      else showDone(shell, result, options);
      if (!options.json) shell.warn(result.warnings);
    } else {
      const analysis = await analyseHost(host, ports, (done, all) => progress.step('compare', done, all));
      progress.end();
      const plan = await switchPlan(host, analysis);
      const due = options.apply && analysis.report.pairs.length > 0;
      const refused = due ? refusalOf(analysis.report, accepted, command) : undefined;
      if (options.json) {
        // One document: what is refused is part of it.
        shell.json({
          dryRun: true,
          report: analysis.report,
          plan,
          refused: refused === undefined ? null : errorReport(refused),
        });
        if (refused !== undefined) shell.exit(refused.exit);
        return;
      }
      showReport(shell, analysis.report, options);
      if (options.dryRun || options.apply) for (const line of plan) shell.out(`${printable(line, 400)}\n`);
      shell.out('Nothing was changed.\n');
      if (
        !options.apply &&
        (analysis.phase === undefined || analysis.phase === 'applied' || analysis.phase === 'rolled-back')
      ) {
        showNext(shell, analysis.report, command, accepted);
      }
      if (refused !== undefined) throw refused;
    }
  } finally {
    progress.end();
  }
}

function acceptances(text: string | undefined): readonly Acceptance[] {
  if (text === undefined) return [];
  return text.split(',').map((part) => {
    const found = parseAcceptance(part.trim());
    if (found !== undefined) return found;
    throw new KvmIbError('usage', `Cannot accept "${printable(part, 60)}"`, {
      why: 'it names no kind of packet',
      fix: 'name what `kvm-ib import` shows as different: host, loopback/own, inbound/other-link, host@192.168.10.202',
    });
  });
}

/** The first thing that is tried on an old host: it is told what to write. */
function noConfig(path: string, suggestion: string | undefined): KvmIbError {
  return new KvmIbError('bad-config', `Cannot read the configuration ${printable(path, 200)}`, {
    why: 'the file is not there',
    fix:
      suggestion === undefined
        ? 'write it (docs/install.md has an example), or name it: kvm-ib import --config FILE'
        : `write it, or name it with --config FILE; what the rules have would fit into this (look at bridge and ranges):\n${suggestion}`,
  });
}

function showFiles(shell: Shell, files: readonly string[], options: ImportOptions): void {
  const path = options.config ?? pathsFrom(process.env).config;
  const progress = createProgress(options.json ?? false);
  try {
    const read = files.map((name) => ({ name: name === '-' ? 'standard input' : name, text: readInput(name) }));
    if (!existsSync(path)) throw noConfig(path, suggestFromFiles(read));
    const config = readConfig(path);
    const { report } = analyseFiles(config, read, (done, all) => progress.step('compare', done, all));
    progress.end();
    if (options.json) shell.json({ dryRun: true, report });
    else showReport(shell, report, options);
  } finally {
    progress.end();
  }
}

function readInput(name: string): string {
  const message = `Cannot read ${name === '-' ? 'standard input' : printable(name, 200)}`;
  let fd: number | undefined;
  try {
    if (name === '-') return bounded(readFileSync(0), message).toString('utf8');
    fd = openSync(name, 'r');
    const stat = fstatSync(fd);
    if (stat.isDirectory())
      throw new KvmIbError('usage', message, { why: 'it is a directory', fix: 'name the files in it' });
    if (stat.size > MAX_INPUT) throw tooLarge(message);
    return bounded(readFileSync(fd), message).toString('utf8');
  } catch (cause) {
    if (cause instanceof KvmIbError) throw cause;
    throw new KvmIbError('usage', message, {
      why: whyUnread(cause),
      fix: 'name a file that is there and may be read',
      cause,
    });
  } finally {
    if (fd !== undefined) closeSync(fd);
  }
}

function whyUnread(cause: unknown): string {
  const { code, message } = cause as NodeJS.ErrnoException;
  if (code === 'ENOENT') return 'it is not there';
  return code === 'EACCES' ? 'it may not be read by this user' : String(message);
}

function bounded(bytes: Buffer, message: string): Buffer {
  if (bytes.length > MAX_INPUT) throw tooLarge(message);
  return bytes;
}

function tooLarge(message: string): KvmIbError {
  return new KvmIbError('bad-input', message, {
    why: `it has more than ${MAX_INPUT / 1024 / 1024} MiB`,
    fix: 'give the output of `iptables-save`, or the script that sets the rules',
  });
}

const STEP_WORDS: Readonly<Record<SwitchStep, string>> = {
  compare: 'comparing',
  files: 'writing state files',
  table: 'loading the table',
  aliases: 'taking over the aliases',
  rules: 'taking the old rules out',
  reconcile: 'reconciling',
};

/** One line on standard error that is written over, on a terminal only. */
function createProgress(quiet: boolean) {
  const shown = process.stderr.isTTY === true && !quiet;
  let dirty = false;
  return {
    step: (step: SwitchStep, done: number, all: number): void => {
      if (!shown) return;
      const count = all > 1 ? ` ${done} of ${all}` : '';
      process.stderr.write(`\r\u001b[K${STEP_WORDS[step]}${count} …`);
      dirty = true;
    },
    end: (): void => {
      if (dirty) process.stderr.write('\r\u001b[K');
      dirty = false;
    },
  };
}

function showReport(shell: Shell, report: ImportReport, options: ImportOptions): void {
  const { out } = shell;
  const heading = (text: string): void => out(`\n${text}\n`);
  const rule = (one: RuleReport): string => printable(`${one.source}, ${one.table}: ${one.rule}`, 300);
  shell.warn(report.warnings);
  out(`${count(report.pairs.length, 'pair')}${report.pairs.length === 0 ? '.\n' : ' to take over:\n'}`);
  if (report.pairs.length > 0) {
    out(
      table(report.pairs, [
        { title: 'GUEST', value: (p) => p.guest },
        { title: 'ADDRESS', value: (p) => p.address },
        { title: 'NETWORK', value: (p) => p.mapping.network },
        { title: 'BECOMES', value: becomes },
        { title: 'MAC', value: (p) => p.mapping.mac },
        { title: 'ALIAS', value: (p) => aliasText(p, report) },
        { title: 'RULES', value: (p) => p.rules.length },
      ]),
    );
    const notes = new Map<string, PairReport[]>();
    for (const pair of report.pairs) for (const note of pair.notes) notes.set(note, [...(notes.get(note) ?? []), pair]);
    for (const [note, pairs] of notes)
      out(
        `  note: ${pairs.length > 3 ? `${pairs.length} pairs` : pairs.map((p) => p.guest).join(', ')}: ${printable(note, 300)}\n`,
      );
  }
  if (report.halves.length > 0) {
    heading(`${count(report.halves.length, 'half', 'halves')}, left ${asIs(report.halves.length)}:`);
    for (const one of report.halves) {
      const missing =
        one.missing === 'snat' ? 'nothing translates what the guest sends' : 'nothing translates what is sent to it';
      out(`  ${one.guest} <-> ${one.address}: ${missing}\n`);
      for (const found of one.rules) out(`    ${rule(found)}\n`);
    }
  }
  if (report.conflicts.length > 0) {
    heading(`${count(report.conflicts.length, 'conflict')}, left ${asIs(report.conflicts.length)}:`);
    for (const one of report.conflicts) {
      out(`  ${one.guest} <-> ${one.address}: ${one.why}\n`);
      for (const found of one.rules) out(`    ${rule(found)}\n`);
    }
  }
  const others = report.left.length + report.otherTables.length;
  if (others > 0) {
    heading('Rules left alone, in their place:');
    for (const one of report.left.slice(0, options.all ? undefined : SHOWN))
      out(`  ${rule(one)}\n    ${printable(one.why, 300)}\n`);
    if (!options.all && report.left.length > SHOWN) out(`  … and ${report.left.length - SHOWN} more (--all)\n`);
    for (const one of report.otherTables)
      out(`  ${one.source}, ${one.table}: ${count(one.rules, 'rule')}: not in table nat\n`);
  }
  const spare = (report.aliases ?? []).filter(({ guest, ours }) => guest === null && !ours);
  if (spare.length > 0) {
    heading('Aliases without a pair, left as they are:');
    for (const one of spare)
      out(`  ${one.address}/${one.prefixLength} on ${one.device} (${printable(one.label, 20)})\n`);
  }
  if (report.skipped.length > 0) {
    heading('Lines passed over:');
    for (const one of report.skipped.slice(0, options.all ? undefined : SHOWN)) {
      out(`  ${printable(one.source, 100)}:${one.line}: ${one.text}\n    ${one.why}\n`);
    }
    if (!options.all && report.skipped.length > SHOWN) out(`  … and ${report.skipped.length - SHOWN} more (--all)\n`);
  }
  if (report.comparisons.length > 0) {
    heading('What becomes of packets:');
    if (options.all || report.pairs.length <= SHOWN) showEach(shell, report.comparisons);
    else showGrouped(shell, report);
  }
  out('\n');
}

function becomes({ owner, mapping, mapped }: PairReport): string {
  const who = owner.kind === 'vm' ? `VM ${owner.vm} NIC ${mapping.nic}` : 'manual mapping';
  return mapped ? `(mapped: ${ownerName(owner)})` : who;
}

function aliasText(pair: PairReport, report: ImportReport): string {
  if (report.aliases === null) return '-';
  const [first] = pair.aliases;
  if (first !== undefined) return `${first.address}/${first.prefixLength} ${first.label}`;
  return pair.mapped || report.aliases.some((one) => one.ours && one.address === pair.address)
    ? 'kvm-ib'
    : 'none: added';
}

const CLASSES = ['inbound', 'outbound', 'host', 'loopback'] as const;

/** A line for each address and class; where a class differs, one for each case that does. */
function showEach(shell: Shell, comparisons: readonly Comparison[]): void {
  const byAddress = new Map<string, Comparison[]>();
  for (const one of comparisons) {
    const key = one.address === null ? `${one.guest} of network ${one.network}` : `${one.guest} <-> ${one.address}`;
    byAddress.set(key, [...(byAddress.get(key) ?? []), one]);
  }
  for (const [who, list] of byAddress) {
    shell.out(`  ${who}\n`);
    for (const name of CLASSES) {
      const own = list.filter((one) => one.case.startsWith(`${name}/`));
      const differing = own.filter(({ same }) => !same);
      const [alike] = own.filter(({ same }) => same);
      const what = differing.length === 0 ? name : alike?.case;
      if (alike !== undefined) shell.out(`    same     ${(what ?? '').padEnd(22)} ${alike.new}\n`);
      for (const one of differing) {
        shell.out(`    ${marked(shell, 'DIFFERS')}  ${one.case.padEnd(22)} before: ${one.old}; after: ${one.new}\n`);
      }
    }
  }
}

/** Comparisons that read the same but for the addresses are one line. */
function showGrouped(shell: Shell, { comparisons, pairs }: ImportReport): void {
  const guests = new Set<string>(pairs.map(({ guest }) => guest));
  const groups = new Map<
    string,
    { readonly one: Comparison; readonly old: string; readonly after: string; count: number }
  >();
  for (const one of comparisons) {
    const [old, after] = [general(one.old, one, guests), general(one.new, one, guests)];
    const key = `${one.case} ${old} ${after}`;
    const known = groups.get(key);
    if (known === undefined) groups.set(key, { one, old, after, count: 1 });
    else known.count += 1;
  }
  for (const { one, old, after, count: times } of groups.values()) {
    const what = one.same
      ? `same     ${one.case.padEnd(22)} ${after}`
      : `${marked(shell, 'DIFFERS')}  ${one.case.padEnd(22)} before: ${old}; after: ${after}`;
    shell.out(`  ${String(times).padStart(6)} x ${what}\n`);
  }
  shell.out('  (each address by itself: --all, or --json)\n');
}

/** The same text for every guest: addresses become words. */
function general(text: string, { case: kind, guest, address }: Comparison, guests: ReadonlySet<string>): string {
  const word = (found: string): string => {
    if (found === guest) return 'the guest';
    if (found === address) return 'its IB address';
    if (kind !== 'loopback/other-guest') return found;
    return guests.has(found) ? 'the sender' : "the sender's IB address";
  };
  return text.replace(/(?<![0-9.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9.])/g, word);
}

function marked(shell: Shell, text: string): string {
  return shell.colour ? `\u001b[33m${text}\u001b[0m` : text;
}

function refusalOf(report: ImportReport, accepted: readonly Acceptance[], command: string): KvmIbError | undefined {
  try {
    refuseUnaccepted(report.comparisons, accepted, command);
    return undefined;
  } catch (error) {
    return toKvmIbError(error);
  }
}

/** The command as it was called: before an installation it lies elsewhere, and has its configuration elsewhere. */
function ownCommand(options: ImportOptions): string {
  const program = process.argv[1] ?? '';
  const called = program === '' || program.startsWith('/usr/') ? 'kvm-ib' : `node ${program}`;
  const config = options.config === undefined ? [] : ['--config', options.config];
  return [called, 'import', ...config, ...(options.manual ? ['--manual'] : [])].join(' ');
}

function showNext(shell: Shell, report: ImportReport, command: string, accepted: readonly Acceptance[]): void {
  if (report.pairs.length === 0) return;
  const open = unaccepted(report.comparisons, accepted);
  const given = accepted.map(({ what, address }) => (address === undefined ? what : `${what}@${address}`));
  const words = [...given, ...acceptanceFor(open, report.comparisons)];
  const accept = words.length === 0 ? '' : ` --accept ${words.join(',')}`;
  shell.out(`To go over${open.length === 0 ? '' : ', if these differences are meant'}: ${command} --apply${accept}\n`);
}

function showDone(shell: Shell, result: Omit<SwitchResult, 'report'>, options: ImportOptions): void {
  if (options.json) {
    shell.json({ ...result, reconciled: undefined });
    return;
  }
  if (options.resume) shell.warn(result.warnings);
  shell.out(
    `Taken over: ${count(result.mappings, 'mapping')}; out of iptables: ${count(result.rules, 'rule')}; aliases replaced: ${result.addresses}.\n`,
  );
  shell.out('Look at it with `kvm-ib status`; the way back is `kvm-ib import --rollback`.\n');
}

function showRollback(shell: Shell, result: RollbackResult, options: ImportOptions): void {
  if (options.json) {
    shell.json({ dryRun: options.dryRun ?? false, ...result });
    return;
  }
  shell.warn(result.warnings);
  for (const one of result.ended) shell.out(`not restored: ${one} has ended since the import\n`);
  const would = options.dryRun ? 'Would be back' : 'Back';
  shell.out(
    `${would}: ${count(result.rules, 'rule')}, ${count(result.addresses, 'address', 'addresses')}; gone: ${count(result.mappings, 'mapping')}${result.tableRemoved ? ', the table ip kvm_ib' : ''}.\n`,
  );
  if (options.dryRun) shell.out('Nothing was changed (--dry-run).\n');
  else
    shell.out(
      'The old rules are in force. kvm-ib stands still until `kvm-ib import --apply`: systemctl disable --now kvm-ib.timer kvm-ib-reconcile.service\n',
    );
}

function asIs(n: number): string {
  return n === 1 ? 'as it is' : 'as they are';
}

function count(n: number, one: string, many = `${one}s`): string {
  return `${n} ${n === 1 ? one : many}`;
}
