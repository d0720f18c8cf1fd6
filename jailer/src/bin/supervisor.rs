//! `bulkhead-supervisor [--seccomp=MODE]`: started by `bulkhead run` in a jail, with its control
//! socket as descriptor 3.

use jailer::sandbox::SeccompMode;
use jailer::supervisor::SupervisorError;
use std::error::Error;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut mode = SeccompMode::Enforce;
    for argument in std::env::args().skip(1) {
        match argument.strip_prefix("--seccomp=").map(str::parse) {
            Some(Ok(given)) => mode = given,
            _ => {
                eprintln!("supervisor: '{argument}' is no argument: it is started by bulkhead run");
                return ExitCode::from(vm_spec::control::exit_code::USAGE);
            }
        }
    }
    match jailer::supervisor::run(mode) {
        Ok(()) => ExitCode::SUCCESS,
        Err(SupervisorError::SpawnerGone) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("supervisor: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  cause: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}
