//! The 16550's registers (vm-superio) between port exits and the console.

use super::output::ConsoleOutput;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents};

struct Interrupt(Arc<EventFd>);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)?;
        Ok(())
    }
}

struct Transmitter(Arc<ConsoleOutput>);

impl Write for Transmitter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|&byte| self.0.push(byte));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tells the main thread that the receive FIFO has room again.
struct Drained(Arc<EventFd>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // A full counter means that the signal is pending already.
        let _ = self.0.write(1);
    }
}

type Uart = Serial<Interrupt, Drained, Transmitter>;

/// COM1.
pub struct Com1 {
    uart: Mutex<Uart>,
    interrupt: Arc<EventFd>,
    drained: Arc<EventFd>,
    output: Arc<ConsoleOutput>,
}

impl Com1 {
    /// A UART at power-on, writing to `output`.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(output: Arc<ConsoleOutput>) -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let interrupt = Arc::new(EventFd::from_flags(flags)?);
        let drained = Arc::new(EventFd::from_flags(flags)?);
        Ok(Self {
            uart: Mutex::new(power_on(&interrupt, &drained, &output)),
            interrupt,
            drained,
            output,
        })
    }

    /// The eventfd that raises COM1's interrupt.
    #[must_use]
    pub fn interrupt(&self) -> BorrowedFd<'_> {
        self.interrupt.as_fd()
    }

    /// Readable when the guest has emptied the receive FIFO.
    #[must_use]
    pub fn drained(&self) -> BorrowedFd<'_> {
        self.drained.as_fd()
    }

    /// Where output goes.
    #[must_use]
    pub fn output(&self) -> &Arc<ConsoleOutput> {
        &self.output
    }

    /// A guest's read of register `offset` (0 to 7).
    #[must_use]
    pub fn read(&self, offset: u8) -> u8 {
        self.lock().read(offset)
    }

    /// A guest's write to register `offset` (0 to 7).
    pub fn write(&self, offset: u8, value: u8) {
        if let Err(error) = self.lock().write(offset, value) {
            // Only an interrupt that is pending already can fail.
            tracing::trace!(%error, "COM1 write");
        }
    }

    /// Moves input from the console to the guest as far as the FIFO has room.
    pub fn receive(&self) -> Input {
        // Consumes the signal; there may be none.
        let _ = self.drained.read();
        let mut uart = self.lock();
        let room = uart.fifo_capacity();
        if room == 0 {
            return Input::Full;
        }
        let mut buffer = [0; 64];
        let room = room.min(buffer.len());
        match nix::unistd::read(self.output.socket(), &mut buffer[..room]) {
            Ok(0) => Input::Closed,
            Ok(count) => {
                if let Err(error) = uart.enqueue_raw_bytes(&buffer[..count]) {
                    tracing::trace!(%error, "COM1 input");
                }
                if uart.fifo_capacity() == 0 {
                    Input::Full
                } else {
                    Input::Open
                }
            }
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => Input::Open,
            Err(_) => Input::Closed,
        }
    }

    /// Back to power-on state; console and counters stay.
    pub fn reset(&self) {
        *self.lock() = power_on(&self.interrupt, &self.drained, &self.output);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the console's input side can do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Input {
    /// Wait for the socket.
    Open,
    /// Wait for the guest to empty its FIFO.
    Full,
    /// Nobody writes any more.
    Closed,
}

fn power_on(interrupt: &Arc<EventFd>, drained: &Arc<EventFd>, output: &Arc<ConsoleOutput>) -> Uart {
    Serial::with_events(
        Interrupt(interrupt.clone()),
        Drained(drained.clone()),
        Transmitter(output.clone()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    const IER: u8 = 1;
    const RECEIVE_INTERRUPT: u8 = 1;

    #[test]
    fn input_beyond_the_fifo_waits_in_the_socket() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let com1 = Com1::new(Arc::new(ConsoleOutput::new(ours.into()).unwrap())).unwrap();
        com1.write(IER, RECEIVE_INTERRUPT);
        let sent: Vec<u8> = (0..200).collect();
        theirs.write_all(&sent).unwrap();
        let mut received = Vec::new();
        while received.len() < sent.len() {
            com1.receive();
            while com1.read(5) & 1 == 1 {
                received.push(com1.read(0));
            }
        }
        assert_eq!(received, sent);
        assert!(com1.interrupt.read().unwrap() > 0);
        assert!(com1.drained.read().is_ok());
    }

    #[test]
    fn a_console_that_closes_its_end_is_told_apart() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let com1 = Com1::new(Arc::new(ConsoleOutput::new(ours.into()).unwrap())).unwrap();
        assert_eq!(com1.receive(), Input::Open);
        drop(theirs);
        assert_eq!(com1.receive(), Input::Closed);
    }
}
