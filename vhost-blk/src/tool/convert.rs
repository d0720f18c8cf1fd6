//! Copying a disk into a new image, without what reads as zeros.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use vm_memory::VolatileSlice;
use vm_spec::image::FromImageTool;

use super::{Files, Reports, ToolError, make, refuse_ignored};
use crate::image::qcow2::CreateOptions;
use crate::image::{Format, HostFile, Image, OpenOptions, Resolved, lock, open_layers};

/// Bytes read at a time.
const CHUNK: u64 = 2 << 20;
/// Bytes of zeros that are worth a hole.
const BLOCK: usize = 64 << 10;

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
    copy(&*source, &*target, reports)?;
    target
        .close()
        .map_err(|error| ToolError::Io("finish the new image", error))
}

fn copy(source: &dyn Image, target: &dyn Image, reports: &Reports) -> Result<(), ToolError> {
    let total = source.capacity();
    let mut buffer = vec![0; CHUNK as usize];
    let mut done = 0;
    while done < total {
        let want = (total - done).min(CHUNK);
        let zeros = match source.resolve_read(done, total - done).map_err(reading)? {
            Resolved::Zero { len } => len,
            _ => 0,
        };
        done += if zeros > 0 {
            zeros
        } else {
            let chunk = &mut buffer[..want as usize];
            source
                .read(&[VolatileSlice::from(&mut *chunk)], done)
                .map_err(reading)?;
            write_used(target, chunk, done)?;
            want
        };
        reports.send(FromImageTool::Progress { done, total })?;
    }
    Ok(())
}

fn reading(error: io::Error) -> ToolError {
    ToolError::Io("read the image", error)
}

/// Writes the runs of blocks that are not all zeros.
fn write_used(target: &dyn Image, chunk: &mut [u8], offset: u64) -> Result<(), ToolError> {
    let mut start = 0;
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
        target
            .write(
                &[VolatileSlice::from(&mut chunk[start..end])],
                offset + start as u64,
            )
            .map_err(|error| ToolError::Io("write the new image", error))?;
        start = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageError;

    #[test]
    fn an_error_of_the_engine_keeps_its_cause() {
        let inner = ImageError::refused("field", "reason");
        let text = super::super::chain(&reading(inner.into()));
        assert_eq!(text, "cannot read the image: field: reason");
    }
}
