//! Orders to a device, over the socket that they come by.

use super::*;
use crate::image::{ImageError, Resolved};
use crate::settings::OnError;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use vm_memory::VolatileSlice;

const SIZE: u64 = 1 << 20;
/// What an answer that waits for no disk takes at most.
const AT_ONCE: Duration = Duration::from_secs(1);
const DEADLINE: Duration = Duration::from_secs(20);

/// Where growing takes until it is let go.
struct Slow {
    capacity: AtomicU64,
    /// Whether it has begun, and whether it may end.
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Slow {
    fn wait_until(&self, reached: impl Fn(&(bool, bool)) -> bool) {
        let state = self.state.lock().unwrap();
        let waited = self
            .changed
            .wait_timeout_while(state, DEADLINE, |state| !reached(state));
        assert!(!waited.unwrap().1.timed_out());
    }

    fn set(&self, change: impl FnOnce(&mut (bool, bool))) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }
}

impl Image for Slow {
    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }
    fn grow(&self, capacity: u64, _deadline: Option<Instant>) -> Result<(), ImageError> {
        if capacity < self.capacity() {
            return Err(ImageError::refused("size", "less than now"));
        }
        self.set(|state| state.0 = true);
        self.wait_until(|state| state.1);
        self.capacity.store(capacity, Ordering::Release);
        Ok(())
    }
    fn read_only(&self) -> bool {
        false
    }
    fn can_discard(&self) -> bool {
        true
    }
    fn discard_granularity(&self) -> u64 {
        4096
    }
    fn read(&self, _buffers: &[VolatileSlice<'_>], _offset: u64) -> io::Result<()> {
        Ok(())
    }
    fn write(&self, _buffers: &[VolatileSlice<'_>], _offset: u64) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _offset: u64, _length: u64, _unmap: bool) -> io::Result<()> {
        Ok(())
    }
    fn resolve_read(&self, _offset: u64, len: u64) -> io::Result<Resolved<'_>> {
        Ok(Resolved::Elsewhere { len })
    }
    fn resolve_write(&self, _offset: u64, len: u64) -> io::Result<Resolved<'_>> {
        Ok(Resolved::Elsewhere { len })
    }
    fn describe(&self) -> String {
        "slow to grow".to_owned()
    }
}

/// A device, its image, and who gives it orders.
struct Ordered {
    device: BlkDevice,
    image: &'static Slow,
    socket: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Ordered {
    /// With its own thread, which stays when the test is over.
    fn new() -> Self {
        let image = Box::leak(Box::new(Slow {
            capacity: AtomicU64::new(SIZE),
            state: Mutex::default(),
            changed: Condvar::new(),
        }));
        let (socket, theirs) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut device = BlkDevice {
            image,
            features: features(image, 1),
            settings: Settings {
                serial: Vec::new().into(),
                limits: vhost_daemon::Limits::default().limiter(),
                on_error: OnError::Report,
                trouble: Arc::default(),
            },
            counters: Counters::new(1),
            rings: Vec::new(),
            orders: Orders::new(Some(theirs.into())).unwrap(),
            growth: Some(Growth::new().unwrap()),
            flusher: None,
            grows_for: OrderNumber::default(),
            told: SIZE,
        };
        let (_, errands) = device.take_errands().pop().unwrap();
        thread::spawn(move || {
            errands();
        });
        Self {
            device,
            image,
            answers: BufReader::new(socket.try_clone().unwrap()),
            socket,
        }
    }

    /// Gives an order; whether the driver is to be told of what it changed.
    fn order(&mut self, line: &str) -> bool {
        writeln!(self.socket, "{line}").unwrap();
        let begin = Instant::now();
        let changed = self.device.config_changed();
        assert!(begin.elapsed() < AT_ONCE, "{line}: the session waits");
        changed
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line
    }

    /// Waits until the device's own thread has done something.
    fn wait(&self) {
        let mut fds = [PollFd::new(
            self.device.errand_source().unwrap(),
            PollFlags::POLLIN,
        )];
        let limit = PollTimeout::try_from(DEADLINE).unwrap();
        assert_eq!(poll(&mut fds, limit), Ok(1), "it never ends");
    }

    fn told_capacity(&self) -> u64 {
        u64::from_le_bytes(self.device.config()[..8].try_into().unwrap()) * SECTOR
    }
}

#[test]
fn a_disk_that_is_slow_to_grow_keeps_nobody_waiting() {
    let mut ordered = Ordered::new();
    assert!(!ordered.order(&format!("1 size {}", 2 * SIZE)));
    ordered.image.wait_until(|state| state.0);
    let begin = Instant::now();
    let features = ordered.device.features();
    assert_eq!(features & (1 << VIRTIO_BLK_F_FLUSH), 1 << VIRTIO_BLK_F_FLUSH);
    assert_eq!(ordered.told_capacity(), SIZE, "it is not that long yet");
    assert!(begin.elapsed() < AT_ONCE);
    assert!(!ordered.order(&format!("2 size {}", 3 * SIZE)));
    assert_eq!(ordered.answer(), "2 error: another order to grow is under way\n");
    assert!(!ordered.order("metrics"));
    while ordered.answer() != "# EOF\n" {}
    ordered.image.set(|state| state.1 = true);
    ordered.wait();
    assert!(ordered.device.config_changed(), "the driver is told");
    assert_eq!(ordered.answer(), "1 ok\n");
    assert_eq!(ordered.told_capacity(), 2 * SIZE);
    assert!(ordered.device.errand_source().is_none(), "nothing is under way");
    // What is refused changes nothing, and what follows is carried out.
    assert!(!ordered.order("size 512"));
    ordered.wait();
    assert!(!ordered.device.config_changed());
    assert!(ordered.answer().starts_with("error: "));
    let mut changed = ordered.order(&format!("size {}", 3 * SIZE));
    ordered.wait();
    changed |= ordered.device.config_changed();
    assert!(changed, "the driver is told");
    assert_eq!(ordered.answer(), "ok\n");
}

#[test]
fn the_end_of_a_session_waits_for_what_grows() {
    let mut ordered = Ordered::new();
    ordered.order(&format!("size {}", 2 * SIZE));
    ordered.image.wait_until(|state| state.0);
    thread::scope(|scope| {
        let Ordered { device, image, .. } = &mut ordered;
        let flush = scope.spawn(|| device.flush());
        image.set(|state| state.1 = true);
        flush.join().unwrap().unwrap();
    });
    assert_eq!(ordered.answer(), "ok\n");
    assert_eq!(ordered.told_capacity(), 2 * SIZE);
}
