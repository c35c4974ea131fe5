/** The name of the driver, written into oned.conf and vmm_execrc and taken out again: what is not ours keeps its bytes. */
import { describe, expect, test } from 'vitest';
import { vmMads, withLiveSnapshots, withoutLiveSnapshots } from '../../lib/opennebula/oned-conf.ts';
import { isCurrent, isRegistered, otherNames, parseOneVersion } from '../../lib/opennebula/registration.ts';
import type { DriverName } from '../../lib/ops/driver-name.ts';
import { DRIVER_NAMES, editLines, giveName, parseDriverName, planEdit, takeName } from '../../lib/ops/driver-name.ts';

/** In the manner of OpenNebula's own file: comments, drivers that are commented out, several of them. */
const ONED_CONF = `# VM_MAD = [ NAME = "kvm-ib", ARGUMENTS = "kvm-ib" ]
LOG = [ SYSTEM = "file", DEBUG_LEVEL = 3 ]
VNC_PORTS = [ START = 5900 # comment ] here
]
EMPTY =
VM_MAD = [
    NAME           = "kvm",
    SUNSTONE_NAME  = "KVM",   # ] in a comment
    EXECUTABLE     = "one_vmm_exec",
    ARGUMENTS      = "-t 15 -r 0 kvm -p",
    # ARGUMENTS    = "-t 15 -r 0 kvm-ib -p",
    DEFAULT        = "vmm_exec/vmm_exec_kvm.conf",
    TYPE           = "kvm",
    IMPORTED_VMS_ACTIONS = "terminate, suspend [all],
        resume"
]
VM_MAD = [
    NAME = "qemu", ARGUMENTS = "-t 15 -r 0 kvm", TYPE = "qemu" ]
VM_RESTRICTED_ATTR = "NIC/MAC"
`;
const EXECRC = `# pairs
LIVE_DISK_SNAPSHOTS="kvm-qcow2 kvm-ceph qemu-qcow2"
VNMAD_LOCAL_ACTIONS="elastic-post"
`;
const VERSION = parseOneVersion('6.10.0');
const FILES = { onedConf: ONED_CONF, vmmExecrc: EXECRC };

const given = (name: DriverName, files = FILES): { onedConf: string; vmmExecrc: string } => {
  const named = giveName(name, VERSION, files);
  return { onedConf: named.onedConf.text, vmmExecrc: named.vmmExecrc?.text ?? files.vmmExecrc };
};
const taken = (names: readonly DriverName[], files: typeof FILES): { onedConf: string; vmmExecrc: string } => {
  const named = takeName(names, files);
  return { onedConf: named.onedConf.text, vmmExecrc: named.vmmExecrc?.text ?? files.vmmExecrc };
};

describe('oned.conf', () => {
  test('is read as OpenNebula reads it', () => {
    expect(vmMads(ONED_CONF).map(({ name, type, directory }) => [name, type, directory])).toEqual([
      ['kvm', 'KVM', 'kvm'],
      ['qemu', 'QEMU', 'kvm'],
    ]);
    expect(vmMads(null)).toEqual([]);
    expect(vmMads('vm_mad=[name="a",arguments="x"]')[0]).toMatchObject({ name: 'a', directory: 'x' });
    expect(vmMads('VM_MAD = [ NAME = kvm, ARGUMENTS = kvm-ib ]')[0]).toMatchObject({ directory: 'kvm-ib' });
  });

  test.each([
    ['-t 15 -r 0 kvm -p', 'kvm'],
    ['kvm-ib', 'kvm-ib'],
    ['-p kvm-ib', 'kvm-ib'],
    ['-t15 -p -l migrate=x -d migrate,deploy kvm-ib', 'kvm-ib'],
    ['--threads 15 --local migrate kvm-ib -w 600', 'kvm-ib'],
    ['-t 15 -r 0 -i kvm', 'kvm'],
    ['-s kvm-ib kvm', 'kvm'],
    ['-t 15', undefined],
    ['', undefined],
  ])('of ARGUMENTS "%s" the folder is %s', (text, folder) => {
    expect(vmMads(`VM_MAD = [ NAME = "x", ARGUMENTS = "${text}" ]`)[0]?.directory).toBe(folder);
  });

  test('that is broken, huge or hostile ends the reading, not the program', () => {
    for (const text of [
      'VM_MAD = [ NAME = "kvm"',
      'VM_MAD = [ NAME = "kvm',
      'VM_MAD = [ VM_MAD = [ NAME = "x" ]',
      `VM_MAD = [ ${'A = "\\"'.repeat(50_000)}`,
      'VM_MAD='.repeat(100_000),
      `${'x'.repeat(2_000_000)}\nVM_MAD = [ NAME = "kvm" ]`,
    ]) {
      const before = performance.now();
      expect(() => vmMads(text)).not.toThrow();
      expect(performance.now() - before).toBeLessThan(1000);
    }
  });
});

describe('the name kvm-ib', () => {
  test('is a section of its own, with words for live disk snapshots, and goes without a trace', () => {
    const after = given('kvm-ib');
    expect(after.onedConf.startsWith(ONED_CONF)).toBe(true);
    expect(isRegistered(after.onedConf)).toBe(true);
    expect(isCurrent(VERSION, after, 'kvm-ib')).toBe(true);
    expect(after.vmmExecrc).toBe(EXECRC.replace('qemu-qcow2"', 'qemu-qcow2 kvm-ib-qcow2 kvm-ib-ceph"'));
    expect(given('kvm-ib', after)).toEqual(after);
    expect(taken(['kvm-ib'], after)).toEqual(FILES);
    expect(taken(DRIVER_NAMES, after)).toEqual(FILES);
  });

  test('goes too when its section was changed, or when something was written behind it', () => {
    const after = given('kvm-ib');
    const changed = {
      ...after,
      onedConf: `${after.onedConf.replace('SUNSTONE_NAME     ', 'SUNSTONE_NAME')}HOOK = "later"\n`,
    };
    expect(taken(['kvm-ib'], changed)).toEqual({ ...FILES, onedConf: `${ONED_CONF}HOOK = "later"\n` });
  });

  test('stays when its section was written by hand, and so do its words', () => {
    const own = {
      onedConf: `${ONED_CONF}VM_MAD = [ NAME = "kvm-ib", ARGUMENTS = "kvm-ib" ]\n`,
      vmmExecrc: EXECRC.replace('kvm-ceph', 'kvm-ceph kvm-ib-qcow2'),
    };
    expect(taken(DRIVER_NAMES, own)).toEqual(own);
    expect(giveName('kvm-ib', VERSION, own).onedConf.edits).toEqual([]);
  });
});

describe('the name kvm', () => {
  test('is one word of the section of OpenNebula, there and back', () => {
    const after = given('kvm');
    expect(after).toEqual({ ...FILES, onedConf: ONED_CONF.replace('0 kvm -p",\n    #', '0 kvm-ib -p",\n    #') });
    expect(otherNames(after.onedConf)).toEqual(['kvm']);
    // OpenNebula's own section is not told to call itself otherwise.
    expect(isCurrent(VERSION, after, 'kvm')).toBe(true);
    expect(given('kvm', after)).toEqual(after);
    expect(taken(['kvm'], after)).toEqual(FILES);
    expect(taken(DRIVER_NAMES, after)).toEqual(FILES);
    expect(taken(['kvm-ib'], after)).toEqual(after);
  });

  test('is refused where that section runs something else, or is not there', () => {
    const other = { ...FILES, onedConf: ONED_CONF.replaceAll('0 kvm -p', '0 kvm-site -p') };
    expect(() => giveName('kvm', VERSION, other)).toThrow(/Cannot give the driver kvm the folder kvm-ib/);
    expect(() => giveName('kvm', VERSION, { ...FILES, onedConf: 'VM_MAD = [ NAME = "vmm_kvm" ]\n' })).toThrow(
      /Cannot give the driver kvm another folder/,
    );
    expect(() => giveName('kvm', VERSION, { ...FILES, onedConf: null })).toThrow(/Cannot write the driver/);
  });
});

test('from one name to the other both sections run the driver, until one is taken back', () => {
  const both = given('kvm', given('kvm-ib'));
  expect(otherNames(both.onedConf)).toEqual(['kvm']);
  expect(isRegistered(both.onedConf)).toBe(true);
  expect(taken(['kvm-ib'], both)).toEqual(given('kvm'));
  expect(taken(['kvm'], both)).toEqual(given('kvm-ib'));
  expect(taken(DRIVER_NAMES, both)).toEqual(FILES);
});

test('the driver of 2012 keeps its section', () => {
  const old = { ...FILES, onedConf: `${ONED_CONF}VM_MAD = [ name = "vmm_kvm_ib", arguments = "-t 15 -r 0 kvm-ib" ]\n` };
  expect(otherNames(given('kvm-ib', old).onedConf)).toEqual(['vmm_kvm_ib']);
  expect(taken(DRIVER_NAMES, given('kvm-ib', old))).toEqual(old);
});

test('only names that are known are written', () => {
  expect(parseDriverName('kvm')).toBe('kvm');
  for (const name of ['', 'qemu', 'kvm-ib"', 'KVM']) expect(() => parseDriverName(name)).toThrow(/driver name/);
});

describe('vmm_execrc', () => {
  test.each([
    ['no line', '# nothing\n'],
    ['two lines', `${EXECRC}${EXECRC}`],
    ['a line that a shell puts together', 'LIVE_DISK_SNAPSHOTS="$OTHER kvm-qcow2"\n'],
    ['a value without quotes', 'LIVE_DISK_SNAPSHOTS=kvm-qcow2\n'],
    ['a value over two lines', 'LIVE_DISK_SNAPSHOTS="kvm-qcow2\nkvm-ceph"\n'],
  ])('with %s is left alone', (_, text) => {
    expect(withLiveSnapshots(text, ['kvm-ib-qcow2'])).toEqual({ text, edits: [] });
    expect(withoutLiveSnapshots(text, 'kvm-ib')).toEqual({ text, edits: [] });
  });

  test('keeps its quotes and comments', () => {
    const text = "  LIVE_DISK_SNAPSHOTS='kvm-qcow2'   # ours\n";
    const after = withLiveSnapshots(text, ['kvm-ib-qcow2', 'kvm-qcow2']);
    expect(after.text).toBe("  LIVE_DISK_SNAPSHOTS='kvm-qcow2 kvm-ib-qcow2'   # ours\n");
    expect(withoutLiveSnapshots(after.text, 'kvm-ib').text).toBe(text);
  });
});

describe('as an operation', () => {
  test('a change names what it does, and shows its lines', () => {
    const { onedConf } = giveName('kvm', VERSION, FILES);
    const [operation] = planEdit('/etc/one/oned.conf', ONED_CONF, onedConf);
    expect(operation).toMatchObject({
      sign: '~',
      why: 'VM_MAD "kvm": folder kvm -> kvm-ib',
      item: { edits: ONED_CONF },
    });
    expect(editLines(onedConf.edits)).toEqual([
      '-     ARGUMENTS      = "-t 15 -r 0 kvm -p",',
      '+     ARGUMENTS      = "-t 15 -r 0 kvm-ib -p",',
    ]);
    expect(planEdit('/x', ONED_CONF, { text: ONED_CONF, edits: [] })).toEqual([]);
  });

  test('a file in another encoding is not written anew', () => {
    const text = `# caf\ufffd\n${ONED_CONF}`;
    const { onedConf } = giveName('kvm', VERSION, { ...FILES, onedConf: text });
    expect(() => planEdit('/etc/one/oned.conf', text, onedConf)).toThrow(/Cannot change \/etc\/one\/oned.conf/);
  });
});
