//! Kernel modules by name, with everything they need, in the order to load them.
//!
//! A Debian kernel package carries no modules.dep (its post-installation makes it), so that the
//! dependencies are read from the modules themselves: section `.modinfo`, entries `depends=`
//! and `softdep=pre:`.

use crate::error::At;
use crate::{Error, Result};
use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Most bytes of one module.
const MAX_MODULE: u64 = 64 << 20;

/// The modules of one kernel.
#[derive(Debug)]
pub struct Modules {
    release: String,
    files: HashMap<String, PathBuf>,
    builtin: HashSet<String>,
}

/// A module ready to be loaded.
#[derive(Clone, Debug)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The uncompressed ELF object.
    pub object: Vec<u8>,
}

impl Modules {
    /// Reads the folder `lib/modules/RELEASE` of an unpacked kernel package.
    ///
    /// # Errors
    /// The folder or its list of built-in modules cannot be read.
    pub fn read(folder: &Path) -> Result<Self> {
        let release = folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let list = folder.join("modules.builtin");
        let builtin = std::fs::read_to_string(&list).at("read", &list)?;
        let mut files = HashMap::new();
        collect(&folder.join("kernel"), &mut files)?;
        let builtin = builtin
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect();
        Ok(Self {
            release,
            files,
            builtin,
        })
    }

    /// The kernel's release, as `uname -r` says it.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// `wanted` and all that they need, each after what it needs; built-in ones are left out.
    ///
    /// # Errors
    /// [`Error::NoModule`] for a name that is neither a file nor built in.
    pub fn resolve(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut order = Vec::new();
        let mut seen = HashSet::new();
        for name in wanted {
            self.visit(&normal(name), &mut seen, &mut order)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, seen: &mut HashSet<String>, order: &mut Vec<Module>) -> Result<()> {
        if self.builtin.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let file = self.files.get(name).ok_or_else(|| Error::NoModule {
            module: name.to_owned(),
            release: self.release.clone(),
        })?;
        let object = read_module(file)?;
        let info = modinfo(&object);
        for soft in softdeps(&info) {
            // A soft dependency may name a crypto algorithm (`crypto-crc32c`, or bare); the
            // generic implementation provides it.
            let algorithm = soft.strip_prefix("crypto_").unwrap_or(&soft);
            for candidate in [soft.clone(), format!("{algorithm}_generic")] {
                if self.files.contains_key(&candidate) {
                    self.visit(&candidate, seen, order)?;
                }
            }
        }
        for needed in hard_depends(&info) {
            self.visit(&needed, seen, order)?;
        }
        order.push(Module {
            name: name.to_owned(),
            object,
        });
        Ok(())
    }
}

fn collect(folder: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).at("list", folder)? {
        let entry = entry.at("list", folder)?;
        let path = entry.path();
        if entry.file_type().at("look at", &path)?.is_dir() {
            collect(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `drivers/net/virtio-net.ko.xz` is module `virtio_net`.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let (name, _) = file.split_once(".ko")?;
    Some(normal(name))
}

fn normal(name: &str) -> String {
    name.trim().replace('-', "_")
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(path).at("read", path)?;
    let mut object = Vec::new();
    match bytes.as_slice() {
        [0xfd, b'7', b'z', b'X', ..] => {
            let decoder = xz2::read::XzDecoder::new(bytes.as_slice());
            decoder
                .take(MAX_MODULE)
                .read_to_end(&mut object)
                .at("decompress", path)?;
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(bytes.as_slice());
            let decoder = decoder.map_err(|error| Error::Format {
                path: path.into(),
                what: error.to_string(),
            })?;
            decoder
                .take(MAX_MODULE)
                .read_to_end(&mut object)
                .at("decompress", path)?;
        }
        _ => object = bytes,
    }
    Ok(object)
}

/// The `key=value` strings of section `.modinfo`. Module objects hold each of them once, after a
/// NUL; looking for the keys that we want spares parsing the section table.
fn modinfo(object: &[u8]) -> Vec<(String, String)> {
    let section = section(object, b".modinfo").unwrap_or_default();
    section
        .split(|byte| *byte == 0)
        .filter_map(|entry| std::str::from_utf8(entry).ok()?.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

fn hard_depends(info: &[(String, String)]) -> Vec<String> {
    let values = info.iter().filter(|(key, _)| key == "depends");
    values
        .flat_map(|(_, list)| list.split(','))
        .filter(|name| !name.is_empty())
        .map(normal)
        .collect()
}

fn softdeps(info: &[(String, String)]) -> Vec<String> {
    let values = info.iter().filter(|(key, _)| key == "softdep");
    let before = values.filter_map(|(_, list)| list.split("pre:").nth(1));
    let before = before.map(|list| list.split("post:").next().unwrap_or(list));
    before.flat_map(str::split_whitespace).map(normal).collect()
}

/// A section of a 64-bit little-endian ELF object, by name.
fn section<'a>(object: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    let half = |at: usize| {
        Some(usize::from(u16::from_le_bytes(
            object.get(at..at + 2)?.try_into().ok()?,
        )))
    };
    let word = |at: usize| Some(u32::from_le_bytes(object.get(at..at + 4)?.try_into().ok()?) as usize);
    let long = |at: usize| usize::try_from(u64::from_le_bytes(object.get(at..at + 8)?.try_into().ok()?)).ok();
    let (table, size, count, names) = (long(0x28)?, half(0x3a)?, half(0x3c)?, half(0x3e)?);
    let header = |index: usize| table.checked_add(index.checked_mul(size)?);
    let content = |index: usize| {
        let at = header(index)?;
        let (offset, length) = (long(at + 0x18)?, long(at + 0x20)?);
        object.get(offset..offset.checked_add(length)?)
    };
    let strings = content(names)?;
    (0..count).find_map(|index| {
        let name = strings.get(word(header(index)?)?..)?;
        (name.split(|byte| *byte == 0).next()? == wanted)
            .then(|| content(index))
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_as_modinfo_spells_them() {
        let info = vec![
            ("depends".to_owned(), "9pnet,netfs".to_owned()),
            ("softdep".to_owned(), "pre: crc32c aes-x post: later".to_owned()),
        ];
        assert_eq!(hard_depends(&info), ["9pnet", "netfs"]);
        assert_eq!(softdeps(&info), ["crc32c", "aes_x"]);
        assert_eq!(
            module_name(Path::new("kernel/a/kvm-amd.ko.xz")).unwrap(),
            "kvm_amd"
        );
    }

    #[test]
    fn a_broken_object_has_no_section() {
        assert_eq!(section(b"\x7fELF", b".modinfo"), None);
        assert_eq!(section(&[0xff; 4096], b".modinfo"), None);
    }
}
