//! A real Debian user space on a qcow2 base image, made by mmdebstrap without root.

use crate::apt::Apt;
use crate::cache::{Cache, Recipe};
use crate::command::run;
use crate::disk;
use crate::error::At;
use crate::progress::Step;
use crate::{Error, Result};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the root holds beyond minbase: to bring up a NIC, fetch a page, and power off with no
/// init system.
const PACKAGES: &str = "iproute2,wget,busybox-static";
/// Size of the disk in bytes; the image's file holds what is used.
const DISK_SIZE: u64 = 1 << 30;

/// The qcow2 base image with Debian's minbase on ext4 (no partition table), built once.
///
/// # Errors
/// mmdebstrap, mke2fs or qemu-img is missing or fails.
pub fn debian_root(cache: &Cache, apt: &Apt) -> Result<PathBuf> {
    // The release's own version stands for its packages: it changes with each point release.
    let release = apt.find("base-files", None)?;
    let recipe = Recipe::new("debian-root", 1)
        .with(apt.codename())
        .with(&release.version)
        .with(PACKAGES)
        .with(DISK_SIZE.to_le_bytes());
    let entry = cache.entry(recipe, |folder| {
        let step = Step::start(&format!("Debian {} root: mmdebstrap", apt.codename()));
        let raw = folder.join("root.raw");
        bootstrap(apt, folder, &raw)?;
        step.now("Debian root: convert to qcow2");
        disk::qcow2_from_raw(&raw, &folder.join("root.qcow2"))?;
        std::fs::remove_file(&raw).at("remove", &raw)
    })?;
    Ok(entry.join("root.qcow2"))
}

/// Runs mmdebstrap; the file system is made by its last hook, where every file has its right
/// owner, whichever way mmdebstrap stands in for root. The image is open as fd 3, because the
/// hook may be the root of a user namespace that cannot reach the cache's folder by name.
fn bootstrap(apt: &Apt, folder: &Path, raw: &Path) -> Result<()> {
    let file = std::fs::File::create(raw).at("make", raw)?;
    file.set_len(DISK_SIZE).at("size", raw)?;
    // For the mapped user of mode unshare; the file is converted and removed right after.
    file.set_permissions(std::fs::Permissions::from_mode(0o666))
        .at("open up", raw)?;
    let (mode, tree) = mode();
    // Where it is missing, the shell would be what failed.
    run(Command::new("mmdebstrap").arg("--version"), "mmdebstrap")?;
    let mut command = Command::new("sh");
    command
        .args(["-c", "exec \"$@\" 3<>root.raw", "sh", "mmdebstrap"])
        .current_dir(folder);
    command.args(["--quiet", "--variant=minbase", "--format=null", mode]);
    command
        .arg(format!("--include={PACKAGES}"))
        .arg(format!("--customize-hook={}", hook(&tree)));
    command.args([
        "--aptopt=Acquire::Retries \"3\"",
        "--aptopt=Acquire::Languages \"none\"",
    ]);
    for left_out in [
        "/usr/share/doc/*",
        "/usr/share/man/*",
        "/usr/share/locale/*",
        "/usr/share/info/*",
    ] {
        command.arg(format!("--dpkgopt=path-exclude={left_out}"));
    }
    command
        .arg(apt.codename())
        .arg("/dev/null")
        .arg(apt.sources_file());
    run(&mut command, "mmdebstrap").map(drop).map_err(explained)
}

/// What mmdebstrap says where the kernel makes no user namespace or maps nobody into it.
const NO_NAMESPACE: [&str; 3] = [
    "unshare syscall failed",
    "unshare() failed",
    "write to uid_map failed",
];

/// mmdebstrap's words on a user who is not in `/etc/subuid`, or may make no user namespace, do not say what to do.
fn explained(error: Error) -> Error {
    let Error::Command { status, stderr, .. } = error else {
        return error;
    };
    if stderr.contains("/etc/subuid") {
        Error::NoSubordinateIds(stderr)
    } else if NO_NAMESPACE.iter().any(|words| stderr.contains(words)) {
        Error::NoUserNamespaces(stderr)
    } else {
        Error::Command {
            command: "mmdebstrap".to_owned(),
            status,
            stderr,
        }
    }
}

/// Makes the file system, as the image that is open as fd 3, from the tree in `$1`.
fn hook(tree: &Tree) -> String {
    let make = format!("mke2fs {} -d", disk::EXT4_OPTIONS.join(" "));
    match tree {
        // A plain bind mount shows the tree without the kernel's file systems mounted in it. A root who may not mount,
        // as in a container, has none mounted.
        Tree::Mounted => format!(
            "tree=\"$(mktemp -d)\" && if mount --bind \"$1\" \"$tree\"; then \
             {make} \"$tree\" /proc/self/fd/3 && umount \"$tree\"; \
             else [ ! -e \"$1/proc/self\" ] && {make} \"$1\" /proc/self/fd/3; fi && rmdir \"$tree\""
        ),
        Tree::Plain => format!("{make} \"$1\" /proc/self/fd/3"),
    }
}

/// Whether the kernel's file systems are mounted in the tree when the hook runs.
enum Tree {
    Mounted,
    Plain,
}

/// How mmdebstrap stands in for root here.
fn mode() -> (&'static str, Tree) {
    if nix::unistd::geteuid().is_root() {
        ("--mode=root", Tree::Mounted)
    } else if Path::new("/usr/bin/newuidmap").exists() {
        ("--mode=unshare", Tree::Mounted)
    } else {
        ("--mode=fakechroot", Tree::Plain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn whoever_lacks_subordinate_ids_or_namespaces_is_told_how_to_get_some() {
        let complaint = |words: &str| {
            let script = format!("echo '{words}' >&2; exit 25");
            let error = run(Command::new("sh").args(["-c", &script]), "dash").unwrap_err();
            explained(error).to_string()
        };
        let text = complaint("E: failed to parse /etc/subuid and /etc/subgid");
        assert!(text.contains("usermod --add-subuids"), "{text}");
        for words in NO_NAMESPACE {
            let text = complaint(&format!("E: {words}: Operation not permitted"));
            assert!(text.contains("sysctl user.max_user_namespaces"), "{text}");
        }
        let text = complaint("E: disk full");
        assert!(
            text.starts_with("mmdebstrap failed") && text.ends_with("E: disk full"),
            "{text}"
        );
    }

    #[test]
    fn a_root_who_may_not_mount_makes_the_file_system_all_the_same() {
        let scratch = tempfile::tempdir().unwrap();
        let path = |name: &str| scratch.path().join(name);
        for folder in ["bin", "tree", "a b"] {
            std::fs::create_dir(path(folder)).unwrap();
        }
        std::fs::write(path("bin/mount"), "#!/bin/sh\nexit 1\n").unwrap();
        std::fs::set_permissions(path("bin/mount"), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::write(path("tree/hello"), "content").unwrap();
        std::fs::File::create(path("raw"))
            .unwrap()
            .set_len(8 << 20)
            .unwrap();
        let make = || {
            let search = format!("{}:$PATH", path("bin").display());
            let script = format!("exec 3<>raw; PATH=\"{search}\"; {}", hook(&Tree::Mounted));
            let mut shell = Command::new("sh");
            shell.args(["-c", &script, "sh"]).arg(path("tree"));
            shell.current_dir(scratch.path()).env("TMPDIR", path("a b"));
            run(&mut shell, "dash")
        };
        make().unwrap();
        let mut cat = Command::new("debugfs");
        let content = run(cat.args(["-R", "cat /hello"]).arg(path("raw")), "e2fsprogs").unwrap();
        assert_eq!(content, b"content");
        assert_eq!(std::fs::read_dir(path("a b")).unwrap().count(), 0);
        // With /proc in the tree the file system would hold that as well.
        std::fs::create_dir_all(path("tree/proc/self")).unwrap();
        assert!(make().is_err());
    }
}
