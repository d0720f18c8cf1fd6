//! Orders for a running VM's links: a pipe for each NIC in the run-time folder, which its device
//! process reads.

use crate::failure::Failure;
use crate::launch::run_dir::RunDir;
use crate::sandbox::SEALS;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use nix::unistd::{ftruncate, getpid, mkfifo};
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes of the page of [`make_state`].
const STATE_SIZE: i64 = 4096;

/// What [`order`] asks for, as the device process reads it (`--link-fd`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Order {
    /// The guest sees no carrier, and no frame passes
    Down,
    /// Frames pass again
    Up,
    /// The guest tells the network where it is
    Announce,
}

impl Order {
    fn byte(self) -> u8 {
        match self {
            Self::Down => b'0',
            Self::Up => b'1',
            Self::Announce => b'a',
        }
    }
}

/// Makes the pipe of the NIC `id`, open both ways: its reader never sees its end.
pub(crate) fn make(run_dir: &Path, id: &str) -> io::Result<OwnedFd> {
    let path = path_of(run_dir, id);
    mkfifo(&path, Mode::from_bits_truncate(0o600))?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    Ok(options.open(&path)?.into())
}

/// Removes the pipe of a NIC that is no more.
pub(crate) fn remove(run_dir: &Path, id: &str) {
    let _ = std::fs::remove_file(path_of(run_dir, id));
}

fn path_of(run_dir: &Path, id: &str) -> PathBuf {
    run_dir.join(format!("{id}{}", RunDir::LINK))
}

/// The place of a pipe whose NIC is not the VM's yet. It goes away unless it is [named](Self::name): two that
/// come at the same moment under one id must not have each other's.
#[derive(Debug)]
pub(crate) struct Unnamed(PathBuf);

impl Unnamed {
    /// Makes a pipe as [`make`] does.
    pub(crate) fn make(run_dir: &Path) -> io::Result<(Self, OwnedFd)> {
        // No NIC's: their names begin with no dot.
        let own = format!(".{}", getpid());
        remove(run_dir, &own);
        let pipe = make(run_dir, &own)?;
        Ok((Self(path_of(run_dir, &own)), pipe))
    }

    /// The pipe is that of the NIC `id` from now on.
    pub(crate) fn name(self, id: &str) -> io::Result<()> {
        let folder = self.0.parent().unwrap_or(Path::new("."));
        std::fs::rename(&self.0, path_of(folder, id))
    }
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        // It is gone already where it was named.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Makes the page in which a NIC's process leaves what its successor must know (`--state-fd`): the last order,
/// and what the driver said, such as how many pairs of queues it uses.
pub(crate) fn make_state() -> io::Result<OwnedFd> {
    let state = memfd_create(c"nic-state", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    ftruncate(&state, STATE_SIZE)?;
    fcntl(&state, FcntlArg::F_ADD_SEALS(SEALS))?;
    Ok(state)
}

/// Gives an order to the NIC `id` of the running VM `vm`, whose run-time folder is `folder`.
///
/// # Errors
/// A [`Failure`] when there is no such NIC, or its process does not take orders.
pub(crate) fn order(vm: &str, folder: &Path, id: &str, order: Order) -> Result<u8, Failure> {
    crate::launch::machine::check_name("nic", id)?;
    let open = || {
        let mut options = OpenOptions::new();
        let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
        let file = options
            .write(true)
            .custom_flags(flags)
            .open(path_of(folder, id))?;
        match file.metadata()?.file_type().is_fifo() {
            true => Ok(file),
            false => Err(io::Error::other("it is no pipe")),
        }
    };
    open()
        .and_then(|mut pipe| pipe.write_all(&[order.byte()]))
        .map_err(|e| {
            let failure = Failure::host(format!("cannot give an order to the NIC '{id}' of the VM '{vm}'"));
            match e.kind() {
                io::ErrorKind::NotFound => failure
                    .cause("it has no such NIC that vhost-user-net serves, and no other takes orders")
                    .hint(format!("bulkhead inspect {vm} names its devices")),
                _ => failure.because(&e),
            }
        })?;
    Ok(0)
}
