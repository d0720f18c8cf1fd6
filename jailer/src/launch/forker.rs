//! The forker: makes the successors of device processes for a spawner that can make no process itself.
//! Stops one that its supervisor talks into something from making a process of anybody's choice.
//!
//! ```text
//!   supervisor --requests--> spawner --orders--> forker --clone3--> successor
//!                  (spawner.policy)       (forker.policy)     (the spawner's child, which reaps it)
//! ```
//!
//! It is a copy of the spawner from before that read its first message. It keeps the images and TAPs,
//! knows six orders, and reads nothing else. What it makes is fixed by the plan, but for another build
//! of a device's binary and devices that are attached, which only the VM's owner can send, and another TAP, which the
//! connector opens.
#![expect(unsafe_code, reason = "a fork")]

use super::net::detach;
use super::respawn::Respawner;
use crate::failure::Failure;
use crate::sandbox::lockdown_forker;
use crate::tell::tell;
use crate::wire::{Received, TransferError, send_message};
use crate::wire_fds::{receive_with_fds, send_with_fd, send_with_fds};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::SockType;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};
use vm_spec::control::BACKEND_FDS;
use vm_spec::supervise::{AddedProcess, Build};

/// Longest wait for an answer; the forker itself waits for a jail at most 2 s, after it has answered.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// Make a process in the place of `process`.
    Start { process: u16, build: Build },
    /// Another build of `process`; its binary comes along.
    Candidate { process: u16 },
    /// The candidate serves.
    Adopt { process: u16 },
    /// Another TAP for `process`; its queues come along.
    Tap { process: u16 },
    /// What one more process takes; its descriptors come along.
    Add { process: u16, plan: Box<AddedProcess> },
    /// There is to be no successor of `process`.
    Remove { process: u16 },
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// It takes orders, and is under its filter.
    Ready,
    /// It builds its jail. Its sockets for the vmm come along.
    Started { pid: i32 },
    /// It cannot be made.
    Refused { why: String },
    /// Nothing of it is kept.
    Removed,
}

/// The spawner's side.
pub(crate) struct Forker {
    pub(crate) pid: Pid,
    socket: OwnedFd,
    /// Of the last order that is answered. An answer that came too late has another, and is no other's.
    order: Cell<u64>,
}

impl Forker {
    /// Forks, and waits until the forker is confined. The calling process must have one thread; with
    /// `respawner` it lets go of everything that successors are given.
    ///
    /// # Errors
    /// There is none, or it could not be confined, which it has said.
    pub(crate) fn start(respawner: Respawner) -> Result<Self, Failure> {
        let failed = |e: Errno| Failure::host("cannot start the forker").because(&e);
        let (ours, theirs) = super::spawn::pair(SockType::SeqPacket).map_err(failed)?;
        // SAFETY: this process has one thread, so the child may do whatever the parent might.
        match unsafe { fork() }.map_err(failed)? {
            ForkResult::Child => {
                drop(ours);
                let mut keep = respawner.descriptors();
                keep.extend([libc::STDERR_FILENO, theirs.as_raw_fd()]);
                detach(&keep);
                match lockdown_forker(respawner.seccomp()) {
                    Ok(()) => serve(theirs.as_fd(), respawner),
                    Err(error) => tell(format_args!(
                        "bulkhead: the forker: {}",
                        crate::tell::chain(&error)
                    )),
                }
                // SAFETY: ends the child without running what the parent registered for its exit.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                drop(theirs);
                let forker = Self {
                    pid: child,
                    socket: ours,
                    order: Cell::new(0),
                };
                match forker.answer()? {
                    (Answer::Ready, _) => Ok(forker),
                    _ => Err(no_answer()),
                }
            }
        }
    }

    /// The answer to the last order.
    fn answer(&self) -> Result<(Answer, Vec<OwnedFd>), Failure> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            wait(self.socket.as_fd(), Some(left)).map_err(|e| no_answer().because(&e))?;
            match receive_with_fds(self.socket.as_fd()).map_err(|e| no_answer().because(&e))? {
                (Received::Message(id, answer), fds) if id == self.order.get() => return Ok((answer, fds)),
                (Received::Message(_, Answer::Started { pid }), _) => {
                    // Nobody waits for it any more. Unless it has been reaped already, it is our child.
                    let pid = Pid::from_raw(pid);
                    if waitpid(pid, Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive) {
                        let _ = kill(pid, Signal::SIGKILL);
                    }
                }
                (Received::Message(..), _) => {}
                _ => return Err(no_answer()),
            }
        }
    }

    /// Gives an order that is answered.
    fn ask(&self, order: Order) -> Result<(Answer, Vec<OwnedFd>), Failure> {
        self.order.set(self.order.get() + 1);
        send_message(self.socket.as_fd(), self.order.get(), order).map_err(|e| no_answer().because(&e))?;
        self.answer()
    }

    /// Has a successor of `process` made: its process id, and its sockets for the vmm.
    pub(crate) fn successor(&self, process: u16, build: Build) -> Result<(Pid, Vec<OwnedFd>), Failure> {
        match self.ask(Order::Start { process, build })? {
            (Answer::Started { pid }, fds) if fds.len() == BACKEND_FDS => Ok((Pid::from_raw(pid), fds)),
            (Answer::Refused { why }, _) => Err(Failure::host(why)),
            _ => Err(no_answer()),
        }
    }

    /// See `Respawner::keep_candidate`.
    pub(crate) fn keep_candidate(&self, process: u16, binary: BorrowedFd<'_>) -> Result<(), TransferError> {
        send_with_fd(self.socket.as_fd(), 0, Order::Candidate { process }, binary)
    }

    /// See `Respawner::adopt`.
    pub(crate) fn adopt(&self, process: u16) -> Result<(), TransferError> {
        send_message(self.socket.as_fd(), 0, Order::Adopt { process })
    }

    /// See `Respawner::keep_tap`.
    pub(crate) fn keep_tap(&self, process: u16, queues: &[OwnedFd]) -> Result<(), TransferError> {
        send_with_fds(self.socket.as_fd(), 0, Order::Tap { process }, queues)
    }

    /// See `Respawner::add`.
    pub(crate) fn add(
        &self,
        process: u16,
        plan: Box<AddedProcess>,
        fds: &[OwnedFd],
    ) -> Result<(), TransferError> {
        send_with_fds(self.socket.as_fd(), 0, Order::Add { process, plan }, fds)
    }

    /// See `Respawner::remove`; done when it returns.
    pub(crate) fn remove(&self, process: u16) -> Result<(), Failure> {
        match self.ask(Order::Remove { process })? {
            (Answer::Removed, _) => Ok(()),
            _ => Err(no_answer()),
        }
    }

    /// Ends it. It must not have been reaped.
    pub(crate) fn end(self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

fn no_answer() -> Failure {
    Failure::host("the forker does not answer")
}

/// Carries orders out until the spawner is gone.
fn serve(socket: BorrowedFd<'_>, mut respawner: Respawner) {
    if send_message(socket, 0, Answer::Ready).is_err() {
        return;
    }
    while wait(socket, None).is_ok() {
        let (id, order, mut fds) = match receive_with_fds(socket) {
            Ok((Received::Message(id, order), fds)) => (id, order, fds),
            Ok((Received::Nothing, _)) => continue,
            Ok((Received::End, _)) | Err(_) => return,
        };
        let answered = match order {
            Order::Start { process, build } => match respawner.start(process.into(), build) {
                Ok(successor) => {
                    let pid = successor.pid().as_raw();
                    let sent = send_with_fds(socket, id, Answer::Started { pid }, &successor.sockets);
                    successor.finish();
                    sent
                }
                Err(failure) => {
                    let why = failure.line();
                    send_message(socket, id, Answer::Refused { why })
                }
            },
            Order::Candidate { process } => {
                if let Some(binary) = fds.pop() {
                    respawner.keep_candidate(process.into(), binary);
                }
                Ok(())
            }
            Order::Tap { process } => {
                respawner.keep_tap(process.into(), fds);
                Ok(())
            }
            Order::Adopt { process } => {
                respawner.adopt(process.into());
                Ok(())
            }
            Order::Add { process, plan } => {
                respawner.add(process.into(), *plan, fds);
                Ok(())
            }
            Order::Remove { process } => {
                respawner.remove(process.into());
                send_message(socket, id, Answer::Removed)
            }
        };
        if answered.is_err() {
            return;
        }
    }
}

/// Waits until there is something to read; without a limit for ever.
fn wait(socket: BorrowedFd<'_>, limit: Option<Duration>) -> nix::Result<()> {
    let mut ready = [PollFd::new(socket, PollFlags::POLLIN)];
    let timeout = limit.map_or(PollTimeout::NONE, |limit| {
        PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX)
    });
    loop {
        match poll(&mut ready, timeout) {
            Ok(0) => return Err(Errno::ETIMEDOUT),
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    /// The spawner's side of a forker that this test plays.
    fn forker() -> (Forker, OwnedFd) {
        let (ours, theirs) = super::super::spawn::pair(SockType::SeqPacket).unwrap();
        let forker = Forker {
            pid: nix::unistd::getpid(),
            socket: ours,
            order: Cell::new(1),
        };
        (forker, theirs)
    }

    /// Two answers wait: that to an order of before, and that to the next one.
    fn next_order_fails_by_its_own_answer(late: i32) {
        let (forker, theirs) = forker();
        send_message(theirs.as_fd(), 1, Answer::Started { pid: late }).unwrap();
        let failure = Failure::host("cannot start net0").cause("no\nmemory").hint("-");
        let why = failure.line();
        send_message(theirs.as_fd(), 2, Answer::Refused { why }).unwrap();
        let refused = forker.successor(0, Build::Current).unwrap_err();
        assert_eq!(refused.line(), "cannot start net0: no\\nmemory");
    }

    #[test]
    fn a_process_that_came_too_late_is_ended() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        next_order_fails_by_its_own_answer(child.id() as i32);
        assert_eq!(child.wait().unwrap().signal(), Some(Signal::SIGKILL as i32));
    }

    #[test]
    fn a_number_that_is_no_childs_is_left_alone() {
        let mut child = Command::new("sh")
            .args(["-c", "sleep 60 & echo $!; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        said.read_line(&mut line).unwrap();
        let grandchild = Pid::from_raw(line.trim().parse().unwrap());
        next_order_fails_by_its_own_answer(grandchild.as_raw());
        assert_eq!(kill(grandchild, None), Ok(()), "it was killed");
        kill(grandchild, Signal::SIGKILL).unwrap();
        assert!(
            child.wait().unwrap().success(),
            "the grandchild's parent waits for it"
        );
    }

    #[test]
    fn an_answer_without_its_sockets_is_none() {
        let (forker, theirs) = forker();
        let answer = Answer::Started { pid: 1 << 30 };
        send_with_fd(theirs.as_fd(), 2, answer, theirs.as_fd()).unwrap();
        let failed = forker.successor(0, Build::Current).unwrap_err().to_string();
        assert!(failed.contains("does not answer"), "{failed}");
        drop(theirs);
        assert!(forker.successor(0, Build::Current).is_err());
    }
}
