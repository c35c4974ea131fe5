/** sync, commit and undo on the fake host: what they do, in which order, and what they refuse. */
import { beforeEach, describe, expect, it } from 'vitest';
import type { Mapping } from '../../lib/core/mapping.ts';
import { commit, release, undo } from '../../lib/ops/actions.ts';
import { reconcile } from '../../lib/ops/reconcile.ts';
import { sync } from '../../lib/ops/sync.ts';
import type { FakeHost } from '../support/fake-host.ts';
import {
  addressOf,
  BOOT,
  CONFIG,
  claimsFor,
  createFakeHost,
  failureOf,
  flushRuleset,
  guestOf,
  holderOf,
  IB0,
  mapping,
  request,
  snapshot,
  unitsOf,
  vmOwner,
} from '../support/fake-host.ts';

let host: FakeHost;
/** A host whose table is loaded, as reconcile leaves it at boot. */
beforeEach(async () => {
  host = createFakeHost(CONFIG);
  await reconcile(host);
  host.log.length = 0;
});

/** The host holds exactly these mappings, in kernel, files and index. */
function expectHeld(...mappings: readonly Mapping[]): void {
  const seen = snapshot(host);
  expect(seen).toMatchObject(unitsOf(mappings));
  expect(seen.claims).toEqual(claimsFor(seen.files));
}

const add = (m: Mapping, vm = m.vm ?? 0) => sync(host, request(vmOwner(vm), [m]));
const CHANGES = /^(?:write|remove|nat\.change|flush|addAlias|deleteAlias|announce|setMtu|setHairpin)/;
const changesLogged = () => host.log.filter((line) => CHANGES.test(line));

describe('the order of an addition', () => {
  it('is file, pair, conntrack, alias, file, announcement', async () => {
    await add(mapping(2));
    expect(changesLogged()).toEqual([
      'write vm-2 pending',
      'nat.change',
      `flush foreign ${guestOf(2)} ${addressOf(2)}`,
      `addAlias ${addressOf(2)} ib0:2-0`,
      'write vm-2 active',
      `announce ${addressOf(2)}`,
    ]);
    expectHeld(mapping(2));
  });

  it('makes pairs of several NICs in one transaction, and looks at conntrack once', async () => {
    const wish = [mapping(2, { vm: 7 }), mapping(3, { vm: 7, nic: 1 }), mapping(4, { vm: 7, nic: 2, mac: null })];
    await sync(host, request(vmOwner(7), wish));
    expect(changesLogged().filter((line) => line === 'nat.change')).toHaveLength(1);
    expect(changesLogged().filter((line) => line.startsWith('flush'))).toHaveLength(1);
    expectHeld(...wish);
  });

  it('drops flows of the guest without the translation, and no other', async () => {
    const flow = (source: string, destination: string, back: string, to: string) => {
      return { original: { source, destination }, reply: { source: back, destination: to } };
    };
    const outside = '192.168.10.100';
    const others = flow(guestOf(3), outside, outside, addressOf(3));
    host.kernel.flows = [
      flow(guestOf(2), outside, outside, guestOf(2)),
      flow(outside, addressOf(2), addressOf(2), outside),
      others,
    ];
    expect((await add(mapping(2))).flushed).toBe(2);
    expect(host.kernel.flows).toEqual([others]);
  });
});

describe('the order of a removal', () => {
  it('is file, alias, pair, conntrack, file', async () => {
    await add(mapping(2));
    host.log.length = 0;
    await sync(host, request(vmOwner(2), []));
    expect(changesLogged()).toEqual([
      'write vm-2 removing',
      `deleteAlias ${addressOf(2)} ib0:2-0`,
      'nat.change',
      `flush mapping ${guestOf(2)} ${addressOf(2)}`,
      'remove vm-2',
    ]);
    expectHeld();
  });

  it('drops exactly the flows of the mapping, both ways', async () => {
    await add(mapping(2));
    const flow = (source: string, destination: string, back: string, to: string) => {
      return { original: { source, destination }, reply: { source: back, destination: to } };
    };
    const other = flow('192.168.10.100', addressOf(3), guestOf(3), '192.168.10.100');
    host.kernel.flows = [
      flow(guestOf(2), '192.168.10.100', '192.168.10.100', addressOf(2)),
      flow('192.168.10.100', addressOf(2), guestOf(2), '192.168.10.100'),
      other,
    ];
    expect((await sync(host, request(vmOwner(2), []))).flushed).toBe(2);
    expect(host.kernel.flows).toEqual([other]);
  });

  it('does nothing for an owner that has nothing', async () => {
    expect(await sync(host, request(vmOwner(2), []))).toMatchObject({ changes: [], flushed: 0, warnings: [] });
    expect(changesLogged()).toEqual([]);
  });

  it('goes on when somebody took the alias away before', async () => {
    await add(mapping(2));
    host.kernel.addresses = [];
    await sync(host, request(vmOwner(2), []));
    expectHeld();
  });
});

describe('a change of address', () => {
  it('takes the old alias off before the pair goes over, and puts the new one on after it', async () => {
    await add(mapping(2));
    host.log.length = 0;
    await add(mapping(2, { to: 5 }));
    expect(changesLogged()).toEqual([
      'write vm-2 pending',
      `deleteAlias ${addressOf(2)} ib0:2-0`,
      'nat.change',
      `flush mapping ${guestOf(2)} ${addressOf(2)}, foreign ${guestOf(2)} ${addressOf(5)}`,
      `addAlias ${addressOf(5)} ib0:2-0`,
      'write vm-2 active',
      `announce ${addressOf(5)}`,
    ]);
    expectHeld(mapping(2, { to: 5 }));
  });

  it('of the MAC alone touches neither alias nor conntrack', async () => {
    await add(mapping(2));
    host.log.length = 0;
    await add(mapping(2, { mac: 99 }));
    expect(changesLogged()).toEqual(['write vm-2 pending', 'nat.change', 'write vm-2 active']);
    expectHeld(mapping(2, { mac: 99 }));
  });

  it('of the MAC to any, and back, leaves no binding behind', async () => {
    await add(mapping(2));
    await add(mapping(2, { mac: null }));
    expectHeld(mapping(2, { mac: null }));
    await add(mapping(2));
    expectHeld(mapping(2));
  });

  it('of the NIC number gives the alias its new label', async () => {
    await add(mapping(2));
    await add(mapping(2, { nic: 3 }));
    expectHeld(mapping(2, { nic: 3 }));
  });

  it('swaps two addresses of one VM', async () => {
    const before = [mapping(2, { vm: 7 }), mapping(3, { vm: 7, nic: 1 })];
    const after = [mapping(2, { vm: 7, to: 3 }), mapping(3, { vm: 7, nic: 1, to: 2 })];
    await sync(host, request(vmOwner(7), before));
    await sync(host, request(vmOwner(7), after));
    expectHeld(...after);
  });
});

describe('a second sync of the same wish', () => {
  it('plans nothing, writes nothing, and touches neither conntrack nor the list of addresses', async () => {
    await add(mapping(2));
    host.log.length = 0;
    expect(await add(mapping(2))).toMatchObject({ changes: [], flushed: 0 });
    expect(host.log).toEqual([]);
  });

  it('repairs what is missing', async () => {
    await add(mapping(2));
    host.kernel.addresses = [];
    expect((await add(mapping(2))).changes.map((c) => c.kind)).toEqual(['flush-foreign', 'add-alias', 'announce']);
    expectHeld(mapping(2));
  });
});

describe('a change of one mapping', () => {
  it('never lists the table nor reads the other files', async () => {
    for (const n of [3, 4, 5]) await add(mapping(n));
    host.log.length = 0;
    await add(mapping(2));
    await add(mapping(2, { to: 9 }));
    await sync(host, request(vmOwner(2), []));
    expect(host.log.filter((line) => line === 'nft list' || line === 'all files' || line === 'addresses')).toEqual([]);
  });
});

describe('a dry run', () => {
  it('gives the plan and changes nothing, also without a table', async () => {
    const before = snapshot(host);
    const planned = await sync(host, request(vmOwner(2), [mapping(2)], { dryRun: true }));
    expect(planned.changes.map((c) => c.kind)).toEqual(['change-pairs', 'flush-foreign', 'add-alias', 'announce']);
    expect(snapshot(host)).toEqual(before);
    await flushRuleset(host.kernel);
    host.log.length = 0;
    await sync(host, request(vmOwner(2), [mapping(2)], { dryRun: true }));
    expect(changesLogged()).toEqual([]);
    expect(host.kernel.table).toBeUndefined();
  });
});

describe('a deploy', () => {
  const owner = vmOwner(2);
  const holder = holderOf(77);
  const deploy = (m = mapping(2)) => sync(host, request(owner, [m], { action: 'deploy', holder, pending: true }));

  it('stays pending with its holder until it is committed', async () => {
    await deploy();
    expect(host.store.read(owner)?.phase).toEqual({ name: 'pending', action: 'deploy', holder });
    expectHeld(mapping(2));
    await commit(host, owner, holder);
    expect(host.store.read(owner)).toMatchObject({ phase: { name: 'active' }, previous: [], leftovers: [] });
    expectHeld(mapping(2));
  });

  it('lets the taps that came with it leave by the port they came in by, when the bridge calls the firewall', async () => {
    host.kernel.callsIptables = true;
    await deploy();
    host.kernel.ports.push({ bridge: 'virbr1', name: 'vnet2', hairpin: false });
    await commit(host, owner, holder);
    expect(host.kernel.ports).toEqual([{ bridge: 'virbr1', name: 'vnet2', hairpin: true }]);
  });

  it('that maps nothing does the same for its taps, and writes no file', async () => {
    host.kernel.callsIptables = true;
    host.kernel.ports.push({ bridge: 'virbr1', name: 'vnet2', hairpin: false });
    await commit(host, owner, holder);
    expect(host.kernel.ports).toEqual([{ bridge: 'virbr1', name: 'vnet2', hairpin: true }]);
    expect(host.store.read(owner)).toBeUndefined();
  });

  it('that is undone leaves nothing', async () => {
    const before = snapshot(host);
    await deploy();
    await undo(host, owner, holder, 'deploy');
    expect(snapshot(host)).toEqual(before);
  });

  it('that is undone goes back to what the VM had', async () => {
    await add(mapping(2));
    const before = snapshot(host);
    host.active = new Set([2]);
    await deploy(mapping(2, { to: 6 }));
    await undo(host, owner, holder, 'deploy');
    expect(snapshot(host)).toEqual(before);
  });

  it('is neither committed nor undone by another holder, nor after another action took over', async () => {
    await deploy();
    const pending = snapshot(host);
    await commit(host, owner, holderOf(78));
    await undo(host, owner, { ...holder, start: 2 }, 'deploy');
    await undo(host, owner, { ...holder, bootId: 'another boot' }, 'deploy');
    expect(snapshot(host)).toEqual(pending);
    await add(mapping(2));
    const active = snapshot(host);
    expect(await undo(host, owner, holder, 'deploy')).toMatchObject({ changes: [] });
    expect(snapshot(host)).toEqual(active);
  });

  it('that a cancel overtook is mapped after all if its domain runs, and not if it does not', async () => {
    for (const running of [false, true]) {
      host.active = new Set();
      await deploy();
      const cancelled = await release(host, { owner, action: 'cancel', holder: holderOf(78) });
      expect(cancelled.warnings).toEqual(['deploy of vm-2 is under way and decides at its end']);
      host.active = new Set(running ? [2] : []);
      await commit(host, owner, holder, [mapping(2)]);
      if (running) expectHeld(mapping(2));
      else expectHeld();
    }
    expect(host.store.read(owner)?.phase).toEqual({ name: 'active', bootId: BOOT });
  });

  it('whose driver died as its domain came up is not released by what libvirt said just before', async () => {
    await deploy();
    host.dead.add(holder.pid);
    const { state } = host.domains;
    const comesUp = async (vm: number) => {
      const before = await state(vm);
      host.active = new Set([2]);
      return before;
    };
    const late = { ...host, domains: { ...host.domains, state: comesUp } };
    await release(late, { owner, action: 'cancel', holder: holderOf(78) });
    expectHeld(mapping(2));
  });

  it('that failed while its domain runs keeps its mapping, and says so', async () => {
    await deploy();
    host.active = new Set([2]);
    const { warnings } = await undo(host, owner, holder, 'deploy');
    expect(warnings.join()).toContain('deploy failed, but the domain of vm-2 is active');
    expectHeld(mapping(2));
    expect(host.store.read(owner)?.phase).toEqual({ name: 'active', bootId: BOOT });
  });

  it('after one that died half-way forgets nothing of that one', async () => {
    await add(mapping(2));
    // It wrote its wish, and the new alias, and died.
    await deploy(mapping(2, { to: 6 }));
    await sync(host, request(owner, [mapping(2, { to: 8 })], { holder: holderOf(79), pending: true }));
    expectHeld(mapping(2, { to: 8 }));
    expect(host.store.read(owner)).toMatchObject({
      previous: [mapping(2)],
      leftovers: [mapping(2, { to: 6 })],
    });
    host.active = undefined;
    await undo(host, owner, holderOf(79), 'deploy');
    expectHeld(mapping(2));
  });
});

describe('a rival', () => {
  it('whose domain is active is refused, naming both', async () => {
    await add(mapping(2));
    host.active = new Set([2]);
    const before = snapshot(host);
    const error = await failureOf(add(mapping(2, { vm: 3 })));
    expect(error).toMatchObject({ code: 'conflict', exit: 4 });
    expect(`${error.message} ${error.why}`).toMatch(/vm-3.*vm-2.*active/);
    expect(snapshot(host)).toEqual(before);
  });

  it('of the IB address alone is one too', async () => {
    await add(mapping(2));
    host.active = new Set([2]);
    expect(await failureOf(add(mapping(3, { to: 2 })))).toMatchObject({ code: 'conflict' });
  });

  it('that is stale is released whole in the same sync, and said', async () => {
    await sync(host, request(vmOwner(2), [mapping(2, { vm: 2 }), mapping(3, { vm: 2, nic: 1 })]));
    const result = await add(mapping(2, { vm: 9 }));
    expect(result.warnings).toEqual([expect.stringMatching(/192\.168\.122\.2 .* released from vm-2, .* not active/)]);
    expectHeld(mapping(2, { vm: 9 }));
    expect(host.store.read(vmOwner(2))).toBeUndefined();
  });

  it('that holds guest and IB address by different NICs is released whole', async () => {
    await sync(host, request(vmOwner(2), [mapping(2, { vm: 2 }), mapping(3, { vm: 2, nic: 1 })]));
    await add(mapping(2, { vm: 9, to: 3 }));
    expectHeld(mapping(2, { vm: 9, to: 3 }));
    expect(host.store.all().files).toHaveLength(1);
  });

  it('that died in the middle of a change of address leaves neither address behind', async () => {
    await add(mapping(2));
    await sync(host, request(vmOwner(2), [mapping(2, { to: 6 })], { holder: holderOf(50), pending: true }));
    host.dead.add(50);
    await add(mapping(2, { vm: 9, to: 6 }));
    expectHeld(mapping(2, { vm: 9, to: 6 }));
  });

  it('whose action is under way is refused although its domain is not active yet', async () => {
    await sync(host, request(vmOwner(2), [mapping(2)], { action: 'deploy', holder: holderOf(50), pending: true }));
    const error = await failureOf(add(mapping(2, { vm: 9 })));
    expect(error.why).toBe('vm-2 has it, and its deploy is under way');
  });

  it('is refused when libvirt does not answer', async () => {
    await add(mapping(2));
    host.active = undefined;
    const error = await failureOf(add(mapping(2, { vm: 9 })));
    expect(error).toMatchObject({ code: 'conflict' });
    expect(error.why).toContain('libvirt does not answer');
  });

  it('made by hand is never released', async () => {
    await sync(host, request({ kind: 'manual', guest: guestOf(2) }, [mapping(2, { vm: null })]));
    const error = await failureOf(add(mapping(2)));
    expect(error).toMatchObject({ code: 'conflict', fix: expect.stringContaining('kvm-ib remove --guest') });
  });
});

describe('an address of somebody else', () => {
  const foreign = [
    ['with another label', { device: 'ib0', prefixLength: 32, label: 'ib0:vip' }],
    ['with another prefix', { device: 'ib0', prefixLength: 24, label: 'ib0:2-0' }],
    ['on another link', { device: 'eth0', prefixLength: 32, label: 'eth0' }],
    ['with the label of another VM', { device: 'ib0', prefixLength: 32, label: 'ib0:99-0' }],
  ] as const;

  it.each(foreign)('%s is a conflict and stays', async (_, entry) => {
    host.kernel.addresses = [{ ...entry, address: addressOf(2) }];
    const before = snapshot(host);
    const error = await failureOf(add(mapping(2)));
    expect(error).toMatchObject({ code: 'conflict', exit: 4 });
    expect(error.why).toContain(`${addressOf(2)}/${entry.prefixLength} on ${entry.device}`);
    expect(snapshot(host)).toEqual(before);
  });

  it('in the range does not keep other mappings of the network away', async () => {
    host.kernel.addresses = [{ device: IB0, address: addressOf(3), prefixLength: 32, label: 'ib0:vip' }];
    await reconcile(host);
    await add(mapping(2));
    expect(snapshot(host).pairs).toEqual(unitsOf([mapping(2)]).pairs);
  });

  it("that is the host's own, in the range, keeps the whole network from being served", async () => {
    host.kernel.addresses = [{ device: IB0, address: addressOf(3), prefixLength: 24, label: 'ib0' }];
    await reconcile(host);
    const error = await failureOf(add(mapping(2)));
    expect(error).toMatchObject({ code: 'conflict', message: 'Cannot serve network ib' });
    expect(error.why).toContain(addressOf(3));
    expectHeldPairs([]);
  });

  it("that is the host's own does not keep a mapping from being removed", async () => {
    await add(mapping(2));
    host.kernel.addresses.push({ device: IB0, address: addressOf(3), prefixLength: 24, label: 'ib0' });
    await flushRuleset(host.kernel);
    await sync(host, request(vmOwner(2), []));
    expectHeldPairs([]);
    expect(host.store.all().files).toEqual([]);
  });

  function expectHeldPairs(mappings: readonly Mapping[]): void {
    expect(snapshot(host).pairs).toEqual(unitsOf(mappings).pairs);
  }
});

describe('a missing part of the host', () => {
  it.each([
    ['ib0', 'this host has no link ib0'],
    ['virbr1', 'this host has no bridge virbr1'],
  ])('%s is named, and nothing changes', async (link, why) => {
    host.kernel.links.delete(link);
    const before = snapshot(host);
    expect(await failureOf(add(mapping(2)))).toMatchObject({ code: 'host-lacks', exit: 6, why });
    expect(snapshot(host)).toEqual(before);
  });

  it('is no hindrance to a removal', async () => {
    await add(mapping(2));
    host.kernel.links.delete('ib0');
    host.kernel.addresses = [];
    await sync(host, request(vmOwner(2), []));
    expectHeld();
  });

  it('such as the table is made on the way, with every mapping of the host, and old flows go', async () => {
    await add(mapping(3));
    await flushRuleset(host.kernel);
    host.kernel.flows = [
      {
        original: { source: guestOf(3), destination: '192.168.10.100' },
        reply: { source: '192.168.10.100', destination: guestOf(3) },
      },
    ];
    await add(mapping(2));
    expectHeld(mapping(2), mapping(3));
    expect(host.kernel.flows).toEqual([]);
  });
});

describe('the bridge', () => {
  it('takes the MTU of the IPoIB link before the alias comes', async () => {
    host.kernel.links.set('virbr1', { mtu: 1500, up: true, type: 1 });
    await add(mapping(2));
    const log = changesLogged();
    expect(log).toContain('setMtu virbr1 2044');
    expect(log.indexOf('setMtu virbr1 2044')).toBeLessThan(log.indexOf(`addAlias ${addressOf(2)} ib0:2-0`));
  });
});

describe('an announcement', () => {
  it('that fails is a warning and no failure', async () => {
    host.announcementError = 'the link is down';
    const { warnings } = await add(mapping(2));
    expect(warnings).toEqual([`${addressOf(2)} was not announced on ib0: the link is down`]);
    expectHeld(mapping(2));
  });
});

describe('a wish', () => {
  it('that asks for an address twice is refused', async () => {
    const twice = [mapping(2, { vm: 7 }), mapping(3, { vm: 7, nic: 1, to: 2 })];
    expect(await failureOf(sync(host, request(vmOwner(7), twice)))).toMatchObject({ code: 'conflict' });
    expectHeld();
  });
});

describe('aliases of an unfinished action', () => {
  it('are all removed, whichever of its labels the kernel has', async () => {
    await add(mapping(2));
    await sync(host, request(vmOwner(2), [mapping(2, { nic: 4 })], { holder: holderOf(50), pending: true }));
    // It was stopped before it came to the alias.
    host.kernel.addresses = [{ device: IB0, address: addressOf(2), prefixLength: 32, label: 'ib0:2-0' }];
    await sync(host, request(vmOwner(2), []));
    expectHeld();
  });
});
