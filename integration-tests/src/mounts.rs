//! Files of the host that look different to one thread and to what it starts.

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::path::Path;

/// Gives the calling thread mounts of its own, with each first file in the place of the second.
///
/// # Errors
/// When the kernel refuses: only root may.
pub fn show_instead(files: &[(&Path, &str)]) -> Result<()> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    for (instead, file) in files {
        mount(Some(*instead), *file, none, MsFlags::MS_BIND, none).context(file.to_string())?;
    }
    Ok(())
}
