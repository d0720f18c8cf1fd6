# What the demo's guest does as process 1 of its Debian root; every line that starts with
# "demo:" is read by the demo, with the kernel's uptime in seconds.
step() { read up rest < /proc/uptime; echo "demo: $1 $up"; }
power_off() { sync; mount -o remount,ro /; busybox poweroff -f; }
fail() { echo "demo: failed $1"; power_off; }
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
token="$(sed 's/.*demo.token=\([^ ]*\).*/\1/' /proc/cmdline)"
echo "Debian $(cat /etc/debian_version), kernel $(uname -r), $(nproc) CPU, root on $(stat -f -c %T /)"
ip link set lo up
ip link set eth0 up || fail "to bring the NIC up"
ip address add 10.0.2.15/24 dev eth0 || fail "to give the NIC its address"
step network
page="$(wget -q -T 30 -t 3 -O - http://10.0.2.2:8080/page)" || fail "to fetch the page"
step page
# A program of the distribution with its libraries and data from the disk.
packages="$(dpkg-query -W | wc -l)"
[ "$packages" -gt 50 ] || fail "to run dpkg-query"
printf '%s\n%s\n%s packages\n' "$token" "$page" "$packages" > /root/demo-file
sync
step written
power_off
