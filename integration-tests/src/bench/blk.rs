//! `bench blk`: the disk process beside qemu-storage-daemon, in turns within one run.

use super::blk_cases::{Case, Content, Place, all};
use super::blk_driver::Limit;
use super::blk_floor::{self, Floor};
use super::blk_peer::{Contender, Format, Peer, Programs, Turn};
use super::median;
use crate::artifacts::{Artifact, Artifacts, BIN_DIR};
use crate::qemu_img::qemu_img;
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::{
    env,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

/// Requests of a turn that allocates: it uses up clusters, so it is not bounded by time.
const ALLOCATIONS: u64 = 2048;

/// Flags of `bench blk`.
#[derive(Args, Debug)]
pub struct Settings {
    /// Turns of each contender in each case.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Milliseconds of a turn.
    #[arg(long, default_value_t = 250)]
    turn: u64,
    /// Size of the images with data, in MiB (a power of two).
    #[arg(long, default_value_t = 256)]
    size: u64,
    /// Folder on a tmpfs.
    #[arg(long, default_value = "/dev/shm")]
    tmpfs: PathBuf,
    /// Folder on a real disk.
    #[arg(long, default_value = "/var/tmp")]
    disk: PathBuf,
    /// Only cases whose name holds this text.
    #[arg(long, default_value = "")]
    only: String,
    /// A further flag for our process, such as --io=sync.
    #[arg(long = "flag", allow_hyphen_values = true)]
    flags: Vec<String>,
    /// qemu-storage-daemon's aio= for cached files (O_DIRECT uses native instead of threads).
    #[arg(long, default_value = "threads")]
    qemu_aio: String,
    /// Gives qemu-storage-daemon an iothread, which polls.
    #[arg(long)]
    qemu_iothread: bool,
}

/// Measures every case and prints the table as Markdown.
///
/// # Errors
/// When a binary is missing, or a request fails.
pub fn run(settings: &Settings) -> Result<()> {
    let artifacts = match env::var_os(BIN_DIR) {
        Some(dir) => Artifacts::from_dir(Path::new(&dir)),
        None => Artifacts::build_shipped()?,
    };
    let programs = Programs {
        ours: artifacts.path(Artifact::VhostUserBlk)?.to_owned(),
        our_flags: settings.flags.clone(),
        qemu: "qemu-storage-daemon".into(),
        qemu_aio: settings.qemu_aio.clone(),
        qemu_iothread: settings.qemu_iothread,
    };
    let size = settings.size << 20;
    ensure!(size.is_power_of_two(), "--size is not a power of two");
    println!(
        "| case | ours | baseline | ratio | goal | CPU us/op | CPU ratio | goal | floor | idle KiB | private KiB |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for case in all(size, 64 << 30) {
        if case.name.contains(&settings.only) {
            let line = measure(settings, &programs, &case).with_context(|| case.name.clone())?;
            println!("{line}");
            std::io::stdout().flush()?;
        }
    }
    Ok(())
}

fn measure(settings: &Settings, programs: &Programs, case: &Case) -> Result<String> {
    let place = match case.place {
        Place::Tmpfs => &settings.tmpfs,
        Place::Disk => &settings.disk,
    };
    let folder = tempfile::tempdir_in(place)?;
    let start = |contender: Contender, name: &str| -> Result<Peer> {
        let image = folder.path().join(name);
        make_image(&image, contender.format, case)?;
        let mut peer = Peer::start(programs, contender, &image, folder.path(), case.work)?;
        if case.content == Content::Cold {
            peer.forget = Some(File::open(image)?);
        }
        Ok(peer)
    };
    let mut ours = start(case.contender, "ours")?;
    let idle = ours.idle_memory()?;
    let mut baseline = start(case.baseline, "baseline")?;
    let limit = match case.content {
        Content::Full | Content::Cold => Limit::Time(Duration::from_millis(settings.turn)),
        Content::Empty => Limit::Requests(ALLOCATIONS),
    };
    ours.turn(limit)?;
    baseline.turn(limit)?;
    let mut turns: Vec<(Turn, Turn)> = Vec::new();
    let mut floors = Floors::default();
    let bare = |queues| -> Result<Floor> {
        let time = Duration::from_millis(settings.turn);
        blk_floor::measure(&folder.path().join("ours"), &case.work, queues, time)
    };
    for round in 0..settings.rounds {
        // Who begins changes, so that neither always finds the other's caches.
        turns.push(if round % 2 == 0 {
            let first = ours.turn(limit)?;
            (first, baseline.turn(limit)?)
        } else {
            let first = baseline.turn(limit)?;
            (ours.turn(limit)?, first)
        });
        if case.has_floor() {
            floors.ours.push(bare(case.contender.queues)?);
            if case.contender.queues != case.baseline.queues {
                floors.baseline.push(bare(case.baseline.queues)?);
            }
        }
    }
    Ok(line(case, &turns, &floors, [idle, ours.memory()?]))
}

/// Bare loops in turn with the contenders; none where the image is not simply the file.
#[derive(Default)]
struct Floors {
    ours: Vec<Floor>,
    /// Where the baseline is ours with another number of queues.
    baseline: Vec<Floor>,
}

impl std::fmt::Display for Floors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.ours.is_empty() {
            return Ok(());
        }
        let of = |value: fn(&Floor) -> f64| median(self.ours.iter().map(value).collect());
        write!(
            f,
            "{:.0}, {:.2} us",
            of(|floor| floor.rate),
            of(|floor| floor.cost)
        )?;
        if !self.baseline.is_empty() {
            let pairs = self.ours.iter().zip(&self.baseline);
            let ratio = median(pairs.map(|(many, one)| many.rate / one.rate).collect());
            write!(f, ", {ratio:.2} of one thread")?;
        }
        Ok(())
    }
}

fn line(case: &Case, turns: &[(Turn, Turn)], floors: &Floors, [idle, private]: [u64; 2]) -> String {
    let of = |value: fn(&(Turn, Turn)) -> f64| median(turns.iter().map(value).collect());
    let ratio = of(|(ours, baseline)| ours.rate() / baseline.rate());
    let cpu = of(|(ours, baseline)| ours.cost() / baseline.cost());
    let mark = |held: bool| if held { "" } else { " (falls short)" };
    let cpu_goal = case
        .cpu_goal
        .map_or_else(String::new, |goal| format!("at most {goal}{}", mark(cpu <= goal)));
    format!(
        "| {} | {:.0} | {:.0} | {ratio:.2} | at least {}{} | {:.2} / {:.2} | {cpu:.2} | {cpu_goal} | {floors} | {idle} | {private} |",
        case.name,
        of(|(ours, _)| ours.rate()),
        of(|(_, baseline)| baseline.rate()),
        case.goal,
        mark(ratio >= case.goal),
        of(|(ours, _)| ours.cost()),
        of(|(_, baseline)| baseline.cost()),
    )
}

/// An image for `case`: its whole span holds data, or nothing.
fn make_image(path: &Path, format: Format, case: &Case) -> Result<()> {
    let size = case.work.span;
    if case.content == Content::Empty {
        let size = size.to_string();
        return qemu_img(&["create", "-q", "-f", format.name(), text(path)?, &size]).map(drop);
    }
    let raw = match format {
        Format::Raw => path.to_owned(),
        Format::Qcow2 => path.with_extension("raw"),
    };
    let mut file = File::create(&raw)?;
    let block: Vec<u8> = (0..1 << 20).map(|byte: u32| (byte % 251) as u8 | 1).collect();
    for _ in 0..size >> 20 {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    if format == Format::Qcow2 {
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&raw)?, text(path)?])?;
        fs::remove_file(raw)?;
    }
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("the folder is not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::blk_peer::Program;

    #[test]
    fn every_case_has_a_name_of_its_own() {
        let cases = all(256 << 20, 64 << 30);
        let mut names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), cases.len());
        assert!(cases.iter().all(|case| case.contender.program == Program::Ours));
    }
}
