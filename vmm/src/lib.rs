//! The KVM process of a microVM: vCPUs, guest RAM, the virtio-pci transport and a generic
//! vhost-user front end. No device is emulated behind virtio.
#![cfg_attr(not(test), deny(clippy::print_stderr))]

pub mod boot;
pub mod control;
pub mod error;
pub mod frontend;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod platform;
pub mod serial;
pub mod virtio;

#[cfg(feature = "fuzzing")]
#[path = "../fuzz/mod.rs"]
pub mod fuzz;
