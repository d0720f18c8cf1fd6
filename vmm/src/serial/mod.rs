//! COM1: a 16550 whose output never blocks a vCPU and whose input waits in the console's socket.

mod output;
mod uart;

pub use output::ConsoleOutput;
pub use uart::{Com1, Input};
