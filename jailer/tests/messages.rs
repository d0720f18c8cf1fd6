//! What `bulkhead run` says to input that is wrong before any host facility is needed: the
//! message names the field, and the exit code tells usage from host.

use std::fs;
use std::process::Command;

/// Runs with `arguments`; the exit code and standard error.
fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .arg("run")
        .args(arguments)
        .arg("--dry-run")
        .output()
        .expect("bulkhead runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), text)
}

fn assert_says(arguments: &[&str], code: i32, parts: &[&str]) {
    let (got, text) = run(arguments);
    assert_eq!(got, Some(code), "{text}");
    for part in parts {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
}

#[test]
fn a_spec_with_an_unknown_key_is_placed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.toml");
    fs::write(&path, "[boot]\nkernel = \"k\"\ncmdlien = \"x\"\n").unwrap();
    let path = path.to_str().unwrap();
    let parts = [&*format!("{path}:3:1"), "`cmdlien`", "did you mean 'cmdline'?"];
    assert_says(&[path], 2, &parts);
}

#[test]
fn a_missing_and_a_truncated_kernel_are_told_apart() {
    assert_says(
        &["--kernel", "/nonexistent/kernel"],
        1,
        &["boot.kernel: cannot open /nonexistent/kernel", "No such file"],
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bzImage");
    // A bzImage header that speaks of 1000 paragraphs after four sectors.
    let mut image = vec![0; 1024];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x1F4..0x1F8].copy_from_slice(&1000u32.to_le_bytes());
    fs::write(&path, image).unwrap();
    let parts = ["boot.kernel", "truncated: it has 1024 bytes", "18560"];
    assert_says(&["--kernel", path.to_str().unwrap()], 1, &parts);
}

#[test]
fn what_is_no_kernel_of_this_machine_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kernel");
    let mut arm64 = vec![0; 1024];
    arm64[56..60].copy_from_slice(b"ARM\x64");
    let mut elf_arm64 = vec![0; 1024];
    elf_arm64[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf_arm64[18] = 183;
    for (image, cause) in [
        (arm64.as_slice(), "for another processor"),
        (&elf_arm64, "for another processor"),
        (b"\x7fELF\x01\x01", "for another processor"),
        (b"\x7fELF\x02\x01", "too short for an ELF header"),
        (b"\x1f\x8b\x08", "compressed with gzip"),
        (b"", "neither a 64-bit ELF image nor a bzImage"),
    ] {
        fs::write(&path, image).unwrap();
        assert_says(&["--kernel", path.to_str().unwrap()], 1, &["boot.kernel", cause]);
    }
}

#[test]
fn a_home_that_no_shell_has_put_in_is_explained() {
    assert_says(
        &["--kernel", "~/vmlinux"],
        1,
        &["cannot open ~/vmlinux", "hint: '~'"],
    );
}

#[test]
fn wrong_fields_are_named() {
    let cases: [(&[&str], &str); 10] = [
        (
            &["--cpus", "33"],
            "'33' for '--cpus <N>': expected a number from 1 to 32",
        ),
        (&["--memory", "16M"], "memory: 16M is not between 32M and 1T"),
        (&["--memory", "512"], "a number alone is bytes: write 512M"),
        (&["--name=-x"], "name: '-x' is no name"),
        (&["--disk", "path=a,slot=-1"], "'slot': is not understood"),
        (&["--disk", "path=a"], "disk[0].format: is missing"),
        (
            &["--disk", "path=a,format=raw,vhost-user=s"],
            "disk[0].vhost-user: excludes path",
        ),
        (
            &["--net", "mac=02:00:00:00:00:01"],
            "net[0]: give exactly one of user",
        ),
        (&["--net", "tap=t,mac=01:00:00:00:00:01"], "net[0].mac:"),
        (
            &["--disk", "path=a,format=raw,slot=3", "--net", "tap=t,slot=3"],
            "net[0].slot: 3 is already disk[0]'s",
        ),
    ];
    for (arguments, message) in cases {
        let all: Vec<&str> = ["--kernel", "k"].iter().chain(arguments).copied().collect();
        assert_says(&all, 2, &[message]);
    }
}

#[test]
fn no_kernel_is_a_usage_error() {
    assert_says(&[], 2, &["boot.kernel: no kernel is given", "--kernel FILE"]);
}
