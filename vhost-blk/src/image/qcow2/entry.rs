//! L1 and L2 entries: decoding is where the image's word is checked, encoding is the reverse.

use super::geometry::Geometry;
use crate::image::ImageError;

/// Bit 63: the refcount is exactly one, so that it may be overwritten in place.
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Bits 9 to 55.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// An L1 entry that has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct L1Entry {
    /// Host offset of the L2 table, aligned and inside the file.
    pub(super) table: u64,
    pub(super) copied: bool,
}

impl L1Entry {
    /// `None` for an unallocated table.
    pub(super) fn decode(raw: u64, geometry: &Geometry, file_end: u64) -> Result<Option<Self>, ImageError> {
        if raw & !(OFFSET_MASK | COPIED) != 0 {
            return Err(ImageError::corrupt(
                "L1 entry",
                format!("reserved bits are set in {raw:#x}"),
            ));
        }
        let table = raw & OFFSET_MASK;
        if table == 0 {
            return match raw {
                0 => Ok(None),
                _ => Err(ImageError::corrupt("L1 entry", "COPIED is set without an offset")),
            };
        }
        check_host("L1 entry", table, geometry, file_end)?;
        Ok(Some(Self {
            table,
            copied: raw & COPIED != 0,
        }))
    }

    pub(super) fn encode(self) -> u64 {
        self.table | if self.copied { COPIED } else { 0 }
    }
}

/// Where a cluster's data lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Host {
    None,
    Plain {
        /// Host offset, aligned and inside the file.
        offset: u64,
        copied: bool,
    },
    Compressed(Compressed),
}

/// A compressed cluster's place: any byte offset, and its length in bytes up to a sector's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Compressed {
    pub(super) offset: u64,
    /// Up to the end of the last sector; at most two clusters.
    pub(super) len: u64,
}

impl Compressed {
    /// The host clusters that it touches.
    pub(super) fn clusters(&self, geometry: &Geometry) -> std::ops::Range<u64> {
        geometry.cluster_of(self.offset)..geometry.cluster_of(self.offset + self.len - 1) + 1
    }
}

/// An L2 entry that has been checked. A plain image's cluster counts as one subcluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cluster {
    pub(super) host: Host,
    /// Subclusters whose data is at `host`.
    pub(super) allocated: u32,
    /// Subclusters that read as zeros.
    pub(super) zero: u32,
}

impl Cluster {
    /// Everything shows what lies below.
    pub(super) const UNALLOCATED: Self = Self {
        host: Host::None,
        allocated: 0,
        zero: 0,
    };

    /// Decodes the entry of guest cluster `guest`; `bitmap` is 0 without extended L2 entries.
    pub(super) fn decode(
        raw: u64,
        bitmap: u64,
        guest: u64,
        geometry: &Geometry,
        file_end: u64,
    ) -> Result<Self, ImageError> {
        if raw & COMPRESSED != 0 {
            return Self::decode_compressed(raw, bitmap, geometry, file_end);
        }
        let zero_flag = raw & ZERO != 0;
        if raw & !(OFFSET_MASK | COPIED | ZERO) != 0
            || (zero_flag && (geometry.version < 3 || geometry.extended_l2))
        {
            return Err(ImageError::corrupt(
                "L2 entry",
                format!("reserved bits are set in {raw:#x}"),
            ));
        }
        let offset = raw & OFFSET_MASK;
        let copied = raw & COPIED != 0;
        let host = match (offset, copied) {
            (_, true) if geometry.external_data => Host::Plain { offset, copied },
            (0, true) => {
                return Err(ImageError::corrupt(
                    "L2 entry",
                    "host offset is zero while COPIED is set",
                ));
            }
            (0, false) => Host::None,
            _ => Host::Plain { offset, copied },
        };
        if let Host::Plain { offset, .. } = host {
            check_data_host(offset, guest, geometry, file_end)?;
        }
        let (allocated, zero) = if geometry.extended_l2 {
            split_bitmap(bitmap)?
        } else {
            (u32::from(!zero_flag && host != Host::None), u32::from(zero_flag))
        };
        if allocated != 0 && host == Host::None {
            return Err(ImageError::corrupt(
                "L2 entry",
                "subclusters are allocated at host offset zero",
            ));
        }
        Ok(Self {
            host,
            allocated,
            zero,
        })
    }

    fn decode_compressed(
        raw: u64,
        bitmap: u64,
        geometry: &Geometry,
        file_end: u64,
    ) -> Result<Self, ImageError> {
        if raw & COPIED != 0 || bitmap != 0 {
            return Err(ImageError::corrupt(
                "L2 entry",
                "COPIED or subclusters on a compressed cluster",
            ));
        }
        if geometry.external_data || geometry.encrypted {
            return Err(ImageError::corrupt(
                "L2 entry",
                "compressed cluster with an external data file or with encryption",
            ));
        }
        let bits = geometry.compressed_offset_bits();
        let offset = raw & ((1 << bits) - 1);
        let sectors = ((raw & !COMPRESSED) >> bits) + 1;
        if offset >= 1 << 56 || offset < geometry.cluster_size() || offset >= file_end {
            return Err(ImageError::corrupt(
                "L2 entry",
                format!("compressed cluster at {offset:#x}, outside the file's clusters"),
            ));
        }
        let len = sectors * 512 - (offset & 511);
        Ok(Self {
            host: Host::Compressed(Compressed { offset, len }),
            allocated: 0,
            zero: 0,
        })
    }

    /// The entry's two words; the second is used with extended L2 entries only.
    pub(super) fn encode(&self, geometry: &Geometry) -> (u64, u64) {
        let mut raw = match self.host {
            Host::None => 0,
            Host::Plain { offset, copied } => offset | if copied { COPIED } else { 0 },
            Host::Compressed(Compressed { offset, len }) => {
                let sectors = (len + (offset & 511)) / 512;
                COMPRESSED | offset | ((sectors - 1) << geometry.compressed_offset_bits())
            }
        };
        if geometry.extended_l2 {
            return (raw, u64::from(self.allocated) | u64::from(self.zero) << 32);
        }
        raw |= if self.zero != 0 { ZERO } else { 0 };
        (raw, 0)
    }
}

fn split_bitmap(bitmap: u64) -> Result<(u32, u32), ImageError> {
    let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
    if allocated & zero != 0 {
        return Err(ImageError::corrupt(
            "L2 entry",
            "a subcluster is both allocated and zero",
        ));
    }
    Ok((allocated, zero))
}

fn check_data_host(offset: u64, guest: u64, geometry: &Geometry, file_end: u64) -> Result<(), ImageError> {
    if !geometry.external_data {
        return check_host("L2 entry", offset, geometry, file_end);
    }
    if offset != geometry.offset_of(guest) {
        return Err(ImageError::corrupt(
            "L2 entry",
            format!("offset {offset:#x} in the external data file is not the guest's"),
        ));
    }
    Ok(())
}

/// A host cluster must be aligned, past the header and inside the file.
fn check_host(
    field: &'static str,
    offset: u64,
    geometry: &Geometry,
    file_end: u64,
) -> Result<(), ImageError> {
    if geometry.within(offset) != 0 {
        return Err(ImageError::corrupt(
            field,
            format!("host offset {offset:#x} is not aligned to a cluster"),
        ));
    }
    if offset < geometry.cluster_size() {
        return Err(ImageError::corrupt(
            field,
            format!("host offset {offset:#x} lies in the header"),
        ));
    }
    if offset >= file_end {
        return Err(ImageError::corrupt(
            field,
            format!("host offset {offset:#x} is past the file's end at {file_end:#x}"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Geometry = Geometry {
        cluster_bits: 16,
        extended_l2: false,
        external_data: false,
        encrypted: false,
        refcount_order: 4,
        version: 3,
    };
    const END: u64 = 100 << 16;

    #[test]
    fn entries_survive_a_round_trip() {
        let extended = Geometry {
            extended_l2: true,
            ..PLAIN
        };
        let host = Host::Plain {
            offset: 5 << 16,
            copied: true,
        };
        let packed = Host::Compressed(Compressed {
            offset: (5 << 16) + 77,
            len: 3 * 512 - 77,
        });
        for (geometry, cluster) in [
            (PLAIN, Cluster::UNALLOCATED),
            (
                PLAIN,
                Cluster {
                    host,
                    allocated: 1,
                    zero: 0,
                },
            ),
            (
                PLAIN,
                Cluster {
                    host,
                    allocated: 0,
                    zero: 1,
                },
            ),
            (
                PLAIN,
                Cluster {
                    host: Host::None,
                    allocated: 0,
                    zero: 1,
                },
            ),
            (
                PLAIN,
                Cluster {
                    host: packed,
                    allocated: 0,
                    zero: 0,
                },
            ),
            (
                extended,
                Cluster {
                    host,
                    allocated: 0xff,
                    zero: 0x100,
                },
            ),
        ] {
            let (raw, bitmap) = cluster.encode(&geometry);
            assert_eq!(Cluster::decode(raw, bitmap, 9, &geometry, END).unwrap(), cluster);
        }
    }

    /// Whatever the entry says: what is read and inflated is bounded.
    #[test]
    fn compressed_clusters_are_two_clusters_at_most() {
        for cluster_bits in 9..=21 {
            let geometry = Geometry {
                cluster_bits,
                ..PLAIN
            };
            let offset = geometry.cluster_size();
            let longest = !COPIED & !((1 << geometry.compressed_offset_bits()) - 1) | offset;
            let cluster = Cluster::decode(longest, 0, 9, &geometry, u64::MAX).unwrap();
            let len = 2 * geometry.cluster_size();
            assert_eq!(cluster.host, Host::Compressed(Compressed { offset, len }));
        }
    }

    #[test]
    fn bad_entries_are_named() {
        let refuse = |raw, bitmap, geometry: &Geometry| {
            Cluster::decode(raw, bitmap, 9, geometry, END)
                .unwrap_err()
                .to_string()
        };
        assert!(refuse(2, 0, &PLAIN).contains("reserved bits"));
        assert!(refuse(1 << 60, 0, &PLAIN).contains("reserved bits"));
        assert!(refuse(1, 0, &Geometry { version: 2, ..PLAIN }).contains("reserved bits"));
        assert!(refuse(COPIED, 0, &PLAIN).contains("host offset is zero"));
        assert!(refuse(0x10200, 0, &PLAIN).contains("not aligned"));
        assert!(refuse(END, 0, &PLAIN).contains("past the file's end"));
        assert!(refuse(COMPRESSED | COPIED | 0x20000, 0, &PLAIN).contains("compressed"));
        assert!(refuse(COMPRESSED | END, 0, &PLAIN).contains("outside the file"));
        let extended = Geometry {
            extended_l2: true,
            ..PLAIN
        };
        assert!(refuse(0, 1, &extended).contains("host offset zero"));
        assert!(refuse(0x20000, 1 << 32 | 1, &extended).contains("both allocated and zero"));
        let external = Geometry {
            external_data: true,
            ..PLAIN
        };
        assert!(refuse(COPIED | 0x20000, 0, &external).contains("not the guest's"));
        for raw in [1, 1 << 56, COPIED, 0x200, END] {
            assert!(L1Entry::decode(raw, &PLAIN, END).is_err(), "{raw:#x}");
        }
    }
}
