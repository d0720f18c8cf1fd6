//! Requests on sound images of every shape, against a model, the image's consistency checked as it goes.

use super::check::{self, Shape};
use super::file::MemoryFile;
use super::model::{Model, Range};
use crate::image::{BlockFile, Format, Image, OpenOptions, open_layers};
use arbitrary::Unstructured;
use std::sync::Arc;

const MOST_STEPS: usize = 48;

/// A qcow2 image, perhaps over a raw one.
pub fn qcow2(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Some(shape) = Shape::read(&mut input) else {
        return;
    };
    let below = shape.backed.then(|| {
        let sectors = shape.size as usize / 512;
        let half = sectors / 2 + 1;
        (0..half + if shape.longer { sectors } else { 0 })
            .flat_map(|sector| [sector as u8 | 1; 512])
            .collect::<Vec<u8>>()
    });
    let mut model = Model {
        bytes: below.clone().unwrap_or_default(),
    };
    model.bytes.resize(shape.size as usize, 0);
    let disk = Disk {
        format: Format::Qcow2,
        top: Arc::new(MemoryFile::new(shape.image())),
        below: below.map(|bytes| Arc::new(MemoryFile::new(bytes))),
    };
    disk.run(&mut model, &mut input);
}

/// A raw image.
pub fn raw(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Ok(sectors) = input.arbitrary::<u8>() else {
        return;
    };
    let bytes = vec![0; (usize::from(sectors) + 1) * 512];
    let disk = Disk {
        format: Format::Raw,
        top: Arc::new(MemoryFile::new(bytes.clone())),
        below: None,
    };
    disk.run(&mut Model { bytes }, &mut input);
}

struct Disk {
    format: Format,
    top: Arc<MemoryFile>,
    below: Option<Arc<MemoryFile>>,
}

impl Disk {
    fn open(&self) -> Arc<dyn Image> {
        let top: Arc<dyn BlockFile> = self.top.clone();
        let mut layers = vec![(self.format, top)];
        if let Some(below) = &self.below {
            layers.push((Format::Raw, below.clone()));
        }
        open_layers(layers, None, &OpenOptions::default()).expect("a sound image opens")
    }

    fn run(&self, model: &mut Model, input: &mut Unstructured<'_>) {
        let mut image = self.open();
        let mut failed = false;
        for _ in 0..MOST_STEPS {
            if input.is_empty() {
                break;
            }
            let [kind, low, high, length] = input.arbitrary::<[u8; 4]>().unwrap_or_default();
            let range = range(image.capacity(), u16::from_le_bytes([low, high]), length);
            match kind % 16 {
                0..6 => model.write(&*image, range, kind | 1),
                6..8 => model.zero(&*image, range, kind & 16 != 0),
                8..10 => model.discard(&*image, range),
                10..12 => model.read(&*image, range),
                12 => image.flush().unwrap_or_else(|_| assert!(failed, "a flush fails")),
                13 => {
                    failed |= kind > 127;
                    self.top.fail_after((kind > 127).then_some(low));
                }
                14 => {
                    self.top.fail_after(None);
                    image.close().expect("an image closes");
                    self.check(failed);
                    drop(image);
                    image = self.open();
                    // A growth may have failed when all was done.
                    model.bytes.resize(image.capacity() as usize, 0);
                }
                _ => model.grow(&*image, image.capacity() + (u64::from(low) << 9 << (high % 5))),
            }
            self.check(true);
        }
        self.top.fail_after(None);
        let all = Range {
            offset: 0,
            length: image.capacity(),
        };
        model.read(&*image, all);
        image.close().expect("an image closes");
        drop(image);
        self.check(failed);
        model.read(&*self.open(), all);
    }

    /// `leaks`: clusters may be counted that nothing refers to.
    fn check(&self, leaks: bool) {
        if self.format == Format::Qcow2 {
            check::check(&self.top.lock(), leaks);
        }
    }
}

/// Whole sectors inside the disk, at least one.
fn range(capacity: u64, place: u16, length: u8) -> Range {
    let sectors = capacity / 512;
    let start = u64::from(place) % sectors;
    let length = (u64::from(length) + 1).min(sectors - start);
    Range {
        offset: start * 512,
        length: length * 512,
    }
}
