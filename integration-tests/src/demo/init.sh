# /init of the demo's guest, after its modules are loaded: from the initramfs to Debian.
step() { read up rest < /proc/uptime; echo "demo: $1 $up"; }
fail() { echo "demo: failed $1"; poweroff -f; }
step init
mkdir -p /root
mount -t ext4 -o rw /dev/vda /root || fail "to mount the root file system"
step disk
mount -t tmpfs run /root/run
cp /guest.sh /root/run/guest.sh
for folder in dev sys proc; do mount --move /$folder /root/$folder; done
exec switch_root /root /bin/sh /run/guest.sh
