/** What both drivers make of a VM that OpenNebula describes: whether it is ours, what it has here, what the engine is asked. */
import { toKvmIbError } from '../core/errors.ts';
import type { Config } from '../core/mapping.ts';
import type { Vm } from '../opennebula/action-data.ts';
import { mayTouchBridges } from '../opennebula/action-data.ts';
import type { ActionWish, Held } from '../opennebula/action-wish.ts';
import type { Store } from '../ops/host.ts';
import type { WishMessage } from './engine-client.ts';

export const NOTHING_HELD: Held = { mappings: [], detachedAliases: [] };

/** What the VM has on this host; undefined: nothing. The engine reads the file anew, under its lock, and decides. */
export function heldBy(store: Store, vm: number): Held | undefined {
  try {
    return store.read({ kind: 'vm', vm });
  } catch (cause) {
    // One that is there and is no state file: the engine says what is wrong with it.
    return toKvmIbError(cause).code === 'not-permitted' ? undefined : NOTHING_HELD;
  }
}

export function messageOf(wish: ActionWish): WishMessage {
  const { sources, unmapped, keep, attaching, detachedAliases } = wish;
  const nics = sources.map(({ mapping: m, source }) => {
    if (m.mac === null || m.nic === null) throw new TypeError('a VM has mappings with NIC and MAC only');
    return { nic: m.nic, guest: m.guest, address: source === 'range' ? null : m.address, mac: m.mac, bridge: m.bridge };
  });
  return { nics, unmapped, keep, attaching, detachedAliases };
}

/**
 * A whole document in which none of our bridges can stand: not ours to judge, so it costs no parse and cannot fail on
 * one. What is cut off, or is another kind of document, is looked at.
 */
export function isForeign(config: Config, text: string, root: string): boolean {
  const bridges = config.networks.map((network) => network.bridge);
  return (
    new RegExp(`^\\s*(?:<\\?xml[^>]*\\?>\\s*)?<${root}[\\s>]`).test(text.slice(0, 1000)) &&
    text.slice(-1000).trimEnd().endsWith(`</${root}>`) &&
    !mayTouchBridges(text, bridges)
  );
}

export function touches(config: Config, vm: Vm): boolean {
  return config.networks.some((network) => [...vm.nics, ...vm.skipped].some((nic) => nic.bridge === network.bridge));
}
