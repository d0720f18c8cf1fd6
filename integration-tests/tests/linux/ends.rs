//! How Linux guests end, and what the exit code says of it; a person at the console.

use crate::boots::{BOOT, GRACE};
use crate::default_kernel;
use anyhow::{Result, ensure};
use integration_tests::artifacts::Artifact;
use integration_tests::host::Host;
use integration_tests::linux::{Launch, Ran, Work};
use integration_tests::nested::Ended;
use integration_tests::suite::{artifact, jail_flags, test_within};
use integration_tests::terminal::Terminal;
use libtest_mimic::Trial;
use std::process::Command;
use std::time::Duration;
use vm_spec::control::exit_code;

/// Asked to by a person, a VM is gone after this long: the time a guest has for its power-off, and
/// some more.
const LEAVE: Duration = Duration::from_secs(40);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_within(BOOT + GRACE, "a kernel that panics", || {
            ends("guest.end=panic", exit_code::PANIC, "kernel panicked")
        }),
        test_within(BOOT + GRACE, "a kernel that reboots", || {
            ends("guest.end=reboot", exit_code::RESET, "the guest reset")
        }),
        // No fault tells it from a crash: it ends as one.
        test_within(BOOT + GRACE, "a kernel that reboots by a triple fault", || {
            ends(
                "reboot=t guest.end=reboot",
                exit_code::TRIPLE_FAULT,
                "triple fault",
            )
        }),
        test_within(
            BOOT + GRACE,
            "a command whose exit status is the launcher's",
            || {
                command(
                    &["sh", "-c", "echo \"guest: <$1>\"; exit 42", "sh", "it's  *"],
                    42,
                    "<it's  *>",
                )
            },
        ),
        test_within(BOOT + GRACE, "a command that cannot be found", || {
            command(&["no-such-command"], 127, "")
        }),
        test_within(BOOT + GRACE, "a command that powers off tells no status", || {
            let (code, line) = (exit_code::ERROR, "had told no exit status");
            let ran = run_command(&["sh", "-c", "echo o >/proc/sysrq-trigger; sleep 60"], code)?;
            ensure!(
                ran.stderr.contains(line),
                "it does not say {line:?}: {}",
                ran.stderr
            );
            Ok(())
        }),
        test_within(BOOT + LEAVE, "Ctrl-C reaches a command", interrupted),
        test_within(BOOT + LEAVE, "a person at a shell's prompt", prompt),
    ]
}

fn ends(words: &'static str, code: u8, line: &str) -> Result<()> {
    Host::need_linux_kvm()?;
    let ran = Work::new(default_kernel()?)?.run(&Launch {
        words,
        ..Launch::small(BOOT)
    })?;
    let said = format!("{}\nthe console:\n{}", ran.stderr, ran.console);
    ensure!(
        ran.reports.last().is_some_and(|report| report == "end"),
        "it did not come to its end: {said}"
    );
    ensure!(
        ran.ended == Ended::Exited(code.into()),
        "{:?}, not {code}: {said}",
        ran.ended
    );
    ensure!(ran.stderr.contains(line), "it does not say {line:?}: {said}");
    Ok(())
}

/// The status becomes ours, and so far nothing is said.
fn command(words: &'static [&'static str], code: u8, report: &str) -> Result<()> {
    let ran = run_command(words, code)?;
    ensure!(ran.stderr.is_empty(), "it said: {}", ran.stderr);
    ensure!(
        report.is_empty() || ran.reports == [report],
        "the console:\n{}",
        ran.console
    );
    Ok(())
}

fn run_command(command: &'static [&'static str], code: u8) -> Result<Ran> {
    Host::need_linux_kvm()?;
    let ran = Work::new(default_kernel()?)?.run(&Launch {
        command,
        ..Launch::small(BOOT)
    })?;
    ensure!(
        ran.ended == Ended::Exited(code.into()),
        "{:?}, not {code}: {}\nthe console:\n{}",
        ran.ended,
        ran.stderr,
        ran.console
    );
    Ok(ran)
}

/// A command that a person interrupts, as a shell would tell it.
fn interrupted() -> Result<()> {
    Host::need_linux_kvm()?;
    let work = Work::new(default_kernel()?)?;
    let launch = Launch {
        command: &["sh", "-c", "echo runs; exec sleep 1000"],
        ..Launch::small(BOOT)
    };
    let mut terminal = run_in_terminal(&work, &launch)?;
    terminal.screen.wait_line("runs", BOOT)?;
    terminal.type_keys(b"\x03")?;
    let status = terminal.wait(LEAVE)?;
    ensure!(status.code() == Some(130), "{status}: {}", terminal.screen.text());
    Ok(())
}

fn run_in_terminal(work: &Work, launch: &Launch) -> Result<Terminal> {
    let mut command = Command::new(artifact(Artifact::Bulkhead)?);
    command
        .arg("run")
        .args(jail_flags())
        .arg(work.write_spec(launch, None)?)
        .arg("--power-off-grace=1")
        .env("XDG_RUNTIME_DIR", work.path());
    Terminal::start(command)
}

/// Types a command, sees its output, and leaves with Ctrl-A x.
fn prompt() -> Result<()> {
    Host::need_linux_kvm()?;
    let work = Work::new(default_kernel()?)?;
    let launch = Launch {
        words: "guest.end=shell",
        ..Launch::small(BOOT)
    };
    let mut terminal = run_in_terminal(&work, &launch)?;
    terminal.screen.wait_line("guest: end", BOOT)?;
    terminal.type_keys(b"echo $((6 * 7))\r")?;
    terminal.screen.wait_line("42", BOOT)?;
    let screen = terminal.screen.text();
    ensure!(screen.contains("# echo $((6 * 7))"), "no prompt: {screen}");
    terminal.type_keys(b"\x01x")?;
    let status = terminal.wait(LEAVE)?;
    ensure!(status.success(), "{status}: {}", terminal.screen.text());
    ensure!(terminal.is_as_before()?, "the terminal's settings have changed");
    Ok(())
}
