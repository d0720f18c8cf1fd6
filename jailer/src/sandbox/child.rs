//! Making a jailed process: clone into fresh namespaces, build the jail from inside, execute a
//! static binary by descriptor.
//!
//! ```text
//!   spawner: start() --clone3--> child: maps, session, empty root, descriptors, no privileges
//!            start() for others         |-- execveat: the report pipe closes --+
//!            finish() <-- report pipe --+-- or one (step, errno) ---------------+
//! ```
//!
//! The children build their jails at the same time, since nobody waits between two `start`s.
#![expect(unsafe_code, reason = "clone3, execveat and descriptor surgery between them")]

use super::rlimit::MAX_OPEN_FILES;
use super::step::{SpawnError, Step};
use super::userns::{IdMaps, become_id};
use super::{Role, SeccompMode, caps, mounts, seccomp};
use crate::audit::wall::{Removed, Wall};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::unistd::{Gid, Pid, Uid, getegid, geteuid, pipe2, setsid};
use std::ffi::CString;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::OnceLock;
use std::time::Duration;

/// Whose child a process is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parent {
    /// The caller's.
    Caller,
    /// The caller's parent's, which reaps it, and with which it dies.
    CallersParent,
}

/// What to execute in a jail.
pub struct Program<'a> {
    /// The binary, static, opened for reading or with O_PATH.
    pub binary: BorrowedFd<'a>,
    /// Its arguments, its own name first.
    pub arguments: Vec<CString>,
    /// Its descriptors: the one at index N becomes N. It gets no other.
    pub descriptors: Vec<BorrowedFd<'a>>,
    /// See [`open_proc`].
    pub proc: BorrowedFd<'a>,
    /// The caller's root is an empty one already ([`super::Root::Empty`]), and so is its copy.
    pub rooted: bool,
    /// The cgroup (v2) that it is born in, by its folder; else the caller's.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Most bytes of address space (RLIMIT_AS).
    pub address_space: u64,
    /// Most open descriptors (RLIMIT_NOFILE): its role's [`most_open_files`](super::most_open_files).
    pub open_files: u64,
    /// Whose filter it starts under: [`Role::Startup`] or [`Role::StartupRing`].
    pub startup: Role,
    /// What becomes of calls that this filter forbids.
    pub seccomp: SeccompMode,
    /// The user and group that it is, by an id of the caller's namespace, in which the caller may be
    /// anyone; `None`: the caller's own.
    pub identity: Option<u32>,
    /// Whose child it is.
    pub parent: Parent,
}

/// A child that builds its jail.
#[must_use]
pub struct Starting {
    child: Child,
    report: OwnedFd,
}

/// A child that executes its program.
#[derive(Debug)]
pub struct Child {
    /// Its process id in the caller's namespace; valid until it is reaped.
    pub pid: Pid,
    /// Its pidfd.
    pub pidfd: OwnedFd,
}

/// Clones a child that builds its jail and executes `program`; it may still fail, which
/// [`Starting::finish`] tells. Neither ids nor any privilege of the caller are in the child's
/// user namespace: the user and group that it is outside are its user and group 0, and the only ones.
///
/// The calling process must have one thread only, so that the child inherits no held lock.
///
/// # Errors
/// [`SpawnError::Pipe`] or [`SpawnError::Clone`].
pub fn start(program: &Program<'_>) -> Result<Starting, SpawnError> {
    start_without(program, Removed::NONE)
}

/// As [`start`], with some walls left out: for probes of `bulkhead audit` only.
///
/// # Errors
/// As [`start`].
pub fn start_without(program: &Program<'_>, removed: Removed) -> Result<Starting, SpawnError> {
    let (report, child_report) = pipe2(OFlag::O_CLOEXEC).map_err(|e| SpawnError::Pipe(e.into()))?;
    let mut prepared = Prepared::new(program, child_report.as_raw_fd(), removed);
    let mut pidfd: RawFd = -1;
    let mut namespaces = libc::CLONE_NEWPID;
    if program.identity.is_none() {
        namespaces |= OWNED.bits();
    }
    if time_namespaces() {
        namespaces |= CLONE_NEWTIME;
    }
    if removed.has(Wall::Namespace) {
        namespaces = 0;
    }
    // SAFETY: every field of clone_args may be zero.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = (namespaces | libc::CLONE_PIDFD) as u64;
    if let Some(cgroup) = program.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    args.pidfd = (&raw mut pidfd) as u64;
    match program.parent {
        Parent::Caller => args.exit_signal = libc::SIGCHLD as u64,
        // It ends with the signal that the caller ends with.
        Parent::CallersParent => args.flags |= libc::CLONE_PARENT as u64,
    }
    // SAFETY: without CLONE_VM the child runs on a copy of this stack and memory, as after fork;
    // `args` is a live clone_args of the size given. The child goes to `build_and_execute`, which
    // neither returns nor allocates.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    if pid == 0 {
        build_and_execute(&mut prepared);
    }
    if pid < 0 {
        return Err(SpawnError::Clone(io::Error::last_os_error()));
    }
    // SAFETY: CLONE_PIDFD stored a new descriptor, which nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Starting {
        child: Child {
            pid: Pid::from_raw(pid as i32),
            pidfd,
        },
        report,
    })
}

/// `/proc`, for children to write their id maps by: whoever makes them may see no path any more by then, and
/// finds out here what else it takes from paths.
///
/// # Errors
/// When there is none.
pub fn open_proc() -> io::Result<OwnedFd> {
    time_namespaces();
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::open(c"/proc", flags, nix::sys::stat::Mode::empty())?)
}

/// Kernels before 5.6 have no time namespaces, and refuse the flag. A forker, which may look at no path,
/// knows it from before.
pub(crate) fn time_namespaces() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| std::path::Path::new("/proc/self/ns/time").exists())
}

impl Starting {
    /// The child's process id.
    pub fn pid(&self) -> Pid {
        self.child.pid
    }

    /// Readable once [`Starting::finish`] does not wait.
    pub fn report(&self) -> BorrowedFd<'_> {
        self.report.as_fd()
    }

    /// Waits until the child executes its program.
    ///
    /// # Errors
    /// [`SpawnError::Child`] with the step that failed, or [`SpawnError::Died`]; the child is
    /// still to be reaped by whoever reaps all.
    pub fn finish(self) -> Result<Child, SpawnError> {
        let mut ready = [PollFd::new(self.report(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(DEADLINE).unwrap_or(PollTimeout::MAX);
        if poll(&mut ready, timeout) == Ok(0) {
            return Err(SpawnError::Late);
        }
        let mut report = Vec::new();
        std::fs::File::from(self.report)
            .take(REPORT_LEN as u64)
            .read_to_end(&mut report)
            .map_err(SpawnError::Pipe)?;
        match report[..] {
            [] => Ok(self.child),
            [step, a, b, c, d] => {
                let error = io::Error::from_raw_os_error(i32::from_ne_bytes([a, b, c, d]));
                match Step::ALL.into_iter().find(|s| *s as u8 == step) {
                    Some(step) => Err(SpawnError::Child(step, error)),
                    None => Err(SpawnError::Died),
                }
            }
            _ => Err(SpawnError::Died),
        }
    }
}

/// Longest wait for a jail and its program, which take a few milliseconds.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// The namespaces whose owner is the user that the child is. A child that becomes another user does so
/// first; pid and time namespaces are made with it, by the caller's right.
const OWNED: CloneFlags = CloneFlags::CLONE_NEWUSER
    .union(CloneFlags::CLONE_NEWNS)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWCGROUP);
/// `linux/sched.h`; in clone3 only, since clone takes its low byte for a signal.
const CLONE_NEWTIME: i32 = 0x80;
/// `linux/sched.h`.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// A step's number and an errno.
const REPORT_LEN: usize = 5;
/// The binary's number at exec, which `startup.policy` names: with [`MAX_OPEN_FILES`] no descriptor
/// gets it again, so that nothing can be executed once more.
const BINARY: RawFd = MAX_OPEN_FILES as RawFd;

/// All that the child needs, allocated before the clone.
struct Prepared {
    maps: IdMaps,
    _arguments: Vec<CString>,
    argv: Vec<*const libc::c_char>,
    /// Descriptors in the order of their numbers in the program.
    descriptors: Vec<RawFd>,
    binary: RawFd,
    proc: RawFd,
    rooted: bool,
    report: RawFd,
    removed: Removed,
    address_space: u64,
    open_files: u64,
    startup: Role,
    seccomp: SeccompMode,
    identity: Option<u32>,
}

impl Prepared {
    fn new(program: &Program<'_>, report: RawFd, removed: Removed) -> Self {
        let arguments = program.arguments.clone();
        let argv = arguments
            .iter()
            .map(|a| a.as_ptr())
            .chain([ptr::null()])
            .collect();
        let (uid, gid) = match program.identity {
            Some(id) => (Uid::from_raw(id), Gid::from_raw(id)),
            None => (geteuid(), getegid()),
        };
        Self {
            maps: IdMaps::new(uid, gid),
            identity: program.identity,
            argv,
            _arguments: arguments,
            descriptors: program.descriptors.iter().map(|fd| fd.as_raw_fd()).collect(),
            binary: program.binary.as_raw_fd(),
            proc: program.proc.as_raw_fd(),
            rooted: program.rooted,
            report,
            removed,
            address_space: program.address_space,
            open_files: program.open_files,
            startup: program.startup,
            seccomp: if removed.has(Wall::Seccomp) {
                SeccompMode::Off
            } else {
                program.seccomp
            },
        }
    }
}

/// The child between clone and exec: async-signal-safe calls only, no allocation.
fn build_and_execute(prepared: &mut Prepared) -> ! {
    let (step, errno) = match try_build(prepared) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    let [a, b, c, d] = (errno as i32).to_ne_bytes();
    let message = [step as u8, a, b, c, d];
    // SAFETY: `message` lives and is as long as said; the report is this process's own descriptor.
    unsafe {
        libc::write(prepared.report, message.as_ptr().cast(), message.len());
    }
    // SAFETY: ends the process without running what the parent registered to run at its exit.
    unsafe { libc::_exit(127) }
}

fn try_build(prepared: &mut Prepared) -> Result<std::convert::Infallible, (Step, Errno)> {
    let at = |step: Step| move |errno: Errno| (step, errno);
    // Another user's process forgets its death signal.
    if let Some(id) = prepared.identity {
        become_id(id).map_err(at(Step::Identity))?;
    }
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(at(Step::DeathSignal))?;
    // A parent that died before this line sends no signal: nobody reads the report then.
    if parent_is_gone(prepared.report) {
        return Err((Step::DeathSignal, Errno::ESRCH));
    }
    if !prepared.removed.has(Wall::Namespace) {
        if prepared.identity.is_some() {
            unshare(OWNED).map_err(at(Step::Namespaces))?;
        }
        // SAFETY: the caller's descriptor, which this process has a copy of.
        let proc = unsafe { BorrowedFd::borrow_raw(prepared.proc) };
        prepared.maps.write_own(proc).map_err(at(Step::IdMaps))?;
        // The costliest namespace by far; made here, the children make theirs at the same time.
        unshare(CloneFlags::CLONE_NEWNET).map_err(at(Step::Network))?;
        nix::unistd::sethostname("bulkhead").map_err(at(Step::HostName))?;
        if !prepared.rooted {
            mounts::enter_empty_root().map_err(at(Step::Root))?;
        }
    }
    setsid().map_err(at(Step::Session))?;
    join_new_keyring().map_err(at(Step::Keyring))?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    arrange(prepared).map_err(at(Step::Descriptors))?;
    if !prepared.removed.has(Wall::Limit) {
        setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(at(Step::Limits))?;
        let files = prepared.open_files;
        setrlimit(Resource::RLIMIT_NOFILE, files, files).map_err(at(Step::Limits))?;
        // Who started us may have bounded it closer.
        let (_, hard) = getrlimit(Resource::RLIMIT_AS).map_err(at(Step::Limits))?;
        let most = prepared.address_space.min(hard);
        setrlimit(Resource::RLIMIT_AS, most, most).map_err(at(Step::Limits))?;
    }
    // A file that may grow no further (RLIMIT_FSIZE) is an error of the write.
    let blocked = SigSet::from(Signal::SIGXFSZ);
    nix::sys::signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(&blocked), None)
        .map_err(at(Step::Execute))?;
    if !prepared.removed.has(Wall::Capability) {
        caps::drop_all().map_err(|e| (Step::Capabilities, last_errno(&e)))?;
    }
    nix::sys::prctl::set_no_new_privs().map_err(at(Step::Capabilities))?;
    seccomp::install_before_exec(prepared.startup, prepared.seccomp)
        .map_err(|_| (Step::Filter, Errno::last()))?;
    Err((Step::Execute, execute(prepared)))
}

/// The keys of the person's session stay theirs. A kernel without keyrings has none to share.
fn join_new_keyring() -> nix::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: no name is given, so no pointer is read: an anonymous keyring.
    let joined = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0) };
    match Errno::result(joined) {
        Err(Errno::ENOSYS) => Ok(()),
        other => other.map(drop),
    }
}

fn parent_is_gone(report: RawFd) -> bool {
    let mut poll = libc::pollfd {
        fd: report,
        events: 0,
        revents: 0,
    };
    // SAFETY: one live pollfd, and no waiting.
    unsafe { libc::poll(&raw mut poll, 1, 0) };
    poll.revents & libc::POLLERR != 0
}

fn last_errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EPERM, Errno::from_raw)
}

/// Gives the program exactly its descriptors; every other closes at exec, the binary's and the
/// report's among them.
fn arrange(prepared: &mut Prepared) -> nix::Result<()> {
    let count = prepared.descriptors.len() as RawFd;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft <= MAX_OPEN_FILES {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    // First all out of the way, so that no target is a source that is still needed.
    for fd in &mut prepared.descriptors {
        *fd = duplicate_above(*fd, count)?;
    }
    prepared.binary = duplicate_above(prepared.binary, count)?;
    prepared.report = duplicate_above(prepared.report, count)?;
    for (target, fd) in (0..).zip(&prepared.descriptors) {
        // SAFETY: this process has one thread and drops no Rust descriptor from here to its end.
        Errno::result(unsafe { libc::dup2(*fd, target) })?;
    }
    if prepared.report == BINARY {
        prepared.report = duplicate_above(prepared.report, count)?;
    }
    // SAFETY: as above; what may have been there is in its place by now.
    Errno::result(unsafe { libc::dup3(prepared.binary, BINARY, libc::O_CLOEXEC) })?;
    // SAFETY: as above; closing waits for the exec, so that the report can still be written.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            count,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    Errno::result(rc).map(drop)
}

fn duplicate_above(fd: RawFd, least: RawFd) -> nix::Result<RawFd> {
    // SAFETY: makes a new descriptor; no Rust owner is affected.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, least) })
}

/// Returns only what went wrong.
fn execute(prepared: &Prepared) -> Errno {
    let no_environment: [*const libc::c_char; 1] = [ptr::null()];
    // SAFETY: `argv` ends with null and points into `_arguments`, which lives; the path is an
    // empty string.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            BINARY,
            c"".as_ptr(),
            prepared.argv.as_ptr(),
            no_environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    Errno::last()
}
