//! A VM's run-time folder, `$XDG_RUNTIME_DIR/bulkhead/NAME` or `/tmp/bulkhead-UID/NAME`: its
//! lock says whether the VM runs, and whoever comes next sweeps what nobody holds.

use super::connect::connect_within;
use crate::failure::Failure;
use crate::sandbox::cgroup::Place;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, openat, renameat};
use nix::sys::signal::kill;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Pid, Uid, geteuid};
use std::cell::Cell;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vm_spec::client;
use vm_spec::events::{self, EventLine, VmEvent};
use vm_spec::run_state::{self, ProcessRole, RunState};
use vm_spec::timestamp::Timestamp;

/// What holds or removes a folder in passing is waited out for this long: another start's sweep, or the reaper of a VM
/// whose spawner was killed, which removes its groups first.
const PATIENCE: Duration = Duration::from_secs(3);
/// Between two looks at who holds a folder: the kernel tells of no lock's end.
const PAUSE: Duration = Duration::from_millis(5);
/// For a supervisor to let a client in.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// The files that a run-time folder may hold.
const FILES: [&str; 5] = [
    run_state::FILE_NAME,
    "state.json.new",
    events::FILE_NAME,
    "events.jsonl.new",
    client::SOCKET_NAME,
];

/// A locked run-time folder. The lock is the folder's own, and ends with its last holder.
pub(crate) struct RunDir {
    path: PathBuf,
    lock: Flock<File>,
    /// How often the events were begun anew.
    begun_anew: Cell<u64>,
}

/// What makes of `XDG_RUNTIME_DIR` no folder for VMs of `uid`, if something does. One of somebody else's is set where
/// `su` or `sudo` left the variable as it was: whoever can write it could exchange what root goes through by paths.
pub(crate) fn no_runtime_dir(folder: &Path, uid: Uid) -> Option<&'static str> {
    let about = fs::metadata(folder);
    let Some(about) = about.ok().filter(|about| about.is_dir() && folder.is_absolute()) else {
        return Some("is no folder");
    };
    (!is_only_of(&about, uid)).then_some("is not a folder that only you can write")
}

fn is_only_of(about: &fs::Metadata, uid: Uid) -> bool {
    about.uid() == uid.as_raw() && about.mode() & 0o022 == 0
}

/// The folders that VMs of this user are in: new ones go to the first. The variable may be set in one shell and
/// not in another, which is where the second comes in.
pub(crate) fn places() -> [PathBuf; 2] {
    places_of(std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from), geteuid())
}

fn places_of(given: Option<PathBuf>, uid: Uid) -> [PathBuf; 2] {
    let fallback = PathBuf::from(format!("/tmp/bulkhead-{uid}"));
    match given.filter(|folder| no_runtime_dir(folder, uid).is_none()) {
        Some(folder) => [folder.join("bulkhead"), fallback],
        None => [fallback, format!("/run/user/{uid}/bulkhead").into()],
    }
}

/// The folders of all VMs of this user, in the order of their names; also of those that are over, where
/// nobody swept yet.
pub(crate) fn all() -> Result<Vec<PathBuf>, Failure> {
    all_in(places())
}

fn all_in([first, second]: [PathBuf; 2]) -> Result<Vec<PathBuf>, Failure> {
    let mut folders = match list(&first) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        listed => listed.map_err(|e| unusable(&first, &e))?,
    };
    // One that someone else made in the second's place holds no VM of ours, and hinders nobody.
    folders.extend(list(&second).unwrap_or_default());
    folders.sort_by(|a, b| a.file_name().cmp(&b.file_name()));
    Ok(folders)
}

fn list(parent: &Path) -> io::Result<Vec<PathBuf>> {
    check_owner(parent)?;
    Ok(fs::read_dir(parent)?
        .flatten()
        .map(|entry| entry.path())
        .collect())
}

/// Whether the process `pid` locked the folder `path`, and the lock is held. By the kernel's own list: what a
/// folder says of itself its VM's spawner wrote, and to try the lock would be in the way of one that starts.
pub(crate) fn is_locked_by(path: &Path, pid: i32) -> io::Result<bool> {
    let folder = fs::symlink_metadata(path)?.ino();
    Ok(fs::read_to_string("/proc/locks")?
        .lines()
        .filter_map(lock)
        .any(|lock| lock == (pid, folder)))
}

/// The process and the inode of a line of `/proc/locks`: `1: FLOCK  ADVISORY  WRITE 17 fe:00:23 0 EOF`.
/// Devices are left out: some file systems have another number there than in `stat`.
fn lock(line: &str) -> Option<(i32, u64)> {
    let mut words = line.split_whitespace().skip(1);
    if (words.next()?, words.nth(1)?) != ("FLOCK", "WRITE") {
        return None;
    }
    let pid = words.next()?.parse().ok()?;
    let (_, inode) = words.next()?.rsplit_once(':')?;
    Some((pid, inode.parse().ok()?))
}

/// The control socket in the folder that is open as `folder`: a run-time folder's own path may be
/// longer than an address holds.
fn socket_address(folder: i32) -> nix::Result<UnixAddr> {
    UnixAddr::new(format!("/proc/self/fd/{folder}/{}", client::SOCKET_NAME).as_str())
}

/// Connects to the supervisor of the VM whose folder `path` is.
pub(crate) fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let folder = File::open(path)?;
    let address = socket_address(folder.as_raw_fd())?;
    connect_within(SockType::SeqPacket, &address, CONNECT_DEADLINE)
}

/// Makes and locks the folder of VM `name`, after sweeping what VMs left whose reapers were killed too.
pub(crate) fn create(name: &str) -> Result<RunDir, Failure> {
    create_within(PATIENCE, places(), name)
}

fn create_within(patience: Duration, places: [PathBuf; 2], name: &str) -> Result<RunDir, Failure> {
    let until = Instant::now() + patience;
    loop {
        let held = match attempt(&places, name)? {
            Attempt::Made(run_dir) => return Ok(run_dir),
            Attempt::Held(path) => path,
        };
        let folder = format!("its run-time folder is {}", held.display());
        if is_running(&held) {
            return Err(Failure::usage(format!("name: the VM '{name}' already runs"))
                .cause(folder)
                .hint("give another name, or end that VM first"));
        }
        if Instant::now() >= until {
            let what = format!("name: a VM '{name}' is starting, or has not ended altogether");
            return Err(Failure::host(what)
                .cause(format!("{folder}, which stays locked"))
                .hint("try again, or give another name"));
        }
        std::thread::sleep(PAUSE);
    }
}

enum Attempt {
    Made(RunDir),
    /// Someone has this folder, or is removing it.
    Held(PathBuf),
}

fn attempt([parent, other]: &[PathBuf; 2], name: &str) -> Result<Attempt, Failure> {
    if check_owner(other).is_ok() {
        let path = other.join(name);
        if matches!(try_lock(&path), Ok(None)) {
            return Ok(Attempt::Held(path));
        }
        sweep(other);
    }
    let path = parent.join(name);
    // What someone else can change is not looked through.
    match make(parent).and_then(|()| check_owner(parent)) {
        Ok(()) => sweep(parent),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Attempt::Held(path)),
        Err(e) => return Err(unusable(parent, &e)),
    }
    let made = make(&path).and_then(|()| try_lock(&path));
    match made {
        Ok(Some(lock)) => Ok(Attempt::Made(RunDir {
            path,
            lock,
            begun_anew: Cell::new(0),
        })),
        Ok(None) => Ok(Attempt::Held(path)),
        // Swept, or removed as the last one's parent, between two calls.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Attempt::Held(path)),
        Err(e) => Err(unusable(parent, &e)),
    }
}

/// Whether the folder `path` is that of a VM whose spawner holds it and is not about to leave.
fn is_running(path: &Path) -> bool {
    let state = fs::read(path.join(run_state::FILE_NAME)).ok();
    let state = state.and_then(|text| serde_json::from_slice::<RunState>(&text).ok());
    let state = state.filter(|state| state.ended_ns.is_none());
    let mut processes = state.iter().flat_map(|state| &state.processes);
    let spawner = processes.find(|process| process.role == ProcessRole::Spawner);
    // The kernel's list names whoever took a lock, also once that is dead and others hold on to it.
    let lives = |pid| kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH);
    spawner.is_some_and(|spawner| is_locked_by(path, spawner.pid).unwrap_or(false) && lives(spawner.pid))
}

fn unusable(parent: &Path, error: &dyn std::error::Error) -> Failure {
    Failure::host(format!("cannot use the run-time folder {}", parent.display()))
        .because(error)
        .hint("set XDG_RUNTIME_DIR to a folder of yours")
}

/// In /tmp someone else may have been first.
fn check_owner(parent: &Path) -> io::Result<()> {
    let about = fs::symlink_metadata(parent)?;
    if !about.is_dir() || !is_only_of(&about, geteuid()) {
        return Err(io::Error::other(
            "it is not a folder that only its owner, you, can write",
        ));
    }
    Ok(())
}

fn make(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// The lock of a folder; `None`: someone holds it. NotFound when it was removed meanwhile.
fn try_lock(path: &Path) -> io::Result<Option<Flock<File>>> {
    let folder = File::open(path)?;
    match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => {
            let now = fs::symlink_metadata(path)?;
            if now.ino() == lock.metadata()?.ino() {
                Ok(Some(lock))
            } else {
                Err(io::ErrorKind::NotFound.into())
            }
        }
        Err((_, Errno::EAGAIN)) => Ok(None),
        Err((_, e)) => Err(e.into()),
    }
}

/// Removes the folders that nobody holds, and their VMs' cgroups. A folder stays as long as its group does: the
/// next sweep finds the group by it.
fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if let Ok(Some(_lock)) = try_lock(&path) {
            empty(&path);
            let place = entry.file_name().to_str().and_then(|name| Place::find(name).ok());
            if place.is_none_or(|place| place.sweep()) {
                remove(&path);
            }
        }
    }
}

fn remove(path: &Path) {
    empty(path);
    let _ = fs::remove_dir(path);
    // The last VM's folder takes its parent along; with others in it, this fails.
    if let Some(parent) = path.parent() {
        let _ = fs::remove_dir(parent);
    }
}

fn empty(path: &Path) {
    for file in FILES {
        let _ = fs::remove_file(path.join(file));
    }
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry
            .file_name()
            .as_encoded_bytes()
            .ends_with(RunDir::LINK.as_bytes())
        {
            let _ = fs::remove_file(entry.path());
        }
    }
}

impl RunDir {
    /// What the names of NICs' pipes end in.
    pub(crate) const LINK: &str = ".link";

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the folder to the user that the spawner is about to become.
    pub(crate) fn give_to(&self, uid: Uid, gid: Gid) -> io::Result<()> {
        nix::unistd::fchown(&*self.lock, Some(uid), Some(gid)).map_err(io::Error::from)
    }

    /// Writes `state.json` anew, whole. Goes by the folder's descriptor: its path may lead
    /// through folders that are closed to who we are by now.
    pub(crate) fn write_state(&self, state: &RunState) -> io::Result<()> {
        let [name, new, ..] = FILES;
        self.replace(name, new, &serde_json::to_vec_pretty(state)?)
    }

    /// Writes a file anew, whole, as `new` at first.
    fn replace(&self, name: &str, new: &str, text: &[u8]) -> io::Result<()> {
        self.open(new, OFlag::O_TRUNC)?.write_all(text)?;
        renameat(&*self.lock, new, &*self.lock, name).map_err(io::Error::from)
    }

    fn open(&self, name: &str, how: OFlag) -> io::Result<File> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_CLOEXEC | how;
        let file = openat(&*self.lock, name, flags, Mode::from_bits_truncate(0o600))?;
        Ok(File::from(file))
    }

    /// Adds a line to the events, or begins them anew: see [`events::MAX_BYTES`]. A reader keeps the file that it
    /// has, which does not change any more then.
    pub(crate) fn write_event(&self, event: &VmEvent) -> io::Result<()> {
        let time = Timestamp::now().to_string();
        let line = |event: &VmEvent| {
            let time = time.clone();
            let mut line = serde_json::to_vec(&EventLine { time, event })?;
            line.push(b'\n');
            io::Result::Ok(line)
        };
        let text = line(event)?;
        let [.., name, new, _] = FILES;
        let mut file = self.open(name, OFlag::O_APPEND)?;
        if file.metadata()?.len() + text.len() as u64 <= events::MAX_BYTES {
            return file.write_all(&text);
        }
        self.begun_anew.set(self.begun_anew.get() + 1);
        let first = line(&VmEvent::begun_anew(event.time_ns, self.begun_anew.get()))?;
        self.replace(name, new, &[first, text].concat())
    }

    /// Makes the socket that other commands connect to.
    pub(crate) fn listen(&self) -> io::Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        bind(listener.as_raw_fd(), &socket_address(self.lock.as_raw_fd())?)?;
        listen(&listener, Backlog::new(8)?)?;
        Ok(listener)
    }

    /// The number of the descriptor that holds the lock.
    pub(crate) fn lock_number(&self) -> i32 {
        self.lock.as_raw_fd()
    }

    /// Removes the folder, with the lock still held.
    pub(crate) fn remove(&self) {
        remove(&self.path);
    }

    /// As [`Self::remove`], unless it is gone: one of the same name that a launcher has made since then is
    /// another VM's.
    pub(crate) fn remove_if_there(&self) {
        let inode = |about: fs::Metadata| (about.dev(), about.ino());
        let (now, ours) = (fs::symlink_metadata(&self.path), self.lock.metadata());
        if now.map(inode).ok() == ours.map(inode).ok() {
            self.remove();
        }
    }
}

#[cfg(test)]
mod tests;
