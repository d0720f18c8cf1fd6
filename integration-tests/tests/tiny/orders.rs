//! Orders to a running VM's device processes: `bulkhead resize` and `bulkhead metrics`.

use anyhow::{Context, Result, ensure};
use integration_tests::{
    host::Host,
    qemu_img::{qemu_img, qemu_img_in},
    suite::test,
    tiny::{Events, Run},
};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    process::Output,
    time::Duration,
};
use vm_spec::events::EventKind;
use vm_spec::run_state::ProcessRole;

const DEADLINE: Duration = Duration::from_secs(20);
const DISK: u64 = 16 << 20;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("orders::a_disk_grows_and_tells", grows),
        test("orders::a_disk_of_many_queues_tells", many_queues),
        test("orders::a_qcow2_disk_grows", qcow2_grows),
        test("orders::a_nic_tells_what_it_counts", nic),
    ]
}

/// `bulkhead VERB test WORDS...`.
fn order(run: &Run, verb: &str, words: &[&str]) -> Result<Output> {
    Ok(run.verb(verb, words)?.output()?)
}

fn said(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(out),
        String::from_utf8_lossy(err)
    )
}

fn start(flags: &[String]) -> Result<Run> {
    let mut run = Run::tiny("scenario=hlt", flags)?;
    run.console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    Ok(run)
}

/// Kills the disk's process, and waits for its successor.
pub(crate) fn replace_disk_process(run: &mut Run) -> Result<()> {
    replace_process(run, ProcessRole::Disk)
}

fn replace_process(run: &mut Run, role: ProcessRole) -> Result<()> {
    kill(run.pid_of(role, DEADLINE)?, Signal::SIGKILL)?;
    Events::default().wait(run, DEADLINE, |event| event.event == EventKind::Restarted)?;
    Ok(())
}

/// A successor takes orders as its predecessor did.
fn grows() -> Result<()> {
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk");
    File::create(&disk)?.set_len(DISK)?;
    let flags = [
        format!("--disk=path={},format=raw", disk.display()),
        "--power-off-grace=1".to_owned(),
    ];
    let mut run = start(&flags)?;
    let output = order(&run, "resize", &["disk0", "32M"])?;
    ensure!(output.status.success(), "{}", said(&output));
    ensure!(fs::metadata(&disk)?.len() == 2 * DISK, "it did not grow");
    replace_disk_process(&mut run)?;
    let output = order(&run, "resize", &["disk0", "48M"])?;
    ensure!(output.status.success(), "{}", said(&output));
    ensure!(fs::metadata(&disk)?.len() == 3 * DISK, "it did not grow again");
    let output = order(&run, "metrics", &["disk0"])?;
    ensure!(
        output.status.success() && said(&output).contains("# TYPE ") && said(&output).contains("# EOF"),
        "{}",
        said(&output)
    );
    for (words, code, why) in [
        (["disk0", "1M"], 1, "size: "),
        (["disk7", "64M"], 2, "no device 'disk7'"),
        (["net0", "64M"], 2, "no device 'net0'"),
    ] {
        let output = order(&run, "resize", &words)?;
        ensure!(
            output.status.code() == Some(code) && said(&output).contains(why),
            "{words:?}: {}",
            said(&output)
        );
    }
    ensure!(
        fs::metadata(&disk)?.len() == 3 * DISK,
        "a refused order was obeyed"
    );
    Ok(())
}

/// What it says fits a message.
fn many_queues() -> Result<()> {
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk");
    File::create(&disk)?.set_len(DISK)?;
    let flags = [
        format!("--disk=path={},format=raw,queues=32", disk.display()),
        "--power-off-grace=1".to_owned(),
    ];
    let run = start(&flags)?;
    let output = order(&run, "metrics", &[])?;
    ensure!(
        output.status.success() && said(&output).contains("queue=\"31\""),
        "{}",
        said(&output)
    );
    Ok(())
}

/// A successor counts from the beginning, and knows how the link is.
fn nic() -> Result<()> {
    Host::need_kvm()?;
    Host::need_tun()?;
    let flags = [
        "--net=private=10.213.9.1/24".to_owned(),
        "--power-off-grace=1".to_owned(),
    ];
    let mut run = start(&flags)?;
    let of = "vm=\"test\",device=\"net0\"";
    let tells = |run: &Run, line: &str| -> Result<()> {
        // Of all devices, of which there is one.
        let output = order(run, "metrics", &[])?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success() && said.ends_with("# EOF\n"), "{output:?}");
        ensure!(said.lines().any(|told| told == line), "no {line:?} in\n{said}");
        Ok(())
    };
    tells(&run, &format!("bulkhead_net_link_up{{{of}}} 1"))?;
    tells(
        &run,
        &format!("bulkhead_net_frames_total{{{of},direction=\"transmit\"}} 0"),
    )?;
    let output = order(&run, "link", &["net0", "down"])?;
    ensure!(output.status.success(), "{}", said(&output));
    tells(&run, &format!("bulkhead_net_link_up{{{of}}} 0"))?;
    replace_process(&mut run, ProcessRole::Net)?;
    tells(&run, &format!("bulkhead_net_link_up{{{of}}} 0"))?;
    let output = order(&run, "resize", &["net0", "64M"])?;
    ensure!(
        output.status.code() == Some(2) && said(&output).contains("net0 is no disk"),
        "{}",
        said(&output)
    );
    end(run)
}

/// Ends the VM, and with it the disk's process.
fn end(mut run: Run) -> Result<()> {
    run.process.signal(Signal::SIGTERM)?;
    run.wait(DEADLINE).map(drop)
}

/// The size that the image says, with no regard to who uses it.
fn virtual_size(image: &Path) -> Result<u64> {
    let image = image.to_str().context("no text")?;
    let info = qemu_img(&["info", "-U", "--output=json", image])?;
    let info: serde_json::Value = serde_json::from_str(&info)?;
    info["virtual-size"].as_u64().context("no size")
}

/// An overlay that is shorter than its base, with a longer L1 table each time. Its process does in its jail
/// all that growing takes.
fn qcow2_grows() -> Result<()> {
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    let (base, disk) = (folder.path().join("base"), folder.path().join("disk"));
    fs::write(&base, vec![0xab; 2 * DISK as usize])?;
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base"];
    qemu_img_in(
        folder.path(),
        &[&create[..], &["-o", "size=16M,cluster_size=512", "disk"]].concat(),
    )?;
    let flags = [
        format!("--disk=path={},format=qcow2", disk.display()),
        "--power-off-grace=1".to_owned(),
    ];
    let mut run = start(&flags)?;
    let output = order(&run, "resize", &["disk0", "24M"])?;
    ensure!(output.status.success(), "{}", said(&output));
    ensure!(virtual_size(&disk)? == 24 << 20, "it did not grow");
    replace_disk_process(&mut run)?;
    let output = order(&run, "resize", &["disk0", "1G"])?;
    ensure!(output.status.success(), "{}", said(&output));
    ensure!(virtual_size(&disk)? == 1 << 30, "it did not grow again");
    for (size, why) in [("1M", "size: "), ("1T", "size: the L1 table")] {
        let output = order(&run, "resize", &["disk0", size])?;
        ensure!(
            output.status.code() == Some(1) && said(&output).contains(why),
            "{size}: {}",
            said(&output)
        );
    }
    let output = order(&run, "metrics", &["disk0"])?;
    ensure!(
        output.status.success() && said(&output).contains("1073741824"),
        "{}",
        said(&output)
    );
    end(run)?;
    // The process that was killed left what it had reserved, and nothing worse.
    qemu_img_in(folder.path(), &["check", "-q", "-r", "leaks", "disk"])?;
    let run = start(&flags)?;
    let output = order(&run, "resize", &["disk0", "2G"])?;
    ensure!(output.status.success(), "{}", said(&output));
    end(run)?;
    ensure!(virtual_size(&disk)? == 2 << 30, "another size after the end");
    qemu_img_in(folder.path(), &["check", "-q", "disk"])?;
    qemu_img_in(folder.path(), &["convert", "-O", "raw", "disk", "raw"])?;
    let raw = File::open(folder.path().join("raw"))?;
    for (at, expected) in [(0, 0xab), (DISK - 512, 0xab), (DISK, 0), ((2 * DISK) - 512, 0)] {
        let mut sector = [1; 512];
        raw.read_exact_at(&mut sector, at)?;
        ensure!(sector == [expected; 512], "other bytes at {at}");
    }
    Ok(())
}
