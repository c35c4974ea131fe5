/**
 * The monitoring probes, run by the shells that hosts have, on what may lie at /run/kvm-ib/status. They must print what
 * OpenNebula can take in, end quickly, and exit 0 whatever they find.
 */
import { spawnSync } from 'node:child_process';
import {
  chmodSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { afterAll, beforeEach, describe, expect, test } from 'vitest';
import type { Ipv4, LinkName } from '../../lib/core/address.ts';
import type { Config } from '../../lib/core/mapping.ts';
import { configHash, createStatusFile, formatStatus } from '../../lib/host/status-file.ts';
import type { StatusReport } from '../../lib/ops/publish.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

const PROBES = resolve(import.meta.dirname, '../../drivers/im/kvm-probes.d');
const SHELLS = [['/usr/bin/dash'], ['/usr/bin/busybox', 'sh'], ['/usr/bin/bash', '--posix']] as const;
const KEYS = ['KVM_IB_STATUS', 'KVM_IB_DRIFT', 'KVM_IB_OUTDATED', 'KVM_IB_CONFIG', 'KVM_IB_RULESET', 'KVM_IB_VERSION'];
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
const REPORT: StatusReport = {
  time: '2026-01-01T00:00:00.000Z',
  error: null,
  drift: 0,
  outdated: 1,
  config: CONFIG,
  ruleset: '1a2b3c4d',
  vms: [
    {
      vm: 42,
      state: 'ok',
      drift: 0,
      outdated: 1,
      addresses: ['192.168.10.202', '192.168.10.203'],
      traffic: { sent: { packets: 12, bytes: 1_234 }, received: { packets: 2 ** 53, bytes: 2 ** 64 } },
    },
    { vm: 7, state: 'drift', drift: 2, outdated: 0, addresses: ['192.168.10.204'], traffic: null },
  ],
};

const folder = mkdtempSync(join(tmpdir(), 'kvm-ib-probes-'));
const status = join(folder, 'run/status');
const installed = join(folder, 'lib');
const clock = join(folder, 'uptime');
const UPTIME = 200_000;
const probe = { host: copy('host/system'), vm: copy('vm/monitor') };
afterAll(() => rmSync(folder, { recursive: true, force: true }));
beforeEach(() => {
  writeFileSync(clock, `${UPTIME}.25 1234.50\n`);
  for (const path of ['run', 'lib']) {
    rmSync(join(folder, path), { recursive: true, force: true });
    mkdirSync(join(folder, path));
  }
});

/** The probe with the places that it looks at moved. */
function copy(kind: 'host/system' | 'vm/monitor'): string {
  const text = readFileSync(join(PROBES, kind, 'kvm-ib.sh'), 'utf8');
  const moved = [
    ['/run/kvm-ib/status', status],
    ['/usr/lib/kvm-ib', installed],
    ['/proc/uptime', clock],
  ].reduce((script, [from = '', to = '']) => script.replace(new RegExp(`(=|< )${from}$`, 'm'), `$1${to}`), text);
  for (const path of [status, clock]) expect(moved).toContain(path);
  const path = join(folder, `${kind.replace('/', '-')}.sh`);
  writeFileSync(path, moved);
  chmodSync(path, 0o755);
  return path;
}

const text = (age = 0, report = REPORT): string => formatStatus(report, { version: '0.1.0', uptime: UPTIME - age });

interface Answer {
  readonly lines: readonly string[];
  /** Milliseconds of processor. */
  readonly took: number;
}

/** Runs it as monitord does: two arguments, configuration on stdin, an empty environment. */
function run(shell: readonly string[], script: string): Answer {
  const [program = '', ...args] = shell;
  const began = childrenTime();
  const result = spawnSync(program, [...args, script, 'kvm', '3', 'kvmib01'], {
    input: '<MONITOR_CONFIGURATION/>',
    encoding: 'latin1',
    env: { PATH: '/usr/bin:/bin' },
    timeout: 10_000,
  });
  expect({ status: result.status, stderr: result.stderr }).toEqual({ status: 0, stderr: '' });
  return { lines: result.stdout.split('\n').slice(0, -1), took: childrenTime() - began };
}

/** Milliseconds of processor that ended children of this process had, cutime and cstime of proc(5): what waiting does not count. */
function childrenTime(): number {
  const fields = readFileSync('/proc/self/stat', 'latin1').split(') ').at(-1)?.split(' ') ?? [];
  const TICK_MS = 10;
  return (Number(fields[16 - 3]) + Number(fields[17 - 3])) * TICK_MS;
}

function values(lines: readonly string[]): Readonly<Record<string, string>> {
  return Object.fromEntries(
    lines.map((line) => {
      const match = /^(KVM_IB_[A-Z_]+)="([A-Za-z0-9 ._-]*)"$/.exec(line);
      expect(match, line).not.toBeNull();
      return [match?.[1] ?? '', match?.[2] ?? ''];
    }),
  );
}

function monitoring(lines: readonly string[]): Readonly<Record<string, Readonly<Record<string, string>>>> {
  return Object.fromEntries(
    lines.map((line) => {
      const match = /^VM = \[ ID="([0-9]+)", MONITOR="([A-Za-z0-9+/=]+)" \]$/.exec(line);
      expect(match, line).not.toBeNull();
      const decoded = Buffer.from(match?.[2] ?? '', 'base64').toString('latin1');
      expect(decoded.endsWith('\n')).toBe(true);
      return [match?.[1] ?? '', values(decoded.split('\n').slice(0, -1))];
    }),
  );
}

describe.each(SHELLS.map((shell) => ({ name: shell.join(' '), shell })))('under $name', ({ shell }) => {
  const host = (): Readonly<Record<string, string>> => values(run(shell, probe.host).lines);
  const vms = (): ReturnType<typeof monitoring> => monitoring(run(shell, probe.vm).lines);

  test('the host shows drift, configuration, rule set and version', () => {
    writeFileSync(status, text());
    expect(host()).toEqual({
      KVM_IB_STATUS: 'OK',
      KVM_IB_DRIFT: '0',
      KVM_IB_OUTDATED: '1',
      KVM_IB_CONFIG: configHash(CONFIG),
      KVM_IB_RULESET: '1a2b3c4d',
      KVM_IB_VERSION: '0.1.0',
    });
    writeFileSync(status, text(0, { ...REPORT, drift: 3 }));
    expect(host()).toMatchObject({ KVM_IB_STATUS: 'DRIFT', KVM_IB_DRIFT: '3' });
  });

  test('each VM shows its state, drift, counters where there are any, and IB addresses', () => {
    writeFileSync(status, text());
    expect(vms()).toEqual({
      42: {
        KVM_IB_STATE: 'OK',
        KVM_IB_DRIFT: '0',
        KVM_IB_OUTDATED: '1',
        KVM_IB_RX_PACKETS: '9007199254740992',
        KVM_IB_RX_BYTES: '18446744073709551616',
        KVM_IB_TX_PACKETS: '12',
        KVM_IB_TX_BYTES: '1234',
        KVM_IB_ADDRESSES: '192.168.10.202 192.168.10.203',
      },
      7: { KVM_IB_STATE: 'DRIFT', KVM_IB_DRIFT: '2', KVM_IB_OUTDATED: '0', KVM_IB_ADDRESSES: '192.168.10.204' },
    });
  });

  test('a reconcile that could not look is no host without drift', () => {
    writeFileSync(
      status,
      text(0, { ...REPORT, drift: null, outdated: null, error: 'host-lacks', ruleset: null, vms: [] }),
    );
    expect(host()).toMatchObject({
      KVM_IB_STATUS: 'FAILED',
      KVM_IB_DRIFT: '-1',
      KVM_IB_OUTDATED: '-1',
      KVM_IB_RULESET: '',
    });
  });

  test('a status of three minutes ago still counts, an older one or one from the future is stale', () => {
    writeFileSync(status, text(175));
    expect(host()['KVM_IB_STATUS']).toBe('OK');
    for (const age of [185, 100_000, -60]) {
      writeFileSync(status, text(age));
      expect(host()).toMatchObject({ KVM_IB_STATUS: 'STALE', KVM_IB_DRIFT: '-1' });
      expect(vms()).toEqual({ 42: { KVM_IB_STATE: 'STALE' }, 7: { KVM_IB_STATE: 'STALE' } });
    }
  });

  test('every key is printed each time, since OpenNebula keeps what is not printed again', () => {
    for (const content of [text(), text(500), '', undefined]) {
      rmSync(status, { force: true });
      if (content !== undefined) writeFileSync(status, content);
      expect(Object.keys(host())).toEqual(KEYS);
    }
  });

  test('a host without kvm-ib prints nothing, one where no reconcile ran yet says so', () => {
    expect(host()).toMatchObject({ KVM_IB_STATUS: 'MISSING', KVM_IB_DRIFT: '-1' });
    rmSync(installed, { recursive: true });
    expect(run(shell, probe.host).lines).toEqual([]);
    expect(run(shell, probe.vm).lines).toEqual([]);
  });

  const good = text();
  test.each<[string, string | Buffer]>([
    ['empty', ''],
    ['cut off before its end', good.slice(0, -10)],
    ['cut off in its first line', 'kvm-ib-sta'],
    ['of another form', good.replace('kvm-ib-status 1', 'kvm-ib-status 2')],
    ['without a time', good.replace(/^uptime .*\n/m, '')],
    ['with a number that shells read as octal', good.replace(/^uptime .*$/m, 'uptime 0999')],
    ['with a number beyond 64 bits', good.replace(/^uptime .*$/m, `uptime ${'9'.repeat(40)}`)],
    ['with an expression for a number', good.replace(/^uptime .*$/m, 'uptime a[$(touch$IFS.x)]')],
    ['zeros', Buffer.alloc(1_000_000)],
    ['noise', Buffer.from(Array.from({ length: 200_000 }, (_, i) => (i * 7919 + (i >> 3)) & 0xff))],
    ['one endless line', `kvm-ib-status 1\n${'x'.repeat(4_000_000)}`],
  ])('a file that is %s is corrupt, and no VM is shown', (_, content) => {
    writeFileSync(status, content);
    expect(host()).toMatchObject({ KVM_IB_STATUS: 'CORRUPT', KVM_IB_DRIFT: '-1', KVM_IB_CONFIG: '' });
    const answer = run(shell, probe.vm).lines;
    expect(answer.every((line) => line.includes('MONITOR="S1ZNX0lCX1NUQVRFPSJTVEFMRSIK"'))).toBe(true);
  });

  test('nothing of a hostile file reaches OpenNebula but what has the form of a value', () => {
    const evil = [
      '"',
      '`id`',
      '$(id)',
      '$IFS',
      "'",
      '\\',
      '*',
      '%s%n',
      '\u0007',
      'a"\nREBOOT="1',
      'é',
      'x'.repeat(17),
      '-n',
      '/etc/*',
    ];
    for (const word of evil) {
      const lines = good
        .replace(/^(config|ruleset|version|state|drift|outdated) .*$/gm, `$1 ${word}`)
        .replace('state', 'state OK\nstate');
      writeFileSync(
        status,
        lines.replace(
          /^end$/m,
          `vm 9 ${word}!\nvm ${word} QUJD\nvm 1;id QUJD\nvm 10 ${'A'.repeat(601)}\nvm 00012 QUJD\nend`,
        ),
      );
      const shown = host();
      expect(Object.keys(shown)).toEqual(KEYS);
      if (word !== '-n') expect(shown).toMatchObject({ KVM_IB_CONFIG: '', KVM_IB_RULESET: '', KVM_IB_VERSION: '' });
      expect([shown['KVM_IB_DRIFT'], shown['KVM_IB_OUTDATED']]).toEqual(['-1', '-1']);
      expect(Object.keys(vms())).toEqual(['7', '42']);
    }
  });

  test('a pipe, a directory, a device and a dangling link in its place do not hang it', () => {
    const put: readonly (() => void)[] = [
      () => expect(spawnSync('/usr/bin/mkfifo', [status]).status).toBe(0),
      () => mkdirSync(status),
      () => symlinkSync('/dev/zero', status),
      () => symlinkSync('/nowhere', status),
    ];
    for (const make of put) {
      rmSync(status, { recursive: true, force: true });
      make();
      expect(host()['KVM_IB_STATUS']).toMatch(/^(CORRUPT|MISSING)$/);
      expect(run(shell, probe.vm).lines).toEqual([]);
    }
  });

  test('a thousand VMs are cut to what fits, and still quick', () => {
    const most = { packets: 2 ** 63, bytes: 2 ** 64 };
    const many = Array.from({ length: 1000 }, (_, vm) => {
      return {
        vm,
        state: 'ok' as const,
        drift: 0,
        outdated: 0,
        traffic: { sent: most, received: most },
        addresses: Array.from({ length: 20 }, (__, n) => `192.168.110.2${n}`),
      };
    });
    const content = text(0, { ...REPORT, vms: many });
    expect(content.length).toBeLessThan(512 * 1024);
    writeFileSync(status, content);
    const answer = run(shell, probe.vm);
    const shown = monitoring(answer.lines);
    expect(Object.keys(shown)).toHaveLength(500);
    expect(shown['1']?.['KVM_IB_ADDRESSES']?.split(' ').length).toBeGreaterThan(10);
    expect(answer.took).toBeLessThan(2000);
    expect(host()['KVM_IB_STATUS']).toBe('OK');
  });
});

test('the status file is replaced whole, and anyone may read it whatever the umask', () => {
  const sink = createStatusFile(join(folder, 'run'), '0.1.0');
  const before = process.umask(0o077);
  try {
    expect(sink?.write(REPORT)).toBeUndefined();
    expect(sink?.write({ ...REPORT, drift: 1 })).toBeUndefined();
  } finally {
    process.umask(before);
  }
  expect(statSync(status).mode & 0o777).toBe(0o644);
  expect(readFileSync(status, 'utf8')).toMatch(/^state DRIFT$/m);
  truncateSync(status);
  expect(createStatusFile(undefined, '0.1.0')).toBeUndefined();
});

test('a status that cannot be written is a warning, not an error', () => {
  writeFileSync(join(folder, 'run/file'), '');
  expect(createStatusFile(join(folder, 'run/file/below'), '0.1.0')?.write(REPORT)).toMatch(/STALE: cannot write/);
});

test('the hash of the configuration is that of its meaning', () => {
  const [network] = CONFIG.networks;
  if (network === undefined) throw new Error('no network');
  const reordered: Config = { static: [], networks: [{ ...network, isolate: true, name: 'ib' }] };
  expect(configHash(reordered)).toBe(configHash(CONFIG));
  expect(configHash({ ...CONFIG, networks: [{ ...network, isolate: false }] })).not.toBe(configHash(CONFIG));
  expect(configHash({ ...CONFIG, networks: [{ ...network, probe: true }] })).toBe(configHash(CONFIG));
  expect(configHash({ ...CONFIG, networks: [{ ...network, probe: false }] })).not.toBe(configHash(CONFIG));
  expect(
    configHash({ ...CONFIG, static: [{ guest: network.guests.first, address: network.addresses.first }] }),
  ).not.toBe(configHash(CONFIG));
});
