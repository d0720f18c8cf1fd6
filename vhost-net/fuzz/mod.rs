//! Fuzz targets: each queue of a NIC, its control commands, and what a guest may send.

use crate::address::MacAddress;
use crate::device::NetDevice;
use crate::guard::Guard;
use crate::header::{ETHERNET_HEADER, HEADER_SIZE, MAX_FRAME, NetHeader, TxHeader};
use crate::offload::Offloads;
use crate::options::Options;
use crate::tap::Tap;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use vhost_daemon::Device;
use zerocopy::{FromBytes, IntoBytes};

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);

/// A NIC on a socket, and the socket's other end.
fn nic(guarded: bool) -> (NetDevice, OwnedFd) {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (ours, host) =
        socketpair(AddressFamily::Unix, SockType::Datagram, None, flags).expect("a socket pair");
    let addresses = if guarded {
        vec!["10.0.0.2".parse().expect("an address")]
    } else {
        Vec::new()
    };
    let options = Options {
        mac: Some(MAC),
        addresses,
        guard: (!guarded).then_some(crate::options::Switch::Off),
        ..Options::default()
    };
    let tap = Arc::new(Tap::from_socket(ours));
    (NetDevice::on(options, vec![tap]).expect("a NIC"), host)
}

/// Puts queue `index` to a driver that is the fuzzer.
fn serve(device: &mut NetDevice, index: usize, features: u8, input: &[u8]) {
    let mut handlers = device.take_handlers();
    // Checksums and segments both ways (bits 0 to 15), or mergeable buffers too.
    let features = match features & 3 {
        0 => 0,
        1 => 1 << 15,
        2 => 0x7FFF,
        _ => u64::MAX,
    };
    vhost_daemon::fuzz::serve(handlers[index].as_mut(), features, input);
}

/// Buffers for frames of the input's lengths, which come first.
pub fn receive(input: &[u8]) {
    let Some(([features, one, two, three], input)) = input.split_first_chunk() else {
        return;
    };
    let (mut device, host) = nic(false);
    for length in [one, two, three] {
        let frame = vec![0; HEADER_SIZE + ETHERNET_HEADER + usize::from(*length) * 40];
        let _ = send(host.as_raw_fd(), &frame, MsgFlags::MSG_DONTWAIT);
    }
    serve(&mut device, 0, *features, input);
}

/// Frames to the host, guarded or not.
pub fn transmit(input: &[u8]) {
    let Some((features, input)) = input.split_first() else {
        return;
    };
    let (mut device, _host) = nic(features & 4 != 0);
    serve(&mut device, 1, *features, input);
}

/// Control commands.
pub fn control(input: &[u8]) {
    let Some((features, input)) = input.split_first() else {
        return;
    };
    let (mut device, _host) = nic(features & 4 != 0);
    serve(&mut device, 2, *features, input);
    device.reset();
}

/// A header and a frame: what passes lies within the frame, and is the guest's.
pub fn header(input: &[u8]) {
    let Some((features, input)) = input.split_first_chunk() else {
        return;
    };
    let Some((length, input)) = input.split_first_chunk() else {
        return;
    };
    let Some((header, frame)) = input.split_first_chunk::<HEADER_SIZE>() else {
        return;
    };
    let offloads = Offloads::new(u64::from_le_bytes(*features));
    let Ok(fields) = NetHeader::read_from_bytes(header) else {
        return;
    };
    let length = frame.len() + usize::from(u16::from_le_bytes(*length));
    let mut field = None;
    if let Ok(clean) = TxHeader::check(fields, length, &offloads) {
        field = clean.checksum();
        let clean = NetHeader::read_from_bytes(clean.as_bytes()).expect("a header");
        assert!((ETHERNET_HEADER..=MAX_FRAME).contains(&length));
        let checksum = usize::from(clean.csum_start.get()) + usize::from(clean.csum_offset.get());
        assert!(
            clean.flags == 0 || checksum + 2 <= length,
            "a checksum outside the frame"
        );
        assert!(
            usize::from(clean.hdr_len.get()) <= length,
            "headers beyond the frame"
        );
        assert!(clean.gso_type == 0 || (clean.flags == 1 && clean.gso_size.get() > 0));
    }
    for addresses in [Vec::new(), vec!["10.0.0.2".parse().expect("an address")]] {
        let guard = Guard::new(MAC, addresses);
        if guard.check(frame, field).is_ok() {
            assert_eq!(
                frame.get(6..12),
                Some(&MAC.0[..]),
                "another station's address passed"
            );
            let mut finished = frame.to_vec();
            let sum = field.and_then(|at| finished.get_mut(at..at + 2));
            // A field that nobody reads on this way.
            sum.into_iter()
                .for_each(|sum| sum.copy_from_slice(fields.num_buffers.as_bytes()));
            assert!(
                guard.check(&finished, None).is_ok(),
                "what was checked was rewritten"
            );
        }
    }
}
