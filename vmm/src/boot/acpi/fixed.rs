//! Tables of fixed form: FADT (5.2.9), MADT (5.2.12), MCFG (PCI firmware specification 4.1.2).

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use vm_spec::machine;

/// IAPC_BOOT_ARCH (table 5.11): no VGA to probe, no CMOS real time clock; bits 0 and 1 clear: no
/// ISA devices beyond those in the DSDT, no 8042.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// An 8-bit register in I/O space.
fn port(address: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(address),
    )
}

/// A hardware-reduced platform with reset and sleep registers and nothing else.
pub(super) fn fadt(dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = port(machine::RESET_PORT);
    fadt.reset_value = machine::RESET_VALUE;
    fadt.sleep_control_reg = port(machine::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(machine::SLEEP_STATUS_PORT);
    fadt.finalize()
}

/// One local APIC a vCPU, its id the vCPU's index, and the I/O APIC with GSI 0 to 23.
pub(super) fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(machine::LAPIC_START as u32),
    );
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, machine::IOAPIC_START as u32, 0));
    madt
}

/// Segment 0, bus 0.
pub(super) fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(machine::ECAM_START, 0, 0, 0);
    mcfg
}
