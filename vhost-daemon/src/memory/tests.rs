use super::*;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::os::fd::OwnedFd;

/// A memfd of `size` bytes, sealed against shrinking.
pub(crate) fn sealed(size: u64) -> OwnedFd {
    let fd = unsealed(size);
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    fd
}

fn unsealed(size: u64) -> OwnedFd {
    let fd = memfd_create(c"test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&fd, size as i64).unwrap();
    fd
}

pub(crate) fn spec(guest_address: u64, size: u64, user_address: u64, offset: u64) -> RegionSpec {
    RegionSpec {
        guest_address,
        size,
        user_address,
        offset,
    }
}

fn two_regions() -> GuestMemory {
    let low = GuestMemory::default().with_region(
        spec(0, 0x3000, 0x10_0000, 0x1000),
        sealed(0x4000),
        Sealing::Required,
    );
    let both = low.unwrap().with_region(
        spec(0x3000, 0x1000, 0x20_0000, 0),
        sealed(0x1000),
        Sealing::Required,
    );
    both.unwrap()
}

#[test]
fn regions_that_cannot_be_are_refused() {
    let add = |spec, fd| {
        GuestMemory::default()
            .with_region(spec, fd, Sealing::Required)
            .unwrap_err()
    };
    for wrong in [
        spec(0, 0, 0, 0),
        spec(1, 0x1000, 0, 0),
        spec(0, 0x1001, 0, 0),
        spec(0, 0x1000, 0, 8),
        spec(u64::MAX - 0xFFF, 0x1000, 0, 0),
        spec(0, 0x1000, u64::MAX - 0xFFF, 0),
        spec(0, 0x2000, 0, u64::MAX - 0xFFF),
    ] {
        assert!(
            matches!(add(wrong, sealed(0x4000)), MemoryError::Shape(_)),
            "{wrong:?}"
        );
    }
    let end_of_file = add(spec(0, 0x2000, 0, 0x1000), sealed(0x2000));
    assert!(matches!(
        end_of_file,
        MemoryError::TooShort {
            end: 0x3000,
            size: 0x2000,
            ..
        }
    ));
    let (reader, _writer) = nix::unistd::pipe().unwrap();
    assert!(matches!(
        add(spec(0, 0x1000, 0, 0), reader),
        MemoryError::NotAFile(_)
    ));
    assert!(matches!(
        add(spec(0, 0x1000, 0, 0), unsealed(0x1000)),
        MemoryError::Unsealed(_)
    ));
}

#[test]
fn an_unsealed_region_is_accepted_by_hand() {
    let memory =
        GuestMemory::default().with_region(spec(0, 0x1000, 0, 0), unsealed(0x1000), Sealing::Preferred);
    assert!(memory.unwrap().segment(GuestAddress(0), 0x1000).is_some());
}

#[test]
fn overlaps_are_refused_on_both_sides() {
    let memory = two_regions();
    let add = |spec| memory.with_region(spec, sealed(0x10000), Sealing::Required);
    assert!(matches!(
        add(spec(0x2000, 0x2000, 0x90_0000, 0)),
        Err(MemoryError::Overlap(_))
    ));
    assert!(matches!(
        add(spec(0x8000, 0x1000, 0x10_2000, 0)),
        Err(MemoryError::Overlap(_))
    ));
    assert!(add(spec(0x4000, 0x1000, 0x10_3000, 0)).is_ok());
}

#[test]
fn segments_cross_regions_and_end_with_memory() {
    let memory = two_regions();
    assert!(
        memory.segment(GuestAddress(0x2FFF), 2).is_none(),
        "one segment is one region"
    );
    let (mut hint, mut segments) = (RegionHint::default(), Segments::default());
    assert!(memory.append_segments(GuestAddress(0x2000), 0x2000, &mut hint, &mut segments));
    assert_eq!(segments.length(), 0x2000);
    let mut slices = Vec::new();
    slices.extend(segments.slices(&memory, 0xFF0, 0x20));
    assert_eq!(
        slices.iter().map(|slice| slice.len()).collect::<Vec<_>>(),
        [0x10, 0x10]
    );
    // With every hint that there can be: what it says must not matter.
    for near in [0, 0x3000] {
        for (address, length, inside) in [
            (0x0, 0x4000, true),
            (0x2FFF, 2, true),
            (0x3000, 0x1000, true),
            (0x3FFF, 1, true),
            (0x3000, 0, true),
            (0x3000, 0x1001, false),
            (0x4000, 1, false),
            (u64::MAX, 2, false),
            (u64::MAX - 0xFFF, 0x2000, false),
        ] {
            let (mut hint, mut found) = (RegionHint::default(), Segments::default());
            assert!(memory.append_segments(GuestAddress(near), 1, &mut hint, &mut found));
            found.clear();
            let whole = memory.append_segments(GuestAddress(address), length, &mut hint, &mut found);
            assert_eq!(whole, inside, "{length:#x} bytes at {address:#x}");
            if inside {
                assert_eq!(found.length(), length);
                let parts = found.slices(&memory, 0, length);
                assert_eq!(parts.map(|part| part.len()).sum::<usize>(), length);
            }
        }
    }
}

#[test]
fn removed_memory_stays_while_it_is_used() {
    let memory = two_regions();
    let segment = memory.segment(GuestAddress(0x3000), 8).unwrap();
    memory.slice(&segment).unwrap().copy_from(&[7u8; 8]);
    let without = memory.without_region(0x3000, 0x20_0000, 0x1000).unwrap();
    assert!(without.segment(GuestAddress(0x3000), 8).is_none());
    let mut back = [0u8; 8];
    memory.slice(&segment).unwrap().copy_to(&mut back);
    assert_eq!(back, [7; 8]);
    assert!(matches!(
        without.without_region(0x3000, 0x20_0000, 0x1000),
        Err(MemoryError::Unknown(_))
    ));
}

#[test]
fn front_end_addresses_are_translated() {
    let memory = two_regions();
    assert_eq!(memory.guest_address(0x10_0010), Some(GuestAddress(0x10)));
    assert_eq!(memory.guest_address(0x20_0FFF), Some(GuestAddress(0x3FFF)));
    assert_eq!(memory.guest_address(0x20_1000), None);
}
