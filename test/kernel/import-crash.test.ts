/**
 * An import that is killed at any of its steps: the old rules or our table translate each address at every moment, and
 * afterwards it can go on or back. Every call that reaches the kernel or the disk is a step.
 */
import { execFileSync } from 'node:child_process';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { createImportHost } from '../../lib/host/import-host.ts';
import type { Variant } from '../../lib/iptables/table.ts';
import type { Host } from '../../lib/ops/host.ts';
import type { ImportHost } from '../../lib/ops/import.ts';
import { importApply, importResume, importRollback } from '../../lib/ops/import-switch.ts';
import { reconcile } from '../../lib/ops/reconcile.ts';
import { CONFIG, temporaryDirectory } from '../support/fake-host.ts';
import { createRealHost, ip, makeLinks, type RealHost, removeLinks } from '../support/kernel-host.ts';

const run = (program: string, args: readonly string[], input?: string): string =>
  execFileSync(program, args, { encoding: 'utf8', stdio: 'pipe', ...(input === undefined ? {} : { input }) });

const NUMBERS = [2, 3, 4];
const ACCEPTED = ['inbound', 'outbound', 'host', 'loopback'].map((what) => ({ what, address: undefined }));

const RULES = [
  '-A PREROUTING -i eth0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.1.1.1:8080',
  ...NUMBERS.map((n) => `-A PREROUTING -d 192.168.10.20${n}/32 -j DNAT --to-destination 192.168.122.${n}`),
  '-A POSTROUTING -o eth0 -j MASQUERADE',
  ...NUMBERS.map((n) => `-A POSTROUTING -s 192.168.122.${n}/32 -o ib0 -j SNAT --to-source 192.168.10.20${n}`),
  '-A POSTROUTING -s 10.0.0.0/8 -j ACCEPT',
];

let directory: string;
beforeEach(() => makeOld('legacy'));
afterEach(() => {
  clear();
  removeLinks();
});

function clear(): void {
  for (const variant of ['legacy', 'nft']) run(`/usr/sbin/iptables-${variant}-restore`, [], '*nat\nCOMMIT\n');
}

/** One alias is secondary to the host's address, one is a /32 as ours, one is the first of a subnet that others live in. */
function makeOld(variant: Variant): void {
  directory = temporaryDirectory();
  makeLinks();
  ip('address', 'add', '192.168.10.1/24', 'dev', 'ib0');
  ip('address', 'add', '192.168.10.202/24', 'brd', '+', 'dev', 'ib0', 'label', 'ib0:2');
  ip('address', 'add', '192.168.10.203/32', 'dev', 'ib0', 'label', 'ib0:3');
  ip('address', 'add', '192.168.10.99/25', 'dev', 'ib0', 'label', 'ib0:vip');
  ip('address', 'add', '192.168.10.204/25', 'dev', 'ib0', 'label', 'ib0:4');
  ip('address', 'add', '192.168.10.129/25', 'dev', 'ib0');
  run(`/usr/sbin/iptables-${variant}-restore`, [], ['*nat', ...RULES, 'COMMIT', ''].join('\n'));
}

const BOTH = ['on', 'back'] as const;

class Killed extends Error {}

/** A process that dies at its n-th call: that one and all later ones do nothing. */
async function process(dieAt: number, when: 'before' | 'after' = 'before') {
  const real = await createRealHost(CONFIG, directory);
  const state = { calls: 0 };
  const dying = <T extends object>(target: T): T =>
    new Proxy(target, {
      get: (object, name) => {
        const value = Reflect.get(object, name) as unknown;
        if (typeof value !== 'function') return value;
        return (...args: readonly unknown[]): unknown => {
          state.calls += 1;
          if (state.calls > dieAt) throw new Killed();
          const last = state.calls === dieAt;
          if (last && when === 'before') throw new Killed();
          const result = (value as (...args: readonly unknown[]) => unknown).apply(object, [...args]);
          if (!last) return result;
          if (!(result instanceof Promise)) throw new Killed();
          return result.then(() => Promise.reject(new Killed()));
        };
      },
    });
  const host: Host = { ...real, nat: dying(real.nat), store: dying(real.store) };
  const ports = createImportHost(directory);
  const wrapped: ImportHost = {
    ...ports,
    guests: async () => ({ kind: 'asked', nics: [] }),
    foreignNat: async () => [],
    iptables: dying(ports.iptables),
    addresses: dying(ports.addresses),
    journal: dying(ports.journal),
  };
  return { host, ports: wrapped, state, real };
}

interface Seen {
  readonly nat: string;
  readonly addresses: string;
  readonly pairs: readonly string[];
  readonly files: number;
}

async function seen(host: RealHost, variant: Variant): Promise<Seen> {
  const nat = run(`/usr/sbin/iptables-${variant}-save`, []);
  const { guestToIb, ibToGuest } = await host.nat.lookup(
    NUMBERS.map((n) => ({ guest: `192.168.122.${n}`, address: `192.168.10.20${n}`, mac: null, comment: '' }) as never),
  );
  return {
    nat: nat
      .split('\n')
      .filter((line) => line.startsWith('-A'))
      .join('\n'),
    addresses: ip('-4', '-o', 'address', 'show', 'dev', 'ib0')
      .split('\n')
      .map((line) =>
        line
          .replace(/^\d+: ib0\s+/, '')
          .replace(/\\.*$/, '')
          // Which of a subnet comes first is not as before where another one has moved up.
          .replace('secondary ', '')
          .trim(),
      )
      .sort()
      .join('\n'),
    pairs: [...guestToIb]
      .filter(([guest, address]) => ibToGuest.get(address) === guest)
      .map(([guest]) => guest)
      .sort(),
    files: host.store.all().files.length,
  };
}

/** Each guest is translated both ways, by the old rules or by ours, and its address is on this host. */
function expectServed({ nat, addresses, pairs }: Seen): void {
  for (const n of NUMBERS) {
    const byOld = nat.includes(`-d 192.168.10.20${n}/32`) && nat.includes(`-s 192.168.122.${n}/32`);
    expect({ n, served: byOld || pairs.includes(`192.168.122.${n}`) }).toEqual({ n, served: true });
    // One that differs from ours by its label alone is away for one step, which no packet notices; ARP asks again.
    if (n !== 3) expect(addresses).toContain(`192.168.10.20${n}/`);
  }
  for (const rule of [RULES[0], RULES[4], RULES[8]]) expect(nat).toContain(rule);
  expect(addresses).toContain('192.168.10.99/25');
}

test.each(['legacy', 'nft'] as const)(
  'iptables-%s: killed at every step, then on or back',
  { timeout: 280_000 },
  async (variant) => {
    clear();
    makeOld(variant);
    const whole = await process(Number.POSITIVE_INFINITY);
    const before = await seen(whole.real, variant);
    const options = { accepted: ACCEPTED, manual: true };
    await importApply(whole.host, whole.ports, options);
    const steps = whole.state.calls;
    const after = await seen(whole.real, variant);
    expect(after).toMatchObject({ pairs: NUMBERS.map((n) => `192.168.122.${n}`), files: 3 });
    expect(after.nat.split('\n')).toEqual([RULES[0], RULES[4], RULES[8]]);
    await importRollback(whole.host, whole.ports);
    const backSteps = whole.state.calls - steps;
    expect(await seen(whole.real, variant)).toEqual(before);
    expect(steps).toBeGreaterThan(20);

    for (let step = 1; step <= steps; step++) {
      // One part of iptables with both ways at each step, the other with one.
      for (const how of variant === 'legacy' ? BOTH : [BOTH[step % 2] ?? 'on']) {
        clear();
        makeOld(variant);
        const victim = await process(step, step % 2 === 0 ? 'after' : 'before');
        // At its end reconcile tells what it could not do, and goes on.
        await importApply(victim.host, victim.ports, options).catch(() => undefined);
        const fresh = await process(Number.POSITIVE_INFINITY);
        expectServed(await seen(fresh.real, variant));
        const phase = fresh.ports.journal.read()?.phase;
        if (phase === undefined) {
          expect({ step, ...(await seen(fresh.real, variant)) }).toEqual({ step, ...before });
          continue;
        }
        if (phase === 'applying' || phase === 'switching') {
          await expect(reconcile(fresh.host)).rejects.toMatchObject({ code: 'conflict' });
          expectServed(await seen(fresh.real, variant));
          if (how === 'on') await importResume(fresh.host, fresh.ports, {});
        }
        if (how === 'back') await importRollback(fresh.host, fresh.ports);
        expect({ step, how, ...(await seen(fresh.real, variant)) }).toEqual({
          step,
          how,
          ...(how === 'on' ? after : before),
        });
      }
    }

    for (let step = 1; step <= backSteps; step++) {
      clear();
      makeOld(variant);
      const first = await process(Number.POSITIVE_INFINITY);
      await importApply(first.host, first.ports, options);
      const victim = await process(step, step % 2 === 0 ? 'after' : 'before');
      await importRollback(victim.host, victim.ports).catch(() => undefined);
      const fresh = await process(Number.POSITIVE_INFINITY);
      expectServed(await seen(fresh.real, variant));
      if (fresh.ports.journal.read()?.phase !== 'rolled-back') await importRollback(fresh.host, fresh.ports);
      expect({ step, ...(await seen(fresh.real, variant)) }).toEqual({ step, ...before });
    }
    globalThis.process.stdout.write(
      `iptables-${variant}: killed at ${steps} steps over, twice, and at ${backSteps} back\n`,
    );
  },
);
