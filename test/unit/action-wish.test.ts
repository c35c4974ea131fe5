/** What an action wants of a VM's NICs and aliases, and what that comes to for the domain as it is. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { Mac } from '../../lib/core/address.ts';
import type { Mapping } from '../../lib/core/mapping.ts';
import { wishOfDomain } from '../../lib/core/state.ts';
import { parseActionData } from '../../lib/opennebula/action-data.ts';
import type { Held } from '../../lib/opennebula/action-wish.ts';
import { wishOfAction } from '../../lib/opennebula/action-wish.ts';
import type { KnownAction } from '../../lib/opennebula/contract.ts';
import { CONFIG, failureOf, mapping } from '../support/fake-host.ts';
import type { TestAlias, TestVm } from '../support/vm/opennebula.ts';
import { actionData } from '../support/vm/opennebula.ts';

const NOTHING: Held = { mappings: [], detachedAliases: [] };
const nic = (n: number, more: object = {}) => ({
  bridge: 'virbr1',
  mac: `02:00:c0:a8:7a:0${n}`,
  ip: `192.168.122.${n}`,
  ...more,
});
const alias: TestAlias = {
  id: 2,
  parent: 0,
  aliasId: 0,
  ip: '192.168.10.208',
  mac: '02:00:c0:a8:0a:d0',
  attach: true,
};
const vm = (more: Partial<TestVm>): TestVm => ({ id: 42, name: 'web', uuid: 'u', nics: [nic(2), nic(3)], ...more });

function wish(action: KnownAction, of: TestVm, held = NOTHING) {
  const { mappings, ...rest } = wishOfAction(CONFIG, parseActionData(actionData(of, 'h')).vm, action, held);
  return { ...rest, addresses: mappings.map((m) => `${m.nic} ${m.address}`) };
}

const held = (...mappings: readonly Mapping[]): Held => ({ mappings, detachedAliases: [] });
const first = mapping(2, { vm: 42 });
const second = mapping(3, { vm: 42, nic: 1 });

describe('the marked NIC', () => {
  const marked = vm({ nics: [nic(2), nic(3, { attach: true })] });

  it('is wanted by attach_nic and left out by detach_nic', () => {
    expect(wish('attach_nic', marked)).toMatchObject({
      addresses: ['0 192.168.10.202', '1 192.168.10.203'],
      attaching: [1],
    });
    expect(wish('detach_nic', marked)).toMatchObject({ addresses: ['0 192.168.10.202'], attaching: [] });
  });

  it('is wanted by the steps behind if it is held: attached, not detached', () => {
    for (const action of ['prereconfigure', 'reconfigure'] as const) {
      expect(wish(action, marked, held(first, second)).addresses).toHaveLength(2);
      expect(wish(action, marked, held(first)).addresses).toEqual(['0 192.168.10.202']);
    }
  });
});

describe('the marked alias', () => {
  const coming = vm({ aliases: [alias], context: { leaving: [] } });
  const going = vm({ aliases: [alias], context: { leaving: [2] } });
  const bare = vm({ aliases: [alias] });
  const inEffect = held(mapping(2, { vm: 42, to: 8 }), second);

  it('comes or goes by what the context says', () => {
    for (const has of [held(first, second), inEffect]) {
      expect(wish('reconfigure', coming, has)).toMatchObject({ attachedAliases: [2], detachedAliases: [] });
    }
    expect(wish('reconfigure', going, inEffect)).toMatchObject({
      addresses: ['0 192.168.10.202', '1 192.168.10.203'],
      attachedAliases: [],
      detachedAliases: [2],
    });
  });

  it('without a context comes if it is not in effect, and goes if it is or went before', () => {
    expect(wish('reconfigure', bare, held(first)).addresses[0]).toBe('0 192.168.10.208');
    expect(wish('reconfigure', bare, inEffect).addresses[0]).toBe('0 192.168.10.202');
    expect(wish('reconfigure', bare, { ...held(first), detachedAliases: [2] }).addresses[0]).toBe('0 192.168.10.202');
  });

  it('with the mark of a detach (5.8), which stays for the next alias of that number, is judged as without a context', () => {
    const data = actionData(coming, 'h').replace(
      '<ETH0_ALIAS0_IP>',
      '<ETH0_ALIAS0_DETACH>YES</ETH0_ALIAS0_DETACH><ETH0_ALIAS0_IP>',
    );
    expect(data).toContain('_DETACH');
    const of = (has: Held) => {
      const { mappings } = wishOfAction(CONFIG, parseActionData(data).vm, 'reconfigure', has);
      return mappings[0]?.address;
    };
    expect(of(inEffect)).toBe('192.168.10.202');
    expect(of({ ...held(first, second), detachedAliases: [2] })).toBe('192.168.10.202');
    expect(of(held(first, second))).toBe('192.168.10.208');
  });

  it('is refused where it would not come into effect, as long as there is somebody to tell', async () => {
    const another = { ...alias, id: 4, aliasId: 1, ip: '192.168.10.207' };
    const second = vm({ aliases: [{ ...alias, attach: false }, another], context: { leaving: [] } });
    const error = await failureOf(Promise.resolve().then(() => wish('prereconfigure', second, inEffect)));
    expect(error).toMatchObject({ code: 'conflict', message: 'Cannot attach the alias 4 to NIC 0 of VM 42' });
    expect(error.why).toContain('192.168.10.208');
    expect(wish('deploy', second).notes.join()).toContain('one IB address');
    const elsewhere = vm({ aliases: [{ ...another, ip: '10.9.9.9' }], context: { leaving: [] } });
    expect(wish('prereconfigure', elsewhere, held(first)).attachedAliases).toEqual([4]);
  });

  it('is not there for detach_nic, which follows a failed attach, nor for attach_nic', () => {
    for (const action of ['detach_nic', 'attach_nic'] as const) {
      expect(wish(action, coming, inEffect).addresses[0]).toBe('0 192.168.10.202');
    }
  });
});

describe('a NIC that cannot be mapped', () => {
  const outside = vm({ nics: [nic(2), nic(3, { ip: '192.168.122.99' })] });

  it('fails what starts the VM, and the attach of that NIC', async () => {
    for (const action of ['deploy', 'restore'] as const) {
      const error = await failureOf(Promise.resolve().then(() => wish(action, outside)));
      expect(error).toMatchObject({ code: 'out-of-range' });
    }
    const attached = vm({ nics: [nic(2), nic(3, { ip: '192.168.122.99', attach: true })] });
    const error = await failureOf(Promise.resolve().then(() => wish('attach_nic', attached)));
    expect(error.message).toContain('NIC 1 of VM 42');
  });

  it('keeps what it has in all that happens to a running VM, and is said', () => {
    for (const action of ['reboot', 'attach_nic', 'detach_nic', 'reconfigure', 'snapshot_revert'] as const) {
      const { addresses, keep, notes } = wish(action, outside, held(first, second));
      expect({ addresses, keep }).toEqual({ addresses: ['0 192.168.10.202'], keep: [1] });
      expect(notes.join()).toContain('192.168.122.99');
      expect(wish(action, outside, held(first)).keep).toEqual([]);
    }
  });

  it('whose bridge left the configuration keeps it too', () => {
    const moved = vm({ nics: [nic(2), nic(3, { bridge: 'virbr9' })] });
    const old = { ...second, bridge: 'virbr9' } as Mapping;
    expect(wish('reboot', moved, held(first, old)).keep).toEqual([1]);
  });

  it('that opts out is known and unmapped', () => {
    expect(wish('reboot', vm({ nics: [nic(2, { ibIp: 'none' }), nic(3)] }))).toMatchObject({
      addresses: ['1 192.168.10.203'],
      unmapped: [0],
      keep: [],
    });
  });
});

describe('the wish for a domain', () => {
  const macs = (...of: readonly Mapping[]) => new Set(of.flatMap((m) => m.mac ?? []));
  const nicsOf = (mappings: readonly Mapping[]) => mappings.map((m) => m.nic);
  const plain = { unmapped: [], attaching: [] };

  it('stands where libvirt does not say', () => {
    expect(wishOfDomain({ ...plain, mappings: [first] }, [second], undefined)).toEqual([first]);
  });

  it('leaves out what the domain lacks, but not what is being attached', () => {
    const both = { ...plain, mappings: [first, second] };
    expect(nicsOf(wishOfDomain(both, [], macs(first)))).toEqual([0]);
    expect(nicsOf(wishOfDomain({ ...both, attaching: [1] }, [], macs(first)))).toEqual([0, 1]);
  });

  it('keeps what the domain has and OpenNebula forgot, unless it says that the NIC is to have none', () => {
    const forgot = { ...plain, mappings: [first] };
    expect(nicsOf(wishOfDomain(forgot, [first, second], macs(first, second)))).toEqual([0, 1]);
    expect(nicsOf(wishOfDomain({ ...forgot, unmapped: [1] }, [first, second], macs(first, second)))).toEqual([0]);
  });

  it('never gives an address twice, nor anything to a NIC that the domain lacks', () => {
    const some = fc.array(
      fc
        .tuple(fc.integer({ min: 2, max: 8 }), fc.integer({ min: 0, max: 3 }), fc.integer({ min: 2, max: 8 }))
        .map(([guest, number, to]) => mapping(guest, { vm: 42, nic: number, to })),
    );
    fc.assert(
      fc.property(some, some, fc.array(fc.integer({ min: 2, max: 8 })), (wished, had, guests) => {
        const distinct = wished.filter(
          (m, i) =>
            wished.findIndex(
              (o) => o.nic === m.nic || o.guest === m.guest || o.address === m.address || o.mac === m.mac,
            ) === i,
        );
        const plugged = new Set(guests.map((n) => mapping(n).mac as Mac));
        const result = wishOfDomain({ ...plain, mappings: distinct }, had, plugged);
        for (const key of ['guest', 'address', 'nic'] as const) {
          expect(new Set(result.map((m) => m[key])).size).toBe(result.length);
        }
        expect(result.every((m) => m.mac === null || plugged.has(m.mac))).toBe(true);
      }),
    );
  });
});
