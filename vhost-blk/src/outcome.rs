//! How a request ended, and what of it the driver learns.

use crate::counters::Operation;
use crate::image::ImageError;
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
        let inner = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<ImageError>());
        let errno = inner.map_or_else(|| error.raw_os_error(), ImageError::host_error);
        errno.filter(|errno| matches!(*errno, libc::ENOSPC | libc::EDQUOT | libc::EIO))
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
}
