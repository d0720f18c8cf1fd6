//! The folder from which an unprivileged user runs the demo: readable by everyone, with the
//! binaries and images linked or copied in under fixed names.

use crate::artifacts::{Artifact, Artifacts, copy_for_all, mode_for_all};
use anyhow::Context;
use images::apt::Apt;
use images::cache::Cache;
use images::debian_root::debian_root;
use images::initramfs::Initramfs;
use images::kernel::{Kernel, KernelChoice};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What Debian's kernel needs before it has its root file system.
const MODULES: &[&str] = &["virtio_pci", "virtio_blk", "virtio_net", "ext4"];
/// The first process: from the initramfs to Debian.
const INIT: &str = include_str!("init.sh");
/// The first process in Debian.
const GUEST: &str = include_str!("guest.sh");

/// A staged demo.
#[derive(Clone, Debug)]
pub(super) struct Stage {
    folder: PathBuf,
}

impl Stage {
    /// Builds what is missing and stages it in `folder`.
    pub(super) fn fill(folder: &Path, artifacts: &Artifacts) -> anyhow::Result<Self> {
        let stage = Self {
            folder: folder.to_owned(),
        };
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))?;
        let cache = Cache::open_default()?;
        let apt = Apt::open(&cache)?;
        let kernel = Kernel::get(&cache, &apt, KernelChoice::Default)?;
        let files: &[(&str, u32, &[u8])] = &[("guest.sh", 0o644, GUEST.as_bytes())];
        let initramfs = Initramfs {
            kernel: &kernel,
            modules: MODULES,
            later: &[],
            script: INIT,
            files,
        }
        .build(&cache, &apt)?;
        place(&kernel.elf, &stage.kernel())?;
        place(&initramfs, &stage.initrd())?;
        place(&debian_root(&cache, &apt)?, &stage.base())?;
        for artifact in [
            Artifact::Bulkhead,
            Artifact::Supervisor,
            Artifact::Vmm,
            Artifact::VhostUserBlk,
            Artifact::VhostUserNet,
        ] {
            place(artifacts.path(artifact)?, &folder.join(artifact.name()))?;
        }
        place(&std::env::current_exe()?, &stage.demo())?;
        Ok(stage)
    }

    /// A stage that another process filled.
    pub(super) fn at(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
        }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn bulkhead(&self) -> PathBuf {
        self.folder.join(Artifact::Bulkhead.name())
    }

    /// The demo's own program.
    pub(super) fn demo(&self) -> PathBuf {
        self.folder.join("demo")
    }

    pub(super) fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinux")
    }

    pub(super) fn initrd(&self) -> PathBuf {
        self.folder.join("initramfs.cpio")
    }

    pub(super) fn base(&self) -> PathBuf {
        self.folder.join("root.qcow2")
    }
}

/// Links a file, or copies it where the stage is on another file system, or not everyone can read it.
fn place(from: &Path, to: &Path) -> anyhow::Result<()> {
    let mode = from.metadata().map_or(0, |about| about.permissions().mode());
    if mode != mode_for_all(mode) || std::fs::hard_link(from, to).is_err() {
        copy_for_all(from, to)
            .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_its_owner_can_read_is_staged_for_everyone() {
        let folder = tempfile::tempdir().unwrap();
        for (before, after) in [(0o600, 0o644), (0o700, 0o755), (0o640, 0o644), (0o755, 0o755)] {
            let [from, to] = ["from", "to"].map(|name| folder.path().join(format!("{name}-{before:o}")));
            std::fs::write(&from, "x").unwrap();
            let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
            std::fs::set_permissions(&from, std::fs::Permissions::from_mode(before)).unwrap();
            place(&from, &to).unwrap();
            assert_eq!((mode(&from), mode(&to)), (before, after));
        }
    }
}
