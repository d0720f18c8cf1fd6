//! Requests and packets: the data is right, and the vmm sees none of them.

use crate::fixture::{Disk, Server};
use anyhow::{Context, Result, ensure};
use guest_contract::{Checksum, holds};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    process::Process,
    suite::{artifact, seccomp_flag, test},
    tiny::{Device, Tap, Vm, VmOptions},
};
use libtest_mimic::Trial;
use std::{collections::BTreeMap, fs, process::Command, time::Duration};
use vm_spec::control::{EndReason, VmStats};

const DEADLINE: Duration = Duration::from_secs(50);
/// Requests of a run, and frames.
const COUNT: u64 = 10_000;
/// Exits that a run may have in all, whatever its length: the console's bytes around it, and what
/// the reference back end's start leaves over.
const EXITS: u64 = 50;

pub(crate) fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    for (name, server) in [("ours", Server::Ours), ("reference", Server::Reference)] {
        for (way, cmdline) in [
            ("depth_1", "depth=1"),
            ("depth_32", "depth=32"),
            ("4_queues", "depth=16 queues=4"),
            ("polled", "depth=32 mode=poll"),
            ("no_event_idx", "depth=32 event-idx=0"),
        ] {
            // The reference's configuration space says one queue.
            if server == Server::Ours || !cmdline.contains("queues") {
                let name = format!("work::blk_{name}_{way}");
                tests.push(test(name, move || blk(server, cmdline)));
            }
        }
        tests.push(test(format!("work::msix_mask_{name}"), move || msix_mask(server)));
    }
    tests.push(test("work::blk_discard", discard));
    tests.push(test("work::net_depth_1", || net(1)));
    tests.push(test("work::net_depth_32", || net(32)));
    tests
}

/// Exits by reason between two counts.
fn difference(before: &VmStats, after: &VmStats) -> BTreeMap<String, u64> {
    let before: BTreeMap<_, _> = before.exits.iter().cloned().collect();
    let since = |(reason, count): &(String, u64)| {
        let count = count - before.get(reason).copied().unwrap_or(0);
        (count > 0).then(|| (reason.clone(), count))
    };
    after.exits.iter().filter_map(since).collect()
}

/// Lets the guest's work run, and counts the exits to user space that it makes.
fn measured(vm: &mut Vm, name: &str) -> Result<()> {
    vm.console.wait_line("phase=work", DEADLINE)?;
    let before = vm.stats(DEADLINE)?;
    vm.type_text("w")?;
    vm.console.wait_line("phase=done", DEADLINE)?;
    let after = vm.stats(DEADLINE)?;
    vm.type_text("d")?;
    let exits = difference(&before, &after);
    println!("{name}: {COUNT} requests, exits to user space by reason: {exits:?}");
    let sum: u64 = exits.values().sum();
    ensure!(sum <= EXITS, "{sum} exits for {COUNT} requests: {exits:?}");
    no_rekicks(&after)
}

/// What the guest waited for came by itself.
pub(crate) fn no_rekicks(stats: &VmStats) -> Result<()> {
    ensure!(
        stats.rekicks == 0,
        "nothing was completed for a second, {} times: the host is slow, or a kick was lost",
        stats.rekicks
    );
    Ok(())
}

fn blk(server: Server, cmdline: &str) -> Result<()> {
    Host::need_kvm()?;
    let (disk, device) = Disk::start(server)?;
    let options = VmOptions::tiny(format!("scenario=blk sync=1 requests={COUNT} seed=11 {cmdline}"));
    let mut vm = Vm::start(&options, vec![device])?;
    measured(&mut vm, &format!("{server:?} {cmdline}")).map_err(|error| disk.explain(error))?;
    let ended = vm.wait_end(DEADLINE)?;
    ended.console.expect_ok()?;
    ensure!(ended.reason == EndReason::PowerOff, "{:?}", ended.reason);
    ensure!(
        ended.console.number("requests")? == COUNT,
        "{}",
        ended.console.text()
    );
    println!(
        "  interrupts {}, doorbells {}, cycles {}",
        ended.console.number("interrupts")?,
        ended.console.number("doorbells")?,
        ended.console.number("cycles")?
    );
    check_image(&disk, ended.console.value("checksum")?)
}

/// The host's own reading of the image: every block, and the checksum that the guest printed.
fn check_image(disk: &Disk, checksum: &str) -> Result<()> {
    let content = fs::read(&disk.path)?;
    let mut sum = 0_u64;
    for (number, block) in (0..COUNT / 2).zip(content.chunks(4096)) {
        ensure!(holds(block, 11, number), "block {number} of the image differs");
        let mut of_block = Checksum::default();
        of_block.update(block);
        sum = sum.wrapping_add(of_block.0);
    }
    ensure!(
        format!("{sum:016x}") == checksum,
        "checksums differ: {sum:016x} and {checksum}"
    );
    Ok(())
}

fn discard() -> Result<()> {
    Host::need_kvm()?;
    let (disk, device) = Disk::start(Server::Ours)?;
    let vm = Vm::start(
        &VmOptions::tiny("scenario=blk requests=2000 discard=1"),
        vec![device],
    )?;
    let ended = vm.wait_end(DEADLINE).map_err(|error| disk.explain(error))?;
    ended.console.expect_ok()?;
    let content = fs::read(&disk.path)?;
    ensure!(
        content[..500 * 4096].iter().all(|byte| *byte == 0),
        "the image keeps discarded data"
    );
    ensure!(
        holds(&content[500 * 4096..501 * 4096], 1, 500),
        "the image lost other data"
    );
    Ok(())
}

/// A lost interrupt leaves the guest halted: the deadline finds it.
fn msix_mask(server: Server) -> Result<()> {
    Host::need_kvm()?;
    let (_disk, device) = Disk::start(server)?;
    let options = VmOptions::tiny("scenario=msix-mask sync=1 rounds=1000 depth=8");
    let mut vm = Vm::start(&options, vec![device])?;
    vm.console.wait_line("phase=work", DEADLINE)?;
    vm.type_text("w")?;
    vm.console.wait_line("phase=done", DEADLINE)?;
    no_rekicks(&vm.stats(DEADLINE)?)?;
    vm.type_text("d")?;
    let ended = vm.wait_end(DEADLINE)?;
    ended.console.expect_ok()?;
    ensure!(
        ended.console.number("rounds")? == 1000,
        "{}",
        ended.console.text()
    );
    ensure!(
        ended.console.number("masked_completions")? == 500,
        "{}",
        ended.console.text()
    );
    Ok(())
}

fn net(depth: u64) -> Result<()> {
    Host::need_kvm()?;
    let tap = Tap::new()?;
    let echo = tap.echo()?;
    let mut command = Command::new(artifact(Artifact::VhostUserNet)?);
    command.arg(seccomp_flag());
    command.args(["--fd=3", "--tap-fd=4", "--mac=02:00:00:00:00:02"]);
    integration_tests::process::inherit_at(&mut command, tap.fd, 4)?;
    let (process, socket) = Process::start_with_socket(command)?;
    let options = VmOptions::tiny(format!("scenario=net sync=1 packets={COUNT} depth={depth}"));
    let mut vm = Vm::start(&options, vec![Device::nic(socket)])?;
    measured(&mut vm, &format!("net depth={depth}"))
        .with_context(|| format!("vhost-user-net: {}", process.stderr().unwrap_or_default()))?;
    let ended = vm.wait_end(DEADLINE)?;
    ended.console.expect_ok()?;
    let (count, sum) = echo.stop()?;
    ensure!(count == COUNT, "{count} frames came to the host");
    ensure!(
        ended.console.number("echoed")? == COUNT,
        "{}",
        ended.console.text()
    );
    let sent = ended.console.value("sent_checksum")?;
    ensure!(
        format!("{sum:016x}") == sent,
        "checksums differ: {sum:016x} and {sent}"
    );
    Ok(())
}
