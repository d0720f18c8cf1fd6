//! `bulkhead audit`: each role's own binary, in the jail that `bulkhead run` would give it, tries
//! what a taken-over process would try; the result names the wall that stopped it.
//!
//! ```text
//!   bulkhead audit            probe = the role's binary built with feature `probe`
//!     targets (file, process, sockets)
//!     for each role, attack:
//!       order in argv[0] ---> starts as ever ... lockdown() returns -> tries the attack
//!       outcome <------------ report pipe: begun, then an errno or success; or killed by SIGSYS
//! ```
//!
//! The launcher's side ([`run`]) and the probe's side (`probe`) share the list of attacks
//! ([`catalogue`]) and the text of an order ([`order`]). A binary that was not built with the
//! feature holds none of the attacks.

#[cfg(feature = "probe")]
mod attacks;
pub mod catalogue;
#[cfg(feature = "launcher")]
pub(crate) mod nic;
pub mod order;
#[cfg(feature = "probe")]
pub mod probe;
#[cfg(feature = "launcher")]
mod report;
#[cfg(feature = "launcher")]
mod run;
#[cfg(feature = "launcher")]
mod targets;
pub mod wall;

#[cfg(feature = "launcher")]
use crate::sandbox::Role;
#[cfg(feature = "launcher")]
pub use run::{Options, run};

/// The roles that there are attacks for.
#[cfg(feature = "launcher")]
pub(crate) const AUDITED: [Role; 6] = [
    Role::Vmm,
    Role::Vcpu,
    Role::Disk,
    Role::Net,
    Role::Supervisor,
    Role::Startup,
];
