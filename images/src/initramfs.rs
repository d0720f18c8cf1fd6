//! Initial RAM disks: busybox, a script as /init, the kernel modules it loads, other files.

use crate::apt::Apt;
use crate::cache::{Cache, Recipe};
use crate::cpio::Archive;
use crate::error::At;
use crate::kernel::Kernel;
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// What every /init begins with: the kernel's file systems, and the modules in their order. Applets go by their
/// bare names: Debian's shell finds them in itself, most of them without an exec, of which each takes 50 ms in an
/// emulated machine.
const PRELUDE: &str = "#!/bin/busybox sh\n\
    export PATH=/bin\n\
    (PATH= uname) > /dev/null 2>&1 || /bin/busybox --install -s /bin\n\
    mkdir -p /proc /sys /dev /tmp /run\n\
    mount -t proc proc /proc\n\
    mount -t sysfs sys /sys\n\
    mount -t devtmpfs dev /dev\n\
    load() {\n\
    for module in $(cat /modules/$1); do\n\
    insmod /modules/$module.ko || echo \"init: cannot load $module\"\n\
    done\n\
    }\n\
    load order\n";

/// Programs that have names of their own: what the script around `bulkhead run -- COMMAND` asks for, and what is
/// asked for where /proc is not mounted.
const APPLETS: [&str; 8] = [
    "dd",
    "mkdir",
    "mount",
    "setsid",
    "sh",
    "sleep",
    "switch_root",
    "sync",
];

/// What an initial RAM disk holds.
#[derive(Debug)]
pub struct Initramfs<'a> {
    /// The kernel whose modules it carries.
    pub kernel: &'a Kernel,
    /// Modules to load, by name; what they need comes along.
    pub modules: &'a [&'a str],
    /// Further modules, which the script loads, if it wants them, with `load later`.
    pub later: &'a [&'a str],
    /// Shell script: what /init does once the modules are loaded. /proc, /sys and /dev are mounted.
    pub script: &'a str,
    /// Further files: name in the archive (folders are made), permissions, content.
    pub files: &'a [(&'a str, u32, &'a [u8])],
}

impl Initramfs<'_> {
    /// Builds it, or finds it in the cache. Not compressed: unpacking costs a guest more than
    /// loading.
    ///
    /// # Errors
    /// A module or busybox is missing, or the file system fails.
    pub fn build(&self, cache: &Cache, apt: &Apt) -> Result<PathBuf> {
        let busybox = busybox(apt)?;
        let mut recipe = Recipe::new("initramfs", 5)
            .with(&self.kernel.release)
            .with(crate::cache::text(&self.kernel.modules)?)
            .with(crate::cache::text(&busybox)?)
            .with(PRELUDE)
            .with(self.script);
        for module in self.modules.iter().chain(&["/"]).chain(self.later) {
            recipe = recipe.with(module);
        }
        for (name, mode, content) in self.files {
            recipe = recipe.with(name).with(mode.to_le_bytes()).with(content);
        }
        let entry = cache.entry(recipe, |folder| {
            let path = folder.join("initramfs.cpio");
            std::fs::write(&path, self.archive(&busybox)?).at("write", &path)
        })?;
        Ok(entry.join("initramfs.cpio"))
    }

    fn archive(&self, busybox: &Path) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        for folder in ["bin", "dev", "modules"] {
            archive.folder(folder);
        }
        archive.character_device("dev/console", 5, 1);
        let program = std::fs::read(busybox).at("read", busybox)?;
        archive.file("bin/busybox", 0o755, &program);
        for name in APPLETS {
            archive.link(&format!("bin/{name}"), "busybox");
        }
        let modules = self.kernel.modules()?;
        let now = modules.resolve(self.modules)?;
        let mut later = modules.resolve(self.later)?;
        later.retain(|module| now.iter().all(|earlier| earlier.name != module.name));
        for (list, modules) in [("order", now), ("later", later)] {
            let mut order = String::new();
            for module in modules {
                order = order + &module.name + "\n";
                archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.object);
            }
            archive.file(&format!("modules/{list}"), 0o644, order.as_bytes());
        }
        let mut folders = vec!["bin".to_owned(), "dev".to_owned(), "modules".to_owned()];
        for (name, mode, content) in self.files {
            for ancestor in Path::new(name)
                .ancestors()
                .skip(1)
                .collect::<Vec<_>>()
                .into_iter()
                .rev()
            {
                let ancestor = ancestor.to_string_lossy().into_owned();
                if !ancestor.is_empty() && !folders.contains(&ancestor) {
                    archive.folder(&ancestor);
                    folders.push(ancestor);
                }
            }
            archive.file(name, *mode, content);
        }
        archive.file("init", 0o755, format!("{PRELUDE}{}", self.script).as_bytes());
        Ok(archive.finish())
    }
}

/// The statically linked busybox of the release.
///
/// # Errors
/// The package cannot be fetched.
pub fn busybox(apt: &Apt) -> Result<PathBuf> {
    let folder = apt.fetching(|| apt.unpacked(&apt.find("busybox-static", None)?))?;
    let places = ["bin/busybox", "usr/bin/busybox"].map(|place| folder.join(place));
    let found = places.into_iter().find(|place| place.exists());
    found.ok_or_else(|| Error::NoPackage("busybox-static with busybox in it".to_owned()))
}
