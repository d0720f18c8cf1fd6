//! The guest-visible machine, version 1: every address a guest may rely on.
//!
//! A change to any of these is a new machine version: a saved guest carries the version it was
//! started with.

/// The version of the guest-visible machine that this file describes.
pub const MACHINE_VERSION: u16 = 1;

/// Least guest memory, in bytes.
pub const MIN_MEMORY: u64 = 32 << 20;
/// Most guest memory, in bytes.
pub const MAX_MEMORY: u64 = 1 << 40;
/// Most vCPUs.
pub const MAX_CPUS: u8 = 32;

/// Guest RAM below 4 GiB ends here at the latest; the rest continues at 4 GiB.
pub const PCI_HOLE_START: u64 = 0xC000_0000;
/// Where RAM above the hole starts.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// 32-bit window for PCI BARs (start).
pub const MMIO32_START: u64 = PCI_HOLE_START;
/// 32-bit window for PCI BARs (end, exclusive).
pub const MMIO32_END: u64 = ECAM_START;
/// PCI Express enhanced configuration space, segment 0, bus 0 only (1 MiB).
pub const ECAM_START: u64 = 0xE000_0000;
/// Size of the enhanced configuration space: one bus.
pub const ECAM_SIZE: u64 = 1 << 20;
/// The I/O APIC (emulated in the kernel).
pub const IOAPIC_START: u64 = 0xFEC0_0000;
/// The local APICs (emulated in the kernel).
pub const LAPIC_START: u64 = 0xFEE0_0000;

/// Size of each virtio function's one 64-bit BAR; the vmm assigns `MMIO32_START + slot * this`
/// before the guest starts, so that a guest that assigns nothing finds it there.
pub const VIRTIO_BAR_SIZE: u64 = 0x8_0000;

/// PCI device numbers that a device may have (0 is the host bridge), inclusive.
pub const FIRST_SLOT: u8 = 1;
/// The last PCI device number.
pub const LAST_SLOT: u8 = 31;

/// Where the spec has a command: its exit status (8 bits), in a vendor-specific capability of the host bridge
/// (PCI 3.0, appendix H). What is written there ends the VM.
pub const STATUS_REGISTER: u16 = 0x44;

/// Most entries of a queue of a device.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// COM1: first I/O port (8 ports).
pub const COM1_PORT: u16 = 0x3F8;
/// COM1: global system interrupt.
pub const COM1_GSI: u32 = 4;
/// First GSI given to MSI-X vectors (the I/O APIC has 24 pins).
pub const FIRST_MSI_GSI: u32 = 24;

/// ACPI sleep control register (8 bits, I/O space). ACPI 6.5, 4.8.3.7.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register (8 bits, I/O space).
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register (8 bits, I/O space): writing [`RESET_VALUE`] resets the machine.
pub const RESET_PORT: u16 = 0x602;
/// The value that resets.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of S5 (power off), as `_S5` says it.
pub const S5_SLEEP_TYPE: u8 = 5;
/// Paravirtual panic device (QEMU0001): a guest that panics writes bit 0 here.
pub const PVPANIC_PORT: u16 = 0x505;
/// Generic event device: its event register (8 bits, read clears; bit 0 power button, bit 1 PCI hot-plug).
pub const GED_PORT: u16 = 0x604;
/// Generic event device: its global system interrupt.
pub const GED_GSI: u32 = 9;
/// PCI hot-plug registers (16 ports), where a machine has slots for them: 32 bits each, one for each PCI device
/// number. Which were filled since the last look: a read clears it.
pub const HOTPLUG_PORT: u16 = 0x610;
/// Which the guest is asked to let go of: a read clears it.
pub const HOTPLUG_REMOVAL_PORT: u16 = HOTPLUG_PORT + 4;
/// Written: which the guest has let go of.
pub const HOTPLUG_EJECT_PORT: u16 = HOTPLUG_PORT + 8;
/// Reserved guest memory for a VM generation id (one page, below the PCI hole's end).
pub const VMGENID_START: u64 = 0xFED0_0000;
