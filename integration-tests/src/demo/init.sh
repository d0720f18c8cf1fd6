# /init of the demo's guest, after its modules are loaded: from the initramfs to Debian.
step() { read up rest < /proc/uptime; echo "demo: $1 $up"; }
fail() { echo "demo: failed $1"; busybox poweroff -f; }
step init
busybox mkdir -p /root
busybox mount -t ext4 -o rw /dev/vda /root || fail "to mount the root file system"
step disk
busybox mount -t tmpfs run /root/run
busybox cp /guest.sh /root/run/guest.sh
for folder in dev sys proc; do busybox mount --move /$folder /root/$folder; done
exec busybox switch_root /root /bin/sh /run/guest.sh
