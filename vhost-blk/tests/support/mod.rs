//! What the image tests share: qemu-img as the second opinion, a model of a disk, random requests.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

pub mod damaged;
pub mod growing;
pub mod hooked;
pub mod recorder;
pub mod suite;
pub mod victim;

use std::fs::{File, OpenOptions as FileOptions};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use vhost_blk::image::{self, Format, Image, OpenOptions};
use vm_memory::VolatileSlice;

/// Everything is to be tried, however long it takes: `cargo verify --full`.
pub fn full() -> bool {
    std::env::var_os("BULKHEAD_FULL").is_some()
}

/// Runs qemu-img and gives back what it did.
pub fn qemu_img_output(args: &[&str]) -> Output {
    Command::new("qemu-img")
        .args(args)
        .output()
        .expect("qemu-img runs")
}

/// Runs qemu-img, which must succeed.
#[track_caller]
pub fn qemu_img(args: &[&str]) -> String {
    let output = qemu_img_output(args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {args:?}: {text}{error}");
    text
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

pub fn create(path: &Path, options: &str, size: &str) {
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([text(path), size]);
    qemu_img(&args);
}

pub fn fd(path: &Path, write: bool) -> OwnedFd {
    FileOptions::new()
        .read(true)
        .write(write)
        .open(path)
        .expect("opens")
        .into()
}

/// For those who may not write.
pub fn read_only() -> OpenOptions {
    OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    }
}

/// Opens `layers`, from top to base.
pub fn open_with(
    layers: &[(&Path, Format)],
    options: &OpenOptions,
) -> Result<Arc<dyn Image>, image::ImageError> {
    let backing = layers[1..]
        .iter()
        .map(|(path, format)| (*format, fd(path, false)))
        .collect();
    image::open(fd(layers[0].0, !options.read_only), layers[0].1, backing, options)
}

#[track_caller]
pub fn open(layers: &[(&Path, Format)]) -> Arc<dyn Image> {
    open_with(layers, &OpenOptions::default()).unwrap_or_else(|error| panic!("{error:?}"))
}

/// Reads a range of an image.
pub fn read(image: &dyn Image, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    bytes.fill(0xaa);
    image.read(&[VolatileSlice::from(&mut bytes[..])], offset)?;
    Ok(bytes)
}

/// Writes `bytes` in three pieces.
pub fn write(image: &dyn Image, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
    let mut bytes = bytes.to_vec();
    let third = bytes.len() / 3;
    let (first, rest) = bytes.split_at_mut(third);
    let (second, last) = rest.split_at_mut(third);
    image.write(&[first.into(), second.into(), last.into()], offset)
}

/// All of a file.
pub fn contents(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    File::open(path)
        .expect("opens")
        .read_to_end(&mut bytes)
        .expect("reads");
    bytes
}

/// What qemu-img reads from an image.
pub fn qemu_contents(path: &Path, args: &[&str]) -> Vec<u8> {
    let raw = path.with_extension("compare-raw");
    // The copy is read at once: it need not reach the disk.
    let mut all = vec!["convert", "-U", "-f", "qcow2", "-O", "raw", "-t", "unsafe"];
    all.extend(args);
    all.extend([text(path), text(&raw)]);
    qemu_img(&all);
    let bytes = contents(&raw);
    std::fs::remove_file(raw).expect("removes");
    bytes
}

/// `qemu-img check` finds nothing at all.
#[track_caller]
pub fn check_clean(path: &Path) {
    qemu_img(&["check", "-U", "-q", "-f", "qcow2", text(path)]);
}

/// `qemu-img check` finds nothing, or leaks only (exit code 3).
pub fn check_leaks_at_most(path: &Path) -> Result<(), String> {
    let output = qemu_img_output(&["check", "-U", "-f", "qcow2", text(path)]);
    match output.status.code() {
        Some(0 | 3) => Ok(()),
        _ => Err(format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

#[track_caller]
pub fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if found == expected {
        return;
    }
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        panic!(
            "{what}: differ first at {at:#x}: {:#x}, expected {:#x}",
            found[at], expected[at]
        );
    }
}

/// A small generator of reproducible numbers (xorshift).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }

    /// A range of whole sectors inside `size`, at most `most` bytes; often aligned to large powers of two.
    pub fn range(&mut self, size: u64, most: u64) -> (u64, u64) {
        let unit = 512 << (self.below(4) * 3);
        let offset = (self.below(size) & !(unit - 1)).min(size - 512);
        let len = (self.below(most) / unit + 1) * unit;
        (offset, len.min(size - offset).max(512))
    }
}

/// One request.
#[derive(Clone, Debug)]
pub enum Request {
    Write { offset: u64, bytes: Vec<u8> },
    Discard { offset: u64, len: u64 },
    Zero { offset: u64, len: u64, unmap: bool },
    Flush,
    Read { offset: u64, len: u64 },
}

/// Makes a request; its data can be told from every other's by `tag`.
pub fn random_request(random: &mut Random, size: u64, most: u64, tag: u8) -> Request {
    let (offset, len) = random.range(size, most);
    match random.below(16) {
        0..8 => Request::Write {
            offset,
            bytes: vec![tag; len as usize],
        },
        8..10 => Request::Discard { offset, len: len * 2 },
        10..12 => Request::Zero {
            offset,
            len,
            unmap: random.below(2) == 0,
        },
        12 => Request::Flush,
        _ => Request::Read { offset, len },
    }
    .clipped(size)
}

impl Request {
    fn clipped(self, size: u64) -> Self {
        match self {
            Self::Discard { offset, len } => Self::Discard {
                offset,
                len: len.min(size - offset),
            },
            other => other,
        }
    }

    /// Runs the request and keeps `model` equal to the disk. Discarded ranges are read back: what they
    /// read as is the image's choice between zeros and the old data.
    pub fn run(&self, image: &dyn Image, model: &mut [u8]) {
        match self {
            Self::Write { offset, bytes } => {
                write(image, *offset, bytes).unwrap_or_else(|error| panic!("write: {error:?}"));
                model[*offset as usize..][..bytes.len()].copy_from_slice(bytes);
            }
            Self::Discard { offset, len } => {
                image
                    .discard(*offset, *len)
                    .unwrap_or_else(|error| panic!("discard: {error:?}"));
                let now = read(image, *offset, *len as usize).expect("reads");
                let old = &mut model[*offset as usize..][..*len as usize];
                for (at, (new, old)) in now.iter().zip(old.iter()).enumerate() {
                    assert!(
                        new == old || *new == 0,
                        "discard of {offset:#x}+{len:#x} shows other data at +{at:#x}"
                    );
                }
                old.copy_from_slice(&now);
            }
            Self::Zero { offset, len, unmap } => {
                image
                    .write_zeroes(*offset, *len, *unmap)
                    .unwrap_or_else(|error| panic!("zero: {error:?}"));
                model[*offset as usize..][..*len as usize].fill(0);
            }
            Self::Flush => image.flush().unwrap_or_else(|error| panic!("flush: {error:?}")),
            Self::Read { offset, len } => {
                let found =
                    read(image, *offset, *len as usize).unwrap_or_else(|error| panic!("read: {error:?}"));
                assert_same(&found, &model[*offset as usize..][..*len as usize], "read");
            }
        }
    }
}

/// A temporary directory and files in it.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("makes a temporary directory"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// Overwrites part of a file.
pub fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = FileOptions::new().write(true).open(path).expect("opens");
    file.write_all_at(bytes, offset).expect("writes");
}

/// What imago reads from an image with no layer below: a reader that shares no code with qemu-img.
pub fn imago_contents(path: &Path) -> std::io::Result<Vec<u8>> {
    use imago::file::File as ImagoFile;
    use imago::qcow2::Qcow2;
    use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};
    let file = File::open(path)?;
    let storage = ImagoFile::try_from(file)?;
    let image =
        FormatAccess::new(Qcow2::<ImagoFile>::builder(storage).open(DenyImplicitOpenGate::default())?);
    let mut bytes = vec![0; image.size() as usize];
    image.read(&mut bytes, 0)?;
    Ok(bytes)
}
