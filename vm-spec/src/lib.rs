//! The description of a virtual machine, and the messages between Bulkhead's processes.
//!
//! This crate holds data only: no unsafe code, no KVM, no file access. The privileged launcher
//! links it without linking any code that parses what a guest wrote.
#![forbid(unsafe_code)]

pub mod client;
pub mod command;
pub mod control;
pub mod disk;
pub mod events;
pub mod image;
pub mod machine;
pub mod net;
pub mod run_state;
pub mod schema;
pub mod shape;
pub mod size;
pub mod spec;
pub mod supervise;
pub mod timestamp;

#[cfg(feature = "fuzzing")]
#[path = "../fuzz/mod.rs"]
pub mod fuzz;
