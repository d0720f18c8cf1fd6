//! `bulkhead`: see [`jailer::cli`].

use std::process::ExitCode;

/// The C library's maps and unmaps pages for most of what a launch allocates, which takes longer
/// than all else that the launcher computes.
#[global_allocator]
static ALLOCATOR: jailer::sandbox::OrEnd<dlmalloc::GlobalDlmalloc> =
    jailer::sandbox::OrEnd::with_code(dlmalloc::GlobalDlmalloc, vm_spec::control::exit_code::ERROR);

fn main() -> ExitCode {
    ExitCode::from(jailer::cli::main())
}
