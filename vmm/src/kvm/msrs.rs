//! Model-specific registers: what differs from KVM's defaults, and what a reset must undo.

use crate::error::Error;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

const IA32_MISC_ENABLE: u32 = 0x1A0;
const FAST_STRINGS: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2FF;
/// MTRRs on, default type write-back: without it Linux turns PAT off.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// What a guest may have set and must not survive a reset, above all the addresses that KVM
/// writes to (clock, steal time, asynchronous page faults, end of interrupt).
const POWER_ON: &[(u32, u64)] = &[
    (0x4B56_4D01, 0),               // kvm-clock
    (0x4B56_4D00, 0),               // KVM wall clock
    (0x12, 0),                      // kvm-clock, old number
    (0x11, 0),                      // KVM wall clock, old number
    (0x4B56_4D02, 0),               // asynchronous page faults
    (0x4B56_4D03, 0),               // steal time
    (0x4B56_4D04, 0),               // paravirtual end of interrupt
    (0x4B56_4D05, 1),               // halt polling by the host
    (0x6E0, 0),                     // TSC deadline
    (0x174, 0),                     // SYSENTER_CS
    (0x175, 0),                     // SYSENTER_ESP
    (0x176, 0),                     // SYSENTER_EIP
    (0xC000_0081, 0),               // STAR
    (0xC000_0082, 0),               // LSTAR
    (0xC000_0083, 0),               // CSTAR
    (0xC000_0084, 0),               // SFMASK
    (0xC000_0102, 0),               // KERNEL_GS_BASE
    (0xC000_0103, 0),               // TSC_AUX
    (0x277, 0x0007_0406_0007_0406), // PAT
    (0x48, 0),                      // SPEC_CTRL
];

fn at_start() -> [kvm_msr_entry; 2] {
    [
        (IA32_MISC_ENABLE, FAST_STRINGS),
        (IA32_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    })
}

/// Sets what differs from KVM's defaults.
pub(super) fn initialise(vcpu: &VcpuFd) -> Result<(), Error> {
    for entry in at_start() {
        set(vcpu, entry).map_err(Error::kvm("set a vCPU's MSRs"))?;
    }
    Ok(())
}

/// Brings the MSRs back to power-on values. A register that this KVM does not have was never
/// set, so a refusal is no failure.
pub(super) fn reset(vcpu: &VcpuFd) -> Result<(), Error> {
    for &(index, data) in POWER_ON {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        if let Err(error) = set(vcpu, entry) {
            tracing::debug!(index, %error, "MSR not reset");
        }
    }
    initialise(vcpu)
}

fn set(vcpu: &VcpuFd, entry: kvm_msr_entry) -> Result<(), kvm_ioctls::Error> {
    let msrs = Msrs::from_entries(&[entry]).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
    match vcpu.set_msrs(&msrs)? {
        1 => Ok(()),
        _ => Err(kvm_ioctls::Error::new(libc::EINVAL)),
    }
}
