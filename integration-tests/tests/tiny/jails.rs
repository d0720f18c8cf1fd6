//! Every jailed process while its guest runs, seen from outside: started by whoever runs the
//! tests, and by a user who owns nothing.

use super::descriptors::{self, exact};
use anyhow::{Context, Result, anyhow, bail, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    lent::{Lent, NOBODY, become_nobody, become_user},
    mounts::show_instead,
    suite::{Skip, artifact, need_jail, test},
    tiny::{Events, Run},
};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, User, chown};
use std::{
    collections::BTreeSet,
    fs::{self, File, Permissions},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};
use tempfile::TempDir;
use vm_spec::events::EventKind;
use vm_spec::run_state::{Identity, ProcessRole, ProcessState, RunState};

const DEADLINE: Duration = Duration::from_secs(20);
const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("jails::own_user", as_self),
        test("jails::unprivileged_user", as_nobody),
        test("jails::user_with_subordinate_ids", with_subordinate_ids),
    ]
}

fn flags(folder: &Path, kernel: &Path) -> Result<Vec<String>> {
    let make = |name| -> Result<PathBuf> {
        let disk = folder.join(name);
        File::create(&disk)?.set_len(16 << 20)?;
        fs::set_permissions(&disk, Permissions::from_mode(0o666))?;
        Ok(disk)
    };
    let (disk, second) = (make("disk")?, make("second")?);
    let mut flags = vec![
        format!("--kernel={}", kernel.display()),
        "--memory=64M".to_owned(),
        "--cmdline=scenario=hlt".to_owned(),
        format!("--disk=path={},format=raw", disk.display()),
        format!(
            "--disk=path={},format=raw,serial=second,poll-us=50,on-error=stop,\
             ops=50K,bytes=1G,queues=2{}",
            second.display(),
            if takes_direct(&second) { ",cache=none" } else { "" }
        ),
        "--power-off-grace=1".to_owned(),
    ];
    if Path::new("/dev/net/tun").exists() {
        flags.push("--net=private=10.213.8.1/24".to_owned());
    }
    Ok(flags)
}

/// Not every file system does.
fn takes_direct(path: &Path) -> bool {
    let mut options = File::options();
    options.read(true).custom_flags(nix::libc::O_DIRECT);
    options.open(path).is_ok()
}

fn as_self() -> Result<()> {
    need_jail()?;
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    let flags = flags(folder.path(), artifact(Artifact::TinyGuest)?)?;
    let bulkhead = || artifact(Artifact::Bulkhead).map(Command::new);
    let printed = dry_run(bulkhead()?, &flags)?;
    let expected = match Uid::effective().is_root() {
        true => Some(Identity::Range),
        // They may have subordinate ids, or not.
        false => None,
    };
    jails(Run::with_flags(&flags)?, &printed, expected)
}

fn as_nobody() -> Result<()> {
    as_another(NOBODY, NOBODY, Identity::Own)
}

fn with_subordinate_ids() -> Result<()> {
    by_user_with_ids(|user, group| as_another(user, group, Identity::Subordinate))
}

/// For a user who has subordinate ids, in a mount namespace where the host's files say so.
pub(crate) fn by_user_with_ids(test: fn(u32, u32) -> Result<()>) -> Result<()> {
    if !Uid::effective().is_root() {
        bail!(Skip("only root can give subordinate ids".to_owned()));
    }
    for needed in ["/usr/bin/newuidmap", "/etc/subuid", "/etc/subgid"] {
        if !Path::new(needed).exists() {
            bail!(Skip(format!("no {needed}")));
        }
    }
    let inside = thread::spawn(move || {
        let folder = tempfile::tempdir()?;
        let ids = folder.path().join("ids");
        fs::write(&ids, "nobody:2000000000:65536\n")?;
        show_instead(&[(&ids, "/etc/subuid"), (&ids, "/etc/subgid")])?;
        // newuidmap wants a name.
        let nobody = User::from_name("nobody")?.context("no user nobody")?;
        test(nobody.uid.as_raw(), nobody.gid.as_raw())
    });
    inside
        .join()
        .map_err(|_| anyhow!("the user's namespace panicked"))?
}

fn as_another(user: u32, group: u32, expected: Identity) -> Result<()> {
    need_jail()?;
    Host::need_kvm()?;
    if !Uid::effective().is_root() {
        bail!(Skip("only root can become another user".to_owned()));
    }
    let _lent = Lent::to(user)?;
    let place = Place::make()?;
    let flags = flags(place.folder.path(), &place.path("tiny-guest"))?;
    let runtime = tempfile::tempdir()?;
    chown(
        runtime.path(),
        Some(Uid::from_raw(user)),
        Some(Gid::from_raw(group)),
    )?;
    let bulkhead = || become_user(user, group, &place.path("bulkhead"));
    let printed = dry_run(bulkhead(), &flags)?;
    jails(Run::by(bulkhead(), runtime, &flags)?, &printed, Some(expected))
}

/// What `--dry-run` prints.
fn dry_run(mut command: Command, flags: &[String]) -> Result<String> {
    let output = command.args(["run", "--dry-run"]).args(flags).output()?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {words}", output.status);
    Ok(String::from_utf8(output.stdout)?)
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

/// A VM of a user who owns nothing, and whose spawner may not be of the same user namespace. Its guest is halted.
pub(crate) struct NobodysVm {
    pub(crate) run: Run,
    place: Place,
    _lent: Lent,
}

impl NobodysVm {
    pub(crate) fn start() -> Result<Self> {
        Host::need_kvm()?;
        if !Uid::effective().is_root() {
            bail!(Skip("only root can become another user".to_owned()));
        }
        let lent = Lent::to(NOBODY)?;
        let (place, runtime) = (Place::make()?, tempfile::tempdir()?);
        let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        chown(runtime.path(), Some(user), Some(group))?;
        let flags = [
            format!("--kernel={}", place.path("tiny-guest").display()),
            "--memory=64M".to_owned(),
            "--cmdline=scenario=hlt".to_owned(),
        ];
        let mut run = Run::by(become_nobody(&place.path("bulkhead")), runtime, &flags)?;
        run.state(DEADLINE)?;
        Ok(Self {
            run,
            place,
            _lent: lent,
        })
    }

    /// `bulkhead` by that user.
    pub(crate) fn bulkhead(&self) -> Command {
        let mut command = become_nobody(&self.place.path("bulkhead"));
        command.env("XDG_RUNTIME_DIR", self.run.folder());
        command
    }

    /// `bulkhead VERB test WORDS...` by that user.
    pub(crate) fn verb(&self, verb: &str, words: &[&str]) -> Command {
        self.run.verb_by(self.bulkhead(), verb, words)
    }
}

/// Each jailed process, as the kernel sees it while the guest runs.
fn jails(mut run: Run, printed: &str, expected: Option<Identity>) -> Result<()> {
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
    ensure!(
        expected.is_none_or(|expected| expected == state.identity),
        "{:?}: {printed}\n{}",
        state.identity,
        run.process.stderr()?
    );
    identities(&state, &jailed)?;
    let spawner = state.processes.iter().find(|p| p.role == ProcessRole::Spawner);
    let spawner = spawner.context("no spawner")?.pid;
    confined(spawner)?;
    holds_no_device(spawner, &state)?;
    let forker = state.processes.iter().find(|p| p.role == ProcessRole::Forker);
    let forker = forker.context("no forker")?.pid;
    filtered(forker)?;
    if state.identity != Identity::Own {
        empty_root(spawner).context("the spawner")?;
        empty_root(forker).context("the forker")?;
    }
    for process in jailed {
        // Of its start and of its role; a disk process may make no more rings between the two.
        let filters = if process.role == ProcessRole::Disk { 3 } else { 2 };
        let looked = jail(process.pid, filters).and_then(|()| exact(process, &state, printed));
        looked.with_context(|| format!("process {} ({})", process.pid, process.name))?;
    }
    successor(&mut run, printed)
}

/// A disk process that comes after one that died has the same jail, and is under the forker's filter too.
fn successor(run: &mut Run, printed: &str) -> Result<()> {
    let disk = |state: &RunState| -> Result<ProcessState> {
        let mut disks = state.processes.iter().filter(|p| p.role == ProcessRole::Disk);
        Ok(disks.next().context("no disk")?.clone())
    };
    let first = disk(&run.state(DEADLINE)?)?;
    let sockets = |pid| -> Result<BTreeSet<String>> {
        let open = descriptors::open(pid)?.into_values();
        Ok(open.filter(|link| link.starts_with("socket:")).collect())
    };
    let before = sockets(first.pid)?;
    kill(Pid::from_raw(first.pid), Signal::SIGKILL)?;
    Events::default().wait(run, DEADLINE, |event| event.event == EventKind::Restarted)?;
    let state = run.state(DEADLINE)?;
    let next = disk(&state)?;
    ensure!(next.pid != first.pid, "no successor of {}", first.pid);
    let looked = jail(next.pid, 4).and_then(|()| exact(&next, &state, printed));
    looked.with_context(|| format!("the successor {} of {}", next.pid, first.pid))?;
    let (after, orders) = (sockets(next.pid)?, 1);
    ensure!(
        before.intersection(&after).count() == orders,
        "{after:?} after {before:?}"
    );
    Ok(())
}

/// The spawner makes nothing any more, and can end its processes at most.
fn confined(spawner: i32) -> Result<()> {
    let status = filtered(spawner)?;
    let capabilities = u64::from_str_radix(value(&status, "CapEff:"), 16)?;
    ensure!(capabilities & !(1 << 5) == 0, "{status}");
    Ok(())
}

/// The spawner has let go of images and TAPs: only the forker keeps them.
fn holds_no_device(spawner: i32, state: &RunState) -> Result<()> {
    let disk = state.processes.iter().find(|p| p.role == ProcessRole::Disk);
    let disk = disk.context("no disk")?;
    let image = descriptors::open(disk.pid)?.remove(&4).context("no image")?;
    let held = descriptors::open(spawner)?;
    ensure!(
        held.values().all(|link| *link != image && link != "/dev/net/tun"),
        "the spawner holds {held:?}"
    );
    Ok(())
}

/// The process has a filter, and can gain nothing by executing. Its status.
pub(crate) fn filtered(pid: i32) -> Result<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    ensure!(
        value(&status, "Seccomp:") == "2" && value(&status, "NoNewPrivs:") == "1",
        "{status}"
    );
    Ok(status)
}

fn value<'a>(status: &'a str, key: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    line.map(str::trim).unwrap_or_default()
}

/// Each process is who the state says it is, and nobody else; ids of their own are their own.
fn identities(state: &RunState, jailed: &[&ProcessState]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for process in jailed {
        let words = |file: &str| -> Result<Vec<String>> {
            let text = fs::read_to_string(format!("/proc/{}/{file}", process.pid))?;
            Ok(text.split_whitespace().map(str::to_owned).collect())
        };
        let (uids, gids) = (words("uid_map")?, words("gid_map")?);
        for map in [&uids, &gids] {
            ensure!(map.len() == 3 && map[0] == "0" && map[2] == "1", "{map:?}");
        }
        let own = state.identity != Identity::Own;
        ensure!(process.id.is_some() == own, "{process:?}");
        if let Some(id) = process.id {
            ensure!(uids[1] == id.to_string(), "{uids:?}, not {id}");
        }
        let others = seen.iter().any(|(uid, gid)| *uid == uids[1] || *gid == gids[1]);
        ensure!(
            own != others || seen.is_empty(),
            "{}: {uids:?} {gids:?}",
            process.name
        );
        seen.insert((uids[1].clone(), gids[1].clone()));
    }
    Ok(())
}

/// What is around every jailed process, and on each of its threads.
pub(crate) fn jail(pid: i32, filters: u32) -> Result<()> {
    let filters = format!("Seccomp_filters:\t{filters}");
    let proc = PathBuf::from(format!("/proc/{pid}"));
    for task in fs::read_dir(proc.join("task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        for line in [
            "Seccomp:\t2",
            &filters,
            "NoNewPrivs:\t1",
            "CapInh:\t0000000000000000",
            "CapPrm:\t0000000000000000",
            "CapEff:\t0000000000000000",
            "CapAmb:\t0000000000000000",
            "CapBnd:\t0000000000000000",
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
    empty_root(pid)
}

/// The only mount of the process is a root that holds nothing, and that nothing can be put in.
pub(crate) fn empty_root(pid: i32) -> Result<()> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let root: Vec<_> = fs::read_dir(proc.join("root"))?.collect();
    ensure!(root.is_empty(), "its root holds {root:?}");
    let mounts = fs::read_to_string(proc.join("mountinfo"))?;
    let options = mounts.split_whitespace().nth(5).unwrap_or_default();
    ensure!(
        mounts.lines().count() == 1 && options.starts_with("ro,nosuid,nodev,noexec"),
        "{mounts}"
    );
    Ok(())
}
