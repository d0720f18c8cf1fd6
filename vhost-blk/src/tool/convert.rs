//! Copying a disk into a new image, without what reads as zeros.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use vm_memory::VolatileSlice;
use vm_spec::image::FromImageTool;

use super::{Files, Reports, ToolError, make, refuse_ignored};
use crate::image::qcow2::{CreateOptions, Progress};
use crate::image::{Format, HostFile, Image, OpenOptions, Resolved, lock, open_layers};

/// Bytes read at a time.
const CHUNK: u64 = 2 << 20;
/// Bytes of zeros that are worth a hole.
const BLOCK: usize = 64 << 10;
/// Bytes written between two flushes. A host with much memory would else take all of a disk before it writes it out,
/// which the last flush would wait for, with no word on how far it is.
const MOST_UNFLUSHED: u64 = 256 << 20;

pub(super) fn convert(
    mut files: Files,
    format: Format,
    cluster_bits: Option<u32>,
    reports: &Reports,
) -> Result<(), ToolError> {
    let target = files
        .target
        .take()
        .ok_or_else(|| ToolError::Refused("there is nothing to convert to".into()))?;
    refuse_ignored(format, "cluster size", cluster_bits.is_some())?;
    files.options.tells_holes = true;
    let source = files.open()?;
    let size = source.capacity();
    lock(target.as_fd(), false)?;
    let target = HostFile::new(target).map_err(|error| ToolError::Io("use the new image's file", error))?;
    let options = CreateOptions::of_size(size);
    let options = CreateOptions {
        cluster_bits: cluster_bits.unwrap_or(options.cluster_bits),
        ..options
    };
    make(&target, format, &options)?;
    let target = open_layers(vec![(format, Arc::new(target))], None, &OpenOptions::default())?;
    let tell = |done, total| reports.offer(FromImageTool::Progress { done, total });
    let progress = Progress::told(&tell);
    progress.expect(size);
    copy(&*source, &*target, &progress)?;
    target
        .close()
        .map_err(|error| ToolError::Io("finish the new image", error))
}

/// Copies all of a disk.
fn copy(source: &dyn Image, target: &dyn Image, progress: &Progress<'_>) -> Result<(), ToolError> {
    let total = source.capacity();
    let mut buffer = vec![0; CHUNK as usize];
    let mut done = 0;
    // To find a piece's end may take a walk over all of it: no more is looked at than what was found before
    // lets expect, and nothing is looked at again.
    let mut look = CHUNK;
    let mut unflushed = 0;
    while done < total {
        let asked = (total - done).min(look);
        let (len, is_zero) = extent(source.resolve_read(done, asked).map_err(reading)?);
        look = if len == asked {
            look.saturating_mul(2)
        } else {
            CHUNK
        };
        let end = done + len;
        if is_zero {
            done = end;
            progress.step(len);
        }
        while done < end {
            // Past a short piece's end: what is zeros there is found by reading.
            let chunk = &mut buffer[..(total - done).min(CHUNK) as usize];
            source
                .read(&[VolatileSlice::from(&mut *chunk)], done)
                .map_err(reading)?;
            unflushed += write_used(target, chunk, done).map_err(writing)?;
            if unflushed >= MOST_UNFLUSHED {
                target.flush().map_err(writing)?;
                unflushed = 0;
            }
            done += chunk.len() as u64;
            progress.step(chunk.len() as u64);
        }
    }
    Ok(())
}

/// Length of a piece, and whether it reads as zeros.
fn extent(piece: Resolved<'_>) -> (u64, bool) {
    match piece {
        Resolved::Zero { len } => (len, true),
        Resolved::Mapped(extent, _) => (extent.len, false),
        Resolved::Elsewhere { len } => (len, false),
    }
}

fn reading(error: io::Error) -> ToolError {
    ToolError::Io("read the image", error)
}

fn writing(error: io::Error) -> ToolError {
    ToolError::Io("write the new image", error)
}

/// Writes the runs of blocks that are not all zeros; how many bytes that were.
fn write_used(target: &dyn Image, chunk: &mut [u8], offset: u64) -> io::Result<u64> {
    let (mut start, mut written) = (0, 0);
    while start < chunk.len() {
        let is_zero = |at: usize| {
            let block = &chunk[at..chunk.len().min(at + BLOCK)];
            block.iter().all(|byte| *byte == 0)
        };
        if is_zero(start) {
            start += BLOCK;
            continue;
        }
        let mut end = start + BLOCK;
        while end < chunk.len() && !is_zero(end) {
            end += BLOCK;
        }
        let end = end.min(chunk.len());
        target.write(
            &[VolatileSlice::from(&mut chunk[start..end])],
            offset + start as u64,
        )?;
        written += (end - start) as u64;
        start = end;
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{ImageError, RawImage};
    use std::cell::Cell;
    use std::sync::atomic::{AtomicU64, Ordering};

    const UNIT: u64 = 64 << 10;
    const SIZE: u64 = 32 << 20;

    /// A disk of 7s that finds the end of a piece by a walk over its units, and counts them. One in so
    /// many units is zeros.
    struct Walked {
        zeros_every: u64,
        looked_at: AtomicU64,
    }

    impl Walked {
        fn is_zero(&self, offset: u64) -> bool {
            (offset / UNIT).is_multiple_of(self.zeros_every)
        }
    }

    impl Image for Walked {
        fn capacity(&self) -> u64 {
            SIZE
        }
        fn read_only(&self) -> bool {
            true
        }
        fn can_discard(&self) -> bool {
            false
        }
        fn discard_granularity(&self) -> u64 {
            UNIT
        }
        fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
            let len = buffers[0].len();
            let bytes = (offset..).take(len).map(|at| u8::from(!self.is_zero(at)) * 7);
            buffers[0].copy_from(&bytes.collect::<Vec<u8>>());
            Ok(())
        }
        fn write(&self, _buffers: &[VolatileSlice<'_>], _offset: u64) -> io::Result<()> {
            unreachable!("nobody writes to a source")
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
        fn discard(&self, _offset: u64, _length: u64) -> io::Result<()> {
            unreachable!("nobody discards in a source")
        }
        fn write_zeroes(&self, _offset: u64, _length: u64, _unmap: bool) -> io::Result<()> {
            unreachable!("nobody clears a source")
        }
        fn resolve_read(&self, offset: u64, len: u64) -> io::Result<Resolved<'_>> {
            let zero = self.is_zero(offset);
            let mut end = offset;
            while end < offset + len && self.is_zero(end) == zero {
                self.looked_at.fetch_add(1, Ordering::Relaxed);
                end = ((end / UNIT + 1) * UNIT).min(offset + len);
            }
            let len = end - offset;
            Ok(if zero {
                Resolved::Zero { len }
            } else {
                Resolved::Elsewhere { len }
            })
        }
    }

    #[test]
    fn the_work_grows_with_the_disk_and_no_faster() {
        // All zeros, one long piece of data, several, many.
        for zeros_every in [1, u64::MAX, 100, 2] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(SIZE).unwrap();
            let target = RawImage::open(file.into(), false).unwrap();
            let source = Walked {
                zeros_every,
                looked_at: AtomicU64::new(0),
            };
            let told = Cell::new(0);
            let tell = |done, total| {
                assert!(told.replace(done) < done, "no step forward");
                assert_eq!(total, SIZE);
            };
            let progress = Progress::told(&tell);
            progress.expect(SIZE);
            copy(&source, &target, &progress).unwrap();
            assert_eq!(told.get(), SIZE);
            let looked_at = source.looked_at.load(Ordering::Relaxed);
            assert!(
                looked_at <= 2 * SIZE / UNIT,
                "{looked_at} looks at {} units",
                SIZE / UNIT
            );
            let (mut expected, mut found) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
            for at in (0..SIZE).step_by(CHUNK as usize) {
                source
                    .read(&[VolatileSlice::from(&mut expected[..])], at)
                    .unwrap();
                target.read(&[VolatileSlice::from(&mut found[..])], at).unwrap();
                assert!(found == expected, "other data from {at:#x}");
            }
        }
    }

    /// A disk of 7s, to which anything can be written.
    #[derive(Default)]
    struct Slow {
        unflushed: AtomicU64,
        most: AtomicU64,
    }

    impl Image for Slow {
        fn capacity(&self) -> u64 {
            3 * MOST_UNFLUSHED
        }
        fn read_only(&self) -> bool {
            false
        }
        fn can_discard(&self) -> bool {
            false
        }
        fn discard_granularity(&self) -> u64 {
            UNIT
        }
        fn read(&self, buffers: &[VolatileSlice<'_>], _offset: u64) -> io::Result<()> {
            buffers[0].copy_from(&vec![7_u8; buffers[0].len()]);
            Ok(())
        }
        fn write(&self, buffers: &[VolatileSlice<'_>], _offset: u64) -> io::Result<()> {
            let len = buffers[0].len() as u64;
            let unflushed = self.unflushed.fetch_add(len, Ordering::Relaxed) + len;
            self.most.fetch_max(unflushed, Ordering::Relaxed);
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            self.unflushed.store(0, Ordering::Relaxed);
            Ok(())
        }
        fn discard(&self, _offset: u64, _length: u64) -> io::Result<()> {
            Ok(())
        }
        fn write_zeroes(&self, _offset: u64, _length: u64, _unmap: bool) -> io::Result<()> {
            Ok(())
        }
        fn resolve_read(&self, _offset: u64, len: u64) -> io::Result<Resolved<'_>> {
            Ok(Resolved::Elsewhere { len })
        }
    }

    #[test]
    fn little_is_left_to_be_written_out_at_the_end() {
        let (source, target) = (Slow::default(), Slow::default());
        copy(&source, &target, &Progress::untold()).unwrap();
        assert_eq!(target.most.into_inner(), MOST_UNFLUSHED);
    }

    #[test]
    fn an_error_of_the_engine_keeps_its_cause() {
        let inner = ImageError::refused("field", "reason");
        let text = jailer::tell::chain(&reading(inner.into()));
        assert_eq!(text, "cannot read the image: field: reason");
    }
}
