//! Performance counters that a guest may have left running, by the CPUID that it sees.

use super::cpuid::leaf;
use kvm_bindings::CpuId;

const DEBUG_STORE: u32 = 1 << 21;

/// General and fixed-function counters of Intel's architectural monitoring (leaf 0xA).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Intel {
    general: u32,
    fixed: u32,
}

/// AMD's counters: four under their first numbers, or as many as there are under the later ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Amd {
    First,
    Later(u32),
}

/// What there is of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Pmu {
    intel: Option<Intel>,
    amd: Option<Amd>,
    debug_store: bool,
}

impl Pmu {
    pub(super) fn new(cpuid: &CpuId) -> Self {
        Self {
            intel: intel(cpuid),
            amd: amd(cpuid),
            debug_store: leaf(cpuid, 1).is_some_and(|leaf| leaf.edx & DEBUG_STORE != 0),
        }
    }

    /// Whether there are records of precise events (PEBS), for which KVM has the debug store.
    pub(super) fn precise_events(&self) -> bool {
        self.debug_store
    }

    /// The registers with their power-on values (Intel SDM 3A, table 9-1), in an order in which nothing
    /// counts any more before its counter is cleared. Only of counters that there are: older KVMs put a
    /// write to others into the host's log.
    pub(super) fn power_on(&self) -> Vec<(u32, u64)> {
        let mut registers = Vec::new();
        if let Some(Intel { general, fixed }) = self.intel {
            registers.extend([0x38D, 0x3F1].map(|index| (index, 0))); // fixed-function control, PEBS enable
            registers.extend((0..general).map(|counter| (0x186 + counter, 0))); // event selects
            registers.extend((0..general).map(|counter| (0xC1 + counter, 0)));
            registers.extend((0..fixed).map(|counter| (0x309 + counter, 0)));
            registers.extend([0x3F2, 0x600, 0x38E].map(|index| (index, 0))); // PEBS data, DS area, status
            registers.push((0x38F, ones(general))); // global control: every general counter
        }
        match self.amd {
            Some(Amd::First) => registers.extend((0..4).map(|counter| (0xC001_0000 + counter, 0))),
            Some(Amd::Later(general)) => {
                // Event selects and counters take turns.
                registers.extend((0..2 * general).map(|index| (0xC001_0200 + index, 0)));
                registers.extend([(0xC000_0300, 0), (0xC000_0301, ones(general))]); // status, control
            }
            None => {}
        }
        registers
    }
}

fn ones(count: u32) -> u64 {
    (1 << count) - 1
}

fn intel(cpuid: &CpuId) -> Option<Intel> {
    let leaf = leaf(cpuid, 0xA).filter(|leaf| leaf.eax & 0xFF != 0)?;
    Some(Intel {
        general: (leaf.eax >> 8 & 0xFF).min(32),
        fixed: (leaf.edx & 0x1F).min(16),
    })
}

fn amd(cpuid: &CpuId) -> Option<Amd> {
    const VENDORS: [&[u8; 4]; 2] = [b"cAMD", b"uine"];
    const CORE_COUNTERS: u32 = 1 << 23;
    let vendor = leaf(cpuid, 0)?.ecx.to_le_bytes();
    if !VENDORS.contains(&&vendor) {
        return None;
    }
    let monitoring = leaf(cpuid, 0x8000_0022).filter(|leaf| leaf.eax & 1 != 0);
    let extended = leaf(cpuid, 0x8000_0001).is_some_and(|leaf| leaf.ecx & CORE_COUNTERS != 0);
    Some(match monitoring {
        Some(leaf) => Amd::Later(leaf.ebx & 0xF),
        None if extended => Amd::Later(6),
        None => Amd::First,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    fn power_on(leaves: &[(u32, [u32; 4])]) -> Vec<(u32, u64)> {
        let leaves = leaves
            .iter()
            .map(|&(function, [eax, ebx, ecx, edx])| kvm_cpuid_entry2 {
                function,
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            });
        Pmu::new(&CpuId::from_entries(&leaves.collect::<Vec<_>>()).unwrap()).power_on()
    }

    fn vendor(ecx: &[u8; 4]) -> (u32, [u32; 4]) {
        (0, [0, 0, u32::from_le_bytes(*ecx), 0])
    }

    #[test]
    fn what_counts_on_intel_is_stopped_before_it_is_cleared() {
        let registers = power_on(&[vendor(b"ntel"), (0xA, [8 << 8 | 2, 0, 0, 3])]);
        let place = |index| registers.iter().position(|&(register, _)| register == index);
        for counter in [0xC1, 0xC8, 0x309, 0x30B] {
            assert!(place(0x38D) < place(counter) && place(0x18D) < place(counter));
        }
        assert_eq!(registers.last(), Some(&(0x38F, 0xFF)));
        assert_eq!((place(0xC9), place(0x18E), place(0x30C)), (None, None, None));
        assert_eq!(registers.iter().filter(|(_, value)| *value != 0).count(), 1);
    }

    #[test]
    fn amds_counters_are_those_of_its_generation() {
        let zero = |indices: std::ops::Range<u32>| indices.map(|index| (index, 0)).collect::<Vec<_>>();
        let amd = vendor(b"cAMD");
        assert_eq!(power_on(&[amd]), zero(0xC001_0000..0xC001_0004));
        let core = (0x8000_0001, [0, 0, 1 << 23, 0]);
        let status_and_control = |ones| [(0xC000_0300, 0), (0xC000_0301, ones)];
        assert_eq!(
            power_on(&[amd, core]),
            [&zero(0xC001_0200..0xC001_020C)[..], &status_and_control(0x3F)].concat()
        );
        assert_eq!(
            power_on(&[amd, core, (0x8000_0022, [1, 4, 0, 0])]),
            [&zero(0xC001_0200..0xC001_0208)[..], &status_and_control(0xF)].concat()
        );
    }

    #[test]
    fn where_nothing_counts_nothing_is_written() {
        assert_eq!(power_on(&[vendor(b"ntel"), (0xA, [0; 4])]), []);
        assert_eq!(power_on(&[]), []);
    }
}
