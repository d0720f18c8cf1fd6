# /init of the test guests, after their modules are loaded. Every report starts with "guest:".
say() { echo "guest: $*"; }
option() { busybox sed -n "s/.*$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
busybox mount -o remount,rw / 2>/dev/null
say "kernel $(busybox uname -r) cpus $(busybox nproc) memory $(busybox awk '/MemTotal/ {print $2}' /proc/meminfo)"
if [ -b /dev/vda ]; then
    # The first 8 MiB carry a pattern; the second 8 MiB become a copy of it.
    say "disk $(busybox dd if=/dev/vda bs=1M count=8 2>/dev/null | busybox sha256sum | busybox cut -d' ' -f1)"
    busybox dd if=/dev/vda of=/dev/vda bs=1M count=8 seek=8 conv=notrunc,fsync 2>/dev/null || say "cannot write"
    say "queues $(busybox ls /sys/block/vda/mq | busybox wc -l)"
fi
if [ -e /sys/class/net/eth0 ]; then
    busybox ifconfig eth0 10.0.2.15 up
    # Not wget: it looks up the service's name, for which a static glibc wants its plugins.
    say "page $(printf 'GET /page HTTP/1.0\r\n\r\n' | busybox nc -w 30 10.0.2.2 8080 | busybox tail -n 1)"
fi
reboots="$(option guest.reboots)"
if [ -n "$reboots" ]; then
    # How often it has rebooted stands in the sector at 16 MiB.
    done="$(busybox dd if=/dev/vda bs=512 skip=32768 count=1 2>/dev/null | busybox tr -d '\0')"
    say "boot ${done:-0}"
    if [ "${done:-0}" -lt "$reboots" ]; then
        echo -n "$((${done:-0} + 1))" | busybox dd of=/dev/vda bs=512 seek=32768 conv=notrunc,sync,fsync 2>/dev/null
        busybox reboot -f
    fi
fi
say end
case "$(option guest.end)" in
panic) echo c > /proc/sysrq-trigger ;;
reboot) busybox reboot -f ;;
shell) busybox setsid busybox cttyhack busybox sh ;;
esac
busybox poweroff -f
