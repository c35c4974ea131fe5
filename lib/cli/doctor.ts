/** `kvm-ib doctor`: looks at this machine; `ops/doctor.ts` says what it comes to. */
import { lstatSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import type { Command } from 'commander';
import { KvmIbError, toKvmIbError } from '../core/errors.ts';
import type { Config } from '../core/mapping.ts';
import { readConfig } from '../host/config-file.ts';
import { exec } from '../host/exec.ts';
import type { Target } from '../host/installer.ts';
import { findPackage, openTarget } from '../host/installer.ts';
import { pathsFrom } from '../host/paths.ts';
import { createStore } from '../host/store.ts';
import type { OneNetwork } from '../opennebula/pools.ts';
import { parseNicDrivers } from '../opennebula/pools.ts';
import { DRIVER, parseOneVersion, STOCK } from '../opennebula/registration.ts';
import { worstOf } from '../ops/check.ts';
import type { Diagnosis, Fact, FrontEndDiagnosisFacts, HostTree } from '../ops/doctor.ts';
import { diagnoseFrontEnd, diagnoseHost, together } from '../ops/doctor.ts';
import { planInstall } from '../ops/install.ts';
import {
  DRIVER_DIRECTORY,
  FRONT_END_USER,
  frontEndItems,
  ONED_CONF,
  REMOTES,
  VERSION_FILE,
  VMM_EXECRC,
} from '../ops/install-front-end.ts';
import { LIBRARY } from '../ops/install-host.ts';
import { installedNetworkDriver, networkDriverItems } from '../ops/install-network-driver.ts';
import { configFindings, firewallFindings, oneHosts, oneNetworks } from './facts.ts';
import type { Shell } from './install.ts';
import { renderDiagnosis } from './render.ts';

const ENGINE = `${LIBRARY}/kvm-ib-engine`;
/** Where OpenNebula copies its remotes to on each host. */
const HOST_REMOTES = '/var/tmp/one';
const DATASTORES = '/var/lib/one/datastores';
const NETWORK_DEFAULTS = 'etc/vnm/OpenNebulaNetwork.conf';
const XML_LIMIT = 4 * 1024 * 1024;

interface DoctorOptions {
  readonly config?: string;
  readonly json?: boolean;
}

export function addDoctorCommand(program: Command, shell: Shell): void {
  shell
    .command(
      program,
      'doctor',
      'Look whether this machine is set up right: as a front-end, as a host, or as both',
      [],
      ['kvm-ib doctor', 'kvm-ib doctor --json'],
    )
    .addHelpText(
      'after',
      `
It reads and changes nothing. Run it as root: what another user may not see it leaves out, and says so.
Exit status: 0 nothing but warnings; 4 an error that is a conflict, such as the stock driver in a cluster of kvm-ib;
6 another error, or this machine is neither front-end nor host.
`,
    )
    .action((options: DoctorOptions) => doctor(shell, options));
}

async function doctor(shell: Shell, options: DoctorOptions): Promise<void> {
  shell.useJson(options.json ?? false);
  const target = openTarget('/', FRONT_END_USER);
  const file = options.config ?? pathsFrom(process.env).config;
  const frontEnd = isThere(target, REMOTES) && isThere(target, ONED_CONF);
  const host = isThere(target, ENGINE);
  if (!frontEnd && !host) {
    throw new KvmIbError('host-lacks', 'Cannot examine this machine', {
      why: `it is no front-end (no ${REMOTES} and ${ONED_CONF}), and kvm-ib is not installed on it (no ${ENGINE})`,
      fix: 'run it on the front-end, or on a host after kvm-ib install host',
    });
  }
  const found: Diagnosis[] = [];
  if (frontEnd) found.push(diagnoseFrontEnd(await frontEndFacts(shell, target, file)));
  if (host) found.push(diagnoseHost(await hostFacts(target, file)));
  const result = together(found);
  const worst = worstOf(result.findings);
  if (worst !== undefined) shell.exit(worst);
  if (options.json) {
    shell.json({ ok: worst === undefined, version: shell.version, frontEnd, host, ...result });
    return;
  }
  shell.out(renderDiagnosis(result, shell.colour));
  const count = (level: string): number => result.findings.filter((one) => one.level === level).length;
  const left = result.checks.filter(({ state }) => state === 'skipped').length;
  const summary =
    result.findings.length === 0 ? 'Nothing found' : `Errors: ${count('error')}, warnings: ${count('warning')}`;
  shell.out(`\n${summary}${left === 0 ? '' : `; not looked at: ${left} of ${result.checks.length}`}.\n`);
}

async function frontEndFacts(shell: Shell, target: Target, file: string): Promise<FrontEndDiagnosisFacts> {
  const config = attempt(() => readConfig(file));
  const network = attempt(() => installedNetworkDriver(target.observe(findPackage(), new Map())));
  const networkDriver =
    network instanceof KvmIbError || !network.isThere
      ? undefined
      : { hooksOf: network.hooksOf, alone: !target.exists(DRIVER_DIRECTORY) };
  return {
    onedConf: target.readText(ONED_CONF),
    vmmExecrc: target.readText(VMM_EXECRC),
    version: attempt(() => parseOneVersion(target.readText(VERSION_FILE) ?? '')),
    networkDriver,
    driverFiles: attempt(() => {
      const pack = findPackage();
      const drivers = pack.list('drivers');
      const items = [
        ...frontEndItems(drivers, null, networkDriver?.alone !== true),
        ...(networkDriver === undefined ? [] : networkDriverItems(drivers, networkDriver.hooksOf)),
      ];
      const operations = planInstall(items, target.observe(pack, new Map()));
      const files = operations.filter(({ kind, sign }) => kind === 'file' && sign !== '=');
      const paths = (sign: '+' | '~'): readonly string[] =>
        files.filter((one) => one.sign === sign).map(({ path }) => path.slice(REMOTES.length + 1));
      return { missing: paths('+'), different: paths('~') };
    }),
    program: shell.version,
    hosts: await oneHosts(),
    networks: await oneNetworks(),
    bridges: config instanceof KvmIbError ? null : config.networks.map(({ bridge }) => bridge),
    networkDefaults: target.readText(`${REMOTES}/${NETWORK_DEFAULTS}`),
  };
}

async function hostFacts(target: Target, file: string): Promise<Parameters<typeof diagnoseHost>[0]> {
  const config = attempt(() => readConfig(file));
  const root = process.getuid?.() === 0;
  const hasUser = (target.readText('/etc/passwd') ?? '')
    .split('\n')
    .some((line) => line.startsWith(`${FRONT_END_USER}:`));
  const noUser = new KvmIbError('host-lacks', 'Cannot look at the driver', {
    why: `this host has no user ${FRONT_END_USER}, so it is none of OpenNebula`,
  });
  const bridges = config instanceof KvmIbError ? [] : config.networks.map(({ bridge }) => bridge);
  return {
    config: config instanceof KvmIbError ? config : await attemptLater(() => configFindings(config)),
    firewalls: await firewalls(config, root),
    node: isThere(target, '/usr/bin/node') || isThere(target, '/usr/local/bin/node'),
    dropIn: isThere(target, '/etc/sudoers.d/kvm-ib'),
    sudo: hasUser ? await startEngine(root) : noUser,
    tree: hasUser ? hostTree(target) : noUser,
    nics: attempt(() => mappedNics(target)),
    bridges,
    networkDefaults: target.readText(`${HOST_REMOTES}/${NETWORK_DEFAULTS}`),
  };
}

function firewalls(config: Fact<Config>, root: boolean): Promise<Fact<Awaited<ReturnType<typeof firewallFindings>>>> {
  const without = (why: string): Promise<KvmIbError> =>
    Promise.resolve(new KvmIbError('not-permitted', 'Cannot look at the firewalls', { why }));
  if (config instanceof KvmIbError) return without('the configuration does not hold');
  return root ? attemptLater(() => firewallFindings(config)) : without('this needs root');
}

/** As the driver starts it. With nothing to read it ends at once, having changed nothing. */
async function startEngine(root: boolean): Promise<Fact<{ readonly said: string | null }>> {
  const call = ['/usr/bin/sudo', '-n', ENGINE] as const;
  if (!root) {
    return new KvmIbError('not-permitted', 'Cannot try sudo', {
      why: `this needs root, to try it as ${FRONT_END_USER}`,
    });
  }
  try {
    const { status, stdout, stderr } = await exec(['/usr/sbin/runuser', '-u', FRONT_END_USER, '--', ...call], {
      timeout: 20_000,
    });
    return { said: status === 0 ? null : ((stderr.trim() || stdout.trim()).split('\n').at(-1) ?? '') };
  } catch (cause) {
    return { said: toKvmIbError(cause).why ?? 'it could not be started' };
  }
}

function hostTree(target: Target): HostTree {
  const wanted = [
    ...['launch.sh', 'parser.mjs', 'deploy', 'shutdown', 'cancel'].map((name) => `vmm/${DRIVER}/${name}`),
    `vmm/${STOCK}/deploy`,
  ];
  const there = target.readText(`${HOST_REMOTES}/vmm/${DRIVER}/parser.mjs`);
  const here = target.readText(`${LIBRARY}/parser.mjs`);
  return {
    missing: wanted.filter((path) => !isThere(target, `${HOST_REMOTES}/${path}`)),
    sameVersion: there === null || here === null ? null : there === here,
  };
}

/** The NICs of the VMs that are mapped here, from the description that OpenNebula leaves beside their deployment files. */
function mappedNics(target: Target): readonly OneNetwork[] {
  const { files } = createStore(pathsFrom(process.env).state).all();
  const datastores = directoriesIn(DATASTORES).filter((name) => /^[0-9]{1,9}$/.test(name));
  return files.flatMap(({ owner }) => {
    if (owner.kind !== 'vm') return [];
    return datastores.flatMap((datastore) => {
      const path = join(DATASTORES, datastore, String(owner.vm), 'vm.xml');
      const size = lstatSync(path, { throwIfNoEntry: false })?.size ?? 0;
      const text = size > 0 && size <= XML_LIMIT ? target.readText(path) : null;
      // One that cannot be read is the matter of the driver, which refuses it.
      const nics = text === null ? [] : attempt(() => parseNicDrivers(text));
      return nics instanceof KvmIbError ? [] : nics;
    });
  });
}

/** Where another user may not even look, it counts as there: what cannot be seen must not read as missing. */
function isThere(target: Target, path: string): boolean {
  try {
    return target.exists(path);
  } catch {
    return true;
  }
}

function directoriesIn(path: string): readonly string[] {
  try {
    return readdirSync(path);
  } catch {
    return [];
  }
}

function attempt<T>(act: () => T): Fact<T> {
  try {
    return act();
  } catch (cause) {
    return toKvmIbError(cause);
  }
}

async function attemptLater<T>(act: () => Promise<T>): Promise<Fact<T>> {
  try {
    return await act();
  } catch (cause) {
    return toKvmIbError(cause);
  }
}
