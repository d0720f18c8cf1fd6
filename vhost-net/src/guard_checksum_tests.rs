//! Nothing that was looked at is rewritten by the checksum that the kernel fills in.

use super::*;

fn lax() -> Guard {
    Guard::new(MAC, vec![])
}

/// Destination options, then `next`.
fn behind_options(next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![next, 0, 0x1e, 4, 0, 0, 0, 0];
    packet.extend(payload);
    ipv6(IP6, 60, &packet)
}

fn fragment(next: u8, offset: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![next, 0];
    packet.extend((offset << 3 | 1).to_be_bytes());
    packet.extend([0, 0, 0, 9]);
    packet.extend(payload);
    ipv6(IP6, PROTOCOL_FRAGMENT, &packet)
}

/// Each of them passes if no checksum is left open.
fn frames() -> Vec<Vec<u8>> {
    let link_local = MAC.link_local();
    let solicit = neighbour(135, IP6, Some(MAC.0));
    let mut packets = vec![
        (TYPE_ARP, arp(MAC.0, IP4, Ipv4Addr::new(10, 0, 0, 1))),
        (TYPE_ARP, arp(MAC.0, Ipv4Addr::UNSPECIFIED, IP4)),
        (TYPE_IPV4, ipv4(IP4, [1, 2])),
        (TYPE_IPV4, ipv4(Ipv4Addr::UNSPECIFIED, [68, 67])),
        (TYPE_IPV6, ipv6(IP6, 6, &[0; 32])),
        (TYPE_IPV6, ipv6(IP6, PROTOCOL_ICMPV6, &[128; 16])),
        (TYPE_IPV6, ipv6(IP6, PROTOCOL_ICMPV6, &solicit)),
        (
            TYPE_IPV6,
            ipv6(link_local, PROTOCOL_ICMPV6, &neighbour(136, IP6, Some(MAC.0))),
        ),
        (
            TYPE_IPV6,
            ipv6(Ipv6Addr::UNSPECIFIED, PROTOCOL_ICMPV6, &neighbour(135, IP6, None)),
        ),
        (
            TYPE_IPV6,
            ipv6(Ipv6Addr::UNSPECIFIED, PROTOCOL_ICMPV6, &[143; 16]),
        ),
        (TYPE_IPV6, behind_options(PROTOCOL_ICMPV6, &[128; 16])),
        (TYPE_IPV6, behind_options(PROTOCOL_ICMPV6, &solicit)),
        (TYPE_IPV6, behind_options(17, &[0; 16])),
        (TYPE_IPV6, fragment(PROTOCOL_ICMPV6, 0, &[128; 16])),
        (TYPE_IPV6, fragment(PROTOCOL_ICMPV6, 2, &[134; 16])),
    ];
    let mut options = ipv4(IP4, [1, 2]);
    options[0] = 0x46;
    options.splice(20..20, [1; 4]);
    packets.push((TYPE_IPV4, options));
    let tags: [&[u16]; 3] = [&[], &[0x8100], &[0x88a8, 0x8100]];
    let tagged = packets.iter().flat_map(|(kind, packet)| {
        tags.map(|tags| {
            let kinds = [tags, &[*kind]].concat();
            frame(MAC.0, &kinds, packet)
        })
    });
    tagged.collect()
}

#[test]
fn a_forged_arp_sender_is_refused() {
    let claims = own(TYPE_ARP, &arp(MAC.0, IP4, Ipv4Addr::new(10, 0, 0, 9)));
    // The low half of its IP address.
    assert_eq!(strict().check(&claims, Some(20 + 10)), Err(Refusal::Checksum));
    assert_eq!(lax().check(&claims, Some(20 + 10)), Err(Refusal::Checksum));
    // Nowhere, not even in padding.
    assert_eq!(strict().check(&claims, Some(60)), Err(Refusal::Checksum));
}

#[test]
fn an_echo_that_becomes_a_routers_advertisement_is_refused() {
    let echo = own(TYPE_IPV6, &behind_options(PROTOCOL_ICMPV6, &[128; 48]));
    for (field, may) in [(54 + 8, false), (54 + 9, false), (54 + 10, true), (54 + 11, true)] {
        for guard in [strict(), lax()] {
            assert_eq!(guard.check(&echo, Some(field)).is_ok(), may, "{field}");
        }
    }
}

#[test]
fn of_a_neighbour_message_only_its_own_checksum_is_filled_in() {
    let message = own(
        TYPE_IPV6,
        &ipv6(IP6, PROTOCOL_ICMPV6, &neighbour(136, IP6, Some(MAC.0))),
    );
    for field in 0..message.len() {
        assert_eq!(
            strict().check(&message, Some(field)).is_ok(),
            field == 54 + 2,
            "{field}"
        );
    }
}

#[test]
fn what_was_not_parsed_is_not_rewritten() {
    // The type behind the tag, the payload.
    let tagged = frame(MAC.0, &[0x8100, 0x88cc], &[0; 60]);
    for field in [14, 15, 16, 17, 18, 40] {
        assert_eq!(
            lax().check(&tagged, Some(field)),
            Err(Refusal::Checksum),
            "{field}"
        );
    }
    let tagged = frame(MAC.0, &[0x8100, TYPE_IPV4], &ipv4(IP4, [1, 2]));
    for field in [0, 12, 16, 17] {
        assert_eq!(
            lax().check(&tagged, Some(field)),
            Err(Refusal::Checksum),
            "{field}"
        );
    }
}

#[test]
fn the_question_for_an_address_stays_one() {
    let question = own(TYPE_IPV4, &ipv4(Ipv4Addr::UNSPECIFIED, [68, 67]));
    for (field, may) in [(26, false), (34, false), (37, false), (38, true), (40, true)] {
        assert_eq!(strict().check(&question, Some(field)).is_ok(), may, "{field}");
    }
}

#[test]
fn what_drivers_leave_open_passes() {
    let segment = [0; 120];
    let mut packet = ipv4(IP4, [1, 2]);
    packet.extend(segment);
    let kinds = [
        (TYPE_IPV4, packet, 20),
        (TYPE_IPV6, ipv6(IP6, 6, &segment), 40),
        (TYPE_IPV6, behind_options(17, &segment), 48),
    ];
    for (kind, packet, length) in kinds {
        for (tags, ethernet) in [(vec![kind], 14), (vec![0x8100, kind], 18)] {
            let frame = frame(MAC.0, &tags, &packet);
            // UDP, TCP, and TCP in a VXLAN tunnel (8 + 8 + 14 + 20).
            for offset in [6, 16, 50 + 16] {
                for guard in [strict(), lax()] {
                    assert_eq!(guard.check(&frame, Some(ethernet + length + offset)), Ok(()));
                }
            }
        }
    }
}

#[test]
fn frames_of_the_set_pass() {
    for frame in frames() {
        assert_eq!(strict().check(&frame, None), Ok(()), "{frame:x?}");
        assert_eq!(lax().check(&frame, None), Ok(()), "{frame:x?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]
    #[test]
    fn whatever_sum_comes_out_the_frame_would_have_passed(
        frame in proptest::sample::select(frames()),
        field in 0usize..110,
        sum in prop_oneof![
            any::<u16>(),
            proptest::sample::select(vec![0, 0x8600, 0x8800, 0x3a00, 0x2c00, TYPE_ARP, TYPE_IPV6, 0x0201]),
        ],
        guard in proptest::sample::select(vec![strict(), lax()]),
    ) {
        let mut finished = frame.clone();
        let Some(place) = finished.get_mut(field..field + 2) else {
            return Ok(());
        };
        place.copy_from_slice(&sum.to_be_bytes());
        if guard.check(&frame, Some(field)).is_ok() {
            prop_assert_eq!(guard.check(&finished, None), Ok(()));
            prop_assert_eq!(guard.check(&finished, Some(field)), Ok(()));
        }
    }
}
