//! `cargo demo`.

use clap::{Parser, Subcommand};
use integration_tests::demo;
use integration_tests::interrupt;
use integration_tests::linux::Images;
use integration_tests::nested::{self, Ended, Job, Nested};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Boots a stock Debian guest in jailed processes and shows what runs.
#[derive(Parser)]
#[command(name = "cargo demo")]
struct Arguments {
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Subcommand)]
enum Verb {
    /// The demo proper, from a folder where everything is built.
    #[command(hide = true)]
    Staged {
        /// The folder.
        folder: PathBuf,
    },
    /// Build the images of the test guests and write their list for BULKHEAD_TEST_IMAGES.
    TestImages {
        /// The list's file.
        file: PathBuf,
    },
    /// Run shell commands in an emulated machine with a real KVM, whose root is this machine's
    /// file tree (writes stay in its memory).
    NestedShell {
        /// RAM of the outer machine in MiB.
        #[arg(long, default_value_t = 3072)]
        memory: u32,
        /// Seconds that each command may take.
        #[arg(long, default_value_t = 300)]
        deadline: u64,
        /// CPUs of the outer machine. Two are faster for what runs beside a guest, but a second guest, or a
        /// second vCPU of one, then meets a fault of the emulator.
        #[arg(long, default_value_t = 1)]
        cpus: u8,
        /// A folder that both sides write, at the same path.
        #[arg(long)]
        shared: Option<PathBuf>,
        /// Show the outer kernel's console.
        #[arg(long)]
        console: bool,
        /// Each argument is one command for /bin/sh, run in turn in one boot; a failing one ends it.
        #[arg(required = true)]
        commands: Vec<String>,
    },
}

fn main() -> ExitCode {
    nested::agent::intercept();
    demo::peer::intercept();
    let (result, last_line) = match Arguments::parse().verb {
        Some(Verb::NestedShell {
            memory,
            deadline,
            cpus,
            shared,
            console,
            commands,
        }) => {
            let options = nested::Options {
                memory_mib: memory,
                cpus,
                shared,
                console,
                ..Default::default()
            };
            (
                nested_shell(&options, Duration::from_secs(deadline), &commands),
                "nested",
            )
        }
        Some(Verb::Staged { folder }) => (
            demo::run_staged(&folder).map(|()| ExitCode::SUCCESS),
            "demo proper",
        ),
        Some(Verb::TestImages { file }) => (Images::write(&file).map(|()| ExitCode::SUCCESS), "images"),
        None => (demo::run().map(|()| ExitCode::SUCCESS), "demo"),
    };
    result.unwrap_or_else(|error| {
        println!("{last_line}: failed: {error:#}");
        ExitCode::FAILURE
    })
}

/// Exit code of the first command that fails, else 0.
fn nested_shell(
    options: &nested::Options,
    deadline: Duration,
    commands: &[String],
) -> anyhow::Result<ExitCode> {
    interrupt::heed()?;
    let mut nested = Nested::boot(options)?;
    let mut code = ExitCode::SUCCESS;
    for command in commands {
        let ended = nested.run_through(&Job::new(&["/bin/sh", "-c", command], deadline).for_nested(None))?;
        if !ended.success() {
            eprintln!("nested: '{command}' {ended:?}");
            code = match ended {
                Ended::Exited(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
                Ended::Signalled(_) | Ended::TimedOut | Ended::NotStarted(_) => ExitCode::FAILURE,
            };
            break;
        }
    }
    nested.power_off()?;
    Ok(code)
}
