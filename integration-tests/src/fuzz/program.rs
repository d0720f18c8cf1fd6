//! The instrumented program: how it is built, and what is in it.

use crate::artifacts::{target_folder, workspace};
use crate::lint;
use anyhow::{Context, bail};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Instrumented and uninstrumented code do not share a target.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// What `-Zsanitizer` would pass on a nightly compiler: LLVM's pass, its counters and comparisons.
const FLAGS: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];
/// Chooses the target in the program.
pub(super) const CHOICE: &str = "FUZZ_TARGET";
/// Most bytes of a target's corpus in the repository.
const CORPUS_BYTES: u64 = 8 << 10;
/// Most inputs in it.
const CORPUS_INPUTS: usize = 24;

/// A fuzz target.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// Its name in the table.
    pub name: String,
    /// Its inputs in the repository.
    pub corpus: PathBuf,
    /// Inputs found on this machine.
    pub found: PathBuf,
}

/// The built program.
#[derive(Debug)]
pub struct Program {
    pub(super) path: PathBuf,
    pub(super) folder: PathBuf,
    /// What clippy says of all that only fuzzing compiles, if the build is brief.
    pub warnings: Vec<String>,
}

impl Program {
    /// Builds it; cargo speaks on standard error. For runs of seconds, if they are `brief`, with what the tests are
    /// built of, linted like them, and only our own crates instrumented: a fifth of the time, and slower to run.
    ///
    /// # Errors
    /// When it does not build.
    pub fn build(brief: bool) -> anyhow::Result<Self> {
        let mut build = cargo();
        if brief {
            // The whole workspace chooses the features of what it depends on, as it does for the tests.
            build
                .args(["--workspace", "--features=fuzz-targets/libfuzzer"])
                .args(["--bin=fuzz-targets"])
                .env(lint::WRAPPER, wrapper()?);
        } else {
            build
                .args(["--package=fuzz-targets", "--features=libfuzzer"])
                .args(["--profile=fuzz", "--target", TRIPLE])
                .env("CARGO_TARGET_DIR", folder()?)
                .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"))
                .env_remove("RUSTFLAGS")
                .env_remove(lint::WRAPPER);
        }
        build.args(["--quiet", "--message-format=json"]);
        let built = lint::build(&mut build)?;
        let messages = built.messages.iter();
        let path = messages
            .filter_map(|message| message["executable"].as_str())
            .next();
        Ok(Self {
            path: path.context("cargo names no program")?.into(),
            folder: folder()?,
            warnings: built.warnings,
        })
    }

    /// The targets in the program, or those `wanted`.
    ///
    /// # Errors
    /// When one does not exist.
    pub fn targets(&self, wanted: &[String]) -> anyhow::Result<Vec<Target>> {
        let output = Command::new(&self.path).env_remove(CHOICE).output();
        let list = String::from_utf8(output.context("the fuzz targets")?.stdout)?;
        let targets: Vec<Target> = list
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(name, krate)| Target {
                name: name.to_owned(),
                corpus: workspace().join(krate).join("fuzz/corpus").join(name),
                found: self.folder.join("corpus").join(name),
            })
            .collect();
        if wanted.is_empty() {
            return Ok(targets);
        }
        let find = |name: &String| {
            let target = targets.iter().find(|target| target.name == *name);
            target.cloned().with_context(|| {
                let names: Vec<&str> = targets.iter().map(|target| target.name.as_str()).collect();
                format!("no fuzz target '{name}'; there are {}", names.join(", "))
            })
        };
        wanted.iter().map(find).collect()
    }

    /// Replaces a target's corpus by few inputs of those known that reach as much as fits.
    ///
    /// # Errors
    /// When libFuzzer fails, or files cannot be written.
    pub fn minimise(&self, target: &Target) -> anyhow::Result<()> {
        let best = tempfile::tempdir()?;
        fs::create_dir_all(&target.corpus)?;
        fs::create_dir_all(&target.found)?;
        let output = Command::new(&self.path)
            .env(CHOICE, &target.name)
            .args(["-set_cover_merge=1", "-timeout=10"])
            .args([best.path(), &target.corpus, &target.found])
            .stdin(Stdio::null())
            .output()
            .context("libFuzzer")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let tail: Vec<&str> = said.lines().rev().take(8).collect();
            bail!("{}: {}", target.name, tail.join("\n"));
        }
        let (count, bytes) = replace(&target.corpus, best.path())?;
        eprintln!("{}: {count} inputs, {bytes} bytes", target.name);
        Ok(())
    }
}

/// Puts files of `best` in the place of those in `corpus`: as many as the repository is to hold, the
/// longest that fit first, since they reach the most.
fn replace(corpus: &Path, best: &Path) -> anyhow::Result<(usize, u64)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(best)? {
        let entry = entry?;
        files.push((entry.metadata()?.len(), entry.path()));
    }
    files.sort_by(|one, other| other.cmp(one));
    for entry in fs::read_dir(corpus)? {
        fs::remove_file(entry?.path())?;
    }
    let (mut count, mut bytes) = (0, 0);
    for (length, path) in files {
        if bytes + length > CORPUS_BYTES || count == CORPUS_INPUTS {
            continue;
        }
        fs::copy(&path, corpus.join(path.file_name().unwrap_or_default()))?;
        (count, bytes) = (count + 1, bytes + length);
    }
    Ok((count, bytes))
}

/// A script in the place of the compiler of our own crates: clippy's driver, with [`FLAGS`] for all but build scripts.
fn wrapper() -> anyhow::Result<PathBuf> {
    let script = format!(
        "#!/bin/sh\n\
         case \" $* \" in *' --crate-name build_script_'*) exec {driver} \"$@\" ;; esac\n\
         exec {driver} \"$@\" {}\n",
        FLAGS.join(" "),
        driver = lint::DRIVER,
    );
    let path = folder()?.join("instrumented-rustc");
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// Where instrumented code is built, and what runs find is kept.
fn folder() -> anyhow::Result<PathBuf> {
    let folder = target_folder().join("fuzz-all");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()));
    cargo.arg("build").current_dir(workspace()).stdin(Stdio::null());
    cargo
}
