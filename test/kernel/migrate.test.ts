/** Live migration between two hosts of namespaces, by the real driver, engines and kernels; libvirt and ssh are stand-ins. */
import { readFileSync, rmSync, writeFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { temporaryDirectory } from '../support/fake-host.ts';
import type { Host, Lab, Stream } from '../support/lab.ts';
import { createLab } from '../support/lab.ts';
import { requireOwnNetns } from '../support/netns.ts';
import type { TwoHosts } from '../support/two-hosts.ts';
import { CONFIG, createTwoHosts, MIGRATES, VM } from '../support/two-hosts.ts';

requireOwnNetns();

const IP = '/usr/sbin/ip';
const OWNS = { alias: true, pair: true, phase: 'active' };
const NOTHING = { alias: false, pair: false, phase: undefined };

let lab: Lab;
let folder: string;
let hosts: TwoHosts;
beforeEach(async () => {
  folder = temporaryDirectory();
  lab = await createLab({ guests: { h1: [11, 12], h2: [21] } });
  hosts = await createTwoHosts(lab, folder);
  await ok('h1', 'add', '--guest', '192.168.122.11', '--vm', String(VM), '--nic', '0', '--mac', '02:00:c0:a8:7a:0b');
  await ok('h1', 'add', '--guest', '192.168.122.12');
  await ok('h2', 'add', '--guest', '192.168.122.21');
});
afterEach(async () => {
  for (const host of ['h1', 'h2'] as const) for (const pid of hosts?.engines(host) ?? []) process.kill(pid, 'SIGKILL');
  await lab?.close();
  rmSync(folder, { recursive: true, force: true });
});

async function ok(host: Host, ...args: readonly string[]): Promise<string> {
  const result = await hosts.kvmIb(host, ...args);
  expect(result, result.stdout + result.stderr).toMatchObject({ status: 0 });
  return result.stdout;
}

async function owners(): Promise<readonly [unknown, unknown]> {
  return [await hosts.holds('h1'), await hosts.holds('h2')];
}

async function until(what: string, holds: () => boolean | Promise<boolean>): Promise<void> {
  for (const end = Date.now() + 8_000; !(await holds()); ) {
    if (Date.now() > end) throw new Error(`not in time: ${what}; ${JSON.stringify(await owners())}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

const raise = (flag: string): void => writeFileSync(hosts.flag(flag), '');

/** Connections of every direction, each open before the guest moves. */
async function connections(): Promise<readonly Stream[]> {
  const ends = [
    ['out', '192.168.10.11'],
    ['g11', '192.168.10.100'],
    ['g12', '192.168.10.11'],
    ['g11', '192.168.10.12'],
    ['g21', '192.168.10.11'],
    ['g11', '192.168.10.21'],
  ] as const;
  return Promise.all(ends.map(([from, to]) => lab.stream('tcp', from, to)));
}

async function alive(streams: readonly Stream[]): Promise<void> {
  expect(await Promise.all(streams.map((stream) => stream.exchange({ timeout: 6_000 })))).toEqual(
    streams.map(() => 'alive'),
  );
}

/** No difference between files and kernel on either host. */
async function clean(): Promise<void> {
  for (const host of ['h1', 'h2'] as const) await ok(host, 'status');
}

describe('a migration', () => {
  test('keeps every connection; the other host owns the address in the end', async () => {
    const streams = await connections();
    await alive(streams);
    const result = await hosts.migrate().ended;
    expect(result).toEqual({ status: 0, stdout: '', stderr: '' });
    expect(await owners()).toEqual([NOTHING, OWNS]);
    await alive(streams);
    await clean();
    expect(hosts.engines('h1').concat(hosts.engines('h2'))).toEqual([]);
  });

  test('without data of the VM, as before OpenNebula 5.0: what it has goes, the command behind is run', async () => {
    const streams = await connections();
    await alive(streams);
    expect(await hosts.migrateWithoutData().ended).toEqual({ status: 0, stdout: '0\nnext\n', stderr: '' });
    expect(await owners()).toEqual([NOTHING, OWNS]);
    await alive(streams);
    await clean();
  });

  test('there and back again', async () => {
    const streams = await connections();
    for (const [from, to] of [
      ['h1', 'h2'],
      ['h2', 'h1'],
      ['h1', 'h2'],
    ] as const) {
      expect(await hosts.migrate({ from, to }).ended).toEqual({ status: 0, stdout: '', stderr: '' });
      await alive(streams);
    }
    expect(await owners()).toEqual([NOTHING, OWNS]);
    await clean();
  });

  test('has nothing in the kernel there before the guest runs, and both hosts cut over at its first frame', async () => {
    hosts.behave('comes; wait_for go; pauses; moves; resumes; wait_for done; goes');
    const running = hosts.migrate();
    await until('the domain comes', () => hosts.domainState('h2') === 'paused (migrating)');
    expect(await owners()).toEqual([
      { alias: true, pair: true, phase: 'pending' },
      { alias: false, pair: false, phase: 'pending' },
    ]);
    // Neither reconcile nor status takes it for a fault.
    await ok('h1', 'reconcile');
    await ok('h2', 'reconcile');
    await clean();
    expect(await owners()).toMatchObject([
      { alias: true, pair: true },
      { alias: false, pair: false },
    ]);
    raise('go');
    await until('both cut over', async () => {
      const [one, two] = await owners();
      return (
        JSON.stringify([one, two]) ===
        JSON.stringify([
          { ...NOTHING, phase: 'pending' },
          { ...OWNS, phase: 'pending' },
        ])
      );
    });
    await ok('h1', 'reconcile');
    await ok('h2', 'reconcile');
    await clean();
    raise('done');
    expect(await running.ended).toMatchObject({ status: 0 });
    expect(await owners()).toEqual([NOTHING, OWNS]);
  });

  test("that comes without a frame cuts over by libvirt's event, or else at its end", async () => {
    hosts.behave('comes; pauses; moves; state $to "running (migrated)"; goes');
    expect(await hosts.migrate().ended).toMatchObject({ status: 0 });
    expect(await owners()).toEqual([NOTHING, OWNS]);
    await clean();
  });

  test('within one host moves nothing', async () => {
    hosts.behave(':');
    expect(await hosts.migrate({ to: 'h1' }).ended).toEqual({ status: 0, stdout: '', stderr: '' });
    expect(await owners()).toEqual([OWNS, NOTHING]);
  });

  test('within one host that goes by two names moves nothing', async () => {
    hosts.behave(':');
    expect(await hosts.migrate({ to: 'h1.example.org' }).ended).toEqual({ status: 0, stdout: '', stderr: '' });
    expect(await owners()).toEqual([OWNS, NOTHING]);
    await clean();
  });
});

describe('is refused before the guest moves', () => {
  beforeEach(() => hosts.behave('touch "$(domains h1)/../moved"'));

  async function refused(why: RegExp): Promise<void> {
    const before = [await lab.exec('h1', [IP, '-o', 'address']), await lab.exec('h2', [IP, '-o', 'address'])];
    const result = await hosts.migrate().ended;
    expect(result.stderr).toMatch(why);
    expect(result.stderr).toMatch(/^kvm-ib: [^\n]+\.\n$/);
    expect(result.status).not.toBe(0);
    expect(await owners()).toEqual([OWNS, NOTHING]);
    expect([await lab.exec('h1', [IP, '-o', 'address']), await lab.exec('h2', [IP, '-o', 'address'])]).toEqual(before);
    await clean();
  }

  test('to a link with a smaller MTU', async () => {
    await lab.exec('h2', [IP, 'link', 'set', 'ib0', 'mtu', '2044']);
    await ok('h2', 'reconcile');
    await refused(
      /h2: Cannot take in VM 42: ib0 has an MTU of 2044 on this host, and the link of the source 65520: .*ip link set ib0 mtu 65520/,
    );
  });

  test('to a host that nobody reaches', async () => {
    raise('unreachable');
    await refused(/Cannot reach h2: .*No route to host.* ssh h2 true/);
  });

  test('to a host without kvm-ib', async () => {
    raise('no-kvm-ib');
    await refused(/Cannot start the kvm-ib engine of h2: h2 has no kvm-ib: .*install kvm-ib on h2/);
  });

  test('to another network', async () => {
    hosts.configure('h2', CONFIG.replace('10.11-192.168.10.99', '10.111-192.168.10.199'));
    const result = await hosts.migrate().ended;
    expect(result.stderr).toMatch(
      /h2: Cannot take in VM 42: its guest 192\.168\.122\.11 has 192\.168\.10\.11 on the source, and network ib of this host would give it 192\.168\.10\.111/,
    );
    hosts.configure('h2', CONFIG.replace('name: ib', 'name: other'));
    expect((await hosts.migrate().ended).stderr).toMatch(
      /of network other on this host, and of another one on the source/,
    );
    hosts.configure('h2', CONFIG);
    expect(await owners()).toEqual([OWNS, NOTHING]);
    await clean();
  });

  test('while another host than the source answers for the address', async () => {
    await lab.exec('out', [IP, 'address', 'add', '192.168.10.11/32', 'dev', 'ib0']);
    await refused(/h2: Cannot take the IB address 192\.168\.10\.11: another host on ib0 has it/);
  });

  test('while a guest of the destination has the address', async () => {
    await ok('h2', 'add', '--guest', '192.168.122.30', '--address', '192.168.10.77');
    await lab.exec('h2', [IP, 'address', 'add', '192.168.10.11/32', 'dev', 'ib0']);
    const result = await hosts.migrate().ended;
    expect(result.stderr).toMatch(/this host has 192\.168\.10\.11\/32 on ib0 already/);
    await lab.exec('h2', [IP, 'address', 'del', '192.168.10.11/32', 'dev', 'ib0']);
    expect(await owners()).toEqual([OWNS, NOTHING]);
  });

  test('while libvirt does not answer there', async () => {
    writeFileSync(`${folder}/h2/silent`, '');
    const result = await hosts.migrate().ended;
    expect(result.stderr).toMatch(/h2: Cannot take in VM 42: libvirt does not answer on this host/);
    rmSync(`${folder}/h2/silent`);
    expect(await owners()).toEqual([OWNS, NOTHING]);
  });

  test('while its domain is active there', async () => {
    hosts.domain('h2', 'running (booted)');
    const result = await hosts.migrate().ended;
    expect(result.stderr).toMatch(/h2: Cannot take in VM 42: one-42 is active on this host already/);
    hosts.domain('h2', undefined);
    expect(await owners()).toEqual([OWNS, NOTHING]);
  });
});

describe('a migration that fails', () => {
  const FAILS = 'echo "ERROR: cannot migrate" >&2; exit 3';

  test.each([
    ['before the domain comes', FAILS],
    ['while it comes', `comes; rm -f "$(domains $to)/one-42"; ${FAILS}`],
    [
      'when the guest is paused',
      `comes; pauses; sleep 0.1; state $from "running (booted)"; rm -f "$(domains $to)/one-42"; ${FAILS}`,
    ],
    ['after both have cut over', `comes; pauses; moves; resumes; sleep 0.4; back; ${FAILS}`],
  ])('%s leaves the source as it was, and the destination clean', async (_, behaviour) => {
    const streams = await connections();
    hosts.behave(behaviour);
    const result = await hosts.migrate().ended;
    expect(result).toMatchObject({ status: 3 });
    expect(result.stderr).toContain('ERROR: cannot migrate\n');
    expect(await owners()).toEqual([OWNS, NOTHING]);
    await alive(streams);
    await clean();
    hosts.behave(MIGRATES);
    expect(await hosts.migrate().ended).toMatchObject({ status: 0 });
    await alive(streams);
  });

  test('after the guest has moved leaves it to the host where its domain is', async () => {
    const streams = await connections();
    hosts.behave(`${MIGRATES}; ${FAILS}`);
    expect(await hosts.migrate().ended).toMatchObject({ status: 3 });
    expect(await owners()).toEqual([NOTHING, OWNS]);
    await alive(streams);
    await clean();
  });

  test('because it passed its deadline is aborted by libvirt', async () => {
    hosts.behave(
      'comes; for n in $(seq 400); do [ -e "$(domains $from)/../aborted" ] && { rm -f "$(domains $to)/one-42"; echo aborted >&2; exit 1; }; sleep 0.025; done',
    );
    const result = await hosts.migrate({ env: { KVM_IB_MIGRATE_DEADLINE_MS: '500' } }).ended;
    expect(result).toMatchObject({ status: 1 });
    expect(result.stderr).toMatch(/^ERROR: kvm-ib: it did not end within 500 ms: the migration of VM 42 is aborted\n/);
    expect(await owners()).toEqual([OWNS, NOTHING]);
    await clean();
  });
});

describe('the engine of the destination', () => {
  const WAITS =
    'comes; for n in $(seq 400); do [ -e "$(domains $from)/../aborted" ] && { rm -f "$(domains $to)/one-42"; echo aborted >&2; exit 1; }; sleep 0.025; done';
  const kill = (): void => {
    const [pid] = hosts.engines('h2');
    if (pid === undefined) throw new Error('no engine waits on h2');
    process.kill(pid, 'SIGKILL');
  };

  test('killed before the guest came: the migration is aborted, and the source keeps it', async () => {
    hosts.behave(WAITS);
    const running = hosts.migrate();
    await until('the domain comes', () => hosts.domainState('h2') === 'paused (migrating)');
    kill();
    const result = await running.ended;
    expect(result).toMatchObject({ status: 1 });
    expect(result.stderr).toContain('the kvm-ib engine of h2 ended: the migration of VM 42 is aborted');
    expect(await hosts.holds('h1')).toEqual(OWNS);
    await ok('h2', 'reconcile');
    expect(await owners()).toEqual([OWNS, NOTHING]);
    await clean();
  });

  test('killed after the guest came: the mapping stands all the same', async () => {
    const streams = await connections();
    hosts.behave('comes; pauses; moves; resumes; wait_for done; goes');
    const running = hosts.migrate();
    await until('both cut over', async () => (await hosts.holds('h2')).alias && !(await hosts.holds('h1')).alias);
    kill();
    raise('done');
    expect(await running.ended).toMatchObject({ status: 0 });
    expect(await owners()).toEqual([NOTHING, OWNS]);
    await alive(streams);
    await clean();
  });

  test("that is cut off goes on alone: at the guest's arrival it cuts over", async () => {
    hosts.behave('comes; wait_for go; pauses; moves; resumes; sleep 1; goes');
    const running = hosts.migrate();
    await until('the domain comes', () => hosts.domainState('h2') === 'paused (migrating)');
    process.kill(Number(readFileSync(hosts.flag('ssh.pid'), 'utf8')), 'SIGKILL');
    await new Promise((resolve) => setTimeout(resolve, 300));
    raise('go');
    const result = await running.ended;
    expect(result).toMatchObject({ status: 0 });
    await until('one owner', async () => JSON.stringify(await owners()) === JSON.stringify([NOTHING, OWNS]));
    await clean();
  });

  test('that is cut off takes its claim back when the domain has gone again', async () => {
    hosts.behave(WAITS);
    const running = hosts.migrate();
    await until('the domain comes', () => hosts.domainState('h2') === 'paused (migrating)');
    process.kill(Number(readFileSync(hosts.flag('ssh.pid'), 'utf8')), 'SIGKILL');
    expect(await running.ended).toMatchObject({ status: 1 });
    await until('one owner', async () => JSON.stringify(await owners()) === JSON.stringify([OWNS, NOTHING]));
    await clean();
  });
});

describe('the driver killed on the source', () => {
  test.each(['comes', 'runs there'])('when the guest %s: both hosts find to what libvirt says', async (when) => {
    const streams = await connections();
    hosts.behave('comes; wait_for go; pauses; moves; resumes; wait_for done; goes');
    const running = hosts.migrate();
    await until('the domain comes', () => hosts.domainState('h2') === 'paused (migrating)');
    if (when === 'runs there') {
      raise('go');
      await until('both cut over', async () => (await hosts.holds('h2')).alias && !(await hosts.holds('h1')).alias);
    }
    running.child.kill('SIGKILL');
    raise('go');
    raise('done');
    await until('the stock script has ended', () => hosts.domainState('h1') === undefined);
    await ok('h1', 'reconcile');
    await until('the destination has it', async () => JSON.stringify(await hosts.holds('h2')) === JSON.stringify(OWNS));
    expect(await owners()).toEqual([NOTHING, OWNS]);
    await alive(streams);
    await clean();
  });
});

describe('the network driver', () => {
  const OK = { status: 0, stdout: '', stderr: '' };

  test('alone: the destination takes over when the guest runs there, the source lets go behind it', async () => {
    const streams = await connections();
    expect(await hosts.network('h2', 'pre')).toEqual(OK);
    expect(await owners()).toMatchObject([OWNS, { alias: false, pair: false, phase: 'pending' }]);
    expect(await hosts.stockMigrate().ended).toMatchObject({ status: 0 });
    await until('the destination has it', async () => (await hosts.holds('h2')).alias);
    expect(await hosts.network('h1', 'clean')).toEqual(OK);
    expect(await hosts.network('h2', 'post')).toEqual(OK);
    expect(await owners()).toEqual([NOTHING, OWNS]);
    await alive(streams);
    await clean();
  });

  test('alone, and the migration fails on the way: the destination gives up by itself, the source never knew', async () => {
    const streams = await connections();
    hosts.behave(`comes; sleep 1; rm "$(domains $to)/one-${VM}"; exit 1`);
    expect(await hosts.network('h2', 'pre')).toEqual(OK);
    expect(await hosts.stockMigrate().ended).toMatchObject({ status: 1 });
    await until('the destination gives up', async () => (await hosts.holds('h2')).phase === undefined);
    expect(await owners()).toEqual([OWNS, NOTHING]);
    await alive(streams);
    await clean();
  });

  test('beside the VMM driver: its claim is taken over, and nothing is lost', async () => {
    const streams = await connections();
    expect(await hosts.network('h2', 'pre')).toEqual(OK);
    expect(await hosts.migrate().ended).toEqual(OK);
    expect(await hosts.network('h1', 'clean')).toEqual(OK);
    expect(await hosts.network('h2', 'post')).toEqual(OK);
    expect(await owners()).toEqual([NOTHING, OWNS]);
    await alive(streams);
    await clean();
  });
});
