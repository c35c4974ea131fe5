/** The network driver's contract: argv and standard input of every version, and what each action wants of a VM. */
import { readFileSync } from 'node:fs';
import fc from 'fast-check';
import { describe, expect, it, test } from 'vitest';
import { KvmIbError } from '../../lib/core/errors.ts';
import type { Mapping } from '../../lib/core/mapping.ts';
import { parseActionData } from '../../lib/opennebula/action-data.ts';
import type { Held } from '../../lib/opennebula/action-wish.ts';
import { wishOfAction } from '../../lib/opennebula/action-wish.ts';
import type { NetworkAction } from '../../lib/opennebula/vnm.ts';
import {
  isHotplug,
  parseNetworkCall,
  parseNetworkVm,
  requireBase64,
  wishOfNetworkAction,
} from '../../lib/opennebula/vnm.ts';
import { CONFIG, mapping } from '../support/fake-host.ts';
import type { TestVm } from '../support/vm/opennebula.ts';
import { actionData } from '../support/vm/opennebula.ts';
import { deployIdOf, networkCall, networkVm, partOfVm, VNM_VERSIONS } from '../support/vnm.ts';

function failureOf(act: () => unknown): KvmIbError {
  try {
    act();
  } catch (error) {
    if (error instanceof KvmIbError) return error;
    throw error;
  }
  throw new Error('it did not fail');
}
const fixture = (name: string) =>
  readFileSync(`${import.meta.dirname}/../fixtures/opennebula/${name}`, 'latin1').trim();
const nic = (n: number, more: object = {}) => ({
  bridge: 'virbr1',
  mac: `02:00:c0:a8:7a:0${n}`,
  ip: `192.168.122.${n}`,
  ...more,
});
const alias = (more: object = {}) => ({
  id: 2,
  parent: 0,
  aliasId: 0,
  ip: '192.168.10.208',
  mac: '02:00:c0:a8:0a:d0',
  ...more,
});
const vm = (more: Partial<TestVm> = {}): TestVm => ({
  id: 42,
  name: 'web',
  uuid: '6f0a1c1e-6c0e-4d0c-9a0e-5a3b3f1d2c42',
  nics: [nic(2), nic(3)],
  ...more,
});
const ACTIONS: readonly NetworkAction[] = ['pre', 'post', 'clean', 'update_nic'];
const newest = VNM_VERSIONS.at(-1);
if (newest === undefined) throw new Error('no versions');

test('the tests give a network driver what the code of OpenNebula gives it', () => {
  expect(partOfVm(newest, fixture('vm-7.4.xml'))).toBe(fixture('vnm-7.4.xml'));
});

describe.each(VNM_VERSIONS)('$name', (version) => {
  const step = { vm: vm(), deployed: true, host: 'kvmib01', newest: 'kvmib02' };

  // update_nic came with 6.6.
  const actions = ACTIONS.filter((action) => version.host || action !== 'update_nic');

  test.each(actions)('%s: finds the VM where it is, and the host', (action) => {
    const { argv, stdin } = networkCall(version, action, step);
    const call = parseNetworkCall(action, argv);
    expect(call.vm === null).toBe(version.vmIn === 'stdin');
    expect(stdin === null).toBe(version.vmIn === 'argument');
    expect(call.host).toBe(version.host && (action === 'post' || action === 'clean') ? 'kvmib01' : null);
    const packed = requireBase64(call.vm ?? stdin ?? '', 'it');
    const read = parseNetworkVm(Buffer.from(packed, 'base64').toString('latin1'), 'it');
    expect(read).toMatchObject({ id: 42, deployId: deployIdOf(version, step.vm) });
    expect(read.nics.map((one) => [one.nic, one.bridge, one.ip])).toEqual([
      [0, 'virbr1', '192.168.122.2'],
      [1, 'virbr1', '192.168.122.3'],
    ]);
  });

  it('says before the first deploy that there was none', () => {
    const text = networkVm(version, { ...step, deployed: false });
    expect(parseNetworkVm(text, 'it').deployId).toBeNull();
  });

  it('names the datastore of the newest record, or none', () => {
    const knows = version.paths === null || version.paths.some((path) => path.endsWith('DS_ID'));
    expect(parseNetworkVm(networkVm(version, step), 'it').datastore).toBe(knows ? 0 : null);
  });

  // There are none before 5.6, and nothing of them is given on.
  it('has the aliases of the VM, if it gives them on', () => {
    if (version.paths === null) return;
    const text = networkVm(version, { ...step, vm: vm({ aliases: [alias()] }) });
    expect(parseNetworkVm(text, 'it').aliases).toHaveLength(version.lists.includes('NIC_ALIAS') ? 1 : 0);
  });
});

describe('what is an argument and what is standard input', () => {
  const encoded = Buffer.from(networkVm(newest, { vm: vm(), deployed: true, host: 'h' })).toString('base64');

  test.each([
    ['pre', []],
    ['clean', []],
    ['clean', ['kvmib01']],
    ['clean', ['PFZNPgh.example.org']],
    ['post', ['one-42']],
    ['post', ['6f0a1c1e-6c0e-4d0c-9a0e-5a3b3f1d2c42', 'kvmib01']],
    ['post', ['', '']],
    ['pre', ['']],
  ])('%s %j: the VM is on standard input', (action, argv) => {
    expect(parseNetworkCall(action, argv).vm).toBeNull();
  });

  test.each([
    ['whole', encoded],
    ['cut off', encoded.slice(0, 101)],
    ['with something else in it', `${encoded.slice(0, 100)}$(x)`],
  ])('a VM that is %s is still no host: standard input is not read', (_, argument) => {
    for (const action of ACTIONS) expect(parseNetworkCall(action, [argument, 'x']).vm).toBe(argument);
  });

  it('holds for every VM', () => {
    fc.assert(
      fc.property(fc.string({ minLength: 60 }), (rest) => {
        const argument = Buffer.from(`<VM>${rest}`).toString('base64');
        expect(parseNetworkCall('clean', [argument]).vm).toBe(argument);
      }),
    );
  });

  test.each(['', 'exec', 'update_sg', '../pre'])('"%s" is none of its actions', (action) => {
    expect(failureOf(() => parseNetworkCall(action, [])).code).toBe('usage');
  });
});

describe('base64', () => {
  it('may have line ends, and nothing else', () => {
    expect(requireBase64(' PFZN\r\nPjwv\nVk0+\n\n', 'it')).toBe('PFZNPjwvVk0+');
    for (const text of ['', '\n', 'PFZ', 'PFZN!', 'PF=N', '====', 'PFZN\0', 'PFZ\u00e9']) {
      expect(failureOf(() => requireBase64(text, 'the VM of pre'))).toMatchObject({
        code: 'bad-input',
        message: 'Cannot read the VM of pre',
      });
    }
  });
});

describe('a VM that is not whole', () => {
  test.each([
    ['no VM', '<VNET/>'],
    ['no id', '<VM><TEMPLATE/></VM>'],
    ['no TEMPLATE: it would read as a VM without NICs', '<VM><ID>42</ID></VM>'],
    [
      'two NICs with one number',
      `<VM><ID>1</ID>${'<TEMPLATE><NIC><NIC_ID>0</NIC_ID></NIC></TEMPLATE>'.repeat(2)}</VM>`,
    ],
    ['cut off', '<VM><ID>42</ID><TEMPLATE>'],
  ])('%s', (_, text) => {
    expect(failureOf(() => parseNetworkVm(text, 'it')).code).toBe('bad-input');
  });

  it('several hosts in one record are not chosen from', () => {
    const record = (host: string) =>
      `<HISTORY_RECORDS><HISTORY><HOSTNAME>${host}</HOSTNAME></HISTORY></HISTORY_RECORDS>`;
    const text = `<VM><ID>42</ID><TEMPLATE/>${record('a')}${record('b')}</VM>`;
    expect(failureOf(() => parseNetworkVm(text, 'it')).code).toBe('bad-input');
  });
});

const held = (...mappings: readonly Mapping[]): Held => ({ mappings, detachedAliases: [] });
const NOTHING = held();
const first = mapping(2, { vm: 42 });
const second = mapping(3, { vm: 42, nic: 1 });

function wish(action: NetworkAction, of: TestVm, has = NOTHING) {
  const read = parseNetworkVm(
    networkVm(newest as NonNullable<typeof newest>, { vm: of, deployed: true, host: 'h' }),
    'it',
  );
  const { mappings, ...rest } = wishOfNetworkAction(CONFIG, read, action, has);
  return { ...rest, addresses: mappings.map((m) => `${m.nic} ${m.address}`), hotplug: isHotplug(read) };
}

describe('what an action wants', () => {
  const both = ['0 192.168.10.202', '1 192.168.10.203'];

  it('all NICs where nothing is marked', () => {
    for (const action of ACTIONS) expect(wish(action, vm())).toMatchObject({ addresses: both, hotplug: false });
  });

  it('the marked NIC comes with pre and post, and goes with clean', () => {
    const marked = vm({ nics: [nic(2), nic(3, { attach: true })] });
    expect(wish('pre', marked)).toMatchObject({ addresses: both, attaching: [1], hotplug: true });
    expect(wish('post', marked)).toMatchObject({ addresses: both, attaching: [], hotplug: true });
    expect(wish('clean', marked, held(first, second))).toMatchObject({ addresses: both.slice(0, 1), attaching: [] });
  });

  it('so does the marked alias, whatever the context says', () => {
    for (const context of [undefined, { leaving: [] }, { leaving: [2] }]) {
      const marked = vm({ aliases: [alias({ attach: true })], ...(context === undefined ? {} : { context }) });
      const inEffect = ['0 192.168.10.208', '1 192.168.10.203'];
      for (const action of ['pre', 'post'] as const) {
        expect(wish(action, marked)).toMatchObject({ addresses: inEffect, attachedAliases: [2], detachedAliases: [] });
      }
      expect(wish('clean', marked, held(mapping(2, { vm: 42, to: 8 }), second))).toMatchObject({
        addresses: both,
        attachedAliases: [],
        detachedAliases: [2],
      });
    }
  });

  it('an alias that would lead nowhere is refused where somebody is told', () => {
    const third = alias({ id: 4, aliasId: 1, ip: '192.168.10.209', attach: true });
    const two = vm({ aliases: [alias(), third] });
    for (const action of ['pre', 'post'] as const) {
      expect(failureOf(() => wish(action, two))).toMatchObject({ code: 'conflict' });
    }
    expect(wish('clean', two).addresses[0]).toBe('0 192.168.10.208');
  });

  it('a NIC that cannot be mapped fails a VM that starts, and the attach of that NIC, and nothing else', () => {
    const outside = { ip: '192.168.122.99' };
    const broken = vm({ nics: [nic(2), nic(3, outside)] });
    expect(failureOf(() => wish('pre', broken))).toMatchObject({ code: 'out-of-range' });
    for (const action of ['post', 'clean', 'update_nic'] as const) {
      expect(wish(action, broken, held(first, second))).toMatchObject({ addresses: both.slice(0, 1), keep: [1] });
    }
    const attached = vm({ nics: [nic(2, outside), nic(3, { attach: true })] });
    expect(wish('pre', attached).addresses).toEqual(['1 192.168.10.203']);
    const attachedBroken = vm({ nics: [nic(2), nic(3, { ...outside, attach: true })] });
    for (const action of ['pre', 'post'] as const) {
      expect(failureOf(() => wish(action, attachedBroken))).toMatchObject({ code: 'out-of-range' });
    }
    expect(wish('clean', attachedBroken).addresses).toEqual(both.slice(0, 1));
  });
});

describe('both drivers at once', () => {
  const bare = vm({ aliases: [alias({ attach: true })] });
  const read = parseActionData(actionData(bare, 'h')).vm;
  const inEffect = held(mapping(2, { vm: 42, to: 8 }), second);
  const reconfigure = (has: Held, ours: boolean) =>
    wishOfAction(CONFIG, read, 'reconfigure', has, { hasNetworkDriver: (vnMad) => ours && vnMad === 'dummy' })
      .mappings[0]?.address;

  it('without a context, an alias that post has brought into effect is not taken for one that goes', () => {
    expect(reconfigure(inEffect, true)).toBe('192.168.10.208');
    expect(reconfigure(inEffect, false)).toBe('192.168.10.202');
  });

  it('and one that clean has taken back does not come again', () => {
    expect(reconfigure({ ...held(first, second), detachedAliases: [2] }, true)).toBe('192.168.10.202');
  });
});
