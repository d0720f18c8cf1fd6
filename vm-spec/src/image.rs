//! What the jailed image tool tells the launcher. It is less trusted than its reader: texts may hold
//! anything an image does, and are to be escaped before a person sees them.

use serde::{Deserialize, Serialize};

/// Longest text from an image in bytes, but for a backing file's name; the rest is cut.
pub const MAX_TEXT: usize = 1024;
/// Most layers of an image's chain, the top included: a loop ends here, and it bounds what a read of a hole can cost.
pub const MAX_CHAIN: usize = 16;
/// Most snapshots of an image (the format's bound).
pub const MAX_SNAPSHOTS: usize = 65_536;

/// One message of the tool.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum FromImageTool {
    /// How far the job is: in bytes of the disk for a conversion, else in tables of the image.
    Progress {
        /// What is done.
        done: u64,
        /// What is to be done in all, as far as is known yet.
        total: u64,
    },
    /// The answer to `info`; the image's snapshots follow.
    Info(Box<ImageInfo>),
    /// An internal snapshot, in the order of the table.
    Snapshot(SnapshotInfo),
    /// The answer to `check`.
    Checked(CheckResult),
    /// All went well; nothing follows.
    Done,
    /// What failed, with the causes behind it; nothing follows.
    Failed(String),
}

/// What an image is.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Disk size in bytes.
    pub virtual_size: u64,
    /// Length of the file in bytes.
    pub file_size: u64,
    /// Set for qcow2.
    pub qcow2: Option<Qcow2Info>,
}

/// What a qcow2 header says.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Qcow2Info {
    /// 2 or 3.
    pub version: u32,
    /// In bytes.
    pub cluster_size: u64,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// `zlib` or `zstd`.
    pub compression: String,
    /// Compatible bit 0.
    pub lazy_refcounts: bool,
    /// Incompatible bit 0.
    pub dirty: bool,
    /// Incompatible bit 1.
    pub corrupt: bool,
    /// Incompatible bit 4.
    pub extended_l2: bool,
    /// crypt_method 2.
    pub encrypted: bool,
    /// Name of the backing file, as the image has it: whole, and not necessarily UTF-8.
    pub backing_file: Option<Vec<u8>>,
    /// Format of the backing file, as the image has it.
    pub backing_format: Option<String>,
    /// Name of the external data file, as the image has it.
    pub data_file: Option<String>,
    /// Autoclear bit 1; `None` without an external data file.
    pub data_file_raw: Option<bool>,
}

/// An internal snapshot.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Unique in the image.
    pub id: String,
    /// As given by a person.
    pub name: String,
    /// Seconds since 1970.
    pub date_sec: u32,
    /// Nanoseconds in that second.
    pub date_nsec: u32,
    /// The guest's clock in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of the VM's state.
    pub vm_state_size: u64,
    /// Disk size in bytes.
    pub disk_size: u64,
}

/// What `check` found.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct CheckResult {
    /// Clusters that are counted but not used: lost space, nothing worse.
    pub leaks: u64,
    /// Whatever can lose data: clusters used but not counted, wrong COPIED flags, entries that cannot be.
    pub corruptions: u64,
    /// Leaks that were mended.
    pub leaks_fixed: u64,
    /// Corruptions that were mended.
    pub corruptions_fixed: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Those with a place in the file.
    pub allocated_clusters: u64,
    /// End of the last cluster in use.
    pub image_end_offset: u64,
    /// The first entry that cannot be, in words: counting ended there.
    pub broken: Option<String>,
}
