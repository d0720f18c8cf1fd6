//! Who a VM's processes are outside their namespaces: stops one that was broken into from touching
//! another, or another VM's, by the right of being the same user.
//!
//! Where a range of ids is to be had, the spawner enters a user namespace of the VM's own, which has
//! that range and nothing else, and in it makes each process another user. Root has ranges; a user has
//! them by `/etc/subuid` and `/etc/subgid`, through newuidmap and newgidmap, which run while the
//! launcher opens files. Else every process is the user.

use crate::failure::Failure;
use crate::sandbox::{Anchor, Root, caps};
use crate::tell::{printable, tell};
use nix::unistd::{Gid, Uid, User, getgid, getpid, getuid, setgroups};
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::IntoRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use vm_spec::run_state::Identity;

/// Root's ranges begin here, one for each process id: no distribution gives these ids to people or to
/// containers (systemd's documented UID ranges).
const ROOT_RANGES: u32 = 0x7000_0000;
/// Ids of a VM: the spawner's, the vmm's, the supervisor's, 32 devices'. With the largest process id,
/// ranges end at 2^31.
const IDS: u32 = 64;
/// On any host.
const LARGEST_PID: u32 = 1 << 22;
/// Ranges behind those of process ids, short of the last ids there are.
const DRAWN: u32 = (1 << 25) - 2;
/// `PROC_PID_INIT_INO` of the kernel.
const FIRST_PID_NAMESPACE: u64 = 0xEFFF_FFFC;
/// `CAP_KILL`, `CAP_SETGID`, `CAP_SETUID` and `CAP_SYS_ADMIN` within the VM's own user namespace: what
/// it takes to make, and to end, processes of other users in it.
const KEPT: u64 = 1 << 5 | 1 << 6 | 1 << 7 | 1 << 21;

/// Why there may be none although there are subordinate ids.
const TAKEN: &str = "all subordinate ids are in use";
/// Where programs are without a PATH: where the C library looks for them.
const DEFAULT_PATH: &str = "/usr/bin:/bin";

/// Why root of a user namespace has no range.
const NO_RANGE: &str = "a user namespace has no ids to spare";

/// What there is to be had, and what is under way to have it.
pub(crate) enum Identities {
    /// Every process is the launcher's user; why.
    Own(&'static str),
    /// The namespace waits for its maps, which root writes itself.
    Range { anchor: Anchor, first: u32 },
    /// The namespace's maps are being written.
    Subordinate {
        anchor: Anchor,
        helpers: [Child; 2],
        first: (u32, u32),
    },
}

/// Who the spawner's children will be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Settled {
    /// The spawner's user.
    Own,
    /// Of the spawner's own namespace, in which id 1 is `first + 1` outside, or for a user's
    /// subordinate ids `first`.
    Each { kind: Identity, first: u32 },
}

impl Settled {
    /// The id that the process at `place` (the workers in the plan's order, then the supervisor)
    /// becomes.
    pub(crate) fn of(self, place: usize) -> Option<u32> {
        match self {
            Self::Own => None,
            Self::Each { .. } => u32::try_from(place + 1).ok().filter(|id| *id < IDS),
        }
    }

    /// The same id, as others see it.
    pub(crate) fn outside(self, place: usize) -> Option<u32> {
        match self {
            Self::Own => None,
            Self::Each { first, .. } => self.of(place).map(|id| first + id - 1),
        }
    }

    pub(crate) fn kind(self) -> Identity {
        match self {
            Self::Own => Identity::Own,
            Self::Each { kind, .. } => kind,
        }
    }
}

/// In words, what [`Identities::begin`] would find; `binaries` are those that will be executed.
pub(crate) fn describe(binaries: &[PathBuf]) -> String {
    if getuid().is_root() && in_namespace() {
        return format!("every process is this namespace's root: {NO_RANGE}");
    }
    if getuid().is_root() {
        return format!("each process a user of its own, of {IDS} that no one else has");
    }
    match subordinate(binaries) {
        Ok(all) => format!(
            "each process a user of its own, of {} of the subordinate ids from {} on",
            IDS - 1,
            all.users.first
        ),
        Err(why) => format!("every process is this user ({}): {why}", getuid()),
    }
}

impl Identities {
    /// Whether the spawner goes on seeing the launcher's paths, as their user.
    pub(crate) fn keep_paths(&self) -> bool {
        matches!(self, Self::Own(_))
    }

    /// Looks for ids, and begins to have them mapped. The calling process must have one thread.
    pub(crate) fn begin(binaries: &[PathBuf]) -> Result<Self, Failure> {
        let failed = |e: io::Error| {
            Failure::host("cannot make the VM's user namespace")
                .because(&e)
                .hint("bulkhead doctor tells what is missing")
        };
        if getuid().is_root() && in_namespace() {
            return Ok(Self::Own(NO_RANGE));
        }
        if getuid().is_root() {
            let first = root_range().map_err(failed)?;
            let anchor = Anchor::start().map_err(failed)?;
            for map in ["gid_map", "uid_map"] {
                let path = format!("/proc/{}/{map}", anchor.pid());
                fs::write(path, format!("0 {first} {IDS}")).map_err(failed)?;
            }
            return Ok(Self::Range { anchor, first });
        }
        let claimed = subordinate(binaries).and_then(|all| all.claim(getpid().as_raw().unsigned_abs()));
        let (first, claim) = match claimed {
            Ok(claimed) => claimed,
            Err(why) => return Ok(Self::Own(why)),
        };
        // Held until this process has ended, and its children with it.
        let _ = claim.into_raw_fd();
        let anchor = Anchor::start().map_err(failed)?;
        let help = |program: &str, own: u32, first: u32| {
            let pid = anchor.pid().to_string();
            let (own, first, count) = (own.to_string(), first.to_string(), (IDS - 1).to_string());
            let map = [&pid, "0", &own, "1", "1", &first, &count];
            // Where the launch fails meanwhile, what they say of it is nobody's concern.
            let mut command = Command::new(program);
            command.args(map).stdin(Stdio::null()).stderr(Stdio::piped());
            command.spawn()
        };
        let helpers = help("newuidmap", getuid().as_raw(), first.0)
            .and_then(|uids| Ok([uids, help("newgidmap", getgid().as_raw(), first.1)?]));
        match helpers {
            Ok(helpers) => Ok(Self::Subordinate {
                anchor,
                helpers,
                first,
            }),
            Err(_) => Ok(Self::Own("newuidmap cannot be run")),
        }
    }

    /// Gives up root, or enters the user's own range: for good. `give` is told who the spawner is about
    /// to become, if that is another than it was. What comes back beside is to be dropped when there is
    /// time: it waits for a process to end. What `root` says is done where ids of its own are had.
    ///
    /// # Errors
    /// A [`Failure`] when root cannot be left.
    pub(crate) fn enter(
        self,
        root: Root,
        give: impl FnOnce(Uid, Gid) -> io::Result<()>,
    ) -> Result<(Settled, Option<Anchor>), Failure> {
        match self {
            Self::Own(why) => {
                if why == TAKEN {
                    // Not what this user is used to: whoever took the names may have meant it.
                    tell(format_args!(
                        "bulkhead: warning: every process is this user: {why}"
                    ));
                }
                Ok((Settled::Own, None))
            }
            Self::Range { anchor, first } => {
                let failed = |e: &dyn std::error::Error| Failure::host("cannot leave root").because(e);
                give(Uid::from_raw(first), Gid::from_raw(first)).map_err(|e| failed(&e))?;
                setgroups(&[]).map_err(|e| failed(&e))?;
                anchor.enter(root).map_err(|e| failed(&e))?;
                caps::keep_only(KEPT).map_err(|e| failed(&e))?;
                let (kind, first) = (Identity::Range, first + 1);
                Ok((Settled::Each { kind, first }, Some(anchor)))
            }
            Self::Subordinate {
                anchor,
                helpers,
                first: (first, _),
            } => {
                for helper in helpers {
                    let why = match helper.wait_with_output() {
                        Ok(done) if done.status.success() => continue,
                        Ok(done) => String::from_utf8_lossy(&done.stderr).trim().to_owned(),
                        Err(error) => error.to_string(),
                    };
                    tell(format_args!(
                        "bulkhead: no subordinate ids: every process is this user: {}",
                        printable(&why)
                    ));
                    return Ok((Settled::Own, None));
                }
                let failed = |e: &dyn std::error::Error| {
                    Failure::host("cannot enter the namespace of the subordinate ids").because(e)
                };
                anchor.enter(root).map_err(|e| failed(&e))?;
                caps::keep_only(KEPT).map_err(|e| failed(&e))?;
                let kind = Identity::Subordinate;
                Ok((Settled::Each { kind, first }, Some(anchor)))
            }
        }
    }
}

/// Who a jailed process beside any VM becomes, by an id of this process's namespace; `None`: its user, as it may be
/// nobody else. That is another process's only once this one has ended.
pub(super) fn alone() -> io::Result<Option<u32>> {
    if !getuid().is_root() || in_namespace() || caps::effective()? & KEPT != KEPT {
        return Ok(None);
    }
    root_range().map(|first| Some(first + 1))
}

/// The first of our range of root's: of our process id, which is the host's own. In another pid namespace, a
/// container's, that may be another VM's as well: there one is drawn from all that lie behind those.
fn root_range() -> io::Result<u32> {
    if fs::metadata("/proc/self/ns/pid")?.ino() == FIRST_PID_NAMESPACE {
        return Ok(ROOT_RANGES + getpid().as_raw().unsigned_abs() * IDS);
    }
    let mut drawn = [0; 4];
    File::open("/dev/urandom")?.read_exact(&mut drawn)?;
    Ok(ROOT_RANGES + (LARGEST_PID + 1 + u32::from_ne_bytes(drawn) % DRAWN) * IDS)
}

/// Root is root of a user namespace only, such as a container's: outside it is a user, and what is
/// outside the namespace it cannot be.
fn in_namespace() -> bool {
    let own = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    !own.split_whitespace().eq(["0", "0", "4294967295"])
}

/// Ids that belong to this user.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Owned {
    first: u32,
    /// How many VMs find room in them, each for [`IDS`] less one.
    ranges: u32,
}

/// This user's subordinate ids.
#[derive(Clone, Copy, Debug)]
struct Subordinate {
    users: Owned,
    groups: Owned,
}

impl Subordinate {
    /// The first user and group id of a range that no other VM of this user has, for as long as what comes
    /// with them is open; looked for from `turn` on.
    fn claim(self, turn: u32) -> Result<((u32, u32), UnixDatagram), &'static str> {
        let ranges = self.users.ranges.min(self.groups.ranges);
        (0..ranges)
            .map(|step| turn.wrapping_add(step) % ranges)
            .find_map(|range| {
                let at = |owned: Owned| owned.first.checked_add(range * (IDS - 1));
                let first = (at(self.users)?, at(self.groups)?);
                // An abstract name goes with whoever has bound it.
                let name = format!("bulkhead/ids/{}", first.0);
                let name = SocketAddr::from_abstract_name(name).ok()?;
                Some((first, UnixDatagram::bind_addr(&name).ok()?))
            })
            .ok_or(TAKEN)
    }
}

/// The subordinate user and group ids of this user, or why there are none.
fn subordinate(binaries: &[PathBuf]) -> Result<Subordinate, &'static str> {
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let (users, groups) = (read("/etc/subuid"), read("/etc/subgid"));
    if users.is_empty() || groups.is_empty() {
        return Err("there are no subordinate ids (/etc/subuid, /etc/subgid)");
    }
    let uid = getuid();
    let name = User::from_uid(uid).ok().flatten().map(|user| user.name);
    let owners = [uid.to_string(), name.unwrap_or_default()];
    let (Some(users), Some(groups)) = (owned(&users, &owners), owned(&groups, &owners)) else {
        return Err("it has no range of subordinate ids (/etc/subuid, /etc/subgid)");
    };
    if !["newuidmap", "newgidmap"].into_iter().all(in_path) {
        return Err("newuidmap and newgidmap are not installed");
    }
    // Another user must be able to execute them.
    let open = |path: &PathBuf| fs::metadata(path).is_ok_and(|about| about.permissions().mode() & 1 == 1);
    if !binaries.iter().all(open) {
        return Err("other users may not execute Bulkhead's binaries");
    }
    Ok(Subordinate { users, groups })
}

/// The first line `NAME:FIRST:COUNT` of one of `owners` with room for a VM.
fn owned(text: &str, owners: &[String; 2]) -> Option<Owned> {
    text.lines().find_map(|line| {
        let mut parts = line.split(':');
        let owner = parts.next()?;
        let (first, count): (u32, u32) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let ranges = count / (IDS - 1);
        let ours = !owner.is_empty() && owners.iter().any(|known| known == owner) && ranges > 0;
        ours.then_some(Owned { first, ranges })
    })
}

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    std::env::split_paths(&path).any(|folder: PathBuf| Path::new(&folder).join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_the_owners_and_whole() {
        let owners = ["1000".to_owned(), "ann".to_owned()];
        let of = |text| owned(text, &owners);
        let range = |first, ranges| Some(Owned { first, ranges });
        assert_eq!(of("bob:1:65536\nann:100000:65536\n"), range(100_000, 1040));
        assert_eq!(of("1000:5000:126\n"), range(5000, 2));
        assert_eq!(of("ann:5000:62\n"), None, "too few");
        assert_eq!(of("annie:1:65536\n:1:65536\nann:x:9\n"), None);
    }

    #[test]
    fn a_range_is_one_vms_at_a_time() {
        // Ids that nobody has on this machine.
        let first = 0x6000_0000 + std::process::id();
        let owned = Owned { first, ranges: 2 };
        let all = Subordinate {
            users: owned,
            groups: Owned { first: 7, ranges: 3 },
        };
        let (one, claim) = all.claim(5).unwrap();
        assert_eq!(one, (first + 63, 7 + 63));
        let (other, _claim) = all.claim(5).unwrap();
        assert_eq!(other, (first, 7));
        assert!(all.claim(5).is_err(), "there are two");
        drop(claim);
        assert_eq!(all.claim(5).unwrap().0, one);
    }

    #[test]
    fn ids_end() {
        let owned = Owned {
            first: u32::MAX - 62,
            ranges: 2,
        };
        let all = Subordinate {
            users: owned,
            groups: owned,
        };
        assert_eq!(all.claim(1).unwrap().0.0, owned.first, "beyond the last id");
    }

    #[test]
    fn each_process_is_another() {
        let each = Settled::Each {
            kind: Identity::Range,
            first: 1000,
        };
        assert_eq!((each.of(0), each.outside(0)), (Some(1), Some(1000)));
        assert_eq!((each.of(33), each.outside(33)), (Some(34), Some(1033)));
        assert_eq!(each.of(63), None, "the range is over");
        assert_eq!((Settled::Own.of(0), Settled::Own.outside(0)), (None, None));
    }
}
