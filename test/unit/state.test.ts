/** State files: what is one, what is not, and what each means to reconcile. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { Phase, StateFile } from '../../lib/core/state.ts';
import { mappingsOf, parseStateFile, STATE_VERSION, verdictOf } from '../../lib/core/state.ts';
import { guestOf, holderOf, mapping, vmOwner } from '../support/fake-host.ts';

const active: Phase = { name: 'active' };
const removing: Phase = { name: 'removing' };
const pending: Phase = { name: 'pending', action: 'deploy', holder: holderOf(7) };

function file(more: Partial<StateFile> = {}): StateFile {
  return {
    version: STATE_VERSION,
    owner: vmOwner(2),
    phase: active,
    mappings: [mapping(2)],
    previous: [],
    leftovers: [],
    detachedAliases: [],
    updated: '2026-01-01T00:00:00.000Z',
    ...more,
  };
}

describe('a state file', () => {
  it.each([
    ['of a VM', file()],
    [
      'of a mapping by hand',
      file({ owner: { kind: 'manual', guest: guestOf(2) }, mappings: [mapping(2, { mac: null })] }),
    ],
    ['of a static mapping', file({ owner: { kind: 'static', guest: guestOf(2) }, phase: removing })],
    ['of an action under way', file({ phase: pending, previous: [mapping(3)], leftovers: [mapping(4)] })],
  ])('%s is read as it was written', (_, written) => {
    expect(parseStateFile(JSON.stringify(written))).toEqual(written);
  });

  it('cut off anywhere is none', () => {
    const text = JSON.stringify(file({ phase: pending, previous: [mapping(3)] }));
    fc.assert(
      fc.property(fc.integer({ min: 0, max: text.length - 1 }), (length) => {
        expect(parseStateFile(text.slice(0, length))).toBeUndefined();
      }),
    );
  });

  const broken: readonly (readonly [string, unknown])[] = [
    ['of another version', { ...file(), version: 2 }],
    ['with a host name for an address', { ...file(), mappings: [{ ...mapping(2), address: 'localhost' }] }],
    ['with an IPv6 address', { ...file(), mappings: [{ ...mapping(2), guest: '::1' }] }],
    ['with a link name that is a path', { ...file(), mappings: [{ ...mapping(2), device: '../lo' }] }],
    ['with an upper-case MAC', { ...file(), mappings: [{ ...mapping(2), mac: '02:00:C0:A8:7A:02' }] }],
    ['with a label too long for the kernel', { ...file(), mappings: [{ ...mapping(2), label: 'x'.repeat(16) }] }],
    ['with a negative VM id', { ...file(), owner: { kind: 'vm', vm: -1 } }],
    ['with an unknown phase', { ...file(), phase: { name: 'asleep' } }],
    ['with a pending phase and no holder', { ...file(), phase: { name: 'pending', action: 'deploy' } }],
    ['without mappings', { ...file(), mappings: undefined }],
    ['that is a list', []],
    ['that is null', null],
  ];
  it.each(broken)('%s is none', (_, value) => {
    expect(parseStateFile(JSON.stringify(value))).toBeUndefined();
  });
});

describe('the mappings that a file may have in the kernel', () => {
  it('are the wish, what was before, and what was left over, each once', () => {
    const all = file({
      mappings: [mapping(2)],
      previous: [mapping(2), mapping(3)],
      leftovers: [mapping(3), mapping(4)],
    });
    expect(mappingsOf(all)).toEqual([mapping(2), mapping(3), mapping(4)]);
    expect(mappingsOf(undefined)).toEqual([]);
  });

  it('differ by label and MAC as well, since the kernel holds both', () => {
    const before = [mapping(2, { nic: 1 }), mapping(2, { mac: 9 })];
    expect(mappingsOf(file({ previous: before }))).toEqual([mapping(2), ...before]);
  });
});

describe('the verdict on a file', () => {
  const manual = { kind: 'manual', guest: guestOf(2) } as const;
  const active = (bootId: string) => ({ name: 'active', bootId }) as const;
  it.each([
    ['an active VM with its domain', file(), false, true, 'keep'],
    ['an active VM without its domain', file(), false, false, 'release'],
    ['an active VM when libvirt is silent', file({ phase: active('boot') }), false, undefined, 'keep'],
    ['an active VM of an older version when libvirt is silent', file(), false, undefined, 'keep'],
    [
      'an active VM of another boot when libvirt is silent',
      file({ phase: active('other') }),
      false,
      undefined,
      'leave',
    ],
    ['an active VM of another boot with its domain', file({ phase: active('other') }), false, true, 'keep'],
    ['an active VM of another boot without its domain', file({ phase: active('other') }), false, false, 'release'],
    ['a pending VM whose action lives', file({ phase: pending }), true, false, 'leave'],
    ['a pending VM whose action died, with its domain', file({ phase: pending }), false, true, 'keep'],
    ['a pending VM whose action died, without its domain', file({ phase: pending }), false, false, 'release'],
    ['a pending VM whose action died, when libvirt is silent', file({ phase: pending }), false, undefined, 'leave'],
    ['a removal that was begun', file({ phase: removing }), false, true, 'release'],
    ['a removal that was begun, when libvirt is silent', file({ phase: removing }), false, undefined, 'release'],
    ['a mapping by hand, whatever libvirt says', file({ owner: manual }), false, false, 'keep'],
    ['a mapping by hand whose command died', file({ owner: manual, phase: pending }), false, undefined, 'keep'],
    ['a mapping by hand whose command lives', file({ owner: manual, phase: pending }), true, undefined, 'leave'],
  ] as const)('of %s', (_, of, holderAlive, domainActive, expected) => {
    expect(verdictOf(of, holderAlive, domainActive, 'boot')).toBe(expected);
  });
});
