//! `/dev/kvm`, and what lets a person open it.

use crate::failure::Failure;
use nix::unistd::{Gid, Group};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

const PATH: &str = "/dev/kvm";

/// Opens it as the VMM needs it.
///
/// # Errors
/// The system's.
pub(crate) fn try_open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(PATH)
}

pub(super) fn open() -> Result<OwnedFd, Failure> {
    match try_open() {
        Ok(file) => Ok(file.into()),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            Err(Failure::host("KVM is not permitted: cannot open /dev/kvm")
                .because(&e)
                .hint(remedy()))
        }
        Err(e) => Err(Failure::host("no KVM: cannot open /dev/kvm").because(&e).hint(
            "load kvm_intel or kvm_amd, or enable virtualisation in the firmware; without, cargo \
             demo runs the guest in the nested runner",
        )),
    }
}

/// What permits it to this user.
pub(crate) fn remedy() -> String {
    let about = fs::metadata(PATH).ok();
    let group = about.and_then(|about| {
        let group = Group::from_gid(Gid::from_raw(about.gid())).ok().flatten();
        group.filter(|_| lets_group(about.mode(), about.gid()))
    });
    remedy_by(group.as_ref().map(|group| group.name.as_str()))
}

/// Whether members of the device's group may use it. None is made a member of root's.
fn lets_group(mode: u32, gid: u32) -> bool {
    const RW_OF_GROUP: u32 = 0o060;
    mode & RW_OF_GROUP == RW_OF_GROUP && gid != 0
}

fn remedy_by(group: Option<&str>) -> String {
    match group {
        Some(group) => format!("sudo usermod -aG {group} \"$USER\", then log in again"),
        None => "sudo setfacl -m u:\"$USER\":rw /dev/kvm, which lasts until the next boot".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_group_that_may_use_it_is_to_be_joined() {
        for (mode, gid, may) in [
            (0o020_660, 36, true),
            (0o020_666, 36, true),
            (0o020_600, 36, false),
            (0o020_640, 36, false),
            (0o020_660, 0, false),
            (0o020_600, 0, false),
        ] {
            assert_eq!(lets_group(mode, gid), may, "{mode:o} {gid}");
        }
        assert!(remedy_by(Some("virt")).contains("usermod -aG virt "));
        assert!(remedy_by(None).contains("setfacl"));
    }
}
