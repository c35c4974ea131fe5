/**
 * What other firewalls on this host do to our packets. An accept of ours ends our chain only: a drop or reject in
 * anybody else's forward chain still wins. We never write into those; we name what stands in the way, and the remedy.
 */
import type { Exec } from '../core/exec.ts';
import type { Network } from '../core/mapping.ts';
import { rulesOfForwardMode } from '../libvirt/network.ts';
import type { Finding } from './check.ts';

const NFT = '/usr/sbin/nft';
const IPTABLES_LEGACY = '/usr/sbin/iptables-legacy';
const VIRSH = '/usr/bin/virsh';

/**
 * Forward chains that drop what nobody accepted, and libvirt networks that reject what crosses their bridge.
 * @param legacyTables tables that iptables-legacy has in use (/proc/net/ip_tables_names): to ask for another makes it
 */
export async function obstacles(
  exec: Exec,
  networks: readonly Network[],
  legacyTables: readonly string[],
): Promise<readonly Finding[]> {
  const legacy = legacyTables.includes('filter') ? await droppingLegacyChain(exec) : [];
  const chains = [...(await droppingNftChains(exec)), ...legacy];
  const policies = networks.flatMap((network) => chains.map((chain) => policyFinding(network, chain)));
  const libvirt: Finding[] = [];
  for (const { name, xml } of await libvirtNetworks(exec)) {
    const network = networks.find((candidate) => bridgeOf(xml) === candidate.bridge);
    const mode = forwardMode(xml);
    if (network !== undefined && rulesOfForwardMode(mode) !== 'none') libvirt.push(libvirtFinding(network, name, mode));
  }
  return [...policies, ...libvirt];
}

/** Guests that rules of iptables translate still, while ours would be asked first and drop what they do not have. */
export function oldRulesFinding(guests: readonly string[]): readonly Finding[] {
  const [first] = guests;
  if (first === undefined) return [];
  return [
    {
      level: 'error',
      code: 'conflict',
      network: null,
      what: `rules of iptables translate ${guests.length === 1 ? first : `${guests.length} guests`}`,
      why: 'they are of an older deployment; the table of kvm-ib drops guests that it has no mapping of',
      fix: 'kvm-ib import: it shows them, and what would change',
    },
  ];
}

interface DroppingChain {
  /** As its owner names it. */
  readonly name: string;
  /** The command that lets packets of this pair of links through, without the links. */
  readonly remedy: (from: string, to: string) => string;
}

async function droppingNftChains(exec: Exec): Promise<readonly DroppingChain[]> {
  const listing = await read(exec, [NFT, '-j', 'list', 'chains']);
  return chainsOf(listing).flatMap(({ family, table, name, hook, policy }): readonly DroppingChain[] => {
    if (!['ip', 'inet'].includes(family) || hook !== 'forward' || policy !== 'drop') return [];
    // iptables-nft keeps its chains here, in capitals; its own program must write into them.
    if (family === 'ip' && table === 'filter' && name === 'FORWARD') return [iptablesChain('iptables')];
    return [
      {
        name: `chain ${name} of table ${family} ${table} (nft)`,
        remedy: (from, to) => `nft insert rule ${family} ${table} ${name} iifname ${from} oifname ${to} accept`,
      },
    ];
  });
}

async function droppingLegacyChain(exec: Exec): Promise<readonly DroppingChain[]> {
  const listing = await read(exec, [IPTABLES_LEGACY, '-S', 'FORWARD']);
  return /^-P FORWARD DROP$/m.test(listing) ? [iptablesChain('iptables-legacy')] : [];
}

function iptablesChain(program: string): DroppingChain {
  return {
    name: `chain FORWARD of ${program}`,
    remedy: (from, to) => `${program} -I FORWARD -i ${from} -o ${to} -j ACCEPT (with Docker: -I DOCKER-USER)`,
  };
}

function policyFinding(network: Network, chain: DroppingChain): Finding {
  const { device, bridge } = network;
  return {
    level: 'warning',
    code: 'host-lacks',
    network: network.name,
    what: `${chain.name} drops by policy what no rule of its own accepts`,
    why: `packets between ${bridge} and ${device} die there unless a rule of that firewall lets them pass`,
    fix: `let them pass, both ways: ${chain.remedy(bridge, device)}; ${chain.remedy(device, bridge)}`,
  };
}

function libvirtFinding(network: Network, name: string, mode: string): Finding {
  return {
    level: rulesOfForwardMode(mode) === 'in-the-way' ? 'error' : 'warning',
    code: 'host-lacks',
    network: network.name,
    what: `the libvirt network ${name} on ${network.bridge} has forward mode ${mode}`,
    why:
      rulesOfForwardMode(mode) === 'in-the-way'
        ? 'libvirt then adds firewall rules that reject or masquerade what crosses the bridge'
        : "libvirt then adds firewall rules that let the network's own subnet pass and reject all else",
    fix: `define it anew with forward mode open: kvm-ib network-xml --network ${network.name}`,
  };
}

async function libvirtNetworks(exec: Exec): Promise<readonly { readonly name: string; readonly xml: string }[]> {
  const virsh = [VIRSH, '--readonly', '--connect', 'qemu:///system'] as const;
  const names = (await read(exec, [...virsh, 'net-list', '--name'])).split('\n').map((line) => line.trim());
  const networks: { name: string; xml: string }[] = [];
  for (const name of names.filter((line) => /^[A-Za-z0-9_.-]+$/.test(line))) {
    networks.push({ name, xml: await read(exec, [...virsh, 'net-dumpxml', name]) });
  }
  return networks;
}

/** libvirt's own output, not a user's: the first match is the network's. */
function bridgeOf(xml: string): string | undefined {
  return /<bridge\b[^>]*\bname='([^']+)'/.exec(xml)?.[1];
}

function forwardMode(xml: string): string {
  const forward = /<forward\b([^>]*)>/.exec(xml)?.[1];
  if (forward === undefined) return 'isolated';
  return /\bmode='([^']+)'/.exec(forward)?.[1] ?? 'nat';
}

interface ListedChain {
  readonly family: string;
  readonly table: string;
  readonly name: string;
  readonly hook?: string;
  readonly policy?: string;
}

function chainsOf(listing: string): readonly ListedChain[] {
  try {
    const { nftables } = JSON.parse(listing) as { nftables?: readonly { chain?: ListedChain }[] };
    return (nftables ?? []).flatMap(({ chain }) => (chain === undefined ? [] : [chain]));
  } catch {
    return [];
  }
}

/** What a program printed; nothing when it is absent, refuses or crashes: a check must not fail on what others run. */
async function read(exec: Exec, argv: readonly [string, ...string[]]): Promise<string> {
  try {
    const { status, stdout } = await exec(argv, { timeout: 10_000 });
    return status === 0 ? stdout : '';
  } catch {
    return '';
  }
}
