//! What can go wrong with an image, named by the field that is at fault.

use std::io;

/// Failure to open or to use a disk image.
///
/// An image is untrusted data: each variant names the header field or table that was refused, and no
/// variant carries bytes of the image other than numbers and printable names.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The host failed a system call on one of the image's files.
    #[error("cannot {action}")]
    Io {
        /// What was tried, as in "read the L1 table".
        action: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The image was refused when it was opened. The file has not been changed.
    #[error("{field}: {reason}")]
    Refused {
        /// The header field, table or option at fault, spelled as the specification does.
        field: &'static str,
        /// Why, and what to do about it.
        reason: String,
    },
    /// The image contradicts itself. For a writable image the corrupt bit is set and writing has ended.
    #[error("image is corrupt: {field}: {reason}")]
    Corrupt {
        /// The table or field at fault.
        field: &'static str,
        /// Which value is wrong, and where.
        reason: String,
    },
    /// A write to an image that was opened read-only, or that has been found corrupt.
    #[error("the image is read-only{}", if *corrupt { " since it was found corrupt; see the log for where" } else { "" })]
    ReadOnly {
        /// Whether it turned read-only at run time.
        corrupt: bool,
    },
    /// A request that leaves the disk.
    #[error("request of {len} bytes at {offset} is past the disk's end at {capacity}")]
    OutOfRange {
        /// First byte of the request.
        offset: u64,
        /// Length of the request in bytes.
        len: u64,
        /// Capacity of the disk in bytes.
        capacity: u64,
    },
    /// Another process uses the file in a way that excludes this use.
    #[error("the file is in use by {user}; end that one first, or use a copy or an overlay of the image")]
    Locked {
        /// Who, as far as its locks tell.
        user: &'static str,
    },
    /// One of the layers below the top failed.
    #[error("backing layer {depth}")]
    Backing {
        /// Position in the chain; 1 is directly below the top.
        depth: usize,
        /// What that layer said.
        #[source]
        source: Box<ImageError>,
    },
}

impl ImageError {
    pub(crate) fn refused(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Refused {
            field,
            reason: reason.into(),
        }
    }

    pub(crate) fn corrupt(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Corrupt {
            field,
            reason: reason.into(),
        }
    }

    /// Adapter for `map_err`: names what was tried.
    pub(crate) fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, source }
    }

    /// The errno of the system call that the host failed, where that is the cause.
    #[must_use]
    pub fn host_error(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } => errno(source),
            Self::Backing { source, .. } => source.host_error(),
            _ => None,
        }
    }

    pub(crate) fn is_no_space(&self) -> bool {
        self.host_error().is_some_and(says_no_space)
    }
}

/// Whether the host has no room for what is written: on the disk, in a quota, or below the limit of a file's
/// size (RLIMIT_FSIZE, or the file system's own).
pub(crate) fn says_no_space(errno: i32) -> bool {
    matches!(errno, libc::ENOSPC | libc::EDQUOT | libc::EFBIG)
}

/// The errno of the system call that the host failed: of the error itself, or of the image's that it holds,
/// as it does where a layer below failed.
pub(crate) fn errno(error: &io::Error) -> Option<i32> {
    error.raw_os_error().or_else(|| {
        error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<ImageError>())
            .and_then(ImageError::host_error)
    })
}

/// What the host would say where it is known before that there is no space.
pub(crate) fn no_space() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOSPC)
}

impl From<ImageError> for io::Error {
    fn from(error: ImageError) -> Self {
        let kind = match &error {
            ImageError::Io { source, .. } => source.kind(),
            ImageError::Refused { .. } | ImageError::Corrupt { .. } => io::ErrorKind::InvalidData,
            ImageError::ReadOnly { .. } => io::ErrorKind::ReadOnlyFilesystem,
            ImageError::Locked { .. } => io::ErrorKind::ResourceBusy,
            ImageError::OutOfRange { .. } => io::ErrorKind::InvalidInput,
            ImageError::Backing { .. } => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}
