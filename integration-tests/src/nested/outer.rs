//! The outer machine: QEMU's command line, its kernel, and the script that makes the host's
//! file tree its root.

use super::agent::AGENT_FLAG;
use super::{Options, wire::PORT_NAME};
use crate::interrupt::{self, Guard};
use crate::process::inherit_at;
use anyhow::{Context, bail};
use images::apt::Apt;
use images::cache::Cache;
use images::initramfs::Initramfs;
use images::kernel::{Kernel, KernelChoice};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// QEMU's descriptor for the port.
const PORT_FD: i32 = 3;
/// Bytes of the console's log that an error repeats.
const LOG_TAIL: u64 = 4000;

/// What the outer kernel needs: the file tree, the port, KVM, and what tests use.
const MODULES: &[&str] = &[
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_console",
    "kvm_amd",
    "tun",
    "vhost_net",
    "veth",
    "bridge",
    "virtio_blk",
    "virtio_net",
    "loop",
    "ext4",
    "fuse",
];

/// After the modules: the host's tree (read-only) below an overlay in memory, the kernel's file
/// systems, then the agent as process 1. switch_root rather than chroot: a process in a chroot
/// may not make user namespaces.
const SCRIPT: &str = r#"
fail() { echo "nested: $1"; poweroff -f; }
OPTIONS=trans=virtio,version=9p2000.L,msize=1048576,access=any
mkdir -p /host /upper /root
mount -t 9p -o ro,cache=loose,$OPTIONS host /host || fail "cannot mount the host's files"
mount -t tmpfs -o size=60% upper /upper || fail "no tmpfs"
mkdir /upper/data /upper/work
mount -t overlay -o lowerdir=/host,upperdir=/upper/data,workdir=/upper/work root /root || fail "no overlay"
mkdir -p /root/proc /root/sys /root/dev /root/run /root/tmp
# All guest RAM in huge pages, QEMU's too: far fewer nested faults, each of which costs much here.
echo always > /sys/kernel/mm/transparent_hugepage/shmem_enabled
mount --move /dev /root/dev
mount --move /sys /root/sys
mkdir -p /root/dev/pts /root/dev/shm
# As udev does: a script that is executed by its descriptor is opened there.
ln -s /proc/self/fd /root/dev/fd
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /root/dev/pts
mount -t tmpfs -o mode=1777 shm /root/dev/shm
mount -t tmpfs -o mode=755,size=60% run /root/run
mkdir -p /root/run/tmp /root/run/user/0 /root/run/lock
chmod 1777 /root/run/tmp /root/run/lock
chmod 700 /root/run/user/0
mount -t cgroup2 cgroup2 /root/sys/fs/cgroup
chmod 666 /root/dev/kvm /root/dev/net/tun
ifconfig lo 127.0.0.1 up
SHARED="$(sed -n 's/.*nested\.shared=\([^ ]*\).*/\1/p' /proc/cmdline)"
AGENT="$(sed -n 's/.*nested\.agent=\([^ ]*\).*/\1/p' /proc/cmdline)"
if [ -n "$SHARED" ]; then
    mkdir -p "/root$SHARED"
    mount -t 9p -o cache=none,$OPTIONS shared "/root$SHARED" || fail "cannot mount the shared folder"
fi
mount --move /proc /root/proc
exec switch_root /root "$AGENT" "#;

/// Starts QEMU and returns it with the port. The port has no name and `log` need not have one: nothing of them
/// outlives whoever is killed.
pub(super) fn start(options: &Options, log: &File) -> anyhow::Result<(Child, Guard, UnixStream)> {
    let cache = Cache::open_default()?;
    let apt = Apt::open(&cache)?;
    let kernel = Kernel::get(&cache, &apt, KernelChoice::Default)?;
    let script = format!("{SCRIPT}{AGENT_FLAG}\n");
    let initramfs = Initramfs {
        kernel: &kernel,
        modules: MODULES,
        later: &[],
        script: &script,
        files: &[],
    }
    .build(&cache, &apt)?;
    let (port, theirs) = UnixStream::pair().context("the port's socket")?;
    let mut command = Command::new("qemu-system-x86_64");
    inherit_at(&mut command, theirs.into(), PORT_FD)?;
    machine(&mut command, options);
    devices(&mut command, options)?;
    command
        .arg("-kernel")
        .arg(&kernel.bzimage)
        .arg("-initrd")
        .arg(&initramfs);
    command.arg("-append").arg(kernel_command_line(options)?);
    let console = if options.console {
        Stdio::inherit()
    } else {
        Stdio::from(log.try_clone()?)
    };
    command
        .stdin(Stdio::null())
        .stdout(console)
        .stderr(log.try_clone()?);
    let (emulator, guard) = interrupt::start(&mut command).context(
        "cannot start qemu-system-x86_64: install the Debian package qemu-system-x86 (from backports if \
         qemu-utils comes from there)",
    )?;
    Ok((emulator, guard, port))
}

/// The end of what the emulator and the outer kernel said.
pub(super) fn console_tail(log: &File) -> String {
    let length = log.metadata().map_or(0, |about| about.len());
    let start = length.saturating_sub(LOG_TAIL);
    let mut tail = vec![0; (length - start) as usize];
    // Not `read`: the emulator writes on from the offset that a read would move.
    match log.read_exact_at(&mut tail, start) {
        Ok(()) => String::from_utf8_lossy(&tail).into_owned(),
        Err(error) => error.to_string(),
    }
}

fn machine(command: &mut Command, options: &Options) {
    command.args([
        "-M",
        "q35,hpet=off",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "EPYC,+svm,+npt",
    ]);
    command.args([
        "-smp",
        &options.cpus.to_string(),
        "-m",
        &options.memory_mib.to_string(),
    ]);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
        // Says on standard error in which state a processor was that ended the machine.
        "-d",
        "cpu_reset",
    ]);
}

fn devices(command: &mut Command, options: &Options) -> anyhow::Result<()> {
    command.args([
        "-device",
        "virtio-serial-pci",
        "-chardev",
        &format!("socket,id=port,fd={PORT_FD}"),
    ]);
    command.args([
        "-device",
        &format!("virtserialport,chardev=port,name={PORT_NAME}"),
    ]);
    command.args(["-device", "virtio-rng-pci"]);
    let share = |tag: &str, path: &str, more: &str| {
        format!("local,path={path},mount_tag={tag},security_model=none,multidevs=remap{more}")
    };
    command.args(["-virtfs", &share("host", "/", ",readonly=on")]);
    if let Some(shared) = &options.shared {
        command.args(["-virtfs", &share("shared", plain(shared)?, "")]);
    }
    Ok(())
}

fn kernel_command_line(options: &Options) -> anyhow::Result<String> {
    let agent = match &options.agent {
        Some(agent) => agent.clone(),
        None => std::env::current_exe().context("the path of this program")?,
    };
    let mut line = format!(
        "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check nested.agent={}",
        plain(&agent)?
    );
    if let Some(shared) = &options.shared {
        line += &format!(" nested.shared={}", plain(shared)?);
    }
    Ok(line)
}

/// A path that needs no quoting in QEMU's options and the kernel's command line.
fn plain(path: &Path) -> anyhow::Result<&str> {
    let text = path.to_str().context("a path that is not UTF-8")?;
    if !path.is_absolute() || text.contains([',', ' ', '"', '\n']) {
        bail!("the path '{text}' must be absolute, without commas, quotes and blanks");
    }
    Ok(text)
}
