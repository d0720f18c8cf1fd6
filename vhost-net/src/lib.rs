//! The network process: one TAP, served to one virtual machine over vhost-user.
//!
//! ```text
//!   TAP --readv--> rx  --+                      +-- header, guard: what a guest may send
//!                        +-- guest's buffers ---+
//!   TAP <-writev-- tx  --+                      +-- pacer: how much
//! ```
//!
//! Trust: the guest's headers and frames are hostile and are checked in [`header`] and [`guard`];
//! its rings are checked by `vhost-daemon`. Only [`tap`] talks to the kernel about the interface.
#![cfg_attr(not(test), deny(clippy::print_stderr))]

pub mod address;
pub mod buffers;
pub mod capture;
pub mod control;
pub mod counters;
pub mod device;
pub mod filter;
pub mod guard;
pub mod header;
pub mod link;
pub mod offload;
pub mod options;
pub mod pacer;
pub mod rx;
pub mod state;
pub mod station;
pub mod steering;
pub mod tap;
pub mod third;
pub mod tx;

#[cfg(feature = "fuzzing")]
#[path = "../fuzz/mod.rs"]
pub mod fuzz;
