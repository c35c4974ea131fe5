/**
 * `kvm-ib doctor`: whether a machine is set up as kvm-ib needs it, as a front-end, as a host, or as both. Pure: facts in,
 * checks and findings out. What could not be looked at is a check of its own kind and never counts as right.
 */
import type { KvmIbError } from '../core/errors.ts';
import { printable } from '../core/errors.ts';
import type { VmMad } from '../opennebula/oned-conf.ts';
import { vmMads } from '../opennebula/oned-conf.ts';
import type { OneHost, OneNetwork } from '../opennebula/pools.ts';
import type { OneVersion } from '../opennebula/registration.ts';
import { DRIVER, isNetworkDriverRegistered, liveSnapshotsLine, STOCK } from '../opennebula/registration.ts';
import type { Finding } from './check.ts';

export type Where = 'front-end' | 'host';
export type CheckState = 'ok' | 'warning' | 'error' | 'skipped';

/** One thing that was looked at. */
export interface Check {
  readonly where: Where;
  readonly name: string;
  readonly state: CheckState;
  /** What is there; of a skipped one, why it was not looked at. */
  readonly seen: string;
}

export interface DoctorFinding extends Omit<Finding, 'network'> {
  readonly where: Where;
  readonly check: string;
}

/** A line of the table of hosts. */
export interface HostLine {
  readonly name: string;
  readonly cluster: string;
  readonly driver: string;
  /** The folder of scripts that the driver runs; null when `oned.conf` does not have the driver. */
  readonly folder: string | null;
  readonly vms: number;
  /** Status and version that its probe reported; null: nothing. */
  readonly kvmIb: string | null;
}

export interface Diagnosis {
  readonly checks: readonly Check[];
  readonly hosts: readonly HostLine[];
  readonly findings: readonly DoctorFinding[];
}

/** Facts that were not to be had are an error that says why. */
export type Fact<T> = T | KvmIbError;

export interface FrontEndDiagnosisFacts {
  /** Where the network driver is installed: the drivers that call it as their hook, and whether there is no VMM driver of ours. */
  readonly networkDriver?: { readonly hooksOf: readonly string[]; readonly alone: boolean } | undefined;
  /** /etc/one/oned.conf; null when it may not be read. */
  readonly onedConf: string | null;
  readonly vmmExecrc: string | null;
  readonly version: Fact<OneVersion>;
  /** Files of the driver in the remotes that are missing or of another version than this program's. */
  readonly driverFiles: Fact<{ readonly missing: readonly string[]; readonly different: readonly string[] }>;
  /** Version of this program. */
  readonly program: string;
  readonly hosts: Fact<readonly OneHost[]>;
  readonly networks: Fact<readonly OneNetwork[]>;
  /** Bridges of the configuration; null: there is none on this machine. */
  readonly bridges: readonly string[] | null;
  /** OpenNebulaNetwork.conf, the defaults of the network drivers. */
  readonly networkDefaults: string | null;
}

type Part = Omit<DoctorFinding, 'where' | 'check'>;

interface Examined {
  readonly name: string;
  readonly seen: string;
  readonly skipped?: boolean;
  readonly findings: readonly Part[];
}

/** @param hosts the table, where OpenNebula gave one */
function diagnosis(where: Where, examined: readonly Examined[], hosts: readonly HostLine[] = []): Diagnosis {
  const checks = examined.map(({ name, seen, skipped, findings }): Check => {
    const worst = findings.some(({ level }) => level === 'error') ? 'error' : 'warning';
    return { where, name, seen, state: findings.length > 0 ? worst : skipped === true ? 'skipped' : 'ok' };
  });
  return {
    checks,
    hosts,
    findings: examined.flatMap(({ name, findings }) => findings.map((part) => ({ where, check: name, ...part }))),
  };
}

export function together(parts: readonly Diagnosis[]): Diagnosis {
  return {
    checks: parts.flatMap(({ checks }) => checks),
    hosts: parts.flatMap(({ hosts }) => hosts),
    findings: parts.flatMap(({ findings }) => findings),
  };
}

function skipped(name: string, why: string): Examined {
  return { name, seen: `not looked at: ${why}`, skipped: true, findings: [] };
}

function isProblem<T>(fact: Fact<T>): fact is KvmIbError {
  return fact instanceof Error;
}

export function diagnoseFrontEnd(facts: FrontEndDiagnosisFacts): Diagnosis {
  const sections = vmMads(facts.onedConf);
  const hosts = isProblem(facts.hosts) ? [] : facts.hosts;
  const examined = [
    driverSections(facts, sections),
    driverFiles(facts),
    liveSnapshotWords(facts),
    ...(isProblem(facts.hosts)
      ? [unanswered('hosts', facts.hosts)]
      : facts.onedConf === null
        ? [skipped('hosts', 'oned.conf cannot be read')]
        : [clusters(facts.hosts, sections), reports(facts.hosts, sections, facts.program)]),
    virtualNetworks(facts),
  ];
  const lines = hosts.map((host): HostLine => {
    return {
      name: host.name,
      cluster: clusterName(host),
      driver: host.driver,
      folder: sections.find(({ name }) => name === host.driver)?.directory ?? null,
      vms: host.runningVms,
      kvmIb: host.kvmIb === null ? null : `${host.kvmIb.status} ${host.kvmIb.version}`.trim(),
    };
  });
  return diagnosis('front-end', examined, lines);
}

/** Without the command nothing can be asked; a command that fails means that OpenNebula is ill. */
function unanswered(name: string, error: KvmIbError): Examined {
  const why = error.why ?? error.message;
  if (error.code === 'host-lacks') return skipped(name, why);
  const part: Part = {
    level: 'error',
    code: 'host-lacks',
    what: `OpenNebula does not say which ${name} it has`,
    why,
    fix: error.fix ?? 'systemctl status opennebula',
  };
  return { name, seen: 'no answer', findings: [part] };
}

function driverSections({ onedConf, networkDriver }: FrontEndDiagnosisFacts, sections: readonly VmMad[]): Examined {
  const name = 'driver';
  if (onedConf === null) return skipped(name, '/etc/one/oned.conf cannot be read; run it as root');
  const ours = sections.filter(({ directory }) => directory === DRIVER);
  if (ours.length > 0) {
    const seen = ours.map((section) => `VM_MAD "${printable(section.name, 40)}"`).join(', ');
    return { name, seen: `${seen} of oned.conf`, findings: [] };
  }
  if (networkDriver !== undefined) return networkDriverSection(onedConf, networkDriver.hooksOf);
  const part: Part = {
    level: 'error',
    code: 'host-lacks',
    what: 'no section VM_MAD of /etc/one/oned.conf runs kvm-ib',
    why: 'OpenNebula then uses it for no host',
    fix: 'kvm-ib install front-end --driver-name kvm-ib; or the name kvm, see docs/driver-name.md',
  };
  return { name, seen: 'none', findings: [part] };
}

function networkDriverSection(onedConf: string, hooksOf: readonly string[]): Examined {
  const name = 'driver';
  if (hooksOf.length > 0) return { name, seen: `the network driver, as hook of ${some(hooksOf)}`, findings: [] };
  const seen = `the network driver, VN_MAD "${DRIVER}"`;
  if (isNetworkDriverRegistered(onedConf)) return { name, seen, findings: [] };
  const part: Part = {
    level: 'warning',
    code: 'host-lacks',
    what: `no section VN_MAD_CONF of /etc/one/oned.conf names ${DRIVER}`,
    why: 'since 5.8 OpenNebula takes no virtual network with a VN_MAD that it does not know',
    fix: 'kvm-ib install front-end --vnm prints the section',
  };
  return { name, seen, findings: [part] };
}

function driverFiles({ driverFiles: fact, program, networkDriver }: FrontEndDiagnosisFacts): Examined {
  const name = 'driver files';
  if (isProblem(fact)) return skipped(name, fact.why ?? fact.message);
  const { missing, different } = fact;
  const sync = `kvm-ib install front-end${networkDriver?.alone ? ' --vnm' : ''}; then runuser -u oneadmin -- onehost sync --force`;
  const findings: Part[] = [];
  if (missing.length > 0) {
    findings.push({
      level: 'error',
      code: 'host-lacks',
      what: `${counted(missing.length, 'file')} of the driver missing in /var/lib/one/remotes`,
      why: `${some(missing)}; hosts get the driver from there`,
      fix: sync,
    });
  }
  if (different.length > 0) {
    findings.push({
      level: 'warning',
      code: 'host-lacks',
      what: `${counted(different.length, 'file')} of the driver differ from those of kvm-ib ${program}`,
      why: `${some(different)}; they are of another version, or were changed`,
      fix: `hosts first, then here: ${sync}`,
    });
  }
  return { name, seen: findings.length === 0 ? `those of kvm-ib ${program}` : 'not those of this version', findings };
}

function liveSnapshotWords(facts: FrontEndDiagnosisFacts): Examined {
  const name = 'live disk snapshots';
  if (facts.onedConf === null || facts.vmmExecrc === null) {
    return skipped(name, `${facts.onedConf === null ? 'oned.conf' : 'vmm_execrc'} cannot be read`);
  }
  if (isProblem(facts.version)) return skipped(name, facts.version.why ?? facts.version.message);
  const names = vmMads(facts.onedConf).flatMap((section) =>
    section.directory === DRIVER && section.name !== STOCK ? [section.name] : [],
  );
  const line = names.length === 0 ? undefined : liveSnapshotsLine(facts.version, facts, names);
  if (line === undefined) return { name, seen: names.length === 0 ? 'as those of kvm' : 'in vmm_execrc', findings: [] };
  const part: Part = {
    level: 'warning',
    code: 'host-lacks',
    what: `LIVE_DISK_SNAPSHOTS of vmm_execrc lacks words for ${names.map((one) => printable(one, 40)).join(', ')}`,
    why: 'OpenNebula then refuses to snapshot a disk while its VM runs, where it does so for the driver kvm',
    fix: names.includes(DRIVER)
      ? 'kvm-ib install front-end --driver-name kvm-ib; then systemctl restart opennebula'
      : `this line in /etc/one/vmm_exec/vmm_execrc, then systemctl restart opennebula: ${line}`,
  };
  return { name, seen: 'words missing', findings: [part] };
}

/**
 * A VM that is migrated runs the driver of its destination, and OpenNebula does not ask whether both are the same. Only
 * hosts that may get a KVM guest count: one of LXC or a test driver in the cluster does no harm.
 */
function clusters(hosts: readonly OneHost[], sections: readonly VmMad[]): Examined {
  const name = 'clusters';
  const byCluster = new Map<number, OneHost[]>();
  for (const host of hosts) byCluster.set(host.clusterId, [...(byCluster.get(host.clusterId) ?? []), host]);
  const isOurs = ({ driver }: OneHost): boolean =>
    sections.some((section) => section.name === driver && section.directory === DRIVER);
  const isOtherKvm = ({ driver }: OneHost): boolean =>
    sections.some((s) => s.name === driver && s.directory !== DRIVER && (s.type === 'KVM' || s.type === 'QEMU'));
  const findings: Part[] = [];
  for (const members of byCluster.values()) {
    const ours = members.filter(isOurs);
    const [first] = ours;
    if (first === undefined) continue;
    for (const host of members.filter(isOtherKvm)) {
      findings.push({
        level: 'error',
        code: 'conflict',
        what: `host ${quoted(host.name)} has the driver ${quoted(host.driver)}, beside ${counted(ours.length, 'host')} of kvm-ib in ${clusterPhrase(host)}`,
        why: `a VM that is migrated there from ${quoted(first.name)} leaves its IB address behind without a word, and one deployed there gets none`,
        fix: `as oneadmin, into another cluster: onecluster addhost CLUSTER ${word(host)}; or kvm-ib on it too: kvm-ib install host there, then here, as oneadmin: ${renameCommand(host, first.driver)}`,
      });
    }
  }
  for (const host of hosts) {
    if (host.driver !== DRIVER || sections.some((section) => section.name === host.driver)) continue;
    findings.push({
      level: 'error',
      code: 'host-lacks',
      what: `host ${quoted(host.name)} has the driver ${quoted(host.driver)}, which oned.conf does not have`,
      why: 'every action on its VMs fails',
      fix: `kvm-ib install front-end --driver-name kvm-ib; or as oneadmin: ${renameCommand(host, STOCK)}`,
    });
  }
  const own = hosts.filter(isOurs).length;
  return { name, seen: `${counted(own, 'host')} of kvm-ib, ${hosts.length - own} others`, findings };
}

/** Hosts that OpenNebula monitors: of others no report can be expected. */
const MONITORED = [1, 2];

/** What the probe of each host has put into OpenNebula. */
function reports(hosts: readonly OneHost[], sections: readonly VmMad[], program: string): Examined {
  const name = 'hosts';
  const ours = hosts.filter(({ driver }) => sections.some((s) => s.name === driver && s.directory === DRIVER));
  const findings: Part[] = [];
  for (const host of ours) {
    if (host.kvmIb !== null || !MONITORED.includes(host.state ?? -1)) continue;
    findings.push({
      level: 'warning',
      code: 'host-lacks',
      what: `host ${quoted(host.name)} has the driver ${quoted(host.driver)} and has not reported kvm-ib`,
      why: 'without kvm-ib on it each deploy there fails, of any VM; a new host reports within ten minutes',
      fix: 'on that host: kvm-ib doctor; if it is not there: kvm-ib install host',
    });
  }
  const older = ours.flatMap(({ name: host, kvmIb }) =>
    kvmIb !== null && kvmIb.version !== '' && kvmIb.version !== program ? [`${host} (${kvmIb.version})`] : [],
  );
  if (older.length > 0) {
    findings.push({
      level: 'warning',
      code: 'host-lacks',
      what: `${counted(older.length, 'host')} with another version than ${program}, that of this program`,
      why: some(older),
      fix: 'upgrade hosts first, then the front-end (docs/install-command.md)',
    });
  }
  const byCluster = new Map<number, OneHost[]>();
  for (const host of ours) byCluster.set(host.clusterId, [...(byCluster.get(host.clusterId) ?? []), host]);
  for (const members of byCluster.values()) {
    const configs = new Map<string, string[]>();
    for (const { name: host, kvmIb } of members) {
      if (kvmIb === null || kvmIb.config === '') continue;
      configs.set(kvmIb.config, [...(configs.get(kvmIb.config) ?? []), host]);
    }
    const [first] = members;
    if (configs.size < 2 || first === undefined) continue;
    findings.push({
      level: 'warning',
      code: 'conflict',
      what: `hosts of ${clusterPhrase(first)} have ${configs.size} different configurations`,
      why: `${[...configs.values()].map((names) => some(names)).join(' / ')}; a VM may get another IB address where it goes`,
      fix: 'the same /etc/kvm-ib/kvm-ib.yaml on each of them, then kvm-ib reconcile',
    });
  }
  const reporting = ours.filter(({ kvmIb }) => kvmIb !== null).length;
  return { name, seen: `${reporting} of ${ours.length} have reported`, findings };
}

/** Network drivers of OpenNebula that delete a bridge when its last guest goes. */
const DELETING = ['bridge', 'fw', 'ebtables'];

function keepsBridge(text: string | null): boolean {
  return /keep_empty_bridge["']?\s*[=:]\s*["']?(?:true|yes|1)\b/i.test(text ?? '');
}

/** @param on the names of bridges that must stay */
function deletingNetworks(
  networks: readonly OneNetwork[],
  on: readonly string[],
  defaults: string | null,
): readonly OneNetwork[] {
  const kept = keepsBridge((defaults ?? '').replace(/^[ \t]*#.*$/gm, ''));
  return networks.filter(({ bridge, driver, conf }) => {
    const named = bridge !== null && on.includes(bridge) && DELETING.includes(driver ?? '');
    return named && !(conf !== null && /keep_empty_bridge/i.test(conf) ? keepsBridge(conf) : kept);
  });
}

function virtualNetworks({ networks, bridges, networkDefaults }: FrontEndDiagnosisFacts): Examined {
  const name = 'virtual networks';
  if (bridges === null) {
    return skipped(name, 'no configuration here; kvm-ib install front-end --config kvm-ib.yaml puts it in place');
  }
  if (isProblem(networks)) return unanswered(name, networks);
  const findings = deletingNetworks(networks, bridges, networkDefaults).map((network): Part => {
    return {
      level: 'error',
      code: 'conflict',
      what: `virtual network ${quoted(network.name)} has VN_MAD ${quoted(network.driver ?? '')} on ${network.bridge}`,
      why: 'that driver deletes the bridge when the last guest of a host goes, and with it the network of libvirt',
      fix: `as oneadmin: echo 'VN_MAD = "dummy"' > /var/lib/one/vn_mad && onevnet update ${network.id ?? 'ID'} /var/lib/one/vn_mad --append (NICs of VMs keep the old one until they are instantiated anew)`,
    };
  });
  const on = networks.filter(({ bridge }) => bridge !== null && bridges.includes(bridge)).length;
  return { name, seen: `${on} on ${bridges.join(', ')}`, findings };
}

/** What a hypervisor shows of itself. */
export interface HostDiagnosisFacts {
  /** Findings of `config check` on links, addresses and sysctls; an error when the configuration does not hold. */
  readonly config: Fact<readonly Finding[]>;
  /** Those on other firewalls and older rules. */
  readonly firewalls: Fact<readonly Finding[]>;
  /** Node is where engine and units look for it. */
  readonly node: boolean;
  /** The drop-in is in /etc/sudoers.d. */
  readonly dropIn: boolean;
  /** The engine, started as the driver does; null: it answered. */
  readonly sudo: Fact<{ readonly said: string | null }>;
  /** The folder that OpenNebula copies to each host. */
  readonly tree: Fact<HostTree>;
  /** NICs of mapped VMs. */
  readonly nics: Fact<readonly OneNetwork[]>;
  readonly bridges: readonly string[];
  readonly networkDefaults: string | null;
}

export interface HostTree {
  /** Files that must be there, below /var/tmp/one. */
  readonly missing: readonly string[];
  /** The parser there is the one that came with the engine here; null: one of them is not there. */
  readonly sameVersion: boolean | null;
}

export function diagnoseHost(facts: HostDiagnosisFacts): Diagnosis {
  return diagnosis('host', [
    ownFindings('configuration', facts.config),
    ownFindings('other firewalls', facts.firewalls),
    nodeProgram(facts),
    hostTree(facts),
    sudo(facts),
    nicDrivers(facts),
  ]);
}

function ownFindings(name: string, fact: Fact<readonly Finding[]>): Examined {
  if (!isProblem(fact)) {
    return { name, seen: fact.length === 0 ? 'fits this host' : counted(fact.length, 'finding'), findings: fact };
  }
  if (fact.code === 'not-permitted') return skipped(name, fact.why ?? fact.message);
  const part: Part = {
    level: 'error',
    code: 'host-lacks',
    what: fact.message,
    why: fact.why ?? 'it does not hold',
    fix: fact.fix ?? 'kvm-ib config check',
  };
  return { name, seen: 'does not hold', findings: [part] };
}

function nodeProgram({ node }: HostDiagnosisFacts): Examined {
  const name = 'node';
  if (node) return { name, seen: 'where the engine looks for it', findings: [] };
  const part: Part = {
    level: 'error',
    code: 'host-lacks',
    what: 'node is neither /usr/bin/node nor /usr/local/bin/node',
    why: 'engine and units start it from these places alone',
    fix: 'install Node.js 20.11 or later for all users, or link it to /usr/local/bin/node',
  };
  return { name, seen: 'missing', findings: [part] };
}

function hostTree({ tree }: HostDiagnosisFacts): Examined {
  const name = 'driver files';
  if (isProblem(tree)) return skipped(name, tree.why ?? tree.message);
  if (tree.missing.length > 0) {
    const part: Part = {
      level: 'error',
      code: 'host-lacks',
      what: `${counted(tree.missing.length, 'file')} of the driver missing in /var/tmp/one`,
      why: `${some(tree.missing)}; OpenNebula runs the scripts there, and copies them from the front-end`,
      fix: 'on the front-end, as oneadmin: onehost sync --force; a host that is not created yet gets them then',
    };
    return { name, seen: 'missing', findings: [part] };
  }
  if (tree.sameVersion !== false) return { name, seen: 'of the version of the engine', findings: [] };
  const part: Part = {
    level: 'warning',
    code: 'host-lacks',
    what: 'the driver in /var/tmp/one is of another version than the engine in /usr/lib/kvm-ib',
    why: 'an engine serves the driver of its own version and the one before',
    fix: 'upgrade this host with kvm-ib install host; then on the front-end kvm-ib install front-end, and onehost sync --force as oneadmin',
  };
  return { name, seen: 'of another version', findings: [part] };
}

function sudo({ sudo: fact, dropIn }: HostDiagnosisFacts): Examined {
  const name = 'sudo';
  if (isProblem(fact)) return skipped(name, fact.why ?? fact.message);
  if (fact.said === null) return { name, seen: 'oneadmin may start the engine', findings: [] };
  const part: Part = {
    level: 'error',
    code: 'host-lacks',
    what: 'oneadmin cannot start the engine by sudo',
    why: printable(fact.said === '' ? 'it ended without a word' : fact.said, 300),
    fix: dropIn
      ? 'is /etc/sudoers.d read? visudo -c; sudo -l -U oneadmin; docs/install.md, step 5'
      : '/etc/sudoers.d/kvm-ib is not there: kvm-ib install host puts it in place',
  };
  return { name, seen: 'refused', findings: [part] };
}

function nicDrivers({ nics, bridges, networkDefaults }: HostDiagnosisFacts): Examined {
  const name = 'bridges';
  if (isProblem(nics)) return skipped(name, nics.why ?? nics.message);
  const seen = new Set<string>();
  const findings = deletingNetworks(nics, bridges, networkDefaults).flatMap((nic): readonly Part[] => {
    const key = `${nic.bridge} ${nic.driver} ${nic.name}`;
    if (seen.has(key)) return [];
    seen.add(key);
    return [
      {
        level: 'error',
        code: 'conflict',
        what: `a running VM has a NIC of ${quoted(nic.name)} with VN_MAD ${quoted(nic.driver ?? '')} on ${nic.bridge}`,
        why: 'OpenNebula deletes that bridge when the last guest of this host goes, and with it the network of libvirt',
        fix: 'on the front-end: kvm-ib doctor there says how to change the virtual network, for VMs to come; for this one set :keep_empty_bridge: true in /var/lib/one/remotes/etc/vnm/OpenNebulaNetwork.conf, then onehost sync --force as oneadmin',
      },
    ];
  });
  return { name, seen: `${counted(nics.length, 'NIC')} of mapped VMs`, findings };
}

function counted(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? '' : 's'}`;
}

function some(words: readonly string[]): string {
  const shown = words.slice(0, 5).map((one) => printable(one, 80));
  return `${shown.join(', ')}${words.length > 5 ? `, and ${words.length - 5} more` : ''}`;
}

function quoted(text: string): string {
  return `"${printable(text, 60)}"`;
}

/** How a command names this host: by its number where the name is not a plain word. */
function word({ id, name }: OneHost): string {
  return /^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$/.test(name) ? name : String(id ?? 'HOST');
}

function clusterName({ cluster, clusterId }: OneHost): string {
  return clusterId < 0 ? '-' : (cluster ?? String(clusterId));
}

function clusterPhrase(host: OneHost): string {
  return host.clusterId < 0 ? 'no cluster' : `cluster ${quoted(clusterName(host))}`;
}

/** `onehost update` changes VM_MAD since 4.14; what runs on the host follows at its next deploy or migration. */
function renameCommand(host: OneHost, driver: string): string {
  return `echo 'VM_MAD = "${printable(driver, 64)}"' > /var/lib/one/vm_mad && onehost update ${word(host)} /var/lib/one/vm_mad --append`;
}
