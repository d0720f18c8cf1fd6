//! A whole session with a back end that lies, sends what it likes along, and talks unasked.

use crate::frontend::fake_backend::{FakeBackend, Quirk, Script, memfd, memory, options};
use crate::frontend::{Deadlines, Error, Ring, RingAddresses, RingEvents, Session, SharedEvent};
use arbitrary::Unstructured;
use nix::fcntl::SealFlag;
use nix::sys::socket::{MsgFlags, send};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// As short as a busy machine allows: a back end that is silent costs one of these.
const STEP: Duration = Duration::from_millis(40);

/// Every step of a session, as far as it gets. It ends with a result, in bounded time.
pub fn frontend(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Ok(features) = input.arbitrary::<[u8; 4]>() else {
        return;
    };
    let flood = flood(&mut input).unwrap_or_default();
    let mut options = options();
    options.deadlines = Deadlines {
        first_answer: STEP,
        alive: STEP,
        step: STEP,
        drain: 2 * STEP,
        end: STEP,
    };
    options.ours = features[3] & 1 != 0;
    let script = script(features, input.take_rest().to_vec());
    let (fake, sockets) = FakeBackend::start(script);
    let peer = sockets.requests_peer.try_clone().expect("a descriptor");
    if let Ok(mut session) = Session::connect(sockets, options) {
        // What the peer's socket takes no more of is not sent. The session may have no channel.
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let _ = send(peer.as_raw_fd(), &flood, flags);
        let _ = use_session(&mut session);
    }
    drop(fake);
}

fn flood(input: &mut Unstructured<'_>) -> Option<Vec<u8>> {
    let length = usize::from(input.arbitrary::<u8>().ok()?);
    Some(input.bytes(length.min(input.len())).ok()?.to_vec())
}

fn script(features: [u8; 4], input: Vec<u8>) -> Script {
    let mut script = Script::default();
    // Some features are left out; VERSION_1 mostly stays.
    if features[0] & 0xF == 0xF {
        script.features &= !(1 << (32 - 2 * (features[0] >> 7)));
    }
    script.protocol &= !u64::from(u16::from_le_bytes([features[1], features[2]]));
    script.queues = (features[0] >> 4 & 7).into();
    *script.config.lock().expect("no panic") = vec![7; 60];
    let mut at = 0;
    script.quirk = Box::new(move |_| {
        let mut rest = Unstructured::new(input.get(at..).unwrap_or_default());
        let quirk = quirk(&mut rest).unwrap_or(Quirk::Normal);
        at = input.len() - rest.len();
        quirk
    });
    script
}

/// How the back end answers next.
fn quirk(input: &mut Unstructured<'_>) -> Option<Quirk> {
    if input.is_empty() {
        return None;
    }
    let [kind, detail] = input.arbitrary::<[u8; 2]>().ok()?;
    let bytes = |input: &mut Unstructured<'_>| {
        let length = usize::from(detail).min(input.len());
        input.bytes(length).ok().map(<[u8]>::to_vec)
    };
    Some(match kind % 16 {
        0..8 => Quirk::Normal,
        8..10 => Quirk::Payload(bytes(input)?),
        10..13 => Quirk::Answer(bytes(input)?, descriptors(kind)),
        13 => Quirk::Raw(bytes(input)?),
        14 if detail == 255 => Quirk::Silent,
        15 if detail > 127 => Quirk::Close,
        _ => Quirk::Normal,
    })
}

/// What a reply brings along: good memory, memory that can shrink or is short, none at all, too much.
fn descriptors(kind: u8) -> Vec<OwnedFd> {
    let good = || memfd(4096, SealFlag::F_SEAL_SHRINK);
    match kind >> 4 {
        0..4 => vec![good()],
        4..6 => vec![memfd(4096, SealFlag::empty())],
        6..8 => vec![memfd(0, SealFlag::F_SEAL_SHRINK)],
        8..10 => vec![good(), good()],
        10..12 => vec![good(), good(), good(), good()],
        12 => vec![memfd(4096, SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_WRITE)],
        13 => Vec::new(),
        _ => std::os::unix::net::UnixStream::pair().map_or_else(|_| Vec::new(), |(one, _)| vec![one.into()]),
    }
}

fn use_session(session: &mut Session) -> Result<(), Error> {
    let config = session.read_config(60)?;
    assert!(config.is_none_or(|config| config.len() == 60));
    let region = session.get_inflight(2, 64)?;
    let error = Arc::new(SharedEvent::new()?);
    let mut rings = Vec::new();
    for index in 0..2 {
        let base = 0x1_0000 * (u64::from(index) + 1);
        let areas = [base, base + 0x4000, base + 0x8000];
        let addresses = RingAddresses::check(&memory(), 64, areas).expect("areas in memory");
        rings.push(Ring {
            index,
            addresses,
            base: 0,
            events: RingEvents::new(&error)?,
        });
    }
    session.start(session.features(), &rings, region.as_ref())?;
    session.take_config_change();
    match session.write_config(8, &[1, 2, 3, 4]) {
        Err(Error::Refused(_)) | Ok(()) => {}
        Err(error) => return Err(error),
    }
    let states = session.stop(0..2)?;
    assert_eq!(states.len(), 2);
    session.reset(0..2)?;
    region.map_or(Ok(()), |region| region.zero())?;
    session.check_idle()
}
