//! Where an exit to user space goes. Nothing here waits: a vCPU only takes short locks.

use super::events::{Events, GuestEvent};
use super::hotplug::Hotplug;
use super::ports::Ports;
use crate::pci::PciBus;
use crate::serial::Com1;
use kvm_ioctls::VcpuExit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_spec::machine;

const COM1_LAST: u16 = machine::COM1_PORT + 7;
const ECAM_END: u64 = machine::ECAM_START + machine::ECAM_SIZE;
/// What a read that nobody answers gives.
const FLOATING: u8 = 0xFF;

/// Everything that a guest reaches by an exit.
pub struct Platform {
    /// COM1.
    pub com1: Com1,
    /// Sleep, reset, panic and event registers.
    pub ports: Ports,
    /// The PCI bus with all devices.
    pub pci: PciBus,
    /// What the guest is told of devices that come and go.
    pub hotplug: Hotplug,
    /// Where the main thread hears of those that it lets go of.
    pub events: Arc<Events>,
}

impl Platform {
    /// Carries out one exit. `Some` when it ends this boot.
    pub fn handle(&self, exit: VcpuExit<'_>, counters: &ExitCounters) -> Option<GuestEvent> {
        counters.count(&exit);
        match exit {
            VcpuExit::IoOut(port, data) => return self.port_write(port, data),
            VcpuExit::IoIn(port, data) => self.port_read(port, data),
            VcpuExit::MmioRead(address, data) => self.mmio_read(address, data),
            VcpuExit::MmioWrite(address, data) => return self.mmio_write(address, data),
            VcpuExit::Shutdown => return Some(GuestEvent::TripleFault),
            VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
            VcpuExit::FailEntry(reason, cpu) => {
                let why = format!("KVM cannot enter the guest (reason {reason:#x}, host CPU {cpu})");
                return Some(GuestEvent::KvmFailure(why));
            }
            other => return Some(GuestEvent::KvmFailure(format!("KVM gave up: {other:?}"))),
        }
        None
    }

    fn port_write(&self, port: u16, data: &[u8]) -> Option<GuestEvent> {
        if let machine::COM1_PORT..=COM1_LAST = port {
            // A repeated OUTSB comes as one exit with all its bytes.
            for &byte in data {
                self.com1.write((port - machine::COM1_PORT) as u8, byte);
            }
            return None;
        }
        if let Some(event) = data.first().and_then(|&byte| self.ports.write(port, byte)) {
            return Some(event);
        }
        for slot in self.hotplug.ejected(port, data) {
            // From here on the slot is empty for every vCPU; the rest may take time.
            if self.pci.remove(slot).is_some() {
                self.events.tell_ejected(slot);
            }
        }
        self.pci.io_write(port, data);
        self.pci.take_status().map(GuestEvent::Exit)
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        if let machine::COM1_PORT..=COM1_LAST = port {
            data.fill_with(|| self.com1.read((port - machine::COM1_PORT) as u8));
        } else if let [byte] = data
            && let Some(value) = self.ports.read(port)
        {
            // Only a read of the register's width: reading may clear it.
            *byte = value;
        } else if !self.hotplug.read(port, data) && !self.pci.io_read(port, data) {
            data.fill(FLOATING);
        }
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match address {
            machine::ECAM_START..ECAM_END => self.pci.ecam_read(address - machine::ECAM_START, data),
            _ if self.pci.mmio_read(address, data) => {}
            _ => data.fill(FLOATING),
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) -> Option<GuestEvent> {
        if let machine::ECAM_START..ECAM_END = address {
            self.pci.ecam_write(address - machine::ECAM_START, data);
            return self.pci.take_status().map(GuestEvent::Exit);
        }
        self.pci.mmio_write(address, data);
        None
    }
}

const REASONS: [&str; 8] = [
    "io_in",
    "io_out",
    "mmio_read",
    "mmio_write",
    "hlt",
    "intr",
    "shutdown",
    "other",
];

/// Exits to user space of one vCPU, by reason.
#[derive(Default)]
pub struct ExitCounters([AtomicU64; REASONS.len()]);

impl ExitCounters {
    fn count(&self, exit: &VcpuExit<'_>) {
        self.add(match exit {
            VcpuExit::IoIn(..) => 0,
            VcpuExit::IoOut(..) => 1,
            VcpuExit::MmioRead(..) => 2,
            VcpuExit::MmioWrite(..) => 3,
            VcpuExit::Hlt => 4,
            VcpuExit::Intr => 5,
            VcpuExit::Shutdown => 6,
            _ => 7,
        });
    }

    /// Counts a kick out of the guest.
    pub fn count_kick(&self) {
        self.add(5);
    }

    fn add(&self, reason: usize) {
        self.0[reason].fetch_add(1, Ordering::Relaxed);
    }

    /// Adds these counters to `sums`, one entry a reason.
    pub fn add_to(&self, sums: &mut Vec<(String, u64)>) {
        for (index, (name, count)) in REASONS.iter().zip(&self.0).enumerate() {
            let count = count.load(Ordering::Relaxed);
            match sums.get_mut(index) {
                Some((_, sum)) => *sum += count,
                None => sums.push(((*name).to_owned(), count)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serial::ConsoleOutput;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_wide_read_of_the_event_register_takes_no_event() {
        let (console, _theirs) = UnixStream::pair().unwrap();
        let platform = Platform {
            com1: Com1::new(Arc::new(ConsoleOutput::new(console.into()).unwrap())).unwrap(),
            ports: Ports::new().unwrap(),
            pci: PciBus::new(false),
            hotplug: Hotplug::new(0),
            events: Arc::new(Events::new().unwrap()),
        };
        platform.ports.press_power_button().unwrap();
        let (mut wide, mut byte) = ([0; 4], [0]);
        platform.port_read(machine::GED_PORT, &mut wide);
        platform.port_read(machine::GED_PORT, &mut byte);
        assert_eq!((wide, byte), ([FLOATING; 4], [1]));
    }
}
