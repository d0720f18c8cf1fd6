//! Launch to the guest's first byte on COM1, interleaved with the floor; and memory.
//!
//! `cargo bench --bench launch` builds the release binaries, or takes those in
//! `BULKHEAD_BIN_DIR`. Ratios and differences within one run mean something, absolute figures
//! little.

use anyhow::{Context, Result, ensure};
use integration_tests::bench::median;
use integration_tests::{
    artifacts::{Artifact, Artifacts, BIN_DIR, Profile},
    host::Host,
    tiny::Run,
};
use std::{
    env,
    fs::{self, File},
    io::Read,
    path::Path,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

/// Launches of each kind.
const ROUNDS: usize = 15;
const DEADLINE: Duration = Duration::from_secs(20);
/// What a launch may cost above the floor, without and with one disk and one NIC.
const LIMITS: [Duration; 2] = [Duration::from_millis(3), Duration::from_millis(6)];
/// PSS without guest RAM of all processes, with one disk and one NIC; in KiB.
const MEMORY_LIMIT: u64 = 8 << 10;
/// What the second VM may add.
const SECOND_LIMIT: u64 = 5 << 10;

/// One kind of launch.
struct Kind {
    name: &'static str,
    program: Artifact,
    arguments: Vec<String>,
    times: Vec<Duration>,
}

impl Kind {
    /// From just before the process is made until the guest's byte can be read.
    fn launch(&mut self, artifacts: &Artifacts) -> Result<()> {
        let mut command = Command::new(artifacts.path(self.program)?);
        command
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let start = Instant::now();
        let mut child = command.spawn()?;
        let mut byte = [0];
        let mut stdout = child.stdout.take().context("no stdout")?;
        stdout
            .read_exact(&mut byte)
            .with_context(|| format!("{}: no byte", self.name))?;
        self.times.push(start.elapsed());
        ensure!(byte[0] == guest_contract::BYTE, "{}: byte {}", self.name, byte[0]);
        let status = child.wait()?;
        ensure!(status.success(), "{}: {status}", self.name);
        Ok(())
    }

    fn median(&self) -> Duration {
        median(self.times.clone())
    }
}

fn flags(kernel: &Path, disk: &Path) -> Vec<String> {
    vec![
        "run".to_owned(),
        format!("--kernel={}", kernel.display()),
        "--memory=32M".to_owned(),
        format!("--disk=path={},format=raw", disk.display()),
        "--net=private=10.213.9.1/24".to_owned(),
    ]
}

fn launches(artifacts: &Artifacts, disk: &Path) -> Result<bool> {
    let kernel = artifacts.path(Artifact::TinyByte)?;
    let devices = flags(kernel, disk);
    let kind = |name, program, arguments| Kind {
        name,
        program,
        arguments,
        times: Vec::new(),
    };
    let path = kernel.display().to_string();
    let mut kinds = [
        kind("floor", Artifact::Floor, vec![path.clone()]),
        // A command line has it set a CPUID, which every guest but this one needs.
        kind("floor with CPUID", Artifact::Floor, vec![path, String::new()]),
        kind("bulkhead, no device", Artifact::Bulkhead, devices[..3].to_vec()),
        kind("bulkhead, disk and NIC", Artifact::Bulkhead, devices),
    ];
    for _ in 0..ROUNDS {
        for kind in &mut kinds {
            kind.launch(artifacts)?;
        }
    }
    let [floor, with_cpuid, bare, full] = kinds.each_ref().map(Kind::median);
    println!("launch to the guest's first byte, medians of {ROUNDS} interleaved:");
    println!("  {:<24} {floor:>10.2?}", kinds[0].name);
    println!("  {:<24} {with_cpuid:>10.2?}", kinds[1].name);
    let mut held = true;
    for ((kind, median), limit) in kinds[2..].iter().zip([bare, full]).zip(LIMITS) {
        let above = median.saturating_sub(floor);
        held &= above <= limit;
        println!(
            "  {:<24} {median:>10.2?}  floor + {above:.2?} (limit floor + {limit:?}), with CPUID + {:.2?}",
            kind.name,
            median.saturating_sub(with_cpuid)
        );
    }
    Ok(held)
}

/// PSS in KiB of each process, without the guest's RAM.
fn memory(run: &mut Run) -> Result<Vec<(String, u64)>> {
    let state = run.state(DEADLINE)?;
    let of = |pid: i32| -> Result<u64> {
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        let (mut sum, mut ram) = (0, false);
        for line in smaps.lines() {
            if let Some(size) = line.strip_prefix("Pss:").filter(|_| !ram) {
                sum += size.trim().trim_end_matches(" kB").parse::<u64>()?;
            } else if !line.split(' ').next().unwrap_or("").ends_with(':') {
                ram = line.contains("/memfd:guest-ram");
            }
        }
        Ok(sum)
    };
    state
        .processes
        .iter()
        .map(|process| Ok((process.name.clone(), of(process.pid)?)))
        .collect()
}

fn halted(artifacts: &Artifacts, disk: &Path, net: u8) -> Result<Run> {
    let flags = [
        format!("--kernel={}", artifacts.path(Artifact::TinyGuest)?.display()),
        "--memory=64M".to_owned(),
        "--cmdline=scenario=hlt".to_owned(),
        format!("--disk=path={},format=raw", disk.display()),
        format!("--net=private=10.213.{net}.1/24"),
        "--power-off-grace=1".to_owned(),
    ];
    // Not `Run::tiny`, which may take debug builds.
    let launcher = Command::new(artifacts.path(Artifact::Bulkhead)?);
    let mut run = Run::by(launcher, tempfile::tempdir()?, &flags)?;
    run.console.wait_line("ready=1", DEADLINE)?;
    Ok(run)
}

fn memories(artifacts: &Artifacts, folder: &Path) -> Result<bool> {
    let mut disks = Vec::new();
    for name in ["one", "two"] {
        let path = folder.join(name);
        File::create(&path)?.set_len(16 << 20)?;
        disks.push(path);
    }
    let mut first = halted(artifacts, &disks[0], 10)?;
    let alone = memory(&mut first)?;
    println!("PSS without guest RAM, one disk and one NIC, KiB:");
    for (name, size) in &alone {
        println!("  {name:<24} {size:>6}");
    }
    let sum = |sizes: &[(String, u64)]| sizes.iter().map(|(_, size)| size).sum::<u64>();
    let mut second = halted(artifacts, &disks[1], 11)?;
    let both = sum(&memory(&mut second)?) + sum(&memory(&mut first)?);
    let (one, added) = (sum(&alone), both.saturating_sub(sum(&alone)));
    println!("  {:<24} {one:>6} (limit {MEMORY_LIMIT})", "sum");
    println!("  {:<24} {added:>6} (limit {SECOND_LIMIT})", "the second VM adds");
    Ok(one <= MEMORY_LIMIT && added <= SECOND_LIMIT)
}

fn run() -> Result<bool> {
    if Host::detect()? == Host::None {
        println!("launch: skipped: /dev/kvm cannot be opened here");
        return Ok(true);
    }
    let artifacts = match env::var_os(BIN_DIR) {
        Some(dir) => Artifacts::from_dir(Path::new(&dir)),
        None => Artifacts::build(Profile::Release)?,
    };
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk");
    File::create(&disk)?.set_len(16 << 20)?;
    let launches = launches(&artifacts, &disk)?;
    Ok(memories(&artifacts, folder.path())? && launches)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            println!("launch: a limit is not held");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("launch: {error:#}");
            ExitCode::FAILURE
        }
    }
}
