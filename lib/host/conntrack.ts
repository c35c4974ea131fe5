/** Connection tracking entries of this host, over nfnetlink (ctnetlink). Needs CAP_NET_ADMIN. */
import { readFileSync } from 'node:fs';
import {
  CT,
  decodeFlow,
  encodeDelete,
  encodeDump,
  type Flow,
  type FlowFilter,
  selectionOf,
} from '../link/ctnetlink.ts';
import type { Conntrack } from '../link/ports.ts';
import { ERRNO, messagesOf, NETLINK_NETFILTER, type NetlinkSocket, openNetlink } from './netlink-socket.ts';

export interface HostConntrack extends Conntrack {
  /**
   * Closes the socket; the next flush opens another. Closing any nfnetlink socket waits (8-16 ms) for what nf_tables
   * has still to free, so a resident process keeps it.
   */
  close(): void;
}

/** What the flushes reach the kernel through; a test hands in a kernel of its own. */
export interface ConntrackAccess {
  readonly open: () => Promise<NetlinkSocket>;
  /** How many entries this network namespace has; infinite when that cannot be read. */
  readonly entryCount: () => number;
}

const KERNEL: ConntrackAccess = { open: () => openNetlink(NETLINK_NETFILTER), entryCount };

export function createConntrack(access: ConntrackAccess = KERNEL): HostConntrack {
  let socket: NetlinkSocket | undefined;
  const conntrack: HostConntrack = {
    flush: async (requests) => conntrack.remove(await conntrack.find(requests)),
    find: async (requests) => {
      if (requests.length === 0) return [];
      socket ??= await access.open();
      const open = socket;
      const selection = selectionOf(requests);
      const filtered = selection.dumps.length <= MANY_DUMPS && access.entryCount() >= FEW_ENTRIES;
      // All are found before the first is deleted: a delete moves what follows it in the kernel's list.
      const found = new Map<string, Flow>();
      for (const filter of filtered ? selection.dumps : [undefined]) {
        for (const flow of dump(open, filter)) {
          if (selection.includes(flow)) found.set(`${flow.wire.id} ${flow.wire.zone} ${flow.wire.original}`, flow);
        }
      }
      return [...found.values()];
    },
    remove: async (flows) => {
      if (flows.length === 0) return 0;
      socket ??= await access.open();
      let deleted = 0;
      for (const flow of flows) if (remove(socket, flow)) deleted += 1;
      return deleted;
    },
    close: () => {
      socket?.close();
      socket = undefined;
    },
  };
  return conntrack;
}

/**
 * A dump walks every bucket of the table, 11 ms for the usual 262,144, filter or not; to read an entry here takes about
 * 10 us. So with few entries one dump of all of them is quicker than one for each filter.
 */
const FEW_ENTRIES = 1_000;
/** With more filters than this, one dump of everything is quicker as well: reconcile after a flush of the whole table. */
const MANY_DUMPS = 32;

function entryCount(): number {
  try {
    return Number.parseInt(readFileSync('/proc/sys/net/netfilter/nf_conntrack_count', 'latin1'), 10);
  } catch {
    return Number.POSITIVE_INFINITY;
  }
}

/** What a kernel says that knows CTA_FILTER but not this use of it. */
const NO_FILTER: readonly number[] = [ERRNO.EINVAL, ERRNO.EOPNOTSUPP];

function dump(socket: NetlinkSocket, filter: FlowFilter | undefined): readonly Flow[] {
  const message = 'Cannot list connection tracking entries';
  let reply = socket.dump(CT.get, encodeDump(filter));
  if (filter !== undefined && reply.kind === 'refused' && NO_FILTER.includes(reply.errno))
    reply = socket.dump(CT.get, encodeDump());
  return messagesOf(reply, message).flatMap((answer) => decodeFlow(answer) ?? []);
}

/** @returns false when the entry was gone already. */
function remove(socket: NetlinkSocket, flow: Flow): boolean {
  const reply = socket.request(CT.delete, 0, encodeDelete(flow));
  if (reply.kind === 'refused' && reply.errno === ERRNO.ENOENT) return false;
  const { original } = flow;
  messagesOf(reply, `Cannot delete the connection tracking entry of ${original.source} to ${original.destination}`);
  return true;
}
