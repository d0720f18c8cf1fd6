//! A virtio-pci function with a back end that behaves, under a driver that does not.

use crate::virtio::rig::{BAR, CONFIG, Rig, script};
use arbitrary::Unstructured;
use vm_spec::machine::VIRTIO_BAR_SIZE;

const MOST_STEPS: usize = 96;

/// Reads and writes configuration space, registers and tables in any width and order. Afterwards the
/// device's thread still answers, and a reset brings the device back.
pub fn virtio(input: &[u8]) {
    let rig = Rig::new(script());
    let mut input = Unstructured::new(input);
    for _ in 0..MOST_STEPS {
        if step(&rig, &mut input).is_none() {
            break;
        }
    }
    rig.bus.reset();
    let mut data = [0; 4];
    rig.bus.ecam_read(CONFIG, &mut data);
    assert_eq!(data[..2], [0xF4, 0x1A], "the function is gone");
    rig.set_command(6);
    assert_eq!(rig.status(), 0, "the device was not reset");
    rig.device.drain().expect("the device's thread answers");
}

fn step(rig: &Rig, input: &mut Unstructured<'_>) -> Option<()> {
    if input.is_empty() {
        return None;
    }
    let [kind, small] = input.arbitrary::<[u8; 2]>().ok()?;
    let mut data = [0; 8];
    let data = &mut data[..[1, 2, 4, 8][usize::from(kind >> 6)]];
    match kind & 15 {
        0 => rig.bus.ecam_read(CONFIG + place(input)?, data),
        1 => {
            let at = CONFIG + place(input)?;
            input.fill_buffer(data).ok()?;
            rig.bus.ecam_write(at, data);
        }
        2 => {
            rig.bus.mmio_read(BAR + place(input)?, data);
        }
        3 => {
            let at = BAR + place(input)?;
            input.fill_buffer(data).ok()?;
            rig.bus.mmio_write(at, data);
        }
        // The common configuration's registers, by their small offsets.
        4 | 5 => {
            input.fill_buffer(data).ok()?;
            rig.bus.mmio_write(BAR + u64::from(small & 63), data);
        }
        6 => {
            rig.bus.mmio_read(BAR + u64::from(small), data);
        }
        7 => {
            rig.bus.io_write(0xCF8 + u16::from(small & 7), data);
            rig.bus.io_read(0xCFC + u16::from(small >> 3 & 3), data);
        }
        8 => rig.set_command(u16::from(small)),
        // The transport's own steps, in order or not.
        9 => {
            rig.bus.mmio_write(BAR + 20, &[small]);
        }
        10 => begin(rig),
        11 => {
            for (at, value) in [(22, small & 3), (26, small >> 2 & 3), (28, 1)] {
                rig.bus.mmio_write(BAR + at, &u16::from(value).to_le_bytes());
            }
        }
        12 => {
            let address: u64 = input.arbitrary().ok()?;
            let register = 32 + 8 * u64::from(small % 3);
            rig.bus
                .mmio_write(BAR + register, &(address & 0xF_FFFF).to_le_bytes());
        }
        13 if small == 255 => rig.bus.reset(),
        14 if small == 255 => {
            rig.device.drain().expect("the device's thread answers");
            rig.device.resume().expect("and starts again");
        }
        _ => {
            rig.bus.mmio_read(input.arbitrary().ok()?, data);
        }
    }
    Some(())
}

/// Up to FEATURES_OK.
fn begin(rig: &Rig) {
    rig.set_command(6);
    for status in [1, 3] {
        rig.bus.mmio_write(BAR + 20, &[status]);
    }
    for select in 0..2u32 {
        let mut word = [0; 4];
        rig.bus.mmio_write(BAR, &select.to_le_bytes());
        rig.bus.mmio_read(BAR + 4, &mut word);
        rig.bus.mmio_write(BAR + 8, &select.to_le_bytes());
        rig.bus.mmio_write(BAR + 12, &word);
    }
    rig.bus.mmio_write(BAR + 20, &[11]);
}

/// In the function's configuration space, or its BAR.
fn place(input: &mut Unstructured<'_>) -> Option<u64> {
    let word: u16 = input.arbitrary().ok()?;
    Some(u64::from(word) % VIRTIO_BAR_SIZE)
}
