//! `bulkhead logs VM`: what a running VM's processes log.

use super::listen::{DEADLINE, listen, next};
use super::put_out;
use crate::failure::Failure;
use crate::log_line::{json_line, of_stamped};
use crate::tell::{MOST_AT_ONCE, name_vm};
use nix::sys::socket::{MsgFlags, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use vm_spec::client::Channel;
use vm_spec::timestamp::Timestamp;

/// Longest line that the supervisor sends, and its time.
const LONGEST: usize = MOST_AT_ONCE + 64;

/// Prints the last of what the VM's processes logged, and with `follow` what they will, until it is over.
///
/// # Errors
/// A [`Failure`] when no such VM runs, or standard output cannot be written.
pub(super) fn print(vm: &str, follow: bool, json: bool) -> Result<u8, Failure> {
    let socket = listen(vm, Channel::Log, follow)?;
    name_vm(vm);
    if !follow {
        // What there is comes at once.
        let limit = TimeVal::seconds(DEADLINE.as_secs() as i64);
        setsockopt(&socket, sockopt::ReceiveTimeout, &limit)
            .map_err(|e| Failure::host("cannot limit the wait").because(&e))?;
    }
    let mut pending = Vec::new();
    while let Some(bytes) = next(&socket, MsgFlags::empty())? {
        if bytes.is_empty() {
            return Err(Failure::host(format!("no answer within {DEADLINE:?}")));
        }
        pending.extend(bytes);
        if !put_out(&whole_lines(&mut pending, json))? {
            break;
        }
    }
    Ok(0)
}

/// Takes the lines that are there to their end; whatever is too long for one is taken for one.
fn whole_lines(pending: &mut Vec<u8>, json: bool) -> Vec<u8> {
    let end = pending.iter().rposition(|byte| *byte == b'\n');
    let count = match end {
        Some(end) => end + 1,
        None if pending.len() > LONGEST => pending.len(),
        None => 0,
    };
    let taken: Vec<u8> = pending.drain(..count).collect();
    let text = String::from_utf8_lossy(&taken);
    text.lines()
        .map(|line| shown(line, json))
        .collect::<String>()
        .into_bytes()
}

/// A line that the supervisor sent as it is printed, with its end.
fn shown(line: &str, json: bool) -> String {
    let (time, said) = of_stamped(line).unzip();
    let said = said.unwrap_or(line);
    if !json || said.starts_with('{') {
        return format!("{said}\n");
    }
    match (time, said.split_once(": ")) {
        (Some(time), Some((process, text))) => json_line(&time, process, text),
        // Before the words about what was lost.
        (None, _) if said.is_empty() => String::new(),
        _ => json_line(&Timestamp::now(), "bulkhead", said.trim_matches(['[', ']'])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const TIME: &str = "2026-01-01T00:00:00.000001Z";

    #[test]
    fn lines_are_objects_where_wanted() {
        let line = |rest: &str| format!("{TIME} {rest}");
        for (plain, process, level, message) in [
            (
                "bulkhead: disk0 died: again",
                "bulkhead",
                "WARN",
                "disk0 died: again",
            ),
            ("net0: 2026-01-01T00:00:00.1Z  INFO up", "net0", "INFO", "up"),
            ("vmm: say \"x\"", "vmm", "WARN", "say \"x\""),
        ] {
            assert_eq!(shown(&line(plain), false), format!("{plain}\n"));
            let object = shown(&line(plain), true);
            assert!(object.ends_with("}\n") && object.lines().count() == 1, "{object}");
            let wanted = json!({"process": process, "timestamp": TIME, "level": level, "message": message});
            assert_eq!(serde_json::from_str::<Value>(&object).unwrap(), wanted);
        }
        // Those of a VM that logs JSON are such objects.
        for json in [false, true] {
            assert_eq!(
                shown(&line("{\"process\":\"vmm\"}"), json),
                "{\"process\":\"vmm\"}\n"
            );
        }
    }

    #[test]
    fn what_was_lost_is_an_object_too() {
        let mut pending = b"\n[7 bytes were lost]\n".to_vec();
        let plain = whole_lines(&mut pending.clone(), false);
        assert_eq!(plain, b"\n[7 bytes were lost]\n");
        let object: Value = serde_json::from_slice(&whole_lines(&mut pending, true)).unwrap();
        assert_eq!(object["process"], "bulkhead");
        assert_eq!(object["message"], "7 bytes were lost");
        assert!(object["timestamp"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn lines_come_whole_and_their_length_is_bounded() {
        let mut pending = format!("{TIME} vmm: a\n{TIME} vmm: \u{e4}").into_bytes();
        let rest = pending.pop().unwrap();
        assert_eq!(whole_lines(&mut pending, false), b"vmm: a\n");
        assert!(whole_lines(&mut pending, false).is_empty());
        pending.extend([rest, b'\n']);
        assert_eq!(whole_lines(&mut pending, false), "vmm: \u{e4}\n".as_bytes());
        pending.resize(LONGEST, b'x');
        assert!(whole_lines(&mut pending, false).is_empty());
        pending.push(b'x');
        assert_eq!(whole_lines(&mut pending, false).len(), LONGEST + 2);
        assert!(pending.is_empty());
    }
}
