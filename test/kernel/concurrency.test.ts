/** Many processes of the command at once on one host: the lock lets them in one by one, and the end state is right. */
import { spawn } from 'node:child_process';
import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { exec } from '../../lib/host/exec.ts';
import { withLock } from '../../lib/host/lock.ts';
import { createStore } from '../../lib/host/store.ts';
import { createNft } from '../../lib/nftables-json/index.ts';
import type { Store } from '../../lib/ops/host.ts';
import { claimsFor, claimsOf, elementsOf, temporaryDirectory, unitsOf } from '../support/fake-host.ts';
import { ip, makeLinks, removeLinks } from '../support/kernel-host.ts';

const PROGRAM = fileURLToPath(new URL('../../dist/kvm-ib.mjs', import.meta.url));
const CONFIG = `networks:
  - name: ib
    device: ib0
    bridge: virbr1
    guests: 192.168.122.2-192.168.122.40
    addresses: 192.168.10.102-192.168.10.140
`;

let directory: string;
let store: Store;
beforeAll(() => {
  if (!existsSync(PROGRAM)) throw new Error('dist/ is not built: run `npm run build` first');
});
beforeEach(async () => {
  makeLinks();
  directory = temporaryDirectory();
  writeFileSync(join(directory, 'kvm-ib.yaml'), CONFIG);
  store = createStore(join(directory, 'state'));
  expect(await kvmIb('reconcile')).toMatchObject({ status: 0 });
});
afterAll(removeLinks);

interface Ended {
  readonly status: number | null;
  readonly stderr: string;
}

/** @param killAfter milliseconds until it is killed, at whatever instruction it is */
function kvmIb(
  args: string,
  options: { readonly killAfter?: number; readonly lockTimeout?: number } = {},
): Promise<Ended> {
  const env = {
    ...process.env,
    KVM_IB_CONFIG: join(directory, 'kvm-ib.yaml'),
    KVM_IB_STATE_DIR: join(directory, 'state'),
    // Nobody is on the fabric who could answer.
    KVM_IB_PROBE_MS: '3',
    ...(options.lockTimeout === undefined ? {} : { KVM_IB_LOCK_TIMEOUT_MS: String(options.lockTimeout) }),
  };
  const child = spawn(process.execPath, [PROGRAM, ...args.split(' ')], { env, stdio: ['ignore', 'ignore', 'pipe'] });
  const timer =
    options.killAfter === undefined ? undefined : setTimeout(() => child.kill('SIGKILL'), options.killAfter);
  let stderr = '';
  child.stderr.on('data', (chunk: Buffer) => {
    stderr += chunk.toString();
  });
  return new Promise((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (status) => {
      clearTimeout(timer);
      resolve({ status, stderr });
    });
  });
}

/** Kernel, files and claims say the same. @returns the guests that are mapped */
async function expectAgreement(): Promise<readonly string[]> {
  const { files, unreadable } = store.all();
  expect(unreadable).toEqual([]);
  expect(files.filter((file) => file.phase.name !== 'active')).toEqual([]);
  const mappings = files.flatMap((file) => file.mappings);
  const links = JSON.parse(ip('-j', '-4', 'address', 'show', 'dev', 'ib0')) as readonly {
    readonly addr_info?: readonly { readonly local: string; readonly prefixlen: number; readonly label: string }[];
  }[];
  const aliases = links.flatMap(({ addr_info = [] }) =>
    addr_info.map((a) => `ib0 ${a.local}/${a.prefixlen} ${a.label}`),
  );
  const listing = await createNft({ exec }).listTable('ip', 'kvm_ib');
  expect({ ...elementsOf(listing), aliases: aliases.sort() }).toEqual(unitsOf(mappings));
  expect(claimsOf(store.directory)).toEqual(claimsFor(files));
  return mappings.map((m) => m.guest).sort();
}

const guests = Array.from({ length: 15 }, (_, n) => `192.168.122.${n + 2}`);

describe('processes at once', () => {
  it('that add 15 mappings, with reconcile in between, all succeed; so do those that remove them', async () => {
    const added = await Promise.all([
      ...guests.map((guest) => kvmIb(`add --guest ${guest}`)),
      ...Array.from({ length: 3 }, () => kvmIb('reconcile')),
    ]);
    expect(added.filter(({ status }) => status !== 0)).toEqual([]);
    expect(await expectAgreement()).toEqual([...guests].sort());

    const half = guests.slice(0, 8);
    const changed = await Promise.all([
      ...half.map((guest) => kvmIb(`remove --guest ${guest}`)),
      ...guests.slice(8).map((guest) => kvmIb(`add --guest ${guest}`)),
      kvmIb('reconcile'),
      kvmIb('status'),
    ]);
    // Status takes the lock as well, so it never sees one in the middle.
    expect(changed.filter(({ status }) => status !== 0)).toEqual([]);
    expect(await expectAgreement()).toEqual(guests.slice(8).sort());
  }, 120_000);

  it('that want one address: exactly one gets it, the others are refused with exit code 4', async () => {
    const wanting = [1, 2, 3, 4, 5, 6].map((n) => kvmIb(`add --guest 192.168.122.${n + 1} --address 192.168.10.120`));
    const ended = (await Promise.all(wanting)).map(({ status }) => status);
    expect(ended.sort()).toEqual([0, 4, 4, 4, 4, 4]);
    expect(await expectAgreement()).toHaveLength(1);
  }, 60_000);

  it('that are killed at any moment leave what the next reconcile ends', async () => {
    for (let round = 0; round < 10; round++) {
      // A start takes some 100 ms, the work behind it 30: the kills are spread over both.
      const work = guests.slice(0, 4).map((guest, n) => {
        const command = (round + n) % 2 === 0 ? 'add' : 'remove';
        return kvmIb(`${command} --guest ${guest}`, { killAfter: 80 + 35 * ((round * 4 + n) % 11) });
      });
      await Promise.all(work);
      const { status, stderr } = await kvmIb('reconcile');
      expect(status, stderr).toBe(0);
      await expectAgreement();
    }
    expect((await kvmIb('status')).status).toBe(0);
  }, 120_000);

  it('that wait too long for the lock end with exit code 7, and nothing is changed', async () => {
    const before = await expectAgreement();
    await withLock(store.lockPath, { timeoutMs: 1_000, who: 'a test' }, async () => {
      const { status, stderr } = await kvmIb('add --guest 192.168.122.2', { lockTimeout: 50 });
      expect(status).toBe(7);
      expect(stderr).toContain('a test');
    });
    expect(await expectAgreement()).toEqual(before);
  });
});
