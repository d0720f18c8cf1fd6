//! Every way to boot, many boots, many reboots.

use crate::{default_kernel, images};
use anyhow::{Result, bail, ensure};
use integration_tests::host::Host;
use integration_tests::linux::{Disk, Launch, Loader, Work, pattern};
use integration_tests::suite::{Skip, full, test_within};
use libtest_mimic::Trial;
use std::time::Duration;

/// For one boot on an emulated processor that others use too.
pub(crate) const BOOT: Duration = Duration::from_secs(300);

/// After a guest's deadline, for the test to say what was on its console.
pub(crate) const GRACE: Duration = Duration::from_secs(20);

/// One point of the matrix.
#[derive(Clone, Copy)]
struct Case {
    loader: Loader,
    old_kernel: bool,
    cpus: u8,
    memory_mib: u64,
    disk: bool,
    nic: bool,
}

/// Rows such that every pair of values of every two factors occurs (checked below): the loader,
/// the kernel, the CPUs, the memory, the disk, the NIC.
const PAIRWISE: [u8; 6] = [0b000000, 0b111111, 0b000111, 0b011001, 0b101010, 0b110100];

/// The row with four CPUs: the cheapest of those with several, whose others have two in a quick run.
const FOUR: u8 = 0b000111;

pub(crate) fn tests() -> Vec<Trial> {
    let mut tests: Vec<Trial> = (0..64u8)
        .filter(|bits| full() || PAIRWISE.contains(bits))
        .map(matrix)
        .collect();
    tests.push(test_within(
        Duration::from_secs(5),
        "the default matrix has every pair",
        every_pair,
    ));
    tests.push(test_within(2 * BOOT, "a guest reboot in one launch", || {
        reboots(1)
    }));
    if full() {
        tests.push(test_within(20 * BOOT, "20 launches in a row (full)", || {
            launches(20)
        }));
        tests.push(test_within(
            21 * BOOT,
            "20 guest reboots in one launch (full)",
            || reboots(20),
        ));
    }
    tests
}

fn case(bits: u8) -> Case {
    let bit = |place: u8| bits >> place & 1 == 1;
    Case {
        loader: if bit(0) { Loader::BzImage } else { Loader::Pvh },
        old_kernel: bit(1),
        cpus: match bit(2) {
            true if bits == FOUR || full() => 4,
            true => 2,
            false => 1,
        },
        memory_mib: if bit(3) { 5 << 10 } else { 128 },
        disk: bit(4),
        nic: bit(5),
    }
}

fn matrix(bits: u8) -> Trial {
    let case = case(bits);
    let word = |set: bool, name: &'static str| if set { name } else { "" };
    let name = format!(
        "boots by {:?}, {}, {} CPUs, {} MiB{}{}{}",
        case.loader,
        if case.old_kernel { "6.1" } else { "default kernel" },
        case.cpus,
        case.memory_mib,
        word(case.disk, ", disk"),
        word(case.nic, ", NIC"),
        word(!PAIRWISE.contains(&bits), " (full)"),
    );
    test_within(BOOT + GRACE, name, move || boot(case))
}

fn boot(case: Case) -> Result<()> {
    Host::need_linux_kvm()?;
    let kernel = match (case.old_kernel, &images()?.v6_1) {
        (false, _) => default_kernel()?,
        (true, Some(kernel)) => kernel,
        (true, None) => bail!(Skip("this release has no kernel 6.1".to_owned())),
    };
    let work = Work::new(kernel)?;
    let disk = case.disk.then(|| pattern::make_disk(work.path())).transpose()?;
    let page = case.nic.then(|| "the page of the matrix".to_owned());
    let launch = Launch {
        loader: case.loader,
        cpus: case.cpus,
        memory_mib: case.memory_mib,
        disk: disk.as_ref().map(|(path, _)| Disk::Qcow2(path.clone())),
        page: page.clone(),
        ..Launch::small(BOOT)
    };
    let ran = work.run(&launch)?;
    ran.expect_power_off()?;
    let facts: Vec<&str> = ran.report("kernel")?.split_whitespace().collect();
    let cpus = case.cpus.to_string();
    ensure!(
        facts.first() == Some(&&*kernel.release) && facts.get(2) == Some(&&*cpus),
        "{facts:?}"
    );
    let memory_kib: u64 = facts.get(4).and_then(|size| size.parse().ok()).unwrap_or(0);
    // The kernel keeps a part for itself: page structures, its own image, the initramfs.
    let least = if case.memory_mib > 1024 {
        case.memory_mib * 9 / 10
    } else {
        case.memory_mib / 2
    };
    ensure!(
        (least..=case.memory_mib).contains(&(memory_kib >> 10)),
        "{memory_kib} KiB of {} MiB",
        case.memory_mib
    );
    if let Some((path, sum)) = disk {
        ensure!(
            ran.report("disk")? == sum,
            "the guest read something else: {:?}",
            ran.reports
        );
        pattern::check_disk(work.path(), &path)?;
    }
    if let Some(page) = page {
        ensure!(ran.report("page")? == page, "{:?}", ran.reports);
    }
    Ok(())
}

fn every_pair() -> Result<()> {
    for first in 0..6u8 {
        for second in 0..first {
            for values in 0..4u8 {
                let has = |row: &u8| row >> first & 1 == values & 1 && row >> second & 1 == values >> 1;
                ensure!(
                    PAIRWISE.iter().any(has),
                    "factors {first} and {second} never are {values:#04b}"
                );
            }
        }
    }
    Ok(())
}

fn launches(count: u32) -> Result<()> {
    Host::need_linux_kvm()?;
    let work = Work::new(default_kernel()?)?;
    let launch = Launch::small(BOOT);
    for _ in 0..count {
        work.run(&launch)?.expect_power_off()?;
    }
    Ok(())
}

fn reboots(count: u32) -> Result<()> {
    Host::need_linux_kvm()?;
    let work = Work::new(default_kernel()?)?;
    let (disk, sum) = pattern::make_disk(work.path())?;
    let launch = Launch {
        disk: Some(Disk::Qcow2(disk.clone())),
        reboots: count,
        ..Launch::small(BOOT * (count + 1))
    };
    let ran = work.run(&launch)?;
    ran.expect_power_off()?;
    let boots: Vec<&str> = ran
        .reports
        .iter()
        .filter_map(|report| report.strip_prefix("boot "))
        .collect();
    let expected: Vec<String> = (0..=count).map(|boot| boot.to_string()).collect();
    ensure!(boots == expected, "{boots:?}");
    let sums = ran
        .reports
        .iter()
        .filter(|report| **report == format!("disk {sum}"))
        .count();
    ensure!(
        sums == expected.len(),
        "the disk was right in {sums} of {} boots",
        expected.len()
    );
    pattern::check_disk(work.path(), &disk)
}
