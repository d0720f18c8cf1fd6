//! Every fuzz target in one program: `FUZZ_TARGET=NAME fuzz-targets [libFuzzer's arguments]`;
//! without the variable it prints each target's name and the folder of its crate.
#![no_main]
#![expect(
    unsafe_code,
    reason = "libFuzzer's main is not Rust's: SIGPIPE is to be ignored here"
)]

use std::sync::OnceLock;

/// Which target this process runs.
const CHOICE: &str = "FUZZ_TARGET";

/// Name, folder of the crate that is fuzzed, and what takes the input.
type Target = (&'static str, &'static str, fn(&[u8]));

const TARGETS: &[Target] = &[
    ("control", "vm-spec", vm_spec::fuzz::control),
    ("spec", "jailer", jailer::fuzz::spec),
    ("flags", "jailer", jailer::fuzz::flags),
    ("files", "jailer", jailer::fuzz::files),
    ("exits", "vmm", vmm::fuzz::exits),
    ("msix", "vmm", vmm::fuzz::msix),
    ("virtio", "vmm", vmm::fuzz::virtio),
    ("frontend", "vmm", vmm::fuzz::frontend),
    ("ring", "vhost-daemon", vhost_daemon::fuzz::ring),
    ("inflight", "vhost-daemon", vhost_daemon::fuzz::inflight),
    ("session", "vhost-daemon", vhost_daemon::fuzz::session),
    ("blk-queue", "vhost-blk", vhost_blk::fuzz::queue),
    ("raw", "vhost-blk", vhost_blk::fuzz::raw),
    ("qcow2", "vhost-blk", vhost_blk::fuzz::qcow2),
    ("qcow2-hostile", "vhost-blk", vhost_blk::fuzz::qcow2_hostile),
    ("vmdk", "vhost-blk", vhost_blk::fuzz::vmdk),
    ("vdi", "vhost-blk", vhost_blk::fuzz::vdi),
    ("vhdx", "vhost-blk", vhost_blk::fuzz::vhdx),
    ("vhd", "vhost-blk", vhost_blk::fuzz::vhd),
    ("net-receive", "vhost-net", vhost_net::fuzz::receive),
    ("net-transmit", "vhost-net", vhost_net::fuzz::transmit),
    ("net-control", "vhost-net", vhost_net::fuzz::control),
    ("net-header", "vhost-net", vhost_net::fuzz::header),
];

static CHOSEN: OnceLock<fn(&[u8])> = OnceLock::new();

libfuzzer_sys::fuzz_target!(init: choose(), |input: &[u8]| {
    if let Some(run) = CHOSEN.get() {
        run(input);
    }
});

fn choose() {
    // SAFETY: no other thread runs yet, and the disposition has no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let Ok(wanted) = std::env::var(CHOICE) else {
        for (name, folder, _) in TARGETS {
            println!("{name} {folder}");
        }
        std::process::exit(0);
    };
    match TARGETS.iter().find(|(name, ..)| *name == wanted) {
        Some((.., run)) => CHOSEN.get_or_init(|| *run),
        None => {
            eprintln!("no fuzz target '{wanted}'");
            std::process::exit(2);
        }
    };
}
