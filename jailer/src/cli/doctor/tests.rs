//! What is said of a host's states.

use super::*;

/// A host's state, how bad it is, and what the finding and its remedy must name.
#[test]
fn each_lack_has_its_remedy() {
    let text = |text: &str| Some(text.to_owned());
    let denied = || Err(io::ErrorKind::PermissionDenied.into());
    let absent = || Err(io::ErrorKind::NotFound.into());
    let cases = [
        (kvm(denied()), Level::Missing, "not permitted", "sudo "),
        (kvm(absent()), Level::Missing, "/dev/kvm", "modprobe kvm_intel"),
        (
            kvm_kind(Some("kvm_pvm")),
            Level::Note,
            "software KVM",
            "cargo demo",
        ),
        (
            user_namespaces(false, text("1")),
            Level::Missing,
            "AppArmor",
            "apparmor_restrict_unprivileged_userns=0",
        ),
        (
            user_namespaces(false, text("0")),
            Level::Missing,
            "by this user",
            "max_user_namespaces=15000",
        ),
        (
            user_namespaces(false, None),
            Level::Missing,
            "by this user",
            "unprivileged_userns_clone=1",
        ),
        (
            identity("every process is you".to_owned()),
            Level::Note,
            "every process is you",
            "apt-get install uidmap",
        ),
        (landlock(Some(5)), Level::Note, "level 5", ""),
        (landlock(None), Level::Note, "none; the empty root", ""),
        (
            cgroups(Ok(vec!["io", "cpu"]), true),
            Level::Note,
            "no limits on io, cpu",
            "unified_cgroup_hierarchy=1",
        ),
        (
            cgroups(Err(CgroupError::None), false),
            Level::Note,
            "not mounted",
            "Delegate=yes",
        ),
        (siblings(text("1")), Level::Note, "siblings", "core-scheduling"),
        (tun(absent()), Level::Note, "no NIC but user", "modprobe tun"),
        (rings(text("1")), Level::Note, "is 1", "io_uring_disabled=0"),
        (rings(text("2")), Level::Note, "is 2", "io_uring_disabled=0"),
        (
            huge_pages(text("0")),
            Level::Note,
            "none reserved",
            "vm.nr_hugepages",
        ),
        (huge_pages(None), Level::Note, "none reserved", "vm.nr_hugepages"),
        (
            transparent_huge_pages(text("always advise [never] deny")),
            Level::Note,
            "never",
            "echo advise",
        ),
        (
            transparent_huge_pages(None),
            Level::Note,
            "not offered",
            "echo advise",
        ),
    ];
    for (finding, level, what, mend) in cases {
        let Finding { name, .. } = finding;
        assert_eq!(finding.level, level, "{name}");
        assert!(finding.what.contains(what), "{name}: {}", finding.what);
        assert!(finding.mend.contains(mend), "{name}: {}", finding.mend);
        assert_eq!(finding.mend.is_empty(), mend.is_empty(), "{name}");
    }
}

#[test]
fn a_host_that_has_it_all_needs_no_remedy() {
    let text = |text: &str| Some(text.to_owned());
    for finding in [
        kvm(Ok(())),
        kvm_kind(Some("kvm_amd")),
        user_namespaces(true, text("1")),
        identity("each process has a user of its own".to_owned()),
        landlock(Some(6)),
        cgroups(Ok(Vec::new()), true),
        siblings(text("0")),
        siblings(None),
        tun(Ok(())),
        rings(text("0")),
        // Kernels before 6.6.
        rings(None),
        huge_pages(text("8")),
        transparent_huge_pages(text("always [advise] never deny")),
    ] {
        assert_eq!(finding.level, Level::Good, "{}: {}", finding.name, finding.what);
        assert!(finding.mend.is_empty(), "{}", finding.name);
    }
}
