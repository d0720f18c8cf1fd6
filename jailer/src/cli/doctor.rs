//! `bulkhead doctor`: what this host lacks, and the command that mends it.

mod net;

use crate::launch::spawn::{installed, unopened};
use crate::launch::{self, identity};
use crate::sandbox::cgroup::Place;
use crate::sandbox::landlock_level;
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Uid;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use vm_spec::control::exit_code;

/// How a check came out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Level {
    Good,
    /// Something works less well, or one way of several does not.
    Note,
    /// `bulkhead run` cannot work.
    Missing,
}

struct Finding {
    name: &'static str,
    level: Level,
    what: String,
    mend: &'static str,
}

impl Finding {
    fn good(name: &'static str, what: impl Into<String>) -> Self {
        Self {
            name,
            level: Level::Good,
            what: what.into(),
            mend: "",
        }
    }

    fn bad(name: &'static str, level: Level, what: impl Into<String>, mend: &'static str) -> Self {
        Self {
            name,
            level,
            what: what.into(),
            mend,
        }
    }
}

/// Examines the host; the text, and the exit code (1 when something needed is missing).
pub(super) fn examine(json: bool) -> (String, u8) {
    let findings = [
        kvm(),
        kvm_kind(),
        programs(),
        open_files(),
        user_namespaces(),
        identity(),
        landlock(),
        cgroups(),
        cpu(),
        siblings(),
        tun(),
        net::private_bridge(),
        net::passt(),
        net::host_bridge(),
        run_time_folder(),
        rings(
            fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
                .ok()
                .as_deref(),
        ),
        huge_pages(),
        transparent_huge_pages(),
    ];
    let missing = findings.iter().any(|f| f.level == Level::Missing);
    let text = if json {
        to_json(&findings)
    } else {
        to_text(&findings)
    };
    (text, if missing { exit_code::ERROR } else { 0 })
}

fn to_text(findings: &[Finding]) -> String {
    let mut out = String::new();
    for f in findings {
        let mark = match f.level {
            Level::Good => "ok     ",
            Level::Note => "note   ",
            Level::Missing => "MISSING",
        };
        let _ = writeln!(out, "{mark} {}: {}", f.name, f.what);
        if !f.mend.is_empty() {
            let _ = writeln!(out, "        mend: {}", f.mend);
        }
    }
    out
}

fn to_json(findings: &[Finding]) -> String {
    let all: Vec<_> = findings
        .iter()
        .map(|f| {
            serde_json::json!({
                "name": f.name,
                "level": format!("{:?}", f.level).to_lowercase(),
                "what": f.what,
                "mend": f.mend,
            })
        })
        .collect();
    format!("{:#}\n", serde_json::Value::Array(all))
}

fn open_device(path: &str) -> io::Result<()> {
    OpenOptions::new().read(true).write(true).open(path).map(drop)
}

fn kvm() -> Finding {
    match open_device("/dev/kvm") {
        Ok(()) => Finding::good("kvm", "/dev/kvm can be opened"),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Finding::bad(
            "kvm",
            Level::Missing,
            "/dev/kvm is not permitted",
            "sudo usermod -aG kvm \"$USER\", then log in again",
        ),
        Err(e) => Finding::bad(
            "kvm",
            Level::Missing,
            format!("/dev/kvm: {e}"),
            "sudo modprobe kvm_intel || sudo modprobe kvm_amd; without hardware: cargo demo",
        ),
    }
}

fn kvm_kind() -> Finding {
    let name = "kvm kind";
    let module = ["kvm_intel", "kvm_amd", "kvm_pvm"]
        .into_iter()
        .find(|module| Path::new("/sys/module").join(module).exists());
    match module {
        Some("kvm_pvm") => Finding::bad(
            name,
            Level::Note,
            "software KVM (kvm_pvm): tiny guests only, no stock Linux kernel",
            "cargo demo runs stock kernels in the nested runner",
        ),
        Some(module) => Finding::good(name, format!("hardware ({module})")),
        None => Finding::bad(name, Level::Note, "no KVM module that is known", ""),
    }
}

fn programs() -> Finding {
    let name = "programs";
    match &*unopened() {
        [] => Finding::good(name, "all of them can be opened"),
        missing => Finding::bad(
            name,
            Level::Missing,
            missing.join(", "),
            "install all of Bulkhead's binaries in one folder (cargo install-bulkhead)",
        ),
    }
}

fn open_files() -> Finding {
    let name = "open files";
    match launch::too_few_open_files() {
        None => Finding::good(name, "their limit is high enough"),
        Some(too_few) => Finding::bad(name, Level::Missing, too_few, launch::MORE_OPEN_FILES),
    }
}

/// Tries it in a process of its own: the launcher itself stays outside.
fn user_namespaces() -> Finding {
    let name = "user namespaces";
    match namespaces_in_child() {
        Ok(true) => Finding::good(name, "can be made"),
        Ok(false) | Err(_) => Finding::bad(
            name,
            Level::Missing,
            if restricted_by_apparmor() {
                "AppArmor restricts them"
            } else {
                "cannot be made by this user (a chroot forbids them, too)"
            },
            if restricted_by_apparmor() {
                "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
            } else {
                "sudo sysctl user.max_user_namespaces=15000 kernel.unprivileged_userns_clone=1"
            },
        ),
    }
}

/// Whom a VM's processes would be.
fn identity() -> Finding {
    let name = "identity";
    let words = identity::describe(&installed());
    match words.starts_with("each process") {
        true => Finding::good(name, words),
        false => Finding::bad(
            name,
            Level::Note,
            words,
            "sudo apt-get install uidmap && sudo usermod --add-subuids 100000-165535 --add-subgids \
             100000-165535 \"$USER\"",
        ),
    }
}

fn restricted_by_apparmor() -> bool {
    fs::read_to_string("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
        .is_ok_and(|text| text.trim() == "1")
}

#[expect(unsafe_code, reason = "a fork to try namespaces in")]
fn namespaces_in_child() -> nix::Result<bool> {
    // SAFETY: this process has one thread; the child makes two calls and leaves.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => {
            let all = CloneFlags::CLONE_NEWUSER
                | CloneFlags::CLONE_NEWNS
                | CloneFlags::CLONE_NEWPID
                | CloneFlags::CLONE_NEWNET
                | CloneFlags::CLONE_NEWIPC
                | CloneFlags::CLONE_NEWUTS
                | CloneFlags::CLONE_NEWCGROUP;
            let code = i32::from(unshare(all).is_err());
            // SAFETY: leaves without running what the parent registered.
            unsafe { libc::_exit(code) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            Ok(waitpid(child, None)? == WaitStatus::Exited(child, 0))
        }
    }
}

fn landlock() -> Finding {
    let name = "landlock";
    let lack = match landlock_level() {
        Some(level @ 6..) => return Finding::good(name, format!("level {level}")),
        Some(level) => format!("level {level}: signals and abstract sockets are denied from 6 on"),
        None => "none".to_owned(),
    };
    Finding::bad(
        name,
        Level::Note,
        format!("{lack}; the empty root, namespaces and seccomp stand without it"),
        "",
    )
}

/// Whether a spec's limits could be kept; looks, and makes nothing.
fn cgroups() -> Finding {
    let name = "cgroup v2";
    let lack = match Place::find("doctor").map(|place| place.missing()) {
        Ok(missing) if missing.is_empty() => return Finding::good(name, "limits can be set"),
        Ok(missing) => format!("no limits on {}", missing.join(", ")),
        Err(error) => error.to_string(),
    };
    let mend = if Uid::effective().is_root() {
        "boot with systemd.unified_cgroup_hierarchy=1, or cgroup_no_v1=all"
    } else {
        "systemd-run --user --scope -p Delegate=yes bulkhead run ..."
    };
    Finding::bad(
        name,
        Level::Note,
        format!("{lack}: [limits] in a spec cannot be kept"),
        mend,
    )
}

/// What the kernel says of each flaw that it knows of.
fn cpu() -> Finding {
    let name = "cpu mitigations";
    let mut open = Vec::new();
    for entry in fs::read_dir("/sys/devices/system/cpu/vulnerabilities")
        .into_iter()
        .flatten()
    {
        let Ok(entry) = entry else { continue };
        let state = fs::read_to_string(entry.path()).unwrap_or_default();
        if state.starts_with("Vulnerable") {
            open.push(format!(
                "{} ({})",
                entry.file_name().to_string_lossy(),
                state.trim()
            ));
        }
    }
    if open.is_empty() {
        return Finding::good(name, "the kernel reports no open flaw");
    }
    open.sort();
    Finding::bad(
        name,
        Level::Note,
        format!("open: {}", open.join(", ")),
        "update the kernel and microcode; boot without mitigations=off",
    )
}

/// Siblings of one core share more than memory.
fn siblings() -> Finding {
    let name = "core siblings";
    let smt = fs::read_to_string("/sys/devices/system/cpu/smt/active").unwrap_or_default();
    match smt.trim() {
        "1" => Finding::bad(
            name,
            Level::Note,
            "cores have siblings, which other guests may run on",
            "core-scheduling = true in the spec's [limits], or echo off > /sys/devices/system/cpu/smt/control",
        ),
        _ => Finding::good(name, "none"),
    }
}

fn tun() -> Finding {
    match open_device("/dev/net/tun") {
        Ok(()) => Finding::good("tun", "/dev/net/tun can be opened"),
        Err(e) => Finding::bad(
            "tun",
            Level::Note,
            format!("/dev/net/tun: {e}: no NIC but user (with a passt that has vhost-user) and vhost-user="),
            "sudo modprobe tun && sudo chmod 0666 /dev/net/tun",
        ),
    }
}

fn run_time_folder() -> Finding {
    let name = "run-time folder";
    let [folder, _] = launch::run_places();
    let folder = folder.display();
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        None => Finding::good(name, format!("{folder} (XDG_RUNTIME_DIR is not set)")),
        Some(set) if set.is_absolute() && set.is_dir() => Finding::good(name, format!("{folder}")),
        Some(set) => Finding::bad(
            name,
            Level::Note,
            format!("{folder}, since XDG_RUNTIME_DIR is no folder: {}", set.display()),
            "set it to a folder of yours, by its whole path",
        ),
    }
}

/// Whether disk processes may have an io_uring, from the sysctl; kernels before 6.6 lack it, and have rings.
fn rings(setting: Option<&str>) -> Finding {
    let name = "io_uring";
    match setting.map_or("0", str::trim) {
        "0" => Finding::good(
            name,
            "allowed: disks read many blocks at once of what is not in memory",
        ),
        disabled => Finding::bad(
            name,
            Level::Note,
            format!("kernel.io_uring_disabled is {disabled}: a disk's queue waits for one block at a time"),
            "sudo sysctl kernel.io_uring_disabled=0",
        ),
    }
}

fn huge_pages() -> Finding {
    let count = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages");
    match count.map(|text| text.trim().to_owned()) {
        Ok(count) if count != "0" => Finding::good("huge pages", format!("{count} of 2M")),
        _ => Finding::bad(
            "huge pages",
            Level::Note,
            "none reserved: huge-pages cannot be used",
            "sudo sysctl vm.nr_hugepages=256",
        ),
    }
}

/// Whether guest RAM, which is shared memory, may get huge pages as it is touched.
fn transparent_huge_pages() -> Finding {
    const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let name = "transparent huge pages";
    let setting = fs::read_to_string(SETTING).unwrap_or_default();
    // The one in brackets is in force.
    let in_force = setting.split(['[', ']']).nth(1).unwrap_or("not offered");
    match in_force {
        "advise" | "within_size" | "always" | "force" => {
            Finding::good(name, format!("{in_force}: guest RAM gets them as it is touched"))
        }
        _ => Finding::bad(
            name,
            Level::Note,
            format!("{in_force}: guest RAM gets them below the kernel only, and faults once for each 4 KiB"),
            "echo advise | sudo tee /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_that_the_host_forbids_are_a_note() {
        let level = |setting| rings(setting).level;
        assert!(matches!(level(None), Level::Good), "an older kernel");
        assert!(matches!(level(Some("0\n")), Level::Good));
        for setting in ["1\n", "2\n"] {
            let finding = rings(Some(setting));
            assert!(matches!(finding.level, Level::Note), "{setting}");
            assert!(finding.what.contains(setting.trim()));
        }
    }
}
