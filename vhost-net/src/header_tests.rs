use super::*;
use crate::offload::Offloads;
use proptest::prelude::*;

fn everything() -> Offloads {
    Offloads::new(u64::MAX)
}

fn tcp4() -> NetHeader {
    NetHeader {
        flags: F_NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 54.into(),
        gso_size: 1448.into(),
        csum_start: 34.into(),
        csum_offset: 16.into(),
        num_buffers: 7.into(),
    }
}

#[test]
fn a_plain_frame_carries_nothing_over() {
    let noise = NetHeader {
        flags: 2,
        hdr_len: 9999.into(),
        gso_size: 1.into(),
        csum_start: 9999.into(),
        ..NetHeader::default()
    };
    let header = TxHeader::check(noise, 60, &Offloads::new(0)).unwrap();
    assert_eq!(header.as_bytes(), [0; HEADER_SIZE]);
}

#[test]
fn a_super_frame_keeps_its_fields_but_not_num_buffers() {
    let header = TxHeader::check(tcp4(), 60_000, &everything()).unwrap();
    let expected = NetHeader {
        num_buffers: 0.into(),
        ..tcp4()
    };
    assert_eq!(header.as_bytes(), expected.as_bytes());
}

#[test]
fn a_hint_that_cannot_be_true_is_corrected() {
    for (hint, frame, passed) in [
        (0, 2000, 54),
        (53, 2000, 54),
        (54, 2000, 54),
        // With timestamps.
        (66, 2000, 66),
        (95, 2000, 54),
        (65535, 2000, 54),
        (66, 60, 54),
    ] {
        let header = NetHeader {
            hdr_len: hint.into(),
            ..tcp4()
        };
        let TxHeader { clean, .. } = TxHeader::check(header, frame, &everything()).unwrap();
        assert_eq!(clean.hdr_len.get(), passed, "{hint} in {frame}");
    }
}

#[test]
fn each_field_is_held_to_the_frame() {
    let check = |change: fn(&mut NetHeader), frame| {
        let mut header = tcp4();
        change(&mut header);
        TxHeader::check(header, frame, &everything()).unwrap_err()
    };
    assert_eq!(check(|_| (), 13), HeaderError::Short);
    assert_eq!(check(|_| (), MAX_FRAME + 1), HeaderError::Long);
    assert_eq!(check(|_| (), 53), HeaderError::Checksum);
    assert_eq!(check(|h| h.gso_type = 3, 2000), HeaderError::GsoType);
    assert_eq!(check(|h| h.gso_type = 0x7f, 2000), HeaderError::GsoType);
    assert_eq!(check(|h| h.gso_size = 0.into(), 2000), HeaderError::GsoSize);
    assert_eq!(check(|h| h.flags = 0, 2000), HeaderError::GsoSize);
    assert_eq!(check(|h| h.csum_start = 13.into(), 2000), HeaderError::Checksum);
    assert_eq!(
        check(|h| h.csum_start = 65535.into(), 2000),
        HeaderError::Checksum
    );
    assert_eq!(
        check(|h| h.csum_offset = 65535.into(), 2000),
        HeaderError::Checksum
    );
    assert_eq!(check(|h| h.csum_offset = 6.into(), 2000), HeaderError::Checksum);
}

#[test]
fn a_super_frame_is_cut_into_as_many_packets_as_any_network_needs() {
    let cut = |size: u16, frame| {
        let header = NetHeader {
            gso_size: size.into(),
            ..tcp4()
        };
        TxHeader::check(header, frame, &everything()).map(|header| header.cut())
    };
    let packets = |packets| Ok(Cut { packets, headers: 54 });
    assert_eq!(cut(1448, 54), packets(1));
    assert_eq!(cut(1448, 54 + 1448), packets(1));
    assert_eq!(cut(1448, 54 + 1449), packets(2));
    assert_eq!(cut(28, MAX_FRAME), packets((MAX_FRAME - 54).div_ceil(28)));
    assert_eq!(cut(1, MAX_FRAME), Err(HeaderError::Segments));
    // A few short datagrams, such as a guest's program may send at once.
    assert_eq!(cut(1, 54 + 64), packets(64));
    let plain = TxHeader::check(NetHeader::default(), 60, &everything()).unwrap();
    assert_eq!((plain.cut().packets, plain.cut().headers), (1, 0));
}

#[test]
fn a_received_super_frame_counts_as_its_packets() {
    let cut = |change: fn(&mut NetHeader), frame| {
        // As the kernel says it: the hint is the part of the frame that lies together.
        let mut header = tcp4();
        header.hdr_len = 2000.into();
        change(&mut header);
        let cut = Cut::received(&header, frame);
        (cut.packets, cut.headers)
    };
    assert_eq!(cut(|_| (), 54 + 1448), (1, 54));
    assert_eq!(cut(|_| (), 54 + 3 * 1448), (3, 54));
    assert_eq!(cut(|h| h.gso_type = GSO_TCPV6 | GSO_ECN, 54 + 1449), (2, 54));
    assert_eq!(cut(|h| h.gso_type = GSO_UDP_L4, 42 + 1449), (2, 42));
    // What a guest may write there meanwhile.
    assert_eq!(cut(|h| h.gso_size = 1.into(), MAX_FRAME), (MOST_SEGMENTS, 54));
    assert_eq!(cut(|h| h.gso_size = 0.into(), MAX_FRAME), (1, 0));
    assert_eq!(cut(|h| h.csum_start = 65535.into(), 2000), (1, 0));
    assert_eq!(cut(|h| h.gso_type = GSO_NONE, 2000), (1, 0));
    assert_eq!(cut(|h| h.gso_type = 0x7f, 2000), (1, 0));
}

#[test]
fn what_was_not_negotiated_is_refused() {
    let none = Offloads::new(0);
    assert_eq!(
        TxHeader::check(tcp4(), 2000, &none),
        Err(HeaderError::NotNegotiated)
    );
    let only_csum = Offloads::new(1);
    assert_eq!(
        TxHeader::check(tcp4(), 2000, &only_csum),
        Err(HeaderError::NotNegotiated)
    );
}

proptest! {
    #[test]
    fn whatever_passes_lies_within_the_frame(
        bytes in any::<[u8; HEADER_SIZE]>(),
        frame in 0usize..70_000,
        features in any::<u64>(),
    ) {
        let header = NetHeader::read_from_bytes(&bytes).unwrap();
        if let Ok(TxHeader { clean, cut }) = TxHeader::check(header, frame, &Offloads::new(features)) {
            prop_assert!((1..=MOST_SEGMENTS).contains(&cut.packets) && cut.headers <= frame);
            prop_assert!((ETHERNET_HEADER..=MAX_FRAME).contains(&frame));
            if clean.flags != 0 {
                let end = usize::from(clean.csum_start.get()) + usize::from(clean.csum_offset.get());
                prop_assert!(end + 2 <= frame);
            }
            prop_assert!(usize::from(clean.hdr_len.get()) <= frame);
            prop_assert_eq!(clean.gso_type == 0, clean.gso_size.get() == 0);
        }
    }
}
