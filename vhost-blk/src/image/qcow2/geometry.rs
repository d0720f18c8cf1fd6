//! Sizes that follow from the header, and the arithmetic of clusters.

/// How an image is divided; constant while it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// log2 of the cluster size, 9 to 21.
    pub(super) cluster_bits: u32,
    /// Incompatible bit 4: 128-bit L2 entries with 32 subclusters.
    pub(super) extended_l2: bool,
    /// Incompatible bit 2: guest data lies in another file, at the guest's offset.
    pub(super) external_data: bool,
    /// Guest data is encrypted: a hole in a data cluster does not read as zeros.
    pub(super) encrypted: bool,
    /// log2 of the width of a refcount in bits, 0 to 6.
    pub(super) refcount_order: u32,
    /// 2 or 3.
    pub(super) version: u32,
}

impl Geometry {
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(super) fn cluster_bytes(&self) -> usize {
        1 << self.cluster_bits
    }

    /// Offset inside its cluster.
    pub(super) fn within(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    pub(super) fn cluster_of(&self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }

    pub(super) fn offset_of(&self, cluster: u64) -> u64 {
        cluster << self.cluster_bits
    }

    /// Clusters needed for `bytes`.
    pub(super) fn clusters_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Bytes of an L2 entry.
    pub(super) fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// log2 of the entries of an L2 table.
    pub(super) fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }

    /// Subclusters of a cluster; a plain image counts as having one.
    pub(super) fn subclusters(&self) -> u32 {
        if self.extended_l2 { 32 } else { 1 }
    }

    pub(super) fn subcluster_bits(&self) -> u32 {
        if self.extended_l2 {
            self.cluster_bits - 5
        } else {
            self.cluster_bits
        }
    }

    pub(super) fn subcluster_size(&self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// One bit for each subcluster.
    pub(super) fn all_subclusters(&self) -> u32 {
        if self.extended_l2 { u32::MAX } else { 1 }
    }

    /// Bits of the subclusters that `within..within + len` of a cluster touches.
    pub(super) fn subcluster_mask(&self, within: u64, len: u64) -> u32 {
        if len == 0 {
            return 0;
        }
        let first = within >> self.subcluster_bits();
        let last = (within + len - 1) >> self.subcluster_bits();
        (first..=last).fold(0, |mask, index| mask | 1 << index)
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub(super) fn l1_entries(&self, size: u64) -> u64 {
        self.clusters_for(size).div_ceil(1 << self.l2_bits())
    }

    /// Index into L1 of a guest cluster.
    pub(super) fn l1_index(&self, guest_cluster: u64) -> u64 {
        guest_cluster >> self.l2_bits()
    }

    /// Index into its L2 table of a guest cluster.
    pub(super) fn l2_index(&self, guest_cluster: u64) -> u64 {
        guest_cluster & ((1 << self.l2_bits()) - 1)
    }

    /// Entries of a refcount block.
    pub(super) fn refblock_entries(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// The largest refcount that fits.
    pub(super) fn max_refcount(&self) -> u64 {
        match self.refcount_order {
            6 => u64::MAX,
            order => (1 << (1_u32 << order)) - 1,
        }
    }

    /// Bits of the offset in a compressed cluster's descriptor (`x` in the specification).
    pub(super) fn compressed_offset_bits(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }
}
