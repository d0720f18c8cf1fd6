//! Installs the Debian packages that a command needs and the machine lacks.

mod apt;

use anyhow::{Context, bail};
use apt::AptGet;
use images::apt::sources_with_backports;
use nix::sys::stat::Mode;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use tempfile::TempDir;

/// A program and the package that has it.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// Looked for in the PATH and in the system's own folders.
    pub program: &'static str,
    /// The Debian package.
    pub package: &'static str,
}

const fn need(program: &'static str, package: &'static str) -> Need {
    Need { program, package }
}

/// What images and guests need everywhere.
const IMAGES: &[Need] = &[
    need("qemu-img", "qemu-utils"),
    need("mmdebstrap", "mmdebstrap"),
    need("mke2fs", "e2fsprogs"),
    need("ip", "iproute2"),
    // The static binaries' build: C libraries that the tests' own tools link.
    need("musl-gcc", "musl-tools"),
];
/// What an emulated machine needs: the nested runner, and QEMU as another front end.
const EMULATION: &[Need] = &[need("qemu-system-x86_64", "qemu-system-x86")];
/// What root needs to lend its device nodes to an unprivileged user.
const ROOT: &[Need] = &[need("setfacl", "acl")];
/// What an unprivileged user needs to stand in for root while a root file system is made.
const ROOTLESS: &[Need] = &[need("newuidmap", "uidmap")];
/// What only the tests need.
const TESTS: &[Need] = &[
    need("qemu-storage-daemon", "qemu-utils"),
    need("busybox", "busybox-static"),
    need("iasl", "acpica-tools"),
    need("passt", "passt"),
    need("newuidmap", "uidmap"),
    need("mkfs.xfs", "xfsprogs"),
    need("mkfs.btrfs", "btrfs-progs"),
];

/// What `bench iperf` measures with.
const IPERF: &[Need] = &[need("iperf3", "iperf3"), need("ip", "iproute2")];

/// What libFuzzer is compiled with.
const FUZZING: &[Need] = &[need("c++", "g++")];

/// What is installed for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// The demo on a KVM that runs stock kernels.
    Demo,
    /// The demo in the nested runner.
    NestedDemo,
    /// Every test.
    Tests,
    /// `cargo fuzz-all`.
    Fuzzing,
    /// `bench iperf`.
    Iperf,
}

/// Installs what is missing for `purpose`, and says so first. As an ordinary user it asks sudo.
///
/// # Errors
/// apt-get is missing, fails, or the packages do not have the programs.
pub fn install_missing(purpose: Purpose) -> anyhow::Result<()> {
    let needs = needs(purpose);
    let mut packages: Vec<&str> = needs
        .iter()
        .filter(|need| !installed(need.program))
        .map(|need| need.package)
        .collect();
    packages.sort_unstable();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    install(&packages)?;
    let still = needs.iter().find(|need| !installed(need.program));
    still.map_or(Ok(()), |need| {
        bail!(
            "'{}' is still missing after installing {}",
            need.program,
            need.package
        )
    })
}

fn needs(purpose: Purpose) -> Vec<Need> {
    let mut needs = match purpose {
        Purpose::Fuzzing => return FUZZING.to_vec(),
        Purpose::Iperf => return [IPERF, EMULATION].concat(),
        Purpose::Demo => IMAGES.to_vec(),
        Purpose::NestedDemo => [IMAGES, EMULATION].concat(),
        Purpose::Tests => [IMAGES, EMULATION, TESTS, FUZZING].concat(),
    };
    needs.extend(if nix::unistd::geteuid().is_root() {
        ROOT
    } else {
        ROOTLESS
    });
    needs
}

/// Others may read what is made, since unprivileged users run it, and may not write it.
pub fn usual_umask() {
    nix::sys::stat::umask(Mode::S_IWGRP | Mode::S_IWOTH);
}

fn installed(program: &str) -> bool {
    std::env::split_paths(&images::search_path()).any(|folder| folder.join(program).is_file())
}

fn install(packages: &[&str]) -> anyhow::Result<()> {
    eprintln!("installing Debian packages: {}", packages.join(" "));
    let backports = match backports_suite() {
        Some(suite) if packages.iter().any(|package| package.starts_with("qemu-")) => {
            eprintln!("from {suite}, where the installed qemu-utils comes from");
            Some(Backports::new(suite)?)
        }
        _ => None,
    };
    let options = backports.as_ref().map_or_else(Vec::new, Backports::options);
    let with = |rest: &[&str]| -> Vec<String> {
        let rest = rest.iter().map(|argument| (*argument).to_owned());
        options.iter().cloned().chain(rest).collect()
    };
    let mut install = with(&["install", "-y", "-q", "--no-install-recommends"]);
    install.extend(packages.iter().map(|package| (*package).to_owned()));
    let by_hand = match &backports {
        None => format!("apt-get install {}", packages.join(" ")),
        Some(from) => format!(
            "apt-get install -t {} {} (with that suite among apt's sources)",
            from.suite,
            packages.join(" ")
        ),
    };
    let by_hand = format!("as root, run: apt-get update && {by_hand}");
    let root = nix::unistd::geteuid().is_root();
    if !installed("apt-get") {
        bail!("there is no apt-get: this needs Debian");
    }
    if !root && !installed("sudo") {
        bail!("you are not root and there is no sudo: {by_hand}");
    }
    let apt = AptGet::new(root);
    // One source of many may be gone while the others have what is needed.
    if let Err(error) = apt.update(&with(&["update", "-q"])) {
        eprintln!("{error:#}");
    }
    apt.install(&install).context(by_hand)
}

/// Sources of the release with its backports, for one call of apt: the machine's own need not
/// name that suite, and are left as they are.
struct Backports {
    suite: String,
    folder: TempDir,
}

impl Backports {
    fn new(suite: String) -> anyhow::Result<Self> {
        let sources = sources_with_backports().context("apt has no source of this Debian release")?;
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("bulkhead.sources"), sources)?;
        // apt reads it as a user of its own.
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
        Ok(Self { suite, folder })
    }

    fn options(&self) -> Vec<String> {
        let folder = self.folder.path().display();
        [
            format!("Dir::Etc::SourceParts={folder}"),
            "Dir::Etc::SourceList=/dev/null".to_owned(),
            // The lists of sources that this call does not name stay.
            "APT::Get::List-Cleanup=0".to_owned(),
            format!("APT::Default-Release={}", self.suite),
        ]
        .map(|option| format!("-o{option}"))
        .to_vec()
    }
}

/// The backports suite if the installed qemu-utils is from there: QEMU's packages of two suites
/// cannot be mixed.
fn backports_suite() -> Option<String> {
    let query = ["-W", "-f", "${Version}", "qemu-utils"];
    let version = Command::new("dpkg-query").args(query).output().ok()?;
    let backport = String::from_utf8_lossy(&version.stdout).contains("~bpo");
    let release = std::fs::read_to_string("/etc/os-release").ok()?;
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    backport.then(|| format!("{}-backports", codename.trim_matches('"')))
}
