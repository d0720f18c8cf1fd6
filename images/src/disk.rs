//! Disk images: ext4 file systems from a folder, qcow2 bases and overlays.

use crate::Result;
use crate::cache::text;
use crate::command::run;
use crate::error::At;
use std::path::Path;
use std::process::Command;

/// Makes `raw` a file of `size` bytes that holds an ext4 file system with what lies in `folder`.
///
/// # Errors
/// mke2fs fails, for example because the content does not fit.
pub fn ext4(folder: &Path, raw: &Path, size: u64) -> Result<()> {
    let file = std::fs::File::create(raw).at("make", raw)?;
    file.set_len(size).at("size", raw)?;
    run(
        Command::new("mke2fs")
            .args(EXT4_OPTIONS)
            .arg("-d")
            .arg(folder)
            .arg(raw),
        "e2fsprogs",
    )
    .map(drop)
}

/// mke2fs options: quiet, no question, the features of ext4, no reserved blocks; the times in the
/// superblock are all that differs between two runs.
pub(crate) const EXT4_OPTIONS: [&str; 8] = ["-q", "-F", "-t", "ext4", "-m", "0", "-L", "root"];

/// Converts a raw image to qcow2 (version 3, clusters of 64 KiB).
///
/// # Errors
/// qemu-img fails.
pub fn qcow2_from_raw(raw: &Path, qcow2: &Path) -> Result<()> {
    let convert = ["convert", "-f", "raw", "-O", "qcow2", "-o", "compat=1.1"];
    run(
        Command::new("qemu-img").args(convert).arg(raw).arg(qcow2),
        "qemu-utils",
    )
    .map(drop)
}

/// Makes a qcow2 overlay that takes all writes over `base`, itself qcow2, named by absolute path.
///
/// # Errors
/// qemu-img fails, for example because the base is missing.
pub fn overlay(base: &Path, overlay: &Path) -> Result<()> {
    let backing = base.canonicalize().at("find", base)?;
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        text(&backing)?,
    ];
    run(Command::new("qemu-img").args(create).arg(overlay), "qemu-utils").map(drop)
}

/// Checks an image; an inconsistent one is an error that carries qemu-img's report.
///
/// # Errors
/// The image has errors or leaks, or cannot be read.
pub fn check(qcow2: &Path) -> Result<()> {
    run(
        Command::new("qemu-img")
            .args(["check", "-q", "-f", "qcow2"])
            .arg(qcow2),
        "qemu-utils",
    )
    .map(drop)
}

/// Reads a file out of the ext4 file system on a qcow2 image, without mounting it.
///
/// # Errors
/// The image or the file system in it cannot be read; a missing file reads as empty.
pub fn read_file(qcow2: &Path, scratch: &Path, file: &str) -> Result<Vec<u8>> {
    let raw = scratch.join("read-back.raw");
    let convert = ["convert", "-f", "qcow2", "-O", "raw"];
    run(
        Command::new("qemu-img").args(convert).arg(qcow2).arg(&raw),
        "qemu-utils",
    )?;
    let content = run(
        Command::new("debugfs")
            .args(["-R", &format!("cat {file}")])
            .arg(&raw),
        "e2fsprogs",
    );
    std::fs::remove_file(&raw).at("remove", &raw)?;
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_goes_into_an_overlay_s_base_and_comes_back() {
        let scratch = tempfile::tempdir().unwrap();
        let path = |name: &str| scratch.path().join(name);
        std::fs::create_dir(path("tree")).unwrap();
        std::fs::write(path("tree/hello"), "content").unwrap();
        ext4(&path("tree"), &path("disk.raw"), 8 << 20).unwrap();
        qcow2_from_raw(&path("disk.raw"), &path("base.qcow2")).unwrap();
        overlay(&path("base.qcow2"), &path("top.qcow2")).unwrap();
        check(&path("top.qcow2")).unwrap();
        assert_eq!(
            read_file(&path("top.qcow2"), scratch.path(), "/hello").unwrap(),
            b"content"
        );
        std::fs::write(path("bad.qcow2"), "QFI\u{fb}").unwrap();
        assert!(check(&path("bad.qcow2")).is_err());
    }
}
