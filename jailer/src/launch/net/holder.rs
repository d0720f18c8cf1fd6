//! A process that holds what a TAP needs for as long as its VM runs, and nothing else.
#![expect(unsafe_code, reason = "a fork, and descriptors that are closed by number")]

use super::NetError;
use crate::sandbox::caps;
use crate::wire_fds::receive_rights;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use nix::unistd::{ForkResult, Pid, fork, getegid, geteuid};
use std::fs;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

/// What is said of a process that closed its socket before it sent anything.
pub(super) const DIED: &str = "its process died";
/// Ends the words of a refusal that is about the host.
const LACKING: u8 = 0;
/// Longest wait for a TAP, which takes a few milliseconds.
const TAP_DEADLINE: Duration = Duration::from_secs(30);
/// Most descriptors of one TAP.
const MOST_TAPS: usize = 8;

/// The holder, as the launcher sees it.
pub(crate) struct Holder {
    pub(crate) pid: Pid,
    /// The spec's field that asks for it, for messages.
    pub(crate) field: String,
    /// Our end of its socket: the TAP comes over it, and the holder ends when it is closed.
    lifeline: Rc<OwnedFd>,
}

impl Holder {
    /// Forks a process that does `job`, which ends with the launcher's end of its socket.
    /// The calling process must have one thread only.
    pub(crate) fn start(
        field: impl Into<String>,
        job: impl FnOnce(&Post) -> Result<(), NetError>,
    ) -> Result<Self, NetError> {
        let failed = |e: Errno| NetError::Make("start a holder", e.into());
        let kind = SockType::SeqPacket;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).map_err(failed)?;
        // SAFETY: this process has one thread, so the child may do whatever the parent might.
        match unsafe { fork() }.map_err(failed)? {
            ForkResult::Child => {
                drop(ours);
                let post = Post(theirs);
                if let Err(error) = job(&post) {
                    post.refuse(&error);
                }
                // SAFETY: ends the child without running what the parent registered for its exit.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => Ok(Self {
                pid: child,
                field: field.into(),
                lifeline: Rc::new(ours),
            }),
        }
    }

    /// The same holder, which ends when both are dropped.
    pub(crate) fn share(&self) -> Self {
        Self {
            pid: self.pid,
            field: self.field.clone(),
            lifeline: Rc::clone(&self.lifeline),
        }
    }

    /// Our end of its socket, where no other has it.
    pub(crate) fn into_socket(self) -> Option<OwnedFd> {
        Rc::into_inner(self.lifeline)
    }

    /// Waits for the TAP, which comes once. A holder that dies closes its end.
    pub(crate) fn receive(&self) -> Result<Vec<OwnedFd>, NetError> {
        receive_taps(&self.lifeline, None)
    }
}

/// The holder's end of its socket.
pub(crate) struct Post(OwnedFd);

impl Post {
    /// Hands the TAP over.
    pub(super) fn give(&self, taps: &[OwnedFd]) -> Result<(), NetError> {
        send_taps(&self.0, taps)
    }

    fn refuse(&self, error: &NetError) {
        send_refusal(&self.0, error);
    }

    /// Becomes what no one needs to fear: no descriptor but its own and `keep`, no capability, no
    /// controlling terminal.
    pub(super) fn retire(&self, keep: &[RawFd]) {
        retire(&[keep, &[self.0.as_raw_fd()]].concat());
    }

    /// Keeps no descriptor but its own and `keep`, and no controlling terminal.
    pub(crate) fn detach(&self, keep: &[RawFd]) {
        detach(&[keep, &[self.0.as_raw_fd()]].concat());
    }

    /// Whether there is nobody any more for whom its job is done.
    pub(super) fn is_left(&self) -> bool {
        let mut launcher = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut launcher, PollTimeout::ZERO) != Ok(0)
    }

    /// Closed by the launcher when it ends. (A death signal would not do: a spawner that left root
    /// may not signal what it made before.)
    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.0
    }

    /// Waits for the launcher's end.
    pub(super) fn stay(&self) {
        while nix::unistd::read(&self.0, &mut [0]) == Err(Errno::EINTR) {}
    }
}

/// Closes every descriptor but `keep`, leaves the terminal, and drops all capabilities.
fn retire(keep: &[RawFd]) {
    detach(keep);
    let _ = caps::drop_all();
    let _ = nix::sys::prctl::set_no_new_privs();
}

/// Closes every descriptor but `keep`, and leaves the terminal.
pub(in crate::launch) fn detach(keep: &[RawFd]) {
    let mut keep = keep.to_vec();
    keep.sort_unstable();
    let mut first = 0;
    for number in keep.into_iter().chain([RawFd::MAX]) {
        if first < number {
            // SAFETY: this process uses no other descriptor from here to its end.
            unsafe { crate::inherit::close_range(first as u32, (number - 1) as u32) };
        }
        first = number.saturating_add(1);
    }
    let _ = nix::unistd::setsid();
    let _ = nix::unistd::chdir(c"/");
}

/// Enters a network namespace of its own, as the root of a user namespace of its own, whose
/// capabilities reach no further.
pub(crate) fn enter_namespace() -> Result<(), NetError> {
    let failed = |e: Errno| NetError::Make("make a network namespace", e.into());
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).map_err(failed)?;
    for (file, text) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("0 {uid} 1")),
        ("gid_map", format!("0 {gid} 1")),
    ] {
        fs::write(format!("/proc/self/{file}"), text)
            .map_err(|e| NetError::Make("map this user into a namespace", e))?;
    }
    Ok(())
}

/// Sends a TAP's descriptors over a SOCK_SEQPACKET socket.
pub(super) fn send_taps(socket: &OwnedFd, taps: &[OwnedFd]) -> Result<(), NetError> {
    let fds: Vec<RawFd> = taps.iter().map(AsRawFd::as_raw_fd).collect();
    send(socket, b"+", &[ControlMessage::ScmRights(&fds)])
        .map(drop)
        .map_err(|e| NetError::Make("hand the TAP over", e.into()))
}

/// Sends, in the place of a TAP, why there is none.
pub(super) fn send_refusal(socket: &OwnedFd, error: &NetError) {
    let mut text = crate::tell::chain(error).into_bytes();
    if error.is_of_the_host() {
        text.push(LACKING);
    }
    let _ = send(socket, &text, &[]);
}

fn send(socket: &OwnedFd, text: &[u8], rights: &[ControlMessage<'_>]) -> nix::Result<usize> {
    let data = [IoSlice::new(text)];
    sendmsg::<()>(socket.as_raw_fd(), &data, rights, MsgFlags::MSG_NOSIGNAL, None)
}

/// Receives what [`send_taps`] sent; a text in its place is the reason why there is none. Whoever waits for
/// another does so for as long as its `launcher` is there.
pub(super) fn receive_taps(socket: &OwnedFd, launcher: Option<&Post>) -> Result<Vec<OwnedFd>, NetError> {
    let fds = [Some(socket), launcher.map(Post::socket)].into_iter().flatten();
    let mut ready: Vec<_> = fds.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
    let timeout = PollTimeout::try_from(TAP_DEADLINE).unwrap_or(PollTimeout::MAX);
    if poll(&mut ready, timeout) == Ok(0) {
        return Err(NetError::Holder(format!("there is none after {TAP_DEADLINE:?}")));
    }
    if ready.get(1).is_some_and(|fd| fd.any().unwrap_or(false)) {
        return Err(NetError::Left);
    }
    let mut text = [0; 512];
    let rights = nix::cmsg_space!([RawFd; MOST_TAPS]);
    let brought = receive_rights(socket.as_fd(), &mut text, rights, MsgFlags::empty())
        .map_err(|e| NetError::Make("receive the TAP", e.into()))?;
    if brought.fds.is_empty() {
        return Err(refusal(&text[..brought.length]));
    }
    Ok(brought.fds)
}

fn refusal(text: &[u8]) -> NetError {
    let words = |text| String::from_utf8_lossy(text).into_owned();
    match text {
        [] => NetError::Holder(DIED.to_owned()),
        [text @ .., LACKING] => NetError::Lacking(words(text)),
        text => NetError::Holder(words(text)),
    }
}
