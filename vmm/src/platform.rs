//! What the virtio side of the vmm asks of the KVM side, and the reverse.
//!
//! `kvm` implements [`Interrupts`] and [`Doorbells`]; `pci` offers the bus that vCPU exits are
//! routed to. Neither knows the other's types.

use std::os::fd::BorrowedFd;

/// A global system interrupt that an MSI-X vector owns.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Gsi(pub u32);

/// An MSI message as a guest programs it (PCI 3.0, 6.8.2).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct MsiMessage {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Interrupt delivery by KVM.
pub trait Interrupts: Send + Sync {
    /// Reserves a GSI for one MSI-X vector.
    ///
    /// # Errors
    /// When no GSI is left.
    fn allocate(&self) -> std::io::Result<Gsi>;
    /// Gives back a GSI from [`Interrupts::allocate`] that nothing is attached to.
    fn free(&self, gsi: Gsi);
    /// Routes `gsi` to `message` (`None`: nowhere). Takes effect before it returns.
    ///
    /// # Errors
    /// When KVM refuses the routing table.
    fn set_route(&self, gsi: Gsi, message: Option<MsiMessage>) -> std::io::Result<()>;
    /// Makes a signal on `eventfd` raise `gsi` (KVM_IRQFD).
    ///
    /// # Errors
    /// When KVM refuses.
    fn attach(&self, gsi: Gsi, eventfd: BorrowedFd<'_>) -> std::io::Result<()>;
    /// Undoes [`Interrupts::attach`].
    ///
    /// # Errors
    /// When it was not attached.
    fn detach(&self, gsi: Gsi, eventfd: BorrowedFd<'_>) -> std::io::Result<()>;
}

/// Doorbells that KVM turns into eventfd signals without an exit (KVM_IOEVENTFD).
pub trait Doorbells: Send + Sync {
    /// A write of any value and width at guest physical `address` signals `eventfd`.
    ///
    /// # Errors
    /// When KVM refuses.
    fn attach(&self, address: u64, eventfd: BorrowedFd<'_>) -> std::io::Result<()>;
    /// Undoes [`Doorbells::attach`].
    ///
    /// # Errors
    /// When it was not attached.
    fn detach(&self, address: u64, eventfd: BorrowedFd<'_>) -> std::io::Result<()>;
}
