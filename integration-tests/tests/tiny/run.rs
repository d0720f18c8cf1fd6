//! `bulkhead run` with the tiny guest: exit codes, jails, and what is left behind.

use anyhow::{Context, Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    suite::{Skip, artifact, test},
    tiny::Run,
};
use libtest_mimic::Trial;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
    time::Duration,
};
use tempfile::TempDir;
use vm_spec::{
    control::exit_code,
    run_state::{ProcessRole, ProcessState},
    spec::OnDeviceDeath,
};

const DEADLINE: Duration = Duration::from_secs(20);
/// Nothing is left this long after a process was killed.
const GONE: Duration = Duration::from_secs(2);
const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

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
        ("supervisor", ProcessRole::Supervisor),
        ("vmm", ProcessRole::Vmm),
        ("disk", ProcessRole::Disk),
        ("net", ProcessRole::Net),
        ("net_namespace", ProcessRole::NetNamespace),
    ];
    for (name, role) in roles {
        tests.push(test(format!("run::kill_{name}"), move || killed(name, role)));
    }
    tests.push(test("run::jails", jails));
    tests.push(test("run::sigterm_leaves_nothing", sigterm));
    tests.push(test("run::20_launches", launches));
    tests.extend(bad_input());
    tests
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

/// A halted guest with a disk, and a NIC where the host has TAPs.
fn halted(folder: &TempDir) -> Result<Run> {
    halted_with(folder, OnDeviceDeath::Restart)
}

fn halted_with(folder: &TempDir, on_device_death: OnDeviceDeath) -> Result<Run> {
    Host::need_kvm()?;
    let mut flags = vec![disk_flag(folder)?];
    if on_device_death == OnDeviceDeath::End {
        flags.push("--on-device-death=end".to_owned());
    }
    if Path::new("/dev/net/tun").exists() {
        flags.push("--net=private=10.213.7.1/24".to_owned());
    }
    flags.push("--power-off-grace=1".to_owned());
    let mut run = Run::tiny("scenario=hlt", &flags)?;
    run.console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    Ok(run)
}

fn killed(name: &str, role: ProcessRole) -> Result<()> {
    let folder = tempfile::tempdir()?;
    // The tests of recovery are about what happens otherwise.
    let mut run = halted_with(&folder, OnDeviceDeath::End)?;
    let state = run.state(DEADLINE)?;
    let Some(victim) = state.processes.iter().find(|process| process.role == role) else {
        return Err(Skip(format!("this VM has no {name}")).into());
    };
    kill(Pid::from_raw(victim.pid), Signal::SIGKILL)?;
    run.wait_gone(&state, GONE)
        .with_context(|| format!("stderr: {}", run.process.stderr().unwrap_or_default()))?;
    let words = run.process.stderr()?;
    let called = match role {
        ProcessRole::NetNamespace => "network namespace",
        _ => victim.name.as_str(),
    };
    ensure!(
        words.lines().any(|line| line.contains(called)),
        "no line names the {called}: {words:?}"
    );
    let status = run.process.wait(DEADLINE)?;
    ensure!(!status.success(), "{status} after {name} was killed");
    Ok(())
}

fn sigterm() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut run = halted(&folder)?;
    let state = run.state(DEADLINE)?;
    run.process.signal(Signal::SIGTERM)?;
    run.process.wait(DEADLINE)?;
    run.wait_gone(&state, GONE)
}

fn launches() -> Result<()> {
    for round in 0..20 {
        exits_with("poweroff", exit_code::POWER_OFF).with_context(|| format!("launch {round}"))?;
    }
    Ok(())
}

/// Each jailed process, as the kernel sees it while the guest runs.
fn jails() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut run = halted(&folder)?;
    let state = run.state(DEADLINE)?;
    let jailed: Vec<_> = state.processes.iter().filter(|process| process.jailed).collect();
    for role in [ProcessRole::Supervisor, ProcessRole::Vmm, ProcessRole::Disk] {
        ensure!(
            jailed.iter().any(|process| process.role == role),
            "no jailed {role:?}"
        );
    }
    for process in jailed {
        jail(process).with_context(|| format!("process {} ({})", process.pid, process.name))?;
    }
    Ok(())
}

fn jail(process: &ProcessState) -> Result<()> {
    let proc = PathBuf::from(format!("/proc/{}", process.pid));
    for task in fs::read_dir(proc.join("task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        for line in [
            "Seccomp:\t2",
            "NoNewPrivs:\t1",
            "CapEff:\t0000000000000000",
            "CapPrm:\t0000000000000000",
        ] {
            ensure!(
                status.lines().any(|have| have == line),
                "no line {line:?} in a thread's status:\n{status}"
            );
        }
    }
    for name in NAMESPACES {
        let of = |process: &Path| fs::read_link(process.join("ns").join(name));
        ensure!(
            of(&proc)? != of(Path::new("/proc/self"))?,
            "the host's {name} namespace"
        );
    }
    let root: Vec<_> = fs::read_dir(proc.join("root"))?.collect();
    ensure!(root.is_empty(), "its root holds {root:?}");
    let given = |number: i32| process.fds.iter().any(|fd| fd.number == number);
    let mut printed = BTreeSet::new();
    let mut others = Vec::new();
    for entry in fs::read_dir(proc.join("fd"))? {
        let entry = entry?;
        let number: i32 = entry.file_name().to_string_lossy().parse()?;
        let target = fs::read_link(entry.path())?.to_string_lossy().into_owned();
        if given(number) {
            printed.insert(target);
        } else {
            others.push((number, target));
        }
    }
    let per_device = if process.role == ProcessRole::Vmm { 2 } else { 1 };
    // What it made itself after exec has no name in any file system, or is another descriptor of
    // what it was given. Besides there is each device's request channel (SET_BACKEND_REQ_FD): the
    // vmm has both ends, since locked down it makes no socket for a successor; the device
    // process has been given one.
    others.retain(|(_, target)| {
        !target.starts_with("anon_inode:") && !target.starts_with("/memfd:") && !printed.contains(target)
    });
    let devices = process
        .fds
        .iter()
        .filter(|fd| fd.what.starts_with("vhost-user socket"));
    let channels = others
        .iter()
        .filter(|(_, target)| target.starts_with("socket:"))
        .count();
    let only_channels = channels == others.len() && channels <= per_device * devices.count();
    ensure!(
        others.is_empty() || only_channels,
        "--dry-run does not print {others:?}"
    );
    Ok(())
}

/// Flags that must fail, with what the message must name.
type Bad = (
    &'static str,
    fn(&Path) -> Result<Vec<String>>,
    &'static [&'static str],
);

fn bad_input() -> Vec<Trial> {
    let cases: [Bad; 8] = [
        (
            "kernel_missing",
            |folder| Ok(vec![kernel(&folder.join("none"))]),
            &["boot.kernel", "none"],
        ),
        (
            "kernel_truncated",
            |folder| {
                let whole = fs::read(artifact(Artifact::TinyGuest)?)?;
                fs::write(folder.join("short"), &whole[..100])?;
                Ok(vec![kernel(&folder.join("short"))])
            },
            &["kernel"],
        ),
        (
            "kernel_is_no_kernel",
            |folder| {
                fs::write(folder.join("text"), "no kernel")?;
                Ok(vec![kernel(&folder.join("text"))])
            },
            &["kernel"],
        ),
        (
            "disk_missing",
            |folder| {
                with(format!(
                    "--disk=path={},format=raw",
                    folder.join("none").display()
                ))
            },
            &["disk[0].path", "none"],
        ),
        (
            "disk_of_wrong_format",
            |folder| {
                fs::write(folder.join("raw"), [0; 4096])?;
                with(format!(
                    "--disk=path={},format=qcow2",
                    folder.join("raw").display()
                ))
            },
            &["disk[0]", "qcow2"],
        ),
        (
            "format_missing",
            |folder| {
                fs::write(folder.join("raw"), [0; 4096])?;
                with(format!("--disk=path={}", folder.join("raw").display()))
            },
            &["disk[0].format"],
        ),
        (
            "memory_too_small",
            |_| with("--memory=1M".to_owned()),
            &["memory"],
        ),
        (
            "unknown_key",
            |_| with("--disk=pth=x,format=raw".to_owned()),
            &["pth", "path"],
        ),
    ];
    cases
        .into_iter()
        .map(|(name, flags, words)| test(format!("run::bad_{name}"), move || refused(flags, words)))
        .collect()
}

fn kernel(path: &Path) -> String {
    format!("--kernel={}", path.display())
}

fn with(flag: String) -> Result<Vec<String>> {
    Ok(vec![kernel(artifact(Artifact::TinyGuest)?), flag])
}

/// Refused, soon, with a message that names the field and the cause, and with nothing started.
fn refused(flags: fn(&Path) -> Result<Vec<String>>, words: &[&str]) -> Result<()> {
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    let mut run = Run::with_flags(&flags(folder.path())?)?;
    let status = run.wait(DEADLINE)?;
    let message = run.process.stderr()?;
    ensure!(!status.success(), "{status}: {message}");
    for word in words {
        ensure!(
            message.contains(word),
            "the message does not name {word:?}: {message}"
        );
    }
    ensure!(
        run.console.text().is_empty(),
        "a guest ran: {}",
        run.console.text()
    );
    Ok(())
}
