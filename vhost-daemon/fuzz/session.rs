//! A session whose front end lies.

use super::guest::sealed;
use crate::memory::Sealing;
use crate::ring::{InflightRegion, Ring, RingFault};
use crate::session::{Session, messages};
use crate::signals::Termination;
use crate::worker::Worker;
use crate::{ConfigError, Device, QueueHandler, Wait};
use arbitrary::Unstructured;
use jailer::sandbox::{Role, SeccompMode};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::{IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

const QUEUES: usize = 2;
const MOST_MESSAGES: usize = 24;
/// For the answers to what was sent; a front end that has sent half a message gets none.
const PATIENCE: Duration = Duration::from_millis(50);

/// Completes everything unread.
struct Sink;

impl QueueHandler for Sink {
    fn start(&mut self, _features: u64) {}

    fn process(&mut self, ring: &mut Ring) -> Result<Wait, RingFault> {
        while let Some(chain) = ring.pop()? {
            ring.complete(chain, 0);
        }
        Ok(Wait::AVAILABLE)
    }
}

struct Fake;

impl Device for Fake {
    fn features(&self) -> u64 {
        0xFF
    }
    fn set_features(&mut self, _features: u64) {}
    fn config(&self) -> Vec<u8> {
        vec![7; 60]
    }
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), ConfigError> {
        assert!(
            offset as usize + data.len() <= 60,
            "outside the configuration space"
        );
        Ok(())
    }
    fn records_inflight(&self) -> bool {
        true
    }
    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        (0..QUEUES)
            .map(|_| Box::new(Sink) as Box<dyn QueueHandler>)
            .collect()
    }
    fn reset(&mut self) {}
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Lives as long as the process, as a real one does: the next front end finds it reset.
fn shared() -> &'static Arc<Mutex<Session>> {
    static SESSION: OnceLock<Arc<Mutex<Session>>> = OnceLock::new();
    SESSION.get_or_init(|| {
        let workers =
            Worker::spawn_all(&mut Fake, Role::Disk, SeccompMode::Off, Duration::ZERO).expect("workers");
        let region = InflightRegion::create(QUEUES as u16, 64).expect("a region");
        let session = Session::new(Box::new(Fake), workers, Sealing::Required, Some(region));
        Arc::new(Mutex::new(session))
    })
}

/// What a front end may send along: good memory, bad memory, an eventfd, no memory at all.
fn descriptors() -> &'static [OwnedFd; 4] {
    static DESCRIPTORS: OnceLock<[OwnedFd; 4]> = OnceLock::new();
    DESCRIPTORS.get_or_init(|| {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("an eventfd");
        let (pipe, _) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).expect("a pipe");
        [sealed(0x1_0000), event.into(), sealed(0x1000), pipe]
    })
}

/// Sends messages whose code, size, payload and descriptors are the input's, then hangs up. The
/// session ends, the queues stop, and the next front end is served.
pub fn session(input: &[u8]) {
    let (front, back) = UnixStream::pair().expect("a socket pair");
    let session = Arc::clone(shared());
    let server = std::thread::spawn(move || {
        let termination = Termination::new().expect("a signalfd");
        let _ = messages(&session, back, &termination);
        let mut session = session.lock().expect("no panic");
        session.end().expect("a session winds down");
    });
    let mut input = Unstructured::new(input);
    for _ in 0..MOST_MESSAGES {
        if send(&front, &mut input).is_none() {
            break;
        }
    }
    settle(&front);
    let _ = front.shutdown(Shutdown::Both);
    drop(front);
    server.join().expect("the server ends");
}

/// One message: code, flags, descriptors, length of the payload, payload.
fn send(front: &UnixStream, input: &mut Unstructured<'_>) -> Option<()> {
    if input.is_empty() {
        return None;
    }
    let [code, flags, which] = input.arbitrary::<[u8; 3]>().ok()?;
    let length = usize::from(input.arbitrary::<u8>().ok()?);
    let payload = input.bytes(length.min(input.len())).ok()?;
    // One in sixteen lies about its size.
    let size = match flags >> 4 {
        15 => input.arbitrary::<u32>().ok()?,
        _ => payload.len() as u32,
    };
    let mut message = Vec::from(u32::from(code % 48).to_le_bytes());
    message.extend((1 ^ u32::from(flags & 15)).to_le_bytes());
    message.extend(size.to_le_bytes());
    message.extend(payload);
    let count = usize::from(which & 7);
    let fds: Vec<RawFd> = (0..count)
        .map(|at| descriptors()[(usize::from(which >> 3) + at) % 4].as_raw_fd())
        .collect();
    let control = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[] } else { &control[..] };
    let vectors = [IoSlice::new(&message)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(front.as_raw_fd(), &vectors, control, flags, None)
        .ok()
        .map(drop)
}

/// Waits until what was sent is answered: a last question is, unless it stands behind half a message.
fn settle(front: &UnixStream) {
    const GET_QUEUE_NUM: u32 = 17;
    let question = [GET_QUEUE_NUM, 1, 0].map(u32::to_le_bytes).concat();
    let _ = front.set_read_timeout(Some(PATIENCE));
    if nix::unistd::write(front, &question).is_err() {
        return;
    }
    let mut answers = Vec::new();
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = (&mut &*front).read(&mut bytes) {
        answers.extend_from_slice(&bytes[..count]);
        if answers.ends_with(&(QUEUES as u64).to_le_bytes()) {
            return;
        }
    }
}
