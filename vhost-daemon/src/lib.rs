//! The one shell around every vhost-user device process.
//!
//! A device crate implements [`Program`] (flags, what it opens), [`Device`] (features,
//! configuration space) and [`QueueHandler`] (what one queue does), and its `main` is
//! `vhost_daemon::run::<MyProgram>()`. This crate does the rest: command line, log, vhost-user
//! session, guest memory, rings, in-flight region, one thread a queue, lockdown, exit code.
//!
//! ```text
//!   front end  <-- socket -->  session (main thread)   owns Device, memory table, in-flight region
//!                                 | start / stop -> QueueState / call, err fds
//!                                 v
//!                              one worker thread a queue   owns QueueHandler and its Ring
//!                                 ^ kick eventfd, the handler's own fd
//!   guest  <-- shared memory --> Ring -> Chain -> volatile slices
//! ```
//!
//! Trust: everything in guest memory is hostile and is checked in [`ring`] and [`memory`]; the
//! front end is more trusted than this process, yet its messages are checked in `session`, since
//! one that is wrong would break memory safety here.
#![cfg_attr(not(test), deny(clippy::print_stderr))]

pub mod allocator;
pub mod bucket;
mod descriptors;
pub mod device;
mod doorkeeper;
pub mod event;
pub mod faults;
mod flags;
mod limits;
mod listener;
mod log;
pub mod memory;
mod orders;
pub mod ring;
mod run;
mod session;
mod signals;
mod wait;
mod worker;

pub use bucket::SharedLimiter;
pub use descriptors::inherited;
pub use device::{ConfigError, Device, Program, QueueHandler, QueueLimits, Wait};
pub use limits::Limits;
pub use orders::{Order, OrderNumber, Orders};
pub use ring::{Chain, Ring, RingFault};
pub use run::{DaemonError, run};
pub use session::{ServeError, SessionError};
pub use worker::{WorkerError, progress};

#[cfg(feature = "fuzzing")]
#[path = "../fuzz/mod.rs"]
pub mod fuzz;
