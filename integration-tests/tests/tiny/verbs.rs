//! The verbs beside `run`, and `run` where nobody is at the keyboard.

use super::{jails::NobodysVm, run::gone, traces::Traces};
use anyhow::{Context, Result, anyhow, bail, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    suite::{artifact, test},
    tiny::{Run, launcher},
};
use libtest_mimic::Trial;
use nix::{sys::signal::Signal, unistd::getpid};
use serde_json::Value;
use std::{
    fs::{self, File},
    io,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, Output},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant, SystemTime},
};
use tempfile::TempDir;
use vm_spec::{control::exit_code, run_state::FILE_NAME};

const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("verbs::ps", ps),
        test("verbs::ps_believes_no_folder", ps_believes_no_folder),
        test("verbs::ps_where_others_lock_files", ps_among_locks),
        test("verbs::stop", stop),
        test("verbs::stop_waits_no_longer_than_told", stop_in_time),
        test("verbs::kill", kill),
        test("verbs::kill_unprivileged", kill_unprivileged),
        test("verbs::no_such_vm", no_such_vm),
        test("verbs::doctor", doctor),
        test("verbs::completions", completions),
        test("verbs::schema", schema),
        test("verbs::sigterm_has_an_exit_code", sigterm),
        test("verbs::a_terminal_that_is_closed_asks_once", hang_up),
        test("verbs::an_audit_of_nothing_does_not_pass", empty_audit),
        test("verbs::run_with_stdin_closed", || run_without("<&-")),
        test("verbs::run_with_stdout_closed", || run_without(">&-")),
    ]
}

/// `bulkhead`, with `folder` for the run-time folders.
pub(crate) fn bulkhead(folder: &Path, arguments: &[&str]) -> Result<Output> {
    Ok(Command::new(artifact(Artifact::Bulkhead)?)
        .args(arguments)
        .env("XDG_RUNTIME_DIR", folder)
        .output()?)
}

pub(crate) fn expect(output: &Output, code: u8) -> Result<String> {
    ensure!(output.status.code() == Some(i32::from(code)), "{output:?}");
    Ok(String::from_utf8(output.stdout.clone())?)
}

/// A guest that does nothing, not even power off when asked.
fn halted(place: &TempDir, grace: u32) -> Result<Run> {
    Host::need_kvm()?;
    let disk = place.path().join("disk");
    File::create(&disk)?.set_len(16 << 20)?;
    let flags = [
        format!("--disk=path={},format=raw", disk.display()),
        format!("--power-off-grace={grace}"),
    ];
    let mut run = Run::tiny("scenario=hlt", &flags)?;
    run.console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    run.state(DEADLINE)?;
    Ok(run)
}

fn ps() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = halted(&place, 1)?;
    let json = expect(&bulkhead(run.folder(), &["ps", "--json"])?, 0)?;
    let json: Value = serde_json::from_str(&json)?;
    let [vm] = json.as_array().context("no list")?.as_slice() else {
        bail!("not one VM: {json}");
    };
    ensure!(vm["name"] == "test" && vm["state"] == "running", "{vm}");
    ensure!(vm["pid"] == run.process.pid().as_raw(), "{vm}");
    ensure!(vm["devices"] == serde_json::json!(["disk0"]), "{vm}");
    let since = vm["since"].as_u64().context("no time")?;
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)?
        .as_secs();
    ensure!((now.saturating_sub(60)..=now).contains(&since), "{vm} at {now}");
    let text = expect(&bulkhead(run.folder(), &["ps"])?, 0)?;
    let lines: Vec<_> = text.lines().collect();
    ensure!(lines.len() == 2 && lines[0].starts_with("NAME "), "{text}");
    let words: Vec<_> = lines[1].split_whitespace().collect();
    let pid = run.process.pid().to_string();
    ensure!(words[..3] == ["test", pid.as_str(), "running"], "{text}");
    ensure!(words.last() == Some(&"disk0"), "{text}");
    let traces = Traces::of(run.process.pid().as_raw(), run.folder())?;
    run.process.signal(Signal::SIGKILL)?;
    gone(&mut run, &traces)?;
    let json = expect(&bulkhead(run.folder(), &["ps", "--json"])?, 0)?;
    ensure!(json.trim() == "[]", "{json}");
    Ok(())
}

/// A folder that no VM holds, whose state names a process that lives, is no VM.
fn ps_believes_no_folder() -> Result<()> {
    let place = tempfile::tempdir()?;
    let run = halted(&place, 1)?;
    let text = fs::read_to_string(run.run_folder().join(FILE_NAME))?;
    let (spawner, own) = (run.process.pid().to_string(), getpid().to_string());
    for (name, pid) in [("copy", &spawner), ("forged", &own)] {
        let folder = run.folder().join("bulkhead").join(name);
        fs::create_dir(&folder)?;
        let state = text.replace(&format!("\"pid\": {spawner}"), &format!("\"pid\": {pid}"));
        fs::write(folder.join(FILE_NAME), state)?;
        for verb in ["stop", "kill"] {
            expect(&bulkhead(run.folder(), &[verb, name])?, exit_code::USAGE)?;
        }
    }
    let text = expect(&bulkhead(run.folder(), &["ps"])?, 0)?;
    ensure!(text.lines().count() == 2 && text.contains("\ntest "), "{text}");
    Ok(())
}

/// The kernel's list of locks, which says who runs, changes while it is read.
fn ps_among_locks() -> Result<()> {
    let place = tempfile::tempdir()?;
    let run = halted(&place, 1)?;
    let files: Vec<_> = (0..20)
        .map(|n| File::create(place.path().join(n.to_string())))
        .collect::<io::Result<_>>()?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let others = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                files.iter().try_for_each(File::lock)?;
                files.iter().try_for_each(File::unlock)?;
            }
            Ok(())
        });
        let listed = (0..100).try_for_each(|n| {
            let text = expect(&bulkhead(run.folder(), &["ps"])?, 0)?;
            ensure!(text.contains("\ntest "), "look {n}: {text}");
            Ok(())
        });
        over.store(true, Ordering::Relaxed);
        others.join().map_err(|_| anyhow!("the others failed"))??;
        listed
    })
}

fn stop() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = halted(&place, 1)?;
    let traces = Traces::of(run.process.pid().as_raw(), run.folder())?;
    let said = expect(&bulkhead(run.folder(), &["stop", "test"])?, 0)?;
    ensure!(said.starts_with("test: "), "{said}");
    let status = run.wait(DEADLINE)?;
    ensure!(status.code() == Some(exit_code::TIMEOUT.into()), "{status}");
    // At once: the verb has waited.
    let left = traces.left()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// The VM that did not end in time goes on.
fn stop_in_time() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = halted(&place, 60)?;
    let output = bulkhead(run.folder(), &["stop", "test", "--timeout=0"])?;
    expect(&output, exit_code::TIMEOUT)?;
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(words.contains("hint: bulkhead kill test"), "{words}");
    ensure!(run.process.alive()?, "it is over");
    Ok(())
}

fn kill() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = halted(&place, 1)?;
    let traces = Traces::of(run.process.pid().as_raw(), run.folder())?;
    ensure!(traces.left()?.len() > traces.processes(), "{traces:?}");
    let said = expect(&bulkhead(run.folder(), &["kill", "test"])?, 0)?;
    ensure!(said == "test: killed\n", "{said}");
    // Reaps the spawner.
    run.wait(DEADLINE)?;
    let left = traces.left()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn kill_unprivileged() -> Result<()> {
    let mut vm = NobodysVm::start()?;
    let text = expect(&vm.bulkhead().arg("ps").output()?, 0)?;
    ensure!(text.contains("\ntest "), "{text}");
    let said = expect(&vm.verb("kill", &[]).output()?, 0)?;
    ensure!(said == "test: killed\n", "{said}");
    let status = vm.run.wait(DEADLINE)?;
    ensure!(status.signal() == Some(Signal::SIGKILL as i32), "{status}");
    Ok(())
}

fn no_such_vm() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for verb in ["stop", "kill"] {
        let output = bulkhead(folder.path(), &[verb, "web"])?;
        expect(&output, exit_code::USAGE)?;
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(words.contains("error: no VM 'web' runs\n"), "{words}");
        ensure!(words.contains("hint: bulkhead ps"), "{words}");
    }
    let json = expect(&bulkhead(folder.path(), &["ps", "--json"])?, 0)?;
    ensure!(json.trim() == "[]", "{json}");
    Ok(())
}

/// What doctor looks at, in its order.
const EXAMINED: [&str; 18] = [
    "kvm",
    "kvm kind",
    "programs",
    "open files",
    "user namespaces",
    "identity",
    "landlock",
    "cgroup v2",
    "cpu mitigations",
    "core siblings",
    "tun",
    "private networks",
    "passt",
    "host bridges",
    "run-time folder",
    "io_uring",
    "huge pages",
    "transparent huge pages",
];

/// What is missing has its remedy, and the exit code says so.
fn doctor() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let output = bulkhead(folder.path(), &["doctor", "--json"])?;
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let names: Vec<_> = findings
        .iter()
        .filter_map(|finding| finding["name"].as_str())
        .collect();
    ensure!(names == EXAMINED, "{names:?}");
    let mut missing = false;
    for finding in &findings {
        let text = |key: &str| finding[key].as_str().with_context(|| format!("{key}: {finding}"));
        ensure!(
            !text("name")?.is_empty() && !text("what")?.is_empty(),
            "{finding}"
        );
        match text("level")? {
            "good" | "note" => {}
            "missing" => {
                missing = true;
                ensure!(!text("mend")?.is_empty(), "{finding}");
            }
            other => bail!("a level '{other}'"),
        }
    }
    expect(&output, u8::from(missing))?;
    Ok(())
}

fn completions() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = expect(&bulkhead(folder.path(), &["completions", shell])?, 0)?;
        for word in ["upgrade", "stop", "power-off-grace"] {
            ensure!(script.contains(word), "{shell}: no {word}");
        }
    }
    let script = expect(&bulkhead(folder.path(), &["completions", "bash"])?, 0)?;
    for words in [
        "enforce trap log off",
        "seccomp namespace",
        "restart exit",
        "spawner forker",
    ] {
        ensure!(script.contains(words), "no {words}");
    }
    expect(
        &bulkhead(folder.path(), &["completions", "csh"])?,
        exit_code::USAGE,
    )?;
    Ok(())
}

/// Of the README's spec, each key is in it; no kernel is needed to get it.
fn schema() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let schema = expect(&bulkhead(folder.path(), &["run", "--print-schema"])?, 0)?;
    let schema: Value = serde_json::from_str(&schema)?;
    let text = super::tour::spec()?;
    let mut keys = &schema["properties"];
    for line in text.lines() {
        if let Some(table) = line.strip_prefix('[') {
            let table = table.trim_matches(['[', ']']);
            let known = &schema["properties"][table];
            let list = known["items"]["$ref"].as_str();
            let kind = list.or_else(|| known["$ref"].as_str());
            let kind = kind.with_context(|| format!("no {table}"))?;
            let kind = kind.trim_start_matches("#/$defs/");
            keys = &schema["$defs"][kind]["properties"];
        } else if let Some((key, _)) = line.split_once(" = ") {
            ensure!(keys[key]["description"].is_string(), "{key} is not in {keys}");
        }
    }
    Ok(())
}

fn sigterm() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = halted(&place, 1)?;
    run.process.signal(Signal::SIGTERM)?;
    let status = run.wait(DEADLINE)?;
    ensure!(status.code() == Some(exit_code::TIMEOUT.into()), "{status}");
    // Asked twice, it is killed, and the code is a shell's for the signal.
    let mut run = halted(&place, 60)?;
    run.process.signal(Signal::SIGTERM)?;
    let status = run.insist(Signal::SIGINT, DEADLINE)?;
    ensure!(status.code() == Some(128 + Signal::SIGINT as i32), "{status}");
    Ok(())
}

/// As where a terminal is closed, and of `timeout`: one request, in several signals.
fn hang_up() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = halted(&place, 1)?;
    for signal in [Signal::SIGHUP, Signal::SIGHUP, Signal::SIGTERM] {
        run.process.signal(signal)?;
        // Of two at once the second would not be seen.
        thread::sleep(Duration::from_millis(5));
    }
    let late = Instant::now() + Duration::from_millis(600);
    while Instant::now() < late {
        run.process.signal(Signal::SIGHUP)?;
        thread::sleep(Duration::from_millis(50));
    }
    let status = run.wait(DEADLINE)?;
    ensure!(status.code() == Some(exit_code::TIMEOUT.into()), "{status}");
    Ok(())
}

/// As services and scripts start it.
fn run_without(redirection: &str) -> Result<()> {
    Host::need_kvm()?;
    let shell = launcher("", redirection)?;
    let flags = [
        format!("--kernel={}", artifact(Artifact::TinyGuest)?.display()),
        "--memory=64M".to_owned(),
        "--cmdline=scenario=poweroff".to_owned(),
    ];
    let mut run = Run::by(shell, tempfile::tempdir()?, &flags)?;
    let status = run.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", run.process.stderr()?);
    if redirection.starts_with('<') {
        run.console.expect_ok()?;
    }
    Ok(())
}

fn empty_audit() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for role in ["spawner", "forker", "image", "startup-ring"] {
        let output = bulkhead(folder.path(), &["audit", "--role", role])?;
        let said = expect(&output, exit_code::USAGE)?;
        ensure!(said.is_empty(), "{role}: {said}");
    }
    Ok(())
}
