//! The demo itself, as the unprivileged user: launch, watch, look, check what is left.

use super::peer::Peer;
use super::stage::Stage;
use super::timeline::{Report, Timeline, now, report};
use super::{Outcome, table};
use crate::host::{Host, NESTED};
use crate::interrupt;
use anyhow::{Context, bail};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use vm_spec::disk::DiskSpec;
use vm_spec::net::NetSpec;
use vm_spec::run_state::{self, RunState};
use vm_spec::size::ByteSize;
use vm_spec::spec::{BootSpec, ImageFormat, OnReboot, VmSpec};

/// The VM's name.
const NAME: &str = "demo";
/// Longest console line that is shown.
const MAX_LINE: u64 = 4096;
/// How long the whole guest may take.
const DEADLINE: Duration = Duration::from_secs(240);
/// How long the launcher may take to end once asked to.
const END_GRACE: Duration = Duration::from_secs(20);
/// Where the guest writes the token, the page and what its program said.
const GUEST_FILE: &str = "/root/demo-file";

enum Event {
    Console(String, u64),
    ConsoleClosed,
    Request(u64),
    Exited(ExitStatus, u64),
}

/// Runs the demo from a filled stage and prints everything but the last line.
pub(super) fn run(stage: &Stage) -> anyhow::Result<Outcome> {
    let host = Host::detect()?;
    if !host.runs_linux() {
        bail!(host.lack());
    }
    let work = tempfile::Builder::new().prefix("bulkhead-demo-").tempdir()?;
    interrupt::heed()?;
    let _guard = interrupt::folder(work.path());
    let token = random_token()?;
    let page = format!("page for {token}");
    let overlay = work.path().join("disk.qcow2");
    images::disk::overlay(&stage.base(), &overlay)?;
    let peer = Peer::start(&page)?;
    let boot = boot(stage, work.path(), &token)?;
    let spec = spec(stage, boot, &overlay, peer.tap.as_raw_fd());
    let spec_file = work.path().join("demo.toml");
    std::fs::write(&spec_file, toml::to_string(&spec)?)?;
    let launch = now();
    let launcher = launch_vm(stage, &spec_file, &peer, work.path())?;
    let mut watch = Watch::new(stage, work.path(), launch, launcher, &peer)?;
    let outcome = watch.follow(peer);
    print!("{}", watch.render());
    outcome?;
    images::disk::check(&overlay).context("after the guest's end")?;
    println!("qemu-img check: no errors in the overlay");
    let content = images::disk::read_file(&overlay, work.path(), GUEST_FILE)?;
    let content = String::from_utf8_lossy(&content).into_owned();
    if !content.starts_with(&format!("{token}\n{page}\n")) {
        bail!("the file in the image is not what the guest should have written: {content:?}");
    }
    println!(
        "the file is in the image: {}",
        content.trim_end().replace('\n', ", ")
    );
    Ok(Outcome { host })
}

/// What to boot. In the nested runner the files are copied out of the host's tree first: reading
/// them from there is not what the timeline is about.
fn boot(stage: &Stage, work: &Path, token: &str) -> anyhow::Result<BootSpec> {
    let (mut kernel, mut initrd) = (stage.kernel(), stage.initrd());
    if std::env::var_os(NESTED).is_some() {
        for path in [&mut kernel, &mut initrd] {
            let copy = work.join(path.file_name().unwrap_or_default());
            std::fs::copy(&*path, &copy)?;
            *path = copy;
        }
    }
    Ok(BootSpec {
        kernel,
        initrd: Some(initrd),
        cmdline: format!("console=ttyS0 quiet mitigations=off panic=-1 demo.token={token}"),
        command: Vec::new(),
    })
}

fn spec(stage: &Stage, boot: BootSpec, overlay: &Path, tap: i32) -> VmSpec {
    let disk = DiskSpec {
        path: Some(overlay.to_owned()),
        format: Some(ImageFormat::Qcow2),
        ..DiskSpec::default()
    };
    let net = NetSpec {
        tap_fd: vec![tap],
        ..NetSpec::default()
    };
    VmSpec {
        name: Some(NAME.to_owned()),
        boot,
        cpus: 2,
        memory: ByteSize(512 << 20),
        huge_pages: None,
        disks: vec![disk],
        nets: vec![net],
        vhost_user: Vec::new(),
        on_device_death: vm_spec::spec::OnDeviceDeath::default(),
        hotplug: 0,
        on_reboot: OnReboot::Exit,
        power_off_grace: 10,
        limits: vm_spec::spec::LimitsSpec::default(),
        image_folders: vec![stage.folder().to_owned()],
    }
}

fn launch_vm(stage: &Stage, spec: &Path, peer: &Peer, work: &Path) -> anyhow::Result<Child> {
    // The launcher inherits the TAP under the number that the spec names.
    fcntl(&peer.tap, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let launcher = Command::new(stage.bulkhead())
        .arg("run")
        .arg(spec)
        .env("XDG_RUNTIME_DIR", work)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start bulkhead")?;
    fcntl(&peer.tap, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(launcher)
}

/// What is known of the running VM.
struct Watch {
    bulkhead: PathBuf,
    state_file: PathBuf,
    launcher: Pid,
    events: Receiver<Event>,
    exit: Option<ExitStatus>,
    timeline: Timeline,
    table: Option<String>,
    entry_known: bool,
    failure: Option<String>,
}

impl Watch {
    fn new(stage: &Stage, work: &Path, launch: u64, launcher: Child, peer: &Peer) -> anyhow::Result<Self> {
        Ok(Self {
            bulkhead: stage.bulkhead(),
            state_file: work.join("bulkhead").join(NAME).join(run_state::FILE_NAME),
            launcher: Pid::from_raw(launcher.id().cast_signed()),
            events: events(launcher, peer)?,
            exit: None,
            timeline: Timeline::new(launch),
            table: None,
            entry_known: false,
            failure: None,
        })
    }

    fn render(&self) -> String {
        format!(
            "\n{}\n{}\n",
            self.table.as_deref().unwrap_or_default(),
            self.timeline.render()
        )
    }

    /// Follows the guest until the launcher has ended and its console is read out.
    fn follow(&mut self, mut peer: Peer) -> anyhow::Result<()> {
        let deadline = Instant::now() + DEADLINE;
        let mut console_open = true;
        while console_open || self.exit.is_none() {
            match self
                .events
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(Event::Console(line, at)) => self.line(&line, at),
                Ok(Event::Request(at)) => {
                    self.timeline
                        .add(at, "first packet answered (the page is asked for)");
                    self.look()?;
                    peer.answer()?;
                }
                Ok(Event::ConsoleClosed) => console_open = false,
                Ok(Event::Exited(status, at)) => {
                    self.timeline.add(at, "power-off (the launcher has ended)");
                    self.exit = Some(status);
                }
                Err(_) => bail!("the guest did not end within {} s", DEADLINE.as_secs()),
            }
        }
        if let Some(failure) = &self.failure {
            bail!("the guest failed {failure}");
        }
        match self.exit {
            Some(status) if status.success() => {}
            status => bail!("bulkhead run ended with {status:?}"),
        }
        self.table
            .as_ref()
            .map(drop)
            .context("the guest ended before it asked for the page")
    }

    fn line(&mut self, line: &str, at: u64) {
        println!("guest | {}", line.trim_end());
        match report(line) {
            Some(Report::Failed(what)) => self.failure = Some(what),
            Some(Report::Step(step, uptime)) => {
                if !std::mem::replace(&mut self.entry_known, true) {
                    self.timeline.add(
                        at.saturating_sub(uptime),
                        "kernel entry (from the kernel's uptime)",
                    );
                }
                self.timeline.add(at, &step);
            }
            None => {}
        }
    }

    /// The table, and the times that only the launcher knows.
    fn look(&mut self) -> anyhow::Result<()> {
        let text = std::fs::read(&self.state_file).context("the VM's run-time state")?;
        let state: RunState = serde_json::from_slice(&text)?;
        if let Some(at) = state.first_instruction_ns {
            self.timeline.add(at, "first guest instruction");
        }
        let rows = table::look(&state, &self.bulkhead)?;
        self.table = Some(table::render(&rows));
        table::flaw(&rows).map_or(Ok(()), |flaw| bail!("{flaw}"))
    }
}

impl Drop for Watch {
    /// Only where the demo failed half-way: the launcher takes its VM down with it.
    fn drop(&mut self) {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            if self.exit.is_some() {
                return;
            }
            let _ = kill(self.launcher, signal);
            let deadline = Instant::now() + END_GRACE;
            while let Ok(event) = self
                .events
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                if let Event::Exited(status, _) = event {
                    self.exit = Some(status);
                }
            }
        }
    }
}

/// Threads that wait for the console, the guest's request and the launcher's end.
fn events(mut launcher: Child, peer: &Peer) -> anyhow::Result<Receiver<Event>> {
    let (sender, events) = channel();
    // A receiver that is gone is no error to any of them: the demo is over.
    let console = launcher.stdout.take().context("the launcher has no output")?;
    let lines = sender.clone();
    std::thread::spawn(move || read_console(console, &lines));
    let mut socket = peer.try_clone_socket()?;
    socket.set_read_timeout(Some(DEADLINE))?;
    let request = sender.clone();
    std::thread::spawn(move || {
        if socket.read_exact(&mut [0]).is_ok() {
            let _ = request.send(Event::Request(now()));
        }
    });
    std::thread::spawn(move || {
        if let Ok(status) = launcher.wait() {
            let _ = sender.send(Event::Exited(status, now()));
        }
    });
    Ok(events)
}

fn read_console(console: impl Read, lines: &Sender<Event>) {
    let mut console = BufReader::new(console);
    loop {
        let mut line = Vec::new();
        match (&mut console).take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(1..) => {
                let line = String::from_utf8_lossy(&line).into_owned();
                if lines.send(Event::Console(line, now())).is_err() {
                    return;
                }
            }
            Ok(0) | Err(_) => {
                let _ = lines.send(Event::ConsoleClosed);
                return;
            }
        }
    }
}

/// 128 random bits in hexadecimal, which only this run's guest can have written.
fn random_token() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
