//! Port and memory exits: serial, the ports that end or reset, PCI configuration space.

use crate::machine::{Events, ExitCounters, Hotplug, Platform, Ports};
use crate::pci::PciBus;
use crate::serial::{Com1, ConsoleOutput};
use arbitrary::Unstructured;
use kvm_ioctls::VcpuExit;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use vm_spec::machine;

/// Where something answers; the input's low bits are added.
const PORTS: [u16; 11] = [
    machine::COM1_PORT,
    machine::SLEEP_CONTROL_PORT,
    machine::SLEEP_STATUS_PORT,
    machine::RESET_PORT,
    machine::GED_PORT,
    machine::PVPANIC_PORT,
    0x60,
    0xCF8,
    0xCFC,
    0,
    machine::HOTPLUG_PORT,
];
const MOST_STEPS: usize = 128;

/// Carries out exits of any port, address, width and value.
pub fn exits(input: &[u8]) {
    let (console, mut person) = UnixStream::pair().expect("a socket pair");
    person.set_nonblocking(true).expect("a non-blocking socket");
    let output = ConsoleOutput::new(console.into()).expect("a console");
    let platform = Platform {
        com1: Com1::new(Arc::new(output)).expect("a UART"),
        ports: Ports::new().expect("ports"),
        pci: PciBus::new(true),
        hotplug: Hotplug::new(!1),
        events: Arc::new(Events::new().expect("an eventfd")),
    };
    let counters = ExitCounters::default();
    let mut input = Unstructured::new(input);
    for _ in 0..MOST_STEPS {
        if step(&platform, &counters, &mut person, &mut input).is_none() {
            break;
        }
    }
    assert!(platform.com1.output().dropped() <= platform.com1.output().written());
}

fn step(
    platform: &Platform,
    counters: &ExitCounters,
    person: &mut UnixStream,
    input: &mut Unstructured<'_>,
) -> Option<()> {
    if input.is_empty() {
        return None;
    }
    let [kind, place] = input.arbitrary::<[u8; 2]>().ok()?;
    let port = PORTS[usize::from(place >> 4) % PORTS.len()].wrapping_add(u16::from(place & 15));
    let mut data = [0; 8];
    let length = [1, 2, 4, 8][usize::from(kind >> 6)];
    let data = &mut data[..length];
    match kind & 7 {
        0 => return handle(platform, VcpuExit::IoIn(port, data), counters),
        1 => {
            input.fill_buffer(data).ok()?;
            handle(platform, VcpuExit::IoOut(port, data), counters);
        }
        2 => {
            let address = address(input)?;
            handle(platform, VcpuExit::MmioRead(address, data), counters);
        }
        3 => {
            let address = address(input)?;
            input.fill_buffer(data).ok()?;
            handle(platform, VcpuExit::MmioWrite(address, data), counters);
        }
        4 => {
            // A person who types more than there is room for is not heard.
            let _ = person.write(&[place; 40]);
            platform.com1.receive();
        }
        5 => platform.ports.press_power_button().ok()?,
        6 => {
            platform.com1.reset();
            platform.ports.reset();
            platform.pci.reset();
        }
        _ => platform.com1.output().flush(),
    }
    Some(())
}

fn handle(platform: &Platform, exit: VcpuExit<'_>, counters: &ExitCounters) -> Option<()> {
    // What ends a boot is for the machine to act on; the next exit may come before it does.
    let _ = platform.handle(exit, counters);
    Some(())
}

/// Near the enhanced configuration space, or anywhere.
fn address(input: &mut Unstructured<'_>) -> Option<u64> {
    let word: u32 = input.arbitrary().ok()?;
    match word & 1 {
        0 => Some(machine::ECAM_START + u64::from(word >> 1 & 0xF_FFFF)),
        _ => input.arbitrary().ok(),
    }
}
