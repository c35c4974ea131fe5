#!/bin/sh
# State hook of OpenNebula, optional: a VM went to POWEROFF or DONE, perhaps without any driver action (its guest powered
# itself off, QEMU crashed). Tells the engine of this host, which asks libvirt and releases the mappings of this VM if its
# domain is not active any more. Without the hook the timer does the same within a minute. POSIX sh, no Node.
#
#   vm-gone.sh ID           the id of the VM
#   vm-gone.sh BASE64       the VM XML in base64: OpenNebula's $TEMPLATE
#   vm-gone.sh < BASE64     the same on standard input: ARGUMENTS_STDIN="YES"; the XML of a large VM is too long for an argument
#
# Prints nothing and exits 0 when all is well, also on a host without kvm-ib; else one line on standard error and status 1.
# A hook of your own can call it with what it got itself.

engine=/usr/lib/kvm-ib/kvm-ib-engine
# Seconds that the engine has: it may wait for an action that is at work on this host.
limit=90

PATH=/usr/sbin:/usr/bin:/sbin:/bin
LC_ALL=C
export PATH LC_ALL

fail() {
  printf 'kvm-ib: %s\n' "$(printf '%s' "$1" | tr -c '\040-\176' ' ' | cut -c 1-500)" >&2
  exit 1
}

# OpenNebula runs the hook on every host that had the VM.
[ -d "${engine%/*}" ] || exit 0

# The beginning is enough: <VM><ID>42</ID>. What users may write into a VM comes later.
if [ $# -gt 0 ]; then
  given=$(printf '%.2048s' "$1" | tr -d ' \t\r\n')
else
  [ -t 0 ] && fail 'Cannot tell which VM is gone: give its id, or its XML in base64 as argument or on standard input'
  given=$(exec 2> /dev/null; timeout 10 dd bs=1 count=2048 | tr -d ' \t\r\n' | tr '\000' '!')
fi
case $given in
  '') fail 'Cannot tell which VM is gone: neither an id nor its XML came' ;;
  *[!0-9]*)
    case $given in *[!A-Za-z0-9+/=]*) fail 'Cannot tell which VM is gone: what came is neither an id nor base64' ;; esac
    xml=$(printf '%.1024s' "$given" | base64 -d 2> /dev/null | tr '\000\t\r\n' '!   ')
    vm=$(printf '%s\n' "$xml" | sed -n 's/^ *\(<?xml [^<>]*?>\)\{0,1\} *<VM> *<ID>\([0-9]\{1,\}\)<\/ID>.*/\2/p')
    ;;
  *) vm=$given ;;
esac
case $vm in '' | 0?* | *[!0-9]*) fail 'Cannot tell which VM is gone: what came does not begin with <VM><ID>number</ID>' ;; esac
[ ${#vm} -le 10 ] || fail 'Cannot tell which VM is gone: its id is too long'

if [ "$(id -u)" = 0 ]; then set -- "$engine"; else set -- sudo -n "$engine"; fi
# In the background, all of its output in the pipe: sudo cannot be killed without root, so after the limit it is left
# alone, and nothing of it keeps an ssh session open.
answer=$(
  # Shells report there what they kill.
  exec 2> /dev/null
  { { printf '{"version":2,"verb":"settle","vm":%s}\n' "$vm" | "$@"; } 2>&1 < /dev/null & } | timeout "$limit" cat
)
# One line of it is the engine's; sudo may have said something before.
line=$(printf '%s\n' "$answer" | sed -n '/^{"version":[0-9]\{1,\},"ok":/p' | sed -n '$p')
case $line in
  '')
    said=$(printf '%s\n' "$answer" | sed -n '/[^ ]/p' | sed -n '$p')
    fail "Cannot release what VM $vm had: ${said:-the engine gave no answer within $limit s}"
    ;;
esac
[ -n "$(printf '%s\n' "$line" | sed -n '/^{"version":[0-9]\{1,\},"ok":true[,}]/p')" ] && exit 0

# One text of the engine's error.
text() {
  printf '%s\n' "$line" | sed -n 's/.*"'"$1"'":"\([^"\\]*\(\\.[^"\\]*\)*\)".*/\1/p' | sed 's/\\n/ /g; s/\\\(["\\/]\)/\1/g'
}
message=$(text message) why=$(text why) fix=$(text fix)
fail "${message:-Cannot release what VM $vm had}${why:+: $why}${fix:+. Remedy: $fix}"
