//! `bulkhead`: see [`jailer::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(jailer::cli::main())
}
