//! A user and network namespace for the whole test process, so that no test needs root and none
//! touches the host's network.

use anyhow::{Context, Result, ensure};
use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::net::if_::InterfaceFlags;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getgid, getuid};
use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Moves this process, which has one thread, into namespaces of its own.
///
/// # Errors
/// Where the host forbids it; the message says which part.
pub fn enter() -> Result<()> {
    let (user, group) = (getuid(), getgid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).context("no user namespaces here")?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
    fs::File::open("/dev/net/tun").context("/dev/net/tun does not open")?;
    ip("link set lo up").context("iproute2 is needed to set up a TAP")
}

/// Runs `ip` with these arguments.
///
/// # Errors
/// With what it printed, when it fails.
pub fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output()?;
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "ip {arguments}: {complaint}");
    Ok(())
}

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A TAP of its own for one test: 10.N.0.1 on the host's side, 10.N.0.2 on the guest's.
pub struct TestTap {
    /// The interface's name.
    pub name: String,
    number: u8,
}

impl TestTap {
    /// Makes it; `options` are more words for `ip tuntap add`.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn new(options: &str) -> Result<Self> {
        let number = u8::try_from(NEXT.fetch_add(1, Ordering::Relaxed) + 1)?;
        let tap = Self {
            name: format!("tap{number}"),
            number,
        };
        let name = &tap.name;
        ip(&format!("tuntap add {name} mode tap vnet_hdr{options}"))?;
        // No neighbour discovery of the host's own between the frames that tests count.
        fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1")?;
        ip(&format!("link set {name} address {} up", text(&tap.host_mac())))?;
        ip(&format!("address add 10.{number}.0.1/24 dev {name}"))?;
        let guest = text(&tap.guest_mac());
        ip(&format!("neigh add 10.{number}.0.2 lladdr {guest} dev {name}"))?;
        Ok(tap)
    }

    /// Waits until the kernel has seen that a process serves the TAP: before that, it drops what
    /// the host sends.
    ///
    /// # Errors
    /// When it has not after ten seconds.
    pub fn wait_up(&self) -> Result<()> {
        let running = |address: InterfaceAddress| {
            address.interface_name == self.name && address.flags.contains(InterfaceFlags::IFF_RUNNING)
        };
        let end = Instant::now() + Duration::from_secs(10);
        while !getifaddrs()?.any(running) {
            ensure!(Instant::now() < end, "{} does not come up", self.name);
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// The host side's MAC address.
    pub fn host_mac(&self) -> [u8; 6] {
        [2, 0, 0, 0, 1, self.number]
    }

    /// The guest's.
    pub fn guest_mac(&self) -> [u8; 6] {
        [2, 0, 0, 0, 2, self.number]
    }

    /// The host side's IPv4 address.
    pub fn host_ip(&self) -> [u8; 4] {
        [10, self.number, 0, 1]
    }

    /// The guest's.
    pub fn guest_ip(&self) -> [u8; 4] {
        [10, self.number, 0, 2]
    }
}

/// A MAC address as `ip` and our flags write it.
pub fn text(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
