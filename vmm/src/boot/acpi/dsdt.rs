//! The DSDT: processors, PCI root bridge, COM1, power button, panic device.

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, ONE,
    OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::sdt::Sdt;
use vm_spec::machine;

const DSDT_HEADER: u32 = 36;
/// ACPI 6.5, 5.6.6: a power button was pressed.
const BUTTON_PRESSED: u8 = 0x80;
/// _STA: present, enabled, shown, functioning.
const PRESENT: u8 = 0xF;

/// The whole table for `cpus` vCPUs.
pub(super) fn build(cpus: u8) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", DSDT_HEADER, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut code = Vec::new();
    let sleep_type = machine::S5_SLEEP_TYPE;
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&sleep_type, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(&mut code);
    processors(cpus, &mut code);
    Scope::new(
        "_SB_".into(),
        vec![&Pci, &ComPort, &PowerButton, &EventDevice, &Panic, &Motherboard],
    )
    .to_aml_bytes(&mut code);
    dsdt.append_slice(&code);
    dsdt
}

/// One ACPI0007 a vCPU; _UID matches the MADT's processor uid.
fn processors(cpus: u8, code: &mut Vec<u8>) {
    let mut scope = Vec::new();
    for cpu in 0..cpus {
        let path = Path::new(&format!("C{cpu:03}"));
        Device::new(
            path,
            vec![
                &Name::new("_HID".into(), &"ACPI0007"),
                &Name::new("_UID".into(), &cpu),
            ],
        )
        .to_aml_bytes(&mut scope);
    }
    code.extend_from_slice(&Scope::raw("_SB_".into(), scope));
}

/// The PCI Express root bridge, bus 0 only; interrupts are MSI-X, so there is no _PRT.
struct Pci;

impl Aml for Pci {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let end = |exclusive: u64| (exclusive - 1) as u32;
        Device::new(
            "PCI0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_SEG".into(), &ZERO),
                &Name::new("_BBN".into(), &ZERO),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &AddressSpace::new_bus_number(0u16, 0u16),
                        &IO::new(0xCF8, 0xCF8, 1, 8),
                        &AddressSpace::new_memory(
                            AddressSpaceCacheable::NotCacheable,
                            true,
                            machine::MMIO32_START as u32,
                            end(machine::MMIO32_END),
                            None,
                        ),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// COM1.
struct ComPort;

impl Aml for ComPort {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &IO::new(machine::COM1_PORT, machine::COM1_PORT, 1, 8),
                        &Interrupt::new(true, true, false, false, machine::COM1_GSI),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct PowerButton;

impl Aml for PowerButton {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            "PWRB".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
                &Name::new("_UID".into(), &ZERO),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Generic event device (5.6.9.2): its interrupt reads which event happened and notifies.
struct EventDevice;

impl Aml for EventDevice {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let port = machine::GED_PORT;
        Device::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, machine::GED_GSI)]),
                ),
                &OpRegion::new("EVTR".into(), OpRegionSpace::SystemIO, &port, &ONE),
                &Field::new(
                    "EVTR".into(),
                    FieldAccessType::Byte,
                    FieldLockRule::NoLock,
                    FieldUpdateRule::WriteAsZeroes,
                    vec![FieldEntry::Named(*b"EVTS", 8)],
                ),
                &Method::new(
                    "_EVT".into(),
                    1,
                    true,
                    vec![
                        &Store::new(&Local(0), &Path::new("EVTS")),
                        &And::new(&Local(1), &Local(0), &ONE),
                        &If::new(
                            &Equal::new(&Local(1), &ONE),
                            vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &BUTTON_PRESSED)],
                        ),
                    ],
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// QEMU's panic device, which stock kernels have a driver for.
struct Panic;

impl Aml for Panic {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            "PEVT".into(),
            vec![
                &Name::new("_HID".into(), &"QEMU0001"),
                &Name::new("_STA".into(), &PRESENT),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&IO::new(
                        machine::PVPANIC_PORT,
                        machine::PVPANIC_PORT,
                        1,
                        1,
                    )]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// What must be given to nobody else: ECAM (Linux trusts MCFG only if it is reserved), our
/// ports, and the places kept for hot-plug registers and a VM generation id.
struct Motherboard;

impl Aml for Motherboard {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let sleep = machine::SLEEP_CONTROL_PORT;
        let hotplug = machine::HOTPLUG_PORT;
        Device::new(
            "MBRD".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, machine::ECAM_START as u32, machine::ECAM_SIZE as u32),
                        &Memory32Fixed::new(true, machine::VMGENID_START as u32, 0x1000),
                        &IO::new(sleep, sleep, 1, 8),
                        &IO::new(hotplug, hotplug, 1, 16),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}
