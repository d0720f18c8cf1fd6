//! A VM's cgroups, where the host offers the controllers of version 2 (the nested tier's does).

use anyhow::{Context, Result, bail, ensure};
use integration_tests::{
    host::Host,
    loop_device::LoopDevice,
    suite::{Skip, test},
    tiny::Run,
};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use vm_spec::run_state::{ProcessRole, RunState};

const DEADLINE: Duration = Duration::from_secs(20);
const TOP: &str = "/sys/fs/cgroup";

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("limits::are_on_each_process_and_gone_at_the_end", kept_and_gone),
        test("limits::are_gone_after_a_kill_of_the_spawner", gone_after_a_kill),
        test("limits::hold_for_what_a_ring_leaves_to_its_threads", ring),
        test("limits::a_host_without_them_refuses", refused),
        test("limits::core_scheduling_is_kept_or_refused", core_scheduling),
    ]
}

/// Whether this host lets us limit what `controller` controls.
fn offered(controller: &str) -> bool {
    let controllers = fs::read_to_string(Path::new(TOP).join("cgroup.controllers")).unwrap_or_default();
    Uid::effective().is_root() && controllers.split_whitespace().any(|one| one == controller)
}

fn all_offered() -> bool {
    ["memory", "cpu", "pids"].into_iter().all(offered)
}

fn start() -> Result<Run> {
    Run::tiny(
        "scenario=hlt",
        &[
            "--limits=memory=256M,cpu-percent=150,pids=40".to_owned(),
            "--power-off-grace=1".to_owned(),
        ],
    )
}

/// A guest that runs, and its VM's group.
fn running() -> Result<(Run, RunState, PathBuf)> {
    Host::need_kvm()?;
    if !all_offered() {
        bail!(Skip(
            "no cgroup v2 with memory, cpu and pids, or not root".to_owned()
        ));
    }
    let mut run = start()?;
    run.console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    let state = run.state(DEADLINE)?;
    let vmm = state
        .processes
        .iter()
        .find(|process| process.role == ProcessRole::Vmm)
        .context("no vmm")?;
    let own = fs::read_to_string(format!("/proc/{}/cgroup", vmm.pid))?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
    let own = Path::new(TOP).join(own.context("the vmm is in no group")?);
    let group = own.parent().context("no group")?.to_owned();
    ensure!(own.ends_with("vmm"), "the vmm is in {}", own.display());
    Ok((run, state, group))
}

fn kept_and_gone() -> Result<()> {
    let (mut run, state, group) = running()?;
    let read = |file: &str| fs::read_to_string(group.join(file)).map(|text| text.trim().to_owned());
    ensure!(read("memory.max")? == (256 << 20).to_string());
    for process in state.processes.iter().filter(|process| process.jailed) {
        let file = |name: &str| read(&format!("{}/{name}", process.name));
        ensure!(file("pids.max")? == "40", "{}", process.name);
        ensure!(file("cpu.max")? == "150000 100000", "{}", process.name);
        ensure!(
            file("cgroup.procs")? == process.pid.to_string(),
            "{}",
            process.name
        );
    }
    // The guest's RAM is charged to the group, whoever touched it.
    ensure!(read("memory.current")?.parse::<u64>()? > 1 << 20);
    run.process.signal(Signal::SIGTERM)?;
    run.wait(DEADLINE)?;
    ensure!(!group.exists(), "{} is left behind", group.display());
    Ok(())
}

fn gone_after_a_kill() -> Result<()> {
    let (run, state, group) = running()?;
    let spawner = state
        .processes
        .iter()
        .find(|process| process.role == ProcessRole::Spawner);
    kill(Pid::from_raw(spawner.context("no spawner")?.pid), Signal::SIGKILL)?;
    is_gone(&group)?;
    drop(run);
    Ok(())
}

fn is_gone(group: &Path) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    while group.exists() {
        ensure!(Instant::now() < end, "{} is left behind", group.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Direct writes that make a file longer are done by threads of the kernel's, which belong to the
/// disk's process: its group's limit holds for them.
fn ring() -> Result<()> {
    const RATE: u64 = 4 << 20;
    const WRITTEN: u64 = 16 << 20;
    Host::need_kvm()?;
    if !offered("io") {
        bail!(Skip("no cgroup v2 with io, or not root".to_owned()));
    }
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("device");
    fs::File::create(&file)?.set_len(128 << 20)?;
    let mut device = LoopDevice::over(&file)?;
    let mounted = folder.path().join("mounted");
    device.mount("ext4", &mounted)?;
    let image = mounted.join("disk");
    fs::File::create(&image)?.set_len(WRITTEN)?;
    let flags = [
        format!("--disk=path={},format=raw,cache=none", image.display()),
        format!("--limits=io-bytes-per-second={RATE}"),
    ];
    // Half of them read; what was written is flushed before.
    let requests = 2 * WRITTEN / 65536;
    let scenario = format!("scenario=blk requests={requests} size=65536 depth=32");
    let mut run = Run::tiny(&scenario, &flags)?;
    let state = run.state(DEADLINE)?;
    let start = Instant::now();
    let disk = state.processes.iter().find(|p| p.role == ProcessRole::Disk);
    let tasks = format!("/proc/{}/task", disk.context("no disk")?.pid);
    while !is_worker_there(&tasks) {
        let words = || run.process.stderr().unwrap_or_default();
        ensure!(start.elapsed() < DEADLINE, "no thread of a ring's: {}", words());
        std::thread::sleep(Duration::from_millis(1));
    }
    run.wait(DEADLINE)?;
    run.console.expect_ok()?;
    // Both directions have the same limit, one after the other; a bit may come at once.
    let least = Duration::from_secs(2 * WRITTEN / RATE).mul_f64(0.8);
    let took = start.elapsed();
    ensure!(took >= least, "{took:?} for what takes {least:?}");
    Ok(())
}

/// Whether a process has a thread that does a ring's work.
fn is_worker_there(tasks: &str) -> bool {
    let Ok(tasks) = fs::read_dir(tasks) else {
        return false;
    };
    tasks.flatten().any(|task| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("iou-wrk"))
    })
}

/// What cannot be kept is not left out.
fn refused() -> Result<()> {
    Host::need_kvm()?;
    if all_offered() {
        bail!(Skip("this host keeps limits".to_owned()));
    }
    let mut run = start()?;
    let status = run.wait(DEADLINE)?;
    let words = run.process.stderr()?;
    ensure!(
        !status.success() && words.contains("limits: cannot be kept"),
        "{status}: {words}"
    );
    Ok(())
}

/// A VM's processes share cores with each other only, where the kernel can see to that.
fn core_scheduling() -> Result<()> {
    Host::need_kvm()?;
    let flags = ["--limits=core-scheduling=true", "--power-off-grace=1"].map(str::to_owned);
    let mut run = Run::tiny("scenario=hlt", &flags)?;
    if core_cookie(std::process::id() as i32).is_err() {
        let status = run.wait(DEADLINE)?;
        let words = run.process.stderr()?;
        ensure!(
            status.code() == Some(1) && words.contains("limits.core-scheduling: the kernel refuses it"),
            "{status}: {words}"
        );
        return Ok(());
    }
    run.console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    let state = run.state(DEADLINE)?;
    let jailed = state.processes.iter().filter(|process| process.jailed);
    let cookies: Vec<_> = jailed
        .map(|process| core_cookie(process.pid))
        .collect::<Result<_, _>>()?;
    ensure!(
        cookies.iter().all(|cookie| *cookie != 0 && *cookie == cookies[0]),
        "{cookies:?}"
    );
    Ok(())
}

/// What a process has in common with those that may run beside it; an error without core scheduling.
#[expect(unsafe_code, reason = "prctl of this option has no safe form")]
fn core_cookie(pid: i32) -> std::io::Result<u64> {
    const PR_SCHED_CORE: libc::c_int = 62;
    const GET: libc::c_ulong = 0;
    const ONE_THREAD: libc::c_ulong = 0;
    let mut cookie = 0_u64;
    // SAFETY: the kernel writes one u64 through the pointer.
    match unsafe { libc::prctl(PR_SCHED_CORE, GET, pid, ONE_THREAD, &raw mut cookie) } {
        0 => Ok(cookie),
        _ => Err(std::io::Error::last_os_error()),
    }
}
