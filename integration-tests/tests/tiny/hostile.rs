//! A back end that lies under a running guest: the vmm says so in one line and lives, its memory stays
//! bounded, and the guest's other disk goes on.

use crate::fixture::{Disk, Server};
use anyhow::{Context, Result, ensure};
use integration_tests::{
    host::Host,
    suite::test,
    tiny::{Device, Liar, Lie, Vm, VmOptions},
};
use libtest_mimic::Trial;
use std::{fs, time::Duration};
use vm_spec::control::EndReason;

const DEADLINE: Duration = Duration::from_secs(50);
const REQUESTS: u64 = 2000;
/// Most memory of the vmm, beside the guest's, in KiB.
const MOST_MEMORY: u64 = 24 << 10;
/// The guest's, in KiB.
const GUEST_MEMORY: u64 = 64 << 10;
/// Most lines that the vmm may log of it all.
const MOST_LINES: usize = 12;

/// A lie, and what the vmm says of it; nothing where the device itself lives on.
const LIES: [(&str, Lie, Option<&str>); 14] = [
    ("wrong_length", Lie::WrongLength, Some("4 bytes")),
    ("huge_reply", Lie::HugeReply, Some("4294967295")),
    ("no_reply", Lie::NoReply, Some("SET_VRING_ENABLE")),
    ("out_of_order", Lie::OutOfOrder, Some("SET_VRING_ENABLE")),
    ("descriptors", Lie::Descriptors, Some("descriptor")),
    ("unasked", Lie::Unasked, Some("a message that nobody asked for")),
    ("close", Lie::Close, Some("closed its socket")),
    ("flood_of_requests", Lie::FloodRequests, None),
    ("flood_of_changes", Lie::FloodChanges, None),
    ("garbage", Lie::Garbage, None),
    ("interrupts", Lie::Interrupts, Some("broken ring")),
    ("noise_in_the_ring", Lie::Noise, None),
    ("used_index_jumps", Lie::UsedIndex, None),
    ("truncate_guest_memory", Lie::Truncate, None),
];

pub(crate) fn tests() -> Vec<Trial> {
    let trial = |(name, lie, said): (&str, Lie, Option<&'static str>)| {
        test(format!("hostile::{name}"), move || neighbour(lie, said))
    };
    LIES.into_iter().map(trial).collect()
}

fn neighbour(lie: Lie, said: Option<&str>) -> Result<()> {
    Host::need_kvm()?;
    let (disk, good) = Disk::start(Server::Ours)?;
    let (liar, socket) = Liar::start(lie)?;
    let cmdline = format!("scenario=blk sync=1 requests={REQUESTS} seed=3 depth=8 neighbour=1");
    let mut vm = Vm::start(&VmOptions::tiny(cmdline), vec![good, Device::disk(socket)])?;
    if let Err(error) = work(&mut vm) {
        let log = vm.process.stderr()?;
        let ended = vm.wait_end(DEADLINE).map(|ended| ended.reason);
        return Err(disk.explain(error.context(format!("vmm: {ended:?}; {log}"))));
    }
    if said.is_some() {
        vm.wait_lost(DEADLINE)?;
    }
    let memory = peak_memory(&vm)?;
    vm.type_text("d")?;
    let ended = vm.wait_end(DEADLINE)?;
    liar.finish()?;
    ended.console.expect_ok()?;
    ensure!(ended.reason == EndReason::PowerOff, "{:?}", ended.reason);
    ensure!(memory < GUEST_MEMORY + MOST_MEMORY, "the vmm took {memory} KiB");
    let lines = ended.log.lines().count();
    ensure!(
        lines <= MOST_LINES,
        "{lines} lines for one neighbour:\n{}",
        ended.log
    );
    ensure!(!ended.log.contains("panicked"), "{}", ended.log);
    match (said, ended.lost.as_slice()) {
        (None, []) => {}
        (Some(said), [one]) => ensure!(one.starts_with("device1: ") && one.contains(said), "{one}"),
        (_, lost) => ensure!(false, "the vmm said {lost:?}; it logged\n{}", ended.log),
    }
    Ok(())
}

/// The guest drives both disks, and has the good one do its work.
fn work(vm: &mut Vm) -> Result<()> {
    vm.console.wait_line("phase=work", DEADLINE)?;
    vm.type_text("w")?;
    vm.console.wait_line("phase=done", DEADLINE)
}

/// The most that was resident at any time, in KiB.
fn peak_memory(vm: &Vm) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", vm.process.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let words = line.context("no VmHWM")?.split_whitespace().next();
    Ok(words.context("no number")?.parse()?)
}
