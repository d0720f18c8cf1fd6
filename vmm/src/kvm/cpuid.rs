//! The CPUID that a guest sees: the host's, with the topology and identity of this VM.

use crate::error::Error;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const HYPERVISOR_PRESENT: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const HTT: u32 = 1 << 28;
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;
const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
/// KVM_FEATURE_CLOCKSOURCE, CLOCKSOURCE2 and CLOCKSOURCE_STABLE_BIT.
const KVM_CLOCK_FEATURES: u32 = 1 | 1 << 3 | 1 << 24;

fn entry(cpuid: &mut CpuId, function: u32, index: u32) -> Option<&mut kvm_cpuid_entry2> {
    cpuid
        .as_mut_slice()
        .iter_mut()
        .find(|e| e.function == function && e.index == index)
}

/// The first part of a leaf.
pub(super) fn leaf(cpuid: &CpuId, function: u32) -> Option<&kvm_cpuid_entry2> {
    cpuid
        .as_slice()
        .iter()
        .find(|e| e.function == function && e.index == 0)
}

fn add(cpuid: &mut CpuId, new: kvm_cpuid_entry2) -> Result<(), Error> {
    cpuid
        .push(new)
        .map_err(|_| Error::Config("this host's CPUID has too many leaves".into()))
}

/// Bits that an APIC id of this VM needs: one package of `cpus` cores of one thread.
fn id_bits(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two().trailing_zeros()
}

/// What all vCPUs share.
pub(super) fn for_guest(cpuid: &mut CpuId, cpus: u8, deadline_timer: bool) -> Result<(), Error> {
    if let Some(leaf) = entry(cpuid, 1, 0) {
        // KVM does not always report it; without it a guest ignores kvm-clock.
        leaf.ecx |= HYPERVISOR_PRESENT;
        if deadline_timer {
            leaf.ecx |= TSC_DEADLINE;
        }
        // A vCPU in VMX operation takes no power-on state: such a guest could not be reset.
        leaf.ecx &= !VMX;
        leaf.ebx = leaf.ebx & 0xFF00_FFFF | u32::from(cpus) << 16;
        leaf.edx = if cpus > 1 { leaf.edx | HTT } else { leaf.edx & !HTT };
    }
    if let Some(leaf) = entry(cpuid, 0x8000_0001, 0) {
        leaf.ecx &= !SVM;
    }
    kvm_leaves(cpuid)?;
    cache_sharing(cpuid, cpus);
    extended_topology(cpuid, cpus)?;
    amd_topology(cpuid, cpus);
    Ok(())
}

/// Leaves 0x4000_0000 and 0x4000_0001: KVM, with its clock.
fn kvm_leaves(cpuid: &mut CpuId) -> Result<(), Error> {
    let word = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
    let signature = kvm_cpuid_entry2 {
        function: KVM_SIGNATURE,
        eax: KVM_FEATURES,
        ebx: word(b"KVMK"),
        ecx: word(b"VMKV"),
        edx: word(b"M\0\0\0"),
        ..Default::default()
    };
    match entry(cpuid, KVM_SIGNATURE, 0) {
        Some(leaf) => *leaf = signature,
        None => add(cpuid, signature)?,
    }
    match entry(cpuid, KVM_FEATURES, 0) {
        Some(leaf) => leaf.eax |= KVM_CLOCK_FEATURES,
        None => add(
            cpuid,
            kvm_cpuid_entry2 {
                function: KVM_FEATURES,
                eax: KVM_CLOCK_FEATURES,
                ..Default::default()
            },
        )?,
    }
    Ok(())
}

/// Leaf 4 (Intel) and 0x8000_001D (AMD): which vCPUs share a cache. L1 and L2 are private, L3 is
/// shared by the package.
fn cache_sharing(cpuid: &mut CpuId, cpus: u8) {
    for leaf in cpuid.as_mut_slice() {
        if leaf.function != 4 && leaf.function != 0x8000_001D {
            continue;
        }
        let level = leaf.eax >> 5 & 7;
        let sharing = if level >= 3 { (1 << id_bits(cpus)) - 1 } else { 0 };
        leaf.eax = leaf.eax & !(0xFFF << 14) | sharing << 14;
        if leaf.function == 4 {
            leaf.eax = leaf.eax & !(0x3F << 26) | (((1 << id_bits(cpus)) - 1) & 0x3F) << 26;
        }
    }
}

/// Leaves 0xB and 0x1F: level 0 threads, level 1 cores, then the end. The x2APIC id in EDX is
/// set by [`for_vcpu`]. Leaf 0x1F is written only where the host's CPUID reaches it.
fn extended_topology(cpuid: &mut CpuId, cpus: u8) -> Result<(), Error> {
    let highest = entry(cpuid, 0, 0).map_or(0, |leaf| leaf.eax);
    for function in [0xB, 0x1F] {
        if highest < function {
            continue;
        }
        cpuid.retain(|e| e.function != function);
        let levels = [
            (0, 1, 1 << 8),
            (id_bits(cpus), u32::from(cpus), 2 << 8),
            (0, 0, 0),
        ];
        for (index, (shift, logical, kind)) in (0..).zip(levels) {
            add(
                cpuid,
                kvm_cpuid_entry2 {
                    function,
                    index,
                    flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                    eax: shift,
                    ebx: logical,
                    ecx: kind | index,
                    ..Default::default()
                },
            )?;
        }
    }
    Ok(())
}

/// Leaf 0x8000_0008 ECX (core count) and 0x8000_001E (core and node of a vCPU).
fn amd_topology(cpuid: &mut CpuId, cpus: u8) {
    if let Some(leaf) = entry(cpuid, 0x8000_0008, 0) {
        leaf.ecx = leaf.ecx & !0xF0FF | id_bits(cpus) << 12 | u32::from(cpus - 1);
    }
    if let Some(leaf) = entry(cpuid, 0x8000_001E, 0) {
        leaf.ebx &= 0xFF;
        leaf.ecx = 0;
    }
}

/// What is a vCPU's own: its APIC id, which is its index.
pub(super) fn for_vcpu(cpuid: &mut CpuId, index: u8) {
    let id = u32::from(index);
    for leaf in cpuid.as_mut_slice() {
        match leaf.function {
            1 => leaf.ebx = leaf.ebx & 0x00FF_FFFF | id << 24,
            0xB | 0x1F => leaf.edx = id,
            0x8000_001E => {
                leaf.eax = id;
                leaf.ebx = leaf.ebx & !0xFF | id;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> CpuId {
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        CpuId::from_entries(&[leaf(0, 0x1F), leaf(1, 0), leaf(4, 3 << 5), leaf(0x8000_001E, 0)]).unwrap()
    }

    #[test]
    fn each_vcpu_finds_its_apic_id_in_every_leaf() {
        let mut cpuid = host();
        for_guest(&mut cpuid, 5, true).unwrap();
        for_vcpu(&mut cpuid, 3);
        assert_eq!(entry(&mut cpuid, 1, 0).unwrap().ebx, 3 << 24 | 5 << 16);
        for index in 0..3 {
            assert_eq!(entry(&mut cpuid, 0xB, index).unwrap().edx, 3);
            assert_eq!(entry(&mut cpuid, 0x1F, index).unwrap().edx, 3);
        }
        assert_eq!(
            entry(&mut cpuid, 0xB, 1).unwrap().eax,
            3,
            "five ids need three bits"
        );
        assert_eq!(entry(&mut cpuid, 0x8000_001E, 0).unwrap().eax, 3);
    }

    #[test]
    fn no_guest_runs_guests_of_its_own() {
        let leaf = |function| kvm_cpuid_entry2 {
            function,
            ecx: !0,
            ..Default::default()
        };
        let mut cpuid = CpuId::from_entries(&[leaf(0), leaf(1), leaf(0x8000_0001)]).unwrap();
        for_guest(&mut cpuid, 1, false).unwrap();
        assert_eq!(entry(&mut cpuid, 1, 0).unwrap().ecx, !VMX);
        assert_eq!(entry(&mut cpuid, 0x8000_0001, 0).unwrap().ecx, !SVM);
    }

    #[test]
    fn a_guest_knows_that_it_runs_on_kvm_with_a_clock() {
        let mut cpuid = host();
        for_guest(&mut cpuid, 1, false).unwrap();
        let leaf = entry(&mut cpuid, 1, 0).unwrap();
        assert_eq!(leaf.ecx & HYPERVISOR_PRESENT, HYPERVISOR_PRESENT);
        assert_eq!(leaf.ecx & TSC_DEADLINE, 0);
        assert_eq!(
            entry(&mut cpuid, KVM_SIGNATURE, 0).unwrap().ebx.to_le_bytes(),
            *b"KVMK"
        );
        let features = entry(&mut cpuid, KVM_FEATURES, 0).unwrap().eax;
        assert_eq!(features & KVM_CLOCK_FEATURES, KVM_CLOCK_FEATURES);
    }
}
