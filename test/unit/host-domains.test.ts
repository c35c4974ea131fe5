/** What virsh prints, and what is made of it. */
import { expect, test } from 'vitest';
import type { Exec } from '../../lib/core/exec.ts';
import { createDomains } from '../../lib/host/domains.ts';

const HEAD = ` Interface   Type      Source    Model    MAC
------------------------------------------------------------
`;
const MAC = '02:00:c0:a8:7a:02';

/** A virsh that says these things in turn; undefined: it fails. */
function virsh(...answers: readonly (string | undefined)[]) {
  const asked: string[] = [];
  const rest = [...answers];
  const exec: Exec = async (argv) => {
    asked.push(argv.slice(4).join(' '));
    const stdout = rest.shift();
    return { status: stdout === undefined ? 1 : 0, signal: null, stdout: stdout ?? '', stderr: '' };
  };
  return { domains: createDomains(exec), asked };
}

test('a domain is active with its interfaces, inactive, or not known', async () => {
  const { domains, asked } = virsh(
    'one-4\none-42\n\n',
    `one-42\n${HEAD} one-42-0    bridge    virbr1    virtio   ${MAC}\n\n`,
  );
  expect(await domains.state(42)).toEqual({ kind: 'active', macs: new Set([MAC]) });
  expect(asked).toEqual(['list --name', 'echo one-42; domiflist one-42']);
  expect(await virsh('one-42\n').domains.state(4)).toEqual({ kind: 'inactive' });
  expect(await virsh(undefined).domains.state(4)).toEqual({ kind: 'unknown' });
  expect(await virsh('one-4\n', undefined).domains.state(4)).toEqual({ kind: 'active', macs: undefined });
});

test('of many domains each has its own table; one that is gone or said nothing has none', async () => {
  const text = `one-1
${HEAD} vnet0       bridge    virbr1    virtio   ${MAC}
 -           bridge    virbr1    -        02:00:C0:A8:7A:03

one-2
one-3
${HEAD}
one-4
error: unknown
`;
  const { domains, asked } = virsh(text);
  expect(await domains.interfaces([1, 2, 3, 4])).toEqual(
    new Map([
      [1, new Set([MAC, '02:00:c0:a8:7a:03'])],
      [3, new Set()],
    ]),
  );
  expect(asked).toHaveLength(1);
});

test('a thousand domains cost five calls', async () => {
  const { domains, asked } = virsh(...Array.from({ length: 5 }, () => ''));
  expect(await domains.interfaces(Array.from({ length: 1000 }, (_, n) => n))).toEqual(new Map());
  expect(asked).toHaveLength(5);
  expect(Math.max(...asked.map((line) => line.length))).toBeLessThan(16_384);
});

test.each([
  ['paused (migrating)\n\n', true],
  ['paused (starting up)\n\n', true],
  // It went between two questions: nobody may take it to be here.
  [undefined, true],
  ['running (migrated)\n\n', false],
  ['running (booted)\n\n', false],
  ['paused (user)\n\n', false],
])('of a domain that is %j, it is on its way: %s', async (said, moving) => {
  const { domains, asked } = virsh(said);
  expect(await domains.isMoving(42)).toBe(moving);
  expect(asked).toEqual(['domstate --reason one-42']);
});
