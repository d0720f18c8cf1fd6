//! Puts a kernel, its initrd, command line and ACPI tables into guest memory. Every byte of the
//! files is untrusted.

pub mod acpi;
mod bzimage;
mod elf;
mod error;
mod image;
mod paging;
mod pvh;
mod reset_vector;
#[cfg(test)]
mod tests;

pub use error::BootError;
pub use image::Image;

use crate::kvm::Entry;
use crate::memory::{GuestRam, HUGE_PAGE, layout};
use vm_memory::{Bytes, GuestAddress};

/// What the guest boots; kept open, so that a reboot loads it again.
pub struct BootImages {
    /// ELF or bzImage.
    pub kernel: Image,
    /// Initial RAM disk.
    pub initrd: Option<Image>,
    /// Command line, without NUL.
    pub cmdline: String,
    /// PCI slots whose devices may come and go, a bit each.
    pub hotplug_slots: u32,
}

/// Most bytes, and share of RAM, that get huge pages beside the images, in each of two places.
const BOOT_ROOM: u64 = 16 << 20;
const BOOT_SHARE: u64 = 16;

/// Huge pages for where Linux allocates while it boots: behind the kernel and below the top of low
/// RAM, where the page structures lie. A kernel smaller than a huge page is no Linux.
fn place_huge_pages(ram: &GuestRam, kernel: &Image, kernel_end: u64) {
    if ram.is_used() || kernel.size() < HUGE_PAGE as u64 {
        return;
    }
    let room = BOOT_ROOM.min(ram.size() / BOOT_SHARE);
    ram.place_huge_pages(kernel_end, room);
    ram.place_huge_pages(layout::low_ram_end(ram.size()).saturating_sub(room), room);
}

/// Where the initrd was put.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Placed {
    start: u64,
    size: u64,
}

impl BootImages {
    /// Loads everything for a machine of `cpus` vCPUs and says where the boot CPU starts.
    ///
    /// # Errors
    /// Any [`BootError`].
    pub fn load(&self, ram: &GuestRam, cpus: u8) -> Result<Entry, BootError> {
        if self.cmdline.len() > layout::CMDLINE_MAX {
            return Err(BootError::CmdlineTooLong(self.cmdline.len()));
        }
        if self.cmdline.contains('\0') {
            return Err(BootError::CmdlineNul);
        }
        let mut cmdline = self.cmdline.clone().into_bytes();
        cmdline.push(0);
        ram.memory()
            .write_slice(&cmdline, GuestAddress(layout::CMDLINE))?;
        let rsdp = acpi::write(ram, cpus, self.hotplug_slots)?;
        reset_vector::write(ram)?;
        let mut magic = [0; 4];
        self.kernel.read_exact_at(&mut magic, 0)?;
        let entry = if magic == elf::MAGIC {
            let kernel = elf::load(&self.kernel, ram)?;
            place_huge_pages(ram, &self.kernel, kernel.end);
            let initrd = self.load_initrd(ram, kernel.end, u64::MAX)?;
            pvh::write_start_info(ram, initrd, rsdp)?;
            kernel.entry
        } else {
            let kernel = bzimage::load(&self.kernel, ram, self.cmdline.len())?;
            place_huge_pages(ram, &self.kernel, kernel.end);
            let initrd = self.load_initrd(ram, kernel.end, kernel.initrd_max)?;
            kernel.write_zero_page(ram, initrd, rsdp)?;
            paging::write_identity_map(ram)?;
            kernel.entry
        };
        paging::write_gdt(ram, entry.mode)?;
        Ok(entry)
    }

    /// As high as the kernel allows in RAM below the PCI hole, so that it is in no one's way.
    fn load_initrd(&self, ram: &GuestRam, kernel_end: u64, max: u64) -> Result<Option<Placed>, BootError> {
        const PAGE: u64 = 4096;
        let Some(initrd) = &self.initrd else {
            return Ok(None);
        };
        let size = initrd.size();
        let top = layout::low_ram_end(ram.size()).min(max.saturating_add(1));
        let room = top.saturating_sub(kernel_end.next_multiple_of(PAGE));
        let start = top.saturating_sub(size) & !(PAGE - 1);
        if size > room || start < kernel_end {
            return Err(BootError::InitrdTooLarge { size, room });
        }
        initrd.load(ram, 0, start, size)?;
        Ok(Some(Placed { start, size }))
    }
}
