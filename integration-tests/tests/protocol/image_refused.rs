//! Hostile images that the disk process refuses at the start: it says which field and why, ends, and leaves
//! every file as it was. What is refused, line by line, is tested in `vhost-blk/tests/`; here is how a
//! process says it.

use crate::image_damaged::edit;
use anyhow::{Context, Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    frontend_harness::DEADLINE,
    process::Process,
    qemu_img::qemu_img,
    suite::{artifact, seccomp_flag, test},
};
use libtest_mimic::Trial;
use std::{collections::BTreeMap, ffi::OsString, fs, path::Path, process::Command};

pub(crate) fn tests() -> Vec<Trial> {
    let headers = HEADERS.map(|(name, patches, field, reason)| {
        test(format!("image_refused::header::{name}"), move || {
            let folder = tempfile::tempdir()?;
            let path = folder.path().join("disk");
            create(&["-f", "qcow2"], &path)?;
            edit(&path, |bytes| {
                for (at, patch) in patches {
                    bytes.put(*at, patch);
                }
            })?;
            let command = serve(folder.path(), &["--format=qcow2".to_owned()])?;
            refused(command, folder.path(), field, reason)
        })
    });
    let twice = test("image_refused::chain_with_one_file_twice", one_file_twice);
    headers.into_iter().chain([twice]).collect()
}

/// Name, what is written over the header of an empty image of 1 MiB, the field that is refused, and why.
type Header = (
    &'static str,
    &'static [(u64, &'static [u8])],
    &'static str,
    &'static str,
);

const HEADERS: [Header; 2] = [
    (
        "unknown_feature",
        &[(74, &[1])],
        "incompatible_features",
        "bit 40",
    ),
    (
        "corrupt",
        &[(79, &[2])],
        "incompatible_features",
        "the corrupt bit is set",
    ),
];

/// Makes an image of 1 MiB.
fn create(options: &[&str], path: &Path) -> Result<()> {
    let path = path.to_str().context("temporary folder is not UTF-8")?;
    qemu_img(&[&["create", "-q"], options, &[path, "1M"]].concat()).map(drop)
}

/// Three layers, the second of which is passed once more by another name.
fn one_file_twice() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let [disk, base, link] = ["disk", "base", "link"].map(|name| folder.path().join(name));
    create(&["-f", "qcow2"], &base)?;
    let below = base.to_str().context("temporary folder is not UTF-8")?;
    create(&["-f", "qcow2", "-b", below, "-F", "qcow2"], &disk)?;
    fs::hard_link(&base, &link)?;
    let backing = |path: &Path| format!("--backing=qcow2:{}", path.display());
    let flags = ["--format=qcow2".to_owned(), backing(&base), backing(&link)];
    let command = serve(folder.path(), &flags)?;
    refused(command, folder.path(), "chain", "one file appears twice")
}

/// The process that is to serve the folder's `disk`.
fn serve(folder: &Path, flags: &[String]) -> Result<Command> {
    let mut command = Command::new(artifact(Artifact::VhostUserBlk)?);
    command.arg(seccomp_flag());
    command.arg(format!("--blk-file={}", folder.join("disk").display()));
    command.args(flags);
    Ok(command)
}

/// Every file of a folder.
fn files(folder: &Path) -> Result<BTreeMap<OsString, Vec<u8>>> {
    fs::read_dir(folder)?
        .map(|entry| {
            let entry = entry?;
            Ok((entry.file_name(), fs::read(entry.path())?))
        })
        .collect()
}

/// The process ends with a message that names the field and the cause, and changes no file.
pub(crate) fn refused(mut command: Command, folder: &Path, field: &str, reason: &str) -> Result<()> {
    let before = files(folder)?;
    command.arg("--fd=3");
    let (mut process, _socket) = Process::start_with_socket(command)?;
    let status = process.wait(DEADLINE)?;
    let message = process.stderr()?;
    ensure!(status.code() == Some(1), "{status}: {message}");
    ensure!(
        message.contains(&format!(": {field}: ")) && message.contains(reason),
        "the message does not name {field:?} and say {reason:?}: {message}"
    );
    ensure!(files(folder)? == before, "a file was changed");
    Ok(())
}
