/** Ten thousand pairs: the report comes in time, says how far it is on a terminal, and the switch and the way back are whole. */
import { execFileSync } from 'node:child_process';
import { rmSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { temporaryDirectory } from '../support/fake-host.ts';
import { ip } from '../support/kernel-host.ts';

const COMMAND = resolve(import.meta.dirname, '../../dist/kvm-ib.mjs');
const PAIRS = 10_000;
const LIMIT_MS = 10_000;
const numbers = Array.from({ length: PAIRS }, (_, n) => `${1 + Math.floor(n / 250)}.${1 + (n % 250)}`);

const run = (program: string, args: readonly string[], input?: string): string =>
  execFileSync(program, args, {
    encoding: 'utf8',
    maxBuffer: 2 ** 28,
    stdio: 'pipe',
    env: { ...process.env, KVM_IB_CONFIG: join(folder, 'kvm-ib.yaml'), KVM_IB_STATE_DIR: join(folder, 'state') },
    ...(input === undefined ? {} : { input }),
  });
const kvmIb = (...args: readonly string[]): string => run(process.execPath, [COMMAND, ...args]);
const rules = (): number => run('/usr/sbin/iptables-legacy-save', ['-t', 'nat']).match(/^-A/gm)?.length ?? 0;
const addresses = (): number => ip('-4', '-o', 'address', 'show', 'dev', 'ib0').trim().split('\n').length;

let folder: string;
beforeAll(() => {
  folder = temporaryDirectory();
  ip('link', 'add', 'ib0', 'mtu', '2044', 'type', 'veth', 'peer', 'name', 'fabric0', 'mtu', '2044');
  ip('link', 'add', 'virbr1', 'type', 'bridge');
  for (const link of ['ib0', 'fabric0', 'virbr1']) ip('link', 'set', link, 'up');
  ip('address', 'add', '10.9.0.1/16', 'dev', 'ib0');
  const network = {
    name: 'ib',
    device: 'ib0',
    bridge: 'virbr1',
    guests: '10.8.1.0-10.8.60.255',
    addresses: '10.9.1.0-10.9.60.255',
  };
  writeFileSync(join(folder, 'kvm-ib.yaml'), JSON.stringify({ networks: [network] }));
  const pairs = numbers.flatMap((n) => [
    `-A PREROUTING -d 10.9.${n}/32 -j DNAT --to-destination 10.8.${n}`,
    `-A POSTROUTING -s 10.8.${n}/32 -o ib0 -j SNAT --to-source 10.9.${n}`,
  ]);
  run('/usr/sbin/iptables-legacy-restore', [], ['*nat', ...pairs, 'COMMIT', ''].join('\n'));
  run('/usr/sbin/ip', ['-batch', '-'], numbers.map((n) => `address add 10.9.${n}/16 dev ib0\n`).join(''));
}, 120_000);
afterAll(() => {
  run('/usr/sbin/iptables-legacy-restore', [], '*nat\nCOMMIT\n');
  for (const link of ['ib0', 'virbr1']) ip('link', 'delete', link);
  rmSync(folder, { recursive: true, force: true });
}, 120_000);

test('reported in time, with progress on a terminal', { timeout: 60_000 }, () => {
  const began = performance.now();
  const text = run('/usr/bin/script', ['-qec', `${process.execPath} ${COMMAND} import`, '/dev/null']);
  const took = performance.now() - began;
  process.stdout.write(`import of ${PAIRS} pairs, reported in ${Math.round(took)} ms\n`);
  expect(took).toBeLessThan(LIMIT_MS);
  expect(text).toContain(`comparing 5000 of ${PAIRS}`);
  expect(text).toMatch(/^ *10000 x same +inbound\/fabric +reaches the guest from the other host/m);
});

test('taken over and given back', { timeout: 180_000 }, () => {
  const began = performance.now();
  kvmIb('import', '--apply', '--accept', 'inbound,outbound,host,loopback');
  const over = performance.now();
  expect([rules(), addresses()]).toEqual([0, PAIRS + 1]);
  expect(kvmIb('status')).toContain(`OK: ${PAIRS} mappings`);
  const back = performance.now();
  kvmIb('import', '--rollback');
  process.stdout.write(`over in ${Math.round(over - began)} ms, back in ${Math.round(performance.now() - back)} ms\n`);
  expect([rules(), addresses()]).toEqual([2 * PAIRS, PAIRS + 1]);
});
