//! passt, which speaks for a guest with the host's own sockets and needs no root. Where its version
//! offers vhost-user it serves the guest's queues itself; else it is given frames over a stream
//! socket.
#![expect(unsafe_code, reason = "a descriptor is passed on at exec")]

use super::NetError;
use super::settings::Publish;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::ffi::OsStr;
use std::io::{self, Read};
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
    fn what_passt_said_last_is_told() {
        let said = "Failed to send 51 bytes to syslog\nno such port\nFailed to send 7 bytes to syslog\n";
        assert_eq!(last_words(said), "no such port");
    }
}
