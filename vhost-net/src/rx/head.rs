//! The start of a frame that was read: how many packets it stands for, and whether it may be longer than the
//! driver's MTU.
//!
//! It is read back from the guest's buffers. A guest that writes there meanwhile mistakes these two things
//! about its own frame, within their bounds; the frame's length is the kernel's word.

use crate::header::{Cut, ETHERNET_HEADER, GSO_ECN, GSO_NONE, HEADER_SIZE, NetHeader};
use vm_memory::VolatileSlice;
use zerocopy::FromBytes;

/// Bytes of a frame with its header up to the Ethernet type.
const HEAD: usize = HEADER_SIZE + ETHERNET_HEADER;
/// Ethernet types of a tag, which the MTU does not count, its length, and how many a frame may have.
const TAGS: [[u8; 2]; 2] = [[0x81, 0], [0x88, 0xa8]];
const TAG: usize = 4;
const MOST_TAGS: usize = 2;

/// The longest frame of this MTU, with its header and no tag.
pub(super) fn longest_whole(mtu: u16) -> usize {
    HEAD + usize::from(mtu)
}

/// The first bytes of a frame.
pub(super) struct Head([u8; HEAD]);

impl Head {
    /// Of the frame that was read to `slices` and, behind them, to `spill`.
    pub(super) fn copy(slices: &[VolatileSlice<'_>], spill: &[u8]) -> Self {
        let mut head = [0; HEAD];
        let mut done = 0;
        for slice in slices {
            if done == HEAD {
                break;
            }
            done += slice.copy_to(&mut head[done..]);
        }
        if let Some(rest) = spill.get(done..HEAD) {
            head[done..].copy_from_slice(rest);
        }
        Self(head)
    }

    /// The frame may be so many bytes longer than the MTU (virtio 1.3, 5.1.4.1).
    pub(super) fn is_segmented_or_tagged(&self, bytes: usize) -> bool {
        let [_, gso_type, .., high, low] = self.0;
        gso_type & !GSO_ECN != GSO_NONE || (bytes <= MOST_TAGS * TAG && TAGS.contains(&[high, low]))
    }

    /// What a frame of `frame` bytes that starts so stands for.
    pub(super) fn cut(&self, frame: usize) -> Cut {
        NetHeader::read_from_prefix(&self.0).map_or(Cut::WHOLE, |(header, _)| Cut::received(&header, frame))
    }
}
