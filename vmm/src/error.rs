//! The one error type of the crate: what failed, why, and what to do about it.

use crate::boot::BootError;
use crate::control::ControlError;
use crate::memory::RamError;
pub use jailer::tell::chain;
use std::io;

/// Why a VM could not be built or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration contradicts itself or the machine.
    #[error("configuration: {0}")]
    Config(String),
    /// Guest RAM.
    #[error("cannot set up guest memory")]
    Ram(#[from] RamError),
    /// A KVM ioctl.
    #[error("cannot {what}")]
    Kvm {
        /// What was to be done.
        what: &'static str,
        /// KVM's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Any other system call.
    #[error("cannot {what}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A device could not be connected.
    #[error("cannot connect device '{device}'")]
    Device {
        /// Its id.
        device: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The sandbox.
    #[error("cannot lock down")]
    Lockdown(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A vCPU thread did not answer in time.
    #[error("vCPU {cpu} did not {what} in time")]
    VcpuTimeout {
        /// Its index.
        cpu: u8,
        /// What was asked of it.
        what: &'static str,
    },
}

impl Error {
    /// Wraps KVM's answer to `what`.
    pub fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }

    /// Wraps a failed system call.
    pub fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            what,
            source: source.into(),
        }
    }

    /// The chain of causes below this error, on one line; empty when the error says it all.
    #[must_use]
    pub fn cause(&self) -> String {
        std::error::Error::source(self).map(chain).unwrap_or_default()
    }

    /// What a person can do about it; may be empty.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::Ram(RamError::System { .. }) => {
                "free memory or huge pages on the host, or give the guest less memory".into()
            }
            Self::Ram(RamError::Alignment { page, .. }) => format!("make memory a multiple of {page}"),
            Self::Boot(error) => error.hint().into(),
            Self::Kvm { .. } => "see `bulkhead doctor` for what this host's KVM can do".into(),
            Self::Device { .. } => "see the device process's own messages".into(),
            _ => String::new(),
        }
    }
}
