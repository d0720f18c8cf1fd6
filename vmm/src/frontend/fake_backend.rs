//! A scripted back end on the other end of a socketpair, in a thread of its own.

use super::message::{HEADER_SIZE, Header};
use super::{BackendSockets, Deadlines, MemoryTable, SessionOptions, new_event};
use crate::memory::RamRegion;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as Protocol};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use zerocopy::{FromZeros, IntoBytes};

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const PROTOCOL: u64 = 1 << 30;

/// Everything our own back ends speak.
pub(crate) fn all_protocol() -> u64 {
    (Protocol::MQ
        | Protocol::REPLY_ACK
        | Protocol::CONFIG
        | Protocol::BACKEND_REQ
        | Protocol::INFLIGHT_SHMFD
        | Protocol::RESET_DEVICE
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::GET_VRING_BASE_INFLIGHT)
        .bits()
}

/// How the back end departs from the protocol at a request.
pub(crate) enum Quirk {
    Normal,
    /// No answer.
    Silent,
    /// No answer until the gate opens.
    Wait(Gate),
    /// These bytes.
    Raw(Vec<u8>),
    /// This payload in a proper reply.
    Payload(Vec<u8>),
    /// This payload and these descriptors in a proper reply.
    Answer(Vec<u8>, Vec<OwnedFd>),
    /// End of file.
    Close,
}

/// Shut until it is opened.
#[derive(Clone, Default)]
pub(crate) struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub(crate) fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let open = self.0.0.lock().unwrap();
        let timeout = Duration::from_secs(20);
        drop(self.0.1.wait_timeout_while(open, timeout, |open| !*open).unwrap());
    }
}

type QuirkOf = Box<dyn FnMut(FrontendReq) -> Quirk + Send>;

/// What the back end is.
pub(crate) struct Script {
    pub(crate) features: u64,
    pub(crate) protocol: u64,
    pub(crate) queues: u64,
    pub(crate) config: Arc<Mutex<Vec<u8>>>,
    pub(crate) bases: Vec<u32>,
    pub(crate) quirk: QuirkOf,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            features: VERSION_1 | PROTOCOL,
            protocol: all_protocol(),
            queues: 4,
            config: Arc::default(),
            bases: vec![0; 8],
            quirk: Box::new(|_| Quirk::Normal),
        }
    }
}

impl Script {
    pub(crate) fn quirk_at(request: FrontendReq, mut quirk: impl FnMut() -> Quirk + Send + 'static) -> Self {
        Self {
            quirk: Box::new(move |at| if at == request { quirk() } else { Quirk::Normal }),
            ..Self::default()
        }
    }
}

/// A request as it came.
pub(crate) struct Seen {
    pub(crate) request: FrontendReq,
    pub(crate) payload: Vec<u8>,
    pub(crate) fd: Option<File>,
}

#[derive(Default)]
struct Log {
    seen: Mutex<Vec<Seen>>,
    changed: Condvar,
}

pub(crate) struct FakeBackend {
    log: Arc<Log>,
    stream: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl FakeBackend {
    /// The back end, and the front end's sockets.
    pub(crate) fn start(script: Script) -> (Self, BackendSockets) {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let log = Arc::new(Log::default());
        let thread = std::thread::spawn({
            let (log, stream) = (log.clone(), ours.try_clone().unwrap());
            move || {
                let _ = serve(&stream, script, &log);
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        });
        let fake = Self {
            log,
            stream: ours,
            thread: Some(thread),
        };
        (fake, sockets(theirs))
    }

    /// Dies.
    pub(crate) fn kill(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Bytes that nobody asked for.
    pub(crate) fn babble(&self) {
        (&self.stream).write_all(&[7; 20]).unwrap();
    }

    /// All requests so far.
    pub(crate) fn requests(&self) -> Vec<FrontendReq> {
        self.log
            .seen
            .lock()
            .unwrap()
            .iter()
            .map(|seen| seen.request)
            .collect()
    }

    /// Waits until `request` has come `count` times, then looks at the last.
    pub(crate) fn look<T>(&self, request: FrontendReq, count: usize, look: impl Fn(&Seen) -> T) -> T {
        let came = |seen: &[Seen]| seen.iter().filter(|seen| seen.request == request).count();
        let seen = self.log.seen.lock().unwrap();
        let limit = Duration::from_secs(10);
        let (seen, timeout) = self
            .log
            .changed
            .wait_timeout_while(seen, limit, |seen| came(seen) < count)
            .unwrap();
        assert!(!timeout.timed_out(), "{request:?} did not come {count} times");
        look(seen.iter().rfind(|seen| seen.request == request).unwrap())
    }

    /// A copy of the fd of the last `request`.
    pub(crate) fn fd(&self, request: FrontendReq, count: usize) -> File {
        self.look(request, count, |seen| {
            seen.fd.as_ref().unwrap().try_clone().unwrap()
        })
    }

    /// A copy of the fd of the last `request` for a queue.
    pub(crate) fn fd_of(&self, request: FrontendReq, queue: u8) -> File {
        let seen = self.log.seen.lock().unwrap();
        let of = |seen: &&Seen| seen.request == request && seen.payload[0] == queue;
        let fd = seen.iter().rfind(of).unwrap().fd.as_ref();
        fd.unwrap().try_clone().unwrap()
    }
}

impl Drop for FakeBackend {
    fn drop(&mut self) {
        self.kill();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(stream: &UnixStream, mut script: Script, log: &Log) -> std::io::Result<()> {
    loop {
        let mut header = Header::new_zeroed();
        let (count, fd) = stream
            .recv_with_fd(header.as_mut_bytes())
            .map_err(std::io::Error::from)?;
        if count != HEADER_SIZE {
            return Ok(());
        }
        let mut payload = vec![0; header.size as usize];
        (&*stream).read_exact(&mut payload)?;
        let request = FrontendReq::try_from(header.request).unwrap();
        let answer = answer(&script, request, &payload);
        log.seen.lock().unwrap().push(Seen { request, payload, fd });
        log.changed.notify_all();
        let answer = match (script.quirk)(request) {
            Quirk::Normal => answer,
            Quirk::Silent => continue,
            Quirk::Wait(gate) => {
                gate.pass();
                answer
            }
            Quirk::Payload(payload) => Some((payload, None)),
            Quirk::Answer(payload, fds) => {
                let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
                let message = [header.reply(payload.len()).as_bytes(), &payload].concat();
                let sent = stream.send_with_fds(&[message.as_slice()], &fds);
                sent.map_err(std::io::Error::from)?;
                continue;
            }
            Quirk::Raw(bytes) => {
                (&*stream).write_all(&bytes)?;
                continue;
            }
            Quirk::Close => return Ok(()),
        };
        let acknowledged = header.wants_reply().then(|| (vec![0; 8], None));
        if let Some((payload, fd)) = answer.or(acknowledged) {
            let message = [header.reply(payload.len()).as_bytes(), &payload].concat();
            let fd: Option<i32> = fd.as_ref().map(|fd: &OwnedFd| fd.as_raw_fd());
            stream
                .send_with_fds(&[message.as_slice()], fd.as_slice())
                .map_err(std::io::Error::from)?;
        }
    }
}

fn answer(script: &Script, request: FrontendReq, payload: &[u8]) -> Option<(Vec<u8>, Option<OwnedFd>)> {
    let number = |value: u64| Some((value.to_ne_bytes().to_vec(), None));
    match request {
        FrontendReq::GET_FEATURES => number(script.features),
        FrontendReq::GET_PROTOCOL_FEATURES => number(script.protocol),
        FrontendReq::GET_QUEUE_NUM => number(script.queues),
        FrontendReq::GET_MAX_MEM_SLOTS => number(32),
        FrontendReq::GET_CONFIG => {
            let config = script.config.lock().unwrap();
            let fits = config.len() == payload.len() - 12;
            let space = if fits { &config[..] } else { &[] };
            Some((
                if fits {
                    [&payload[..12], space].concat()
                } else {
                    Vec::new()
                },
                None,
            ))
        }
        FrontendReq::GET_VRING_BASE => {
            let index = payload[0];
            let base = script.bases[usize::from(index)].to_ne_bytes();
            Some(([&payload[..4], &base].concat(), None))
        }
        FrontendReq::GET_INFLIGHT_FD => {
            let mut reply = payload.to_vec();
            reply[..8].copy_from_slice(&4096u64.to_ne_bytes());
            Some((reply, Some(memfd(4096, SealFlag::F_SEAL_SHRINK))))
        }
        _ => None,
    }
}

pub(crate) fn memfd(size: u64, seals: SealFlag) -> OwnedFd {
    let fd = memfd_create(c"test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let file = File::from(fd);
    file.set_len(size).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    file.into()
}

/// 1 MiB of guest memory at 0 and 1 MiB at 4 GiB. The host addresses are made up: nothing here
/// follows them.
pub(crate) fn memory() -> Arc<MemoryTable> {
    let region = |guest_address, memfd_offset| RamRegion {
        guest_address,
        size: 1 << 20,
        memfd_offset,
        host_address: 0x7000_0000_0000 + guest_address,
    };
    let memfd = memfd(2 << 20, SealFlag::F_SEAL_SHRINK);
    Arc::new(MemoryTable::new(
        memfd,
        vec![region(0, 0), region(1 << 32, 1 << 20)],
    ))
}

/// Short enough for a test, long enough for a busy machine.
pub(crate) fn deadlines() -> Deadlines {
    Deadlines {
        first_answer: Duration::from_secs(5),
        alive: Duration::from_secs(5),
        step: Duration::from_secs(5),
        drain: Duration::from_secs(10),
        end: Duration::from_secs(10),
    }
}

/// A back end's, with a new channel for its own requests.
pub(crate) fn sockets(socket: UnixStream) -> BackendSockets {
    let (requests, peer) = UnixStream::pair().unwrap();
    [socket, requests, peer].map(OwnedFd::from).into()
}

pub(crate) fn options() -> SessionOptions {
    SessionOptions {
        memory: memory(),
        deadlines: deadlines(),
        cancel: new_event().unwrap(),
        ours: true,
    }
}
