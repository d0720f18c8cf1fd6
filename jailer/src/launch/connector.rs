//! The connector: a process that connects to someone else's back ends again, for the supervisor, which
//! may open no path. It knows the paths from the spec and takes no other from anyone; it is made
//! before root is left, so that a socket that the launcher could reach can be reached again.
//!
//! A path says nothing about who listens there: connecting succeeds on a listener that is about to
//! die. Whether the back end serves is found by the vmm, and where it does not, the supervisor asks
//! once more. There is no limit of time; the end of the supervisor is the connector's end.
//!
//! A TAP of the host's that vanished is opened again by its name, or made again on its bridge, for the same
//! reasons. (One that the launcher inherited from another network namespace stays lost: its name means
//! nothing here.)
//!
//! A relay of ours that lost its passt says so to the connector, which passes it on, and is told to start another.

use super::machine::{Backend, Device};
use super::net::line::{self, Lines};
use super::net::{self, Holder, NetError};
use super::spawn::of_back_end;
use crate::sandbox::caps;
use crate::tell::{chain, printable, tell};
use crate::wire::{Received, receive_message, send_message};
use crate::wire_fds::send_with_fds;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::{Pid, dup2_stdin, dup2_stdout};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use vm_spec::supervise::{FromConnector, ToConnector};

/// The wait before the second attempt; it doubles each time. A path on any file system may become a
/// socket, which no event tells of.
const FIRST_DELAY: Duration = Duration::from_millis(5);
/// The longest wait between attempts.
const LONGEST_DELAY: Duration = Duration::from_millis(200);

/// The same for a passt, each of which is a process that is started.
const LONGEST_PASST_DELAY: Duration = Duration::from_secs(5);

/// Between two TAPs for one NIC, or two passts: a process that says again and again that its is lost keeps no one
/// busy.
const TAP_DELAY: Duration = Duration::from_secs(1);

/// The devices that are connected again, in the order in which they are counted.
pub(crate) fn remotes(devices: &[Device]) -> impl Iterator<Item = &Device> {
    devices.iter().filter(|device| !device.is_ours())
}

/// What is opened again: someone else's back ends, then TAPs in the host's network and passts behind a relay.
fn reachable(devices: &[Device]) -> impl Iterator<Item = &Device> {
    let may_end = |device: &&Device| match &device.backend {
        Backend::Net(nic) => nic.is_of_the_host() || nic.has_relay(),
        _ => false,
    };
    remotes(devices).chain(devices.iter().filter(may_end))
}

/// Whether there is anything that the connector could do.
pub(crate) fn is_needed(devices: &[Device]) -> bool {
    reachable(devices).next().is_some()
}

/// Where the TAP of the device `id`, or its passt, is counted among these.
pub(crate) fn tap_place(devices: &[Device], id: &str) -> Option<u16> {
    let place = reachable(devices).position(|device| device.is_ours() && device.id == id);
    place.and_then(|place| u16::try_from(place).ok())
}

/// The connector, as the launcher sees it.
pub(crate) struct Connector {
    pub(crate) pid: Pid,
    /// The supervisor's end of its socket.
    pub(crate) socket: OwnedFd,
}

impl Connector {
    /// Starts it where it has something to do, with the lines to relays. The calling process must have one
    /// thread only.
    pub(crate) fn start(devices: &[Device], mut lines: Lines) -> Result<Option<Self>, NetError> {
        if !is_needed(devices) {
            return Ok(None);
        }
        let holder = Holder::start("connector", |post| {
            let reachable: Vec<Device> = reachable(devices).cloned().map(by_name).collect();
            let number = |(n, device): (u16, &Device)| Some((n, Relay::at(lines.remove(&device.id)?)));
            let mut relays: BTreeMap<_, _> = (0..).zip(&reachable).filter_map(number).collect();
            let kept = relays.values().map(|relay: &Relay| relay.line.as_raw_fd());
            leave_input_and_output().map_err(|e| NetError::Make("open /dev/null", e))?;
            let standard = [libc::STDIN_FILENO, libc::STDOUT_FILENO, libc::STDERR_FILENO];
            post.detach(&kept.chain(standard).collect::<Vec<_>>());
            let _ = nix::sys::prctl::set_no_new_privs();
            if let Ok(have) = caps::effective() {
                let _ = caps::keep_only(have & needed(&reachable));
            }
            serve(post.socket(), &reachable, &mut relays);
            Ok(())
        })?;
        let pid = holder.pid;
        Ok(holder.into_socket().map(|socket| Self { pid, socket }))
    }
}

/// Nothing takes the place of standard input and output: what is to go to a passt by a number of those would be
/// closed on its way.
fn leave_input_and_output() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    Ok(dup2_stdout(&null)?)
}

/// The capabilities, a bit each, without which something could not be opened again that the launcher could open.
fn needed(reachable: &[Device]) -> u64 {
    /// `linux/capability.h`.
    const CAP_DAC_OVERRIDE: u64 = 1 << 1;
    const CAP_NET_ADMIN: u64 = 1 << 12;
    let of = |device: &Device| match &device.backend {
        // passt becomes another user by itself.
        Backend::Net(nic) if nic.has_relay() => u64::MAX,
        Backend::Passt { .. } => u64::MAX,
        Backend::Net(_) => CAP_NET_ADMIN,
        Backend::External(_) => CAP_DAC_OVERRIDE,
        Backend::Disk(_) => 0,
    };
    reachable.iter().map(of).fold(0, |all, one| all | one)
}

/// Of one device that is wanted.
struct Attempt {
    at: Instant,
    delay: Duration,
    /// Why the last one came to nothing.
    why: String,
}

impl Attempt {
    fn at(at: Instant) -> Self {
        Self {
            at,
            delay: FIRST_DELAY,
            why: String::new(),
        }
    }

    /// It came to nothing, and the next follows; whether `why` is news.
    fn failed(&mut self, why: &str, device: &Device, now: Instant) -> bool {
        let longest = match &device.backend {
            Backend::Passt { .. } => LONGEST_PASST_DELAY,
            Backend::Net(nic) if nic.has_relay() => LONGEST_PASST_DELAY,
            _ => LONGEST_DELAY,
        };
        self.at = now + self.delay;
        self.delay = (2 * self.delay).min(longest);
        let news = self.why != why;
        if news {
            why.clone_into(&mut self.why);
        }
        news
    }
}

/// A relay that can lose its passt.
struct Relay {
    line: OwnedFd,
    /// It has said so, and is heard no more until it has another.
    waits: bool,
}

impl Relay {
    fn at(line: OwnedFd) -> Self {
        Self { line, waits: false }
    }
}

/// Serves until the supervisor is gone.
fn serve(supervisor: &OwnedFd, reachable: &[Device], relays: &mut BTreeMap<u16, Relay>) {
    let mut wanted = BTreeMap::new();
    let mut last_made = BTreeMap::new();
    loop {
        wait(
            supervisor,
            relays,
            wanted.values().map(|attempt: &Attempt| attempt.at).min(),
        );
        hear(supervisor, relays);
        loop {
            match receive_message(supervisor.as_fd()) {
                Ok(Received::Nothing) => break,
                Ok(Received::Message(_, ToConnector::Connect { device })) => {
                    let rested = last_made.get(&device).map(|last: &Instant| *last + TAP_DELAY);
                    let at = rested.unwrap_or_else(Instant::now);
                    wanted.entry(device).or_insert_with(|| Attempt::at(at));
                }
                Ok(Received::End) | Err(_) => return,
            }
        }
        let now = Instant::now();
        wanted.retain(|number, attempt| {
            let Some(device) = reachable.get(usize::from(*number)) else {
                return false;
            };
            if now < attempt.at {
                return true;
            }
            let opened = match open(device, relays.get_mut(number)) {
                Some(Ok(opened)) => opened,
                Some(Err(error)) => {
                    let why = printable(&chain(&error));
                    // Of someone else's back end the supervisor says that it is gone; whoever runs it knows why.
                    if attempt.failed(&why, device, now) && !matches!(device.backend, Backend::External(_)) {
                        tell(format_args!("bulkhead: {}: not back yet: {why}", device.id));
                    }
                    return true;
                }
                None => return false,
            };
            if !matches!(device.backend, Backend::External(_)) {
                last_made.insert(*number, now);
            }
            let answer = FromConnector::Connected { device: *number };
            // A supervisor that takes no answer is gone, which is heard next.
            send_with_fds(supervisor.as_fd(), 0, answer, &opened).is_err()
        });
    }
}

/// Passes on which relays have lost their passt.
fn hear(supervisor: &OwnedFd, relays: &mut BTreeMap<u16, Relay>) {
    relays.retain(|device, relay| {
        if relay.waits {
            return true;
        }
        let Ok(lost) = line::hear(&relay.line) else {
            return false;
        };
        relay.waits = lost;
        let message = FromConnector::Lost { device: *device };
        // A supervisor that takes no message is gone, which is heard next.
        !lost || send_message(supervisor.as_fd(), 0, message).is_ok()
    });
}

fn wait(supervisor: &OwnedFd, relays: &BTreeMap<u16, Relay>, next: Option<Instant>) {
    let timeout = next.map_or(PollTimeout::NONE, |at| {
        // One more millisecond, so that the time has come when poll returns.
        let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    });
    // Interrupted or not: everything is looked at next.
    let heard = relays.values().filter(|relay| !relay.waits);
    let mut fds: Vec<_> = [supervisor]
        .into_iter()
        .chain(heard.map(|relay| &relay.line))
        .map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN))
        .collect();
    let _ = poll(&mut fds, timeout);
}

/// `None`: it never can be.
fn open(device: &Device, relay: Option<&mut Relay>) -> Option<io::Result<Vec<OwnedFd>>> {
    let socket = match &device.backend {
        Backend::External(remote) => connect_at(&remote.socket),
        Backend::Passt { passt, publish, mtu } => {
            net::serve(&device.field, passt, publish, *mtu).map_err(io::Error::other)
        }
        Backend::Net(nic) if nic.has_relay() => {
            let relay = relay.filter(|relay| relay.waits)?;
            // One that has ended: its NIC was detached.
            line::hear(&relay.line).ok()?;
            let given = nic.start_passt_again(&device.field)?.map_err(io::Error::other);
            return Some(given.and_then(|passt| {
                line::give(&relay.line, &passt)?;
                relay.waits = false;
                Ok(Vec::new())
            }));
        }
        Backend::Net(nic) => return nic.open_again().map(|opened| opened.map_err(io::Error::other)),
        Backend::Disk(_) => return None,
    };
    Some(socket.and_then(|socket| Ok(of_back_end(socket)?.into())))
}

fn by_name(mut device: Device) -> Device {
    if let Backend::Net(nic) = device.backend {
        device.backend = Backend::Net(nic.by_name());
    }
    device
}

/// Without waiting for a listener whose queue is full.
fn connect_at(path: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::machine::Remote;
    use crate::launch::spawn::pair;
    use crate::wire_fds::receive_with_fds;
    use std::io::Read;
    use std::os::unix::net::UnixListener;
    use std::thread;
    use vm_spec::control::BACKEND_FDS;

    fn device(socket: &Path) -> Device {
        Device {
            id: "disk0".into(),
            field: "disk[0]".into(),
            slot: 1,
            device_type: 2,
            num_queues: None,
            config: Vec::new(),
            config_features: 0,
            backend: Backend::External(Remote::at(socket)),
        }
    }

    #[test]
    fn a_reason_is_told_once_and_the_attempts_are_ever_fewer() {
        let device = device(Path::new("/nowhere"));
        let now = Instant::now();
        let mut attempt = Attempt::at(now);
        let news: Vec<bool> = ["no such", "no such", "busy", "busy", "no such"]
            .map(|why| attempt.failed(why, &device, now))
            .into();
        assert_eq!(news, [true, false, true, false, true]);
        for _ in 0..20 {
            attempt.failed("busy", &device, now);
        }
        assert_eq!(attempt.at, now + LONGEST_DELAY);
    }

    #[test]
    fn a_second_lies_between_two_passts_for_one_nic() {
        let backend = Backend::Passt {
            passt: net::Passt::at(Path::new("/bin/true")),
            publish: Vec::new(),
            mtu: None,
        };
        let device = Device {
            backend,
            ..device(Path::new("/nowhere"))
        };
        let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
        let connector = thread::spawn(move || serve(&theirs, &[device], &mut BTreeMap::new()));
        let start = Instant::now();
        for _ in 0..2 {
            send_message(ours.as_fd(), 0, ToConnector::Connect { device: 0 }).unwrap();
            let mut ready = [PollFd::new(ours.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut ready, PollTimeout::from(20_000u16)), Ok(1));
            let (_, fds) = receive_with_fds::<FromConnector>(ours.as_fd()).unwrap();
            assert_eq!(fds.len(), BACKEND_FDS);
        }
        assert!(start.elapsed() >= TAP_DELAY);
        drop(ours);
        connector.join().unwrap();
    }

    #[test]
    fn a_listener_that_comes_late_is_found_and_the_supervisors_end_is_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("late.sock");
        let device = device(&path);
        let (ours, theirs) = pair(SockType::SeqPacket).unwrap();
        let connector = thread::spawn(move || serve(&theirs, &[device], &mut BTreeMap::new()));
        for number in [0, 7] {
            send_message(ours.as_fd(), 0, ToConnector::Connect { device: number }).unwrap();
        }
        // Nobody listens there: it goes on trying.
        let mut ready = [PollFd::new(ours.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ready, PollTimeout::from(50u8)), Ok(0));
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(poll(&mut ready, PollTimeout::from(5000u16)), Ok(1));
        let (message, mut fds) = receive_with_fds::<FromConnector>(ours.as_fd()).unwrap();
        assert!(matches!(
            message,
            Received::Message(0, FromConnector::Connected { device: 0 })
        ));
        // Behind the socket are both ends of a channel, which are nobody else's.
        assert_eq!(fds.len(), BACKEND_FDS);
        let [peer, mut requests] = [2, 1].map(|at| UnixStream::from(fds.remove(at)));
        drop(peer);
        assert_eq!(requests.read(&mut [0]).unwrap(), 0);
        drop(fds);
        let mut end = Vec::new();
        let (mut stream, _) = listener.accept().unwrap();
        assert_eq!(stream.read_to_end(&mut end).unwrap(), 0);
        drop(ours);
        connector.join().unwrap();
    }
}
