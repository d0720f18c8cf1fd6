#[path = "guard_checksum_tests.rs"]
mod checksums;

use super::*;
use proptest::prelude::*;

const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);
const OTHER: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];
const IP4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const IP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);

fn strict() -> Guard {
    Guard::new(MAC, vec![IpAddr::from(IP4).into(), IpAddr::from(IP6).into()])
}

fn frame(source: [u8; 6], kind: &[u16], packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(source);
    for (index, kind) in kind.iter().enumerate() {
        if index > 0 {
            frame.extend([0, 7]);
        }
        frame.extend(kind.to_be_bytes());
    }
    frame.extend(packet);
    frame
}

fn own(kind: u16, packet: &[u8]) -> Vec<u8> {
    frame(MAC.0, &[kind], packet)
}

fn ipv4(source: Ipv4Addr, ports: [u16; 2]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(source.octets());
    packet.extend([255; 4]);
    packet.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
    packet.extend([0, 8, 0, 0]);
    packet
}

fn ipv6(source: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 255]);
    packet.extend(source.octets());
    packet.extend([0xff; 16]);
    packet.extend(payload);
    packet
}

fn arp(hardware: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 2];
    packet.extend(hardware);
    packet.extend(sender.octets());
    packet.extend([0; 6]);
    packet.extend(target.octets());
    packet
}

fn neighbour(kind: u8, target: Ipv6Addr, option: Option<[u8; 6]>) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0x60, 0, 0, 0];
    message.extend(target.octets());
    if let Some(address) = option {
        message.extend([2, 1]);
        message.extend(address);
    }
    message
}

#[test]
fn another_source_mac_is_refused() {
    let packet = ipv4(IP4, [1, 2]);
    let spoofed = frame(OTHER, &[TYPE_IPV4], &packet);
    assert_eq!(strict().check(&spoofed, None), Err(Refusal::SourceMac));
    assert_eq!(strict().check(&own(TYPE_IPV4, &packet), None), Ok(()));
    let lax = Guard::new(MAC, vec![]);
    assert_eq!(lax.check(&spoofed, None), Err(Refusal::SourceMac));
    assert_eq!(lax.check(&own(0x88cc, &[]), None), Ok(()));
    assert_eq!(strict().check(&own(0x88cc, &[]), None), Err(Refusal::Protocol));
}

#[test]
fn ipv4_sources_are_the_guests_or_a_dhcp_question() {
    let check = |source, ports| strict().check(&own(TYPE_IPV4, &ipv4(source, ports)), None);
    assert_eq!(check(Ipv4Addr::new(10, 0, 0, 3), [1, 2]), Err(Refusal::SourceIp));
    assert_eq!(check(Ipv4Addr::UNSPECIFIED, [68, 67]), Ok(()));
    assert_eq!(check(Ipv4Addr::UNSPECIFIED, [68, 53]), Err(Refusal::SourceIp));
}

#[test]
fn who_has_no_address_yet_may_join_groups() {
    let igmp = |kind, source| {
        let mut packet = ipv4(source, [0, 0]);
        packet[9] = PROTOCOL_IGMP;
        packet[20] = kind;
        strict().check(&own(TYPE_IPV4, &packet), None)
    };
    for kind in IGMP_MEMBER {
        assert_eq!(igmp(kind, Ipv4Addr::UNSPECIFIED), Ok(()));
        assert_eq!(igmp(kind, Ipv4Addr::new(10, 0, 0, 3)), Err(Refusal::SourceIp));
    }
    // A router's question.
    assert_eq!(igmp(0x11, Ipv4Addr::UNSPECIFIED), Err(Refusal::SourceIp));
}

#[test]
fn tags_do_not_hide_a_source() {
    let stranger = ipv4(Ipv4Addr::new(10, 0, 0, 3), [1, 2]);
    for tags in [vec![0x8100, TYPE_IPV4], vec![0x88a8, 0x8100, TYPE_IPV4]] {
        let tagged = frame(MAC.0, &tags, &stranger);
        assert_eq!(strict().check(&tagged, None), Err(Refusal::SourceIp));
    }
    let three = frame(MAC.0, &[0x88a8, 0x8100, 0x8100, TYPE_IPV4], &stranger);
    assert_eq!(strict().check(&three, None), Err(Refusal::Protocol));
    assert_eq!(
        Guard::new(MAC, vec![]).check(&three, None),
        Err(Refusal::Malformed)
    );
}

#[test]
fn a_length_for_a_type_hides_nothing() {
    let stranger = arp(OTHER, IP4, IP4);
    let advertisement = ipv6(MAC.link_local(), PROTOCOL_ICMPV6, &neighbour(134, IP6, None));
    let snap = |kind: u16, packet: &[u8]| {
        let mut llc = vec![0xaa, 0xaa, 3, 0, 0, 0];
        llc.extend(kind.to_be_bytes());
        llc.extend(packet);
        llc
    };
    let bridge = vec![0x42, 0x42, 3, 0, 0, 0, 0];
    for llc in [snap(TYPE_ARP, &stranger), snap(TYPE_IPV6, &advertisement), bridge] {
        for length in [llc.len() as u16, 0, 0x05ff] {
            for tags in [vec![length], vec![0x8100, length], vec![0x88a8, 0x8100, length]] {
                let frame = frame(MAC.0, &tags, &llc);
                assert_eq!(Guard::new(MAC, vec![]).check(&frame, None), Err(Refusal::Length));
                assert_eq!(strict().check(&frame, None), Err(Refusal::Protocol));
            }
        }
    }
    assert_eq!(Guard::new(MAC, vec![]).check(&own(0x0600, &[]), None), Ok(()));
}

#[test]
fn arp_speaks_for_the_guest_only() {
    let stranger = Ipv4Addr::new(10, 0, 0, 1);
    let nobody = Ipv4Addr::UNSPECIFIED;
    let check =
        |hardware, sender, target| strict().check(&own(TYPE_ARP, &arp(hardware, sender, target)), None);
    assert_eq!(check(MAC.0, IP4, stranger), Ok(()));
    assert_eq!(check(MAC.0, stranger, IP4), Err(Refusal::Arp));
    assert_eq!(check(OTHER, IP4, stranger), Err(Refusal::Arp));
    // Probes.
    assert_eq!(check(MAC.0, nobody, IP4), Ok(()));
    assert_eq!(check(MAC.0, nobody, stranger), Err(Refusal::Arp));
    let lax = Guard::new(MAC, vec![]);
    assert_eq!(
        lax.check(&own(TYPE_ARP, &arp(MAC.0, nobody, stranger)), None),
        Ok(())
    );
}

#[test]
fn ipv6_sources_and_neighbour_messages() {
    let check =
        |source, next, payload: &[u8]| strict().check(&own(TYPE_IPV6, &ipv6(source, next, payload)), None);
    let stranger = "2001:db8::3".parse().unwrap();
    let link_local = "fe80::5054:ff:fe01:203".parse().unwrap();
    assert_eq!(check(IP6, 6, &[]), Ok(()));
    assert_eq!(check(link_local, 6, &[]), Ok(()));
    assert_eq!(check(stranger, 6, &[]), Err(Refusal::SourceIp));
    assert_eq!(check(Ipv6Addr::UNSPECIFIED, 6, &[]), Err(Refusal::SourceIp));
    assert_eq!(
        check(Ipv6Addr::UNSPECIFIED, 58, &neighbour(135, IP6, None)),
        Ok(())
    );
    let asks = |target| check(Ipv6Addr::UNSPECIFIED, 58, &neighbour(135, target, None));
    assert_eq!(asks(link_local), Ok(()));
    assert_eq!(asks(stranger), Err(Refusal::Neighbour));
    assert_eq!(check(IP6, 58, &neighbour(135, stranger, Some(MAC.0))), Ok(()));
    let lax = Guard::new(MAC, vec![]);
    let packet = ipv6(Ipv6Addr::UNSPECIFIED, 58, &neighbour(135, stranger, None));
    assert_eq!(lax.check(&own(TYPE_IPV6, &packet), None), Ok(()));
    assert_eq!(check(IP6, 58, &neighbour(136, IP6, Some(MAC.0))), Ok(()));
    let refused = Err(Refusal::Neighbour);
    assert_eq!(check(IP6, 58, &neighbour(136, stranger, None)), refused);
    assert_eq!(check(IP6, 58, &neighbour(136, IP6, Some(OTHER))), refused);
    assert_eq!(check(IP6, 58, &neighbour(134, IP6, None)), refused);
}

#[test]
fn no_option_of_a_neighbour_message_goes_unseen() {
    let with = |options: &[u8]| {
        let mut message = neighbour(136, IP6, Some(MAC.0));
        message.extend(options);
        let mut frame = own(TYPE_IPV6, &ipv6(IP6, PROTOCOL_ICMPV6, &message));
        frame.truncate(PREFIX);
        strict().check(&frame, None)
    };
    // 14 and 40 bytes of headers, 32 of the message: 168 are left.
    let mut long = vec![14, 21];
    long.resize(168, 0);
    assert_eq!(with(&long), Ok(()));
    let mut beyond = long;
    beyond.extend([2, 1]);
    beyond.extend(OTHER);
    assert_eq!(with(&beyond), Err(Refusal::Malformed));
    assert_eq!(with(&[14, 2, 0, 0, 0, 0, 0, 0]), Err(Refusal::Malformed));
    assert_eq!(with(&[14]), Err(Refusal::Malformed));
    // A solicitation of a router is held to the same.
    let mut message = vec![133, 0, 0, 0, 0, 0, 0, 0, 14, 28];
    message.resize(8 + 28 * 8, 0);
    let mut frame = own(TYPE_IPV6, &ipv6(IP6, PROTOCOL_ICMPV6, &message));
    frame.truncate(PREFIX);
    assert_eq!(strict().check(&frame, None), Err(Refusal::Malformed));
    // A long echo is none.
    let mut frame = own(TYPE_IPV6, &ipv6(IP6, PROTOCOL_ICMPV6, &[128; 1000]));
    frame.truncate(PREFIX);
    assert_eq!(strict().check(&frame, None), Ok(()));
}

#[test]
fn what_lies_behind_the_payload_is_no_part_of_the_packet() {
    let mut packet = ipv6(IP6, 0, &[PROTOCOL_ICMPV6, 0, 0, 0, 0, 0, 0, 0]);
    packet.extend(neighbour(136, IP6, Some(MAC.0)));
    assert_eq!(
        strict().check(&own(TYPE_IPV6, &packet), None),
        Err(Refusal::Malformed)
    );
    packet[5] = 4;
    assert_eq!(
        strict().check(&own(TYPE_IPV6, &packet), None),
        Err(Refusal::Malformed)
    );
    // A header behind the first fragment, where the next fragment has another one.
    let fragment = [60, 0, 0, 1, 0, 0, 0, 9, 60, 0, 1, 4, 0, 0, 0, 0];
    let mut packet = ipv6(IP6, PROTOCOL_FRAGMENT, &fragment);
    packet.extend([6, 0, 1, 4, 0, 0, 0, 0]);
    assert_eq!(
        strict().check(&own(TYPE_IPV6, &packet), None),
        Err(Refusal::Malformed)
    );
    // Padding behind a whole message.
    let mut packet = ipv6(IP6, PROTOCOL_ICMPV6, &neighbour(136, IP6, None));
    packet.extend([2, 1, 0, 0]);
    assert_eq!(strict().check(&own(TYPE_IPV6, &packet), None), Ok(()));
}

#[test]
fn extension_headers_do_not_hide_a_neighbour_message() {
    let stranger = "2001:db8::3".parse().unwrap();
    let mut hidden = vec![58, 0, 0, 0, 0, 0, 0, 0];
    hidden.extend(neighbour(136, stranger, None));
    let packet = ipv6(IP6, 0, &hidden);
    assert_eq!(
        strict().check(&own(TYPE_IPV6, &packet), None),
        Err(Refusal::Neighbour)
    );
    let mut fragment = vec![58, 0, 0, 1, 0, 0, 0, 9];
    fragment.extend(neighbour(136, IP6, None));
    let packet = ipv6(IP6, 44, &fragment);
    assert_eq!(
        strict().check(&own(TYPE_IPV6, &packet), None),
        Err(Refusal::Neighbour)
    );
    let endless = ipv6(IP6, 0, &[0, 31, 0, 0, 0, 0, 0, 0]);
    assert_eq!(
        strict().check(&own(TYPE_IPV6, &endless), None),
        Err(Refusal::Malformed)
    );
}

proptest! {
    #[test]
    fn no_frame_makes_it_panic_or_lets_a_foreign_mac_through(
        frame in proptest::collection::vec(any::<u8>(), 0..PREFIX),
        kind in proptest::sample::select(vec![TYPE_IPV4, TYPE_ARP, TYPE_IPV6, 0x8100]),
        ours: bool,
    ) {
        let mut frame = frame;
        if frame.len() >= 14 {
            if ours {
                frame[6..12].copy_from_slice(&MAC.0);
            }
            frame[12..14].copy_from_slice(&kind.to_be_bytes());
        }
        if strict().check(&frame, None).is_ok() {
            prop_assert_eq!(&frame[6..12], &MAC.0);
        }
    }
}

#[test]
fn a_link_local_address_that_the_guest_chose_has_to_be_named() {
    let router = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
    let own_choice = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x1234, 5, 6, 7);
    let solicit = |from| {
        own(
            TYPE_IPV6,
            &ipv6(from, PROTOCOL_ICMPV6, &neighbour(135, IP6, Some(MAC.0))),
        )
    };
    let advertise = |of| {
        own(
            TYPE_IPV6,
            &ipv6(IP6, PROTOCOL_ICMPV6, &neighbour(136, of, Some(MAC.0))),
        )
    };
    let named = |prefix: &str| Guard::new(MAC, vec![IpAddr::from(IP6).into(), prefix.parse().unwrap()]);
    let cases = [
        (strict(), MAC.link_local(), true),
        (strict(), own_choice, false),
        (strict(), router, false),
        (named("fe80::1234:5:6:7"), own_choice, true),
        (named("fe80::1234:5:6:7"), router, false),
        (named("fe80::/10"), own_choice, true),
    ];
    for (guard, address, may) in cases {
        assert_eq!(
            guard.check(&solicit(address), None).is_ok(),
            may,
            "solicit from {address}"
        );
        assert_eq!(
            guard.check(&advertise(address), None).is_ok(),
            may,
            "advertise {address}"
        );
    }
}
