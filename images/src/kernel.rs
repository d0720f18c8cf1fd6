//! Debian's kernels as their packages hold them: the bzImage, and the ELF from inside it.

use crate::apt::{Apt, KERNEL_FROM_BACKPORTS};
use crate::bzimage::uncompressed_kernel;
use crate::cache::{Cache, Recipe};
use crate::error::At;
use crate::modules::Modules;
use crate::progress::Step;
use crate::{Error, Result};
use std::path::PathBuf;

/// The meta-package that depends on the release's current kernel.
const META: &str = "linux-image-amd64";

/// Which of Debian's kernels.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum KernelChoice {
    /// 6.12 or newer: the release's own kernel, on Debian 12 the one from its backports.
    Default,
    /// 6.1, the own kernel of Debian 12; other releases do not have it.
    V6_1,
}

/// A kernel in the cache.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// The compressed image for the Linux boot protocol.
    pub bzimage: PathBuf,
    /// The uncompressed ELF, with its PVH note.
    pub elf: PathBuf,
    /// `lib/modules/RELEASE` of the unpacked package.
    pub modules: PathBuf,
}

impl Kernel {
    /// Fetches and unpacks a kernel, or finds it in the cache.
    ///
    /// # Errors
    /// [`Error::NoPackage`] where the release has no such kernel; any other for what fails.
    pub fn get(cache: &Cache, apt: &Apt, choice: KernelChoice) -> Result<Self> {
        apt.fetching(|| Self::find(cache, apt, choice))
    }

    fn find(cache: &Cache, apt: &Apt, choice: KernelChoice) -> Result<Self> {
        let old_release = apt.codename() == KERNEL_FROM_BACKPORTS;
        let backports = format!("{}-backports", apt.codename());
        let meta = match (choice, old_release) {
            (KernelChoice::Default, true) => apt.find(META, Some(&backports))?,
            (KernelChoice::Default, false) | (KernelChoice::V6_1, true) => {
                apt.find(META, Some(apt.codename()))?
            }
            (KernelChoice::V6_1, false) => return Err(Error::NoPackage(format!("{META} 6.1"))),
        };
        let name = meta.depends.iter().find(|name| name.starts_with("linux-image-"));
        let name = name.ok_or_else(|| Error::NoPackage(META.to_owned()))?;
        let package = apt.find(name, None)?;
        let release = name.trim_start_matches("linux-image-").to_owned();
        let unpacked = apt.unpacked(&package)?;
        let bzimage = unpacked.join("boot").join(format!("vmlinuz-{release}"));
        let recipe = Recipe::new("kernel", 1)
            .with(&package.name)
            .with(&package.version);
        let elf = cache.entry(recipe, |folder| {
            let _step = Step::start(&format!("kernel {release}: take the ELF out of the bzImage"));
            let image = std::fs::read(&bzimage).at("read", &bzimage)?;
            let kernel = uncompressed_kernel(&image).map_err(|error| Error::Format {
                path: bzimage.clone(),
                what: error.to_string(),
            })?;
            let path = folder.join("vmlinux");
            std::fs::write(&path, kernel).at("write", &path)
        })?;
        let modules = ["lib/modules", "usr/lib/modules"]
            .map(|folder| unpacked.join(folder).join(&release))
            .into_iter()
            .find(|folder| folder.exists());
        let modules = modules.ok_or_else(|| Error::NoPackage(format!("{name} with modules")))?;
        Ok(Self {
            release,
            bzimage,
            elf: elf.join("vmlinux"),
            modules,
        })
    }

    /// The kernel's modules.
    ///
    /// # Errors
    /// The package's folder cannot be read.
    pub fn modules(&self) -> Result<Modules> {
        Modules::read(&self.modules)
    }
}
