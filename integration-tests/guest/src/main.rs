//! The tiny guest: long mode, its work in ring 3, virtio-pci block and net.
//!
//! The kernel command line chooses the scenario (`scenario=NAME` and its parameters); results are
//! lines `key=value` on COM1, the last one `result=ok` or `result=fail REASON`; then it powers off.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("tiny-guest is a guest: build it for x86_64-unknown-none");
}

#[cfg(target_os = "none")]
mod blk;
#[cfg(target_os = "none")]
mod boot;
#[cfg(target_os = "none")]
mod cpu;
#[cfg(target_os = "none")]
mod flushed;
#[cfg(target_os = "none")]
mod internet;
#[cfg(target_os = "none")]
mod memory;
#[cfg(target_os = "none")]
mod mmio;
#[cfg(target_os = "none")]
mod net;
#[cfg(target_os = "none")]
mod parameters;
#[cfg(target_os = "none")]
mod pci;
#[cfg(target_os = "none")]
mod queue;
#[cfg(target_os = "none")]
mod scenario;
#[cfg(target_os = "none")]
mod serial;
#[cfg(target_os = "none")]
mod storm;
#[cfg(target_os = "none")]
mod virtio;

#[cfg(target_os = "none")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    serial::line!("result=fail panic: {}", info.message());
    cpu::power_off()
}
