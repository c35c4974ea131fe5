/** What `kvm-ib doctor` says of a front-end and of a host, and that it says nothing where all is well. */
import { describe, expect, test } from 'vitest';
import { renderDiagnosis } from '../../lib/cli/render.ts';
import { KvmIbError } from '../../lib/core/errors.ts';
import type { OneHost, OneNetwork } from '../../lib/opennebula/pools.ts';
import { parseOneVersion, vmMadSection, vnMadSection } from '../../lib/opennebula/registration.ts';
import { worstOf } from '../../lib/ops/check.ts';
import type { FrontEndDiagnosisFacts, HostDiagnosisFacts } from '../../lib/ops/doctor.ts';
import { diagnoseFrontEnd, diagnoseHost, together } from '../../lib/ops/doctor.ts';
import { giveName } from '../../lib/ops/driver-name.ts';

const VERSION = parseOneVersion('7.0.1');
const STOCK = `VM_MAD = [ NAME = "kvm", ARGUMENTS = "-t 15 -r 0 kvm -p", TYPE = "kvm" ]
VM_MAD = [ NAME = "qemu", ARGUMENTS = "-t 15 -r 0 kvm", TYPE = "qemu" ]
VM_MAD = [ NAME = "lxc", ARGUMENTS = "-t 15 -r 0 lxc", TYPE = "xml" ]
`;
const EXECRC = 'LIVE_DISK_SNAPSHOTS="kvm-qcow2 kvm-ssh"\n';
const IB = giveName('kvm-ib', VERSION, { onedConf: STOCK, vmmExecrc: EXECRC });
const KVM = giveName('kvm', VERSION, { onedConf: STOCK, vmmExecrc: EXECRC }).onedConf.text;
const OLD = `${STOCK}VM_MAD = [ name = "vmm_kvm_ib", arguments = "-t 15 -r 0 kvm-ib", type = "kvm" ]\n`;

const REPORT = { status: 'OK', version: '0.1.0', config: 'aaaa' };
let ids = 0;
const host = (name: string, driver: string, more: Partial<OneHost> = {}): OneHost => {
  ids += 1;
  const kvmIb = driver.includes('ib') ? REPORT : null;
  return { id: ids, name, driver, clusterId: 100, cluster: 'ib', state: 2, runningVms: 0, kvmIb, ...more };
};
const elsewhere = { clusterId: 0, cluster: 'default' };
const HEALTHY: FrontEndDiagnosisFacts = {
  onedConf: IB.onedConf.text,
  vmmExecrc: IB.vmmExecrc?.text ?? '',
  version: VERSION,
  driverFiles: { missing: [], different: [] },
  program: '0.1.0',
  hosts: [host('kvmib01', 'kvm-ib'), host('kvmib02', 'kvm-ib'), host('kvm01', 'kvm', elsewhere), host('ct01', 'lxc')],
  networks: [
    { id: 7, name: 'ib-guests', bridge: 'virbr1', driver: 'dummy', conf: null },
    { id: 1, name: 'lan', bridge: 'br0', driver: 'bridge', conf: null },
  ],
  bridges: ['virbr1'],
  networkDefaults: ':keep_empty_bridge: false\n',
};

const found = (facts: Partial<FrontEndDiagnosisFacts>): readonly string[] =>
  diagnoseFrontEnd({ ...HEALTHY, ...facts }).findings.map(
    ({ level, what, why, fix }) => `${level}: ${what}: ${why}: ${fix}`,
  );
const state = (facts: Partial<FrontEndDiagnosisFacts>, name: string): string | undefined =>
  diagnoseFrontEnd({ ...HEALTHY, ...facts }).checks.find((check) => check.name === name)?.state;

describe('a front-end', () => {
  test('that is right has no findings, under any of the names', () => {
    expect(found({})).toEqual([]);
    expect(diagnoseFrontEnd(HEALTHY).checks.map((check) => check.state)).toEqual(Array(6).fill('ok'));
    expect(
      found({
        onedConf: KVM,
        vmmExecrc: EXECRC,
        hosts: [host('a', 'kvm', { kvmIb: REPORT }), host('b', 'kvm', { kvmIb: REPORT })],
      }),
    ).toEqual([]);
    const words = EXECRC.replace('kvm-ssh', 'kvm-ssh vmm_kvm_ib-qcow2 vmm_kvm_ib-ssh');
    expect(found({ onedConf: OLD, vmmExecrc: words, hosts: [host('a', 'vmm_kvm_ib')] })).toEqual([]);
    expect(found({ hosts: [] })).toEqual([]);
  });

  test('has each stock host named that shares a cluster with hosts of kvm-ib, with the commands', () => {
    const hosts = [
      host('kvmib01', 'kvm-ib'),
      host('one07', 'kvm'),
      host('one08', 'qemu', { runningVms: 4 }),
      host('far', 'kvm', elsewhere),
      host('ct01', 'lxc'),
    ];
    const findings = found({ hosts });
    expect(findings).toHaveLength(2);
    expect(findings[0]).toMatch(/^error: host "one07" has the driver "kvm", beside 1 host of kvm-ib in cluster "ib"/);
    expect(findings[0]).toContain('onecluster addhost CLUSTER one07');
    expect(findings[0]).toContain(
      `echo 'VM_MAD = "kvm-ib"' > /var/lib/one/vm_mad && onehost update one07 /var/lib/one/vm_mad --append`,
    );
    expect(findings[1]).toContain('host "one08" has the driver "qemu"');
    const result = diagnoseFrontEnd({ ...HEALTHY, hosts });
    expect(worstOf(result.findings)).toBe(4);
    expect(result.hosts.map(({ name, cluster, folder, kvmIb }) => [name, cluster, folder, kvmIb])).toEqual([
      ['kvmib01', 'ib', 'kvm-ib', 'OK 0.1.0'],
      ['one07', 'ib', 'kvm', null],
      ['one08', 'ib', 'kvm', null],
      ['far', 'default', 'kvm', null],
      ['ct01', 'ib', 'lxc', null],
    ]);
  });

  test('of the name kvm has no host of kvm to be mixed up with, but of qemu', () => {
    const hosts = [host('a', 'kvm', { kvmIb: REPORT }), host('b', 'qemu')];
    expect(found({ onedConf: KVM, vmmExecrc: EXECRC, hosts })).toEqual([
      expect.stringContaining('host "b" has the driver "qemu"'),
    ]);
  });

  test('takes hosts without a cluster as neighbours of each other', () => {
    const none = { clusterId: -1, cluster: null };
    const findings = found({ hosts: [host('a', 'kvm-ib', none), host('b', 'kvm', none), host('c', 'kvm')] });
    expect(findings).toEqual([expect.stringMatching(/host "b" .* in no cluster/)]);
  });

  test('does not put hostile names into commands or on the terminal as they are', () => {
    const evil = host("x'; rm -rf /\u001b[2J", 'kvm');
    const [finding = ''] = found({ hosts: [host('a', 'kvm-ib'), evil] });
    expect(finding).toContain(`onecluster addhost CLUSTER ${evil.id};`);
    expect(finding).not.toContain('\u001b');
    expect(finding).not.toContain('update x');
  });

  test('without a section, or with a driver that is gone, is an error', () => {
    expect(found({ onedConf: STOCK, hosts: [] })).toEqual([expect.stringContaining('no section VM_MAD')]);
    expect(found({ onedConf: KVM, vmmExecrc: EXECRC, hosts: [host('a', 'kvm-ib')] })).toEqual([
      expect.stringContaining('which oned.conf does not have'),
    ]);
    // A driver of somebody else is their own matter.
    expect(found({ hosts: [host('a', 'site')] })).toEqual([]);
  });

  test('without words for live disk snapshots is a warning, not for kvm, and not where the site has none', () => {
    expect(found({ vmmExecrc: EXECRC })).toEqual([
      expect.stringMatching(/^warning: LIVE_DISK_SNAPSHOTS of vmm_execrc/),
    ]);
    expect(found({ onedConf: OLD, vmmExecrc: EXECRC, hosts: [] })).toEqual([
      expect.stringContaining('LIVE_DISK_SNAPSHOTS="kvm-qcow2 kvm-ssh vmm_kvm_ib-qcow2 vmm_kvm_ib-ssh"'),
    ]);
    expect(found({ onedConf: KVM, vmmExecrc: EXECRC, hosts: [] })).toEqual([]);
    expect(found({ vmmExecrc: 'LIVE_DISK_SNAPSHOTS=""\n' })).toEqual([]);
  });

  test('hosts that have not reported, or another version or configuration, are warnings', () => {
    const silent = { kvmIb: null };
    expect(found({ hosts: [host('a', 'kvm-ib', silent)] })).toEqual([
      expect.stringMatching(/^warning: host "a" .* has not reported kvm-ib/),
    ]);
    // Of a host that is not monitored nothing can be expected.
    expect(found({ hosts: [host('a', 'kvm-ib', { ...silent, state: 8 })] })).toEqual([]);
    expect(found({ hosts: [host('a', 'kvm-ib', { kvmIb: { ...REPORT, version: '0.0.9' } })] })).toEqual([
      expect.stringContaining('1 host with another version than 0.1.0'),
    ]);
    const other = { kvmIb: { ...REPORT, config: 'bbbb' } };
    expect(found({ hosts: [host('a', 'kvm-ib'), host('b', 'kvm-ib', other)] })).toEqual([
      expect.stringMatching(/hosts of cluster "ib" have 2 different configurations: a \/ b/),
    ]);
    expect(found({ hosts: [host('a', 'kvm-ib'), host('b', 'kvm-ib', { ...other, ...elsewhere })] })).toEqual([]);
  });

  test('a virtual network whose driver deletes our bridge is an error, unless it keeps it', () => {
    const on = (more: Partial<OneNetwork>): Partial<FrontEndDiagnosisFacts> => ({
      networks: [{ id: 7, name: 'ib', bridge: 'virbr1', driver: 'bridge', conf: null, ...more }],
    });
    expect(found(on({}))).toEqual([expect.stringContaining('virtual network "ib" has VN_MAD "bridge" on virbr1')]);
    expect(found(on({ driver: 'fw' }))).toHaveLength(1);
    expect(found(on({ driver: 'dummy' }))).toEqual([]);
    expect(found(on({ bridge: 'br0' }))).toEqual([]);
    expect(found(on({ conf: 'keep_empty_bridge=true' }))).toEqual([]);
    expect(found({ ...on({}), networkDefaults: '# x\n:keep_empty_bridge: true\n' })).toEqual([]);
    expect(found({ ...on({}), networkDefaults: '#:keep_empty_bridge: true\n' })).toHaveLength(1);
    expect(
      found({ ...on({ conf: 'keep_empty_bridge=false' }), networkDefaults: ':keep_empty_bridge: true\n' }),
    ).toHaveLength(1);
  });

  test('a site that has the network driver alone needs no section VM_MAD', () => {
    const stock = 'VM_MAD = [ NAME = "kvm", ARGUMENTS = "-t 15 -r 0 kvm -p", TYPE = "kvm" ]\n';
    const site = (more: string, hooksOf: readonly string[] = []): Partial<FrontEndDiagnosisFacts> => ({
      onedConf: `${stock}${more}`,
      hosts: [host('kvm01', 'kvm')],
      networkDriver: { hooksOf, alone: true },
    });
    expect(found({ ...site(''), networkDriver: undefined })).toEqual([expect.stringContaining('no section VM_MAD')]);
    expect(found(site(vnMadSection()))).toEqual([]);
    expect(found(site(''))).toEqual([expect.stringMatching(/^warning: no section VN_MAD_CONF .* names kvm-ib/)]);
    expect(found(site('', ['dummy']))).toEqual([]);
    const { checks } = diagnoseFrontEnd({ ...HEALTHY, ...site('', ['dummy']) });
    expect(checks.find(({ name }) => name === 'driver')?.seen).toBe('the network driver, as hook of dummy');
  });

  test('driver files that lack or differ are said', () => {
    expect(found({ driverFiles: { missing: ['vmm/kvm-ib/deploy'], different: [] } })).toEqual([
      expect.stringMatching(/^error: 1 file of the driver missing/),
    ]);
    expect(found({ driverFiles: { missing: [], different: ['a', 'b', 'c', 'd', 'e', 'f'] } })).toEqual([
      expect.stringMatching(
        /^warning: 6 files of the driver differ from those of kvm-ib 0\.1\.0: a, b, c, d, e, and 1 more/,
      ),
    ]);
  });

  test('what cannot be looked at is no finding and not right either; an OpenNebula that fails is an error', () => {
    const absent = new KvmIbError('host-lacks', 'Cannot run /usr/bin/onehost', { why: 'the program is not there' });
    const failed = new KvmIbError('failed', 'Cannot run', { why: 'Connection refused' });
    const blind = {
      onedConf: null,
      vmmExecrc: null,
      version: absent,
      driverFiles: absent,
      hosts: absent,
      networks: absent,
    };
    expect(found(blind)).toEqual([]);
    expect(new Set(diagnoseFrontEnd({ ...HEALTHY, ...blind }).checks.map((check) => check.state))).toEqual(
      new Set(['skipped']),
    );
    expect(found({ hosts: failed })).toEqual([expect.stringContaining('Connection refused')]);
    expect(state({ hosts: failed }, 'hosts')).toBe('error');
    expect(state({ bridges: null, networks: failed }, 'virtual networks')).toBe('skipped');
    expect(state({ onedConf: null }, 'hosts')).toBe('skipped');
  });
});

describe('a host', () => {
  const RIGHT: HostDiagnosisFacts = {
    config: [],
    firewalls: [],
    node: true,
    dropIn: true,
    sudo: { said: null },
    tree: { missing: [], sameVersion: true },
    nics: [{ id: null, name: 'ib', bridge: 'virbr1', driver: 'dummy', conf: null }],
    bridges: ['virbr1'],
    networkDefaults: null,
  };
  const of = (facts: Partial<HostDiagnosisFacts>): readonly string[] =>
    diagnoseHost({ ...RIGHT, ...facts }).findings.map(({ level, what, fix }) => `${level}: ${what}: ${fix}`);

  test('that is right has no findings', () => {
    const { checks, findings } = diagnoseHost(RIGHT);
    expect([findings, checks.map((check) => check.state)]).toEqual([[], Array(6).fill('ok')]);
  });

  test('has the findings of `config check`, and the error of a configuration that does not hold', () => {
    const finding = { level: 'warning', code: 'host-lacks', network: 'ib', what: 'w', why: 'y', fix: 'f' } as const;
    expect(of({ config: [finding] })).toEqual(['warning: w: f']);
    expect(of({ firewalls: [finding] })).toEqual(['warning: w: f']);
    const broken = new KvmIbError('bad-config', 'Cannot use the configuration', { why: 'line 1', fix: 'correct it' });
    expect(of({ config: broken })).toEqual(['error: Cannot use the configuration: correct it']);
  });

  test('whose driver is missing or of another version, whose sudo or node is not there', () => {
    expect(of({ tree: { missing: ['vmm/kvm-ib/deploy'], sameVersion: null } })).toEqual([
      expect.stringMatching(/^error: 1 file of the driver missing.*onehost sync --force/),
    ]);
    expect(of({ tree: { missing: [], sameVersion: false } })).toEqual([
      expect.stringMatching(/^warning: .*another version/),
    ]);
    expect(of({ sudo: { said: 'sudo: a password is required' }, dropIn: false })).toEqual([
      expect.stringMatching(/^error: oneadmin cannot start.*kvm-ib install host/),
    ]);
    expect(of({ sudo: { said: '' } })).toEqual([expect.stringContaining('visudo -c')]);
    expect(of({ node: false })).toEqual([expect.stringContaining('node is neither')]);
  });

  test('with a NIC whose driver will delete the bridge, said once', () => {
    const nic: OneNetwork = { id: null, name: 'ib', bridge: 'virbr1', driver: 'bridge', conf: null };
    expect(of({ nics: [nic, nic] })).toEqual([expect.stringContaining('VN_MAD "bridge" on virbr1')]);
    expect(of({ nics: [{ ...nic, conf: 'keep_empty_bridge=yes' }] })).toEqual([]);
  });

  test('that is none of OpenNebula, or looked at without rights, leaves checks out and says why', () => {
    const denied = new KvmIbError('not-permitted', 'Cannot try sudo', { why: 'this needs root' });
    const { checks, findings } = diagnoseHost({ ...RIGHT, sudo: denied, tree: denied, firewalls: denied });
    expect(findings).toEqual([]);
    expect(checks.filter((check) => check.state === 'skipped').map(({ name, seen }) => [name, seen])).toEqual(
      ['other firewalls', 'driver files', 'sudo'].map((name) => [name, 'not looked at: this needs root']),
    );
  });
});

test('is coloured by result on a terminal only, and a finding says the same as in JSON', () => {
  const broken = diagnoseFrontEnd({ ...HEALTHY, onedConf: STOCK, hosts: [] });
  const plain = renderDiagnosis(broken, false);
  expect(plain).not.toContain('\u001b');
  expect(plain).toMatch(/^front-end +driver +error +none$/m);
  const coloured = renderDiagnosis(broken, true);
  expect(coloured).toContain('\u001b[31mfront-end  driver ');
  expect(coloured).toContain('\u001b[32mfront-end  virtual networks');
  for (const { what, why, fix } of broken.findings) expect(plain).toContain(`${what}: ${why}\n         fix: ${fix}\n`);
});

test('one machine may be both', () => {
  const section = vmMadSection(VERSION, { onedConf: null });
  const both = together([diagnoseFrontEnd({ ...HEALTHY, onedConf: section }), diagnoseFrontEnd(HEALTHY)]);
  expect(both.checks).toHaveLength(12);
  expect(worstOf(both.findings)).toBeUndefined();
});
