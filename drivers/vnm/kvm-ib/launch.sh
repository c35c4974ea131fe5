# Read by every action of this directory and by our hooks of other network drivers (not a script of its own). POSIX sh.
#
# OpenNebula calls /var/tmp/one/vnm/kvm-ib/ACTION, or as a hook /var/tmp/one/vnm/DRIVER/ACTION.d/kvm-ib, with the VM in
# base64: since 5.10 on standard input, before as first argument, and then standard input is the ssh command stream: it
# is not ours to read. The parser tells the two apart.

here=${0%/*}
action=${0##*/}
case $here in
  *.d) action=${here##*/} action=${action%.d} hook=yes ;;
  *) hook= ;;
esac

case $action in
  pre | post | clean | update_nic) ;;
  # Security groups and the making of virtual networks are nothing that kvm-ib has to do with.
  *) exit 0 ;;
esac

# A hook is copied to every host of OpenNebula, and most may have nothing to do with kvm-ib.
if [ "$hook" ] && [ ! -e "${KVM_IB_CONFIG:-/etc/kvm-ib/kvm-ib.yaml}" ]; then exit 0; fi

# What cannot be done must not keep a VM from ending.
give_up() {
  if [ "$action" = clean ]; then
    echo "ERROR: kvm-ib: $1 The next kvm-ib reconcile brings it right" >&2
    exit 0
  fi
  echo "kvm-ib: $1" >&2
  exit 6
}

# Beside the launchers where `onehost sync` has put it; in a checkout, where `npm run build` has.
parser=$dir/vnm.mjs
[ -f "$parser" ] || parser=$dir/../../../dist/vnm.mjs
[ -f "$parser" ] || give_up "Cannot run $action: vnm.mjs is neither in $dir nor in a built checkout. Remedy: run \`npm run build\` and install the driver again (docs/install.md)."

node=/usr/bin/node
[ -x "$node" ] || node=$(command -v node) || give_up "Cannot run $action: this host has no node. Remedy: install Node.js 20.11 or later."

# Both would slow every start or change what node does; nothing here needs them.
unset NODE_OPTIONS NODE_EXTRA_CA_CERTS
exec "$node" "$parser" "$action" "$@"
