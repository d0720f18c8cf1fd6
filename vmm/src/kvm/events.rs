//! irqfds with their GSI routing table, and ioeventfds: interrupts and doorbells without exits.

#![expect(
    unsafe_code,
    reason = "lends borrowed eventfds to kvm-ioctls, which wants its own type"
)]

use super::irqchip::Irqchip;
use super::vm::Vm;
use crate::error::Error;
use crate::platform::{Doorbells, Gsi, Interrupts, MsiMessage};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use std::collections::BTreeMap;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::sync::{Arc, Mutex, PoisonError};
use vm_spec::machine;
use vmm_sys_util::eventfd::EventFd;

/// Pins of the I/O APIC.
const PINS: u32 = 24;
/// Most MSI-X vectors of all devices together; KVM's table has 4096 entries in all.
const MAX_MSI: u32 = 4000;

struct Table {
    next: u32,
    free: Vec<u32>,
    msi: BTreeMap<u32, MsiMessage>,
}

/// The VM's routing table and event registrations.
pub struct EventRouter {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

impl EventRouter {
    /// A router over the routes that KVM made with its interrupt controllers: GSI n is pin n. They
    /// are replaced as a whole with the first MSI route; until then they lead to the PICs' pins too, which
    /// [`Irqchip::create`] masks. (Setting the same routes again would wait for every processor.)
    #[must_use]
    pub fn new(vm: &Vm) -> Self {
        Self {
            vm: vm.fd().clone(),
            table: Mutex::new(Table {
                next: machine::FIRST_MSI_GSI,
                free: Vec::new(),
                msi: BTreeMap::new(),
            }),
        }
    }

    /// Resets the interrupt controllers. MSI routes are their owners' to reset.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn reset(&self, irqchip: &dyn Irqchip) -> Result<(), Error> {
        irqchip.reset(&self.vm)
    }

    fn commit(&self, msi: &BTreeMap<u32, MsiMessage>) -> io::Result<()> {
        let mut entries: Vec<_> = (0..PINS).map(pin_entry).collect();
        entries.extend(msi.iter().map(|(&gsi, message)| msi_entry(gsi, message)));
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(self.vm.set_gsi_routing(&table)?)
    }
}

fn pin_entry(pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: pin,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip = kvm_bindings::kvm_irq_routing_irqchip {
        irqchip: KVM_IRQCHIP_IOAPIC,
        pin,
    };
    entry
}

fn msi_entry(gsi: u32, message: &MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi = kvm_bindings::kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

/// An `EventFd` view of a borrowed descriptor; never closes it.
fn lend(fd: BorrowedFd<'_>) -> ManuallyDrop<EventFd> {
    // SAFETY: the descriptor is open for the borrow's lifetime, which covers the one call that the
    // view is made for, and ManuallyDrop keeps it from being closed.
    ManuallyDrop::new(unsafe { EventFd::from_raw_fd(fd.as_raw_fd()) })
}

impl Interrupts for EventRouter {
    fn allocate(&self) -> io::Result<Gsi> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gsi) = table.free.pop() {
            return Ok(Gsi(gsi));
        }
        if table.next - machine::FIRST_MSI_GSI >= MAX_MSI {
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, "no interrupt left"));
        }
        let gsi = table.next;
        table.next += 1;
        Ok(Gsi(gsi))
    }

    fn free(&self, gsi: Gsi) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.free.push(gsi.0);
    }

    fn set_route(&self, gsi: Gsi, message: Option<MsiMessage>) -> io::Result<()> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if gsi.0 < machine::FIRST_MSI_GSI || gsi.0 >= table.next {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not an MSI interrupt",
            ));
        }
        if table.msi.get(&gsi.0) == message.as_ref() {
            return Ok(());
        }
        let before = match message {
            Some(message) => table.msi.insert(gsi.0, message),
            None => table.msi.remove(&gsi.0),
        };
        // On refusal the table stays what KVM has.
        self.commit(&table.msi).inspect_err(|_| {
            match before {
                Some(before) => table.msi.insert(gsi.0, before),
                None => table.msi.remove(&gsi.0),
            };
        })
    }

    fn attach(&self, gsi: Gsi, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(self.vm.register_irqfd(&lend(eventfd), gsi.0)?)
    }

    fn detach(&self, gsi: Gsi, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(self.vm.unregister_irqfd(&lend(eventfd), gsi.0)?)
    }
}

impl Doorbells for EventRouter {
    fn attach(&self, address: u64, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self.vm.register_ioevent(&lend(eventfd), &address, NoDatamatch)?)
    }

    fn detach(&self, address: u64, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self
            .vm
            .unregister_ioevent(&lend(eventfd), &address, NoDatamatch)?)
    }
}
