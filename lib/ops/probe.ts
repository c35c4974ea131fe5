/**
 * Before an IB address is taken, an ARP probe asks the fabric whether another host has it. The question needs no lock:
 * sync asks before it waits for the lock, so that many actions at once wait side by side, and asks again under it only
 * for what it could not know before.
 */
import type { Ipv4, LinkName } from '../core/address.ts';
import { KvmIbError } from '../core/errors.ts';
import type { Config, Mapping } from '../core/mapping.ts';
import { domainName } from '../core/mapping.ts';
import type { Change } from '../core/plan.ts';
import { goesFirst } from '../link/arp.ts';
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

/** Questions besides whether an address may be taken. */
export interface Inquiry extends Probing {
  /** Asks, in the same way, who else has addresses that are on their link. Who only probes for one is answered by the kernel. */
  askOthers(items: readonly LinkAddress[]): Promise<void>;
  /** Asks once more for those that another host was about to take, where it is the other that gives up. */
  askFirst(items: readonly LinkAddress[]): Promise<void>;
}

/** @param except hardware addresses of hosts that may have the addresses */
export function createProbing(
  host: Pick<Host, 'config' | 'prober' | 'links'>,
  except: readonly string[] = [],
): Inquiry {
  const asked = new Map<Ipv4, number>();
  const others = new Map<Ipv4, OtherHolder>();
  const conflicts = new Map<Ipv4, KvmIbError>();
  const unasked = new Map<Ipv4, string>();
  let spent = 0;
  const ask = async (items: readonly LinkAddress[], concerns: (other: OtherHolder) => boolean): Promise<void> => {
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
      others.delete(address);
      conflicts.delete(address);
      if (other === undefined || !concerns(other)) continue;
      others.set(address, other);
      conflicts.set(address, heldElsewhere(host.config, device, address, other));
    }
    spent += performance.now() - now;
  };
  const probing: Inquiry = {
    ask: (items) => ask(items, () => true),
    askOthers: (items) => ask(items, ({ how }) => how === 'has'),
    askFirst: async (items) => {
      const tied: LinkAddress[] = [];
      for (const item of items) {
        const other = others.get(item.address);
        if (other?.how !== 'probes') continue;
        const link = await host.links.link(item.device);
        if (link !== undefined && goesFirst(link, other.hardware)) tied.push(item);
      }
      for (const { address } of tied) asked.delete(address);
      await probing.ask(tied);
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

/**
 * A VM whose domain is active here has an address that another host answers for. Which of the two is the right one only
 * people know.
 */
export function heldTwice(
  { address, vm }: Mapping & { readonly vm: number },
  conflict: KvmIbError,
  stands: boolean,
): KvmIbError {
  const domain = domainName(vm);
  return new KvmIbError('conflict', `Cannot ${stands ? 'keep' : 'take'} the IB address ${address}`, {
    why: `${conflict.why}; ${domain} is active on this host all the same, without that address`,
    fix:
      `let only one of the two live. If VM ${vm} runs on the other host (onevm show ${vm}): virsh destroy ${domain} here. ` +
      `If it belongs here: end it on the host with that hardware address (ip -4 address there shows ${address}); ` +
      '`kvm-ib reconcile` here then takes the address back, within a minute by its timer',
  });
}
