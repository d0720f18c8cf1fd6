//! Fixture library of the tests, the nested runner, and what the two commands are made of.

pub mod artifacts;
pub mod frontend_harness;
pub mod nested;
pub mod process;
pub mod suite;
pub mod demo;
pub mod host;
pub mod setup;
