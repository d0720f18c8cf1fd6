//! Hostile images that the disk process refuses at the start: it says which field and why, ends, and leaves
//! every file as it was.

use crate::{
    fixture::qemu_img,
    image_damaged::{COPIED, edit},
};
use anyhow::{Context, Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    frontend_harness::DEADLINE,
    process::Process,
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
    let files = FILES.map(|(name, make, field, reason)| {
        test(format!("image_refused::files::{name}"), move || {
            let folder = tempfile::tempdir()?;
            let flags = make(folder.path())?;
            refused(serve(folder.path(), &flags)?, folder.path(), field, reason)
        })
    });
    headers.into_iter().chain(files).collect()
}

/// Name, what is written over the header of an empty image of 1 MiB, the field that is refused, and why.
type Header = (
    &'static str,
    &'static [(u64, &'static [u8])],
    &'static str,
    &'static str,
);

/// Where the first header extension is.
const EXTENSION: u64 = 112;

const HEADERS: [Header; 27] = [
    ("encryption_with_aes", &[(35, &[1])], "crypt_method", "AES"),
    (
        "encryption_without_a_header",
        &[(35, &[2])],
        "header extension",
        "without an encryption header",
    ),
    ("unknown_encryption", &[(35, &[77])], "crypt_method", "method 77"),
    (
        "unknown_feature",
        &[(74, &[1])],
        "incompatible_features",
        "bit 40",
    ),
    (
        "compression_type_without_its_bit",
        &[(104, &[1])],
        "compression_type",
        "without its feature bit",
    ),
    (
        "compression_bit_without_a_type",
        &[(79, &[8])],
        "compression_type",
        "the type is zlib",
    ),
    (
        "corrupt",
        &[(79, &[2])],
        "incompatible_features",
        "the corrupt bit is set",
    ),
    (
        "clusters_too_small",
        &[(23, &[8])],
        "cluster_bits",
        "8 is outside 9 to 21",
    ),
    (
        "clusters_too_large",
        &[(23, &[22])],
        "cluster_bits",
        "22 is outside 9 to 21",
    ),
    (
        "extended_l2_in_small_clusters",
        &[(23, &[13]), (79, &[16])],
        "cluster_bits",
        "13 is under 14",
    ),
    ("refcount_order", &[(99, &[7])], "refcount_order", "7 is over 6"),
    (
        "header_too_short",
        &[(103, &[96])],
        "header_length",
        "96 is under 104",
    ),
    (
        "header_of_odd_length",
        &[(103, &[106])],
        "header_length",
        "no multiple of 8",
    ),
    (
        "header_over_a_cluster",
        &[(101, &[1, 0, 8])],
        "header_length",
        "over a cluster",
    ),
    ("l1_too_large", &[(36, &[1, 0, 0, 0])], "l1_size", "over 32 MiB"),
    ("l1_too_short", &[(36, &[0; 4])], "l1_size", "too few"),
    ("size_over_the_limit", &[(24, &[0x80])], "size", "over 2^63-1"),
    (
        "refcount_table_too_large",
        &[(59, &[129])],
        "refcount_table_clusters",
        "over 8 MiB",
    ),
    (
        "too_many_snapshots",
        &[(60, &[0, 1, 0, 1])],
        "nb_snapshots",
        "over 65536",
    ),
    (
        "too_many_bitmaps",
        &[(EXTENSION, &[0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24, 0, 1, 0, 0])],
        "bitmaps extension",
        "outside 1 to 65535",
    ),
    ("unaligned_table", &[(46, &[2])], "l1_table_offset", "not aligned"),
    (
        "table_past_2_to_56",
        &[(40, &[1])],
        "l1_table_offset",
        "past 2^56",
    ),
    (
        "table_past_the_end",
        &[(42, &[1])],
        "l1_table_offset",
        "past the end",
    ),
    (
        "table_in_the_header",
        &[(40, &[0; 8])],
        "l1_table_offset",
        "in the header",
    ),
    (
        "tables_overlap",
        &[(40, &[0, 0, 0, 0, 0, 1, 0, 0])],
        "l1_table_offset",
        "overlaps the table at refcount_table_offset",
    ),
    (
        "backing_name_too_long",
        &[(8, &[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 4, 0])],
        "backing_file_size",
        "1024 is over 1023",
    ),
    (
        "extension_past_the_first_cluster",
        &[(EXTENSION, &[0, 0, 0x12, 0x34, 0, 1, 0x11, 0x70])],
        "header extension",
        "past the first cluster",
    ),
];

/// Name, what makes `disk` and other files and gives the flags, the field that is refused, and why.
type Files = (
    &'static str,
    fn(&Path) -> Result<Vec<String>>,
    &'static str,
    &'static str,
);

const FILES: [Files; 12] = [
    (
        "raw_as_qcow2",
        |folder| {
            create(&["-f", "raw"], &folder.join("disk"))?;
            Ok(vec!["--format=qcow2".to_owned()])
        },
        "magic",
        "not a qcow2 image",
    ),
    (
        "backing_file_of_version_2",
        |folder| overlay(folder, &["-o", "compat=0.10"]),
        "backing file",
        "names one but none was passed",
    ),
    (
        "backing_file_of_version_3",
        |folder| overlay(folder, &[]),
        "backing file",
        "names one but none was passed",
    ),
    (
        "backing_file_that_is_not_named",
        |folder| {
            create(&["-f", "raw"], &folder.join("base"))?;
            create(&["-f", "qcow2"], &folder.join("disk"))?;
            let base = format!("--backing=raw:{}", folder.join("base").display());
            Ok(vec!["--format=qcow2".to_owned(), base])
        },
        "backing file",
        "names none",
    ),
    (
        "external_data_file",
        |folder| {
            let option = format!("data_file={}", folder.join("data").display());
            create(&["-f", "qcow2", "-o", &option], &folder.join("disk"))?;
            Ok(vec!["--format=qcow2".to_owned()])
        },
        "external data file",
        "none was passed",
    ),
    (
        "vmdk_with_named_extents",
        |folder| read_only(folder, "vmdk", "subformat=monolithicFlat"),
        "descriptor",
        "named files",
    ),
    (
        "differencing_vdi",
        |folder| {
            let flags = read_only(folder, "vdi", "static=off")?;
            edit(&folder.join("disk"), |bytes| bytes.put(0x4c, &[4]))?;
            Ok(flags)
        },
        "image type",
        "differencing",
    ),
    (
        "encrypted_without_its_key",
        |folder| {
            fs::write(folder.join("key"), "secret")?;
            let secret = format!("secret,id=s,file={}", folder.join("key").display());
            let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1";
            let disk = folder.join("disk");
            create(&["--object", &secret, "-f", "qcow2", "-o", options], &disk)?;
            Ok(vec!["--format=qcow2".to_owned()])
        },
        "crypt_method",
        "no passphrase was passed",
    ),
    (
        "dirty_and_broken",
        |folder| {
            create(
                &["-f", "qcow2", "-o", "preallocation=metadata"],
                &folder.join("disk"),
            )?;
            edit(&folder.join("disk"), |bytes| {
                bytes.set(bytes.l2(), COPIED | 1 << 50);
                bytes.put(79, &[1]);
            })?;
            Ok(vec!["--format=qcow2".to_owned()])
        },
        "image is corrupt: L2 entry",
        "past the file's end",
    ),
    (
        "extension_twice",
        |folder| {
            create(&["-f", "qcow2"], &folder.join("disk"))?;
            edit(&folder.join("disk"), |bytes| {
                for at in [EXTENSION, EXTENSION + 8] {
                    bytes.put(at, &[0, 0, 0x12, 0x34, 0, 0, 0, 0]);
                }
            })?;
            Ok(vec!["--format=qcow2".to_owned()])
        },
        "header extension",
        "0x1234 appears twice",
    ),
    ("chain_too_deep", |folder| chain(folder, 17), "chain", "17 layers"),
    (
        "chain_with_one_file_twice",
        |folder| {
            let mut flags = chain(folder, 2)?;
            fs::hard_link(folder.join("1"), folder.join("link"))?;
            flags.push(format!("--backing=qcow2:{}", folder.join("link").display()));
            Ok(flags)
        },
        "chain",
        "one file appears twice",
    ),
];

/// Makes an image of 1 MiB.
fn create(options: &[&str], path: &Path) -> Result<()> {
    let path = path.to_str().context("temporary folder is not UTF-8")?;
    qemu_img(&[&["create", "-q"], options, &[path, "1M"]].concat()).map(drop)
}

fn overlay(folder: &Path, options: &[&str]) -> Result<Vec<String>> {
    let base = folder.join("base");
    create(&["-f", "raw"], &base)?;
    let base = base.to_str().context("temporary folder is not UTF-8")?;
    let backing = ["-f", "qcow2", "-b", base, "-F", "raw"];
    create(&[&backing, options].concat(), &folder.join("disk"))?;
    Ok(vec!["--format=qcow2".to_owned()])
}

fn read_only(folder: &Path, format: &str, option: &str) -> Result<Vec<String>> {
    create(&["-f", format, "-o", option], &folder.join("disk"))?;
    Ok(vec![format!("--format={format}"), "--read-only".to_owned()])
}

/// So many layers, all of them passed: `disk`, then `1` and so on.
fn chain(folder: &Path, layers: usize) -> Result<Vec<String>> {
    let name = |depth: usize| match depth {
        0 => folder.join("disk"),
        other => folder.join(other.to_string()),
    };
    let mut flags = vec!["--format=qcow2".to_owned()];
    create(&["-f", "qcow2"], &name(layers - 1))?;
    for depth in (0..layers - 1).rev() {
        let below = name(depth + 1);
        let below = below.to_str().context("temporary folder is not UTF-8")?;
        create(&["-f", "qcow2", "-b", below, "-F", "qcow2"], &name(depth))?;
        flags.insert(1, format!("--backing=qcow2:{below}"));
    }
    Ok(flags)
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
