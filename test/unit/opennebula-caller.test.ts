/** Which OpenNebula calls, by what arrives. */
import { describe, expect, test } from 'vitest';
import type { CallSigns } from '../../lib/opennebula/caller.ts';
import { isBeforeVmXml, wantsErrorBlock } from '../../lib/opennebula/caller.ts';

const UUID = '6f0a1c1e-6c0e-4d0c-9a0e-5a3b3f1d2c42';

test.each<[string, CallSigns, { readonly block: boolean; readonly before: boolean }]>([
  ['nothing', {}, { block: false, before: false }],
  ['a UUID', { deployId: UUID }, { block: false, before: false }],
  ['an empty deploy id', { deployId: '' }, { block: false, before: false }],
  ['a deploy id of the old form', { deployId: 'one-42' }, { block: true, before: true }],
  ['a domain that only begins like one', { deployId: 'one-42x' }, { block: false, before: false }],
  ['no input', { hasInput: false }, { block: true, before: true }],
  ['input', { hasInput: true, deployId: UUID }, { block: false, before: false }],
  ['no vm.xml', { hasVmXml: false, remotesVersion: null }, { block: true, before: true }],
  [
    'no vm.xml, of a version that writes it',
    { hasVmXml: false, domainVersion: '6.0.0' },
    { block: true, before: false },
  ],
  ['VERSION before the form', { hasInput: false, remotesVersion: '7.0.0' }, { block: false, before: false }],
  ['the domain before VERSION', { domainVersion: '5.12.0', remotesVersion: '6.4.0' }, { block: true, before: true }],
  ['a domain that says nothing', { domainVersion: 'x', remotesVersion: '6.4.0' }, { block: false, before: false }],
])('%s', (_, signs, { block, before }) => {
  expect(wantsErrorBlock(signs)).toBe(block);
  expect(isBeforeVmXml(signs)).toBe(before);
});

describe('a version', () => {
  test.each([
    ['4.14.2', true, true],
    ['5.13.90', true, true],
    ['6.0.0', true, false],
    ['6.0.0.3\n', true, false],
    ['6.0.2', true, false],
    ['6.0.3', false, false],
    ['6.1.80', false, false],
    ['6.10.5\n', false, false],
    ['10.0', false, false],
    ['6', false, false],
    ['6.0.', true, false],
    ['', false, false],
    ['6.0.2\u001b[31m', true, false],
  ])('%j', (text, block, before) => {
    expect([wantsErrorBlock({ remotesVersion: text }), isBeforeVmXml({ remotesVersion: text })]).toEqual([
      block,
      before,
    ]);
  });
});
