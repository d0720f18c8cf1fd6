//! kill -9 in the middle of writing, without a flush: every completed write is there.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use support::{Random, Scratch, check_leaks_at_most, create, full, open, qemu_contents, text};
use vhost_blk::image::{Format, OpenOptions};

/// Says to this program that it is the one that writes and is killed: the image's path.
const VICTIM: &str = "BULKHEAD_KILL_VICTIM";
const SIZE: u64 = 4 << 20;
const DEADLINE: Duration = Duration::from_secs(30);

/// Kills: all with `--full`, else a tenth.
fn rounds() -> u64 {
    if full() { 200 } else { 20 }
}

/// Writes and zeroes for ever; says a request's place, length and value once it has completed.
fn write_for_ever(path: &Path) -> ! {
    let layers: Vec<PathBuf> = std::iter::once(path.to_owned())
        .chain(Some(path.with_extension("base")).filter(|base| base.exists()))
        .collect();
    let layers: Vec<(&Path, Format)> = layers
        .iter()
        .map(|layer| match layer.extension() {
            Some(_) => (layer.as_path(), Format::Raw),
            None => (layer.as_path(), Format::Qcow2),
        })
        .collect();
    let image = support::open_with(&layers, &OpenOptions::default()).expect("opens");
    let mut random = Random::new(u64::from(std::process::id()));
    let mut out = std::io::stdout();
    loop {
        let (offset, len) = random.range(SIZE, 100 << 10);
        // One in five is zeroed.
        let value = match random.below(5) {
            0 => 0,
            _ => random.below(255) as u8 + 1,
        };
        // Announced first: it may be there in part, or whole, when its end is never heard of.
        writeln!(out, "begin {offset} {len} {value}").expect("says");
        match value {
            0 => image
                .write_zeroes(offset, len, random.below(2) == 0)
                .expect("zeroes"),
            _ => support::write(&*image, offset, &vec![value; len as usize]).expect("writes"),
        }
        writeln!(out, "end {offset} {len} {value}").expect("says");
    }
}

struct Victim {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Victim {
    fn start(path: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("knows itself"))
            .env(VICTIM, path)
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let out = BufReader::new(child.stdout.take().expect("has a pipe"));
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self { child, lines }
    }

    /// Lets it complete `writes` writes, then kills it at once; all that it said.
    fn kill_after(mut self, writes: usize) -> Vec<String> {
        let mut said = Vec::new();
        while said
            .iter()
            .filter(|line: &&String| line.starts_with("end"))
            .count()
            < writes
        {
            said.push(self.lines.recv_timeout(DEADLINE).expect("it writes"));
        }
        self.child.kill().expect("kills");
        self.child.wait().expect("reaps");
        said.extend(self.lines.iter());
        said
    }
}

/// Applies what was said to `model`; what may be either way is left to `found`.
fn follow(said: &[String], model: &mut [u8], found: &[u8]) {
    for (at, line) in said.iter().enumerate() {
        let mut words = line.split(' ');
        let verb = words.next();
        let mut number = || words.next().and_then(|word| word.parse::<usize>().ok());
        let (Some(offset), Some(len), Some(value)) = (number(), number(), number()) else {
            // The last line may have been cut off.
            assert_eq!(at + 1, said.len(), "{line}");
            continue;
        };
        let range = offset..offset + len;
        match verb {
            Some("end") => model[range].fill(value as u8),
            Some("begin") if at + 1 >= said.len() - 1 => {
                for at in range {
                    if found[at] == value as u8 {
                        model[at] = found[at];
                    }
                }
            }
            _ => {}
        }
    }
}

fn every_completed_write_survives() {
    for (options, base) in [
        ("compat=1.1", false),
        ("cluster_size=4k,extended_l2=off", true),
        ("extended_l2=on,cluster_size=16k", false),
        ("compat=0.10,cluster_size=512", false),
    ] {
        let scratch = Scratch::new();
        let path = scratch.path("top");
        let mut model = vec![0; SIZE as usize];
        if base {
            model.fill(0xbb);
            let below = path.with_extension("base");
            fs::write(&below, &model).expect("writes");
            let backing = format!("{options},backing_file={},backing_fmt=raw", text(&below));
            create(&path, &backing, &SIZE.to_string());
        } else {
            create(&path, options, &SIZE.to_string());
        }
        let mut random = Random::new(11);
        for round in 0..rounds() / 4 {
            let said = Victim::start(&path).kill_after(random.below(60) as usize);
            let found = qemu_contents(&path, &[]);
            follow(&said, &mut model, &found);
            support::assert_same(&found, &model, &format!("{options}, kill {round}"));
            check_leaks_at_most(&path).unwrap_or_else(|found| panic!("{options}, kill {round}: {found}"));
        }
        if !base {
            drop(open(&[(&path, Format::Qcow2)]));
        }
    }
}

fn main() -> ExitCode {
    if let Some(path) = std::env::var_os(VICTIM) {
        write_for_ever(Path::new(&path));
    }
    support::suite::run(vec![support::suite::test_with_qemu_img(
        "every_completed_write_survives",
        every_completed_write_survives,
    )])
}
