//! ACPI 6.5 tables: RSDP, XSDT, FADT, MADT, MCFG, DSDT. They say where everything is and, as
//! important for the time to boot, what is not there.

mod dsdt;
mod fixed;
#[cfg(test)]
mod tests;

use super::BootError;
use crate::memory::{GuestRam, layout};
use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};

const OEM_ID: [u8; 6] = *b"BULKHD";
const OEM_TABLE_ID: [u8; 8] = *b"BULKHEAD";
const OEM_REVISION: u32 = vm_spec::machine::MACHINE_VERSION as u32;
const ALIGNMENT: usize = 16;

/// Tables as they lie in guest memory from [`layout::ACPI_START`] on; the RSDP comes first.
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    fn put(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let address = layout::ACPI_START + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }

    fn build(cpus: u8, hotplug_slots: u32) -> Self {
        let mut tables = Self {
            bytes: vec![0; Rsdp::len()],
        };
        let dsdt = tables.put(&dsdt::build(cpus, hotplug_slots));
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        xsdt.add_entry(tables.put(&fixed::fadt(dsdt)));
        xsdt.add_entry(tables.put(&fixed::madt(cpus)));
        xsdt.add_entry(tables.put(&fixed::mcfg()));
        let xsdt = tables.put(&xsdt);
        let mut rsdp = Vec::new();
        Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
        tables.bytes[..rsdp.len()].copy_from_slice(&rsdp);
        tables
    }
}

/// Writes the tables of a machine of `cpus` vCPUs, with PCI slots (a bit each) whose devices may come and go, and
/// returns the RSDP's address.
///
/// # Errors
/// [`BootError::AcpiTooLarge`], [`BootError::Memory`].
pub fn write(ram: &GuestRam, cpus: u8, hotplug_slots: u32) -> Result<u64, BootError> {
    let tables = Tables::build(cpus, hotplug_slots);
    if tables.bytes.len() as u64 > layout::ACPI_END - layout::ACPI_START {
        return Err(BootError::AcpiTooLarge(tables.bytes.len()));
    }
    ram.memory()
        .write_slice(&tables.bytes, GuestAddress(layout::ACPI_START))?;
    Ok(layout::ACPI_START)
}
