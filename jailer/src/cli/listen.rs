//! `bulkhead console VM`, and how one listens to a running VM's guest and processes.

use super::connection::{Connection, not_done};
use super::ps;
use crate::escape::EscapeReader;
use crate::failure::Failure;
use crate::launch::signals::{LEAVING, take_by_descriptor};
use crate::launch::terminal::{self, Saved};
use crate::tell::say;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{MsgFlags, recv, send};
use nix::unistd::read;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, IsTerminal, Write, stdin, stdout};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::time::Duration;
use vm_spec::client::{Answer, Channel, Request};

/// For the supervisor to take a listener, and to say what there is.
pub(super) const DEADLINE: Duration = Duration::from_secs(5);
/// Longest datagram from the supervisor.
const LONGEST: usize = 4096;
/// Longest to it.
const PIECE: usize = 256;
/// Most bytes held that the guest has not taken. When full, keys are lost, as on any terminal; a file or
/// pipe is not read.
const MOST_TYPED: usize = 4096;

/// Has the supervisor send what is said.
///
/// # Errors
/// A [`Failure`] when no such VM runs, or too many listen.
pub(super) fn listen(vm: &str, channel: Channel, follow: bool) -> Result<OwnedFd, Failure> {
    let mut connection = Connection::open(&ps::find(vm)?)?;
    match connection.ask(Request::Listen { channel, follow }, None, DEADLINE)? {
        Answer::Listening => Ok(connection.into_socket()),
        answer => Err(not_done(format!("cannot listen to the VM '{vm}'"), answer)),
    }
}

/// Joins the guest's console: what it wrote last, what it writes, and what is typed, until the VM is over or
/// the person leaves by Ctrl-A x.
///
/// # Errors
/// A [`Failure`] when no such VM runs, or standard output cannot be written.
pub(super) fn console(vm: &str) -> Result<u8, Failure> {
    let socket = listen(vm, Channel::Console, true)?;
    let signals =
        take_by_descriptor(LEAVING).map_err(|e| Failure::host("cannot take signals").because(&e))?;
    let mut visit = Visit {
        socket,
        signals,
        out: Out::open()?,
        reads: terminal::has_input(),
        keyboard: stdin().is_terminal(),
        escape: EscapeReader::default(),
        typed: Vec::new(),
    };
    let raw = Raw(terminal::save());
    if let Some(saved) = &raw.0 {
        say(format_args!("console of '{vm}': Ctrl-A x leaves it"));
        terminal::make_raw(saved);
    }
    let end = visit.stay()?;
    drop(raw);
    Ok(match end {
        End::Left => 0,
        End::Over => {
            say(format_args!("the VM '{vm}' is over"));
            0
        }
        End::Signal(number) => 128_u8.saturating_add(number),
    })
}

/// A terminal that becomes what it was, however we leave.
struct Raw(Option<Saved>);

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(saved) = &self.0 {
            terminal::restore(saved);
        }
    }
}

/// Why a visit to a console is over.
enum End {
    Left,
    Over,
    Signal(u8),
}

/// Standard output, which is never waited for in a write: signals are blocked there.
struct Out {
    file: File,
    /// What was said and is not written yet. Until it is, nothing else is heard.
    pending: Vec<u8>,
}

impl Out {
    fn open() -> Result<Self, Failure> {
        let own = stdout().as_fd().try_clone_to_owned().map(File::from);
        let own = own.map_err(|e| Failure::host("cannot write to standard output").because(&e))?;
        let blocks = own.is_terminal() || own.metadata().is_ok_and(|about| about.file_type().is_fifo());
        // Opened once more: others may write by the description that we were given, and want to wait. A
        // terminal is ready when it has room for a single byte.
        let mut again = OpenOptions::new();
        again.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let path = format!("/proc/self/fd/{}", own.as_raw_fd());
        Ok(Self {
            file: blocks.then(|| again.open(path).ok()).flatten().unwrap_or(own),
            pending: Vec::new(),
        })
    }

    /// Writes what there is room for, in a file that is ready; false: nobody reads it any more.
    fn write(&mut self) -> Result<bool, Failure> {
        // A pipe that is ready has room for as much.
        let piece = &self.pending[..self.pending.len().min(libc::PIPE_BUF)];
        match self.file.write(piece) {
            Ok(count) => drop(self.pending.drain(..count)),
            Err(e) if e.kind() == ErrorKind::BrokenPipe => return Ok(false),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(e) => return Err(Failure::host("cannot write to standard output").because(&e)),
        }
        Ok(true)
    }
}

/// Someone at a console.
struct Visit {
    socket: OwnedFd,
    signals: SignalFd,
    out: Out,
    /// There is input, and it has not ended.
    reads: bool,
    /// Input comes from a person.
    keyboard: bool,
    escape: EscapeReader,
    typed: Vec<u8>,
}

impl Visit {
    fn stay(&mut self) -> Result<End, Failure> {
        loop {
            let mut socket = PollFlags::POLLIN;
            socket.set(PollFlags::POLLOUT, !self.typed.is_empty());
            let input = stdin();
            let mut fds = vec![
                match self.out.pending.is_empty() {
                    true => PollFd::new(self.socket.as_fd(), socket),
                    false => PollFd::new(self.out.file.as_fd(), PollFlags::POLLOUT),
                },
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            if self.reads && (self.keyboard || self.typed.len() < MOST_TYPED) {
                fds.push(PollFd::new(input.as_fd(), PollFlags::POLLIN));
            }
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(Failure::host("poll").because(&e)),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            if ready[1]
                && let Ok(Some(info)) = self.signals.read_signal()
            {
                return Ok(End::Signal(u8::try_from(info.ssi_signo).unwrap_or(0)));
            }
            if ready.get(2) == Some(&true) && self.read() {
                return Ok(End::Left);
            }
            if ready[0]
                && let Some(end) = self.hear()?
            {
                return Ok(end);
            }
            self.send();
        }
    }

    /// Takes what was said, or prints what is left of it; the end, if that was all.
    fn hear(&mut self) -> Result<Option<End>, Failure> {
        if !self.out.pending.is_empty() {
            return Ok((!self.out.write()?).then_some(End::Left));
        }
        match next(&self.socket, MsgFlags::MSG_DONTWAIT)? {
            Some(bytes) => self.out.pending = bytes,
            None => return Ok(Some(End::Over)),
        }
        Ok(None)
    }

    /// Takes what was typed; true: the person leaves.
    fn read(&mut self) -> bool {
        let mut bytes = [0; PIECE];
        let mut keys = Vec::new();
        let left = match read(stdin(), &mut bytes) {
            // What is no terminal has no commands.
            Ok(count) if count > 0 && !self.keyboard => {
                keys.extend_from_slice(&bytes[..count]);
                false
            }
            Ok(count) if count > 0 => self.escape.pass(&bytes[..count], &mut keys).is_some(),
            Err(Errno::EAGAIN | Errno::EINTR) => false,
            _ => {
                self.reads = false;
                false
            }
        };
        if self.typed.len() < MOST_TYPED {
            self.typed.extend(keys);
        }
        left
    }

    /// Sends what can be sent at once. That the supervisor is gone is found by [`Self::hear`].
    fn send(&mut self) {
        while !self.typed.is_empty() {
            let piece = &self.typed[..self.typed.len().min(PIECE)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.socket.as_raw_fd(), piece, flags) {
                Ok(count) => drop(self.typed.drain(..count)),
                Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }
}

/// The next datagram, empty where none has come yet; `None`: there will be no more.
pub(super) fn next(socket: &OwnedFd, flags: MsgFlags) -> Result<Option<Vec<u8>>, Failure> {
    let mut bytes = vec![0; LONGEST];
    loop {
        match recv(socket.as_raw_fd(), &mut bytes, flags) {
            Ok(0) => return Ok(None),
            Ok(count) => {
                bytes.truncate(count);
                return Ok(Some(bytes));
            }
            Err(Errno::EAGAIN) => return Ok(Some(Vec::new())),
            // Told once, of a supervisor that left with something of ours unread.
            Err(Errno::EINTR | Errno::ECONNRESET) => {}
            Err(e) => return Err(Failure::host("cannot hear the supervisor").because(&e)),
        }
    }
}
