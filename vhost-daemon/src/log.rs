//! Log lines on standard error; nothing is ever printed on standard output but what a flag asked
//! for.

use std::str::FromStr;
use tracing_subscriber::filter::LevelFilter;

/// How lines look.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line, with the keys `timestamp`, `level`, `message` and the event's own, such as `queue`.
    Json,
}

impl FromStr for LogFormat {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            _ => Err("is none of human, json"),
        }
    }
}

/// Starts the log for the rest of the process's life.
pub(crate) fn start(level: LevelFilter, format: LogFormat) {
    use std::io::IsTerminal;
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // Only a second call in one process fails, and then the first one's settings stay.
    let _ = match format {
        LogFormat::Human => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}
