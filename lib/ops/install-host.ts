/** What `kvm-ib install host` puts on a hypervisor, what it runs there, and what it leaves to the operator. Pure. */
import type { Config, Network } from '../core/mapping.ts';
import type { Item, Note, Operation, Step } from './install.ts';
import { parents, touches } from './install.ts';
import type { LibvirtPlan } from './install-libvirt.ts';

export const LIBRARY = '/usr/lib/kvm-ib';
export const CONFIG_FILE = '/etc/kvm-ib/kvm-ib.yaml';
export const HOST_RECORD = `${LIBRARY}/installed.json`;
/** In the package; a build without documentation has none. */
const MAN_PAGE = 'docs/man/kvm-ib.1';
const COMMAND = '/usr/bin/kvm-ib';
const SYSCTL_FILE = '/etc/sysctl.d/60-kvm-ib.conf';
const MODULES_FILE = '/etc/modules-load.d/kvm-ib.conf';
const UNIT_DIRECTORY = '/etc/systemd/system';
const RECONCILE_UNIT = 'kvm-ib-reconcile.service';
const TIMER_UNIT = 'kvm-ib.timer';
const UNITS = [RECONCILE_UNIT, 'kvm-ib-timer.service', TIMER_UNIT] as const;
const NETWORK_MANAGER = '/etc/NetworkManager';
const DISPATCHER = `${NETWORK_MANAGER}/dispatcher.d/50-kvm-ib`;
export const UNMANAGED = `${NETWORK_MANAGER}/conf.d/90-kvm-ib.conf`;
/** What libvirt was given at an installation. */
export const LIBVIRT_DIRECTORY = `${LIBRARY}/networks`;

/** What is known of the host. Of another root only the files are looked at, and nothing is run. */
export interface HostFacts {
  /** The running system, not a directory that will become one. */
  readonly live: boolean;
  /** systemd runs. */
  readonly systemd: boolean;
  /** Reconcile unit and timer are enabled, and the timer runs. */
  readonly unitsRunning: boolean;
  /** Connection tracking is in the kernel, so that its values can be set. */
  readonly conntrack: boolean;
  readonly networkManager: boolean;
  /** What NetworkManager says of each link, as `nmcli device` does; empty when it does not run. */
  readonly managed: ReadonlyMap<string, string>;
  /** NetworkManager shall leave the IPoIB links alone as well. */
  readonly unmanagedDevice: boolean;
  readonly selinux: boolean;
  readonly firewalld: boolean;
  /** The configuration that stands there, or will; null when there is none that holds. */
  readonly config: Config | null;
  /** Why there is none. */
  readonly configProblem: string | null;
  /** Content for a configuration that is not there yet. */
  readonly givenConfig: string | null;
  /** What is done about libvirt's networks. */
  readonly libvirt: LibvirtPlan;
}

/** @param packageFiles every file below `drivers/`, `rulesets/` and `docs/man/` of the package, with its mode */
export function hostItems(
  facts: Pick<HostFacts, 'networkManager' | 'managed' | 'unmanagedDevice' | 'config' | 'givenConfig' | 'libvirt'>,
  packageFiles: readonly { readonly path: string; readonly mode: number }[],
): readonly Item[] {
  const program = (name: string, mode: number, source = `bundle/${name}`): Item => {
    return { kind: 'file', path: `${LIBRARY}/${name}`, mode, source: { package: source }, keep: 'ours' };
  };
  const setting = (path: string, source: string, mode = 0o644): Item => {
    return { kind: 'file', path, mode, source: { package: source }, keep: 'unless-ours' };
  };
  const own = (path: string): Item => ({ kind: 'directory', path, mode: 0o755, own: true });
  const folders = new Set(packageFiles.flatMap(({ path }) => parents(path)));
  return [
    own(LIBRARY),
    // The engine's bundle before what starts it, so that a half-done installation starts nothing new.
    program('engine.mjs', 0o644),
    program('parser.mjs', 0o644),
    program('vnm.mjs', 0o644),
    program('koffi.node', 0o644),
    program('netlink.node', 0o644),
    program('kvm-ib.mjs', 0o755),
    program('kvm-ib-engine', 0o755, 'rulesets/kvm-ib-engine'),
    ...[...folders].sort().map((folder) => own(`${LIBRARY}/${folder}`)),
    ...packageFiles.map(({ path, mode }) => program(path, mode, path)),
    ...packageFiles
      .filter(({ path }) => path === MAN_PAGE)
      .map(({ path }): Item => {
        return {
          kind: 'file',
          path: '/usr/share/man/man1/kvm-ib.1',
          mode: 0o644,
          source: { package: path },
          keep: 'ours',
        };
      }),
    { kind: 'link', path: COMMAND, target: `../lib/kvm-ib/kvm-ib.mjs` },
    { kind: 'directory', path: '/etc/kvm-ib', mode: 0o755, own: false },
    {
      kind: 'file',
      path: CONFIG_FILE,
      mode: 0o644,
      source: facts.givenConfig === null ? { package: 'rulesets/kvm-ib.example.yaml' } : { text: facts.givenConfig },
      keep: 'always',
    },
    {
      kind: 'file',
      path: '/etc/sudoers.d/kvm-ib',
      mode: 0o440,
      source: { package: 'rulesets/sudoers.d/kvm-ib' },
      keep: 'unless-ours',
      check: 'visudo',
    },
    setting(SYSCTL_FILE, 'rulesets/sysctl.d/60-kvm-ib.conf'),
    setting(MODULES_FILE, 'rulesets/modules-load.d/kvm-ib.conf'),
    ...UNITS.map((unit) => setting(`${UNIT_DIRECTORY}/${unit}`, `rulesets/systemd/${unit}`)),
    ...(facts.networkManager ? networkManagerItems(facts) : []),
    ...facts.libvirt.items,
  ];
}

function networkManagerItems(facts: Pick<HostFacts, 'config' | 'managed' | 'unmanagedDevice'>): readonly Item[] {
  const { config } = facts;
  const dispatcher: Item = {
    kind: 'file',
    path: DISPATCHER,
    mode: 0o755,
    source: { package: 'rulesets/networkmanager/50-kvm-ib' },
    keep: 'unless-ours',
  };
  if (config === null) return [dispatcher];
  const text = unmanagedText(unmanagedLinks(config.networks, facts));
  return [dispatcher, { kind: 'file', path: UNMANAGED, mode: 0o644, source: { text }, keep: 'unless-ours' }];
}

/** NetworkManager runs this link by a profile of its own: told to leave it alone, it would take its addresses and set it down. */
export function isRunByNetworkManager(link: string, managed: ReadonlyMap<string, string>): boolean {
  const state = managed.get(link);
  return state !== undefined && state !== 'unmanaged' && state !== 'connected (externally)';
}

/** The bridges; the IPoIB links only when that was asked for, since NetworkManager may have to bring them up. */
export function unmanagedLinks(
  networks: readonly Network[],
  facts: Pick<HostFacts, 'managed' | 'unmanagedDevice'>,
): readonly string[] {
  const bridges = networks
    .map(({ bridge }) => bridge)
    .filter((bridge) => !isRunByNetworkManager(bridge, facts.managed));
  return [...bridges, ...(facts.unmanagedDevice ? networks.map(({ device }) => device) : [])];
}

export function unmanagedText(links: readonly string[]): string {
  return [
    `# ${UNMANAGED}, written by \`kvm-ib install host\` from ${CONFIG_FILE}. NetworkManager.conf(5)`,
    '#',
    '# The bridges of the guests belong to libvirt: NetworkManager shall not take addresses off them or change their MTU.',
    '# An IPoIB link is listed only after `kvm-ib install host --unmanaged-device`; else NetworkManager keeps it, and the',
    '# dispatcher script repairs our aliases there.',
    '[keyfile]',
    `unmanaged-devices+=${links.map((link) => `interface-name:${link}`).join(';')}`,
    '',
  ].join('\n');
}

/** What to run once the files are in place. Nothing below another root. */
export function hostSteps(operations: readonly Operation[], facts: HostFacts): readonly Step[] {
  if (!facts.live) return [];
  const steps: Step[] = [];
  const step = (what: string, ...argv: [string, ...string[]]): void => void steps.push({ what, argv });
  if (touches(operations, [SYSCTL_FILE, MODULES_FILE])) {
    if (!facts.conntrack) step('connection tracking, for the value below', '/usr/sbin/modprobe', 'nf_conntrack');
    step('forwarding', '/usr/sbin/sysctl', '-p', SYSCTL_FILE);
  }
  if (facts.networkManager && facts.systemd && touches(operations, [UNMANAGED])) {
    step('NetworkManager reads its settings', '/usr/bin/systemctl', 'try-reload-or-restart', 'NetworkManager.service');
  }
  steps.push(...facts.libvirt.steps);
  if (
    facts.systemd &&
    touches(
      operations,
      UNITS.map((unit) => `${UNIT_DIRECTORY}/${unit}`),
    )
  ) {
    step('systemd reads the units', '/usr/bin/systemctl', 'daemon-reload');
  }
  if (facts.config === null) return steps;
  if (facts.systemd && !facts.unitsRunning) {
    step(
      'at boot, after firewall reloads, each minute',
      '/usr/bin/systemctl',
      'enable',
      '--now',
      RECONCILE_UNIT,
      TIMER_UNIT,
    );
  } else if (facts.systemd && touches(operations, [LIBRARY])) {
    step('the new version loads its rules', '/usr/bin/systemctl', 'reload-or-restart', RECONCILE_UNIT);
  }
  return steps;
}

export function hostUninstallSteps(facts: Pick<HostFacts, 'live' | 'systemd'>): {
  readonly before: readonly Step[];
  readonly after: readonly Step[];
} {
  if (!facts.live || !facts.systemd) return { before: [], after: [] };
  return {
    before: [
      { what: 'no reconcile any more', argv: ['/usr/bin/systemctl', 'disable', '--now', TIMER_UNIT, RECONCILE_UNIT] },
    ],
    after: [{ what: 'systemd forgets the units', argv: ['/usr/bin/systemctl', 'daemon-reload'] }],
  };
}

/** What is left to the operator, in the order to do it. */
export function hostNotes(facts: HostFacts): readonly Note[] {
  const notes: Note[] = [];
  const note = (title: string, ...lines: readonly string[]): void => void notes.push({ title, text: lines.join('\n') });
  const { config } = facts;
  if (config === null) {
    note(
      `The configuration names no network yet (${facts.configProblem ?? 'it is the example'})`,
      `Edit ${CONFIG_FILE}, then:`,
      '  kvm-ib config check',
      '  kvm-ib install host        # again: it then starts the units',
    );
  } else {
    notes.push(...facts.libvirt.notes);
    for (const { bridge } of config.networks) {
      if (!facts.networkManager || !isRunByNetworkManager(bridge, facts.managed)) continue;
      note(
        `NetworkManager runs the bridge ${bridge} by a profile of its own`,
        'It is left to it, since a bridge that is taken from NetworkManager loses its addresses. Better is a bridge of libvirt.',
      );
    }
  }
  if (facts.live && !facts.systemd) {
    note(
      'systemd does not run here, so nothing repairs what no driver action ends',
      'Have these run as root, at boot after the firewall and then once a minute:',
      `  ${COMMAND} reconcile --quiet`,
    );
  }
  if (!facts.live) {
    note(
      'Files only: this is not the running system',
      'On the host itself run `kvm-ib install host` once more: it loads sysctls and starts the units.',
    );
  }
  if (facts.selinux) selinuxNote(note);
  if (facts.firewalld) firewalldNote(config, note);
  return notes;
}

type AddNote = (title: string, ...lines: readonly string[]) => void;

function selinuxNote(note: AddNote): void {
  note(
    'SELinux is configured on this host (not tried by us)',
    'Give the new files their labels; systemd and sudo start programs of type bin_t:',
    `  semanage fcontext -a -t bin_t '${LIBRARY}/(kvm-ib\\.mjs|kvm-ib-engine)'`,
    `  restorecon -RvF ${LIBRARY} ${COMMAND} /etc/kvm-ib /etc/sudoers.d/kvm-ib`,
    'Then, should something be denied still:',
    '  ausearch -m AVC,USER_AVC -ts recent',
  );
}

function firewalldNote(config: Config | null, note: AddNote): void {
  // Names of zones and policies have at most 17 characters.
  const lines = (config?.networks ?? []).flatMap((network, index) => {
    const zone = `kvm-ib-${index}`;
    return [
      `  IB=$(firewall-cmd --get-zone-of-interface=${network.device} || firewall-cmd --get-default-zone)`,
      `  firewall-cmd --permanent --new-zone=${zone}`,
      `  firewall-cmd --permanent --zone=${zone} --add-interface=${network.bridge}`,
      ...[
        [`${zone}-out`, zone, '"$IB"'],
        [`${zone}-in`, '"$IB"', zone],
      ].flatMap(([policy, from, to]) => [
        `  firewall-cmd --permanent --new-policy=${policy}`,
        `  firewall-cmd --permanent --policy=${policy} --add-ingress-zone=${from} --add-egress-zone=${to}`,
        `  firewall-cmd --permanent --policy=${policy} --set-target=ACCEPT`,
      ]),
    ];
  });
  note(
    'firewalld is on this host (0.9 or later; not tried by us)',
    'It rejects what is forwarded between zones, and a reject of its own wins over any accept of ours; kvm-ib puts nothing',
    'into its chains. If guests do not reach the fabric, let it pass what goes between bridge and IPoIB link. The table of',
    'kvm-ib still says which guest may use which address.',
    ...(lines.length > 0
      ? [...lines, '  firewall-cmd --reload']
      : ['(Commands once the configuration has a network.)']),
  );
}
