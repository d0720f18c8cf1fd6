//! The machine: built from a `VmConfig`, run until the guest or the supervisor ends it.
//!
//! ```text
//! build (RAM, slots, irqchip, vCPU threads, devices, boot images) -> lockdown -> Running
//!   -> events: reset -> reboot in place
//!              power-off, panic, triple fault, Stop, supervisor gone -> Ended
//! ```

mod build;
mod early;
mod events;
mod exits;
mod hotplug;
mod ports;
mod reminder;
mod run;
mod slots;
mod vcpus;

pub use build::{Build, Options};
pub use events::{DeviceWord, Events, GuestEvent};
pub use exits::{ExitCounters, Platform};
pub use hotplug::Hotplug;
#[cfg(feature = "fuzzing")]
pub(crate) use ports::Ports;
pub use run::{Machine, Started};
