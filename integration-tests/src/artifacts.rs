//! The binaries that tests run: found in a folder, or built.
//!
//! `BULKHEAD_BIN_DIR` names a folder that holds every one of them under its own name (where
//! there is no compiler, as in the nested tier); without it cargo builds them: ours as static
//! musl binaries, the guests for no operating system at all.

use serde_json::Value;
use std::{
    collections::BTreeMap,
    env,
    fs::{self, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The folder with every artifact; see the module's text.
pub const BIN_DIR: &str = "BULKHEAD_BIN_DIR";
/// `release` builds with that profile; unset or `dev` with cargo's default.
pub const PROFILE: &str = "BULKHEAD_PROFILE";

/// Where there is no compiler: the folder with the audit's probes.
pub const PROBES: &str = "BULKHEAD_PROBES_DIR";
/// The programs that have a form with attacks in it.
pub const PROBE_NAMES: [&str; 4] = [
    "bulkhead-vmm",
    "bulkhead-supervisor",
    "vhost-user-blk",
    "vhost-user-net",
];

const MUSL: &str = "x86_64-unknown-linux-musl";
const BARE_METAL: &str = "x86_64-unknown-none";

/// A file that tests execute or boot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Artifact {
    /// Launcher and spawner.
    Bulkhead,
    /// The supervisor.
    Supervisor,
    /// The KVM process.
    Vmm,
    /// The disk process.
    VhostUserBlk,
    /// The jailed half of `bulkhead image`.
    ImageTool,
    /// The disk process that dies or hangs where a test wants it to.
    FaultyBlk,
    /// The NIC process.
    VhostUserNet,
    /// A block back end built on the crate `vhost-user-backend`, the second opinion.
    ReferenceBlk,
    /// The bare KVM program that launches are measured against.
    Floor,
    /// The tiny guest with its scenarios (PVH ELF).
    TinyGuest,
    /// The guest that writes one byte (PVH ELF).
    TinyByte,
}

impl Artifact {
    /// Every artifact.
    pub const ALL: [Self; 11] = [
        Self::Bulkhead,
        Self::Supervisor,
        Self::Vmm,
        Self::VhostUserBlk,
        Self::ImageTool,
        Self::FaultyBlk,
        Self::VhostUserNet,
        Self::ReferenceBlk,
        Self::Floor,
        Self::TinyGuest,
        Self::TinyByte,
    ];

    /// The file's name in `BULKHEAD_BIN_DIR`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bulkhead => "bulkhead",
            Self::Supervisor => "bulkhead-supervisor",
            Self::Vmm => "bulkhead-vmm",
            Self::VhostUserBlk => "vhost-user-blk",
            Self::ImageTool => "bulkhead-image",
            Self::FaultyBlk => "vhost-user-blk-faults",
            Self::VhostUserNet => "vhost-user-net",
            Self::ReferenceBlk => "reference-blk",
            Self::Floor => "floor",
            Self::TinyGuest => "tiny-guest",
            Self::TinyByte => "tiny-byte",
        }
    }
}

/// Cargo's profile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Profile {
    /// Fast to build.
    Dev,
    /// What is shipped and measured.
    Release,
}

impl Profile {
    /// What `BULKHEAD_PROFILE` says.
    ///
    /// # Errors
    /// [`ArtifactError::Profile`] for another name.
    pub fn from_environment() -> Result<Self, ArtifactError> {
        match env::var(PROFILE).as_deref() {
            Err(_) | Ok("" | "dev") => Ok(Self::Dev),
            Ok("release") => Ok(Self::Release),
            Ok(other) => Err(ArtifactError::Profile(other.to_owned())),
        }
    }
}

/// Why the binaries are not there.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// The profile's name is unknown.
    #[error("{PROFILE}={0} is neither dev nor release")]
    Profile(String),
    /// An artifact is not in the folder.
    #[error("{} is missing (build with cargo, or set {BIN_DIR} to a folder that has it)", .0.display())]
    Missing(PathBuf),
    /// A program could not be started.
    #[error("cannot run {program}")]
    Spawn {
        /// The program.
        program: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Cargo or rustup failed; its own message is on stderr.
    #[error("{0} failed")]
    Failed(String),
    /// Cargo did not name this artifact among what it built.
    #[error("cargo built no {0}")]
    NotBuilt(&'static str),
    /// A file could not be copied.
    #[error("cannot copy {} to {}", .from.display(), .to.display())]
    Copy {
        /// What.
        from: PathBuf,
        /// Where to.
        to: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Where each artifact is.
#[derive(Clone, Debug)]
pub struct Artifacts {
    paths: BTreeMap<Artifact, PathBuf>,
}

impl Artifacts {
    /// From `BULKHEAD_BIN_DIR`, or else built with the profile that `BULKHEAD_PROFILE` names.
    ///
    /// # Errors
    /// Any [`ArtifactError`].
    pub fn locate() -> Result<Self, ArtifactError> {
        match env::var_os(BIN_DIR) {
            Some(dir) => Ok(Self::from_dir(Path::new(&dir))),
            None => Self::build(Profile::from_environment()?),
        }
    }

    /// From a folder; what it lacks is missed when it is asked for.
    #[must_use]
    pub fn from_dir(dir: &Path) -> Self {
        let paths = Artifact::ALL.map(|artifact| (artifact, dir.join(artifact.name())));
        Self {
            paths: paths.into_iter().collect(),
        }
    }

    /// Builds all of them with cargo; its messages go to stderr. Missing Rust targets are
    /// installed with rustup.
    ///
    /// # Errors
    /// Any [`ArtifactError`].
    pub fn build(profile: Profile) -> Result<Self, ArtifactError> {
        ensure_targets()?;
        let mut built = BTreeMap::new();
        // One call a group: cargo unifies features within a call, and only the launcher may
        // link the launcher's part of the jail.
        let groups: [(&str, &[&str]); 5] = [
            (MUSL, &["-p", "jailer"]),
            (
                MUSL,
                &[
                    "-p",
                    "bulkhead-vmm",
                    "-p",
                    "vhost-user-blk",
                    "-p",
                    "vhost-user-net",
                ],
            ),
            (
                MUSL,
                &[
                    "-p",
                    "integration-tests",
                    "--bin",
                    "floor",
                    "--bin",
                    "reference-blk",
                ],
            ),
            (
                MUSL,
                &[
                    "-p",
                    "vhost-user-blk",
                    "--features",
                    "faults",
                    "--bin",
                    "vhost-user-blk-faults",
                ],
            ),
            (BARE_METAL, &["-p", "tiny-guest"]),
        ];
        for (target, packages) in groups {
            cargo_build(profile, target, packages, &mut built)?;
        }
        let mut paths = BTreeMap::new();
        for artifact in Artifact::ALL {
            let path = built
                .remove(artifact.name())
                .ok_or(ArtifactError::NotBuilt(artifact.name()))?;
            paths.insert(artifact, path);
        }
        Ok(Self { paths })
    }

    /// Where `artifact` is.
    ///
    /// # Errors
    /// [`ArtifactError::Missing`].
    pub fn path(&self, artifact: Artifact) -> Result<&Path, ArtifactError> {
        let path = &self.paths[&artifact];
        if path.is_file() {
            Ok(path)
        } else {
            Err(ArtifactError::Missing(path.clone()))
        }
    }

    /// Copies all of them into `dir`, for a place where `BULKHEAD_BIN_DIR` will name it.
    ///
    /// # Errors
    /// [`ArtifactError::Copy`].
    pub fn copy_to(&self, dir: &Path) -> Result<(), ArtifactError> {
        for (artifact, from) in &self.paths {
            let to = dir.join(artifact.name());
            copy_for_all(from, &to).map_err(|source| ArtifactError::Copy {
                from: from.clone(),
                to: to.clone(),
                source,
            })?;
        }
        Ok(())
    }
}

/// With these permissions any user can do what the owner can, but write.
#[must_use]
pub fn mode_for_all(mode: u32) -> u32 {
    let owners = mode & 0o500;
    mode | owners >> 3 | owners >> 6
}

/// Copies a file so that any user can read it, or run it, whatever the umask was when it was made.
///
/// # Errors
/// The file system's.
pub fn copy_for_all(from: &Path, to: &Path) -> io::Result<()> {
    fs::copy(from, to)?;
    let mode = fs::metadata(to)?.permissions().mode();
    fs::set_permissions(to, Permissions::from_mode(mode_for_all(mode)))
}

/// Builds each role's program with the audit's attacks in it, below `target`, and returns their
/// folder. A folder of their own: nothing may take them for what is shipped.
///
/// # Errors
/// [`ArtifactError::Failed`] with cargo's own message on stderr.
pub fn build_probes(target: &Path) -> Result<PathBuf, ArtifactError> {
    let mut command = Command::new(cargo());
    command
        .current_dir(workspace())
        .args(["build", "--quiet", "--target", MUSL])
        .args(["-p", "jailer", "-p", "bulkhead-vmm"])
        .args(["-p", "vhost-user-blk", "-p", "vhost-user-net"])
        .args(["--no-default-features", "--features", "jailer/probe"])
        .arg("--target-dir")
        .arg(target);
    run(command)?;
    Ok(target.join(MUSL).join("debug"))
}

/// The workspace's folder, as it was when this was compiled.
#[must_use]
pub fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn cargo() -> String {
    env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

fn run(mut command: Command) -> Result<Vec<u8>, ArtifactError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|source| ArtifactError::Spawn {
            program: program.clone(),
            source,
        })?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(ArtifactError::Failed(program))
    }
}

/// Adds the targets where rustup manages the toolchain; elsewhere cargo's own error names what
/// is missing.
pub(crate) fn ensure_targets() -> Result<(), ArtifactError> {
    let mut list = Command::new("rustup");
    list.current_dir(workspace())
        .args(["target", "list", "--installed"]);
    let Ok(installed) = run(list) else {
        return Ok(());
    };
    let installed = String::from_utf8_lossy(&installed);
    for target in [MUSL, BARE_METAL] {
        if !installed.lines().any(|line| line == target) {
            let mut add = Command::new("rustup");
            add.current_dir(workspace()).args(["target", "add", target]);
            run(add)?;
        }
    }
    Ok(())
}

/// Runs `cargo build` and adds each executable that it names to `built`, by name.
fn cargo_build(
    profile: Profile,
    target: &str,
    packages: &[&str],
    built: &mut BTreeMap<String, PathBuf>,
) -> Result<(), ArtifactError> {
    let mut command = Command::new(cargo());
    command
        .current_dir(workspace())
        .args([
            "build",
            "--quiet",
            "--message-format=json-render-diagnostics",
            "--target",
            target,
        ])
        .args(packages);
    if profile == Profile::Release {
        command.arg("--release");
    }
    let messages = run(command)?;
    for line in messages.split(|byte| *byte == b'\n') {
        let Ok(message) = serde_json::from_slice::<Value>(line) else {
            continue;
        };
        let name = message["target"]["name"].as_str();
        if let (Some(name), Some(executable)) = (name, message["executable"].as_str()) {
            built.insert(name.to_owned(), PathBuf::from(executable));
        }
    }
    Ok(())
}
