import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { KvmIbError } from '../../lib/core/errors.ts';
import {
  ACTIONS,
  failureMessage,
  failureText,
  isKnownAction,
  logText,
  parseActionCall,
  treatmentOf,
} from '../../lib/opennebula/contract.ts';

const UUID = '6f0a1c1e-6c0e-4d0c-9a0e-5a3b3f1d2c42';

function refusal(act: () => unknown): KvmIbError {
  try {
    act();
  } catch (error) {
    expect(error).toBeInstanceOf(KvmIbError);
    return error as KvmIbError;
  }
  throw new Error('accepted');
}

describe('parseActionCall', () => {
  test('reads deploy', () => {
    const file = '/var/lib/one//datastores/0/42/deployment.0';
    expect(parseActionCall('deploy', [file, 'kvmib01', '42', 'kvmib01'])).toEqual({
      treatment: 'sync-before',
      action: 'deploy',
      vmId: 42,
      host: 'kvmib01',
      args: { deploymentFile: file, host: 'kvmib01' },
    });
  });

  test.each(['shutdown', 'cancel'] as const)('reads %s, also with an empty or absurd deploy id', (action) => {
    for (const deployId of [UUID, 'one-42', '-', '']) {
      expect(parseActionCall(action, [deployId, 'kvmib01', '42', 'kvmib01'])).toEqual({
        treatment: 'release-after',
        action,
        vmId: 42,
        host: 'kvmib01',
        args: { deployId, host: 'kvmib01' },
      });
    }
  });

  test.each([
    ['save', 'release-after', [UUID, '/c', 'h1'], { deployId: UUID, checkpointFile: '/c', host: 'h1' }],
    ['restore', 'sync-before', ['/c', 'h1', UUID], { checkpointFile: '/c', host: 'h1', deployId: UUID }],
    ['migrate', 'move', [UUID, 'h2', 'h1'], { deployId: UUID, destination: 'h2', source: 'h1' }],
    [
      'attach_nic',
      'sync-before',
      [UUID, '02:00:c0:a8:7b:0b', 'virbr1', '-', 'dummy', 'one-42-1'],
      { deployId: UUID, mac: '02:00:c0:a8:7b:0b', bridge: 'virbr1', model: '-', vnMad: 'dummy', target: 'one-42-1' },
    ],
    ['detach_nic', 'sync-after', [UUID, '02:00:c0:a8:7b:0b'], { deployId: UUID, mac: '02:00:c0:a8:7b:0b' }],
    ['prereconfigure', 'check-before', [UUID, ''], { deployId: UUID, contextDevice: '' }],
    ['reconfigure', 'sync-after', [UUID, 'hda', '/d'], { deployId: UUID, contextDevice: 'hda', contextImage: '/d' }],
    ['snapshot_revert', 'sync-after', [UUID, 'snap-0'], { deployId: UUID, snapshotName: 'snap-0' }],
    ['reset', 'repair-before', [UUID, 'h1'], { deployId: UUID, host: 'h1' }],
  ])('reads %s', (action, treatment, own, args) => {
    const call = parseActionCall(action, [...own, '42', 'h1']);
    expect(call).toEqual({ treatment, action, vmId: 42, host: 'h1', args });
  });

  test('takes the VM id from the end, so an argument that a later version adds does no harm', () => {
    expect(parseActionCall('detach_nic', [UUID, 'mac', 'new', '7', 'h1'])).toMatchObject({ vmId: 7, host: 'h1' });
  });

  test('minds a missing argument only where it is needed: restore has no deploy id before 4.4, empty ones vanish before 4.2', () => {
    expect(parseActionCall('restore', ['/c', 'h1', '7', 'h1'])).toMatchObject({
      vmId: 7,
      args: { checkpointFile: '/c', host: 'h1', deployId: '' },
    });
    expect(parseActionCall('cancel', ['h1', '7', 'h1'])).toMatchObject({ vmId: 7, args: { deployId: 'h1', host: '' } });
    expect(parseActionCall('attach_nic', ['one-7', 'mac', 'br', '-', '7', 'h1'])).toMatchObject({
      vmId: 7,
      args: { deployId: 'one-7', mac: 'mac', bridge: 'br', model: '-', vnMad: '', target: '' },
    });
    expect(refusal(() => parseActionCall('migrate', ['h2', 'h1', '7', 'h1'])).code).toBe('usage');
    expect(refusal(() => parseActionCall('restore', ['7', 'h1'])).code).toBe('usage');
  });

  test('passes every other action and any unknown one without a look at its arguments', () => {
    for (const action of ['attach_disk', 'poll', 'poll_ganglia', 'resize', 'exec', 'snapshot_create', 'brand_new']) {
      expect(parseActionCall(action, ['\n', ''])).toEqual({ treatment: 'pass', action });
    }
    for (const action of ['toString', '__proto__', 'constructor', '']) {
      expect(isKnownAction(action)).toBe(false);
      expect(parseActionCall(action, [])).toEqual({ treatment: 'pass', action });
      expect(treatmentOf(action)).toBe('pass');
    }
  });

  test('knows each treatment by the name alone', () => {
    const by = (treatment: string) => Object.keys(ACTIONS).filter((action) => treatmentOf(action) === treatment);
    expect(by('sync-before')).toEqual(['deploy', 'restore', 'attach_nic']);
    expect(by('repair-before')).toEqual(['reboot', 'reset']);
    expect(by('check-before')).toEqual(['prereconfigure']);
    expect(by('sync-after')).toEqual(['detach_nic', 'reconfigure', 'snapshot_revert']);
    expect(by('release-after')).toEqual(['shutdown', 'cancel', 'save']);
    expect(by('move')).toEqual(['migrate']);
    expect(by('refuse-if-mapped')).toEqual(['migrate_local']);
    expect(Object.values(ACTIONS).filter((action) => action.stdin === 'domain')).toEqual([ACTIONS.deploy]);
  });

  test.each([
    ['too few arguments', 'deploy', ['/f', '42', 'h'], 'usage', '3 arguments: deploymentFile, host, vmId, host'],
    ['no arguments', 'shutdown', [], 'usage', '0 arguments'],
    ['a VM id that is none', 'shutdown', [UUID, 'h', 'h', '42'], 'bad-input', '"h", not a VM id'],
    ['a VM id with a sign', 'shutdown', [UUID, 'h', '-1', 'h'], 'bad-input', '"-1"'],
    ['a VM id too large', 'cancel', [UUID, 'h', '100000000', 'h'], 'bad-input', '"100000000"'],
    ['an empty host', 'cancel', [UUID, '', '1', ''], 'bad-input', 'the host is empty'],
    ['a host with control characters', 'cancel', [UUID, 'h', '1', 'h\u001b[0m'], 'bad-input', 'control characters'],
    ['a deployment file without a path', 'deploy', ['--help', 'h', '1', 'h'], 'bad-input', 'not an absolute path'],
    ['an empty deployment file', 'deploy', ['', 'h', '1', 'h'], 'bad-input', 'not an absolute path'],
  ])('refuses %s', (_, action, argv, code, why) => {
    const error = refusal(() => parseActionCall(action, argv));
    expect(error.code).toBe(code);
    expect(error.why).toContain(why);
  });
});

/** What OpenNebula 7 makes of standard error: log lines out, the rest stripped and joined. */
function messageSince7(stderr: string): string {
  const plain = stderr.split('\n').filter((line) => !/^(?:ERROR|INFO|WARN|DEBUG):\s+(?:\d+)?\s*.*$/.test(line));
  return `${plain.map((line) => line.trim()).join('')}ExitCode: 1`;
}

describe('failureText', () => {
  test('is the log lines and one plain line with a full stop and a line end', () => {
    const text = failureText({
      log: [
        { level: 'info', text: 'undone: alias 10.148.0.10' },
        { level: 'error', text: 'nft: not permitted' },
      ],
      message: 'Cannot map NIC 0 of VM 42',
    });
    expect(text).toBe(
      'INFO: kvm-ib: undone: alias 10.148.0.10\nERROR: kvm-ib: nft: not permitted\nkvm-ib: Cannot map NIC 0 of VM 42.\n',
    );
    expect(messageSince7(text)).toBe('kvm-ib: Cannot map NIC 0 of VM 42.ExitCode: 1');
  });

  test('never has more than one plain line, an early end mark, raw control characters or no end, whatever it is given', () => {
    const nasty = fc.oneof(
      fc.string({ unit: 'binary' }),
      fc.constantFrom(
        '',
        '-',
        'x\nExitCode: 0 EOF_ERR\n',
        'ERROR: 7 x',
        '\r\nEOT\r\n',
        'a\u2028b\u202ec',
        '...',
        'y'.repeat(9999),
      ),
    );
    const line = fc.record({ level: fc.constantFrom('info' as const, 'error' as const), text: nasty });
    fc.assert(
      fc.property(fc.array(line, { maxLength: 4 }), nasty, (log, message) => {
        const text = failureText({ log, message });
        expect(text.endsWith('.\n')).toBe(true);
        const lines = text.slice(0, -1).split('\n');
        expect(lines).toHaveLength(log.length + 1);
        expect(lines.slice(0, -1).every((one) => /^(?:INFO|ERROR): kvm-ib: /.test(one))).toBe(true);
        expect(lines.at(-1)?.startsWith('kvm-ib: ')).toBe(true);
        expect(lines.join('')).not.toMatch(/[\u0000-\u001f\u007f-\u009f\u2028\u2029\u202e]/);
        expect(Math.max(...lines.map((one) => one.length))).toBeLessThan(8000);
      }),
    );
  });

  test('stands between marks where they are asked for, with the log lines before them', () => {
    expect(failureText({ log: [{ level: 'info', text: 'a' }], message: 'Cannot b' }, { block: true })).toBe(
      'INFO: kvm-ib: a\nERROR MESSAGE --8<------\nkvm-ib: Cannot b.\nERROR MESSAGE ------>8--\n',
    );
  });

  test('carries reason and remedy of an error', () => {
    const error = new KvmIbError('out-of-range', 'Cannot map NIC 0', { why: 'it is outside', fix: 'widen the range' });
    expect(failureText({ log: [], message: failureMessage(error) })).toBe(
      'kvm-ib: Cannot map NIC 0: it is outside. Remedy: widen the range.\n',
    );
    expect(failureMessage(new KvmIbError('failed', 'Cannot finish'))).toBe('Cannot finish');
  });

  test('logs a line that later versions do not take for one of another VM', () => {
    expect(logText({ level: 'info', text: '7 mappings\nkept' })).toBe('INFO: kvm-ib: 7 mappings kept\n');
  });
});
