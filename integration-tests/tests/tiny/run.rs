//! `bulkhead run` with the tiny guest: exit codes, jails, and what is left behind.

use super::{
    jails::{Place, by_user_with_ids},
    traces::Traces,
    verbs::{bulkhead, expect},
};
use anyhow::{Context, Result, anyhow, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    lent::{Lent, NOBODY, become_user},
    suite::{Skip, artifact, jail_flags, jail_is_off, test},
    tiny::{Run, launcher},
};
use libtest_mimic::Trial;
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, Uid},
};
use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::{OpenOptionsExt, chown},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use vm_spec::{control::exit_code, run_state::ProcessRole, spec::OnDeviceDeath};

const DEADLINE: Duration = Duration::from_secs(20);
/// Nothing is left this long after a process was killed.
pub(crate) const GONE: Duration = Duration::from_secs(2);
/// Between two looks at what is left.
const LOOK: Duration = Duration::from_millis(10);

pub(crate) fn tests() -> Vec<Trial> {
    let codes = [
        ("poweroff", exit_code::POWER_OFF),
        ("panic", exit_code::PANIC),
        ("triplefault", exit_code::TRIPLE_FAULT),
        ("reset", exit_code::RESET),
        ("instant-reset", exit_code::INSTANT_RESET),
    ];
    let mut tests: Vec<_> = codes
        .into_iter()
        .map(|(scenario, code)| {
            test(format!("run::exit_code_{scenario}"), move || {
                exits_with(scenario, code)
            })
        })
        .collect();
    let roles = [
        ("spawner", ProcessRole::Spawner),
        ("reaper", ProcessRole::Reaper),
        ("forker", ProcessRole::Forker),
        ("supervisor", ProcessRole::Supervisor),
        ("vmm", ProcessRole::Vmm),
        ("disk", ProcessRole::Disk),
        ("net", ProcessRole::Net),
        ("net_namespace", ProcessRole::NetNamespace),
    ];
    for (name, role) in roles {
        for (who, suffix) in [(Who::Own, ""), (Who::Other(NOBODY, NOBODY), "_unprivileged")] {
            tests.push(test(format!("run::kill_{name}{suffix}"), move || {
                killed(name, role, who)
            }));
        }
    }
    // Whose spawner sees no path.
    tests.push(test("run::kill_reaper_with_subordinate_ids", || {
        by_user_with_ids(|user, group| killed("reaper", ProcessRole::Reaper, Who::Other(user, group)))
    }));
    tests.push(test("run::kill_with_its_reapers_and_start_another", || {
        is_swept(halted(&Place::make()?, OnDeviceDeath::End, Who::Own)?, &["file "])
    }));
    tests.push(test("run::with_a_capability_of_the_file", with_a_capability));
    tests.push(test("run::root_of_two_pid_namespaces", two_pid_namespaces));
    tests.push(test("run::with_few_open_files", few_open_files));
    tests.push(test("run::with_little_address_space", little_address_space));
    tests.push(test("run::exit_code_lost_disk", lost_disk));
    tests.push(test("run::exit_code_forbidden_call", || {
        forbidden_call().map(drop)
    }));
    tests.push(test("run::a_forbidden_call_is_named", named_call));
    for mode in ["trap", "log", "off"] {
        tests.push(test(format!("run::seccomp_{mode}"), move || seccomp_mode(mode)));
    }
    tests.push(test("run::sigterm_leaves_nothing", sigterm));
    tests.push(test("run::20_launches", launches));
    tests
}

fn lost_disk() -> Result<()> {
    let place = Place::make()?;
    let mut run = halted(&place, OnDeviceDeath::End, Who::Own)?;
    kill(run.pid_of(ProcessRole::Disk, DEADLINE)?, Signal::SIGKILL)?;
    let status = run.wait(DEADLINE)?;
    ensure!(
        status.code() == Some(exit_code::BACKEND_LOST.into()),
        "{status}: {}",
        run.process.stderr()?
    );
    Ok(())
}

fn need_filters() -> Result<()> {
    if jail_is_off() {
        return Err(Skip("without a jail there are no filters".to_owned()).into());
    }
    Ok(())
}

/// A disk process that is another program, which opens a file; its number, and what is said of its end.
fn forbidden_call() -> Result<(String, String)> {
    Host::need_kvm()?;
    need_filters()?;
    let place = tempfile::tempdir()?;
    let bin = place.path().join("bin");
    fs::create_dir(&bin)?;
    for name in [Artifact::Bulkhead, Artifact::Vmm, Artifact::Supervisor] {
        fs::copy(artifact(name)?, bin.join(name.name()))?;
    }
    fs::copy(
        artifact(Artifact::Floor)?,
        bin.join(Artifact::VhostUserBlk.name()),
    )?;
    let mut launcher = Command::new(bin.join(Artifact::Bulkhead.name()));
    launcher.env("BULKHEAD_BIN_DIR", &bin);
    let flags = [
        format!("--kernel={}", artifact(Artifact::TinyGuest)?.display()),
        "--on-device-death=end".to_owned(),
        disk_flag(&place)?,
    ];
    let mut run = Run::by(launcher, tempfile::tempdir()?, &flags)?;
    let status = run.wait(DEADLINE)?;
    let said = run.process.stderr()?;
    ensure!(
        status.code() == Some(exit_code::SECCOMP.into()),
        "{status}: {said}"
    );
    let end = ") was stopped by seccomp: policy jailer/policy/disk.policy";
    let before = said.split_once(end).with_context(|| said.clone())?.0;
    let (_, pid) = before
        .rsplit_once("disk0 (vhost-user-blk, pid ")
        .context("no pid")?;
    Ok((pid.to_owned(), said))
}

/// Process, call and where the policy has its rule, by the kernel's own record.
fn named_call() -> Result<()> {
    let mut unnamed = None;
    // A record may come too late for the launcher, which waits for none.
    for _ in 0..3 {
        let (pid, said) = forbidden_call()?;
        let line =
            format!("bulkhead: disk0 (pid {pid}): system call open (2): disk.policy has no rule for it");
        if said.lines().filter(|have| *have == line).count() == 1 {
            return Ok(());
        }
        unnamed = is_recorded(&pid).then_some(said);
        if unnamed.is_none() {
            break;
        }
    }
    let skip = "the kernel's log, as far as it can be read here, has no record of the process";
    Err(unnamed.map_or_else(|| Skip(skip.to_owned()).into(), |said| anyhow!(said)))
}

/// Whether the log says that this process made a forbidden call: some are left out when there are many.
fn is_recorded(pid: &str) -> bool {
    let log = File::options()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open("/dev/kmsg");
    let Ok(mut log) = log else { return false };
    let mut record = [0; 8192];
    loop {
        match log.read(&mut record) {
            Ok(length) => {
                let text = String::from_utf8_lossy(&record[..length]);
                if text.contains("type=1326 ") && text.contains(&format!(" pid={pid} ")) {
                    return true;
                }
            }
            // Records were overwritten meanwhile.
            Err(error) if error.raw_os_error() == Some(nix::libc::EPIPE) => {}
            Err(_) => return false,
        }
    }
}

/// A VM runs in each mode, without a word of calls that were not expected; the weaker ones are warned of.
fn seccomp_mode(mode: &str) -> Result<()> {
    Host::need_kvm()?;
    need_filters()?;
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk");
    File::create(&disk)?.set_len(16 << 20)?;
    let flags = [
        format!("--seccomp={mode}"),
        format!("--disk=path={},format=raw", disk.display()),
    ];
    let mut run = Run::tiny("scenario=blk requests=64 depth=8", &flags)?;
    let status = run.wait(DEADLINE)?;
    let said = run.process.stderr()?;
    run.console.expect_ok().with_context(|| said.clone())?;
    ensure!(status.success(), "{status}: {said}");
    let warned = said.contains(&format!("warning: --seccomp={mode}"));
    ensure!(warned == (mode != "trap"), "{said}");
    Ok(())
}

fn exits_with(scenario: &str, code: u8) -> Result<()> {
    Host::need_kvm()?;
    let mut run = Run::tiny(&format!("scenario={scenario}"), &["--on-reboot=exit".to_owned()])?;
    let status = run.wait(DEADLINE)?;
    ensure!(
        status.code() == Some(i32::from(code)),
        "{status}, not {code}: {}\n{}",
        run.console.text(),
        run.process.stderr()?
    );
    Ok(())
}

fn disk_flag(folder: &TempDir) -> Result<String> {
    let path = folder.path().join("disk");
    File::create(&path)?.set_len(16 << 20)?;
    Ok(format!("--disk=path={},format=raw", path.display()))
}

/// Whose VM it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    /// Of whoever runs the tests.
    Own,
    /// Of this user and group.
    Other(u32, u32),
}

/// A halted guest with a disk, and a NIC where the host has TAPs.
fn halted(place: &Place, on_device_death: OnDeviceDeath, who: Who) -> Result<Run> {
    Host::need_kvm()?;
    let mut flags = vec![
        format!("--kernel={}", place.path("tiny-guest").display()),
        "--memory=64M".to_owned(),
        "--cmdline=scenario=hlt".to_owned(),
        disk_flag(&place.folder)?,
    ];
    if on_device_death == OnDeviceDeath::End {
        flags.push("--on-device-death=end".to_owned());
    }
    if Path::new("/dev/net/tun").exists() {
        flags.push("--net=private=10.213.7.1/24".to_owned());
    }
    flags.push("--power-off-grace=1".to_owned());
    let (launcher, folder) = (place.path("bulkhead"), tempfile::tempdir()?);
    let launcher = match who {
        Who::Own => Command::new(launcher),
        Who::Other(user, group) => {
            chown(folder.path(), Some(user), Some(group))?;
            chown(place.path("disk"), Some(user), Some(group))?;
            become_user(user, group, &launcher)
        }
    };
    let mut run = Run::by(launcher, folder, &flags)?;
    run.console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    Ok(run)
}

fn killed(name: &str, role: ProcessRole, who: Who) -> Result<()> {
    let _lent = match who {
        Who::Own => None,
        Who::Other(..) if !Uid::effective().is_root() => {
            return Err(Skip("only root can become another user".to_owned()).into());
        }
        Who::Other(user, _) => Some(Lent::to(user)?),
    };
    let place = Place::make()?;
    // The tests of recovery are about what happens otherwise.
    let mut run = halted(&place, OnDeviceDeath::End, who)?;
    let state = run.state(DEADLINE)?;
    let Some(victim) = state.processes.iter().find(|process| process.role == role) else {
        return Err(Skip(format!("this VM has no {name}")).into());
    };
    let traces = Traces::of(run.process.pid().as_raw(), run.folder())?;
    ensure!(traces.processes() >= state.processes.len(), "{traces:?}");
    // Were nothing found now, nothing found later would say nothing.
    ensure!(traces.left()?.len() > traces.processes(), "{traces:?}");
    kill(Pid::from_raw(victim.pid), Signal::SIGKILL)?;
    gone(&mut run, &traces)?;
    let words = run.process.stderr()?;
    let called = match role {
        ProcessRole::NetNamespace => "network namespace",
        _ => victim.name.as_str(),
    };
    // That its filter is off, where it is, is told by each process.
    let told = |line: &&str| line.contains(called) && !line.contains("mode=off");
    let lines = words.lines().filter(told).count();
    ensure!(lines == 1, "{lines} lines name the {called}: {words:?}");
    let status = run.process.wait(DEADLINE)?;
    ensure!(!status.success(), "{status} after {name} was killed");
    Ok(())
}

/// As doctor advises it for bridges.
fn with_a_capability() -> Result<()> {
    if !Uid::effective().is_root() {
        return Err(Skip("only root can become another user".to_owned()).into());
    }
    let _lent = Lent::to(NOBODY)?;
    let place = Place::make()?;
    let setcap = Command::new("setcap")
        .arg("cap_net_admin+ep")
        .arg(place.path("bulkhead"))
        .status();
    if !setcap.is_ok_and(|status| status.success()) {
        return Err(Skip("no setcap, or no file system for it".to_owned()).into());
    }
    let mut run = halted(&place, OnDeviceDeath::End, Who::Other(NOBODY, NOBODY))?;
    run.process.signal(Signal::SIGTERM)?;
    let status = run.wait(DEADLINE)?;
    ensure!(status.code() == Some(exit_code::TIMEOUT.into()), "{status}");
    Ok(())
}

/// A process id is the same in both: the users must not be.
fn two_pid_namespaces() -> Result<()> {
    Host::need_kvm()?;
    if !Uid::effective().is_root() || jail_is_off() {
        return Err(Skip("only root has ranges of ids, in a jail".to_owned()).into());
    }
    let start = || -> Result<Run> {
        let mut command = Command::new("unshare");
        command
            .args(["--pid", "--fork", "--mount-proc"])
            .arg(artifact(Artifact::Bulkhead)?);
        let flags = [
            format!("--kernel={}", artifact(Artifact::TinyGuest)?.display()),
            "--cmdline=scenario=hlt".to_owned(),
        ];
        Run::by(command, tempfile::tempdir()?, &flags)
    };
    let (mut one, mut other) = (start()?, start()?);
    let id = |run: &mut Run| -> Result<Option<u32>> {
        let state = run.state(DEADLINE)?;
        let vmm = state
            .processes
            .iter()
            .find(|process| process.role == ProcessRole::Vmm);
        Ok(vmm.context("no vmm")?.id)
    };
    let (first, second) = (id(&mut one)?, id(&mut other)?);
    for run in [&one, &other] {
        // The first process of its namespace, which takes all others along.
        let unshare = run.process.pid();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"))?;
        for child in children.split_whitespace() {
            kill(Pid::from_raw(child.parse()?), Signal::SIGKILL)?;
        }
    }
    ensure!(first.is_some() && first != second, "{first:?} and {second:?}");
    Ok(())
}

/// `bulkhead run` by a shell that has set a limit.
fn limited(limit: &str) -> Result<Run> {
    Host::need_kvm()?;
    let shell = launcher(&format!("ulimit {limit};"), "")?;
    let flags = [
        format!("--kernel={}", artifact(Artifact::TinyGuest)?.display()),
        "--memory=64M".to_owned(),
        "--cmdline=scenario=poweroff".to_owned(),
    ];
    Run::by(shell, tempfile::tempdir()?, &flags)
}

fn few_open_files() -> Result<()> {
    for few in [20, 1023] {
        let mut run = limited(&format!("-n {few}"))?;
        let status = run.wait(DEADLINE)?;
        let said = run.process.stderr()?;
        ensure!(status.code() == Some(exit_code::ERROR.into()), "{status}: {said}");
        let expected = format!("the limit on open files is {few}, and 1024 are needed");
        ensure!(said.contains(&expected), "{said}");
    }
    let mut run = limited("-n 1024")?;
    let status = run.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", run.process.stderr()?);
    Ok(())
}

/// Less than a process's bound of its own.
fn little_address_space() -> Result<()> {
    let mut run = limited("-v 2000000")?;
    let status = run.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", run.process.stderr()?);
    Ok(())
}

/// Waits until nothing of the VM is left.
pub(crate) fn gone(run: &mut Run, traces: &Traces) -> Result<()> {
    let end = Instant::now() + GONE;
    loop {
        // Reaps the spawner: until then it is there, if only as a zombie.
        run.process.alive()?;
        let left = traces.left()?;
        if left.is_empty() {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "left after {GONE:?}: {}; stderr: {}",
            left.join(", "),
            run.process.stderr()?
        );
        thread::sleep(LOOK);
    }
}

/// The spawner and whoever would clean up behind it are killed: `left` stays, until a VM of another name starts.
pub(crate) fn is_swept(mut run: Run, left: &[&str]) -> Result<()> {
    let spawner = run.process.pid();
    let reaper = run.pid_of(ProcessRole::Reaper, DEADLINE)?;
    let traces = Traces::of(spawner.as_raw(), run.folder())?;
    let second = fs::read_to_string(format!("/proc/{reaper}/task/{reaper}/children"))?;
    let second = second
        .split_whitespace()
        .map(|pid| Ok(Pid::from_raw(pid.parse()?)));
    let reapers = [Ok(reaper)]
        .into_iter()
        .chain(second)
        .collect::<Result<Vec<_>>>()?;
    // None of them sees the others' end.
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        reapers.iter().try_for_each(|pid| kill(*pid, signal))?;
        if signal == Signal::SIGSTOP {
            kill(spawner, Signal::SIGKILL)?;
        }
    }
    run.process.wait(DEADLINE)?;
    let end = Instant::now() + GONE;
    let lasting = loop {
        let lasting = traces.left()?;
        if lasting
            .iter()
            .all(|one| left.iter().any(|kind| one.starts_with(kind)))
        {
            break lasting;
        }
        ensure!(Instant::now() < end, "left after {GONE:?}: {lasting:?}");
        thread::sleep(LOOK);
    };
    for kind in left {
        ensure!(
            lasting.iter().any(|one| one.starts_with(kind)),
            "who was killed removed its {kind}: {lasting:?}"
        );
    }
    let kernel = format!("--kernel={}", artifact(Artifact::TinyGuest)?.display());
    let mut next = vec![
        "run",
        "--name=next",
        "--cmdline=scenario=poweroff",
        kernel.as_str(),
    ];
    next.extend(jail_flags());
    expect(&bulkhead(run.folder(), &next)?, exit_code::POWER_OFF)?;
    let lasting = traces.left()?;
    ensure!(lasting.is_empty(), "the next one did not sweep {lasting:?}");
    Ok(())
}

fn sigterm() -> Result<()> {
    let place = Place::make()?;
    let mut run = halted(&place, OnDeviceDeath::Restart, Who::Own)?;
    run.state(DEADLINE)?;
    let traces = Traces::of(run.process.pid().as_raw(), run.folder())?;
    run.process.signal(Signal::SIGTERM)?;
    run.process.wait(DEADLINE)?;
    gone(&mut run, &traces)
}

fn launches() -> Result<()> {
    for round in 0..20 {
        exits_with("poweroff", exit_code::POWER_OFF).with_context(|| format!("launch {round}"))?;
    }
    Ok(())
}
