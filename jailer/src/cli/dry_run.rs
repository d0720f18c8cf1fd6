//! `bulkhead run --dry-run`.

use crate::failure::Failure;
use crate::launch::{self, Options};
use std::fs;
use std::path::PathBuf;
use vm_spec::spec::VmSpec;

/// Says what would run. Captures that were not there before, which opening makes, are not there afterwards.
///
/// # Errors
/// As [`launch::dry_run`].
pub(super) fn show(spec: &VmSpec, options: &Options) -> Result<String, Failure> {
    let captures = spec.nets.iter().filter_map(|net| net.pcap.clone());
    let new: Vec<PathBuf> = captures
        .filter(|path| fs::symlink_metadata(path).is_err())
        .collect();
    let said = launch::dry_run(spec, options);
    for path in new {
        // One that holds something is someone else's, who began it meanwhile.
        if fs::symlink_metadata(&path).is_ok_and(|about| about.is_file() && about.len() == 0) {
            // It is no more than an empty file.
            let _ = fs::remove_file(&path);
        }
    }
    said
}
