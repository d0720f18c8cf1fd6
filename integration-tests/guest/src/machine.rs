//! The machine's addresses, as the guest knows them (the test `addresses_agree` of the crate
//! integration-tests compares them with `vm_spec::machine`).

/// COM1's data register.
pub const COM1: u16 = 0x3F8;
/// COM1's interrupt.
pub const COM1_GSI: u32 = 4;
/// ACPI sleep control register.
pub const SLEEP_CONTROL: u16 = 0x600;
/// SLP_EN and SLP_TYP of S5 (ACPI 6.5, 4.8.3.7).
pub const SLEEP_S5: u8 = (5 << 2) | (1 << 5);
/// ACPI reset register.
pub const RESET: u16 = 0x602;
/// What resets.
pub const RESET_VALUE: u8 = 1;
/// The panic device.
pub const PVPANIC: u16 = 0x505;
/// PCI configuration address port; its data port is 4 above.
pub const PCI_CONFIG_ADDRESS: u16 = 0xCF8;
/// PCI configuration data port.
pub const PCI_CONFIG_DATA: u16 = 0xCFC;
/// PCI Express enhanced configuration space of bus 0.
pub const ECAM: u64 = 0xE000_0000;
/// The I/O APIC.
pub const IO_APIC: u64 = 0xFEC0_0000;
/// The local APIC.
pub const LOCAL_APIC: u64 = 0xFEE0_0000;
