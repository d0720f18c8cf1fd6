//! Disks for the tiny guest.

use anyhow::Result;
use integration_tests::{
    artifacts::Artifact,
    frontend_harness::DEADLINE,
    process::{Process, connect},
    scratch::quick_folder,
    suite::{artifact, seccomp_flag},
    tiny::Device,
};
use std::{fs::File, path::PathBuf, process::Command};
use tempfile::TempDir;

/// Bytes of every disk.
pub(crate) const DISK: u64 = 64 << 20;

/// Who serves a raw disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Server {
    Ours,
    Reference,
}

/// A raw disk and the process that serves it.
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    process: Process,
    _folder: TempDir,
}

impl Disk {
    /// What went wrong, with the device process's own words.
    pub(crate) fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let words = self.process.stderr().unwrap_or_default();
        error.context(format!("device process: {words}"))
    }

    /// Starts the process; the device goes to the vmm.
    pub(crate) fn start(server: Server) -> Result<(Self, Device)> {
        // A flush that takes long looks as a lost kick does.
        let folder = quick_folder()?;
        let path = folder.path().join("disk");
        File::create(&path)?.set_len(DISK)?;
        let (process, socket) = match server {
            Server::Ours => {
                let mut command = Command::new(artifact(Artifact::VhostUserBlk)?);
                command.arg(seccomp_flag());
                command.arg(format!("--blk-file={}", path.display())).args([
                    "--format=raw",
                    "--num-queues=4",
                    "--fd=3",
                ]);
                Process::start_with_socket(command)?
            }
            Server::Reference => {
                let path_of_socket = folder.path().join("sock");
                let mut command = Command::new(artifact(Artifact::ReferenceBlk)?);
                command.arg(&path_of_socket).arg(&path);
                let process = Process::start(command)?;
                (process, connect(&path_of_socket, DEADLINE)?)
            }
        };
        let disk = Self {
            path,
            process,
            _folder: folder,
        };
        Ok((disk, Device::disk(socket)))
    }
}
