/** What a VM should have where OpenNebula does not describe it: NICs from domain XML or argv, addresses from filter or MAC. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ipv4FromNumber, rangeContains, rangeOffset } from '../../lib/core/address.ts';
import { KvmIbError } from '../../lib/core/errors.ts';
import type { Config, Mapping } from '../../lib/core/mapping.ts';
import type { StateFile } from '../../lib/core/state.ts';
import type { OwnCall } from '../../lib/opennebula/contract.ts';
import { parseActionCall } from '../../lib/opennebula/contract.ts';
import type { DomainNic } from '../../lib/opennebula/without-data.ts';
import { correctedAddresses, wishOfDomainXml, wishWithoutData } from '../../lib/opennebula/without-data.ts';
import { mapping, network } from '../support/fake-host.ts';

const [NET, OTHER] = [
  network(),
  network({
    name: 'ib2',
    device: 'ib1',
    bridge: 'virbr2',
    guests: '10.0.0.2-10.0.0.5',
    addresses: '10.9.0.2-10.9.0.5',
  }),
];
const CONFIG: Config = { networks: [NET, OTHER], static: [] };
const DEPLOY = { vmId: 42, action: 'deploy' } as const;
const mac = (n: number) => `02:00:c0:a8:7a:0${n}`;
const nic = (n: number, more: Partial<DomainNic> = {}): DomainNic => ({
  bridge: 'virbr1',
  mac: mac(n),
  target: null,
  ip: null,
  place: 0,
  ...more,
});

function wish(interfaces: readonly DomainNic[], note?: StateFile, name: string | null = 'one-42') {
  return wishOfDomainXml(CONFIG, DEPLOY, { name, interfaces }, note);
}
const shown = (mappings: readonly Mapping[]) => mappings.map((m) => `${m.nic} ${m.guest} ${m.address}`);

function refusal(act: () => unknown): KvmIbError {
  try {
    act();
  } catch (error) {
    expect(error).toBeInstanceOf(KvmIbError);
    return error as KvmIbError;
  }
  throw new Error('accepted');
}

describe('a domain that is to start', () => {
  test('has its NICs by MAC, each numbered by its place, and one line says what could not be seen', () => {
    const { mappings, notes, networksTouched } = wish([
      nic(2),
      nic(9, { bridge: 'br0', place: 1 }),
      nic(3, { bridge: 'virbr2', mac: '02:00:0A:00:00:03', place: 2 }),
    ]);
    expect(shown(mappings)).toEqual(['0 192.168.122.2 192.168.10.202', '2 10.0.0.3 10.9.0.3']);
    expect(networksTouched).toEqual([NET, OTHER]);
    expect(notes).toEqual([
      'NIC 0 has 192.168.122.2 <-> 192.168.10.202 by its MAC 02:00:c0:a8:7a:02, NIC 2 has 10.0.0.3 <-> 10.9.0.3 by its MAC 02:00:0a:00:00:03: this OpenNebula (before 6.0) tells no more of VM 42 here. IB_IP and external aliases need VN_MAD kvm-ib (docs/install.md)',
    ]);
  });

  test('says nothing where there is no NIC of ours', () => {
    expect(wish([nic(2, { bridge: 'br0' })])).toMatchObject({ mappings: [], notes: [] });
  });

  test('is numbered by its taps only where all of them have a number of this VM', () => {
    const taps = (...names: (string | null)[]) =>
      wish(names.map((target, place) => nic(place + 2, { target, place }))).mappings.map((m) => m.nic);
    expect(taps('one-42-3', 'one-42-7')).toEqual([3, 7]);
    for (const other of [null, 'vnet0', 'one-4-2', 'one-42-100', 'one-42-1x', 'one-42-1']) {
      expect(taps('one-42-1', other)).toEqual([0, 1]);
    }
  });

  test('has the address of its filter, which is refused outside the range like any other', () => {
    expect(shown(wish([nic(2, { ip: '192.168.122.5' })]).mappings)).toEqual(['0 192.168.122.5 192.168.10.205']);
    expect(refusal(() => wish([nic(2, { ip: '192.168.122.99' })])).code).toBe('out-of-range');
    expect(refusal(() => wish([nic(2, { ip: 'x' })])).code).toBe('bad-input');
  });

  test('is refused with a MAC that reads as an address elsewhere; the message names NIC, MAC, address and remedy', () => {
    const error = refusal(() => wish([nic(2, { mac: '02:00:0a:00:00:03' })]));
    expect(error).toMatchObject({ code: 'out-of-range', message: 'Cannot map NIC 0 of VM 42' });
    expect(error.why).toContain('its MAC 02:00:0a:00:00:03 reads as 10.0.0.3');
    expect(error.fix).toContain('VN_MAD kvm-ib');
  });

  test('is refused without a MAC, with a group MAC, and with two NICs of one address', () => {
    expect(refusal(() => wish([nic(2, { mac: null })])).why).toBe('it has no MAC');
    expect(refusal(() => wish([nic(2, { mac: '03:00:c0:a8:7a:02' })])).why).toContain('group address');
    expect(refusal(() => wish([nic(2), nic(2, { mac: '06:00:c0:a8:7a:02', place: 1 })])).code).toBe('conflict');
  });

  test.each([['one-43'], [null], ['web\n']])('is refused when it is %j', (name) => {
    expect(refusal(() => wish([nic(2)], undefined, name))).toMatchObject({ code: 'bad-input' });
  });

  test('never gets an address but the one of the same place in the range of its own bridge', () => {
    const byte = fc.oneof(fc.integer({ min: 0, max: 255 }), fc.constantFrom(192, 168, 122, 10, 0, 2, 3, 5));
    const bridge = fc.constantFrom('virbr1', 'virbr2');
    fc.assert(
      fc.property(bridge, fc.array(byte, { minLength: 6, maxLength: 6 }), (on, bytes) => {
        const address = bytes.map((b) => b.toString(16).padStart(2, '0')).join(':');
        const decoded = ipv4FromNumber(bytes.slice(2).reduce((sum, b) => sum * 256 + b, 0));
        const net = on === 'virbr1' ? NET : OTHER;
        let got: readonly Mapping[] | undefined;
        try {
          got = wish([nic(2, { bridge: on, mac: address })]).mappings;
        } catch (error) {
          expect(error).toBeInstanceOf(KvmIbError);
        }
        if (got === undefined) expect(rangeContains(net.guests, decoded) && ((bytes[0] ?? 0) & 1) === 0).toBe(false);
        else {
          expect(got).toMatchObject([{ guest: decoded, bridge: on, named: false }]);
          const [m] = got;
          expect(m && rangeOffset(net.addresses, m.address)).toBe(rangeOffset(net.guests, decoded));
        }
      }),
      { numRuns: 500 },
    );
  });
});

describe("the note of the VNM driver's pre", () => {
  const note = (mappings: readonly Mapping[], action = 'pre'): StateFile => ({
    version: 1,
    owner: { kind: 'vm', vm: 42 },
    phase: { name: 'pending', action, holder: { pid: 7, start: 1, bootId: 'b' } },
    mappings,
    previous: [],
    leftovers: [],
    detachedAliases: [],
    updated: '',
  });
  const noted = mapping(2, { vm: 42, to: 8 });

  test('counts, and what it did not map opts out; nothing is unseen', () => {
    const got = wish([nic(2), nic(3, { place: 1 }), nic(9, { bridge: 'br0', place: 2 })], note([noted]));
    expect(got).toMatchObject({ mappings: [noted], unmapped: [1], notes: [] });
    expect(got.sources.map(({ source }) => source)).toEqual(['nic-attribute']);
    expect(got.networksTouched).toEqual([NET]);
  });

  test('names no address that came by the range', () => {
    expect(wish([nic(2)], note([{ ...noted, named: false }])).sources.map(({ source }) => source)).toEqual(['range']);
  });

  test('that is of another domain is refused', () => {
    for (const other of [nic(3), nic(2, { bridge: 'virbr2' }), nic(2, { bridge: 'br0' })]) {
      expect(refusal(() => wish([other], note([noted])))).toMatchObject({ code: 'bad-input' });
    }
  });

  test('is no note in any other phase or of any other action', () => {
    const active: StateFile = { ...note([noted]), phase: { name: 'active' } };
    for (const file of [active, note([noted], 'deploy')]) {
      expect(shown(wish([nic(2)], file).mappings)).toEqual(['0 192.168.122.2 192.168.10.202']);
    }
  });
});

describe('an action on a VM that is there', () => {
  const first = { ...mapping(2, { vm: 42 }), named: false };
  const second = { ...mapping(3, { vm: 42, nic: 4 }), named: false };
  const held = { mappings: [first, second], detachedAliases: [] };
  const call = (action: string, ...args: readonly string[]): OwnCall => {
    const parsed = parseActionCall(action, [...args, '42', 'h']);
    if (parsed.treatment === 'pass') throw new Error('passes');
    return parsed;
  };

  test('that holds nothing has nothing to do with us', () => {
    for (const action of ['shutdown', 'reboot', 'detach_nic', 'snapshot_revert', 'reconfigure']) {
      expect(wishWithoutData(CONFIG, call(action, 'one-42', mac(2)), undefined)).toBeUndefined();
    }
    expect(wishWithoutData(CONFIG, call('attach_nic', 'one-42', mac(2), 'br0', '-'), undefined)).toBeUndefined();
  });

  test('keeps what it has', () => {
    for (const [action, ...args] of [['reboot', 'one-42'], ['snapshot_revert', 'one-42', 's'], ['reset']] as const) {
      const got = wishWithoutData(CONFIG, call(action, ...args), held);
      expect(got).toMatchObject({ mappings: [], sources: [], unmapped: [], keep: [0, 4], attaching: [], notes: [] });
    }
    expect(wishWithoutData(CONFIG, call('attach_nic', 'one-42', mac(5), 'br0', '-'), held)?.keep).toEqual([0, 4]);
  });

  test('keeps all but the NIC that is detached', () => {
    expect(wishWithoutData(CONFIG, call('detach_nic', 'one-42', mac(3).toUpperCase()), held)?.keep).toEqual([0]);
    expect(wishWithoutData(CONFIG, call('detach_nic', 'one-42', mac(9)), held)?.keep).toEqual([0, 4]);
  });

  test('attaches by MAC, under a number that no other NIC has; a repetition takes the same', () => {
    const attach = (n: number, has: typeof held | undefined) =>
      wishWithoutData(CONFIG, call('attach_nic', 'one-42', mac(n), 'virbr1', '-', 'dummy'), has);
    const got = attach(5, held);
    expect(shown(got?.mappings ?? [])).toEqual(['5 192.168.122.5 192.168.10.205']);
    expect(got).toMatchObject({ keep: [0, 4], attaching: [5] });
    expect(got?.notes.join()).toContain(`by its MAC ${mac(5)}`);
    expect(attach(3, held)).toMatchObject({ keep: [0], attaching: [4] });
    expect(attach(5, undefined)).toMatchObject({ keep: [], attaching: [0] });
  });

  test('attaches nothing with a MAC that is none of the range, or with its arguments out of place', () => {
    const attach = (...args: readonly string[]) =>
      refusal(() => wishWithoutData(CONFIG, call('attach_nic', ...args), held));
    expect(attach('one-42', '02:00:0a:0a:0a:0a', 'virbr1', '-').code).toBe('out-of-range');
    expect(attach('one-42', '', 'virbr1', '-').code).toBe('bad-input');
    expect(attach(mac(5), 'virbr1', '-').code).toBe('usage');
  });
});

describe('an address that is seen later', () => {
  const old = { ...mapping(2, { vm: 42 }), named: false };
  const held = { mappings: [old], detachedAliases: [] };
  const now = mapping(2, { vm: 42, to: 8 });

  test('is said, with both addresses and by what', () => {
    for (const [source, name] of [
      ['nic-attribute', 'IB_IP'],
      ['external-alias', 'external alias'],
    ] as const) {
      expect(correctedAddresses(held, { sources: [{ mapping: now, source }] })).toEqual([
        `NIC 0 of VM 42 had 192.168.10.202, since this OpenNebula does not tell its ${name} at deploy; it gets 192.168.10.208 now. To have it from the start: VN_MAD kvm-ib (docs/install.md)`,
      ]);
    }
  });

  test('is not said where nothing differs, or it was asked for before', () => {
    const none = (has: typeof held | undefined, source: 'range' | 'nic-attribute', m = now) =>
      expect(correctedAddresses(has, { sources: [{ mapping: m, source }] })).toEqual([]);
    none(held, 'range');
    none(held, 'nic-attribute', mapping(2, { vm: 42 }));
    none(undefined, 'nic-attribute');
    none({ ...held, mappings: [{ ...old, named: true }] }, 'nic-attribute');
  });
});
