import { describe, expect, it } from 'vitest';
import { type Command, createNft, type NftExec, transaction } from '../../lib/nftables-json/index.ts';

type Answer = { status: number | null; signal?: string; stdout?: string; stderr?: string };

/** An nft whose answers are a function of what it is sent. */
function scripted(answer: (commands: readonly Command[], check: boolean) => Answer) {
  const calls: { argv: readonly string[]; commands: readonly Command[]; timeout: number | undefined }[] = [];
  const exec: NftExec = async (argv, options) => {
    const { nftables } = JSON.parse(options?.input ?? '{}') as { nftables: readonly Command[] };
    calls.push({ argv, commands: nftables, timeout: options?.timeout });
    const { status, signal, stdout, stderr } = answer(nftables, argv.includes('-c'));
    return { status, signal: signal ?? null, stdout: stdout ?? '', stderr: stderr ?? '' };
  };
  return { exec, calls };
}

const add = (name: string): Command => ({ add: { chain: { family: 'ip', table: 't', name } } });
const kernel = (text: string) => `internal:0:0-0: Error: Could not process rule: ${text}\n\n`;
const has = (commands: readonly Command[], name: string) => JSON.stringify(commands).includes(`"${name}"`);

describe('run', () => {
  it('sends one list on standard input and nothing more when nft takes it', async () => {
    const { exec, calls } = scripted(() => ({ status: 0 }));
    await createNft({ exec, program: '/opt/nft', timeout: 1234 }).run(transaction(add('a'), add('b')));
    expect(calls).toEqual([{ argv: ['/opt/nft', '-j', '-f', '-'], commands: [add('a'), add('b')], timeout: 1234 }]);
  });

  it('never starts nft for an empty transaction or one that cannot be sent', async () => {
    const { exec, calls } = scripted(() => ({ status: 0 }));
    const nft = createNft({ exec });
    await expect(nft.run(transaction())).rejects.toMatchObject({ code: 'refused' });
    await expect(nft.check(transaction(add('a b')))).rejects.toMatchObject({ code: 'refused' });
    await expect(nft.listTable('ip', 't; flush ruleset')).rejects.toMatchObject({ code: 'refused' });
    expect(calls).toEqual([]);
  });

  it.each([1, 2, 3, 5, 8, 100])('finds the refused command of %i wherever it stands', async (count) => {
    const all = Array.from({ length: count }, (_, n) => add(`c${n}`));
    for (const bad of new Set([0, Math.floor(count / 2), count - 1])) {
      const { exec, calls } = scripted((commands) =>
        has(commands, `c${bad}`) ? { status: 1, stderr: kernel('File exists') } : { status: 0 },
      );
      await expect(createNft({ exec }).run(transaction(...all))).rejects.toMatchObject({
        code: 'exists',
        index: bad,
        command: `add chain ip t c${bad}`,
      });
      expect(calls.length).toBeLessThanOrEqual(2 + Math.ceil(Math.log2(count)));
      expect(calls.slice(1).every((call) => call.argv.includes('-c'))).toBe(true);
    }
  });

  it('takes the code from the first command at fault, not from what nft complains of first', async () => {
    const { exec } = scripted((commands) => {
      if (has(commands, 'late')) return { status: 1, stderr: 'internal:0:0-0: Error: No such file or directory\n' };
      return has(commands, 'early') ? { status: 1, stderr: kernel('File exists') } : { status: 0 };
    });
    const failed = createNft({ exec }).run(transaction(add('a'), add('early'), add('b'), add('late')));
    await expect(failed).rejects.toMatchObject({ code: 'exists', index: 1 });
  });

  it('names no command when the refusal does not come again', async () => {
    const { exec } = scripted((_, check) => (check ? { status: 0 } : { status: 1, stderr: kernel('File exists') }));
    await expect(createNft({ exec }).run(transaction(add('a'), add('b')))).rejects.toMatchObject({
      code: 'exists',
      index: undefined,
      command: undefined,
      message:
        'Cannot run a transaction of 2 commands: File exists, and a check of the same commands passed afterwards',
    });
  });

  it('believes nft when it names the command itself', async () => {
    const stderr =
      'internal:0:0-0: Error: Unknown object passed to add command.\n\ninternal:0:0-0: Error: Parsing command array at index 1 failed.\n\n';
    const { exec, calls } = scripted(() => ({ status: 1, stderr }));
    await expect(createNft({ exec }).run(transaction(add('a'), add('b')))).rejects.toMatchObject({
      code: 'too-old',
      index: 1,
      stderr,
    });
    expect(calls).toHaveLength(1);
  });

  it.each<[string, Answer, string]>([
    ['the kernel knows no such thing', { status: 1, stderr: kernel('No such file or directory') }, 'not-found'],
    [
      'nft guesses what was meant',
      {
        status: 1,
        stderr: 'internal:0:0-0: Error: No such file or directory; did you mean chain ‘c’ in table ip ‘t’?\n',
      },
      'not-found',
    ],
    ['it is in use', { status: 1, stderr: kernel('Device or resource busy') }, 'refused'],
    [
      'there is no right to it',
      { status: 1, stderr: 'netlink: Error: cache initialization failed: Operation not permitted\n' },
      'not-permitted',
    ],
    ['JSON is not built in', { status: 1, stderr: 'Error: JSON support not compiled-in\n' }, 'too-old'],
    ['a signal ended it', { status: null, signal: 'SIGSEGV' }, 'crashed'],
    ['a shell says that a signal ended it', { status: 139 }, 'crashed'],
    ['it aborted', { status: 134, stderr: 'nft: BUG: unknown expression\n' }, 'crashed'],
    ['it says nothing', { status: 1 }, 'refused'],
  ])('classes the failure when %s', async (_, answer, code) => {
    const { exec, calls } = scripted(() => answer);
    await expect(createNft({ exec }).run(transaction(add('a')))).rejects.toMatchObject({ name: 'NftError', code });
    expect(calls).toHaveLength(1);
  });

  it('does not try again what crashed nft or is not permitted', async () => {
    for (const answer of [{ status: 139 }, { status: 1, stderr: 'Error: Operation not permitted\n' }]) {
      const { exec, calls } = scripted(() => answer);
      await expect(createNft({ exec }).run(transaction(add('a'), add('b')))).rejects.toMatchObject({
        index: undefined,
      });
      expect(calls).toHaveLength(1);
    }
  });

  it('hands on what exec throws', async () => {
    const exec: NftExec = () => Promise.reject(new Error('nft is absent'));
    await expect(createNft({ exec }).run(transaction(add('a')))).rejects.toThrow('nft is absent');
  });

  it('cuts a long command in the message and keeps it whole beside it', async () => {
    const elem = Array.from({ length: 100 }, (_, n) => `10.0.0.${n}`);
    const { exec } = scripted(() => ({ status: 1, stderr: kernel('File exists') }));
    const command: Command = { add: { element: { family: 'ip', table: 't', name: 's', elem } } };
    const error = await createNft({ exec })
      .run(transaction(command))
      .catch((caught: unknown) => caught);
    expect(String(error).length).toBeLessThan(300);
    expect(error).toMatchObject({ command: `add element ip t s { ${elem.join(', ')} }` });
  });
});

describe('listTable', () => {
  it('asks for one table and never for all', async () => {
    const { exec, calls } = scripted(() => ({
      status: 1,
      stderr: 'internal:0:0-0: Error: No such file or directory\n',
    }));
    expect(await createNft({ exec }).listTable('ip', 't')).toBeUndefined();
    expect(calls.map((call) => call.commands)).toEqual([[{ list: { table: { family: 'ip', name: 't' } } }]]);
  });

  it('says crashed when nft dies of the table, and refused when it prints nothing', async () => {
    const dead = createNft(scripted(() => ({ status: null, signal: 'SIGSEGV' })));
    await expect(dead.listTable('ip', 't')).rejects.toMatchObject({ code: 'crashed' });
    const silent = createNft(scripted(() => ({ status: 0 })));
    await expect(silent.listTable('ip', 't')).rejects.toMatchObject({ code: 'refused' });
  });
});
