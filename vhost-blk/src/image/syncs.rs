//! A flush that failed is not forgotten.
//!
//! Linux reports a write-back that failed once for each open file, and takes the pages for clean from then
//! on (fsync(2)): the next flush succeeds and says nothing of what was lost. All queues and all barriers
//! share one open file, and whichever of them is told, no later flush may cover what it lost.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The flushes of one file.
#[derive(Debug, Default)]
pub(super) struct Syncs {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// One has failed, here or in a predecessor; stays so.
    lost: bool,
    /// Number given to the next one.
    next: u64,
    /// Those that have not ended.
    running: Vec<u64>,
}

/// A flush after one that failed. No errno: it will not pass, whatever the host can do later.
#[derive(Debug, thiserror::Error)]
#[error("a flush of this file failed before: what was written until then may be lost")]
struct Lost;

impl Syncs {
    /// Of a file that another process worked on before, and lost something of.
    pub(super) fn lost() -> Self {
        let state = State {
            lost: true,
            ..State::default()
        };
        Self {
            state: Mutex::new(state),
            ended: Condvar::new(),
        }
    }

    /// Flushes everything that was written.
    pub(super) fn everything(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut state = self.run(sync)?.1;
        // One that runs beside this one may have been told what this one was not.
        let later = state.next;
        let beside = |state: &mut State| !state.lost && state.running.iter().any(|number| *number < later);
        state = self
            .ended
            .wait_while(state, beside)
            .unwrap_or_else(PoisonError::into_inner);
        state.check()
    }

    /// Writes something durably by itself.
    pub(super) fn one_write<T>(&self, write: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let (done, state) = self.run(write)?;
        state.check().map(|()| done)
    }

    fn run<T>(&self, sync: impl FnOnce() -> io::Result<T>) -> io::Result<(T, MutexGuard<'_, State>)> {
        let mut state = self.lock();
        state.check()?;
        let number = state.next;
        state.next += 1;
        state.running.push(number);
        drop(state);
        let result = sync();
        let mut state = self.lock();
        state.running.retain(|running| *running != number);
        if let Err(error) = &result
            && !std::mem::replace(&mut state.lost, true)
        {
            tracing::error!(%error, "a flush failed: from now on each one does");
        }
        self.ended.notify_all();
        result.map(|done| (done, state))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn check(&self) -> io::Result<()> {
        if self.lost {
            Err(io::Error::other(Lost))
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{BlockFile, HostFile};
    use std::sync::mpsc;
    use std::time::Duration;

    const DEADLINE: Duration = Duration::from_secs(60);

    fn fails() -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EIO))
    }

    #[test]
    fn none_succeeds_after_one_that_failed() {
        let syncs = Syncs::default();
        syncs.everything(|| Ok(())).expect("flushes");
        syncs.one_write(|| Ok(())).expect("writes");
        let first = syncs.everything(fails).expect_err("fails");
        assert_eq!(first.raw_os_error(), Some(libc::EIO), "the host's own word");
        let later = syncs.everything(|| Ok(())).expect_err("fails");
        assert_eq!(later.raw_os_error(), None, "not one that passes");
        syncs.one_write(|| Ok(())).expect_err("fails");
    }

    #[test]
    fn a_durable_write_that_failed_counts() {
        let syncs = Syncs::default();
        syncs.one_write(fails).expect_err("fails");
        syncs.everything(|| Ok(())).expect_err("fails");
    }

    /// The kernel tells one of them only.
    #[test]
    fn one_that_runs_beside_a_failure_fails_as_well() {
        let syncs = Syncs::default();
        let (told, other) = mpsc::channel();
        std::thread::scope(|scope| {
            let (begun, has_begun) = mpsc::channel();
            let failing = scope.spawn(|| {
                syncs.everything(move || {
                    begun.send(()).expect("is waited for");
                    // The kernel's answer is there, and nobody knows of it yet.
                    other.recv_timeout(DEADLINE).expect("the other one was told");
                    fails()
                })
            });
            has_begun.recv_timeout(DEADLINE).expect("begins");
            let lucky = syncs.everything(|| {
                told.send(()).expect("is waited for");
                Ok(())
            });
            lucky.expect_err("its data may be what was lost");
            failing.join().expect("ends").expect_err("fails");
        });
    }

    #[test]
    fn a_file_of_the_host_remembers() {
        // A regular file that cannot be flushed.
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/proc/self/comm");
        let file = HostFile::new(file.expect("opens").into()).expect("is a regular file");
        let first = file.sync().expect_err("fails");
        assert_eq!(first.raw_os_error(), Some(libc::EINVAL));
        assert!(
            file.sync()
                .expect_err("fails")
                .to_string()
                .contains("failed before")
        );
        assert!(
            file.write_durably(b"x", 0).is_err(),
            "nothing is durable any more"
        );
    }
}
