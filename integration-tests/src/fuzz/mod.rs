//! Coverage-guided fuzzing on the stable toolchain: libFuzzer, with LLVM's own coverage pass.
//!
//! A target is a function in its crate's folder `fuzz`, its corpus lies beside it, and one program
//! (`integration-tests/fuzz`) holds them all. What a run finds goes on in `CORPUS` below the target
//! folder, so that the next run knows it; `cargo fuzz-all --minimise` brings the best of it home.

mod program;
mod run;

pub use program::{Program, Target};
pub use run::{Finds, Plan, Run, table};
