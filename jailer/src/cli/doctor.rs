//! `bulkhead doctor`: what this host lacks, and the command that mends it.

use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Uid;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;
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
        user_namespaces(),
        landlock(),
        tun(),
        run_time_folder(),
        huge_pages(),
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
    let list = fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    if list.contains("landlock") {
        Finding::good(name, "on")
    } else {
        Finding::bad(
            name,
            Level::Note,
            "not seen in /sys/kernel/security/lsm; the empty root and seccomp stand without it",
            "",
        )
    }
}

fn tun() -> Finding {
    match open_device("/dev/net/tun") {
        Ok(()) => Finding::good("tun", "/dev/net/tun can be opened"),
        Err(e) => Finding::bad(
            "tun",
            Level::Note,
            format!("/dev/net/tun: {e}: no NIC but vhost-user="),
            "sudo modprobe tun && sudo chmod 0666 /dev/net/tun",
        ),
    }
}

fn run_time_folder() -> Finding {
    let name = "run-time folder";
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(folder) if Path::new(&folder).is_dir() => Finding::good(name, "XDG_RUNTIME_DIR is set"),
        _ => Finding::good(
            name,
            format!("/tmp/bulkhead-{} (XDG_RUNTIME_DIR is not set)", Uid::effective()),
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
