//! Reading: where each piece of a range lies, and fetching it.

use std::sync::{Arc, PoisonError};

use super::entry::{Cluster, Compressed, Host};
use super::{Meta, Qcow2, compressed};
use crate::image::{Buffers, ImageError, Resolved};

/// Clusters looked at for one piece: bounds how long that holds the lock.
const MOST_LOOKED_AT: usize = 4096;

/// The start of a guest range, as one piece.
#[derive(Clone, Copy, Debug)]
pub(super) enum Piece {
    /// At this offset of the data file.
    Host {
        offset: u64,
        len: u64,
    },
    Zero {
        len: u64,
    },
    /// In the backing file, inside its capacity.
    Below {
        len: u64,
    },
    /// In a compressed cluster, from byte `within`.
    Packed {
        cluster: Compressed,
        within: u64,
        len: u64,
    },
}

impl Piece {
    pub(super) fn len(&self) -> u64 {
        match *self {
            Self::Host { len, .. } | Self::Zero { len } | Self::Below { len } | Self::Packed { len, .. } => {
                len
            }
        }
    }

    /// This piece followed directly by `next`, if both are one.
    fn join(self, next: Self) -> Option<Self> {
        match (self, next) {
            (
                Self::Host { offset, len },
                Self::Host {
                    offset: follows,
                    len: more,
                },
            ) if offset + len == follows => Some(Self::Host {
                offset,
                len: len + more,
            }),
            (Self::Zero { len }, Self::Zero { len: more }) => Some(Self::Zero { len: len + more }),
            (Self::Below { len }, Self::Below { len: more }) => Some(Self::Below { len: len + more }),
            _ => None,
        }
    }
}

impl Qcow2 {
    /// Where the start of a range (not empty, inside the disk) lies; the piece is as long as it can be,
    /// up to a bound.
    pub(super) fn locate(&self, meta: &mut Meta, offset: u64, len: u64) -> Result<Piece, ImageError> {
        let mut all = self.locate_one(meta, offset, len)?;
        for _ in 1..MOST_LOOKED_AT {
            if all.len() >= len {
                break;
            }
            let next = self.locate_one(meta, offset + all.len(), len - all.len())?;
            match all.join(next) {
                Some(joined) => all = joined,
                None => break,
            }
        }
        Ok(all)
    }

    /// As [`Self::locate`], inside one cluster.
    fn locate_one(&self, meta: &mut Meta, offset: u64, len: u64) -> Result<Piece, ImageError> {
        let geometry = &self.geometry;
        let cluster = self.cluster_at(meta, geometry.cluster_of(offset))?;
        let within = geometry.within(offset);
        let len = len.min(geometry.cluster_size() - within);
        if let Host::Compressed(cluster) = cluster.host {
            return Ok(Piece::Packed { cluster, within, len });
        }
        let (len, state) = self.subcluster_run(&cluster, within, len);
        Ok(match (state, cluster.host) {
            (State::Allocated, Host::Plain { offset, .. }) => Piece::Host {
                offset: offset + within,
                len,
            },
            (State::Zero, _) => Piece::Zero { len },
            _ => self.below(offset, len),
        })
    }

    /// How far, from `within`, the subclusters have the same state.
    fn subcluster_run(&self, cluster: &Cluster, within: u64, len: u64) -> (u64, State) {
        let bits = self.geometry.subcluster_bits();
        let first = within >> bits;
        let state = State::of(cluster, first);
        let end = (first + 1..u64::from(self.geometry.subclusters()))
            .find(|index| State::of(cluster, *index) != state)
            .unwrap_or(u64::from(self.geometry.subclusters()));
        (((end << bits) - within).min(len), state)
    }

    /// What shows through an unallocated range: the backing file up to its end, then zeros.
    fn below(&self, offset: u64, len: u64) -> Piece {
        let end = self.covered();
        if offset < end {
            Piece::Below {
                len: len.min(end - offset),
            }
        } else {
            Piece::Zero { len }
        }
    }

    /// Whether a range is known to read as zeros, without reading it.
    pub(super) fn reads_as_zeros(&self, meta: &mut Meta, offset: u64, len: u64) -> Result<bool, ImageError> {
        let mut done = 0;
        while done < len {
            let piece = self.locate(meta, offset + done, len - done)?;
            let known = match (&piece, &self.backing) {
                (Piece::Zero { .. }, _) => true,
                (Piece::Below { len }, Some(backing)) => is_hole(&**backing, offset + done, *len),
                _ => false,
            };
            if !known {
                return Ok(false);
            }
            done += piece.len();
        }
        Ok(true)
    }

    pub(super) fn read_buffers(&self, to: Buffers<'_>, offset: u64) -> Result<(), ImageError> {
        let mut done = 0;
        while done < to.len() {
            let at = offset + done as u64;
            let mut meta = self.lock();
            let piece = self.locate(&mut meta, at, (to.len() - done) as u64)?;
            let guard = self.guard(&meta);
            drop(meta);
            let window = to.window(done, piece.len() as usize);
            match piece {
                Piece::Zero { .. } => window.fill_zero(),
                Piece::Host { offset, .. } => {
                    self.data
                        .read_buffers(window, offset)
                        .map_err(ImageError::io("read guest data"))?;
                }
                Piece::Below { .. } => self.read_below(window, at)?,
                Piece::Packed { cluster, within, .. } => {
                    let plain = self.inflate(cluster)?;
                    window.copy_from(&plain[within as usize..]);
                }
            }
            drop(guard);
            done += window.len();
        }
        Ok(())
    }

    fn read_below(&self, to: Buffers<'_>, offset: u64) -> Result<(), ImageError> {
        let Some(backing) = &self.backing else {
            to.fill_zero();
            return Ok(());
        };
        to.with_slices(|slices| backing.read(slices, offset))
            .map_err(ImageError::io("read from the backing file"))
    }

    fn inflate(&self, cluster: Compressed) -> Result<Arc<Vec<u8>>, ImageError> {
        let last = self
            .inflated
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some((known, plain)) = last
            && known == cluster
        {
            return Ok(plain);
        }
        let mut packed = vec![0; cluster.len as usize];
        self.file
            .read_at(&mut packed, cluster.offset)
            .map_err(ImageError::io("read a compressed cluster"))?;
        let plain = Arc::new(compressed::inflate(&packed, self.compression, &self.geometry)?);
        *self.inflated.lock().unwrap_or_else(PoisonError::into_inner) = Some((cluster, Arc::clone(&plain)));
        Ok(plain)
    }
}

/// State of a subcluster.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Allocated,
    Zero,
    Unallocated,
}

impl State {
    fn of(cluster: &Cluster, index: u64) -> Self {
        if cluster.allocated >> index & 1 != 0 {
            Self::Allocated
        } else if cluster.zero >> index & 1 != 0 {
            Self::Zero
        } else {
            Self::Unallocated
        }
    }
}

/// Whether the backing file says that all of a range reads as zeros; any doubt is a no.
fn is_hole(backing: &dyn crate::image::Image, mut offset: u64, mut len: u64) -> bool {
    while len > 0 {
        match backing.resolve_read(offset, len) {
            Ok(Resolved::Zero { len: zeros }) if zeros > 0 => {
                offset += zeros;
                len = len.saturating_sub(zeros);
            }
            _ => return false,
        }
    }
    true
}
