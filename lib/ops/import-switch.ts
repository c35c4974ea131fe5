/**
 * The switch from old rules to the table of kvm-ib, and back, without losing a packet of a live connection.
 *
 * Over: journal and backup, state files, the table with all pairs in one transaction, our aliases beside the old
 * addresses, the old addresses off, the old rules out in one transaction for each part of iptables. The table decides
 * before iptables does, and both translate alike, so it does not matter when the old rules go. They go last, since
 * connection tracking must never be without a user.
 * Back: the old rules in, the old addresses on, our aliases off, our pairs out.
 *
 * Every step can be done again, so whoever is stopped goes on from the journal, either way.
 */
import type { Ipv4 } from '../core/address.ts';
import { KvmIbError, toKvmIbError } from '../core/errors.ts';
import type { Mapping, Owner } from '../core/mapping.ts';
import { ownerName, sameMapping } from '../core/mapping.ts';
import type { Change, ObservedBridge } from '../core/plan.ts';
import { describe, plan } from '../core/plan.ts';
import { servedNetworks } from '../core/served.ts';
import type { StateFile } from '../core/state.ts';
import { mappingsOf } from '../core/state.ts';
import type { Comparison } from '../import/compare.ts';
import type { BridgeSetting, Journal, JournalMapping, JournalRules } from '../import/journal.ts';
import { JOURNAL_VERSION } from '../import/journal.ts';
import type { JournalPhase } from '../import/phase.ts';
import type { Acceptance, ImportReport } from '../import/report.ts';
import { acceptanceFor, differingCases, groupBy, isOf, unaccepted } from '../import/report.ts';
import { returnPlan, textsOf } from '../iptables/change.ts';
import type { StandingAddress } from '../link/ports.ts';
import { announceAll } from './apply.ts';
import type { Host } from './host.ts';
import type { HostAnalysis, ImportHost, Progress } from './import.ts';
import { analyseHost } from './import.ts';
import { addressKey, adopt, giveBack } from './import-addresses.ts';
import { NAT, readNat, ruleKey, takeRules, verify } from './import-rules.ts';
import { neededSpec, observeBridge, ownAddressInRange, pairOf, refuseMissingLinks, tableSpec } from './observe.ts';
import { createProbing } from './probe.ts';
import type { ReconcileResult } from './reconcile.ts';
import { reconcileLocked } from './reconcile.ts';
import { activeFile, loadTable, stateFile, unfinishedImport } from './sync.ts';

const WHO = 'import';

export interface SwitchOptions {
  readonly accepted: readonly Acceptance[];
  /** True: whose the guests are is not asked for; all become manual mappings. */
  readonly manual: boolean;
  /** How the command was called, for what is to be typed next. */
  readonly command?: string;
  /** Told of each step, with how much of it is done. */
  readonly onStep?: (step: SwitchStep, done: number, all: number) => void;
}

export type SwitchStep = 'compare' | 'files' | 'table' | 'aliases' | 'rules' | 'reconcile';

export interface SwitchResult {
  readonly report: ImportReport;
  /** Old rules that went, and old addresses. */
  readonly rules: number;
  readonly addresses: number;
  readonly mappings: number;
  /** What reconcile did at the end; undefined: there was nothing to import. */
  readonly reconciled: ReconcileResult | undefined;
  readonly warnings: readonly string[];
}

/** What would be done, a line a change: for `--dry-run` and the report. */
export async function switchPlan(
  host: Pick<Host, 'config' | 'links'>,
  analysis: HostAnalysis,
): Promise<readonly string[]> {
  const journal = journalOf(analysis, '', null);
  const empty = journal.mappings.length === 0;
  const settings = empty ? [] : await bridgeChanges(host);
  const coming = journal.mappings.filter(({ mapped }) => !mapped);
  return [
    ...(analysis.loaded || empty ? [] : ['+ table     ip kvm_ib']),
    ...coming.flatMap(({ mapping }) => [
      `+ element   guest_to_ib ${mapping.guest} : ${mapping.address}`,
      `+ element   ib_to_guest ${mapping.address} : ${mapping.guest}`,
    ]),
    ...journal.mappings.map(
      ({ mapping }) => `+ alias     ${mapping.address}/32 on ${mapping.device} (${mapping.label})`,
    ),
    ...journal.addresses.map((one) => `- alias     ${one.address}/${one.prefixLength} on ${one.device} (${one.label})`),
    ...journal.rules.flatMap(({ variant, removed }) =>
      removed.map(({ chain, text }) => `- rule      iptables-${variant} -t nat -A ${chain} ${text}`),
    ),
    ...settings.flatMap(describe),
  ];
}

/** What reconcile makes of the bridges at the end: their MTU follows the link, their ports let frames turn round where need be. */
async function bridgeChanges(host: Pick<Host, 'config' | 'links'>): Promise<readonly Change[]> {
  const bridges: ObservedBridge[] = [];
  for (const { bridge, device } of host.config.networks) bridges.push(await observeBridge(host, bridge, device));
  const nothing = { guestToIb: new Map(), ibToGuest: new Map(), macs: new Set<string>(), unbound: new Set<Ipv4>() };
  return plan({ want: [], release: [] }, { ...nothing, aliases: [], bridges });
}

/** How the bridges are before that. */
function settingsOf(changes: readonly Change[]): readonly BridgeSetting[] {
  return changes.flatMap((change): readonly BridgeSetting[] => {
    if (change.kind === 'set-mtu') return [{ kind: 'mtu', link: change.link, mtu: change.from }];
    return change.kind === 'set-hairpin' ? [{ kind: 'hairpin', port: change.port, on: !change.on }] : [];
  });
}

/** A port may have gone with its VM. */
async function putSettingsBack(host: Host, settings: readonly BridgeSetting[]): Promise<void> {
  for (const one of settings) {
    try {
      if (one.kind === 'mtu') await host.links.setMtu(one.link, one.mtu);
      else await host.links.setHairpin(one.port, one.on);
    } catch (error) {
      if (!(error instanceof KvmIbError) || error.code !== 'host-lacks') throw error;
    }
  }
}

/**
 * Goes over to the table of kvm-ib.
 * @throws KvmIbError `conflict` before anything is changed: a difference that is not accepted, an address that another host
 *   has, an import that was stopped; otherwise the error of the step that failed, after all was put back;
 *   `reversal-failed` when that failed too
 */
export function importApply(host: Host, ports: ImportHost, options: SwitchOptions): Promise<SwitchResult> {
  return host.withLock(WHO, async () => {
    const before = ports.journal.read();
    refuseStopped(before?.phase, 'Cannot import');
    const analysis = await analyseHost(host, options.manual ? withoutGuests(ports) : ports, (done, all) =>
      options.onStep?.('compare', done, all),
    );
    const none = { report: analysis.report, rules: 0, addresses: 0, mappings: 0, reconciled: undefined };
    if (analysis.report.pairs.length === 0) {
      // Somebody took the old rules out himself: nothing keeps the table from coming any more.
      if (before?.phase === 'rolled-back') ports.journal.remove();
      return { ...none, warnings: analysis.report.warnings };
    }
    refuseUnaccepted(analysis.report.comparisons, options.accepted, options.command);
    if (analysis.libvirtSilent && !options.manual) {
      throw new KvmIbError('conflict', 'Cannot import', {
        why: 'libvirt does not answer, so nobody knows which guests belong to VMs that OpenNebula may end',
        fix: 'bring it back (systemctl restart libvirtd), or make every pair a mapping that only `kvm-ib remove` ends: --manual',
      });
    }
    const earlier = before?.phase === 'applied' ? before.journal.started : null;
    const planned = journalOf(analysis, host.now(), earlier);
    const journal = { ...planned, settings: settingsOf(await bridgeChanges(host)) };
    await refuseMissingLinks(
      host,
      journal.mappings.map(({ mapping }) => mapping),
    );
    const probing = createProbing(host);
    const local = new Set<string>(analysis.addresses.map(({ address }) => address));
    const absent = journal.mappings.map(({ mapping }) => mapping).filter(({ address }) => !local.has(address));
    await probing.ask(absent);
    probing.refuse(absent);
    refuseLeftovers(host, journal, analysis.addresses);
    if (earlier !== null && before !== undefined) ports.journal.keep(before.journal);
    for (const { variant, text } of analysis.saved) ports.journal.backup(variant, journal, text);
    ports.journal.write(journal);
    ports.journal.setPhase('applying');
    try {
      const done = await goOver(host, ports, journal, 'applying', options);
      return {
        ...none,
        ...done,
        warnings: [...analysis.report.warnings, ...probing.warnings(new Set()), ...done.warnings],
      };
    } catch (error) {
      throw await afterFailure(host, ports, journal, error);
    }
  });
}

/** Goes on with an import that was stopped. @throws KvmIbError as `importApply`; `conflict` when there is none */
export function importResume(
  host: Host,
  ports: ImportHost,
  options: Pick<SwitchOptions, 'onStep'>,
): Promise<Omit<SwitchResult, 'report'>> {
  return host.withLock(WHO, async () => {
    const known = ports.journal.read();
    if (known === undefined || (known.phase !== 'applying' && known.phase !== 'switching')) {
      throw new KvmIbError('conflict', 'Cannot go on with an import', {
        why: known === undefined ? 'there was none' : `the last one ${PHASE_WORDS[known.phase]}`,
        fix: known?.phase === 'rolling-back' ? 'go on with `kvm-ib import --rollback`' : 'see `kvm-ib import`',
      });
    }
    return goOver(host, ports, known.journal, known.phase, options);
  });
}

const PHASE_WORDS: Readonly<Record<JournalPhase, string>> = {
  applying: 'was stopped half-way',
  switching: 'was stopped half-way',
  applied: 'is done',
  'rolling-back': 'was stopped on its way back',
  'rolled-back': 'was rolled back',
};

export interface RollbackResult {
  readonly rules: number;
  readonly addresses: number;
  readonly mappings: number;
  /** Mappings that have ended since the import: their rules stay away. */
  readonly ended: readonly string[];
  /** True: the table of kvm-ib is gone, as before the import. */
  readonly tableRemoved: boolean;
  readonly warnings: readonly string[];
}

/**
 * Puts the old rules and addresses back, and takes what the import made away.
 * @throws KvmIbError `conflict` when there is no import, or when mappings came after it that would be cut off
 */
export function importRollback(
  host: Host,
  ports: ImportHost,
  options: { readonly dryRun?: boolean } = {},
): Promise<RollbackResult> {
  return host.withLock(WHO, async () => {
    const known = ports.journal.read();
    if (known === undefined || known.phase === 'rolled-back') {
      throw new KvmIbError('conflict', 'Cannot roll an import back', {
        why: known === undefined ? 'there was none on this host' : 'it has been rolled back already',
        fix: 'see `kvm-ib import`',
      });
    }
    return goBack(host, ports, known.journal, options.dryRun ?? false);
  });
}

function withoutGuests(ports: ImportHost): ImportHost {
  return { ...ports, guests: async () => ({ kind: 'asked', nics: [] }) };
}

function refuseStopped(phase: JournalPhase | undefined, message: string): void {
  if (phase === undefined || phase === 'rolled-back' || phase === 'applied') return;
  throw new KvmIbError('conflict', message, unfinishedImport(phase));
}

/** @throws KvmIbError `conflict` that names what differs, and the option that accepts it */
export function refuseUnaccepted(
  comparisons: readonly Comparison[],
  accepted: readonly Acceptance[],
  command = 'kvm-ib import',
): void {
  const stray = accepted.find((one) => one.address !== undefined && !comparisons.some((c) => isOf(one, c)));
  if (stray !== undefined) {
    throw new KvmIbError('usage', `Cannot accept "${stray.what}@${stray.address}"`, {
      why: 'no comparison is of that address',
      fix: `see which there are: ${command}`,
    });
  }
  const open = unaccepted(comparisons, accepted);
  const [first] = open;
  if (first === undefined) return;
  const cases = differingCases(open);
  const given = accepted.map(({ what, address }) => (address === undefined ? what : `${what}@${address}`));
  throw new KvmIbError('conflict', 'Cannot import', {
    why: `${open.length} of ${comparisons.length} comparisons differ, and that is not accepted: ${cases.join(', ')}; for example ${first.case} of ${first.address ?? first.guest}: before, ${first.old}; after, ${first.new}`,
    fix: `look at each in \`${command}\`; where it is meant to be: ${command} --apply --accept ${[...given, ...acceptanceFor(open, comparisons)].join(',')}`,
  });
}

function journalOf(analysis: HostAnalysis, started: string, earlier: string | null): Journal {
  const { report, removed, sources } = analysis;
  const mappings = report.pairs.map(({ owner, mapping, mapped }): JournalMapping => ({ owner, mapping, mapped }));
  const guests = new Map(removed.map(({ rule, guest }) => [rule, guest]));
  const rules = sources.flatMap((source): readonly JournalRules[] => {
    const table = source.tables.get(NAT);
    if (table === undefined || source.variant === null) return [];
    const chains = [...table.chains.values()];
    const gone = chains.flatMap(({ rules: all }) =>
      all.flatMap((rule) => {
        const guest = guests.get(rule);
        return guest === undefined ? [] : [{ chain: rule.chain, text: rule.text, guest }];
      }),
    );
    if (gone.length === 0) return [];
    const before = Object.fromEntries(chains.map((chain) => [chain.name, textsOf(chain)]));
    return [{ variant: source.variant, before, removed: gone }];
  });
  const addresses = report.pairs.flatMap((pair) => pair.aliases);
  return {
    version: JOURNAL_VERSION,
    started,
    earlier,
    loaded: analysis.loaded,
    mappings,
    rules,
    addresses,
    settings: [],
    promoting: promotingLinks(addresses, analysis.addresses),
  };
}

/**
 * An address that would be taken for the host's own stands in the way of all guests: an alias without a label and without
 * a pair, say.
 * @throws KvmIbError `conflict` naming it
 */
function refuseLeftovers(host: Host, journal: Journal, all: readonly StandingAddress[]): void {
  const going = new Set(journal.addresses.map(addressKey));
  const left = all.filter((one) => !going.has(addressKey(one)));
  const spec = tableSpec(servedNetworks(host.config.networks, []), left);
  for (const network of host.config.networks) {
    const error = ownAddressInRange(network, spec.hostAddresses.get(network.name) ?? []);
    if (error !== undefined) {
      throw new KvmIbError('conflict', 'Cannot import', {
        why: `${error.why}, and no pair translates it`,
        fix: 'take it off the link if nobody needs it (ip address del), or leave it out of the ranges in the configuration',
      });
    }
  }
}

/** Links where an address goes that others of its subnet are secondary to. */
function promotingLinks(going: readonly StandingAddress[], all: readonly StandingAddress[]): readonly string[] {
  const first = going.filter((one) => !one.secondary && one.prefixLength < 32);
  const links = first.filter((one) => all.some((other) => other.device === one.device && other.secondary));
  return [...new Set(links.map(({ device }) => device))];
}

type Done = Omit<SwitchResult, 'report'>;

/** All steps, each of which may have been done before. */
async function goOver(
  host: Host,
  ports: ImportHost,
  journal: Journal,
  phase: 'applying' | 'switching',
  { onStep }: Pick<SwitchOptions, 'onStep'>,
): Promise<Done> {
  const step =
    (name: SwitchStep): Progress =>
    (done, all) =>
      onStep?.(name, done, all);
  if (phase === 'applying') {
    writeFiles(host, journal, step('files'));
    ports.journal.setPhase('switching');
  }
  const { files } = host.store.all();
  const standing = standingOf(journal, files);
  const mappings = files.flatMap(mappingsOf);
  const old = new Set(journal.addresses.map((one) => addressKey(one)));
  const all = await ports.addresses.standing();
  const others = all.filter((one) => !old.has(addressKey(one)));

  step('table')(0, 1);
  const spec = neededSpec(host, mappings, others, false);
  await loadTable(host, spec, mappings, await host.nat.list(spec), 'keep');

  const fresh = await adopt(ports, journal, standing, all, step('aliases'));
  step('rules')(0, 1);
  await takeRules(ports, journal);
  // Also those that went before it was stopped.
  const rules = journal.rules.reduce((sum, { removed }) => sum + removed.length, 0);
  ports.journal.setPhase('applied');

  step('reconcile')(0, 1);
  const announced = await announceAll(host, fresh);
  const reconciled = await reconcileLocked(host, false);
  return {
    rules,
    addresses: journal.addresses.length,
    mappings: standing.length,
    reconciled,
    warnings: [
      ...announced.warnings,
      ...reconciled.warnings,
      ...reconciled.errors.map((error) => `${error.message}: ${error.why ?? ''}`),
    ],
  };
}

/** Mappings of the import that still have their file. */
function standingOf(journal: Journal, files: readonly StateFile[]): readonly Mapping[] {
  const held = new Map(files.flatMap((file) => file.mappings.map((mapping) => [mapping.guest, mapping] as const)));
  return journal.mappings.flatMap(({ mapping }) => {
    const now = held.get(mapping.guest);
    return now !== undefined && now.address === mapping.address ? [mapping] : [];
  });
}

function writeFiles(host: Host, journal: Journal, progress: Progress): void {
  const byOwner = new Map<string, { owner: Owner; mappings: Mapping[] }>();
  for (const { owner, mapping, mapped } of journal.mappings) {
    if (mapped) continue;
    const name = ownerName(owner);
    const known = byOwner.get(name) ?? { owner, mappings: [] };
    known.mappings.push(mapping);
    byOwner.set(name, known);
  }
  let done = 0;
  for (const { owner, mappings } of byOwner.values()) {
    const before = host.store.read(owner);
    const rest = (before?.mappings ?? []).filter((old) => !mappings.some((one) => one.guest === old.guest));
    host.store.write(activeFile(host, owner, [...rest, ...mappings], before?.detachedAliases));
    done += 1;
    if (done % 100 === 0) progress(done, byOwner.size);
  }
}

/** What to throw after a step failed: all is put back, or the journal says how to do it. */
async function afterFailure(host: Host, ports: ImportHost, journal: Journal, cause: unknown): Promise<KvmIbError> {
  const error = toKvmIbError(cause, 'Cannot import');
  try {
    await goBack(host, ports, journal, false);
  } catch (reversal) {
    const { message, why } = toKvmIbError(reversal);
    return new KvmIbError('reversal-failed', error.message, {
      why: `${error.why ?? 'a step failed'}; and going back failed too: ${message}: ${why ?? ''}`,
      fix:
        'go on with `kvm-ib import --resume`, or back with `kvm-ib import --rollback`; the old rules are kept beside ' +
        ports.journal.path,
      cause,
    });
  }
  return error;
}

async function goBack(host: Host, ports: ImportHost, journal: Journal, dryRun: boolean): Promise<RollbackResult> {
  const { files } = host.store.all();
  const phase = ports.journal.read()?.phase;
  const standing = new Set<string>(standingOf(journal, files).map(({ guest }) => guest));
  // Before the switch, and on the way back, a mapping without a file has not ended: it was not there yet, or is gone again.
  const isSettled = phase === 'applied' || phase === 'switching';
  const back = new Set(
    journal.mappings.map(({ mapping }) => mapping.guest).filter((guest) => !isSettled || standing.has(guest)),
  );
  const backAddresses = new Set(
    journal.mappings.filter(({ mapping }) => back.has(mapping.guest)).map(({ mapping }) => mapping.address),
  );
  const ours = journal.mappings.filter(({ mapped }) => !mapped).map(({ mapping }) => mapping);
  const after = files.flatMap((file) => file.mappings.map((mapping) => ({ owner: file.owner, mapping })));
  const imported = new Map<string, string>(journal.mappings.map(({ mapping }) => [mapping.guest, mapping.address]));
  const later = after.filter(({ mapping }) => imported.get(mapping.guest) !== mapping.address);
  const [stranger] = later;
  if (!journal.loaded && stranger !== undefined) {
    throw new KvmIbError('conflict', 'Cannot roll the import back', {
      why: `mappings came after it and would be cut off: ${later
        .slice(0, 5)
        .map(({ owner, mapping }) => `${mapping.guest} of ${ownerName(owner)}`)
        .join(', ')}${later.length > 5 ? ', …' : ''}`,
      fix: `end them first: shut the VM down, or kvm-ib remove ${stranger.owner.kind === 'vm' ? `--vm ${stranger.owner.vm}` : `--guest ${stranger.mapping.guest}`}`,
    });
  }
  const ended = journal.mappings
    .filter(({ mapping }) => !back.has(mapping.guest))
    .map(({ owner, mapping }) => `${mapping.guest} <-> ${mapping.address} of ${ownerName(owner)}`);
  const returning = journal.addresses.filter(({ address }) => backAddresses.has(address));
  const plans = [];
  for (const { variant, before, removed } of journal.rules) {
    const table = await readNat(ports, variant);
    const wanted = new Map(removed.map(({ chain, text, guest }) => [ruleKey(chain, text), guest]));
    const isWanted = (rule: { chain: string; text: string }): boolean => {
      const guest = wanted.get(ruleKey(rule.chain, rule.text));
      return guest !== undefined && back.has(guest);
    };
    plans.push({ variant, back: returnPlan(table, new Map(Object.entries(before)), isWanted) });
  }
  const result: RollbackResult = {
    rules: journal.rules.flatMap((one) => one.removed).filter(({ guest }) => back.has(guest)).length,
    addresses: returning.length,
    mappings: ours.filter(({ guest }) => back.has(guest)).length,
    ended,
    tableRemoved: !journal.loaded,
    warnings: [],
  };
  if (dryRun) return result;

  // What has ended stays away, also if this is stopped and done again.
  ports.journal.write({
    ...journal,
    mappings: journal.mappings.filter(({ mapping }) => back.has(mapping.guest)),
    rules: journal.rules.map((one) => ({ ...one, removed: one.removed.filter(({ guest }) => back.has(guest)) })),
    addresses: returning,
  });
  ports.journal.setPhase('rolling-back');
  for (const one of plans) {
    if (one.back.text === '') continue;
    await ports.iptables.restore(one.variant, one.back.text);
    verify(one.variant, await readNat(ports, one.variant), one.back.expected);
  }
  await giveBack(ports, returning, ours);
  if (journal.loaded) await takePairs(host, ours);
  else {
    await putSettingsBack(host, journal.settings);
    await host.nat.remove();
    host.store.writeTable(undefined);
  }
  removeFiles(host, ours, journal);
  if (journal.earlier !== null) {
    // The import before this one stands, and is the next to go back.
    ports.journal.setPhase('applied');
    ports.journal.restore(journal.earlier);
  } else if (journal.loaded) ports.journal.remove();
  else ports.journal.setPhase('rolled-back');
  return result;
}

/** The pairs go, the flows stay: the old rules translate them the same way. */
async function takePairs(host: Host, mappings: readonly Mapping[]): Promise<void> {
  const observed = { ...(await host.nat.lookup(mappings.map(pairOf))), aliases: [], bridges: [] };
  for (const change of plan({ want: [], release: mappings }, observed)) {
    if (change.kind === 'change-pairs') await host.nat.change(change);
  }
}

function removeFiles(host: Host, ours: readonly Mapping[], journal: Journal): void {
  const owners = new Map(journal.mappings.map(({ owner }) => [ownerName(owner), owner]));
  const own = groupBy(ours, ({ guest }) => guest);
  for (const owner of owners.values()) {
    const file = host.store.read(owner);
    if (file === undefined) continue;
    const rest = file.mappings.filter((mapping) => !own.get(mapping.guest)?.some((one) => sameMapping(one, mapping)));
    if (rest.length === file.mappings.length) continue;
    if (rest.length === 0) host.store.remove(owner);
    else host.store.write({ ...stateFile(host, owner, file.phase, rest), detachedAliases: file.detachedAliases });
  }
}
