//! `bench net`: the network process over a TAP in a network namespace of its own, and beside it the
//! floor: one system call a frame from a bare loop, in turns within one run.

use super::median;
use super::net_bed::{Bed, Floor, Posting, RING, Turn};
use super::net_frames::Size;
use super::net_host;
use crate::artifacts::{Artifact, Artifacts, BIN_DIR};
use anyhow::{Context, Result};
use clap::Args;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs};

/// Flags of `bench net`.
#[derive(Args, Debug)]
pub struct Settings {
    /// Turns of each contender in each case.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Milliseconds of a turn.
    #[arg(long, default_value_t = 250)]
    turn: u64,
    /// Round trips of a turn.
    #[arg(long, default_value_t = 2000)]
    trips: u32,
    /// Only cases whose name holds this text.
    #[arg(long, default_value = "")]
    only: String,
    /// Another vhost-user-net than the one that is built.
    #[arg(long)]
    binary: Option<PathBuf>,
    /// A further flag for the process, such as --guard=off.
    #[arg(long = "flag", allow_hyphen_values = true)]
    flags: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Send,
    Receive,
}

struct Case {
    name: String,
    direction: Direction,
    size: Size,
    posting: Posting,
    pairs: u16,
}

fn cases() -> Vec<Case> {
    use Direction::{Receive, Send};
    let mut cases = Vec::new();
    let mut add = |what: &str, direction, size: Size, posting, pairs: u16| {
        let pair = if pairs == 1 { "pair" } else { "pairs" };
        let name = format!("{what} {}, {pairs} {pair}", size.name());
        cases.push(Case {
            name,
            direction,
            size,
            posting,
            pairs,
        });
    };
    for size in [Size::Small, Size::Full, Size::Super] {
        for pairs in [1, 4] {
            add("send", Send, size, Posting::Large, pairs);
        }
    }
    for size in [Size::Small, Size::Full, Size::Super] {
        add("receive into large buffers", Receive, size, Posting::Large, 1);
        add("receive into chains of 19", Receive, size, Posting::Chains, 1);
        add(
            "receive into mergeable buffers",
            Receive,
            size,
            Posting::Mergeable,
            1,
        );
        add("receive into large buffers", Receive, size, Posting::Large, 4);
    }
    cases
}

/// Measures every case and prints tables as Markdown.
///
/// # Errors
/// When a binary is missing, a namespace or TAP cannot be made, or frames stop.
pub fn run(settings: &Settings) -> Result<()> {
    let binary = match (&settings.binary, env::var_os(BIN_DIR)) {
        (Some(binary), _) => binary.clone(),
        (None, Some(dir)) => Artifacts::from_dir(Path::new(&dir))
            .path(Artifact::VhostUserNet)?
            .into(),
        (None, None) => Artifacts::build_shipped()?.path(Artifact::VhostUserNet)?.into(),
    };
    // While this process has one thread.
    net_host::enter()?;
    println!("| case | kpps | Gb/s | CPU us/frame | floor kpps | floor CPU us/frame | of the floor | lost |");
    println!("|---|---|---|---|---|---|---|---|");
    for case in cases() {
        if case.name.contains(&settings.only) {
            println!(
                "{}",
                measure(settings, &binary, &case).with_context(|| case.name.clone())?
            );
            std::io::stdout().flush()?;
        }
    }
    if "round trip".contains(&settings.only) || settings.only.contains("round trip") {
        round_trips(settings, &binary)?;
    }
    if "io_uring".contains(&settings.only) {
        by_ring(settings)?;
    }
    Ok(())
}

fn measure(settings: &Settings, binary: &Path, case: &Case) -> Result<String> {
    let span = Duration::from_millis(settings.turn);
    let mut bed = Bed::start(binary, &settings.flags, case.size, case.posting, case.pairs)?;
    let mut floor = Floor::start(case.size)?;
    let mut turn = || -> Result<(Turn, Turn)> {
        Ok(match case.direction {
            Direction::Send => (bed.send(span)?, floor.send(span)?),
            Direction::Receive => (bed.receive(span)?, floor.receive(span)?),
        })
    };
    // Every buffer's memory is touched for the first time, and the device learns what comes.
    let mut warm = 0;
    while warm < 2 * u64::from(RING) * u64::from(case.pairs) {
        warm += turn()?.0.frames;
    }
    let turns = (0..settings.rounds).map(|_| turn()).collect::<Result<Vec<_>>>()?;
    bed.stop()?;
    floor.stop()?;
    Ok(line(case, &turns))
}

fn line(case: &Case, turns: &[(Turn, Turn)]) -> String {
    let of = |value: &dyn Fn(&(Turn, Turn)) -> f64| median(turns.iter().map(value).collect());
    let rate = of(&|(ours, _)| ours.rate());
    let lost: u64 = turns.iter().map(|(ours, _)| ours.lost).sum();
    format!(
        "| {} | {:.0} | {:.2} | {:.2} | {:.0} | {:.2} | {:.2} | {lost} |",
        case.name,
        rate / 1e3,
        rate * case.size.bytes() as f64 * 8.0 / 1e9,
        of(&|(ours, _)| ours.cost()),
        of(&|(_, floor)| floor.rate()) / 1e3,
        of(&|(_, floor)| floor.cost()),
        of(&|(ours, floor)| ours.rate() / floor.rate()),
    )
}

/// The floor's call a frame, and batches through io_uring.
fn by_ring(settings: &Settings) -> Result<()> {
    let span = Duration::from_millis(settings.turn);
    println!("\n| io_uring, bare loops | kpps | CPU us/frame | floor kpps | floor CPU us/frame |");
    println!("|---|---|---|---|---|");
    for size in [Size::Small, Size::Full, Size::Super] {
        let mut floor = Floor::start(size)?;
        let mut turns = Vec::new();
        for _ in 0..settings.rounds {
            turns.push((floor.send_by_ring(span)?, floor.send(span)?));
        }
        let of = |value: &dyn Fn(&(Turn, Turn)) -> f64| median(turns.iter().map(value).collect());
        println!(
            "| send {} | {:.0} | {:.2} | {:.0} | {:.2} |",
            size.name(),
            of(&|(ring, _)| ring.rate()) / 1e3,
            of(&|(ring, _)| ring.cost()),
            of(&|(_, calls)| calls.rate()) / 1e3,
            of(&|(_, calls)| calls.cost()),
        );
        floor.stop()?;
    }
    Ok(())
}

fn round_trips(settings: &Settings, binary: &Path) -> Result<()> {
    let mut bed = Bed::start(binary, &settings.flags, Size::Small, Posting::Mergeable, 1)?;
    let mut floor = Floor::start(Size::Small)?;
    println!("\n| round trip of 64 B | us | floor us | ratio |\n|---|---|---|---|");
    for (name, spin) in [("the driver sleeps", false), ("the driver spins", true)] {
        let mut turns = Vec::new();
        for _ in 0..settings.rounds {
            let ours = bed.round_trips(settings.trips, spin)?.as_secs_f64() * 1e6;
            turns.push((ours, floor.round_trips(settings.trips, spin)?.as_secs_f64() * 1e6));
        }
        println!(
            "| {name} | {:.1} | {:.1} | {:.2} |",
            median(turns.iter().map(|turn| turn.0).collect()),
            median(turns.iter().map(|turn| turn.1).collect()),
            median(turns.iter().map(|turn| turn.0 / turn.1).collect()),
        );
    }
    println!("\nMemory after the round trips: {}", memory(bed.pid())?);
    bed.stop()?;
    floor.stop()
}

/// What the process holds that no other one shares.
fn memory(pid: nix::unistd::Pid) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let wanted = |line: &&str| line.starts_with("RssAnon") || line.starts_with("RssFile");
    let fields: Vec<_> = text
        .lines()
        .filter(wanted)
        .map(|line| line.replace('\t', " "))
        .collect();
    Ok(fields.join(", "))
}
