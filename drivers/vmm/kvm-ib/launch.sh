# Read by every action of this directory (not a script of its own). POSIX sh.
#
# OpenNebula calls /var/tmp/one/vmm/kvm-ib/ACTION. What does not concern kvm-ib goes straight to the stock script of the
# same name in ../kvm: argv, stdin, stdout, stderr and exit status are then its own. The rest goes to the parser, which
# runs the stock script itself.
#
# Nothing here may read standard input: below OpenNebula 5.0 it is the ssh command stream for every action but deploy. The
# parser finds out whether it is.

dir=${0%/*}
action=${0##*/}
stock=$dir/../kvm/$action

case $action in
  deploy | shutdown | cancel | save | restore | reboot | reset | migrate | migrate_local) ;;
  attach_nic | detach_nic | prereconfigure | reconfigure | snapshot_revert) ;;
  *) exec "$stock" "$@" ;;
esac

# Beside the launchers where `onehost sync` has put it; in a checkout, where `npm run build` has.
parser=$dir/parser.mjs
[ -f "$parser" ] || parser=$dir/../../../dist/parser.mjs
if [ ! -f "$parser" ]; then
  echo "kvm-ib: Cannot run $action: parser.mjs is neither in $dir nor in a built checkout. Remedy: run \`npm run build\` and install the driver again (docs/install.md)." >&2
  exit 6
fi

node=/usr/bin/node
[ -x "$node" ] || node=$(command -v node) || {
  echo "kvm-ib: Cannot run $action: this host has no node. Remedy: install Node.js 20.11 or later." >&2
  exit 6
}

# Both would slow every start or change what node does; nothing here needs them.
unset NODE_OPTIONS NODE_EXTRA_CA_CERTS
exec "$node" "$parser" "$action" "$stock" "$@"
