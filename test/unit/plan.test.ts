/** The plan as a function: laws by random inputs, orders and texts by example. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { Mapping } from '../../lib/core/mapping.ts';
import type { Change, Elements, Observed } from '../../lib/core/plan.ts';
import { describe as describeChange, plan, reverse } from '../../lib/core/plan.ts';
import { addressOf, guestOf, IB0, mapping, VIRBR1 } from '../support/fake-host.ts';

const NOTHING: Observed = {
  guestToIb: new Map(),
  ibToGuest: new Map(),
  macs: new Set(),
  unbound: new Set(),
  aliases: [],
  bridges: [],
};

/** The kernel that holds exactly these mappings. */
function holding(mappings: readonly Mapping[], bridges: Observed['bridges'] = []): Observed {
  return {
    guestToIb: new Map(mappings.map((m) => [m.guest, m.address])),
    ibToGuest: new Map(mappings.map((m) => [m.address, m.guest])),
    macs: new Set(mappings.flatMap((m) => (m.mac === null ? [] : [`${m.guest} ${m.mac}`]))),
    unbound: new Set(mappings.flatMap((m) => (m.mac === null ? [m.guest] : []))),
    aliases: mappings.map(({ device, address, label }) => ({ device, address, label })),
    bridges,
  };
}

/** The kernel after one change; strict as the kernel is. */
function after(observed: Observed, change: Change): Observed {
  const guestToIb = new Map(observed.guestToIb);
  const ibToGuest = new Map(observed.ibToGuest);
  const macs = new Set(observed.macs);
  const unbound = new Set(observed.unbound);
  const strictly = (ok: boolean): void => {
    if (!ok) throw new Error(`the kernel refuses ${JSON.stringify(change)}`);
  };
  if (change.kind === 'change-pairs') {
    const { remove, add } = change;
    for (const e of remove.guestToIb) strictly(guestToIb.delete(e.guest));
    for (const e of remove.ibToGuest) strictly(ibToGuest.delete(e.address));
    for (const e of remove.macs) strictly(macs.delete(`${e.guest} ${e.mac}`));
    for (const e of remove.unbound) strictly(unbound.delete(e));
    for (const e of add.guestToIb) strictly(!guestToIb.has(e.guest) && guestToIb.set(e.guest, e.address) !== undefined);
    for (const e of add.ibToGuest)
      strictly(!ibToGuest.has(e.address) && ibToGuest.set(e.address, e.guest) !== undefined);
    for (const e of add.macs) macs.add(`${e.guest} ${e.mac}`);
    for (const e of add.unbound) unbound.add(e);
    return { ...observed, guestToIb, ibToGuest, macs, unbound };
  }
  if (change.kind === 'add-alias') {
    const { device, address, label } = change;
    strictly(!observed.aliases.some((a) => a.device === device && a.address === address));
    return { ...observed, aliases: [...observed.aliases, { device, address, label }] };
  }
  if (change.kind === 'delete-alias') {
    const aliases = observed.aliases.filter((a) => a.address !== change.address || a.label !== change.label);
    strictly(aliases.length < observed.aliases.length);
    return { ...observed, aliases };
  }
  return observed;
}

function essence(observed: Observed): object {
  const { guestToIb, ibToGuest, macs, unbound, aliases } = observed;
  return {
    pairs: [...guestToIb].sort(),
    back: [...ibToGuest].sort(),
    macs: [...macs].sort(),
    unbound: [...unbound].sort(),
    aliases: aliases.map((a) => `${a.device} ${a.address} ${a.label}`).sort(),
  };
}

/** Mappings over few addresses, none of them twice. */
const distinct = fc
  .tuple(
    fc.uniqueArray(fc.integer({ min: 2, max: 6 }), { maxLength: 4 }),
    fc.uniqueArray(fc.integer({ min: 2, max: 6 }), { minLength: 4, maxLength: 4 }),
    fc.array(fc.record({ nic: fc.integer({ min: 0, max: 2 }), mac: fc.option(fc.integer({ min: 1, max: 3 })) }), {
      minLength: 4,
      maxLength: 4,
    }),
  )
  .map(([guests, addresses, extras]) =>
    guests.map((guest, index) => mapping(guest, { vm: 1, to: addresses[index] ?? guest, ...extras[index] })),
  );

const changes = (want: readonly Mapping[], release: readonly Mapping[], observed: Observed) =>
  plan({ want, release }, observed);

describe('a plan', () => {
  it('from what is to the same is empty', () => {
    fc.assert(
      fc.property(distinct, (mappings) => {
        expect(changes(mappings, [], holding(mappings))).toEqual([]);
      }),
    );
  });

  it('that is carried out gives what was wanted, with no step that the kernel refuses', () => {
    fc.assert(
      fc.property(distinct, distinct, (have, want) => {
        const steps = changes(want, have, holding(have));
        const result = steps.reduce(after, holding(have));
        expect(essence(result)).toEqual(essence(holding(want)));
        expect(changes(want, [], result)).toEqual([]);
      }),
    );
  });

  it('does not depend on the order of its input', () => {
    const shuffled = distinct.chain((list) =>
      fc.tuple(fc.constant(list), fc.shuffledSubarray(list, { minLength: list.length })),
    );
    fc.assert(
      fc.property(shuffled, shuffled, ([have, haveToo], [want, wantToo]) => {
        expect(changes(wantToo, haveToo, holding(have))).toEqual(changes(want, have, holding(have)));
        expect(changes(want, [...have, ...haveToo], holding(have))).toEqual(changes(want, have, holding(have)));
      }),
    );
  });

  it('never has an alias without its pair, after any of its steps', () => {
    fc.assert(
      fc.property(distinct, distinct, (have, want) => {
        let seen = holding(have);
        for (const step of changes(want, have, seen)) {
          seen = after(seen, step);
          for (const { address } of seen.aliases) expect(seen.ibToGuest.has(address)).toBe(true);
        }
      }),
    );
  });

  it('is taken back by the reversals of its steps, last first', () => {
    fc.assert(
      fc.property(distinct, distinct, (have, want) => {
        const steps = changes(want, have, holding(have));
        const back = steps.flatMap((step) => reverse(step) ?? []).reverse();
        expect(essence([...steps, ...back].reduce(after, holding(have)))).toEqual(essence(holding(have)));
      }),
    );
  });

  it('drops the flows of every pair that goes', () => {
    fc.assert(
      fc.property(distinct, distinct, (have, want) => {
        const kept = new Set(want.map((m) => `${m.guest} ${m.address}`));
        const gone = have.map((m) => `${m.guest} ${m.address}`).filter((pair) => !kept.has(pair));
        const flushed = changes(want, have, holding(have)).flatMap((c) =>
          c.kind === 'flush-mapping' ? [`${c.guest} ${c.address}`] : [],
        );
        expect(flushed.sort()).toEqual(gone.sort());
      }),
    );
  });
});

describe('what is released', () => {
  it('has its flows dropped also when the pair is gone already', () => {
    expect(changes([], [mapping(2)], NOTHING)).toEqual([
      { kind: 'flush-mapping', guest: guestOf(2), address: addressOf(2) },
    ]);
  });

  it('and unknown to every file goes with nothing but what was seen of it', () => {
    const stray = { ...mapping(2), label: '' };
    expect(changes([], [stray], NOTHING)).toEqual([]);
    const seen = { ...holding([stray]), aliases: [] };
    expect(changes([], [stray], seen).map((c) => c.kind)).toEqual(['change-pairs', 'flush-mapping']);
  });
});

describe('a wanted mapping', () => {
  it('displaces whatever the table holds under its two addresses', () => {
    const other = holding([mapping(2, { to: 4 }), mapping(3, { to: 2 })]);
    const [change] = changes([mapping(2)], [], { ...other, aliases: [] });
    expect(change).toMatchObject({
      kind: 'change-pairs',
      remove: {
        guestToIb: [
          { guest: guestOf(2), address: addressOf(4) },
          { guest: guestOf(3), address: addressOf(2) },
        ],
      },
      add: { guestToIb: [{ guest: guestOf(2), address: addressOf(2) }] },
    });
  });

  it('whose pair is there one way only is made whole', () => {
    const half = { ...holding([mapping(2)]), ibToGuest: new Map() };
    expect(changes([mapping(2)], [], half)).toMatchObject([
      { kind: 'change-pairs', add: { guestToIb: [], ibToGuest: [{ address: addressOf(2), guest: guestOf(2) }] } },
      { kind: 'flush-foreign' },
    ]);
  });
});

describe('bridges', () => {
  const bridge = { bridge: VIRBR1, device: IB0, bridgeMtu: 1500, deviceMtu: 2044, portsToHairpin: [] };

  it('follow the MTU of their link, where both are there', () => {
    expect(changes([], [], { ...NOTHING, bridges: [bridge] })).toEqual([
      { kind: 'set-mtu', link: VIRBR1, from: 1500, to: 2044 },
    ]);
    expect(changes([], [], { ...NOTHING, bridges: [{ ...bridge, bridgeMtu: null }] })).toEqual([]);
    expect(changes([], [], { ...NOTHING, bridges: [{ ...bridge, deviceMtu: null }] })).toEqual([]);
  });
});

describe('the text of a change', () => {
  const elements: Elements = {
    guestToIb: [{ guest: guestOf(2), address: addressOf(2) }],
    ibToGuest: [{ address: addressOf(2), guest: guestOf(2) }],
    macs: [],
    unbound: [guestOf(2)],
  };
  const none: Elements = { guestToIb: [], ibToGuest: [], macs: [], unbound: [] };

  it('tells what comes with +, what goes with - and what changes with ~', () => {
    const [add] = changes([mapping(2)], [], NOTHING);
    expect(add && describeChange(add)).toEqual([
      '+ element   guest_to_ib 192.168.122.2 : 192.168.10.202',
      '+ element   ib_to_guest 192.168.10.202 : 192.168.122.2',
      '+ element   guest_mac 192.168.122.2 . 02:00:c0:a8:7a:02',
    ]);
    expect(describeChange({ kind: 'change-pairs', remove: elements, add: none, comments: {} })).toEqual([
      '- element   guest_to_ib 192.168.122.2 : 192.168.10.202',
      '- element   ib_to_guest 192.168.10.202 : 192.168.122.2',
      '- element   guest_any_mac 192.168.122.2',
    ]);
    expect(describeChange({ kind: 'set-mtu', link: VIRBR1, from: 1500, to: 2044 })).toEqual([
      '~ mtu       virbr1 1500 -> 2044',
    ]);
  });

  it('has a comment of few letters only, whatever the network is called', () => {
    const [add] = changes([{ ...mapping(2), network: 'a"b\nc' }], [], NOTHING);
    expect(add).toMatchObject({ comments: { [guestOf(2)]: 'one-2 nic 0 a_b_c' } });
  });
});
