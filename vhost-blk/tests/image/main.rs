//! The image engine: what it reads, writes, frees and refuses, with qemu-img as the second opinion.

#[path = "../support/mod.rs"]
mod support;

mod block_device;
mod direct_io;
mod image_lock;
mod qcow2_corrupt;
mod qcow2_corrupt_metadata;
mod qcow2_crash;
mod qcow2_dirty;
mod qcow2_faults;
mod qcow2_freeing;
mod qcow2_full_host;
mod qcow2_grow;
mod qcow2_grow_live;
mod qcow2_hostile;
mod qcow2_luks;
mod qcow2_neighbours;
mod qcow2_random;
mod qcow2_refuse;
mod qcow2_refuse_header;
mod qcow2_refuse_tables;
mod qcow2_states;
mod sparse_formats;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut tests = Vec::new();
    tests.extend(block_device::tests());
    tests.extend(direct_io::tests());
    tests.extend(image_lock::tests());
    tests.extend(qcow2_corrupt::tests());
    tests.extend(qcow2_corrupt_metadata::tests());
    tests.extend(qcow2_crash::tests());
    tests.extend(qcow2_dirty::tests());
    tests.extend(qcow2_faults::tests());
    tests.extend(qcow2_freeing::tests());
    tests.extend(qcow2_full_host::tests());
    tests.extend(qcow2_grow::tests());
    tests.extend(qcow2_grow_live::tests());
    tests.extend(qcow2_hostile::tests());
    tests.extend(qcow2_luks::tests());
    tests.extend(qcow2_neighbours::tests());
    tests.extend(qcow2_random::tests());
    tests.extend(qcow2_refuse::tests());
    tests.extend(qcow2_refuse_header::tests());
    tests.extend(qcow2_refuse_tables::tests());
    tests.extend(qcow2_states::tests());
    tests.extend(sparse_formats::tests());
    support::suite::run(tests)
}
