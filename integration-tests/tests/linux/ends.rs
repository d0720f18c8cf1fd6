//! How Linux guests end, and what the exit code says of it; a person at the console.

use crate::boots::{BOOT, GRACE};
use crate::default_kernel;
use anyhow::{Result, ensure};
use integration_tests::artifacts::Artifact;
use integration_tests::host::Host;
use integration_tests::linux::{Launch, Work};
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

/// Types a command, sees its output, and leaves with Ctrl-A x.
fn prompt() -> Result<()> {
    Host::need_linux_kvm()?;
    let work = Work::new(default_kernel()?)?;
    let launch = Launch {
        words: "guest.end=shell",
        ..Launch::small(BOOT)
    };
    let mut command = Command::new(artifact(Artifact::Bulkhead)?);
    command
        .arg("run")
        .args(jail_flags())
        .arg(work.write_spec(&launch, None)?)
        .arg("--power-off-grace=1")
        .env("XDG_RUNTIME_DIR", work.path());
    let mut terminal = Terminal::start(command)?;
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
