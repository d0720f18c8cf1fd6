//! `bulkhead doctor`: what this host lacks, and the command that mends it.

mod namespaces;
mod net;
#[cfg(test)]
mod tests;

use crate::launch::kvm::{remedy, try_open};
use crate::launch::spawn::{installed, unopened};
use crate::launch::{self, identity};
use crate::sandbox::cgroup::{CgroupError, Place};
use crate::sandbox::landlock_level;
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
    mend: String,
}

impl Finding {
    fn good(name: &'static str, what: impl Into<String>) -> Self {
        Self {
            name,
            level: Level::Good,
            what: what.into(),
            mend: String::new(),
        }
    }

    fn bad(name: &'static str, level: Level, what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            name,
            level,
            what: what.into(),
            mend: mend.into(),
        }
    }
}

/// Examines the host; the text, and the exit code (1 when something needed is missing).
pub(super) fn examine(json: bool) -> (String, u8) {
    let findings = [
        kvm(try_open().map(drop)),
        kvm_kind(
            ["kvm_intel", "kvm_amd", "kvm_pvm"]
                .into_iter()
                .find(|module| Path::new("/sys/module").join(module).exists()),
        ),
        programs(),
        open_files(),
        user_namespaces(
            namespaces::usable(),
            setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
        ),
        identity(identity::describe(&installed())),
        landlock(landlock_level()),
        cgroups(
            Place::find("doctor").map(|place| place.missing()),
            Uid::effective().is_root(),
        ),
        cpu(),
        siblings(setting("/sys/devices/system/cpu/smt/active")),
        tun(open_device("/dev/net/tun")),
        net::private_bridge(),
        net::passt(),
        net::host_bridge(),
        run_time_folder(),
        rings(setting("/proc/sys/kernel/io_uring_disabled")),
        huge_pages(setting("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")),
        transparent_huge_pages(setting("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
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

/// What a file of the kernel's says; `None`: this kernel has none.
fn setting(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

fn kvm(opened: io::Result<()>) -> Finding {
    match opened {
        Ok(()) => Finding::good("kvm", "/dev/kvm can be opened"),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            Finding::bad("kvm", Level::Missing, "/dev/kvm is not permitted", remedy())
        }
        Err(e) => Finding::bad(
            "kvm",
            Level::Missing,
            format!("/dev/kvm: {e}"),
            "sudo modprobe kvm_intel || sudo modprobe kvm_amd; without hardware: cargo demo",
        ),
    }
}

fn kvm_kind(module: Option<&str>) -> Finding {
    let name = "kvm kind";
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

/// From whether they could be made and used, and AppArmor's sysctl.
fn user_namespaces(usable: bool, apparmor: Option<String>) -> Finding {
    let name = "user namespaces";
    let (what, mend) = match apparmor.as_deref() {
        _ if usable => return Finding::good(name, "can be made"),
        Some("1") => (
            "AppArmor restricts them",
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        _ => (
            "cannot be made by this user (a chroot forbids them, too)",
            "sudo sysctl user.max_user_namespaces=15000 kernel.unprivileged_userns_clone=1",
        ),
    };
    Finding::bad(name, Level::Missing, what, mend)
}

/// Whom a VM's processes would be.
fn identity(words: String) -> Finding {
    let name = "identity";
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

fn landlock(level: Option<u32>) -> Finding {
    let name = "landlock";
    let lack = match level {
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

/// Whether a spec's limits could be kept, by the controllers that are missing.
fn cgroups(missing: Result<Vec<&'static str>, CgroupError>, root: bool) -> Finding {
    let name = "cgroup v2";
    let lack = match missing {
        Ok(missing) if missing.is_empty() => return Finding::good(name, "limits can be set"),
        Ok(missing) => format!("no limits on {}", missing.join(", ")),
        Err(error) => error.to_string(),
    };
    let mend = if root {
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
fn siblings(smt: Option<String>) -> Finding {
    let name = "core siblings";
    match smt.as_deref() {
        Some("1") => Finding::bad(
            name,
            Level::Note,
            "cores have siblings, which other guests may run on",
            "core-scheduling = true in the spec's [limits], or echo off > /sys/devices/system/cpu/smt/control",
        ),
        _ => Finding::good(name, "none"),
    }
}

fn tun(opened: io::Result<()>) -> Finding {
    match opened {
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
        Some(set) => match launch::no_runtime_dir(&set) {
            None => Finding::good(name, format!("{folder}")),
            Some(why) => Finding::bad(
                name,
                Level::Note,
                format!("{folder}, since XDG_RUNTIME_DIR {why}: {}", set.display()),
                "set it to a folder of yours, by its whole path",
            ),
        },
    }
}

/// Whether disk processes may have an io_uring, from the sysctl; kernels before 6.6 lack it, and have rings.
fn rings(setting: Option<String>) -> Finding {
    let name = "io_uring";
    match setting.as_deref().unwrap_or("0") {
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

fn huge_pages(count: Option<String>) -> Finding {
    match count {
        Some(count) if count != "0" => Finding::good("huge pages", format!("{count} of 2M")),
        _ => Finding::bad(
            "huge pages",
            Level::Note,
            "none reserved: huge-pages cannot be used",
            "sudo sysctl vm.nr_hugepages=256",
        ),
    }
}

/// Whether guest RAM, which is shared memory, may get huge pages as it is touched.
fn transparent_huge_pages(setting: Option<String>) -> Finding {
    let name = "transparent huge pages";
    let setting = setting.unwrap_or_default();
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
