/** The command `kvm-ib` as its users see it: what it prints, its exit status, and what it leaves in the kernel. */
import { spawn } from 'node:child_process';
import { copyFileSync, existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { EXIT } from '../../lib/core/errors.ts';
import { parsed, replaced, withDomains } from '../support/cli.ts';
import type { Result, Rig } from '../support/driver.ts';
import { CONFIG, createRig, LINK_MTU, run, testVm, tool } from '../support/driver.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

let rig: Rig;
beforeAll(async () => {
  rig = await createRig();
  writeFileSync('/proc/sys/net/ipv4/ip_forward', '1');
});
afterAll(() => rig?.remove());
beforeEach(() => rig.reset());

const IP = '/usr/sbin/ip';
const NFT = '/usr/sbin/nft';
const aliases = () => tool(IP, '-o', '-4', 'addr', 'show', 'dev', 'ib0');
const table = () => tool(NFT, 'list', 'table', 'ip', 'kvm_ib');
const nobody = ['/usr/bin/setpriv', '--reuid=65534', '--regid=65534', '--clear-groups'];

async function ok(...args: readonly string[]): Promise<Result> {
  const result = await rig.cli(args);
  expect(result).toMatchObject({ status: EXIT.done, stderr: '' });
  return result;
}

/** A failure in the form for people: what, why and what to do, on standard error alone. */
function expectFailure(result: Result, status: number, says: RegExp): void {
  expect(result).toMatchObject({ status, stdout: '' });
  expect(result.stderr).toMatch(/^error: Cannot [^\n]+ {2}\[[a-z-]+\]\n {2}why: [\s\S]+\n {2}fix: [\s\S]+\n$/);
  expect(result.stderr).toMatch(says);
}

interface Drift {
  readonly guest: string | null;
  readonly address: string | null;
  readonly part: string;
  readonly expected: string;
  readonly observed: string;
  readonly fix: string;
}

async function drift(): Promise<readonly Drift[]> {
  const result = await rig.cli(['status', '--json']);
  const status = parsed<{ ok: boolean; drift: readonly Drift[] }>(result);
  expect(result.status).toBe(status.ok ? EXIT.done : EXIT.drift);
  expect(status.ok).toBe(status.drift.length === 0);
  for (const one of status.drift) {
    expect(Object.keys(one)).toEqual(
      expect.arrayContaining(['guest', 'address', 'part', 'expected', 'observed', 'fix']),
    );
  }
  return status.drift;
}

describe('help', () => {
  test('shows examples first, and every exit code', async () => {
    const { stdout } = await ok('--help');
    expect(stdout).toMatch(/^Examples:\n {2}kvm-ib /);
    expect(stdout.indexOf('Usage:')).toBeGreaterThan(stdout.indexOf('Examples:'));
    const codes = [...stdout.slice(stdout.indexOf('Exit codes:')).matchAll(/(?:^| )([0-9]) {2}\S/gm)].map((m) => m[1]);
    expect(codes.sort()).toEqual(Object.values(EXIT).map(String).sort());
  });

  test('of a command that does not exist is an error', async () => {
    for (const args of [['nonsense', '--help'], ['nonsense'], ['install', 'nonsense', '--help']]) {
      const result = await rig.cli(args);
      expect(result).toMatchObject({ status: EXIT.usage, stdout: '' });
      expect(result.stderr).toContain("unknown command 'nonsense'");
    }
  });

  test.each(['config', 'install', 'uninstall'])('of %s alone shows examples first', async (name) => {
    expect((await ok(name, '--help')).stdout).toMatch(new RegExp(`^Examples:\n {2}kvm-ib ${name} `));
  });

  test('goes quietly when nobody reads on', async () => {
    const line = `set -o pipefail; for n in 1 2 3 4 5; do "$@" --help | true || echo "$?"; done`;
    const argv = ['/bin/bash', '-c', line, 'bash', process.execPath, join(rig.folder, 'kvm-ib.mjs')];
    expect(await run(argv, { env: rig.env })).toMatchObject({ status: 0, stdout: '', stderr: '' });
  });

  test.each(['add', 'remove', 'list', 'status', 'reconcile', 'config check', 'network-xml', 'teardown', 'announce'])(
    'of %s shows examples first',
    async (name) => {
      expect((await ok(...name.split(' '), '--help')).stdout).toMatch(new RegExp(`^Examples:\n {2}kvm-ib ${name}`));
    },
  );

  test('the version is that of the package', async () => {
    const { version } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8'));
    expect((await ok('--version')).stdout).toBe(`${version}\n`);
  });
});

describe('wrong use ends in 2', () => {
  test.each([
    [[]],
    [['frobnicate']],
    [['add']],
    [['add', '--guest']],
    [['add', '--guest', '192.168.122.2', '--colour']],
    [['add', '--guest', 'localhost']],
    [['add', '--guest', '192.168.122.2', '--address', '192.168.10.202/32']],
    [['add', '--guest', '192.168.122.2', '--mac', 'x\u001b[31m']],
    [['add', '--guest', '192.168.122.2', '--vm', '42']],
    [['add', '--guest', '192.168.122.2', '--vm', '-1', '--nic', '0']],
    [['add', '--guest', '192.168.122.2', '--vm', '42', '--nic', '100']],
    [['add', '--guest', '192.168.122.7']],
    [['add', '--guest', '192.168.122.2', '--address', '192.168.10.1']],
    [['remove']],
    [['remove', '--guest', '192.168.122.2', '--vm', '42']],
    [['network-xml', '--network', 'none']],
    [['network-xml', '--mtu', '70000']],
    [['list', '--config', '/nowhere', 'extra']],
  ])('%j', async (args) => {
    const before = rig.snapshot();
    const result = await rig.cli(args);
    expect(result).toMatchObject({ status: EXIT.usage, stdout: '' });
    expect(result.stderr).not.toBe('');
    expect(result.stderr).not.toContain('\u001b');
    expect(result.stderr).not.toMatch(/^ +at /m);
    expect(rig.snapshot()).toEqual(before);
  });

  test('with --json the error is JSON', async () => {
    const result = await rig.cli(['add', '--guest', '192.168.122.7', '--json']);
    expect(result).toMatchObject({ status: EXIT.usage, stderr: '' });
    expect(parsed(result)).toEqual({
      error: {
        code: 'out-of-range',
        exit: EXIT.usage,
        message: expect.stringContaining('192.168.122.7'),
        why: expect.any(String),
        fix: expect.any(String),
      },
    });
  });

  test('a bad configuration is named by file, line, field and value', async () => {
    writeFileSync(rig.config, CONFIG.replace('ib0', '"ib 0"'));
    for (const args of [['status'], ['config', 'check'], ['reconcile'], ['teardown', '--force']]) {
      expectFailure(await rig.cli(args), EXIT.usage, /kvm-ib\.yaml:3: networks\[0\]\.device: "?ib 0/);
    }
  });
});

describe('add and list', () => {
  test('maps a guest by hand, shows the plan, and does it once', async () => {
    const first = await ok('add', '--guest', '192.168.122.2');
    expect(first.stdout.split('\n').filter((line) => line.startsWith('+'))).toEqual([
      '+ element   guest_to_ib 192.168.122.2 : 192.168.10.202',
      '+ element   ib_to_guest 192.168.10.202 : 192.168.122.2',
      '+ element   guest_any_mac 192.168.122.2',
      '+ alias     192.168.10.202/32 on ib0 (kib:s0)',
      '+ announce  192.168.10.202 on ib0',
    ]);
    expect(aliases()).toContain('192.168.10.202/32 scope global kib:s0');
    const before = rig.snapshot();
    expect((await ok('add', '--guest', '192.168.122.2')).stdout).toBe('Nothing to change.\n');
    expect(rig.snapshot()).toEqual(before);
    expect(await drift()).toEqual([]);
    expect((await ok('status')).stdout).toMatch(/^OK: 1 mapping\b/);
  });

  test('list --json has every field, also for a VM and for a static mapping', async () => {
    writeFileSync(rig.config, `${CONFIG}static:\n  - { guest: 192.168.122.6, address: 192.168.10.205 }\n`);
    await rig.cli(['reconcile']);
    await ok('add', '--guest', '192.168.122.2', '--vm', '42', '--nic', '1', '--mac', '02:00:C0:A8:7A:02');
    await ok('add', '--guest', '192.168.122.3', '--address', '192.168.10.206', '--json');
    const common = { network: 'ib', device: 'ib0', state: 'active' };
    const none = { vm: null, nic: null, mac: null };
    const expected = [
      { ...common, ...none, guest: '192.168.122.3', address: '192.168.10.206', label: 'kib:s1', owner: 'manual' },
      { ...common, ...none, guest: '192.168.122.6', address: '192.168.10.205', label: 'kib:s4', owner: 'static' },
      {
        ...common,
        guest: '192.168.122.2',
        address: '192.168.10.202',
        vm: 42,
        nic: 1,
        mac: '02:00:c0:a8:7a:02',
        label: 'ib0:42-1',
        owner: 'vm',
      },
    ];
    expect(parsed(await ok('list', '--json'))).toEqual(expected);
    const lines = (await ok('list')).stdout.trimEnd().split('\n');
    expect(lines).toHaveLength(4);
    expect(lines[0]).toMatch(/^NETWORK +DEVICE +GUEST +ADDRESS +VM +NIC +MAC +LABEL +OWNER +STATE$/);
    expect(lines[3]).toMatch(
      /^ib +ib0 +192\.168\.122\.2 +192\.168\.10\.202 +42 +1 +02:00:c0:a8:7a:02 +ib0:42-1 +vm +active$/,
    );
    // Reading the list needs no rights and no configuration.
    const result = await rig.cli(['list', '--json'], { prefix: nobody, env: { KVM_IB_CONFIG: '/nowhere' } });
    expect(parsed(result)).toEqual(expected);
  });

  test('an empty list is no error', async () => {
    expect((await ok('list')).stdout).toBe('No mappings.\n');
    expect(parsed(await ok('list', '--json'))).toEqual([]);
  });

  test('add --json tells what was done', async () => {
    const result = parsed<Record<string, unknown>>(await ok('add', '--guest', '192.168.122.2', '--json'));
    expect(result).toMatchObject({
      owner: 'manual-192.168.122.2',
      dryRun: false,
      mappings: [{ guest: '192.168.122.2', address: '192.168.10.202' }],
      plan: expect.arrayContaining(['+ alias     192.168.10.202/32 on ib0 (kib:s0)']),
      warnings: [],
    });
  });

  test('a second NIC of a VM joins the first; the same NIC with another address replaces it', async () => {
    await ok('add', '--guest', '192.168.122.2', '--vm', '42', '--nic', '0');
    await ok('add', '--guest', '192.168.122.3', '--vm', '42', '--nic', '1');
    await ok('add', '--guest', '192.168.122.4', '--vm', '42', '--nic', '0');
    expect(aliases().match(/192\.168\.10\.20\d/g)).toEqual(
      expect.arrayContaining(['192.168.10.203', '192.168.10.204']),
    );
    expect(aliases()).not.toContain('192.168.10.202');
    expect(table()).not.toContain('192.168.122.2 ');
  });

  test('a conflict ends in 4 and names both owners', async () => {
    await ok('add', '--guest', '192.168.122.2');
    const before = rig.snapshot();
    const add = (...args: readonly string[]) => rig.cli(['add', ...args]);
    const vm = await add('--guest', '192.168.122.2', '--vm', '42', '--nic', '0');
    expectFailure(vm, EXIT.conflict, /192\.168\.122\.2 to vm-42[\s\S]*manual-192\.168\.122\.2/);
    const other = await add('--guest', '192.168.122.3', '--address', '192.168.10.202');
    expectFailure(other, EXIT.conflict, /192\.168\.10\.202 to manual-192\.168\.122\.3[\s\S]*manual-192\.168\.122\.2/);
    expect(rig.snapshot()).toEqual(before);
  });

  test('a stale VM gives way, a running one does not, and silence of libvirt counts as running', async () => {
    await ok('add', '--guest', '192.168.122.2', '--vm', '42', '--nic', '0');
    const take = (domains: readonly string[] | undefined) =>
      rig.cli(['add', '--guest', '192.168.122.2', '--vm', '44', '--nic', '0'], { prefix: withDomains(rig, domains) });
    expectFailure(await take(undefined), EXIT.conflict, /vm-42[\s\S]*libvirt does not answer/);
    expectFailure(await take(['one-42', 'one-7']), EXIT.conflict, /vm-44[\s\S]*vm-42 has it, and its domain is active/);
    const taken = await take(['one-44', 'one-7']);
    expect(taken).toMatchObject({ status: EXIT.done });
    expect(taken.stderr).toContain('released from vm-42, which is not active');
    expect(rig.phases()).toEqual({ 'vm-44': 'active' });
    expect(aliases()).toContain('192.168.10.202/32 scope global ib0:44-0');
  });
});

describe('remove', () => {
  test('by guest and by VM leaves nothing', async () => {
    const before = rig.snapshot();
    await ok('add', '--guest', '192.168.122.2');
    await ok('add', '--guest', '192.168.122.3', '--vm', '42', '--nic', '0');
    expect((await ok('remove', '--guest', '192.168.122.2')).stdout).toMatch(/^- alias {5}192\.168\.10\.202\/32/m);
    await ok('remove', '--vm', '42');
    expect(rig.snapshot()).toEqual(before);
  });

  test('of what is not there ends in 1, and changes nothing', async () => {
    const before = rig.snapshot();
    expectFailure(await rig.cli(['remove', '--guest', '192.168.122.2']), EXIT.failed, /it has none/);
    expectFailure(await rig.cli(['remove', '--vm', '42']), EXIT.failed, /VM 42[\s\S]*it has none/);
    expect(rig.snapshot()).toEqual(before);
  });

  test('one guest of a VM leaves its others', async () => {
    await ok('add', '--guest', '192.168.122.2', '--vm', '42', '--nic', '0');
    await ok('add', '--guest', '192.168.122.3', '--vm', '42', '--nic', '1');
    await ok('remove', '--guest', '192.168.122.2');
    expect(parsed(await ok('list', '--json'))).toMatchObject([{ guest: '192.168.122.3', vm: 42 }]);
    expect(aliases()).not.toContain('192.168.10.202');
  });
});

describe('--dry-run changes nothing', () => {
  test('on a host where nothing of ours is yet', async () => {
    tool(NFT, 'delete', 'table', 'ip', 'kvm_ib');
    rmSync(rig.state, { recursive: true });
    const before = rig.snapshot();
    const add = await ok('add', '--guest', '192.168.122.2', '--dry-run');
    expect(add.stdout).toMatch(/^\+ alias[\s\S]*Nothing was changed \(--dry-run\)\.\n$/m);
    expect((await ok('reconcile', '--dry-run')).stdout).toContain('~ table     the table ip kvm_ib is not there');
    await ok('teardown', '--dry-run');
    expect(rig.snapshot()).toEqual(before);
    rig.reset();
    await ok('reconcile');
  });

  test('on a host with mappings and drift', async () => {
    await ok('add', '--guest', '192.168.122.2');
    tool(IP, 'addr', 'del', '192.168.10.202/32', 'dev', 'ib0');
    const before = rig.snapshot();
    for (const [args, line] of [
      [['add', '--guest', '192.168.122.3'], '+ element   guest_to_ib 192.168.122.3'],
      [['remove', '--guest', '192.168.122.2'], '- element   guest_to_ib 192.168.122.2'],
      [['reconcile'], '+ alias     192.168.10.202/32 on ib0'],
      [['teardown'], '- table     ip kvm_ib'],
    ] as const) {
      const result = await ok(...args, '--dry-run');
      expect(result.stdout).toContain(line);
      expect(parsed<{ plan: readonly string[] }>(await ok(...args, '--dry-run', '--json')).plan).toBeInstanceOf(Array);
    }
    expect(rig.snapshot()).toEqual(before);
  });
});

describe('status and reconcile', () => {
  const element = (text: string) => tool(NFT, text);

  test.each<[string, () => void, Partial<Drift>]>([
    ['a lost table', () => element('delete table ip kvm_ib'), { part: 'table' }],
    [
      'a lost pair',
      () => element('delete element ip kvm_ib guest_to_ib { 192.168.122.2 }'),
      { part: 'map', guest: '192.168.122.2', address: '192.168.10.202', observed: 'absent' },
    ],
    [
      'an element that no file has',
      () => element('add element ip kvm_ib ib_to_guest { 192.168.10.204 : 192.168.122.4 }'),
      { part: 'map', guest: '192.168.122.4', address: '192.168.10.204' },
    ],
    [
      'a lost alias',
      () => tool(IP, 'addr', 'del', '192.168.10.202/32', 'dev', 'ib0'),
      { part: 'alias', guest: '192.168.122.2', address: '192.168.10.202', observed: 'absent' },
    ],
    [
      'another MTU',
      () => tool(IP, 'link', 'set', 'virbr1', 'mtu', '1500'),
      { part: 'mtu', expected: `virbr1 ${LINK_MTU}`, observed: 'virbr1 1500' },
    ],
    ['a rule that was added by hand', () => element('add rule ip kvm_ib guard_forward accept'), { part: 'table' }],
  ])('%s is drift, and reconcile brings it right', async (_, spoil, expected) => {
    await ok('add', '--guest', '192.168.122.2');
    expect(await drift()).toEqual([]);
    const before = rig.snapshot();
    spoil();
    const spoilt = rig.snapshot();
    expect(await drift()).toContainEqual(expect.objectContaining({ ...expected, fix: 'kvm-ib reconcile' }));
    const text = await rig.cli(['status']);
    expect(text.status).toBe(EXIT.drift);
    expect(text.stdout).toMatch(/^GUEST +ADDRESS +PART +EXPECTED +OBSERVED +FIX\n/);
    expect(rig.snapshot()).toEqual(spoilt);
    expect((await rig.cli(['reconcile'])).status).toBe(EXIT.done);
    const after = rig.snapshot();
    expect({ ...after, links: '', addresses: '' }).toEqual({ ...before, links: '', addresses: '' });
    expect(after.addresses.split('\n').sort()).toEqual(before.addresses.split('\n').sort());
    expect(after.links).toBe(before.links);
  });

  test('reconcile with nothing to do says so, and nothing with --quiet', async () => {
    await ok('add', '--guest', '192.168.122.2');
    expect((await ok('reconcile')).stdout).toBe('Nothing to change.\n');
    expect((await ok('reconcile', '--quiet')).stdout).toBe('');
    expect(parsed(await ok('reconcile', '--json'))).toMatchObject({
      changes: [],
      plan: [],
      table: [],
      released: [],
      errors: [],
    });
  });

  test('an alias of ours that no file knows is reported and never removed', async () => {
    tool(IP, 'addr', 'add', '192.168.10.204/32', 'dev', 'ib0', 'label', 'ib0:9-0');
    expect(await drift()).toEqual([
      expect.objectContaining({
        part: 'alias',
        address: '192.168.10.204',
        fix: expect.stringContaining('ip address del'),
      }),
    ]);
    await ok('reconcile');
    expect(aliases()).toContain('192.168.10.204/32 scope global ib0:9-0');
  });

  test('a state file that cannot be read is reported, kept, and stops no other mapping', async () => {
    await ok('add', '--guest', '192.168.122.2');
    await ok('add', '--guest', '192.168.122.3');
    const path = join(rig.state, 'mappings/manual-192.168.122.2.json');
    writeFileSync(path, readFileSync(path, 'utf8').slice(0, 100));
    tool(IP, 'addr', 'del', '192.168.10.203/32', 'dev', 'ib0');
    const found = await drift();
    expect(found).toContainEqual(expect.objectContaining({ part: 'file', expected: expect.stringContaining(path) }));
    const result = await rig.cli(['reconcile']);
    expect(result.stderr).toContain(path);
    expect(aliases()).toContain('192.168.10.202/32');
    expect(aliases()).toContain('192.168.10.203/32');
    expect(table()).toContain('192.168.122.2 ');
    expect(existsSync(path)).toBe(true);
    const list = await rig.cli(['list']);
    expect(list.stderr).toContain(path);
    expect(list.stdout).toContain('192.168.122.3');
  });

  test('mappings of VMs go with their domain; manual and static ones stay; silence releases nothing', async () => {
    writeFileSync(rig.config, `${CONFIG}static:\n  - { guest: 192.168.122.6, address: 192.168.10.206 }\n`);
    await ok('reconcile');
    await ok('add', '--guest', '192.168.122.2', '--vm', '42', '--nic', '0');
    await ok('add', '--guest', '192.168.122.3', '--vm', '44', '--nic', '0');
    await ok('add', '--guest', '192.168.122.4');
    const before = rig.snapshot();
    const silent = await rig.cli(['reconcile'], { prefix: withDomains(rig, undefined) });
    expect(silent).toMatchObject({ status: EXIT.done });
    expect(silent.stderr).toContain('libvirt does not answer');
    expect(rig.snapshot()).toEqual(before);
    const answered = await rig.cli(['reconcile'], { prefix: withDomains(rig, ['one-44', 'one-4', 'x']) });
    expect(answered).toMatchObject({ status: EXIT.done, stderr: '' });
    expect(answered.stdout).toContain('released vm-42');
    expect(rig.phases()).toEqual({
      'manual-192.168.122.4': 'active',
      'static-192.168.122.6': 'active',
      'vm-44': 'active',
    });
    expect(aliases()).not.toContain('192.168.10.202');
  });

  test('a static mapping comes and goes with the configuration, and only so', async () => {
    const before = rig.snapshot();
    const text = `${CONFIG}static:\n  - { guest: 192.168.122.6, address: 192.168.10.206 }\n`;
    writeFileSync(rig.config, text);
    expect(await drift()).toContainEqual(
      expect.objectContaining({ part: 'file', guest: '192.168.122.6', observed: 'absent' }),
    );
    await ok('reconcile');
    expect(aliases()).toContain('192.168.10.206/32 scope global kib:s4');
    expect(await drift()).toEqual([]);
    expectFailure(await rig.cli(['remove', '--guest', '192.168.122.6']), EXIT.conflict, /static/);
    const add = ['add', '--guest', '192.168.122.5', '--address', '192.168.10.206'];
    expectFailure(await rig.cli(add), EXIT.conflict, /manual-192\.168\.122\.5[\s\S]*static-192\.168\.122\.6/);
    writeFileSync(rig.config, text.replace(/192\.168\.10\.206 \}/, '192.168.10.205 }'));
    await ok('reconcile');
    expect(aliases()).toContain('192.168.10.205/32 scope global kib:s4');
    expect(aliases()).not.toContain('192.168.10.206');
    writeFileSync(rig.config, CONFIG);
    await ok('reconcile');
    expect(rig.snapshot()).toEqual(before);
  });
});

describe('config check', () => {
  test('holds the configuration against the host', async () => {
    const result = await rig.cli(['config', 'check']);
    expect(result).toMatchObject({ status: EXIT.done, stderr: '' });
    expect(result.stdout).toMatch(/OK: .*kvm-ib\.yaml: 1 network\.\n$/);
    expect(parsed(await rig.cli(['config', 'check', '--json']))).toMatchObject({
      ok: true,
      networks: [{ name: 'ib', device: 'ib0', bridge: 'virbr1', isolate: true }],
    });
  });

  test('a link that is not there ends in 6, an address of the host in the range in 4', async () => {
    writeFileSync(rig.config, CONFIG.replace('ib0', 'ib9'));
    const lacks = await rig.cli(['config', 'check']);
    expect(lacks.status).toBe(EXIT.hostLacks);
    expect(lacks.stdout).toMatch(/^error: +there is no link ib9: .*\n +fix: /m);
    writeFileSync(rig.config, CONFIG.replace('192.168.10.202-192.168.10.206', '192.168.10.1-192.168.10.5'));
    const own = await rig.cli(['config', 'check']);
    expect(own.status).toBe(EXIT.conflict);
    expect(own.stdout).toContain('192.168.10.1');
    expectFailure(
      await rig.cli(['add', '--guest', '192.168.122.3']),
      EXIT.conflict,
      /192\.168\.10\.1 is this host's own/,
    );
  });

  test('--config names another file', async () => {
    const other = join(rig.folder, 'other.yaml');
    writeFileSync(other, CONFIG.replace('name: ib', 'name: other'));
    const result = parsed(await rig.cli(['config', 'check', '--config', other, '--json']));
    expect(result).toMatchObject({ file: other, networks: [{ name: 'other' }] });
    const absent = await rig.cli(['config', 'check', '--config', '/nowhere.yaml']);
    expectFailure(absent, EXIT.usage, /nowhere\.yaml[\s\S]*not there/);
  });
});

describe('network-xml', () => {
  test("is an open network on the bridge with the link's MTU", async () => {
    const { stdout } = await ok('network-xml');
    expect(stdout).toMatch(/<forward mode=['"]open['"]\/>/);
    expect(stdout).toMatch(/<bridge name=['"]virbr1['"]/);
    expect(stdout).toMatch(new RegExp(`<mtu size=['"]${LINK_MTU}['"]/>`));
    expect(stdout).toContain('192.168.122.1');
    expect(parsed(await ok('network-xml', '--json'))).toEqual({
      network: 'ib',
      bridgeAddress: '192.168.122.1',
      xml: stdout,
    });
    const other = await ok('network-xml', '--network', 'ib', '--mtu', '2044', '--bridge-address', '192.168.122.9');
    expect(other.stdout).toMatch(/2044[\s\S]*192\.168\.122\.9/);
  });

  test('without the link needs --mtu', async () => {
    writeFileSync(rig.config, CONFIG.replace('ib0', 'ib9'));
    expectFailure(await rig.cli(['network-xml']), EXIT.hostLacks, /--mtu/);
    expect((await ok('network-xml', '--mtu', '65520')).stdout).toContain('65520');
  });
});

describe('teardown', () => {
  test('takes all that is ours and nothing else, and a second time does no harm', async () => {
    tool(NFT, 'delete', 'table', 'ip', 'kvm_ib');
    rmSync(rig.state, { recursive: true });
    tool(NFT, 'add table inet others; add chain inet others c { type filter hook forward priority 0; policy drop; }');
    tool(IP, 'addr', 'add', '192.168.10.250/32', 'dev', 'ib0', 'label', 'ib0:theirs');
    const before = rig.snapshot();
    await ok('add', '--guest', '192.168.122.2');
    await ok('add', '--guest', '192.168.122.3', '--address', '192.168.10.205');
    expect(table()).toContain('192.168.122.2');
    const result = await ok('teardown');
    expect(result.stdout).toContain('- alias     192.168.10.202/32 on ib0');
    expect(rig.snapshot()).toEqual(before);
    expect(readdirSync(rig.state)).toEqual(['lock']);
    await ok('teardown');
    expect(rig.snapshot()).toEqual(before);
    tool(NFT, 'delete', 'table', 'inet', 'others');
    await ok('reconcile');
  });

  test('is refused while VMs are mapped, unless forced', async () => {
    await ok('add', '--guest', '192.168.122.2', '--vm', '42', '--nic', '0');
    const before = rig.snapshot();
    expectFailure(await rig.cli(['teardown']), EXIT.conflict, /VMs are mapped: 42[\s\S]*--force/);
    expectFailure(await rig.cli(['teardown', '--dry-run']), EXIT.conflict, /VMs are mapped/);
    expect(rig.snapshot()).toEqual(before);
    await ok('teardown', '--force');
    expect(tool(NFT, 'list', 'tables')).not.toContain('kvm_ib');
    expect(aliases()).not.toContain('/32');
    await ok('reconcile');
  });
});

describe('exit codes', () => {
  test('5: without rights, every command that looks at or changes the kernel', async () => {
    await ok('add', '--guest', '192.168.122.2');
    const before = rig.snapshot();
    for (const args of [['add', '--guest', '192.168.122.3'], ['status'], ['reconcile'], ['teardown']]) {
      expectFailure(await rig.cli(args, { prefix: nobody }), EXIT.notPermitted, /sudo kvm-ib/);
    }
    expect(rig.snapshot()).toEqual(before);
  });

  test('6: a link that is not there, and the rules of what works stay', async () => {
    await ok('add', '--guest', '192.168.122.2');
    const before = rig.snapshot();
    for (const [link, absent] of [
      ['ib0', 'ib9'],
      ['virbr1', 'virbr9'],
    ] as const) {
      writeFileSync(rig.config, CONFIG.replace(link, absent));
      expectFailure(await rig.cli(['add', '--guest', '192.168.122.3']), EXIT.hostLacks, new RegExp(absent));
      expect(rig.snapshot()).toEqual(before);
    }
  });

  test('7: the lock is held by another, who is named', async () => {
    const lock = join(rig.state, 'lock');
    const script = 'exec 9<>"$0"; flock 9; echo "pid $$, a test" >&9; echo held; exec sleep 30';
    writeFileSync(lock, '');
    const holder = spawn('/bin/sh', ['-c', script, lock], { stdio: ['ignore', 'pipe', 'inherit'] });
    await new Promise((resolve) => holder.stdout.once('data', resolve));
    try {
      const before = rig.snapshot();
      const result = await rig.cli(['add', '--guest', '192.168.122.2'], { env: { KVM_IB_LOCK_TIMEOUT_MS: '50' } });
      expectFailure(result, EXIT.lockNotObtained, new RegExp(`held by pid ${holder.pid}, a test`));
      expect(rig.snapshot()).toEqual(before);
    } finally {
      holder.kill();
    }
  });

  /** An nft that acts as the real one until a line of shell says otherwise; `$input` is a file with what it was sent. */
  const spoiltNft = (line: string): readonly string[] => {
    const real = join(rig.folder, 'nft');
    copyFileSync(NFT, real);
    return replaced(
      rig,
      NFT,
      `#!/bin/sh\ninput='${rig.folder}/nft-input'; cat > "$input"\n${line}\nexec '${real}' "$@" < "$input"\n`,
    );
  };
  const takeAlias = `if grep -q '192.168.10.202' "$input" && ! grep -q '"delete"' "$input"; then
  ${IP} addr add 192.168.10.202/32 dev virbr1 2> /dev/null; ${IP} addr add 192.168.10.202/32 dev ib0 2> /dev/null
fi`;

  test('1: nft refuses, and nothing is changed', async () => {
    const before = rig.snapshot();
    const refuse = `if grep -q '192.168.10.202' "$input"; then echo "Error: no" >&2; exit 1; fi`;
    const result = await rig.cli(['add', '--guest', '192.168.122.2'], { prefix: spoiltNft(refuse) });
    expectFailure(result, EXIT.failed, /command 1 of [0-9]+[\s\S]*: no\n/);
    expect(rig.snapshot()).toEqual(before);
  });

  test('4: an address that somebody takes meanwhile: what was done before is undone', async () => {
    const before = rig.snapshot();
    const result = await rig.cli(['add', '--guest', '192.168.122.2'], { prefix: spoiltNft(takeAlias) });
    for (const dev of ['ib0', 'virbr1']) tool(IP, 'addr', 'del', '192.168.10.202/32', 'dev', dev);
    expectFailure(result, EXIT.conflict, /192\.168\.10\.202/);
    expect(rig.snapshot()).toEqual(before);
  });

  test('8: a step fails, and undoing what was done before fails too; reconcile then brings it right', async () => {
    const refuse = `if grep -q '"delete"' "$input"; then echo "Error: no" >&2; exit 1; fi\n${takeAlias}`;
    const result = await rig.cli(['add', '--guest', '192.168.122.2'], { prefix: spoiltNft(refuse) });
    for (const dev of ['ib0', 'virbr1']) tool(IP, 'addr', 'del', '192.168.10.202/32', 'dev', dev);
    expectFailure(result, EXIT.reversalFailed, /undoing what was done before failed too[\s\S]*kvm-ib reconcile/);
    expect(table()).toContain('192.168.122.2 ');
    expect((await drift()).length).toBeGreaterThan(0);
    expect((await rig.cli(['reconcile'])).status).toBe(EXIT.done);
    expect(await drift()).toEqual([]);
  });
});

test('what a VM deployed by the driver has is seen by the command line', async () => {
  await rig.deploy(testVm(42, [3]));
  expect(parsed(await ok('list', '--json'))).toMatchObject([{ guest: '192.168.122.3', vm: 42, nic: 0, owner: 'vm' }]);
  await ok('remove', '--vm', '42');
  expect(parsed(await ok('list', '--json'))).toEqual([]);
});
