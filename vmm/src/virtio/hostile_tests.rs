//! Back ends that do to the eventfds that they were given what they should not.

use super::DeviceEvent;
use super::layout::{NOTIFY, TABLE};
use super::rig::{Rig, script};
use crate::frontend::SharedEvent;
use crate::frontend::fake_backend::FakeBackend;
use crate::pci::fakes::add;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::channel;
use std::time::Duration;
use vhost::vhost_user::message::FrontendReq as Req;

/// The most that a counter holds.
const FULL: u64 = u64::MAX - 1;

/// Runs it on a thread of its own, which may take so long.
fn within(limit: Duration, body: impl FnOnce() + Send + 'static) {
    let (tell, told) = channel();
    std::thread::spawn(move || {
        body();
        tell.send(()).unwrap();
    });
    told.recv_timeout(limit).expect("it waits for a back end");
}

/// The back end's copy of what the last of two such messages gave, where whoever reads or writes waits.
fn waiting(fake: &FakeBackend, request: Req) -> SharedEvent {
    let event = SharedEvent::from(OwnedFd::from(fake.fd(request, 2)));
    let flags = OFlag::from_bits_retain(fcntl(event.as_fd(), FcntlArg::F_GETFL).unwrap());
    fcntl(event.as_fd(), FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK)).unwrap();
    event
}

fn mask(rig: &Rig, masked: u32) {
    rig.write(TABLE.start + 16 * 2 + 12, &masked.to_le_bytes());
}

#[test]
fn nobody_waits_for_a_back_end_that_lets_readers_and_writers_of_its_eventfds_wait() {
    within(Duration::from_secs(60), || {
        let rig = Rig::new(script());
        rig.drive();
        rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
        let [call, kick, _error] = [Req::SET_VRING_CALL, Req::SET_VRING_KICK, Req::SET_VRING_ERR]
            .map(|request| waiting(&rig.fake, request));
        // A vCPU: nothing was counted, then as much as there can be.
        mask(&rig, 1);
        mask(&rig, 0);
        assert_eq!(rig.interrupts.injected(2), 0);
        mask(&rig, 1);
        add(&call, FULL);
        mask(&rig, 0);
        assert_eq!(rig.interrupts.injected(2), 1);
        // The device's thread.
        add(&kick, FULL);
        rig.write(NOTIFY.start + 4, &1u16.to_le_bytes());
        // Done after the doorbell.
        rig.device.drain().unwrap();
        assert_eq!(kick.take(), FULL);
        rig.set_status(0);
        rig.wait_for("the reset", |rig| rig.status() == 0);
        rig.drive();
        rig.fake.look(Req::SET_VRING_ENABLE, 4, |_| ());
        // A successor is given the same.
        mask(&rig, 1);
        add(&call, FULL);
        add(&kick, FULL);
        rig.fake.kill();
        assert!(matches!(rig.event(), DeviceEvent::BackendLost { .. }));
        let (heir, sockets) = FakeBackend::start(script());
        rig.replace(sockets).unwrap();
        assert_eq!(waiting(&heir, Req::SET_VRING_KICK).take(), FULL);
        mask(&rig, 0);
        assert_eq!(rig.interrupts.injected(2), 2);
        rig.set_status(0);
        rig.wait_for("the reset", |rig| rig.status() == 0);
    });
}
