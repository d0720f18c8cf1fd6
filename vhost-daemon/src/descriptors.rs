//! Taking ownership of file descriptors that come as numbers: at exec, or with a message.
#![expect(unsafe_code, reason = "turns numbers into owned file descriptors, each once")]

use jailer::wire_fds::receive_rights;
use nix::cmsg_space;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::MsgFlags;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

/// Numbers that were given out: a second owner would close what the first one uses.
static TAKEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());
/// Most descriptors in one message that [`receive`] takes.
const MAX_RECEIVED: usize = 4;

/// Owns the descriptor `number` that this process was started with (`--fd=3`), and marks it
/// close-on-exec. Standard input, output and error cannot be had.
///
/// # Errors
/// When it is not open, was taken before, or is one of 0 to 2.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    let refused = |why: &str| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("file descriptor {number} {why}"),
        )
    };
    if number <= 2 {
        return Err(refused("is standard input, output or error, or no number at all"));
    }
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if taken.contains(&number) {
        return Err(refused("is named twice"));
    }
    // SAFETY: F_GETFD only looks; the number is not used as a descriptor unless it is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl(borrowed, FcntlArg::F_GETFD).map_err(|_| refused("is not open"))?;
    let flags = FdFlag::from_bits_truncate(flags) | FdFlag::FD_CLOEXEC;
    fcntl(borrowed, FcntlArg::F_SETFD(flags))?;
    taken.push(number);
    // SAFETY: it is open, came with the process, which promised it to us on the command line, and
    // was not given to another owner here.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Fills `buffer`, unless the stream ends before, and takes the descriptors that came with it.
///
/// # Errors
/// When the socket fails, or more than [`MAX_RECEIVED`] came, which are closed.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let rights = cmsg_space!([RawFd; MAX_RECEIVED]);
    let brought = receive_rights(socket, buffer, rights, MsgFlags::MSG_WAITALL)?;
    if brought.flags.contains(MsgFlags::MSG_CTRUNC) || brought.fds.len() > MAX_RECEIVED {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "message with too many file descriptors",
        ));
    }
    Ok((brought.length, brought.fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{ControlMessage, sendmsg};
    use std::io::{ErrorKind, IoSlice, Read};
    use std::os::fd::{AsFd, AsRawFd};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    fn send(socket: &UnixStream, fds: &[RawFd]) {
        let control = [ControlMessage::ScmRights(fds)];
        let sent = sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(b"+")],
            &control,
            MsgFlags::empty(),
            None,
        );
        assert_eq!(sent, Ok(1));
    }

    #[test]
    fn too_many_descriptors_are_refused_and_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        for (count, fits) in [
            (1, true),
            (MAX_RECEIVED, true),
            (MAX_RECEIVED + 1, false),
            // The most that the kernel passes.
            (253, false),
        ] {
            let (mut reader, writer) = UnixStream::pair().unwrap();
            reader.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            send(&ours, &vec![writer.as_raw_fd(); count]);
            drop(writer);
            match receive(theirs.as_fd(), &mut [0]) {
                Ok((1, fds)) => assert!(fits && fds.len() == count),
                Ok(_) => panic!("nothing came"),
                Err(error) => assert!(!fits && error.kind() == ErrorKind::InvalidData),
            }
            // The end of the stream: no copy is left open.
            assert_eq!(reader.read(&mut [0]).unwrap(), 0, "{count}");
        }
    }
}
