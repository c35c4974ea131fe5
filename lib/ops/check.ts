/** Holds the configuration against the host: `config check`. Reads only. */
import type { ExitStatus } from '../core/errors.ts';
import { EXIT } from '../core/errors.ts';
import type { Config, Network } from '../core/mapping.ts';
import { servedNetworks } from '../core/served.ts';
import type { Link, Links } from '../link/ports.ts';
import { ARPHRD } from '../link/ports.ts';
import { ownAddressInRange, tableSpec } from './observe.ts';

export interface Finding {
  /** `error`: mappings will not work or will be refused. */
  readonly level: 'error' | 'warning';
  readonly code: 'host-lacks' | 'conflict';
  readonly network: string | null;
  readonly what: string;
  readonly why: string;
  readonly fix: string;
}

/** The exit status for these findings: 4 if one is a conflict, else 6; undefined when none is an error. */
export function worstOf(findings: readonly Pick<Finding, 'level' | 'code'>[]): ExitStatus | undefined {
  const errors = findings.filter(({ level }) => level === 'error');
  if (errors.length === 0) return undefined;
  return errors.some(({ code }) => code === 'conflict') ? EXIT.conflict : EXIT.hostLacks;
}

/** What `config check` reads of the host besides links and addresses. */
export interface Sysctls {
  /**
   * A value under /proc/sys by its name as sysctl(8) takes it, where "/" stands for a dot in the name of a link
   * (`net.ipv4.conf.ib0/8001.rp_filter`); undefined when it is not there.
   */
  read(name: string): string | undefined;
}

export async function checkConfig(
  host: { config: Config; links: Links },
  sysctls: Sysctls,
): Promise<readonly Finding[]> {
  const findings: Finding[] = [];
  const spec = tableSpec(servedNetworks(host.config.networks, []), await host.links.addresses());
  for (const network of host.config.networks) {
    const device = await host.links.link(network.device);
    const bridge = await host.links.link(network.bridge);
    const master = device?.master == null ? undefined : await host.links.linkAt(device.master);
    findings.push(...deviceFindings(network, device, master), ...bridgeFindings(network, bridge, device));
    const own = spec.hostAddresses.get(network.name) ?? [];
    const inside = ownAddressInRange(network, own);
    if (inside !== undefined) {
      findings.push(finding('error', 'conflict', network, inside.message, inside.why ?? '', inside.fix ?? ''));
    } else if (device !== undefined && own.length === 0) {
      findings.push(
        finding(
          'warning',
          'host-lacks',
          network,
          `${network.device} has no address of its own`,
          'guests then see the bridge address when this host talks to their IB address',
          `give the host an address on ${network.device} outside the network's range`,
        ),
      );
    }
  }
  const forwarding = sysctls.read('net.ipv4.ip_forward');
  if (forwarding !== '1') {
    findings.push({
      level: 'error',
      code: 'host-lacks',
      network: null,
      what: 'IPv4 forwarding is off',
      why: 'the host routes between the bridge and the IPoIB link',
      fix: 'kvm-ib install host puts the setting in place; at once: sysctl -w net.ipv4.ip_forward=1',
    });
  }
  if (sysctls.read('net.netfilter.nf_conntrack_tcp_loose') === '0') {
    findings.push({
      level: 'warning',
      code: 'host-lacks',
      network: null,
      what: 'nf_conntrack_tcp_loose is 0',
      why: 'established connections will not survive a live migration to this host',
      fix: 'kvm-ib install host puts the setting in place; at once: sysctl -w net.netfilter.nf_conntrack_tcp_loose=1',
    });
  }
  return findings;
}

/** Masters that take what their members receive: it counts as the master's, and no rule for the member sees it. */
const TAKES_PACKETS: Readonly<Record<string, string>> = {
  bond: 'slave',
  team: 'port',
  bridge: 'port',
  openvswitch: 'port',
};

function deviceFindings(network: Network, device: Link | undefined, master: Link | undefined): readonly Finding[] {
  if (device === undefined) {
    const why = `network ${network.name} puts its aliases there`;
    const fix = `bring the IPoIB link up, or correct \`device\` of network ${network.name}`;
    return [finding('error', 'host-lacks', network, `there is no link ${network.device}`, why, fix)];
  }
  const findings: Finding[] = [];
  if (!device.up) {
    const fix = `ip link set ${network.device} up`;
    findings.push(finding('error', 'host-lacks', network, `${network.device} is down`, 'no packet passes it', fix));
  } else if (!device.running) {
    findings.push(noCarrier(network, device));
  }
  const role = TAKES_PACKETS[master?.kind ?? ''];
  if (master !== undefined && role !== undefined) {
    const what = `${network.device} is a ${role} of ${master.kind} ${master.name}`;
    const why = `what it receives counts as received by ${master.name}, so nothing is translated`;
    const fix = `write \`device: ${master.name}\` for network ${network.name}, and give that the host's address`;
    findings.push(finding('error', 'host-lacks', network, what, why, fix));
  }
  if (device.type !== ARPHRD.infiniband) {
    const why = `its hardware type is ${device.type}, IPoIB has ${ARPHRD.infiniband}`;
    findings.push(
      finding(
        'warning',
        'host-lacks',
        network,
        `${network.device} is not an IPoIB link`,
        why,
        'fine in a lab; on a host, correct `device`',
      ),
    );
  }
  return findings;
}

function noCarrier(network: Network, device: Link): Finding {
  const bond = device.kind === 'bond';
  return finding(
    'warning',
    'host-lacks',
    network,
    `${device.name} has no carrier`,
    bond ? 'none of its slaves is active' : 'the port at the other end is down, or no subnet manager answers',
    bond ? `see /proc/net/bonding/${device.name}, and bring a slave up` : 'look at the cable and at `ibstat`',
  );
}

function bridgeFindings(network: Network, bridge: Link | undefined, device: Link | undefined): readonly Finding[] {
  if (bridge === undefined) {
    const fix = `kvm-ib network-xml --network ${network.name} > net.xml; virsh net-define net.xml; virsh net-start kvm-ib-${network.name}`;
    return [
      finding('error', 'host-lacks', network, `there is no bridge ${network.bridge}`, 'the guests hang on it', fix),
    ];
  }
  if (device !== undefined && bridge.mtu !== device.mtu) {
    const what = `MTU of ${network.bridge} is ${bridge.mtu}, of ${network.device} ${device.mtu}`;
    return [finding('warning', 'host-lacks', network, what, 'the bridge follows the IPoIB link', 'kvm-ib reconcile')];
  }
  return [];
}

function finding(
  level: Finding['level'],
  code: Finding['code'],
  network: Network,
  what: string,
  why: string,
  fix: string,
): Finding {
  return { level, code, network: network.name, what, why, fix };
}
