//! The virtio-pci transport (virtio 1.3, 4.1) over a vhost-user back end. No device is emulated
//! here: what a queue carries is between the guest's driver and the back end.
//!
//! ```text
//! vCPU threads   config space, BAR: registers, MSI-X table          (function, registers, ...)
//!       |  mailbox: "DRIVER_OK", "reset", "configuration written"
//! device thread  every vhost-user exchange, the back end's faults   (worker)
//!
//! guest doorbell --ioeventfd--> back end --eventfd--> irqfd --> guest     (no vmm on the way)
//! ```
//!
//! A vCPU thread only takes short locks and makes bounded system calls (routes, irqfds,
//! ioeventfds, eventfds). It never waits for a back end: a driver's reset reads as not done until
//! the device's thread has drained the rings, or the process of a lost back end has ended.

mod bus_master;
mod configuration;
mod device;
mod device_type;
mod doorbells;
mod function;
mod layout;
mod limiter;
mod mailbox;
mod offer;
mod pulse;
mod queue;
mod registers;
mod reset;
mod seat;
mod successor;
mod transport;
mod worker;

#[cfg(test)]
mod bus_master_tests;
#[cfg(test)]
mod device_tests;
#[cfg(test)]
mod function_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod reset_tests;
#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(not(test), allow(dead_code, reason = "the tests use more of it"))]
pub(crate) mod rig;
#[cfg(test)]
mod seat_tests;
#[cfg(test)]
mod successor_tests;

pub use device::{Connecting, Device, DeviceError, DeviceEvent, DeviceParts, EventSink, Word};
pub use mailbox::{Done, Successor};
pub use seat::{Confine, Seat};
