//! The kernels and initial RAM disks of the test guests, built once on the host.

use anyhow::Context;
use images::apt::Apt;
use images::cache::Cache;
use images::initramfs::Initramfs;
use images::kernel::{Kernel, KernelChoice};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The environment variable that names a file with [`Images`] as JSON, for places with no network.
pub const IMAGES: &str = "BULKHEAD_TEST_IMAGES";
const SCRIPT: &str = include_str!("init.sh");
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "af_packet",
    "pvpanic_mmio",
];

/// One kernel with what it boots.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KernelImages {
    /// As `uname -r` says it.
    pub release: String,
    /// For the Linux boot protocol.
    pub bzimage: PathBuf,
    /// For PVH.
    pub elf: PathBuf,
    /// The test guest's initial RAM disk.
    pub initrd: PathBuf,
}

/// Every kernel that the tests boot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Images {
    /// 6.12 or newer.
    pub default: KernelImages,
    /// 6.1, where the release has it.
    pub v6_1: Option<KernelImages>,
}

impl Images {
    /// From the file that [`IMAGES`] names, or built.
    ///
    /// # Errors
    /// A package cannot be fetched, or the file is not what it should be.
    pub fn get() -> anyhow::Result<Self> {
        match std::env::var_os(IMAGES) {
            Some(file) => {
                let text = std::fs::read(&file).with_context(|| format!("{IMAGES}={}", file.display()))?;
                Ok(serde_json::from_slice(&text)?)
            }
            None => Self::build(),
        }
    }

    /// Builds them, or finds them in the cache.
    ///
    /// # Errors
    /// A package cannot be fetched.
    pub fn build() -> anyhow::Result<Self> {
        let cache = Cache::open_default()?;
        let apt = Apt::open(&cache)?;
        let default = Kernel::get(&cache, &apt, KernelChoice::Default)?;
        let v6_1 = match Kernel::get(&cache, &apt, KernelChoice::V6_1) {
            Ok(kernel) => Some(with_initrd(&cache, &apt, kernel)?),
            Err(images::Error::NoPackage(_)) => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Self {
            default: with_initrd(&cache, &apt, default)?,
            v6_1,
        })
    }

    /// Builds them and writes the file that [`IMAGES`] may name.
    ///
    /// # Errors
    /// As [`Self::build`], or the file cannot be written.
    pub fn write(file: &Path) -> anyhow::Result<()> {
        Ok(std::fs::write(file, serde_json::to_vec(&Self::build()?)?)?)
    }
}

fn with_initrd(cache: &Cache, apt: &Apt, kernel: Kernel) -> anyhow::Result<KernelImages> {
    let initramfs = Initramfs {
        kernel: &kernel,
        modules: MODULES,
        later: &["ext4"],
        script: SCRIPT,
        files: &[],
    };
    let initrd = initramfs.build(cache, apt)?;
    Ok(KernelImages {
        release: kernel.release,
        bzimage: kernel.bzimage,
        elf: kernel.elf,
        initrd,
    })
}
