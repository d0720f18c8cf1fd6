//! `bulkhead image` against qemu-img: fields, verdicts, content.

use anyhow::{Context, Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    process::inherit_at,
    qemu_img::{qemu_img_in, qemu_img_output},
    suite::{Skip, artifact, test},
};
use libtest_mimic::Trial;
use nix::{
    fcntl::OFlag,
    sys::stat::Mode,
    unistd::{mkfifo, pipe2},
};
use serde_json::Value;
use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::{FileExt, symlink},
    path::Path,
    process::{Command, Output},
};
use tempfile::TempDir;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("image::info_is_qemus", info),
        test("image::check_is_qemus", check),
        test("image::converted_disks_are_identical", convert),
        test("image::long_names_are_whole", names),
        test("image::holes_are_not_read", holes),
        test("image::encrypted_images_need_their_key", encrypted),
        test("image::nothing_is_opened_by_an_images_word", outside),
        test("image::failures_leave_no_file", failures),
    ]
}

/// `bulkhead image` in `folder`.
pub(crate) fn command(folder: &TempDir, args: &[&str]) -> Result<Command> {
    let program = artifact(Artifact::Bulkhead)?;
    let tool = artifact(Artifact::ImageTool)?;
    let bin = tool.parent().context("the tool has a folder")?;
    let mut command = Command::new(program);
    command
        .env("BULKHEAD_BIN_DIR", bin)
        .current_dir(folder.path())
        .arg("image")
        .args(args);
    Ok(command)
}

/// Runs it.
fn image(folder: &TempDir, args: &[&str]) -> Result<Output> {
    command(folder, args)?.output().context("bulkhead image")
}

/// As [`image`], which must succeed; its standard output.
pub(crate) fn succeeds(folder: &TempDir, args: &[&str]) -> Result<String> {
    let output = image(folder, args)?;
    ensure!(output.status.success(), "{args:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// As [`image`], which must fail with these words.
pub(crate) fn fails(folder: &TempDir, args: &[&str], words: &[&str]) -> Result<()> {
    let output = image(folder, args)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "{args:?} succeeded");
    for word in words {
        ensure!(said.contains(word), "{args:?} does not say {word:?}: {said}");
    }
    Ok(())
}

fn qemu_io(folder: &TempDir, args: &[&str]) -> Result<Output> {
    let output = Command::new("qemu-io")
        .current_dir(folder.path())
        .args(args)
        .output();
    output.map_err(|_| Skip("qemu-io is not installed".to_owned()).into())
}

pub(crate) fn write(folder: &TempDir, file: &str, command: &str) -> Result<()> {
    let output = qemu_io(folder, &["-c", command, file])?;
    ensure!(output.status.success(), "qemu-io {command}: {output:?}");
    Ok(())
}

fn patch(folder: &TempDir, file: &str, offset: u64, bytes: &[u8]) -> Result<()> {
    let file = fs::OpenOptions::new()
        .write(true)
        .open(folder.path().join(file))?;
    Ok(file.write_all_at(bytes, offset)?)
}

pub(crate) fn json(text: &str) -> Result<Value> {
    Ok(serde_json::from_str(text)?)
}

/// The fields of the second, where the first has them too, are equal; `must` are in both.
pub(crate) fn agree(ours: &Value, theirs: &Value, must: &[&str]) -> Result<()> {
    for name in must {
        let (ours, theirs) = (&ours[name], &theirs[name]);
        ensure!(
            !ours.is_null() && ours == theirs,
            "{name}: {ours}, qemu-img says {theirs}"
        );
    }
    Ok(())
}

fn info() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let shared = ["virtual-size", "format", "filename", "dirty-flag", "actual-size"];
    qemu_img_in(folder.path(), &["create", "-f", "raw", "base.img", "4M"])?;
    for options in [
        "compat=0.10",
        "cluster_size=4k,lazy_refcounts=on",
        "compression_type=zstd,refcount_bits=1",
        "extended_l2=on,backing_file=base.img,backing_fmt=raw",
    ] {
        qemu_img_in(
            folder.path(),
            &["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "4M"],
        )?;
        if !options.contains("refcount_bits=1") {
            qemu_img_in(folder.path(), &["snapshot", "-c", "first \u{e4}", "a.qcow2"])?;
        }
        let ours = json(&succeeds(&folder, &["info", "--json", "a.qcow2"])?)?;
        let mut theirs = json(&qemu_img_in(
            folder.path(),
            &["info", "--output=json", "a.qcow2"],
        )?)?;
        agree(&ours, &theirs, &[&shared[..], &["cluster-size"]].concat())?;
        let (ours_data, theirs_data) = (
            &ours["format-specific"]["data"],
            &theirs["format-specific"]["data"],
        );
        ensure!(ours_data == theirs_data, "{ours_data}: {theirs_data}");
        // What qemu-img records of a VM's execution is not ours to show.
        for snapshot in theirs["snapshots"].as_array_mut().into_iter().flatten() {
            snapshot.as_object_mut().map(|fields| fields.remove("icount"));
        }
        for name in ["backing-filename", "backing-filename-format", "snapshots"] {
            ensure!(
                ours[name] == theirs[name],
                "{name}: {} {}",
                ours[name],
                theirs[name]
            );
        }
    }
    for format in ["raw", "vmdk", "vdi", "vhdx", "vpc"] {
        let name = format!("b.{format}");
        qemu_img_in(folder.path(), &["create", "-q", "-f", format, &name, "4M"])?;
        let ours = json(&succeeds(&folder, &["info", "--json", &name])?)?;
        let theirs = json(&qemu_img_in(
            folder.path(),
            &["info", "--output=json", "-f", format, &name],
        )?)?;
        agree(&ours, &theirs, &shared)?;
    }
    fails(
        &folder,
        &["info", "a"],
        &["the format of a is not given", "never guessed"],
    )?;
    fails(
        &folder,
        &["info", "--format=qcow2", "base.img"],
        &["magic", "not a qcow2 image"],
    )
}

fn check() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let fields = [
        "leaks",
        "corruptions",
        "check-errors",
        "image-end-offset",
        "total-clusters",
        "allocated-clusters",
    ];
    let compare = |code: i32| -> Result<()> {
        let output = image(&folder, &["check", "--json", "a.qcow2"])?;
        let theirs = qemu_img_output(folder.path(), &["check", "--output=json", "a.qcow2"])?;
        ensure!(
            output.status.code() == Some(code) && theirs.status.code() == Some(code),
            "{output:?} {theirs:?}"
        );
        let ours = json(str::from_utf8(&output.stdout)?)?;
        let mut theirs = json(str::from_utf8(&theirs.stdout)?)?;
        // qemu-img leaves out what is 0.
        for name in fields {
            if theirs[name].is_null() {
                theirs[name] = 0.into();
            }
        }
        agree(&ours, &theirs, &fields)
    };
    qemu_img_in(folder.path(), &["create", "-q", "-f", "qcow2", "a.qcow2", "8M"])?;
    write(&folder, "a.qcow2", "write -P 3 1M 1M")?;
    compare(0)?;
    let bytes = fs::read(folder.path().join("a.qcow2"))?;
    let word = |at: usize| {
        bytes
            .get(at..at + 8)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u64::from_be_bytes)
    };
    let block = word(usize::try_from(word(48))?);
    // A cluster too many counted once, then one too few.
    patch(&folder, "a.qcow2", block + 2 * 200, &[0, 1])?;
    let file = fs::OpenOptions::new()
        .write(true)
        .open(folder.path().join("a.qcow2"))?;
    file.set_len(201 << 16)?;
    compare(3)?;
    succeeds(&folder, &["check", "--repair", "a.qcow2"])?;
    compare(0)?;
    let bytes = fs::read(folder.path().join("a.qcow2"))?;
    let word = |at: usize| {
        bytes
            .get(at..at + 8)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u64::from_be_bytes)
    };
    let block = word(usize::try_from(word(48))?);
    patch(&folder, "a.qcow2", block + 2 * 5, &[0, 0])?;
    let output = image(&folder, &["check", "a.qcow2"])?;
    ensure!(output.status.code() == Some(2), "{output:?}");
    succeeds(&folder, &["check", "--repair", "a.qcow2"])?;
    compare(0)?;
    fails(
        &folder,
        &["check", "--format=raw", "a.qcow2"],
        &["a raw image has no refcounts"],
    )?;
    fs::remove_file(folder.path().join("a.qcow2"))?;
    let data = ["-o", "data_file=a.data", "a.qcow2", "8M"];
    qemu_img_in(
        folder.path(),
        &[&["create", "-q", "-f", "qcow2"][..], &data].concat(),
    )?;
    write(&folder, "a.qcow2", "write -P 3 1M 1M")?;
    compare(0)
}

fn convert() -> Result<()> {
    let folder = tempfile::tempdir()?;
    succeeds(&folder, &["create", "base.img", "6M"])?;
    write(&folder, "base.img", "write -P 9 1M 100k")?;
    qemu_img_in(
        folder.path(),
        &[
            "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "a.qcow2",
        ],
    )?;
    write(&folder, "a.qcow2", "write -P 4 3000k 1M")?;
    for (format, name) in [("qcow2", "b.qcow2"), ("raw", "b.img")] {
        succeeds(&folder, &["convert", "a.qcow2", name])?;
        qemu_img_in(
            folder.path(),
            &["compare", "-f", "qcow2", "-F", format, "a.qcow2", name],
        )?;
    }
    qemu_img_in(folder.path(), &["check", "-q", "b.qcow2"])?;
    let info = json(&succeeds(&folder, &["info", "--json", "b.img"])?)?;
    ensure!(
        info["actual-size"].as_u64().is_some_and(|used| used < 2 << 20),
        "zeros take space: {info}"
    );
    let sources: [(&str, &[&str]); 6] = [
        ("vmdk", &[]),
        ("vmdk", &["-o", "subformat=streamOptimized"]),
        ("vdi", &[]),
        ("vhdx", &[]),
        ("vpc", &["-o", "force_size=on"]),
        ("qcow2", &["-c", "-o", "compression_type=zstd"]),
    ];
    for (format, options) in sources {
        let source = format!("c.{format}");
        let base = ["convert", "-f", "raw", "-O", format];
        qemu_img_in(folder.path(), &[&base[..], options, &["b.img", &source]].concat())?;
        succeeds(&folder, &["convert", &source, "d.qcow2"])?;
        qemu_img_in(
            folder.path(),
            &["compare", "-f", "raw", "-F", "qcow2", "b.img", "d.qcow2"],
        )?;
        qemu_img_in(folder.path(), &["check", "-q", "d.qcow2"])?;
        fs::remove_file(folder.path().join("d.qcow2"))?;
    }
    qemu_img_in(
        folder.path(),
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "data_file=e.data",
            "e.qcow2",
            "4M",
        ],
    )?;
    write(&folder, "e.qcow2", "write -P 3 1M 100k")?;
    fails(
        &folder,
        &["convert", "e.qcow2", "f.qcow2"],
        &["external data file"],
    )?;
    succeeds(&folder, &["convert", "--data-file=e.data", "e.qcow2", "f.qcow2"])?;
    qemu_img_in(folder.path(), &["compare", "e.qcow2", "f.qcow2"])?;
    let not_qcow2 = ["convert", "--data-file=e.data", "b.img", "g.qcow2"];
    fails(&folder, &not_qcow2, &["only a qcow2 image has one"])
}

/// A longer one is cut to no other file's name.
fn names() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let name = format!("{}/{}", "d".repeat(200), "b".repeat(63));
    let decoy = name.get(..256).context("is longer")?;
    fs::create_dir(folder.path().join("d".repeat(200)))?;
    for (file, content) in [(name.as_str(), 7), (decoy, 8)] {
        fs::write(folder.path().join(file), vec![content; 1 << 20])?;
    }
    succeeds(&folder, &["create", "-b", &name, "-F", "raw", "a.qcow2"])?;
    succeeds(&folder, &["convert", "a.qcow2", "b.img"])?;
    let compare = ["compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "b.img"];
    qemu_img_in(folder.path(), &compare)?;
    let data = format!("data_file={name}");
    qemu_img_in(
        folder.path(),
        &["create", "-q", "-f", "qcow2", "-o", &data, "d.qcow2", "1M"],
    )?;
    for image in ["a.qcow2", "d.qcow2"] {
        let ours = json(&succeeds(&folder, &["info", "--json", image])?)?;
        let theirs = json(&qemu_img_in(folder.path(), &["info", "--output=json", image])?)?;
        for field in ["backing-filename", "format-specific"] {
            ensure!(
                ours[field] == theirs[field],
                "{field}: {} {}",
                ours[field],
                theirs[field]
            );
        }
    }
    // Bytes that are no text have no file of a text's name.
    fs::write(folder.path().join("x\u{fffd}.img"), vec![8; 1 << 20])?;
    fs::write(folder.path().join("xy.img"), vec![8; 1 << 20])?;
    succeeds(&folder, &["create", "-b", "xy.img", "-F", "raw", "c.qcow2"])?;
    let front = fs::read(folder.path().join("c.qcow2"))?;
    let at = u64::from_be_bytes(*front[8..].first_chunk().context("a header")?);
    patch(&folder, "c.qcow2", at + 1, &[0xff])?;
    fails(&folder, &["convert", "c.qcow2", "c.img"], &["is not UTF-8"])?;
    ensure!(!folder.path().join("c.img").exists());
    Ok(())
}

/// Of a raw source, or of one that shows through: there is more of it than could be read.
fn holes() -> Result<()> {
    const SIZE: u64 = 2 << 40;
    let folder = tempfile::tempdir()?;
    let file = fs::File::create(folder.path().join("a.img"))?;
    file.set_len(SIZE)?;
    for (at, len) in [(0, 512), (1 << 40, 3 << 20), ((1 << 40) + (5 << 20), 4096)] {
        file.write_all_at(&vec![7; len], at)?;
    }
    file.write_all_at(&[9; 512], SIZE - 512)?;
    succeeds(&folder, &["create", "-b", "a.img", "-F", "raw", "b.qcow2"])?;
    write(&folder, "b.qcow2", "write -P 3 1M 64k")?;
    for (source, format) in [("a.img", "raw"), ("b.qcow2", "qcow2")] {
        succeeds(&folder, &["convert", source, "c.qcow2"])?;
        let compare = ["compare", "-f", format, "-F", "qcow2", source, "c.qcow2"];
        qemu_img_in(folder.path(), &compare)?;
        qemu_img_in(folder.path(), &["check", "-q", "c.qcow2"])?;
        fs::remove_file(folder.path().join("c.qcow2"))?;
    }
    Ok(())
}

fn encrypted() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("key"), "secret")?;
    let secret = ["--object", "secret,id=s,file=key"];
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1";
    let create = ["create", "-q", "-f", "qcow2"];
    qemu_img_in(
        folder.path(),
        &[&create[..], &secret, &["-o", options, "a.qcow2", "2M"]].concat(),
    )?;
    let source = "driver=qcow2,file.filename=a.qcow2,encrypt.key-secret=s";
    let io = ["--image-opts", source, "-c", "write -P 7 1M 64k"];
    let output = qemu_io(&folder, &[&secret[..], &io].concat())?;
    ensure!(output.status.success(), "{output:?}");
    let info = json(&succeeds(&folder, &["info", "--json", "a.qcow2"])?)?;
    ensure!(info["encrypted"] == true, "{info}");
    fails(
        &folder,
        &["convert", "a.qcow2", "b.img"],
        &["crypt_method", "no passphrase"],
    )?;
    succeeds(&folder, &["convert", "--key-file", "key", "a.qcow2", "b.img"])?;
    write(&folder, "b.img", "read -P 7 1M 64k")?;
    // A pipe is read once, and the tool runs several times.
    let piped: [&[&str]; 2] = [
        &["convert", "--key-fd=3", "a.qcow2", "d.img"],
        &["resize", "--key-fd=3", "a.qcow2", "+1M"],
    ];
    for args in piped {
        let (reads, writes) = pipe2(OFlag::O_CLOEXEC)?;
        File::from(writes).write_all(b"secret")?;
        let mut command = command(&folder, args)?;
        inherit_at(&mut command, reads, 3)?;
        let output = command.output()?;
        ensure!(output.status.success(), "{args:?}: {output:?}");
    }
    write(&folder, "d.img", "read -P 7 1M 64k")?;
    let info = json(&succeeds(&folder, &["info", "--json", "a.qcow2"])?)?;
    ensure!(info["virtual-size"] == 3 << 20, "{info}");
    mkfifo(&folder.path().join("fifo"), Mode::S_IRWXU)?;
    fails(
        &folder,
        &["convert", "--key-file=fifo", "a.qcow2", "c.img"],
        &["not a regular file", "key-fd=N"],
    )?;
    fs::write(folder.path().join("key"), "wrong")?;
    fails(
        &folder,
        &["convert", "--key-file", "key", "a.qcow2", "c.img"],
        &["passphrase", "opens none"],
    )
}

fn outside() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let elsewhere = tempfile::tempdir()?;
    let base = elsewhere.path().join("base.img");
    fs::write(&base, vec![7; 1 << 20])?;
    let name = base.to_str().context("temporary paths are UTF-8")?;
    qemu_img_in(
        folder.path(),
        &["create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", "a.qcow2"],
    )?;
    fails(
        &folder,
        &["convert", "a.qcow2", "b.img"],
        &["lies outside", "--image-folder"],
    )?;
    ensure!(!folder.path().join("b.img").exists());
    let allowed = elsewhere.path().to_str().context("temporary paths are UTF-8")?;
    succeeds(
        &folder,
        &["convert", "--image-folder", allowed, "a.qcow2", "b.img"],
    )?;
    ensure!(fs::read(folder.path().join("b.img"))? == vec![7; 1 << 20]);
    // No link is followed, be it the file or a folder above it.
    symlink(&base, folder.path().join("link"))?;
    symlink(elsewhere.path(), folder.path().join("sub"))?;
    for (image, linked) in [("l.qcow2", "link"), ("s.qcow2", "sub/base.img")] {
        qemu_img_in(
            folder.path(),
            &["create", "-q", "-f", "qcow2", "-b", linked, "-F", "raw", image],
        )?;
        fails(
            &folder,
            &["convert", image, "l.img"],
            &[linked, "lies outside", "--image-folder"],
        )?;
        ensure!(!folder.path().join("l.img").exists());
    }
    // Names that QEMU would take for more than a file's are files that are not there.
    let front = fs::read(folder.path().join("a.qcow2"))?;
    let at = u64::from_be_bytes(*front[8..].first_chunk().context("a header")?);
    for hostile in [
        "json:{\"file.filename\":\"/etc/passwd\"}",
        "nbd:unix:/tmp/x",
        "../../etc/passwd",
    ] {
        patch(&folder, "a.qcow2", at, hostile.as_bytes())?;
        patch(
            &folder,
            "a.qcow2",
            16,
            &u32::try_from(hostile.len())?.to_be_bytes(),
        )?;
        fails(
            &folder,
            &["convert", "a.qcow2", "c.img"],
            &["cannot open the backing file"],
        )?;
        ensure!(!folder.path().join("c.img").exists());
    }
    Ok(())
}

fn failures() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let exists = |name: &str| Path::new(&folder.path().join(name)).exists();
    succeeds(&folder, &["create", "a.qcow2", "1M"])?;
    write(&folder, "a.qcow2", "write -P 1 0 512")?;
    let bytes = fs::read(folder.path().join("a.qcow2"))?;
    let l1 = u64::from_be_bytes(*bytes[40..].first_chunk().context("a header")?);
    let entry = u64::from_be_bytes(*bytes[usize::try_from(l1)?..].first_chunk().context("a table")?);
    patch(
        &folder,
        "a.qcow2",
        entry & !(1 << 63),
        &(1_u64 << 50).to_be_bytes(),
    )?;
    let before = fs::read(folder.path().join("a.qcow2"))?;
    fails(
        &folder,
        &["convert", "a.qcow2", "b.img"],
        &["L2 entry", "past the file's end"],
    )?;
    ensure!(!exists("b.img"), "a half-made image was left");
    let output = image(&folder, &["check", "a.qcow2"])?;
    ensure!(output.status.code() == Some(2), "{output:?}");
    ensure!(
        fs::read(folder.path().join("a.qcow2"))? == before,
        "the image was changed"
    );
    Ok(())
}
