/**
 * Before an IB address is taken, an ARP probe asks the fabric whether another host has it. The question needs no lock:
 * sync asks before it waits for the lock, so that many actions at once wait side by side, and asks again under it only
 * for what it could not know before.
 */
import type { Ipv4, LinkName } from '../core/address.ts';
import { KvmIbError } from '../core/errors.ts';
import type { Config } from '../core/mapping.ts';
import type { Change } from '../core/plan.ts';
import type { LinkAddress, OtherHolder } from '../link/ports.ts';
import type { Host } from './host.ts';

/** A probe that is older than this says nothing any more: another host may have come meanwhile. */
const VALID_MS = 10_000;

/** What the probes of one operation found. */
export interface Probing {
  /** Asks for those that are not asked for yet, in one window of time. */
  ask(items: readonly LinkAddress[]): Promise<void>;
  /** The error for an address that another host has; undefined: nobody answered, or nobody was asked. */
  conflictOf(address: Ipv4): KvmIbError | undefined;
  /** Throws the first of these conflicts. */
  refuse(items: readonly LinkAddress[]): void;
  /** Of what could not be asked, without those that another warning names. */
  warnings(named: ReadonlySet<string>): readonly string[];
  /** Milliseconds spent on probing. */
  spent(): number;
}

/** @param except hardware addresses of hosts that may have the addresses */
export function createProbing(host: Pick<Host, 'config' | 'prober'>, except: readonly string[] = []): Probing {
  const asked = new Map<Ipv4, number>();
  const conflicts = new Map<Ipv4, KvmIbError>();
  const unasked = new Map<Ipv4, string>();
  let spent = 0;
  const probing: Probing = {
    ask: async (items) => {
      const now = performance.now();
      const due = items.filter(({ device, address }) => {
        const last = asked.get(address);
        return wantsProbe(host.config, device) && (last === undefined || now - last > VALID_MS);
      });
      if (due.length === 0) return;
      for (const { device, address, other, error } of await host.prober.probe(due, { except })) {
        asked.set(address, performance.now());
        if (error === undefined) unasked.delete(address);
        else unasked.set(address, `${address} was not probed on ${device}: ${error}`);
        if (other === undefined) conflicts.delete(address);
        else conflicts.set(address, heldElsewhere(host.config, device, address, other));
      }
      spent += performance.now() - now;
    },
    conflictOf: (address) => conflicts.get(address),
    refuse: (items) => {
      for (const { address } of items) {
        const error = conflicts.get(address);
        if (error !== undefined) throw error;
      }
    },
    warnings: (named) => [...unasked].flatMap(([address, text]) => (named.has(address) ? [] : [text])),
    spent: () => spent,
  };
  return probing;
}

function wantsProbe(config: Config, device: string): boolean {
  return config.networks.find((n) => n.device === device)?.probe !== false;
}

/** Addresses that a plan takes: not those whose alias only changes its label. */
export function takenBy(changes: readonly Change[]): readonly LinkAddress[] {
  const kept = new Set(changes.flatMap((change) => (change.kind === 'delete-alias' ? [change.address] : [])));
  return changes.flatMap((change) => (change.kind === 'add-alias' && !kept.has(change.address) ? [change] : []));
}

function heldElsewhere(
  config: Config,
  device: LinkName | string,
  address: Ipv4,
  { hardware, how }: OtherHolder,
): KvmIbError {
  const network = config.networks.find((n) => n.device === device);
  return new KvmIbError('conflict', `Cannot take the IB address ${address}`, {
    why:
      how === 'has'
        ? `another host on ${device} has it: ${hardware} answers for it`
        : `another host on ${device} is about to take it: ${hardware} probes for it`,
    fix:
      `find the host with that hardware address (ip -4 address there shows ${address}). ` +
      'If it runs kvm-ib, `kvm-ib reconcile` there gives up what none of its VMs needs; its timer does so within a minute. ' +
      `If something answers for every address on purpose: \`probe: false\` for network ${network?.name ?? '-'}`,
  });
}
