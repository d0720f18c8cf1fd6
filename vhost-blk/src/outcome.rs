//! How a request ended, and what of it the driver learns.

use crate::counters::Operation;
use crate::image;
use crate::request::Status;
use std::io;

/// Why a request was not done.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It is the driver's fault, or not offered.
    Request(Status),
    /// It is the host's or the image's.
    Image(io::Error),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Request(status)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Image(error)
    }
}

impl Failure {
    /// The host may be able later: it has no space left, or a disk fails.
    pub(crate) fn may_pass(&self) -> bool {
        self.passing().is_some()
    }

    /// What the host said, where [`Failure::may_pass`].
    pub(crate) fn passing(&self) -> Option<i32> {
        let Self::Image(error) = self else { return None };
        image::errno(error).filter(|errno| *errno == libc::EIO || image::says_no_space(*errno))
    }

    /// What the driver learns; the log learns why. A guest can cause this at will on a damaged image, so
    /// it is logged where few look.
    pub(crate) fn status(&self) -> Status {
        match self {
            Self::Request(status) => *status,
            Self::Image(error) => {
                tracing::debug!(error = error as &dyn std::error::Error, "request failed");
                Status::IOERR
            }
        }
    }
}

/// A request that was carried out, or not.
pub(crate) struct Done {
    pub(crate) operation: Operation,
    /// Of data, moved or to be moved.
    pub(crate) bytes: usize,
    pub(crate) outcome: Result<(), Failure>,
}

impl Done {
    pub(crate) fn new(operation: Operation, bytes: usize, outcome: Result<(), Failure>) -> Self {
        Self {
            operation,
            bytes,
            outcome,
        }
    }

    /// Bytes that one that succeeded wrote to the driver's buffers.
    pub(crate) fn written(&self) -> usize {
        match self.operation {
            Operation::Read | Operation::Other => self.bytes,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageError;

    #[test]
    fn what_may_pass_is_found_below_what_failed_for_it() {
        let host = |errno| io::Error::from_raw_os_error(errno);
        let passing = |error: io::Error| Failure::from(error).passing();
        let layer = |error| io::Error::from(ImageError::io("read from the backing file")(error));
        assert_eq!(passing(host(libc::EIO)), Some(libc::EIO));
        assert_eq!(passing(layer(host(libc::EIO))), Some(libc::EIO));
        assert_eq!(passing(layer(layer(host(libc::EIO)))), Some(libc::EIO));
        assert_eq!(passing(layer(image::no_space())), Some(libc::ENOSPC));
        assert_eq!(passing(layer(host(libc::EFBIG))), Some(libc::EFBIG));
        assert_eq!(passing(layer(host(libc::EINVAL))), None);
        assert_eq!(
            passing(layer(ImageError::corrupt("L2 entry", "bad").into())),
            None
        );
        assert_eq!(passing(io::Error::other("a flush that failed before")), None);
    }
}
