//! `bench iperf`: a Linux guest with iperf3 against the machine it runs on, over one TAP: our network
//! process under our vmm, QEMU's own virtio-net, and QEMU with the kernel's vhost-net, in turn.
//!
//! Where KVM runs no stock kernel, all of it happens in one boot of the nested runner. Only the ratios
//! mean anything there.

use super::boot::{FOLDER, artifacts, nested};
use super::median;
use crate::artifacts::Artifact;
use crate::host::Host;
use crate::nested::{Job, Stream, agent::run_here};
use crate::process::ip;
use crate::setup::{Purpose, install_missing};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use images::apt::Apt;
use images::cache::Cache;
use images::initramfs::Initramfs;
use images::kernel::{Kernel, KernelChoice};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const TAP: &str = "iperf0";
/// For one guest from its start to its end.
const GUEST_DEADLINE: Duration = Duration::from_secs(180);
/// For everything in the nested runner.
const NESTED_DEADLINE: Duration = Duration::from_secs(1800);
const MODULES: &[&str] = &["virtio_pci", "virtio_net", "af_packet"];
const OURS: [Artifact; 4] = [
    Artifact::Bulkhead,
    Artifact::Supervisor,
    Artifact::Vmm,
    Artifact::VhostUserNet,
];
/// What each guest does, `ROUNDS` times: TCP both ways, in kbit/s, and round trips, in ms.
const SCRIPT: &str = r#"
ip link set lo up
ip address add 10.9.0.2/24 dev eth0
ip link set eth0 up
rate() { sed -n 's/.* \([0-9.]*\) Kbits.*receiver.*/\1/p'; }
for round in $(seq ROUNDS); do
    echo "iperf: send $(iperf3 -c 10.9.0.1 -t SECONDS -i 0 -f k | rate)"
    echo "iperf: receive $(iperf3 -c 10.9.0.1 -R -t SECONDS -i 0 -f k | rate)"
    echo "iperf: trip $(ping -A -q -c 500 10.9.0.1 | sed -n 's,.* = [^/]*/\([^/]*\)/.*,\1,p')"
done
poweroff -f
"#;

/// Flags of `bench iperf`.
#[derive(Args, Debug)]
pub struct Settings {
    /// Boots of each contender, in turn.
    #[arg(long, default_value_t = 2)]
    passes: usize,
    /// Measurements of each kind in a boot.
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Seconds of one transfer.
    #[arg(long, default_value_t = 3)]
    seconds: usize,
}

/// Who moves the guest's frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Contender {
    Ours,
    Qemu,
    VhostNet,
}

impl Contender {
    const ALL: [Self; 3] = [Self::Ours, Self::Qemu, Self::VhostNet];

    fn name(self) -> &'static str {
        match self {
            Self::Ours => "bulkhead, vhost-user-net",
            Self::Qemu => "QEMU, its own virtio-net",
            Self::VhostNet => "QEMU, the kernel's vhost-net",
        }
    }

    fn command(self, folder: &Path) -> Vec<String> {
        let in_folder = |name: &str| folder.join(name).to_string_lossy().into_owned();
        let cmdline = "console=ttyS0 quiet mitigations=off panic=-1";
        let (kernel, initrd) = (in_folder("vmlinux"), in_folder("initramfs.cpio"));
        let words = match self {
            Self::Ours => format!(
                "{} run --kernel {kernel} --initrd {initrd} --cpus 1 --memory 256M --net tap={TAP} --cmdline",
                in_folder(Artifact::Bulkhead.name())
            ),
            Self::Qemu | Self::VhostNet => format!(
                "qemu-system-x86_64 -M q35 -accel kvm -cpu host -smp 1 -m 256 -nodefaults -no-user-config \
                 -display none -no-reboot -serial stdio -kernel {kernel} -initrd {initrd} \
                 -netdev tap,id=net,ifname={TAP},script=no,downscript=no,vhost={} \
                 -device virtio-net-pci,netdev=net,romfile= -append",
                if self == Self::VhostNet { "on" } else { "off" }
            ),
        };
        let mut words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        words.push(cmdline.to_owned());
        words
    }
}

/// What the guests of one contender reported.
#[derive(Default)]
struct Series {
    send: Vec<f64>,
    receive: Vec<f64>,
    trip: Vec<f64>,
}

impl Series {
    fn take(&mut self, console: &str) -> Result<()> {
        for line in console.lines().filter_map(|line| line.strip_prefix("iperf: ")) {
            let (kind, value) = line.trim_end().split_once(' ').unwrap_or((line, ""));
            let value = value.parse().with_context(|| format!("'{line}' in\n{console}"))?;
            match kind {
                "send" => self.send.push(value),
                "receive" => self.receive.push(value),
                _ => self.trip.push(value),
            }
        }
        Ok(())
    }
}

/// iperf3 with its libraries, as the dynamic linker of this machine finds them.
fn iperf() -> Result<Vec<(String, Vec<u8>)>> {
    let program = Path::new("/usr/bin/iperf3");
    let output = Command::new("ldd").arg(program).output().context("ldd")?;
    let text = String::from_utf8(output.stdout)?;
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/'));
    let mut files = vec![("bin/iperf3".to_owned(), fs::read(program)?)];
    for library in libraries {
        files.push((library.trim_start_matches('/').to_owned(), fs::read(library)?));
    }
    ensure!(files.len() > 2, "iperf3 has no libraries: {text}");
    Ok(files)
}

fn build(settings: &Settings, folder: &Path) -> Result<()> {
    let cache = Cache::open_default()?;
    let apt = Apt::open(&cache)?;
    let kernel = Kernel::get(&cache, &apt, KernelChoice::Default)?;
    let script = SCRIPT.replace("ROUNDS", &settings.rounds.to_string());
    let script = script.replace("SECONDS", &settings.seconds.to_string());
    let files = iperf()?;
    let files: Vec<(&str, u32, &[u8])> = files
        .iter()
        .map(|(name, bytes)| (name.as_str(), 0o755, bytes.as_slice()))
        .collect();
    let initramfs = Initramfs {
        kernel: &kernel,
        modules: MODULES,
        later: &[],
        script: &script,
        files: &files,
    };
    fs::copy(&kernel.elf, folder.join("vmlinux"))?;
    fs::copy(initramfs.build(&cache, &apt)?, folder.join("initramfs.cpio"))?;
    Ok(())
}

/// The TAP, and the server on it; gone with this.
struct Wire(Child);

impl Wire {
    fn make() -> Result<Self> {
        for command in [
            format!("tuntap add {TAP} mode tap vnet_hdr"),
            format!("address add 10.9.0.1/24 dev {TAP}"),
            format!("link set {TAP} up"),
        ] {
            ip(&command)?;
        }
        let server = Command::new("iperf3").arg("-s").stdout(Stdio::null()).spawn();
        Ok(Self(server.context("iperf3")?))
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // They fail only for what is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = ip(&format!("link delete {TAP}"));
    }
}

fn guest(contender: Contender, folder: &Path) -> Result<String> {
    let words = contender.command(folder);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (mut console, mut stderr) = (Vec::new(), Vec::new());
    let ended = run_here(
        &Job::new(&words, GUEST_DEADLINE),
        &mut |stream, bytes| match stream {
            Stream::Out => console.extend_from_slice(bytes),
            Stream::Err => stderr.extend_from_slice(bytes),
        },
    );
    let [console, stderr] = [console, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    ensure!(
        ended.success(),
        "{}: {ended:?}\n{stderr}\n{console}",
        contender.name()
    );
    Ok(console)
}

/// All turns on this very system.
fn compare(settings: &Settings, folder: &Path) -> Result<()> {
    let wire = Wire::make()?;
    let mut all = Contender::ALL.map(|contender| (contender, Series::default()));
    for _ in 0..settings.passes {
        for (contender, series) in &mut all {
            let console = guest(*contender, folder)?;
            let said = console.lines().filter(|line| line.starts_with("iperf: "));
            eprintln!("{}: {}", contender.name(), said.collect::<Vec<_>>().join(", "));
            series.take(&console)?;
        }
    }
    drop(wire);
    println!("| | send Mb/s | receive Mb/s | round trip us |\n|---|---|---|---|");
    // Of no pass there is none.
    let of = |values: &Vec<f64>| match values.is_empty() {
        true => f64::NAN,
        false => median(values.clone()),
    };
    let medians = |series: &Series| [&series.send, &series.receive, &series.trip].map(of);
    for (contender, series) in &all {
        let [send, receive, trip] = medians(series);
        let name = contender.name();
        println!(
            "| {name} | {:.0} | {:.0} | {:.0} |",
            send / 1e3,
            receive / 1e3,
            trip * 1e3
        );
    }
    let [ours, others @ ..] = &all;
    for (contender, series) in others {
        let ratios: Vec<f64> = medians(&ours.1)
            .iter()
            .zip(medians(series))
            .map(|(our, their)| our / their)
            .collect();
        println!(
            "| ours beside {} | {:.2} | {:.2} | {:.2} |",
            contender.name(),
            ratios[0],
            ratios[1],
            ratios[2]
        );
    }
    Ok(())
}

/// Measures; in a program that has called [`crate::nested::agent::intercept`].
///
/// # Errors
/// A guest does not come to its end, or a program is missing.
pub fn run(settings: &Settings) -> Result<()> {
    if let Some(built) = env::var_os(FOLDER) {
        // Out of the host's tree, which is slow to read.
        let folder = tempfile::tempdir()?;
        for entry in fs::read_dir(PathBuf::from(built))? {
            let entry = entry?;
            fs::copy(entry.path(), folder.path().join(entry.file_name()))?;
        }
        return compare(settings, folder.path());
    }
    install_missing(Purpose::Iperf)?;
    let folder = tempfile::tempdir()?;
    build(settings, folder.path())?;
    let artifacts = artifacts()?;
    for artifact in OURS {
        fs::copy(artifacts.path(artifact)?, folder.path().join(artifact.name()))?;
    }
    if Host::detect()?.runs_linux() {
        return compare(settings, folder.path());
    }
    let [passes, rounds, seconds] =
        [settings.passes, settings.rounds, settings.seconds].map(|number| number.to_string());
    let flags = [
        "iperf",
        "--passes",
        &passes,
        "--rounds",
        &rounds,
        "--seconds",
        &seconds,
    ];
    if nested(folder.path(), &flags, NESTED_DEADLINE)? {
        Ok(())
    } else {
        bail!("the series failed")
    }
}
