//! The floor of launch times: a bare program that makes only the KVM calls, in the fastest order,
//! and boots a PVH ELF on one vCPU. What the guest writes to COM1 goes to stdout.
//!
//! `floor ELF [COMMAND LINE]`: with a command line the vCPU gets a CPUID as well, which long mode
//! needs and one byte on COM1 does not. It is no virtual machine monitor: it trusts its guest, has no
//! device but COM1's data register, and ends like `bulkhead run` does (0 power-off, 3 panic,
//! 4 triple fault, 5 reset).
//!
//! The memory slot is set before the irqchip is made: the other way round costs software KVM
//! 6 ms. The process exits with the VM open: closing one takes about 13 ms there, and is the
//! kernel's work after the last byte.
#![expect(unsafe_code, reason = "maps guest memory and gives it to KVM")]

use anyhow::{Context, Result, bail};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::{
    env, fs,
    io::{self, Write},
    ptr, slice,
};
use vm_spec::{control::exit_code, machine};

const RAM_SIZE: usize = 32 << 20;
/// struct hvm_start_info, then the command line.
const START_INFO: usize = 0x1000;
const COMMAND_LINE: usize = 0x1100;

fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let path = arguments.next().context("usage: floor ELF [COMMAND LINE]")?;
    let command_line = arguments.next();
    let elf = fs::read(&path).with_context(|| format!("cannot read {path}"))?;

    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
    let ram = map_ram(&vm)?;
    let entry = load(ram, &elf)?;
    write_start_info(ram, command_line.as_deref().unwrap_or(""))?;
    vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
    let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    if command_line.is_some() {
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .context("KVM_GET_SUPPORTED_CPUID")?;
        vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
    }
    set_registers(&vcpu, entry)?;
    let code = run(&mut vcpu)?;
    // `process::exit` runs no destructor: see the module's text.
    std::process::exit(i32::from(code))
}

/// Maps zeroed memory and makes it guest memory from address 0.
fn map_ram(vm: &VmFd) -> Result<&'static mut [u8]> {
    // SAFETY: a fresh anonymous mapping at an address that the kernel picks.
    let address = unsafe {
        libc::mmap(
            ptr::null_mut(),
            RAM_SIZE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error()).context("mmap");
    }
    let region = kvm_userspace_memory_region {
        memory_size: RAM_SIZE as u64,
        userspace_addr: address as u64,
        ..Default::default()
    };
    // SAFETY: the mapping lives as long as the process.
    unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
    // SAFETY: RAM_SIZE mapped bytes; the slice is not used once the guest runs.
    Ok(unsafe { slice::from_raw_parts_mut(address.cast(), RAM_SIZE) })
}

fn word(bytes: &[u8], at: usize) -> Result<u64> {
    let field = bytes.get(at..at + 8).context("truncated ELF")?;
    Ok(u64::from_le_bytes(field.try_into()?))
}

/// Copies the PT_LOAD segments of a 64-bit ELF, and returns the entry that its PVH note names.
fn load(ram: &mut [u8], elf: &[u8]) -> Result<u64> {
    if elf.get(..5) != Some(b"\x7FELF\x02") {
        bail!("not a 64-bit ELF");
    }
    let headers = usize::try_from(word(elf, 32)?)?;
    let count = usize::from(u16::from_le_bytes([elf[56], elf[57]]));
    let mut entry = None;
    for header in (0..count).map(|index| headers + index * 56) {
        let kind = word(elf, header)? & 0xFFFF_FFFF;
        let offset = usize::try_from(word(elf, header + 8)?)?;
        let address = usize::try_from(word(elf, header + 24)?)?;
        let size = usize::try_from(word(elf, header + 32)?)?;
        let segment = offset.checked_add(size).and_then(|end| elf.get(offset..end));
        let segment = segment.context("truncated ELF")?;
        match kind {
            1 => ram
                .get_mut(address..)
                .and_then(|ram| ram.get_mut(..size))
                .context("segment outside memory")?
                .copy_from_slice(segment),
            4 if segment.get(8..12) == Some(&[18, 0, 0, 0]) => entry = Some(word(segment, 16)?),
            _ => {}
        }
    }
    entry.context("the ELF has no PVH note")
}

/// struct hvm_start_info version 1 with nothing but a command line.
fn write_start_info(ram: &mut [u8], command_line: &str) -> Result<()> {
    if command_line.len() >= 0x1000 - 0x100 {
        bail!("command line too long");
    }
    ram[START_INFO..START_INFO + 8].copy_from_slice(&(0x336E_C578_u64 | 1 << 32).to_le_bytes());
    ram[START_INFO + 24..START_INFO + 32].copy_from_slice(&(COMMAND_LINE as u64).to_le_bytes());
    ram[COMMAND_LINE..COMMAND_LINE + command_line.len()].copy_from_slice(command_line.as_bytes());
    Ok(())
}

/// The state at PVH's entry: flat 32-bit protected mode, paging off.
fn set_registers(vcpu: &VcpuFd, entry: u64) -> Result<()> {
    let data = kvm_segment {
        limit: 0xFFFF_FFFF,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut special = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    special.cs = kvm_segment {
        selector: 8,
        type_: 11,
        ..data
    };
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.tr = kvm_segment {
        limit: 0x67,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    special.cr0 = 1;
    vcpu.set_sregs(&special).context("KVM_SET_SREGS")?;
    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rbx: START_INFO as u64,
        rflags: 2,
        ..Default::default()
    })
    .context("KVM_SET_REGS")
}

/// Runs the guest to its end; the exit code that `bulkhead run` would have.
fn run(vcpu: &mut VcpuFd) -> Result<u8> {
    let mut stdout = io::stdout().lock();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(machine::COM1_PORT, data)) => {
                stdout.write_all(data)?;
                stdout.flush()?;
            }
            Ok(VcpuExit::IoOut(machine::SLEEP_CONTROL_PORT, _)) => return Ok(exit_code::POWER_OFF),
            Ok(VcpuExit::IoOut(machine::RESET_PORT, _)) => return Ok(exit_code::RESET),
            Ok(VcpuExit::IoOut(machine::PVPANIC_PORT, _)) => return Ok(exit_code::PANIC),
            Ok(VcpuExit::Shutdown) => return Ok(exit_code::TRIPLE_FAULT),
            Ok(VcpuExit::IoIn(_, data)) => data.fill(0xFF),
            Ok(VcpuExit::MmioRead(_, data)) => data.fill(0xFF),
            Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..)) => {}
            Ok(exit) => bail!("unexpected exit {exit:?}"),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error).context("KVM_RUN"),
        }
    }
}
