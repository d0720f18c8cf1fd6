use super::*;
use crate::{Device, QueueLimits};
use jailer::sandbox::Role;
use std::error::Error;

/// A program with one flag of its own, and pairs of queues.
struct Pairs;

impl Program for Pairs {
    const NAME: &'static str = "vhost-user-pairs";
    const KIND: &'static str = "net";
    const CAPABILITIES: &'static [&'static str] = &["tap-fd"];
    const ROLE: Role = Role::Net;
    const USAGE: &'static str = "  --tap-fd=N              the TAP\n";
    const QUEUES: QueueLimits = QueueLimits {
        default: 2,
        most: 8,
        multiple: 2,
    };

    type Options = Option<i32>;

    fn option(options: &mut Option<i32>, name: &str, parser: &mut Parser) -> Result<bool, lexopt::Error> {
        if name != "tap-fd" {
            return Ok(false);
        }
        *options = Some(parser.value()?.parse()?);
        Ok(true)
    }

    fn check(options: &Option<i32>) -> Result<(), lexopt::Error> {
        options.map(|_| ()).ok_or_else(|| "--tap-fd is needed".into())
    }

    fn open(_: Option<i32>, _: u16) -> Result<Box<dyn Device>, Box<dyn Error + Send + Sync>> {
        Err("only the command line is tested".into())
    }
}

fn parsed(arguments: &[&str]) -> Result<Request<Option<i32>>, String> {
    parse::<Pairs>(arguments.iter().map(OsString::from)).map_err(|error| error.to_string())
}

#[test]
fn reads_shared_and_own_flags_in_any_order() {
    let request = parsed(&[
        "--tap-fd=4",
        "--fd",
        "3",
        "--num-queues=4",
        "--seccomp=log",
        "--log-format=json",
    ]);
    let Ok(Request::Serve(settings, options)) = request else {
        panic!("{request:?}")
    };
    assert_eq!(options, Some(4));
    assert_eq!(settings.connection, Connection::Fd(3));
    assert_eq!(settings.num_queues, 4);
    assert_eq!(settings.seccomp, SeccompMode::Log);
    assert_eq!(settings.log_format, LogFormat::Json);
    assert_eq!(settings.log_level, LevelFilter::WARN);
}

#[test]
fn usage_errors_name_the_flag_and_what_it_takes() {
    for (arguments, part) in [
        (&["--tap-fd=4"][..], "one of --socket-path and --fd is needed"),
        (&["--fd=3"], "--tap-fd is needed"),
        (&["--fd=3", "--socket-path=s", "--tap-fd=4"], "exclude each other"),
        (&["--fd=3", "--num-queues=3"], "multiple of 2 from 2 to 8"),
        (&["--fd=3", "--num-queues=10"], "multiple of 2 from 2 to 8"),
        (&["--fd=3", "--num-queues=0"], "multiple of 2 from 2 to 8"),
        (&["--fd=3", "--num-queues=0"], "--num-queues: "),
        (&["--fd=three"], "--fd: "),
        (&["--tap-fd=x"], "--tap-fd: "),
        (&["--log-level=loud"], "--log-level: "),
        (&["--seccomp=maybe"], "enforce, trap, log, off"),
        (&["--log-format=xml"], "human, json"),
        (&["--no-such-flag"], "--no-such-flag"),
        (&["stray"], "stray"),
    ] {
        let error = parsed(arguments).expect_err("a usage error");
        assert!(error.contains(part), "{arguments:?}: {error}");
    }
}

#[test]
fn questions_are_answered_without_the_needed_flags() {
    assert!(matches!(parsed(&["--help"]), Ok(Request::Help)));
    assert!(matches!(parsed(&["--version"]), Ok(Request::Version)));
    assert!(matches!(
        parsed(&["--print-capabilities"]),
        Ok(Request::PrintCapabilities)
    ));
    assert!(help::<Pairs>().contains("a multiple of 2 up to 8, default 2"));
    assert!(help::<Pairs>().contains("--tap-fd=N") && help::<Pairs>().contains("--socket-path=PATH"));
    let capabilities: serde_json::Value = serde_json::from_str(&capabilities::<Pairs>()).unwrap();
    assert_eq!(
        capabilities,
        serde_json::json!({ "type": "net", "features": ["tap-fd"] })
    );
}

#[test]
fn a_socket_is_taken_from_the_environment_only_where_it_is_meant() {
    let activated = |pid: Option<&str>, fds: Option<&str>| {
        let variable = |name: &str| match name {
            "LISTEN_PID" => pid.map(str::to_owned),
            "LISTEN_FDS" => fds.map(str::to_owned),
            _ => None,
        };
        Connection::activated(variable, 12)
    };
    assert_eq!(activated(Some("12"), Some("1")), Some(Connection::Listening(3)));
    for (pid, fds) in [
        (Some("13"), Some("1")),
        (None, Some("1")),
        (Some("12"), None),
        (Some("12"), Some("2")),
        (Some("12"), Some("0")),
    ] {
        assert_eq!(activated(pid, fds), None, "{pid:?} {fds:?}");
    }
}
