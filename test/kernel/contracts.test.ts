/**
 * The contract of every OpenNebula from 3.4 on: the life of a VM with the argv and the standard input of each release, through
 * the real launchers, engine and kernel. Stock scripts read standard input only where those of the release do.
 */
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { Rig } from '../support/driver.ts';
import {
  actionDataOf,
  createRig,
  domainOf,
  HOST_NAME,
  LINK_MTU,
  run,
  testVm,
  tool,
  UUID,
  writeScript,
} from '../support/driver.ts';
import type { LibvirtStandIn } from '../support/libvirt-stand-in.ts';
import { startLibvirtStandIn } from '../support/libvirt-stand-in.ts';
import { requireOwnNetns } from '../support/netns.ts';
import type { OneAnswer, Release, Stream } from '../support/one-releases.ts';
import { callByItself, callInStream, domainFor, RELEASES } from '../support/one-releases.ts';
import type { TestVm } from '../support/vm/opennebula.ts';

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
});

const ACTIONS_BY_THEMSELVES = ['reboot', 'reset', 'snapshot_revert'];
const MAC2 = '02:00:c0:a8:7a:02';
const MAC3 = '02:00:c0:a8:7a:03';
const vm = testVm(42);
const PAIR2 = '192.168.122.2 <-> 192.168.10.202';
const PAIR3 = '192.168.122.3 <-> 192.168.10.203';
const UNSEEN =
  'this OpenNebula (before 6.0) tells no more of VM 42 here. IB_IP and external aliases need VN_MAD kvm-ib (docs/install.md)';
const seenByMac = (nic: number, pair: string, mac: string) =>
  `INFO: kvm-ib: NIC ${nic} has ${pair} by its MAC ${mac}: ${UNSEEN}\n`;

/** Calls as one release does. */
class Caller {
  readonly release: Release;
  readonly stream: Stream;
  readonly id: string;
  readonly checkpoint = join(rig.folder, 'checkpoint');

  constructor(release: Release, stream: Stream = 'pipe') {
    this.release = release;
    this.stream = stream;
    this.id = release.id === 'uuid' ? UUID : 'one-42';
    const version = join(rig.folder, 'VERSION');
    rmSync(version, { force: true });
    rmSync(this.checkpoint, { force: true });
    if (release.version) writeFileSync(version, release.name);
    rig.behave(stockOf(release, this.id, libvirt.folder));
  }

  /** The stock script reads the VM data where its release sends them. */
  reads(action: string): boolean {
    if (action === 'deploy') return true;
    return ACTIONS_BY_THEMSELVES.includes(action) ? this.release.remoteData : this.release.data !== 'none';
  }

  call(action: string, args: readonly string[], payload: string): Promise<OneAnswer> {
    const env = { KVM_IB_CONFIG: rig.config, KVM_IB_STATE_DIR: rig.state, KVM_IB_PROBE_MS: '3' };
    const script = join(rig.drivers, action);
    const call = { script, args, vmId: 42, hostName: HOST_NAME, payload, env };
    return ACTIONS_BY_THEMSELVES.includes(action)
      ? callByItself(this.release, call)
      : callInStream(this.release, call, this.stream);
  }

  domain(of: TestVm = vm): string {
    return domainFor(this.release, domainOf(of), of);
  }

  deploy(of: TestVm = vm, domain = this.domain(of)): Promise<OneAnswer> {
    const file = rig.place(of);
    if (!this.release.vmXml) rmSync(join(rig.folder, 'datastores/42/vm.xml'));
    return this.call('deploy', [file, HOST_NAME], domain);
  }

  data(of: TestVm = vm): string {
    return actionDataOf(of).replaceAll(UUID, this.id);
  }

  /** Runs an action, and holds what the stock script got against what came. */
  async run(action: string, args: readonly string[], of: TestVm = vm): Promise<OneAnswer> {
    const answer = await this.call(action, args, this.data(of));
    expect(answer).toMatchObject({ code: 0, stdout: '', next: true });
    const argv = readFileSync(join(rig.record, `${action}.argv`), 'latin1');
    expect(argv).toBe([...args, '42', HOST_NAME, ''].join('\0'));
    const recorded = join(rig.record, `${action}.stdin`);
    expect(existsSync(recorded)).toBe(this.reads(action));
    if (this.reads(action)) expect(readFileSync(recorded, 'latin1').trimEnd()).toBe(this.data(of));
    return answer;
  }

  attachArguments(mac: string): readonly string[] {
    const words = { id: this.id, mac, bridge: 'virbr1', model: '-', driver: 'dummy', target: 'one-42-1' };
    return (this.release.attachNic ?? []).map((word) => words[word]);
  }
}

/** Stock scripts: what those of the release do to the domain, as far as libvirt shows it. A checkpoint holds the domain XML. */
function stockOf(release: Release, id: string, domains: string): string {
  const macs = (file: string) => `sed -n "s/.*<mac address='\\([^']*\\)'.*/\\1/p" ${file}`;
  const readers = ['deploy'];
  if (release.remoteData) readers.push(...ACTIONS_BY_THEMSELVES);
  if (release.data !== 'none') readers.push('shutdown', 'cancel', 'save', 'restore', 'attach_nic', 'detach_nic');
  return `n=$#; eval "vm=\\\${$((n - 1))}"
domain='${domains}'/one-$vm
case $action in ${readers.join(' | ')}) cat > "$record/$action.stdin" ;; esac
case $action in
  deploy) ${macs('"$record/deploy.stdin"')} > "$domain"; echo ${id} ;;
  shutdown | cancel) rm -f "$domain" ;;
  save) cp "$record/deploy.stdin" "$2" && rm "$domain" ;;
  restore) ${macs('"$1"')} > "$domain" && rm "$1" ;;
  attach_nic) echo "$2" >> "$domain" ;;
  detach_nic) sed -i "/$2/d" "$domain" ;;
  *) [ -e "$domain" ] ;;
esac
`;
}

/** IB addresses on the link, with their labels. */
function aliases(): readonly string[] {
  const listing = tool('/usr/sbin/ip', '-o', '-4', 'addr', 'show', 'dev', 'ib0');
  return [...listing.matchAll(/inet 192\.168\.10\.(\d+)\/32 scope global (\S+?)\\/g)].map((m) => `${m[1]} ${m[2]}`);
}

/** One release for each way in which standard input comes. */
const UNLIKE_IN_INPUT = ['3.4.4', '4.14.2', '5.4.15', '6.0.2', '7.4.0'];
const FIRST = '202 ib0:42-0';
const SECOND = '203 ib0:42-1';

describe.each(RELEASES.map((release) => [release.name, release] as const))('OpenNebula %s', (_, release) => {
  test('deploy, reboot, save, restore, shutdown', async () => {
    const one = new Caller(release);
    const said = release.vmXml ? '' : seenByMac(0, PAIR2, MAC2);
    const { stdout, stderr, code, next } = await one.deploy();
    expect({ stdout, stderr, code, next }).toEqual({ stdout: `${one.id}\n`, stderr: said, code: 0, next: true });
    const source = "<source bridge='virbr1'/>";
    const spliced = one.domain().replace(source, `${source}<mtu size='${LINK_MTU}'/>`);
    expect(rig.stockRun('deploy').stdin).toBe(`${spliced}\n`);
    expect(aliases()).toEqual([FIRST]);
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });

    expect((await one.run('reboot', [one.id, HOST_NAME])).stderr).toBe('');
    expect(aliases()).toEqual([FIRST]);

    expect((await one.run('save', [one.id, one.checkpoint, HOST_NAME])).stderr).toBe('');
    expect(aliases()).toEqual([]);
    expect(rig.phases()).toEqual({});

    const id = release.restoreId ? [one.id] : [];
    const restored = await one.run('restore', [one.checkpoint, HOST_NAME, ...id]);
    expect(restored.stderr).toBe(release.data === 'none' ? seenByMac(0, PAIR2, MAC2) : '');
    expect(aliases()).toEqual([FIRST]);
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });

    expect((await one.run('shutdown', [one.id, HOST_NAME])).stderr).toBe('');
    expect(aliases()).toEqual([]);
    expect(rig.phases()).toEqual({});
  });

  if (release.attachNic)
    test('attach_nic, snapshot_revert, detach_nic, cancel', async () => {
      const one = new Caller(release);
      await one.deploy();
      const two = testVm(42, [2, 3]);
      const marked = { ...two, nics: two.nics.map((nic, n) => ({ ...nic, attach: n === 1 })) };
      const attached = await one.run('attach_nic', one.attachArguments(MAC3), marked);
      expect(attached.stderr).toBe(release.data === 'none' ? seenByMac(1, PAIR3, MAC3) : '');
      expect(aliases()).toEqual([FIRST, SECOND]);
      expect((await one.run('snapshot_revert', [one.id, 'snap-0'], two)).stderr).toBe('');
      expect(aliases()).toEqual([FIRST, SECOND]);
      expect((await one.run('detach_nic', [one.id, MAC3], marked)).stderr).toBe('');
      expect(aliases()).toEqual([FIRST]);
      expect((await one.run('cancel', [one.id, HOST_NAME])).stderr).toBe('');
      expect(aliases()).toEqual([]);
    });

  test('a refused deploy shows the user the one message, whole', async () => {
    const one = new Caller(release);
    const before = rig.snapshot();
    const outside = { ...vm, nics: [{ bridge: 'virbr1', mac: '02:00:c0:a8:7a:63', ip: '192.168.122.99' }] };
    const answer = await one.deploy(outside);
    expect(answer).toMatchObject({ code: 2, stdout: '', next: true });
    const exit = release.error === 'block' ? '' : release.error === 'all' ? ' ExitCode: 2' : 'ExitCode: 2';
    const message = release.vmXml
      ? 'kvm-ib: Cannot map NIC 0 of VM 42 (virtual network "ib-nat"): its address 192.168.122.99 is outside the guests 192.168.122.2-192.168.122.6 of network "ib". Remedy: lease it an address of that range, widen the range, or set IB_IP=none on the NIC to do without an IB address.'
      : 'kvm-ib: Cannot map NIC 0 of VM 42: OpenNebula tells no address of it, and its MAC 02:00:c0:a8:7a:63 reads as 192.168.122.99, which is outside the guests 192.168.122.2-192.168.122.6 of network "ib". Remedy: let the VNM driver of kvm-ib tell its address (VN_MAD kvm-ib: docs/install.md), or lease it an address of that range whose MAC OpenNebula makes from the address.';
    expect(answer.message).toBe(`${message}${exit}`);
    expect(rig.runs()).toEqual([]);
    expect(rig.snapshot()).toEqual(before);
  });

  if (UNLIKE_IN_INPUT.includes(release.name))
    test('a VM with nothing on our bridges: the stock script as it is', async () => {
      const one = new Caller(release);
      const foreign = testVm(42, [2], 'br0');
      const before = rig.snapshot();
      const answer = await one.deploy(foreign);
      expect(answer).toMatchObject({ code: 0, stdout: `${one.id}\n`, stderr: '', next: true });
      expect(rig.stockRun('deploy').stdin).toBe(`${one.domain(foreign)}\n`);
      expect((await one.run('reboot', [one.id, HOST_NAME], foreign)).stderr).toBe('');
      expect((await one.run('save', [one.id, one.checkpoint, HOST_NAME], foreign)).stderr).toBe('');
      expect((await one.run('restore', [one.checkpoint, HOST_NAME], foreign)).stderr).toBe('');
      if (release.attachNic) {
        expect((await one.run('detach_nic', [one.id, MAC3], foreign)).stderr).toBe('');
      }
      expect((await one.run('shutdown', [one.id, HOST_NAME], foreign)).stderr).toBe('');
      expect(rig.snapshot()).toEqual(before);
    });
});

const release = (name: string): Release => {
  const found = RELEASES.find((one) => one.name === name);
  if (found === undefined) throw new Error(`no release ${name}`);
  return found;
};

/** What a state file says of one VM's only mapping. */
function mappingOf(id: number): Readonly<Record<string, unknown>> {
  const text = readFileSync(join(rig.state, `mappings/vm-${id}.json`), 'utf8');
  return (JSON.parse(text) as { mappings: Record<string, unknown>[] }).mappings[0] ?? {};
}

/** What the VNM driver's `pre` leaves, as far as another process sees it. */
function leaveNote(more: Readonly<Record<string, unknown>> = {}): void {
  const mapping = {
    network: 'ib',
    device: 'ib0',
    bridge: 'virbr1',
    guest: '192.168.122.2',
    address: '192.168.10.206',
    mac: MAC2,
    vm: 42,
    nic: 0,
    label: 'ib0:42-0',
    named: true,
    ...more,
  };
  const holder = { pid: 4194303, start: 1, bootId: readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim() };
  const file = {
    version: 1,
    owner: { kind: 'vm', vm: 42 },
    phase: { name: 'pending', action: 'pre', holder },
    mappings: [mapping],
    previous: [],
    updated: '2026-01-01T00:00:00.000Z',
  };
  mkdirSync(join(rig.state, 'mappings'), { recursive: true });
  writeFileSync(join(rig.state, 'mappings/vm-42.json'), JSON.stringify(file));
}

describe('the stream of commands', () => {
  test.each(['pipe', 'socket'] as const)('before 5.0, a %s, is left to the shell by every action', async (stream) => {
    const one = new Caller(release('4.14.2'), stream);
    expect(await one.deploy()).toMatchObject({ code: 0, next: true });
    await one.run('attach_nic', one.attachArguments(MAC3));
    await one.run('detach_nic', [one.id, MAC3]);
    await one.run('save', [one.id, one.checkpoint, HOST_NAME]);
    await one.run('restore', [one.checkpoint, HOST_NAME, one.id]);
    await one.run('cancel', [one.id, HOST_NAME]);
    expect(await one.call('migrate', [one.id, 'kvmib02', HOST_NAME], '')).toMatchObject({ next: true });
  });

  test('is left to it also where the VM was imported and its deploy id is a UUID, as since 4.14', async () => {
    const one = new Caller(release('4.14.2'));
    await one.deploy();
    await one.run('shutdown', [UUID, HOST_NAME]);
    expect(aliases()).toEqual([]);
  });

  test('reaches a stock script that reads it, as it does without us', async () => {
    const one = new Caller(release('3.4.4'));
    await one.deploy();
    rig.behave('read -r line; echo "$line"; [ $action != shutdown ] || rm -f "$record/none"');
    const answer = await one.call('reboot', [one.id, HOST_NAME], '');
    expect(answer).toMatchObject({ code: 0, stdout: '\n' });
    const shutdown = await one.call('shutdown', [one.id, HOST_NAME], '');
    expect(shutdown).toMatchObject({ code: 0, stdout: 'echo next\n', next: false });
  });

  test('is a pipe of its own since 5.0: one without an end is not waited for without end', async () => {
    const one = new Caller(release('5.4.15'));
    await one.deploy();
    const script = join(rig.drivers, 'restore');
    const text = `(printf '<VMM'; sleep 5) | '${script}' '/c' '${HOST_NAME}' 'one-42' 42 ${HOST_NAME}; echo $?`;
    const env = { ...rig.env, KVM_IB_STDIN_TIMEOUT_MS: '300' };
    const result = await run(['/bin/bash', '-s'], { env, stdin: text });
    expect(result.stdout).toBe('2\n');
    expect(result.stderr).toContain('did not end within 300 ms');
  });
});

describe('arguments', () => {
  test('an empty one vanishes before 4.2, and nothing that ends a VM minds', async () => {
    const one = new Caller(release('4.0.1'));
    await one.deploy();
    const answer = await one.call('cancel', ['', HOST_NAME], '');
    expect(answer).toMatchObject({ code: 0, stderr: '', next: true });
    expect(readFileSync(join(rig.record, 'cancel.argv'), 'latin1')).toBe([HOST_NAME, '42', HOST_NAME, ''].join('\0'));
    expect(aliases()).toEqual([]);
  });

  test.each(['', '-', 'one-42', UUID])('the deploy id %j is good for all of them', async (id) => {
    const one = new Caller(release('7.4.0'));
    await one.deploy();
    expect(await one.call('cancel', [id, HOST_NAME], one.data())).toMatchObject({ code: 0, stderr: '', next: true });
    expect(aliases()).toEqual([]);
  });

  test('attach_nic whose deploy id vanished is refused, since MAC and bridge are not where they should be', async () => {
    const one = new Caller(release('4.0.1'));
    await one.deploy();
    const answer = await one.call('attach_nic', ['', MAC3, 'virbr1', '-'], '');
    expect(answer).toMatchObject({ code: 2, stdout: '', next: true });
    expect(answer.message).toContain('the bridge virbr1 is not its third argument');
    expect(rig.runs()).toEqual(['deploy']);
    expect(aliases()).toEqual([FIRST]);
  });

  test.each(['poll', 'poll_ganglia'])('%s passes', async (action) => {
    const one = new Caller(release('3.4.4'));
    rig.behave('echo STATE=a');
    expect(await one.call(action, ['one-42', HOST_NAME], '')).toMatchObject({
      code: 0,
      stdout: 'STATE=a\n',
      next: true,
    });
  });

  test('a script that this OpenNebula does not have ends as it does without us', async () => {
    const one = new Caller(release('5.10.5'));
    const path = join(rig.stock, 'exec');
    const text = readFileSync(path, 'latin1');
    rmSync(path);
    const answer = await one.call('exec', [], '');
    writeScript(path, text);
    expect(answer).toMatchObject({ code: 127, next: true });
  });
});

describe('a deploy without vm.xml', () => {
  test('takes the address that the filter of the NIC has, whatever the MAC', async () => {
    const one = new Caller(release('3.4.4'));
    const other = { ...vm, nics: [{ bridge: 'virbr1', mac: '02:01:02:03:04:05', ip: '192.168.122.4' }] };
    const filter = "<filterref filter='clean-traffic'><parameter name='IP' value='192.168.122.4'/></filterref>";
    const domain = one.domain(other).replace('</interface>', `${filter}</interface>`);
    const answer = await one.deploy(other, domain);
    expect(answer).toMatchObject({ code: 0, stdout: 'one-42\n' });
    expect(answer.stderr).toBe(`INFO: kvm-ib: NIC 0 has 192.168.122.4 <-> 192.168.10.204 by its filter: ${UNSEEN}\n`);
    expect(aliases()).toEqual(['204 ib0:42-0']);
  });

  test('numbers NICs by their taps, else by their place', async () => {
    const two = testVm(42, [2, 3]);
    const mixed = { ...two, nics: [...testVm(42, [9], 'br0').nics, ...two.nics] };
    const old = new Caller(release('4.4.1'));
    expect(await old.deploy(mixed)).toMatchObject({ code: 0 });
    expect(aliases()).toEqual(['202 ib0:42-1', '203 ib0:42-2']);
    await old.run('shutdown', [old.id, HOST_NAME], mixed);
    const named = new Caller(release('5.4.15'));
    const domain = named.domain(mixed).replace('one-42-2', 'one-42-7');
    expect(await named.deploy(mixed, domain)).toMatchObject({ code: 0 });
    expect(aliases()).toEqual(['202 ib0:42-1', '203 ib0:42-7']);
  });

  test('takes what the VNM driver has noted: IB_IP and aliases count, and nothing is unseen', async () => {
    leaveNote();
    const one = new Caller(release('5.4.15'));
    expect(await one.deploy()).toMatchObject({ code: 0, stdout: 'one-42\n', stderr: '' });
    expect(aliases()).toEqual(['206 ib0:42-0']);
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });
    expect(mappingOf(42)).toMatchObject({ address: '192.168.10.206', named: true });
  });

  test('takes no note that is not of this domain', async () => {
    leaveNote({ mac: MAC3 });
    const one = new Caller(release('5.4.15'));
    const answer = await one.deploy();
    expect(answer).toMatchObject({ code: 2, stdout: '' });
    expect(answer.message).toBe(
      `kvm-ib: Cannot deploy VM 42: the VNM driver's pre has noted NIC 0 (${MAC3}) on virbr1, which the domain XML does not have. Remedy: look at \`kvm-ib list\`; when the note is stale: kvm-ib remove --vm 42, then try again.`,
    );
    expect(rig.runs()).toEqual([]);
  });

  test('of another VM is refused', async () => {
    const one = new Caller(release('4.4.1'));
    const answer = await one.deploy(vm, one.domain().replace('<name>one-42', '<name>one-43'));
    expect(answer).toMatchObject({ code: 2, stdout: '' });
    expect(answer.message).toContain('the domain XML is that of "one-43", not of one-42');
    expect(rig.runs()).toEqual([]);
  });

  test.each([
    ['6.0 in the domain XML', '<one:opennebula_version>6.0.0<', null],
    ['7.4 at the root of the remotes', '<one:other>x<', '7.4.0'],
  ])('is refused where OpenNebula writes one: %s', async (_, metadata, version) => {
    const one = new Caller({ ...release('7.4.0'), vmXml: false, version: false });
    if (version !== null) writeFileSync(join(rig.folder, 'VERSION'), version);
    const domain = domainOf(vm)
      .replace(/<one:opennebula_version>7\.4\.0</, metadata)
      .replace('x</one:opennebula_version>', 'x</one:other>');
    const answer = await one.deploy(vm, domain);
    expect(answer).toMatchObject({ code: 2, stdout: '' });
    expect(answer.stderr).toMatch(/^kvm-ib: Cannot read .*vm\.xml: it is not there\. Remedy: deploy the VM again/m);
    expect(rig.runs()).toEqual([]);
    expect(aliases()).toEqual([]);
  });

  test('an IB_IP that is seen later comes into effect, and that is said', async () => {
    for (const name of ['5.8.5', '5.12.13']) {
      const one = new Caller(release(name));
      await one.deploy();
      expect(aliases()).toEqual([FIRST]);
      const named = { ...vm, nics: vm.nics.map((nic) => ({ ...nic, ibIp: '192.168.10.206' })) };
      const answer = await one.run('reboot', [one.id, HOST_NAME], named);
      expect(answer.stderr).toBe(
        'INFO: kvm-ib: NIC 0 of VM 42 had 192.168.10.202, since this OpenNebula does not tell its IB_IP at deploy; it gets 192.168.10.206 now. To have it from the start: VN_MAD kvm-ib (docs/install.md)\n',
      );
      expect(aliases()).toEqual(['206 ib0:42-0']);
      await one.run('cancel', [one.id, HOST_NAME], named);
    }
  });
});

describe('restore without VM data', () => {
  test('of a checkpoint that cannot be read is refused, and the checkpoint stays', async () => {
    const one = new Caller(release('3.4.4'));
    const answer = await one.call('restore', ['/nowhere/checkpoint', HOST_NAME], '');
    expect(answer).toMatchObject({ code: 1, stdout: '', next: true });
    expect(answer.message).toMatch(
      /^kvm-ib: Cannot read the NICs of the VM from its checkpoint \/nowhere\/checkpoint: .*No such file.*\. Remedy: look at what/,
    );
    expect(rig.runs()).toEqual([]);
  });

  test('takes what the VNM driver has noted', async () => {
    const one = new Caller(release('4.14.2'));
    writeFileSync(one.checkpoint, one.domain());
    leaveNote();
    expect((await one.run('restore', [one.checkpoint, HOST_NAME, one.id])).stderr).toBe('');
    expect(aliases()).toEqual(['206 ib0:42-0']);
  });

  test('that fails leaves nothing', async () => {
    const one = new Caller(release('4.14.2'));
    writeFileSync(one.checkpoint, one.domain());
    const before = rig.snapshot();
    rig.behave('echo no >&2; exit 1');
    const answer = await one.call('restore', [one.checkpoint, HOST_NAME, one.id], '');
    expect(answer).toMatchObject({ code: 1, stderr: `${seenByMac(0, PAIR2, MAC2)}no\n`, next: true });
    expect(rig.snapshot()).toEqual(before);
  });
});

describe('the block around the message', () => {
  const BLOCK = /^ERROR MESSAGE --8<------\nkvm-ib: Cannot [^\n]+\.\nERROR MESSAGE ------>8--\n$/;
  const PLAIN = /^kvm-ib: Cannot [^\n]+\.\n$/;
  const outside = (of: TestVm): TestVm => ({ ...of, nics: of.nics.map((nic) => ({ ...nic, ip: '192.168.122.99' })) });

  test.each([
    ['VERSION says 6.0.2', '6.0.2', UUID, BLOCK],
    ['VERSION says 6.0.0.3', '6.0.0.3', UUID, BLOCK],
    ['VERSION says 6.0.3', '6.0.3', UUID, PLAIN],
    ['VERSION says 7.4.0, whatever the deploy id', '7.4.0\n', 'one-42', PLAIN],
    ['VERSION says nothing', 'x', UUID, PLAIN],
    ['there is no VERSION, and the deploy id is of the old form', null, 'one-42', BLOCK],
    ['there is no VERSION', null, UUID, PLAIN],
  ])('where %s', async (_, version, id, form) => {
    const one = new Caller({ ...release('6.0.2'), version: false });
    if (version !== null) writeFileSync(join(rig.folder, 'VERSION'), version);
    const answer = await one.call('restore', ['/c', HOST_NAME, id], one.data(outside(vm)));
    expect(answer).toMatchObject({ code: 2, next: true });
    expect(answer.stderr).toMatch(form);
  });

  test('what oned wrote into the domain XML counts before VERSION', async () => {
    const one = new Caller(release('6.0.3'));
    writeFileSync(join(rig.folder, 'VERSION'), '6.0.2');
    expect((await one.deploy(outside(vm))).stderr).toMatch(PLAIN);
  });
});
