use super::fakes::{FakeInterrupts, Point, add, event};
use super::{Msix, NO_VECTOR};
use crate::frontend::SharedEvent;
use crate::platform::MsiMessage;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
const MASK_OFFSET: u64 = 12;

fn msix(vectors: u16) -> (Arc<FakeInterrupts>, Msix) {
    over(FakeInterrupts::strict(), vectors)
}

fn over(interrupts: FakeInterrupts, vectors: u16) -> (Arc<FakeInterrupts>, Msix) {
    let interrupts = Arc::new(interrupts);
    let msix = Msix::new(interrupts.clone(), vectors).unwrap();
    (interrupts, msix)
}

fn program(msix: &mut Msix, vector: u64, data: u32) {
    msix.table_write(16 * vector, &0xFEE0_0000u64.to_le_bytes());
    msix.table_write(16 * vector + 8, &data.to_le_bytes());
    mask(msix, vector, false);
}

fn mask(msix: &mut Msix, vector: u64, masked: bool) {
    msix.table_write(16 * vector + MASK_OFFSET, &u32::from(masked).to_le_bytes());
}

fn pending(msix: &Msix) -> u8 {
    let mut bits = [0];
    msix.pba_read(0, &mut bits);
    bits[0]
}

fn assigned(msix: &mut Msix, vector: u16) -> Arc<SharedEvent> {
    let source = event();
    assert_eq!(msix.assign(&source, NO_VECTOR, vector), vector);
    source
}

#[test]
fn a_function_that_is_not_made_leaves_no_interrupt_taken() {
    let interrupts = Arc::new(FakeInterrupts::limited(3));
    assert!(Msix::new(interrupts.clone(), 4).is_err());
    drop(Msix::new(interrupts.clone(), 3).unwrap());
    assert!(Msix::new(interrupts.clone(), 3).is_ok());
}

#[test]
fn pending_while_masked_and_delivered_at_unmask() {
    let (interrupts, mut msix) = msix(2);
    let source = assigned(&mut msix, 1);
    msix.set_control(ENABLE);
    add(&source, 1);
    assert_eq!(pending(&msix), 0b10);
    assert_eq!(interrupts.injected(1), 0);
    program(&mut msix, 1, 0x41);
    assert_eq!(interrupts.injected(1), 1);
    assert_eq!(pending(&msix), 0);
    add(&source, 1);
    assert_eq!(interrupts.injected(1), 2);
    msix.set_control(ENABLE | FUNCTION_MASK);
    add(&source, 1);
    assert_eq!(pending(&msix), 0b10);
    assert_eq!(interrupts.injected(1), 2);
    msix.set_control(ENABLE);
    assert_eq!((interrupts.injected(1), pending(&msix)), (3, 0));
}

#[test]
fn pending_while_bus_mastering_is_off() {
    let (interrupts, mut msix) = msix(1);
    let source = assigned(&mut msix, 0);
    msix.set_control(ENABLE);
    program(&mut msix, 0, 7);
    msix.set_bus_master(true);
    msix.set_bus_master(false);
    add(&source, 1);
    msix.set_control(ENABLE | FUNCTION_MASK);
    msix.set_control(ENABLE);
    mask(&mut msix, 0, true);
    mask(&mut msix, 0, false);
    assert_eq!((interrupts.injected(0), pending(&msix)), (0, 1));
    msix.set_bus_master(true);
    assert_eq!((interrupts.injected(0), pending(&msix)), (1, 0));
    msix.set_bus_master(false);
    msix.reset();
    let source = assigned(&mut msix, 0);
    msix.set_control(ENABLE);
    program(&mut msix, 0, 7);
    add(&source, 1);
    assert_eq!(interrupts.injected(0), 2, "at power-on nothing is switched off");
}

/// One signal at each step of a mask and an unmask: whenever it comes, it is injected at least
/// once after it was made, and pending until then if the vector is masked.
#[test]
fn a_signal_at_any_step_of_mask_and_unmask_is_delivered() {
    for point in [
        Point::Route,
        Point::BeforeAttach,
        Point::AfterAttach,
        Point::BeforeDetach,
        Point::AfterDetach,
    ] {
        let (interrupts, mut msix) = msix(1);
        let source = assigned(&mut msix, 0);
        msix.set_control(ENABLE);
        program(&mut msix, 0, 1);
        let (signal, signals) = (source.clone(), Arc::new(AtomicU64::new(0)));
        let count = signals.clone();
        interrupts.hook(move |at| {
            if at == point {
                add(&signal, 1);
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        for round in 0..10u32 {
            let before = (interrupts.injected(0), signals.load(Ordering::SeqCst));
            mask(&mut msix, 0, true);
            if point == Point::AfterDetach {
                assert_eq!(pending(&msix), 1);
            }
            // Another message each time, so that the route is set at the unmask.
            msix.table_write(8, &(100 + round).to_le_bytes());
            mask(&mut msix, 0, false);
            let after = (interrupts.injected(0), signals.load(Ordering::SeqCst));
            assert_eq!(after.1, before.1 + 1, "{point:?} was reached");
            assert!(after.0 > before.0, "{point:?}: lost in round {round}");
        }
    }
}

/// A back end that waits for each of its interrupts to arrive, while another thread masks and
/// unmasks: one lost interrupt stops it.
#[test]
fn nothing_is_lost_under_load() {
    const SIGNALS: u64 = 20_000;
    let (interrupts, mut msix) = over(FakeInterrupts::default(), 2);
    let sources = [assigned(&mut msix, 0), assigned(&mut msix, 0)];
    msix.set_control(ENABLE);
    program(&mut msix, 0, 7);
    let msix = Arc::new(Mutex::new(msix));
    let done = Arc::new(AtomicBool::new(false));
    let masker = thread::spawn({
        let (msix, done) = (msix.clone(), done.clone());
        move || {
            let mut toggles = 0u64;
            while !done.load(Ordering::Relaxed) || toggles < 1000 {
                mask(&mut msix.lock().unwrap(), 0, true);
                toggles += 1;
                thread::yield_now();
                match toggles % 3 {
                    0 => msix.lock().unwrap().set_control(ENABLE | FUNCTION_MASK),
                    1 => msix.lock().unwrap().set_control(0),
                    _ => {}
                }
                thread::yield_now();
                msix.lock().unwrap().set_control(ENABLE);
                mask(&mut msix.lock().unwrap(), 0, false);
                thread::yield_now();
            }
            toggles
        }
    });
    let deadline = Instant::now() + Duration::from_secs(60);
    for number in 0..SIGNALS {
        let before = interrupts.injected(0);
        add(&sources[(number % 2) as usize], 1);
        while interrupts.injected(0) == before {
            assert!(Instant::now() < deadline, "interrupt {number} was lost");
            thread::yield_now();
        }
    }
    done.store(true, Ordering::Relaxed);
    assert!(masker.join().unwrap() >= 1000);
}

#[test]
fn the_same_message_again_costs_nothing() {
    let (interrupts, mut msix) = msix(1);
    let _source = assigned(&mut msix, 0);
    msix.set_control(ENABLE);
    assert_eq!(interrupts.route_calls(), 0, "a masked vector has no route yet");
    for _ in 0..5 {
        program(&mut msix, 0, 9);
        mask(&mut msix, 0, true);
    }
    assert_eq!(interrupts.route_calls(), 1);
    program(&mut msix, 0, 10);
    // Live: the message changes at once.
    assert_eq!(interrupts.route(0).map(|m| m.data), Some(10));
    msix.table_write(8, &11u32.to_le_bytes());
    assert_eq!(
        interrupts.route(0),
        Some(MsiMessage {
            address: 0xFEE0_0000,
            data: 11
        })
    );
    assert_eq!(interrupts.route_calls(), 3);
}

#[test]
fn assignment_follows_the_driver() {
    let (interrupts, mut msix) = msix(2);
    msix.set_control(ENABLE);
    program(&mut msix, 0, 1);
    program(&mut msix, 1, 2);
    let source = assigned(&mut msix, 0);
    assert_eq!(msix.assign(&source, 0, 1), 1);
    add(&source, 1);
    assert_eq!((interrupts.injected(0), interrupts.injected(1)), (0, 1));
    assert_eq!(msix.assign(&source, 1, 2), NO_VECTOR, "there is no vector 2");
    assert_eq!(interrupts.attached(), 0);
    assigned(&mut msix, 1);
    msix.reset();
    assert_eq!(interrupts.attached(), 0);
    let mut entry = [0; 16];
    msix.table_read(16, &mut entry);
    assert_eq!(entry[12], 1, "masked after reset");
}

#[test]
fn odd_accesses_to_table_and_pba() {
    let (_, mut msix) = msix(1);
    msix.table_write(1, &[0xFF; 4]);
    msix.table_write(4, &[0xFF; 8]);
    msix.table_write(0, &[0xFF; 2]);
    msix.table_write(16, &[0xFF; 4]);
    msix.table_write(u64::MAX - 3, &[0xFF; 4]);
    let mut entry = [0xAA; 18];
    msix.table_read(0, &mut entry);
    assert_eq!(entry[..16], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(entry[16..], [0xFF, 0xFF]);
    msix.table_write(0, &[0xFF; 4]);
    msix.table_read(0, &mut entry[..4]);
    assert_eq!(
        entry[..4],
        [0xFC, 0xFF, 0xFF, 0xFF],
        "address bits 0 and 1 are zero"
    );
    let mut bits = [0xFF; 8];
    msix.pba_read(0x800, &mut bits);
    assert_eq!(bits, [0; 8]);
}
