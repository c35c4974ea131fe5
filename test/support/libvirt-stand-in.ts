/**
 * A libvirt that is a folder: a file for each active domain, a hardware address a line. A stand-in is mounted over
 * /usr/bin/virsh in this test's own mount namespace, and says what the files say. Stock scripts of tests change the
 * files, as the real ones change the domains.
 */
import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { requireOwnNetns } from './netns.ts';

const VIRSH = '/usr/bin/virsh';

export interface LibvirtStandIn {
  /** Where the domains are: for shell text of stock scripts. */
  readonly folder: string;
  /** False: it does not answer. */
  answers(answers: boolean): void;
  /** What `domstate --reason` says of every domain: `running (booted)`. */
  reason(words: string): void;
  set(vm: number, macs: readonly string[]): void;
  remove(vm: number): void;
  /** Hardware addresses of the interfaces of each active domain. */
  domains(): ReadonlyMap<number, readonly string[]>;
  reset(): void;
  stop(): void;
}

export function startLibvirtStandIn(folder: string): LibvirtStandIn {
  requireOwnNetns();
  const { script, ...libvirt } = writeLibvirtStandIn(folder);
  execFileSync('/usr/bin/mount', ['--bind', script, VIRSH]);
  return { ...libvirt, stop: () => void execFileSync('/usr/bin/umount', [VIRSH]) };
}

/** The same, to be mounted elsewhere: `script` goes over /usr/bin/virsh. */
export function writeLibvirtStandIn(folder: string): Omit<LibvirtStandIn, 'stop'> & { readonly script: string } {
  const domains = join(folder, 'domains');
  const silent = join(folder, 'silent');
  const reason = join(folder, 'reason');
  const script = join(folder, 'virsh');
  mkdirSync(domains, { recursive: true, mode: 0o777 });
  writeFileSync(
    script,
    `#!/bin/sh
[ -e '${silent}' ] && { echo 'error: failed to connect to the hypervisor' >&2; exit 1; }
cd '${domains}' || exit 1
# [--readonly] --connect URI COMMAND ...
[ "$1" != --readonly ] || shift
shift 2
one() {
  case $1 in
    list) ls; echo ;;
    echo) echo "$2" ;;
    # A checkpoint is a file with the domain XML.
    save-image-dumpxml) cat "$2" ;;
    domiflist)
      [ -e "$2" ] || { echo "error: failed to get domain '$2'" >&2; return 1; }
      echo ' Interface   Type     Source   Model    MAC'
      echo '-------------------------------------------------------------'
      while read -r mac; do echo " vnet0       bridge   virbr1   virtio   $mac"; done < "$2"
      echo
      ;;
    domstate) [ -e "$3" ] && cat '${reason}' ;;
    *) return 1 ;;
  esac
}
case $1 in
  # Several commands in one argument: an error does not end them, and the last one's status counts.
  *';'*) IFS=';'; for command in $1; do IFS=' '; one $command; done ;;
  *) one "$@" ;;
esac
`,
    { mode: 0o755 },
  );
  const file = (vm: number) => join(domains, `one-${vm}`);
  const answers = (yes: boolean) => (yes ? rmSync(silent, { force: true }) : writeFileSync(silent, ''));
  return {
    script,
    folder: domains,
    answers,
    reason: (words) => writeFileSync(reason, `${words}\n`),
    set: (vm, macs) => writeFileSync(file(vm), macs.map((mac) => `${mac}\n`).join('')),
    remove: (vm) => rmSync(file(vm), { force: true }),
    domains: () =>
      new Map(
        readdirSync(domains).map((name) => [
          Number(name.slice('one-'.length)),
          readFileSync(join(domains, name), 'latin1').split('\n').filter(Boolean),
        ]),
      ),
    reset: () => {
      answers(true);
      writeFileSync(reason, 'running (booted)\n');
      for (const name of existsSync(domains) ? readdirSync(domains) : []) rmSync(join(domains, name));
    },
  };
}

/**
 * Shell text for the stock scripts of a rig (`$action`, `$record` are set): each does to the domains what OpenNebula's own does.
 * `sed` on the domain XML of deploy finds the interfaces; a checkpoint is a copy of the domain's file.
 */
export function livelyStock(libvirt: Pick<LibvirtStandIn, 'folder'>): string {
  return `cat > "$record/$action.stdin"
n=$#; eval "vm=\\\${$((n - 1))}"
domain='${libvirt.folder}'/one-$vm
case $action in
  deploy)
    [ -e "$domain" ] && { echo "domain is there" >&2; exit 255; }
    sed -n "s/.*<mac address='\\([^']*\\)'.*/\\1/p" "$record/$action.stdin" > "$domain"
    echo 6f0a1c1e-6c0e-4d0c-9a0e-5a3b3f1d2c42 ;;
  shutdown | cancel) rm -f "$domain" ;;
  save) cp "$domain" "$2" && rm "$domain" ;;
  restore) [ -e "$domain" ] || { cp "$1" "$domain" && rm "$1"; } ;;
  attach_nic) [ -e "$domain" ] && echo "$2" >> "$domain" ;;
  detach_nic) [ -e "$domain" ] && sed -i "/$2/d" "$domain" ;;
  snapshot_revert) cp "$record/snapshot" "$domain" ;;
  *) [ -e "$domain" ] ;;
esac
`;
}
