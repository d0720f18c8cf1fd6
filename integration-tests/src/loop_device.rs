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

    /// Makes a file system of this kind on it, and the folder to mount it on.
    ///
    /// # Errors
    /// [`Skip`] where the kernel does not know the kind; or one of these fails.
    pub fn mount(&mut self, kind: &str, folder: &Path) -> Result<()> {
        let known = fs::read_to_string("/proc/filesystems")?;
        if !known.split_whitespace().any(|one| one == kind) {
            bail!(Skip(format!("this kernel has no {kind}")));
        }
        let make = format!("mkfs.{kind}");
        let made = Command::new(&make).arg("-q").arg(&self.path).status()?;
        ensure!(made.success(), "{make} failed");
        fs::create_dir(folder)?;
        let options = None::<&str>;
        mount(Some(&self.path), folder, Some(kind), MsFlags::empty(), options)?;
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
