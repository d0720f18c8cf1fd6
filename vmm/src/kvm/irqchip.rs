//! Interrupt controllers behind one trait, so that a split irqchip can take this one's place.

use crate::error::Error;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_irqchip__bindgen_ty_1,
};
use kvm_bindings::{kvm_ioapic_state, kvm_ioapic_state__bindgen_ty_1, kvm_pic_state};
use kvm_ioctls::VmFd;
use vm_spec::machine;

/// Pins that a guest may make level-triggered (ELCR): the bits that KVM's own PICs have.
const MASTER_ELCR: u8 = 0xF8;
const SLAVE_ELCR: u8 = 0xDE;

/// Where interrupt controllers are emulated.
pub trait Irqchip: Send + Sync {
    /// Makes the controllers of a fresh VM that has its memory slots and no vCPU yet, as
    /// [`Irqchip::reset`] leaves them.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    fn create(&self, vm: &VmFd) -> Result<(), Error>;
    /// Puts the I/O APIC (and PIC) into their power-on state while no vCPU runs.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    fn reset(&self, vm: &VmFd) -> Result<(), Error>;
}

/// PIC, I/O APIC and local APICs all in the kernel; no PIT.
pub struct InKernel;

impl Irqchip for InKernel {
    fn create(&self, vm: &VmFd) -> Result<(), Error> {
        vm.create_irq_chip()
            .map_err(Error::kvm("create the interrupt controllers"))?;
        mask_pics(vm)
    }

    fn reset(&self, vm: &VmFd) -> Result<(), Error> {
        const MASKED: u64 = 1 << 16;
        let mut ioapic = kvm_ioapic_state {
            base_address: machine::IOAPIC_START,
            ..Default::default()
        };
        ioapic.redirtbl = [kvm_ioapic_state__bindgen_ty_1 { bits: MASKED }; 24];
        mask_pics(vm)?;
        set(vm, KVM_IRQCHIP_IOAPIC, kvm_irqchip__bindgen_ty_1 { ioapic })
    }
}

/// The MADT says that there are no PICs (ACPI 6.5, 5.2.12: PCAT_COMPAT), so no guest masks them. KVM
/// makes them with all pins open, to the boot CPU's open LINT0.
fn mask_pics(vm: &VmFd) -> Result<(), Error> {
    set(vm, KVM_IRQCHIP_PIC_MASTER, pic(MASTER_ELCR))?;
    set(vm, KVM_IRQCHIP_PIC_SLAVE, pic(SLAVE_ELCR))
}

fn set(vm: &VmFd, chip_id: u32, chip: kvm_irqchip__bindgen_ty_1) -> Result<(), Error> {
    let state = kvm_irqchip {
        chip_id,
        pad: 0,
        chip,
    };
    vm.set_irqchip(&state)
        .map_err(Error::kvm("reset the interrupt controllers"))
}

/// A PIC with all its pins masked.
fn pic(elcr_mask: u8) -> kvm_irqchip__bindgen_ty_1 {
    kvm_irqchip__bindgen_ty_1 {
        pic: kvm_pic_state {
            imr: 0xFF,
            elcr_mask,
            ..Default::default()
        },
    }
}
