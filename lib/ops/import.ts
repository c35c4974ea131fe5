/** import: reads what an older deployment has on this host, or in files, and reports it. Changes nothing. */
import type { Ipv4, Mac } from '../core/address.ts';
import { rangeContains } from '../core/address.ts';
import { KvmIbError } from '../core/errors.ts';
import type { Config } from '../core/mapping.ts';
import { mappingsOf } from '../core/state.ts';
import type { Journal } from '../import/journal.ts';
import type { RuleSource } from '../import/pairs.ts';
import type { JournalPhase } from '../import/phase.ts';
import type { Analysis, GuestNic } from '../import/report.ts';
import { analyse } from '../import/report.ts';
import { suggestConfig } from '../import/suggest.ts';
import { isAddressListing, parseAddressListing } from '../iptables/address-listing.ts';
import type { Iptables, SavedRules } from '../iptables/port.ts';
import { looksSaved, parseSaved } from '../iptables/save.ts';
import { parseScript } from '../iptables/script.ts';
import type { Parsed, Variant } from '../iptables/table.ts';
import type { AddressTable, StandingAddress } from '../link/ports.ts';
import type { Host } from './host.ts';
import { unfinishedImport } from './sync.ts';

export type Guests = () => Promise<
  | { readonly kind: 'asked'; readonly nics: readonly GuestNic[] }
  /** Neither libvirt nor any guest is on this machine. */
  | { readonly kind: 'absent' }
  /** There are guests, and libvirt does not answer. */
  | { readonly kind: 'silent' }
>;

export interface JournalStore {
  readonly path: string;
  /** @throws KvmIbError `failed` when it cannot be understood */
  read(): { readonly phase: JournalPhase; readonly journal: Journal } | undefined;
  write(journal: Journal): void;
  setPhase(phase: JournalPhase): void;
  /** Keeps the rules of before beside the journal. */
  backup(variant: Variant, journal: Journal, text: string): void;
  /** Keeps the journal of an import that stands while another one comes. */
  keep(journal: Journal): void;
  /** Makes the kept journal of that start the journal again. */
  restore(started: string): void;
  remove(): void;
}

/** What an import needs besides `Host`. */
export interface ImportHost {
  readonly iptables: Iptables;
  readonly addresses: AddressTable;
  readonly guests: Guests;
  /** Who answers for an address by ARP. */
  neighbours(): ReadonlyMap<Ipv4, ReadonlySet<Mac>>;
  readonly journal: JournalStore;
  /** NAT chains of nf_tables that are neither iptables' nor ours. */
  foreignNat(): Promise<readonly string[]>;
}

export type Progress = (done: number, all: number) => void;

/** An analysis of a host, and what it was made from. */
export interface HostAnalysis extends Analysis {
  readonly saved: readonly SavedRules[];
  readonly sources: readonly RuleSource[];
  readonly addresses: readonly StandingAddress[];
  /** The table of kvm-ib is there. */
  readonly loaded: boolean;
  /** There are guests, and libvirt does not say whose they are. */
  readonly libvirtSilent: boolean;
  /** Where an import stands that is not done. */
  readonly phase: JournalPhase | undefined;
}

/** Reads this host. @throws KvmIbError `host-lacks` or `failed` when its rules cannot be read whole */
export async function analyseHost(
  host: Pick<Host, 'config' | 'store' | 'nat'>,
  ports: ImportHost,
  progress?: Progress,
): Promise<HostAnalysis> {
  const { saved, warnings } = await ports.iptables.save();
  const sources = saved.map((one): RuleSource & { skipped: Parsed['skipped'] } => {
    const { tables, skipped } = parseSaved(one.text);
    return { variant: one.variant, name: `iptables-${one.variant}`, tables, skipped };
  });
  const addresses = await ports.addresses.standing();
  const guests = await ports.guests();
  const { files, unreadable } = host.store.all();
  const [bad] = unreadable;
  if (bad !== undefined) {
    throw new KvmIbError('failed', `Cannot read the state file ${bad.path}`, {
      why: `${bad.why}; what kvm-ib has on this host is not known`,
      fix: `look at it, or move it away: mv ${bad.path} ${bad.path}.bad`,
    });
  }
  const { table } = await host.nat.lookup([]);
  const analysis = analyse(
    {
      config: host.config,
      sources,
      skipped: sources.flatMap(({ name, skipped }) => skipped.map((line) => ({ ...line, source: name }))),
      addresses,
      nics: guests.kind === 'asked' ? guests.nics : undefined,
      neighbours: ports.neighbours(),
      held: files.flatMap((file) => mappingsOf(file).map((mapping) => ({ owner: file.owner, mapping }))),
      loaded: table,
    },
    progress,
  );
  const phase = host.store.importPhase();
  const unfinished = phase === undefined || phase === 'applied' ? undefined : unfinishedImport(phase);
  const chains = await ports.foreignNat();
  const silent = guests.kind === 'silent';
  const all = [
    ...(unfinished === undefined ? [] : [`${unfinished.why}; ${unfinished.fix}`]),
    ...warnings,
    ...(guests.kind === 'absent' ? ['there is no libvirt: every pair becomes a manual mapping'] : []),
    ...(silent ? ['libvirt does not answer: whose the pairs are is not known'] : []),
    ...chains.map(
      (chain) => `NAT chain ${chain} of nft is not compared: look at it yourself (nft list chain ${chain})`,
    ),
    ...(sources.filter(hasNatRules).length > 1
      ? ['both iptables-legacy and iptables-nft have rules here: where both decide, it matters which was there first']
      : []),
  ];
  return {
    ...analysis,
    report: { ...analysis.report, warnings: all },
    saved,
    sources,
    addresses,
    loaded: table,
    libvirtSilent: silent,
    phase,
  };
}

function hasNatRules({ tables }: RuleSource): boolean {
  return [...(tables.get('nat')?.chains.values() ?? [])].some(({ rules }) => rules.length > 0);
}

/** More than any host has; a file that is larger is not what it is taken for. */
export const MAX_INPUT = 64 * 1024 * 1024;

interface InputFile {
  readonly name: string;
  readonly text: string;
}

function parseFiles(files: readonly InputFile[]): readonly (Parsed & { readonly name: string })[] {
  return files.map(({ name, text }) => {
    if (text.includes('\0')) {
      throw new KvmIbError('bad-input', `Cannot import ${name}`, {
        why: 'it is not a text',
        fix: 'give the output of `iptables-save`, or the script that sets the rules',
      });
    }
    const isSaved = looksSaved(text);
    const one = isSaved ? parseSaved(text) : isAddressListing(text) ? parseAddressListing(text) : parseScript(text);
    const rules = [...one.tables.values()]
      .flatMap(({ chains }) => [...chains.values()])
      .some((chain) => chain.rules.length > 0);
    if (!rules && !isSaved && one.addresses.length === 0 && one.skipped.length === 0) {
      throw new KvmIbError('bad-input', `Cannot import ${name}`, {
        why: 'it is neither what iptables-save prints nor a script with iptables or `ip addr` commands',
        fix: 'give the output of `iptables-save`, or the script that sets the rules',
      });
    }
    return { name, ...one };
  });
}

/** What to write where there is no configuration yet, from files or from this host. */
export function suggestFromFiles(files: readonly InputFile[]): string | undefined {
  const parsed = parseFiles(files);
  const sources = parsed.map(({ name, tables }): RuleSource => ({ variant: null, name, tables }));
  return suggestConfig(
    sources,
    parsed.flatMap(({ addresses }) => addresses.map((one) => ({ device: one.device, address: one.address as Ipv4 }))),
  );
}

export async function suggestFromHost({
  iptables,
  addresses,
}: Pick<ImportHost, 'iptables' | 'addresses'>): Promise<string | undefined> {
  const { saved } = await iptables.save();
  const sources = saved.map(
    ({ variant, text }): RuleSource => ({ variant, name: variant, tables: parseSaved(text).tables }),
  );
  return suggestConfig(sources, await addresses.standing());
}

/**
 * Reads files: what iptables-save printed, or scripts. All that a script says counts as one host's.
 * @throws KvmIbError `bad-input` naming the file when there is nothing of iptables in it
 */
export function analyseFiles(config: Config, files: readonly InputFile[], progress?: Progress): Analysis {
  const parsed = parseFiles(files);
  const addresses = parsed.flatMap((one) =>
    one.addresses.map((entry): StandingAddress => {
      const address = entry.address as Ipv4;
      // Which one was first is not known; what is no IB address is taken for the host's own.
      const secondary = config.networks.some((network) => rangeContains(network.addresses, address));
      return { ...entry, address, secondary, broadcast: null, scope: 0 };
    }),
  );
  const tellsAddresses = parsed.some((one) => one.addresses.length > 0);
  const { report, removed } = analyse(
    {
      config,
      sources: parsed.map(({ name, tables }) => ({ variant: null, name, tables })),
      skipped: parsed.flatMap(({ name, skipped }) => skipped.map((line) => ({ ...line, source: name }))),
      addresses: tellsAddresses ? addresses : undefined,
      nics: undefined,
      neighbours: new Map(),
      held: [],
      loaded: false,
    },
    progress,
  );
  const warnings = [
    'files do not say which guests run: every pair is shown as a manual mapping',
    ...(tellsAddresses
      ? []
      : [
          'nothing says which addresses are on the links: each pair is taken to have its alias (give `ip -4 address` as well)',
        ]),
  ];
  return { report: { ...report, warnings }, removed };
}
