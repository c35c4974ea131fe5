/** `kvm-ib install` and `kvm-ib uninstall`: what to put where is decided in `ops/install*.ts`, done by `host/installer.ts`. */
import { resolve } from 'node:path';
import type { Command } from 'commander';
import type { Ipv4 } from '../core/address.ts';
import { ipv4FromNumber, parseIpv4 } from '../core/address.ts';
import { bridgeAddress } from '../core/config.ts';
import type { ExitStatus } from '../core/errors.ts';
import { EXIT, KvmIbError, printable, toKvmIbError } from '../core/errors.ts';
import type { Config, Network } from '../core/mapping.ts';
import { readConfig, readConfigText } from '../host/config-file.ts';
import { exec } from '../host/exec.ts';
import type { Package, StepResult, Target } from '../host/installer.ts';
import {
  bridgePorts,
  findPackage,
  libvirtNetworks,
  linkNames,
  mtuOf,
  networkManagerStates,
  openTarget,
  runSteps,
} from '../host/installer.ts';
import { createIptables, guestsUnderOldRules } from '../host/iptables.ts';
import { ONEHOST, ONEVNET } from '../host/one-command.ts';
import { DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, FIXED_PATHS } from '../host/paths.ts';
import { createStore } from '../host/store.ts';
import { createHost, requireRights } from '../host/this-host.ts';
import { parseNetwork, subnetOf } from '../libvirt/network.ts';
import type { FrontEndFiles } from '../opennebula/registration.ts';
import { DRIVER, isRegistered, otherNames, parseOneVersion, STOCK } from '../opennebula/registration.ts';
import type { DriverName, NamedFiles } from '../ops/driver-name.ts';
import { DRIVER_NAMES, editLines, giveName, parseDriverName, planEdit, takeName } from '../ops/driver-name.ts';
import type { Item, Note, Operation, Sign, Step } from '../ops/install.ts';
import { isChange, octal, planInstall, planUninstall } from '../ops/install.ts';
import type { FrontEndFacts } from '../ops/install-front-end.ts';
import {
  DRIVER_DIRECTORY,
  describeSize,
  FRONT_END_USER,
  frontEndItems,
  frontEndNotes,
  frontEndRemovals,
  ONED_CONF,
  REMOTES,
  refuseOlderDriver,
  syncedSize,
  templateItems,
  VERSION_FILE,
  VMM_EXECRC,
} from '../ops/install-front-end.ts';
import type { HostFacts } from '../ops/install-host.ts';
import {
  CONFIG_FILE,
  HOST_RECORD,
  hostItems,
  hostNotes,
  hostSteps,
  hostUninstallSteps,
  isRunByNetworkManager,
  LIBRARY,
  LIBVIRT_DIRECTORY,
  UNMANAGED,
} from '../ops/install-host.ts';
import type { LibvirtPlan, SeenNetwork } from '../ops/install-libvirt.ts';
import { planLibvirt, planLibvirtRemoval } from '../ops/install-libvirt.ts';
import {
  installedNetworkDriver,
  NETWORK_DIRECTORY,
  networkDriverItems,
  networkDriverNotes,
  networkTemplateFiles,
  parseHooksOf,
  refuseOtherNetworkDriver,
} from '../ops/install-network-driver.ts';
import { teardown } from '../ops/teardown.ts';
import { oneHosts, oneNetworks } from './facts.ts';

/** What a command needs of the program that it is part of. */
export interface Shell {
  readonly version: string;
  readonly colour: boolean;
  command(
    parent: Command,
    name: string,
    description: string,
    also: readonly 'dry-run'[],
    examples: readonly string[],
  ): Command;
  /** Errors are JSON from now on. */
  useJson(json: boolean): void;
  exit(status: ExitStatus): void;
  out(text: string): void;
  warn(warnings: readonly string[]): void;
  json(value: unknown): void;
}

interface Options {
  readonly config?: string;
  readonly json?: boolean;
  readonly dryRun?: boolean;
  readonly root: string;
}

interface HostOptions extends Options {
  readonly libvirtNetwork: boolean;
  readonly unmanagedDevice?: boolean;
}

const EXAMPLE: Network = {
  name: 'ib',
  device: 'ib0' as Network['device'],
  bridge: 'virbr1' as Network['bridge'],
  guests: { first: '192.168.122.2' as Ipv4, last: '192.168.122.6' as Ipv4 },
  addresses: { first: '192.168.10.202' as Ipv4, last: '192.168.10.206' as Ipv4 },
  isolate: true,
};
/** What a datagram-mode link of today has (RFC 4391: 2048 less the IPoIB header). */
const COMMON_MTU = 2044;

export function addInstallCommands(program: Command, shell: Shell): void {
  const install = program
    .command('install')
    .description('Put kvm-ib in place')
    .addHelpText('before', 'Examples:\n  kvm-ib install host --dry-run\n  kvm-ib install front-end --dry-run\n');
  const uninstall = program
    .command('uninstall')
    .description('Take kvm-ib off, all of it')
    .addHelpText('before', 'Examples:\n  kvm-ib uninstall host --dry-run\n  kvm-ib uninstall front-end --dry-run\n');
  const root = ['--root <dir>', 'a directory that stands for /: files only, nothing is run', '/'] as const;
  shell
    .command(
      install,
      'host',
      'Install on this hypervisor: programs, sudo, sysctl, units, libvirt network',
      ['dry-run'],
      [
        'kvm-ib install host --dry-run',
        'kvm-ib install host --config kvm-ib.yaml     with a configuration, if there is none yet',
      ],
    )
    .option(...root)
    .option('--no-libvirt-network', 'make no libvirt network for a bridge that is not there')
    .option('--unmanaged-device', 'NetworkManager shall leave the IPoIB links alone; something else brings them up')
    .action((options: HostOptions) => installHost(shell, options));
  shell
    .command(
      install,
      'front-end',
      "Install the driver and the probes into OpenNebula's remotes",
      ['dry-run'],
      [
        'kvm-ib install front-end --dry-run',
        'kvm-ib install front-end --config kvm-ib.yaml --mtu 4092 --templates /var/lib/one/kvm-ib-templates',
        'kvm-ib install front-end --driver-name kvm-ib --dry-run    also what it would write into oned.conf',
        'kvm-ib install front-end --vnm                 where the VMM driver of OpenNebula stays',
        'kvm-ib install front-end --hooks-of dummy      the same, called by another network driver',
      ],
    )
    .option(...root)
    .option(
      '--driver-name <name>',
      'write the driver into oned.conf under this name, kvm-ib or kvm (docs/driver-name.md); else it is printed',
    )
    .option('--one-version <version>', `default: what ${VERSION_FILE} says`)
    .option('--mtu <bytes>', `MTU of the IPoIB link, for the guests; default: ${COMMON_MTU}`)
    .option('--bridge-address <address>', "the host's address on the bridge; default: as `network-xml`")
    .option('--templates <dir>', 'write the section and the templates that are printed to files there as well')
    .option('--vnm', 'the network driver, in place of the VMM driver')
    .option('--hooks-of <drivers>', 'the same as hooks of these network drivers, with commas: dummy, bridge, …')
    .action((options: FrontEndOptions) => installFrontEnd(shell, options));
  shell
    .command(
      uninstall,
      'host',
      'Take kvm-ib off this hypervisor; refused while VMs are mapped',
      ['dry-run'],
      ['kvm-ib uninstall host --dry-run', 'kvm-ib uninstall host --purge                the configuration as well'],
    )
    .option(...root)
    .option('--purge', 'the configuration as well')
    .action((options: Options & { readonly purge?: boolean }) => uninstallHost(shell, options));
  shell
    .command(
      uninstall,
      'front-end',
      "Take driver and probes out of OpenNebula's remotes",
      ['dry-run'],
      [
        'kvm-ib uninstall front-end --dry-run',
        'kvm-ib uninstall front-end --driver-name kvm    the driver "kvm" is the stock one again; nothing else goes',
      ],
    )
    .option(...root)
    .option('--driver-name <name>', 'take this name alone out of oned.conf, kvm-ib or kvm; all files stay')
    .option('--purge', 'the configuration as well')
    .option('--force', 'also while hosts of this driver run VMs, or when OpenNebula does not answer')
    .action((options: UninstallFrontEndOptions) => uninstallFrontEnd(shell, options));
}

function open(shell: Shell, options: Options, what: string): Target {
  shell.useJson(options.json ?? false);
  const target = openTarget(resolve(options.root), FRONT_END_USER);
  if (target.live && !options.dryRun && process.getuid?.() !== 0) {
    throw new KvmIbError('not-permitted', `Cannot ${what}`, {
      why: 'only root may write there',
      fix: `run it as root: sudo kvm-ib ${what}; or look with --dry-run`,
    });
  }
  if (!target.live && !target.exists('/')) {
    throw new KvmIbError('usage', `Cannot ${what}`, { why: `${target.root} is not there`, fix: 'make the directory' });
  }
  return target;
}

async function installHost(shell: Shell, options: HostOptions): Promise<void> {
  const target = open(shell, options, 'install host');
  const pack = findPackage();
  const facts = await hostFacts(target, options);
  if (target.live) requireNode(target);
  if (target.live && facts.config !== null) {
    const refused = await oldRulesError(facts.config, options);
    if (refused !== undefined && !options.dryRun) throw refused;
    if (refused !== undefined) shell.warn([`it would be refused: ${refused.why}; ${refused.fix}`]);
  }
  const items = hostItems(facts, packageFiles(pack));
  const record = target.readRecord(HOST_RECORD);
  const look = target.observe(pack, record.files);
  const operations = planInstall(items, look);
  const steps = hostSteps(operations, facts);
  let results: readonly StepResult[] = [];
  if (!options.dryRun) {
    const made = await target.apply(operations, pack);
    const written = new Map(record.files);
    for (const { item, sign } of operations) {
      if (item?.kind === 'file' && item.keep !== 'always' && sign !== '!')
        written.set(item.path, look.content(item).sha256);
    }
    const directories = [...new Set([...record.directories, ...made])].sort();
    const recorded = { version: shell.version, files: written, directories, networks: record.networks };
    // Before the programs run: whatever they do, what was written is known.
    target.writeRecord(HOST_RECORD, recorded);
    results = await runSteps(steps);
    const defined = facts.libvirt.made.filter((name) =>
      results.some(({ argv, ok }) => ok && argv.includes('net-define') && argv.at(-1) === networkFile(name)),
    );
    const networks = [...new Set([...record.networks, ...defined])].sort();
    target.writeRecord(HOST_RECORD, { ...recorded, networks });
  }
  const next = facts.live && facts.config !== null ? 'Next: `kvm-ib config check`, then `kvm-ib status`.' : undefined;
  show(shell, options, { operations, steps, results, notes: hostNotes(facts), next });
}

/** The units load the table, whose guards drop what has no mapping: guests that older rules serve come over first. */
async function oldRulesError(config: Config, options: HostOptions): Promise<KvmIbError | undefined> {
  const guests = await guestsUnderOldRules(config, createIptables(exec));
  if (guests.length === 0) return undefined;
  const file = options.config === undefined ? '' : ` --config ${options.config}`;
  return new KvmIbError('conflict', 'Cannot install the host', {
    why: `rules of iptables translate ${guests.length === 1 ? guests[0] : `${guests.length} guests`} still, whom kvm-ib would cut off`,
    fix: `take them over first: ${process.argv[1] === undefined ? 'kvm-ib' : `node ${process.argv[1]}`} import${file} (docs/migrate.md)`,
  });
}

function networkFile(name: string): string {
  return `${LIBVIRT_DIRECTORY}/${name}.xml`;
}

/** Every file of the package that goes into /usr/lib/kvm-ib, so that it can install and uninstall again. */
function packageFiles(pack: Package): readonly { readonly path: string; readonly mode: number }[] {
  return [...pack.list('drivers'), ...pack.list('rulesets'), ...pack.list('docs/man')];
}

async function hostFacts(target: Target, options: HostOptions): Promise<HostFacts> {
  const standing = target.exists(CONFIG_FILE);
  const given = options.config === undefined || standing ? null : readConfigText(options.config);
  const { config, problem } = configOf(standing ? `${target.live ? '' : target.root}${CONFIG_FILE}` : options.config);
  // What was asked for by name must hold; what stands there may be the example still.
  if (given !== null && options.config !== undefined) readConfig(options.config);
  const systemd = target.live && target.exists('/run/systemd/system');
  const managed = target.live ? await networkManagerStates() : new Map<string, string>();
  return {
    live: target.live,
    systemd,
    unitsRunning: systemd && (await unitsRunning()),
    conntrack: target.exists('/proc/sys/net/netfilter/nf_conntrack_tcp_loose'),
    networkManager: target.exists('/etc/NetworkManager'),
    managed,
    unmanagedDevice: unmanagedDevice(target, options, config, managed),
    selinux: target.exists('/etc/selinux/config'),
    firewalld: target.exists('/etc/firewalld'),
    config,
    configProblem: problem,
    givenConfig: given,
    libvirt: await libvirtPlan(target, options, config),
  };
}

/** Asked for now, or at an earlier installation: to forget it would let NetworkManager take the addresses off the link. */
function unmanagedDevice(
  target: Target,
  options: HostOptions,
  config: Config | null,
  managed: ReadonlyMap<string, string>,
): boolean {
  const devices = (config?.networks ?? []).map(({ device }) => device);
  const line = /^unmanaged-devices\+=(.*)$/m.exec(target.readText(UNMANAGED) ?? '')?.[1] ?? '';
  if (devices.some((device) => line.split(';').includes(`interface-name:${device}`))) return true;
  if (options.unmanagedDevice !== true) return false;
  const run = devices.find((device) => isRunByNetworkManager(device, managed));
  if (run === undefined) return true;
  throw new KvmIbError('conflict', `Cannot take ${run} from NetworkManager`, {
    why: 'NetworkManager runs it: told by a file to leave it alone, it takes all addresses off and sets the link down',
    fix: `have something else bring ${run} up at boot, then: nmcli device set ${run} managed no (addresses stay), and install again`,
  });
}

async function libvirtPlan(target: Target, options: HostOptions, config: Config | null): Promise<LibvirtPlan> {
  if (!target.live || config === null) return { items: [], steps: [], notes: [], made: [] };
  const mtus = config.networks.flatMap(({ device }) => {
    const mtu = mtuOf(device);
    return mtu === undefined ? [] : [[device, mtu] as const];
  });
  const facts = {
    networks: await seenNetworks(),
    wanted: options.libvirtNetwork,
    mtus: new Map<string, number>(mtus),
    links: linkNames(),
  };
  return planLibvirt(config.networks, facts, LIBVIRT_DIRECTORY);
}

async function seenNetworks(): Promise<readonly SeenNetwork[] | null> {
  const dumps = await libvirtNetworks();
  if (dumps === null) return null;
  return dumps.flatMap(({ xml, active, autostart }) => {
    try {
      return [{ ...parseNetwork(xml), active, autostart }];
    } catch {
      // Not understood: should it be the one with our bridge, libvirt refuses a second one and says so.
      return [];
    }
  });
}

function configOf(file: string | undefined): { readonly config: Config | null; readonly problem: string | null } {
  if (file === undefined) return { config: null, problem: null };
  try {
    return { config: readConfig(file), problem: null };
  } catch (cause) {
    const error = toKvmIbError(cause);
    return { config: null, problem: printable((error.why ?? error.message).split('\n')[0] ?? '', 200) };
  }
}

async function unitsRunning(): Promise<boolean> {
  const ask = async (...args: readonly string[]): Promise<boolean> =>
    (await exec(['/usr/bin/systemctl', '--quiet', ...args])).status === 0;
  const units = ['kvm-ib-reconcile.service', 'kvm-ib.timer'];
  for (const unit of units) if (!(await ask('is-enabled', unit))) return false;
  return ask('is-active', 'kvm-ib.timer');
}

/** The engine starts Node from these places alone. */
function requireNode(target: Target): void {
  if (target.exists('/usr/bin/node') || target.exists('/usr/local/bin/node')) return;
  throw new KvmIbError('host-lacks', 'Cannot install on this host', {
    why: 'node is neither /usr/bin/node nor /usr/local/bin/node, where engine and units look for it',
    fix: `install Node.js 20.11 or later for all users, or: ln -s ${process.execPath} /usr/local/bin/node`,
  });
}

async function uninstallHost(shell: Shell, options: Options & { readonly purge?: boolean }): Promise<void> {
  const target = open(shell, options, 'uninstall host');
  const pack = findPackage();
  const base = target.live ? '' : target.root;
  const store = createStore(`${base}${DEFAULT_STATE_DIR}`);
  const { files, unreadable } = store.all();
  const vms = files.flatMap((file) => (file.owner.kind === 'vm' ? [file.owner.vm] : []));
  const [broken] = unreadable;
  if (vms.length > 0 || broken !== undefined) {
    throw new KvmIbError('conflict', 'Cannot uninstall kvm-ib from this host', {
      why:
        broken === undefined
          ? `VMs are mapped: ${vms.slice(0, 10).join(', ')}${vms.length > 10 ? ', …' : ''}`
          : `a state file cannot be read, so what it mapped is not known: ${broken.path}`,
      fix:
        broken === undefined
          ? 'shut them down or migrate them; or cut them off with `kvm-ib teardown --force`, then uninstall'
          : 'look at it; or `kvm-ib teardown --force`, then uninstall',
    });
  }
  const plan = (): readonly Operation[] => planHostUninstall(target, pack, options.purge ?? false);
  let operations = plan();
  const systemd = target.live && target.exists('/run/systemd/system');
  const unitThere = target.exists('/etc/systemd/system/kvm-ib.timer');
  const { before, after } = hostUninstallSteps({ live: target.live, systemd: systemd && unitThere });
  const recorded = target.readRecord(HOST_RECORD).networks;
  const libvirt =
    target.live && recorded.length > 0
      ? planLibvirtRemoval(recorded, await seenNetworks(), bridgePorts)
      : { steps: [], notes: [] };
  const results: StepResult[] = [];
  if (!options.dryRun) {
    results.push(...(await runSteps(before)));
    const stuck = results.find((result) => !result.ok);
    if (stuck !== undefined) {
      throw new KvmIbError('failed', 'Cannot stop the units', {
        why: stuck.said,
        fix: 'see `systemctl status kvm-ib.timer`',
      });
    }
    if (target.live) await takeDown(shell, target);
    // Again: what was torn down has left other files.
    operations = plan();
    results.push(...(await runSteps(libvirt.steps)));
    await target.apply(operations, pack);
    results.push(...(await runSteps(after)));
  }
  const notes: Note[] =
    target.live && operations.length > 0
      ? [
          ...libvirt.notes,
          {
            title:
              'Left as they are: loaded sysctl values and networks that kvm-ib did not make, which others may use by now',
            text: 'IPv4 forwarding stays on until the next boot.',
          },
        ]
      : [];
  show(shell, options, { operations, steps: [...before, ...libvirt.steps, ...after], results, notes });
}

function planHostUninstall(target: Target, pack: Package, purge: boolean): readonly Operation[] {
  const record = target.readRecord(HOST_RECORD);
  // With all that an installation may have written, whatever is configured now.
  const everything = {
    networkManager: true,
    managed: new Map<string, string>(),
    unmanagedDevice: false,
    config: { networks: [], static: [] },
    givenConfig: null,
    libvirt: { items: [], steps: [], notes: [], made: [] },
  };
  const frontEnd = target.exists(`${REMOTES}/vmm/kvm-ib`);
  const data = [DEFAULT_STATE_DIR, DEFAULT_RUN_DIR];
  return planUninstall(
    {
      items: [
        ...hostItems(everything, packageFiles(pack)),
        ...data.map((path): Item => ({ kind: 'directory', path, mode: 0o755, own: true })),
      ],
      inside: target.inside([LIBRARY, ...data]),
      madeDirectories: record.directories,
      keep: keptConfig(purge, frontEnd ? 'the front-end on this machine has it too' : undefined),
    },
    target.observe(pack, record.files),
  );
}

function keptConfig(purge: boolean, usedBy: string | undefined): ReadonlyMap<string, string> {
  if (purge && usedBy === undefined) return new Map();
  return new Map([[CONFIG_FILE, purge && usedBy !== undefined ? usedBy : 'remove it with --purge']]);
}

/** Aliases, pairs and the table go while the programs that know them are there. */
async function takeDown(shell: Shell, target: Target): Promise<void> {
  if (!target.exists(CONFIG_FILE)) return;
  const { config, problem } = configOf(CONFIG_FILE);
  if (config === null) {
    // The example: nothing was ever mapped by it.
    if (createStore(DEFAULT_STATE_DIR).all().files.length === 0) return;
    throw new KvmIbError('bad-config', 'Cannot take the mappings off this host', {
      why: problem ?? 'the configuration does not hold',
      fix: `correct ${CONFIG_FILE}, then uninstall again`,
    });
  }
  requireRights('Cannot run kvm-ib uninstall host', 'run it as root: sudo kvm-ib uninstall host');
  const { warnings } = await teardown(await createHost(FIXED_PATHS, config), {});
  shell.warn(warnings);
}

interface FrontEndOptions extends Options {
  readonly driverName?: string;
  readonly oneVersion?: string;
  readonly mtu?: string;
  readonly bridgeAddress?: string;
  readonly templates?: string;
  readonly vnm?: boolean;
  readonly hooksOf?: string;
}

interface UninstallFrontEndOptions extends Options {
  readonly driverName?: string;
  readonly force?: boolean;
  readonly purge?: boolean;
}

async function installFrontEnd(shell: Shell, options: FrontEndOptions): Promise<void> {
  const target = open(shell, options, 'install front-end');
  const pack = findPackage();
  const found = frontEndFacts(target, options);
  const named = found.driverName === null ? null : giveName(found.driverName, found.version, found);
  const facts: FrontEndFacts = named === null ? found : { ...found, ...textsOf(found, named), edits: editsOf(named) };
  const given = options.config === undefined ? null : readConfigText(options.config);
  const look = target.observe(pack, new Map());
  refuseOlderDriver(look);
  const network = networkUse(look, facts, options);
  const drivers = pack.list('drivers');
  const vmm = !network.isChosen || target.exists(DRIVER_DIRECTORY);
  const items = [
    ...frontEndItems(drivers, given, vmm),
    ...(network.isWanted ? networkDriverItems(drivers, network.hooksOf) : []),
  ];
  const driver = planInstall(items, look);
  // Wherever the driver goes, the templates are for the operator of this machine.
  const here = openTarget('/', FRONT_END_USER);
  const templates =
    facts.templates === null
      ? []
      : planInstall(
          network.isChosen
            ? templateItems(facts.templates, facts, networkTemplateFiles(facts, network.hooksOf))
            : templateItems(facts.templates, facts),
          here.observe(pack, new Map()),
        );
  const edits = named === null ? [] : planEdits(found, named);
  if (!options.dryRun) {
    await target.apply([...driver, ...edits], pack);
    await here.apply(templates, pack);
  }
  const size = syncedSize(driver);
  const notes = network.isChosen ? networkDriverNotes(facts, network.hooksOf, size) : frontEndNotes(facts, size);
  const operations = [...driver, ...edits, ...templates];
  show(shell, options, { operations, steps: [], results: [], notes, synced: size });
}

function planEdits(before: FrontEndFiles, after: NamedFiles): readonly Operation[] {
  return [
    ...planEdit(ONED_CONF, before.onedConf, after.onedConf),
    ...planEdit(VMM_EXECRC, before.vmmExecrc, after.vmmExecrc),
  ];
}

function textsOf(before: FrontEndFiles, after: NamedFiles): FrontEndFiles {
  return { onedConf: after.onedConf.text, vmmExecrc: after.vmmExecrc?.text ?? before.vmmExecrc };
}

function editsOf({ onedConf, vmmExecrc }: NamedFiles): FrontEndFacts['edits'] {
  const all = [[ONED_CONF, onedConf.edits] as const, [VMM_EXECRC, vmmExecrc?.edits ?? []] as const];
  return new Map(all.filter(([, edits]) => edits.length > 0));
}

/** Chosen now, or by an earlier run: then it is brought up to date. */
function networkUse(
  look: ReturnType<Target['observe']>,
  { version }: FrontEndFacts,
  { vnm = false, hooksOf, driverName }: FrontEndOptions,
): { readonly isChosen: boolean; readonly isWanted: boolean; readonly hooksOf: readonly string[] } {
  const there = installedNetworkDriver(look);
  const isChosen = vnm || hooksOf !== undefined;
  if (isChosen && driverName !== undefined) {
    throw new KvmIbError('usage', 'Cannot install both drivers at once', {
      why: '--driver-name is the name of the VMM driver, which --vnm and --hooks-of do without',
      fix: 'leave one of them out; for both drivers run the command twice',
    });
  }
  if (isChosen) refuseOtherNetworkDriver(look);
  const asked = hooksOf === undefined ? [] : parseHooksOf(hooksOf, version, look);
  return { isChosen, isWanted: isChosen || there.isThere, hooksOf: [...new Set([...asked, ...there.hooksOf])] };
}

function frontEndFacts(target: Target, options: FrontEndOptions): FrontEndFacts {
  if (target.live && !target.exists(REMOTES)) {
    throw new KvmIbError('host-lacks', 'Cannot install the driver', {
      why: `${REMOTES} is not there: this is no OpenNebula front-end`,
      fix: 'run it on the front-end',
    });
  }
  const said = options.oneVersion ?? target.readText(VERSION_FILE);
  if (said === null) {
    throw new KvmIbError('host-lacks', 'Cannot tell which OpenNebula this is', {
      why: `${VERSION_FILE} is not there`,
      fix: 'give it: --one-version 6.10',
    });
  }
  const mtuText = options.mtu ?? String(COMMON_MTU);
  const mtu = /^[1-9][0-9]{1,4}$/.test(mtuText) ? Number(mtuText) : 0;
  if (mtu < 68 || mtu > 65_535) {
    throw new KvmIbError('usage', `Cannot read --mtu "${printable(mtuText, 40)}"`, {
      why: 'it is not a number of bytes from 68 to 65535',
      fix: 'give that of the IPoIB link of the hosts: 2044, 4092 or 65520',
    });
  }
  const file =
    options.config ?? (target.exists(CONFIG_FILE) ? `${target.live ? '' : target.root}${CONFIG_FILE}` : undefined);
  const config = options.config === undefined ? configOf(file).config : readConfig(options.config);
  const gateway =
    options.bridgeAddress === undefined ? undefined : parseIpv4(options.bridgeAddress, '--bridge-address');
  const networks = (config?.networks ?? [EXAMPLE]).map((network) => {
    const address = gateway ?? bridgeAddress(network) ?? ipv4FromNumber(0);
    return { network, options: { gateway: address, prefixLength: subnetOf(network, address), mtu } };
  });
  return {
    driverName: options.driverName === undefined ? null : parseDriverName(options.driverName),
    edits: new Map(),
    version: parseOneVersion(said),
    onedConf: target.readText(ONED_CONF),
    vmmExecrc: target.readText(VMM_EXECRC),
    networks,
    networksConfigured: config !== null,
    mtuGiven: options.mtu !== undefined,
    templates: options.templates === undefined ? null : resolve(options.templates),
  };
}

async function uninstallFrontEnd(shell: Shell, options: UninstallFrontEndOptions): Promise<void> {
  const target = open(shell, options, 'uninstall front-end');
  const pack = findPackage();
  const alone = options.driverName === undefined ? undefined : parseDriverName(options.driverName);
  const files = { onedConf: target.readText(ONED_CONF), vmmExecrc: target.readText(VMM_EXECRC) };
  const named = takeName(alone === undefined ? DRIVER_NAMES : [alone], files);
  const edits = planEdits(files, named);
  if (target.live && !options.force && (alone === undefined || edits.length > 0)) {
    await refuseWhileHostsRun(target, files, alone);
    if (alone === undefined) await refuseWhileNetworksLease(target);
  }
  // With a name alone the driver stays, for the other one.
  const driver = alone === undefined ? planFrontEndRemoval(target, pack, options) : [];
  // First oned.conf: a section whose scripts are gone is worse than scripts that no section names.
  if (!options.dryRun) await target.apply([...edits, ...driver], pack);
  const operations = [...edits, ...driver];
  const notes = operations.length > 0 ? uninstalledNotes(named, alone) : [];
  show(shell, options, { operations, steps: [], results: [], notes });
}

function planFrontEndRemoval(target: Target, pack: Package, options: UninstallFrontEndOptions): readonly Operation[] {
  const look = target.observe(pack, new Map());
  const network = installedNetworkDriver(look);
  const drivers = pack.list('drivers');
  const items = [
    ...frontEndRemovals(drivers),
    ...(network.isThere ? networkDriverItems(drivers, network.hooksOf) : []),
  ];
  const keep = keptConfig(
    options.purge ?? false,
    target.exists(HOST_RECORD) ? 'this machine is a host with kvm-ib as well' : undefined,
  );
  const own = items.flatMap((item) => (item.kind === 'directory' && item.own ? [item.path] : []));
  return planUninstall({ items, inside: target.inside(own), madeDirectories: [], keep }, look);
}

function uninstalledNotes(named: NamedFiles, alone: DriverName | undefined): readonly Note[] {
  const lines = [...editsOf(named)].map(([path, edits]) => ({
    title: `Lines of ${path}`,
    text: editLines(edits).join('\n'),
  }));
  const left = [
    ...(isRegistered(named.onedConf.text) ? [DRIVER] : []),
    ...otherNames(named.onedConf.text).filter((name) => name !== STOCK),
  ].filter(() => alone === undefined);
  const sync = `runuser -u ${FRONT_END_USER} -- onehost sync --force`;
  const then = [
    ...(alone === undefined ? ['# the two hooks, if you made them: onehook list, onehook delete ID'] : []),
    'systemctl restart opennebula',
    ...(alone === undefined ? [sync] : []),
  ].join('\n');
  const title =
    left.length === 0
      ? 'Then'
      : `Take the section VM_MAD of "${left.join('", "')}" out of ${ONED_CONF} and its words out of ${VMM_EXECRC}, then`;
  return [...lines, { title, text: then }];
}

/**
 * Without its scripts OpenNebula could not even shut the VMs of these hosts down; under the stock ones the mappings of
 * those that have some would stay.
 */
async function refuseWhileHostsRun(target: Target, files: FrontEndFiles, alone: DriverName | undefined): Promise<void> {
  if (!target.exists(ONEHOST)) return;
  const refuse = (why: string): KvmIbError =>
    new KvmIbError('conflict', `Cannot uninstall the driver${alone === undefined ? '' : ` "${alone}"`}`, {
      why,
      fix: 'power their VMs off and move the hosts to another driver first; or use --force',
    });
  const hosts = await oneHosts();
  if (hosts instanceof KvmIbError) {
    throw refuse(`OpenNebula does not say which hosts use it (\`onehost list\` failed: ${hosts.why})`);
  }
  const names = alone === undefined ? [DRIVER, ...otherNames(files.onedConf)] : [alone];
  // Hosts of "kvm" without kvm-ib have nothing mapped: for them the stock scripts are the same.
  const busy = hosts.filter(
    ({ driver, runningVms, kvmIb }) => names.includes(driver) && runningVms > 0 && (driver !== STOCK || kvmIb !== null),
  );
  if (busy.length > 0) {
    const some = busy.slice(0, 10).map(({ name }) => printable(name, 60));
    throw refuse(`VMs run on hosts of this driver: ${some.join(', ')}${busy.length > 10 ? ', …' : ''}`);
  }
}

/** Nor the VMs of networks whose network driver it is. A hook that is gone is not missed. */
async function refuseWhileNetworksLease(target: Target): Promise<void> {
  if (!target.exists(ONEVNET) || !target.exists(NETWORK_DIRECTORY)) return;
  const refuse = (why: string): KvmIbError =>
    new KvmIbError('conflict', 'Cannot uninstall the network driver', {
      why,
      fix: 'detach their NICs, or power their VMs off and give the networks another VN_MAD first; or use --force',
    });
  const networks = await oneNetworks();
  if (networks instanceof KvmIbError) {
    throw refuse(`OpenNebula does not say which virtual networks use it (\`onevnet list\` failed: ${networks.why})`);
  }
  const busy = networks.filter(({ driver, usedLeases }) => driver === DRIVER && (usedLeases ?? 0) > 0);
  if (busy.length === 0) return;
  const some = busy.slice(0, 10).map(({ name }) => printable(name, 60));
  throw refuse(`virtual networks with this driver have leases: ${some.join(', ')}${busy.length > 10 ? ', …' : ''}`);
}

interface Outcome {
  readonly operations: readonly Operation[];
  readonly steps: readonly Step[];
  readonly results: readonly StepResult[];
  readonly notes: readonly Note[];
  readonly synced?: { readonly files: number; readonly bytes: number };
  /** What to type once something was installed. */
  readonly next?: string | undefined;
}

function show(shell: Shell, options: Options, outcome: Outcome): void {
  const { operations, steps, results, notes, synced, next } = outcome;
  const failed = results.filter((result) => !result.ok);
  if (failed.length > 0) shell.exit(EXIT.hostLacks);
  const dryRun = options.dryRun ?? false;
  const changes = operations.filter(isChange);
  if (options.json) {
    shell.json({
      root: options.root,
      dryRun,
      changed: changes.length > 0 || steps.length > 0,
      operations: operations.map(({ item: _, ...operation }) => operation),
      steps: dryRun ? steps : results,
      ...(synced === undefined ? {} : { synced }),
      notes,
    });
    return;
  }
  for (const operation of condense(operations)) shell.out(line(operation, shell.colour));
  for (const { argv } of steps) shell.out(`$ ${argv.join(' ')}\n`);
  if (dryRun && changes.length > 0)
    shell.out('(+ is made, ~ replaced, - removed, ! kept, = as it should be, $ is run)\n');
  if (dryRun)
    shell.out(changes.length + steps.length === 0 ? 'Nothing would change.\n' : 'Nothing was changed (--dry-run).\n');
  else if (changes.length + steps.length === 0) shell.out('Nothing to change.\n');
  if (synced !== undefined) shell.out(`\`onehost sync\` copies ${describeSize(synced)} more to each host.\n`);
  for (const { title, text } of notes) shell.out(`\n${title}${/[.:]$/.test(title) ? '' : ':'}\n${indent(text)}\n`);
  if (next !== undefined && !dryRun && changes.length + steps.length > 0) shell.out(`\n${next}\n`);
  shell.warn(failed.map(({ argv, what, said }) => `${what}: \`${argv.join(' ')}\` failed: ${said}`));
}

/** Folders of many small files, shown as one line for each sign. */
const FOLDED = [`${LIBRARY}/drivers`, `${LIBRARY}/rulesets`, DRIVER_DIRECTORY, NETWORK_DIRECTORY];

function condense(operations: readonly Operation[]): readonly Operation[] {
  const folderOf = ({ path, why }: Operation): string | undefined =>
    why === '' ? FOLDED.find((folder) => path === folder || path.startsWith(`${folder}/`)) : undefined;
  const shown = new Set<string>();
  return operations.flatMap((operation): readonly Operation[] => {
    const folder = folderOf(operation);
    if (folder === undefined) return [operation];
    const key = `${operation.sign} ${folder}`;
    if (shown.has(key)) return [];
    shown.add(key);
    const files = operations.filter(
      (o) => o.sign === operation.sign && o.kind !== 'directory' && folderOf(o) === folder,
    );
    const size = files.reduce((sum, { size: bytes }) => sum + (bytes ?? 0), 0);
    const why = `${files.length} ${files.length === 1 ? 'file' : 'files'}`;
    return [{ ...operation, path: folder, kind: 'directory', mode: null, size: size === 0 ? null : size, why }];
  });
}

const COLOURS: Readonly<Record<Sign, string | undefined>> = {
  '+': '32',
  '~': '33',
  '-': '31',
  '!': '35',
  '=': undefined,
};

function line({ sign, path, kind, mode, owner, size, why }: Operation, colour: boolean): string {
  const properties = [
    ...(mode === null || sign === '-' ? [] : [octal(mode)]),
    ...(owner === null || sign === '-' ? [] : [owner]),
    ...(size === null ? [] : [`${size} bytes`]),
    ...(why === '' ? [] : [why]),
  ];
  const what = { file: 'file', link: 'link', directory: 'dir ' }[kind];
  const text = `${sign} ${what} ${path}${properties.length === 0 ? '' : ` (${properties.join(', ')})`}`;
  const code = COLOURS[sign];
  return colour && code !== undefined ? `\u001b[${code}m${text}\u001b[0m\n` : `${text}\n`;
}

function indent(text: string): string {
  return text.replace(/^(?=.)/gm, '  ');
}
