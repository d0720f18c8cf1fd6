//! qemu-img, the second opinion on images.

use crate::suite::Skip;
use anyhow::{Context, Result, bail, ensure};
use std::{
    io::ErrorKind,
    path::Path,
    process::{Command, Output},
};

/// What qemu-img printed, and how it ended.
///
/// # Errors
/// [`Skip`] where it is not installed.
pub fn qemu_img_output(folder: &Path, arguments: &[&str]) -> Result<Output> {
    match Command::new("qemu-img")
        .current_dir(folder)
        .args(arguments)
        .output()
    {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!(Skip("qemu-img is not installed".to_owned()))
        }
        output => output.context("qemu-img"),
    }
}

/// As [`qemu_img`], in `folder`.
///
/// # Errors
/// As [`qemu_img`].
pub fn qemu_img_in(folder: &Path, arguments: &[&str]) -> Result<String> {
    let output = qemu_img_output(folder, arguments)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "qemu-img {arguments:?}: {text}{error}");
    Ok(text)
}

/// What qemu-img printed, which must succeed.
///
/// # Errors
/// [`Skip`] where it is not installed; its words when it fails.
pub fn qemu_img(arguments: &[&str]) -> Result<String> {
    qemu_img_in(Path::new("."), arguments)
}
