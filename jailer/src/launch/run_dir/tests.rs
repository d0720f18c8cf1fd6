use super::*;
use vm_spec::events::EventKind;

#[test]
fn a_lock_is_its_owners_as_long_as_it_is_held() {
    let folder = tempfile::tempdir().unwrap();
    let own = nix::unistd::getpid().as_raw();
    let locked = |pid| is_locked_by(folder.path(), pid).unwrap();
    assert!(!locked(own));
    let lock = try_lock(folder.path()).unwrap().unwrap();
    assert!(locked(own) && !locked(1));
    drop(lock);
    assert!(!locked(own));
}

fn create_in(places: [PathBuf; 2], name: &str) -> Result<RunDir, Failure> {
    create_within(PATIENCE, places, name)
}

fn two_places() -> (tempfile::TempDir, [PathBuf; 2]) {
    let folder = tempfile::tempdir().unwrap();
    let places = ["first", "second"].map(|name| folder.path().join(name));
    (folder, places)
}

/// Says that a VM runs there, whose spawner is `pid`.
fn run_by(run_dir: &RunDir, pid: i32, ended_ns: Option<u64>) {
    let state = serde_json::json!({
        "version": run_state::VERSION,
        "name": "b",
        "processes": [{"name": "spawner", "role": "spawner", "pid": pid, "jailed": false, "fds": []}],
        "launched-ns": 1,
        "spawned-ns": 2,
        "ended-ns": ended_ns,
    });
    run_dir
        .write_state(&serde_json::from_value(state).unwrap())
        .unwrap();
}

fn own_pid() -> i32 {
    nix::unistd::getpid().as_raw()
}

#[test]
fn vms_that_start_at_once_do_not_refuse_each_other() {
    let (_folder, places) = two_places();
    std::thread::scope(|scope| {
        for name in ["a", "b", "c", "d"] {
            let places = places.clone();
            scope.spawn(move || {
                for _ in 0..50 {
                    create_in(places.clone(), name).unwrap().remove();
                }
            });
        }
    });
}

#[test]
fn a_name_whose_spawner_is_gone_or_done_is_waited_for() {
    let (_folder, places) = two_places();
    let mut gone = std::process::Command::new("true").spawn().unwrap();
    gone.wait().unwrap();
    let gone = gone.id().cast_signed();
    for (pid, ended) in [(gone, None), (own_pid(), Some(3))] {
        let held = create_in(places.clone(), "b").unwrap();
        run_by(&held, pid, ended);
        std::thread::scope(|scope| {
            let next = scope.spawn(|| create_in(places.clone(), "b"));
            std::thread::sleep(PAUSE * 4);
            held.remove();
            drop(held);
            assert!(next.join().unwrap().is_ok());
        });
    }
    let _held = create_in(places.clone(), "b").unwrap();
    let failure = create_within(PAUSE, places, "b").err().unwrap();
    assert_eq!(failure.code(), vm_spec::control::exit_code::ERROR);
}

#[test]
fn a_vm_is_found_and_its_name_taken_wherever_it_was_started() {
    let (_folder, [first, second]) = two_places();
    let run_dir = create_in([second.clone(), first.clone()], "b").unwrap();
    run_by(&run_dir, own_pid(), None);
    let _other = create_in([first.clone(), second.clone()], "a").unwrap();
    for places in [[&first, &second], [&second, &first]].map(|all| all.map(Clone::clone)) {
        assert_eq!(
            all_in(places.clone()).unwrap(),
            [first.join("a"), second.join("b")]
        );
        let refusal = create_in(places, "b").err().unwrap().to_string();
        assert!(refusal.contains("already runs"), "{refusal}");
        assert!(refusal.contains(second.to_str().unwrap()), "{refusal}");
    }
    drop(run_dir);
    create_in([first, second], "b").unwrap();
}

#[test]
fn too_many_events_begin_anew() {
    let (_folder, places) = two_places();
    let run_dir = create_in(places, "a").unwrap();
    let path = run_dir.path().join(events::FILE_NAME);
    let read = |file: &mut File| {
        let mut text = String::new();
        io::Read::read_to_string(file, &mut text).unwrap();
        let events = text.lines().map(|line| serde_json::from_str(line).unwrap());
        events.collect::<Vec<VmEvent>>()
    };
    let mut event = VmEvent {
        device: "disk0".to_owned(),
        event: EventKind::NoSpace,
        detail: "x".repeat(events::MAX_DETAIL),
        ..VmEvent::begun_anew(7, 0)
    };
    let mut all = Vec::new();
    let mut file = None;
    for count in 1..=4000 {
        event.count = count;
        run_dir.write_event(&event).unwrap();
        assert!(fs::metadata(&path).unwrap().len() <= events::MAX_BYTES);
        let mut open = file.take().unwrap_or_else(|| File::open(&path).unwrap());
        all.extend(read(&mut open));
        let same = open.metadata().unwrap().ino() == fs::metadata(&path).unwrap().ino();
        file = same.then_some(open);
    }
    all.extend(file.as_mut().map(read).unwrap_or_default());
    let (cuts, kept): (Vec<_>, Vec<_>) = all.iter().partition(|event| event.device.is_empty());
    assert!(kept.iter().map(|event| event.count).eq(1..=4000));
    assert!(cuts.iter().map(|event| event.count).eq(1..=cuts.len() as u64));
    assert!((2..4).contains(&cuts.len()), "{cuts:?}");
    run_dir.remove();
    assert!(!run_dir.path().exists());
}

#[test]
fn what_nobody_holds_is_swept_in_both_places() {
    let (_folder, [first, second]) = two_places();
    let held = create_in([second.clone(), first.clone()], "held").unwrap();
    for place in [&first, &second] {
        let dead = place.join("dead");
        make(place).and_then(|()| make(&dead)).unwrap();
        for file in FILES.into_iter().chain(["net0.link"]) {
            fs::write(dead.join(file), "").unwrap();
        }
    }
    let _vm = create_in([first.clone(), second.clone()], "a").unwrap();
    assert_eq!(
        all_in([first.clone(), second]).unwrap(),
        [first.join("a"), held.path().to_owned()]
    );
}

#[test]
fn a_folder_that_others_may_write_is_not_looked_into() {
    use std::os::unix::fs::PermissionsExt as _;
    let (_folder, [first, second]) = two_places();
    let _vm = create_in([second.clone(), first.clone()], "a").unwrap();
    fs::set_permissions(&second, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(all_in([first.clone(), second.clone()]).unwrap().is_empty());
    assert!(all_in([second.clone(), first.clone()]).is_err());
    create_in([first.clone(), second.clone()], "a").unwrap();
    // Nor is it swept.
    let dead = second.join("dead");
    make(&dead).unwrap();
    assert!(create_in([second, first], "b").is_err());
    assert!(dead.exists());
}

#[test]
fn both_places_are_looked_at_whatever_the_variable_says() {
    let folder = tempfile::tempdir().unwrap();
    let given = |path: &Path| places_of(Some(path.to_owned()), geteuid());
    let uid = geteuid();
    let fallback = PathBuf::from(format!("/tmp/bulkhead-{uid}"));
    assert_eq!(
        given(folder.path()),
        [folder.path().join("bulkhead"), fallback.clone()]
    );
    let without = [fallback, format!("/run/user/{uid}/bulkhead").into()];
    assert_eq!(places_of(None, uid), without);
    // Nor is one that does not exist, or that others can write.
    assert_eq!(given(Path::new("/nowhere")), without);
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o720);
    fs::set_permissions(folder.path(), open).unwrap();
    assert_eq!(given(folder.path()), without);
}

#[test]
fn the_folder_that_somebody_else_is_given_is_left_to_them() {
    let folder = tempfile::tempdir().unwrap();
    let stranger = Uid::from_raw(geteuid().as_raw() + 7);
    let places = places_of(Some(folder.path().to_owned()), stranger);
    let own = [
        format!("/tmp/bulkhead-{stranger}"),
        format!("/run/user/{stranger}/bulkhead"),
    ];
    assert_eq!(places, own.map(PathBuf::from));
}

#[test]
fn only_locks_of_whole_files_that_are_held_count() {
    assert_eq!(
        lock("2: FLOCK  ADVISORY  WRITE 17 fe:00:23 0 EOF"),
        Some((17, 23))
    );
    assert_eq!(lock("2: -> FLOCK  ADVISORY  WRITE 17 fe:00:23 0 EOF"), None);
    assert_eq!(lock("2: POSIX  ADVISORY  WRITE 17 fe:00:23 0 EOF"), None);
    assert_eq!(lock("2: FLOCK  ADVISORY  READ 17 fe:00:23 0 EOF"), None);
}
