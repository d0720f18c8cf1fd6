//! The command line: QEMU's back-end program conventions and a few flags of ours.

use crate::log::LogFormat;
use crate::{Program, QueueLimits};
use jailer::sandbox::SeccompMode;
use lexopt::{Arg, Parser, ValueExt};
use std::ffi::OsString;
use std::fmt::Write;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;
use tracing_subscriber::filter::LevelFilter;

/// Where the front end is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Connection {
    /// A socket to listen on: any number of front ends, one after another.
    Path(PathBuf),
    /// A connected socket: one front end.
    Fd(RawFd),
    /// A socket that listens already: as [`Connection::Path`].
    Listening(RawFd),
}

/// The first descriptor that whoever listens for this process passes (sd_listen_fds(3)).
const FIRST_ACTIVATED: RawFd = 3;

impl Connection {
    /// What the environment says that this process is started for (systemd's socket activation).
    fn activated(variable: impl Fn(&str) -> Option<String>, own_pid: u32) -> Option<Self> {
        // Meant for another, which has passed its environment on.
        let ours = variable("LISTEN_PID")? == own_pid.to_string();
        (ours && variable("LISTEN_FDS")? == "1").then_some(Self::Listening(FIRST_ACTIVATED))
    }
}

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Request<O> {
    Help,
    Version,
    PrintCapabilities,
    Serve(Settings, O),
}

/// The shared flags of a process that serves.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) connection: Connection,
    pub(crate) num_queues: u16,
    pub(crate) seccomp: SeccompMode,
    /// `--poll-us`.
    pub(crate) patience: Duration,
    pub(crate) log_level: LevelFilter,
    pub(crate) log_format: LogFormat,
}

const SHARED_USAGE: &str =
    "  --socket-path=PATH      listen here; serves one front end after another until SIGTERM
  --fd=N                  a connected socket; serves it to its end
                          neither is needed where systemd passes a listening socket (LISTEN_FDS)
  --print-capabilities    print what this program can do as JSON, and exit
  --num-queues=N          QUEUES
  --poll-us=N             after a request, look N microseconds for the next one before sleeping;
                          0 (default) to 10000; costs a CPU
  --seccomp=MODE          enforce (default), trap, log or off
  --log-level=LEVEL       off, error, warn (default), info, debug or trace
  --log-format=FORMAT     human (default) or json
  --help, --version
";

/// What `--help` prints.
pub(crate) fn help<P: Program>() -> String {
    let mut text = format!("Usage: {} [--socket-path=PATH | --fd=N] FLAGS\n\n", P::NAME);
    text.push_str(P::USAGE);
    let QueueLimits {
        default,
        most,
        multiple,
    } = P::QUEUES;
    let queues = match multiple {
        1 => format!("queues, 1 to {most}, default {default}"),
        multiple => format!("queues, a multiple of {multiple} up to {most}, default {default}"),
    };
    let _ = write!(text, "\n{}", SHARED_USAGE.replace("QUEUES", &queues));
    text
}

/// What `--print-capabilities` prints (vhost-user, "Backend program conventions").
pub(crate) fn capabilities<P: Program>() -> String {
    serde_json::json!({ "type": P::KIND, "features": P::CAPABILITIES }).to_string()
}

/// Reads the command line without the program's name.
///
/// # Errors
/// A usage error: unknown flags, wrong values, a flag that excludes another.
pub(crate) fn parse<P: Program>(
    arguments: impl IntoIterator<Item = OsString>,
) -> Result<Request<P::Options>, lexopt::Error> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    // Whatever else is asked for is ignored (vhost-user, "Backend program conventions").
    if arguments
        .iter()
        .any(|argument| argument == "--print-capabilities")
    {
        return Ok(Request::PrintCapabilities);
    }
    let mut parser = Parser::from_args(arguments);
    let mut options = P::Options::default();
    let mut connection: Option<Connection> = None;
    let mut num_queues = P::QUEUES.default;
    let (mut seccomp, mut log_format) = (SeccompMode::default(), LogFormat::default());
    let (mut patience, mut log_level) = (Duration::ZERO, LevelFilter::WARN);
    while let Some(argument) = parser.next()? {
        let Arg::Long(name) = argument else {
            return Err(argument.unexpected());
        };
        let name = name.to_owned();
        let mut take = || -> Result<Option<Request<P::Options>>, lexopt::Error> {
            match name.as_str() {
                "help" => return Ok(Some(Request::Help)),
                "version" => return Ok(Some(Request::Version)),
                "socket-path" => connect(&mut connection, Connection::Path(parser.value()?.into()))?,
                "fd" => connect(&mut connection, Connection::Fd(parser.value()?.parse()?))?,
                "num-queues" => num_queues = parser.value()?.parse_with(queues::<P>)?,
                "poll-us" => patience = parser.value()?.parse_with(microseconds)?,
                "seccomp" => seccomp = parser.value()?.parse()?,
                "log-level" => log_level = parser.value()?.parse()?,
                "log-format" => log_format = parser.value()?.parse()?,
                _ if P::option(&mut options, &name, &mut parser)? => {}
                _ => return Err(Arg::Long(&name).unexpected()),
            }
            Ok(None)
        };
        if let Some(question) = take().map_err(|error| of_flag(&name, error))? {
            return Ok(question);
        }
    }
    let activated = || Connection::activated(|name| std::env::var(name).ok(), std::process::id());
    let connection = connection
        .or_else(activated)
        .ok_or("one of --socket-path and --fd is needed")?;
    P::check(&options)?;
    let settings = Settings {
        connection,
        num_queues,
        seccomp,
        patience,
        log_level,
        log_format,
    };
    Ok(Request::Serve(settings, options))
}

/// An error that says whose value is wrong.
fn of_flag(name: &str, error: lexopt::Error) -> lexopt::Error {
    let words = error.to_string();
    match words.contains("--") {
        true => error,
        false => format!("--{name}: {words}").into(),
    }
}

fn connect(connection: &mut Option<Connection>, new: Connection) -> Result<(), lexopt::Error> {
    match connection.replace(new) {
        None => Ok(()),
        Some(_) => Err("--socket-path and --fd exclude each other, and each is given once".into()),
    }
}

fn queues<P: Program>(text: &str) -> Result<u16, String> {
    let limits = P::QUEUES;
    let number = text.parse::<u16>().ok();
    let allowed = |n: &u16| (1..=limits.most).contains(n) && n.is_multiple_of(limits.multiple);
    number
        .filter(allowed)
        .ok_or_else(|| match (limits.multiple, limits.most) {
            (1, most) => format!("is not a number from 1 to {most}"),
            (first, most) => format!("is not a multiple of {first} from {first} to {most}"),
        })
}

/// Longest busy wait: the session waits for a worker that polls.
const MOST_PATIENCE: u64 = 10_000;

fn microseconds(text: &str) -> Result<Duration, String> {
    let number = text.parse().ok().filter(|n| *n <= MOST_PATIENCE);
    let number = number.ok_or_else(|| format!("is not a number from 0 to {MOST_PATIENCE}"))?;
    Ok(Duration::from_micros(number))
}

#[cfg(test)]
mod tests;
