//! Model-specific registers: what differs from KVM's defaults, and what a reset must undo.

use super::pmu::Pmu;
use crate::error::Error;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use std::ops::RangeInclusive;

const IA32_MISC_ENABLE: u32 = 0x1A0;
const FAST_STRINGS: u64 = 1;
const NO_BRANCH_TRACES: u64 = 1 << 11;
const NO_PRECISE_EVENTS: u64 = 1 << 12;
const IA32_MTRR_DEF_TYPE: u32 = 0x2FF;
/// MTRRs on, default type write-back: without it Linux turns PAT off.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

const SET: &str = "set a vCPU's MSRs";

/// What a guest may have set and must not survive a reset (Intel SDM 3A, table 9-1), above all the
/// addresses that KVM writes to (clock, steal time, asynchronous page faults, end of interrupt).
///
/// TSC_ADJUST is not among them: set from here it does not take the TSC along, and what it holds is
/// how the next guest gets the processors' TSCs together again.
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
    (0x4B56_4D06, 0),               // vector of asynchronous page faults
    (0x34, 0),                      // count of SMIs
    (0x3A, 0),                      // feature control, with its lock
    (0x9E, 0x3_0000),               // SMBASE
    (0xE1, 0),                      // UMWAIT_CONTROL
    (0x122, 0),                     // TSX_CTRL
    (0x140, 0),                     // faulting CPUID
    (0x17A, 0),                     // machine check status
    (0x1C4, 0),                     // XFD
    (0x1C5, 0),                     // XFD_ERR
    (0x1D9, 0),                     // DEBUGCTL
    (0x1FC, 0),                     // POWER_CTL
    (0x6A0, 0),                     // control-flow enforcement of user mode
    (0x6A2, 0),                     // control-flow enforcement of supervisor mode
    (0xDA0, 0),                     // XSS
    (0xC001_011F, 0),               // VIRT_SPEC_CTRL
];

/// More of it, all zero.
const ZERO_AT_POWER_ON: [RangeInclusive<u32>; 5] = [
    0x200..=0x20F, // variable MTRRs
    0x250..=0x250, // fixed MTRRs: 64 KiB,
    0x258..=0x259, // 16 KiB,
    0x268..=0x26F, // 4 KiB
    0x6A4..=0x6A8, // shadow stacks
];

/// What differs from KVM's defaults. Of the status bits in IA32_MISC_ENABLE (Intel SDM 4, table 2-2) KVM
/// leaves to us what they say: it stores no branch traces, and precise events where CPUID says so.
fn at_start(pmu: &Pmu) -> [(u32, u64); 2] {
    let precise = if pmu.precise_events() {
        0
    } else {
        NO_PRECISE_EVENTS
    };
    [
        (IA32_MISC_ENABLE, FAST_STRINGS | NO_BRANCH_TRACES | precise),
        (IA32_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ]
}

/// Sets what differs from KVM's defaults.
pub(super) fn initialise(vcpu: &VcpuFd, pmu: &Pmu) -> Result<(), Error> {
    let entries = at_start(pmu).map(entry);
    match set(vcpu, &entries)? {
        taken if taken == entries.len() => Ok(()),
        _ => Err(Error::kvm(SET)(kvm_ioctls::Error::new(libc::EINVAL))),
    }
}

/// Brings the MSRs back to power-on values. A register that this KVM does not have was never
/// set, so a refusal is no failure.
pub(super) fn reset(vcpu: &VcpuFd, pmu: &Pmu) -> Result<(), Error> {
    let zero = ZERO_AT_POWER_ON.into_iter().flatten().map(|index| (index, 0));
    let entries: Vec<_> = pmu
        .power_on()
        .into_iter()
        .chain(POWER_ON.iter().copied())
        .chain(zero)
        .map(entry)
        .collect();
    let mut rest = entries.as_slice();
    // KVM ends at the first that it refuses.
    while !rest.is_empty() {
        let taken = set(vcpu, rest)?;
        if let Some(refused) = rest.get(taken) {
            tracing::debug!(index = refused.index, "MSR not reset");
        }
        rest = rest.get(taken + 1..).unwrap_or_default();
    }
    initialise(vcpu, pmu)
}

/// How many were set.
fn set(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<usize, Error> {
    let msrs =
        Msrs::from_entries(entries).map_err(|_| Error::kvm(SET)(kvm_ioctls::Error::new(libc::ENOMEM)))?;
    vcpu.set_msrs(&msrs).map_err(Error::kvm(SET))
}

fn entry((index, data): (u32, u64)) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::{CpuId, kvm_cpuid_entry2};

    #[test]
    fn a_guest_is_told_what_its_debug_store_cannot_do() {
        let status = |edx| {
            let leaf = kvm_cpuid_entry2 {
                function: 1,
                edx,
                ..Default::default()
            };
            at_start(&Pmu::new(&CpuId::from_entries(&[leaf]).unwrap()))[0]
        };
        assert_eq!(status(0), (0x1A0, 0x1801));
        assert_eq!(status(1 << 21), (0x1A0, 0x801));
    }
}
