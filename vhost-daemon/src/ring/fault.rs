//! Why a ring is broken.

use crate::memory::GuestAddress;

/// What the driver did wrong. The ring stops, the front end is told by the error eventfd, the
/// process and the other queues go on.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RingFault {
    /// The available index is more than a ring ahead (virtio 1.3, 2.7.13.3).
    #[error("available index {found} is more than {size} ahead of {next}")]
    AvailIndex {
        /// What the driver wrote.
        found: u16,
        /// The next entry that the device would take.
        next: u16,
        /// Entries in the ring.
        size: u16,
    },
    /// A head outside the descriptor table.
    #[error("chain head {0} is outside the descriptor table")]
    Head(u16),
    /// A head that is already with the device.
    #[error("chain head {0} was made available twice")]
    HeadTwice(u16),
    /// The chain names a descriptor outside its table.
    #[error("the chain at head {head} goes on at descriptor {next}, outside its table")]
    Next {
        /// Head of the chain.
        head: u16,
        /// The descriptor that does not exist.
        next: u16,
    },
    /// A loop, or a chain longer than its table or than 1024 descriptors in the ring's.
    #[error("the chain at head {0} is longer than its table, or than 1024 descriptors")]
    Endless(u16),
    /// More than 2^32 bytes (virtio 1.3, 2.7.5.2).
    #[error("the chain at head {0} has 4 GiB or more")]
    TooManyBytes(u16),
    /// A readable descriptor behind a writable one (virtio 1.3, 2.7.4.2).
    #[error("the chain at head {0} has a readable buffer behind a writable one")]
    Order(u16),
    /// An indirect table without the feature, in another one, of a wrong size, or with NEXT set
    /// (virtio 1.3, 2.7.5.3).
    #[error("the chain at head {0} has an indirect table that is not allowed")]
    Indirect(u16),
    /// A buffer, table or ring outside guest memory.
    #[error("{length} bytes at {address} are not guest memory")]
    Memory {
        /// Where it starts.
        address: GuestAddress,
        /// Its length in bytes.
        length: usize,
    },
    /// The in-flight region contradicts the ring or itself.
    #[error("in-flight region: {0}")]
    Inflight(&'static str),
    /// The device cannot answer what it was asked, such as a request without room for a status.
    #[error("{0}")]
    Request(&'static str),
}
