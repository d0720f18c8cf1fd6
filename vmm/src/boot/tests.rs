//! What ends up in guest memory, and that no header, however wrong, does more than fail.

use super::*;
use crate::kvm::EntryMode;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use vm_spec::machine;

const LOAD: u64 = 0x20_0000;

fn file(bytes: &[u8]) -> File {
    let memfd = nix::sys::memfd::memfd_create(c"image", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    let mut file = File::from(memfd);
    file.write_all(bytes).unwrap();
    file
}

fn image(bytes: &[u8], name: &'static str) -> Image {
    Image::new(OwnedFd::from(file(bytes)), name).unwrap()
}

fn ram() -> GuestRam {
    GuestRam::new(machine::MIN_MEMORY, None).unwrap()
}

fn boot(kernel: &[u8], initrd: Option<&[u8]>, ram: &GuestRam) -> Result<Entry, BootError> {
    BootImages {
        hotplug_slots: 0,
        kernel: image(kernel, "kernel"),
        initrd: initrd.map(|bytes| image(bytes, "initrd")),
        cmdline: "console=ttyS0".into(),
    }
    .load(ram, 2)
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// An ELF file with one segment of four bytes (and four of .bss) and a PVH note.
fn elf() -> Vec<u8> {
    let mut file = vec![0; 0x200];
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    for (at, value) in [(18, 62u16), (54, 56), (56, 2)] {
        put(&mut file, at, &value.to_le_bytes());
    }
    let words = [
        (32, 64u64),
        (64, 1),
        (72, 0x1FC),
        (88, LOAD),
        (96, 4),
        (104, 8),
        (120, 4),
        (128, 0x100),
        (152, 20),
    ];
    for (at, value) in words {
        put(&mut file, at, &value.to_le_bytes());
    }
    for (at, value) in [(0x100, 4u32), (0x104, 4), (0x108, 18), (0x110, LOAD as u32)] {
        put(&mut file, at, &value.to_le_bytes());
    }
    put(&mut file, 0x10C, b"Xen\0");
    put(&mut file, 0x1FC, b"CODE");
    file
}

/// A bzImage of one setup sector and 1 KiB of code.
fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 0x400];
    put(&mut file, 0x1F1, &[1]);
    put(&mut file, 0x1FE, &[0x55, 0xAA, 0xEB, 0x66]);
    put(&mut file, 0x202, b"HdrS\x0f\x02");
    put(&mut file, 0x211, &[1]);
    for (at, value) in [
        (0x22C, 0x7FFF_FFFFu32),
        (0x230, 0x20_0000),
        (0x238, 2047),
        (0x260, 0x1000),
    ] {
        put(&mut file, at, &value.to_le_bytes());
    }
    put(&mut file, 0x234, &[1, 0, 3, 0]);
    put(&mut file, 0x258, &LOAD.to_le_bytes());
    file.extend([0xC3; 0x400]);
    file
}

fn read<const N: usize>(ram: &GuestRam, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    ram.memory()
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

fn u64_at(ram: &GuestRam, address: u64) -> u64 {
    u64::from_le_bytes(read(ram, address))
}

#[test]
fn an_elf_kernel_finds_its_code_command_line_initrd_and_tables() {
    let ram = ram();
    let entry = boot(&elf(), Some(b"initrd"), &ram).unwrap();
    assert_eq!((entry.mode, entry.rip), (EntryMode::Pvh, LOAD));
    assert_eq!(u64_at(&ram, layout::GDT + 0x10), EntryMode::Pvh.gdt()[2]);
    assert_eq!(&read(&ram, LOAD), b"CODE\0\0\0\0");
    assert_eq!(read(&ram, layout::START_INFO), 0x336E_C578u32.to_le_bytes());
    let module = u64_at(&ram, layout::START_INFO + 16);
    assert_eq!(&read(&ram, u64_at(&ram, module)), b"initrd");
    assert_eq!(u64_at(&ram, module + 8), 6);
    let cmdline = u64_at(&ram, layout::START_INFO + 24);
    assert_eq!(&read(&ram, cmdline), b"console=ttyS0\0");
    assert_eq!(&read(&ram, u64_at(&ram, layout::START_INFO + 32)), b"RSD PTR ");
}

#[test]
fn a_reboot_clears_what_the_file_does_not_fill() {
    let ram = ram();
    boot(&elf(), None, &ram).unwrap();
    ram.mark_used();
    ram.memory().write_obj(!0u64, GuestAddress(LOAD)).unwrap();
    boot(&elf(), None, &ram).unwrap();
    assert_eq!(&read(&ram, LOAD), b"CODE\0\0\0\0");
}

#[test]
fn a_file_that_becomes_shorter_is_said_to_be_truncated() {
    let (ram, file) = (ram(), file(&elf()));
    let image = Image::new(file.try_clone().unwrap().into(), "kernel").unwrap();
    file.set_len(0x1FE).unwrap();
    let error = image.load(&ram, 0x1FC, LOAD, 4).unwrap_err();
    assert!(
        matches!(
            error,
            BootError::Truncated {
                end: 0x200,
                size: 0x1FE,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(&read(&ram, LOAD), b"CO\0\0");
}

#[test]
fn a_bzimage_finds_its_header_completed_in_the_zero_page() {
    let ram = ram();
    let entry = boot(&bzimage(), Some(b"initrd"), &ram).unwrap();
    assert_eq!((entry.mode, entry.rip), (EntryMode::Linux64, LOAD + 0x200));
    assert_eq!(u64_at(&ram, layout::GDT + 0x10), EntryMode::Linux64.gdt()[2]);
    assert_eq!(read(&ram, LOAD), [0xC3; 0x400]);
    assert_eq!(&read(&ram, layout::ZERO_PAGE + 0x202), b"HdrS");
    assert_eq!(&read(&ram, u64_at(&ram, layout::ZERO_PAGE + 0x70)), b"RSD PTR ");
    let initrd = u32::from_le_bytes(read(&ram, layout::ZERO_PAGE + 0x218));
    assert_eq!(&read(&ram, u64::from(initrd)), b"initrd");
    let [entries] = read(&ram, layout::ZERO_PAGE + 0x1E8);
    assert_eq!(usize::from(entries), layout::memory_map(ram.size()).len());
}

#[test]
fn a_bzimage_that_cannot_be_booted_says_why() {
    for (at, value, why) in [
        (0x236, 0, "32-bit kernel"),
        (0x211, 0, "zImage"),
        (0x207, 1, "older than 2.12"),
        (0x201, 0xFF, "longer than its place"),
        (0x202, 0, "neither an ELF file nor a bzImage"),
    ] {
        let mut kernel = bzimage();
        kernel[at] = value;
        let error = boot(&kernel, None, &ram()).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_bzimage_is_not_loaded_where_it_would_not_stay() {
    let placed = |preferred: u64, init_size: u32| {
        let mut kernel = bzimage();
        put(&mut kernel, 0x258, &preferred.to_le_bytes());
        put(&mut kernel, 0x260, &init_size.to_le_bytes());
        boot(&kernel, None, &ram()).map(|entry| entry.rip - 0x200)
    };
    assert_eq!(placed(16 << 20, 1 << 20).unwrap(), 16 << 20);
    assert_eq!(placed(0, 1 << 20).unwrap(), 2 << 20, "below 1 MiB lies boot data");
    // It would move itself to 16 MiB, and its end is past the end of RAM.
    let error = placed(16 << 20, 20 << 20).unwrap_err();
    assert!(
        matches!(error, BootError::MemoryTooSmall { need, .. } if need == 36 << 20),
        "{error}"
    );
    assert!(placed(u64::MAX, 1 << 20).is_err());
}

/// A fixed sequence (xorshift), so that a failure can be repeated.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn no_mutation_of_a_kernel_file_does_more_than_fail() {
    let ram = ram();
    let mut state = 0x9E37_79B9_7F4A_7C15;
    let extremes = [0, 1, 0x7F, 0x80, 0xFE, 0xFF];
    let (mut booted, mut failed) = (0, 0);
    for round in 0..4000 {
        let mut kernel = if round % 2 == 0 { elf() } else { bzimage() };
        for _ in 0..=random(&mut state) % 4 {
            let at = (random(&mut state) % 0x280) as usize % kernel.len();
            let width = (random(&mut state) % 8) as usize + 1;
            let value = extremes[(random(&mut state) % 6) as usize];
            let end = (at + width).min(kernel.len());
            kernel[at..end].fill(value);
        }
        kernel.truncate((random(&mut state) % 0x1000) as usize + 1);
        match boot(&kernel, None, &ram) {
            Ok(_) => booted += 1,
            Err(_) => failed += 1,
        }
    }
    assert!(booted > 100 && failed > 100, "{booted} booted, {failed} failed");
}
