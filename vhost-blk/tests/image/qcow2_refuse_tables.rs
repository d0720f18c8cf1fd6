//! What is refused when an image is opened: each with the field it names, and the file unchanged.
//! Here: where the header and the tables say that other tables lie.

use crate::support::victim::Victim;
use crate::support::{contents, open, qemu_img, text};
use vhost_blk::image::Format;

const CLUSTER: u64 = 64 << 10;

/// Every wrong place of the table that the 64 bits at `at` place, which `field` names.
#[track_caller]
fn misplaced(victim: &Victim, field: &str, at: u64) {
    let right = victim.long(at);
    let end = contents(&victim.path).len() as u64;
    for (wrong, reason) in [
        (right + 512, "not aligned"),
        (1 << 56, "past 2^56"),
        (!(CLUSTER - 1), "past 2^56"),
        (1 << 50, "past the end of the file"),
        (end.next_multiple_of(CLUSTER), "past the end of the file"),
        (0, "in the header"),
    ] {
        victim.u64(at, wrong).never(field, reason);
    }
    victim.u64(at, right);
}

/// The table that the 64 bits at `at` place lies where `other` is.
#[track_caller]
fn overlapping(victim: &Victim, field: &str, at: u64, other: (&str, u64)) {
    let right = victim.long(at);
    let reason = format!("overlaps the table at {}", other.0);
    victim.u64(at, other.1).never(field, &reason).u64(at, right);
}

fn tables_of_the_header() {
    let victim = Victim::new("");
    let l1 = victim.long(40);
    misplaced(&victim, "l1_table_offset", 40);
    misplaced(&victim, "refcount_table_offset", 48);
    overlapping(&victim, "l1_table_offset", 40, ("refcount_table_offset", CLUSTER));
    overlapping(&victim, "l1_table_offset", 48, ("refcount_table_offset", l1));
    // They begin in a good place, and are too long for it.
    let clusters = (l1 / CLUSTER) as u32;
    victim
        .u32(56, clusters)
        .never("l1_table_offset", "overlaps the table at refcount_table_offset")
        .u32(56, 100)
        .never("refcount_table_offset", "past the end of the file")
        .u32(56, 1)
        .u32(36, 32 << 10)
        .never("l1_table_offset", "past the end of the file");
}

fn the_bitmap_directory() {
    let victim = Victim::new("");
    qemu_img(&["bitmap", "--add", text(&victim.path), "one"]);
    let directory = victim.bitmap_directory();
    misplaced(&victim, "bitmap_directory_offset", directory);
    let other = ("refcount_table_offset", CLUSTER);
    overlapping(&victim, "bitmap_directory_offset", directory, other);
    let other = ("l1_table_offset", victim.long(40));
    overlapping(&victim, "bitmap_directory_offset", directory, other);
}

fn the_refcount_table() {
    let victim = Victim::new("");
    let block = victim.long(CLUSTER);
    let end = contents(&victim.path).len() as u64;
    let end = end.next_multiple_of(CLUSTER);
    for wrong in [block + 512, block | 1, 512, 1 << 40, 1 << 56, u64::MAX, end] {
        // Nobody who only reads looks at refcounts.
        victim.u64(CLUSTER, wrong).reads().refused(
            "refcount table",
            &format!("entry 0 places a block at {wrong:#x}: not aligned, in the header or past the end"),
        );
    }
    victim
        .u64(CLUSTER, block)
        .u64(CLUSTER + 8, 3)
        .refused("refcount table", "entry 1 places a block at 0x3: not aligned");
    victim
        .u64(CLUSTER + 8, block)
        .refused("refcount table", "overlaps the refcount block");
    victim
        .u64(CLUSTER + 8, victim.long(40))
        .refused("refcount table", "overlaps the l1_table_offset");
    victim
        .u64(CLUSTER + 8, CLUSTER)
        .refused("refcount table", "overlaps the refcount_table_offset");
}

fn snapshot_tables() {
    let victim = Victim::new("");
    qemu_img(&["snapshot", "-c", "one", text(&victim.path)]);
    let (l1, table) = (victim.long(40), victim.long(64));
    misplaced(&victim, "snapshots_offset", 64);
    overlapping(
        &victim,
        "snapshots_offset",
        64,
        ("refcount_table_offset", CLUSTER),
    );
    overlapping(&victim, "snapshots_offset", 64, ("l1_table_offset", l1));
    misplaced(&victim, "snapshot l1_table_offset", table);
    for other in [("refcount_table_offset", CLUSTER), ("l1_table_offset", l1)] {
        overlapping(&victim, "snapshot l1_table_offset", table, other);
    }
    // The table itself is looked at last.
    overlapping(
        &victim,
        "snapshots_offset",
        table,
        ("snapshot l1_table_offset", table),
    );
    victim
        .u32(table + 8, u32::MAX)
        .never("snapshot l1_size", "over 32 MiB")
        .u32(table + 8, 1);
    victim
        .u32(table + 36, 1025)
        .never("snapshot table", "extra data of 1025 bytes is over 1024");
}

fn a_long_snapshot_table() {
    const ENTRY: u64 = (40_u64 + 2 * 65_535).next_multiple_of(8);
    let victim = Victim::new("");
    let table = 1 << 20;
    let count = (64 << 20) / ENTRY + 1;
    victim.u32(60, count as u32).u64(64, table);
    for index in 0..count {
        // Lengths of id and name.
        victim.u32(table + index * ENTRY + 12, u32::MAX);
    }
    let file = std::fs::OpenOptions::new().write(true).open(&victim.path);
    let file = file.expect("opens");
    file.set_len(table + count * ENTRY).expect("grows");
    victim.never("snapshot table", "over 64 MiB");
    // One entry less is a table of the size that is allowed.
    victim.u32(60, count as u32 - 1);
    drop(open(&[(&victim.path, Format::Qcow2)]));
}

/// 32 MiB each is allowed, and all of them cost.
fn many_long_tables_of_snapshots() {
    const ENTRY: u64 = 40;
    const LONGEST: u64 = 32 << 20;
    let victim = Victim::new("");
    let table = 1 << 20;
    victim.u32(60, 9).u64(64, table);
    for index in 0..9 {
        let entry = table + index * ENTRY;
        let offset = table + CLUSTER + index * LONGEST;
        victim.u64(entry, offset).u32(entry + 8, (LONGEST / 8) as u32);
    }
    let file = std::fs::OpenOptions::new().write(true).open(&victim.path);
    let file = file.expect("opens");
    file.set_len(table + CLUSTER + 9 * LONGEST).expect("grows");
    victim.never("snapshot l1_size", "over 256 MiB");
    victim.u32(60, 8);
    drop(open(&[(&victim.path, Format::Qcow2)]));
}

/// A repair reads them, and nothing says that they lie apart.
fn many_long_tables_of_bitmaps() {
    let victim = Victim::new("");
    for index in 0..33 {
        qemu_img(&["bitmap", "--add", text(&victim.path), &format!("{index:02}")]);
    }
    let directory = victim.long(victim.bitmap_directory());
    let one = victim.long(directory);
    for index in 0..33 {
        // 24 bytes and a name of 2, rounded up.
        let entry = directory + index * 32;
        victim.u64(entry, one).u32(entry + 8, 1 << 20);
    }
    victim
        .u64(72, 1)
        .refused("bitmap directory", "over 256 MiB together");
}

crate::suite! {
    with_qemu_img: [
        tables_of_the_header,
        the_bitmap_directory,
        the_refcount_table,
        snapshot_tables,
        a_long_snapshot_table,
        many_long_tables_of_snapshots,
        many_long_tables_of_bitmaps,
    ],
    alone: [],
}
