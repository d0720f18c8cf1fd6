//! Which call a process was killed for. A kill leaves no time for words, so the kernel is asked: it
//! writes each into its log. Where that log is closed to the user, `--seccomp=trap` tells instead.

use super::{Role, Verdict};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Pid, Whence, lseek};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

/// Longest record of `/dev/kmsg` (`CONSOLE_EXT_LOG_MAX`).
const RECORD_MAX: usize = 8192;
/// Most records that are looked at for one death.
const RECORDS: usize = 4096;
/// The kernel writes a record by a thread of its own: so late at most.
const LATE: Duration = Duration::from_millis(50);

/// The kernel's log from now on, where this user may read it.
pub struct Witness(Option<File>);

impl Witness {
    /// Looks from the log's end on. Before root is left: `/dev/kmsg` may be root's alone.
    pub fn begin() -> Self {
        let open = || {
            let log = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open("/dev/kmsg")?;
            lseek(&log, 0, Whence::SeekEnd)?;
            Ok::<_, std::io::Error>(log)
        };
        Self(open().ok())
    }

    /// The call that process `pid` was killed for, if the kernel says it. Of the vmm's threads the
    /// record tells which it was.
    pub fn testify(&mut self, pid: Pid, role: Role) -> Option<Verdict> {
        let log = self.0.as_mut()?;
        let mut record = [0; RECORD_MAX];
        let end = Instant::now() + LATE;
        for _ in 0..RECORDS {
            match log.read(&mut record) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(&record[..length]);
                    if let Some(verdict) = parse(&text, pid, role) {
                        return Some(verdict);
                    }
                }
                // Records were overwritten before they were read: the next read goes on behind.
                Err(e) if e.raw_os_error() == Some(libc::EPIPE) || e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    let left = end.saturating_duration_since(Instant::now());
                    let mut more = [PollFd::new(log.as_fd(), PollFlags::POLLIN)];
                    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
                    if left.is_zero() || poll(&mut more, timeout) == Ok(0) {
                        return None;
                    }
                }
                Err(_) => return None,
            }
        }
        None
    }
}

/// A record of AUDIT_SECCOMP: `... type=1326 ... pid=7 comm="vcpu-0" ... sig=31 ... syscall=41 ...`
fn parse(record: &str, pid: Pid, role: Role) -> Option<Verdict> {
    if !record.contains("type=1326 ") {
        return None;
    }
    let field = |name: &str| {
        record
            .split_ascii_whitespace()
            .find_map(|word| word.strip_prefix(name))
    };
    if field("pid=")?.parse() != Ok(pid.as_raw()) || field("sig=")? != "31" {
        return None;
    }
    let vcpu = role == Role::Vmm && field("comm=").is_some_and(|name| name.starts_with("\"vcpu-"));
    Some(Verdict {
        role: if vcpu { Role::Vcpu } else { role },
        number: field("syscall=")?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = "5,1,2,-;audit: type=1326 audit(1795374250.582:8076): auid=1 uid=5 gid=5 ses=1 \
        pid=77 comm=\"vcpu-0\" exe=\"/b\" sig=31 arch=c000003e syscall=41 compat=0 ip=0x7f code=0x80000000";

    #[test]
    fn a_record_names_the_call_and_the_thread() {
        let verdict = parse(RECORD, Pid::from_raw(77), Role::Vmm).unwrap();
        assert_eq!((verdict.role, verdict.number), (Role::Vcpu, 41));
        let disk = parse(RECORD, Pid::from_raw(77), Role::Disk).unwrap();
        assert_eq!(disk.role, Role::Disk);
    }

    #[test]
    fn records_of_others_and_other_records_are_passed_over() {
        assert_eq!(parse(RECORD, Pid::from_raw(7), Role::Vmm), None);
        assert_eq!(
            parse(&RECORD.replace("1326", "1300"), Pid::from_raw(77), Role::Vmm),
            None
        );
        assert_eq!(
            parse(&RECORD.replace("sig=31", "sig=0"), Pid::from_raw(77), Role::Vmm),
            None
        );
    }
}
