//! The jail from outside and from inside: a static probe is started through the real sandbox.
//!
//! It runs as whoever runs the tests; as root it also runs as an unprivileged user, in a process
//! of this test that becomes one.

use jailer::sandbox::child::{Child, Parent, Program, open_proc, start};
use jailer::sandbox::{EXIT_NO_MEMORY, Role, SeccompMode, Witness, most_open_files};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::wait::{WaitStatus, waitpid};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A user that owns nothing here.
const UNPRIVILEGED: u32 = 12345;

/// Builds the probe as shipped binaries are built: static, for an empty root. What it depends on is built where the
/// workspace's is, for the audit's probes most often: the other packages choose its features, as they do there.
fn probe() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("probes");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--no-default-features"]);
    cargo.args(["--package=jailer", "--example=jail_probe"]);
    for package in [
        "bulkhead-vmm",
        "vhost-user-blk",
        "vhost-user-net",
        "images",
        "integration-tests",
    ] {
        cargo.args(["--package", package]);
    }
    cargo.args(["--target", "x86_64-unknown-linux-musl", "--target-dir"]);
    cargo.arg(&target).env(
        "CARGO_BUILD_BUILD_DIR",
        target.ancestors().nth(2).expect("a target folder"),
    );
    let status = cargo.status().expect("cargo runs");
    assert!(status.success(), "the probe does not build");
    target.join("x86_64-unknown-linux-musl/debug/examples/jail_probe")
}

struct Probe {
    child: Child,
    lines: BufReader<File>,
    _hold: UnixStream,
}

/// Of what is started here.
const OPEN_FILES: u64 = 1000;

fn start_probe(binary: &Path, argument: &str) -> Probe {
    let binary = File::open(binary).expect("the probe was built");
    let (read_in, hold) = UnixStream::pair().expect("socketpair");
    let (read_out, write_out) = nix::unistd::pipe().expect("pipe");
    let proc = open_proc().expect("/proc");
    let program = Program {
        binary: binary.as_fd(),
        arguments: vec![
            CString::new("probe").expect("no zero byte"),
            CString::new(argument).expect("no zero byte"),
        ],
        descriptors: vec![read_in.as_fd(), write_out.as_fd(), write_out.as_fd()],
        proc: proc.as_fd(),
        rooted: false,
        cgroup: None,
        address_space: 1 << 30,
        open_files: OPEN_FILES,
        startup: Role::Startup,
        seccomp: match argument {
            "look" => SeccompMode::Off,
            "trapped" => SeccompMode::Trap,
            _ => SeccompMode::Enforce,
        },
        identity: None,
        parent: Parent::Caller,
    };
    let child = start(&program)
        .expect("clone")
        .finish()
        .expect("the probe executes");
    Probe {
        child,
        lines: BufReader::new(File::from(read_out)),
        _hold: hold,
    }
}

impl Probe {
    /// Lines up to `locked`.
    fn report(&mut self) -> Vec<String> {
        let mut all = Vec::new();
        for line in (&mut self.lines).lines() {
            let line = line.expect("the pipe can be read");
            if line == "locked" {
                return all;
            }
            all.push(line);
        }
        panic!("the probe ended before it was locked: {all:?}");
    }

    fn status(&self, key: &str) -> String {
        let path = format!("/proc/{}/status", self.child.pid);
        let text = fs::read_to_string(path).expect("status");
        let line = text.lines().find(|l| l.split(':').next() == Some(key));
        line.and_then(|l| l.split_whitespace().nth(1))
            .unwrap_or_else(|| panic!("no {key}"))
            .to_owned()
    }

    fn open_files(&self) -> u64 {
        let path = format!("/proc/{}/limits", self.child.pid);
        let text = fs::read_to_string(path).expect("limits");
        let line = text.lines().find_map(|l| l.strip_prefix("Max open files"));
        let hard = line.and_then(|l| l.split_whitespace().nth(1));
        hard.and_then(|n| n.parse().ok()).expect("a limit of open files")
    }
}

fn check_jail(binary: &Path) {
    let mut probe = start_probe(binary, "look");
    let report = probe.report();
    for expected in [
        "root-entries=0",
        "environment=0",
        "pid=1",
        "writable=false",
        "fds=0,1,2",
    ] {
        assert!(report.iter().any(|l| l == expected), "{expected}: {report:?}");
    }
    assert_eq!(probe.open_files(), OPEN_FILES);
    assert_eq!(probe.status("Seccomp"), "2");
    assert_eq!(probe.status("NoNewPrivs"), "1");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(probe.status(set), "0000000000000000", "{set}");
    }
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"] {
        if !Path::new("/proc/self/ns").join(kind).exists() {
            continue;
        }
        let ours = fs::read_link(format!("/proc/self/ns/{kind}")).expect("our namespace");
        let path = format!("/proc/{}/ns/{kind}", probe.child.pid);
        let theirs = fs::read_link(path).expect("the probe's namespace");
        assert_ne!(ours, theirs, "{kind}");
    }
    let pid = probe.child.pid;
    drop(probe);
    assert_eq!(waitpid(pid, None), Ok(WaitStatus::Exited(pid, 0)));

    let mut probe = start_probe(binary, "wait");
    probe.report();
    assert_eq!(
        probe.status("Seccomp_filters"),
        "2",
        "of its start, and its role's"
    );
    drop(probe);
    check_descriptors_in_flight(binary);
    check_killed_early(binary);
    check_forbidden(binary);
    check_last_words(
        binary,
        "trapped",
        148,
        "getppid (110): supervisor.policy has no rule for it",
    );
    check_last_words(binary, "panic", 101, "probe: panicked at");
    check_last_words(binary, "hungry", EXIT_NO_MEMORY.into(), "out of memory");
}

/// A device process that sends all the descriptors that it can, which nobody takes, keeps no vmm and no supervisor of
/// its user from passing theirs. (Root's are not bounded.)
fn check_descriptors_in_flight(binary: &Path) {
    let mut probe = start_probe(binary, "park");
    probe.report();
    assert_eq!(probe.open_files(), most_open_files(Role::Disk));
    let mut said = String::new();
    probe.lines.read_line(&mut said).expect("the pipe can be read");
    assert!(said.starts_with("ETOOMANYREFS"), "{said}");
    let (ours, _theirs) = UnixStream::pair().expect("socketpair");
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    for role in [Role::Vmm, Role::Supervisor] {
        setrlimit(Resource::RLIMIT_NOFILE, most_open_files(role), hard).expect("a lower limit");
        let rights = [ControlMessage::ScmRights(&[ours.as_raw_fd()])];
        let sent = sendmsg::<()>(
            ours.as_raw_fd(),
            &[IoSlice::new(b"x")],
            &rights,
            MsgFlags::empty(),
            None,
        );
        assert_eq!(sent, Ok(1), "{role}");
    }
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("the limit that was");
}

/// Before its lockdown, too, a process is under a filter.
fn check_killed_early(binary: &Path) {
    let probe = start_probe(binary, "early");
    let pid = probe.child.pid;
    let stopped = waitpid(pid, None);
    let sigsys = nix::sys::signal::Signal::SIGSYS;
    assert!(
        matches!(stopped, Ok(WaitStatus::Signaled(_, signal, _)) if signal == sigsys),
        "{stopped:?}"
    );
}

/// The call kills, and the kernel's log, where it can be read, names it.
fn check_forbidden(binary: &Path) {
    let readable = File::open("/dev/kmsg").is_ok() && Path::new("/proc/sys/kernel/seccomp").is_dir();
    // Ten records in five seconds, says the kernel, and others may be killing, too.
    let named = (0..10).any(|_| {
        let named = is_named(binary);
        if readable && !named {
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
        named || !readable
    });
    assert!(named, "no record names the call");
}

/// The call kills; whether the record was found, and names it.
fn is_named(binary: &Path) -> bool {
    let mut witness = Witness::begin();
    let mut probe = start_probe(binary, "forbidden");
    probe.report();
    let pid = probe.child.pid;
    match waitpid(pid, None) {
        Ok(WaitStatus::Signaled(_, signal, _)) => {
            assert_eq!(signal, nix::sys::signal::Signal::SIGSYS);
        }
        other => panic!("a forbidden call was not stopped: {other:?}"),
    }
    let verdict = witness.testify(pid, Role::Supervisor).map(|v| v.number);
    assert!(matches!(verdict, None | Some(libc::SYS_getppid)), "{verdict:?}");
    verdict.is_some()
}

/// The process says `words` and exits with `code`.
fn check_last_words(binary: &Path, order: &str, code: i32, words: &str) {
    let mut probe = start_probe(binary, order);
    probe.report();
    let pid = probe.child.pid;
    assert_eq!(waitpid(pid, None), Ok(WaitStatus::Exited(pid, code)), "{order}");
    let said: Vec<String> = probe.lines.lines().map_while(Result::ok).collect();
    assert!(said.iter().any(|line| line.contains(words)), "{order}: {said:?}");
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    // Ourselves, as another user.
    if let (Some("--as-user"), Some(binary)) = (arguments.next().as_deref(), arguments.next()) {
        nix::sys::prctl::set_dumpable(true).expect("dumpable");
        check_jail(Path::new(&binary));
        return;
    }
    let binary = probe();
    let is_root = nix::unistd::geteuid().is_root();
    // What `cargo verify` counts by.
    println!("running {}", if is_root { "2 tests" } else { "1 test" });
    check_jail(&binary);
    println!("test jail_as_{} ... ok", nix::unistd::geteuid());
    if !is_root {
        return;
    }
    // The target folder may be closed to the other user: pass what it needs by a readable copy.
    let folder = tempfile::tempdir().expect("a folder");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(folder.path(), open).expect("permissions");
    let probe = folder.path().join("probe");
    let test = folder.path().join("test");
    fs::copy(&binary, &probe).expect("copy");
    fs::copy(std::env::current_exe().expect("our path"), &test).expect("copy");
    let status = Command::new("setpriv")
        .arg(format!("--reuid={UNPRIVILEGED}"))
        .arg(format!("--regid={UNPRIVILEGED}"))
        .arg("--clear-groups")
        .arg(&test)
        .arg("--as-user")
        .arg(&probe)
        .status()
        .expect("setpriv runs");
    assert!(status.success(), "the jail fails as user {UNPRIVILEGED}");
    println!("test jail_as_{UNPRIVILEGED} ... ok");
}
