use super::fake_backend::{
    FakeBackend, PROTOCOL, Quirk, Script, VERSION_1, all_protocol, memfd, memory, options,
};
use super::inflight::InflightRegion;
use super::message::{Ack, Header, Inflight};
use super::{
    Error, ReplyProblem, Ring, RingAddresses, RingEvents, Session, SessionOptions, SharedEvent, new_event,
};
use nix::fcntl::SealFlag;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::FrontendReq as Req;
use zerocopy::IntoBytes;

fn connect(script: Script) -> (FakeBackend, Result<Session, Error>) {
    let (fake, sockets) = FakeBackend::start(script);
    let session = Session::connect(sockets, options());
    (fake, session)
}

fn hasty() -> SessionOptions {
    let mut options = options();
    options.deadlines.first_answer = Duration::from_millis(100);
    options.deadlines.step = Duration::from_millis(100);
    options.deadlines.drain = Duration::from_millis(300);
    options
}

fn ring(index: u16, size: u16) -> Ring {
    let addresses = RingAddresses::check(&memory(), size, [0x1000, 0x2000, 0x3000]).unwrap();
    Ring {
        index,
        addresses,
        base: 5,
        events: RingEvents::new(&Arc::new(SharedEvent::new().unwrap())).unwrap(),
    }
}

#[test]
fn queues_leave_descriptors_to_others() {
    let error = Arc::new(SharedEvent::new().unwrap());
    assert_eq!(RingEvents::of_queues(3, &error, i32::MAX).unwrap().len(), 3);
    let refused = RingEvents::of_queues(3, &error, 3).unwrap_err();
    assert!(refused.hint().contains("fewer queues"), "{refused}");
}

#[test]
fn negotiates_in_order_and_starts_rings() {
    let script = Script {
        features: VERSION_1 | PROTOCOL | 1 << 26 | 1 << 9,
        ..Script::default()
    };
    let (fake, session) = connect(script);
    let mut session = session.unwrap();
    assert_eq!(
        session.features(),
        VERSION_1 | 1 << 9,
        "the protocol's own bits are hidden"
    );
    assert_eq!(session.queue_limit(), Some(4));
    let negotiation = [
        Req::SET_OWNER,
        Req::GET_FEATURES,
        Req::GET_PROTOCOL_FEATURES,
        Req::SET_PROTOCOL_FEATURES,
        Req::GET_QUEUE_NUM,
        Req::SET_BACKEND_REQ_FD,
        Req::GET_MAX_MEM_SLOTS,
        Req::ADD_MEM_REG,
        Req::ADD_MEM_REG,
    ];
    assert_eq!(fake.requests(), negotiation);
    let region = session.get_inflight(2, 256).unwrap();
    session.start(!0, &[ring(1, 64)], region.as_ref()).unwrap();
    let start = [
        Req::GET_INFLIGHT_FD,
        Req::SET_FEATURES,
        Req::SET_INFLIGHT_FD,
        Req::SET_VRING_NUM,
        Req::SET_VRING_BASE,
        Req::SET_VRING_ADDR,
        Req::SET_VRING_CALL,
        Req::SET_VRING_ERR,
        Req::SET_VRING_KICK,
        Req::SET_VRING_ENABLE,
    ];
    assert_eq!(fake.requests()[negotiation.len()..], start);
    let sent = |request| fake.look(request, 1, |seen| (seen.payload.clone(), seen.fd.is_some()));
    let acked = VERSION_1 | PROTOCOL | 1 << 9;
    assert_eq!(
        sent(Req::SET_FEATURES).0,
        acked.to_ne_bytes(),
        "LOG_ALL is never acknowledged"
    );
    assert_eq!(sent(Req::SET_VRING_NUM).0, [1, 0, 0, 0, 64, 0, 0, 0]);
    assert_eq!(sent(Req::SET_VRING_BASE).0, [1, 0, 0, 0, 5, 0, 0, 0]);
    assert_eq!(sent(Req::SET_VRING_ENABLE).0, [1, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(sent(Req::SET_VRING_KICK), (vec![1, 0, 0, 0, 0, 0, 0, 0], true));
    assert!(sent(Req::SET_INFLIGHT_FD).1 && sent(Req::SET_BACKEND_REQ_FD).1);
    let (addresses, _) = sent(Req::SET_VRING_ADDR);
    let word = |i: usize| u64::from_ne_bytes(addresses[i..i + 8].try_into().unwrap());
    // Descriptors, used, available: the order of the message, not of the virtio registers.
    assert_eq!(
        [word(8), word(16), word(24)],
        [0x7000_0000_1000, 0x7000_0000_3000, 0x7000_0000_2000]
    );
    let states = session.stop([1, 2].into_iter()).unwrap();
    assert_eq!((states[0].index, states[1].index), (1, 2));
    session.reset(0..2).unwrap();
    let requests = fake.requests();
    assert_eq!(
        requests[requests.len() - 3..],
        [Req::RESET_DEVICE, Req::SET_VRING_BASE, Req::SET_VRING_BASE]
    );
}

#[test]
fn a_plain_back_end_is_confirmed_by_a_question() {
    let (fake, session) = connect(Script {
        features: VERSION_1,
        ..Script::default()
    });
    // Without protocol features the memory goes in one table with two fds, of which the fake
    // takes none: it hangs up.
    drop(fake);
    drop(session);
    let (fake, session) = connect(Script {
        protocol: all_protocol() & !(1 << 3) & !(1 << 12),
        ..Script::default()
    });
    let mut session = session.unwrap();
    session.start(VERSION_1, &[ring(0, 16)], None).unwrap();
    assert_eq!(fake.requests().last(), Some(&Req::GET_FEATURES));
    assert!(session.get_inflight(1, 16).unwrap().is_none());
}

#[test]
fn a_legacy_back_end_is_refused() {
    let (_fake, session) = connect(Script {
        features: PROTOCOL,
        ..Script::default()
    });
    assert!(matches!(session, Err(Error::NoVersion1)));
}

#[test]
fn a_silent_back_end_meets_the_deadline() {
    for request in [Req::GET_FEATURES, Req::GET_QUEUE_NUM, Req::ADD_MEM_REG] {
        let (_fake, sockets) = FakeBackend::start(Script::quirk_at(request, || Quirk::Silent));
        let began = Instant::now();
        let error = Session::connect(sockets, hasty()).err().unwrap();
        assert!(
            matches!(error, Error::Timeout { request: at, .. } if at == request),
            "{error}"
        );
        assert!(began.elapsed() < Duration::from_secs(3));
    }
}

/// The first bytes of an answer, then nothing: the deadline is for the whole answer.
#[test]
fn half_an_answer_meets_the_deadline() {
    let half = Header::request(Req::GET_FEATURES.into(), 8, Ack::None)
        .reply(8)
        .as_bytes()[..7]
        .to_vec();
    let quirk = move || Quirk::Raw(half.clone());
    let (_fake, sockets) = FakeBackend::start(Script::quirk_at(Req::GET_FEATURES, quirk));
    let error = Session::connect(sockets, hasty()).err().unwrap();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[test]
fn shutdown_ends_a_wait() {
    let options = options();
    let cancel = options.cancel.clone();
    let (_fake, sockets) = FakeBackend::start(Script::quirk_at(Req::GET_FEATURES, || Quirk::Silent));
    cancel.write(1).unwrap();
    assert!(matches!(
        Session::connect(sockets, options),
        Err(Error::Cancelled)
    ));
}

#[test]
fn end_of_file_is_told_apart() {
    let (_fake, session) = connect(Script::quirk_at(Req::GET_QUEUE_NUM, || Quirk::Close));
    assert!(matches!(session, Err(Error::Gone(Req::GET_QUEUE_NUM))));
}

#[test]
fn bad_replies_are_named() {
    let header = |request: u32, flags: u32, size: u32| {
        let mut bytes = [request, flags, size].map(u32::to_ne_bytes).concat();
        bytes.extend_from_slice(&[0; 8]);
        bytes
    };
    let code = u32::from(Req::GET_QUEUE_NUM);
    let cases = [
        (header(code + 1, 5, 8), ReplyProblem::Code(code + 1)),
        (header(code, 1, 8), ReplyProblem::Flags(1)),
        (header(code, 6, 8), ReplyProblem::Flags(6)),
        (header(code, 0x15, 8), ReplyProblem::Flags(0x15)),
        (header(code, 5, 4), ReplyProblem::Size { expected: 8, got: 4 }),
        (
            header(code, 5, u32::MAX),
            ReplyProblem::Size {
                expected: 0x1000,
                got: u32::MAX,
            },
        ),
        (header(code, 5, 8), ReplyProblem::Value(0)),
    ];
    for (bytes, expected) in cases {
        let (_fake, session) = connect(Script::quirk_at(Req::GET_QUEUE_NUM, move || {
            Quirk::Raw(bytes.clone())
        }));
        match session {
            Err(Error::Reply {
                request: Req::GET_QUEUE_NUM,
                problem,
            }) => assert_eq!(problem, expected),
            Err(other) => panic!("{expected:?}: {other}"),
            Ok(_) => panic!("{expected:?} was accepted"),
        }
    }
    let refused = || Quirk::Payload(vec![1, 0, 0, 0, 0, 0, 0, 0]);
    let (_fake, session) = connect(Script::quirk_at(Req::ADD_MEM_REG, refused));
    assert!(matches!(session, Err(Error::Refused(Req::ADD_MEM_REG))));
    let other_ring = || Quirk::Payload(vec![9, 0, 0, 0, 0, 0, 0, 0]);
    let (_fake, session) = connect(Script::quirk_at(Req::GET_VRING_BASE, other_ring));
    let stopped = session.unwrap().stop([0].into_iter());
    assert!(matches!(
        stopped,
        Err(Error::Reply {
            problem: ReplyProblem::Value(9),
            ..
        })
    ));
}

/// Each step just within its deadline must not add up without end.
#[test]
fn one_deadline_for_all_rings_to_drain() {
    let slow = || {
        std::thread::sleep(Duration::from_millis(120));
        Quirk::Normal
    };
    let (_fake, sockets) = FakeBackend::start(Script::quirk_at(Req::GET_VRING_BASE, slow));
    let mut options = options();
    options.deadlines.drain = Duration::from_millis(300);
    let mut session = Session::connect(sockets, options).unwrap();
    assert!(matches!(
        session.stop(0..8),
        Err(Error::Timeout {
            request: Req::GET_VRING_BASE,
            ..
        })
    ));
}

#[test]
fn configuration_is_read_by_size() {
    let script = Script::default();
    *script.config.lock().unwrap() = (0..60).collect();
    let (_fake, session) = connect(script);
    let mut session = session.unwrap();
    assert_eq!(session.read_config(96).unwrap(), None);
    assert_eq!(session.read_config(60).unwrap(), Some((0..60).collect()));
}

#[test]
fn config_change_is_noted_and_answered() {
    let mut request = Header::request(2, 0, Ack::Wanted).as_bytes().to_vec();
    let script = Script {
        quirk: Box::new(|_| Quirk::Normal),
        ..Script::default()
    };
    let (fake, session) = connect(script);
    let mut session = session.unwrap();
    let fd = fake.fd(Req::SET_BACKEND_REQ_FD, 1);
    let mut channel = UnixStream::from(OwnedFd::from(fd));
    channel.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    channel.write_all(&request).unwrap();
    assert!(session.take_config_change());
    assert!(!session.take_config_change());
    let mut answer = [0; 20];
    channel.read_exact(&mut answer).unwrap();
    assert_eq!(answer[12..], [0; 8]);
    // An unknown request is answered with a failure, a malformed one closes the channel.
    request[0] = 6;
    channel.write_all(&request).unwrap();
    assert!(!session.take_config_change());
    channel.read_exact(&mut answer).unwrap();
    assert_eq!(answer[12], 1);
    request[8..12].fill(0xFF);
    channel.write_all(&request).unwrap();
    assert!(!session.take_config_change());
    assert!(session.request_channel().is_none());
    session.read_config(8).unwrap();
}

#[test]
fn a_change_that_was_told_before_the_end_of_the_channel_counts() {
    let (fake, session) = connect(Script::default());
    let mut session = session.unwrap();
    let mut channel = UnixStream::from(OwnedFd::from(fake.fd(Req::SET_BACKEND_REQ_FD, 1)));
    let change = Header::request(2, 0, Ack::None);
    channel.write_all(change.as_bytes()).unwrap();
    channel.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(session.take_config_change());
    assert!(!session.take_config_change());
    assert!(
        session.request_channel().is_none(),
        "it would be readable for ever"
    );
}

#[test]
fn in_flight_regions_are_judged() {
    let wanted = Inflight {
        mmap_size: 4096,
        mmap_offset: 0,
        num_queues: 1,
        queue_size: 256,
        padding: [0; 4],
    };
    let sealed = SealFlag::F_SEAL_SHRINK;
    let judge =
        |size, seals, message, ours| InflightRegion::accept(memfd(size, seals), message, wanted, ours);
    assert!(judge(4096, sealed, wanted, true).is_ok());
    assert!(
        judge(4096, SealFlag::empty(), wanted, true).is_err(),
        "ours must be sealed"
    );
    assert!(judge(4096, SealFlag::empty(), wanted, false).is_ok());
    assert!(judge(4095, sealed, wanted, true).is_err(), "too short");
    assert!(judge(4096, sealed | SealFlag::F_SEAL_WRITE, wanted, true).is_err());
    let message = |mmap_size, mmap_offset| Inflight {
        mmap_size,
        mmap_offset,
        ..wanted
    };
    assert!(judge(4096, sealed, message(0, 0), true).is_err());
    assert!(judge(1 << 30, sealed, message(1 << 30, 0), true).is_err());
    assert!(judge(4096, sealed, message(4096, u64::MAX), true).is_err());
    let pipe = std::io::pipe().unwrap().0;
    let pipe = pipe.as_fd().try_clone_to_owned().unwrap();
    assert!(
        InflightRegion::accept(pipe, wanted, wanted, false).is_err(),
        "a pipe is no memfd"
    );
}

#[test]
fn rings_lie_inside_ram() {
    let memory = memory();
    let check = |size, areas| RingAddresses::check(&memory, size, areas).is_some();
    assert!(check(256, [0, 0x1000, 0x2000]));
    assert!(check(1, [(1 << 32) + 0xF_FFF0, 0, 0x20]));
    assert!(!check(1, [(1 << 20) - 8, 0, 0x20]), "crosses the end of a region");
    assert!(!check(0, [0, 0x1000, 0x2000]));
    assert!(!check(3, [0, 0x1000, 0x2000]));
    assert!(!check(256, [8, 0x1000, 0x2000]), "descriptors are aligned to 16");
    assert!(!check(256, [0, 0x1001, 0x2000]));
    assert!(!check(256, [0, 0x1000, 0x2002]));
    assert!(!check(256, [!15, 0x1000, 0x2000]));
    assert!(
        !check(256, [0xC000_0000, 0x1000, 0x2000]),
        "the PCI hole is no RAM"
    );
}

#[test]
fn descriptors_that_a_reply_must_not_bring_are_refused_and_closed() {
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    for count in [1, 2, 5, 200] {
        let fds = move || (0..count).map(|_| new_event().unwrap().as_fd().try_clone_to_owned().unwrap());
        let script = Script::quirk_at(Req::GET_QUEUE_NUM, move || {
            Quirk::Answer(vec![4, 0, 0, 0, 0, 0, 0, 0], fds().collect())
        });
        let (fake, session) = connect(script);
        let refused = Error::Reply {
            request: Req::GET_QUEUE_NUM,
            problem: ReplyProblem::Fds,
        };
        let error = session.err().unwrap();
        assert_eq!(error.to_string(), refused.to_string(), "{count} descriptors");
        drop(fake);
    }
    // Other tests open a few at the same time, but not hundreds.
    assert!(open() < 150, "{} descriptors are open", open());
}
