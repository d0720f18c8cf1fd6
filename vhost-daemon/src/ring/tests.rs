//! A driver that breaks every rule, and a device that dies at every step.

pub(super) mod crash;
mod driver;
mod full;
mod noise;
mod recovery;

use super::*;
use driver::{Driver, INDIRECT, NEXT, SIZE, WRITE};

fn fault(driver: &Driver) -> RingFault {
    driver.ring().pop().expect_err("the ring should be broken")
}

#[test]
fn a_chain_goes_there_and_back() {
    let mut driver = Driver::new();
    driver.describe(0, driver.buffer(0), 16, NEXT, 1);
    driver.describe(1, driver.buffer(1), 512, NEXT | WRITE, 2);
    driver.describe(2, driver.buffer(2), 1, WRITE, 0);
    driver.offer(0);
    driver.write(driver.buffer(0), b"a block request!");

    let mut ring = driver.ring();
    let chain = ring.pop().unwrap().unwrap();
    assert_eq!((chain.readable_length(), chain.writable_length()), (16, 513));
    let mut header = [0; 20];
    assert_eq!(chain.read_at(0, &mut header), 16);
    assert_eq!(&header[..16], b"a block request!");
    assert_eq!(chain.write_at(511, b"xyz"), 2);
    ring.complete(chain, 513);
    assert_eq!(driver.used(), [], "nothing shows before it is published");
    ring.publish().unwrap();
    assert_eq!(driver.used(), [(0, 513)]);
    assert_eq!(driver.read(driver.buffer(2), 1), b"y");
    assert!(ring.pop().unwrap().is_none());
    assert_eq!(ring.position(), 1);
}

#[test]
fn an_index_that_jumps_is_a_fault() {
    let mut driver = Driver::new();
    driver.set_available_index(SIZE + 1);
    let found = fault(&driver);
    assert_eq!(
        found,
        RingFault::AvailIndex {
            found: SIZE + 1,
            next: 0,
            size: SIZE
        }
    );
}

#[test]
fn heads_are_checked() {
    let mut driver = Driver::new();
    driver.offer(SIZE);
    assert_eq!(fault(&driver), RingFault::Head(SIZE));

    let mut driver = Driver::new();
    driver.describe(3, driver.buffer(0), 1, WRITE, 0);
    driver.offer(3);
    driver.offer(3);
    let mut ring = driver.ring();
    let chain = ring.pop().unwrap().unwrap();
    assert_eq!(ring.pop().unwrap_err(), RingFault::HeadTwice(3));
    ring.complete(chain, 0);
}

#[test]
fn chains_that_never_end_or_lead_outside_are_faults() {
    let mut driver = Driver::new();
    driver.describe(0, driver.buffer(0), 1, NEXT, 1);
    driver.describe(1, driver.buffer(1), 1, NEXT, 0);
    driver.offer(0);
    assert_eq!(fault(&driver), RingFault::Endless(0));

    driver.describe(1, driver.buffer(1), 1, NEXT, SIZE);
    assert_eq!(fault(&driver), RingFault::Next { head: 0, next: SIZE });

    driver.describe(1, driver.buffer(1), 1, 0, 0);
    driver.describe(0, driver.buffer(0), 1, NEXT | WRITE, 1);
    assert_eq!(fault(&driver), RingFault::Order(0));

    driver.describe(0, driver.buffer(0), 1, NEXT, 1);
    driver.describe(1, driver.buffer(1), u32::MAX, 0, 0);
    assert_eq!(fault(&driver), RingFault::TooManyBytes(0));

    driver.describe(0, u64::MAX - 1, 4, 0, 0);
    assert!(matches!(fault(&driver), RingFault::Memory { length: 4, .. }));

    driver.describe(0, 0, u32::MAX, 0, 0);
    assert!(matches!(fault(&driver), RingFault::Memory { .. }));
}

#[test]
fn indirect_tables_are_followed_once() {
    let mut driver = Driver::new();
    let table = driver.buffer(4);
    driver.describe_in(table, 0, driver.buffer(0), 16, NEXT, 1);
    driver.describe_in(table, 1, driver.buffer(1), 8, WRITE, 0);
    driver.describe(5, table, 32, INDIRECT, 0);
    driver.offer(5);
    let chain = driver.ring().pop().unwrap().unwrap();
    assert_eq!(
        (chain.head(), chain.readable_length(), chain.writable_length()),
        (5, 16, 8)
    );

    for (length, flags) in [
        (0, INDIRECT),
        (24, INDIRECT),
        (32, INDIRECT | NEXT),
        (16 * 1025, INDIRECT),
    ] {
        driver.describe(5, table, length, flags, 0);
        assert_eq!(fault(&driver), RingFault::Indirect(5), "{length} {flags}");
    }
    driver.describe(5, table, 32, INDIRECT, 0);
    driver.describe_in(table, 0, table, 16, INDIRECT, 0);
    assert_eq!(fault(&driver), RingFault::Indirect(5));
    driver.describe_in(table, 0, driver.buffer(0), 16, NEXT, 2);
    assert_eq!(fault(&driver), RingFault::Next { head: 5, next: 2 });
    driver.describe_in(table, 0, driver.buffer(0), 16, NEXT, 0);
    assert_eq!(fault(&driver), RingFault::Endless(5));
    driver.describe(5, u64::MAX - 15, 32, INDIRECT, 0);
    assert!(matches!(fault(&driver), RingFault::Memory { length: 32, .. }));
}

#[test]
fn no_more_of_a_chain_is_read_than_is_wanted() {
    let mut driver = Driver::new();
    let outside = u64::MAX - 1;
    driver.describe(0, driver.buffer(0), 12, NEXT | WRITE, 1);
    driver.describe(1, driver.buffer(1), 100, NEXT | WRITE, 2);
    driver.describe(2, outside, 4, WRITE, 0);
    driver.offer(0);
    let mut ring = driver.ring();
    let mut chain = ring.pop_enough(112).unwrap().unwrap();
    assert_eq!(chain.writable_length(), 112);
    driver.describe(2, driver.buffer(2), 4, WRITE, 0);
    assert!(ring.read_rest(&mut chain).unwrap());
    assert_eq!(chain.writable_length(), 116);
    assert!(!ring.read_rest(&mut chain).unwrap());
    ring.complete(chain, 0);
    driver.describe(2, outside, 4, WRITE, 0);
    assert!(matches!(
        driver.ring().pop_enough(113),
        Err(RingFault::Memory { length: 4, .. })
    ));

    // More entries than are copied at first, of which one says the bytes and another that it is the last.
    let mut driver = Driver::new();
    let table = driver.buffer(4);
    for index in 0..6 {
        let buffer = driver.buffer(u64::from(index % 4));
        driver.describe_in(table, index, buffer, 10, NEXT | WRITE, index + 1);
    }
    driver.describe_in(table, 6, driver.buffer(0), 5, WRITE, 0);
    driver.describe(5, table, 16 * 7, INDIRECT, 0);
    driver.offer(5);
    for (enough, found) in [(1, 10), (40, 40), (41, 50), (60, 60), (61, 65), (1000, 65)] {
        let mut ring = driver.ring();
        let mut chain = ring.pop_enough(enough).unwrap().unwrap();
        assert_eq!(chain.writable_length(), found, "{enough}");
        assert_eq!(ring.read_rest(&mut chain).unwrap(), found < 65, "{enough}");
        assert_eq!(chain.writable_length(), 65, "{enough}");
    }
    driver.describe_in(table, 5, driver.buffer(0), 10, NEXT | WRITE, 7);
    assert_eq!(
        driver.ring().pop_enough(50).unwrap().unwrap().writable_length(),
        50
    );
    assert!(matches!(
        driver.ring().pop_enough(61),
        Err(RingFault::Next { head: 5, next: 7 })
    ));
}

#[test]
fn what_was_put_back_is_not_looked_at_again_before_there_is_more() {
    let mut driver = Driver::new();
    driver.describe(0, driver.buffer(0), 64, WRITE, 0);
    driver.describe(1, driver.buffer(1), 64, WRITE, 0);
    driver.offer(0);
    let mut ring = driver.ring();
    ring.begin_round().unwrap();
    let chain = ring.pop().unwrap().unwrap();
    assert!(ring.pop().unwrap().is_none());
    ring.put_back(chain).unwrap();
    assert!(!ring.enable_kicks().unwrap());
    driver.offer(1);
    assert!(ring.enable_kicks().unwrap());
    ring.begin_round().unwrap();
    assert_eq!(ring.pop().unwrap().unwrap().head(), 0);
    assert_eq!(ring.pop().unwrap().unwrap().head(), 1);
}

#[test]
fn one_round_takes_at_most_a_ring() {
    let mut driver = Driver::new();
    driver.describe(0, driver.buffer(0), 1, WRITE, 0);
    let mut ring = driver.ring();
    for _ in 0..SIZE {
        driver.offer(0);
        let chain = ring.pop().unwrap().unwrap();
        ring.complete(chain, 1);
        ring.publish().unwrap();
    }
    driver.offer(0);
    assert!(ring.pop().unwrap().is_none());
    assert!(!ring.renew_budget());
    assert!(ring.pop().unwrap().is_some());
}

#[test]
fn interrupts_follow_the_drivers_wish() {
    let complete_one = |driver: &mut Driver, ring: &mut Ring, head| {
        driver.describe(head, driver.buffer(0), 1, WRITE, 0);
        driver.offer(head);
        let chain = ring.pop().unwrap().unwrap();
        ring.complete(chain, 1);
        ring.publish().unwrap();
        ring.needs_interrupt().unwrap()
    };
    let mut driver = Driver::new();
    let mut ring = driver.ring();
    assert!(complete_one(&mut driver, &mut ring, 0));
    assert!(!ring.needs_interrupt().unwrap(), "once for what was published");
    driver.set_available_flags(1);
    assert!(!complete_one(&mut driver, &mut ring, 1));

    let mut driver = Driver::with_event_idx();
    let mut ring = driver.ring();
    driver.set_used_event(1);
    assert!(!complete_one(&mut driver, &mut ring, 0));
    assert!(complete_one(&mut driver, &mut ring, 1));
    assert!(!complete_one(&mut driver, &mut ring, 2));
}
