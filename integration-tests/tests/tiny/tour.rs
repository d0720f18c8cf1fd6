//! The README's tour and its one command: what they say of `bulkhead` and the back ends, as it stands there, in its
//! order, on its own spec. The guest is the tiny one here, with `scenario=` for `init=` and for a command. What builds
//! and installs, `cargo demo` and the installer's tests run; the audit, its own.

use anyhow::{Context, Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    process::Process,
    suite::{artifact, test},
    tiny::Console,
};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;
use vm_spec::run_state::RunState;

const README: &str = include_str!("../../../README.md");
const SPEC: &str = "web.toml";
/// In a shell, after the back end was started with `&`.
const END_BACK_END: &str = "kill $!";
const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn tests() -> Vec<Trial> {
    vec![test("tour::the_readmes_commands", tour)]
}

fn tour() -> Result<()> {
    Host::need_kvm()?;
    Host::need_tun()?;
    let mut tour = Tour::prepare()?;
    let lines = commands()?;
    let count = |what: &str| lines.iter().filter(|line| line.starts_with(what)).count();
    ensure!(
        count("bulkhead ") >= 12 && count("vhost-user-blk ") == 1,
        "{lines:#?}"
    );
    for line in &lines {
        tour.follow(line).with_context(|| line.clone())?;
    }
    Ok(())
}

/// What stands between the README's lines `begin` and "```".
fn block(begin: &str) -> Result<&'static str> {
    let (_, rest) = README.split_once(begin).context("no such block")?;
    let (block, _) = rest.split_once("```").context("a block without an end")?;
    Ok(block)
}

/// `web.toml`.
pub(crate) fn spec() -> Result<&'static str> {
    block("```toml\n# web.toml\n")
}

/// The lines of the tour and of the one command, without what follows them as a comment.
fn commands() -> Result<Vec<String>> {
    let (_, tour) = README
        .split_once("\n## A five-minute tour\n")
        .context("no tour")?;
    let (tour, _) = tour
        .split_once("\n## Exit codes ")
        .context("a tour without an end")?;
    let blocks = tour.split("```sh\n").skip(1);
    let text: Vec<_> = blocks.filter_map(|rest| rest.split("```").next()).collect();
    let text = text.concat().replace("\\\n", "");
    let lines = text
        .lines()
        .map(|line| line.split("  # ").next().unwrap_or(line).trim());
    let ours = ["bulkhead ", "vhost-user-", END_BACK_END];
    let ours = lines.filter(|line| ours.iter().any(|begin| line.starts_with(begin)));
    Ok(ours.map(str::to_owned).collect())
}

/// A folder with all that the tour's commands name.
struct Tour {
    folder: TempDir,
    binaries: PathBuf,
    /// `bulkhead run web.toml`.
    web: Option<Process>,
    back_end: Option<Process>,
}

impl Tour {
    fn prepare() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = |name: &str| folder.path().join(name);
        fs::copy(artifact(Artifact::TinyGuest)?, path("vmlinux"))?;
        fs::write(path("initrd.img"), [0; 4096])?;
        let spec = spec()?.replace("init=/bin/sh", "scenario=hlt");
        fs::write(path(SPEC), format!("power-off-grace = 1\n{spec}"))?;
        let bulkhead = artifact(Artifact::Bulkhead)?;
        let tour = Self {
            binaries: bulkhead.parent().context("no folder")?.to_owned(),
            folder,
            web: None,
            back_end: None,
        };
        tour.ends("bulkhead image create --format qcow2 root.qcow2 64M")?;
        Ok(tour)
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// `line` as a shell runs it.
    fn shell(&self, line: &str) -> Result<Command> {
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("sh");
        command
            .args(["-ec", &format!("exec {line}")])
            .current_dir(self.path())
            .env("PATH", format!("{}:{path}", self.binaries.display()))
            .env("XDG_RUNTIME_DIR", self.path());
        Ok(command)
    }

    /// It ends well, and says something.
    fn ends(&self, line: &str) -> Result<String> {
        let output = self.shell(line)?.output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8(output.stdout)?)
    }

    fn follow(&mut self, line: &str) -> Result<()> {
        // Not for everybody's /tmp.
        let line = line.replace("/tmp/", &format!("{}/", self.path().display()));
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            // Nor does this guest know of hot-plug: Linux's tests have devices detached.
            ["bulkhead", "audit" | "detach", ..] => Ok(()),
            ["bulkhead", "image", "create", ..] => self.ends(&line).map(drop),
            // What a host lacks makes it end otherwise.
            ["bulkhead", "doctor"] => {
                let output = self.shell(&line)?.output()?;
                ensure!(!output.stdout.is_empty(), "{output:?}");
                Ok(())
            }
            ["bulkhead", "run", SPEC] => self.start_web(),
            [
                "bulkhead",
                verb @ ("ps" | "inspect" | "logs" | "events" | "metrics" | "resize" | "attach" | "stop"),
                ..,
            ] => {
                self.web_runs()?;
                let said = self.ends(&line)?;
                // Nothing may have happened yet, or all went well.
                let quiet = matches!(verb, "events" | "logs" | "resize");
                ensure!(quiet || !said.is_empty(), "it says nothing");
                if verb == "stop" {
                    let mut web = self.web.take().context("no VM")?;
                    web.wait(DEADLINE)?;
                }
                Ok(())
            }
            ["bulkhead", "console", ..] => {
                self.web_runs()?;
                let mut command = self.shell(&line)?;
                command.stdout(Stdio::piped());
                let mut visit = Process::start(command)?;
                let stdout = visit.child().stdout.take().context("no stdout")?;
                Console::new(stdout).wait_line("ready=1", DEADLINE)
            }
            ["vhost-user-blk", .., "&"] => self.start_back_end(line.trim_end_matches('&')),
            ["kill", "$!"] => {
                let mut back_end = self.back_end.take().context("no line has started a back end")?;
                back_end.signal(Signal::SIGTERM)?;
                back_end.wait(DEADLINE).map(drop)
            }
            _ => {
                let (line, _) = line.split_once(" -- ").unwrap_or((&line, ""));
                let line = ["init=/bin/sh", "quiet"]
                    .iter()
                    .fold(line.to_owned(), |line, word| {
                        line.replace(word, "scenario=poweroff")
                    });
                let said = self.ends(&line)?;
                let ran = !said.contains("scenario=") || said.contains("result=ok");
                ensure!(ran && !said.is_empty(), "{said}");
                Ok(())
            }
        }
    }

    /// A line before has started it, and none has ended it.
    fn web_runs(&mut self) -> Result<()> {
        let web = self.web.as_mut().context("no line has started its VM")?;
        ensure!(web.alive()?, "its VM has ended: {}", web.stderr()?);
        Ok(())
    }

    fn start_web(&mut self) -> Result<()> {
        let mut web = Process::start(self.shell("bulkhead run web.toml")?)?;
        let state = self.path().join("bulkhead/web/state.json");
        until(&mut web, || {
            let text = fs::read_to_string(&state).unwrap_or_default();
            let state = serde_json::from_str::<RunState>(&text);
            state.is_ok_and(|state| state.first_instruction_ns.is_some())
        })?;
        self.web = Some(web);
        Ok(())
    }

    fn start_back_end(&mut self, line: &str) -> Result<()> {
        let mut process = Process::start(self.shell(line)?)?;
        let socket = self.path().join("disk.sock");
        until(&mut process, || socket.exists())?;
        self.back_end = Some(process);
        Ok(())
    }
}

impl Drop for Tour {
    fn drop(&mut self) {
        for process in self.web.iter_mut().chain(&mut self.back_end) {
            let _ = process.signal(Signal::SIGTERM);
            let _ = process.wait(DEADLINE);
        }
    }
}

/// Waits until `done`, for as long as `process` lives.
fn until(process: &mut Process, done: impl Fn() -> bool) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    while !done() {
        ensure!(process.alive()?, "{}", process.stderr()?);
        ensure!(Instant::now() < end, "too late: {}", process.stderr()?);
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
