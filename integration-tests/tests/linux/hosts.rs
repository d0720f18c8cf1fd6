//! What the host offers: huge pages, and no privileges.

use crate::boots::{BOOT, GRACE};
use crate::default_kernel;
use anyhow::{Context, Result, bail, ensure};
use integration_tests::host::Host;
use integration_tests::lent::{Lent, NOBODY};
use integration_tests::linux::{Disk, Launch, Work, pattern};
use integration_tests::suite::{Skip, test_within};
use libtest_mimic::Trial;
use nix::unistd::Uid;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const HUGE_PAGE: u64 = 2 << 20;
/// How many 2 MiB pages the host keeps (`Documentation/admin-guide/mm/hugetlbpage.rst`).
const RESERVED: &str = "/proc/sys/vm/nr_hugepages";
/// Between two looks at the host's huge pages, whose use raises no event.
const LOOK: Duration = Duration::from_millis(20);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_within(BOOT + GRACE, "RAM of huge pages", huge_pages),
        test_within(BOOT + GRACE, "an unprivileged user's guest", unprivileged),
    ]
}

fn need_root(why: &str) -> Result<()> {
    if !Uid::effective().is_root() {
        bail!(Skip(why.to_owned()));
    }
    Ok(())
}

/// A guest's RAM is huge pages while it runs: as many as it has touched.
fn huge_pages() -> Result<()> {
    Host::need_linux_kvm()?;
    need_root("only root can set huge pages aside")?;
    let launch = Launch {
        huge_pages: Some(HUGE_PAGE),
        ..Launch::small(BOOT)
    };
    let pages = (launch.memory_mib << 20) / HUGE_PAGE;
    let _aside = Aside::set(pages)?;
    let work = Work::new(default_kernel()?)?;
    let before = in_use()?;
    let over = AtomicBool::new(false);
    let (ran, most) = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut most = 0;
            while !over.load(Ordering::SeqCst) {
                most = most.max(in_use()?);
                std::thread::sleep(LOOK);
            }
            anyhow::Ok(most)
        });
        let ran = work.run(&launch);
        over.store(true, Ordering::SeqCst);
        let most = watch.join().map_err(|_| anyhow::anyhow!("the watch panicked"));
        anyhow::Ok((ran?, most??))
    })?;
    ran.expect_power_off()?;
    let used = most - before;
    ensure!(
        (pages / 4..=pages).contains(&used),
        "{used} huge pages were in use, of {pages}"
    );
    ensure!(in_use()? == before, "huge pages are still in use");
    Ok(())
}

/// Huge pages set aside on the host; given back when dropped.
struct Aside(String);

impl Aside {
    fn set(pages: u64) -> Result<Self> {
        let before = std::fs::read_to_string(RESERVED)?;
        let aside = Self(before.clone());
        let wanted = before.trim().parse::<u64>()? + pages;
        std::fs::write(RESERVED, wanted.to_string())?;
        if std::fs::read_to_string(RESERVED)?.trim() != wanted.to_string() {
            bail!(Skip(format!("this host cannot set {pages} huge pages aside")));
        }
        Ok(aside)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(RESERVED, &self.0) {
            eprintln!("cannot write {RESERVED}: {error}");
        }
    }
}

/// 2 MiB pages that someone uses or has reserved.
fn in_use() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let count = |name: &str| -> Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        Ok(line.with_context(|| name.to_owned())?.trim().parse()?)
    };
    Ok(count("HugePages_Total:")? - count("HugePages_Free:")? + count("HugePages_Rsvd:")?)
}

/// A user who owns nothing but the images boots with a disk and a NIC.
fn unprivileged() -> Result<()> {
    Host::need_linux_kvm()?;
    need_root("only root can become another user")?;
    let _lent = Lent::to(NOBODY)?;
    let mut work = Work::new(default_kernel()?)?;
    let (disk, sum) = pattern::make_disk(work.path())?;
    work.give_to(NOBODY)?;
    let page = "the page of the unprivileged user";
    let ran = work.run(&Launch {
        disk: Some(Disk::Qcow2(disk.clone())),
        page: Some(page.to_owned()),
        user: Some(NOBODY),
        ..Launch::small(BOOT)
    })?;
    ran.expect_power_off()?;
    ensure!(ran.report("disk")? == sum, "{:?}", ran.reports);
    ensure!(ran.report("page")? == page, "{:?}", ran.reports);
    pattern::check_disk(work.path(), &disk)
}
