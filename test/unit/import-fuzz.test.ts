/** Any input gives a report or a clear error, in bounded time; every rule of it is accounted for; rules go and come back in order. */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { KvmIbError } from '../../lib/core/errors.ts';
import type { Config } from '../../lib/core/mapping.ts';
import type { ImportReport } from '../../lib/import/report.ts';
import { removalText, returnPlan, textsOf } from '../../lib/iptables/change.ts';
import { parseRules } from '../../lib/iptables/rule.ts';
import { looksSaved, parseSaved } from '../../lib/iptables/save.ts';
import { parseScript } from '../../lib/iptables/script.ts';
import { analyseFiles } from '../../lib/ops/import.ts';
import { network, CONFIG as ONE } from '../support/fake-host.ts';

const CONFIG: Config = { ...ONE, networks: [network()] };
const CORPUS = join(import.meta.dirname, '../fixtures/import');
const SEEDS = readdirSync(CORPUS)
  .filter((name) => !name.endsWith('.json'))
  .map((name) => readFileSync(join(CORPUS, name), 'utf8'));
/** An expression that backtracks would take longer, also on a busy machine. */
const LIMIT_MS = 20_000;
/** KVM_IB_FUZZ_RUNS: more, for a long search. */
const RUNS = { numRuns: Number(process.env['KVM_IB_FUZZ_RUNS'] ?? 400) };

function report(text: string): ImportReport | undefined {
  const began = performance.now();
  try {
    return analyseFiles(CONFIG, [{ name: 'input', text }]).report;
  } catch (error) {
    expect(error).toBeInstanceOf(KvmIbError);
    const { message, why, fix } = error as KvmIbError;
    for (const part of [message, why, fix]) expect(part).toMatch(/^[^\u0000-\u0008\u001b]+$/);
    return undefined;
  } finally {
    expect(performance.now() - began).toBeLessThan(LIMIT_MS);
  }
}

/** Each rule of table nat is of a pair, a half or a conflict, or left alone with a reason. */
function expectAccounted(text: string, found: ImportReport): void {
  const { tables } = looksSaved(text) ? parseSaved(text) : parseScript(text);
  const rules = [...(tables.get('nat')?.chains.values() ?? [])].flatMap((chain) =>
    chain.rules.map((rule) => `-A ${rule.chain} ${rule.text}`.trimEnd()),
  );
  const told = [
    ...[...found.pairs, ...found.halves, ...found.conflicts].flatMap((one) => one.rules),
    ...found.left.map(({ why, ...rule }) => {
      expect(why).not.toBe('');
      return rule;
    }),
  ].map(({ rule }) => rule);
  expect(told.sort()).toEqual(rules.sort());
}

const word = fc.oneof(
  fc.constantFrom(
    ...['-s', '-d', '-i', '-o', '-p', '-m', '-j', '-g', '!', '--to-source', '--to-destination', '--comment', '--dport'],
    ...['-A', '-I', '-D', '-R', '-F', '-N', '-t', 'nat', 'PREROUTING', 'POSTROUTING', 'OUTPUT', 'VM1', 'VM2', '1', '2'],
    ...['ACCEPT', 'DNAT', 'SNAT', 'MASQUERADE', 'RETURN', 'LOG', 'tcp', 'udp', 'mark', 'comment', '80', 'ib0', 'eth+'],
    ...['192.168.122.2', '192.168.122.3/32', '192.168.10.202', '192.168.10.203/24', '0.0.0.0/0', '1.2.3.4-1.2.3.9'],
    ...['"a b', '"', "'", '\\', '$X', '$((1+1))', '`', '{1..3}', 'x,y', '#', ';', '&&', '||', '(', ')', '<<EOF', 'for'],
  ),
  fc.string({ maxLength: 12 }),
);
const line = fc.array(word, { maxLength: 12 }).map((words) => words.join(' '));
const ruleLine = fc
  .tuple(
    fc.constantFrom('PREROUTING', 'POSTROUTING', 'OUTPUT', 'VM1', 'VM2'),
    fc.constantFrom('-s', '-d'),
    fc.constantFrom('192.168.122.2/32', '192.168.10.202/32', '192.168.122.0/24', '10.0.0.1/32'),
    fc.constantFrom(
      ...[
        '-j DNAT --to-destination 192.168.122.2',
        '-j SNAT --to-source 192.168.10.202',
        '-j VM1',
        '-g VM2',
        '-j ACCEPT',
      ],
      ...[
        '-o ib0 -j SNAT --to-source 192.168.10.202',
        '-p tcp -m tcp --dport 80 -j DNAT --to-destination 192.168.122.2:80',
      ],
    ),
  )
  .map(([chain, option, address, rest]) => `-A ${chain} ${option} ${address} ${rest}`);

describe('any input', () => {
  test('bytes', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 2_000 }), (bytes) => void report(Buffer.from(bytes).toString('utf8'))),
      RUNS,
    );
  });

  test('words of iptables and of a shell, in any order', () => {
    fc.assert(
      fc.property(
        fc.array(
          fc.oneof(
            line,
            line.map((text) => `iptables -t nat ${text}`),
          ),
          { maxLength: 30 },
        ),
        (lines) => {
          const text = lines.join('\n');
          const found = report(text);
          if (found !== undefined) expectAccounted(text, found);
        },
      ),
      RUNS,
    );
  });

  test('rules in any order, chains that call each other', () => {
    fc.assert(
      fc.property(fc.array(fc.oneof(ruleLine, line), { maxLength: 40 }), (lines) => {
        const text = ['*nat', ':VM1 - [0:0]', ':VM2 - [0:0]', ...lines, 'COMMIT', ''].join('\n');
        const found = report(text);
        if (found !== undefined) expectAccounted(text, found);
      }),
      RUNS,
    );
  });

  test('the corpus, with pieces cut out, doubled and put elsewhere', () => {
    const edit = fc.record({
      from: fc.nat(),
      length: fc.nat({ max: 200 }),
      to: fc.nat(),
      insert: fc.string({ maxLength: 8 }),
    });
    fc.assert(
      fc.property(fc.constantFrom(...SEEDS), fc.array(edit, { maxLength: 4 }), (seed, edits) => {
        let text = seed;
        for (const { from, length, to, insert } of edits) {
          const at = from % (text.length + 1);
          const piece = text.slice(at, at + length);
          const rest = text.slice(0, at) + text.slice(at + length);
          const place = to % (rest.length + 1);
          text = rest.slice(0, place) + insert + piece + rest.slice(place);
        }
        const found = report(text);
        if (found !== undefined) expectAccounted(text, found);
      }),
      RUNS,
    );
  });

  test.each([
    ['a quote without end', `iptables -t nat -A POSTROUTING -m comment --comment "${'x\\'.repeat(50_000)}`],
    [
      'braces in braces',
      `iptables -t nat -A POSTROUTING -s 10.0.0.{1..9}{1..9}{1..9}{1..9}{1..9}{1..9}{1..9} -j ACCEPT`,
    ],
    [
      'loops in loops',
      `${'for i in {1..99}; do '.repeat(8)} iptables -t nat -A POSTROUTING -j ACCEPT ${'; done'.repeat(8)}`,
    ],
    ['functions that call themselves', 'f() { f; f; iptables -t nat -A POSTROUTING -j ACCEPT; }; f'],
    [
      'variables that double',
      `${Array.from({ length: 60 }, (_, n) => `A${n + 1}=$A${n}$A${n}`)
        .join('\n')
        .replace('$A0$A0', 'xx')}\niptables -A INPUT -s $A60`,
    ],
    ['parentheses', `iptables -A INPUT -s ${'$('.repeat(20_000)}`],
    [
      'chains that call each other twice',
      [
        '*nat',
        ...Array.from({ length: 30 }, (_, n) => `:C${n} - [0:0]\n-A C${n} -j C${n + 1}\n-A C${n} -j C${n + 1}`),
        '-A PREROUTING -j C0',
        'COMMIT',
      ].join('\n'),
    ],
    ['a chain that calls itself', '*nat\n:A - [0:0]\n-A A -j A\n-A PREROUTING -j A\nCOMMIT\n'],
    [
      'lists times lists',
      `iptables -t nat -A POSTROUTING -s ${Array.from({ length: 3_000 }, (_, n) => `10.0.${n >> 8}.${n & 255}`).join()} -d ${Array.from({ length: 3_000 }, (_, n) => `10.1.${n >> 8}.${n & 255}`).join()} -j ACCEPT`,
    ],
    ['escape sequences', '*nat\n-A PREROUTING -m comment --comment "\u001b[2J\u001b]0;x\u0007" -j ACCEPT\nCOMMIT\n'],
  ])('%s', { timeout: 60_000 }, (_, text) => {
    report(text);
  });
});

test('rules that are taken out come back where they were, whatever others did meanwhile', () => {
  const rule = fc.tuple(fc.constantFrom('a', 'b', 'c', 'd'), fc.boolean());
  fc.assert(
    fc.property(
      fc.array(rule, { maxLength: 12 }),
      fc.array(fc.tuple(fc.nat(), fc.constantFrom('x', 'y')), { maxLength: 4 }),
      (rules, foreign) => {
        const before = rules.map(([text, gone]) => `-s 10.0.0.1 -j ${text}${gone ? '-gone' : ''}`);
        const isGone = (text: string): boolean => text.endsWith('-gone');
        const now = before.filter((text) => !isGone(text));
        for (const [at, text] of foreign) now.splice(at % (now.length + 1), 0, `-j ${text}`);
        const table = {
          name: 'nat',
          chains: new Map([
            [
              'C',
              { name: 'C', policy: undefined, rules: now.flatMap((text) => parseRules('C', text.split(' '), text, 1)) },
            ],
          ]),
        };
        const plan = returnPlan(table, new Map([['C', before]]), ({ text }) => isGone(text));
        // The lines, carried out as iptables does.
        const list = [...now];
        for (const found of plan.text.matchAll(/^-I C (\d+) (.*)$/gm))
          list.splice(Number(found[1]) - 1, 0, found[2] ?? '');
        expect(list).toEqual(plan.expected.get('C'));
        expect(list.filter((text) => before.includes(text))).toEqual(before);
        expect(list.filter((text) => !isGone(text))).toEqual(now);
        expect(plan.count).toBe(before.filter(isGone).length);
      },
    ),
    { numRuns: 500 },
  );
});

test('what is taken out is named by what it says, as iptables-save says it', () => {
  const { tables } = parseSaved(
    '*nat\n-A POSTROUTING -s 10.0.0.1/32 -m comment --comment "a \\"b\\" c" -j ACCEPT\nCOMMIT\n',
  );
  const [text = ''] = textsOf(
    tables.get('nat')?.chains.get('POSTROUTING') ?? { name: '', policy: undefined, rules: [] },
  );
  expect(removalText('nat', [{ chain: 'POSTROUTING', text }])).toBe(
    '*nat\n-D POSTROUTING -s 10.0.0.1/32 -m comment --comment "a \\"b\\" c" -j ACCEPT\nCOMMIT\n',
  );
});
