//! An image that a test breaks, and how opening it must fail.

use std::path::{Path, PathBuf};

use vhost_blk::image::{Format, ImageError, OpenOptions};

use super::{Scratch, contents, create, open_with, patch, read_only};

/// An image to be broken.
pub struct Victim {
    pub scratch: Scratch,
    pub path: PathBuf,
}

impl Victim {
    /// An empty disk of 1 MiB, made with these options.
    pub fn new(options: &str) -> Self {
        let scratch = Scratch::new();
        let path = scratch.path("top");
        create(&path, options, "1M");
        Self { scratch, path }
    }

    pub fn patch(&self, offset: u64, bytes: &[u8]) -> &Self {
        patch(&self.path, offset, bytes);
        self
    }

    pub fn u32(&self, offset: u64, value: u32) -> &Self {
        self.patch(offset, &value.to_be_bytes())
    }

    pub fn u64(&self, offset: u64, value: u64) -> &Self {
        self.patch(offset, &value.to_be_bytes())
    }

    /// Refused for writing, with `field` and a reason that contains `reason`.
    #[track_caller]
    pub fn refused(&self, field: &str, reason: &str) -> &Self {
        refused(
            &[(&self.path, Format::Qcow2)],
            &OpenOptions::default(),
            field,
            reason,
        );
        self
    }

    /// Refused for reading too.
    #[track_caller]
    pub fn never(&self, field: &str, reason: &str) -> &Self {
        refused(&[(&self.path, Format::Qcow2)], &read_only(), field, reason);
        self.refused(field, reason)
    }

    /// It opens for reading.
    #[track_caller]
    pub fn reads(&self) -> &Self {
        let read_only = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let opened = open_with(&[(&self.path, Format::Qcow2)], &read_only);
        opened.unwrap_or_else(|error| panic!("{error:?}"));
        self
    }

    /// Adds a header extension in front of the others.
    pub fn extension(&self, kind: u32, data: &[u8]) -> &Self {
        let header_length = self.header_length();
        let mut bytes = [&kind.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let old = contents(&self.path)[header_length as usize..4096].to_vec();
        self.patch(header_length, &[bytes, old].concat())
    }

    /// Where the header extensions begin.
    pub fn header_length(&self) -> u64 {
        match self.word(4) {
            2 => 72,
            _ => u64::from(self.word(100)),
        }
    }

    /// Where the bitmaps extension keeps the place of the bitmap directory.
    pub fn bitmap_directory(&self) -> u64 {
        // Kind and length; the place is the last of its 24 bytes.
        let start = [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24];
        let at = contents(&self.path).windows(8).position(|bytes| bytes == start);
        at.expect("has the extension") as u64 + 24
    }

    /// The 64 bits at `offset`, for places and features.
    pub fn long(&self, offset: u64) -> u64 {
        let bytes = contents(&self.path)[offset as usize..][..8].try_into();
        u64::from_be_bytes(bytes.expect("eight bytes"))
    }

    pub fn word(&self, offset: usize) -> u32 {
        u32::from_be_bytes(
            contents(&self.path)[offset..offset + 4]
                .try_into()
                .expect("four bytes"),
        )
    }
}

/// Opening `layers` is refused, and none of them is changed.
#[track_caller]
pub fn refused(layers: &[(&Path, Format)], options: &OpenOptions, field: &str, reason: &str) {
    let before: Vec<_> = layers.iter().map(|(path, _)| contents(path)).collect();
    let error = open_with(layers, options)
        .err()
        .unwrap_or_else(|| panic!("{field} {reason}: was opened"));
    let mut inner = &error;
    while let ImageError::Backing { source, .. } = inner {
        inner = source;
    }
    match inner {
        ImageError::Refused {
            field: found,
            reason: why,
        } => {
            assert_eq!(*found, field, "{why}");
            assert!(why.contains(reason), "{field}: {why:?} does not say {reason:?}");
        }
        other => panic!("{field} {reason}: {other:?}"),
    }
    for ((path, _), before) in layers.iter().zip(before) {
        assert!(contents(path) == before, "{} was changed", path.display());
    }
}
