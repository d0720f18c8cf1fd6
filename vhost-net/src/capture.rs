//! `--pcap-fd`: a copy of the frames that crossed the TAP, in the format that tcpdump and Wireshark
//! read (pcap, nanoseconds, Ethernet).
#![expect(unsafe_code, reason = "I/O between guest memory and the capture's file")]

use crate::buffers::{FrameBuffers, MAX_SEGMENTS};
use crate::header::HEADER_SIZE;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Longest file in bytes: a guest fills it as fast as it likes.
const LONGEST_FILE: u64 = 1 << 30;
/// Nanosecond timestamps in the writer's byte order.
const MAGIC: u32 = 0xa1b2_3c4d;
/// LINKTYPE_ETHERNET.
const ETHERNET: u32 = 1;
/// No frame is longer.
const SNAP_LENGTH: u32 = 256 << 10;

/// A capture that all queues write to.
#[derive(Debug)]
pub struct Capture {
    file: OwnedFd,
    /// Bytes that may still be written.
    left: AtomicU64,
    failed: AtomicBool,
}

impl Capture {
    /// Goes on in `file`, open for appending; an empty one gets its header. Before lockdown: no file of the process
    /// grows beyond what a capture may have from then on, whoever runs in it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn new(file: OwnedFd) -> nix::Result<Self> {
        let length = nix::sys::stat::fstat(&file)?.st_size.unsigned_abs();
        let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE)?;
        let most = LONGEST_FILE.max(length).min(hard);
        setrlimit(Resource::RLIMIT_FSIZE, most, most)?;
        if length == 0 {
            let (major, minor): (u16, u16) = (2, 4);
            let mut header = MAGIC.to_ne_bytes().to_vec();
            header.extend(major.to_ne_bytes());
            header.extend(minor.to_ne_bytes());
            for field in [0, 0, SNAP_LENGTH, ETHERNET] {
                header.extend(field.to_ne_bytes());
            }
            nix::unistd::write(&file, &header)?;
        }
        Ok(Self {
            file,
            left: AtomicU64::new(LONGEST_FILE.saturating_sub(length)),
            failed: AtomicBool::new(false),
        })
    }

    /// Adds the frame of `length` bytes, its virtio-net header among them, that `buffers` hold.
    pub fn record(&self, buffers: &FrameBuffers<'_>, length: usize) {
        let Some(frame) = length.checked_sub(HEADER_SIZE) else {
            return;
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut header = [0; 16];
        let mut parts = Vec::with_capacity(buffers.iovecs().len() + 1);
        parts.push(part(std::ptr::null_mut(), 0));
        let (mut skip, mut left) = (HEADER_SIZE, frame);
        for iovec in buffers.iovecs().iter().take(MAX_SEGMENTS - 1) {
            let skipped = skip.min(iovec.iov_len);
            skip -= skipped;
            let taken = left.min(iovec.iov_len - skipped);
            left -= taken;
            if taken > 0 {
                parts.push(part(iovec.iov_base.wrapping_byte_add(skipped), taken));
            }
        }
        let fields = [
            now.as_secs() as u32,
            now.subsec_nanos(),
            (frame - left) as u32,
            frame as u32,
        ];
        for (to, field) in header.chunks_exact_mut(4).zip(fields) {
            to.copy_from_slice(&field.to_ne_bytes());
        }
        if let Some(first) = parts.first_mut() {
            *first = part(header.as_mut_ptr().cast(), header.len());
        }
        let bytes = (header.len() + frame - left) as u64;
        let room = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(bytes)
            });
        let written = match room {
            // SAFETY: the first part is `header`, alive until the end; each other lies within a
            // segment that `buffers` borrow, which the kernel only reads.
            Ok(_) => unsafe {
                libc::writev(self.file.as_raw_fd(), parts.as_ptr(), parts.len() as libc::c_int)
            },
            Err(_) => {
                Errno::EFBIG.set();
                -1
            }
        };
        let error = match Errno::result(written) {
            Ok(written) if written.unsigned_abs() as u64 == bytes => return,
            // The file system is full. Behind a part of a record nobody finds the next.
            Ok(_) => {
                self.left.store(0, Ordering::Relaxed);
                Errno::ENOSPC
            }
            Err(error) => error,
        };
        if !self.failed.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, "the capture is incomplete");
        }
    }
}

fn part(start: *mut libc::c_void, length: usize) -> libc::iovec {
    libc::iovec {
        iov_base: start,
        iov_len: length,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::Storage;
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_frame_is_recorded_without_its_virtio_header() {
        let file = memfd_create("pcap", MFdFlags::empty()).unwrap();
        let capture = Capture::new(file.try_clone().unwrap()).unwrap();
        let (first, second) = ([7; HEADER_SIZE + 3], *b"defghi");
        let mut buffers = FrameBuffers::from_storage(Storage::default());
        buffers.push_readable(&first);
        buffers.push_readable(&second);
        // The last byte was not filled.
        capture.record(&buffers, HEADER_SIZE + 3 + 5);
        let file = File::from(file);
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes.len(), 24 + 16 + 8);
        assert_eq!(bytes[24 + 8..24 + 12], 8u32.to_ne_bytes());
        assert_eq!(bytes[24 + 12..24 + 16], 8u32.to_ne_bytes());
        assert_eq!(&bytes[40..], b"\x07\x07\x07defgh");
        // A successor goes on in the same file.
        drop(Capture::new(file.into()).unwrap());
    }

    #[test]
    fn a_file_is_not_filled_beyond_its_limit() {
        let file = memfd_create("pcap", MFdFlags::empty()).unwrap();
        let capture = Capture::new(file.try_clone().unwrap()).unwrap();
        capture.left.store(100, Ordering::Relaxed);
        let frame = [0; HEADER_SIZE + 60];
        let mut buffers = FrameBuffers::from_storage(Storage::default());
        buffers.push_readable(&frame);
        capture.record(&buffers, frame.len());
        capture.record(&buffers, frame.len());
        assert_eq!(File::from(file).metadata().unwrap().len(), 24 + 16 + 60);
    }

    #[test]
    fn the_kernel_keeps_the_limit_whoever_writes() {
        let mut end = nix::sys::signal::SigSet::empty();
        end.add(nix::sys::signal::Signal::SIGXFSZ);
        // As in a device process.
        end.thread_block().unwrap();
        let file = memfd_create("pcap", MFdFlags::empty()).unwrap();
        let capture = Capture::new(file.try_clone().unwrap()).unwrap();
        let file = File::from(file);
        file.set_len(LONGEST_FILE - 1).unwrap();
        file.write_all_at(b"x", LONGEST_FILE - 1).unwrap();
        let error = file.write_at(b"x", LONGEST_FILE).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EFBIG as i32));
        drop(capture);
    }

    #[test]
    fn nothing_follows_a_part_of_a_record() {
        let (read, write) = nix::unistd::pipe2(OFlag::O_NONBLOCK).unwrap();
        let room = fcntl(&write, FcntlArg::F_SETPIPE_SZ(4096)).unwrap() as usize;
        let capture = Capture::new(write).unwrap();
        let record = |length: usize| {
            let frame = vec![0; HEADER_SIZE + length];
            let mut buffers = FrameBuffers::from_storage(Storage::default());
            buffers.push_readable(&frame);
            capture.record(&buffers, frame.len());
        };
        let mut bytes = vec![0; 2 * room];
        record(60);
        record(room);
        let taken = nix::unistd::read(&read, &mut bytes).unwrap();
        let (one, both) = (24 + 16 + 60, 24 + 16 + 60 + 16 + room);
        assert!(
            one < taken && taken < both,
            "{taken} bytes are no part of a record"
        );
        record(60);
        assert_eq!(nix::unistd::read(&read, &mut bytes), Err(Errno::EAGAIN));
    }
}
