//! Devices that come and go on one thread.

use super::rig::{Rig, SLOT, script, spec};
use super::{DeviceError, DeviceParts, Seat};
use crate::frontend::fake_backend::{FakeBackend, Quirk, Script, deadlines};
use crate::frontend::{BackendSockets, Deadlines, Error};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;
use vhost::vhost_user::message::FrontendReq as Req;

const LONG: Duration = Duration::from_secs(10);

/// Something that a device's thread says, and its coming.
fn word() -> (Box<dyn FnOnce() + Send>, Receiver<()>) {
    let (say, said) = channel();
    (Box::new(move || say.send(()).unwrap_or_default()), said)
}

fn parts(rig: &Rig, sockets: BackendSockets, answered: Box<dyn FnOnce() + Send>) -> DeviceParts {
    DeviceParts {
        config: spec(),
        sockets,
        memory: rig.memory.clone(),
        interrupts: rig.interrupts.clone(),
        doorbells: rig.doorbells.clone(),
        events: Arc::new(|_| ()),
        // The first answer of a disk of ours has as long as a drain.
        deadlines: Deadlines {
            drain: Duration::from_secs(3),
            ..deadlines()
        },
        generation: 0,
        answered: Some(answered),
    }
}

/// The guest lets go of a rig's device; its thread.
fn ejected(rig: &mut Rig) -> Option<Seat> {
    assert!(rig.bus.remove(SLOT).is_some());
    let (done, said) = word();
    rig.device.eject(done);
    said.recv_timeout(LONG).unwrap();
    let another = Rig::new(script()).device;
    std::mem::replace(&mut rig.device, another).vacate()
}

#[test]
fn a_device_that_the_guest_let_go_of_leaves_nothing_and_its_thread_serves_another() {
    let mut rig = Rig::new(script());
    rig.drive();
    assert_eq!(rig.doorbells.attached().len(), 2);
    let seat = ejected(&mut rig).unwrap();
    // Each ring was stopped before the connection was closed.
    rig.fake.look(Req::GET_VRING_BASE, 2, |_| ());
    assert_eq!(
        (rig.doorbells.attached().len(), rig.interrupts.attached()),
        (0, 0)
    );
    assert_eq!(rig.interrupts.freed(), 3, "of two queues and the configuration");

    let (fake, sockets) = FakeBackend::start(script());
    let (answered, said) = word();
    let connecting = seat.connect(parts(&rig, sockets, answered)).unwrap();
    said.recv_timeout(LONG).unwrap();
    let device = connecting.finish().map_err(|(error, _)| error).unwrap();
    rig.bus.add(SLOT, device.function()).unwrap();
    rig.device = device;
    rig.fake = fake;
    rig.drive();
    rig.fake.look(Req::SET_VRING_KICK, 2, |_| ());
}

#[test]
fn a_thread_whose_device_could_not_be_used_serves_the_next() {
    let mut rig = Rig::new(script());
    let seat = ejected(&mut rig).unwrap();
    let mut seat = Some(seat);
    for quirk in [|| Quirk::Close, || Quirk::Silent] {
        let (_fake, sockets) = FakeBackend::start(Script::quirk_at(Req::GET_FEATURES, quirk));
        let (answered, said) = word();
        let connecting = seat
            .take()
            .unwrap()
            .connect(parts(&rig, sockets, answered))
            .unwrap();
        said.recv_timeout(LONG).unwrap();
        let (DeviceError { cause, .. }, back) = connecting.finish().err().unwrap();
        assert!(
            matches!(cause, Error::Gone(_) | Error::Timeout { .. }),
            "{cause:?}"
        );
        seat = back;
    }
    let (_fake, sockets) = FakeBackend::start(script());
    let (answered, said) = word();
    let connecting = seat.unwrap().connect(parts(&rig, sockets, answered)).unwrap();
    said.recv_timeout(LONG).unwrap();
    assert!(connecting.finish().is_ok());
}

#[test]
fn a_device_whose_back_end_is_lost_with_rings_goes_once_that_writes_no_more() {
    let mut rig = Rig::new(script());
    rig.drive();
    rig.fake.look(Req::SET_VRING_KICK, 2, |_| ());
    rig.fake.kill();
    rig.event();
    assert!(rig.bus.remove(SLOT).is_some());
    let (done, said) = word();
    let device = &mut rig.device;
    device.eject(done);
    assert!(
        said.recv_timeout(Duration::from_millis(200)).is_err(),
        "its process may write"
    );
    assert!(device.is_resetting(), "a machine's reset waits for it");
    device.give_up("its process has ended");
    said.recv_timeout(LONG).unwrap();
}
