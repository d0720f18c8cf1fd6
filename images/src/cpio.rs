//! Archives in the "newc" cpio format, which the kernel unpacks as its initramfs
//! (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

/// An archive under construction. Parent folders must be added before what lies in them.
#[derive(Default, Debug)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const DEVICE: u32 = 0o020_000;

impl Archive {
    /// Adds a folder, mode 0755.
    pub fn folder(&mut self, name: &str) {
        self.add(name, FOLDER | 0o755, (0, 0), &[]);
    }

    /// Adds a regular file with these permission bits.
    pub fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.add(name, FILE | (permissions & 0o7777), (0, 0), content);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, name: &str, target: &str) {
        self.add(name, LINK | 0o777, (0, 0), target.as_bytes());
    }

    /// Adds a character device, mode 0600.
    pub fn character_device(&mut self, name: &str, major: u32, minor: u32) {
        self.add(name, DEVICE | 0o600, (major, minor), &[]);
    }

    /// Ends the archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let links = if mode & 0o170_000 == FOLDER { 2 } else { 1 };
        let size = u32::try_from(content.len()).expect("an initramfs holds no file of 4 GiB");
        let name_size = name.len() as u32 + 1;
        self.bytes.extend(b"070701");
        // inode, mode, uid, gid, nlink, mtime, size, device of the file system, rdev, name size, check
        for field in [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ] {
            self.bytes.extend(format!("{field:08X}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn the_distribution_s_cpio_reads_it() {
        let mut archive = Archive::default();
        archive.folder("bin");
        archive.file("bin/init", 0o755, b"#!/bin/sh\n");
        archive.link("bin/sh", "init");
        let bytes = archive.finish();
        let Ok(mut cpio) = Command::new("busybox")
            .args(["cpio", "-tv"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            panic!("the package busybox-static is needed");
        };
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = cpio.wait_with_output().unwrap();
        let listing = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success());
        assert!(
            listing.contains("drwxr-xr-x") && listing.contains("bin/init"),
            "{listing}"
        );
        assert!(listing.contains("bin/sh -> init"), "{listing}");
    }
}
