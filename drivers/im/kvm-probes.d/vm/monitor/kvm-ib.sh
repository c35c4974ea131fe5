#!/bin/sh
# OpenNebula monitoring probe: what the last reconcile of kvm-ib found, into the monitoring of each mapped VM. POSIX sh.
#
# It only prints /run/kvm-ib/status, which holds the values in base64 already: no sudo, no Node, no child for each VM. It
# always exits 0. OpenNebula merges the values of all probes by the id of the VM.
#
#   KVM_IB_STATE      OK, DRIFT, PENDING (an action is at work), REMOVING, or STALE (the status is older than three minutes)
#   KVM_IB_DRIFT      differences between kernel and files that concern this VM
#   KVM_IB_OUTDATED   its mappings that go on as an older configuration made them (no drift)
#   KVM_IB_RX_PACKETS, KVM_IB_RX_BYTES  what the host forwarded to its IB addresses, from the fabric and from guests of the host
#   KVM_IB_TX_PACKETS, KVM_IB_TX_BYTES  what the host forwarded from it, likewise; each mapping counts from its making
#                     (not there: nft before 1.0.6 cannot count)
#   KVM_IB_ADDRESSES  its IB addresses, as many as fit

exec 2> /dev/null
file=/run/kvm-ib/status
# KVM_IB_STATE="STALE" and a line end.
stale=S1ZNX0lCX1NUQVRFPSJTVEFMRSIK

# A pipe in its place would hang us.
[ -f "$file" ] || exit 0
read -r uptime rest < /proc/uptime
now=${uptime%%.*}

dd if="$file" bs=65536 count=8 | {
  old=yes out='' count=0
  read -r key value rest && [ "$key $value" = 'kvm-ib-status 1' ] || exit 0
  while read -r key value values rest; do
    case $key in
      uptime)
        case $value in '' | 0?* | *[!0-9]*) continue ;; esac
        [ ${#value} -le 9 ] || continue
        # Seconds since boot: a change of the clock does not make it old. Later than now: left from before a boot.
        age=$((now - value))
        [ "$age" -le 180 ] && [ "$age" -ge -5 ] && old=
        ;;
      vm)
        case $value in '' | 0?* | *[!0-9]*) continue ;; esac
        case $values in '' | *[!A-Za-z0-9+/=]*) continue ;; esac
        [ ${#value} -le 9 ] && [ ${#values} -le 600 ] || continue
        # All VMs of a host travel in one datagram.
        count=$((count + 1))
        [ "$count" -le 500 ] || continue
        [ -n "$old" ] && values=$stale
        out="${out}VM = [ ID=\"$value\", MONITOR=\"$values\" ]
"
        ;;
      end)
        printf '%s' "$out"
        break
        ;;
    esac
  done
}
exit 0
