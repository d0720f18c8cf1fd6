use super::*;
use proptest::prelude::*;

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
const GROUP: MacAddress = MacAddress([1, 0, 0x5e, 0, 0, 1]);

/// The bytes that a driver writes for `command`.
fn encode(command: &Command) -> Vec<u8> {
    match command {
        Command::Pairs(pairs) => [&[4, 0], &(*pairs as u16).to_le_bytes()[..]].concat(),
        Command::Receive(mode, on) => vec![0, *mode as u8, (*on).into()],
        Command::Table(addresses) => {
            let (groups, stations): (Vec<MacAddress>, Vec<MacAddress>) =
                addresses.iter().copied().partition(|one| one.is_group());
            let mut bytes = vec![1, 0];
            for table in [stations, groups] {
                bytes.extend((table.len() as u32).to_le_bytes());
                bytes.extend(table.iter().flat_map(|address| address.0));
            }
            bytes
        }
        Command::LongTable => vec![1, 0],
        Command::Address(mac) => [&[1, 1], &mac.0[..]].concat(),
        Command::Announced => vec![3, 0],
    }
}

#[test]
fn each_command_is_known_in_its_exact_length_only() {
    let commands = [
        Command::Pairs(3),
        Command::Receive(Mode::NoBroadcast, true),
        Command::Receive(Mode::Promiscuous, false),
        Command::Table(vec![MAC, GROUP]),
        Command::Table(Vec::new()),
        Command::Address(MAC),
        Command::Announced,
    ];
    for command in commands {
        let bytes = encode(&command);
        assert_eq!(Command::parse(&bytes), Some(command.clone()));
        for length in 0..bytes.len() {
            assert_eq!(
                Command::parse(&bytes[..length]),
                None,
                "{length} bytes of {command:?}"
            );
        }
        assert_eq!(
            Command::parse(&[&bytes[..], &[0]].concat()),
            None,
            "{command:?} and more"
        );
    }
}

#[test]
fn of_commands_too_long_only_a_table_counts() {
    assert_eq!(parse_long(&[1, 0, 0xff, 0xff, 0, 0]), Some(Command::LongTable));
    for bad in [vec![], vec![1], vec![1, 1, 2, 3], vec![4, 0, 1, 0], vec![0, 0, 1]] {
        assert_eq!(parse_long(&bad), None, "{bad:?}");
    }
}

#[test]
fn unknown_commands_are_none() {
    for bad in [[0, 6, 1], [0, 0, 2], [2, 0, 0], [3, 1, 0], [4, 1, 0], [9, 9, 9]] {
        assert_eq!(Command::parse(&bad), None, "{bad:?}");
    }
    // A count that no command of any length could hold.
    assert_eq!(Command::parse(&[1, 0, 0xff, 0xff, 0xff, 0xff]), None);
}

proptest! {
    #[test]
    fn a_table_is_no_longer_than_its_command(
        class in 0u8..5,
        command in 0u8..7,
        counts in prop::array::uniform2(0u32..20),
        data in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut bytes = vec![class, command];
        bytes.extend(counts[0].to_le_bytes());
        bytes.extend(&data);
        let at = 6 + counts[0] as usize * ADDRESS;
        if let Some(place) = bytes.get_mut(at..at + 4) {
            place.copy_from_slice(&counts[1].to_le_bytes());
        }
        if let Some(Command::Table(addresses)) = Command::parse(&bytes) {
            prop_assert_eq!(bytes.len(), 10 + addresses.len() * ADDRESS);
        }
    }
}
