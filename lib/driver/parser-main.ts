/**
 * The unprivileged part of the driver, and its conductor: reads argv, standard input and vm.xml of one VMM action, decides
 * what the VM should have, asks the engine for it, and runs the stock script.
 *
 * usage: parser.mjs ACTION STOCK_SCRIPT [ARG...]
 */
import { closeSync, constants, fstatSync, openSync, readFileSync, readSync, writeSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { isatty } from 'node:tty';
import { KvmIbError, toKvmIbError } from '../core/errors.ts';
import type { Config, Mapping } from '../core/mapping.ts';
import { readConfig } from '../host/config-file.ts';
import { millisecondsFrom, pathsFrom } from '../host/paths.ts';
import { interfacesOnBridge, parseDomain, spliceMtu } from '../libvirt/domain.ts';
import type { Vm } from '../opennebula/action-data.ts';
import { mayTouchBridges, parseActionData, parseVm } from '../opennebula/action-data.ts';
import type { ActionCall } from '../opennebula/contract.ts';
import { failureMessage, failureText, logText, parseActionCall } from '../opennebula/contract.ts';
import { wishedMappings } from '../opennebula/mappings.ts';
import { startEngine } from './engine-client.ts';
import type { Ending } from './stock.ts';
import { endLike, runStock, succeeded } from './stock.ts';

const STDIN_LIMIT = 64 * 1024 * 1024;
const STDIN_TIMEOUT_MS = millisecondsFrom(process.env['KVM_IB_STDIN_TIMEOUT_MS']) ?? 60_000;

interface Call {
  readonly config: Config;
  readonly script: string;
  readonly args: readonly string[];
  readonly stdin: Buffer;
}

const [action = '', script = '', ...args] = process.argv.slice(2);
try {
  endLike(await run());
} catch (cause) {
  const error = toKvmIbError(cause, `Cannot finish ${action}`);
  say(failureText({ log: [], message: failureMessage(error) }));
  process.exit(error.exit);
}

async function run(): Promise<Ending> {
  const call = parseActionCall(action, args);
  const config = readConfig(pathsFrom(process.env).config);
  const stdin = await readStdin();
  const context: Call = { config, script, args, stdin };
  switch (call.treatment) {
    case 'pass':
      return runStock(script, args, stdin);
    case 'sync-before':
      return deploy(context, call);
    case 'release-after':
      return release(context, call);
    case 'refuse-if-mapped':
      return refuseIfMapped(context, call);
  }
}

async function deploy(context: Call, call: Extract<ActionCall, { treatment: 'sync-before' }>): Promise<Ending> {
  const { config, script, args, stdin } = context;
  // latin1: each byte is one character, so the XML goes out as it came in, whatever its encoding.
  const xml = stdin.toString('latin1');
  if (isForeign(config, xml, 'domain')) return runStock(script, args, stdin);
  // It starts while the XML is read: the two take equally long. Until it is told something it reads and changes nothing.
  const engine = startEngine();
  try {
    const wish = readWish(config, xml, call);
    if (wish === undefined) {
      const ended = engine.close();
      const ending = await runStock(script, args, stdin);
      await ended;
      return ending;
    }
    for (const note of wish.notes) say(logText({ level: 'info', text: note }));
    inform(await engine.sync(call.vmId, call.action, wish.mappings, true));
    let ending: Ending;
    try {
      ending = await runStock(script, args, Buffer.from(wish.xml, 'latin1'));
    } catch (error) {
      await settle(() => engine.verdict('undo'));
      throw error;
    }
    await settle(() => engine.verdict(succeeded(ending) ? 'commit' : 'undo'));
    return ending;
  } finally {
    await engine.close();
  }
}

/** What a VM that is to be deployed should have, and its domain XML with our MTUs; undefined: it has no NIC on our bridges. */
function readWish(
  config: Config,
  xml: string,
  call: Extract<ActionCall, { treatment: 'sync-before' }>,
): { readonly mappings: readonly Mapping[]; readonly notes: readonly string[]; readonly xml: string } | undefined {
  const domain = parseDomain(xml);
  if (!config.networks.some((network) => interfacesOnBridge(domain, network.bridge).length > 0)) return undefined;
  const vm = parseVm(readVmXml(join(dirname(call.deploymentFile), 'vm.xml')));
  requireVm(vm, call.vmId);
  const { mappings, networksTouched, notes } = wishedMappings(config, vm);
  requireAgreement(config, domain, vm, mappings);
  const mtus = new Map(networksTouched.map((network) => [String(network.bridge), deviceMtu(network.device)]));
  return { mappings, notes, xml: spliceMtu(xml, mtus).xml };
}

async function release(context: Call, call: Extract<ActionCall, { treatment: 'release-after' }>): Promise<Ending> {
  const { config, script, args, stdin } = context;
  const data = stdin.toString('latin1');
  if (isForeign(config, data, 'VMM_DRIVER_ACTION_DATA')) return runStock(script, args, stdin);
  const { vm } = parseActionData(data);
  requireVm(vm, call.vmId);
  const ending = await runStock(script, args, stdin);
  if (!succeeded(ending) || !touches(config, vm)) return ending;
  const engine = startEngine();
  try {
    // The domain is gone, so the action succeeded: to say otherwise would make OpenNebula take it for running. What
    // stays behind is in the state file, and reconcile ends it.
    await settle(() => engine.sync(call.vmId, call.action, [], false));
  } finally {
    await engine.close();
  }
  return ending;
}

async function refuseIfMapped(
  context: Call,
  call: Extract<ActionCall, { treatment: 'refuse-if-mapped' }>,
): Promise<Ending> {
  const data = context.stdin.toString('latin1');
  if (isForeign(context.config, data, 'VMM_DRIVER_ACTION_DATA')) {
    return runStock(context.script, context.args, context.stdin);
  }
  const { vm } = parseActionData(data);
  requireVm(vm, call.vmId);
  if (!touches(context.config, vm)) return runStock(context.script, context.args, context.stdin);
  throw new KvmIbError('unsupported', `Cannot ${call.action} VM ${vm.id}`, {
    why: `it has a NIC on a bridge of kvm-ib, and this version does not do ${call.action} for such a VM yet`,
    fix: 'power the VM off and deploy it anew instead',
  });
}

/**
 * A whole document in which none of our bridges can stand: not ours to judge, so it costs no parse and cannot fail on
 * one. What is cut off, or is another kind of document, is looked at.
 */
function isForeign(config: Config, text: string, root: string): boolean {
  const bridges = config.networks.map((network) => network.bridge);
  return (
    new RegExp(`^\\s*(?:<\\?xml[^>]*\\?>\\s*)?<${root}[\\s>]`).test(text.slice(0, 1000)) &&
    text.slice(-1000).trimEnd().endsWith(`</${root}>`) &&
    !mayTouchBridges(text, bridges)
  );
}

function touches(config: Config, vm: Vm): boolean {
  return config.networks.some((network) => [...vm.nics, ...vm.skipped].some((nic) => nic.bridge === network.bridge));
}

function requireVm(vm: Vm, vmId: number): void {
  if (vm.id === vmId) return;
  throw new KvmIbError('bad-input', `Cannot run ${action} for VM ${vmId}`, {
    why: `the VM data is that of VM ${vm.id}`,
    fix: 'let OpenNebula (one_vmm_exec) call it',
  });
}

/** The two descriptions of the VM come from one source; where they differ, one of them is not this VM's. */
function requireAgreement(
  config: Config,
  domain: ReturnType<typeof parseDomain>,
  vm: Vm,
  mappings: readonly Mapping[],
): void {
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

/** vm.xml, which one_vmm_exec leaves beside the deployment file since 6.0.0. */
function readVmXml(path: string): string {
  let fd: number;
  try {
    fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
  } catch (cause) {
    throw new KvmIbError('bad-input', `Cannot read ${path}`, {
      why: (cause as Error).message,
      fix: 'kvm-ib serves OpenNebula 6.0 and later, which writes vm.xml there before it calls deploy',
      cause,
    });
  }
  try {
    const stat = fstatSync(fd);
    if (!stat.isFile() || stat.size > STDIN_LIMIT) {
      throw new KvmIbError('bad-input', `Cannot read ${path}`, { why: 'it is not a plain file, or too large' });
    }
    return readFileSync(fd, 'latin1');
  } finally {
    closeSync(fd);
  }
}

/** All of standard input: bounded, and never waited for without end. */
async function readStdin(): Promise<Buffer> {
  const broken = (why: string): KvmIbError =>
    new KvmIbError('bad-input', `Cannot read the standard input of ${action}`, {
      why,
      fix: 'let OpenNebula (one_vmm_exec) call it: it sends the VM there',
    });
  if (isatty(0)) throw broken('it is a terminal');
  let stat: ReturnType<typeof fstatSync>;
  try {
    stat = fstatSync(0);
  } catch {
    throw broken('it is closed');
  }
  const chunks: Buffer[] = [];
  let size = 0;
  const add = (chunk: Buffer): void => {
    size += chunk.length;
    if (size > STDIN_LIMIT) throw broken(`it is larger than ${STDIN_LIMIT} bytes`);
    chunks.push(chunk);
  };
  if (stat.isFile()) {
    for (;;) {
      const chunk = Buffer.alloc(1024 * 1024);
      const count = readSync(0, chunk, 0, chunk.length, null);
      if (count === 0) break;
      add(chunk.subarray(0, count));
    }
  } else {
    const timer = setTimeout(
      () => process.stdin.destroy(broken(`it did not end within ${STDIN_TIMEOUT_MS} ms`)),
      STDIN_TIMEOUT_MS,
    );
    try {
      for await (const chunk of process.stdin) add(chunk as Buffer);
    } catch (error) {
      throw error instanceof KvmIbError ? error : broken((error as Error).message);
    } finally {
      clearTimeout(timer);
    }
  }
  if (size === 0) throw broken('it is empty');
  return Buffer.concat(chunks);
}

/** Runs the last step of an action whose outcome is decided: what goes wrong is logged and left to reconcile. */
async function settle(step: () => Promise<readonly string[]>): Promise<void> {
  try {
    inform(await step());
  } catch (cause) {
    const error = toKvmIbError(cause);
    say(logText({ level: 'error', text: `${failureMessage(error)}. The next kvm-ib reconcile brings it right` }));
  }
}

function inform(warnings: readonly string[]): void {
  for (const text of warnings) say(logText({ level: 'info', text }));
}

function say(text: string): void {
  try {
    writeSync(2, text);
  } catch {
    // Nobody listens any more.
  }
}
