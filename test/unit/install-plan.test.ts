/** What an installation changes, decided from what is there: no file is touched here. */
import { describe, expect, test } from 'vitest';
import type { Ipv4, LinkName } from '../../lib/core/address.ts';
import type { Config } from '../../lib/core/mapping.ts';
import type { Item, Observation, Operation, Seen } from '../../lib/ops/install.ts';
import { planInstall, planUninstall } from '../../lib/ops/install.ts';
import { frontEndItems, syncedSize } from '../../lib/ops/install-front-end.ts';
import type { HostFacts } from '../../lib/ops/install-host.ts';
import {
  hostItems,
  hostNotes,
  hostSteps,
  hostUninstallSteps,
  unmanagedLinks,
  unmanagedText,
} from '../../lib/ops/install-host.ts';

const CONFIG: Config = {
  networks: [
    {
      name: 'ib',
      device: 'ib0' as LinkName,
      bridge: 'virbr1' as LinkName,
      guests: { first: '192.168.122.2' as Ipv4, last: '192.168.122.6' as Ipv4 },
      addresses: { first: '192.168.10.202' as Ipv4, last: '192.168.10.206' as Ipv4 },
      isolate: true,
    },
  ],
  static: [],
};
const FACTS: HostFacts = {
  live: true,
  systemd: true,
  unitsRunning: false,
  conntrack: true,
  networkManager: false,
  managed: new Map(),
  unmanagedDevice: false,
  selinux: false,
  firewalld: false,
  config: CONFIG,
  configProblem: null,
  givenConfig: null,
  libvirt: { items: [], steps: [], notes: [], made: [] },
};
const PACKAGE = [
  { path: 'drivers/vmm/kvm-ib/deploy', mode: 0o755 },
  { path: 'drivers/im/kvm-probes.d/host/system/kvm-ib.sh', mode: 0o755 },
  { path: 'rulesets/kvm-ib-engine', mode: 0o755 },
];

/** A tree with these things in it; the digest of a package file is its name. */
function tree(there: Readonly<Record<string, Seen>>, recorded: Readonly<Record<string, string>> = {}): Observation {
  const nameOf = (item: Extract<Item, { kind: 'file' }>): string =>
    'text' in item.source ? `text:${item.source.text}` : item.source.package;
  return {
    seen: (path) => there[path] ?? { kind: 'absent' },
    content: (item) => ({ sha256: nameOf(item), size: 10 }),
    children: (path) =>
      Object.keys(there).filter((other) => other.startsWith(`${path}/`) && !other.slice(path.length + 1).includes('/')),
    owner: (path) => (path.startsWith('/var/lib/one/') ? 'oneadmin' : 'root'),
    recorded: new Map(Object.entries(recorded)),
  };
}

const file = (sha256: string, mode = 0o644, owner = 'root'): Seen => ({ kind: 'file', sha256, mode, owner });
const item = (over: Partial<Extract<Item, { kind: 'file' }>> = {}): Item => ({
  kind: 'file',
  path: '/etc/x',
  mode: 0o644,
  source: { package: 'new' },
  keep: 'unless-ours',
  ...over,
});
const signs = (operations: readonly Operation[]): string => operations.map((op) => op.sign).join('');
const one = (wanted: Item, seen: Seen, recorded: Readonly<Record<string, string>> = {}): Operation | undefined =>
  planInstall([wanted], tree({ [wanted.path]: seen }, recorded))[0];

describe('a file is', () => {
  test.each<[string, Item, Seen, Readonly<Record<string, string>>, string]>([
    ['made when it is absent', item(), { kind: 'absent' }, {}, '+'],
    ['left when it is as it should be', item(), file('new'), {}, '='],
    ['replaced when it is what an earlier version put there', item(), file('old'), { '/etc/x': 'old' }, '~'],
    ['kept when it was changed since', item(), file('mine'), { '/etc/x': 'old' }, '!'],
    ['kept when nobody knows where it came from', item(), file('mine'), {}, '!'],
    ['kept when an administrator made it a link', item(), { kind: 'link', target: '/srv/x' }, {}, '!'],
    ['replaced, whatever it was, when it is a program of ours', item({ keep: 'ours' }), file('mine'), {}, '~'],
    [
      'replaced when it is a program of ours and a link',
      item({ keep: 'ours' }),
      { kind: 'link', target: '/tmp/x' },
      {},
      '~',
    ],
    ['given its mode back', item(), file('new', 0o666), {}, '~'],
    ['given its owner back', item(), file('new', 0o644, 'oneadmin'), {}, '~'],
    ['never touched when it is the configuration', item({ keep: 'always' }), file('mine', 0o600), {}, '='],
    [
      'kept, and said so, when another configuration was given',
      item({ keep: 'always', source: { text: 'a' } }),
      file('mine'),
      {},
      '!',
    ],
  ])('%s', (_, wanted, seen, recorded, sign) => {
    expect(one(wanted, seen, recorded)?.sign).toBe(sign);
  });

  test('refused where a directory or a device stands', () => {
    expect(() => one(item(), { kind: 'directory', mode: 0o755 })).toThrow(/Cannot install \/etc\/x/);
    expect(() => one(item(), { kind: 'other' })).toThrow(/Cannot install \/etc\/x/);
  });
});

test('a second installation finds nothing to do', () => {
  const items = hostItems({ ...FACTS, networkManager: true }, PACKAGE);
  const there: Record<string, Seen> = {};
  for (const op of planInstall(items, tree({}))) {
    const { item: wanted } = op;
    expect(op.sign).toBe('+');
    if (wanted?.kind === 'directory') there[op.path] = { kind: 'directory', mode: wanted.mode };
    else if (wanted?.kind === 'link') there[op.path] = { kind: 'link', target: wanted.target };
    else if (wanted?.kind === 'file') {
      const { sha256 } = tree({}).content(wanted);
      there[op.path] = file(sha256, wanted.mode);
    }
  }
  const again = planInstall(items, tree(there));
  expect(signs(again)).toMatch(/^=+$/);
  expect(hostSteps(again, { ...FACTS, unitsRunning: true })).toEqual([]);
});

test('the drop-in for sudo is read-only, and checked before it is put in place', () => {
  const sudoers = hostItems(FACTS, PACKAGE).find(({ path }) => path === '/etc/sudoers.d/kvm-ib');
  expect(sudoers).toMatchObject({ mode: 0o440, check: 'visudo' });
});

describe('uninstalling', () => {
  const items: readonly Item[] = [
    { kind: 'directory', path: '/lib/ours', mode: 0o755, own: true },
    item({ path: '/lib/ours/engine', keep: 'ours' }),
    { kind: 'directory', path: '/etc/kvm-ib', mode: 0o755, own: false },
    item({ path: '/etc/kvm-ib/kvm-ib.yaml', keep: 'always' }),
    item({ path: '/etc/shared.d/x' }),
  ];
  const there: Readonly<Record<string, Seen>> = {
    '/lib/ours': { kind: 'directory', mode: 0o755 },
    '/lib/ours/engine': file('new'),
    '/lib/ours/of-an-older-version': file('?'),
    '/etc/kvm-ib': { kind: 'directory', mode: 0o755 },
    '/etc/kvm-ib/kvm-ib.yaml': file('mine'),
    '/etc/shared.d': { kind: 'directory', mode: 0o755 },
    '/etc/shared.d/x': file('mine'),
    '/etc/old-place': file('old'),
  };
  const removal = {
    items,
    inside: ['/lib/ours/engine', '/lib/ours/of-an-older-version'],
    madeDirectories: ['/etc/shared.d'],
    keep: new Map([['/etc/kvm-ib/kvm-ib.yaml', 'remove it with --purge']]),
  };
  const recorded = { '/etc/shared.d/x': 'new', '/etc/old-place': 'old' };

  test('takes everything but the configuration, files of older versions as well, files before directories', () => {
    const operations = planUninstall(removal, tree(there, recorded));
    expect(operations.map(({ sign, path }) => `${sign} ${path}`)).toEqual([
      '- /lib/ours/engine',
      '! /etc/kvm-ib/kvm-ib.yaml',
      '- /etc/shared.d/x',
      '- /etc/old-place',
      '- /lib/ours/of-an-older-version',
      '- /lib/ours',
      '- /etc/shared.d',
    ]);
    expect(operations.find(({ path }) => path === '/etc/shared.d/x')?.why).toBe('it was changed by hand');
  });

  test('leaves a directory that holds something of somebody else', () => {
    const operations = planUninstall(removal, tree({ ...there, '/etc/shared.d/theirs': file('?') }, recorded));
    expect(operations.map(({ path }) => path)).not.toContain('/etc/shared.d');
  });

  test('takes the configuration and its directory too with --purge', () => {
    const paths = planUninstall({ ...removal, keep: new Map() }, tree(there, recorded)).map(
      ({ sign, path }) => `${sign} ${path}`,
    );
    expect(paths).toContain('- /etc/kvm-ib/kvm-ib.yaml');
    expect(paths).toContain('- /etc/kvm-ib');
  });

  test('finds nothing the second time', () => {
    expect(planUninstall({ ...removal, inside: [] }, tree({}, recorded))).toEqual([]);
  });
});

describe('the programs that are run', () => {
  const fresh = planInstall(hostItems({ ...FACTS, networkManager: true }, PACKAGE), tree({}));
  const words = (facts: Partial<HostFacts>, operations = fresh): readonly string[] =>
    hostSteps(operations, { ...FACTS, ...facts }).map(({ argv }) => argv.join(' '));

  test('load sysctls, let systemd read the units, then start them', () => {
    expect(words({})).toEqual([
      '/usr/sbin/sysctl -p /etc/sysctl.d/60-kvm-ib.conf',
      '/usr/bin/systemctl daemon-reload',
      '/usr/bin/systemctl enable --now kvm-ib-reconcile.service kvm-ib.timer',
    ]);
  });

  test('load connection tracking first where it is not there', () => {
    expect(words({ conntrack: false })[0]).toBe('/usr/sbin/modprobe nf_conntrack');
  });

  test('do not start units while the configuration names no network', () => {
    expect(words({ config: null }).join('\n')).not.toContain('enable');
  });

  test('make running units load a new version', () => {
    expect(words({ unitsRunning: true })).toContain('/usr/bin/systemctl reload-or-restart kvm-ib-reconcile.service');
  });

  test('let NetworkManager read its settings where there is one', () => {
    expect(words({ networkManager: true })).toContain(
      '/usr/bin/systemctl try-reload-or-restart NetworkManager.service',
    );
  });

  test('are none below another root, and without systemd no systemctl', () => {
    expect(words({ live: false, systemd: false })).toEqual([]);
    expect(words({ systemd: false }).join('\n')).not.toContain('systemctl');
    expect(hostUninstallSteps({ live: true, systemd: false })).toEqual({ before: [], after: [] });
  });
});

describe('what is left to the operator', () => {
  const titles = (facts: Partial<HostFacts>): string =>
    hostNotes({ ...FACTS, ...facts })
      .map(({ title }) => title)
      .join('\n');

  test('is nothing on a host where all is there', () => {
    expect(hostNotes(FACTS)).toEqual([]);
  });

  test.each<[string, Partial<HostFacts>, RegExp]>([
    ['the configuration', { config: null }, /names no network yet/],
    ['what repairs without systemd', { systemd: false }, /systemd does not run/],
    ['the second run on the host', { live: false }, /not the running system/],
    ['labels under SELinux', { selinux: true }, /SELinux/],
    ['policies under firewalld', { firewalld: true }, /firewalld/],
  ])('is %s', (_, facts, title) => {
    expect(titles(facts)).toMatch(title);
  });
});

test('NetworkManager is told to leave the bridges alone, and nothing else', () => {
  const links = (over: Partial<HostFacts>): readonly string[] => unmanagedLinks(CONFIG.networks, { ...FACTS, ...over });
  const settings = unmanagedText(links({}))
    .split('\n')
    .filter((line) => line !== '' && !line.startsWith('#'));
  expect(settings).toEqual(['[keyfile]', 'unmanaged-devices+=interface-name:virbr1']);
  expect(links({ unmanagedDevice: true })).toEqual(['virbr1', 'ib0']);
  // One that it runs itself would lose its addresses.
  expect(links({ managed: new Map([['virbr1', 'connected']]) })).toEqual([]);
  expect(links({ managed: new Map([['virbr1', 'connected (externally)']]) })).toEqual(['virbr1']);
});

test('the front-end gets driver and probes at the paths that OpenNebula looks at, and the size is counted', () => {
  const operations = planInstall(frontEndItems(PACKAGE, null), tree({}));
  const files = operations.filter(({ kind }) => kind === 'file').map(({ path }) => path);
  expect(files).toEqual([
    '/var/lib/one/remotes/vmm/kvm-ib/parser.mjs',
    '/var/lib/one/remotes/vmm/kvm-ib/deploy',
    '/var/lib/one/remotes/im/kvm-probes.d/host/system/kvm-ib.sh',
  ]);
  expect(operations.every(({ owner }) => owner === 'oneadmin')).toBe(true);
  expect(syncedSize(operations)).toEqual({ files: 3, bytes: 30 });
});
