//! The messages that this crate handles itself, over a real socket.

mod rings;

use super::serve::messages;
use super::{End, Session};
use crate::memory::Sealing;
use crate::ring::InflightRegion;
use crate::signals::Termination;
use crate::{ConfigError, Device, QueueHandler};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

const REPLY_ACK: u64 = 1 << 3;
const INFLIGHT: u64 = 1 << 12;

/// A device with no queue whose configuration changes when its eventfd is signalled.
struct Fake {
    change: EventFd,
    /// Whether it is a thread of the device's own that signals it.
    aside: bool,
    resets: Arc<Mutex<u32>>,
}

impl Device for Fake {
    fn features(&self) -> u64 {
        0
    }
    fn set_features(&mut self, _features: u64) {}
    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4]
    }
    fn write_config(&mut self, _offset: u32, _data: &[u8]) -> Result<(), ConfigError> {
        Err(ConfigError)
    }
    fn records_inflight(&self) -> bool {
        true
    }
    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        Vec::new()
    }
    fn config_source(&self) -> Option<BorrowedFd<'_>> {
        (!self.aside).then(|| self.change.as_fd())
    }
    fn errand_source(&self) -> Option<BorrowedFd<'_>> {
        self.aside.then(|| self.change.as_fd())
    }
    fn config_changed(&mut self) -> bool {
        self.change.read().is_ok()
    }
    fn reset(&mut self) {
        *self.resets.lock().unwrap() += 1;
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A front end, and a thread that serves it.
struct Front {
    socket: UnixStream,
    change: OwnedFd,
    resets: Arc<Mutex<u32>>,
    server: JoinHandle<Result<End, String>>,
}

impl Front {
    fn new() -> Self {
        Self::told_aside(false)
    }

    fn told_aside(aside: bool) -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let change = EventFd::new().unwrap();
        let signal = change.as_fd().try_clone_to_owned().unwrap();
        let resets = Arc::new(Mutex::new(0));
        let device = Box::new(Fake {
            change,
            aside,
            resets: Arc::clone(&resets),
        });
        let inflight = InflightRegion::create(2, 128).unwrap();
        let session = Session::new(device, Vec::new(), Sealing::Required, Some(inflight));
        let session = Arc::new(Mutex::new(session));
        let server = std::thread::spawn(move || {
            let termination = Termination::new().unwrap();
            messages(&session, theirs, &termination).map_err(|error| error.to_string())
        });
        let mut front = Self {
            socket,
            change: signal,
            resets,
            server,
        };
        assert_eq!(front.ask(1, 0, &[]).len(), 8);
        front.send(16, 0, &(REPLY_ACK | INFLIGHT).to_le_bytes(), &[]);
        front
    }

    fn send(&mut self, request: u32, flags: u32, payload: &[u8], fds: &[RawFd]) {
        let mut message = Vec::from(request.to_le_bytes());
        message.extend((1 | flags).to_le_bytes());
        message.extend((payload.len() as u32).to_le_bytes());
        message.extend(payload);
        let control = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[] } else { &control[..] };
        let vectors = [IoSlice::new(&message)];
        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &vectors,
            control,
            MsgFlags::empty(),
            None,
        )
        .unwrap();
    }

    fn ask(&mut self, request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        self.send(request, flags, payload, &[]);
        let (code, body) = receive(&mut self.socket);
        assert_eq!(code, request);
        body
    }

    /// A channel for the back end's requests: the end that they are read from, and the one that is given.
    fn channel(&mut self) -> (UnixStream, UnixStream) {
        let (mine, theirs) = UnixStream::pair().unwrap();
        mine.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        self.send(21, 8, &[0; 8], &[theirs.as_raw_fd()]);
        assert_eq!(receive(&mut self.socket), (21, Vec::from(0u64.to_le_bytes())));
        (mine, theirs)
    }

    /// The device's configuration changes.
    fn change(&self) {
        nix::unistd::write(&self.change, &1u64.to_ne_bytes()).unwrap();
    }

    /// Hangs up.
    fn end(self) -> Result<End, String> {
        drop(self.socket);
        self.server.join().unwrap()
    }
}

fn receive(socket: &mut UnixStream) -> (u32, Vec<u8>) {
    let mut header = [0; 12];
    socket.read_exact(&mut header).unwrap();
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let mut body = vec![0; word(8) as usize];
    socket.read_exact(&mut body).unwrap();
    (word(0), body)
}

#[test]
fn the_status_is_kept_and_zero_resets() {
    let mut front = Front::new();
    assert_eq!(front.ask(39, 8, &15u64.to_le_bytes()), 0u64.to_le_bytes());
    assert_eq!(front.ask(40, 0, &[]), 15u64.to_le_bytes());
    assert_eq!(
        front.ask(39, 8, &0x100u64.to_le_bytes()),
        1u64.to_le_bytes(),
        "unknown bits"
    );
    assert_eq!(*front.resets.lock().unwrap(), 0);
    assert_eq!(front.ask(39, 8, &0u64.to_le_bytes()), 0u64.to_le_bytes());
    assert_eq!(*front.resets.lock().unwrap(), 1);
    assert_eq!(front.end(), Ok(End::Disconnected));
}

#[test]
fn messages_that_come_together_are_told_apart() {
    let mut front = Front::new();
    let mut two = Vec::new();
    for _ in 0..2 {
        two.extend(40u32.to_le_bytes());
        two.extend(1u32.to_le_bytes());
        two.extend(0u32.to_le_bytes());
    }
    front.socket.write_all(&two).unwrap();
    assert_eq!(receive(&mut front.socket), (40, vec![0; 8]));
    assert_eq!(receive(&mut front.socket), (40, vec![0; 8]));
    assert_eq!(front.end(), Ok(End::Disconnected));
}

#[test]
fn a_configuration_change_reaches_the_front_end() {
    for aside in [false, true] {
        let mut front = Front::told_aside(aside);
        let (mut mine, _theirs) = front.channel();
        front.change();
        assert_eq!(receive(&mut mine), (2, Vec::new()));
        assert_eq!(front.end(), Ok(End::Disconnected));
    }
}

#[test]
fn a_configuration_change_that_nobody_hears_of_ends_no_session() {
    let mut front = Front::new();
    let (mine, _theirs) = front.channel();
    drop(mine);
    for _ in 0..2 {
        // The change is handled ahead of the question.
        front.change();
        assert_eq!(front.ask(40, 0, &[]), 0u64.to_le_bytes());
    }
    let (mut mine, mut theirs) = front.channel();
    theirs.set_nonblocking(true).unwrap();
    let full = std::iter::from_fn(|| theirs.write(&[0]).ok()).count();
    front.change();
    assert_eq!(front.ask(40, 0, &[]), 0u64.to_le_bytes());
    // Once there is room, it hears again.
    mine.read_exact(&mut vec![0; full]).unwrap();
    front.change();
    assert_eq!(receive(&mut mine), (2, Vec::new()));
    assert_eq!(front.end(), Ok(End::Disconnected));
}

#[test]
fn the_in_flight_region_comes_in_both_lengths_in_use() {
    let mut front = Front::new();
    let mut wanted = [0; 24];
    wanted[16..18].copy_from_slice(&2u16.to_le_bytes());
    wanted[18..20].copy_from_slice(&64u16.to_le_bytes());
    for length in [20, 24] {
        let answer = front.ask(31, 0, &wanted[..length]);
        assert_eq!(answer.len(), length);
        let size = u64::from_le_bytes(answer[..8].try_into().unwrap());
        assert_eq!(size, 2 * (16 + 64 * 16u64).next_multiple_of(64));
    }
    wanted[16..18].copy_from_slice(&3u16.to_le_bytes());
    front.send(31, 0, &wanted, &[]);
    assert!(front.end().is_err(), "more queues than there are");
}

#[test]
fn requests_stay_in_flight_only_where_there_is_a_record_of_them() {
    const STAY: u64 = 1 << 20;
    let mut front = Front::new();
    let answers = [REPLY_ACK | STAY, REPLY_ACK | INFLIGHT | STAY]
        .map(|features| front.ask(16, 8, &features.to_le_bytes()));
    assert_eq!(answers, [1u64, 0].map(u64::to_le_bytes));
    assert_eq!(front.end(), Ok(End::Disconnected));
}

#[test]
fn malformed_messages_end_the_session() {
    for (request, payload) in [
        (40, &[0u8; 8][..]),
        (39, &[0; 4]),
        (31, &[]),
        (32, &[0; 64]),
        (32, &[0; 8]),
    ] {
        let mut front = Front::new();
        front.send(request, 0, payload, &[]);
        assert!(front.end().is_err(), "{request}");
    }
}

#[test]
fn a_front_end_that_takes_no_answers_is_not_waited_for() {
    let mut front = Front::new();
    front
        .socket
        .set_write_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let question = [1u32, 1, 0].map(u32::to_le_bytes).concat();
    // Until the session is over, which takes its deadline.
    let error = loop {
        if let Err(error) = front.socket.write_all(&question) {
            break error;
        }
    };
    assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "the session waits");
    assert!(front.server.join().unwrap().is_err());
}
