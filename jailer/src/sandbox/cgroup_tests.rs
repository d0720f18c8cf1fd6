//! Against a folder with the files that the kernel would make. The kernel's own behaviour is tested
//! where it offers the controllers (`limits::` of the tiny tests).

use super::*;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_spec::size::ByteSize;

const MOUNTS: &str = "22 28 0:20 / /sys rw - sysfs sysfs rw\n\
    33 22 0:29 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";

fn limits() -> LimitsSpec {
    LimitsSpec {
        memory: Some(ByteSize(1 << 30)),
        cpu_percent: Some(150),
        pids: Some(64),
        io_bytes_per_second: Some(ByteSize(10 << 20)),
        ..LimitsSpec::default()
    }
}

/// What the kernel makes in a new group.
fn files(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    for file in [
        "cgroup.procs",
        "cgroup.subtree_control",
        "memory.max",
        "memory.swap.max",
        "cpu.max",
        "pids.max",
        "io.max",
    ] {
        fs::write(folder.join(file), "").unwrap();
    }
    fs::write(folder.join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
}

fn place(top: &Path) -> Place {
    let mounts = MOUNTS.replace("/sys/fs/cgroup", &top.display().to_string());
    Place::of(&mounts, "0::/user.slice\n", true, "web").unwrap()
}

/// What a launcher has after [`Place::claim`].
fn claimed(top: &Path) -> Place {
    let mut place = place(top);
    for folder in ["", "bulkhead", "bulkhead/web", "bulkhead/web/spawner"] {
        files(&top.join(folder));
    }
    place.made = inode(&place.group);
    place
}

#[test]
fn a_group_in_which_someone_is_cannot_be_claimed() {
    let top = tempfile::tempdir().unwrap();
    let place = place(top.path());
    fs::create_dir_all(&place.group).unwrap();
    fs::write(place.group.join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
    assert!(matches!(place.claim(), Err(CgroupError::InUse(_))));
}

#[test]
fn the_group_of_another_launcher_is_not_removed() {
    let top = tempfile::tempdir().unwrap();
    let mut place = place(top.path());
    let child = place.group.join("vmm");
    fs::create_dir_all(&child).unwrap();
    place.remove();
    place.made = inode(&place.group).map(|inode| inode + 1);
    place.remove();
    let killed = child.join("cgroup.kill");
    assert!(child.exists() && !killed.exists());
    place.made = inode(&place.group);
    place.remove();
    assert!(killed.exists());
}

#[test]
fn what_a_killed_launcher_left_is_swept_once_nobody_is_in_it() {
    let top = tempfile::tempdir().unwrap();
    let place = place(top.path());
    assert!(place.sweep());
    fs::create_dir_all(place.group.join("vmm")).unwrap();
    let events = place.group.join("cgroup.events");
    fs::write(&events, "populated 1\nfrozen 0\n").unwrap();
    assert!(!place.sweep() && place.group.join("vmm").exists());
    // The kernel's own file goes with its folder.
    fs::remove_file(events).unwrap();
    assert!(place.sweep() && !top.path().join("bulkhead").exists());
}

#[test]
fn root_and_users_have_their_places() {
    let root = Place::of(MOUNTS, "1:x:/\n0::/user.slice/a.scope\n", true, "web").unwrap();
    assert_eq!(root.group, Path::new("/sys/fs/cgroup/bulkhead/web"));
    assert_eq!(root.origin, Path::new("/sys/fs/cgroup/user.slice/a.scope"));
    let user = Place::of(MOUNTS, "0::/user.slice/a.scope\n", false, "web").unwrap();
    assert_eq!(
        user.group,
        Path::new("/sys/fs/cgroup/user.slice/a.scope/bulkhead-web")
    );
    assert_eq!(user.above, [user.origin]);
}

#[test]
fn a_host_with_version_1_has_no_place() {
    let mounts = "33 22 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
    assert!(matches!(
        Place::of(mounts, "4:memory:/a\n", true, "web"),
        Err(CgroupError::None)
    ));
}

#[test]
fn limits_are_on_the_group_and_on_each_child() {
    let top = tempfile::tempdir().unwrap();
    let place = claimed(top.path());
    for child in ["vmm", "disk0"] {
        files(&place.group.join(child));
    }
    let children = [("vmm".to_owned(), None), ("disk0".to_owned(), Some((259, 0)))];
    let groups = Groups::make(place.clone(), &limits(), &children).unwrap();
    let read = |path: &str| fs::read_to_string(place.group.join(path)).unwrap();
    assert_eq!(read("memory.max"), "1073741824");
    assert_eq!(read("memory.swap.max"), "0");
    for (place, child) in ["vmm", "disk0"].into_iter().enumerate() {
        assert_eq!(read(&format!("{child}/cpu.max")), "150000 100000");
        assert_eq!(read(&format!("{child}/pids.max")), "64");
        assert!(groups.of(place).is_some());
    }
    assert_eq!(read("disk0/io.max"), "259:0 rbps=10485760 wbps=10485760");
    assert_eq!(read("vmm/io.max"), "");
    assert!(groups.of(2).is_none());
}

#[test]
fn a_limit_that_cannot_be_kept_is_an_error() {
    let top = tempfile::tempdir().unwrap();
    let place = claimed(top.path());
    fs::write(top.path().join("cgroup.controllers"), "cpu pids\n").unwrap();
    let error = Groups::make(place, &limits(), &[]).unwrap_err();
    assert!(
        matches!(error, CgroupError::Controller { name: "memory", .. }),
        "{error}"
    );
}

#[test]
fn kills_for_want_of_memory_are_counted() {
    assert_eq!(oom_kills("low 0\nhigh 0\nmax 7\noom 2\noom_kill 3\n"), 3);
    assert_eq!(oom_kills("oom_kill_x 9\n"), 0);
}

/// The last VM's end takes the common folder along.
#[test]
fn a_vm_begins_while_another_ends() {
    let top = tempfile::tempdir().unwrap();
    let place = place(top.path());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = fs::remove_dir(&place.above[1]);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let made = (0..300).try_for_each(|_| {
            place.make_group()?;
            fs::remove_dir(&place.group).map_err(|e| CgroupError::File(place.group.clone(), e))
        });
        stop.store(true, Ordering::Relaxed);
        made.unwrap();
    });
}
