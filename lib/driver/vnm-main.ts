/**
 * The network driver: for sites that keep the stock VMM driver. Reads the VM of one VNM action, decides what it should have,
 * and asks the engine for it. There is no stock script to run: OpenNebula calls these actions before and after those of
 * its VMM driver, and says less in them, so it is libvirt that tells what came of those.
 *
 * usage: vnm.mjs ACTION [ARG...]
 */
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { toKvmIbError } from '../core/errors.ts';
import type { Config } from '../core/mapping.ts';
import { CLAIM } from '../core/state.ts';
import { readConfig } from '../host/config-file.ts';
import { createDomains } from '../host/domains.ts';
import { exec } from '../host/exec.ts';
import { pathsFrom } from '../host/paths.ts';
import { createStore } from '../host/store.ts';
import type { Vm } from '../opennebula/action-data.ts';
import type { ActionWish } from '../opennebula/action-wish.ts';
import type { CallSigns } from '../opennebula/caller.ts';
import { wantsErrorBlock } from '../opennebula/caller.ts';
import { failureMessage, failureText } from '../opennebula/contract.ts';
import type { NetworkAction, NetworkCall } from '../opennebula/vnm.ts';
import { isHotplug, parseNetworkCall, parseNetworkVm, requireBase64, wishOfNetworkAction } from '../opennebula/vnm.ts';
import type { Store } from '../ops/host.ts';
import type { Engine, WishMessage } from './engine-client.ts';
import { startEngine } from './engine-client.ts';
import { readRemotesVersion, readStdin } from './input.ts';
import { complain, note, say } from './log.ts';
import type { Mode } from './protocol.ts';
import { heldBy, isForeign, messageOf, NOTHING_HELD, touches } from './vm-request.ts';

/** DATASTORE_LOCATION of OpenNebula; a saved VM has `<datastore>/<vm>/checkpoint` below it. */
const DATASTORES = process.env['KVM_IB_DATASTORES'] ?? '/var/lib/one/datastores';

const domains = createDomains(exec);

interface Context {
  readonly config: Config;
  readonly store: Store;
}

const [action = '', ...args] = process.argv.slice(2);
let signs: CallSigns = { remotesVersion: readRemotesVersion(join(import.meta.dirname, '../..')) };
try {
  await run();
  // An engine that waits for the guest is left behind, and goes on alone.
  process.exit(0);
} catch (cause) {
  const error = toKvmIbError(cause, `Cannot finish ${action}`);
  // A clean that fails would make OpenNebula take a VM for running that has ended, or a NIC for attached that has gone.
  if (action === 'clean') complain(error, 'The next kvm-ib reconcile brings it right');
  else {
    say(failureText({ log: [], message: failureMessage(error) }, { block: wantsErrorBlock(signs) }));
    process.exit(error.exit);
  }
}

async function run(): Promise<void> {
  const call = parseNetworkCall(action, args);
  signs = { ...signs, hasInput: call.vm === null, deployId: call.deployId };
  const text = await vmOf(call);
  const paths = pathsFrom(process.env);
  const context: Context = { config: readConfig(paths.config), store: createStore(paths.state) };
  const vm = concernedVm(context, call, text);
  if (vm === undefined) return;
  switch (call.action) {
    case 'pre':
      return pre(context, vm);
    case 'post':
      return post(context, vm);
    case 'clean':
      return clean(context, vm);
    case 'update_nic':
      return follow('update_nic', vm, readWish(context, call.action, vm));
  }
}

/** The VM of a call, as XML. Bytes are kept as characters, whatever its encoding. */
async function vmOf({ action, vm }: NetworkCall): Promise<string> {
  const what = `the VM of ${action}`;
  const text = vm ?? (await readStdin(action)).toString('latin1');
  return Buffer.from(requireBase64(text, what), 'base64').toString('latin1');
}

/** Undefined when the VM has nothing to do with kvm-ib. */
function concernedVm({ config, store }: Context, { action }: NetworkCall, text: string): Vm | undefined {
  const id = /^<VM><ID>([0-9]{1,8})<\/ID>/.exec(text)?.[1];
  const isHeld = (vm: number): boolean => heldBy(store, vm) !== undefined;
  if (id !== undefined && isForeign(config, text, 'VM') && !isHeld(Number(id))) return undefined;
  const vm = parseNetworkVm(text, `the VM of ${action}`);
  return isHeld(vm.id) || touches(config, vm) ? vm : undefined;
}

/** Before a VM comes to this host, or a NIC or an alias to a VM: the last step at which a refusal costs nothing. */
async function pre(context: Context, vm: Vm): Promise<void> {
  const wish = readWish(context, 'pre', vm);
  const domain = await domains.state(vm.id);
  if (isHotplug(vm)) {
    // COLD_NIC_ATTACH: there is no domain, so the next deploy brings it.
    if (domain.kind === 'inactive') return;
    // Whether an alias comes into effect is decided by `post`; a NIC works as soon as the guest sees it.
    return ask('pre', vm, wish.attaching.length > 0 ? 'plug' : 'check', wish);
  }
  // A migration within this host, or a guest that only sleeps: it has what it has.
  if (domain.kind === 'active') return;
  note(wish.notes);
  return claim(vm, wish);
}

/**
 * A VM that was never deployed, or is restored from its checkpoint, has its addresses before its guest runs. Any other may come
 * from another host, where its guest goes on until it has come: then the kernel holds nothing before.
 */
async function claim(vm: Vm, wish: ActionWish): Promise<void> {
  const { nics, unmapped } = messageOf(wish);
  if (nics.length === 0) return;
  const when = vm.deployId === null || isSaved(vm) ? 'now' : 'resume';
  const arriving = nics.map((nic) => ({ ...nic, held: null }));
  const { warnings } = await startEngine().arrive({
    vm: vm.id,
    action: CLAIM,
    when,
    nics: arriving,
    unmapped,
    source: null,
  });
  note(warnings);
}

/** The record names the datastore since 5.10. A checkpoint that is none of a file system is not found: then it comes when it runs. */
function isSaved({ id, datastore }: Vm): boolean {
  const folders = datastore === null ? numberedFolders(DATASTORES) : [String(datastore)];
  return folders.some((folder) => existsSync(join(DATASTORES, folder, String(id), 'checkpoint')));
}

function numberedFolders(path: string): readonly string[] {
  try {
    return readdirSync(path).filter((name) => /^[0-9]{1,9}$/.test(name));
  } catch {
    return [];
  }
}

/**
 * After the stock script succeeded. To fail here makes OpenNebula cancel a VM that it has just started, restored or changed:
 * only right for a NIC or an alias that it then takes back, and for a VM that booted although its address is another host's.
 */
async function post(context: Context, vm: Vm): Promise<void> {
  try {
    await follow('post', vm, readWish(context, 'post', vm));
  } catch (cause) {
    if (isHotplug(vm)) throw cause;
    if (toKvmIbError(cause).code === 'conflict' && (await domains.cameBy(vm.id)) === 'boot') throw cause;
    complain(cause, 'The VM runs on; `kvm-ib status` on its host shows what it has');
  }
}

/** After a VM has left this host, or a NIC or an alias a VM. Neither what is wrong with its NICs nor anything else keeps it. */
async function clean(context: Context, vm: Vm): Promise<void> {
  let wish: ActionWish;
  try {
    wish = readWish(context, 'clean', vm);
  } catch (cause) {
    complain(cause, `VM ${vm.id} loses what it has here if its domain has ended`);
    return withEngine(async (engine) => note(await engine.settle(vm.id)));
  }
  return follow('clean', vm, wish);
}

async function follow(action: NetworkAction, vm: Vm, wish: ActionWish): Promise<void> {
  note(wish.notes);
  await ask(action, vm, 'outcome', wish);
}

function ask(action: NetworkAction, vm: Vm, mode: Mode, wish: ActionWish): Promise<void> {
  const message: WishMessage = messageOf(wish);
  return withEngine(async (engine) => note(await engine.sync(vm.id, action, mode, message)));
}

async function withEngine(act: (engine: Engine) => Promise<void>): Promise<void> {
  const engine = startEngine();
  try {
    await act(engine);
  } finally {
    await engine.close();
  }
}

function readWish({ config, store }: Context, action: NetworkAction, vm: Vm): ActionWish {
  return wishOfNetworkAction(config, vm, action, heldBy(store, vm.id) ?? NOTHING_HELD);
}
