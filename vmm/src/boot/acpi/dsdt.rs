//! The DSDT: processors, PCI root bridge, COM1, power button, panic device.

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, MethodCall, Name,
    Notify, ONE, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::sdt::Sdt;
use vm_spec::machine;

const DSDT_HEADER: u32 = 36;
/// ACPI 6.5, 5.6.6: a power button was pressed.
const BUTTON_PRESSED: u8 = 0x80;
/// _STA: present, enabled, shown, functioning.
const PRESENT: u8 = 0xF;

/// ACPI 6.5, 5.6.6: a device came.
const DEVICE_CHECK: u8 = 1;
/// ACPI 6.5, 5.6.6: a device is to go.
const EJECT_REQUEST: u8 = 3;
/// The event register's bit for PCI hot-plug.
const HOTPLUG_EVENT: u8 = 2;

/// The whole table for `cpus` vCPUs, with PCI slots (a bit each) whose devices may come and go.
pub(super) fn build(cpus: u8, hotplug_slots: u32) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", DSDT_HEADER, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut code = Vec::new();
    let sleep_type = machine::S5_SLEEP_TYPE;
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&sleep_type, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(&mut code);
    processors(cpus, &mut code);
    let events = EventDevice {
        hotplug: hotplug_slots != 0,
    };
    Scope::new(
        "_SB_".into(),
        vec![&Pci, &ComPort, &PowerButton, &events, &Panic, &Motherboard],
    )
    .to_aml_bytes(&mut code);
    if hotplug_slots != 0 {
        hotplug(hotplug_slots, &mut code);
    }
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

/// The driver of the hot-plug registers: each slot with its way to let go of the device, and the method that
/// looks which of them have news.
fn hotplug(slots: u32, code: &mut Vec<u8>) {
    let port = machine::HOTPLUG_PORT;
    let mut scope = Vec::new();
    OpRegion::new("HPRG".into(), OpRegionSpace::SystemIO, &port, &16u8).to_aml_bytes(&mut scope);
    let fields = [*b"CAME", *b"BACK", *b"EJCT"].map(|name| FieldEntry::Named(name, 32));
    Field::new(
        "HPRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields.to_vec(),
    )
    .to_aml_bytes(&mut scope);
    let slots: Vec<_> = (machine::FIRST_SLOT..=machine::LAST_SLOT)
        .map(|slot| (slot, 1u32 << slot))
        .filter(|(_, bit)| slots & bit != 0)
        .collect();
    for (slot, bit) in &slots {
        Device::new(
            slot_path(*slot),
            vec![
                &Name::new("_ADR".into(), &(u32::from(*slot) << 16)),
                &Name::new("_SUN".into(), slot),
                &Method::new("_EJ0".into(), 1, true, vec![&Store::new(&Path::new("EJCT"), bit)]),
            ],
        )
        .to_aml_bytes(&mut scope);
    }
    let mut looks = Vec::new();
    for (register, notice) in [("CAME", DEVICE_CHECK), ("BACK", EJECT_REQUEST)] {
        Store::new(&Local(0), &Path::new(register)).to_aml_bytes(&mut looks);
        for (slot, bit) in &slots {
            And::new(&Local(1), &Local(0), bit).to_aml_bytes(&mut looks);
            If::new(
                &Equal::new(&Local(1), bit),
                vec![&Notify::new(&slot_path(*slot), &notice)],
            )
            .to_aml_bytes(&mut looks);
        }
    }
    Method::new("LOOK".into(), 0, true, vec![&Code(looks)]).to_aml_bytes(&mut scope);
    code.extend_from_slice(&Scope::raw("\\_SB_.PCI0".into(), scope));
}

fn slot_path(slot: u8) -> Path {
    Path::new(&format!("S{slot:03}"))
}

/// Terms that are written already.
struct Code(Vec<u8>);

impl Aml for Code {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
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
struct EventDevice {
    /// It also tells of PCI hot-plug.
    hotplug: bool,
}

impl Aml for EventDevice {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let port = machine::GED_PORT;
        let event = Path::new("EVTS");
        let take = Store::new(&Local(0), &event);
        let mask = And::new(&Local(1), &Local(0), &ONE);
        let pressed = Equal::new(&Local(1), &ONE);
        let button = Path::new("\\_SB_.PWRB");
        let press = Notify::new(&button, &BUTTON_PRESSED);
        let if_pressed = If::new(&pressed, vec![&press]);
        let hotplug_mask = And::new(&Local(1), &Local(0), &HOTPLUG_EVENT);
        let came = Equal::new(&Local(1), &HOTPLUG_EVENT);
        let look = MethodCall::new(Path::new("\\_SB_.PCI0.LOOK"), vec![]);
        let if_came = If::new(&came, vec![&look]);
        let mut method: Vec<&dyn Aml> = vec![&take, &mask, &if_pressed];
        if self.hotplug {
            method.extend([&hotplug_mask as &dyn Aml, &if_came]);
        }
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
                &Method::new("_EVT".into(), 1, true, method),
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
