/** Hostile and broken input to the driver: a clear error in one line, the right exit status, nothing changed, no hang. */
import { closeSync, mkdirSync, openSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { EXIT } from '../../lib/core/errors.ts';
import type { Result, Rig, Snapshot } from '../support/driver.ts';
import {
  actionDataOf,
  CONFIG,
  createRig,
  domainOf,
  HOST_NAME,
  ONE_LINE,
  run,
  testVm,
  tool,
  UUID,
  vmXmlOf,
} from '../support/driver.ts';
import { requireOwnNetns } from '../support/netns.ts';

requireOwnNetns();

let rig: Rig;
let before: Snapshot;
beforeAll(async () => {
  rig = await createRig();
  rig.reset();
  before = rig.snapshot();
});
afterAll(() => rig?.remove());
beforeEach(() => rig.reset());

const vm = testVm(42);
const DOMAIN = domainOf(vm);
const DATA = actionDataOf(vm);
const VM = vmXmlOf(vm);
/** Milliseconds in which even the largest input is refused, on a slow machine with other work. */
const SOON = 10_000;

function expectRefused(result: Result, status: number, says: RegExp | string): void {
  expect({ ...result, took: 0 }).toMatchObject({ status, signal: null, stdout: '' });
  expect(result.stderr).toMatch(ONE_LINE);
  expect(result.stderr).toMatch(says);
  expect(result.took).toBeLessThan(SOON);
  expect(rig.runs()).toEqual([]);
  expect(rig.snapshot()).toEqual(before);
}

const deploy = (stdin: string | Uint8Array, vmText: string | Uint8Array = VM, env = {}) =>
  rig.call('deploy', [rig.place(vm, vmText), HOST_NAME], 42, { stdin, env });
const shutdown = (stdin: string | Uint8Array) => rig.call('shutdown', [UUID, HOST_NAME], 42, { stdin });

/** The VM ended as without kvm-ib, and what is wrong is logged. */
function expectEnded(result: Result, says: RegExp): void {
  expect({ ...result, took: 0 }).toMatchObject({ status: 0, signal: null });
  expect(result.stderr).toMatch(/^ERROR: kvm-ib: [^\n]*\n$/);
  expect(result.stderr).toMatch(says);
  expect(result.took).toBeLessThan(SOON);
  expect(rig.runs()).toEqual(['shutdown']);
  expect(rig.snapshot()).toEqual(before);
}

const BOMB = `<!DOCTYPE domain [<!ENTITY a "aaaaaaaaaa">${Array.from(
  { length: 12 },
  (_, n) => `<!ENTITY ${'bcdefghijklm'[n]} "${`&${'abcdefghijkl'[n]};`.repeat(10)}">`,
).join('')}]>`;
/** Nesting, text and elements without end, each about 20 MB, with our bridge at the front. */
const deep = (xml: string, levels: number) => xml.replace('>', `>${'<a>'.repeat(levels)}${'</a>'.repeat(levels)}`);
const huge = (xml: string, piece: string) => xml.replace('>', `>${piece.repeat(Math.ceil(20e6 / piece.length))}`);

const documents: readonly (readonly [string, (xml: string, root: string) => string, RegExp])[] = [
  ['nothing but white space', () => ' \n', /root element|no element|empty/],
  ['a tag that is not closed', (xml) => xml.replace(/<\/[^<]*>\s*$/, ''), /closed|cut off/],
  ['crossed tags', (xml) => xml.replace(/>(?=[^>]*$)/, '><a><b></a></b>'), /./],
  ['two roots', (xml) => xml + xml, /root/],
  ['text behind the root', (xml) => `${xml}virbr1`, /behind the root/],
  ['the wrong root', (xml, root) => xml.replaceAll(root, 'virbr1'), /root/],
  ['an attribute without quotes', (xml) => xml.replace('>', ' a=b>').replace(/^<(\w+) a=b/, '<$1 a=b'), /./],
  ['a control character in a tag', (xml) => xml.replace('<', '<\u0001'), /./],
  ['NUL characters', (xml) => xml.replace('>', '>\0'), /NUL/],
  ['an entity bomb', (xml) => BOMB + xml.replace('>', '>&m;'), /document type/],
  ['an external entity', (xml) => `<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/shadow">]>${xml}`, /document type/],
  ['100 000 levels', (xml) => deep(xml, 100_000), /deep|level|nest/],
  ['7 million levels, 20 MB', (xml) => xml.replace('>', `>${'<a>'.repeat(6_700_000)}`), /./],
  ['20 MB of elements', (xml) => huge(xml, '<a/>'), /./],
  ['20 MB of text', (xml) => huge(xml, 'x'), /./],
  ['20 MB in CDATA', (xml) => huge(xml, `<a><![CDATA[${'y'.repeat(1e6)}]]></a>`), /limit/],
  ['20 MB of attributes', (xml) => xml.replace('>', `><a ${'b="c" '.repeat(3_400_000)}/>`), /./],
  ['an unclosed comment', (xml) => xml.replace('>', '><!-- virbr1'), /comment|cut off|closed/],
  ['an unclosed CDATA section', (xml) => xml.replace('>', '><![CDATA[virbr1'), /closes/],
  ['no XML at all', () => 'virbr1; rm -rf / $(id)\n', /./],
  ['bytes', () => Buffer.from(Array.from({ length: 4096 }, (_, n) => n & 255)).toString('latin1'), /./],
];

describe('a broken document', () => {
  test.each(documents)('%s as domain XML, as vm.xml and as action data', async (_, spoil, says) => {
    const bytes = (xml: string, root: string) => Buffer.from(spoil(xml, root), 'latin1');
    // A folder of its own, since all three run at once.
    const spoilt = rig.place({ ...vm, id: 4242 }, bytes(VM, 'VM'));
    const results = await Promise.all([
      deploy(bytes(DOMAIN, 'domain')),
      rig.call('deploy', [spoilt, HOST_NAME], 42, { stdin: DOMAIN }),
    ]);
    for (const result of results) expectRefused(result, EXIT.usage, says);
    expectEnded(await shutdown(bytes(DATA, 'VMM_DRIVER_ACTION_DATA')), says);
  });

  test.each([0.2, 0.9])('cut off at %f of its length', async (part) => {
    const cut = (xml: string) => xml.slice(0, Math.floor(xml.length * part));
    expectRefused(await deploy(cut(DOMAIN)), EXIT.usage, /cut off|closed|no name/);
    expectEnded(await shutdown(cut(DATA)), /cut off|closed|no name/);
  });
});

const nic = (from: string | RegExp, to: string) => VM.replace(from, to);
const vmXmls: readonly (readonly [string, string, RegExp])[] = [
  ['nothing', '', /it is empty.*START_SCRIPT_BASE64/],
  ['no ID', nic('<ID>42</ID>', ''), /no ID/],
  ['two IDs', nic('<ID>42</ID>', '<ID>42</ID><ID>43</ID>'), /2 <ID>/],
  ["another VM's", vmXmlOf(testVm(44)), /VM 44/],
  ['no TEMPLATE', nic(/<TEMPLATE>.*<\/TEMPLATE>/, ''), /no <TEMPLATE>/],
  ['no NIC at all', nic(/<NIC>.*<\/NIC>/, ''), /vm\.xml does not have/],
  ['a NIC without NIC_ID', nic(/<NIC_ID>.*?<\/NIC_ID>/, ''), /NIC_ID/],
  ['a NIC_ID that is no number', nic('<NIC_ID><![CDATA[0]]>', '<NIC_ID><![CDATA[0x1]]>'), /NIC_ID/],
  ['a NIC_ID of three digits', nic('<NIC_ID><![CDATA[0]]>', '<NIC_ID><![CDATA[100]]>'), /NIC 100/],
  ['a NIC without IP', nic(/<IP>.*?<\/IP>/, ''), /it has no IP/],
  ['an IPv6 address', nic(/<IP>.*?<\/IP>/, '<IP>2001:db8::2</IP>'), /no IPv6/],
  ['a name as IP', nic(/<IP>.*?<\/IP>/, '<IP>localhost</IP>'), /"localhost"/],
  ['an octal IP', nic(/<IP>.*?<\/IP>/, '<IP>192.168.122.002</IP>'), /not an IPv4/],
  ['a short IP', nic(/<IP>.*?<\/IP>/, '<IP>192.168.2</IP>'), /not an IPv4/],
  ['control characters as IP', nic(/<IP>.*?<\/IP>/, '<IP>1\u001b[31m\n2</IP>'), /not an IPv4/],
  ['an IP outside the guests', nic(/<IP>.*?<\/IP>/, '<IP>192.168.122.7</IP>'), /outside the guests/],
  ["the bridge's IP", nic(/<IP>.*?<\/IP>/, '<IP>192.168.122.1</IP>'), /outside the guests/],
  ['two IPs', nic(/<IP>.*?<\/IP>/, '<IP>192.168.122.2</IP><IP>192.168.122.3</IP>'), /2 <IP>/],
  ['elements as IP', nic(/<IP>.*?<\/IP>/, '<IP><A>192.168.122.2</A></IP>'), /holds elements/],
  ['a NIC without MAC', nic(/<MAC>.*?<\/MAC>/, ''), /no MAC/],
  ['a MAC that is none', nic(/<MAC>.*?<\/MAC>/, '<MAC>02:00:c0</MAC>'), /not a hardware address/],
  ['a group MAC', nic(/<MAC>.*?<\/MAC>/, '<MAC>ff:ff:ff:ff:ff:ff</MAC>'), /group address/],
  ['a MAC that the domain XML does not have', nic(/<MAC>.*?<\/MAC>/, '<MAC>02:00:c0:a8:7a:03</MAC>'), /does not have/],
  ['an IB_IP outside the range', nic('<IP>', '<IB_IP>192.168.10.1</IB_IP><IP>'), /outside the addresses/],
  ['shell syntax as IB_IP', nic('<IP>', '<IB_IP>$(id)</IB_IP><IP>'), /not an IPv4/],
  ['another bridge than the domain XML', VM.replaceAll('virbr1', 'br0'), /vm\.xml does not have/],
];

describe('a vm.xml', () => {
  test.each(vmXmls)('with %s is refused', async (_, text, says) => {
    expectRefused(await deploy(DOMAIN, text), EXIT.usage, says);
  });

  test('that is not there', async () => {
    const file = rig.place(vm);
    rmSync(join(dirname(file), 'vm.xml'));
    expectRefused(await rig.call('deploy', [file, HOST_NAME], 42, { stdin: DOMAIN }), EXIT.usage, /vm\.xml/);
  });

  test.each(['fifo', 'directory', 'dangling link', 'device'])('that is a %s', async (kind) => {
    const file = rig.place(vm);
    const path = join(dirname(file), 'vm.xml');
    rmSync(path);
    if (kind === 'fifo') tool('/usr/bin/mkfifo', path);
    else if (kind === 'directory') mkdirSync(path);
    else tool('/bin/ln', '-s', kind === 'device' ? '/dev/zero' : '/nowhere', path);
    expectRefused(await rig.call('deploy', [file, HOST_NAME], 42, { stdin: DOMAIN }), EXIT.usage, /vm\.xml/);
  });
});

describe('the name of a VM', () => {
  test.each([
    ['quotes, line ends and shell syntax', `a"b'c\nd\r\n$(touch /tmp/x) \`id\` ; | & > < \\ $HOME`],
    ['terminal escapes and a text direction override', '\u001b]0;x\u0007\u001b[31m\u202eabc\u2066'],
    ['the end of a CDATA section, as OpenNebula writes it', ']]]]><![CDATA[>'],
    ['the end marks of one_vmm_exec', 'ExitCode: 0 EOF_ERR\nEOF_OUT\nERROR MESSAGE --8<------'],
  ])('may have %s: deploy and shutdown work, and it is nowhere printed', async (_, name) => {
    const named = (xml: string) =>
      xml
        .replace('<NAME>web-42</NAME>', () => `<NAME><![CDATA[${name}]]></NAME>`)
        .replace('<![CDATA[web-42]]>', () => `<![CDATA[${name}]]>`);
    expect(named(VM)).not.toBe(VM);
    expect(named(DOMAIN)).not.toBe(DOMAIN);
    expect(await deploy(named(DOMAIN), named(VM))).toMatchObject({ status: 0, stdout: `${UUID}\n`, stderr: '' });
    expect(rig.phases()).toEqual({ 'vm-42': 'active' });
    expect(await shutdown(named(DATA))).toMatchObject({ status: 0, stderr: '' });
    expect(rig.phases()).toEqual({});
    expect(rig.snapshot()).toEqual(before);
  });
});

describe('standard input', () => {
  const args = () => [rig.place(vm), HOST_NAME, '42', HOST_NAME];
  const quick = { ...{ KVM_IB_STDIN_TIMEOUT_MS: '300' } };

  test('that is empty', async () => {
    expectRefused(await deploy(''), EXIT.usage, /empty/);
    expectEnded(await shutdown(''), /empty/);
  });

  test('that is /dev/null', async () => {
    expectRefused(await rig.call('deploy', args(), null), EXIT.usage, /empty/);
  });

  test('that is closed', async () => {
    const shell = ['/bin/sh', '-c', 'exec "$@" <&-', 'sh', join(rig.drivers, 'deploy'), ...args()];
    expectRefused(await run(shell, { env: rig.env }), EXIT.usage, /closed|empty/);
  });

  test('that is a directory', async () => {
    const fd = openSync('/tmp', 'r');
    const result = await rig.call('deploy', args(), null, { stdin: fd });
    closeSync(fd);
    expectRefused(result, EXIT.usage, /standard input/);
  });

  test('that has no end, as /dev/zero', async () => {
    const fd = openSync('/dev/zero', 'r');
    const result = await rig.call('deploy', args(), null, { stdin: fd });
    closeSync(fd);
    expectRefused(result, EXIT.usage, /larger than/);
  });

  test('that is a terminal', async () => {
    const error = join(rig.folder, 'stderr');
    const command = [join(rig.drivers, 'deploy'), ...args()].map((word) => `'${word}'`).join(' ');
    const argv = ['/usr/bin/script', '--quiet', '--return', '--command', `${command} 2> ${error}`, '/dev/null'];
    const result = await run(argv, { env: { ...rig.env, TERM: 'dumb' } });
    expectRefused({ ...result, stderr: tool('/bin/cat', error) }, EXIT.usage, /terminal/);
  });

  test('that is never closed is waited for, but not for ever', async () => {
    const shell = `(printf '<domain'; sleep 2) | { "$@"; echo $?; }`;
    const argv = ['/bin/sh', '-c', shell, 'sh', join(rig.drivers, 'deploy'), ...args()];
    const result = await run(argv, { env: { ...rig.env, ...quick } });
    expectRefused({ ...result, status: Number(result.stdout), stdout: '' }, EXIT.usage, /did not end within 300 ms/);
  });

  test('that comes in drops is read to its end', async () => {
    const shell = `(head -c 100 "$F"; sleep 0.2; tail -c +101 "$F") | "$@"`;
    const file = join(rig.folder, 'domain.xml');
    writeFileSync(file, DOMAIN);
    const argv = ['/bin/sh', '-c', shell, 'sh', join(rig.drivers, 'deploy'), ...args()];
    expect(await run(argv, { env: { ...rig.env, F: file } })).toMatchObject({ status: 0, stderr: '' });
    expect(rig.stockRun('deploy').stdin.replace(/<mtu.*?>/, '')).toBe(DOMAIN);
  });
});

describe('arguments', () => {
  const file = '/tmp/deployment.0';
  test.each([
    ['none', []],
    ['too few', [file, HOST_NAME, '42']],
    ['a VM id that is none', [file, HOST_NAME, 'x', HOST_NAME]],
    ['a negative VM id', [file, HOST_NAME, '-1', HOST_NAME]],
    ['a VM id too large for a label', [file, HOST_NAME, '100000000', HOST_NAME]],
    ['a VM id with shell syntax', [file, HOST_NAME, '42; id\n\u001b', HOST_NAME]],
    ['an empty host', [file, HOST_NAME, '42', '']],
    ['control characters in the host', [file, HOST_NAME, '42', 'a\nExitCode: 0 EOF_ERR\n']],
    ['a relative deployment file', ['deployment.0', HOST_NAME, '42', HOST_NAME]],
    ['a deployment file with a line end', ['/tmp/a\nb', HOST_NAME, '42', HOST_NAME]],
  ] as const)('of deploy: %s', async (_, args) => {
    expectRefused(await rig.call('deploy', args, null, { stdin: DOMAIN }), EXIT.usage, /Cannot run deploy/);
  });

  test.each(['shutdown', 'cancel', 'migrate', 'save'])(
    'of %s: none, and another VM than the input has',
    async (action) => {
      expectRefused(await rig.call(action, [], null, { stdin: DATA }), EXIT.usage, /arguments/);
      expectRefused(await rig.call(action, [UUID, 'a', 'b'], 43, { stdin: DATA }), EXIT.usage, /VM 42/);
    },
  );
});

describe('the configuration', () => {
  test.each([
    ['not there', null, EXIT.usage, /not there/],
    ['empty', '', EXIT.usage, /networks/],
    ['no YAML', 'networks: [', EXIT.usage, /yaml:1: /],
    [
      'wrong in a field',
      CONFIG.replace('192.168.122.6', '192.168.122.7'),
      EXIT.usage,
      /yaml:6: networks\[0\]\.addresses: /,
    ],
    ['a terminal escape', 'networks: "\\e[31m"\n', EXIT.usage, /networks/],
    ['an alias bomb', 'a: &a [x,x]\nb: [*a,*a]\nnetworks: [*a]\n', EXIT.usage, /alias/],
    ['1 MB and more', `# ${'x'.repeat(1_100_000)}\n${CONFIG}`, EXIT.usage, /larger/],
  ] as const)('that is %s', async (_, text, status, says) => {
    if (text === null) rmSync(rig.config);
    else writeFileSync(rig.config, text);
    expectRefused(await deploy(DOMAIN), status, says);
    expect(await shutdown(DATA)).toMatchObject({ status: 0, stderr: '' });
    expect(rig.runs()).toEqual(['shutdown']);
    expect(rig.snapshot()).toEqual(before);
  });

  test.each(['/dev/zero', 'a fifo', '/tmp'])('that is %s', async (what) => {
    const path = what.startsWith('/') ? what : join(rig.folder, 'fifo');
    if (!what.startsWith('/')) tool('/usr/bin/mkfifo', path);
    expectRefused(await deploy(DOMAIN, VM, { KVM_IB_CONFIG: path }), EXIT.usage, /plain file/);
  });

  test('that names a link or a bridge that is not there', async () => {
    writeFileSync(rig.config, CONFIG.replace('ib0', 'ib9'));
    expectRefused(await deploy(DOMAIN), EXIT.hostLacks, /ib9/);
    writeFileSync(rig.config, CONFIG.replace('virbr1', 'virbr9'));
    const other = (xml: string) => xml.replaceAll('virbr1', 'virbr9');
    expectRefused(await deploy(other(DOMAIN), other(VM)), EXIT.hostLacks, /virbr9/);
  });
});

describe('a host that lacks something', () => {
  /** Runs the launcher with other things mounted over parts of the host, for this one process tree. */
  const mounted = (mounts: string) => [
    '/usr/bin/unshare',
    '--mount',
    '/bin/sh',
    '-c',
    `export PATH=/usr/sbin:/usr/bin:/sbin:/bin; ${mounts}; export PATH="$CALLER_PATH"; exec "$@"`,
    'sh',
  ];

  test('node', async () => {
    const prefix = mounted('mount --bind /dev/null /usr/bin/node');
    const env = { CALLER_PATH: '/nowhere' };
    const result = await rig.call('deploy', [rig.place(vm), HOST_NAME], 42, { stdin: DOMAIN, prefix, env });
    expectRefused(result, EXIT.hostLacks, /no node/);
  });

  test('nft', async () => {
    const prefix = mounted('mount -t tmpfs none /usr/sbin');
    const env = { CALLER_PATH: rig.env['PATH'] ?? '' };
    const result = await rig.call('deploy', [rig.place(vm), HOST_NAME], 42, { stdin: DOMAIN, prefix, env });
    expectRefused(result, EXIT.hostLacks, /nft/);
  });

  test('rights: a user without sudo', async () => {
    const prefix = ['/usr/bin/setpriv', '--reuid=65534', '--regid=65534', '--clear-groups'];
    const result = await rig.call('deploy', [rig.place(vm), HOST_NAME], 42, { stdin: DOMAIN, prefix });
    expectRefused(result, EXIT.notPermitted, /sudoers/);
  });

  test('sudo', async () => {
    const drop = '/usr/bin/setpriv --reuid=65534 --regid=65534 --clear-groups';
    const prefix = mounted('mount --bind /dev/null /usr/bin/sudo').map((w) =>
      w.replace('exec "$@"', `exec ${drop} "$@"`),
    );
    const env = { CALLER_PATH: rig.env['PATH'] ?? '' };
    const result = await rig.call('deploy', [rig.place(vm), HOST_NAME], 42, { stdin: DOMAIN, prefix, env });
    expectRefused(result, EXIT.hostLacks, /sudo/);
  });

  test('the parser', async () => {
    const path = join(rig.drivers, 'parser.mjs');
    tool('/bin/mv', path, `${path}.away`);
    const result = await rig.call('deploy', [rig.place(vm), HOST_NAME], 42, { stdin: DOMAIN });
    tool('/bin/mv', `${path}.away`, path);
    expectRefused(result, EXIT.hostLacks, /npm run build/);
  });

  test('room for the state', async () => {
    const prefix = mounted(`mount -t tmpfs -o ro none '${rig.state}'`);
    const env = { CALLER_PATH: rig.env['PATH'] ?? '' };
    const result = await rig.call('deploy', [rig.place(vm), HOST_NAME], 42, { stdin: DOMAIN, prefix, env });
    expectRefused(result, EXIT.failed, /lock|state/);
  });
});
