//! `bulkhead audit` on this host: as whoever runs the tests, and as a user who owns nothing.

use super::jails::Place;
use anyhow::{Context, Result, bail, ensure};
use integration_tests::{
    artifacts::{Artifact, PROBE_NAMES, PROBES, build_probes},
    host::{Host, NESTED},
    lent::{Lent, NOBODY, become_nobody},
    process::Process,
    suite::{Skip, artifact, need_jail, test_within},
    verify::FULL,
};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use nix::unistd::Uid;
use serde_json::Value;
use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

const ROLES: [&str; 6] = ["vmm", "vcpu", "disk", "net", "supervisor", "startup"];
/// The first call builds the probes.
const DEADLINE: Duration = Duration::from_secs(600);

/// What each wall alone holds: the table of docs/threat-model.md.
const ALONE: [(&str, &[&str]); 7] = [
    (
        "seccomp",
        &[
            "udp",
            "listen-inet",
            "connect-inet6",
            "netlink",
            "vsock",
            "socketpair",
            "fork",
            "vfork-by-clone",
            "new-user-namespace",
            "io-uring",
            "io-uring-socket",
            "add-key",
            "keyctl",
            "inotify",
            "shared-memory",
            "semaphores",
            "message-queue",
            "posix-queue",
            "map-writable-code",
            "make-code",
            "make-code-by-key",
            "memfd-code",
            "map-file-code",
            "read-implies-exec",
            "local-descriptor-table",
            "take-huge-pages",
            "exhaust-pids",
            "dumpable",
        ],
    ),
    ("namespace", &[]),
    ("landlock", &[]),
    ("capability", &["capset"]),
    ("seal", &["truncate-memory", "grow-memory", "seal-memory"]),
    ("limit", &["exhaust-fds", "raise-core", "exhaust-memory"]),
    ("cgroup", &[]),
];

pub(crate) fn tests() -> Vec<Trial> {
    let walls = ALONE.map(|(wall, alone)| {
        test_within(
            DEADLINE,
            format!("audit::held_by_{wall}_alone (full)"),
            move || held_alone(wall, alone),
        )
    });
    let tests = vec![
        test_within(DEADLINE, "audit::own_user", as_self),
        test_within(DEADLINE, "audit::unprivileged_user", as_nobody),
        test_within(DEADLINE, "audit::interrupted_it_leaves_nothing", interrupted),
        test_within(
            DEADLINE,
            "audit::without_seccomp_the_next_wall_holds",
            without_seccomp,
        ),
        test_within(
            DEADLINE,
            "audit::a_binary_that_is_no_probe_is_found (waits)",
            no_probe,
        ),
    ];
    let full = env::var_os(FULL).is_some();
    tests
        .into_iter()
        .chain(walls.into_iter().filter(|_| full))
        .collect()
}

/// Each role's binary with the attacks, as docs/isolation-tests.md says: found in a folder, or built.
fn probes() -> Result<PathBuf> {
    match env::var_os(PROBES) {
        Some(folder) => Ok(folder.into()),
        None => Ok(build_probes(
            &Path::new(env!("CARGO_TARGET_TMPDIR")).join("probes"),
        )?),
    }
}

/// The exit code and the report.
fn audit(mut command: Command, probes: &Path, flags: &[&str]) -> Result<(Option<i32>, Value)> {
    command
        .args(["audit", "--json", "--probes"])
        .arg(probes)
        .args(flags);
    let output = command.output()?;
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    let report = serde_json::from_slice(&output.stdout).with_context(|| words)?;
    Ok((output.status.code(), report))
}

fn cell<'a>(report: &'a Value, role: &str, attack: &str) -> Option<&'a Value> {
    let results = report["results"].as_array()?;
    results
        .iter()
        .find(|cell| cell["role"] == role && cell["attack"] == attack)
}

fn roles() -> impl Iterator<Item = &'static str> {
    let tun = Path::new("/dev/net/tun").exists();
    ROLES.into_iter().filter(move |role| tun || *role != "net")
}

/// Nothing gets through, and in each role the filter stops a forbidden call.
fn all_held((code, report): &(Option<i32>, Value)) -> Result<()> {
    ensure!(
        *code == Some(0) && report["through"] == 0,
        "exit {code:?}: {report:#}"
    );
    for role in roles() {
        let open = cell(report, role, "open").with_context(|| format!("{role} was not audited"))?;
        ensure!(
            open["outcome"] == "stopped" && open["wall"] == "seccomp",
            "{open}"
        );
    }
    Ok(())
}

fn as_self() -> Result<()> {
    need_jail()?;
    Host::need_kvm()?;
    let result = audit(Command::new(artifact(Artifact::Bulkhead)?), &probes()?, &[])?;
    all_held(&result)?;
    if Uid::effective().is_root() {
        let number = |name: &str| result.1[name].as_u64().unwrap_or(0);
        let (attacks, families) = (number("attacks"), number("families"));
        ensure!(
            attacks >= 60 && families >= 12,
            "{attacks} attacks of {families} families"
        );
    }
    Ok(())
}

fn as_nobody() -> Result<()> {
    need_jail()?;
    Host::need_kvm()?;
    if !Uid::effective().is_root() {
        bail!(Skip("only root can become another user".to_owned()));
    }
    let built = probes()?;
    let _lent = Lent::to(NOBODY)?;
    let place = Place::make()?;
    let folder = place.path("probes");
    fs::create_dir(&folder)?;
    for name in PROBE_NAMES {
        fs::copy(built.join(name), folder.join(name))?;
    }
    all_held(&audit(become_nobody(&place.path("bulkhead")), &folder, &[])?)
}

/// A signal after the first probe has ended: the audit's targets are gone.
fn interrupted() -> Result<()> {
    need_jail()?;
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    let mut command = Command::new(artifact(Artifact::Bulkhead)?);
    command
        .args(["audit", "--probes"])
        .arg(probes()?)
        .env("TMPDIR", folder.path());
    let targets = || -> Result<Option<PathBuf>> {
        let found = fs::read_dir(folder.path())?.next().transpose()?;
        Ok(found.map(|found| found.path()))
    };
    let mut audit = Process::start(command)?;
    let end = Instant::now() + Duration::from_secs(20);
    // Made for the first probe.
    let begun = |targets: &PathBuf| targets.join("secret").exists();
    while !targets()?.is_some_and(|targets| begun(&targets)) {
        ensure!(audit.alive()? && Instant::now() < end, "{}", audit.stderr()?);
        thread::sleep(Duration::from_millis(5));
    }
    audit.signal(Signal::SIGINT)?;
    let status = audit.wait(Duration::from_secs(20))?;
    ensure!(status.code() == Some(130), "{status}: {}", audit.stderr()?);
    ensure!(targets()?.is_none(), "something is left");
    Ok(())
}

/// With the filter gone a path leads nowhere, since the root is empty; what no other wall holds
/// is listed, and is an error.
fn without_seccomp() -> Result<()> {
    need_jail()?;
    Host::need_kvm()?;
    let bulkhead = || artifact(Artifact::Bulkhead).map(Command::new);
    let flags = ["--without=seccomp", "--attack=open"];
    let (code, report) = audit(bulkhead()?, &probes()?, &flags)?;
    ensure!(code == Some(0), "exit {code:?}: {report:#}");
    for role in roles() {
        let open = cell(&report, role, "open").context("no cell")?;
        ensure!(
            open["outcome"] == "stopped" && open["wall"] != "seccomp",
            "{open}"
        );
    }
    let flags = ["--without=seccomp", "--attack=memfd-code", "--role=disk"];
    let (code, report) = audit(bulkhead()?, &probes()?, &flags)?;
    ensure!(
        code == Some(1) && report["through"] == 1,
        "exit {code:?}: {report:#}"
    );
    Ok(())
}

/// Without the wall these attacks get through, in some role at least, and no others; but for those that this host
/// refuses everybody.
fn held_alone(wall: &str, alone: &[&str]) -> Result<()> {
    if env::var_os(NESTED).is_some() {
        bail!(Skip(
            "emulated it takes an hour; the list is the host's".to_owned()
        ));
    }
    need_jail()?;
    Host::need_kvm()?;
    if !Uid::effective().is_root() {
        bail!(Skip("to others the host refuses many of them".to_owned()));
    }
    let bulkhead = Command::new(artifact(Artifact::Bulkhead)?);
    let (_, report) = audit(bulkhead, &probes()?, &[&format!("--without={wall}")])?;
    let results = report["results"].as_array().context("no results")?;
    let of = |outcomes: &[&str]| -> BTreeSet<&str> {
        let cells = results
            .iter()
            .filter(|cell| outcomes.iter().any(|one| cell["outcome"] == *one));
        cells.filter_map(|cell| cell["attack"].as_str()).collect()
    };
    let (through, counted) = (
        of(&["through", "unexplained"]),
        of(&["stopped", "through", "unexplained"]),
    );
    let expected: BTreeSet<&str> = alone
        .iter()
        .copied()
        .filter(|attack| counted.contains(attack))
        .collect();
    ensure!(through == expected, "{through:?} get through, not {expected:?}");
    Ok(())
}

/// A shipped binary holds no attack and would serve: the audit must not take that for a wall.
fn no_probe() -> Result<()> {
    need_jail()?;
    Host::need_kvm()?;
    let place = Place::make()?;
    let output = Command::new(artifact(Artifact::Bulkhead)?)
        .args(["audit", "--role=disk", "--attack=open", "--probes"])
        .arg(place.folder.path())
        .output()?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "{}: {words}", output.status);
    ensure!(words.contains("jailer/probe"), "no hint: {words}");
    Ok(())
}
