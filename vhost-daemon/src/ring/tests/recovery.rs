//! A successor takes over from a device that was killed at any store.

use super::crash;
use super::driver::{Driver, SIZE, WRITE};
use crate::ring::{InflightRegion, Ring, RingFault};

fn setup() -> (Driver, InflightRegion) {
    let mut driver = Driver::new();
    for head in 0..SIZE {
        driver.describe(head, driver.buffer(head.into()), 1, WRITE, 0);
    }
    for head in [4, 1, 6, 3, 0] {
        driver.offer(head);
    }
    let (region, _memfd) = InflightRegion::create(1, SIZE).unwrap();
    (driver, region)
}

/// Takes all, completes out of order in two batches, keeps one.
fn life(driver: &Driver, region: &InflightRegion) -> Result<(), RingFault> {
    let mut ring = driver.ring_with(region)?;
    let mut taken = Vec::new();
    while let Some(chain) = ring.pop()? {
        taken.push(chain);
    }
    for batch in [&[2, 0][..], &[2, 0]] {
        for place in batch {
            let chain = taken.remove(*place);
            ring.complete(chain, 1);
        }
        ring.publish()?;
    }
    Ok(())
}

/// Executes whatever is left, in the order in which it comes; returns the heads.
fn finish(ring: &mut Ring) -> Vec<u16> {
    let mut heads = Vec::new();
    while let Some(chain) = ring.pop().unwrap() {
        heads.push(chain.head());
        ring.complete(chain, 1);
        ring.publish().unwrap();
    }
    heads
}

#[test]
fn every_chain_is_published_once_wherever_the_device_dies() {
    let mut stores = 0;
    loop {
        let (driver, region) = setup();
        let died = crash::after(stores, || life(&driver, &region));
        let published_before = driver.used().len();

        let mut successor = driver.ring_with(&region).unwrap();
        let left = finish(&mut successor);
        assert_eq!(left.len() + published_before, 5, "died after {stores} stores");
        let mut heads: Vec<_> = driver.used().iter().map(|(head, _)| *head).collect();
        heads.sort_unstable();
        assert_eq!(heads, [0, 1, 3, 4, 6], "died after {stores} stores");
        assert_eq!(successor.position(), 5);

        let order: Vec<_> = [4, 1, 6, 3, 0]
            .into_iter()
            .filter(|head| left.contains(head))
            .collect();
        assert_eq!(left, order, "oldest first, after {stores} stores");
        if !died {
            break;
        }
        stores += 1;
    }
    assert!(stores > 30, "only {stores} stores were tried");
}

#[test]
fn a_successor_that_dies_too_changes_nothing() {
    let (driver, region) = setup();
    life(&driver, &region).unwrap();
    let mut stores = 0;
    while crash::after(stores, || driver.ring_with(&region).map(drop)) {
        stores += 1;
    }
    let mut ring = driver.ring_with(&region).unwrap();
    assert_eq!(finish(&mut ring), [3]);
    assert!(stores > 0);
}

#[test]
fn a_successor_interrupts_once_whatever_the_driver_says() {
    let (driver, region) = setup();
    life(&driver, &region).unwrap();
    driver.set_available_flags(1);
    let mut ring = driver.ring_with(&region).unwrap();
    assert!(ring.needs_interrupt().unwrap());
    assert!(!ring.needs_interrupt().unwrap());
}

#[test]
fn a_zeroed_region_is_a_new_one() {
    let (driver, region) = setup();
    life(&driver, &region).unwrap();
    region.zero();
    let ring = driver.ring_with(&region).unwrap();
    assert_eq!(ring.position(), 0, "the base counts again");
}

#[test]
fn a_late_mark_in_a_zeroed_region_does_not_count() {
    let (driver, region) = setup();
    life(&driver, &region).unwrap();
    region.zero();
    region.queue(0, SIZE).unwrap().take(5).unwrap();
    let ring = driver.ring_with(&region).unwrap();
    drop(ring);
    let mut successor = driver.ring_with(&region).unwrap();
    assert!(!finish(&mut successor).contains(&5), "never offered");
}

#[test]
fn regions_that_contradict_the_ring_are_refused() {
    let (driver, region) = setup();
    life(&driver, &region).unwrap();
    let smaller = region.shaped(1, SIZE / 2);
    let wrong = smaller.queue(0, SIZE / 2).unwrap().recover(4).unwrap_err();
    assert_eq!(wrong, RingFault::Inflight("it has another version or size"));
    let far = region.queue(0, SIZE).unwrap().recover(4 + SIZE + 1).unwrap_err();
    assert_eq!(far, RingFault::Inflight("its used index is not near the ring's"));
    assert!(region.queue(1, SIZE).is_none());
    assert!(region.queue(0, SIZE * 2).is_none());
    drop(driver);
}

#[test]
fn adopted_regions_lie_in_their_file() {
    let (region, memfd) = InflightRegion::create(2, SIZE).unwrap();
    let size = region.size() as u64;
    assert!(InflightRegion::adopt(&memfd, 0, size, 2, SIZE).is_ok());
    assert!(InflightRegion::adopt(&memfd, 0, size, 3, SIZE).is_err());
    assert!(InflightRegion::adopt(&memfd, 4096, size, 2, SIZE).is_err());
    assert!(InflightRegion::adopt(&memfd, u64::MAX, size, 2, SIZE).is_err());
}
