//! `bulkhead-supervisor [--seccomp=MODE]`: started by `bulkhead run` in a jail, with its control
//! socket as descriptor 3.

use jailer::sandbox::{OrEnd, SeccompMode, end, end_on_panic};
use jailer::supervisor::SupervisorError;
use jailer::tell::tell;
use std::error::Error;
use std::process::ExitCode;

/// Not the C library's: that one needs brk, mprotect and madvise, which the policy would then allow.
#[global_allocator]
static ALLOCATOR: OrEnd<dlmalloc::GlobalDlmalloc> = OrEnd::new(dlmalloc::GlobalDlmalloc);

fn main() -> ExitCode {
    let mut mode = SeccompMode::Enforce;
    for argument in std::env::args().skip(1) {
        match argument.strip_prefix("--seccomp=").map(str::parse) {
            Some(Ok(given)) => mode = given,
            _ => {
                tell(format_args!(
                    "supervisor: '{argument}' is no argument: it is started by bulkhead run"
                ));
                return ExitCode::from(vm_spec::control::exit_code::USAGE);
            }
        }
    }
    end_on_panic("supervisor");
    match jailer::supervisor::run(mode) {
        Ok(()) => end(0),
        Err(SupervisorError::SpawnerGone) => end(1),
        Err(error) => {
            tell(format_args!("supervisor: {error}"));
            let mut cause = error.source();
            while let Some(error) = cause {
                tell(format_args!("  cause: {error}"));
                cause = error.source();
            }
            end(1)
        }
    }
}
