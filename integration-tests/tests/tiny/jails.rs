//! Every jailed process while its guest runs, seen from outside: started by whoever runs the
//! tests, and by a user who owns nothing.

use anyhow::{Context, Result, bail, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    suite::{Skip, artifact, test},
    tiny::Run,
};
use libtest_mimic::Trial;
use nix::unistd::{Gid, Uid, chown};
use std::{
    collections::BTreeSet,
    fs::{self, File, Permissions},
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tempfile::TempDir;
use vm_spec::run_state::{ProcessRole, ProcessState};

const DEADLINE: Duration = Duration::from_secs(20);
const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];
/// A user that owns nothing here.
pub(crate) const NOBODY: u32 = 54_321;
/// Device nodes that a launcher opens.
const DEVICES: [&str; 2] = ["/dev/kvm", "/dev/net/tun"];

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("jails::own_user", as_self),
        test("jails::unprivileged_user", as_nobody),
    ]
}

fn flags(folder: &Path, kernel: &Path) -> Result<Vec<String>> {
    let disk = folder.join("disk");
    File::create(&disk)?.set_len(16 << 20)?;
    fs::set_permissions(&disk, Permissions::from_mode(0o666))?;
    let mut flags = vec![
        format!("--kernel={}", kernel.display()),
        "--memory=64M".to_owned(),
        "--cmdline=scenario=hlt".to_owned(),
        format!("--disk=path={},format=raw", disk.display()),
        "--power-off-grace=1".to_owned(),
    ];
    if Path::new("/dev/net/tun").exists() {
        flags.push("--net=private=10.213.8.1/24".to_owned());
    }
    Ok(flags)
}

fn as_self() -> Result<()> {
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    let flags = flags(folder.path(), artifact(Artifact::TinyGuest)?)?;
    jails(Run::with_flags(&flags)?)
}

fn as_nobody() -> Result<()> {
    Host::need_kvm()?;
    if !Uid::effective().is_root() {
        bail!(Skip("only root can become another user".to_owned()));
    }
    let _lent = Lent::to(NOBODY)?;
    let place = Place::make()?;
    let flags = flags(place.folder.path(), &place.path("tiny-guest"))?;
    let runtime = tempfile::tempdir()?;
    chown(
        runtime.path(),
        Some(Uid::from_raw(NOBODY)),
        Some(Gid::from_raw(NOBODY)),
    )?;
    jails(Run::by(become_nobody(&place.path("bulkhead")), runtime, &flags)?)
}

/// `program` as [`NOBODY`].
pub(crate) fn become_nobody(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")])
        .arg("--clear-groups")
        .arg(program);
    command
}

/// A folder that everyone can read, with every artifact: cargo's may be closed.
pub(crate) struct Place {
    pub(crate) folder: TempDir,
}

impl Place {
    pub(crate) fn make() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
        for one in Artifact::ALL {
            fs::copy(artifact(one)?, folder.path().join(one.name()))?;
        }
        Ok(Self { folder })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Access to the device nodes by ACL, taken back when dropped.
pub(crate) struct Lent {
    before: Vec<u8>,
    _turn: MutexGuard<'static, ()>,
}

/// Tests that run at the same time must not take back each other's access.
static LENDING: Mutex<()> = Mutex::new(());

impl Lent {
    pub(crate) fn to(user: u32) -> Result<Self> {
        let devices: Vec<_> = DEVICES
            .into_iter()
            .filter(|device| Path::new(device).exists())
            .collect();
        // What a failed test left is still in order: its access was taken back.
        let turn = LENDING.lock().unwrap_or_else(PoisonError::into_inner);
        let getfacl = Command::new("getfacl")
            .arg("--absolute-names")
            .args(&devices)
            .output();
        let before = match getfacl {
            Ok(output) if output.status.success() => output.stdout,
            _ => bail!(Skip("the package acl is not installed".to_owned())),
        };
        let lent = Self { before, _turn: turn };
        let entry = format!("u:{user}:rw");
        let status = Command::new("setfacl")
            .args(["-m", &entry])
            .args(&devices)
            .status()?;
        ensure!(status.success(), "setfacl: {status}");
        Ok(lent)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let restore = || -> Result<()> {
            let mut setfacl = Command::new("setfacl")
                .arg("--restore=-")
                .stdin(Stdio::piped())
                .spawn()?;
            setfacl
                .stdin
                .take()
                .context("setfacl has no input")?
                .write_all(&self.before)?;
            let status = setfacl.wait()?;
            ensure!(status.success(), "setfacl: {status}");
            Ok(())
        };
        if let Err(error) = restore() {
            eprintln!("cannot take back the access to {DEVICES:?}: {error:#}");
        }
    }
}

/// Each jailed process, as the kernel sees it while the guest runs.
fn jails(mut run: Run) -> Result<()> {
    run.console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
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
            "CapInh:\t0000000000000000",
            "CapPrm:\t0000000000000000",
            "CapEff:\t0000000000000000",
            "CapAmb:\t0000000000000000",
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
