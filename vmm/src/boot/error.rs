//! What can be wrong with what is to be booted.

use std::io;

/// Why the guest cannot be booted; messages begin with the field of the spec that is at fault.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file cannot be read.
    #[error("boot.{file}: cannot read the {file}")]
    Read {
        /// `kernel` or `initrd`.
        file: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file ends before something that its headers promise.
    #[error("boot.{file}: the {file} is truncated: bytes {offset} to {end} are needed, it has {size}")]
    Truncated {
        /// `kernel` or `initrd`.
        file: &'static str,
        /// First byte needed.
        offset: u64,
        /// End (exclusive) of what is needed.
        end: u64,
        /// Bytes in the file.
        size: u64,
    },
    /// Neither ELF nor bzImage.
    #[error("boot.kernel: the kernel is neither an ELF file nor a bzImage")]
    Unknown,
    /// An ELF file that is no x86-64 executable.
    #[error("boot.kernel: the kernel's ELF header is not that of an x86-64 executable: {0}")]
    Elf(&'static str),
    /// An ELF file without the PVH entry point.
    #[error("boot.kernel: the kernel's ELF file has no PVH entry point (XEN_ELFNOTE_PHYS32_ENTRY)")]
    NoPvhNote,
    /// An entry point outside what was loaded.
    #[error("boot.kernel: the kernel's entry point {0:#x} lies outside the kernel")]
    EntryOutside(u64),
    /// A bzImage of a form that cannot be booted.
    #[error("boot.kernel: the kernel's bzImage header cannot be booted: {0}")]
    BzImage(&'static str),
    /// A part of the kernel below 1 MiB, where boot data lies.
    #[error("boot.kernel: the kernel wants to be loaded at {0:#x}; addresses below 0x100000 hold boot data")]
    TooLow(u64),
    /// Guest memory ends before the kernel does.
    #[error("memory: the kernel needs guest memory up to {need:#x}, it ends at {end:#x}")]
    MemoryTooSmall {
        /// End (exclusive) of what the kernel needs.
        need: u64,
        /// End of RAM below the PCI hole.
        end: u64,
    },
    /// The initrd does not fit beside the kernel.
    #[error("boot.initrd: the initrd is {size} bytes, guest memory has room for {room}")]
    InitrdTooLarge {
        /// Bytes of the file.
        size: u64,
        /// Bytes of room.
        room: u64,
    },
    /// The command line is too long.
    #[error("boot.cmdline: the kernel command line is {0} bytes, at most 2047 are possible")]
    CmdlineTooLong(usize),
    /// The command line has a NUL inside.
    #[error("boot.cmdline: the kernel command line contains a NUL byte")]
    CmdlineNul,
    /// The ACPI tables outgrew their place.
    #[error("ACPI tables of {0} bytes do not fit their place")]
    AcpiTooLarge(usize),
    /// Guest memory refused a write (a fault of ours: every address was checked before).
    #[error("cannot write guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

impl BootError {
    /// What a person can do about it; may be empty.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Truncated { .. } => "the file is incomplete: copy or build it again",
            Self::Unknown | Self::Elf(_) | Self::BzImage(_) => {
                "use an uncompressed x86-64 vmlinux with a PVH entry, or a bzImage (vmlinuz)"
            }
            Self::NoPvhNote => "build the kernel with CONFIG_PVH=y, or boot its bzImage",
            Self::MemoryTooSmall { .. } | Self::InitrdTooLarge { .. } => "give the guest more memory",
            Self::CmdlineTooLong(_) => "shorten the command line",
            _ => "",
        }
    }
}
