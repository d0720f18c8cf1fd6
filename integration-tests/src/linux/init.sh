# /init of the test guests, after their modules are loaded. Every report starts with "guest:".
say() { echo "guest: $*"; }
option() { busybox sed -n "s/.*$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
received() { busybox sed -n 's/.* \([0-9]*\) packets received.*/\1/p'; }
sum() { busybox sha256sum "$@" | busybox cut -d' ' -f1; }
exchange() { [ "$(busybox taskset "$1" busybox nc -w 30 "$2" 7000 < /data | sum)" = "$(sum /data)" ]; }
carrier() {
    for step in $(busybox seq 200); do
        [ "$(busybox cat /sys/class/net/eth0/carrier)" = "$1" ] && say "carrier $1" && return
        busybox usleep 100000
    done
    return 1
}
# Traffic of every kind; the other side echoes by TCP on port 7000 and keeps a file by TFTP.
traffic() {
    busybox ip address add 10.0.2.15/24 dev eth0
    echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad
    busybox ip address add fd00::15/64 dev eth0
    busybox ip link set eth0 up
    say "mtu $(busybox cat /sys/class/net/eth0/mtu)"
    # The longest that a frame of 9000 bytes can carry.
    say "icmp $(busybox ping -c 5 -i 0.1 -W 5 -s 8972 10.0.2.2 | received)"
    say "icmp6 $(busybox ping -6 -c 5 -i 0.1 -W 5 -s 8952 fd00::2 | received)"
    busybox dd if=/dev/urandom of=/data bs=1M count="$(option guest.traffic)" 2>/dev/null
    # Each CPU sends on a queue of its own, and the host answers on the pair that a flow came from.
    for mask in 1 2 4 8; do
        (exchange $mask 10.0.2.2 && say "tcp $mask") &
    done
    wait
    exchange f fd00::2 && say "tcp6 f"
    busybox head -c 1000000 /data > /sent
    busybox tftp -p -b 8192 -l /sent -r file 10.0.2.2 && busybox tftp -g -b 8192 -l /back -r file 10.0.2.2
    [ "$(sum /back)" = "$(sum /sent)" ] && say "udp 1000000"
    busybox awk '/virtio[0-9]+-(in|out)put/ { n = 0; for (i = 2; i < NF - 2; i++) n += $i
        sub(/.*-/, "", $NF); print "guest: " $NF " " n }' /proc/interrupts
    say "ready for the link to go"
    carrier 0 && carrier 1 && say "back $(busybox ping -c 5 -i 0.1 -W 5 10.0.2.2 | received)"
}
# Keeps a TCP port open for one client, who gets a line once it is through; what it said is in /said.
serve() {
    printf '#!/bin/busybox sh\nbusybox cat > /said\necho the guest\n' > /answer
    busybox chmod +x /answer
    busybox nc -l -p "$1" -e /answer &
    until busybox netstat -ltn | busybox grep -q ":$1 "; do busybox usleep 10000; done
    say serves
    wait
}
# One of some guests on private segments: the first serves, the others come to it.
segment() {
    busybox ip address add "10.9.0.$1/24" dev eth0
    busybox ip link set eth0 up
    if [ "$1" = 1 ]; then
        serve 7000
        say "received $(sum /said)"
    else
        say "icmp $(busybox ping -c 3 -i 0.2 -W 2 10.9.0.1 | received)"
        busybox dd if=/dev/urandom of=/data bs=64k count=16 2>/dev/null
        busybox nc -w 5 10.9.0.1 7000 < /data > /dev/null && say "sent $(sum /data)"
    fi
}
# Whatever DHCP says; a page from a server that is known by name; and a port for the host.
outbound() {
    busybox ip link set eth0 up
    busybox mkdir -p /etc
    busybox cat > /lease <<'END'
#!/bin/busybox sh
[ "$1" = bound ] || exit 0
busybox ip address add "$ip/$mask" dev "$interface"
busybox ip route add default via "$router" dev "$interface"
for server in $dns; do echo "nameserver $server"; done > /etc/resolv.conf
END
    busybox chmod +x /lease
    busybox udhcpc -i eth0 -n -q -s /lease 2>/dev/null
    name="$(busybox nslookup -type=a page.test | busybox sed -n '/^Name/,$ s/^Address: *//p')"
    say "name $name"
    # The console has no end: passt of 2023 never closes a connection that its guest half-closes first.
    say "page $(busybox nc -w 30 "$name" 8080 < /dev/console)"
    serve 80
    say "published $(busybox cat /said)"
}
busybox mount -o remount,rw / 2>/dev/null
say "kernel $(busybox uname -r) cpus $(busybox nproc) memory $(busybox awk '/MemTotal/ {print $2}' /proc/meminfo)"
# Works with files, and with two TCP sessions where there is a NIC, until a line comes on the console;
# then everything is compared.
storm() {
    busybox mkdir -p /mnt
    busybox mount -t ext4 /dev/vda /mnt || say "cannot mount"
    if [ -e /sys/class/net/eth0 ]; then
        busybox ifconfig eth0 10.0.2.15 up
        busybox mkfifo /tmp/copy
        busybox sha256sum < /tmp/copy > /tmp/sent &
        n=0
        until [ -e /tmp/stop ]; do busybox seq $n $((n += 500)); busybox usleep 5000; done |
            busybox tee /tmp/copy | busybox nc 10.0.2.2 8081 | busybox sha256sum > /tmp/received &
        { echo first; until [ -e /tmp/stop ]; do busybox usleep 50000; done; echo last; } |
            busybox nc 10.0.2.2 8081 > /tmp/idle &
        until [ -s /tmp/idle ]; do busybox usleep 10000; done
        flaps="$(busybox cat /sys/class/net/eth0/carrier_changes)"
    fi
    { read -r key; : > /tmp/stop; } < /dev/console &
    say storm
    n=0
    until [ -e /tmp/stop ]; do
        n=$((n + 1)); name="/mnt/$((n % 16))"
        busybox dd if=/dev/urandom of=$name.new bs=4k count=$((n % 32 + 1)) conv=fsync 2>/dev/null || say "cannot write"
        busybox sha256sum < $name.new > $name.sum
        busybox mv $name.new $name || say "cannot rename"
    done
    busybox sync
    echo 3 > /proc/sys/vm/drop_caches
    for sum in /mnt/*.sum; do
        [ "$(busybox sha256sum < ${sum%.sum})" = "$(busybox cat $sum)" ] || say "wrong $sum"
    done
    busybox umount /mnt || say "cannot unmount"
    say "files $n"
    if [ -n "$flaps" ]; then
        wait
        [ "$(busybox cat /tmp/sent)" = "$(busybox cat /tmp/received)" ] && say "stream whole"
        say "idle $(busybox tr '\n' ' ' < /tmp/idle)"
        say "flaps $(($(busybox cat /sys/class/net/eth0/carrier_changes) - flaps))"
    fi
}
# What a disk that comes is filled with, and its length.
filling() { busybox seq 1 500000; }
FILLED=3388895
# Does what lines on the console ask, with devices that come and go, until one says end.
plugs() {
    say plugs
    while read -r word name; do
        case "$word" in
        fill)
            until [ -b "/dev/$name" ]; do busybox usleep 10000; done
            filling | busybox dd of="/dev/$name" bs=16k conv=notrunc,fsync 2>/dev/null && say "filled $name"
            ;;
        filled)
            until [ -b "/dev/$name" ]; do busybox usleep 10000; done
            echo 3 > /proc/sys/vm/drop_caches
            [ "$(busybox head -c $FILLED "/dev/$name" | sum)" = "$(filling | sum)" ] && say "is filled $name"
            ;;
        ping)
            until [ -e "/sys/class/net/$name" ]; do busybox usleep 10000; done
            busybox ifconfig "$name" 10.0.2.15 up
            say "icmp $(busybox ping -c 3 -i 0.1 -W 5 10.0.2.2 | received)"
            ;;
        gone)
            while [ -e "/dev/$name" ] || [ -e "/sys/class/net/$name" ]; do busybox usleep 10000; done
            say "gone $name"
            ;;
        reboot) busybox reboot -f ;;
        end) return ;;
        esac
    done < /dev/console
}
if [ -n "$(option guest.plugs)" ]; then
    plugs
    say end
    busybox poweroff -f
fi
if [ -n "$(option guest.storm)" ]; then
    storm
    say end
    busybox poweroff -f
fi
if [ -n "$(option guest.writes)" ]; then
    # Writes past the page cache, one after the other, until a line comes on the console.
    { read -r key; : > /tmp/stop; } < /dev/console &
    say writes
    until [ -e /tmp/stop ]; do
        busybox dd if=/dev/zero of=/dev/vda bs=4k count=2000 oflag=direct conv=notrunc 2>/dev/null || say "cannot write"
    done
    say end
    busybox poweroff -f
fi
if [ -b /dev/vda ]; then
    # The first 8 MiB carry a pattern; the second 8 MiB become a copy of it.
    say "disk $(busybox dd if=/dev/vda bs=1M count=8 2>/dev/null | busybox sha256sum | busybox cut -d' ' -f1)"
    busybox dd if=/dev/vda of=/dev/vda bs=1M count=8 seek=8 conv=notrunc,fsync 2>/dev/null || say "cannot write"
    say "queues $(busybox ls /sys/block/vda/mq | busybox wc -l)"
fi
if [ -n "$(option guest.traffic)" ]; then
    traffic
elif [ -n "$(option guest.segment)" ]; then
    segment "$(option guest.segment)"
elif [ -n "$(option guest.outbound)" ]; then
    outbound
elif [ -e /sys/class/net/eth0 ]; then
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
