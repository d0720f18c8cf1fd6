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

/// What one call of cargo builds: it unifies features within a call, and only the launcher may link the launcher's
/// part of the jail.
struct Group {
    target: &'static str,
    packages: &'static [&'static str],
    features: Option<&'static str>,
    artifacts: &'static [Artifact],
}

/// Packages whose features each call chooses, too, though it builds nothing of theirs unless an artifact is their own:
/// so what several calls need is the same and is compiled once. (The last one's is the derive of clap, which the
/// launcher has and the others do not: it changes the parser below every derive.)
const ALIGNED: &[&str] = &[
    "bulkhead-vmm",
    "vhost-user-blk",
    "vhost-user-net",
    "images",
    "integration-tests",
];

const SHIPPED: &[Group] = &[
    Group {
        target: MUSL,
        packages: &["jailer"],
        features: None,
        artifacts: &[Artifact::Bulkhead, Artifact::Supervisor],
    },
    Group {
        target: MUSL,
        packages: &[],
        features: None,
        artifacts: &[
            Artifact::Vmm,
            Artifact::VhostUserBlk,
            Artifact::ImageTool,
            Artifact::VhostUserNet,
        ],
    },
];

const FOR_TESTS: &[Group] = &[
    Group {
        target: MUSL,
        packages: &["peers"],
        features: None,
        artifacts: &[Artifact::ReferenceBlk, Artifact::Floor],
    },
    Group {
        target: MUSL,
        packages: &[],
        features: Some("vhost-user-blk/faults"),
        artifacts: &[Artifact::FaultyBlk],
    },
    Group {
        target: BARE_METAL,
        packages: &["tiny-guest"],
        features: None,
        artifacts: &[Artifact::TinyGuest, Artifact::TinyByte],
    },
];

impl Group {
    /// Runs `cargo build`: each executable that it names, by name.
    fn build(&self, profile: Profile) -> Result<BTreeMap<String, PathBuf>, ArtifactError> {
        let mut command = Command::new(cargo());
        command
            .current_dir(workspace())
            .args(["build", "--quiet", "--target", self.target])
            .arg("--message-format=json-render-diagnostics");
        let aligned = match self.target {
            MUSL => ALIGNED,
            _ => &[],
        };
        for package in self.packages.iter().chain(aligned) {
            command.args(["-p", package]);
        }
        for artifact in self.artifacts {
            command.args(["--bin", artifact.name()]);
        }
        if let Some(features) = self.features {
            command.args(["--features", features]);
        }
        if profile == Profile::Release {
            command.arg("--release");
        }
        let messages = run(command)?;
        let messages = messages.split(|byte| *byte == b'\n');
        let messages = messages.filter_map(|line| serde_json::from_slice::<Value>(line).ok());
        let executable = |message: Value| {
            let name = message["target"]["name"].as_str()?;
            let executable = message["executable"].as_str()?;
            Some((name.to_owned(), PathBuf::from(executable)))
        };
        Ok(messages.filter_map(executable).collect())
    }
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
        Self::build_all(profile, SHIPPED.iter().chain(FOR_TESTS))
    }

    /// Builds what is shipped, and nothing else.
    ///
    /// # Errors
    /// Any [`ArtifactError`].
    pub fn build_shipped() -> Result<Self, ArtifactError> {
        Self::build_all(Profile::Release, SHIPPED)
    }

    fn build_all<'a>(
        profile: Profile,
        groups: impl IntoIterator<Item = &'a Group>,
    ) -> Result<Self, ArtifactError> {
        ensure_targets()?;
        let mut paths = BTreeMap::new();
        for group in groups {
            let built = group.build(profile)?;
            for artifact in group.artifacts {
                let path = built
                    .get(artifact.name())
                    .ok_or(ArtifactError::NotBuilt(artifact.name()))?;
                paths.insert(*artifact, path.clone());
            }
        }
        Ok(Self { paths })
    }

    /// Where `artifact` is.
    ///
    /// # Errors
    /// [`ArtifactError::Missing`], [`ArtifactError::NotBuilt`].
    pub fn path(&self, artifact: Artifact) -> Result<&Path, ArtifactError> {
        let path = self.paths.get(&artifact);
        let path = path.ok_or(ArtifactError::NotBuilt(artifact.name()))?;
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
        .args(["-p", "jailer"])
        .args(["--no-default-features", "--features", "jailer/probe"])
        .arg("--target-dir")
        .arg(target)
        // What these programs share with the tests is compiled once.
        .env("CARGO_BUILD_BUILD_DIR", target_folder());
    for package in ALIGNED {
        command.args(["-p", package]);
    }
    for name in PROBE_NAMES {
        command.args(["--bin", name]);
    }
    run(command)?;
    Ok(target.join(MUSL).join("debug"))
}

/// The workspace's folder, as it was when this was compiled.
#[must_use]
pub fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Where cargo builds the workspace.
#[must_use]
pub fn target_folder() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => workspace().join("target"),
    }
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
