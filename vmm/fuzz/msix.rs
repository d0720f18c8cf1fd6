//! MSI-X under any order of table writes, masks and signals.

use crate::frontend::SharedEvent;
use crate::pci::fakes::{FakeInterrupts, add, event};
use crate::pci::{Msix, NO_VECTOR};
use arbitrary::Unstructured;
use std::sync::Arc;

const VECTORS: u16 = 3;
const EVENTS: usize = 4;
const MOST_STEPS: usize = 64;

/// A source, the vector it raises, and whether a signal of it has not been seen injected.
struct Source {
    event: Arc<SharedEvent>,
    vector: u16,
    owed: bool,
}

/// No signal is lost: once all vectors are open, each signalled source has raised its vector.
pub fn msix(input: &[u8]) {
    let interrupts = Arc::new(FakeInterrupts::strict());
    let mut msix = Msix::new(interrupts.clone(), VECTORS).expect("vectors");
    let mut sources: Vec<Source> = (0..EVENTS)
        .map(|_| Source {
            event: event(),
            vector: NO_VECTOR,
            owed: false,
        })
        .collect();
    let mut input = Unstructured::new(input);
    for _ in 0..MOST_STEPS {
        if step(&mut msix, &mut sources, &interrupts, &mut input).is_none() {
            break;
        }
    }
    let before: Vec<u64> = (0..VECTORS)
        .map(|vector| interrupts.injected(vector.into()))
        .collect();
    let owed: Vec<bool> = (0..VECTORS)
        .map(|vector| {
            sources
                .iter()
                .any(|source| source.owed && source.vector == vector)
        })
        .collect();
    let pending: Vec<bool> = (0..VECTORS).map(|vector| is_pending(&msix, vector)).collect();
    for vector in 0..VECTORS {
        msix.table_write(u64::from(vector) * 16 + 12, &[0; 4]);
    }
    msix.set_control(0x8000);
    for vector in 0..VECTORS {
        let place = usize::from(vector);
        let came = interrupts.injected(vector.into()) > before[place];
        assert!(
            !(owed[place] && pending[place]) || came,
            "vector {vector} lost an interrupt"
        );
    }
    msix.release();
    assert_eq!(interrupts.attached(), 0, "an eventfd was left behind");
}

fn is_pending(msix: &Msix, vector: u16) -> bool {
    let mut byte = [0];
    msix.pba_read(0, &mut byte);
    byte[0] >> vector & 1 != 0
}

fn step(
    msix: &mut Msix,
    sources: &mut [Source],
    interrupts: &FakeInterrupts,
    input: &mut Unstructured<'_>,
) -> Option<()> {
    if input.is_empty() {
        return None;
    }
    let [kind, which] = input.arbitrary::<[u8; 2]>().ok()?;
    let source = &mut sources[usize::from(which) % EVENTS];
    match kind & 7 {
        0 | 1 => {
            add(&source.event, 1);
            source.owed = source.vector != NO_VECTOR;
        }
        2 => {
            let wanted = match u16::from(which >> 4) {
                15 => NO_VECTOR,
                number => number,
            };
            source.vector = msix.assign(&source.event, source.vector, wanted);
            source.owed = false;
            assert!(source.vector == NO_VECTOR || source.vector < VECTORS);
        }
        3 => msix.set_control(u16::from(which) << 8),
        4 => {
            let mut data = [0; 8];
            let length = [1, 2, 4, 8][usize::from(kind >> 6)];
            input.fill_buffer(&mut data[..length]).ok()?;
            msix.table_write(which.into(), &data[..length]);
        }
        5 => {
            // The bus has found the place inside the BAR.
            let at = input.arbitrary::<u32>().ok()?.into();
            let mut data = [0; 8];
            msix.table_read(at, &mut data);
            msix.pba_read(at, &mut data);
        }
        6 => {
            let vector = u16::from(which) % VECTORS;
            msix.table_write(u64::from(vector) * 16 + 12, &[which >> 7, 0, 0, 0]);
        }
        _ if which == 255 => {
            msix.reset();
            for source in sources {
                (source.vector, source.owed) = (NO_VECTOR, false);
            }
        }
        _ => {
            for vector in 0..VECTORS {
                interrupts.injected(vector.into());
            }
        }
    }
    Some(())
}
