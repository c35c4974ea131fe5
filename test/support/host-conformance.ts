/**
 * What operations rely on of Links, NatEngine and Conntrack, as one suite: it runs on the fake host and on the kernel.
 * The host has the links ib0 and eth0 and the bridge virbr1 with one port, vnet2; no address of the test ranges.
 */
import { beforeEach, describe, expect, it } from 'vitest';
import type { LinkName } from '../../lib/core/address.ts';
import { parseIpv4, parseLinkName } from '../../lib/core/address.ts';
import { servedNetworks } from '../../lib/core/served.ts';
import type { Conntrack, Links } from '../../lib/link/ports.ts';
import type { NatEngine, Pair, PairChange, TableSpec } from '../../lib/nat/engine.ts';
import { elementsOf } from '../../lib/nat/nft.ts';
import { rulesetTag } from '../../lib/nat/ruleset.ts';
import type { FakeFlow } from './fake-host.ts';
import { addressOf, CONFIG, failureOf, guestOf, IB0, mapping, network, VIRBR1 } from './fake-host.ts';

export interface HostUnderTest {
  readonly links: Links;
  readonly nat: NatEngine;
  readonly conntrack: Conntrack;
  /** Puts entries into connection tracking. */
  plant(...flows: readonly FakeFlow[]): void;
  flows(): readonly FakeFlow[];
  /** What a person does by `ip address add`. */
  addAddress(device: LinkName, cidr: string, label: string): void;
  /** Deletes the table, as `nft flush ruleset` does. */
  flushRuleset(): Promise<void>;
}

const ABSENT = parseLinkName('absent0');
const ETH0 = parseLinkName('eth0');
const PORT = parseLinkName('vnet2');
const OUTSIDE = '192.168.10.100';
const OWN = parseIpv4('192.168.10.1');
const NONE = { packets: 0, bytes: 0 };
const SPEC: TableSpec = { networks: servedNetworks(CONFIG.networks, []), hostAddresses: new Map([['ib', [OWN]]]) };
const NOTHING = elementsOf([]);

function pair(n: number, to = n): Pair {
  const { guest, address, mac } = mapping(n, { to });
  return { guest, address, mac, comment: `guest ${n}` };
}

function change(remove: readonly Pair[], add: readonly Pair[]): PairChange {
  return { remove: elementsOf(remove), add: elementsOf(add), comments: {} };
}

function flow(source: string, destination: string, replySource: string, replyDestination: string): FakeFlow {
  return { original: { source, destination }, reply: { source: replySource, destination: replyDestination } };
}

/** @param make a fresh host, with nothing of an earlier one */
export function hostConformance(name: string, make: () => Promise<HostUnderTest>): void {
  let host: HostUnderTest;
  beforeEach(async () => {
    host = await make();
  });
  const label = 'ib0:2-0';
  const address = addressOf(2);

  describe(`links of ${name}`, () => {
    it('are found by name, with MTU, or not', async () => {
      expect(await host.links.link(IB0)).toMatchObject({ name: 'ib0', mtu: 2044, up: true });
      expect(await host.links.link(ABSENT)).toBeUndefined();
    });

    it('take an alias as /32 with its label, once', async () => {
      expect(await host.links.isLocal(address)).toBe(false);
      await host.links.addAlias(IB0, address, label);
      expect(await host.links.isLocal(address)).toBe(true);
      expect(await host.links.addresses()).toContainEqual({ device: 'ib0', address, prefixLength: 32, label });
      expect(await failureOf(host.links.addAlias(IB0, address, label))).toMatchObject({ code: 'conflict' });
      expect(await failureOf(host.links.addAlias(IB0, address, 'ib0:9-9'))).toMatchObject({ code: 'conflict' });
    });

    it('lose an alias by its label only', async () => {
      await host.links.addAlias(IB0, address, label);
      expect(await failureOf(host.links.deleteAlias(IB0, address, 'ib0:9-9'))).toMatchObject({ code: 'host-lacks' });
      expect(await failureOf(host.links.deleteAlias(ETH0, address, label))).toMatchObject({ code: 'host-lacks' });
      expect(await failureOf(host.links.deleteAlias(IB0, addressOf(3), label))).toMatchObject({ code: 'host-lacks' });
      await host.links.deleteAlias(IB0, address, label);
      expect(await host.links.isLocal(address)).toBe(false);
      expect(await failureOf(host.links.deleteAlias(IB0, address, label))).toMatchObject({ code: 'host-lacks' });
    });

    it('take an address again on another link, and beside a wider prefix, which then stays', async () => {
      host.addAddress(ETH0, `${address}/32`, 'eth0');
      await host.links.addAlias(IB0, address, label);
      host.addAddress(IB0, `${addressOf(3)}/24`, 'ib0:x');
      await host.links.addAlias(IB0, addressOf(3), 'ib0:3-0');
      await host.links.deleteAlias(IB0, address, label);
      await host.links.deleteAlias(IB0, addressOf(3), 'ib0:3-0');
      const left = (await host.links.addresses()).filter((entry) => [address, addressOf(3)].includes(entry.address));
      expect(
        left.map((entry) => `${entry.device} ${entry.address}/${entry.prefixLength} ${entry.label}`).sort(),
      ).toEqual([`eth0 ${address}/32 eth0`, `ib0 ${addressOf(3)}/24 ib0:x`]);
      expect(await host.links.isLocal(address)).toBe(true);
    });

    it('take an MTU', async () => {
      await host.links.setMtu(VIRBR1, 4092);
      expect((await host.links.link(VIRBR1))?.mtu).toBe(4092);
    });

    it('that are missing refuse everything', async () => {
      for (const attempt of [
        () => host.links.addAlias(ABSENT, address, label),
        () => host.links.deleteAlias(ABSENT, address, label),
        () => host.links.setMtu(ABSENT, 1500),
        () => host.links.setHairpin(ABSENT, true),
        () => host.links.bridgePorts(ABSENT),
      ]) {
        expect(await failureOf(attempt())).toMatchObject({ code: 'host-lacks' });
      }
    });

    it('have ports with hairpin mode, where they are bridges', async () => {
      expect(await host.links.bridgePorts(VIRBR1)).toEqual([{ name: 'vnet2', hairpin: false }]);
      await host.links.setHairpin(PORT, true);
      expect(await host.links.bridgePorts(VIRBR1)).toEqual([{ name: 'vnet2', hairpin: true }]);
    });
  });

  describe(`the NAT engine of ${name}`, () => {
    it('finds no table where none is', async () => {
      expect(await host.nat.lookup([pair(2)])).toMatchObject({ table: false, tag: null });
      expect((await host.nat.list(SPEC)).table).toBe(false);
      await expect(host.nat.change(change([], [pair(2)]))).rejects.toMatchObject({ code: 'failed' });
      await host.nat.remove();
    });

    it('loads the table with pairs and tag, as it should be', async () => {
      const any: Pair = { ...pair(3), mac: null };
      await host.nat.load(SPEC, [pair(2), any]);
      const expected = {
        table: true,
        tag: rulesetTag(SPEC),
        guestToIb: new Map([2, 3].map((n) => [guestOf(n), addressOf(n)])),
        ibToGuest: new Map([2, 3].map((n) => [addressOf(n), guestOf(n)])),
        macs: new Set([`${guestOf(2)} ${pair(2).mac}`]),
        unbound: new Set([guestOf(3)]),
      };
      expect(await host.nat.lookup([pair(2), any, pair(4)])).toEqual(expected);
      expect(await host.nat.list(SPEC)).toEqual({
        ...expected,
        traffic: new Map([2, 3].map((n) => [guestOf(n), { sent: NONE, received: NONE }])),
        differences: [],
      });
    });

    it('says what is there under the keys that were asked for, whatever it is', async () => {
      await host.nat.load(SPEC, [pair(2, 5)]);
      expect(await host.nat.lookup([pair(2), pair(5)])).toMatchObject({
        guestToIb: new Map([[guestOf(2), addressOf(5)]]),
        ibToGuest: new Map([[addressOf(5), guestOf(2)]]),
        unbound: new Set(),
      });
      expect((await host.nat.lookup([{ ...pair(2), mac: pair(3).mac }])).macs).toEqual(new Set());
    });

    it('deletes and adds the same key in one change', async () => {
      await host.nat.load(SPEC, [pair(2), pair(3)]);
      await host.nat.change(change([pair(2), pair(3)], [pair(2, 3), pair(3, 2)]));
      const { guestToIb, ibToGuest } = await host.nat.list(SPEC);
      expect(Object.fromEntries(guestToIb)).toEqual({ [guestOf(2)]: addressOf(3), [guestOf(3)]: addressOf(2) });
      expect(Object.fromEntries(ibToGuest)).toEqual({ [addressOf(3)]: guestOf(2), [addressOf(2)]: guestOf(3) });
    });

    it('changes all or nothing', async () => {
      await host.nat.load(SPEC, [pair(2)]);
      const before = await host.nat.list(SPEC);
      // What is to go is not there; what is to come is there with another value.
      expect(await failureOf(host.nat.change(change([pair(4)], [pair(3)])))).toMatchObject({ code: 'failed' });
      expect(await failureOf(host.nat.change(change([], [pair(3), pair(2, 6)])))).toMatchObject({ code: 'conflict' });
      expect(await host.nat.list(SPEC)).toEqual(before);
      await host.nat.change({ remove: NOTHING, add: NOTHING, comments: {} });
      expect(await host.nat.list(SPEC)).toEqual(before);
    });

    it('brings a table of another configuration to this one, with exactly these pairs', async () => {
      const second = network({
        name: 'b',
        device: 'eth0',
        bridge: 'br9',
        guests: '10.9.0.0/24',
        addresses: '10.8.0.0/24',
      });
      const two: TableSpec = { ...SPEC, networks: servedNetworks([...CONFIG.networks, second], []) };
      await host.nat.load(two, [pair(2), pair(3)]);
      expect((await host.nat.list(SPEC)).differences.length).toBeGreaterThan(0);
      await host.nat.load(SPEC, [pair(3)]);
      expect(await host.nat.list(SPEC)).toMatchObject({
        tag: rulesetTag(SPEC),
        differences: [],
        guestToIb: new Map([[guestOf(3), addressOf(3)]]),
      });
    });

    it('loads again after everything was flushed, and removes the table', async () => {
      await host.nat.load(SPEC, [pair(2)]);
      await host.flushRuleset();
      expect((await host.nat.lookup([pair(2)])).table).toBe(false);
      await host.nat.load(SPEC, [pair(2)]);
      expect((await host.nat.list(SPEC)).differences).toEqual([]);
      await host.nat.remove();
      expect((await host.nat.list(SPEC)).table).toBe(false);
    });
  });

  describe(`connection tracking of ${name}`, () => {
    const [guest, ib] = [guestOf(2), addressOf(2)];
    const out = flow(guest, OUTSIDE, OUTSIDE, ib);
    const into = flow(OUTSIDE, ib, guest, OUTSIDE);
    const toHost = flow(OUTSIDE, ib, ib, OUTSIDE);
    const toFormer = flow(OUTSIDE, ib, guestOf(3), OUTSIDE);
    const untranslated = flow(guest, OUTSIDE, OUTSIDE, guest);
    const masqueraded = flow(guest, OUTSIDE, OUTSIDE, OWN);
    const byOther = flow(guest, OUTSIDE, OUTSIDE, '10.0.0.9');
    const fromHost = flow(ib, OUTSIDE, OUTSIDE, ib);
    const neighbour = flow(guestOf(3), OUTSIDE, OUTSIDE, addressOf(3));
    const all = [out, into, toHost, toFormer, untranslated, masqueraded, byOther, fromHost, neighbour];
    const shown = (flows: readonly FakeFlow[]) => flows.map((f) => JSON.stringify(f)).sort();

    it('drops exactly the flows of a mapping', async () => {
      host.plant(...all);
      expect(await host.conntrack.flush([{ kind: 'mapping', guest, address: ib }])).toBe(2);
      expect(shown(host.flows())).toEqual(shown(all.filter((f) => f !== out && f !== into)));
    });

    it('drops exactly the flows that a mapping would not have made so', async () => {
      host.plant(...all);
      const request = { kind: 'foreign', guest, address: ib, stale: [OWN] } as const;
      expect(await host.conntrack.flush([request])).toBe(5);
      expect(shown(host.flows())).toEqual(shown([out, into, byOther, neighbour]));
      expect(await host.conntrack.flush([request])).toBe(0);
    });

    it('takes several requests at once, and none', async () => {
      host.plant(...all);
      expect(await host.conntrack.flush([])).toBe(0);
      const requests = [guest, guestOf(3)].map(
        (g, i) => ({ kind: 'mapping', guest: g, address: addressOf(2 + i) }) as const,
      );
      expect(await host.conntrack.flush(requests)).toBe(3);
    });
  });
}
