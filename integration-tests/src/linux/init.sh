# /init of the test guests, after their modules are loaded. Every report starts with "guest:".
say() { echo "guest: $*"; }
# A word guest.X=Y of the kernel's command line is $guest_X here.
read -r line < /proc/cmdline
for word in $line; do
    case "$word" in guest.*=*) word="${word#guest.}"; readonly "guest_${word%%=*}=${word#*=}" ;; esac
done
received() { sed -n 's/.* \([0-9]*\) packets received.*/\1/p'; }
sum() { sha256sum "$@" | cut -d' ' -f1; }
exchange() { [ "$(taskset "$1" nc -w 30 "$2" 7000 < /data | sum)" = "$(sum /data)" ]; }
carrier() {
    for step in $(seq 200); do
        [ "$(cat /sys/class/net/eth0/carrier)" = "$1" ] && say "carrier $1" && return
        usleep 100000
    done
    return 1
}
# Traffic of every kind; the other side echoes by TCP on port 7000 and keeps a file by TFTP.
traffic() {
    ip address add 10.0.2.15/24 dev eth0
    echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad
    ip address add fd00::15/64 dev eth0
    ip link set eth0 up
    say "mtu $(cat /sys/class/net/eth0/mtu)"
    # The longest that a frame of 9000 bytes can carry.
    say "icmp $(ping -c 5 -i 0.1 -W 5 -s 8972 10.0.2.2 | received)"
    say "icmp6 $(ping -6 -c 5 -i 0.1 -W 5 -s 8952 fd00::2 | received)"
    dd if=/dev/urandom of=/data bs=1M count="$guest_traffic" 2>/dev/null
    # Each CPU sends on a queue of its own, and the host answers on the pair that a flow came from.
    for mask in 1 2 4 8; do
        (exchange $mask 10.0.2.2 && say "tcp $mask") &
    done
    wait
    exchange f fd00::2 && say "tcp6 f"
    head -c 1000000 /data > /sent
    tftp -p -b 8192 -l /sent -r file 10.0.2.2 && tftp -g -b 8192 -l /back -r file 10.0.2.2
    [ "$(sum /back)" = "$(sum /sent)" ] && say "udp 1000000"
    awk '/virtio[0-9]+-(in|out)put/ { n = 0; for (i = 2; i < NF - 2; i++) n += $i
        sub(/.*-/, "", $NF); print "guest: " $NF " " n }' /proc/interrupts
    say "ready for the link to go"
    carrier 0 && carrier 1 && say "back $(ping -c 5 -i 0.1 -W 5 10.0.2.2 | received)"
}
# Keeps a TCP port open for one client, who gets a line once it is through; what it said is in /said.
serve() {
    printf '#!/bin/busybox sh\ncat > /said\necho the guest\n' > /answer
    chmod +x /answer
    nc -l -p "$1" -e /answer &
    until netstat -ltn | grep -q ":$1 "; do usleep 10000; done
    say serves
    wait
}
# One of some guests on private segments: the first serves, the others come to it.
segment() {
    ip address add "10.9.0.$1/24" dev eth0
    ip link set eth0 up
    if [ "$1" = 1 ]; then
        serve 7000
        say "received $(sum /said)"
    else
        say "icmp $(ping -c 3 -i 0.2 -W 2 10.9.0.1 | received)"
        dd if=/dev/urandom of=/data bs=64k count=16 2>/dev/null
        nc -w 5 10.9.0.1 7000 < /data > /dev/null && say "sent $(sum /data)"
    fi
}
# Whatever DHCP says; a page from a server that is known by name; and a port for the host.
outbound() {
    ip link set eth0 up
    mkdir -p /etc
    cat > /lease <<'END'
#!/bin/busybox sh
[ "$1" = bound ] || exit 0
ip address add "$ip/$mask" dev "$interface"
ip route add default via "$router" dev "$interface"
for server in $dns; do echo "nameserver $server"; done > /etc/resolv.conf
END
    chmod +x /lease
    udhcpc -i eth0 -n -q -s /lease 2>/dev/null
    name="$(nslookup -type=a page.test | sed -n '/^Name/,$ s/^Address: *//p')"
    say "name $name"
    # The console has no end: passt of 2023 never closes a connection that its guest half-closes first.
    say "page $(nc -w 30 "$name" 8080 < /dev/console)"
    serve 80
    say "published $(cat /said)"
}
mount -o remount,rw / 2>/dev/null
say "kernel $(uname -r) cpus $(nproc) memory $(awk '/MemTotal/ {print $2}' /proc/meminfo)"
# Works with files, and with two TCP sessions where there is a NIC, until a line comes on the console;
# then everything is compared.
storm() {
    load later
    mkdir -p /mnt
    mount -t ext4 /dev/vda /mnt || say "cannot mount"
    if [ -e /sys/class/net/eth0 ]; then
        ifconfig eth0 10.0.2.15 up
        mkfifo /tmp/copy
        sha256sum < /tmp/copy > /tmp/sent &
        n=0
        until [ -e /tmp/stop ]; do seq $n $((n += 500)); usleep 5000; done |
            tee /tmp/copy | nc 10.0.2.2 8081 | sha256sum > /tmp/received &
        { echo first; until [ -e /tmp/stop ]; do usleep 50000; done; echo last; } |
            nc 10.0.2.2 8081 > /tmp/idle &
        until [ -s /tmp/idle ]; do usleep 10000; done
        flaps="$(cat /sys/class/net/eth0/carrier_changes)"
    fi
    { read -r key; : > /tmp/stop; } < /dev/console &
    say storm
    n=0
    until [ -e /tmp/stop ]; do
        n=$((n + 1)); name="/mnt/$((n % 16))"
        dd if=/dev/urandom of=$name.new bs=4k count=$((n % 32 + 1)) conv=fsync 2>/dev/null || say "cannot write"
        sha256sum < $name.new > $name.sum
        mv $name.new $name || say "cannot rename"
    done
    sync
    echo 3 > /proc/sys/vm/drop_caches
    for sum in /mnt/*.sum; do
        [ "$(sha256sum < ${sum%.sum})" = "$(cat $sum)" ] || say "wrong $sum"
    done
    umount /mnt || say "cannot unmount"
    say "files $n"
    if [ -n "$flaps" ]; then
        wait
        [ "$(cat /tmp/sent)" = "$(cat /tmp/received)" ] && say "stream whole"
        say "idle $(tr '\n' ' ' < /tmp/idle)"
        say "flaps $(($(cat /sys/class/net/eth0/carrier_changes) - flaps))"
    fi
}
# What a disk that comes is filled with, and its length.
filling() { seq 1 500000; }
FILLED=3388895
# Does what lines on the console ask, with devices that come and go, until one says end.
plugs() {
    say plugs
    while read -r word name; do
        case "$word" in
        fill)
            until [ -b "/dev/$name" ]; do usleep 10000; done
            filling | dd of="/dev/$name" bs=16k conv=notrunc,fsync 2>/dev/null && say "filled $name"
            ;;
        filled)
            until [ -b "/dev/$name" ]; do usleep 10000; done
            echo 3 > /proc/sys/vm/drop_caches
            [ "$(head -c $FILLED "/dev/$name" | sum)" = "$(filling | sum)" ] && say "is filled $name"
            ;;
        ping)
            until [ -e "/sys/class/net/$name" ]; do usleep 10000; done
            ifconfig "$name" 10.0.2.15 up
            say "icmp $(ping -c 3 -i 0.1 -W 5 10.0.2.2 | received)"
            ;;
        gone)
            while [ -e "/dev/$name" ] || [ -e "/sys/class/net/$name" ]; do usleep 10000; done
            say "gone $name"
            ;;
        reboot) reboot -f ;;
        end) return ;;
        esac
    done < /dev/console
}
if [ -n "$guest_plugs" ]; then
    plugs
    say end
    poweroff -f
fi
if [ -n "$guest_storm" ]; then
    storm
    say end
    poweroff -f
fi
if [ -n "$guest_writes" ]; then
    # Writes past the page cache, one after the other, until a line comes on the console.
    { read -r key; : > /tmp/stop; } < /dev/console &
    say writes
    until [ -e /tmp/stop ]; do
        dd if=/dev/zero of=/dev/vda bs=4k count=2000 oflag=direct conv=notrunc 2>/dev/null || say "cannot write"
    done
    say end
    poweroff -f
fi
if [ -b /dev/vda ]; then
    # The first 8 MiB carry a pattern; the second 8 MiB become a copy of it.
    say "disk $(dd if=/dev/vda bs=1M count=8 2>/dev/null | sha256sum | cut -d' ' -f1)"
    dd if=/dev/vda of=/dev/vda bs=1M count=8 seek=8 conv=notrunc,fsync 2>/dev/null || say "cannot write"
    say "queues $(ls /sys/block/vda/mq | wc -l)"
fi
if [ -n "$guest_traffic" ]; then
    traffic
elif [ -n "$guest_segment" ]; then
    segment "$guest_segment"
elif [ -n "$guest_outbound" ]; then
    outbound
elif [ -e /sys/class/net/eth0 ]; then
    ifconfig eth0 10.0.2.15 up
    # Not wget: it looks up the service's name, for which a static glibc wants its plugins.
    say "page $(printf 'GET /page HTTP/1.0\r\n\r\n' | nc -w 30 10.0.2.2 8080 | tail -n 1)"
fi
if [ -n "$guest_reboots" ]; then
    # How often it has rebooted stands in the sector at 16 MiB.
    done="$(dd if=/dev/vda bs=512 skip=32768 count=1 2>/dev/null | tr -d '\0')"
    say "boot ${done:-0}"
    if [ "${done:-0}" -lt "$guest_reboots" ]; then
        echo -n "$((${done:-0} + 1))" | dd of=/dev/vda bs=512 seek=32768 conv=notrunc,sync,fsync 2>/dev/null
        reboot -f
    fi
fi
say end
case "$guest_end" in
panic) echo c > /proc/sysrq-trigger ;;
reboot) reboot -f ;;
shell) setsid cttyhack sh ;;
esac
poweroff -f
