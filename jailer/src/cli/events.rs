//! `bulkhead events VM`: what happened to a VM's devices, one JSON object a line.

use crate::failure::Failure;
use crate::launch;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::fs::File;
use std::io::{self, Write};
use vm_spec::events::FILE_NAME;

/// Prints what was written down, and with `follow` what will be, until the VM is over.
///
/// # Errors
/// A [`Failure`] when no such VM runs, or standard output cannot be written.
pub(super) fn show(name: &str, follow: bool) -> Result<u8, Failure> {
    let folder = launch::run_folder(name)?;
    let failed = |e: &dyn std::error::Error| {
        Failure::host(format!("cannot read the events of the VM '{name}'")).because(e)
    };
    // The watch before the first look, so that nothing falls between.
    let watch = Inotify::init(InitFlags::IN_CLOEXEC).map_err(|e| failed(&e))?;
    let changes = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_DELETE_SELF;
    watch.add_watch(&folder, changes).map_err(|e| failed(&e))?;
    let path = folder.join(FILE_NAME);
    let mut file = None;
    loop {
        // No file: nothing has happened yet.
        if file.is_none() {
            file = File::open(&path).ok();
        }
        if let Some(file) = &mut file {
            // A file descriptor keeps its place, and its file when that is removed.
            let copied = io::copy(file, &mut io::stdout()).and_then(|_| io::stdout().flush());
            match copied {
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(0),
                other => other.map_err(|e| failed(&e))?,
            }
        }
        if !follow || !folder.exists() {
            return Ok(0);
        }
        match watch.read_events() {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(failed(&e)),
        }
    }
}
