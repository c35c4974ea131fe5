/**
 * Cold moves between two hosts, as OpenNebula 7.x sends them: argv, standard input and order of each step, those that fail, those
 * that come late or twice, and what reaches no driver at all. At no time two hosts have the address, unless the fabric between
 * them is cut; in the end exactly one has all of it (alias, pair, file) and gets its packets, and the other has nothing.
 */
import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { EXIT } from '../../lib/core/errors.ts';
import { parsed } from '../support/cli.ts';
import { domainOf, ONE_LINE, testVm, tool, UUID } from '../support/driver.ts';
import type { HostName, Hosts, Hypervisor } from '../support/hosts.ts';
import { createHosts, guestReachesOut } from '../support/hosts.ts';
import { livelyStock } from '../support/libvirt-stand-in.ts';
import { requireOwnNetns } from '../support/netns.ts';
import { actionData, writeDeploymentFolder } from '../support/vm/opennebula.ts';

requireOwnNetns();

const VM = testVm(42);
/** A VM that is given the lease of the first after it was deleted. */
const HEIR = testVm(43);
const GUEST = '192.168.122.2';
const ADDRESS = '192.168.10.202';
const PAIR = [ADDRESS, `${ADDRESS} : ${GUEST}`, `${GUEST} : ${ADDRESS}`].sort();

let hosts: Hosts;
beforeAll(async () => {
  hosts = await createHosts();
});
beforeEach(async () => {
  // No domain runs any more, so each host releases all that a test has left.
  for (const host of both()) {
    host.libvirt.reset();
    host.endRepeats();
    if (!host.hasPower()) await host.powerOn();
    host.carrier(true);
    host.reached(true);
  }
  for (const { status, stderr } of await Promise.all(both().map((host) => host.cli('reconcile')))) {
    expect(`${status} ${stderr}`).toBe('0 ');
  }
  for (const host of both()) expect([host.kernel(), host.files()]).toEqual([[], {}]);
});
afterAll(() => hosts?.remove());

const both = (): readonly Hypervisor[] => [hosts.h1, hosts.h2];

// Steps -------------------------------------------------------------------------------------------------------------

/** One call or event, and what it must come to. */
interface Step {
  readonly at: HostName;
  readonly what: string;
  readonly run: (host: Hypervisor) => Promise<Outcome | undefined>;
  readonly succeeds: boolean;
  /** What it must say on standard error. */
  readonly says?: RegExp;
}

interface Outcome {
  readonly code: number | null;
  readonly stderr: string;
}

const step = (at: HostName, what: string, run: Step['run']): Step => ({ at, what, run, succeeds: true });

interface Given {
  readonly vm?: typeof VM;
  /** Of the action data: empty while the VM has none. */
  readonly deployId?: '';
  /** Host of the newest history record, where it is not the one of the call. */
  readonly newest?: HostName;
}

/** VMM_DRIVER_ACTION_DATA for a step on a host. */
function dataFor(host: Hypervisor, { vm = VM, deployId, newest }: Given, migrHost = ''): string {
  const recordHost = hosts[newest ?? host.name].hostName;
  const data = actionData(vm, recordHost)
    .replace(`<HOST>${recordHost}</HOST>`, `<HOST>${host.hostName}</HOST>`)
    .replace('<MIGR_HOST/>', migrHost === '' ? '<MIGR_HOST/>' : `<MIGR_HOST>${migrHost}</MIGR_HOST>`);
  return deployId === undefined ? data : data.replaceAll(`<DEPLOY_ID>${UUID}</DEPLOY_ID>`, '<DEPLOY_ID/>');
}

const checkpoint = (): string => join(hosts.folder, 'checkpoint');

const deploy = (at: HostName, { vm = VM }: Given = {}): Step =>
  step(at, `deploy ${vm.id}`, (host) => {
    const file = writeDeploymentFolder(host.folder, vm, host.hostName);
    return host.action('deploy', [file, host.hostName], vm.id, `${domainOf(vm)}\n`);
  });
const end =
  (action: 'shutdown' | 'cancel') =>
  (at: HostName, given: Given = {}): Step =>
    step(at, action, (host) => {
      const { vm = VM } = given;
      return host.action(action, [UUID, host.hostName], vm.id, dataFor(host, given));
    });
const shutdown = end('shutdown');
const cancel = end('cancel');
const save = (at: HostName, given: Given = {}): Step =>
  step(at, 'save', (host) => host.action('save', [UUID, checkpoint(), host.hostName], VM.id, dataFor(host, given)));
const restore = (at: HostName): Step =>
  step(at, 'restore', (host) => host.action('restore', [checkpoint(), host.hostName, UUID], VM.id, dataFor(host, {})));
const reboot = (at: HostName): Step =>
  step(at, 'reboot', (host) => host.action('reboot', [UUID, host.hostName], VM.id, dataFor(host, {})));
/** Both calls of recover --delete for a VM in MIGRATE: the newest host, then the one before, with the same data. */
const cleanup = (at: HostName, before: HostName): readonly Step[] =>
  [at, before].map((name) =>
    step(name, `cancel of cleanup (${at}, ${before})`, (host) => {
      const data = dataFor(hosts[at], {}, hosts[before].hostName);
      return host.action('cancel', [UUID, host.hostName], VM.id, data);
    }),
  );

/** The stock script fails before it does anything. */
const fails = (of: Step): Step => behaving(of, 'echo "ERROR: no" >&2; echo no >&2; exit 255\n', 'fails', false);
/** It has done its work, and fails. */
const failsLate = (of: Step): Step =>
  behaving(of, (host) => `${livelyStock(host.libvirt)}exit 255\n`, 'fails at its end', false);
/** The driver is killed before it does anything. */
const diesEarly = (of: Step): Step => behaving(of, 'kill -9 $PPID\n', 'dies at its beginning', false);
/** It has done its work, and the driver is killed before it hears of it. */
const diesLate = (of: Step): Step =>
  behaving(of, (host) => `${livelyStock(host.libvirt)}kill -9 $PPID\n`, 'dies at its end', false);

function behaving(of: Step, text: string | ((host: Hypervisor) => string), how: string, succeeds: boolean): Step {
  return {
    ...of,
    what: `${of.what}, which ${how}`,
    succeeds,
    run: async (host) => {
      host.behave(typeof text === 'string' ? text : text(host));
      try {
        return await of.run(host);
      } finally {
        host.behave(undefined);
      }
    },
  };
}

/** Nothing is done, and one line says why and what to do; the stock script has not run. */
const refused = (of: Step, says: RegExp): Step => ({
  ...of,
  what: `${of.what}, refused`,
  succeeds: false,
  says,
  run: async (host) => {
    const before = [host.runs(), host.kernel(), host.files()];
    const outcome = await of.run(host);
    expect(outcome?.stderr).toMatch(ONE_LINE);
    expect([host.runs(), host.kernel(), host.files()]).toEqual(before);
    return outcome;
  },
});

/** The address is held by h1 or h2, which is named by its hardware address. */
const heldBy = (name: HostName): RegExp =>
  new RegExp(`another host on ib0 has it: ${hosts[name].station} answers for it`);

const reconcile = (at: HostName): Step =>
  step(at, 'reconcile', async (host) => {
    const { status, stderr } = await host.cli('reconcile');
    return { code: status, stderr };
  });
/** reconcile that finds a second claim, here where the domain runs: exit code 4, and what to do. */
const contested = (of: Step, says: RegExp): Step => ({ ...of, what: `${of.what}, contested`, succeeds: false, says });
const event = (at: HostName, what: string, act: (host: Hypervisor) => void | Promise<void>): Step =>
  step(at, what, async (host) => {
    await act(host);
    return undefined;
  });
/** The guest powers itself off, qemu crashes, or somebody destroys the domain. */
const guestEnds = (at: HostName): Step => event(at, 'the guest ends', (host) => host.libvirt.remove(VM.id));
const libvirt = (at: HostName, answers: boolean): Step =>
  event(at, answers ? 'libvirt answers' : 'libvirt is silent', (host) => host.libvirt.answers(answers));
const powerOff = (at: HostName): Step => event(at, 'loses power', (host) => host.powerOff());
const powerOn = (at: HostName): Step => event(at, 'boots', (host) => host.powerOn());
const carrier = (at: HostName, on: boolean): Step =>
  event(at, on ? 'ib0 has a carrier again' : 'ib0 loses its carrier', async (host) => {
    if (!on) host.endRepeats();
    host.carrier(on);
    // What the kernel calls a link event comes a little later.
    await new Promise((resolve) => setTimeout(resolve, 50));
  });
const starts = (at: HostName): Step =>
  event(at, 'libvirt starts the domain by itself', (host) =>
    host.libvirt.set(
      VM.id,
      VM.nics.map(({ mac }) => mac),
    ),
  );

// What must hold ----------------------------------------------------------------------------------------------------

async function play(steps: readonly (Step | readonly Step[])[]): Promise<void> {
  const trace: string[] = [];
  // Since they were away from the fabric they have not looked.
  const away = new Set<HostName>();
  for (const { at, what, run, succeeds, says } of steps.flat()) {
    trace.push(`${at}: ${what}`);
    const said = trace.join('\n');
    const outcome = await run(hosts[at]);
    if (outcome !== undefined) {
      expect(outcome.code === 0, `${said}\n${outcome.code} ${outcome.stderr}`).toBe(succeeds);
      if (says !== undefined) expect(outcome.stderr, said).toMatch(says);
    }
    if (what.includes('carrier')) away.add(at);
    if (what.includes('reconcile') && hosts[at].isOnFabric()) away.delete(at);
    const holders = both().filter((host) => !away.has(host.name) && host.kernel().includes(ADDRESS));
    expect(holders.map(({ name }) => name).length, `${said}\nhosts that have ${ADDRESS}`).toBeLessThanOrEqual(1);
  }
}

interface End {
  readonly owner: HostName | undefined;
  /** The VM that has it. */
  readonly vm?: typeof VM;
  /** Hosts where the domain runs as well, so that the file stays for when the owner has gone. */
  readonly waiting?: HostName;
}

async function expectEnd({ owner, vm = VM, waiting }: End): Promise<void> {
  expect(hosts.answering(ADDRESS), 'who answers').toBe(owner);
  const expectHost = async (host: Hypervisor): Promise<void> => {
    const isOwner = host.name === owner;
    expect(host.kernel(), host.name).toEqual(isOwner ? PAIR : []);
    expect(host.files(), host.name).toEqual(
      isOwner ? { [`vm-${vm.id}`]: 'active' } : host.name === waiting ? { [`vm-${VM.id}`]: 'active' } : {},
    );
    const status = await host.cli('status', '--json');
    expect(`${host.name} ${status.status}`, status.stdout).toBe(`${host.name} ${host.name === waiting ? 3 : 0}`);
  };
  await Promise.all(
    both()
      .filter((one) => one.hasPower())
      .map(expectHost),
  );
}

const h1 = 'h1';
const h2 = 'h2';

/** A move: its steps, and where the address is in the end. Every one begins on h1, deployed there. */
type Move = readonly [name: string, steps: () => readonly (Step | readonly Step[])[], end: End];

function movesOf(title: string, moves: readonly Move[]): void {
  describe(title, () => {
    test.each(moves)('%s', { timeout: 60_000 }, async (_, steps, owner) => {
      await play([deploy(h1), ...steps()]);
      await expectEnd(owner);
    });
  });
}

movesOf('moves that OpenNebula sends', [
  [
    'migrate, stop and resume: saved here, restored there',
    () => [save(h1, { newest: h2 }), restore(h2)],
    { owner: h2 },
  ],
  ['there and back', () => [save(h1), restore(h2), save(h2), restore(h1)], { owner: h1 }],
  ['suspend and resume', () => [save(h1), restore(h1)], { owner: h1 }],
  [
    'migrate --poff, undeploy and resume: shut down here, deployed there',
    () => [shutdown(h1), deploy(h2)],
    { owner: h2 },
  ],
  ['migrate --poff-hard', () => [cancel(h1), deploy(h2)], { owner: h2 }],
  ['there and back, powered off', () => [shutdown(h1), deploy(h2), cancel(h2), deploy(h1)], { owner: h1 }],
  ['terminate', () => [shutdown(h1)], { owner: undefined }],
  ['terminate --hard, and again', () => [cancel(h1), cancel(h1)], { owner: undefined }],
  ['recover --delete-recreate: elsewhere', () => [cancel(h1), deploy(h2)], { owner: h2 }],
  ['its lease goes to another VM, elsewhere', () => [cancel(h1), deploy(h2, { vm: HEIR })], { owner: h2, vm: HEIR }],
]);

movesOf('steps that fail', [
  ['save fails: it goes on here', () => [fails(save(h1))], { owner: h1 }],
  [
    'save fails at its end, the domain is gone: restored from what is there',
    () => [failsLate(save(h1)), restore(h2)],
    { owner: h2 },
  ],
  ['restore fails: nobody has it; recover --retry', () => [save(h1), fails(restore(h2)), restore(h2)], { owner: h2 }],
  [
    'restore fails, recover --delete: cancel there, where nothing is',
    () => [save(h1), fails(restore(h2)), cancel(h2)],
    { owner: undefined },
  ],
  [
    'restore works, then fails: the domain is there and keeps it; VNM post failed as well: cancel',
    () => [save(h1), failsLate(restore(h2)), cancel(h2)],
    { owner: undefined },
  ],
  ['restore fails at its end: recover --success', () => [save(h1), failsLate(restore(h2))], { owner: h2 }],
  [
    'shutdown times out: it goes on here; once more',
    () => [fails(shutdown(h1)), shutdown(h1), deploy(h2)],
    { owner: h2 },
  ],
  [
    'deploy fails there: nobody has it; recover --retry',
    () => [shutdown(h1), fails(deploy(h2)), deploy(h2)],
    { owner: h2 },
  ],
  ['deploy fails there, back here', () => [shutdown(h1), fails(deploy(h2)), deploy(h1)], { owner: h1 }],
  [
    'deploy works, VNM post fails: cancel, while the VM has no DEPLOY_ID',
    () => [shutdown(h1), deploy(h2), cancel(h2, { deployId: '' })],
    { owner: undefined },
  ],
  [
    'deploy fails after the domain began: recover --success',
    () => [shutdown(h1), failsLate(deploy(h2))],
    { owner: h2 },
  ],
  [
    'the driver dies after the domain began: recover --success',
    () => [shutdown(h1), diesLate(deploy(h2)), reconcile(h2)],
    { owner: h2 },
  ],
  [
    'the driver dies after save: refused there until reconcile here; recover --retry',
    () => [diesLate(save(h1)), refused(restore(h2), heldBy(h1)), reconcile(h1), restore(h2)],
    { owner: h2 },
  ],
  [
    'the driver dies after shutdown, recover --success: the same with deploy',
    () => [diesLate(shutdown(h1)), refused(deploy(h2), heldBy(h1)), reconcile(h1), deploy(h2)],
    { owner: h2 },
  ],
  ['deploy once more where it runs: the stock script fails, it goes on', () => [failing(deploy(h1))], { owner: h1 }],
]);

/** It fails by itself. */
function failing(of: Step): Step {
  return { ...of, succeeds: false };
}

movesOf('what comes late, or twice', [
  ['cancel of the move before', () => [save(h1), restore(h2), cancel(h1)], { owner: h2 }],
  [
    'cancel of the move before, in SAVE_MIGRATE',
    () => [save(h1, { newest: h2 }), cancel(h1, { newest: h2 })],
    { owner: undefined },
  ],
  ['shutdown, when it runs there already', () => [shutdown(h1), deploy(h2), shutdown(h1)], { owner: h2 }],
  ['save once more: there is no domain', () => [save(h1), failing(save(h1)), restore(h2)], { owner: h2 }],
  [
    'reconcile on both, before and after',
    () => [reconcile(h1), save(h1), reconcile(h1), restore(h2), reconcile(h2), reconcile(h1)],
    { owner: h2 },
  ],
  ['reboot there after the move', () => [save(h1), restore(h2), reboot(h2)], { owner: h2 }],
  ['recover --delete in MIGRATE, it runs here: cancel on both', () => [cleanup(h2, h1)], { owner: undefined }],
  [
    'recover --delete in MIGRATE, it has come: cancel on both',
    () => [save(h1), restore(h2), cleanup(h2, h1)],
    { owner: undefined },
  ],
  ['recover --failure in MIGRATE: nothing is called', () => [reconcile(h1), reconcile(h2)], { owner: h1 }],
]);

movesOf('what reaches no driver action', [
  ['recover --delete in PROLOG_MIGRATE: nothing is called', () => [save(h1)], { owner: undefined }],
  [
    'recover --delete in BOOT, without a DEPLOY_ID: nothing is called; the driver had died before the domain began',
    () => [shutdown(h1), diesEarly(deploy(h2)), reconcile(h2)],
    { owner: undefined },
  ],
  [
    'the same, but the domain began: it keeps the address until somebody ends it, and the next VM is refused',
    () => [
      shutdown(h1),
      diesLate(deploy(h2)),
      refused(deploy(h1, { vm: HEIR }), heldBy(h2)),
      reconcile(h2),
      refused(deploy(h1, { vm: HEIR }), heldBy(h2)),
      guestEnds(h2),
      reconcile(h2),
      deploy(h1, { vm: HEIR }),
    ],
    { owner: 'h1', vm: HEIR },
  ],
  ['the guest powers itself off, terminate', () => [guestEnds(h1), reconcile(h1)], { owner: undefined }],
  [
    'the guest powers itself off, migrate and resume: refused there until reconcile here',
    () => [guestEnds(h1), refused(deploy(h2), heldBy(h1)), reconcile(h1), deploy(h2)],
    { owner: h2 },
  ],
  ['the guest powers itself off, resume here', () => [guestEnds(h1), deploy(h1)], { owner: h1 }],
]);

movesOf('a host that was lost', [
  [
    'comes back after a boot and starts the domain by itself, and nobody else has the address',
    () => [powerOff(h1), powerOn(h1), starts(h1), reconcile(h1)],
    { owner: h1 },
  ],
  [
    'is cut off from the front-end only, the guest is gone, libvirt is silent: refused until it answers',
    () => [
      guestEnds(h1),
      libvirt(h1, false),
      reconcile(h1),
      refused(deploy(h2), heldBy(h1)),
      libvirt(h1, true),
      reconcile(h1),
      deploy(h2),
    ],
    { owner: h2 },
  ],
  ['without power, never to come back', () => [powerOff(h1), deploy(h2)], { owner: h2 }],
  [
    'without power, its lease goes to another VM',
    () => [powerOff(h1), deploy(h2, { vm: HEIR }), powerOn(h1), reconcile(h1)],
    { owner: h2, vm: HEIR },
  ],
  ['comes back after a boot', () => [powerOff(h1), deploy(h2), powerOn(h1), reconcile(h1)], { owner: h2 }],
  [
    'comes back after a boot, before the VM is started elsewhere',
    () => [powerOff(h1), powerOn(h1), reconcile(h1), deploy(h2)],
    { owner: h2 },
  ],
  [
    'comes back after a boot, libvirt is silent: nothing of it until it answers',
    () => [
      powerOff(h1),
      deploy(h2),
      powerOn(h1),
      libvirt(h1, false),
      reconcile(h1),
      reconcile(h1),
      libvirt(h1, true),
      reconcile(h1),
    ],
    { owner: h2 },
  ],
  [
    'comes back after a boot, libvirt is silent, and the VM is started elsewhere only then',
    () => [powerOff(h1), powerOn(h1), libvirt(h1, false), reconcile(h1), deploy(h2), libvirt(h1, true), reconcile(h1)],
    { owner: h2 },
  ],
  [
    'comes back after a boot, and the VM too: recover --retry here',
    () => [powerOff(h1), powerOn(h1), reconcile(h1), deploy(h1)],
    { owner: h1 },
  ],
  [
    'comes back after a boot in the middle of a deploy',
    () => [shutdown(h1), diesLate(deploy(h1)), powerOff(h1), deploy(h2), powerOn(h1), reconcile(h1)],
    { owner: h2 },
  ],
  [
    'comes back after a boot and starts the domain by itself: refused, and said',
    () => [powerOff(h1), deploy(h2), powerOn(h1), starts(h1), contested(reconcile(h1), heldBy(h2))],
    { owner: h2, waiting: h1 },
  ],
  [
    'is cut off from the front-end only, and the guest lives: the second claim is refused; fenced, it is free',
    () => [refused(deploy(h2), heldBy(h1)), reconcile(h1), refused(deploy(h2), heldBy(h1)), powerOff(h1), deploy(h2)],
    { owner: h2 },
  ],
  [
    'is cut off from the front-end only, and the guest is gone: free within a minute',
    () => [guestEnds(h1), refused(deploy(h2), heldBy(h1)), reconcile(h1), deploy(h2)],
    { owner: h2 },
  ],
]);

const secondClaim = (): RegExp =>
  new RegExp(
    `Cannot keep the IB address ${ADDRESS}[\\s\\S]*${hosts.h2.station}[\\s\\S]*one-42 is active on this host[\\s\\S]*virsh destroy one-42`,
  );
const stillClaimed = (): RegExp =>
  new RegExp(`Cannot take the IB address ${ADDRESS}[\\s\\S]*${hosts.h2.station}[\\s\\S]*one-42 is active on this host`);
const cutAndRestarted = (): readonly Step[] => [carrier(h1, false), reconcile(h1), deploy(h2), carrier(h1, true)];

movesOf('a host that was cut off from the fabric while its guest lived', [
  [
    'gives the address up when it is back',
    () => [...cutAndRestarted(), contested(reconcile(h1), secondClaim())],
    { owner: h2, waiting: h1 },
  ],
  [
    'gives it up also while libvirt is silent',
    () => [
      carrier(h1, false),
      deploy(h2),
      libvirt(h1, false),
      carrier(h1, true),
      contested(reconcile(h1), heldBy(h2)),
      libvirt(h1, true),
    ],
    { owner: h2, waiting: h1 },
  ],
  [
    'says so until one of the two is fenced: this one',
    () => [
      ...cutAndRestarted(),
      contested(reconcile(h1), secondClaim()),
      contested(reconcile(h1), stillClaimed()),
      guestEnds(h1),
      reconcile(h1),
    ],
    { owner: h2 },
  ],
  [
    'until one of the two is fenced: the other one. It comes back by itself',
    () => [
      ...cutAndRestarted(),
      contested(reconcile(h1), secondClaim()),
      powerOff(h2),
      reconcile(h1),
      powerOn(h2),
      reconcile(h2),
    ],
    { owner: h1 },
  ],
  [
    'cancel that comes late ends its domain',
    () => [...cutAndRestarted(), contested(reconcile(h1), secondClaim()), cancel(h1)],
    { owner: h2 },
  ],
  [
    'cancel that comes before reconcile',
    () => [carrier(h1, false), deploy(h2), cancel(h1), carrier(h1, true), reconcile(h1)],
    { owner: h2 },
  ],
  [
    'reboot of the domain there takes nothing back',
    () => [...cutAndRestarted(), contested(reconcile(h1), secondClaim()), reboot(h1)],
    { owner: h2, waiting: h1 },
  ],
  [
    'and whose guest has ended meanwhile',
    () => [carrier(h1, false), deploy(h2), guestEnds(h1), carrier(h1, true), reconcile(h1)],
    { owner: h2 },
  ],
  [
    'and nobody took its address',
    () => [carrier(h1, false), reconcile(h1), carrier(h1, true), reconcile(h1)],
    { owner: h1 },
  ],
]);

describe('the second claim', () => {
  beforeEach(() => play([deploy(h1), ...cutAndRestarted()]));

  test('is in status, with who has it and what to do; the guest does not send from the address', async () => {
    const { h1: old } = hosts;
    expect(guestReachesOut('h2', 2)).toBe(true);
    await play([contested(reconcile(h1), secondClaim())]);
    const { drift } = parsed<{ drift: readonly Record<string, string>[] }>(await old.cli('status', '--json'));
    expect(drift).toMatchObject([{ guest: GUEST, address: ADDRESS, part: 'alias' }]);
    expect(drift[0]?.['observed']).toContain(hosts.h2.station);
    expect(drift[0]?.['fix']).toMatch(/virsh destroy one-42 here/);
    expect(guestReachesOut('h1', 2)).toBe(false);
    expect(guestReachesOut('h2', 2)).toBe(true);
    expect(hosts.answering(ADDRESS)).toBe('h2');
  });

  test('is announced by neither host, when it is asked for by hand', async () => {
    for (const host of both()) {
      const { status, stdout, stderr } = await host.cli('announce', ADDRESS);
      expect([status, stdout]).toEqual([EXIT.conflict, '']);
      expect(stderr).toContain(hosts[host.name === 'h1' ? 'h2' : 'h1'].station);
    }
    await play([contested(reconcile(h1), secondClaim())]);
    expect((await hosts.h2.cli('announce', ADDRESS)).stdout).toBe(`+ announce  ${ADDRESS} on ib0\n`);
    await expectEnd({ owner: 'h2', waiting: 'h1' });
  });

  test('of a guest that speaks before reconcile has looked: neighbours find the right host again', async () => {
    // The kernel asks for the client in the name of the address, and the client believes the last who spoke.
    guestReachesOut('h1', 2);
    await play([contested(reconcile(h1), secondClaim())]);
    await hosts.h2.cli('announce', ADDRESS);
    await expectEnd({ owner: 'h2', waiting: 'h1' });
  });
});

describe('hosts that look at the same time', () => {
  /** Both reconcile again and again, as close together as it gets, until one of them has it and the other says so. */
  async function untilOne(): Promise<{ readonly owner: HostName; readonly rounds: number }> {
    for (let rounds = 1; rounds <= 5; rounds += 1) {
      await Promise.all(both().map((host) => host.cli('reconcile')));
      const owners = both().filter((host) => host.kernel().length > 0);
      expect(owners.length, `round ${rounds}: ${owners.map(({ name }) => name)}`).toBeLessThanOrEqual(1);
      const [owner] = owners;
      if (owner !== undefined) return { owner: owner.name, rounds };
    }
    throw new Error('both have given up');
  }

  test('both have it, both links were away: one keeps it, or takes it again', { timeout: 120_000 }, async () => {
    const seen: string[] = [];
    await play([deploy(h1), carrier(h1, false), deploy(h2)]);
    for (let n = 0; n < 4; n += 1) {
      for (const host of both()) host.carrier(false);
      for (const host of both()) await host.cli('reconcile');
      // What the other one has lost it takes again where nobody can tell it not to.
      for (const host of both()) expect(host.kernel(), host.name).toEqual(PAIR);
      for (const host of both()) host.carrier(true);
      const { owner, rounds } = await untilOne();
      seen.push(`${owner} after ${rounds}`);
      expect(hosts.answering(ADDRESS)).toBe(owner);
    }
    console.info(`both had it: ${seen.join(', ')}`);
  });

  test('neither has it, both domains run: exactly one takes it', { timeout: 120_000 }, async () => {
    const seen: string[] = [];
    await play([deploy(h1), carrier(h1, false), deploy(h2), carrier(h1, true)]);
    for (let n = 0; n < 4; n += 1) {
      for (const host of both()) {
        if (host.kernel().includes(ADDRESS))
          tool('/usr/sbin/ip', '-n', host.name, 'address', 'del', `${ADDRESS}/32`, 'dev', 'ib0');
      }
      const { owner, rounds } = await untilOne();
      seen.push(`${owner} after ${rounds}`);
      expect(hosts.answering(ADDRESS)).toBe(owner);
    }
    console.info(`neither had it: ${seen.join(', ')}`);
  });
});

test('a fabric that splits without a link event: no reconcile sees it, `announce --dry-run` does', async () => {
  await play([deploy(h1)]);
  hosts.h1.reached(false);
  await play(
    [deploy(h2)].map((one) => ({ ...one, what: 'carrier of the fabric is whole, but deploy there hears nobody' })),
  );
  hosts.h1.reached(true);
  for (const host of both()) {
    expect((await host.cli('reconcile')).status, host.name).toBe(EXIT.done);
    const { status, stderr } = await host.cli('announce', '--dry-run');
    expect(status).toBe(EXIT.conflict);
    expect(stderr).toContain(hosts[host.name === 'h1' ? 'h2' : 'h1'].station);
  }
});

test('a second link of the host on the same fabric, which answers for every address of the host, is no other host', async () => {
  await play([deploy(h1)]);
  const ip = (...args: readonly string[]) => tool('/usr/sbin/ip', ...args);
  ip('link', 'add', 'ib9', 'netns', 'h1', 'type', 'veth', 'peer', 'name', 'second', 'netns', 'fabric');
  ip('-n', 'fabric', 'link', 'set', 'second', 'master', 'br0', 'up');
  ip('-n', 'h1', 'link', 'set', 'ib9', 'up');
  ip('-n', 'h1', 'address', 'add', '192.168.10.9/24', 'dev', 'ib9');
  try {
    await play([carrier(h1, false), carrier(h1, true), reconcile(h1)]);
    await expectEnd({ owner: 'h1' });
  } finally {
    ip('-n', 'h1', 'link', 'delete', 'ib9');
  }
});
