//! Console output: bounded, non-blocking, and gathered so that a line costs one write.

use jailer::inherit::set_nonblocking;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Most bytes that wait for a reader; what comes on top is dropped and counted.
const CAPACITY: usize = 64 << 10;
/// Bytes after which a partial line is written at once.
const BATCH: usize = 512;
/// Longest that a partial line waits for its end.
const GATHER: Duration = Duration::from_millis(5);

struct State {
    waiting: VecDeque<u8>,
    last_flush: Option<Instant>,
    timer_set: bool,
    blocked: bool,
    dropped: u64,
    written: u64,
}

/// The console's stream socket, seen from the UART.
pub struct ConsoleOutput {
    socket: OwnedFd,
    timer: TimerFd,
    state: Mutex<State>,
}

impl ConsoleOutput {
    /// Takes the console's socket and makes it non-blocking.
    ///
    /// # Errors
    /// When the descriptor or a timer cannot be set up.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        set_nonblocking(socket.as_fd())?;
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self {
            socket,
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                last_flush: None,
                timer_set: false,
                blocked: false,
                dropped: 0,
                written: 0,
            }),
        })
    }

    /// The socket, for polling and for input.
    #[must_use]
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Readable when [`ConsoleOutput::flush`] is due.
    #[must_use]
    pub fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// The reader is behind: flush again when the socket is writable.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.lock().blocked
    }

    /// Bytes dropped because nobody read them.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// Bytes that the guest wrote since the process started.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.lock().written
    }

    /// Takes one byte from the guest. The first byte after a pause goes out at once; the bytes
    /// that follow it are gathered up to the end of the line.
    pub fn push(&self, byte: u8) {
        let mut state = self.lock();
        state.written += 1;
        if state.waiting.len() >= CAPACITY {
            state.dropped += 1;
            return;
        }
        state.waiting.push_back(byte);
        if state.blocked {
            return;
        }
        let rested = state.last_flush.is_none_or(|at| at.elapsed() >= GATHER);
        if byte == b'\n' || rested || state.waiting.len() >= BATCH {
            self.write_out(&mut state);
        } else if !state.timer_set {
            self.set_timer(&mut state);
        }
    }

    /// Writes what waits, as far as the socket takes it.
    pub fn flush(&self) {
        let mut state = self.lock();
        if state.timer_set && self.timer.wait().is_ok() {
            state.timer_set = false;
        }
        self.write_out(&mut state);
    }

    /// Writes what waits, giving a slow reader until `deadline`.
    pub fn drain(&self, deadline: Instant) {
        loop {
            let mut state = self.lock();
            self.write_out(&mut state);
            if state.waiting.is_empty() {
                return;
            }
            drop(state);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let mut fds = [nix::poll::PollFd::new(
                self.socket(),
                nix::poll::PollFlags::POLLOUT,
            )];
            let timeout = u16::try_from(left.as_millis()).unwrap_or(u16::MAX).max(1);
            if nix::poll::poll(&mut fds, timeout).is_err() {
                return;
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_out(&self, state: &mut State) {
        state.last_flush = Some(Instant::now());
        while !state.waiting.is_empty() {
            match nix::unistd::write(&self.socket, state.waiting.as_slices().0) {
                Ok(written) => {
                    state.waiting.drain(..written);
                }
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => {
                    // Once: the main thread, which the timer wakes, waits for the socket from then on.
                    if !std::mem::replace(&mut state.blocked, true) {
                        self.set_timer(state);
                    }
                    return;
                }
                Err(_) => {
                    // The console is gone; the guest goes on without it.
                    state.dropped += state.waiting.len() as u64;
                    state.waiting.clear();
                }
            }
        }
        state.blocked = false;
    }

    fn set_timer(&self, state: &mut State) {
        let when = Expiration::OneShot(TimeSpec::from_duration(GATHER));
        state.timer_set = self.timer.set(when, TimerSetTimeFlags::empty()).is_ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_first_byte_goes_out_at_once_and_a_line_at_its_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let output = ConsoleOutput::new(ours.into()).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut buffer = [0; 16];
        output.push(b'a');
        assert_eq!(theirs.read(&mut buffer).unwrap(), 1);
        output.push(b'b');
        output.push(b'\n');
        assert_eq!(theirs.read(&mut buffer).unwrap(), 2);
    }

    #[test]
    fn a_reader_that_never_reads_costs_bytes_not_time() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let output = ConsoleOutput::new(ours.into()).unwrap();
        let total = 2 << 20;
        for _ in 0..total {
            output.push(b'\n');
        }
        assert!(output.is_blocked());
        let dropped = output.dropped();
        assert!(dropped > 0 && dropped < total);
        theirs.set_nonblocking(true).unwrap();
        let mut received = 0;
        let mut buffer = vec![0; 1 << 20];
        while received < total - dropped {
            received += theirs.read(&mut buffer).unwrap() as u64;
            output.flush();
        }
        assert_eq!(received, total - dropped);
        assert!(!output.is_blocked());
    }

    #[test]
    fn a_console_that_is_gone_does_not_stop_the_guest() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let output = ConsoleOutput::new(ours.into()).unwrap();
        drop(theirs);
        output.push(b'\n');
        assert_eq!(output.dropped(), 1);
        assert!(!output.is_blocked());
    }
}
