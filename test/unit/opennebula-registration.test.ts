/** How OpenNebula is told of the driver, for each version that is served. */
import { describe, expect, test } from 'vitest';
import type { Ipv4, LinkName } from '../../lib/core/address.ts';
import type { Network } from '../../lib/core/mapping.ts';
import {
  addressNetworkTemplate,
  guestNetworkTemplate,
  hookTemplates,
  isRegistered,
  liveSnapshotsLine,
  nicExample,
  otherNames,
  parseOneVersion,
  vmMadSection,
} from '../../lib/opennebula/registration.ts';

const NETWORK: Network = {
  name: 'ib',
  device: 'ib0' as LinkName,
  bridge: 'virbr1' as LinkName,
  guests: { first: '192.168.122.2' as Ipv4, last: '192.168.122.6' as Ipv4 },
  addresses: { first: '192.168.10.202' as Ipv4, last: '192.168.10.206' as Ipv4 },
  isolate: true,
};
const STOCK = `# VM_MAD = [ NAME = "kvm-ib" ]
VM_MAD = [
    NAME           = "kvm",
    EXECUTABLE     = "one_vmm_exec",
    IMPORTED_VMS_ACTIONS = "terminate, suspend,
        resume"
]
VM_MAD = [
    NAME = "lxc", IMPORTED_VMS_ACTIONS = "migrate" ]
`;
const six = parseOneVersion('6.10.0');
const seven = parseOneVersion('7.0.1');

describe('a version', () => {
  test.each([
    ['6.0', 6, 0],
    ['6.10.0.1\n', 6, 10],
    ['7.4.0', 7, 4],
    ['7.1.80~rc1', 7, 1],
  ])('%j is understood', (text, major, minor) => {
    expect(parseOneVersion(text)).toMatchObject({ major, minor });
  });

  test.each(['', 'x', '6', '6.', '-6.0', '6.0; rm -rf /', '6.0\n7.0'])('%j is refused', (text) => {
    expect(() => parseOneVersion(text)).toThrow(/Cannot read the OpenNebula version/);
  });

  test.each(['3.4', '5.12.0.4'])('%s is not served', (text) => {
    expect(() => parseOneVersion(text)).toThrow(/Cannot set OpenNebula .* up/);
  });
});

describe('the VM_MAD section', () => {
  test('names driver and folder, keeps the deployment defaults of kvm, and runs actions in parallel', () => {
    const section = vmMadSection(seven, { onedConf: null });
    for (const [key, value] of Object.entries({
      NAME: 'kvm-ib',
      EXECUTABLE: 'one_vmm_exec',
      ARGUMENTS: '-t 15 -r 0 kvm-ib -p',
      DEFAULT: 'vmm_exec/vmm_exec_kvm.conf',
      TYPE: 'kvm',
    })) {
      expect(section).toMatch(new RegExp(`^ +${key} += "${value}",?$`, 'm'));
    }
  });

  test('is a list with commas between attributes and none at its end', () => {
    const body = vmMadSection(six, { onedConf: STOCK }).split('\n').slice(1, -2);
    expect(body.slice(0, -1).every((line) => line.endsWith(','))).toBe(true);
    expect(body.at(-1)).not.toMatch(/,$/);
  });

  test('takes IMPORTED_VMS_ACTIONS from the stock section up to 6.10, since 7.0 it is gone', () => {
    expect(vmMadSection(six, { onedConf: STOCK })).toContain('IMPORTED_VMS_ACTIONS = "terminate, suspend, resume"');
    expect(vmMadSection(six, { onedConf: null })).toMatch(/^# Copy IMPORTED_VMS_ACTIONS/);
    expect(vmMadSection(seven, { onedConf: STOCK })).not.toContain('IMPORTED_VMS_ACTIONS');
  });

  test('counts as there once it is in oned.conf, and not as a comment', () => {
    expect(isRegistered(STOCK)).toBe(false);
    expect(isRegistered(STOCK + vmMadSection(six, { onedConf: STOCK }))).toBe(true);
    expect(isRegistered(null)).toBe(false);
  });
});

describe('the name of the driver of 2012', () => {
  const old = `VM_MAD = [
    name       = "vmm_kvm_ib",
    executable = "one_vmm_exec",
    arguments  = "-t 15 -r 0 kvm-ib",
    default    = "vmm_exec/vmm_exec_kvm.conf",
    type       = "kvm" ]
`;

  test('is found by the folder that it runs, whatever the case of the attributes', () => {
    expect(otherNames(STOCK + old)).toEqual(['vmm_kvm_ib']);
    expect(otherNames(STOCK + vmMadSection(six, { onedConf: STOCK }))).toEqual([]);
    expect(otherNames(`#${old}`)).toEqual([]);
    expect(otherNames(old.replace('kvm-ib"', 'kvm-ib-other"'))).toEqual([]);
    expect(otherNames(old.replace('vmm_kvm_ib', 'x\u001b[2J'))).toEqual([]);
    expect(otherNames(null)).toEqual([]);
  });

  test('stays, with a section that is up to date', () => {
    const section = vmMadSection(six, { onedConf: STOCK }, 'vmm_kvm_ib');
    expect(section).toMatch(/^ {4}NAME +\S* *= "vmm_kvm_ib",$/m);
    expect(section).toContain('"-t 15 -r 0 kvm-ib -p"');
    expect(otherNames(section)).toEqual(['vmm_kvm_ib']);
    expect(liveSnapshotsLine(six, { vmmExecrc: 'LIVE_DISK_SNAPSHOTS="kvm-qcow2"' }, ['vmm_kvm_ib'])).toBe(
      'LIVE_DISK_SNAPSHOTS="kvm-qcow2 vmm_kvm_ib-qcow2"',
    );
  });
});

describe('live disk snapshots', () => {
  test('are kept by a word for each one that kvm has', () => {
    const vmmExecrc = '# comment\nLIVE_DISK_SNAPSHOTS="kvm-qcow2 kvm-ceph qemu-qcow2"\n';
    const line = liveSnapshotsLine(six, { vmmExecrc });
    expect(line).toBe('LIVE_DISK_SNAPSHOTS="kvm-qcow2 kvm-ceph qemu-qcow2 kvm-ib-qcow2 kvm-ib-ceph"');
    expect(liveSnapshotsLine(six, { vmmExecrc: `${line}\n` })).toBeUndefined();
  });

  test('of drivers called local come with 7.0', () => {
    expect(liveSnapshotsLine(six, { vmmExecrc: null })).not.toContain('kvm-ib-local');
    expect(liveSnapshotsLine(seven, { vmmExecrc: null })).toContain('kvm-ib-local');
  });

  test('that a site switched off stay off', () => {
    expect(liveSnapshotsLine(six, { vmmExecrc: 'LIVE_DISK_SNAPSHOTS=""\n' })).toBeUndefined();
  });
});

describe('the virtual networks', () => {
  test('lease what the configuration maps, on a driver that deletes no bridge', () => {
    const text = guestNetworkTemplate(NETWORK, { gateway: '192.168.122.1' as Ipv4, prefixLength: 29, mtu: 4092 });
    expect(
      text
        .split('\n')
        .filter((line) => !line.startsWith('#'))
        .join('\n'),
    ).toBe(`NAME            = "ib-guests"
VN_MAD          = "dummy"
BRIDGE          = "virbr1"
NETWORK_ADDRESS = "192.168.122.0"
NETWORK_MASK    = "255.255.255.248"
GATEWAY         = "192.168.122.1"
GUEST_MTU       = "4092"
AR = [ TYPE = "IP4", IP = "192.168.122.2", SIZE = "5" ]
`);
    expect(addressNetworkTemplate(NETWORK)).toContain('AR = [ TYPE = "IP4", IP = "192.168.10.202", SIZE = "5" ]');
    expect(addressNetworkTemplate(NETWORK)).toMatch(/^EXTERNAL = "YES"$/m);
    expect(nicExample(NETWORK, seven)).toContain('NETWORK = "ib-addresses", EXTERNAL = "YES"');
    // There it is inherited from the virtual network, and users may not write it.
    expect(nicExample(NETWORK, parseOneVersion('6.0.0'))).not.toContain('EXTERNAL');
  });
});

test('the state hooks stand for states without a driver action, on the host, with the VM on standard input', () => {
  const [poweroff, done] = hookTemplates().map(({ text }) =>
    Object.fromEntries(
      text
        .trim()
        .split('\n')
        .map((line) => line.split(/ += /) as [string, string]),
    ),
  );
  const both = {
    TYPE: '"state"',
    RESOURCE: '"VM"',
    COMMAND: '"kvm-ib/vm-gone.sh"',
    ARGUMENTS: '"$TEMPLATE"',
    ARGUMENTS_STDIN: '"YES"',
    REMOTE: '"YES"',
    TIMEOUT: '"120"',
  };
  expect(poweroff).toEqual({
    ...both,
    NAME: '"kvm-ib-poweroff"',
    ON: '"CUSTOM"',
    STATE: '"POWEROFF"',
    LCM_STATE: '"LCM_INIT"',
  });
  expect(done).toEqual({ ...both, NAME: '"kvm-ib-done"', ON: '"DONE"' });
});
