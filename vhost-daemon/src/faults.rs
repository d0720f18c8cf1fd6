//! Deaths and hangs at chosen moments, for tests. In a build without the feature `faults`, which
//! is every build that is shipped, all of this is empty and the trigger does not exist.
//!
//! The name of a fault comes with the disk's serial number, which is its id in the VM's
//! description: `bad.publish-index` dies between writing the used index and clearing the
//! in-flight record, and so does each successor.

/// The moments, in the order of a request's life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// A chain is to be taken.
    BeforeTake,
    /// It is recorded as in flight.
    AfterTake,
    /// Its I/O is to begin.
    BeforeSubmit,
    /// Its I/O is done, or has begun.
    AfterSubmit,
    /// It is to be completed.
    BeforeComplete,
    /// It waits to be published.
    AfterComplete,
    /// The batch is to be published.
    BeforePublish,
    /// The batch is linked in the in-flight record.
    PublishLinked,
    /// The used elements are written.
    PublishElements,
    /// The used index is written.
    PublishIndex,
    /// The in-flight record is clear.
    AfterPublish,
    /// The guest is to be interrupted, if it wants to be.
    BeforeNotify,
    /// It was.
    AfterNotify,
    /// A flush is to begin.
    Flush,
}

#[cfg(not(feature = "faults"))]
mod nothing {
    /// Does nothing.
    #[inline(always)]
    pub fn point(_: super::Step) {}

    /// Does nothing.
    #[inline(always)]
    pub fn arm(_: &[u8]) {}

    /// Fails nothing.
    #[inline(always)]
    pub fn write() -> std::io::Result<()> {
        Ok(())
    }

    /// Fails nothing.
    #[inline(always)]
    pub fn ring() -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(not(feature = "faults"))]
pub use nothing::{arm, point, ring, write};

#[cfg(feature = "faults")]
mod armed {
    #![expect(unsafe_code, reason = "the death of the process")]

    use super::Step;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant, SystemTime};

    /// Every step that a process can die at, by name.
    const DEATHS: [(&str, Step); 13] = [
        ("take-before", Step::BeforeTake),
        ("take-after", Step::AfterTake),
        ("submit-before", Step::BeforeSubmit),
        ("submit-after", Step::AfterSubmit),
        ("complete-before", Step::BeforeComplete),
        ("complete-after", Step::AfterComplete),
        ("publish-before", Step::BeforePublish),
        ("publish-linked", Step::PublishLinked),
        ("publish-elements", Step::PublishElements),
        ("publish-index", Step::PublishIndex),
        ("publish-after", Step::AfterPublish),
        ("notify-before", Step::BeforeNotify),
        ("notify-after", Step::AfterNotify),
    ];
    /// A process lives at least this long, so that it counts as one that had served.
    const LEAST_LIFE: Duration = Duration::from_millis(150);
    /// At most so much longer, at random.
    const MORE_LIFE: u32 = 100_000_000;

    enum Fault {
        /// Dies at the first such step after that time.
        Die(Step, Instant),
        /// The first thread that comes to such a step after that time spins.
        Spin(Step, Instant, AtomicBool),
        /// The first flush takes that long.
        SlowFlush(Duration, AtomicBool),
        /// Writes fail from the first time to the second.
        IoError(Instant, Instant),
        /// The host's io_uring takes nothing.
        Ring,
        /// It takes nothing the first time.
        BusyRing(AtomicBool),
    }

    static FAULT: OnceLock<Fault> = OnceLock::new();

    /// Takes what `name`, a disk's serial number, asks for.
    pub fn arm(name: &[u8]) {
        let Some(name) = std::str::from_utf8(name)
            .ok()
            .and_then(|name| name.strip_prefix("bad."))
        else {
            return;
        };
        let now = Instant::now();
        let random = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.subsec_nanos());
        let life = LEAST_LIFE + Duration::from_nanos((random % MORE_LIFE).into());
        let death = DEATHS.iter().find(|(step, _)| *step == name);
        let fault = match (death, name) {
            (Some((_, step)), _) => Fault::Die(*step, now + life),
            (None, "spin") => Fault::Spin(
                Step::BeforeSubmit,
                now + Duration::from_secs(1),
                AtomicBool::new(false),
            ),
            (None, "spin-flush") => Fault::Spin(Step::Flush, now, AtomicBool::new(false)),
            (None, "io-error") => Fault::IoError(now + Duration::from_secs(1), now + Duration::from_secs(3)),
            (None, "ring") => Fault::Ring,
            (None, "busy-ring") => Fault::BusyRing(AtomicBool::new(false)),
            (None, "slow-flush") => Fault::SlowFlush(Duration::from_secs(10), AtomicBool::new(false)),
            (None, "flush-2s") => Fault::SlowFlush(Duration::from_secs(2), AtomicBool::new(false)),
            _ => return,
        };
        let _ = FAULT.set(fault);
    }

    /// Fails as a broken disk does, if this is the moment.
    ///
    /// # Errors
    /// EIO.
    pub fn write() -> std::io::Result<()> {
        match FAULT.get() {
            Some(Fault::IoError(from, to)) if (*from..*to).contains(&Instant::now()) => {
                Err(nix::errno::Errno::EIO.into())
            }
            _ => Ok(()),
        }
    }

    /// Fails as an io_uring does that the host takes away, or that can take nothing now.
    ///
    /// # Errors
    /// ENXIO; EAGAIN.
    pub fn ring() -> std::io::Result<()> {
        match FAULT.get() {
            Some(Fault::Ring) => Err(nix::errno::Errno::ENXIO.into()),
            Some(Fault::BusyRing(done)) if !done.swap(true, Ordering::Relaxed) => {
                Err(nix::errno::Errno::EAGAIN.into())
            }
            _ => Ok(()),
        }
    }

    /// Does what was asked for, if this is the moment.
    pub fn point(step: Step) {
        match FAULT.get() {
            Some(Fault::Die(wanted, at)) if *wanted == step && Instant::now() >= *at => {
                // SAFETY: an invalid instruction ends the process, at once: no handler is set.
                unsafe { core::arch::asm!("ud2", options(noreturn)) }
            }
            Some(Fault::Spin(wanted, at, begun))
                if *wanted == step && Instant::now() >= *at && !begun.swap(true, Ordering::Relaxed) =>
            {
                loop {
                    std::hint::spin_loop();
                }
            }
            Some(Fault::SlowFlush(time, done))
                if step == Step::Flush && !done.swap(true, Ordering::Relaxed) =>
            {
                let end = Instant::now() + *time;
                while let Some(left) = end.checked_duration_since(Instant::now()) {
                    // The policy has no call to sleep with but this.
                    let _ = nix::poll::ppoll(&mut [], Some(left.into()), None);
                }
                tracing::warn!("a flush was {time:?} slower");
            }
            _ => {}
        }
    }
}

#[cfg(feature = "faults")]
pub use armed::{arm, point, ring, write};
