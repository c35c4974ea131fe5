#!/usr/bin/env node
/** The command `kvm-ib`. Each command reads its options, calls one operation of `ops/`, and shows the result. */
import { Command, CommanderError, Option } from 'commander';
import type { Ipv4 } from '../core/address.ts';
import { parseIpv4, parseMac } from '../core/address.ts';
import { bridgeAddress, resolveMapping } from '../core/config.ts';
import type { ExitStatus } from '../core/errors.ts';
import { EXIT, errorReport, KvmIbError, printable, toKvmIbError } from '../core/errors.ts';
import type { Mapping, Network, Owner } from '../core/mapping.ts';

import type { Change } from '../core/plan.ts';
import { describe } from '../core/plan.ts';
import { readConfig } from '../host/config-file.ts';
import { createLinks } from '../host/links.ts';
import { pathsFrom } from '../host/paths.ts';
import { ownIdentity } from '../host/process.ts';
import { createStatusFile } from '../host/status-file.ts';
import { createStore } from '../host/store.ts';
import { createHost, repeatAnnouncements, requireRights } from '../host/this-host.ts';
import { networkXml } from '../libvirt/network.ts';
import type { Selection } from '../ops/announce.ts';
import { announce } from '../ops/announce.ts';
import { worstOf } from '../ops/check.ts';
import type { Host } from '../ops/host.ts';
import type { Outdated } from '../ops/inspect.ts';
import { list, status } from '../ops/inspect.ts';
import { reconcileAndPublish } from '../ops/publish.ts';
import { refuseUnderOldRules, sync } from '../ops/sync.ts';
import { teardown } from '../ops/teardown.ts';
import { addDoctorCommand } from './doctor.ts';
import { configFindings, firewallFindings } from './facts.ts';
import { addImportCommand } from './import.ts';
import { addInstallCommands } from './install.ts';
import { renderFindings, renderPlan, table, wantsColour } from './render.ts';

declare const KVM_IB_VERSION: string | undefined;
const VERSION = typeof KVM_IB_VERSION === 'string' ? KVM_IB_VERSION : 'development';

interface CommonOptions {
  readonly config?: string;
  readonly json?: boolean;
  readonly dryRun?: boolean;
}

const EXIT_CODES = `
Exit codes:
  0  done                                    5  not permitted
  1  failed (reconcile: the rest was done)   6  the host lacks something
  2  wrong use or bad configuration          7  the host lock was not obtained
  3  drift found (status)                    8  failed, and undoing it failed too
  4  conflict: the address has another owner

Files:
  /etc/kvm-ib/kvm-ib.yaml   configuration (KVM_IB_CONFIG, --config)
  /var/lib/kvm-ib/          what this host should have (KVM_IB_STATE_DIR)
  /run/kvm-ib/status        what the last reconcile found, for OpenNebula's probes (KVM_IB_RUN_DIR)
`;

let exitStatus: ExitStatus = EXIT.done;
let asJson = false;
const colour = wantsColour(process.stdout, process.env);

// `kvm-ib list | head`: whoever reads may stop reading. What was begun goes on to its end, unheard.
for (const stream of [process.stdout, process.stderr]) {
  stream.on('error', (error: NodeJS.ErrnoException) => {
    // Nobody can be told of any other either; the exit status says that something went wrong.
    if (error.code !== 'EPIPE') process.exitCode = EXIT.failed;
  });
}

try {
  if (!(await repeatAnnouncements(process.argv))) {
    const root = program();
    refuseUnknownCommand(root, ...process.argv.slice(2));
    await root.parseAsync(process.argv);
  }
} catch (cause) {
  exitStatus = report(cause);
}
process.exitCode = exitStatus;

/** commander shows the general help, with success, for `kvm-ib nonsense --help`. */
function refuseUnknownCommand(root: Command, word?: string, ...rest: readonly string[]): void {
  if (word === undefined || word.startsWith('-')) return;
  const known = root.commands.find((one) => one.name() === word);
  if (known === undefined && word !== 'help') root.error(`error: unknown command '${printable(word, 40)}'`);
  if (known !== undefined && known.commands.length > 0) refuseUnknownCommand(known, ...rest);
}

function program(): Command {
  const root = new Command('kvm-ib')
    .description('A real IPoIB address for every KVM guest, by 1-to-1 NAT on this host.')
    .version(VERSION)
    .exitOverride()
    .showHelpAfterError('(see `kvm-ib --help`)')
    .addHelpText(
      'before',
      `Examples:
  kvm-ib add --guest 192.168.122.2              map a guest by hand
  kvm-ib list                                   every mapping of this host
  kvm-ib status                                 what differs from the kernel
  kvm-ib reconcile --dry-run                    what would be brought right
  kvm-ib announce                               tell the fabric again where the addresses are
  kvm-ib doctor                                 is this machine set up right?
`,
    )
    .addHelpText('after', EXIT_CODES);

  command(
    root,
    'add',
    'Map a guest address to an IB address',
    ['dry-run'],
    [
      'kvm-ib add --guest 192.168.122.2',
      'kvm-ib add --guest 192.168.122.2 --address 192.168.10.204 --mac 02:00:c0:a8:7a:02',
      'kvm-ib add --guest 192.168.122.2 --vm 42 --nic 0',
    ],
  )
    .requiredOption('--guest <address>', "the guest NIC's own address")
    .option('--address <address>', 'its IB address; default: the one of the same place in the range')
    .option('--mac <mac>', 'its hardware address; without one any source MAC may use the guest address')
    .option('--vm <id>', 'the VM that it belongs to: reconcile releases it when the VM is gone')
    .option('--nic <n>', 'the NIC of that VM')
    .action(add);
  command(
    root,
    'remove',
    'Take mappings away',
    ['dry-run'],
    ['kvm-ib remove --guest 192.168.122.2', 'kvm-ib remove --vm 42'],
  )
    .addOption(new Option('--guest <address>', 'the mapping of this guest address').conflicts('vm'))
    .option('--vm <id>', 'all mappings of this VM')
    .action(remove);
  command(
    root,
    'list',
    'Show every mapping that this host should have',
    [],
    ['kvm-ib list', 'kvm-ib list --json'],
  ).action(showList);
  command(
    root,
    'status',
    'Compare configuration, files and kernel: exit code 3 when they differ; also names mappings of an older configuration',
    [],
    ['kvm-ib status', 'kvm-ib status --json'],
  ).action(showStatus);
  command(
    root,
    'reconcile',
    'Make the kernel equal to the files; end what VMs left behind',
    ['dry-run'],
    ['kvm-ib reconcile', 'kvm-ib reconcile --dry-run'],
  )
    .option('--quiet', 'print nothing when nothing was to do')
    .action(runReconcile);
  command(
    root,
    'announce',
    'Tell the fabric again where IB addresses are',
    ['dry-run'],
    ['kvm-ib announce', 'kvm-ib announce 192.168.10.202', 'kvm-ib announce --vm 42'],
  )
    .argument('[address...]', 'guest or IB addresses; without any, and without --vm: all')
    .addOption(new Option('--vm <id>', 'all of this VM').conflicts('all'))
    .option('--all', 'every alias of kvm-ib that is on its link')
    .action(runAnnounce);
  const config = root
    .command('config')
    .description('The configuration')
    .addHelpText('before', 'Examples:\n  kvm-ib config check\n');
  command(
    config,
    'check',
    'Validate the configuration, and hold it against this host',
    [],
    ['kvm-ib config check'],
  ).action(configCheck);
  command(
    root,
    'network-xml',
    "Print the libvirt network for a network's bridge",
    [],
    [
      'kvm-ib network-xml > net.xml && virsh net-define net.xml',
      'kvm-ib network-xml --network ib --bridge-address 192.168.122.1',
    ],
  )
    .option('--network <name>', 'which network; needed when there are several')
    .option(
      '--bridge-address <address>',
      "the host's address on the bridge, the guests' gateway; default: the first free one of their /24",
    )
    .option('--mtu <bytes>', 'default: the MTU of the IPoIB link')
    .action(printNetworkXml);
  command(
    root,
    'teardown',
    'Take all of kvm-ib off this host: aliases, table, state',
    ['dry-run'],
    ['kvm-ib teardown --dry-run', 'kvm-ib teardown'],
  )
    .option('--force', 'also while VMs are mapped')
    .action(runTeardown);
  addDoctorCommand(root, { version: VERSION, colour, command, useJson, exit, out, warn, json });
  addImportCommand(root, { colour, command, open, useJson, exit, out, warn, json });
  addInstallCommands(root, { version: VERSION, colour, command, useJson, exit, out, warn, json });
  return root;
}

function command(
  parent: Command,
  name: string,
  description: string,
  also: readonly 'dry-run'[],
  examples: readonly string[],
): Command {
  const made = parent
    .command(name)
    .description(description)
    .option('--config <file>', 'configuration file')
    .option('--json', 'print JSON')
    .addHelpText('before', `Examples:\n${examples.map((line) => `  ${line}\n`).join('')}`);
  return also.includes('dry-run') ? made.option('--dry-run', 'show the plan and change nothing') : made;
}

async function open(options: CommonOptions, what: string): Promise<Host> {
  asJson = options.json ?? false;
  const paths = pathsFrom(process.env);
  const file = options.config ?? paths.config;
  const config = readConfig(file);
  requireRights(`Cannot run kvm-ib ${what}`, `run it as root: sudo kvm-ib ${what}`);
  return createHost({ ...paths, config: file }, config, import.meta.url);
}

interface AddOptions extends CommonOptions {
  readonly guest: string;
  readonly address?: string;
  readonly mac?: string;
  readonly vm?: string;
  readonly nic?: string;
}

async function add(options: AddOptions): Promise<void> {
  asJson = options.json ?? false;
  const guest = parseIpv4(options.guest, '--guest');
  const address = options.address === undefined ? undefined : parseIpv4(options.address, '--address');
  const mac = options.mac === undefined ? null : parseMac(options.mac, '--mac');
  if ((options.vm === undefined) !== (options.nic === undefined)) {
    throw new KvmIbError('usage', 'Cannot add the mapping', {
      why: '--vm and --nic go together',
      fix: 'give both or neither',
    });
  }
  const vm = options.vm === undefined ? null : parseNumber(options.vm, '--vm', 99_999_999);
  const nic = options.nic === undefined ? null : parseNumber(options.nic, '--nic', 99);
  const host = await open(options, 'add');
  refuseUnderOldRules(host, 'Cannot add the mapping', ['switching']);
  const mapping = resolveMapping(host.config, { guest, address, mac, vm, nic });
  const owner: Owner = vm === null ? { kind: 'manual', guest } : { kind: 'vm', vm };
  const others = (host.store.read(owner)?.mappings ?? []).filter(
    (m) => m.nic !== mapping.nic && m.guest !== mapping.guest,
  );
  await change(host, owner, [...others, mapping], 'add', options);
}

type TimedResult = Awaited<ReturnType<typeof sync>>;

interface RemoveOptions extends CommonOptions {
  readonly guest?: string;
  readonly vm?: string;
}

async function remove(options: RemoveOptions): Promise<void> {
  asJson = options.json ?? false;
  if ((options.guest === undefined) === (options.vm === undefined)) {
    throw new KvmIbError('usage', 'Cannot remove a mapping', {
      why: 'it is not said which',
      fix: 'give --guest or --vm',
    });
  }
  if (options.vm !== undefined) {
    const owner: Owner = { kind: 'vm', vm: parseNumber(options.vm, '--vm', 99_999_999) };
    const host = await open(options, 'remove');
    if (host.store.read(owner) === undefined) throw noMapping(`VM ${owner.vm}`);
    await change(host, owner, [], 'remove', options);
    return;
  }
  const guest = parseIpv4(options.guest ?? '', '--guest');
  const host = await open(options, 'remove');
  const file = host.store.holderOf(guest);
  if (file === undefined || !file.mappings.some((m) => m.guest === guest)) throw noMapping(`guest ${guest}`);
  if (file.owner.kind === 'static') {
    throw new KvmIbError('conflict', `Cannot remove the mapping of ${guest}`, {
      why: 'it stands under `static` in the configuration',
      fix: 'take it out there, then run `kvm-ib reconcile`',
    });
  }
  const rest = file.mappings.filter((m) => m.guest !== guest);
  await change(host, file.owner, rest, 'remove', options);
}

function noMapping(what: string): KvmIbError {
  return new KvmIbError('failed', `Cannot remove the mapping of ${what}`, {
    why: 'it has none',
    fix: 'see `kvm-ib list`',
  });
}

async function change(
  host: Host,
  owner: Owner,
  wish: readonly Mapping[],
  action: string,
  options: CommonOptions,
): Promise<void> {
  const result = await sync(host, { owner, wish, action, holder: ownIdentity(), dryRun: options.dryRun ?? false });
  showSync(result, action, wish, options);
}

function showSync(result: TimedResult, action: string, wish: readonly Mapping[], options: CommonOptions): void {
  warn(result.warnings);
  const probe = Math.round(result.timings.probe);
  const total = Math.round(result.timings.total);
  if (options.json) {
    const { owner, changes, flushed, warnings } = result;
    json({
      owner,
      dryRun: options.dryRun ?? false,
      mappings: wish,
      changes,
      plan: changes.flatMap(describe),
      flushed,
      warnings,
      timings: { probe, total },
    });
    return;
  }
  showChanges(result.changes, options);
  if (action !== 'add' || options.dryRun || result.changes.length === 0) return;
  out(`Took ${total - probe} ms${probe === 0 ? ', without a probe' : `, and ${probe} ms for the probe`}.\n`);
}

function showChanges(changes: readonly Change[], options: CommonOptions): void {
  out(renderPlan(changes, colour));
  if (options.dryRun) out(changes.length === 0 ? 'Nothing would change.\n' : 'Nothing was changed (--dry-run).\n');
  else if (changes.length === 0) out('Nothing to change.\n');
}

function showList(options: CommonOptions): void {
  asJson = options.json ?? false;
  const { entries, unreadable } = list({ store: createStore(pathsFrom(process.env).state) });
  warn(unreadable.map(({ path, why }) => `${path}: ${why}`));
  if (options.json) {
    json(entries);
    return;
  }
  if (entries.length === 0) {
    out('No mappings.\n');
    return;
  }
  out(
    table(entries, [
      { title: 'NETWORK', value: (e) => e.network },
      { title: 'DEVICE', value: (e) => e.device },
      { title: 'GUEST', value: (e) => e.guest },
      { title: 'ADDRESS', value: (e) => e.address },
      { title: 'VM', value: (e) => e.vm },
      { title: 'NIC', value: (e) => e.nic },
      { title: 'MAC', value: (e) => e.mac },
      { title: 'LABEL', value: (e) => e.label },
      { title: 'OWNER', value: (e) => e.owner },
      { title: 'STATE', value: (e) => e.state },
    ]),
  );
}

async function showStatus(options: CommonOptions): Promise<void> {
  const result = await status(await open(options, 'status'));
  warn(result.warnings);
  if (!result.ok) exitStatus = EXIT.drift;
  if (options.json) {
    json(result);
    return;
  }
  if (result.ok) {
    out(`OK: ${result.mappings} ${result.mappings === 1 ? 'mapping' : 'mappings'}, kernel and files agree.\n`);
    showOutdated(result.outdated);
    return;
  }
  out(
    table(result.drift, [
      { title: 'GUEST', value: (d) => d.guest },
      { title: 'ADDRESS', value: (d) => d.address },
      { title: 'PART', value: (d) => d.part },
      { title: 'EXPECTED', value: (d) => d.expected },
      { title: 'OBSERVED', value: (d) => d.observed },
      { title: 'FIX', value: (d) => d.fix },
    ]),
  );
  showOutdated(result.outdated);
}

function showOutdated(outdated: readonly Outdated[]): void {
  if (outdated.length === 0) return;
  const count = outdated.length === 1 ? '1 mapping is' : `${outdated.length} mappings are`;
  const goesOn = outdated.length === 1 ? 'it works as before until it ends' : 'they work as before until they end';
  out(`${count} of an older configuration; ${goesOn}:\n`);
  for (const { owner, nic, guest, address, device, bridge, now, why, ends } of outdated) {
    const given = now === null ? `nothing: ${printable(why ?? '')}` : `${now.address} on ${now.device}, ${now.bridge}`;
    out(`  ${owner}${nic === null ? '' : ` NIC ${nic}`}: ${guest} <-> ${address} on ${device}, ${bridge}\n`);
    out(`    configured now: ${given}\n    ends: ${ends}\n`);
  }
}

async function runReconcile(options: CommonOptions & { readonly quiet?: boolean }): Promise<void> {
  const sink = createStatusFile(options.config === undefined ? pathsFrom(process.env).run : undefined, VERSION);
  const result = await reconcileAndPublish(await open(options, 'reconcile'), sink, { dryRun: options.dryRun ?? false });
  const [first] = result.errors;
  if (first !== undefined) exitStatus = first.exit;
  if (options.json) {
    json({ ...result, plan: result.changes.flatMap(describe), errors: result.errors.map(errorReport) });
    return;
  }
  warn(result.warnings);
  for (const { owner, why } of result.left) out(`left     ${owner}: ${why}\n`);
  for (const why of result.table) out(`~ table     ${why}\n`);
  if (!(options.quiet && result.changes.length === 0 && result.table.length === 0)) {
    if (result.changes.length > 0 || result.table.length === 0 || options.dryRun) showChanges(result.changes, options);
  }
  const released = options.dryRun ? 'would release' : 'released';
  for (const owner of result.released) out(`${released} ${owner}\n`);
  for (const { device, why, addresses } of result.announced) {
    const count = `${addresses.length} ${addresses.length === 1 ? 'address' : 'addresses'}`;
    out(`${options.dryRun ? 'would announce' : 'announced'} ${count} on ${device} again: ${why}\n`);
  }
  for (const error of result.errors) err(errorText(error));
}

async function runAnnounce(
  addresses: readonly string[],
  options: CommonOptions & { readonly vm?: string; readonly all?: boolean },
): Promise<void> {
  asJson = options.json ?? false;
  if (addresses.length > 0 && (options.vm !== undefined || options.all)) {
    throw new KvmIbError('usage', 'Cannot choose what to announce', {
      why: `addresses do not go together with ${options.all ? '--all' : '--vm'}`,
      fix: 'give addresses, --vm or --all',
    });
  }
  const selection: Selection =
    addresses.length > 0
      ? { kind: 'addresses', addresses: addresses.map((text) => parseIpv4(text, 'address')) }
      : options.vm === undefined
        ? { kind: 'all' }
        : { kind: 'vm', vm: parseNumber(options.vm, '--vm', 99_999_999) };
  const host = await open(options, 'announce');
  const result = await announce(host, selection, { dryRun: options.dryRun ?? false });
  const [first] = result.errors;
  if (first !== undefined) exitStatus = first.exit;
  if (options.json) {
    json({ ...result, dryRun: options.dryRun ?? false, errors: result.errors.map(errorReport) });
    return;
  }
  warn(result.warnings);
  for (const { device, address } of result.announced) out(`+ announce  ${address} on ${device}\n`);
  if (options.dryRun) out('Nothing was announced (--dry-run).\n');
  else if (result.announced.length === 0 && first === undefined) out('Nothing to announce.\n');
  for (const error of result.errors) err(errorText(error));
}

async function configCheck(options: CommonOptions): Promise<void> {
  asJson = options.json ?? false;
  const file = options.config ?? pathsFrom(process.env).config;
  const config = readConfig(file);
  const findings = [...(await configFindings(config)), ...(await firewallFindings(config))];
  const worst = worstOf(findings);
  if (worst !== undefined) exitStatus = worst;
  if (options.json) {
    json({ file, ok: worst === undefined, networks: config.networks, static: config.static, findings });
    return;
  }
  out(renderFindings(findings));
  const count = `${config.networks.length} ${config.networks.length === 1 ? 'network' : 'networks'}`;
  out(
    worst === undefined
      ? `OK: ${file}: ${count}.\n`
      : `${file} is valid (${count}), but this host does not fit it yet.\n`,
  );
}

interface NetworkXmlCommandOptions extends CommonOptions {
  readonly network?: string;
  readonly bridgeAddress?: string;
  readonly mtu?: string;
}

async function printNetworkXml(options: NetworkXmlCommandOptions): Promise<void> {
  asJson = options.json ?? false;
  const config = readConfig(options.config ?? pathsFrom(process.env).config);
  const network = chooseNetwork(config.networks, options.network);
  const address =
    options.bridgeAddress === undefined ? bridgeAddress(network) : parseIpv4(options.bridgeAddress, '--bridge-address');
  if (address === undefined) {
    throw new KvmIbError('usage', 'Cannot choose an address for the bridge', {
      why: "the guests have all addresses of their /24, so the host's address lies elsewhere",
      fix: 'give it: --bridge-address ADDRESS',
    });
  }
  const xml = networkXml(network, { mtu: await networkMtu(network, options.mtu), bridgeAddress: address as Ipv4 });
  if (options.json) json({ network: network.name, bridgeAddress: address, xml });
  else out(xml);
}

function chooseNetwork(networks: readonly Network[], name: string | undefined): Network {
  const found = name === undefined && networks.length === 1 ? networks[0] : networks.find((n) => n.name === name);
  if (found !== undefined) return found;
  throw new KvmIbError('usage', 'Cannot choose a network', {
    why: name === undefined ? 'the configuration has several' : `the configuration has no network "${name}"`,
    fix: `give --network with one of: ${networks.map((n) => n.name).join(', ')}`,
  });
}

async function networkMtu(network: Network, option: string | undefined): Promise<number> {
  if (option !== undefined) return parseNumber(option, '--mtu', 65_535);
  const link = await createLinks().link(network.device);
  if (link !== undefined) return link.mtu;
  throw new KvmIbError('host-lacks', `Cannot read the MTU of ${network.device}`, {
    why: `this host has no link ${network.device}`,
    fix: 'run it on the hypervisor, or give --mtu',
  });
}

async function runTeardown(options: CommonOptions & { readonly force?: boolean }): Promise<void> {
  const host = await open(options, 'teardown');
  const result = await teardown(host, { force: options.force ?? false, dryRun: options.dryRun ?? false });
  if (options.json) {
    json({ ...result, plan: result.changes.flatMap(describe), dryRun: options.dryRun ?? false });
    return;
  }
  warn(result.warnings);
  out(renderPlan(result.changes, colour));
  if (result.table) out('- table     ip kvm_ib\n');
  out(`- state     ${host.store.directory}\n`);
  if (options.dryRun) out('Nothing was changed (--dry-run).\n');
}

function parseNumber(text: string, what: string, max: number): number {
  const value = /^(?:0|[1-9][0-9]{0,9})$/.test(text) ? Number(text) : Number.NaN;
  if (value <= max) return value;
  throw new KvmIbError('usage', `Cannot read ${what} "${text.slice(0, 40)}"`, {
    why: `it is not a whole number from 0 to ${max}`,
    fix: 'correct it',
  });
}

/** Says what went wrong, in the form that was asked for. @returns the exit status */
function report(cause: unknown): ExitStatus {
  if (cause instanceof CommanderError) {
    if (cause.exitCode === 0) return EXIT.done;
    return EXIT.usage;
  }
  const error = toKvmIbError(cause);
  if (asJson) json({ error: errorReport(error) });
  else err(errorText(error));
  return error.exit;
}

function errorText(error: KvmIbError): string {
  const indent = (text: string): string => text.split('\n').join('\n       ');
  const why = error.why === undefined ? '' : `  why: ${indent(error.why)}\n`;
  const fix = error.fix === undefined ? '' : `  fix: ${indent(error.fix)}\n`;
  return `error: ${error.message}  [${error.code}]\n${why}${fix}`;
}

function useJson(wanted: boolean): void {
  asJson = wanted;
}

function exit(status: ExitStatus): void {
  exitStatus = status;
}

function warn(warnings: readonly string[]): void {
  for (const text of warnings) err(`warning: ${text}\n`);
}

function json(value: unknown): void {
  out(`${JSON.stringify(value, undefined, 2)}\n`);
}

function out(text: string): void {
  process.stdout.write(text);
}

function err(text: string): void {
  process.stderr.write(text);
}
