/** Which libvirt networks an installation makes, starts, leaves and takes away, decided from what libvirt has. */
import { describe, expect, test } from 'vitest';
import type { Ipv4, LinkName } from '../../lib/core/address.ts';
import type { Network } from '../../lib/core/mapping.ts';
import { parseNetwork } from '../../lib/libvirt/network.ts';
import type { LibvirtFacts, LibvirtPlan, SeenNetwork } from '../../lib/ops/install-libvirt.ts';
import { planLibvirt, planLibvirtRemoval } from '../../lib/ops/install-libvirt.ts';

const NETWORK: Network = {
  name: 'ib',
  device: 'ib0' as LinkName,
  bridge: 'virbr1' as LinkName,
  guests: { first: '192.168.122.2' as Ipv4, last: '192.168.122.6' as Ipv4 },
  addresses: { first: '192.168.10.202' as Ipv4, last: '192.168.10.206' as Ipv4 },
  isolate: true,
};
const FACTS: LibvirtFacts = {
  networks: [],
  wanted: true,
  mtus: new Map([['ib0', 4092]]),
  links: new Set(['ib0']),
};
const OURS: SeenNetwork = { name: 'kvm-ib-ib', bridge: 'virbr1', forward: 'open', active: true, autostart: true };

const plan = (over: Partial<LibvirtFacts>, network = NETWORK): LibvirtPlan =>
  planLibvirt([network], { ...FACTS, ...over }, '/xml');
const words = ({ steps }: { readonly steps: LibvirtPlan['steps'] }): readonly string[] =>
  steps.map(({ argv }) => argv.slice(3).join(' '));
const notes = ({ notes: all }: { readonly notes: LibvirtPlan['notes'] }): string =>
  all.map(({ title, text }) => `${title}\n${text}`).join('\n');

describe('an installation', () => {
  test('defines, starts and autostarts a network that is not there', () => {
    const made = plan({});
    expect(words(made)).toEqual(['net-define /xml/kvm-ib-ib.xml', 'net-start kvm-ib-ib', 'net-autostart kvm-ib-ib']);
    expect(made.made).toEqual(['kvm-ib-ib']);
    expect(made.items.map(({ path }) => path)).toEqual(['/xml', '/xml/kvm-ib-ib.xml']);
    const [, file] = made.items;
    const text = file?.kind === 'file' && 'text' in file.source ? file.source.text : '';
    expect(parseNetwork(text)).toEqual({ name: 'kvm-ib-ib', bridge: 'virbr1', forward: 'open' });
    expect(text).toContain("<mtu size='4092'/>");
  });

  test.each<[string, SeenNetwork, readonly string[]]>([
    ['all is right', OURS, []],
    ['it is not started', { ...OURS, active: false }, ['net-start kvm-ib-ib']],
    ['it does not start with libvirt', { ...OURS, autostart: false }, ['net-autostart kvm-ib-ib']],
  ])('keeps its own network when %s', (_, seen, steps) => {
    const kept = plan({ networks: [seen], links: new Set(['ib0', 'virbr1']) });
    expect([words(kept), kept.notes, kept.made, kept.items]).toEqual([steps, [], [], []]);
  });

  test.each<[string, Partial<LibvirtFacts>, RegExp | null]>([
    ['a bridge of somebody else', { links: new Set(['virbr1']) }, null],
    ['another network that is open', { networks: [{ ...OURS, name: 'site' }] }, null],
    ['one of a host bridge', { networks: [{ ...OURS, name: 'site', forward: 'bridge' }] }, null],
    ['one that translates', { networks: [{ ...OURS, forward: 'nat' }] }, /wrong forward mode: nat/],
    ['one that is isolated', { networks: [{ ...OURS, name: 'site', forward: null }] }, /wrong forward mode: isolated/],
    ['another that is not started', { networks: [{ ...OURS, name: 'site', active: false }] }, /net-start site/],
    ['our name on another bridge', { networks: [{ ...OURS, bridge: 'virbr9' }] }, /has the bridge virbr9, not virbr1/],
    ['no libvirt', { networks: null }, /libvirt does not answer[\s\S]*virsh net-define net\.xml/],
    ['no IPoIB link', { mtus: new Map() }, /ib0 is not there[\s\S]*--mtu MTU_OF_IB0/],
    ['an operator who makes it', { wanted: false }, /--no-libvirt-network[\s\S]*virsh net-define/],
  ])('runs nothing where it finds %s', (_, over, said) => {
    const left = plan(over);
    expect([words(left), left.made, left.items]).toEqual([[], [], []]);
    if (said === null) expect(left.notes).toEqual([]);
    else expect(notes(left)).toMatch(said);
  });

  test('cannot choose an address for the bridge where the guests have all of their /24', () => {
    const wide: Network = { ...NETWORK, guests: { first: '10.0.0.0' as Ipv4, last: '10.0.1.255' as Ipv4 } };
    expect(notes(plan({}, wide))).toContain('--bridge-address ADDRESS');
  });
});

describe('taking it off', () => {
  const remove = (networks: readonly SeenNetwork[] | null, ports: readonly string[] = []) =>
    planLibvirtRemoval(['kvm-ib-ib'], networks, () => ports);

  test('destroys and undefines what the installation made, and nothing else', () => {
    expect(words(remove([OURS, { ...OURS, name: 'site' }]))).toEqual([
      'net-destroy kvm-ib-ib',
      'net-undefine kvm-ib-ib',
    ]);
    expect(words(remove([{ ...OURS, active: false }]))).toEqual(['net-undefine kvm-ib-ib']);
    expect(remove([])).toEqual({ steps: [], notes: [] });
  });

  test('leaves one with guests, and all when libvirt does not answer, with the commands', () => {
    expect(words(remove([OURS], ['one-42-0']))).toEqual([]);
    expect(notes(remove([OURS], ['one-42-0']))).toMatch(/guests are on virbr1: one-42-0[\s\S]*net-destroy kvm-ib-ib/);
    expect(notes(remove(null))).toMatch(/libvirt does not answer[\s\S]*net-undefine kvm-ib-ib/);
  });
});

test.each<[string, string, object]>([
  ['nat without a word', '<forward/>', { forward: 'nat' }],
  ['isolated', '', { forward: null }],
  ['open', "<forward mode='open'/>", { forward: 'open' }],
])('libvirt’s network is read: %s', (_, forward, expected) => {
  expect(parseNetwork(`<network><name>n</name>${forward}<bridge name='b'/></network>`)).toMatchObject(expected);
});

test('what is no network is refused', () => {
  expect(() => parseNetwork('<domain/>')).toThrow(/Cannot read the network XML/);
});
