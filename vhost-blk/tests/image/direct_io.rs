//! Images past the page cache: a write shares no page with metadata, whatever the size of clusters.

use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use libtest_mimic::{Completion, Trial};

use crate::support::{Scratch, check_clean, contents, create, fd, open, read, suite, write};
use vhost_blk::image::{BlockFile, Format, HostFile, Image, OpenOptions, Resolved, open_layers};
use vhost_blk::io::DirectFile;

const PAGE: u64 = 4096;
const DATA: u64 = 64 << 10;

/// Opens `path` with O_DIRECT; `None` where the host has none.
fn direct_file(path: &Path) -> Option<DirectFile> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).custom_flags(nix::libc::O_DIRECT);
    let direct = match options.open(path) {
        Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => return None,
        direct => direct.expect("opens"),
    };
    let plain = HostFile::new(fd(path, true)).expect("is a file");
    Some(DirectFile::new(plain, direct.into()).expect("are one file"))
}

/// The image in it.
fn open_direct(path: &Path, format: Format) -> Option<Arc<dyn Image>> {
    let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(format, Arc::new(direct_file(path)?))];
    Some(open_layers(layers, None, &OpenOptions::default()).expect("opens"))
}

fn no_direct_io() -> Completion {
    Completion::ignored_with("no O_DIRECT in the folder for temporary files")
}

/// Where each write of `len` bytes may be submitted.
fn places(image: &dyn Image, len: u64) -> Vec<(u64, u64)> {
    let resolve = |at: u64| match image.resolve_write(at, len).expect("resolves") {
        Resolved::Mapped(extent, _guard) => Some((extent.offset, extent.len)),
        _ => None,
    };
    (0..DATA / len).filter_map(|index| resolve(index * len)).collect()
}

fn only_whole_pages_are_written_past_the_cache() -> Completion {
    if let Some(ignored) = suite::no_qemu_img() {
        return ignored;
    }
    for options in [
        "cluster_size=512",
        "cluster_size=2k",
        "cluster_size=16k,extended_l2=on",
        "",
    ] {
        let scratch = Scratch::new();
        let path = scratch.path("top");
        create(&path, options, "1M");
        let Some(image) = open_direct(&path, Format::Qcow2) else {
            return no_direct_io();
        };
        write(&*image, 0, &[5; DATA as usize]).expect("writes");
        for len in [512, 2 << 10, PAGE, 2 * PAGE] {
            for (offset, len) in places(&*image, len) {
                assert!(
                    offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE),
                    "{options}: {len} bytes at {offset:#x}"
                );
            }
            // Clusters of a page and more lie at one.
            if options.is_empty() && len >= PAGE {
                assert_eq!(places(&*image, len).len() as u64, DATA / len, "{len}");
            }
        }
        for at in (0..DATA).step_by(1536) {
            write(&*image, at, &[9; 512]).expect("writes");
        }
        image.close().expect("closes");
        drop(image);
        check_clean(&path);
        let found = read(&*open(&[(&path, Format::Qcow2)]), 0, DATA as usize).expect("reads");
        let wrong = (0..DATA as usize).find(|at| found[*at] != if at % 1536 < 512 { 9 } else { 5 });
        assert_eq!(wrong, None, "{options}");
    }
    Completion::Completed
}

fn a_raw_image_is_no_other() -> Completion {
    let scratch = Scratch::new();
    let path = scratch.path("raw");
    std::fs::write(&path, [0; DATA as usize]).expect("writes");
    let Some(image) = open_direct(&path, Format::Raw) else {
        return no_direct_io();
    };
    assert_eq!(places(&*image, 512), []);
    assert_eq!(places(&*image, PAGE).len() as u64, DATA / PAGE);
    assert!(matches!(image.resolve_read(512, 512), Ok(Resolved::Mapped(..))));
    Completion::Completed
}

fn what_is_secured_has_its_space() -> Completion {
    let scratch = Scratch::new();
    let path = scratch.path("file");
    std::fs::write(&path, [7; 100]).expect("writes");
    let Some(file) = direct_file(&path) else {
        return no_direct_io();
    };
    file.secure_range(0, 1 << 20).expect("there is space");
    assert_eq!(contents(&path).len(), 1 << 20);
    let taken = std::fs::metadata(&path).expect("is there").blocks() * 512;
    assert!(taken >= 1 << 20, "{taken} bytes");
    Completion::Completed
}

pub(crate) fn tests() -> Vec<Trial> {
    let test = |name, body| suite::test_if_possible(&suite::name(module_path!(), name), body);
    vec![
        test(
            "only_whole_pages_are_written_past_the_cache",
            only_whole_pages_are_written_past_the_cache,
        ),
        test("a_raw_image_is_no_other", a_raw_image_is_no_other),
        test("what_is_secured_has_its_space", what_is_secured_has_its_space),
    ]
}
