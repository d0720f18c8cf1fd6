//! `bulkhead-vmm --control-fd=N [--seccomp=enforce|trap|log|off] [--log-level=L]`: one VM, described by
//! the first message on the control socket.
#![cfg_attr(not(test), deny(clippy::print_stderr))]

use jailer::clock::monotonic_ns;
use jailer::sandbox::{SeccompMode, end, end_on_panic};
use jailer::tell::{chain, tell};
use std::mem::ManuallyDrop;
use std::process::ExitCode;
use std::time::Duration;
use vm_spec::control::{EndReason, FdNumber, FromVmm, ToVmm, VmConfig};
use vmm::control::{ControlError, ControlSocket, Incoming, adopt};
use vmm::error::Error;
use vmm::machine::{Build, Options};

/// Longest that the configuration may take: it is sent before this process is spawned.
const CONFIG_DEADLINE: Duration = Duration::from_secs(5);

const USAGE: &str = "usage: bulkhead-vmm --control-fd=N [--seccomp=enforce|trap|log|off] [--log-level=LEVEL]";

/// Not the C library's: that one needs brk, mprotect and madvise, which the policies would then allow.
#[global_allocator]
static ALLOCATOR: jailer::sandbox::OrEnd<dlmalloc::GlobalDlmalloc> =
    jailer::sandbox::OrEnd::new(dlmalloc::GlobalDlmalloc);

struct Arguments {
    control: i32,
    seccomp: SeccompMode,
    log_level: tracing::Level,
}

fn main() -> ExitCode {
    let started_ns = monotonic_ns();
    let arguments = match parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            tell(format_args!("bulkhead-vmm: {error}\n{USAGE}"));
            return ExitCode::from(vm_spec::control::exit_code::USAGE);
        }
    };
    tracing_subscriber::fmt()
        .with_max_level(arguments.log_level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let socket = match adopt(FdNumber(arguments.control), "control socket") {
        Ok(socket) => socket,
        Err(error) => {
            tell(format_args!("bulkhead-vmm: {error}\n{USAGE}"));
            return ExitCode::from(vm_spec::control::exit_code::USAGE);
        }
    };
    let mut control = ControlSocket::new(socket);
    end_on_panic("bulkhead-vmm");
    match run(&mut control, &arguments, started_ns) {
        Ok(()) => end(vm_spec::control::exit_code::POWER_OFF),
        Err(error) => {
            // A supervisor that is gone has said why, or whoever misses it does.
            match error {
                Error::Control(ControlError::Closed) => tracing::debug!("{error}"),
                error => tracing::error!("{}", chain(&error)),
            }
            end(vm_spec::control::exit_code::ERROR)
        }
    }
}

fn parse() -> Result<Arguments, lexopt::Error> {
    use lexopt::prelude::{Long, ValueExt};
    let mut arguments = Arguments {
        control: -1,
        seccomp: SeccompMode::Enforce,
        log_level: tracing::Level::INFO,
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("control-fd") => arguments.control = parser.value()?.parse()?,
            Long("seccomp") => arguments.seccomp = parser.value()?.parse()?,
            Long("log-level") => arguments.log_level = parser.value()?.parse()?,
            other => return Err(other.unexpected()),
        }
    }
    if arguments.control < 0 {
        return Err("--control-fd is missing".into());
    }
    Ok(arguments)
}

/// Builds and runs the VM; every end, good or bad, is told to the supervisor.
fn run(control: &mut ControlSocket, arguments: &Arguments, started_ns: u64) -> Result<(), Error> {
    let config = receive_config(control)?;
    let error = match build_and_run(config, control, arguments, started_ns) {
        Ok(reason) => return report_end(control, reason),
        Err(error) => error,
    };
    let told = control.send(
        0,
        FromVmm::Error {
            what: error.to_string(),
            cause: error.cause(),
            hint: error.hint(),
        },
    );
    if told.is_ok() {
        end(vm_spec::control::exit_code::ERROR);
    }
    Err(error)
}

fn build_and_run(
    config: VmConfig,
    control: &mut ControlSocket,
    arguments: &Arguments,
    started_ns: u64,
) -> Result<EndReason, Error> {
    let build = Build::new(
        config,
        arguments.control,
        Options {
            seccomp: arguments.seccomp,
        },
    )?;
    let machine = build.build(control)?;
    let started = machine.lock_down_and_start()?;
    // The end of the process takes it apart: threads that ended by themselves, and descriptors
    // that were closed one by one, would take time and calls.
    let mut machine = ManuallyDrop::new(machine);
    machine.run(control, started_ns, &started)
}

fn report_end(control: &ControlSocket, reason: EndReason) -> Result<(), Error> {
    match control.send(0, FromVmm::Ended(reason)) {
        // Nobody is left to be told: that is why it ended.
        Err(ControlError::Closed) if reason == EndReason::Stopped => Ok(()),
        other => Ok(other?),
    }
}

fn receive_config(control: &mut ControlSocket) -> Result<VmConfig, Error> {
    match control.receive_within(CONFIG_DEADLINE)? {
        Incoming::Message(message, _) => match message.body {
            ToVmm::Start(config) => Ok(*config),
            _ => Err(ControlError::NotStart.into()),
        },
        Incoming::Closed | Incoming::Nothing => Err(ControlError::Closed.into()),
    }
}
