//! `bulkhead events VM`: what happened to a VM's devices, one JSON object a line.

use super::pidfd::{PidFd, wait_for_one};
use super::ps::{self, RunningVm};
use crate::failure::Failure;
use nix::fcntl::{OFlag, openat};
use nix::poll::PollTimeout;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::stat::Mode;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use vm_spec::events::FILE_NAME;
use vm_spec::run_state::ProcessRole;

/// Prints what was written down, and with `follow` what will be, until the VM is over.
///
/// # Errors
/// A [`Failure`] when no such VM runs, or standard output cannot be written.
pub(super) fn show(name: &str, follow: bool) -> Result<u8, Failure> {
    let vm = ps::find(name)?;
    let failed = |e: &dyn std::error::Error| {
        Failure::host(format!("cannot read the events of the VM '{name}'")).because(e)
    };
    let mut watched = Watched::begin(&vm).map_err(|e| failed(&e))?;
    if !vm.runs() {
        return Err(Failure::usage(format!("the VM '{name}' has just ended")));
    }
    // No file: nothing has happened yet.
    let mut file: Option<File> = None;
    loop {
        // Before the last look, so that nothing falls between.
        let over = !follow || watched.is_over(&vm);
        // Before what was there before it is read to its end, which no longer moves then.
        let mut newer = watched
            .open_events()
            .filter(|newer| !is_same(file.as_ref(), newer));
        match file.iter_mut().chain(&mut newer).try_for_each(print) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(0),
            printed => printed.map_err(|e| failed(&e))?,
        }
        file = newer.or(file);
        if over {
            return Ok(0);
        }
        watched.wait_for_change().map_err(|e| failed(&e))?;
    }
}

/// Prints the rest of a file. Its descriptor keeps its place, and the file when that is removed.
fn print(file: &mut File) -> io::Result<()> {
    io::copy(file, &mut io::stdout())?;
    io::stdout().flush()
}

fn is_same(one: Option<&File>, other: &File) -> bool {
    let inode = |file: &File| file.metadata().map(|about| (about.dev(), about.ino())).ok();
    one.is_some_and(|one| inode(one) == inode(other))
}

/// A VM's run-time folder, which another VM's of the same name is not taken for.
struct Watched {
    folder: File,
    changes: Inotify,
    /// Its spawner, which writes events, and its reaper, which removes the folder; those that have not ended.
    /// Where both were killed, the folder stays.
    keepers: Vec<PidFd>,
}

impl Watched {
    fn begin(vm: &RunningVm) -> io::Result<Self> {
        let folder = File::open(&vm.folder)?;
        let changes = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let kinds = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE;
        changes.add_watch(&vm.folder, kinds)?;
        let keepers = vm
            .state
            .processes
            .iter()
            .filter(|process| matches!(process.role, ProcessRole::Spawner | ProcessRole::Reaper));
        Ok(Self {
            folder,
            changes,
            keepers: keepers
                .filter_map(|keeper| PidFd::open(keeper.pid).ok())
                .collect(),
        })
    }

    fn open_events(&self) -> Option<File> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let file = openat(&self.folder, FILE_NAME, flags, Mode::empty());
        file.ok().map(File::from)
    }

    fn is_over(&self, vm: &RunningVm) -> bool {
        let inode = |about: fs::Metadata| (about.dev(), about.ino());
        let (now, ours) = (fs::symlink_metadata(&vm.folder), self.folder.metadata());
        self.keepers.is_empty() || now.map(inode).ok() != ours.map(inode).ok()
    }

    fn wait_for_change(&mut self) -> io::Result<()> {
        wait_for_one(&mut self.keepers, self.changes.as_fd(), PollTimeout::NONE)?;
        while self.changes.read_events().is_ok_and(|events| !events.is_empty()) {}
        Ok(())
    }
}
