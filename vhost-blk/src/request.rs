//! Block requests as the driver frames them, checked once (virtio 1.3, 5.2.6).

use vhost_daemon::Chain;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::image::SECTOR;
use crate::options::SERIAL_LENGTH;

/// Most sectors in one segment of a DISCARD: 4 GiB.
pub(crate) const MAX_DISCARD_SECTORS: u32 = 8 << 20;
/// Most sectors in one segment of a WRITE_ZEROES: 64 MiB, which a file system that cannot zero a
/// range has to write.
pub(crate) const MAX_WRITE_ZEROES_SECTORS: u32 = 128 << 10;
/// Most segments in either: bounds what one request can ask for.
pub(crate) const MAX_DISCARD_SEGMENTS: u32 = 32;
/// Clusters that a driver is told to clear at most by one segment, so that 32 of them take a second or so. More are
/// taken: a driver keeps to what it was told when it started, maybe by another build.
const MOST_CLUSTERS: u64 = 64 << 10;

/// What a driver is told of `most` sectors a segment, for an image with `cluster` bytes to a cluster.
pub(crate) fn told_sectors(most: u32, cluster: u64) -> u32 {
    let sectors = (cluster / SECTOR).max(1).saturating_mul(MOST_CLUSTERS);
    u32::try_from(sectors).unwrap_or(most).min(most)
}

/// A request's last byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Status(pub(crate) u8);

impl Status {
    pub(crate) const OK: Self = Self(VIRTIO_BLK_S_OK as u8);
    pub(crate) const IOERR: Self = Self(VIRTIO_BLK_S_IOERR as u8);
    pub(crate) const UNSUPP: Self = Self(VIRTIO_BLK_S_UNSUPP as u8);
}

/// `struct virtio_blk_req`'s readable header.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Segment {
    sector: U64,
    num_sectors: U32,
    flags: U32,
}

/// A range of the disk that lies inside it. In bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Range {
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// WRITE_ZEROES may give the space back.
    pub(crate) unmap: bool,
}

/// A request whose every field was checked against the disk; offsets and lengths in bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Request {
    In { offset: u64, length: usize },
    Out { offset: u64, length: usize },
    Flush,
    GetId { length: usize },
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
}

impl Request {
    /// Bytes of the header.
    pub(crate) const HEADER_LENGTH: usize = size_of::<Header>();

    /// Bytes of data that it moves.
    pub(crate) fn data_length(&self) -> usize {
        match self {
            Self::In { length, .. } | Self::Out { length, .. } => *length,
            _ => 0,
        }
    }

    /// Reads and checks the request in `chain`, whose last writable byte is the status.
    ///
    /// # Errors
    /// The status that the driver gets.
    pub(crate) fn read(chain: &Chain, capacity: u64) -> Result<Self, Status> {
        let mut header = Header::new_zeroed();
        if chain.read_at(0, header.as_mut_bytes()) != Self::HEADER_LENGTH {
            return Err(Status::IOERR);
        }
        let readable = chain.readable_length() - Self::HEADER_LENGTH;
        let writable = chain.writable_length().checked_sub(1).ok_or(Status::IOERR)?;
        let sector = header.sector.get();
        match header.kind.get() {
            VIRTIO_BLK_T_IN => {
                let offset = data_range(sector, writable, capacity)?;
                Ok(Self::In {
                    offset,
                    length: writable,
                })
            }
            VIRTIO_BLK_T_OUT => {
                let offset = data_range(sector, readable, capacity)?;
                Ok(Self::Out {
                    offset,
                    length: readable,
                })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::GetId {
                length: writable.min(SERIAL_LENGTH),
            }),
            VIRTIO_BLK_T_DISCARD => {
                let ranges = ranges(chain, readable, capacity, MAX_DISCARD_SECTORS, 0)?;
                Ok(Self::Discard(ranges))
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                let ranges = ranges(chain, readable, capacity, MAX_WRITE_ZEROES_SECTORS, flags)?;
                Ok(Self::WriteZeroes(ranges))
            }
            _ => Err(Status::UNSUPP),
        }
    }
}

/// The first byte of `length` bytes from `sector`: whole sectors inside the disk, at least one.
fn data_range(sector: u64, length: usize, capacity: u64) -> Result<u64, Status> {
    let length = length as u64;
    if length == 0 || !length.is_multiple_of(SECTOR) {
        return Err(Status::IOERR);
    }
    inside(sector, length, capacity)
}

fn inside(sector: u64, length: u64, capacity: u64) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IOERR)?;
    let end = offset.checked_add(length).ok_or(Status::IOERR)?;
    if end > capacity {
        Err(Status::IOERR)
    } else {
        Ok(offset)
    }
}

/// The segments of a DISCARD or WRITE_ZEROES: all are checked before any is carried out.
fn ranges(
    chain: &Chain,
    length: usize,
    capacity: u64,
    max_sectors: u32,
    known_flags: u32,
) -> Result<Vec<Range>, Status> {
    let size = size_of::<Segment>();
    let count = length / size;
    if !length.is_multiple_of(size) || count == 0 || count > MAX_DISCARD_SEGMENTS as usize {
        return Err(Status::IOERR);
    }
    (0..count)
        .map(|index| {
            let mut segment = Segment::new_zeroed();
            chain.read_at(Request::HEADER_LENGTH + index * size, segment.as_mut_bytes());
            if segment.flags.get() & !known_flags != 0 {
                return Err(Status::UNSUPP);
            }
            if segment.num_sectors.get() > max_sectors {
                return Err(Status::IOERR);
            }
            let length = u64::from(segment.num_sectors.get()) * SECTOR;
            Ok(Range {
                offset: inside(segment.sector.get(), length, capacity)?,
                length,
                unmap: segment.flags.get() & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_driver_is_told_follows_the_clusters() {
        for (cluster, mib) in [(512, 32), (4 << 10, 256), (64 << 10, 4096), (2 << 20, 4096)] {
            let told = told_sectors(MAX_DISCARD_SECTORS, cluster);
            assert_eq!(told, mib << 11, "clusters of {cluster} bytes");
            let told = told_sectors(MAX_WRITE_ZEROES_SECTORS, cluster);
            assert_eq!(told, mib.min(64) << 11, "clusters of {cluster} bytes");
        }
    }

    #[test]
    fn ranges_lie_inside_the_disk() {
        let capacity = 8 * SECTOR;
        assert_eq!(data_range(7, 512, capacity), Ok(7 * SECTOR));
        assert_eq!(data_range(0, 4096, capacity), Ok(0));
        for (sector, length) in [
            (0, 0),
            (0, 511),
            (0, 513),
            (7, 1024),
            (8, 512),
            (u64::MAX, 512),
            (u64::MAX / SECTOR, 512),
            (u64::MAX / SECTOR + 1, 512),
        ] {
            let refused = data_range(sector, length, capacity);
            assert_eq!(refused, Err(Status::IOERR), "sector {sector}, {length} bytes");
        }
    }
}
