/**
 * The actions on a VM that is there, each spoken as one_vmm_exec speaks it: stdout, stderr, exit status, kernel and files.
 * Stock scripts change a stand-in for libvirt, so that what the domain has and what the kernel holds can be compared.
 */
import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { Rig } from '../support/driver.ts';
import { actionDataOf, createRig, eventually, HOST_NAME, ONE_LINE, testVm, tool, UUID } from '../support/driver.ts';
import type { LibvirtStandIn } from '../support/libvirt-stand-in.ts';
import { livelyStock, startLibvirtStandIn } from '../support/libvirt-stand-in.ts';
import { requireOwnNetns } from '../support/netns.ts';
import type { DriverAnswer, TestAlias, TestVm } from '../support/vm/opennebula.ts';

requireOwnNetns();

let rig: Rig;
let libvirt: LibvirtStandIn;
beforeAll(async () => {
  rig = await createRig();
  libvirt = startLibvirtStandIn(rig.folder);
});
afterAll(() => {
  libvirt?.stop();
  rig?.remove();
});
beforeEach(() => {
  rig.reset();
  libvirt.reset();
  rig.behave(livelyStock(libvirt));
});

const MAC2 = '02:00:c0:a8:7a:02';
const MAC3 = '02:00:c0:a8:7a:03';
const one = testVm(42, [2]);
const two = testVm(42, [2, 3]);
/** VM 42 with its second NIC marked, as while it is attached or detached. */
const marked: TestVm = { ...two, nics: two.nics.map((nic, n) => ({ ...nic, attach: n === 1 })) };
const OK = { code: 0, stdout: '', stderr: '' };

/** IB addresses on the link with their labels, in order. */
function aliases(): readonly string[] {
  const listing = tool('/usr/sbin/ip', '-o', '-4', 'addr', 'show', 'dev', 'ib0');
  return [...listing.matchAll(/inet 192\.168\.10\.(\d+)\/32 scope global (\S+?)\\/g)]
    .map((m) => `${m[1]} ${m[2]}`)
    .sort();
}

/** `guest number -> IB number` of the pairs in the table. */
function pairs(): Readonly<Record<string, string>> {
  const map = tool('/usr/sbin/nft', 'list', 'map', 'ip', 'kvm_ib', 'guest_to_ib');
  return Object.fromEntries(
    [...map.matchAll(/192\.168\.122\.(\d+)[^:]*(?:comment "[^"]*")? : 192\.168\.10\.(\d+)/g)].map((m) => [m[1], m[2]]),
  );
}

/** The kernel holds exactly these, pairs and aliases: guest number, IB number, NIC. */
function expectMapped(...wanted: readonly (readonly [number, number, number])[]): void {
  expect(pairs()).toEqual(Object.fromEntries(wanted.map(([guest, ib]) => [String(guest), String(ib)])));
  expect(aliases()).toEqual(wanted.map(([, ib, nic]) => `${ib} ib0:42-${nic}`).sort());
  expect(rig.phases()).toEqual(wanted.length === 0 ? {} : { 'vm-42': 'active' });
}

const NIC0 = [2, 202, 0] as const;
const NIC1 = [3, 203, 1] as const;

async function deployed(vm: TestVm = one): Promise<void> {
  const answer = await rig.deploy(vm);
  expect(answer).toMatchObject({ status: 0, stderr: '' });
}

const call = (action: string, args: readonly string[], vm: TestVm): Promise<DriverAnswer> =>
  rig.ssh(action, args, vm.id, actionDataOf(vm));
const attach = (vm = marked) => call('attach_nic', [UUID, MAC3, 'virbr1', '-', 'dummy', 'one-42-1'], vm);
const detach = (vm = marked, mac = MAC3) => call('detach_nic', [UUID, mac], vm);
const prereconfigure = (vm: TestVm) => call('prereconfigure', [UUID, 'sda'], vm);
const reconfigure = (vm: TestVm) => call('reconfigure', [UUID, 'sda', '/disk.1'], vm);
const reconcile = () => rig.cli(['reconcile']);

describe('deploy', () => {
  test('of a VM whose only NIC has IB_IP=none leaves nothing to reconcile: its tap is a port of our bridge all the same', async () => {
    tool('/usr/sbin/ip', 'link', 'set', 'virbr1', 'type', 'bridge', 'nf_call_iptables', '1');
    rig.behave(
      `/usr/sbin/ip link add one-42-0 type veth peer name guest42 && /usr/sbin/ip link set one-42-0 master virbr1\n${livelyStock(libvirt)}`,
    );
    try {
      const answer = await rig.deploy({ ...one, nics: one.nics.map((nic) => ({ ...nic, ibIp: 'none' })) });
      expect(answer).toMatchObject({ status: 0, stdout: `${UUID}\n` });
      expect(await rig.cli(['status', '--json'])).toMatchObject({ status: 0 });
      expectMapped();
    } finally {
      tool('/usr/sbin/ip', 'link', 'set', 'virbr1', 'type', 'bridge', 'nf_call_iptables', '0');
      tool('/usr/sbin/ip', 'link', 'del', 'one-42-0');
    }
  });
});

describe.each(['shutdown', 'cancel'])('%s', (action) => {
  const end = (stdin: string) => rig.ssh(action, [UUID, HOST_NAME], 42, stdin);

  test('of a VM whose data is cut off, as behind a line EOT in one of its values, ends and releases it', async () => {
    await deployed();
    const answer = await end(actionDataOf(one).slice(0, -200));
    expect(answer.code).toBe(0);
    expect(answer.stderr).toMatch(/^ERROR: kvm-ib: Cannot read the VM data [^\n]*\n$/);
    expect(libvirt.domains().size).toBe(0);
    expectMapped();
  });

  test('of a VM whose data did not come at all ends and releases it', async () => {
    await deployed();
    const answer = await rig.call(action, [UUID, HOST_NAME], 42);
    expect(answer).toMatchObject({ status: 0, stdout: '' });
    expect(answer.stderr).toMatch(/^ERROR: kvm-ib: Cannot read the VM data [^\n]*empty[^\n]*\n$/);
    expectMapped();
  });

  test('is not held up by a broken configuration: what stays behind is released when it is mended', async () => {
    await deployed();
    const config = readFileSync(rig.config, 'latin1');
    writeFileSync(rig.config, 'networks: [');
    const answer = await end(actionDataOf(one));
    expect(answer.code).toBe(0);
    expect(answer.stderr).toMatch(/^ERROR: kvm-ib: Cannot use the configuration [^\n]*brings it right\n$/);
    expect(libvirt.domains().size).toBe(0);
    writeFileSync(rig.config, config);
    expect((await reconcile()).status).toBe(0);
    expectMapped();
  });
});

describe('save', () => {
  const save = () => call('save', [UUID, join(rig.folder, 'checkpoint'), HOST_NAME], one);

  test('releases the VM after the stock script saved it', async () => {
    await deployed();
    expect(await save()).toMatchObject(OK);
    expectMapped();
    expect(rig.stockRun('save').stdin).toBe(`${actionDataOf(one)}\n`);
  });

  test('that fails leaves what the domain has', async () => {
    await deployed();
    rig.behave('cat > /dev/null; echo "Could not save" >&2; exit 1');
    expect(await save()).toMatchObject({ code: 1, stdout: '', stderr: 'Could not save\n' });
    expectMapped(NIC0);
  });

  test('that fails after the domain ended releases it: a late step of the script', async () => {
    await deployed();
    rig.behave(`cat > /dev/null; rm '${libvirt.folder}/one-42'; echo "Could not export" >&2; exit 1`);
    expect(await save()).toMatchObject({ code: 1, stderr: 'Could not export\n' });
    expectMapped();
  });
});

describe('restore', () => {
  const checkpoint = () => join(rig.folder, 'checkpoint');
  const restore = (vm = one) => call('restore', [checkpoint(), HOST_NAME, UUID], vm);
  const saved = () => writeFileSync(checkpoint(), `${MAC2}\n`);

  test('maps before the guest runs, also from a checkpoint that another host made', async () => {
    saved();
    rig.behave(`/usr/sbin/ip -o -4 addr show dev ib0 > "$record/aliases"\n${livelyStock(libvirt)}`);
    expect(await restore()).toMatchObject(OK);
    expect(readFileSync(join(rig.record, 'aliases'), 'latin1')).toContain('ib0:42-0');
    expectMapped(NIC0);
  });

  test('that fails leaves nothing', async () => {
    const before = rig.snapshot();
    expect((await restore()).code).not.toBe(0);
    expect(rig.snapshot()).toEqual(before);
  });

  test('of a pmsuspended domain, which never ended, changes nothing, and keeps the mapping when it does not wake up', async () => {
    await deployed();
    expect(await restore()).toMatchObject(OK);
    expectMapped(NIC0);
    rig.behave('cat > /dev/null; echo "Could not wake up VM" >&2; exit 1');
    expect(await restore()).toMatchObject({ code: 1, stderr: 'Could not wake up VM\n' });
    expectMapped(NIC0);
  });

  test('that takes long is left alone by reconcile, whether libvirt answers or not', async () => {
    saved();
    rig.behave(`until [ -e "$record/go" ]; do sleep 0.05; done\n${livelyStock(libvirt)}`);
    const restoring = restore();
    await eventually('the stock script runs', () => rig.runs().includes('restore'));
    for (const answers of [true, false]) {
      libvirt.answers(answers);
      expect((await reconcile()).stdout).toContain('left     vm-42: its action is under way');
      expect([aliases(), pairs()]).toEqual([['202 ib0:42-0'], { 2: '202' }]);
    }
    libvirt.answers(true);
    writeFileSync(join(rig.record, 'go'), '');
    expect(await restoring).toMatchObject(OK);
    expectMapped(NIC0);
  });

  test('of a VM whose address another VM has is refused before the stock script', async () => {
    expect(await rig.deploy(testVm(44, [2]))).toMatchObject({ status: 0 });
    saved();
    const answer = await restore();
    expect(answer).toMatchObject({ code: 4, stdout: '', stderr: expect.stringMatching(ONE_LINE) });
    expect(answer.stderr).toMatch(/vm-42.*vm-44/);
    expect(rig.runs()).toEqual(['deploy']);
  });
});

describe.each(['reboot', 'reset'])('%s', (action) => {
  const run = (vm = one) => call(action, [UUID, HOST_NAME], vm);

  test('changes nothing, and repairs what is not as it should be before the stock script runs', async () => {
    await deployed();
    const before = rig.snapshot();
    expect(await run()).toMatchObject(OK);
    expect({ ...rig.snapshot(), state: {} }).toEqual({ ...before, state: {} });
    tool('/usr/sbin/ip', 'address', 'del', '192.168.10.202/32', 'dev', 'ib0');
    rig.behave(`/usr/sbin/ip -o -4 addr show dev ib0 > "$record/aliases"\n${livelyStock(libvirt)}`);
    expect(await run()).toMatchObject(OK);
    expect(readFileSync(join(rig.record, 'aliases'), 'latin1')).toContain('ib0:42-0');
    expectMapped(NIC0);
  });

  test('that fails leaves the VM mapped', async () => {
    await deployed();
    rig.behave('cat > /dev/null; echo no >&2; exit 1');
    expect(await run()).toMatchObject({ code: 1, stderr: 'no\n' });
    expectMapped(NIC0);
  });

  test('is not held up by a mapping that cannot be: the guest keeps what it has', async () => {
    await deployed();
    expect(await rig.deploy(testVm(44, [3]))).toMatchObject({ status: 0 });
    libvirt.set(42, [MAC2, MAC3]);
    const answer = await run(two);
    expect(answer.code).toBe(0);
    expect(answer.stderr).toMatch(/^ERROR: kvm-ib: Cannot give 192\.168\.122\.3 to vm-42: vm-44[^\n]*\n$/);
    expect(rig.runs()).toContain(action);
    expect(pairs()).toEqual({ 2: '202', 3: '203' });
  });

  test('is not held up by a broken configuration either', async () => {
    await deployed();
    writeFileSync(rig.config, 'networks: [');
    const answer = await run();
    expect(answer.code).toBe(0);
    expect(answer.stderr).toMatch(/^ERROR: kvm-ib: Cannot use the configuration [^\n]*The guest keeps what it has\n$/);
    expect(rig.runs()).toContain(action);
    expectMapped(NIC0);
  });

  test('is not held up by data that did not come', async () => {
    await deployed();
    const answer = await rig.call(action, [UUID, HOST_NAME], 42);
    expect(answer).toMatchObject({ status: 0, stdout: '' });
    expect(answer.stderr).toMatch(/^ERROR: kvm-ib: [^\n]*The guest keeps what it has\n$/);
    expect(rig.runs()).toContain(action);
    expectMapped(NIC0);
  });

  test('maps no NIC that the domain lacks, as after a detach whose last step failed', async () => {
    await deployed();
    expect(await run(two)).toMatchObject(OK);
    expectMapped(NIC0);
  });

  test('keeps a NIC that the domain has and OpenNebula forgot, as after an attach whose last step failed', async () => {
    await deployed(two);
    expect(await run(one)).toMatchObject(OK);
    expectMapped(NIC0, NIC1);
  });

  test('brings the guest to a range that changed', async () => {
    await deployed();
    const config = readFileSync(rig.config, 'latin1');
    writeFileSync(rig.config, config.replace('192.168.10.202-192.168.10.206', '192.168.10.212-192.168.10.216'));
    expect(await run()).toMatchObject(OK);
    expectMapped([2, 212, 0]);
  });
});

describe('attach_nic', () => {
  test('maps the new NIC before the stock script plugs it in, beside those that are there', async () => {
    await deployed();
    rig.behave(`/usr/sbin/ip -o -4 addr show dev ib0 > "$record/aliases"\n${livelyStock(libvirt)}`);
    expect(await attach()).toMatchObject(OK);
    expect(readFileSync(join(rig.record, 'aliases'), 'latin1')).toContain('ib0:42-1');
    expectMapped(NIC0, NIC1);
    expect(rig.stockRun('attach_nic').argv).toEqual([UUID, MAC3, 'virbr1', '-', 'dummy', 'one-42-1', '42', HOST_NAME]);
  });

  test('of the first NIC on our bridge maps the VM', async () => {
    libvirt.set(42, []);
    const first = { ...marked, nics: marked.nics.slice(1).map((nic) => ({ ...nic, id: 1 })) };
    expect(await attach(first)).toMatchObject(OK);
    expectMapped(NIC1);
  });

  test('that fails leaves the NICs that are there', async () => {
    await deployed();
    rig.behave('cat > /dev/null; echo "Could not attach NIC" >&2; exit 1');
    expect(await attach()).toMatchObject({ code: 1, stderr: 'Could not attach NIC\n' });
    expectMapped(NIC0);
  });

  test('that fails although the domain has the NIC keeps it mapped, and says so', async () => {
    await deployed();
    rig.behave(`cat > /dev/null; echo ${MAC3} >> '${libvirt.folder}/one-42'; exit 1`);
    const answer = await attach();
    expect(answer.code).toBe(1);
    expect(answer.stderr).toMatch(
      /^INFO: kvm-ib: attach_nic failed, but [^\n]*192\.168\.122\.3 <-> 192\.168\.10\.203[^\n]*\n$/,
    );
    expectMapped(NIC0, NIC1);
  });

  test('of a NIC whose address another VM has is refused before the stock script', async () => {
    await deployed();
    expect(await rig.deploy(testVm(44, [3]))).toMatchObject({ status: 0 });
    const before = rig.snapshot();
    const answer = await attach();
    expect(answer).toMatchObject({ code: 4, stdout: '', stderr: expect.stringMatching(ONE_LINE) });
    expect(answer.stderr).toMatch(/vm-42.*vm-44/);
    expect(rig.runs()).not.toContain('attach_nic');
    expect(rig.snapshot()).toEqual(before);
  });

  test('of a NIC outside the range is refused, naming NIC and range', async () => {
    await deployed();
    const outside = {
      ...marked,
      nics: [...one.nics, { bridge: 'virbr1', mac: MAC3, ip: '192.168.122.77', attach: true }],
    };
    const answer = await attach(outside);
    expect(answer).toMatchObject({ code: 2, stderr: expect.stringMatching(ONE_LINE) });
    expect(answer.stderr).toMatch(/NIC 1 of VM 42.*192\.168\.122\.77.*192\.168\.122\.2-192\.168\.122\.6/);
    expect(rig.runs()).not.toContain('attach_nic');
  });

  test('honours IB_IP of the NIC, an address and none', async () => {
    await deployed();
    const named = (ibIp: string) => ({
      ...marked,
      nics: marked.nics.map((nic) => (nic.attach ? { ...nic, ibIp } : nic)),
    });
    expect(await attach(named('192.168.10.206'))).toMatchObject(OK);
    expectMapped(NIC0, [3, 206, 1]);
    expect(await detach(named('192.168.10.206'))).toMatchObject(OK);
    expectMapped(NIC0);
    expect(await attach(named('none'))).toMatchObject({
      code: 0,
      stderr: expect.stringMatching(/^INFO: kvm-ib: .*none\n$/),
    });
    expectMapped(NIC0);
  });

  test('on a bridge that is none of ours leaves the VM as it is', async () => {
    await deployed();
    const foreign = { ...marked, nics: [...one.nics, { bridge: 'br0', mac: MAC3, ip: '10.0.0.3', attach: true }] };
    expect(await call('attach_nic', [UUID, MAC3, 'br0', '-', 'bridge', 'one-42-1'], foreign)).toMatchObject(OK);
    expectMapped(NIC0);
  });

  test('leaves the mapping of the other NICs alone, whatever the configuration has become', async () => {
    await deployed();
    const config = readFileSync(rig.config, 'latin1');
    writeFileSync(
      rig.config,
      config
        .replace('122.2-192.168.122.6', '122.3-192.168.122.7')
        .replace('10.202-192.168.10.206', '10.213-192.168.10.217'),
    );
    const answer = await attach();
    expect(answer.code, answer.stderr).toBe(0);
    expect(pairs()).toEqual({ 2: '202', 3: '213' });
  });

  test('of a VM that is powered off is no matter of ours', async () => {
    rig.behave('cat > /dev/null');
    expect(await attach({ ...marked, lcmState: 65 })).toMatchObject(OK);
    expectMapped();
  });

  test('whose driver is killed half-way leaves what the domain has, after one reconcile', async () => {
    for (const has of [false, true]) {
      rig.reset();
      libvirt.reset();
      rig.behave(livelyStock(libvirt));
      await deployed();
      rig.behave(
        `cat > /dev/null; ${has ? `echo ${MAC3} >> '${libvirt.folder}/one-42';` : ''} echo > "$record/there"; exec sleep 30`,
      );
      await killed('attach_nic', [UUID, MAC3, 'virbr1', '-', 'dummy', 'one-42-1'], marked);
      expect(rig.phases()).toEqual({ 'vm-42': 'pending' });
      expect((await reconcile()).status).toBe(0);
      if (has) expectMapped(NIC0, NIC1);
      else expectMapped(NIC0);
    }
  });
});

/** Runs an action whose stock script writes `there` and sleeps, and kills driver and script then. */
async function killed(action: string, args: readonly string[], vm: TestVm): Promise<void> {
  const result = rig.call(action, args, vm.id, {
    stdin: actionDataOf(vm),
    started: (child) => {
      void eventually('the stock script has begun', () => existsSync(join(rig.record, 'there'))).then(() => {
        rmSync(join(rig.record, 'there'));
        const children = readFileSync(`/proc/${child.pid}/task/${child.pid}/children`, 'latin1');
        child.kill('SIGKILL');
        for (const pid of children.trim().split(' ').map(Number)) {
          const comm = readFileSync(`/proc/${pid}/comm`, 'latin1').trim();
          if (comm !== 'node') process.kill(pid, 'SIGKILL');
        }
      });
    },
  });
  expect(await result).toMatchObject({ signal: 'SIGKILL' });
}

describe('detach_nic', () => {
  test('takes exactly that NIC away, after the stock script unplugged it', async () => {
    await deployed(two);
    rig.behave(`/usr/sbin/ip -o -4 addr show dev ib0 > "$record/aliases"\n${livelyStock(libvirt)}`);
    expect(await detach()).toMatchObject(OK);
    expect(readFileSync(join(rig.record, 'aliases'), 'latin1')).toContain('ib0:42-1');
    expectMapped(NIC0);
  });

  test('of the last NIC leaves no file', async () => {
    await deployed();
    const last = { ...one, nics: one.nics.map((nic) => ({ ...nic, attach: true })) };
    expect(await detach(last, MAC2)).toMatchObject(OK);
    expectMapped();
  });

  test('that fails leaves the NIC that the domain still has', async () => {
    await deployed(two);
    rig.behave('cat > /dev/null; echo "Error detaching interface" >&2; exit 3');
    expect(await detach()).toMatchObject({ code: 3, stderr: 'Error detaching interface\n' });
    expectMapped(NIC0, NIC1);
  });

  test('that fails although the NIC has gone releases it', async () => {
    await deployed(two);
    rig.behave(`cat > /dev/null; sed -i /${MAC3}/d '${libvirt.folder}/one-42'; exit 3`);
    expect(await detach()).toMatchObject({ code: 3, stderr: '' });
    expectMapped(NIC0);
  });

  test('believes the stock script where libvirt does not answer', async () => {
    await deployed(two);
    libvirt.answers(false);
    expect(await detach()).toMatchObject(OK);
    expectMapped(NIC0);
  });

  test('of an alias, which OpenNebula calls when its attach failed, leaves the NIC and what it had', async () => {
    await deployed();
    const withAlias = aliased({ attach: true });
    expect(await prereconfigure(withAlias)).toMatchObject(OK);
    expect(await detach(withAlias, ALIAS.mac)).toMatchObject(OK);
    expectMapped(NIC0);
  });

  test('whose driver is killed half-way leaves what the domain has, after one reconcile', async () => {
    for (const has of [false, true]) {
      rig.reset();
      libvirt.reset();
      rig.behave(livelyStock(libvirt));
      await deployed(two);
      rig.behave(
        `cat > /dev/null; ${has ? '' : `sed -i /${MAC3}/d '${libvirt.folder}/one-42';`} echo > "$record/there"; exec sleep 30`,
      );
      await killed('detach_nic', [UUID, MAC3], marked);
      expect((await reconcile()).status).toBe(0);
      if (has) expectMapped(NIC0, NIC1);
      else expectMapped(NIC0);
    }
  });

  test('behind it prereconfigure and reconfigure, which still carry the NIC, do not bring it back', async () => {
    for (const answers of [true, false]) {
      rig.reset();
      libvirt.reset();
      rig.behave(livelyStock(libvirt));
      await deployed(two);
      libvirt.answers(answers);
      expect(await detach()).toMatchObject(OK);
      expect(await prereconfigure(marked)).toMatchObject(OK);
      expect(await reconfigure(marked)).toMatchObject(OK);
      expectMapped(NIC0);
    }
  });

  test('and behind attach_nic they do not take it away', async () => {
    for (const answers of [true, false]) {
      rig.reset();
      libvirt.reset();
      rig.behave(livelyStock(libvirt));
      await deployed();
      libvirt.answers(answers);
      expect(await attach()).toMatchObject(OK);
      expect(await prereconfigure(marked)).toMatchObject(OK);
      expect(await reconfigure(marked)).toMatchObject(OK);
      expectMapped(NIC0, NIC1);
    }
  });
});

const ALIAS: TestAlias = { id: 2, parent: 0, aliasId: 0, ip: '192.168.10.205', mac: '02:00:c0:a8:0a:cd' };

/** VM 42 with an external alias of its NIC. `leaving`: its context is that of a detach; null: it has no context. */
function aliased({ attach: isMarked = false, leaving = false as boolean | null, ip = ALIAS.ip } = {}): TestVm {
  const vm = { ...one, aliases: [{ ...ALIAS, ip, attach: isMarked }] };
  return leaving === null ? vm : { ...vm, context: { leaving: leaving ? [ALIAS.id] : [] } };
}

describe('an external alias', () => {
  /** The steps of one_vmm_exec, in its order. */
  async function both(vm: TestVm): Promise<readonly DriverAnswer[]> {
    return [await prereconfigure(vm), await reconfigure(vm)];
  }

  test.each([
    ['with network context', false, true],
    ['without any', null, null],
  ] as const)('%s is attached and detached live, the same step twice as well', async (_, coming, going) => {
    await deployed();
    expect(await both(aliased({ attach: true, leaving: coming }))).toMatchObject([OK, OK]);
    expectMapped([2, 205, 0]);
    if (coming === false) {
      expect(await both(aliased({ attach: true, leaving: coming }))).toMatchObject([OK, OK]);
      expectMapped([2, 205, 0]);
    }
    expect(await both(aliased({ attach: true, leaving: going }))).toMatchObject([OK, OK]);
    expectMapped(NIC0);
    // The answer to the detach was lost, and the user tries again.
    expect(await both(aliased({ attach: true, leaving: going }))).toMatchObject([OK, OK]);
    expectMapped(NIC0);
    const anew = { ...one, aliases: [{ ...ALIAS, id: 3, attach: true }] };
    expect(await both(anew)).toMatchObject([OK, OK]);
    expectMapped([2, 205, 0]);
  });

  test('changes the address with the last step, which is the one that no other can fail after', async () => {
    await deployed();
    expect(await prereconfigure(aliased({ attach: true }))).toMatchObject(OK);
    expectMapped(NIC0);
    rig.behave('cat > /dev/null; echo "Could not insert CDROM" >&2; exit 1');
    expect(await reconfigure(aliased({ attach: true }))).toMatchObject({ code: 1, stderr: 'Could not insert CDROM\n' });
    expectMapped(NIC0);
  });

  test('whose address somebody else has is refused before the context is touched', async () => {
    await deployed();
    expect(await rig.deploy(testVm(44, [5]))).toMatchObject({ status: 0 });
    const before = rig.snapshot();
    const answer = await prereconfigure(aliased({ attach: true }));
    expect(answer).toMatchObject({ code: 4, stdout: '', stderr: expect.stringMatching(ONE_LINE) });
    expect(answer.stderr).toMatch(/192\.168\.10\.205 to vm-42.*vm-44/);
    expect(rig.runs()).not.toContain('prereconfigure');
    expect(await detach(aliased({ attach: true }), ALIAS.mac)).toMatchObject(OK);
    expect({ ...rig.snapshot(), state: {} }).toEqual({ ...before, state: {} });
  });

  test('outside the range of our networks is none of ours', async () => {
    await deployed();
    const elsewhere = aliased({ attach: true, ip: '10.9.9.9' });
    expect(await both(elsewhere)).toMatchObject([{ code: 0 }, { code: 0 }]);
    expectMapped(NIC0);
  });

  test('is kept by every later action, and given at deploy and restore', async () => {
    const vm = aliased();
    const file = rig.place(vm);
    await deployed(vm);
    expect(existsSync(join(file, '../vm.xml'))).toBe(true);
    expectMapped([2, 205, 0]);
    for (const action of ['reboot', 'reset']) {
      expect(await call(action, [UUID, HOST_NAME], vm)).toMatchObject(OK);
      expectMapped([2, 205, 0]);
    }
    expect(await reconfigure(vm)).toMatchObject(OK);
    expectMapped([2, 205, 0]);
    const checkpoint = join(rig.folder, 'checkpoint');
    expect(await call('save', [UUID, checkpoint, HOST_NAME], vm)).toMatchObject(OK);
    expect(await call('restore', [checkpoint, HOST_NAME, UUID], vm)).toMatchObject(OK);
    expectMapped([2, 205, 0]);
  });
});

test('a NIC that the guest lets go late, or that is detached by hand, is gone after one reconcile', async () => {
  await deployed(two);
  libvirt.set(42, [MAC2]);
  expect((await reconcile()).status).toBe(0);
  expectMapped(NIC0);
});

describe('snapshot_revert', () => {
  const revert = (vm: TestVm) => call('snapshot_revert', [UUID, 'snap-0'], vm);

  test('brings the mappings to the NICs that the domain has afterwards', async () => {
    await deployed(two);
    writeFileSync(join(rig.record, 'snapshot'), `${MAC2}\n`);
    expect(await revert(two)).toMatchObject(OK);
    expectMapped(NIC0);
    writeFileSync(join(rig.record, 'snapshot'), `${MAC2}\n${MAC3}\n`);
    expect(await revert(two)).toMatchObject(OK);
    expectMapped(NIC0, NIC1);
  });

  test('to a snapshot of a VM that was off releases it', async () => {
    await deployed();
    rig.behave(`cat > /dev/null; rm '${libvirt.folder}/one-42'`);
    expect(await revert(one)).toMatchObject(OK);
    expectMapped();
  });

  test('that fails leaves the VM as it is', async () => {
    await deployed();
    rig.behave('cat > /dev/null; exit 1');
    expect(await revert(one)).toMatchObject({ code: 1, stderr: '' });
    expectMapped(NIC0);
  });
});

test.each(['detach_nic', 'prereconfigure', 'reconfigure', 'snapshot_revert'])(
  '%s of a VM that holds nothing passes with data that cannot be read, and of one that holds something is refused',
  async (action) => {
    const args = action === 'detach_nic' ? [UUID, MAC2] : [UUID, 'sda', '/disk.1'];
    rig.behave('cat > "$record/$action.stdin"; exit 5');
    expect(await rig.ssh(action, args, 43, '<VMM_DRIVER_ACTION_DATA><VM>')).toMatchObject({
      code: 5,
      stdout: '',
      stderr: '',
    });
    rig.behave(livelyStock(libvirt));
    await deployed();
    const answer = await rig.ssh(action, args, 42, '<VMM_DRIVER_ACTION_DATA><VM>');
    expect(answer).toMatchObject({ code: 2, stderr: expect.stringMatching(ONE_LINE) });
    expectMapped(NIC0);
  },
);

describe('actions that meet', () => {
  test('a shutdown that ends after the VM was cancelled and deployed anew leaves the new one mapped', async () => {
    await deployed();
    rig.behave(`until [ -e "$record/go" ]; do sleep 0.05; done; cat > /dev/null`);
    const shutdown = call('shutdown', [UUID, HOST_NAME], one);
    await eventually('the stock script runs', () => rig.runs().includes('shutdown'));
    rig.behave(livelyStock(libvirt));
    expect(await call('cancel', [UUID, HOST_NAME], one)).toMatchObject(OK);
    expectMapped();
    await deployed();
    writeFileSync(join(rig.record, 'go'), '');
    const late = await shutdown;
    expect(late.code).toBe(0);
    expectMapped(NIC0);
  });

  test('a cancel that overtakes a deploy: whether its domain is there decides', async () => {
    for (const runs of [true, false]) {
      rig.reset();
      libvirt.reset();
      rig.behave(
        `until [ -e "$record/go" ]; do sleep 0.05; done\n${livelyStock(libvirt)}\n${runs ? '' : 'rm "$domain"'}`,
      );
      const deploying = rig.deploy(one);
      await eventually('the stock script runs', () => rig.runs().includes('deploy'));
      rig.behave(livelyStock(libvirt));
      expect((await call('cancel', [UUID, HOST_NAME], one)).code).toBe(0);
      writeFileSync(join(rig.record, 'go'), '');
      expect((await deploying).status).toBe(0);
      if (runs) expectMapped(NIC0);
      else expectMapped();
    }
  });

  test('a deploy that comes twice: the second fails, and the VM stays mapped, whether libvirt answers or not', async () => {
    for (const answers of [true, false]) {
      rig.reset();
      libvirt.reset();
      rig.behave(`until [ -e "$record/go" ]; do sleep 0.05; done\n${livelyStock(libvirt)}`);
      const first = rig.deploy(one);
      await eventually('the stock script runs', () => rig.runs().length === 1);
      const second = rig.deploy(one);
      await eventually('it runs twice', () => rig.runs().length === 2);
      libvirt.answers(answers);
      writeFileSync(join(rig.record, 'go'), '');
      expect([(await first).status, (await second).status].sort()).toEqual([0, 255]);
      expectMapped(NIC0);
    }
  });
});

describe('the engine asked to settle a VM', () => {
  const settle = () => {
    const input = '{"version":2,"verb":"settle","vm":42}\n';
    return JSON.parse(
      execFileSync(process.execPath, [join(rig.drivers, 'engine.mjs')], { input, encoding: 'utf8', env: rig.env }),
    ) as {
      ok: boolean;
      warnings: readonly string[];
    };
  };

  test('releases it when its domain has gone, and only then', async () => {
    await deployed();
    expect(settle()).toMatchObject({ ok: true, warnings: [] });
    expectMapped(NIC0);
    libvirt.answers(false);
    expect(settle()).toMatchObject({ ok: true, warnings: [expect.stringContaining('libvirt does not answer')] });
    expectMapped(NIC0);
    libvirt.answers(true);
    libvirt.remove(42);
    expect(settle()).toMatchObject({ ok: true, warnings: [] });
    expectMapped();
    expect(settle()).toMatchObject({ ok: true });
  });
});

describe('after a boot', () => {
  test('libvirt that does not answer yet brings no address of a VM back, which may run elsewhere by now', async () => {
    await deployed();
    const path = join(rig.state, 'mappings/vm-42.json');
    writeFileSync(path, readFileSync(path, 'latin1').replace(/"bootId": "[^"]*"/, '"bootId": "of-before"'));
    tool('/usr/sbin/nft', 'delete', 'table', 'ip', 'kvm_ib');
    tool('/usr/sbin/ip', 'address', 'del', '192.168.10.202/32', 'dev', 'ib0');
    libvirt.answers(false);
    const silent = await reconcile();
    expect(silent.stdout).toContain('left     vm-42: it is from before the boot of this host');
    expect([aliases(), pairs()]).toEqual([[], {}]);
    libvirt.answers(true);
    expect((await reconcile()).status).toBe(0);
    expectMapped(NIC0);
    libvirt.answers(false);
    tool('/usr/sbin/ip', 'address', 'del', '192.168.10.202/32', 'dev', 'ib0');
    expect((await reconcile()).status).toBe(0);
    expectMapped(NIC0);
  });
});
