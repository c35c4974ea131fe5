/**
 * The driver contract of OpenNebula 3.4 to 7.x, as one_vmm_exec.rb of these versions calls the scripts: argv, standard
 * input, and what standard error may hold. Two rules shape it:
 *
 * - Every script but `exec` and `exec_cancel` gets two arguments after its own: the VM id and the host of the step
 *   (OpenNebulaDriver.rb). New arguments have always come behind an action's own and before these two, so own arguments
 *   are counted from the front and the two from the end, and more arguments than known are no error.
 * - Arguments are wrapped in single quotes since 4.2. Before, an empty one vanishes and the rest moves up, and `restore` has
 *   its deploy id only since 4.4: so fewer arguments than known are an error only where they are needed.
 */
import { KvmIbError, printable } from '../core/errors.ts';
import { VM_ID_LIMIT } from './action-data.ts';

/** What kvm-ib does with an action. */
export type Treatment =
  /** Our work first, then the stock script; ours is undone when that fails. */
  | 'sync-before'
  /** The same, but what goes wrong in our work is logged and does not hold up the stock script. */
  | 'repair-before'
  /** Before the stock script it is looked whether `sync-after` will succeed. */
  | 'check-before'
  /** The stock script first; then the mappings follow the NICs. */
  | 'sync-after'
  /** The stock script first; the mappings go when the domain has gone. */
  | 'release-after'
  /** The destination is asked first; the mappings go over when the guest does. */
  | 'move'
  /** Cannot be followed from where it runs: refused for a VM that has a NIC on our bridges, passed through for any other. */
  | 'refuse-if-mapped'
  /** The stock script with argv, stdin, stdout, stderr and exit status untouched. */
  | 'pass';

export type Stdin =
  /** The libvirt domain XML. */
  | 'domain'
  /** VMM_DRIVER_ACTION_DATA. */
  | 'action-data';

interface ActionShape {
  /** The action's own arguments, in order. */
  readonly args: readonly string[];
  /** How many of them there must be; without the rest the action can be served as well. */
  readonly needs: number;
  readonly stdin: Stdin;
  readonly treatment: Treatment;
}

const shape = (
  treatment: Treatment,
  args: readonly string[],
  { needs = 0, stdin = 'action-data' }: { readonly needs?: number; readonly stdin?: Stdin } = {},
): ActionShape => ({ args, needs, stdin, treatment });

/**
 * The actions that OpenNebula 3.4 to 7.x may call. Of 3.4 are deploy, shutdown, cancel, save, restore, migrate, migrate_local,
 * reboot, poll and poll_ganglia (until 4.2); since 3.8 reset, attach_disk and detach_disk; since 4.0 attach_nic, detach_nic and
 * the snapshots; since 5.0 prereconfigure and reconfigure; since 5.4 resize_disk; since 6.0 resize; since 7.2 exec and
 * exec_cancel. A name that is not here passes, like every `pass` below: it is a newer OpenNebula's.
 */
export const ACTIONS = {
  deploy: shape('sync-before', ['deploymentFile', 'host'], { needs: 2, stdin: 'domain' }),
  shutdown: shape('release-after', ['deployId', 'host']),
  cancel: shape('release-after', ['deployId', 'host']),
  save: shape('release-after', ['deployId', 'checkpointFile', 'host']),
  restore: shape('sync-before', ['checkpointFile', 'host', 'deployId'], { needs: 1 }),
  migrate: shape('move', ['deployId', 'destination', 'source'], { needs: 3 }),
  migrate_local: shape('refuse-if-mapped', ['deployId', 'destination', 'source'], { needs: 3 }),
  // The fifth since 4.4, where it is NET_DRV of the host; the tap since 5.0.
  attach_nic: shape('sync-before', ['deployId', 'mac', 'bridge', 'model', 'vnMad', 'target']),
  detach_nic: shape('sync-after', ['deployId', 'mac']),
  reboot: shape('repair-before', ['deployId', 'host']),
  reset: shape('repair-before', ['deployId', 'host']),
  attach_disk: shape('pass', ['deployId', 'diskPath', 'target', 'targetIndex', 'actionData']),
  detach_disk: shape('pass', ['deployId', 'diskPath', 'target', 'targetIndex']),
  prereconfigure: shape('check-before', ['deployId', 'contextDevice']),
  reconfigure: shape('sync-after', ['deployId', 'contextDevice', 'contextImage']),
  snapshot_create: shape('pass', ['deployId', 'snapshotId']),
  snapshot_revert: shape('sync-after', ['deployId', 'snapshotName']),
  snapshot_delete: shape('pass', ['deployId', 'snapshotName']),
  resize: shape('pass', ['deployId']),
  resize_disk: shape('pass', ['deployId', 'diskId', 'size', 'actionData', 'host']),
  exec: shape('pass', []),
  exec_cancel: shape('pass', []),
  poll: shape('pass', ['deployId', 'host']),
  poll_ganglia: shape('pass', ['deployId', 'host']),
} as const satisfies Record<string, ActionShape>;

export type KnownAction = keyof typeof ACTIONS;

/** One call of a driver script. */
export type ActionCall =
  | { readonly treatment: 'pass'; readonly action: string }
  | {
      readonly treatment: Exclude<Treatment, 'pass'>;
      readonly action: KnownAction;
      readonly vmId: number;
      /** The host that the step runs on, as oned names it. */
      readonly host: string;
      /**
       * The action's own arguments by name, as in `ACTIONS`; one that did not come is empty. A deploy id is a UUID, `one-<id>`
       * or, after a deploy that went wrong, empty or `-`; nothing may depend on it. Of deploy, `deploymentFile` is an absolute
       * path; since 6.0.0 `vm.xml` lies in the same folder.
       */
      readonly args: Readonly<Record<string, string>>;
    };

export type OwnCall = Exclude<ActionCall, { treatment: 'pass' }>;

export function isKnownAction(name: string): name is KnownAction {
  return Object.hasOwn(ACTIONS, name);
}

/** How an action is treated, by its name alone; an unknown one passes. */
export function treatmentOf(action: string): Treatment {
  return isKnownAction(action) ? ACTIONS[action].treatment : 'pass';
}

/**
 * Reads one call. What passes is not looked at.
 *
 * @param action Name of the script.
 * @param argv Its arguments, without the script itself.
 * @throws KvmIbError `usage` when there are too few arguments, `bad-input` when the VM id, the host or the deployment
 *   file cannot be one.
 */
export function parseActionCall(action: string, argv: readonly string[]): ActionCall {
  if (!isKnownAction(action)) return { treatment: 'pass', action };
  const { args, needs, treatment } = ACTIONS[action];
  if (treatment === 'pass') return { treatment, action };

  const last = argv.length - 2;
  if (last < needs) {
    throw new KvmIbError('usage', `Cannot run ${action}`, {
      why: `it got ${argv.length} arguments: ${[...args.slice(0, needs), 'vmId', 'host'].join(', ')} are needed`,
      fix: 'let OpenNebula (one_vmm_exec) call it; by hand, give the arguments in this order',
    });
  }
  const vmId = parseVmId(action, argv[last] ?? '');
  const host = nonEmpty(action, 'host', argv[last + 1] ?? '');
  const own = Object.fromEntries(args.map((name, index) => [name, index < last ? (argv[index] ?? '') : '']));
  if (action === 'deploy') absolutePath(action, own['deploymentFile'] ?? '');
  return { treatment, action, vmId, host, args: own };
}

function parseVmId(action: string, text: string): number {
  if (/^(?:0|[1-9][0-9]{0,8})$/.test(text) && Number(text) < VM_ID_LIMIT) return Number(text);
  throw new KvmIbError('bad-input', `Cannot run ${action}`, {
    why: `the last argument but one is "${printable(text, 60)}", not a VM id`,
    fix: 'let OpenNebula (one_vmm_exec) call it: it puts the VM id and the host behind the other arguments',
  });
}

function nonEmpty(action: string, name: string, text: string): string {
  if (text !== '' && printable(text) === text) return text;
  throw new KvmIbError('bad-input', `Cannot run ${action}`, {
    why: text === '' ? `the ${name} is empty` : `the ${name} "${printable(text, 60)}" has control characters`,
    fix: 'look at the host and the VM in OpenNebula: `onehost show`, `onevm show`',
  });
}

function absolutePath(action: string, text: string): void {
  if (text.startsWith('/') && !text.includes('\0') && !/[\r\n]/.test(text)) return;
  throw new KvmIbError('bad-input', `Cannot run ${action}`, {
    why: `the deployment file "${printable(text, 100)}" is not an absolute path`,
    fix: 'look at DATASTORE_LOCATION in /etc/one/oned.conf',
  });
}

export interface LogLine {
  readonly level: 'info' | 'error';
  readonly text: string;
}

/** Longest line on standard error: an error with reason and remedy fits. */
const LINE_LIMIT = 1000;

/**
 * One line for OpenNebula's log of the VM. The form is that of its own drivers; a number behind the colon would be
 * taken for a VM id since 7.0, so the name of the product stands there.
 */
export function logText(line: LogLine): string {
  return `${line.level === 'info' ? 'INFO' : 'ERROR'}: kvm-ib: ${oneLine(line.text)}\n`;
}

/** The marks between which OpenNebula up to 6.0.2 looks for the message (get_error_message in its CommandManager.rb). */
const BLOCK_START = 'ERROR MESSAGE --8<------\n';
const BLOCK_END = 'ERROR MESSAGE ------>8--\n';

/**
 * What standard error must hold when an action of ours fails: the log lines, then exactly one plain line for the user.
 * What becomes of it:
 *
 * - 7.0 and later: the log lines go to the log, the plain ones are stripped, joined with no separator and followed by
 *   `ExitCode: N`. So there is one plain line, it ends in a full stop, and it does not start like a log line.
 * - 6.0.3 to 6.10: all of standard error, with spaces for line ends, is the message; it starts with the log lines, so
 *   give few, and none that says what the message says.
 * - 3.4 to 6.0.2: only text between two marks becomes the message. In every later version the marks themselves would be
 *   part of it, so they are printed only for a caller that is known to look for them; see `wantsErrorBlock`.
 * - All: the last character must be a line end, or one_vmm_exec waits for its end mark for ever; a message that starts
 *   with `-` would not be stored; a line `ExitCode: N EOF_ERR` would end the answer early. The fixed start excludes
 *   both.
 */
export function failureText(
  failure: { readonly log: readonly LogLine[]; readonly message: string },
  { block = false }: { readonly block?: boolean } = {},
): string {
  const message = oneLine(failure.message).replace(/[\s.;:,]+$/, '');
  const line = `kvm-ib: ${message === '' ? 'failed' : message}.\n`;
  return `${failure.log.map(logText).join('')}${block ? `${BLOCK_START}${line}${BLOCK_END}` : line}`;
}

/** An error as the text of that one line: what failed, why, and what to do. */
export function failureMessage(error: KvmIbError): string {
  const why = error.why === undefined ? '' : `: ${error.why}`;
  const fix = error.fix === undefined ? '' : `. Remedy: ${error.fix}`;
  return `${error.message}${why}${fix}`;
}

/** Line ends become spaces, as OpenNebula itself does; any other control character becomes visible. */
function oneLine(text: string): string {
  return printable(text.replace(/\s*[\r\n]+\s*/g, ' ').trim(), LINE_LIMIT);
}
