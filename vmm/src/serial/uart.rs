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

/// Register offsets.
const RECEIVER: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
/// Read: interrupt identification; written: FIFO control.
const INTERRUPT_ID: u8 = 2;
const FIFO_CONTROL: u8 = 2;
const LINE_CONTROL: u8 = 3;
const LINE_STATUS: u8 = 5;

/// Interrupt enable: received data, transmitter empty.
const ENABLE_RECEIVED: u8 = 1;
const ENABLE_EMPTY: u8 = 2;
/// Interrupt identification, with the bits that say that there are FIFOs.
const ID_RECEIVED: u8 = 0xC4;
const ID_EMPTY: u8 = 0xC2;
const ID_NONE: u8 = 0xC1;
/// The bit of [`ID_EMPTY`].
const EMPTY: u8 = 2;
const FIFO_ON: u8 = 1;
const DIVISOR_LATCH: u8 = 0x80;
const DATA_READY: u8 = 1;

/// The crate's registers, with the interrupt identification of a 16550: the crate names all that is
/// pending at once, and forgets it all when it is read.
struct Uart {
    registers: Serial<Interrupt, Drained, Transmitter>,
    interrupt: Arc<EventFd>,
    /// What the guest wrote: it cannot be read back while the divisor latch is in its place.
    enabled: u8,
    fifo: bool,
    /// "Transmitter empty" is pending behind received data.
    empty: bool,
}

impl Uart {
    fn read(&mut self, offset: u8) -> u8 {
        match offset {
            INTERRUPT_ID => self.identify(),
            RECEIVER if !self.divisor_latch() => {
                let byte = self.registers.read(RECEIVER);
                // Without the FIFO each byte takes the place of the one before, and interrupts anew.
                if !self.fifo && self.has_received() {
                    // A full counter means that the interrupt is pending already.
                    let _ = self.interrupt.write(1);
                }
                byte
            }
            _ => self.registers.read(offset),
        }
    }

    fn write(&mut self, offset: u8, value: u8) -> Result<(), vm_superio::serial::Error<io::Error>> {
        match offset {
            INTERRUPT_ENABLE if !self.divisor_latch() => self.enabled = value,
            FIFO_CONTROL => self.fifo = value & FIFO_ON != 0,
            _ => {}
        }
        self.registers.write(offset, value)
    }

    /// The pending interrupt of the highest priority. Received data is pending until it is read, an
    /// empty transmitter until this has said so (PC16550D data sheet, table IV).
    fn identify(&mut self) -> u8 {
        self.empty |= self.registers.read(INTERRUPT_ID) & EMPTY != 0;
        if self.has_received() {
            ID_RECEIVED
        } else if std::mem::take(&mut self.empty) && self.enabled & ENABLE_EMPTY != 0 {
            ID_EMPTY
        } else {
            ID_NONE
        }
    }

    fn has_received(&mut self) -> bool {
        self.enabled & ENABLE_RECEIVED != 0 && self.registers.read(LINE_STATUS) & DATA_READY != 0
    }

    fn divisor_latch(&mut self) -> bool {
        self.registers.read(LINE_CONTROL) & DIVISOR_LATCH != 0
    }
}

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
        let registers = &mut self.lock().registers;
        let room = registers.fifo_capacity();
        if room == 0 {
            return Input::Full;
        }
        let mut buffer = [0; 64];
        let room = room.min(buffer.len());
        match nix::unistd::read(self.output.socket(), &mut buffer[..room]) {
            Ok(0) => Input::Closed,
            Ok(count) => {
                if let Err(error) = registers.enqueue_raw_bytes(&buffer[..count]) {
                    tracing::trace!(%error, "COM1 input");
                }
                if registers.fifo_capacity() == 0 {
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
    Uart {
        registers: Serial::with_events(
            Interrupt(interrupt.clone()),
            Drained(drained.clone()),
            Transmitter(output.clone()),
        ),
        interrupt: interrupt.clone(),
        enabled: 0,
        fifo: false,
        empty: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    const TRANSMITTER: u8 = 0;

    fn com1() -> (Com1, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let output = Arc::new(ConsoleOutput::new(ours.into()).unwrap());
        (Com1::new(output).unwrap(), theirs)
    }

    /// Whether the guest was interrupted since this was last asked.
    fn interrupted(com1: &Com1) -> bool {
        com1.interrupt.read().is_ok()
    }

    #[test]
    fn input_beyond_the_fifo_waits_in_the_socket() {
        let (com1, mut theirs) = com1();
        com1.write(INTERRUPT_ENABLE, ENABLE_RECEIVED);
        let sent: Vec<u8> = (0..200).collect();
        theirs.write_all(&sent).unwrap();
        let mut received = Vec::new();
        while received.len() < sent.len() {
            com1.receive();
            while com1.read(LINE_STATUS) & DATA_READY != 0 {
                received.push(com1.read(RECEIVER));
            }
        }
        assert_eq!(received, sent);
        assert!(interrupted(&com1));
        assert!(com1.drained.read().is_ok());
    }

    #[test]
    fn a_console_that_closes_its_end_is_told_apart() {
        let (com1, theirs) = com1();
        assert_eq!(com1.receive(), Input::Open);
        drop(theirs);
        assert_eq!(com1.receive(), Input::Closed);
    }

    #[test]
    fn received_data_is_named_until_it_is_read_and_then_the_empty_transmitter_once() {
        let (com1, mut theirs) = com1();
        com1.write(FIFO_CONTROL, FIFO_ON);
        com1.write(INTERRUPT_ENABLE, ENABLE_RECEIVED | ENABLE_EMPTY);
        assert_eq!(com1.read(INTERRUPT_ID), ID_EMPTY);
        assert_eq!(com1.read(INTERRUPT_ID), ID_NONE);
        com1.write(TRANSMITTER, b'x');
        theirs.write_all(b"abc").unwrap();
        assert_eq!(com1.receive(), Input::Open);
        assert_eq!(com1.read(INTERRUPT_ID), ID_RECEIVED);
        assert_eq!(com1.read(INTERRUPT_ID), ID_RECEIVED);
        assert_eq!([(); 3].map(|()| com1.read(RECEIVER)), *b"abc");
        assert_eq!(com1.read(INTERRUPT_ID), ID_EMPTY);
        assert_eq!(com1.read(INTERRUPT_ID), ID_NONE);
    }

    #[test]
    fn what_is_not_enabled_is_not_named() {
        let (com1, mut theirs) = com1();
        com1.write(INTERRUPT_ENABLE, ENABLE_RECEIVED | ENABLE_EMPTY);
        theirs.write_all(b"a").unwrap();
        assert_eq!(com1.receive(), Input::Open);
        assert_eq!(com1.read(INTERRUPT_ID), ID_RECEIVED);
        // The divisor latch, which is no interrupt enable register.
        com1.write(LINE_CONTROL, DIVISOR_LATCH);
        com1.write(INTERRUPT_ENABLE, 0);
        assert_eq!(com1.read(INTERRUPT_ID), ID_RECEIVED);
        com1.write(LINE_CONTROL, 0);
        com1.write(INTERRUPT_ENABLE, 0);
        assert_eq!(com1.read(INTERRUPT_ID), ID_NONE);
        com1.write(INTERRUPT_ENABLE, ENABLE_EMPTY);
        assert_eq!(com1.read(INTERRUPT_ID), ID_EMPTY);
        com1.write(INTERRUPT_ENABLE, ENABLE_RECEIVED);
        assert_eq!(com1.read(INTERRUPT_ID), ID_RECEIVED);
        com1.reset();
        assert_eq!(com1.read(INTERRUPT_ID), ID_NONE);
    }

    #[test]
    fn without_the_fifo_each_byte_interrupts_and_with_it_they_do_together() {
        for (control, expected) in [(0, [true; 3]), (FIFO_ON, [true, false, false])] {
            let (com1, mut theirs) = com1();
            com1.write(FIFO_CONTROL, control);
            com1.write(INTERRUPT_ENABLE, ENABLE_RECEIVED);
            theirs.write_all(b"abc").unwrap();
            assert_eq!(com1.receive(), Input::Open);
            let seen = [(); 3].map(|()| {
                let seen = interrupted(&com1);
                assert_eq!(com1.read(INTERRUPT_ID), ID_RECEIVED);
                let _ = com1.read(RECEIVER);
                seen
            });
            assert_eq!(seen, expected);
            assert!(!interrupted(&com1));
            assert_eq!(com1.read(INTERRUPT_ID), ID_NONE);
        }
    }
}
