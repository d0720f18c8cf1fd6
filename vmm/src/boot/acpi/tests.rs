//! The tables against their checksums and, where it is installed, Intel's disassembler.

use super::*;
use std::process::Command;

fn table_at(bytes: &[u8], address: u64) -> &[u8] {
    let at = (address - layout::ACPI_START) as usize;
    let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
    &bytes[at..at + length]
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Every table by its signature, found the way a guest finds it.
fn tables(bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
    let xsdt = table_at(bytes, u64_at(bytes, 24));
    let mut found: Vec<_> = xsdt[36..]
        .chunks(8)
        .map(|entry| table_at(bytes, u64_at(entry, 0)).to_vec())
        .collect();
    let fadt = found.iter().find(|t| t.starts_with(b"FACP")).unwrap();
    found.push(table_at(bytes, u64_at(fadt, 140)).to_vec());
    found
        .into_iter()
        .map(|t| (String::from_utf8(t[..4].to_vec()).unwrap(), t))
        .collect()
}

#[test]
fn every_table_is_found_from_the_rsdp_with_a_right_checksum() {
    let bytes = Tables::build(32, 0).bytes;
    assert_eq!(&bytes[..8], b"RSD PTR ");
    assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
    let tables = tables(&bytes);
    let names: Vec<_> = tables.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["FACP", "APIC", "MCFG", "DSDT"]);
    for (name, table) in &tables {
        assert_eq!(sum(table), 0, "{name}");
    }
}

#[test]
fn the_tables_fit_their_place_with_all_vcpus() {
    let size = Tables::build(vm_spec::machine::MAX_CPUS, !1).bytes.len() as u64;
    assert!(size <= layout::ACPI_END - layout::ACPI_START);
}

#[test]
fn intels_disassembler_and_compiler_accept_the_tables() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("iasl is not installed: not checked");
        return;
    }
    let folder = std::env::temp_dir().join(format!("bulkhead-acpi-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for (name, table) in tables(&Tables::build(4, 1 << 3 | 1 << 31).bytes) {
        let file = folder.join(format!("{name}.dat"));
        std::fs::write(&file, table).unwrap();
        let run = Command::new("iasl").args(["-d"]).arg(&file).output().unwrap();
        let said = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success(), "{name}: {said}");
        for word in ["Error", "Invalid", "Could not"] {
            assert!(!said.contains(word), "{name}: {said}");
        }
    }
    let source = folder.join("DSDT.dsl");
    let text = std::fs::read_to_string(&source).unwrap();
    for what in [
        "PNP0A08", "PNP0501", "PNP0C0C", "ACPI0013", "QEMU0001", "_EVT", "_S5", "_EJ0", "S003", "S031",
    ] {
        assert!(text.contains(what), "{what} is missing:\n{text}");
    }
    let run = Command::new("iasl")
        .args(["-p"])
        .arg(folder.join("again"))
        .arg(&source)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout).into_owned();
    assert!(run.status.success() && said.contains("0 Errors"), "{said}");
    std::fs::remove_dir_all(&folder).unwrap();
}
