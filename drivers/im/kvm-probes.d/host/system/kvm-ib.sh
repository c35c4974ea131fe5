#!/bin/sh
# OpenNebula monitoring probe: puts what the last reconcile of kvm-ib found into the template of the host. POSIX sh.
#
# It only prints /run/kvm-ib/status: no sudo, no Node. It always exits 0, because one failing probe puts the whole host
# into ERROR. OpenNebula merges what is printed into the template, where a key stays until it is printed again; so every
# key is printed each time. A host without kvm-ib prints nothing: the same probes run on every KVM host.
#
#   KVM_IB_STATUS   OK, DRIFT, FAILED (reconcile could not look), STALE (older than three minutes), MISSING, CORRUPT
#   KVM_IB_DRIFT    differences left after reconcile; -1: not known
#   KVM_IB_OUTDATED  mappings that go on as an older configuration made them (no drift); -1: not known
#   KVM_IB_CONFIG   hash of the configuration: equal on all hosts of a cluster
#   KVM_IB_RULESET  tag of the loaded rule set
#   KVM_IB_VERSION  version of kvm-ib

exec 2> /dev/null
file=/run/kvm-ib/status
installed=/usr/lib/kvm-ib
[ -e "$file" ] || [ -d "$installed" ] || exit 0

print() {
  printf 'KVM_IB_STATUS="%s"\nKVM_IB_DRIFT="%s"\nKVM_IB_OUTDATED="%s"\nKVM_IB_CONFIG="%s"\nKVM_IB_RULESET="%s"\nKVM_IB_VERSION="%s"\n' "$@"
  exit 0
}
# At most 16 characters of A-Z a-z 0-9 . _ -
plain() {
  case $1 in '' | *[!A-Za-z0-9._-]*) return 1 ;; esac
  [ ${#1} -le 16 ]
}
# Seconds, or a count.
number() {
  case $1 in '' | 0?* | *[!0-9]*) return 1 ;; esac
  [ ${#1} -le 9 ]
}

[ -e "$file" ] || print MISSING -1 -1 '' '' ''
# A pipe in its place would hang us.
[ -f "$file" ] || print CORRUPT -1 -1 '' '' ''
read -r uptime rest < /proc/uptime
now=${uptime%%.*}

dd if="$file" bs=65536 count=8 | {
  state='' drift='' outdated='' config='' ruleset='' version='' when='' complete=
  if read -r key value rest && [ "$key $value" = 'kvm-ib-status 1' ]; then
    while read -r key value rest; do
      case $key in
        uptime) number "$value" && when=$value ;;
        state) case $value in OK | DRIFT | FAILED) state=$value ;; esac ;;
        drift) number "$value" && drift=$value ;;
        outdated) number "$value" && outdated=$value ;;
        config) plain "$value" && config=$value ;;
        ruleset) plain "$value" && ruleset=$value ;;
        version) plain "$value" && version=$value ;;
        end) complete=yes && break ;;
      esac
    done
  fi
  [ -n "$complete" ] && [ -n "$state" ] && [ -n "$when" ] || print CORRUPT -1 -1 '' '' ''
  # Seconds since boot: a change of the clock does not make it old. Later than now: left from before a boot.
  age=$((now - when))
  if [ "$age" -gt 180 ] || [ "$age" -lt -5 ]; then print STALE -1 -1 "$config" "$ruleset" "$version"; fi
  [ "$state" = FAILED ] && drift=-1 outdated=-1
  print "$state" "${drift:--1}" "${outdated:--1}" "$config" "$ruleset" "$version"
}
exit 0
