/**
 * The unprivileged part of the driver, and its conductor: reads argv, standard input and vm.xml of one VMM action, decides
 * what the VM should have, asks the engine for it, and runs the stock script.
 *
 * usage: parser.mjs ACTION STOCK_SCRIPT [ARG...]
 */
import { closeSync, constants, existsSync, fstatSync, openSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { KvmIbError, toKvmIbError } from '../core/errors.ts';
import type { Config, Mapping } from '../core/mapping.ts';
import { readCheckpoint } from '../host/checkpoint.ts';
import { readConfig } from '../host/config-file.ts';
import { exec } from '../host/exec.ts';
import type { Paths } from '../host/paths.ts';
import { pathsFrom } from '../host/paths.ts';
import { createStore } from '../host/store.ts';
import type { Domain } from '../libvirt/domain.ts';
import { interfacesOnBridge, parseDomain, spliceMtu } from '../libvirt/domain.ts';
import type { Vm } from '../opennebula/action-data.ts';
import { HOTPLUG_NIC_POWEROFF, parseActionData, parseVm } from '../opennebula/action-data.ts';
import type { ActionWish } from '../opennebula/action-wish.ts';
import { wishOfAction } from '../opennebula/action-wish.ts';
import type { CallSigns } from '../opennebula/caller.ts';
import { isBeforeVmXml, wantsErrorBlock } from '../opennebula/caller.ts';
import type { KnownAction, OwnCall } from '../opennebula/contract.ts';
import { failureMessage, failureText, parseActionCall } from '../opennebula/contract.ts';
import { DRIVER } from '../opennebula/registration.ts';
import { correctedAddresses, wishOfDomainXml, wishWithoutData } from '../opennebula/without-data.ts';
import type { Store } from '../ops/host.ts';
import type { Engine } from './engine-client.ts';
import { NO_WISH, startEngine } from './engine-client.ts';
import type { ReadOptions } from './input.ts';
import { readActionData, readRemotesVersion, readStdin, STDIN_LIMIT } from './input.ts';
import { complain, note, say, settle } from './log.ts';
import { migrateTo, underVerdict } from './migration.ts';
import type { Ending } from './stock.ts';
import { endLike, runStock, succeeded } from './stock.ts';
import { heldBy, isForeign, messageOf, NOTHING_HELD, touches } from './vm-request.ts';

/** Actions that give a VM no new mapping, but for an alias of a NIC that holds one. */
const TAKING: readonly KnownAction[] = ['detach_nic', 'prereconfigure', 'reconfigure', 'snapshot_revert'];

interface Context {
  readonly config: Config;
  readonly store: Store;
  /** Null: none came, or it is not ours to read. */
  readonly stdin: Buffer | null;
}

const [action = '', script = '', ...args] = process.argv.slice(2);
let signs: CallSigns = { remotesVersion: readRemotesVersion(join(dirname(script), '../..')) };
try {
  endLike(await run());
} catch (cause) {
  const error = toKvmIbError(cause, `Cannot finish ${action}`);
  say(failureText({ log: [], message: failureMessage(error) }, { block: wantsErrorBlock(signs) }));
  process.exit(error.exit);
}

async function run(): Promise<Ending> {
  const call = parseActionCall(action, args);
  const paths = pathsFrom(process.env);
  if (call.treatment === 'pass') return stock(null);
  signs = { ...signs, deployId: call.args['deployId'] };
  if (call.treatment === 'repair-before') return repairBefore(paths, call);
  if (call.treatment === 'release-after') return releaseAfter(paths, call);
  const context: Context = {
    config: readConfig(paths.config),
    store: createStore(paths.state),
    stdin: call.action === 'deploy' ? await readStdin(action) : await readInput(),
  };
  switch (call.treatment) {
    case 'sync-before':
      return call.action === 'deploy' ? deploy(context, call) : syncBefore(context, call);
    case 'check-before':
      return checkBefore(context, call);
    case 'sync-after':
      return call.action === 'reconfigure' ? followAfter(context, call) : unplug(context, call);
    case 'move':
      return migrate(context, call);
    case 'refuse-if-mapped':
      return refuseIfMapped(context, call);
  }
}

function stock(stdin: Uint8Array | null): Promise<Ending> {
  return runStock(script, args, stdin);
}

async function readInput(options: ReadOptions = {}): Promise<Buffer | null> {
  const bytes = await readActionData(action, options);
  signs = { ...signs, hasInput: bytes !== null };
  return bytes;
}

async function deploy(context: Context, call: OwnCall): Promise<Ending> {
  const { config } = context;
  const stdin = context.stdin ?? Buffer.alloc(0);
  // latin1: each byte is one character, so the XML goes out as it came in, whatever its encoding.
  const xml = stdin.toString('latin1');
  if (isForeign(config, xml, 'domain')) return stock(stdin);
  // It starts while the XML is read: the two take equally long. Until it is told something it reads and changes nothing.
  const engine = startEngine();
  try {
    const plan = readDeployment(context, xml, call);
    if (plan === undefined) {
      const ended = engine.close();
      const ending = await stock(stdin);
      await ended;
      return ending;
    }
    note(plan.wish.notes);
    note(await engine.sync(call.vmId, call.action, 'start', messageOf(plan.wish)));
    return await underVerdict(engine, () => stock(Buffer.from(plan.xml, 'latin1')));
  } finally {
    await engine.close();
  }
}

/** restore and attach_nic: the address works before the guest does. */
async function syncBefore(context: Context, call: OwnCall): Promise<Ending> {
  const wish = await concernedWish(context, call);
  if (wish === undefined) return stock(context.stdin);
  note(wish.notes);
  const engine = startEngine();
  try {
    const mode = call.action === 'attach_nic' ? 'plug' : 'start';
    note(await engine.sync(call.vmId, call.action, mode, messageOf(wish)));
    return await underVerdict(engine, () => stock(context.stdin));
  } finally {
    await engine.close();
  }
}

/**
 * reboot and reset change nothing for us, so whatever is wrong with a mapping, or with the configuration, must not keep an
 * operator from a reset.
 */
async function repairBefore(paths: Paths, call: OwnCall): Promise<Ending> {
  const stdin = await readInput({ mayBeEmpty: true });
  const engine = await repair(paths, call, stdin).catch((cause: unknown) =>
    complain(cause, 'The guest keeps what it has'),
  );
  try {
    return engine ? await underVerdict(engine, () => stock(stdin)) : await stock(stdin);
  } finally {
    await engine?.close();
  }
}

/** @returns the engine, which awaits the verdict; undefined when the VM does not concern us */
async function repair(paths: Paths, call: OwnCall, stdin: Buffer | null): Promise<Engine | undefined> {
  const context: Context = { config: readConfig(paths.config), store: createStore(paths.state), stdin };
  const wish = await concernedWish(context, call);
  if (wish === undefined) return undefined;
  const engine = startEngine();
  try {
    note(await engine.sync(call.vmId, call.action, 'restart', messageOf(wish)));
    return engine;
  } catch (cause) {
    await engine.close();
    throw cause;
  }
}

/**
 * prereconfigure is the first that is called for an alias, and the last step at which a refusal costs the guest nothing:
 * behind it the context is written anew and its CD changed.
 */
async function checkBefore(context: Context, call: OwnCall): Promise<Ending> {
  const wish = await concernedWish(context, call);
  if (wish !== undefined && wish.attachedAliases.length > 0) {
    const engine = startEngine();
    try {
      note(await engine.sync(call.vmId, call.action, 'check', messageOf(wish)));
    } finally {
      await engine.close();
    }
  }
  return stock(context.stdin);
}

/** reconfigure is the last step of an alias that comes or goes: what it changes, no later step can fail over. */
async function followAfter(context: Context, call: OwnCall): Promise<Ending> {
  const wish = await concernedWish(context, call);
  if (wish === undefined) return stock(context.stdin);
  const ending = await stock(context.stdin);
  if (!succeeded(ending)) return ending;
  note(wish.notes);
  const engine = startEngine();
  try {
    note(await engine.sync(call.vmId, call.action, 'follow', messageOf(wish)));
  } finally {
    await engine.close();
  }
  return ending;
}

/** detach_nic and snapshot_revert: the NICs that the domain has afterwards are what counts. */
async function unplug(context: Context, call: OwnCall): Promise<Ending> {
  const wish = await concernedWish(context, call);
  if (wish === undefined) return stock(context.stdin);
  const engine = startEngine();
  try {
    note(await engine.sync(call.vmId, call.action, 'unplug', messageOf(wish)));
    return await underVerdict(engine, () => stock(context.stdin));
  } finally {
    await engine.close();
  }
}

/**
 * shutdown, cancel and save: neither a broken configuration nor data that cannot be read keeps a VM from ending. What is to
 * be released is known without them.
 */
async function releaseAfter(paths: Paths, call: OwnCall): Promise<Ending> {
  const stdin = await readInput({ mayBeEmpty: true });
  const isOurs = maySomethingBeHeld(paths, call, stdin);
  const ending = await stock(stdin);
  if (!isOurs) return ending;
  const engine = startEngine();
  try {
    if (succeeded(ending)) {
      // The domain is gone, so the action succeeded: to say otherwise would make OpenNebula take it for running. What
      // stays behind is in the state file, and reconcile ends it.
      await settle(() => engine.sync(call.vmId, call.action, 'release', NO_WISH));
    } else {
      // It failed, but the domain may have gone all the same: libvirt is asked. Its own message is the one to show.
      await engine.settle(call.vmId).catch(() => undefined);
    }
  } finally {
    await engine.close();
  }
  return ending;
}

/** @throws KvmIbError `usage` when the data is that of another VM */
function maySomethingBeHeld(paths: Paths, call: OwnCall, stdin: Buffer | null): boolean {
  const store = createStore(paths.state);
  if (stdin === null) return heldBy(store, call.vmId) !== undefined;
  try {
    return concernedVm({ config: readConfig(paths.config), store }, call, stdin) !== undefined;
  } catch (cause) {
    const { code } = toKvmIbError(cause);
    if (code !== 'bad-input' && code !== 'bad-config') throw cause;
    const isHeld = heldBy(store, call.vmId) !== undefined;
    // Of the configuration the engine complains, if there is something to release.
    if (code === 'bad-input') complain(cause, `Only what VM ${call.vmId} holds here counts for ${call.action}`);
    return isHeld;
  }
}

/** What a VM that is to be deployed should have, and its domain XML with our MTUs; undefined: it has no NIC on our bridges. */
function readDeployment(
  context: Context,
  xml: string,
  call: OwnCall,
): { readonly wish: ActionWish; readonly xml: string } | undefined {
  const domain = parseDomain(xml);
  signs = { ...signs, domainVersion: domain.openNebulaVersion };
  if (!touchesDomain(context.config, domain)) return undefined;
  const path = join(dirname(call.args['deploymentFile'] ?? ''), 'vm.xml');
  const text = readVmXml(path);
  signs = { ...signs, hasVmXml: text !== undefined };
  const wish =
    text === undefined ? wishWithoutVmXml(context, call, domain, path) : wishOfVmXml(context, call, domain, text);
  const mtus = new Map(wish.networksTouched.map((network) => [String(network.bridge), deviceMtu(network.device)]));
  return { wish, xml: spliceMtu(xml, mtus).xml };
}

function touchesDomain(config: Config, domain: Domain): boolean {
  return config.networks.some((network) => interfacesOnBridge(domain, network.bridge).length > 0);
}

function wishOfVmXml({ config }: Context, call: OwnCall, domain: Domain, text: string): ActionWish {
  const vm = parseVm(text);
  requireVm(vm, call.vmId);
  const wish = wishOfAction(config, vm, call.action, NOTHING_HELD);
  requireAgreement(config, domain, vm, wish.mappings);
  return wish;
}

/** Before 6.0.0 no vm.xml is written: the domain XML is all there is. */
function wishWithoutVmXml({ config, store }: Context, call: OwnCall, domain: Domain, path: string): ActionWish {
  if (isBeforeVmXml(signs)) return wishOfDomainXml(config, call, domain, store.read({ kind: 'vm', vm: call.vmId }));
  throw new KvmIbError('bad-input', `Cannot read ${path}`, {
    why: 'it is not there',
    fix: 'deploy the VM again: OpenNebula 6.0 and later writes vm.xml there before it calls deploy',
  });
}

/** What an action on a VM that is there wants of it; undefined when the VM has nothing to do with kvm-ib. */
async function concernedWish(context: Context, call: OwnCall): Promise<ActionWish | undefined> {
  const { config, store, stdin } = context;
  if (stdin !== null) {
    const vm = concernedVm(context, call, stdin);
    return vm === undefined ? undefined : readWish(context, call, vm);
  }
  if (call.action !== 'restore') return wishWithoutData(config, call, heldBy(store, call.vmId));
  const domain = parseDomain(
    await readCheckpoint(exec, call.args['checkpointFile'] ?? ''),
    'the domain XML in the checkpoint',
  );
  if (!touchesDomain(config, domain)) return undefined;
  return wishOfDomainXml(config, call, domain, store.read({ kind: 'vm', vm: call.vmId }));
}

function readWish({ config, store }: Context, call: OwnCall, vm: Vm): ActionWish {
  const held = heldBy(store, vm.id);
  const wish = wishOfAction(config, vm, call.action, held ?? NOTHING_HELD, { hasNetworkDriver });
  // prereconfigure only looks whether it can be; reconfigure comes behind it.
  if (isBeforeVmXml(signs) && call.action !== 'prereconfigure') note(correctedAddresses(held, wish));
  return wish;
}

/** Whether OpenNebula calls our network driver for NICs of this VN_MAD: it is that driver, or hangs in its folders of hooks. */
function hasNetworkDriver(vnMad: string): boolean {
  if (!/^[A-Za-z0-9_-][A-Za-z0-9_.-]*$/.test(vnMad)) return false;
  return existsSync(join(dirname(script), '../../vnm', vnMad, vnMad === DRIVER ? 'post' : `post.d/${DRIVER}`));
}

/** The VM of an action on one that is there; undefined when it has nothing to do with kvm-ib, or no domain to follow. */
function concernedVm({ config, store }: Omit<Context, 'stdin'>, call: OwnCall, stdin: Buffer): Vm | undefined {
  const data = stdin.toString('latin1');
  const held = heldBy(store, call.vmId);
  if (held === undefined && isForeign(config, data, 'VMM_DRIVER_ACTION_DATA')) return undefined;
  let vm: Vm;
  try {
    ({ vm } = parseActionData(data));
  } catch (cause) {
    // Where nothing is held and none is attached there is nothing to lose: not ours to judge.
    if (held === undefined && TAKING.includes(call.action)) return undefined;
    throw cause;
  }
  requireVm(vm, call.vmId);
  if (held === undefined && !touches(config, vm)) return undefined;
  return vm.lcmState === HOTPLUG_NIC_POWEROFF ? undefined : vm;
}

/** The source of a live migration. Storage moves within one host since OpenNebula 7.2: its addresses stay where they are. */
async function migrate(context: Context, call: OwnCall): Promise<Ending> {
  const run = () => stock(context.stdin);
  const { destination = '', source = '' } = call.args;
  const wish = await concernedWish(context, call);
  if (wish === undefined || destination === source) return run();
  note(wish.notes);
  return migrateTo(destination, { vm: call.vmId, action: call.action, wish: messageOf(wish) }, run);
}

/** A front-end has no guests: what runs there cannot follow one. */
function refuseIfMapped(context: Context, call: OwnCall): Promise<Ending> {
  const { store, stdin } = context;
  const isOurs =
    stdin === null ? heldBy(store, call.vmId) !== undefined : concernedVm(context, call, stdin) !== undefined;
  if (!isOurs) return stock(stdin);
  throw new KvmIbError('unsupported', `Cannot ${call.action} VM ${call.vmId}`, {
    why: 'it has a NIC on a bridge of kvm-ib, and its addresses can only be moved from the host that it runs on',
    fix: 'take `-l migrate=migrate_local` out of ARGUMENTS of VM_MAD in /etc/one/oned.conf, then restart oned',
  });
}

function requireVm(vm: Vm, vmId: number): void {
  if (vm.id === vmId) return;
  throw new KvmIbError('usage', `Cannot run ${action} for VM ${vmId}`, {
    why: `the VM data is that of VM ${vm.id}`,
    fix: 'let OpenNebula (one_vmm_exec) call it',
  });
}

/** The two descriptions of the VM come from one source; where they differ, one of them is not this VM's. */
function requireAgreement(config: Config, domain: Domain, vm: Vm, mappings: readonly Mapping[]): void {
  const disagree = (why: string): KvmIbError =>
    new KvmIbError('bad-input', `Cannot deploy VM ${vm.id}`, {
      why,
      fix: 'remove the stale vm.xml beside the deployment file, or let OpenNebula write both anew by deploying again',
    });
  for (const network of config.networks) {
    const inDomain = new Set(interfacesOnBridge(domain, network.bridge).map((one) => one.mac?.toLowerCase()));
    const inVm = vm.nics.filter((nic) => nic.bridge === network.bridge);
    for (const mac of inDomain) {
      if (!inVm.some((nic) => nic.mac?.toLowerCase() === mac)) {
        throw disagree(
          `the domain XML has an interface ${mac ?? 'without MAC'} on ${network.bridge} that vm.xml does not have`,
        );
      }
    }
    for (const mapping of mappings.filter((m) => m.network === network.name)) {
      if (!inDomain.has(mapping.mac ?? '')) {
        throw disagree(
          `vm.xml has NIC ${mapping.nic} (${mapping.mac}) on ${network.bridge} that the domain XML does not have`,
        );
      }
    }
  }
}

/** MTU of the IPoIB link in bytes. */
function deviceMtu(device: string): number {
  let text: string;
  try {
    text = readFileSync(`/sys/class/net/${device}/mtu`, 'latin1').trim();
  } catch (cause) {
    throw new KvmIbError('host-lacks', `Cannot read the MTU of ${device}`, {
      why: `this host has no link ${device}`,
      fix: `bring the IPoIB link up (ip link show ${device}), or correct \`device\` in the configuration`,
      cause,
    });
  }
  return Number(text);
}

/** vm.xml, which one_vmm_exec leaves beside the deployment file since 6.0.0; undefined when it is not there. */
function readVmXml(path: string): string | undefined {
  let fd: number;
  try {
    fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw new KvmIbError('bad-input', `Cannot read ${path}`, {
      why: (cause as Error).message,
      fix: 'let oneadmin read it: one_vmm_exec writes vm.xml there before it calls deploy',
      cause,
    });
  }
  try {
    const stat = fstatSync(fd);
    if (!stat.isFile() || stat.size > STDIN_LIMIT) {
      throw new KvmIbError('bad-input', `Cannot read ${path}`, { why: 'it is not a plain file, or too large' });
    }
    if (stat.size === 0) {
      throw new KvmIbError('bad-input', `Cannot read ${path}`, {
        why: 'it is empty',
        fix: "look above in the VM's log; OpenNebula before 6.6 lets the host's shell expand $ and backticks in values of the VM: encode a script in CONTEXT as START_SCRIPT_BASE64",
      });
    }
    return readFileSync(fd, 'latin1');
  } finally {
    closeSync(fd);
  }
}
