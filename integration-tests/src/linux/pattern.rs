//! The disk that test guests read and copy: 8 MiB of pattern, room for its copy, and a counter.

use anyhow::{Context, ensure};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Length of the pattern in bytes.
const PATTERN: usize = 8 << 20;
/// Size of the disk in bytes.
const DISK: u64 = 32 << 20;

/// Makes a qcow2 overlay over a base with the pattern. Returns the pattern's SHA-256 as the guest
/// will spell it.
///
/// # Errors
/// qemu-img or sha256sum fails.
pub fn make_disk(folder: &Path) -> anyhow::Result<(std::path::PathBuf, String)> {
    let (raw, base, top) = (
        folder.join("disk.raw"),
        folder.join("base.qcow2"),
        folder.join("disk.qcow2"),
    );
    let pattern = pattern();
    std::fs::write(&raw, &pattern)?;
    std::fs::File::options().write(true).open(&raw)?.set_len(DISK)?;
    images::disk::qcow2_from_raw(&raw, &base)?;
    std::fs::remove_file(&raw)?;
    images::disk::overlay(&base, &top)?;
    Ok((top, sha256(&pattern)?))
}

/// Makes a qcow2 image with an empty ext4.
///
/// # Errors
/// mkfs.ext4 or qemu-img fails.
pub fn make_ext4(folder: &Path) -> anyhow::Result<std::path::PathBuf> {
    let (raw, image) = (folder.join("ext4.raw"), folder.join("ext4.qcow2"));
    std::fs::File::create(&raw)?.set_len(2 * DISK)?;
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&raw).status()?;
    ensure!(made.success(), "mkfs.ext4 failed");
    images::disk::qcow2_from_raw(&raw, &image)?;
    std::fs::remove_file(&raw)?;
    Ok(image)
}

/// Checks such an image after a guest's end: it is sound, and its file system clean.
///
/// # Errors
/// They are not.
pub fn check_ext4(folder: &Path, image: &Path) -> anyhow::Result<()> {
    let check = Command::new("qemu-img")
        .args(["check", "-f", "qcow2"])
        .arg(image)
        .output()?;
    let words = String::from_utf8_lossy(&check.stdout);
    // 3: clusters that a killed process had allocated and not yet used are lost, nothing else.
    ensure!(
        matches!(check.status.code(), Some(0 | 3)) && !words.contains("ERROR"),
        "qemu-img check: {}: {words}",
        check.status
    );
    let raw = folder.join("after.raw");
    let convert = Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .arg(image)
        .arg(&raw)
        .status();
    ensure!(convert?.success(), "qemu-img convert failed");
    let fsck = Command::new("fsck.ext4").arg("-fn").arg(&raw).output()?;
    ensure!(
        fsck.status.success(),
        "fsck.ext4: {}{}",
        String::from_utf8_lossy(&fsck.stdout),
        String::from_utf8_lossy(&fsck.stderr)
    );
    Ok(())
}

/// Checks the image after a guest's end: consistent, the pattern intact and copied.
///
/// # Errors
/// It is not.
pub fn check_disk(folder: &Path, qcow2: &Path) -> anyhow::Result<()> {
    images::disk::check(qcow2)?;
    let raw = folder.join("after.raw");
    let convert = Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .arg(qcow2)
        .arg(&raw)
        .status();
    ensure!(convert?.success(), "qemu-img convert failed");
    check_raw(&raw)
}

/// Checks a raw disk after a guest's end: the pattern intact and copied.
///
/// # Errors
/// It is not.
pub fn check_raw(raw: &Path) -> anyhow::Result<()> {
    let content = std::fs::read(raw)?;
    let pattern = pattern();
    ensure!(
        content.get(..PATTERN) == Some(&pattern),
        "the pattern on the disk has changed"
    );
    ensure!(
        content.get(PATTERN..2 * PATTERN) == Some(&pattern),
        "the guest's copy of the pattern is wrong"
    );
    Ok(())
}

/// A raw disk with the pattern; returns its SHA-256.
///
/// # Errors
/// The file cannot be written.
pub fn make_raw_disk(raw: &Path) -> anyhow::Result<String> {
    let pattern = pattern();
    std::fs::write(raw, &pattern)?;
    std::fs::File::options().write(true).open(raw)?.set_len(DISK)?;
    sha256(&pattern)
}

/// Numbers that differ in every 8 bytes (a linear congruential generator modulo 2^64).
fn pattern() -> Vec<u8> {
    let mut state: u64 = 1;
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        Some(state.to_le_bytes())
    };
    std::iter::from_fn(next).flatten().take(PATTERN).collect()
}

fn sha256(bytes: &[u8]) -> anyhow::Result<String> {
    let mut tool = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    tool.stdin.take().context("no input")?.write_all(bytes)?;
    let output = tool.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text
        .split_whitespace()
        .next()
        .context("sha256sum said nothing")?
        .to_owned())
}
