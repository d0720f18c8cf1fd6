//! cgroup v2: stops a process that was broken into from taking the host's memory, CPUs, process
//! numbers or disk bandwidth. A VM has a group with a child for each process.
//!
//! ```text
//!   as root            /sys/fs/cgroup/bulkhead/NAME/{spawner,vmm,disk0,...}
//!   delegated          OWN GROUP/bulkhead-NAME/{spawner,vmm,disk0,...}
//!   memory.max on the VM's own group: shared RAM is charged to whoever touches it first
//!   cpu.max, pids.max, io.max on each child but the spawner's
//! ```
//!
//! A group with limits for its children can hold no process itself: the launcher moves into
//! `spawner` before it makes any other process, the jailed ones are born in theirs, and at the end whoever
//! removes the groups moves what is left in `spawner` back to where it came from.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Gid, Uid, chown, geteuid};
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vm_spec::spec::LimitsSpec;

/// Where the launcher's own processes are.
const SPAWNER: &str = "spawner";
/// Longest that killed processes may take to leave their groups.
const DEATHS: Duration = Duration::from_millis(1500);
/// The end of another VM, which takes the folder above with it, is waited out this many times.
const ATTEMPTS: usize = 16;
/// Microseconds that `cpu.max` counts in.
const PERIOD: u64 = 100_000;

/// Why a VM's limits cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// There is no hierarchy of version 2.
    #[error("cgroup v2 is not mounted, or this process is not in it")]
    None,
    /// A controller is not offered where the groups would be made.
    #[error("the controller '{name}' is not available in {}", folder.display())]
    Controller {
        /// The controller.
        name: &'static str,
        /// The group that lacks it.
        folder: PathBuf,
    },
    /// A VM of that name, launched elsewhere, is in it.
    #[error("{} belongs to a VM that runs", .0.display())]
    InUse(PathBuf),
    /// The launcher's own group holds other processes or groups.
    #[error("{} is shared with other processes", .0.display())]
    Shared(PathBuf),
    /// A file or folder of the hierarchy.
    #[error("cannot use {}", .0.display())]
    File(PathBuf, #[source] io::Error),
}

/// Where groups can be made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// The group that the launcher was started in.
    origin: PathBuf,
    /// The folder of the VM's group.
    group: PathBuf,
    /// The folders, outermost first, that must hand controllers down to the group.
    above: Vec<PathBuf>,
    /// The group, once this launcher has made it: its inode. Another of the same name is another VM's.
    made: Option<u64>,
}

impl Place {
    /// Where the group of VM `name` goes: below `/sys/fs/cgroup/bulkhead` for root, below the
    /// launcher's own group for a user, who has been given that.
    ///
    /// # Errors
    /// [`CgroupError::None`].
    pub fn find(name: &str) -> Result<Self, CgroupError> {
        let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
        Self::of(
            &read("/proc/self/mountinfo"),
            &read("/proc/self/cgroup"),
            geteuid().is_root(),
            name,
        )
    }

    fn of(mounts: &str, own: &str, root: bool, name: &str) -> Result<Self, CgroupError> {
        // `36 35 98:0 /mnt1 /mount/point options - type source options` (proc(5)).
        let top = mounts.lines().find_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            (after.split(' ').next() == Some("cgroup2")).then(|| before.split(' ').nth(4))?
        });
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
        let (Some(top), Some(own)) = (top.map(Path::new), own) else {
            return Err(CgroupError::None);
        };
        let origin = top.join(own);
        Ok(if root {
            let ours = top.join("bulkhead");
            Self {
                group: ours.join(name),
                above: vec![top.to_owned(), ours],
                origin,
                made: None,
            }
        } else {
            Self {
                group: origin.join(format!("bulkhead-{name}")),
                above: vec![origin.clone()],
                origin,
                made: None,
            }
        })
    }

    /// The controllers that are missing of those that limits may need.
    pub fn missing(&self) -> Vec<&'static str> {
        let outermost = self.above.first().unwrap_or(&self.origin);
        let offered = fs::read_to_string(outermost.join("cgroup.controllers")).unwrap_or_default();
        let mut all = vec!["memory", "cpu", "pids", "io"];
        all.retain(|controller| !offered.split_whitespace().any(|one| one == *controller));
        all
    }

    /// Makes the VM's group, and moves the calling process into its child for the spawner, with all that it
    /// makes from here on.
    ///
    /// # Errors
    /// [`CgroupError::InUse`] or [`CgroupError::File`].
    pub fn claim(mut self) -> Result<Self, CgroupError> {
        self.make_group()?;
        self.made = inode(&self.group);
        let joined = make_folder(&self.group.join(SPAWNER)).and_then(|()| {
            let pid = nix::unistd::getpid().to_string();
            put(&self.group.join(SPAWNER), "cgroup.procs", &pid)
        });
        if joined.is_err() {
            self.remove();
        }
        joined.map(|()| self)
    }

    /// Makes the VM's group, and what is above it, which whoever ends as the last VM removes.
    fn make_group(&self) -> Result<(), CgroupError> {
        let is_gone = |made: &Result<(), CgroupError>| matches!(made, Err(CgroupError::File(_, e)) if e.kind() == io::ErrorKind::NotFound);
        let mut made = self.try_to_make_group();
        for _ in 1..ATTEMPTS {
            if !is_gone(&made) {
                break;
            }
            made = self.try_to_make_group();
        }
        made
    }

    fn try_to_make_group(&self) -> Result<(), CgroupError> {
        for folder in self.above.iter().skip(1) {
            make_folder(folder)?;
        }
        let failed = |e| CgroupError::File(self.group.clone(), e);
        match fs::create_dir(&self.group) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                if self.is_populated() {
                    return Err(CgroupError::InUse(self.group.clone()));
                }
                // What a launcher left that was killed.
                clear(&self.group);
                fs::create_dir(&self.group).map_err(failed)
            }
            other => other.map_err(failed),
        }
    }

    fn is_populated(&self) -> bool {
        let events = fs::read_to_string(self.group.join("cgroup.events")).unwrap_or_default();
        events.contains("populated 1")
    }

    /// Removes the groups of a VM whose launcher was killed, with all who would have; whether none are there now.
    /// Where somebody is in them they stay: it may be another VM of that name, launched elsewhere.
    pub fn sweep(&self) -> bool {
        if !self.is_populated() {
            clear(&self.group);
            self.remove_common();
        }
        !self.group.exists()
    }

    /// The last VM's takes the common folder along; with others in it, this fails.
    fn remove_common(&self) {
        if let Some(ours) = self.above.get(1) {
            let _ = fs::remove_dir(ours);
        }
    }

    /// Removes the VM's groups, if they are those that [`Self::claim`] made. What is in the spawner's is moved
    /// out, jailed processes are ended. What cannot be removed is left.
    pub fn remove(&self) {
        if self.made.is_none() || self.made != inode(&self.group) {
            return;
        }
        let spawner = self.group.join(SPAWNER);
        for folder in folders_in(&self.group).filter(|folder| *folder != spawner) {
            end(&folder);
        }
        if self.above.last() == Some(&self.origin) {
            // It takes processes again once it hands nothing down, which it must while the group does.
            for folder in [&self.group, &self.origin] {
                let down = folder.join("cgroup.subtree_control");
                for controller in fs::read_to_string(&down).unwrap_or_default().split_whitespace() {
                    let _ = fs::write(&down, format!("-{controller}"));
                }
            }
        }
        // Twice: one may have been made while others were moved.
        for _ in 0..2 {
            let left = fs::read_to_string(spawner.join("cgroup.procs")).unwrap_or_default();
            for pid in left.lines() {
                let _ = fs::write(self.origin.join("cgroup.procs"), pid);
            }
        }
        end(&spawner);
        let _ = fs::remove_dir(&self.group);
        self.remove_common();
    }
}

fn inode(folder: &Path) -> Option<u64> {
    fs::symlink_metadata(folder).ok().map(|about| about.ino())
}

fn folders_in(group: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(group).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir())
}

/// Removes a group and its children, in which no process is.
fn clear(group: &Path) {
    folders_in(group).for_each(|folder| {
        let _ = fs::remove_dir(folder);
    });
    let _ = fs::remove_dir(group);
}

/// Ends what is left in a group, waits until it is gone, and removes the group.
fn end(group: &Path) {
    // Before Linux 5.14 there is no such file: what is left dies with the spawner by itself.
    let _ = fs::write(group.join("cgroup.kill"), "1");
    if let Ok(mut events) = File::open(group.join("cgroup.events")) {
        let deadline = Instant::now() + DEATHS;
        loop {
            let mut text = String::new();
            let read = events.rewind().and_then(|()| events.read_to_string(&mut text));
            let left = deadline.saturating_duration_since(Instant::now());
            if read.is_err() || !text.contains("populated 1") || left.is_zero() {
                break;
            }
            // The kernel reports each change of the file so.
            let mut changed = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
            let _ = poll(
                &mut changed,
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
            );
        }
    }
    let _ = fs::remove_dir(group);
}

/// A VM's groups.
#[derive(Debug)]
pub struct Groups {
    place: Place,
    children: Vec<Child>,
}

/// One process's group.
#[derive(Debug)]
struct Child {
    name: String,
    folder: File,
    /// Opened at once: the confined spawner opens nothing to read.
    events: Option<File>,
}

impl Groups {
    /// Gives the group that was claimed its limits, and makes one for each of `children`: their names, each with
    /// the block device that its process's image lies on.
    ///
    /// # Errors
    /// Any [`CgroupError`]: a limit that cannot be kept is not left out.
    pub fn make(
        place: Place,
        limits: &LimitsSpec,
        children: &[(String, Option<(u64, u64)>)],
    ) -> Result<Self, CgroupError> {
        for folder in place.above.iter().chain([&place.group]) {
            hand_down(folder, limits)?;
        }
        if let Some(memory) = limits.memory {
            put(&place.group, "memory.max", &memory.0.to_string())?;
            // Else the limit would be on RAM only, and the disk would take the rest.
            put_if_there(&place.group, "memory.swap.max", "0")?;
        }
        let children = children.iter().map(|(name, device)| {
            let path = place.group.join(name);
            Ok(Child {
                name: name.clone(),
                folder: make_child(&path, limits, *device)?,
                events: File::open(path.join("memory.events")).ok(),
            })
        });
        Ok(Self {
            children: children.collect::<Result<_, _>>()?,
            place,
        })
    }

    /// Lets the user that the launcher is about to become make processes in the groups; their
    /// limits stay root's.
    ///
    /// # Errors
    /// [`CgroupError::File`].
    pub fn give_to(&self, uid: Uid, gid: Gid) -> Result<(), CgroupError> {
        let spawner = self.place.group.join(SPAWNER);
        let children = self.children.iter();
        let children = children.map(|child| self.place.group.join(&child.name));
        for folder in children.chain([self.place.group.clone(), spawner]) {
            let file = folder.join("cgroup.procs");
            chown(&file, Some(uid), Some(gid)).map_err(|e| CgroupError::File(file, e.into()))?;
        }
        Ok(())
    }

    /// The folder of the group at `place` among the children, for `Program::cgroup`.
    pub fn of(&self, place: usize) -> Option<BorrowedFd<'_>> {
        self.children.get(place).map(|child| child.folder.as_fd())
    }

    /// The numbers of the groups' folders.
    pub fn descriptors(&self) -> Vec<RawFd> {
        self.children
            .iter()
            .map(|child| child.folder.as_raw_fd())
            .collect()
    }

    /// How many processes of the group at `place` the kernel has killed for want of memory.
    pub fn oom_kills(&self, place: usize) -> u64 {
        let mut text = [0; 1024];
        let events = self.children.get(place).and_then(|child| child.events.as_ref());
        match events.map(|events| events.read_at(&mut text, 0)) {
            Some(Ok(length)) => oom_kills(&String::from_utf8_lossy(&text[..length])),
            _ => 0,
        }
    }
}

fn oom_kills(events: &str) -> u64 {
    let count = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.parse().ok()).unwrap_or(0)
}

fn make_folder(folder: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(folder) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(CgroupError::File(folder.to_owned(), e)),
        _ => Ok(()),
    }
}

fn put(folder: &Path, file: &str, text: &str) -> Result<(), CgroupError> {
    let path = folder.join(file);
    // Never made anew: what the kernel does not offer must not look as if it were set.
    let written = fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut open| io::Write::write_all(&mut open, text.as_bytes()));
    written.map_err(|e| CgroupError::File(path, e))
}

fn put_if_there(folder: &Path, file: &str, text: &str) -> Result<(), CgroupError> {
    match folder.join(file).exists() {
        true => put(folder, file, text),
        false => Ok(()),
    }
}

/// Lets the groups below `folder` have the controllers that `limits` need.
fn hand_down(folder: &Path, limits: &LimitsSpec) -> Result<(), CgroupError> {
    let offered = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    for controller in limits.controllers() {
        if !offered.split_whitespace().any(|one| one == controller) {
            return Err(CgroupError::Controller {
                name: controller,
                folder: folder.to_owned(),
            });
        }
        match put(folder, "cgroup.subtree_control", &format!("+{controller}")) {
            Err(CgroupError::File(_, e)) if e.raw_os_error() == Some(libc::EBUSY) => {
                return Err(CgroupError::Shared(folder.to_owned()));
            }
            other => other?,
        }
    }
    Ok(())
}

fn make_child(folder: &Path, limits: &LimitsSpec, device: Option<(u64, u64)>) -> Result<File, CgroupError> {
    make_folder(folder)?;
    if let Some(percent) = limits.cpu_percent {
        let quota = u64::from(percent) * PERIOD / 100;
        put(folder, "cpu.max", &format!("{quota} {PERIOD}"))?;
    }
    if let Some(pids) = limits.pids {
        put(folder, "pids.max", &pids.to_string())?;
    }
    if let (Some((major, minor)), Some(line)) = (device, io_line(limits)) {
        put(folder, "io.max", &format!("{major}:{minor}{line}"))?;
    }
    File::open(folder).map_err(|e| CgroupError::File(folder.to_owned(), e))
}

/// The limits of `io.max`, behind the device's number.
fn io_line(limits: &LimitsSpec) -> Option<String> {
    let mut line = String::new();
    if let Some(bytes) = limits.io_bytes_per_second {
        line.push_str(&format!(" rbps={0} wbps={0}", bytes.0));
    }
    if let Some(operations) = limits.io_operations_per_second {
        line.push_str(&format!(" riops={operations} wiops={operations}"));
    }
    Some(line).filter(|line| !line.is_empty())
}

/// The whole disk that `device` (st_dev) is, or is a part of: `io.max` takes no partition. `None`:
/// no disk is behind it, as with tmpfs.
pub fn disk_behind(device: u64) -> Option<(u64, u64)> {
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let folder = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    if !folder.exists() {
        return None;
    }
    if !folder.join("partition").exists() {
        return Some((major, minor));
    }
    let text = fs::read_to_string(folder.join("../dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
#[path = "cgroup_tests.rs"]
mod tests;
