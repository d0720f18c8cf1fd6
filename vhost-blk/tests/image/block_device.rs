//! A disk on a block device, whose logical blocks are larger than the guest's sectors.

use crate::support;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::support::{Scratch, assert_same, contents, create, open, patch, qemu_img, read, text, write};
use libtest_mimic::{Completion, Trial};
use vhost_blk::image::qcow2::{self, Progress, Repair};
use vhost_blk::image::{Format, HostFile};

const SIZE: usize = 1 << 20;
const FILE: &str = "file";

/// A loop device; detached when dropped.
struct LoopDevice(PathBuf);

impl LoopDevice {
    /// One of zeros with logical blocks of 4096 bytes over [`FILE`]; `None` where there is none to be had.
    fn make() -> Option<(Scratch, Self)> {
        let scratch = Scratch::new();
        let file = scratch.path(FILE);
        std::fs::write(&file, vec![0; SIZE]).expect("writes");
        let mut losetup = Command::new("losetup");
        losetup
            .args(["--find", "--show", "--sector-size", "4096"])
            .arg(&file);
        let output = losetup.output().ok().filter(|output| output.status.success())?;
        let path = String::from_utf8(output.stdout).expect("a path");
        Some((scratch, Self(path.trim().into())))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

fn sectors_are_zeroed_and_discarded() -> Completion {
    let Some((_scratch, device)) = LoopDevice::make() else {
        return Completion::ignored_with("no loop devices with blocks of 4096 bytes here");
    };
    let image = open(&[(&device.0, Format::Raw)]);
    let mut expected = vec![7; SIZE];
    write(&*image, 0, &expected).expect("writes");
    for (offset, length, unmap) in [
        (512, 512, true),
        (8192 + 512, 3 * 4096, true),
        (64 << 10, 4096, true),
        (128 << 10, 1536, false),
        (256 << 10, 8192, false),
    ] {
        let zeroed = image.write_zeroes(offset, length, unmap);
        assert!(zeroed.is_ok(), "{length} bytes at {offset}: {zeroed:?}");
        expected[offset as usize..][..length as usize].fill(0);
    }
    assert_same(&read(&*image, 0, SIZE).expect("reads"), &expected, "zeroed");
    // What a discarded range shows is not said.
    image.discard(512 << 10, 512).expect("a sector");
    image.discard(600 << 10, 64 << 10).expect("whole blocks");
    image.flush().expect("flushes");
    let found = read(&*image, 0, 512 << 10).expect("reads");
    assert_same(&found, &expected[..512 << 10], "before what was discarded");
    Completion::Completed
}

fn a_disk_is_no_longer_than_its_device() -> Completion {
    let Some((scratch, device)) = LoopDevice::make() else {
        return Completion::ignored_with("no loop devices with blocks of 4096 bytes here");
    };
    let image = open(&[(&device.0, Format::Raw)]);
    let twice = 2 * SIZE as u64;
    assert!(image.grow(twice, None).is_err(), "the device is not that long");
    assert_eq!(image.capacity(), SIZE as u64);
    let longer = std::fs::OpenOptions::new()
        .write(true)
        .open(scratch.path(FILE))
        .expect("opens");
    longer.set_len(twice).expect("grows");
    let mut losetup = Command::new("losetup");
    let status = losetup.arg("--set-capacity").arg(&device.0).status();
    assert!(status.expect("losetup").success());
    image.grow(twice, None).expect("the device is that long now");
    assert_eq!(image.capacity(), twice);
    write(&*image, twice - 512, &[7; 512]).expect("writes");
    assert_same(
        &read(&*image, twice - 512, 512).expect("reads"),
        &[7; 512],
        "the end",
    );
    Completion::Completed
}

/// The device never has more room: counts find it inside.
fn an_image_on_a_device_is_repaired_and_has_snapshots() -> Completion {
    let Some((scratch, device)) = LoopDevice::make() else {
        return Completion::ignored_with("no loop devices with blocks of 4096 bytes here");
    };
    let path = scratch.path("top");
    create(&path, "cluster_size=4k", "256k");
    write(&*open(&[(&path, Format::Qcow2)]), 0, &[7; 100 << 10]).expect("writes");
    qemu_img(&["snapshot", "-c", "one", text(&path)]);
    let bytes = contents(&path);
    patch(&device.0, 0, &bytes);
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    // Of a cluster that nobody uses.
    patch(&device.0, word(word(48) as usize) + 2 * 200, &[0, 1]);
    let file = HostFile::new(support::fd(&device.0, true)).expect("is a device");
    let found = qcow2::check(&file, Repair::Refcounts, &Progress::untold()).expect("repairs");
    assert_eq!((found.leaks_fixed, found.leaks, found.corruptions), (1, 0, 0));
    support::check_clean(&device.0);
    let progress = Progress::untold();
    for name in ["two", "three"] {
        qcow2::take(&file, name, Duration::from_secs(1), &progress).expect("takes");
        support::check_clean(&device.0);
        write(&*open(&[(&device.0, Format::Qcow2)]), 0, &[9; 8192]).expect("writes");
    }
    qcow2::delete(&file, "two", &progress).expect("deletes one of three");
    qcow2::apply(&file, "one", &progress).expect("applies");
    qcow2::delete(&file, "one", &progress).expect("deletes");
    qcow2::delete(&file, "three", &progress).expect("deletes the last");
    drop(file);
    support::check_clean(&device.0);
    let image = open(&[(&device.0, Format::Qcow2)]);
    write(&*image, 0, &[8; 512]).expect("writes");
    assert_same(
        &read(&*image, 512, 1024).expect("reads"),
        &[7; 1024],
        "what was there",
    );
    Completion::Completed
}

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        support::suite::test_if_possible(
            "block_device::sectors_are_zeroed_and_discarded",
            sectors_are_zeroed_and_discarded,
        ),
        support::suite::test_if_possible(
            "block_device::a_disk_is_no_longer_than_its_device",
            a_disk_is_no_longer_than_its_device,
        ),
        support::suite::test_if_possible(
            "block_device::an_image_on_a_device_is_repaired_and_has_snapshots",
            || match Command::new("qemu-img").arg("--version").output() {
                Ok(_) => an_image_on_a_device_is_repaired_and_has_snapshots(),
                Err(_) => Completion::ignored_with("qemu-img is not installed"),
            },
        ),
    ]
}
