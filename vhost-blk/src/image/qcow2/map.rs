//! From guest clusters to L2 entries and back to the file.

use std::ops::Range;

use super::entry::{Cluster, Host, L1Entry};
use super::{Kind, Meta, Qcow2};
use crate::image::ImageError;

impl Qcow2 {
    fn l1_entry(&self, meta: &Meta, guest: u64) -> Result<Option<L1Entry>, ImageError> {
        let index = usize::try_from(self.geometry.l1_index(guest)).unwrap_or(usize::MAX);
        let raw = meta.l1.get(index).copied().unwrap_or(0);
        L1Entry::decode(raw, &self.geometry, meta.file_end)
    }

    fn entry_address(&self, table: u64, guest: u64) -> u64 {
        table + self.geometry.l2_index(guest) * self.geometry.l2_entry_size()
    }

    /// The mapping of a guest cluster.
    pub(super) fn cluster_at(&self, meta: &mut Meta, guest: u64) -> Result<Cluster, ImageError> {
        let Some(l1) = self.l1_entry(meta, guest)? else {
            return Ok(Cluster::UNALLOCATED);
        };
        let address = self.entry_address(l1.table, guest);
        let raw = meta.l2.word(&*self.file, address)?;
        let bitmap = if self.geometry.extended_l2 {
            meta.l2.word(&*self.file, address + 8)?
        } else {
            0
        };
        Cluster::decode(raw, bitmap, guest, &self.geometry, meta.file_end)
    }

    /// Whether a guest cluster's L2 table exists.
    pub(super) fn has_table(&self, meta: &Meta, guest: u64) -> Result<bool, ImageError> {
        Ok(self.l1_entry(meta, guest)?.is_some())
    }

    /// Guest clusters, from `guest`, whose entries lie in one slice of the cache.
    pub(super) fn slice_span(&self, meta: &Meta, guest: u64) -> u64 {
        let at = self.geometry.l2_index(guest) * self.geometry.l2_entry_size();
        (meta.l2.slice_end(at) - at) / self.geometry.l2_entry_size()
    }

    /// Writes the entries of consecutive clusters of one slice; their table must be writable.
    pub(super) fn store(&self, meta: &mut Meta, guest: u64, clusters: &[Cluster]) -> Result<(), ImageError> {
        let table = self.writable_table(meta, guest)?;
        let mut bytes = Vec::with_capacity(clusters.len() * 16);
        for cluster in clusters {
            let (raw, bitmap) = cluster.encode(&self.geometry);
            bytes.extend_from_slice(&raw.to_be_bytes());
            if self.geometry.extended_l2 {
                bytes.extend_from_slice(&bitmap.to_be_bytes());
            }
        }
        let address = self.entry_address(table, guest);
        meta.l2.write(&*self.file, address, &bytes)
    }

    /// The L2 table of a guest cluster, made if there is none, copied if a snapshot shares it.
    pub(super) fn writable_table(&self, meta: &mut Meta, guest: u64) -> Result<u64, ImageError> {
        match self.l1_entry(meta, guest)? {
            Some(L1Entry { table, copied }) => {
                self.check_is_table(meta, table)?;
                if !copied {
                    return self.copy_table(meta, guest, table);
                }
                self.check_refcount_is_one(meta, self.geometry.cluster_of(table), "L1 entry")?;
                Ok(table)
            }
            None => {
                // Reserved clusters are durably zero: an empty table needs neither write nor barrier.
                let table = self.geometry.offset_of(self.take_one(meta)?);
                self.publish_table(meta, guest, table)?;
                Ok(table)
            }
        }
    }

    /// An L2 table must be nothing else, and in the place of one L1 entry only.
    fn check_is_table(&self, meta: &Meta, table: u64) -> Result<(), ImageError> {
        let used_as = match meta.kinds.get(&self.geometry.cluster_of(table)) {
            Some(Kind::L2) => return Ok(()),
            Some(kind) => kind.to_string(),
            None => "data".to_owned(),
        };
        Err(ImageError::corrupt(
            "L1 entry",
            format!("the L2 table at {table:#x} is used as {used_as} too"),
        ))
    }

    fn check_refcount_is_one(
        &self,
        meta: &mut Meta,
        cluster: u64,
        field: &'static str,
    ) -> Result<(), ImageError> {
        match meta.refcounts.get(&*self.file, &self.geometry, cluster)? {
            1 => Ok(()),
            count => Err(ImageError::corrupt(
                field,
                format!("COPIED is set but the refcount of cluster {cluster:#x} is {count}"),
            )),
        }
    }

    fn copy_table(&self, meta: &mut Meta, guest: u64, old: u64) -> Result<u64, ImageError> {
        let mut bytes = vec![0; self.geometry.cluster_bytes()];
        self.file
            .read_at(&mut bytes, old)
            .map_err(ImageError::io("read an L2 table"))?;
        let new = self.geometry.offset_of(self.take_one(meta)?);
        self.file
            .write_at(&bytes, new)
            .map_err(ImageError::io("write an L2 table"))?;
        meta.l2.forget(new..new + self.geometry.cluster_size());
        self.file.sync().map_err(ImageError::io("flush an L2 table"))?;
        self.publish_table(meta, guest, new)?;
        let old = self.geometry.cluster_of(old);
        meta.kinds.remove(&old);
        self.free_later(meta, old..old + 1);
        Ok(new)
    }

    fn publish_table(&self, meta: &mut Meta, guest: u64, table: u64) -> Result<(), ImageError> {
        let index = self.geometry.l1_index(guest);
        let raw = L1Entry { table, copied: true }.encode();
        self.file
            .write_at(&raw.to_be_bytes(), meta.l1_offset + index * 8)
            .map_err(ImageError::io("write the L1 table"))?;
        if let Some(entry) = meta.l1.get_mut(index as usize) {
            *entry = raw;
        }
        meta.kinds.insert(self.geometry.cluster_of(table), Kind::L2);
        Ok(())
    }

    /// Host offset and length of the start of a range, where it may be overwritten in place.
    pub(super) fn in_place(
        &self,
        meta: &mut Meta,
        offset: u64,
        len: u64,
    ) -> Result<Option<(u64, u64)>, ImageError> {
        let geometry = &self.geometry;
        let mut found: Option<(u64, u64)> = None;
        let mut done = 0;
        while done < len {
            let (guest, within) = (geometry.cluster_of(offset + done), geometry.within(offset + done));
            let part = (len - done).min(geometry.cluster_size() - within);
            if meta.unprepared.is_some() || is_busy(meta, guest) {
                break;
            }
            let cluster = self.cluster_at(meta, guest)?;
            let Host::Plain {
                offset: host,
                copied: true,
            } = cluster.host
            else {
                break;
            };
            let touched = geometry.subcluster_mask(within, part);
            if cluster.allocated & touched != touched || found.is_some_and(|(start, _)| start + done != host)
            {
                break;
            }
            self.verify(meta, guest, host)?;
            found.get_or_insert((host + within, 0));
            done += part;
        }
        Ok(found.map(|(start, _)| (start, done)))
    }

    /// Checks, once for each cached entry, that a cluster may be overwritten in place.
    pub(super) fn verify(&self, meta: &mut Meta, guest: u64, host: u64) -> Result<(), ImageError> {
        if self.geometry.external_data {
            return Ok(());
        }
        let Some(l1) = self.l1_entry(meta, guest)? else {
            return Ok(());
        };
        let address = self.entry_address(l1.table, guest);
        if meta.l2.is_verified(&*self.file, address)? {
            return Ok(());
        }
        self.check_is_table(meta, l1.table)?;
        let cluster = self.geometry.cluster_of(host);
        self.check_data_place(meta, cluster..cluster + 1)?;
        self.check_refcount_is_one(meta, cluster, "L2 entry")?;
        meta.l2.set_verified(&*self.file, address)
    }

    /// Refuses to put guest data over metadata.
    pub(super) fn check_data_place(&self, meta: &Meta, clusters: Range<u64>) -> Result<(), ImageError> {
        for cluster in clusters {
            if let Some(kind) = meta.kinds.get(&cluster) {
                return Err(ImageError::corrupt(
                    "L2 entry",
                    format!("guest data at cluster {cluster:#x} would overwrite the {kind}"),
                ));
            }
        }
        Ok(())
    }
}

/// Whether an allocation of this guest cluster is in flight.
pub(super) fn is_busy(meta: &Meta, guest: u64) -> bool {
    meta.busy.iter().any(|range| range.contains(&guest))
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::Table(name) => name,
            Self::Refblock => "refcount block",
            Self::L2 => "L2 table",
            Self::SharedL2 => "L2 table of another range",
            Self::Reserved => "reserve of free clusters",
        })
    }
}
