//! What `--dry-run` opens: what a VM would be given, as far as to open it changes nothing on the host and
//! nothing for a VM that has it. No TAP is made, no image is held, nobody is connected to, no process starts.

use super::chain::{Purpose, open_chain, open_image_for};
use super::disk::{Disk, Key};
use super::inputs::{formats, no_back_end, no_key, open_boot, open_direct, open_key_file};
use super::machine::{Backend, Device};
use super::net;
use crate::failure::Failure;
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use vm_spec::control::FdNumber;
use vm_spec::spec::{ImageFormat, VmSpec};

/// Looks at all that [`inputs::open`](super::inputs::open) would open. For each device the formats of its image
/// chain, the top first.
pub(super) fn look(spec: &VmSpec, devices: &[Device]) -> Result<Vec<Vec<ImageFormat>>, Failure> {
    for device in devices {
        if let Backend::Net(nic) = &device.backend {
            net::look(device, nic)?;
        }
    }
    open_boot(&spec.boot)?;
    devices.iter().map(|device| look_behind(spec, device)).collect()
}

fn look_behind(spec: &VmSpec, device: &Device) -> Result<Vec<ImageFormat>, Failure> {
    match &device.backend {
        Backend::Disk(disk) => look_at_disk(spec, device, disk),
        Backend::External(remote) => {
            is_socket(&remote.socket).map_err(|e| no_back_end(device, &remote.socket, &e))?;
            Ok(Vec::new())
        }
        Backend::Net(_) | Backend::Passt { .. } => Ok(Vec::new()),
    }
}

fn look_at_disk(spec: &VmSpec, device: &Device, disk: &Disk) -> Result<Vec<ImageFormat>, Failure> {
    let layers = open_chain(spec, device, disk, Purpose::Look)?;
    if let Some(top) = layers.first().filter(|_| disk.past_cache) {
        open_direct(device, disk, &top.file)?;
    }
    if let Some(path) = &disk.data_file {
        let field = format!("{}.data-file", device.field);
        open_image_for(Purpose::Look, &field, path, disk.read_only)?;
    }
    match &disk.key {
        Some(Key::File(path)) => drop(open_key_file(&format!("{}.key-file", device.field), path)?),
        // What is read of a pipe is gone.
        Some(Key::Inherited(number)) => {
            drop(
                crate::inherit::take(FdNumber(*number))
                    .map_err(|e| no_key(&format!("{}.", device.field), *number, &e))?,
            );
        }
        None => {}
    }
    Ok(formats(&layers))
}

fn is_socket(path: &Path) -> io::Result<()> {
    match fs::metadata(path)?.file_type().is_socket() {
        true => Ok(()),
        false => Err(io::Error::other("it is no socket")),
    }
}
