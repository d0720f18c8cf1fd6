//! The connection of a command to a running VM's supervisor.

use super::ps::RunningVm;
use crate::failure::Failure;
use crate::launch;
use crate::supervisor::NO_REQUEST;
use crate::wire::{Received, TransferError, send_message};
use crate::wire_fds::{receive_with_fds, send_with_fds};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};
use vm_spec::client::{Answer, Request};

/// For the supervisor to say hello.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);

/// To a VM's supervisor.
pub(super) struct Connection {
    socket: OwnedFd,
    requests: u64,
}

/// That something is not so, as `answer` has it.
pub(super) fn not_done(what: impl Into<String>, answer: Answer) -> Failure {
    match answer {
        Answer::Failed(why) => Failure::host(what).cause(why),
        Answer::Refused(refusal) => Failure::host(what).because(&refusal),
        _ => Failure::host("the supervisor gave no answer to the request"),
    }
}

/// The same, with a hint at what has become of that which was begun.
pub(super) fn not_finished(what: impl Into<String>, answer: Answer, hint: &str) -> Failure {
    let begun = matches!(answer, Answer::Failed(_));
    let failure = not_done(what, answer);
    if begun { failure.hint(hint) } else { failure }
}

impl Connection {
    /// Connects, and says hello.
    ///
    /// # Errors
    /// Nobody listens there, or speaks this protocol.
    pub(super) fn open(vm: &RunningVm) -> Result<Self, Failure> {
        let socket = launch::connect_to(&vm.folder).map_err(|e| {
            Failure::host(format!("cannot reach the supervisor of '{}'", vm.name())).because(&e)
        })?;
        let mut connection = Self { socket, requests: 0 };
        match connection.ask(Request::Hello, None, HELLO_DEADLINE)? {
            Answer::Hello => Ok(connection),
            Answer::Failed(why) => {
                let what = format!("cannot talk to the supervisor of '{}'", vm.name());
                Err(Failure::host(what)
                    .cause(why)
                    .hint("try again once one of them is done"))
            }
            _ => Err(Failure::host("the supervisor does not speak this protocol")),
        }
    }

    /// The connection, for one that carries no more messages.
    pub(super) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Asks, with a file where one belongs to the request, and waits for the answer.
    ///
    /// # Errors
    /// There is none within `limit`.
    pub(super) fn ask(
        &mut self,
        request: Request,
        file: Option<&File>,
        limit: Duration,
    ) -> Result<Answer, Failure> {
        self.ask_with(request, file.map(AsFd::as_fd).as_slice(), limit)
    }

    /// The same, with all the descriptors that belong to the request.
    ///
    /// # Errors
    /// As [`Connection::ask`].
    pub(super) fn ask_with(
        &mut self,
        request: Request,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Answer, Failure> {
        self.requests += 1;
        let socket = self.socket.as_fd();
        let sent = match fds.is_empty() {
            false => send_with_fds(socket, self.requests, request, fds),
            true => send_message(socket, self.requests, request),
        };
        let failed = |e: &dyn std::error::Error| Failure::host("cannot talk to the supervisor").because(e);
        match sent {
            // Whoever is turned away is told why before.
            Err(TransferError::Socket(e)) if e.kind() == io::ErrorKind::BrokenPipe => {}
            sent => sent.map_err(|e| failed(&e))?,
        }
        let deadline = Instant::now() + limit;
        loop {
            match receive_with_fds(socket).map_err(|e| failed(&e))? {
                (Received::Message(id, answer), _) if [self.requests, NO_REQUEST].contains(&id) => {
                    return Ok(answer);
                }
                (Received::Message(..), _) => {}
                (Received::End, _) => return Err(Failure::host("the VM ended")),
                (Received::Nothing, _) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(Failure::host(format!("no answer within {limit:?}")));
                    }
                    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
                    let mut ready = [PollFd::new(socket, PollFlags::POLLIN)];
                    match poll(&mut ready, timeout) {
                        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                        Err(e) => return Err(failed(&e)),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_spec::client::Refusal;

    #[test]
    fn only_what_was_begun_has_left_something_to_look_at() {
        let failure = |answer| not_finished("slot1 was not attached", answer, "look").to_string();
        assert_eq!(
            failure(Answer::Failed("slot1: it ended".to_owned())),
            "error: slot1 was not attached\n  cause: slot1: it ended\n  hint: look"
        );
        let refusal = Refusal::Because("the VM ends".to_owned());
        assert_eq!(
            failure(Answer::Refused(refusal)),
            "error: slot1 was not attached\n  cause: the VM ends"
        );
        assert_eq!(
            failure(Answer::Refused(Refusal::IdTaken)),
            "error: slot1 was not attached\n  cause: its id is another device's"
        );
        assert!(failure(Answer::Hello).contains("no answer"));
    }
}
