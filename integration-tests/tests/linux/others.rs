//! Our vmm with a back end that is not ours.

use crate::boots::{BOOT, GRACE};
use crate::default_kernel;
use anyhow::{Context, Result, ensure};
use integration_tests::host::Host;
use integration_tests::linux::{Disk, Launch, Work, pattern};
use integration_tests::process::Process;
use integration_tests::process::wait_for;
use integration_tests::suite::test_within;
use libtest_mimic::Trial;
use std::process::Command;
use std::time::Duration;

pub(crate) fn tests() -> Vec<Trial> {
    vec![test_within(
        BOOT + GRACE,
        "a disk of qemu-storage-daemon",
        storage_daemon,
    )]
}

fn storage_daemon() -> Result<()> {
    Host::need_linux_kvm()?;
    let work = Work::new(default_kernel()?)?;
    let (raw, socket) = (work.path().join("disk.raw"), work.path().join("disk.sock"));
    let sum = pattern::make_raw_disk(&raw)?;
    let mut daemon = Command::new("qemu-storage-daemon");
    daemon
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=disk,filename={}", raw.display()));
    daemon.arg("--export").arg(format!(
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path={}",
        socket.display()
    ));
    let _daemon = Process::start(daemon).context("package qemu-utils")?;
    // One front end at a time: it is not connected to before bulkhead does, only looked for.
    wait_for(&socket, Duration::from_secs(10))?;
    let launch = Launch {
        cpus: 2,
        disk: Some(Disk::Socket(socket)),
        ..Launch::small(BOOT)
    };
    let ran = work.run(&launch)?;
    ran.expect_power_off()?;
    ensure!(
        ran.report("disk")? == sum,
        "the guest read something else: {:?}",
        ran.reports
    );
    pattern::check_raw(&raw)
}
