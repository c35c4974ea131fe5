/** A hypervisor of the lab as an older deployment left it: a NAT pair in iptables and an alias for each guest, by hand. */
import { existsSync, mkdirSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import type { Variant } from '../../lib/iptables/table.ts';
import { type Lab, pairOf } from './lab.ts';

const COMMAND = resolve(import.meta.dirname, '../../dist/kvm-ib.mjs');
export const IB = '192.168.10';
export const GUESTS = '192.168.122';

export const CONFIG = {
  networks: [
    {
      name: 'ib',
      device: 'ib0',
      bridge: 'virbr1',
      guests: `${GUESTS}.11-${GUESTS}.19`,
      addresses: `${IB}.11-${IB}.19`,
    },
  ],
};

/** The two rules of one guest, as the old scripts appended them. */
export function pairRules(n: number): readonly string[] {
  return [
    `-A PREROUTING -d ${IB}.${n}/32 -j DNAT --to-destination ${GUESTS}.${n}`,
    `-A POSTROUTING -s ${GUESTS}.${n}/32 -o ib0 -j SNAT --to-source ${IB}.${n}`,
  ];
}

/** Rules of others, in front of the pairs, between them and behind. */
export function withForeign(...numbers: readonly number[]): readonly string[] {
  const [first, ...rest] = numbers.map(pairRules);
  return [
    '-A PREROUTING -i eth9 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.9.0.2:80',
    ...(first ?? []),
    '-A POSTROUTING -s 10.9.0.0/24 -o eth9 -m comment --comment "not \\"ours\\" at all" -j MASQUERADE',
    '-A PREROUTING -i eth9 -m mark --mark 0x7 -j ACCEPT',
    ...rest.flat(),
    '-A POSTROUTING -o eth9 -j MASQUERADE',
  ];
}

export interface OldHost {
  /** Table nat as iptables-save shows it, without counters. */
  nat(): Promise<readonly string[]>;
  addresses(): Promise<readonly string[]>;
  /** Runs `kvm-ib` on the hypervisor. */
  kvmIb(
    ...args: readonly string[]
  ): Promise<{ readonly status: number | null; readonly stdout: string; readonly stderr: string }>;
  /** The same, killed after so many milliseconds. */
  killed(after: number, ...args: readonly string[]): Promise<void>;
}

export interface OldHostOptions {
  readonly variant: Variant;
  readonly rules: readonly string[];
  /** Addresses as `ip address add` takes them. */
  readonly addresses: readonly string[];
  /** VMs that run, each with the guest of its number: VM 11 has guest 11. */
  readonly vms: readonly number[];
  /** False: there is a libvirt that does not answer. */
  readonly libvirt?: boolean;
  readonly config?: unknown;
  /** Milliseconds that an answer to a probe is waited for; 30 by default, since nobody answers in most tests. */
  readonly probeMs?: number;
}

export async function createOldHost(lab: Lab, folder: string, options: OldHostOptions): Promise<OldHost> {
  const { variant } = options;
  if (!existsSync('/usr/bin/virsh')) throw new Error('virsh is needed: apt-get install libvirt-clients');
  const restore = `/usr/sbin/iptables-${variant}-restore` as const;
  await lab.exec('h1', [restore], { input: ['*nat', ...options.rules, 'COMMIT', ''].join('\n') });
  for (const address of options.addresses)
    await lab.exec('h1', ['/usr/sbin/ip', 'address', 'add', ...address.split(' ')]);
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, 'kvm-ib.yaml'), JSON.stringify(options.config ?? CONFIG));
  const virsh = join(folder, 'virsh');
  writeFileSync(virsh, virshScript(options), { mode: 0o755 });
  const mounted = '/bin/mount --bind "$1" "$2" && shift 2 && exec "$@"';
  const fake = ['/usr/bin/unshare', '--mount', '/bin/sh', '-c', mounted, 'sh', virsh, '/usr/bin/virsh'] as const;
  const probe = `KVM_IB_PROBE_MS=${options.probeMs ?? 30}`;
  const env = [`KVM_IB_CONFIG=${folder}/kvm-ib.yaml`, `KVM_IB_STATE_DIR=${folder}/state`, probe];
  const argv = (args: readonly string[]) =>
    [...fake, '/usr/bin/env', ...env, process.execPath, COMMAND, ...args] as const;
  const text = async (program: string, ...args: readonly string[]): Promise<readonly string[]> =>
    (await lab.exec('h1', [program, ...args])).split('\n');
  return {
    nat: async () =>
      (await text(`/usr/sbin/iptables-${variant}-save`, '-t', 'nat')).filter((line) => line.startsWith('-A')),
    addresses: async () =>
      (await text('/usr/sbin/ip', '-4', '-o', 'address', 'show', 'dev', 'ib0')).flatMap((line) => {
        const [, address, brd, label] = /inet (\S+)( brd \S+)? scope \w+ (?:secondary )?(\S+?)\\/.exec(line) ?? [];
        return address === undefined ? [] : [`${address}${brd ?? ''} ${label}`];
      }),
    kvmIb: (...args) => lab.tryExec('h1', argv(args)),
    killed: async (after, ...args) =>
      void (await lab.tryExec('h1', ['/usr/bin/timeout', '-s', 'KILL', `${after / 1000}`, ...argv(args)])),
  };
}

function virshScript({ vms, libvirt = true }: OldHostOptions): string {
  if (!libvirt) return '#!/bin/sh\nexit 1\n';
  const table = (vm: number): string => {
    const { mac } = pairOf(vm);
    return [
      ' Interface   Type     Source   Model    MAC',
      '---------',
      ` one-${vm}-0   bridge   virbr1   virtio   ${mac}`,
      '',
    ].join('\n');
  };
  const files = vms.map((vm) => `one-${vm}) cat <<'END'\n${table(vm)}\nEND\n;;`).join('\n');
  return `#!/bin/sh
domiflist() { case "$1" in
${files}
esac; }
for last; do :; done
case "$*" in
*"list --name") printf '%s\\n' ${vms.map((vm) => `one-${vm}`).join(' ')} '' ;;
*"echo one-"*) printf '%s\\n' "$last" | tr ';' '\\n' | while read -r verb name; do
  case "$verb" in echo) echo "$name" ;; domiflist) domiflist "$name" ;; esac
done ;;
*domiflist*) domiflist "$last" ;;
esac
`;
}
