import { describe, expect, it } from 'vitest';
import {
  append,
  type Command,
  NftError,
  print,
  printCommand,
  toJson,
  transaction,
} from '../../lib/nftables-json/index.ts';
import { CORPUS } from '../support/nft-corpus.ts';

const IN = { family: 'ip', table: 't' } as const;
const withComment = (comment: string): Command => ({
  add: { rule: { ...IN, chain: 'c', comment, expr: [{ accept: null }] } },
});

function fault(command: unknown): NftError {
  try {
    toJson(transaction({ list: { table: { family: 'ip', name: 't' } } }, command as Command));
  } catch (error) {
    if (error instanceof NftError) return error;
    throw error;
  }
  throw new Error('nothing was refused');
}

describe('print', () => {
  it.each(CORPUS.map(([command, text]) => ({ command, text })))('writes $text', ({ command, text }) => {
    expect(printCommand(command)).toBe(text);
  });

  it('writes the other verbs', () => {
    const rule = { ...IN, chain: 'c', handle: 7 };
    const all = transaction(
      { insert: { rule: { ...IN, chain: 'c', expr: [{ accept: null }] } } },
      { insert: { rule: { ...rule, expr: [{ accept: null }], comment: 'x' } } },
      { replace: { rule: { ...rule, expr: [{ drop: null }] } } },
      { delete: { rule } },
      { delete: { element: { ...IN, name: 'm', elem: ['10.0.0.1'] } } },
      { destroy: { table: { family: 'inet', name: 't' } } },
      { flush: { chain: { ...IN, name: 'c' } } },
      { list: { table: { family: 'ip', name: 't' } } },
    );
    expect(print(all)).toBe(
      [
        'insert rule ip t c accept',
        'insert rule ip t c handle 7 accept comment "x"',
        'replace rule ip t c handle 7 drop',
        'delete rule ip t c handle 7',
        'delete element ip t m { 10.0.0.1 }',
        'destroy table inet t',
        'flush chain ip t c',
        'list table ip t',
        '',
      ].join('\n'),
    );
  });

  it('does not show the handle of a listed rule that is added again', () => {
    const listed = { ...IN, chain: 'c', handle: 7, expr: [{ accept: null }] } as const;
    expect(printCommand({ add: { rule: listed } })).toBe('add rule ip t c accept');
  });

  it('numbers the lines from 1', () => {
    const all = transaction(...Array.from({ length: 10 }, () => withComment('x')));
    const lines = print(all, { numbered: true }).split('\n');
    expect(lines[0]).toBe(' 1  add rule ip t c accept comment "x"');
    expect(lines[9]).toBe('10  add rule ip t c accept comment "x"');
  });

  it('never lets a string out of its place', () => {
    const text = printCommand({
      add: { element: { ...IN, name: 'm', elem: [{ elem: { val: '1.1.1.1 }; flush ruleset', comment: 'a"b\nc' } }] } },
    });
    expect(text).toBe('add element ip t m { "1.1.1.1 }; flush ruleset" comment "a?b?c" }');
  });
});

describe('a transaction', () => {
  it('is not changed by append', () => {
    const first = transaction(withComment('1'));
    const both = append(first, withComment('2'), withComment('3'));
    expect(first.commands).toHaveLength(1);
    expect(both.commands).toEqual([withComment('1'), withComment('2'), withComment('3')]);
  });

  it('is sent as the commands stand', () => {
    expect(JSON.parse(toJson(transaction(withComment('ü 1'))))).toEqual({ nftables: [withComment('ü 1')] });
  });

  it.each([
    ['a quote', 'a"b'],
    ['a line end', 'a\nb'],
    ['NUL', 'a\u0000'],
    ['half of a surrogate pair', 'a\ud800b'],
    ['an escape sequence', '\u001b[31m'],
    ['more than 128 bytes', 'ü'.repeat(65)],
  ])('is refused with %s in a comment', (_, comment) => {
    expect(fault(withComment(comment))).toMatchObject({ code: 'refused', index: 1 });
  });

  it('takes a comment of 128 bytes and characters beyond the basic plane', () => {
    expect(toJson(transaction(withComment('ü'.repeat(64))))).toContain('ü');
    expect(toJson(transaction(withComment('😀')))).toContain('😀');
  });

  it.each(['', '1st', 'a b', 'a;b', 'ü', '@a', '-j', 'a'.repeat(256)])('is refused with the name %j', (name) => {
    expect(fault({ add: { chain: { ...IN, name } } }).message).toBe(
      'Cannot send command 2: name is not a name that nft can write',
    );
    expect(fault({ add: { rule: { ...IN, chain: 'c', expr: [{ jump: { target: name } }] } } }).code).toBe('refused');
  });

  it.each([Number.NaN, Number.POSITIVE_INFINITY, 1.5, 2 ** 53, undefined, true])(
    'is refused with the value %s',
    (value) => {
      expect(fault({ add: { chain: { ...IN, name: 'c', prio: value } } }).code).toBe('refused');
    },
  );
});
