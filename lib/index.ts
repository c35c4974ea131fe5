/** The public API: the core's values, the operations, and the ports that a host implements. */
export * from './core/address.ts';
export { networkOfBridge, networkOfGuest, parseConfig, resolveMapping } from './core/config.ts';
export * from './core/errors.ts';
export * from './core/mapping.ts';
export * from './core/plan.ts';
export * from './core/state.ts';
export { networkXml } from './libvirt/network.ts';
export type { Announcer, Conntrack, Links, Prober } from './link/ports.ts';
export type { NatEngine, Pair, TableSpec } from './nat/engine.ts';
export { announce } from './ops/announce.ts';
export type { Host, Store } from './ops/host.ts';
export { list, status } from './ops/inspect.ts';
export { reconcile } from './ops/reconcile.ts';
export { sync } from './ops/sync.ts';
export { teardown } from './ops/teardown.ts';
