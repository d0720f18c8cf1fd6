//! `bulkhead image` makes and changes images, which qemu-img finds as it would have made them.

use crate::image::{agree, command, fails, json, succeeds, write};
use anyhow::{Result, ensure};
use integration_tests::{qemu_img::qemu_img_in, suite::test};
use libtest_mimic::Trial;
use nix::pty::openpty;
use std::{
    fs::{self, File},
    io::Read,
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("image::created_images_are_sound", create),
        test("image::a_chain_has_a_bound", chain),
        test("image::snapshots_are_qemus", snapshots),
        test("image::disks_grow_and_shrink", resize),
        test("image::terminals_show_how_far_it_is", progress),
    ]
}

/// Of what takes long on a large image, and nowhere else.
fn progress() -> Result<()> {
    let folder = tempfile::tempdir()?;
    succeeds(&folder, &["create", "a.qcow2", "64M"])?;
    let jobs: [(&[&str], &str); 5] = [
        (&["check", "a.qcow2"], " tables"),
        (&["snapshot", "--create", "one", "a.qcow2"], " tables"),
        (&["snapshot", "--apply", "one", "a.qcow2"], " tables"),
        (&["snapshot", "--delete", "one", "a.qcow2"], " tables"),
        (&["convert", "a.qcow2", "b.qcow2"], "64.00 MiB"),
    ];
    for (args, unit) in jobs {
        let terminal = openpty(None, None)?;
        let output = command(&folder, args)?.stderr(terminal.slave).output()?;
        ensure!(output.status.success(), "{args:?}: {output:?}");
        let mut screen = Vec::new();
        // It ends with an error: nobody has the other side any more.
        let _ = File::from(terminal.master).read_to_end(&mut screen);
        let screen = String::from_utf8_lossy(&screen);
        ensure!(screen.contains(unit), "{args:?}: {screen:?}");
    }
    let output = command(&folder, &["check", "a.qcow2"])?.output()?;
    ensure!(output.stderr.is_empty(), "{output:?}");
    Ok(())
}

fn create() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (size, cluster) in [("1", "64K"), ("100", "512"), ("5G", "4K"), ("4096G", "2M")] {
        let bytes = if size == "1" {
            "512".to_owned()
        } else {
            size.replace("100", "100K")
        };
        succeeds(&folder, &["create", "--cluster-size", cluster, "a.qcow2", &bytes])?;
        qemu_img_in(folder.path(), &["check", "-q", "a.qcow2"])?;
        let theirs = json(&qemu_img_in(
            folder.path(),
            &["info", "--output=json", "a.qcow2"],
        )?)?;
        let ours = json(&succeeds(&folder, &["info", "--json", "a.qcow2"])?)?;
        agree(&ours, &theirs, &["virtual-size", "cluster-size"])?;
        fails(&folder, &["create", "a.qcow2", "1M"], &["never overwritten"])?;
        fs::remove_file(folder.path().join("a.qcow2"))?;
    }
    succeeds(&folder, &["create", "base.img", "3M"])?;
    ensure!(fs::metadata(folder.path().join("base.img"))?.len() == 3 << 20);
    write(&folder, "base.img", "write -P 9 1M 1M")?;
    succeeds(
        &folder,
        &[
            "create",
            "-b",
            "base.img",
            "-F",
            "raw",
            "--lazy-refcounts",
            "top.qcow2",
        ],
    )?;
    qemu_img_in(folder.path(), &["check", "-q", "top.qcow2"])?;
    qemu_img_in(
        folder.path(),
        &["compare", "-f", "qcow2", "-F", "raw", "top.qcow2", "base.img"],
    )?;
    write(&folder, "top.qcow2", "write -P 1 0 3M")?;
    qemu_img_in(folder.path(), &["check", "-q", "top.qcow2"])?;
    fails(
        &folder,
        &["create", "--cluster-size=3000", "x.qcow2", "1M"],
        &["no power of two"],
    )?;
    fs::write(folder.path().join("key"), "secret")?;
    fs::create_dir(folder.path().join("in"))?;
    let refused: [(&[&str], &str); 11] = [
        (&["x.vmdk", "1M"], "can only be read"),
        (&["x.img", "0"], "positive multiple of 512"),
        (&["x.img", "511"], "positive multiple of 512"),
        (&["x.qcow2", "0"], "positive multiple of 512"),
        (&["--key-file", "key", "x.qcow2", "1M"], "qemu-img create"),
        (&["--key-fd=9", "x.qcow2", "1M"], "qemu-img create"),
        (&["--image-folder", "/nope", "x.img", "1M"], "goes with --backing"),
        (&["-b", "../base.img", "-F", "raw", "in/x.qcow2"], "lies outside"),
        (&["no/x.img", "1M"], "No such file"),
        (&["base.img", "1M"], "never overwritten"),
        (&["-F", "raw", "x.qcow2", "1M"], "--backing <FILE>"),
    ];
    for (args, words) in refused {
        fails(&folder, &[&["create"], args].concat(), &[words])?;
    }
    for made in ["x.vmdk", "x.img", "x.qcow2", "in/x.qcow2"] {
        ensure!(!folder.path().join(made).exists(), "{made} was made");
    }
    // As whoever opens it will be allowed to.
    let below = [
        "create",
        "--image-folder",
        ".",
        "-b",
        "../base.img",
        "-F",
        "raw",
        "in/x.qcow2",
    ];
    succeeds(&folder, &below)?;
    fails(&folder, &["convert", "base.img", "z"], &["--output-format=raw"])
}

/// As many as can be opened, and no more are made.
fn chain() -> Result<()> {
    let folder = tempfile::tempdir()?;
    succeeds(&folder, &["create", "0.qcow2", "1M"])?;
    for layer in 1..16 {
        let (below, name) = (format!("{}.qcow2", layer - 1), format!("{layer}.qcow2"));
        // Each step looks at all that is below; only the last two are of interest.
        if layer < 15 {
            let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-u"];
            qemu_img_in(
                folder.path(),
                &[&create[..], &["-b", &below, &name, "1M"]].concat(),
            )?;
        } else {
            succeeds(&folder, &["create", "-b", &below, "-F", "qcow2", &name])?;
        }
    }
    succeeds(&folder, &["convert", "15.qcow2", "a.img"])?;
    let one_more = ["create", "-b", "15.qcow2", "-F", "qcow2", "16.qcow2"];
    fails(&folder, &one_more, &["more than 16 layers"])?;
    ensure!(!folder.path().join("16.qcow2").exists(), "it was made");
    Ok(())
}

fn snapshots() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let sound = || qemu_img_in(folder.path(), &["check", "-q", "a.qcow2"]);
    let same = |name: &str| {
        qemu_img_in(
            folder.path(),
            &["compare", "-f", "qcow2", "-F", "raw", "a.qcow2", name],
        )
    };
    succeeds(&folder, &["create", "a.qcow2", "4M"])?;
    for (value, name) in [("1", "one"), ("2", "two"), ("3", "three")] {
        write(&folder, "a.qcow2", &format!("write -P {value} {value}00k 300k"))?;
        qemu_img_in(
            folder.path(),
            &["convert", "-O", "raw", "a.qcow2", &format!("{name}.img")],
        )?;
        succeeds(&folder, &["snapshot", "--create", name, "a.qcow2"])?;
        sound()?;
    }
    let ours = json(&succeeds(&folder, &["info", "--json", "a.qcow2"])?)?;
    let theirs = json(&qemu_img_in(
        folder.path(),
        &["info", "--output=json", "a.qcow2"],
    )?)?;
    agree(&ours, &theirs, &["snapshots"])?;
    let list = succeeds(&folder, &["snapshot", "--list", "a.qcow2"])?;
    ensure!(
        ["one", "two", "three"].iter().all(|name| list.contains(name)),
        "{list}"
    );
    write(&folder, "a.qcow2", "write -P 7 0 4M")?;
    succeeds(&folder, &["snapshot", "--apply", "one", "a.qcow2"])?;
    sound()?;
    same("one.img")?;
    succeeds(&folder, &["snapshot", "--delete", "2", "a.qcow2"])?;
    sound()?;
    // qemu-img applies what is left.
    qemu_img_in(folder.path(), &["snapshot", "-a", "three", "a.qcow2"])?;
    same("three.img")?;
    write(&folder, "a.qcow2", "write -P 8 0 4M")?;
    succeeds(&folder, &["snapshot", "--delete", "three", "a.qcow2"])?;
    succeeds(&folder, &["snapshot", "--apply", "one", "a.qcow2"])?;
    succeeds(&folder, &["snapshot", "--delete", "one", "a.qcow2"])?;
    sound()?;
    same("one.img")?;
    fails(
        &folder,
        &["snapshot", "--apply", "gone", "a.qcow2"],
        &["snapshot name", "there is no"],
    )?;
    qemu_img_in(
        folder.path(),
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "compat=0.10",
            "old.qcow2",
            "1M",
        ],
    )?;
    fails(
        &folder,
        &["snapshot", "--create", "x", "old.qcow2"],
        &["version", "dirty bit"],
    )
}

fn resize() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for name in ["a.qcow2", "a.img"] {
        let format = if name == "a.img" { "raw" } else { "qcow2" };
        succeeds(&folder, &["create", name, "2M"])?;
        write(&folder, name, "write -P 5 0 2M")?;
        // Past what the first L1 table maps.
        succeeds(&folder, &["resize", name, "+3G"])?;
        let size = json(&qemu_img_in(
            folder.path(),
            &["info", "--output=json", "-f", format, name],
        )?)?;
        ensure!(size["virtual-size"] == (3_u64 << 30) + (2 << 20), "{size}");
        write(&folder, name, "read -P 5 0 2M")?;
        write(&folder, name, "read -P 0 2M 8M")?;
        write(&folder, name, "write -P 6 2G 1M")?;
        fails(&folder, &["resize", name, "1M"], &["fewer than", "--shrink"])?;
        succeeds(&folder, &["resize", "--shrink", name, "1000K"])?;
        succeeds(&folder, &["resize", name, "3M"])?;
        write(&folder, name, "read -P 5 0 1000k")?;
        write(&folder, name, "read -P 0 1000k 2072k")?;
        if format == "qcow2" {
            qemu_img_in(folder.path(), &["check", "-q", name])?;
        }
        for size in ["1000", "0"] {
            fails(&folder, &["resize", "--shrink", name, size], &["multiple of 512"])?;
        }
    }
    // What is no disk yet.
    for (length, size, after) in [
        (0, "+1M", 1 << 20),
        (1000, "+1M", (1 << 20) + 1024),
        (1000, "4K", 4096),
    ] {
        let path = folder.path().join("b.img");
        fs::write(&path, vec![7; length])?;
        succeeds(&folder, &["resize", "b.img", size])?;
        ensure!(fs::metadata(&path)?.len() == after, "{length} by {size}");
    }
    Ok(())
}
