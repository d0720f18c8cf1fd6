//! Images past the page cache: a write shares no page with metadata, whatever the size of clusters.

use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use crate::support::{Scratch, check_clean, create, fd, open, read, write};
use vhost_blk::image::{BlockFile, Format, HostFile, Image, OpenOptions, Resolved, open_layers};
use vhost_blk::io::DirectFile;

const PAGE: u64 = 4096;
const DATA: u64 = 64 << 10;

/// Opens the image in `path` with O_DIRECT; `None` where the host has none.
fn open_direct(path: &Path, format: Format) -> Option<Arc<dyn Image>> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).custom_flags(nix::libc::O_DIRECT);
    let Ok(direct) = options.open(path) else {
        eprintln!("no O_DIRECT in {}", path.display());
        return None;
    };
    let plain = HostFile::new(fd(path, true)).expect("is a file");
    let file = DirectFile::new(plain, direct.into()).expect("are one file");
    let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(format, Arc::new(file))];
    Some(open_layers(layers, None, &OpenOptions::default()).expect("opens"))
}

/// Where each write of `len` bytes may be submitted.
fn places(image: &dyn Image, len: u64) -> Vec<(u64, u64)> {
    let resolve = |at: u64| match image.resolve_write(at, len).expect("resolves") {
        Resolved::Mapped(extent, _guard) => Some((extent.offset, extent.len)),
        _ => None,
    };
    (0..DATA / len).filter_map(|index| resolve(index * len)).collect()
}

fn only_whole_pages_are_written_past_the_cache() {
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
            return;
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
}

fn a_raw_image_is_no_other() {
    let scratch = Scratch::new();
    let path = scratch.path("raw");
    std::fs::write(&path, [0; DATA as usize]).expect("writes");
    let Some(image) = open_direct(&path, Format::Raw) else {
        return;
    };
    assert_eq!(places(&*image, 512), []);
    assert_eq!(places(&*image, PAGE).len() as u64, DATA / PAGE);
    assert!(matches!(image.resolve_read(512, 512), Ok(Resolved::Mapped(..))));
}

crate::suite! {
    with_qemu_img: [only_whole_pages_are_written_past_the_cache],
    alone: [a_raw_image_is_no_other],
}
