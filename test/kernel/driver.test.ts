/** The driver as OpenNebula sees it: launchers called as one_vmm_exec calls them, stock scripts that record, a real kernel. */
import { spawn } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { ACTIONS, treatmentOf } from '../../lib/opennebula/contract.ts';
import type { Rig } from '../support/driver.ts';
import {
  actionDataOf,
  createRig,
  domainOf,
  eventually,
  HOST_NAME,
  LINK_MTU,
  ONE_LINE,
  run,
  testVm,
  tool,
  UUID,
  vmXmlOf,
  writeScript,
} from '../support/driver.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

let rig: Rig;
beforeAll(async () => {
  rig = await createRig();
});
afterAll(() => rig?.remove());
beforeEach(() => rig.reset());

const vm = testVm(42);
const foreign = testVm(43, [2], 'br0');
const MTU = `<mtu size='${LINK_MTU}'/>`;
const aliases = () => tool('/usr/sbin/ip', '-o', '-4', 'addr', 'show', 'dev', 'ib0');
const table = () => tool('/usr/sbin/nft', 'list', 'table', 'ip', 'kvm_ib');
const recorded = (name: string) => readFileSync(join(rig.record, name), 'latin1');
const ALIAS = 'inet 192.168.10.202/32 scope global ib0:42-0';
const PAIR = '192.168.122.2 comment "one-42 nic 0 ib" : 192.168.10.202';

describe('deploy', () => {
  test('gives the stock script a host that is mapped, and the domain XML with nothing but the MTU added', async () => {
    rig.behave(`cat > "$record/stdin"
/usr/sbin/nft list table ip kvm_ib > "$record/table"
/usr/sbin/ip -o -4 addr show dev ib0 > "$record/aliases"
cp '${rig.state}/mappings/vm-42.json' "$record/file"
echo ${UUID}
`);
    const file = rig.place(vm);
    const answer = await rig.ssh('deploy', [file, HOST_NAME], 42, domainOf(vm));
    expect(answer).toMatchObject({ code: 0, stdout: `${UUID}\n`, stderr: '' });
    const source = "<source bridge='virbr1'/>";
    expect(domainOf(vm).split(source)).toHaveLength(2);
    expect(recorded('stdin')).toBe(`${domainOf(vm).replace(source, `${source}${MTU}`)}\n`);
    expect(recorded('deploy.argv')).toBe([file, HOST_NAME, '42', HOST_NAME, ''].join('\0'));
    expect(recorded('table')).toContain(PAIR);
    expect(recorded('table')).toContain('192.168.10.202 : 192.168.122.2');
    expect(recorded('table')).toContain('192.168.122.2 . 02:00:c0:a8:7a:02');
    expect(recorded('aliases')).toContain(ALIAS);
    expect(JSON.parse(recorded('file'))).toMatchObject({ phase: { name: 'pending', action: 'deploy' } });
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });
    expect(aliases()).toContain(ALIAS);
    expect(table()).toContain(PAIR);
  });

  test('keeps every byte of the domain XML, those that are no UTF-8 too', async () => {
    const bytes = Buffer.concat([
      Buffer.from('\ufeff'),
      Buffer.from(
        domainOf(vm).replace('<title>web-42', '<title>\u00fe\u0080 \u00ff & <![CDATA[]] >]]>\r\n\t'),
        'latin1',
      ),
      Buffer.from('\r\n \n'),
    ]);
    const result = await rig.call('deploy', [rig.place(vm), HOST_NAME], 42, { stdin: bytes });
    expect(result).toMatchObject({ status: 0, stderr: '' });
    const source = "<source bridge='virbr1'/>";
    expect(rig.stockRun('deploy').stdin).toBe(bytes.toString('latin1').replace(source, `${source}${MTU}`));
  });

  test('maps each NIC on our bridge, and only those', async () => {
    const both = testVm(42, [2, 4]);
    const mixed = { ...both, nics: [...both.nics, ...testVm(42, [9], 'br0').nics] };
    expect(await rig.deploy(mixed)).toMatchObject({ status: 0, stderr: '' });
    expect(aliases().match(/192\.168\.10\.\d+\/32 scope global \S+/g)).toEqual([
      '192.168.10.202/32 scope global ib0:42-0\\',
      '192.168.10.204/32 scope global ib0:42-1\\',
    ]);
    expect(rig.stockRun('deploy').stdin.split(MTU)).toHaveLength(3);
    expect(rig.stockRun('deploy').stdin).toContain("<source bridge='br0'/>\n");
  });

  test('a second deploy of the same VM changes nothing', async () => {
    await rig.deploy(vm);
    const before = rig.snapshot();
    expect(await rig.deploy(vm)).toMatchObject({ status: 0, stdout: `${UUID}\n`, stderr: '' });
    const strip = (text: string | undefined) => text?.replace(/"updated": ".*"/, '');
    const after = rig.snapshot();
    expect(strip(after.state['mappings/vm-42.json'])).toBe(strip(before.state['mappings/vm-42.json']));
    expect({ ...after, state: {} }).toEqual({ ...before, state: {} });
  });

  test.each([1, 255])('a stock script that fails with %i leaves everything as it was', async (status) => {
    rig.behave(`cat > /dev/null; echo odd; echo "Could not create domain" >&2; exit ${status}`);
    await rig.cli(['add', '--guest', '192.168.122.5']);
    const before = rig.snapshot();
    const answer = await rig.ssh('deploy', [rig.place(vm), HOST_NAME], 42, domainOf(vm));
    expect(answer).toMatchObject({ code: status, stdout: 'odd\n', stderr: 'Could not create domain\n' });
    expect(rig.snapshot()).toEqual(before);
  });

  test('a stock script that fails on a VM that was mapped before leaves it mapped', async () => {
    await rig.deploy(vm);
    const before = rig.snapshot();
    rig.behave('exit 9');
    expect(await rig.deploy(testVm(42, [2, 3]))).toMatchObject({ status: 9, stderr: '' });
    const after = rig.snapshot();
    expect([after.rules, after.addresses]).toEqual([before.rules, before.addresses]);
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });
  });

  test.each([
    ['KILL', 137],
    ['TERM', 143],
    ['PIPE', 141],
    ['USR1', 138],
  ])('a stock script that dies of SIG%s leaves everything as it was', async (signal, status) => {
    rig.behave(`ulimit -c 0; cat > /dev/null; kill -${signal} $$; sleep 5`);
    const before = rig.snapshot();
    const answer = await rig.ssh('deploy', [rig.place(vm), HOST_NAME], 42, domainOf(vm));
    expect(answer).toMatchObject({ code: status, stdout: '' });
    expect(answer.stderr).not.toMatch(/kvm-ib: |Debugger/);
    expect(rig.snapshot()).toEqual(before);
  });

  test('passes on what the stock script prints, byte by byte, and whether it reads or not', async () => {
    rig.behave(`printf 'a\\000b\\377 no end'; printf 'ERROR: x\\033[31m\\n\\n' >&2`);
    expect(await rig.deploy(vm)).toMatchObject({
      status: 0,
      stdout: 'a\0b\u00ff no end',
      stderr: 'ERROR: x\u001b[31m\n\n',
    });
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });
  });

  test('a stock script may open its standard input again', async () => {
    rig.behave('cat /dev/stdin > "$record/deploy.stdin"; head -c 8 /proc/self/fd/0 > "$record/again"');
    expect(await rig.deploy(vm)).toMatchObject({ status: 0, stderr: '' });
    expect(rig.stockRun('deploy').stdin).toContain(MTU);
    expect(recorded('again')).toBe(domainOf(vm).slice(0, 8));
  });

  test('a missing stock script is said, and nothing stays', async () => {
    const stock = join(rig.stock, 'deploy');
    const text = readFileSync(stock, 'latin1');
    const before = rig.snapshot();
    writeFileSync(stock, text, { mode: 0o644 });
    tool('/bin/chmod', '0644', stock);
    try {
      const result = await rig.deploy(vm);
      expect(result).toMatchObject({ status: 6, stdout: '' });
      expect(result.stderr).toMatch(ONE_LINE);
      expect(result.stderr).toContain('onehost sync');
    } finally {
      writeScript(stock, text);
    }
    expect(rig.snapshot()).toEqual(before);
  });

  test('SIGTERM goes to the stock script, and the mapping goes with it', async () => {
    rig.behave(`trap 'kill $!; exit 7' TERM; sleep 30 > /dev/null 2>&1 & wait`);
    const before = rig.snapshot();
    const result = rig.call('deploy', [rig.place(vm), HOST_NAME], 42, {
      stdin: domainOf(vm),
      started: (child) => {
        void eventually('the stock script runs', () => rig.runs().includes('deploy')).then(() =>
          setTimeout(() => child.kill('SIGTERM'), 100),
        );
      },
    });
    expect(await result).toMatchObject({ status: 7 });
    expect(rig.snapshot()).toEqual(before);
  });

  test('a driver that is killed leaves its file pending; the next deploy makes it right', async () => {
    rig.behave('exec sleep 30');
    const pids: number[] = [];
    const killed = rig.call('deploy', [rig.place(vm), HOST_NAME], 42, {
      stdin: domainOf(vm),
      started: (child) => {
        void eventually('the stock script runs', () => rig.runs().includes('deploy')).then(() => {
          pids.push(...childrenOf(child.pid ?? 0));
          child.kill('SIGKILL');
          for (const pid of pids) if (readFileSync(`/proc/${pid}/comm`, 'latin1') === 'sleep\n') process.kill(pid);
        });
      },
    });
    expect(await killed).toMatchObject({ signal: 'SIGKILL' });
    expect(rig.phases()).toEqual({ 'vm-42': 'pending' });
    expect(table()).toContain(PAIR);
    rig.behave(`cat > /dev/null; echo ${UUID}`);
    expect(await rig.deploy(vm)).toMatchObject({ status: 0, stderr: '' });
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });
    expect(aliases()).toContain(ALIAS);
  });

  test('while the stock script works, reconcile leaves the VM alone', async () => {
    rig.behave(`cat > /dev/null; until [ -e "$record/go" ]; do sleep 0.05; done; echo ${UUID}`);
    const deploying = rig.deploy(vm);
    await eventually('the stock script runs', () => rig.runs().includes('deploy'));
    const reconciled = await rig.cli(['reconcile']);
    expect(reconciled.status).toBe(0);
    expect(reconciled.stdout).toContain('left     vm-42: its action is under way');
    expect(table()).toContain(PAIR);
    expect(rig.phases()).toEqual({ 'vm-42': 'pending' });
    writeFileSync(join(rig.record, 'go'), '');
    expect(await deploying).toMatchObject({ status: 0 });
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });
  });

  test('two VMs deployed at once are both mapped', async () => {
    rig.behave(`cat > /dev/null; sleep 0.2; echo ${UUID}`);
    const results = await Promise.all([rig.deploy(testVm(42, [2])), rig.deploy(testVm(44, [3]))]);
    expect(results.map((r) => [r.status, r.stderr])).toEqual([
      [0, ''],
      [0, ''],
    ]);
    expect(rig.phases()).toEqual({ 'vm-42': 'active', 'vm-44': 'active' });
    expect(aliases()).toContain('192.168.10.203/32 scope global ib0:44-0');
  });

  test('two VMs that claim one address: the second is refused, naming the first', async () => {
    await rig.deploy(vm);
    const before = rig.snapshot();
    const other = testVm(44);
    const result = await rig.deploy(other);
    expect(result).toMatchObject({ status: 4, stdout: '' });
    expect(result.stderr).toMatch(ONE_LINE);
    expect(result.stderr).toContain('vm-44');
    expect(result.stderr).toContain('vm-42');
    expect(rig.runs()).toEqual(['deploy']);
    expect(rig.snapshot()).toEqual(before);
  });

  test('an IB address on the host that is not ours is refused, and stays', async () => {
    tool('/usr/sbin/ip', 'addr', 'add', '192.168.10.202/32', 'dev', 'virbr1');
    const before = rig.snapshot();
    const result = await rig.deploy(vm);
    tool('/usr/sbin/ip', 'addr', 'del', '192.168.10.202/32', 'dev', 'virbr1');
    expect(result).toMatchObject({ status: 4, stdout: '' });
    expect(result.stderr).toMatch(ONE_LINE);
    expect(rig.runs()).toEqual([]);
    expect(before.addresses).toContain('192.168.10.202/32');
    expect(rig.phases()).toEqual({});
  });

  test('IB_IP on the NIC names the IB address', async () => {
    const text = vmXmlOf(vm).replace('<MAC>', '<IB_IP><![CDATA[192.168.10.206]]></IB_IP><MAC>');
    const file = rig.place(vm, text);
    expect(await rig.call('deploy', [file, HOST_NAME], 42, { stdin: domainOf(vm) })).toMatchObject({ status: 0 });
    expect(aliases()).toContain('192.168.10.206/32 scope global ib0:42-0');
  });

  test('makes the table when it is not there yet', async () => {
    tool('/usr/sbin/nft', 'delete', 'table', 'ip', 'kvm_ib');
    expect(await rig.deploy(vm)).toMatchObject({ status: 0, stderr: '' });
    expect(table()).toContain(PAIR);
  });
});

function childrenOf(pid: number): readonly number[] {
  const children = readFileSync(`/proc/${pid}/task/${pid}/children`, 'latin1').trim();
  return children === '' ? [] : children.split(' ').map(Number);
}

describe.each(['shutdown', 'cancel'])('%s', (action) => {
  const args = [UUID, HOST_NAME];

  test('runs the stock script first, with its input as it came, and releases after it', async () => {
    await rig.deploy(vm);
    rig.behave(`cat > "$record/$action.stdin"
/usr/sbin/nft list table ip kvm_ib > "$record/table"
/usr/sbin/ip -o -4 addr show dev ib0 > "$record/aliases"
cat '${rig.state}/mappings/vm-42.json' > "$record/file"
`);
    const answer = await rig.ssh(action, args, 42, actionDataOf(vm));
    expect(answer).toMatchObject({ code: 0, stdout: '', stderr: '' });
    expect(rig.stockRun(action)).toMatchObject({ argv: [...args, '42', HOST_NAME], stdin: `${actionDataOf(vm)}\n` });
    expect(recorded('table')).toContain(PAIR);
    expect(recorded('aliases')).toContain(ALIAS);
    expect(JSON.parse(recorded('file'))).toMatchObject({ phase: { name: 'active' } });
    expect(aliases()).not.toContain('/32');
    expect(table()).not.toContain('192.168.122.2 ');
    expect(rig.phases()).toEqual({});
    expect(Object.keys(rig.snapshot().state)).not.toContain('claims/192.168.122.2');
  });

  test('a stock script that fails, or is killed, leaves the mapping', async () => {
    await rig.deploy(vm);
    const before = rig.snapshot();
    for (const [behaviour, code] of [
      ['echo "Could not shutdown" >&2; exit 1', 1],
      ['exit 255', 255],
      ['kill -KILL $$', 137],
    ] as const) {
      rig.behave(behaviour);
      expect(await rig.ssh(action, args, 42, actionDataOf(vm))).toMatchObject({ code });
    }
    expect(rig.snapshot()).toEqual(before);
  });

  test('a release that fails does not fail the action, and is logged', async () => {
    await rig.deploy(vm);
    const lock = spawn('/usr/bin/flock', [join(rig.state, 'lock'), '/bin/sh', '-c', 'echo held; exec sleep 30'], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    await new Promise((resolve) => lock.stdout.once('data', resolve));
    const env = { KVM_IB_LOCK_TIMEOUT_MS: '50' };
    try {
      const result = await rig.call(action, args, 42, { stdin: actionDataOf(vm), env });
      expect(result).toMatchObject({ status: 0, stdout: `${UUID}\n` });
      expect(result.stderr).toMatch(/^ERROR: kvm-ib: Cannot lock [^\n]*reconcile[^\n]*\n$/);
    } finally {
      // flock waits for its child, and the child has the lock too.
      for (const pid of childrenOf(lock.pid ?? 0)) process.kill(pid);
    }
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });
  });

  test('of a VM that has no mapping any more succeeds', async () => {
    const before = rig.snapshot();
    expect(await rig.ssh(action, ['', HOST_NAME], 42, actionDataOf(vm))).toMatchObject({ code: 0, stderr: '' });
    expect(rig.runs()).toEqual([action]);
    expect(rig.snapshot()).toEqual(before);
  });
});

describe('a migration', () => {
  const args = [UUID, 'kvmib02', HOST_NAME];
  const calls: readonly (readonly [string, readonly string[]])[] = [
    ['migrate', args],
    ['migrate_local', args],
  ];

  test.each([
    ['migrate', 'Cannot reach kvmib02'],
    ['migrate_local', 'Cannot migrate_local VM 42'],
  ])('%s of a VM on our bridge, here without the way to go, is refused in one plain line', async (action, why) => {
    const answer = await rig.ssh(action, args, 42, actionDataOf(vm));
    expect(answer).toMatchObject({ code: 1, stdout: '' });
    expect(answer.stderr).toMatch(ONE_LINE);
    expect(answer.stderr).toContain(why);
    expect(rig.runs()).toEqual([]);
  });

  test.each(calls)('%s of any other VM passes', async (action, args) => {
    rig.behave('cat > "$record/$action.stdin"; echo out; echo err >&2; exit 5');
    const answer = await rig.ssh(action, args, 43, actionDataOf(foreign));
    expect(answer).toMatchObject({ code: 5, stdout: 'out\n', stderr: 'err\n' });
    expect(rig.stockRun(action)).toMatchObject({
      argv: [...args, '43', HOST_NAME],
      stdin: `${actionDataOf(foreign)}\n`,
    });
  });
});

/** Bytes that are no text: invalid UTF-8, quotes, line ends, shell syntax, an empty one. A shell makes them. */
const ODD_WORDS = String.raw`a="$(printf 'x\377\376\n\\\n"y_')"; set -- "$@" "${'$'}{a%_}" '' '$(id) ; * '"'" '-n' '\0141' "$(printf '\303\244')"`;
const ODD_BYTES = ['x\u00ff\u00fe\n\\\n"y', '', "$(id) ; * '", '-n', '\\0141', '\u00c3\u00a4'];
/** Those of them that are UTF-8: Node, which conducts some actions, can hand on no others. */
const ODD_TEXT_WORDS = ODD_WORDS.replace(String.raw`\377\376`, '');
const ODD_TEXT = ODD_BYTES.map((word) => word.replace('\u00ff\u00fe', ''));

describe('a VM with no NIC on our bridges', () => {
  /** The engine says that it was started, and nothing else. */
  async function withSealedEngine(act: () => Promise<void>): Promise<void> {
    const engine = join(rig.drivers, 'engine.mjs');
    const real = readFileSync(engine);
    const marker = join(rig.folder, 'engine-started');
    writeFileSync(engine, `import {writeFileSync} from 'node:fs'; writeFileSync(${JSON.stringify(marker)}, '');`);
    try {
      await act();
      expect(() => readFileSync(marker)).toThrow('ENOENT');
    } finally {
      writeFileSync(engine, real);
    }
  }

  const actions = ['deploy', 'shutdown', 'cancel', 'save'] as const;
  const input = (action: string) => (action === 'deploy' ? domainOf(foreign) : actionDataOf(foreign));
  const own = (action: string) =>
    action === 'deploy' ? ['/nowhere/deployment.0', HOST_NAME] : [UUID, '/c', HOST_NAME];

  test.each(actions)('%s: arguments, input, output and exit status are those of the stock script', async (action) => {
    await withSealedEngine(async () => {
      for (const status of [0, 1, 42, 255]) {
        rig.behave(`cat > "$record/$action.stdin"; printf 'o\\377'; printf 'e\\000' >&2; exit ${status}`);
        const script = join(rig.drivers, action);
        const words = [script, ...own(action)];
        const bytes = Buffer.from(`${input(action).replaceAll('web-43', 'w\u00ff\u0080 \t')}\r\n `, 'latin1');
        const tail = `${ODD_TEXT_WORDS}; set -- "$@" 43 ${HOST_NAME}; exec "$@"`;
        const result = await run(['/bin/sh', '-c', tail, 'sh', ...words], {
          env: rig.env,
          stdin: bytes,
          cwd: rig.record,
        });
        expect(result).toMatchObject({ status, stdout: 'o\u00ff', stderr: 'e\0' });
        const seen = rig.stockRun(action);
        expect(seen.argv).toEqual([...own(action), ...ODD_TEXT, '43', HOST_NAME]);
        expect(seen.stdin).toBe(bytes.toString('latin1'));
        expect(seen.cwd).toBe(rig.record);
      }
    });
  });

  test('an argument that is no UTF-8 is refused, since it could not be handed on as it came', async () => {
    const tail = `${ODD_WORDS}; set -- "$@" 43 ${HOST_NAME}; exec "$@"`;
    const script = join(rig.drivers, 'deploy');
    const result = await run(['/bin/sh', '-c', tail, 'sh', script, ...own('deploy')], {
      env: rig.env,
      stdin: Buffer.from(domainOf(foreign)),
      cwd: rig.record,
    });
    expect(result).toMatchObject({ status: 2, stdout: '', stderr: expect.stringMatching(ONE_LINE) });
    expect(rig.runs()).toEqual([]);
  });

  test.each(['deploy', 'shutdown'])('%s with 10 MB of input passes', async (action) => {
    await withSealedEngine(async () => {
      const root = action === 'deploy' ? '<domain' : '<VM_';
      const [head = '', tail = ''] = [input(action).slice(0, 7), input(action).slice(7)];
      expect(`${head}${tail}`).toContain(root);
      const text = input(action).replace('web-43', `web-43${'0123456789abcdef'.repeat(655_360)}`);
      const result = await rig.call(action, own(action).slice(-2), 43, { stdin: text });
      expect(result).toMatchObject({ status: 0, stderr: '' });
      expect(rig.stockRun(action).stdin === text).toBe(true);
    });
  });

  test('a stock script that dies of a signal is seen to', async () => {
    rig.behave('kill -TERM $$');
    const result = await rig.call('shutdown', [UUID, HOST_NAME], 43, { stdin: actionDataOf(foreign) });
    expect(result).toMatchObject({ status: null, signal: 'SIGTERM' });
  });
});

describe('actions that are not ours', () => {
  const passing = Object.keys(ACTIONS).filter((name) => treatmentOf(name) === 'pass');

  test.each(passing)('%s passes with any arguments, no input read, and no configuration needed', async (action) => {
    rig.behave('head -c 3 > "$record/$action.stdin"; cat > "$record/rest"; printf o; printf e >&2; exit 77');
    const words = `exec 3<&0; set -- "$0"; ${ODD_WORDS}; exec "$@" <&3`;
    const result = await run(['/bin/sh', '-c', words, join(rig.drivers, action)], {
      env: { ...rig.env, KVM_IB_CONFIG: '/nowhere' },
      stdin: 'raw\0\u00ff',
      cwd: rig.record,
    });
    expect(result).toMatchObject({ status: 77, stdout: 'o', stderr: 'e' });
    expect(rig.stockRun(action)).toEqual({ argv: ODD_BYTES, stdin: 'raw', cwd: rig.record });
    expect(recorded('rest')).toBe(Buffer.from('\0\u00ff').toString('latin1'));
  });

  test('keep every exit status from 0 to 255, and signals', async () => {
    rig.behave('exit "$1"');
    const launcher = join(rig.drivers, 'resize');
    const loop = `i=0; while [ $i -lt 256 ]; do "$0" $i; echo $?; i=$((i + 1)); done`;
    const result = await run(['/bin/sh', '-c', loop, launcher], { env: rig.env });
    expect(result.stdout.trim().split('\n').map(Number)).toEqual(Array.from({ length: 256 }, (_, n) => n));
    for (const signal of ['SIGKILL', 'SIGTERM', 'SIGPIPE', 'SIGUSR1']) {
      rig.behave(`kill -${signal.slice(3)} $$`);
      expect(await rig.call('resize', [], 42)).toMatchObject({ status: null, signal });
    }
  });

  test('take no arguments at all, and many', async () => {
    rig.behave('true');
    expect(await rig.call('poll', [], null)).toMatchObject({ status: 0 });
    expect(rig.runs()).toEqual(['poll']);
    const many = Array.from({ length: 500 }, (_, n) => `word ${n}`);
    expect(await rig.call('exec', many, null)).toMatchObject({ status: 0 });
    expect(recorded('exec.argv').split('\0').slice(0, -1)).toEqual(many);
  });

  test('leave a mapped VM mapped', async () => {
    await rig.deploy(vm);
    const before = rig.snapshot();
    for (const action of ['resize', 'attach_disk', 'snapshot_create']) {
      expect(await rig.ssh(action, [UUID, HOST_NAME], 42, actionDataOf(vm))).toMatchObject({ code: 0 });
    }
    expect(rig.snapshot()).toEqual(before);
  });
});

describe('arguments that a newer OpenNebula may add', () => {
  test('behind those of today do no harm', async () => {
    const file = rig.place(vm);
    const answer = await rig.ssh('deploy', [file, HOST_NAME, 'new', ''], 42, domainOf(vm));
    expect(answer).toMatchObject({ code: 0, stderr: '' });
    expect(rig.stockRun('deploy').argv).toEqual([file, HOST_NAME, 'new', '', '42', HOST_NAME]);
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });
  });
});
