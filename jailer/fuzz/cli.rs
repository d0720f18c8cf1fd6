//! A spec's text, and the command line.

use super::{Cli, Verb, spec_file};
use clap::Parser;
use vm_spec::spec::VmSpec;

/// Reads a spec. What is accepted can be written and read again; what is not has a place.
pub fn spec(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    match spec_file::parse("fuzz.toml", text) {
        Ok(spec) => {
            let again = serde_json::to_string(&spec).expect("a spec can be written");
            let back: VmSpec = serde_json::from_str(&again).expect("and read");
            assert_eq!(serde_json::to_string(&back).expect("and written"), again);
        }
        Err(failure) => assert!(failure.to_string().contains("fuzz.toml")),
    }
}

/// Reads a command line, one word a line, as far as it describes a VM. No file is opened: a spec file
/// is not among the words that are passed on.
pub fn flags(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    let words = ["bulkhead", "run"].into_iter().chain(text.lines().take(64));
    if let Ok(Cli {
        verb: Verb::Run(args),
    }) = Cli::try_parse_from(words)
        && args.spec.is_none()
    {
        let _ = args.options();
        let _ = args.spec();
    }
}
