//! The only KVM ioctls of the project: the VM, its vCPUs, interrupts and doorbells.

mod cpuid;
mod events;
mod irqchip;
mod msrs;
mod pmu;
mod registers;
mod vcpu;
mod vm;

pub use events::EventRouter;
pub use irqchip::{InKernel, Irqchip};
pub use registers::{Entry, EntryMode};
pub use vcpu::{Kicker, Vcpu, install_kick_handler};
pub use vm::{Host, Vm};
