//! Two writes at a time beside each other, one of them in place, the other one in need of an allocation: the
//! latter touches nothing that is not its own.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use crate::support::hooked::Hooked;
use crate::support::recorder::Recorder;
use crate::support::{Scratch, assert_same, check_clean, contents, create, read, write};
use vhost_blk::image::{BlockFile, Format, OpenOptions, open_layers};

/// Of an extended L2 entry with clusters of 64 KiB.
const SUBCLUSTER: u64 = 2 << 10;
/// For what happens at once.
const DEADLINE: Duration = Duration::from_secs(10);

/// What the first write of a byte 9 waits for, and what waits for it.
#[derive(Default)]
struct Held {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    begun: bool,
    released: bool,
    ended: bool,
}

impl Held {
    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().expect("nobody panicked"));
        self.changed.notify_all();
    }

    fn wait_until(&self, reached: impl Fn(&State) -> bool) {
        let state = self.state.lock().expect("nobody panicked");
        let (_state, waited) = self
            .changed
            .wait_timeout_while(state, DEADLINE, |state| !reached(state))
            .expect("nobody panicked");
        assert!(!waited.timed_out(), "the other write does not get there");
    }

    /// Holds the write of bytes 9. One that puts old bytes 1 back lets it pass before.
    fn before_write(&self, bytes: &[u8]) {
        match bytes.first() {
            Some(9) => {
                self.set(|state| state.begun = true);
                self.wait_until(|state| state.released);
            }
            Some(1) if self.state.lock().expect("nobody panicked").begun => {
                self.set(|state| state.released = true);
                self.wait_until(|state| state.ended);
            }
            _ => {}
        }
    }
}

fn bytes(value: u8, range: &Range<u64>) -> Vec<u8> {
    vec![value; (range.end - range.start) as usize]
}

/// `old` is allocated and holds bytes 1. A write to `in_place` inside it has begun when one to
/// `allocating`, beside it, begins and ends.
fn both_last(old: &Range<u64>, in_place: &Range<u64>, allocating: &Range<u64>) {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "extended_l2=on", "64M");
    let held = Arc::new(Held::default());
    let mut file = Hooked::new(Recorder::new(contents(&path)));
    let hook = Arc::clone(&held);
    file.before_write = Box::new(move |bytes| hook.before_write(bytes));
    let file = Arc::new(file);
    let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, file.clone())];
    let image = open_layers(layers, None, &OpenOptions::default()).expect("opens");
    write(&*image, old.start, &bytes(1, old)).expect("writes");
    thread::scope(|scope| {
        scope.spawn(|| {
            write(&*image, in_place.start, &bytes(9, in_place)).expect("writes");
            held.set(|state| state.ended = true);
        });
        held.wait_until(|state| state.begun);
        write(&*image, allocating.start, &bytes(7, allocating)).expect("writes");
        held.set(|state| state.released = true);
    });
    let mut expected = vec![0; 4 * SUBCLUSTER as usize];
    for (range, value) in [(old, 1), (in_place, 9), (allocating, 7)] {
        expected[range.start as usize..range.end as usize].fill(value);
    }
    let found = read(&*image, 0, expected.len()).expect("reads");
    assert_same(&found, &expected, "after two writes");
    drop(image);
    std::fs::write(&path, file.inner.after_process_death(file.inner.position())).expect("writes");
    check_clean(&path);
}

fn before_the_start_of_an_allocating_write_nothing_is_put_back() {
    both_last(
        &(SUBCLUSTER..2 * SUBCLUSTER),
        &(SUBCLUSTER..SUBCLUSTER + 512),
        &(SUBCLUSTER + 512..3 * SUBCLUSTER),
    );
}

fn behind_the_end_of_an_allocating_write_nothing_is_put_back() {
    both_last(
        &(SUBCLUSTER..2 * SUBCLUSTER),
        &(2 * SUBCLUSTER - 512..2 * SUBCLUSTER),
        &(512..2 * SUBCLUSTER - 512),
    );
}

crate::suite! {
    with_qemu_img: [
        before_the_start_of_an_allocating_write_nothing_is_put_back,
        behind_the_end_of_an_allocating_write_nothing_is_put_back,
    ],
    alone: [],
}
