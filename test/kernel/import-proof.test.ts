/**
 * The comparison that an import shows is a model. Here it is held to the kernel: whatever it says of old rules and of our
 * table, real packets do, before the switch, after it, and after the way back.
 */
import { rmSync } from 'node:fs';
import { afterEach, beforeEach, expect, test } from 'vitest';
import type { Case, Comparison } from '../../lib/import/compare.ts';
import type { ImportReport } from '../../lib/import/report.ts';
import { temporaryDirectory } from '../support/fake-host.ts';
import { createLab, type Lab, type Protocol } from '../support/lab.ts';
import { requireOwnNetns } from '../support/netns.ts';
import { CONFIG, createOldHost, GUESTS, IB, type OldHost, pairRules } from '../support/old-deployment.ts';

requireOwnNetns();

const EVERYTHING = 'inbound,outbound,host,loopback';
/** Where an answer would come within a millisecond. */
const SILENCE = 300;

let lab: Lab;
let folder: string;
beforeEach(async () => {
  folder = temporaryDirectory();
  lab = await createLab({ guests: { h1: [11, 12, 14] }, foreign: true });
  await lab.sysctl('h1', 'net.bridge.bridge-nf-call-iptables', 0);
  // A host of the fabric may know the way to the guests' own addresses.
  await lab.exec('out', ['/usr/sbin/ip', 'route', 'add', `${GUESTS}.0/24`, 'via', `${IB}.1`]);
  await lab.exec('lan', ['/usr/sbin/ip', 'route', 'replace', 'default', 'via', '10.9.0.1']);
});
afterEach(async () => {
  await lab?.close();
  rmSync(folder, { recursive: true, force: true });
});

const snatOf = (n: number): string => `-s ${GUESTS}.${n}/32 -j SNAT --to-source ${IB}.${n}`;
const dnatOf = (n: number): string => `-d ${IB}.${n}/32 -j DNAT --to-destination ${GUESTS}.${n}`;
const BOTH = [11, 12];

const RULES: Readonly<Record<string, readonly string[]>> = {
  'as the old guide has them': BOTH.flatMap(pairRules),
  'with links on both': BOTH.flatMap((n) => [
    `-A PREROUTING -i ib0 ${dnatOf(n)}`,
    `-A POSTROUTING -o ib0 ${snatOf(n)}`,
  ]),
  'complete: host and hairpin too': BOTH.flatMap((n) => [
    `-A PREROUTING ${dnatOf(n)}`,
    `-A OUTPUT ${dnatOf(n)}`,
    `-A POSTROUTING ${snatOf(n)}`,
  ]),
  'SNAT by every link, and a masquerade behind it': [
    ...BOTH.flatMap((n) => [`-A PREROUTING ${dnatOf(n)}`, `-A POSTROUTING ${snatOf(n)}`]),
    '-A POSTROUTING -o eth9 -j MASQUERADE',
  ],
  'an exemption in front': [
    `-A POSTROUTING -s ${GUESTS}.0/24 -d ${IB}.0/24 -j ACCEPT`,
    ...BOTH.flatMap((n) => [`-A PREROUTING ${dnatOf(n)}`, `-A POSTROUTING ${snatOf(n)}`]),
  ],
  'a masquerade in front': [`-A POSTROUTING -s ${GUESTS}.0/24 -o ib0 -j MASQUERADE`, ...BOTH.flatMap(pairRules)],
  'by protocol': BOTH.flatMap((n) => [
    `-A PREROUTING -p tcp ${dnatOf(n)}`,
    `-A PREROUTING -p udp ${dnatOf(n)}`,
    `-A POSTROUTING -p tcp -o ib0 ${snatOf(n)}`,
    `-A POSTROUTING -p udp -o ib0 ${snatOf(n)}`,
  ]),
  'a chain for each guest': BOTH.flatMap((n) => [
    `-N vm${n}`,
    `-A PREROUTING -d ${IB}.${n}/32 -j vm${n}`,
    `-A vm${n} -j DNAT --to-destination ${GUESTS}.${n}`,
    `-A POSTROUTING -o ib0 ${snatOf(n)}`,
  ]),
  'halves beside pairs': [
    ...BOTH.flatMap(pairRules),
    `-A POSTROUTING -o ib0 ${snatOf(14)}`,
    `-A INPUT -s ${GUESTS}.12/32 -d ${IB}.1/32 -j SNAT --to-source ${IB}.12`,
  ],
  'a half that is only sent to': [...BOTH.flatMap(pairRules), `-A PREROUTING ${dnatOf(14)}`],
  'others go out behind the host': [
    ...BOTH.flatMap(pairRules),
    `-A POSTROUTING -s ${GUESTS}.0/24 -o ib0 -j MASQUERADE`,
  ],
};

/** Who sends where, for a case. */
function probeOf(one: Comparison): readonly [from: string, to: string, target: string] | undefined {
  const n = Number(one.guest.split('.')[3]);
  const guest = `g${n}`;
  const other = n === 11 ? 'g12' : 'g11';
  const address = one.address ?? '';
  const probes: Partial<Record<Case, readonly [string, string, string]>> = {
    'inbound/fabric': ['out', address, guest],
    'inbound/other-link': ['lan', address, guest],
    'inbound/guest-address': ['out', one.guest, guest],
    'outbound/fabric': [guest, `${IB}.100`, 'out'],
    'outbound/other-link': [guest, '10.9.0.2', 'lan'],
    'outbound/unmapped': ['g14', `${IB}.100`, 'out'],
    'host/to-guest': ['h1', address, guest],
    'host/from-guest': [guest, `${IB}.1`, 'h1'],
    'loopback/other-guest': [other, address, guest],
    'loopback/own': [guest, address, guest],
  };
  return probes[one.case];
}

/** What the lab's probe answers where the model is right. */
function expected(text: string, one: Comparison, probe: readonly [string, string, string], protocol: Protocol): RegExp {
  const [from, to, target] = probe;
  const said = ofProtocol(text, protocol);
  if (said.includes('goes past this host') || said.includes('answer is dropped')) return /^(?!g\d+: )/;
  if (said === 'dropped') return /^(?:timeout|refused|unreachable|reset|EHOSTUNREACH|ENETUNREACH)/;
  const peer = from === 'lan' || to === '10.9.0.2' ? '10.9.0.2' : `${IB}.100`;
  const own = to === '10.9.0.2' ? '10.9.0.1' : `${IB}.1`;
  const named = (party: string | undefined): string =>
    (party === 'the other host'
      ? peer
      : party === "the host's own address"
        ? own
        : party === 'the guest'
          ? `${GUESTS}.14`
          : (party ?? '')
    ).replaceAll('.', '\\.');
  const ends = /^ends on this host, from (.+)$/.exec(said);
  // The address may be one that nothing listens on.
  if (ends !== null) return new RegExp(`^(?:refused|h1: ${named(ends[1])} > .*)`);
  const reaches = /^reaches (.+?)(?: by another link)? from (.+)$/.exec(said);
  if (reaches === null) throw new Error(`${one.case}: not understood: ${text}`);
  if (reaches[1] === one.address) return /^(?:timeout|refused|unreachable|EHOSTUNREACH|ENETUNREACH)/;
  return new RegExp(`^${target}: ${named(reaches[2])} > ${named(reaches[1])}$`);
}

/** `A (if protocol tcp, udp); B (if protocol icmp, other)`, and what goes by the other link leaves by eth9. */
function ofProtocol(text: string, protocol: Protocol): string {
  const parts = text.split('; ');
  const fits = new RegExp(`\\(if (?:protocol [^)]*\\b${protocol}\\b|-o eth9\\))`);
  const part = parts.length === 1 ? text : (parts.find((one) => fits.test(one)) ?? text);
  return part.replace(/ \(if .*$/, '');
}

async function hold(comparisons: readonly Comparison[], which: 'old' | 'new'): Promise<void> {
  const results = await Promise.all(
    comparisons.flatMap((one) => {
      const probe = probeOf(one);
      if (probe === undefined) throw new Error(one.case);
      return (['tcp', 'udp'] as const).map(async (protocol) => {
        const want = expected(one[which], one, probe, protocol);
        const silent =
          !want.source.startsWith('^g') &&
          !want.source.startsWith('^out') &&
          !want.source.startsWith('^lan') &&
          !want.source.includes('h1: ');
        const seen = await lab.reach(protocol, probe[0], probe[1], { timeout: silent ? SILENCE : 3_000 });
        return want.test(seen)
          ? []
          : [`${protocol} ${one.case} of ${one.guest}: ${one[which]} (${want.source}), but ${seen}`];
      });
    }),
  );
  expect(results.flat()).toEqual([]);
}

async function done(host: OldHost, ...args: readonly string[]): Promise<string> {
  const result = await host.kvmIb(...args);
  expect(result, result.stdout + result.stderr).toMatchObject({ status: 0 });
  return result.stdout;
}

const CONFIGS = {
  isolated: CONFIG,
  open: { networks: CONFIG.networks.map((network) => ({ ...network, isolate: false })) },
};

test.each(
  Object.entries(RULES).flatMap(([name, rules]) =>
    (Object.keys(CONFIGS) as (keyof typeof CONFIGS)[]).map((kind) => [name, kind, rules] as const),
  ),
)('%s, %s', async (name, kind, rules) => {
  const host = await createOldHost(lab, folder, {
    variant: name.length % 2 === 0 ? 'legacy' : 'nft',
    rules,
    addresses: (rules.some((rule) => rule.includes('.14')) ? [...BOTH, 14] : BOTH).map(
      (n) => `${IB}.${n}/24 dev ib0 label ib0:${n}`,
    ),
    vms: BOTH,
    config: CONFIGS[kind],
  });
  const { report } = JSON.parse(await done(host, 'import', '--json')) as { report: ImportReport };
  expect(report.pairs).toHaveLength(2);
  expect(report.comparisons.length).toBeGreaterThanOrEqual(18);
  await hold(report.comparisons, 'old');
  await done(host, 'import', '--apply', '--accept', EVERYTHING);
  await hold(report.comparisons, 'new');
  await done(host, 'import', '--rollback');
  await hold(report.comparisons, 'old');
});
