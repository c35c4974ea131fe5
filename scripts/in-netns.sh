#!/bin/sh
# Runs a command in a network and mount namespace of its own: links, firewall, sysfs and `ip netns` names that it
# leaves behind vanish with it. A libvirt that runs on this machine is out of sight: its domains are none of the lab's.
# Never touches the namespace it is called from.
# usage: scripts/in-netns.sh COMMAND [ARG...]
KVM_IB_TEST_OUTER_NETNS=$(readlink /proc/self/ns/net) || exit 6
export KVM_IB_TEST_OUTER_NETNS
exec unshare --net --mount --propagation private sh -c '
  mkdir -p /run/netns /run/kvm-ib &&
  mount -t sysfs sysfs /sys &&
  mount -t tmpfs tmpfs /run/netns &&
  mount -t tmpfs tmpfs /run/kvm-ib &&
  { [ ! -d /run/libvirt ] || mount -t tmpfs tmpfs /run/libvirt; } &&
  ip link set lo up &&
  KVM_IB_TEST_NETNS=1 exec "$@"
' in-netns "$@"
