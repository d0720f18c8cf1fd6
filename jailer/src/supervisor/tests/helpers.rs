//! The end of a process that serves the supervisor.

use super::*;

/// What the log's listener has heard, without the times.
pub(super) fn heard(play: &mut Play, listener: &OwnedFd) -> String {
    play.settle();
    let mut bytes = [0; 4096];
    let count = nix::unistd::read(listener, &mut bytes).unwrap_or(0);
    let text = String::from_utf8_lossy(&bytes[..count]);
    let lines = text.split_inclusive('\n');
    lines
        .map(|line| line.split_once("Z ").map_or(line, |(_, said)| said))
        .collect()
}

#[test]
fn that_the_connector_is_gone_is_told_at_once_and_once() {
    let mut play = Play::begin("connector");
    let listener = play.listener(Channel::Log).unwrap();
    let (ours, theirs) = pair(SockType::SeqPacket);
    play.supervisor.connector = Some(ours);
    play.supervisor.hear_connector(Instant::now());
    assert_eq!(heard(&mut play, &listener), "");
    drop(theirs);
    play.supervisor.hear_connector(Instant::now());
    play.supervisor.hear_connector(Instant::now());
    let said = heard(&mut play, &listener);
    assert_eq!(said.matches("the connector has ended").count(), 1, "{said}");
}

#[test]
fn a_connector_that_goes_with_its_vm_is_no_news() {
    let mut play = Play::begin("connector-last");
    let listener = play.listener(Channel::Log).unwrap();
    let (ours, theirs) = pair(SockType::SeqPacket);
    play.supervisor.connector = Some(ours);
    play.supervisor.wind_down(Instant::now());
    drop(theirs);
    play.supervisor.hear_connector(Instant::now());
    assert_eq!(heard(&mut play, &listener), "");
}
