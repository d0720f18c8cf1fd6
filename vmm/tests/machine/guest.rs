//! PVH kernels of a few instructions, as ELF files.

use std::fs::File;
use std::io::{Seek, Write};
use vm_spec::machine;

/// Where the kernels are loaded.
pub(crate) const LOAD_ADDRESS: u32 = 0x10_0000;
const CODE_OFFSET: usize = 0x200;

/// The I/O APIC's register with the lower half of a pin's redirection entry; the upper half is in the next.
pub(crate) fn redirection(pin: u32) -> u32 {
    0x10 + 2 * pin
}

/// 32-bit code, one instruction after another.
#[derive(Clone, Default)]
pub(crate) struct Code(Vec<u8>);

impl Code {
    /// `out` of one byte to a port.
    pub(crate) fn out(mut self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.0.extend([0x66, 0xBA, low, high, 0xB0, value, 0xEE]);
        self
    }

    /// `out` of four bytes to a port.
    pub(crate) fn out_long(mut self, port: u16, value: u32) -> Self {
        let [low, high] = port.to_le_bytes();
        self.0.extend([0x66, 0xBA, low, high, 0xB8]);
        self.0.extend(value.to_le_bytes());
        self.0.push(0xEF);
        self
    }

    /// Writes a text to COM1.
    pub(crate) fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(0x3F8, byte))
    }

    /// ACPI S5.
    pub(crate) fn power_off(self) -> Self {
        self.out(0x600, 5 << 2 | 1 << 5)
    }

    /// Waits in the guest for ever.
    pub(crate) fn spin(mut self) -> Self {
        self.0.extend([0xEB, 0xFE]);
        self
    }

    /// Loads an empty IDT and divides by zero.
    pub(crate) fn triple_fault(mut self) -> Self {
        // push 0; push 0; lidt [esp]; xor ecx, ecx; div ecx
        self.0
            .extend([0xBC, 0, 0, 0x20, 0, 0x6A, 0, 0x6A, 0, 0x0F, 0x01, 0x1C, 0x24]);
        self.0.extend([0x31, 0xC9, 0xF7, 0xF1]);
        self
    }

    /// Counts boots in memory that a reboot does not load, then resets while fewer than `boots`.
    pub(crate) fn reset_until(mut self, boots: u8) -> Self {
        // inc byte [0x200000]; cmp byte [0x200000], boots; jae +9
        self.0.extend([0xFE, 0x05, 0, 0, 0x20, 0]);
        self.0.extend([0x80, 0x3D, 0, 0, 0x20, 0, boots]);
        let reset = Self::default().out(0x602, 1).spin();
        self.0.extend([0x73, reset.0.len() as u8]);
        self.0.extend(reset.0);
        self
    }

    /// Waits for the event device to say what happened, then goes on.
    pub(crate) fn wait_for_event(mut self) -> Self {
        // mov dx, 0x604; again: in al, dx; test al, al; je again
        self.0
            .extend([0x66, 0xBA, 0x04, 0x06, 0xEC, 0x84, 0xC0, 0x74, 0xFB]);
        self
    }

    /// Writes so many bytes of memory to COM1.
    pub(crate) fn print_memory(mut self, count: u32) -> Self {
        // mov dx, 0x3F8; mov esi, LOAD_ADDRESS; mov ecx, count; cld; rep outsb
        self.0.extend([0x66, 0xBA, 0xF8, 0x03, 0xBE]);
        self.0.extend(LOAD_ADDRESS.to_le_bytes());
        self.0.push(0xB9);
        self.0.extend(count.to_le_bytes());
        self.0.extend([0xFC, 0xF3, 0x6E]);
        self
    }

    /// Opens the event device's pin, and ends by a triple fault once that interrupts.
    pub(crate) fn fall_at_the_next_event(self) -> Self {
        let pin = redirection(machine::GED_GSI);
        let lapic_spurious = 0xFEE0_00F0;
        let code = self.store(lapic_spurious, &0x1FFu32.to_le_bytes());
        let mut code = code.set_ioapic(pin + 1, 0).set_ioapic(pin, 0x30);
        // mov esp, 0x200000; push 0; push 0; lidt [esp]; sti
        code.0
            .extend([0xBC, 0, 0, 0x20, 0, 0x6A, 0, 0x6A, 0, 0x0F, 0x01, 0x1C, 0x24]);
        code.0.push(0xFB);
        code.spin()
    }

    /// Sets a register of the I/O APIC.
    pub(crate) fn set_ioapic(self, register: u32, value: u32) -> Self {
        self.store(machine::IOAPIC_START, &register.to_le_bytes())
            .store(machine::IOAPIC_START + 0x10, &value.to_le_bytes())
    }

    /// Writes the four bytes of a register of the I/O APIC to COM1.
    pub(crate) fn print_ioapic(self, register: u32) -> Self {
        let mut code = self.store(machine::IOAPIC_START, &register.to_le_bytes());
        // mov eax, [window]; mov dx, 0x3F8
        code.0.push(0xA1);
        code.0.extend((machine::IOAPIC_START as u32 + 0x10).to_le_bytes());
        code.0.extend([0x66, 0xBA, 0xF8, 0x03]);
        // out dx, al; shr eax, 8
        code.0.extend([0xEE, 0xC1, 0xE8, 8].repeat(4));
        code
    }

    /// Echoes one byte from COM1's receiver back.
    pub(crate) fn echo(mut self) -> Self {
        // mov dx, 0x3FD; again: in al, dx; test al, 1; je again; mov dx, 0x3F8; in; out
        self.0
            .extend([0x66, 0xBA, 0xFD, 0x03, 0xEC, 0xA8, 0x01, 0x74, 0xFB]);
        self.0.extend([0x66, 0xBA, 0xF8, 0x03, 0xEC, 0xEE]);
        self
    }

    /// Writes to COM1 which bits of a port's byte are clear.
    pub(crate) fn print_clear_bits(mut self, port: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        // mov dx, port; in al, dx; not al; mov dx, 0x3F8; out dx, al
        self.0.extend([0x66, 0xBA, low, high, 0xEC, 0xF6, 0xD0]);
        self.0.extend([0x66, 0xBA, 0xF8, 0x03, 0xEE]);
        self
    }

    /// Writes the low byte of a model-specific register to COM1, and a value below 2^32 to it.
    pub(crate) fn print_and_set_msr(mut self, index: u32, value: u32) -> Self {
        // mov ecx, index; rdmsr; mov dx, 0x3F8; out dx, al; mov eax, value; xor edx, edx; wrmsr
        self.0.push(0xB9);
        self.0.extend(index.to_le_bytes());
        self.0.extend([0x0F, 0x32, 0x66, 0xBA, 0xF8, 0x03, 0xEE, 0xB8]);
        self.0.extend(value.to_le_bytes());
        self.0.extend([0x31, 0xD2, 0x0F, 0x30]);
        self
    }

    /// Writes to memory, one, two or four bytes.
    pub(crate) fn store(mut self, address: u64, bytes: &[u8]) -> Self {
        // mov [address], value
        match bytes.len() {
            1 => self.0.extend([0xC6, 0x05]),
            2 => self.0.extend([0x66, 0xC7, 0x05]),
            _ => self.0.extend([0xC7, 0x05]),
        }
        self.0.extend((address as u32).to_le_bytes());
        self.0.extend(bytes);
        self
    }

    /// Starts the virtio device in this slot with one queue (virtio 1.3, 3.1.1 and 4.1.4.3).
    pub(crate) fn drive(self, slot: u8) -> Self {
        let bar = machine::MMIO32_START + u64::from(slot) * machine::VIRTIO_BAR_SIZE;
        let command = machine::ECAM_START + (u64::from(slot) << 15) + 4;
        let code = self.store(command, &2u16.to_le_bytes()).store(bar + 20, &[3]);
        let code = code.store(bar + 8, &1u32.to_le_bytes());
        // VIRTIO_F_VERSION_1, then FEATURES_OK.
        let mut code = code.store(bar + 12, &1u32.to_le_bytes()).store(bar + 20, &[11]);
        for (at, area) in [(32, 0x30_0000u32), (40, 0x30_4000), (48, 0x30_8000)] {
            code = code.store(bar + at, &area.to_le_bytes());
        }
        code.store(bar + 28, &1u16.to_le_bytes()).store(bar + 20, &[15])
    }

    /// The bytes of the ELF file.
    pub(crate) fn elf(self) -> Vec<u8> {
        let mut file = vec![0; CODE_OFFSET];
        put(&mut file, 0, b"\x7fELF\x02\x01\x01");
        put(&mut file, 16, &2u16.to_le_bytes()); // executable
        put(&mut file, 18, &62u16.to_le_bytes()); // x86-64
        put(&mut file, 20, &1u32.to_le_bytes());
        put(&mut file, 32, &64u64.to_le_bytes()); // program headers
        put(&mut file, 54, &56u16.to_le_bytes());
        put(&mut file, 56, &2u16.to_le_bytes());
        let size = self.0.len() as u64;
        segment(
            &mut file[64..],
            1,
            CODE_OFFSET as u64,
            u64::from(LOAD_ADDRESS),
            size,
        );
        segment(&mut file[120..], 4, 0x100, 0, 20);
        put(&mut file, 0x100, &4u32.to_le_bytes());
        put(&mut file, 0x104, &4u32.to_le_bytes());
        put(&mut file, 0x108, &18u32.to_le_bytes()); // XEN_ELFNOTE_PHYS32_ENTRY
        put(&mut file, 0x10C, b"Xen\0");
        put(&mut file, 0x110, &LOAD_ADDRESS.to_le_bytes());
        file.extend(self.0);
        file
    }
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

fn segment(header: &mut [u8], kind: u32, offset: u64, address: u64, size: u64) {
    put(header, 0, &kind.to_le_bytes());
    for (at, value) in [
        (8, offset),
        (16, address),
        (24, address),
        (32, size),
        (40, size),
        (48, 4),
    ] {
        put(header, at, &value.to_le_bytes());
    }
}

/// An unlinked file with these contents.
pub(crate) fn file(contents: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(contents).unwrap();
    file.rewind().unwrap();
    file
}
