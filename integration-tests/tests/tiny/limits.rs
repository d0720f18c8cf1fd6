//! A VM's cgroups, where the host offers the controllers of version 2 (the nested tier's does).

use super::{
    jails::Place,
    run::{GONE, is_swept},
};
use anyhow::{Context, Result, bail, ensure};
use integration_tests::{
    host::{Host, NESTED},
    lent::{Lent, NOBODY, become_nobody},
    loop_device::LoopDevice,
    suite::{Skip, test},
    tiny::Run,
};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid, chown};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};
use vm_spec::run_state::{ProcessRole, RunState};

const DEADLINE: Duration = Duration::from_secs(20);
const TOP: &str = "/sys/fs/cgroup";

pub(crate) fn tests() -> Vec<Trial> {
    let roles = [
        ("spawner", ProcessRole::Spawner),
        ("reaper", ProcessRole::Reaper),
        ("supervisor", ProcessRole::Supervisor),
        ("vmm", ProcessRole::Vmm),
    ];
    let kills = roles.map(|(name, role)| {
        test(
            format!("limits::are_gone_after_a_kill_of_the_{name}"),
            move || gone_after_a_kill(role),
        )
    });
    let tests = vec![
        test("limits::are_on_each_process_and_gone_at_the_end", kept_and_gone),
        test(
            "limits::are_gone_when_the_reaper_was_killed_too_and_another_starts",
            swept,
        ),
        test("limits::are_kept_in_a_group_that_a_user_was_given", delegated),
        test("limits::another_vm_of_the_same_name_is_left_alone", same_name),
        test("limits::hold_for_what_a_ring_leaves_to_its_threads", ring),
        test("limits::a_host_without_them_refuses", refused),
        test("limits::core_scheduling_is_kept_or_refused", core_scheduling),
    ];
    tests.into_iter().chain(kills).collect()
}

/// Whether this host lets us limit what `controller` controls.
fn offered(controller: &str) -> bool {
    let controllers = fs::read_to_string(Path::new(TOP).join("cgroup.controllers")).unwrap_or_default();
    Uid::effective().is_root() && controllers.split_whitespace().any(|one| one == controller)
}

fn all_offered() -> bool {
    ["memory", "cpu", "pids"].into_iter().all(offered)
}

const FLAGS: [&str; 2] = [
    "--limits=memory=256M,cpu-percent=150,pids=40",
    "--power-off-grace=1",
];

fn start() -> Result<Run> {
    Run::tiny("scenario=hlt", &FLAGS.map(str::to_owned))
}

fn need_limits() -> Result<()> {
    Host::need_kvm()?;
    if !all_offered() {
        bail!(Skip(
            "no cgroup v2 with memory, cpu and pids, or not root".to_owned()
        ));
    }
    Ok(())
}

/// A guest that runs, and its VM's group.
fn running(mut run: Run) -> Result<(Run, RunState, PathBuf)> {
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
    need_limits()?;
    let (mut run, state, group) = running(start()?)?;
    are_kept(&state, &group)?;
    run.process.signal(Signal::SIGTERM)?;
    run.wait(DEADLINE)?;
    ensure!(!group.exists(), "{} is left behind", group.display());
    Ok(())
}

/// The group and its children have the limits of [`FLAGS`].
fn are_kept(state: &RunState, group: &Path) -> Result<()> {
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
    Ok(())
}

/// A user who owns nothing but the group that they start in, as systemd delegates it. It is as it was after
/// each VM, however that ended.
fn delegated() -> Result<()> {
    need_limits()?;
    Host::need_tun()?;
    let given = Given::to(NOBODY)?;
    let _lent = Lent::to(NOBODY)?;
    let place = Place::make()?;
    let (mut run, state, group) = running(given.start(&place)?)?;
    are_kept(&state, &group)?;
    run.process.signal(Signal::SIGTERM)?;
    run.wait(DEADLINE)?;
    ensure!(!group.exists(), "{} is left behind", group.display());
    for role in [ProcessRole::Spawner, ProcessRole::Reaper] {
        let (run, state, group) = running(given.start(&place)?)?;
        are_kept(&state, &group)?;
        kill_process(&state, role)?;
        is_gone(&group).with_context(|| format!("{role:?} was killed"))?;
        drop(run);
        let down = fs::read_to_string(given.0.join("cgroup.subtree_control"))?;
        ensure!(down.trim().is_empty(), "still hands down {down}");
    }
    Ok(())
}

/// A group that belongs to a user; gone when dropped.
struct Given(PathBuf);

impl Given {
    fn to(user: u32) -> Result<Self> {
        for controller in ["memory", "cpu", "pids"] {
            fs::write(
                Path::new(TOP).join("cgroup.subtree_control"),
                format!("+{controller}"),
            )?;
        }
        let group = Path::new(TOP).join(format!("bulkhead-given-{}", std::process::id()));
        fs::create_dir(&group)?;
        let given = Self(group);
        for file in ["", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
            chown(&given.0.join(file), Some(user.into()), Some(user.into()))?;
        }
        Ok(given)
    }

    /// The tiny guest with [`FLAGS`], launched by the user from within the group.
    fn start(&self, place: &Place) -> Result<Run> {
        let runtime = tempfile::tempdir()?;
        chown(runtime.path(), Some(NOBODY.into()), Some(NOBODY.into()))?;
        let user = become_nobody(&place.path("bulkhead"));
        let mut launcher = Command::new("sh");
        launcher
            .args(["-c", "echo $$ > \"$1\" && shift && exec \"$@\"", "sh"])
            .arg(self.0.join("cgroup.procs"))
            .arg(user.get_program())
            .args(user.get_args());
        let mut flags = FLAGS.map(str::to_owned).to_vec();
        flags.extend([
            format!("--kernel={}", place.path("tiny-guest").display()),
            "--memory=64M".to_owned(),
            "--cmdline=scenario=hlt".to_owned(),
            // Its holder is one of the processes that must not stay outside.
            "--net=private=10.213.9.1/24".to_owned(),
        ]);
        Run::by(launcher, runtime, &flags)
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        // A test that failed may have left processes in it.
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

fn gone_after_a_kill(role: ProcessRole) -> Result<()> {
    need_limits()?;
    let (run, state, group) = running(start()?)?;
    kill_process(&state, role)?;
    is_gone(&group)?;
    drop(run);
    Ok(())
}

fn kill_process(state: &RunState, role: ProcessRole) -> Result<()> {
    let process = state.processes.iter().find(|process| process.role == role);
    let pid = process.with_context(|| format!("no {role:?}"))?.pid;
    Ok(kill(Pid::from_raw(pid), Signal::SIGKILL)?)
}

fn swept() -> Result<()> {
    need_limits()?;
    let (run, _, group) = running(start()?)?;
    is_swept(run, &["file ", "cgroup "])?;
    ensure!(!group.exists(), "{} is left behind", group.display());
    Ok(())
}

/// Launchers with other run-time folders know nothing of each other but the group.
fn same_name() -> Result<()> {
    need_limits()?;
    let (mut first, state, group) = running(start()?)?;
    let mut second = start()?;
    let status = second.wait(DEADLINE)?;
    let words = second.process.stderr()?;
    ensure!(
        status.code() == Some(1) && words.contains("belongs to a VM that runs"),
        "{status}: {words}"
    );
    are_kept(&state, &group)?;
    ensure!(first.process.alive()?, "{}", first.process.stderr()?);
    first.process.signal(Signal::SIGTERM)?;
    first.wait(DEADLINE)?;
    ensure!(!group.exists(), "{} is left behind", group.display());
    Ok(())
}

fn is_gone(group: &Path) -> Result<()> {
    // The emulated processors of the nested runner take longer over each group.
    let patience = std::env::var_os(NESTED).map_or(GONE, |_| 5 * GONE);
    let end = Instant::now() + patience;
    while group.exists() {
        ensure!(
            Instant::now() < end,
            "{} is there after {patience:?}",
            group.display()
        );
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
