//! Fixture library of the tests, the nested runner, and what the two commands are made of.

pub mod artifacts;
pub mod bench;
pub mod demo;
pub mod frontend_harness;
pub mod fuzz;
pub mod host;
pub mod install;
pub mod interrupt;
pub mod lent;
mod lint;
pub mod linux;
pub mod loop_device;
pub mod mounts;
pub mod nested;
pub mod process;
pub mod qemu_img;
pub mod scratch;
pub mod setup;
pub mod suite;
pub mod tap;
pub mod terminal;
pub mod tiny;
pub mod verify;
