//! The tiny guest under our vmm: started directly, with no jail around it, or by `bulkhead run`.

mod console;
mod echo;
mod events;
mod liar;
mod run;
mod vmm;

pub use console::Console;
pub use echo::{Echo, Tap};
pub use events::Events;
pub use liar::{Liar, Lie};
pub use run::{Run, launcher};
pub use vmm::{Device, Ended, Vm, VmOptions};
