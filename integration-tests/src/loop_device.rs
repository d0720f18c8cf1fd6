//! Block devices of a test's own, each over a file.

use crate::suite::Skip;
use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device; detached when dropped, what is mounted of it before that.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    mounted: Option<PathBuf>,
}

impl LoopDevice {
    /// One over `file`.
    ///
    /// # Errors
    /// [`Skip`] where the host has none.
    pub fn over(file: &Path) -> Result<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .context("losetup")?;
        if !output.status.success() {
            bail!(Skip("no loop devices here".to_owned()));
        }
        Ok(Self {
            path: String::from_utf8(output.stdout)?.trim().into(),
            mounted: None,
        })
    }

    /// Its device node.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes an ext4 file system on it, and the folder to mount it on.
    ///
    /// # Errors
    /// One of these fails.
    pub fn mount_ext4(&mut self, folder: &Path) -> Result<()> {
        let made = Command::new("mkfs.ext4").arg("-q").arg(&self.path).status()?;
        ensure!(made.success(), "mkfs.ext4 failed");
        fs::create_dir(folder)?;
        let (kind, options) = (Some("ext4"), None::<&str>);
        mount(Some(&self.path), folder, kind, MsFlags::empty(), options)?;
        self.mounted = Some(folder.to_owned());
        Ok(())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Some(folder) = &self.mounted {
            let _ = umount2(folder, MntFlags::MNT_DETACH);
        }
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}
