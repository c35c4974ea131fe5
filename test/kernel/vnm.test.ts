/**
 * The network driver as one_vmm_exec of each version calls it, alone, as a hook of `dummy`, and beside our VMM driver; on a
 * real kernel. The stock VMM driver is stood for by the domains of a stand-in for libvirt.
 */
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { Rig } from '../support/driver.ts';
import { actionDataOf, createRig, eventually, HOST_NAME, ONE_LINE, testVm, tool, UUID } from '../support/driver.ts';
import { inOther, makeOther, OTHER_MAC, otherIp } from '../support/fabric.ts';
import type { LibvirtStandIn } from '../support/libvirt-stand-in.ts';
import { livelyStock, startLibvirtStandIn } from '../support/libvirt-stand-in.ts';
import { requireOwnNetns } from '../support/netns.ts';
import type { TestAlias, TestVm } from '../support/vm/opennebula.ts';
import type { NetworkStep, SessionAnswer, VnmVersion } from '../support/vnm.ts';
import { callInSession, installNetworkDriver, networkCall, VNM_VERSIONS } from '../support/vnm.ts';

requireOwnNetns();

let rig: Rig;
let libvirt: LibvirtStandIn;
beforeAll(async () => {
  rig = await createRig();
  libvirt = startLibvirtStandIn(rig.folder);
  installNetworkDriver(rig.folder);
  makeOther();
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

afterEach(() => otherIp('address', 'flush', 'dev', 'fabric'));

const IP = '/usr/sbin/ip';
const MAC2 = '02:00:c0:a8:7a:02';
const MAC3 = '02:00:c0:a8:7a:03';
const one = testVm(42, [2]);
const two = testVm(42, [2, 3]);
const marked: TestVm = { ...two, nics: two.nics.map((nic, n) => ({ ...nic, attach: n === 1 })) };
const alias: TestAlias = { id: 1, parent: 0, aliasId: 0, ip: '192.168.10.205', mac: '02:00:c0:a8:0a:cd', attach: true };
const OK = { code: 0, stdout: '', stderr: '' };
const NIC0 = [2, 202, 0] as const;
const NIC1 = [3, 203, 1] as const;
const BY_ALIAS = [2, 205, 0] as const;
const newest = VNM_VERSIONS.at(-1) as VnmVersion;
type Action = 'pre' | 'post' | 'clean' | 'update_nic';

interface Caller {
  readonly version: VnmVersion;
  /** Folder below `vnm`. */
  readonly driver: string;
}

const KVM_IB: Caller = { version: newest, driver: 'kvm-ib' };
const CALLERS: readonly (Caller & { readonly name: string })[] = [
  ...VNM_VERSIONS.map((version) => ({ name: version.name, version, driver: 'kvm-ib' })),
  { name: 'a hook of dummy, 6.0 to 7.4', version: newest, driver: 'dummy' },
];

function call(
  action: Action,
  vm: TestVm,
  { version, driver }: Caller = KVM_IB,
  step: Partial<NetworkStep> = {},
  more: { readonly env?: Readonly<Record<string, string>> } = {},
): Promise<SessionAnswer> {
  const env = { ...rig.env, KVM_IB_DATASTORES: join(rig.folder, 'saved'), ...more.env };
  const made = networkCall(version, action, { vm, deployed: true, host: HOST_NAME, ...step });
  return callInSession(join(rig.folder, 'vnm', driver, action), made, env);
}

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
}

/** The same, and nothing is under way. */
function expectSettled(...wanted: readonly (readonly [number, number, number])[]): void {
  expectMapped(...wanted);
  expect(rig.phases()).toEqual(wanted.length === 0 ? {} : { 'vm-42': 'active' });
}

async function deployed(vm: TestVm, caller: Caller = KVM_IB): Promise<void> {
  expect(await call('pre', vm, caller, { deployed: false })).toEqual(OK);
  libvirt.set(
    42,
    vm.nics.map((nic) => nic.mac),
  );
  expect(await call('post', vm, caller)).toEqual(OK);
}

describe.each(CALLERS)('$name', (caller) => {
  test('deploy: the address works before the guest boots; shutdown: it goes', async () => {
    expect(await call('pre', two, caller, { deployed: false })).toEqual(OK);
    expectMapped(NIC0, NIC1);
    expect(rig.phases()).toEqual({ 'vm-42': 'pending' });
    libvirt.set(42, [MAC2, MAC3]);
    expect(await call('post', two, caller)).toEqual(OK);
    expectSettled(NIC0, NIC1);
    libvirt.remove(42);
    expect(await call('clean', two, caller)).toEqual(OK);
    expectSettled();
  });

  test('a NIC is attached and detached', async () => {
    await deployed(one, caller);
    expect(await call('pre', marked, caller)).toEqual(OK);
    expectMapped(NIC0, NIC1);
    libvirt.set(42, [MAC2, MAC3]);
    expect(await call('post', marked, caller)).toEqual(OK);
    expectSettled(NIC0, NIC1);
    libvirt.set(42, [MAC2]);
    expect(await call('clean', marked, caller)).toEqual(OK);
    expectSettled(NIC0);
  });

  test('a VM on other bridges is none of ours, whatever is wrong with it', async () => {
    const before = rig.snapshot();
    const other = testVm(43, [2], 'br0');
    for (const action of ['pre', 'post', 'clean'] as const) expect(await call(action, other, caller)).toEqual(OK);
    const odd = { ...other, nics: other.nics.map((nic) => ({ ...nic, mac: 'x', ip: 'y' })) };
    expect(await call('pre', odd, caller)).toEqual(OK);
    expect(rig.snapshot()).toEqual(before);
  });
});

describe('before a VM comes', () => {
  test.each([
    ['an address outside the range', { ...one, nics: one.nics.map((nic) => ({ ...nic, ip: '192.168.122.99' })) }, 2],
    ['an address that another owner has', testVm(42, [5]), 4],
  ])('%s is refused, and nothing is left', async (_, vm, code) => {
    await rig.cli(['add', '--guest', '192.168.122.5']);
    const before = rig.snapshot();
    const answer = await call('pre', vm, KVM_IB, { deployed: false });
    expect(answer).toMatchObject({ code, stdout: '' });
    expect(answer.stderr).toMatch(ONE_LINE);
    expect(rig.snapshot()).toEqual(before);
  });

  test('the reason stands between the marks that its version looks for', async () => {
    await rig.cli(['add', '--guest', '192.168.122.5']);
    for (const version of VNM_VERSIONS) {
      const { stderr } = await call('pre', testVm(42, [5]), { version, driver: 'kvm-ib' }, { deployed: false });
      const between = /^ERROR MESSAGE --8<------\n(kvm-ib: [^\n]+\.\n)ERROR MESSAGE ------>8--\n$/.exec(stderr)?.[1];
      expect([version.name, version.vmIn === 'argument' ? between : stderr]).toEqual([
        version.name,
        expect.stringMatching(ONE_LINE),
      ]);
    }
  });

  test('clean ends what a deploy that failed has left', async () => {
    expect(await call('pre', one, KVM_IB, { deployed: false })).toEqual(OK);
    expectMapped(NIC0);
    expect(await call('clean', one, KVM_IB, { deployed: false })).toEqual(OK);
    expectSettled();
  });

  test('a migration within the host changes nothing', async () => {
    await deployed(one);
    const before = rig.snapshot();
    for (const action of ['pre', 'clean', 'post'] as const) expect(await call(action, one)).toEqual(OK);
    expect(rig.snapshot()).toEqual(before);
  });
});

describe('a VM that was deployed before', () => {
  const IB = '192.168.10.202';
  const answering = { env: { KVM_IB_PROBE_MS: '150' } };
  const anotherHost = () => otherIp('address', 'add', `${IB}/24`, 'dev', 'fabric');
  const arrives = () => libvirt.set(42, [MAC2]);
  const isMapped = () => aliases().length === 1 && rig.phases()['vm-42'] === 'active';

  test('may come from another host: nothing is in the kernel before it runs here', async () => {
    expect(await call('pre', one)).toEqual(OK);
    expectMapped();
    expect(rig.phases()).toEqual({ 'vm-42': 'pending' });
    arrives();
    expect(await call('post', one)).toEqual(OK);
    expectSettled(NIC0);
  });

  test('the engine that is left behind sees it run, even where nobody calls post', async () => {
    expect(await call('pre', one)).toEqual(OK);
    await new Promise((resolve) => setTimeout(resolve, 700));
    expectMapped();
    arrives();
    await eventually('the engine maps it', isMapped);
    expectSettled(NIC0);
  });

  test('its first frame is enough', async () => {
    expect(await call('pre', one)).toEqual(OK);
    libvirt.answers(false);
    tool(IP, 'link', 'add', 'one-42-0', 'type', 'veth', 'peer', 'name', 'guest42');
    try {
      tool(IP, 'link', 'set', 'guest42', 'netns', 'other');
      otherIp('address', 'add', '192.168.122.2/24', 'dev', 'guest42');
      otherIp('link', 'set', 'guest42', 'up');
      tool(IP, 'link', 'set', 'one-42-0', 'up');
      await new Promise((resolve) => setTimeout(resolve, 200));
      expectMapped();
      inOther('sh', '-c', 'ping -c 1 -W 1 192.168.122.1 || true');
      await eventually('the engine maps it', () => aliases().length === 1, 2000);
      expectMapped(NIC0);
    } finally {
      tool(IP, 'link', 'del', 'one-42-0');
    }
  });

  test('and is restored has its address before it runs: its checkpoint says so', async () => {
    for (const version of VNM_VERSIONS) {
      rig.reset();
      libvirt.reset();
      const checkpoint = join(rig.folder, 'saved/0/42/checkpoint');
      mkdirSync(dirname(checkpoint), { recursive: true });
      writeFileSync(checkpoint, '');
      libvirt.reason('running (restored)');
      expect(await call('pre', one, { version, driver: 'kvm-ib' })).toEqual(OK);
      expectMapped(NIC0);
      rmSync(checkpoint);
      arrives();
      expect(await call('post', one, { version, driver: 'kvm-ib' })).toEqual(OK);
      expectSettled(NIC0);
    }
  });

  test('migrates live though its source answers, and takes over from it', async () => {
    anotherHost();
    expect(await call('pre', one, KVM_IB, {}, answering)).toEqual(OK);
    expectMapped();
    libvirt.reason('paused (migrating)');
    arrives();
    await new Promise((resolve) => setTimeout(resolve, 700));
    expectMapped();
    libvirt.reason('running (migrated)');
    await eventually('the engine maps it', isMapped);
    expect(await call('post', one, KVM_IB, { host: 'kvmib02', newest: HOST_NAME }, answering)).toEqual(OK);
    expectSettled(NIC0);
  });

  test('is not given an address here that another host has, and OpenNebula cancels it', async () => {
    anotherHost();
    expect(await call('pre', one, KVM_IB, {}, answering)).toEqual(OK);
    arrives();
    const answer = await call('post', one, KVM_IB, {}, answering);
    expect(answer).toMatchObject({ code: 4, stdout: '' });
    expect(answer.stderr).toMatch(ONE_LINE);
    expect(answer.stderr).toContain(OTHER_MAC);
    await eventually('the engine gives up', () => Object.keys(rig.phases()).length === 0);
    libvirt.remove(42);
    expect(await call('clean', one, KVM_IB, {}, answering)).toEqual(OK);
    expectSettled();
  });

  test('a first deploy is refused before it begins where another host has its address', async () => {
    anotherHost();
    const answer = await call('pre', one, KVM_IB, { deployed: false }, answering);
    expect(answer).toMatchObject({ code: 4, stdout: '' });
    expect(answer.stderr).toContain(OTHER_MAC);
    expectSettled();
  });

  test('a second claim of the same VM takes the first over: drivers of two NICs, a deploy that is tried again', async () => {
    for (const deployed of [false, true, false]) {
      expect(await call('pre', one, KVM_IB, { deployed })).toEqual(OK);
      expect(rig.phases()).toEqual({ 'vm-42': 'pending' });
    }
    arrives();
    expect(await call('post', one)).toEqual(OK);
    expectSettled(NIC0);
  });

  test('that does not come is released by clean, and its engine ends', async () => {
    for (const deployed of [false, true]) {
      expect(await call('pre', one, KVM_IB, { deployed })).toEqual(OK);
      expect(engines()).not.toEqual([]);
      expect(await call('clean', one, KVM_IB, { deployed })).toEqual(OK);
      expectSettled();
      await eventually('the engine ends', () => engines().length === 0);
    }
  });
});

/** Engines of our network driver that are left behind, without those that repeat announcements. */
function engines(): readonly string[] {
  return readdirSync('/proc').filter((pid) => {
    try {
      const argv = readFileSync(`/proc/${pid}/cmdline`, 'latin1').split('\0').filter(Boolean);
      return argv.length === 2 && argv[1] === join(rig.folder, 'vnm/kvm-ib/engine.mjs');
    } catch {
      return false;
    }
  });
}

describe('an alias', () => {
  const coming = { ...one, aliases: [alias] };

  test('is looked at before, comes into effect behind the attach, and goes with clean', async () => {
    await deployed(one);
    const before = rig.snapshot();
    expect(await call('pre', coming)).toEqual(OK);
    expect(rig.snapshot()).toEqual(before);
    expect(await call('post', coming)).toEqual(OK);
    expectSettled(BY_ALIAS);
    expect(await call('clean', coming)).toEqual(OK);
    expectSettled(NIC0);
  });

  test('is refused by pre where its address is taken, before anything is done', async () => {
    await deployed(one);
    await rig.cli(['add', '--guest', '192.168.122.5']);
    const before = rig.snapshot();
    const answer = await call('pre', coming);
    expect(answer).toMatchObject({ code: 4, stdout: '' });
    expect(answer.stderr).toMatch(ONE_LINE);
    expect(rig.snapshot()).toEqual(before);
  });

  test('is refused by post too, which takes the attach back', async () => {
    await deployed(one);
    await rig.cli(['add', '--guest', '192.168.122.5']);
    expect(await call('post', coming)).toMatchObject({ code: 4 });
    expect(pairs()).toEqual({ 2: '202', 5: '205' });
  });
});

describe('behind a step', () => {
  test('an attach that failed, though OpenNebula never says so, ends with the next reconcile', async () => {
    await deployed(one);
    expect(await call('pre', marked)).toEqual(OK);
    expectMapped(NIC0, NIC1);
    expect(await rig.cli(['reconcile'])).toMatchObject({ status: 0 });
    expectSettled(NIC0);
  });

  test('a NIC of a VM that is off is left to its next deploy', async () => {
    expect(await call('pre', marked)).toEqual(OK);
    expectSettled();
  });

  test('what the domain has counts: a detach in vain keeps the NIC', async () => {
    await deployed(two);
    expect(await call('clean', marked)).toEqual(OK);
    expectSettled(NIC0, NIC1);
  });

  test('a VM whose addresses another has by then: cancelled if it booted, left running if it came with its memory', async () => {
    libvirt.set(42, [MAC2]);
    await rig.cli(['add', '--guest', '192.168.122.2']);
    const refused = await call('post', one);
    expect(refused).toMatchObject({ code: 4, stdout: '' });
    expect(refused.stderr).toMatch(ONE_LINE);
    libvirt.reason('running (restored)');
    const left = await call('post', one);
    expect(left).toMatchObject({ code: 0, stdout: '' });
    expect(left.stderr).toMatch(/^ERROR: kvm-ib: Cannot give 192\.168\.122\.2 to vm-42: .*\n$/);
  });

  test('where libvirt does not answer nothing is released', async () => {
    await deployed(one);
    libvirt.answers(false);
    const answer = await call('clean', one);
    expect(answer).toMatchObject({ code: 0, stdout: '' });
    expect(answer.stderr).toMatch(/^INFO: kvm-ib: libvirt does not answer: [^\n]+\n$/);
    expectSettled(NIC0);
  });

  test('update_nic brings a running guest to what the NIC says now', async () => {
    await deployed(one);
    const changed = { ...one, nics: one.nics.map((nic) => ({ ...nic, ibIp: '192.168.10.206' })) };
    expect(await call('update_nic', changed)).toEqual(OK);
    expectSettled([2, 206, 0]);
    await rig.cli(['add', '--guest', '192.168.122.5']);
    const taken = { ...one, nics: one.nics.map((nic) => ({ ...nic, ibIp: '192.168.10.205' })) };
    expect(await call('update_nic', taken)).toMatchObject({ code: 4 });
    expect(pairs()).toEqual({ 2: '206', 5: '205' });
  });
});

describe('clean never keeps a VM from ending', () => {
  let configuration = '';
  beforeEach(() => {
    configuration = readFileSync(rig.config, 'utf8');
  });
  afterEach(() => writeFileSync(rig.config, configuration));

  test('a broken configuration', async () => {
    await deployed(one);
    libvirt.remove(42);
    writeFileSync(rig.config, 'networks: 7\n');
    const answer = await call('clean', one);
    expect(answer).toMatchObject({ code: 0, stdout: '' });
    expect(answer.stderr).toMatch(/^ERROR: kvm-ib: [^\n]+\n$/);
    writeFileSync(rig.config, configuration);
    expect(await call('clean', one)).toEqual(OK);
    expectSettled();
  });

  test('a VM that cannot be read', async () => {
    for (const stdin of ['', 'PFZNP\n', `${Buffer.from('<VM><ID>42</ID>').toString('base64')}\n`]) {
      const answer = await callInSession(join(rig.folder, 'vnm/kvm-ib/clean'), { argv: [], stdin }, rig.env);
      expect(answer).toMatchObject({ code: 0, stdout: '' });
      expect(answer.stderr).toMatch(/^ERROR: kvm-ib: [^\n]+\n$/);
      const failed = await callInSession(join(rig.folder, 'vnm/kvm-ib/pre'), { argv: [], stdin }, rig.env);
      expect(failed).toMatchObject({ code: 2, stdout: '' });
      expect(failed.stderr).toMatch(ONE_LINE);
    }
  });

  test('NICs that contradict each other: the VM has ended, so all goes', async () => {
    await deployed(one);
    libvirt.remove(42);
    const answer = await call('clean', { ...one, nics: [...one.nics, ...one.nics] });
    expect(answer).toMatchObject({ code: 0, stdout: '' });
    expect(answer.stderr).toMatch(/^ERROR: kvm-ib: Cannot map NIC 1 of VM 42: [^\n]+\n$/);
    expectSettled();
  });
});

describe('both drivers at once', () => {
  const vmm = (action: string, args: readonly string[], vm: TestVm) => rig.ssh(action, args, vm.id, actionDataOf(vm));

  test('deploy, attach, detach, shutdown: the same as with either', async () => {
    expect(await call('pre', one, KVM_IB, { deployed: false })).toEqual(OK);
    expect(await rig.deploy(one)).toMatchObject({ status: 0, stderr: '' });
    const standing = rig.snapshot();
    expect(await call('post', one)).toEqual(OK);
    expect(rig.snapshot()).toEqual(standing);
    expectSettled(NIC0);

    expect(await call('pre', marked)).toEqual(OK);
    expect(await vmm('attach_nic', [UUID, MAC3, 'virbr1', '-', 'dummy', 'one-42-1'], marked)).toMatchObject(OK);
    expect(await call('post', marked)).toEqual(OK);
    expectSettled(NIC0, NIC1);
    expect(await vmm('detach_nic', [UUID, MAC3], marked)).toMatchObject(OK);
    expect(await call('clean', marked)).toEqual(OK);
    expectSettled(NIC0);

    expect(await vmm('shutdown', [UUID, HOST_NAME], one)).toMatchObject(OK);
    expect(await call('clean', one)).toEqual(OK);
    expectSettled();
  });

  test('a deploy that fails leaves nothing', async () => {
    expect(await call('pre', one, KVM_IB, { deployed: false })).toEqual(OK);
    rig.behave('cat > /dev/null; exit 255');
    expect(await rig.deploy(one)).toMatchObject({ status: 255 });
    expect(await call('clean', one, KVM_IB, { deployed: false })).toEqual(OK);
    expectSettled();
  });

  test('an alias of a VM without context comes and goes, though the VMM driver is called behind', async () => {
    await deployed(one);
    const coming = { ...one, aliases: [alias] };
    const rest = async () => {
      expect(await vmm('prereconfigure', [UUID, 'sda'], coming)).toMatchObject(OK);
      expect(await vmm('reconfigure', [UUID, 'sda', '/disk.1'], coming)).toMatchObject(OK);
    };
    expect(await call('pre', coming, { version: newest, driver: 'dummy' })).toEqual(OK);
    expect(await call('post', coming, { version: newest, driver: 'dummy' })).toEqual(OK);
    await rest();
    expectSettled(BY_ALIAS);
    expect(await call('clean', coming, { version: newest, driver: 'dummy' })).toEqual(OK);
    await rest();
    expectSettled(NIC0);
  });
});
