//! passt, which speaks for a guest with the host's own sockets and needs no root. Where its version
//! offers vhost-user it serves the guest's queues itself; else it is given frames over a stream
//! socket.
#![expect(unsafe_code, reason = "a descriptor is passed on at exec")]

use super::NetError;
use super::settings::Publish;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, socketpair, sockopt,
};
use std::ffi::OsStr;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Longest message of passt's that is passed on.
const LONGEST_MESSAGE: usize = 400;

/// How passt is given the guest's frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Speech {
    /// It serves the guest's queues.
    VhostUser,
    /// Each frame behind its length, 4 bytes in network order.
    Stream,
}

/// An installed passt.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Passt {
    path: PathBuf,
    vhost_user: bool,
}

impl Passt {
    /// Looks in the PATH.
    pub(crate) fn find() -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
        let path = std::env::split_paths(&path)
            .filter(|folder| folder.is_absolute())
            .map(|folder| folder.join("passt"))
            .find(|path| path.is_file())?;
        let vhost_user = output(&path, "--help").is_ok_and(|output| {
            let said = [output.stdout, output.stderr].concat();
            said.windows(12).any(|part| part == b"--vhost-user")
        });
        Some(Self { path, vhost_user })
    }

    /// A program that stands for one.
    #[cfg(test)]
    pub(crate) fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            vhost_user: true,
        }
    }

    /// It can serve a guest's queues itself.
    pub(crate) fn has_vhost_user(&self) -> bool {
        self.vhost_user
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The first line of what it says about its version.
    pub(crate) fn version(&self) -> String {
        let text = output(&self.path, "--version").map(|output| output.stdout);
        let text = String::from_utf8_lossy(&text.unwrap_or_default()).into_owned();
        text.lines().next().unwrap_or("passt").to_owned()
    }

    /// Starts it, and returns our end of its socket once it is ready. It ends when that is closed.
    pub(super) fn start(
        &self,
        speech: Speech,
        publish: &[Publish],
        mtu: Option<u16>,
    ) -> Result<OwnedFd, NetError> {
        check_free(publish)?;
        let failed = |e| NetError::Make("start passt", e);
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::Stream,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(|e| failed(e.into()))?;
        let mut command = Command::new(&self.path);
        command.args(arguments(speech, publish, mtu));
        command.arg("--fd").arg(theirs.as_raw_fd().to_string());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // SAFETY: between fork and exec the child makes one call, which allocates nothing.
        unsafe {
            command.pre_exec(move || {
                fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(failed)?;
        // With its copy of the other end: passt alone holds that from here on.
        drop(command);
        // It goes into the background when it is ready, and then closes what it was started with.
        let mut said = String::new();
        if let Some(stderr) = &mut child.stderr {
            let _ = stderr.take(64 << 10).read_to_string(&mut said);
        }
        let status = child.wait().map_err(failed)?;
        if status.success() {
            return Ok(ours);
        }
        Err(NetError::Holder(format!("passt refused: {}", last_words(&said))))
    }
}

/// Of a port at every address passt is content with either of IPv4 and IPv6: whoever had the other would be taken
/// for the guest.
fn check_free(publish: &[Publish]) -> Result<(), NetError> {
    for one in publish.iter().filter(|one| one.address.is_none()) {
        for any in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
            if try_to_bind(SocketAddr::new(any, one.host), one.udp) == Err(Errno::EADDRINUSE) {
                let (port, family) = (one.host, if any.is_ipv4() { "IPv4" } else { "IPv6" });
                let why = format!("the host's port {port} is in use ({family})");
                return Err(NetError::Holder(why));
            }
        }
    }
    Ok(())
}

/// As passt would, but for one family at a time.
fn try_to_bind(address: SocketAddr, udp: bool) -> nix::Result<()> {
    let (family, kind) = (
        if address.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        },
        if udp { SockType::Datagram } else { SockType::Stream },
    );
    let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))
}

fn output(path: &Path, flag: impl AsRef<OsStr>) -> io::Result<Output> {
    Command::new(path).arg(flag).stdin(Stdio::null()).output()
}

fn arguments(speech: Speech, publish: &[Publish], mtu: Option<u16>) -> Vec<String> {
    let mut arguments = Vec::new();
    if speech == Speech::VhostUser {
        arguments.push("--vhost-user".to_owned());
    }
    if let Some(mtu) = mtu {
        arguments.extend(["--mtu".to_owned(), mtu.to_string()]);
    }
    for one in publish {
        let address = one.address.map_or(String::new(), |a| format!("{a}/"));
        arguments.push(if one.udp { "--udp-ports" } else { "--tcp-ports" }.to_owned());
        arguments.push(format!("{address}{}:{}", one.host, one.guest));
    }
    arguments
}

/// Its last line but those about a system logger that is not there.
fn last_words(said: &str) -> String {
    let mut lines = said.lines().filter(|line| !line.ends_with("to syslog"));
    let last = lines.rfind(|line| !line.trim().is_empty());
    last.unwrap_or("it did not say why")
        .chars()
        .take(LONGEST_MESSAGE)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    #[test]
    fn ports_are_spelled_as_passt_reads_them() {
        let publish = |address: Option<&str>, udp| Publish {
            address: address.map(|text| text.parse().unwrap()),
            host: 8080,
            guest: 80,
            udp,
        };
        let all = [publish(None, false), publish(Some("127.0.0.1"), true)];
        let wanted = [
            "--mtu",
            "1400",
            "--tcp-ports",
            "8080:80",
            "--udp-ports",
            "127.0.0.1/8080:80",
        ];
        assert_eq!(arguments(Speech::Stream, &all, Some(1400)), wanted);
        assert_eq!(arguments(Speech::VhostUser, &[], None), ["--vhost-user"]);
    }

    #[test]
    fn a_port_that_is_taken_in_one_family_is_no_guests() {
        let free = |port, udp, address: Option<IpAddr>| {
            let publish = Publish {
                address,
                host: port,
                guest: 80,
                udp,
            };
            check_free(&[publish]).map_err(|e| e.to_string())
        };
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let why = free(port, false, None).unwrap_err();
        assert!(why.contains(&format!("{port} is in use (IPv4)")), "{why}");
        // What passt itself refuses.
        assert_eq!(free(port, false, Some(Ipv4Addr::LOCALHOST.into())), Ok(()));
        drop(listener);
        assert_eq!(free(port, false, None), Ok(()));
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = socket.local_addr().unwrap().port();
        assert!(free(port, true, None).is_err());
    }

    #[test]
    fn what_passt_said_last_is_told() {
        let said = "Failed to send 51 bytes to syslog\nno such port\nFailed to send 7 bytes to syslog\n";
        assert_eq!(last_words(said), "no such port");
    }
}
