/**
 * A guest that comes from another host knows the hardware address of that host's bridge, and libvirt gives each bridge one
 * of its own: for some 4 s it would send to nobody (Linux: 5 s of delay, then three probes). So the bridge introduces itself.
 *
 * What the guest sends until then, the bridge floods. With bridge-nf-call-iptables it is tracked on that way, untranslated, and
 * would stay so when it is sent to the right address: so the entries are looked through again as well.
 */
import type { Mapping } from '../core/mapping.ts';
import type { LinkAddress } from '../link/ports.ts';
import { apply } from './apply.ts';
import type { Host } from './host.ts';

/** The guest may not have listened the first time. */
const AGAIN_MS = [30, 150, 500];

/** The addresses of the bridges of these guests. */
export async function gatewaysOf(host: Host, mappings: readonly Mapping[]): Promise<readonly LinkAddress[]> {
  const bridges = [...new Set(mappings.map((m) => m.bridge))];
  return (await host.links.addresses()).flatMap(({ device, address }) => {
    const bridge = bridges.find((name) => name === device);
    return bridge === undefined ? [] : [{ device: bridge, address }];
  });
}

/** Best effort: the guest finds out by itself in the end. Never throws. */
export async function introduce(
  host: Host,
  mappings: readonly Mapping[],
  gateways: readonly LinkAddress[],
): Promise<void> {
  const flushes = mappings.map(
    ({ guest, address, device }) => ({ kind: 'flush-foreign', guest, address, device }) as const,
  );
  const began = performance.now();
  for (const ms of AGAIN_MS) {
    await new Promise((resolve) => setTimeout(resolve, began + ms - performance.now()));
    await host.announcer.announce(gateways);
    // Those that the announcement overtook.
    await apply(host, flushes).catch(() => undefined);
  }
}
