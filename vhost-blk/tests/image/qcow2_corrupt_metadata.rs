//! What is refused while an image is in use: an error to the guest, the corrupt bit set, no more writing,
//! and everything else still read. Here: refcounts and places of metadata that contradict the mapping.

use crate::support;
use crate::support::damaged::{CLUSTER, COPIED, Damaged, says, write_first};
use crate::support::{Scratch, contents, create, open, patch, qemu_img, text, write};
use vhost_blk::image::{Format, Image};

fn data_over_metadata() {
    let places = |victim: &Damaged| {
        let mut places = victim.tables().to_vec();
        places.extend([
            (victim.l2(), "L2 table"),
            (victim.word(64), "snapshots_offset"),
            (victim.word(victim.word(64)), "snapshot l1_table_offset"),
        ]);
        places
    };
    for index in 0..6 {
        let victim = Damaged::new("");
        qemu_img(&["snapshot", "-c", "one", text(&victim.path)]);
        // Makes the active tables our own again.
        drop(open(&[(&victim.path, Format::Qcow2)]).write(&[(&mut [4; 512][..]).into()], CLUSTER));
        let (place, name) = places(&victim)[index];
        victim.set(victim.l2(), COPIED | place);
        let before = contents(&victim.path)[place as usize..][..512].to_vec();
        victim.found(write_first, "L2 entry", &format!("would overwrite the {name}"));
        assert!(
            contents(&victim.path)[place as usize..][..512] == before,
            "{name} was overwritten"
        );
    }
    let victim = Damaged::new("");
    victim
        .set(victim.l2(), 0)
        .set(victim.l2(), COPIED | 512)
        .found(write_first, "L2 entry", "not aligned");
}

fn refcounts_that_lie() {
    let victim = Damaged::new("");
    let (l2, host) = (victim.l2(), victim.word(victim.l2()) & !COPIED);
    for count in [0, 2, 9] {
        victim.set_refcount(host, count).set(72, 0).found(
            write_first,
            "L2 entry",
            "COPIED is set but the refcount",
        );
    }
    victim.set_refcount(host, 1).set_refcount(l2, 2).set(72, 0);
    victim.found(
        |image| write(image, 2 << 20, &[5; 512]),
        "L1 entry",
        "COPIED is set but the refcount",
    );
    let victim = Damaged::new("");
    victim.set_refcount(host, 0).set(victim.l2(), host);
    let image = open(&[(&victim.path, Format::Qcow2)]);
    image.discard(0, CLUSTER).expect("is noted");
    victim.found_in(
        &image,
        &|image| image.flush(),
        "refcount block",
        "less than its references",
    );
}

fn allocations_over_metadata() {
    let allocate = |image: &dyn Image| write(image, 2 << 20, &vec![5; 2 << 20]);
    for index in 0..3 {
        let victim = Damaged::new("");
        let (place, name) = victim.tables()[index];
        victim.set_refcount(place, 0);
        let before = victim.cluster(place);
        victim.found(
            allocate,
            "refcount block",
            &format!("is 0, but it holds the {name}"),
        );
        assert!(victim.cluster(place) == before, "{name} was overwritten");
    }
    let victim = Damaged::new("");
    victim
        .set_refcount(victim.l2(), 0)
        .found(allocate, "L1 entry", "COPIED is set but the refcount");
}

/// Offset 0 is the header's, whatever the refcounts say.
fn allocations_at_offset_0() {
    let victim = Damaged::new("");
    victim.set_refcount(0, 0);
    let image = open(&[(&victim.path, Format::Qcow2)]);
    write(&*image, 2 << 20, &vec![5; 2 << 20]).expect("writes");
    drop(image);
    assert_eq!(&contents(&victim.path)[..4], b"QFI\xfb");
    // No block says what the first clusters hold: a new one would cover itself in the first of them.
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", "8M");
    let victim = Damaged { scratch, path };
    victim.set(victim.word(48), 0);
    let image = open(&[(&victim.path, Format::Qcow2)]);
    victim.found_in(
        &image,
        &|image| write(image, 0, &[5; 512]),
        "refcount block",
        "the refcount of cluster 0x0 is 0, but it holds the header",
    );
}

/// The last reference to a place that holds metadata is no reason to free it.
fn metadata_is_not_freed() {
    for index in 0..4 {
        for fails in [
            |image: &dyn Image| write_first(image).and_then(|()| image.flush()),
            |image: &dyn Image| image.discard(0, CLUSTER).and_then(|()| image.flush()),
        ] {
            let victim = Damaged::new("");
            let [l1, refcount_table, refcount_block] = victim.tables();
            let places = [l1, refcount_table, refcount_block, (victim.l2(), "L2 table")];
            let (place, name) = places[index];
            victim.set(victim.l2(), place);
            let before = victim.cluster(place);
            victim.found(fails, "refcount block", &format!("holds the {name}"));
            assert_eq!(victim.refcount(place), 1, "{name} was freed");
            // A refcount block that says so was not cleared; the L2 table's first entry is the changed one.
            let same = match name {
                "refcount block" => continue,
                "L2 table" => 8,
                _ => 0,
            };
            assert!(
                victim.cluster(place)[same..] == before[same..],
                "{name} was cleared"
            );
        }
    }
    let victim = Damaged::new("");
    for (place, name) in victim.tables() {
        victim.set(victim.l1(), place).set(72, 0);
        let before = victim.cluster(place);
        let image = open(&[(&victim.path, Format::Qcow2)]);
        says(
            write(&*image, 4 << 20, &[5; 512]).and_then(|()| image.flush()),
            "L1 entry",
            &format!("is used as {name} too"),
        );
        drop(image);
        assert!(victim.cluster(place) == before, "{name} was cleared");
    }
}

/// What was reserved because its refcount said that it was free is no place for what is mapped there.
fn reserved_clusters_hold_nothing() {
    for (fails, field) in [
        (
            (|image| write(image, CLUSTER, &[5; 512])) as fn(&dyn Image) -> std::io::Result<()>,
            "L2 entry",
        ),
        (
            |image| image.discard(CLUSTER, CLUSTER).and_then(|()| image.flush()),
            "refcount block",
        ),
    ] {
        let victim = Damaged::new("");
        for entry in [victim.l2(), victim.l2() + 8] {
            victim.set_refcount(victim.word(entry) & !COPIED, 0);
        }
        let image = open(&[(&victim.path, Format::Qcow2)]);
        // Takes the first of the two; the second is kept for later.
        write(&*image, 2 << 20, &[5; 512]).expect("writes");
        victim.found_in(&image, &fails, field, "the reserve of free clusters");
    }
}

/// That a cluster may be overwritten in place is not remembered past the time when one was freed.
fn freed_clusters_are_looked_at_again() {
    let victim = Damaged::new("");
    victim.set(victim.l2() + 8, victim.word(victim.l2()));
    let image = open(&[(&victim.path, Format::Qcow2)]);
    let second = |image: &dyn Image| write(image, CLUSTER, &[5; 512]);
    second(&*image).expect("writes");
    image.discard(0, CLUSTER).expect("discards");
    image.flush().expect("flushes");
    victim.found_in(&image, &second, "L2 entry", "COPIED is set but the refcount");
}

/// What has a refcount is not taken, whoever refers to it.
fn allocations_pass_over_what_is_counted() {
    let victim = Damaged::new("");
    let end = contents(&victim.path).len() as u64;
    let counted = [(end, 1), (end + 3 * CLUSTER, u16::MAX)];
    for (place, count) in counted {
        patch(&victim.path, place, &vec![0xab; CLUSTER as usize]);
        victim.set_refcount(place, count);
    }
    let image = open(&[(&victim.path, Format::Qcow2)]);
    write(&*image, 2 << 20, &vec![5; 2 << 20]).expect("writes");
    drop(image);
    for (place, count) in counted {
        assert!(
            victim.cluster(place).iter().all(|byte| *byte == 0xab),
            "cluster {place:#x} was taken"
        );
        assert_eq!(victim.refcount(place), count);
    }
    support::check_leaks_at_most(&victim.path).expect("is whole");
}

fn tables_used_twice() {
    let victim = Damaged::new("cluster_size=4k");
    let table = victim.word(victim.l1());
    victim.set(victim.l1() + 8, table);
    // Guest cluster 512 is the first that the second entry maps.
    victim.found(
        |image| write(image, 512 * 4096, &[5; 512]),
        "L1 entry",
        "is used as L2 table of another range too",
    );
    let victim = Damaged::new("");
    for (place, name) in victim.tables() {
        victim.set(victim.l1(), COPIED | place).set(72, 0);
        let image = open(&[(&victim.path, Format::Qcow2)]);
        // There is a zero, which is a good L2 entry.
        says(
            write(&*image, 4 << 20, &[5; 512]),
            "L1 entry",
            &format!("is used as {name} too"),
        );
    }
}

crate::suite! {
    with_qemu_img: [
        data_over_metadata,
        refcounts_that_lie,
        allocations_over_metadata,
        allocations_at_offset_0,
        metadata_is_not_freed,
        reserved_clusters_hold_nothing,
        freed_clusters_are_looked_at_again,
        allocations_pass_over_what_is_counted,
        tables_used_twice,
    ],
    alone: [],
}
