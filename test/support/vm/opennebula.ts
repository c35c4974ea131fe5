/**
 * The side of OpenNebula: the files that oned writes, the stock drivers' folder on a hypervisor, and the way in which
 * one_vmm_exec calls a driver script there (OpenNebula 6.6 to 7.x; older forms are in test/support/one-releases.ts).
 */
import { spawn } from 'node:child_process';
import { chmodSync, cpSync, mkdirSync, symlinkSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Host } from './host.ts';

const repository = join(dirname(fileURLToPath(import.meta.url)), '../../..');

export interface TestVm {
  readonly id: number;
  readonly name: string;
  readonly uuid: string;
  readonly nics: readonly TestNic[];
  readonly aliases?: readonly TestAlias[];
  /** LCM_STATE; 3 (RUNNING) where it is not given. */
  readonly lcmState?: number;
  /**
   * With CONTEXT as oned writes it where NETWORK=YES: variables of every NIC and alias, without those that are being
   * detached. Where it is not given the VM has none.
   */
  readonly context?: { readonly leaving: readonly number[] };
}

export interface TestNic {
  readonly bridge: string;
  readonly mac: string;
  readonly ip: string;
  /** NIC_ID; its place in the list where it is not given. */
  readonly id?: number;
  readonly attach?: boolean;
  readonly ibIp?: string;
  /** The tap; `one-<vm>-<NIC_ID>` where it is not given. */
  readonly target?: string;
}

/** An external NIC_ALIAS. */
export interface TestAlias {
  readonly id: number;
  readonly parent: number;
  /** ALIAS_ID. */
  readonly aliasId: number;
  readonly ip: string;
  readonly mac: string;
  readonly attach?: boolean;
}

/** TARGET of the context CD, an argument of prereconfigure and reconfigure. */
export const CONTEXT_DEVICE = 'sda';

export interface DomainBoot {
  readonly kernel: string;
  readonly initramfs: string;
  readonly commandLine: string;
  /** File that the serial console is written to; made by qemu. */
  readonly console: string;
  /** A qcow2 image as first disk. */
  readonly disk?: string;
  /** Image of the context CD. */
  readonly context?: string;
  /** RAW of the VM template: put into the domain as it is. */
  readonly raw?: string;
}

/**
 * The deployment file, in the order and quoting of OpenNebula 7.x: texts in CDATA, attributes in single quotes, the
 * title raw, one `devices` section for the VM, one for the guest agent, one from RAW. Two deviations that this machine
 * needs: type qemu (no KVM), and no cputune (no cgroups).
 */
export function domainXml(vm: TestVm, boot: DomainBoot): string {
  const interfaces = vm.nics.map(
    (nic, n) => `\t\t<interface type='bridge'>
\t\t\t<source bridge='${nic.bridge}'/>
\t\t\t<mac address='${nic.mac}'/>
\t\t\t<target dev='one-${vm.id}-${n}'/>
\t\t\t<model type='virtio'/>
\t\t</interface>
`,
  );
  const disks = [
    ...(boot.disk === undefined
      ? []
      : [
          `\t\t<disk type='file' device='disk'>
\t\t\t<source file='${boot.disk}'/>
\t\t\t<target dev='vda' bus='virtio'/>
\t\t\t<driver name='qemu' type='qcow2'/>
\t\t</disk>
`,
        ]),
    ...(boot.context === undefined
      ? []
      : [
          `\t\t<disk type='file' device='cdrom'>
\t\t\t<source file='${boot.context}'/>
\t\t\t<target dev='${CONTEXT_DEVICE}' bus='sata'/>
\t\t\t<readonly/>
\t\t\t<driver name='qemu' type='raw'/>
\t\t</disk>
`,
        ]),
  ];
  return `<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
\t<name>one-${vm.id}</name>
\t<title>${vm.name}</title>
\t<uuid>${vm.uuid}</uuid>
\t<vcpu><![CDATA[1]]></vcpu>
\t<memory>196608</memory>
\t<os>
\t\t<type arch='x86_64' machine='q35'>hvm</type>
\t\t<kernel><![CDATA[${boot.kernel}]]></kernel>
\t\t<initrd><![CDATA[${boot.initramfs}]]></initrd>
\t\t<cmdline><![CDATA[${boot.commandLine}]]></cmdline>
\t</os>
\t<devices>
\t\t<emulator><![CDATA[/usr/bin/qemu-system-x86_64]]></emulator>
${disks.join('')}${interfaces.join('')}\t\t<graphics type='vnc' listen='0.0.0.0' port='${5900 + vm.id}'/>
\t</devices>
\t<features>
\t\t<acpi/>
\t</features>
\t<devices>
\t\t<channel type='unix'>
\t\t\t<source mode='bind'/><target type='virtio' name='org.qemu.guest_agent.0'/>
\t\t</channel>
\t</devices>
\t<devices><serial type='file'><source path='${boot.console}'/></serial></devices>${boot.raw ?? ''}
\t<metadata>
\t\t<one:vm xmlns:one="http://opennebula.org/xmlns/libvirt/1.0">
\t\t\t<one:system_datastore><![CDATA[/var/lib/one//datastores/0/${vm.id}]]></one:system_datastore>
\t\t\t<one:name><![CDATA[${vm.name}]]></one:name>
\t\t\t<one:uname><![CDATA[oneadmin]]></one:uname>
\t\t\t<one:uid>0</one:uid>
\t\t\t<one:gname><![CDATA[oneadmin]]></one:gname>
\t\t\t<one:gid>0</one:gid>
\t\t\t<one:opennebula_version>7.4.0</one:opennebula_version>
\t\t\t<one:stime>1787200000</one:stime>
\t\t\t<one:deployment_time>1787200031</one:deployment_time>
\t\t\t<one:pci_devices></one:pci_devices>
\t\t</one:vm>
\t</metadata>
</domain>
`;
}

/** Element VM as oned prints it: vm.xml beside the deployment file, and part of the action data. One line. */
export function vmXml(vm: TestVm, hostName: string): string {
  const cdata = (fields: Readonly<Record<string, string | number>>) =>
    Object.entries(fields)
      .map(([name, value]) => `<${name}><![CDATA[${value}]]></${name}>`)
      .join('');
  const nics = vm.nics.map((nic, place) => {
    const n = nic.id ?? place;
    const fields = {
      AR_ID: 0,
      BRIDGE: nic.bridge,
      BRIDGE_TYPE: 'linux',
      CLUSTER_ID: 0,
      IP: nic.ip,
      MAC: nic.mac,
      MODEL: 'virtio',
      NAME: `NIC${n}`,
      NETWORK: 'ib-nat',
      NETWORK_ID: 7,
      NIC_ID: n,
      SECURITY_GROUPS: 0,
      TARGET: nic.target ?? `one-${vm.id}-${n}`,
      VN_MAD: 'dummy',
      ...(nic.attach ? { ATTACH: 'YES' } : {}),
      ...(nic.ibIp === undefined ? {} : { IB_IP: nic.ibIp }),
    };
    return `<NIC>${cdata(fields)}</NIC>`;
  });
  const aliases = (vm.aliases ?? []).map(({ id, parent, aliasId, ip, mac, attach }) => {
    const fields = {
      ALIAS_ID: aliasId,
      ...(attach ? { ATTACH: 'YES' } : {}),
      BRIDGE: 'virbr1',
      EXTERNAL: 'YES',
      IP: ip,
      MAC: mac,
      NAME: `NIC${parent}_ALIAS${id}`,
      NETWORK: 'ipoib',
      NETWORK_ID: 8,
      NIC_ID: id,
      PARENT: `NIC${parent}`,
      PARENT_ID: parent,
      TARGET: `one-${vm.id}-${id}`,
      VN_MAD: 'dummy',
    };
    return `<NIC_ALIAS>${cdata(fields)}</NIC_ALIAS>`;
  });
  const context = vm.context === undefined ? '' : `<CONTEXT>${cdata(contextFields(vm, vm.context.leaving))}</CONTEXT>`;
  const history =
    `<HISTORY><OID>${vm.id}</OID><SEQ>0</SEQ><HOSTNAME>${hostName}</HOSTNAME><HID>3</HID><CID>0</CID>` +
    '<STIME>1787200030</STIME><ETIME>0</ETIME><VM_MAD><![CDATA[kvm-ib]]></VM_MAD><TM_MAD><![CDATA[qcow2]]></TM_MAD>' +
    '<DS_ID>0</DS_ID></HISTORY>';
  return (
    `<VM><ID>${vm.id}</ID><UID>0</UID><GID>0</GID><UNAME>oneadmin</UNAME><GNAME>oneadmin</GNAME>` +
    `<NAME>${vm.name}</NAME><STATE>3</STATE><LCM_STATE>${vm.lcmState ?? 3}</LCM_STATE><STIME>1787200000</STIME><ETIME>0</ETIME>` +
    `<DEPLOY_ID>${vm.uuid}</DEPLOY_ID><MONITORING/><SCHED_ACTIONS/>` +
    `<TEMPLATE>${context}${cdata({ CPU: 1, MEMORY: 192 })}${nics.join('')}${aliases.join('')}${cdata({ TEMPLATE_ID: 5, VCPU: 1, VMID: vm.id })}</TEMPLATE>` +
    `<USER_TEMPLATE>${cdata({ HYPERVISOR: 'kvm' })}</USER_TEMPLATE><HISTORY_RECORDS>${history}</HISTORY_RECORDS></VM>`
  );
}

function contextFields(vm: TestVm, leaving: readonly number[]): Readonly<Record<string, string>> {
  const fields: Record<string, string> = { DISK_ID: '1' };
  vm.nics.forEach(({ id, ip, mac }, place) => {
    if (leaving.includes(id ?? place)) return;
    Object.assign(fields, { [`ETH${id ?? place}_IP`]: ip, [`ETH${id ?? place}_MAC`]: mac });
  });
  for (const { id, parent, aliasId, ip, mac } of vm.aliases ?? []) {
    if (leaving.includes(id)) continue;
    const prefix = `ETH${parent}_ALIAS${aliasId}`;
    Object.assign(fields, { [`${prefix}_EXTERNAL`]: 'YES', [`${prefix}_IP`]: ip, [`${prefix}_MAC`]: mac });
  }
  return { ...fields, NETWORK: 'YES', TARGET: CONTEXT_DEVICE };
}

/** Where a migration goes, as the action data says it. */
export interface TestMigration {
  readonly to: string;
  /** False: the disks are copied, and the guest arrives paused. */
  readonly shared?: boolean;
  /** Directory of the VM on the destination. */
  readonly home?: string;
}

/**
 * VMM_DRIVER_ACTION_DATA, which every action but deploy gets on its standard input since 5.0. One line, no declaration.
 * While a VM migrates its history names the destination already; `hostName` is the source.
 */
export function actionData(vm: TestVm, hostName: string, migration?: TestMigration): string {
  const moved: TestVm = migration === undefined ? vm : { ...vm, lcmState: vm.lcmState ?? 4 };
  const shared = migration?.shared === false ? 'NO' : 'YES';
  return (
    `<VMM_DRIVER_ACTION_DATA><HOST>${hostName}</HOST>` +
    (migration === undefined ? '<MIGR_HOST/>' : `<MIGR_HOST>${migration.to}</MIGR_HOST>`) +
    `<DEPLOY_ID>${vm.uuid}</DEPLOY_ID>` +
    '<LOCAL_DEPLOYMENT_FILE/><REMOTE_DEPLOYMENT_FILE/><CHECKPOINT_FILE/><TM_COMMAND/><TM_COMMAND_ROLLBACK/>' +
    (migration?.home === undefined ? '<DISK_TARGET_PATH/>' : `<DISK_TARGET_PATH>${migration.home}</DISK_TARGET_PATH>`) +
    `${vmXml(moved, migration?.to ?? hostName)}<DATASTORE><ID>0</ID><NAME>system</NAME>` +
    '<TM_MAD><![CDATA[qcow2]]></TM_MAD><BASE_PATH><![CDATA[/var/lib/one//datastores/0]]></BASE_PATH>' +
    (migration === undefined ? '' : `<TEMPLATE><SHARED><![CDATA[${shared}]]></SHARED></TEMPLATE>`) +
    '</DATASTORE></VMM_DRIVER_ACTION_DATA>'
  );
}

/** What one_vmm_exec leaves on the hypervisor before it calls deploy. @returns the deployment file's path (first argument). */
export function writeDeploymentFolder(folder: string, vm: TestVm, hostName: string): string {
  const home = join(folder, 'datastores', '0', String(vm.id));
  mkdirSync(home, { recursive: true });
  writeFileSync(join(home, 'vm.xml'), `${vmXml(vm, hostName)}\n`);
  writeFileSync(join(home, 'ds.xml'), '<DATASTORE><ID>0</ID></DATASTORE>\n');
  return join(home, 'deployment.0');
}

/**
 * What all stock scripts read first. A command that fails is logged with what it said, then comes the script's own message;
 * the script ends with the status of the command.
 */
const COMMON = `VIRSH="virsh --connect $LIBVIRT_URI"
error() { printf '%s\\n' "$1" >&2; }
try() {
  local message=$1 said status
  shift
  said=$("$@" 2>&1 > /dev/null) && return
  status=$?
  error "ERROR: $(basename "$0"): Command \\"$*\\" failed: $said"
  error "$message"
  exit "$status"
}
again() {
  local left=$1
  shift
  until ("$@"); do
    left=$((left - 1))
    [ "$left" -gt 0 ] || return 1
    sleep 1
  done
}
value() { xmllint --xpath "string($1)" - <<< "$DATA"; }
`;

/**
 * Stock-shaped scripts: argv, standard input and output, exit status and what they do to the domain as those of OpenNebula's
 * own kvm folder, 6.0 to 7.4.
 */
const STOCK = {
  deploy: `cat > "$1" || exit 255
$VIRSH create "$1" > /dev/null || { error "Could not create domain from $1"; exit 255; }
$VIRSH dominfo "$(sed -n "s/.*<name>\\(.*\\)<\\/name>.*/\\1/p" "$1" | head -n 1)" | awk '/^UUID:/ { print $2 }'
`,
  shutdown: `gone() { ! $VIRSH --readonly dominfo "$1" > /dev/null 2>&1; }
gone "$1" && exit 0
try "Could not shutdown $1" $VIRSH shutdown "$1"
left=$((SHUTDOWN_TIMEOUT * 5))
until gone "$1"; do
  [ "$left" -gt 0 ] || { error "Timed out shutting down $1"; exit 255; }
  left=$((left - 1))
  sleep 0.2
done
`,
  cancel: `$VIRSH --readonly dominfo "$1" > /dev/null 2>&1 || exit 0
try "Could not destroy $1" $VIRSH destroy "$1"
`,
  reboot: `try "Could not reboot domain $1" $VIRSH reboot "$1"
`,
  reset: `try "Could not reset domain $1" $VIRSH reset "$1"
`,
  // An older checkpoint is moved out of the way, never written over. save.<TM_MAD> is never run: the script ends before.
  save: `cat > /dev/null
[ ! -f "$2" ] || try "Could not move $2" mv "$2" "$2.$(date +%s)"
touch "$2"
chmod 666 "$2"
try "Could not save $1 to $2" $VIRSH save "$1" "$2"
`,
  // First restore.<TM_MAD>, if there is one. The domain is named after the VM's id, the fourth argument; where there is none,
  // virsh says so on standard error. Paths in the checkpoint follow it to its datastore.
  restore: `DATA=$(cat)
first="$(dirname "$0")/restore.$(value /VMM_DRIVER_ACTION_DATA/DATASTORE/TM_MAD)"
[ ! -x "$first" ] || "$first" "$@" <<< "$DATA"
state=$($VIRSH --readonly dominfo "one-$4" | sed -n 's/^State: *//p')
if [ "$state" = pmsuspended ]; then
  try "Could not wake up VM from suspended state" $VIRSH dompmwakeup "one-$4"
  exit 0
fi
home=$(dirname "$1")
stores=$(dirname "$(dirname "$home")")
try "Could not recalculate paths in $1.xml" $VIRSH save-image-dumpxml "$1"
$VIRSH save-image-dumpxml "$1" | sed "s%$stores/[0-9]*/$4/%$home/%g" > "$1.xml"
restore() { try "Could not restore from $1" $VIRSH restore "$1" --xml "$1.xml"; }
again "$VIRSH_RETRIES" restore "$1" || exit 1
rm "$1" "$1.xml"
`,
  // Shared storage, or disks that virsh copies: then the guest arrives paused, what virsh does not copy follows, and the
  // script has it resumed. Metadata of snapshots would make libvirt refuse. A failure is cleaned up on the destination.
  // Within one host (since 7.2) only disks move.
  migrate: `DATA=$(cat)
[ "$2" != "$3" ] || exit 0
there="$QEMU_PROTOCOL://$2/system"
for snapshot in $($VIRSH snapshot-list "$1" --name 2> /dev/null); do
  try "Failed to delete snapshot $snapshot from $1" $VIRSH snapshot-delete "$1" --snapshotname "$snapshot" --metadata
done
shared=$(value /VMM_DRIVER_ACTION_DATA/DATASTORE/TEMPLATE/SHARED)
options="--live $MIGRATE_OPTIONS"
[ "$shared" = YES ] || options="$options --suspend"
status=0
$VIRSH migrate $options "$1" "$there" || status=$?
if [ "$status" -ne 0 ]; then
  for action in destroy undefine; do virsh --connect "$there" "$action" "$1" > /dev/null 2>&1; done
  error "Could not migrate $1 to $2"
  exit "$status"
fi
[ "$shared" = YES ] || try "Could not resume $1 on $2" virsh --connect "$there" resume "$1"
`,
  attach_nic: `DATA=$(cat)
nic='//NIC[ATTACH="YES"]'
model=$(value "$nic/MODEL")
if ! said=$($VIRSH attach-device "$1" <(cat << EOT
<interface type="bridge"><source bridge="$(value "$nic/BRIDGE")"/><mac address="$(value "$nic/MAC")"/><target dev="$(value "$nic/TARGET")"/><model type="\${model:-$DEFAULT_ATTACH_NIC_MODEL}"/></interface>
EOT
) 2>&1 > /dev/null); then
  error "Could not attach NIC to $1: $said"
  exit 1
fi
`,
  // Each try may be in vain without virsh saying so; when all were, the status is their number.
  detach_nic: `cat > /dev/null
attached() { $VIRSH domiflist "$1" | grep "$2" > /dev/null 2>&1; }
for n in $(seq "$VIRSH_RETRIES"); do
  said=$($VIRSH detach-interface --domain "$1" --type bridge --mac "$2" 2>&1 > /dev/null) ||
    error "Error detaching interface ($2): $said"
  attached "$1" "$2" || exit 0
done
exit "$VIRSH_RETRIES"
`,
  prereconfigure: `[ -n "$1" ] && [ -n "$2" ] || exit 0
disk=$($VIRSH domblklist "$1" | awk -v dev="$2" '$1 == dev { print $2; exit }')
[ "$disk" != - ] || exit 0
try "Could not eject CDROM $2" $VIRSH change-media "$1" "$2" --eject --force
`,
  reconfigure: `[ -n "$1" ] && [ -n "$2" ] && [ -n "$3" ] || exit 0
try "Could not insert CDROM $3 to $2" $VIRSH change-media "$1" "$2" "$3" --insert
`,
  snapshot_create: `said=$($VIRSH snapshot-create-as "$1" --name "snap-$2") ||
  { error "Could not create snapshot snap-$2 for domain $1."; exit 255; }
awk '{ print $3 }' <<< "$said"
`,
  snapshot_revert: `try "Could not revert to snapshot $2 for domain $1." $VIRSH snapshot-revert --force "$1" "$2"
`,
  snapshot_delete: `try "Could not delete snapshot $2 for domain $1." $VIRSH snapshot-delete "$1" "$2"
`,
} as const;

const KVMRC = `export LANG=C
export LIBVIRT_URI=qemu:///system
export QEMU_PROTOCOL=qemu+ssh
export SHUTDOWN_TIMEOUT=30
export VIRSH_RETRIES=3
export DEFAULT_ATTACH_NIC_MODEL=virtio
`;

/**
 * Builds `<folder>/remotes`, what the front-end copies to /var/tmp/one: `vmm/kvm` with stock-shaped scripts and
 * `vmm/kvm-ib` with ours, links followed as `rsync -L` does. `<folder>/dist` leads to this checkout's bundles, where the
 * launchers look for them when they are not installed.
 * @returns the folder of the drivers (…/vmm).
 */
export function writeRemotes(folder: string): string {
  const remotes = join(folder, 'remotes');
  writeStock(remotes);
  cpSync(join(repository, 'drivers/vmm/kvm-ib'), join(remotes, 'vmm/kvm-ib'), { recursive: true, dereference: true });
  symlinkSync(join(repository, 'dist'), join(folder, 'dist'));
  return join(remotes, 'vmm');
}

/** Stock-shaped scripts in `<remotes>/vmm/kvm`, and the two files that they read. */
export function writeStock(remotes: string): void {
  const etc = join(remotes, 'etc/vmm/kvm');
  const kvm = join(remotes, 'vmm/kvm');
  for (const path of [etc, kvm]) mkdirSync(path, { recursive: true });
  writeFileSync(join(etc, 'kvmrc'), KVMRC);
  writeFileSync(join(remotes, 'scripts_common.sh'), COMMON);
  for (const [action, body] of Object.entries(STOCK)) {
    const head = `#!/bin/bash
source "$(dirname "$0")/../../etc/vmm/kvm/kvmrc"
source "$(dirname "$0")/../../scripts_common.sh"
`;
    writeScript(join(kvm, action), `${head}${body}`);
  }
}

export function writeScript(path: string, text: string): void {
  writeFileSync(path, text);
  chmodSync(path, 0o755);
}

export interface DriverCall {
  /** Where the shell is started. */
  readonly host: Pick<Host, 'inside'>;
  /**
   * Starts the shell by this argv, as ssh from the front-end does, with exactly this environment; absent: in the host, as root,
   * with what sshd gives a session.
   */
  readonly ssh?: {
    readonly argv: readonly [string, ...string[]];
    readonly env: Readonly<Record<string, string>>;
  };
  /** Absolute path of the driver script on the host. */
  readonly script: string;
  /** The action's own arguments; VM id and host name follow by themselves. */
  readonly args: readonly string[];
  /** Payload: the domain XML for deploy, else the action data. */
  readonly stdin: string;
  readonly vmId: number;
  readonly hostName: string;
  /** Added to the environment of an ssh session. */
  readonly env?: Readonly<Record<string, string>>;
  /** Milliseconds; 60 s by default. one_vmm_exec itself has no limit unless told so. */
  readonly timeout?: number;
}

export interface DriverAnswer {
  /** Exit status as one_vmm_exec reads it. */
  readonly code: number;
  /** Standard output without the end mark. */
  readonly stdout: string;
  /** Standard error without the line that carries the exit status. */
  readonly stderr: string;
  /** Milliseconds from the call to the second end mark. */
  readonly took: number;
}

/**
 * What sshd gives a session of oneadmin: no sbin. The folder of the node that runs the tests comes last, for machines
 * that have it elsewhere. HOME is a tmpfs of the host.
 */
const SSH_ENV = {
  PATH: `/usr/local/bin:/usr/bin:/bin:/usr/games:${dirname(process.execPath)}`,
  LANG: 'C',
  HOME: '/run',
  SHELL: '/bin/bash',
};

const END_OUT = 'EOF_OUT\n';
// The exit status must begin a line: a script whose standard error ends in the middle of one is never seen to end.
const END_ERR = /^ExitCode: (\d*) EOF_ERR\n/m;

/**
 * Calls a driver script as SshStream of one_vmm_exec does: `bash -s` in the host, which reads from its standard input
 * first whether the script is executable, then the script at the head of a here document, then the payload.
 * @throws Error when the end marks do not come: there one_vmm_exec would wait for ever.
 */
export async function callAsOneVmmExec(call: DriverCall): Promise<DriverAnswer> {
  const env = Object.entries({ ...SSH_ENV, ...call.env }).map(([name, value]) => `${name}=${value}`);
  const [program, ...args] = call.ssh?.argv ?? call.host.inside(['/usr/bin/env', '-i', ...env, '/bin/bash', '-s']);
  const shell = spawn(program, args, { stdio: ['pipe', 'pipe', 'pipe'], env: call.ssh?.env });
  try {
    let out = '';
    let err = '';
    let heard = () => {};
    const listen = (stream: NodeJS.ReadableStream, add: (text: string) => void) => {
      stream.setEncoding('utf8').on('data', (text: string) => {
        add(text);
        heard();
      });
    };
    listen(shell.stdout, (text) => {
      out += text;
    });
    listen(shell.stderr, (text) => {
      err += text;
    });
    shell.stdin.on('error', () => undefined); // the shell may be gone; the missing end marks tell

    const exchange = (command: string, payload: string): Promise<DriverAnswer> => {
      const began = Date.now();
      out = '';
      err = '';
      return new Promise((resolve, reject) => {
        const fail = (why: string) =>
          reject(new Error(`${call.script}: ${why}\nstdout: ${JSON.stringify(out)}\nstderr: ${JSON.stringify(err)}`));
        const limit = call.timeout ?? 60_000;
        const timer = setTimeout(() => fail(`no end marks within ${limit} ms: one_vmm_exec would hang`), limit);
        shell.once('error', (error) => fail(error.message));
        shell.once('close', () => fail('the shell ended before the end marks'));
        heard = () => {
          if (!out.includes(END_OUT) || !err.includes(' EOF_ERR\n')) return;
          const end = END_ERR.exec(err);
          if (end === null) {
            clearTimeout(timer);
            fail('its standard error does not end with a line end: one_vmm_exec would wait for ever');
            return;
          }
          clearTimeout(timer);
          resolve({
            code: Number(end[1]),
            stdout: out.replace(END_OUT, ''),
            stderr: err.replace(END_ERR, ''),
            took: Date.now() - began,
          });
        };
        shell.stdin.write(`(${command}); echo "ExitCode: $? EOF_ERR" 1>&2; echo "EOF_OUT"\n${payload}`);
      });
    };

    const check = await exchange(`if [ ! -x "${call.script}" ]; then exit 42 1>&2; fi`, '');
    if (check.code === 42) throw new Error(`${call.script} is not an executable file`);
    const words = [...call.args, String(call.vmId), call.hostName].map((arg) => `'${arg}'`);
    return await exchange(`cat << 'EOT' | ${call.script} ${words.join(' ')}`, `${call.stdin}\nEOT\n`);
  } finally {
    shell.stdin.end('\nexit\n');
    shell.kill('SIGHUP');
  }
}
