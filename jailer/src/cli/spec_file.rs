//! Reading `SPEC.toml` or `SPEC.json`, and saying where it is wrong.

use crate::failure::Failure;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use vm_spec::disk::DiskSpec;
use vm_spec::spec::VmSpec;

/// Longest spec file in bytes.
const LONGEST: u64 = 1 << 20;

/// What stands for standard input.
const STANDARD_INPUT: &str = "-";
/// What some editors put before a text in UTF-8.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// Reads the file at `path`, or standard input.
pub(super) fn read(path: &Path) -> Result<VmSpec, Failure> {
    if path == Path::new(STANDARD_INPUT) {
        let text = text("standard input", &mut io::stdin())?;
        // No TOML begins so, and there is no name that could say it.
        return match text.trim_start().starts_with('{') {
            true => parse_json("standard input", &text),
            false => parse("standard input", &text),
        };
    }
    let name = path.display().to_string();
    let mut file = File::open(path).map_err(|e| {
        let failure = unread(&name).because(&e);
        let meant = ["toml", "json"].map(|end| format!("{name}.{end}"));
        match meant.iter().find(|path| Path::new(path).exists()) {
            Some(path) => failure.hint(format!("did you mean {path}?")),
            None => failure,
        }
    })?;
    let text = text(&name, &mut file)?;
    let mut spec = match path.extension() {
        Some(end) if end.eq_ignore_ascii_case("json") => parse_json(&name, &text)?,
        _ if text.starts_with('{') => {
            let failure = Failure::usage(format!("{name}:1:1: is not understood"));
            return Err(failure
                .cause("it is JSON")
                .hint("give it a name that ends in .json"));
        }
        _ => parse(&name, &text)?,
    };
    let folder = path.parent().unwrap_or(Path::new(""));
    resolve_paths(&mut spec, folder);
    Ok(spec)
}

fn unread(name: &str) -> Failure {
    Failure::usage(format!("cannot read the spec {name}"))
}

/// All of `file`, which need not be one with a length: pipes and devices have none.
fn text(name: &str, file: &mut dyn Read) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let read = file.take(LONGEST + 1).read_to_end(&mut bytes);
    read.map_err(|e| unread(name).because(&e))?;
    // A kernel is what people give in a spec's place.
    let kernel = "a kernel is given with --kernel FILE";
    if bytes.len() as u64 > LONGEST {
        let cause = "it is longer than 1M";
        return Err(unread(name).cause(cause).hint(kernel));
    }
    let text = String::from_utf8(bytes);
    let mut text = text.map_err(|_| unread(name).cause("it is no text in UTF-8").hint(kernel))?;
    if text.starts_with(BYTE_ORDER_MARK) {
        text.remove(0);
    }
    Ok(text)
}

/// A spec's paths are relative to the spec, wherever it is run from.
fn resolve_paths(spec: &mut VmSpec, folder: &Path) {
    let disks = spec.disks.iter_mut();
    let nets = spec.nets.iter_mut();
    let paths = [Some(&mut spec.boot.kernel), spec.boot.initrd.as_mut()]
        .into_iter()
        .flatten()
        .chain(disks.flat_map(disk_paths))
        .chain(nets.flat_map(|n| n.vhost_user.iter_mut().chain(&mut n.pcap)))
        .chain(spec.vhost_user.iter_mut().map(|v| &mut v.socket))
        .chain(&mut spec.image_folders);
    // A kernel that a flag names is none yet.
    for path in paths.filter(|path| !path.as_os_str().is_empty()) {
        *path = folder.join(&*path);
    }
}

fn disk_paths(disk: &mut DiskSpec) -> impl Iterator<Item = &mut PathBuf> {
    let named = [
        &mut disk.path,
        &mut disk.vhost_user,
        &mut disk.key_file,
        &mut disk.data_file,
    ];
    named.into_iter().flatten()
}

/// Reads a spec's text in TOML; `name` is the file's, for messages.
pub(super) fn parse(name: &str, text: &str) -> Result<VmSpec, Failure> {
    toml::from_str(text).map_err(|e| {
        let place = match e.span() {
            Some(span) => {
                let (line, column) = line_and_column(text, span.start);
                format!("{name}:{line}:{column}")
            }
            None => name.to_owned(),
        };
        explain(&place, e.message())
    })
}

/// Reads a spec's text in JSON.
fn parse_json(name: &str, text: &str) -> Result<VmSpec, Failure> {
    let mut json = serde_json::Deserializer::from_str(text);
    let spec = vm_spec::shape::table(&mut json).and_then(|spec| json.end().map(|()| spec));
    spec.map_err(|e| {
        // The column is how many of the line's bytes were read: a key's place is its end.
        let (line, read) = (e.line(), e.column());
        let whole = text.lines().nth(line.saturating_sub(1)).unwrap_or_default();
        let read_part = &whole.as_bytes()[..read.min(whole.len())];
        let column = String::from_utf8_lossy(read_part).chars().count().max(1);
        let message = e.to_string();
        let place = format!(" at line {line} column {read}");
        let message = message.strip_suffix(&place).unwrap_or(&message);
        explain(&format!("{name}:{line}:{column}"), message)
    })
}

/// Line and column of a byte, both from 1, the column in characters.
fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = &text.as_bytes()[..offset.min(text.len())];
    let line = before.iter().filter(|b| **b == b'\n').count() + 1;
    let start = before.iter().rposition(|b| *b == b'\n').map_or(0, |n| n + 1);
    (
        line,
        String::from_utf8_lossy(&before[start..]).chars().count() + 1,
    )
}

/// A deserialiser's message, with the key that was probably meant.
pub(super) fn explain(place: &str, message: &str) -> Failure {
    let failure = Failure::usage(format!("{place}: is not understood")).cause(in_words(message));
    match meant(message) {
        Some(key) => failure.hint(format!("did you mean '{key}'?")),
        None => failure,
    }
}

/// What Rust calls things, and people do not.
const WORDS: [(&str, &str); 8] = [
    ("expected u8", "expected a whole number from 0 to 255"),
    ("expected u16", "expected a whole number from 0 to 65535"),
    ("expected u32", "expected a whole number from 0 to 4294967295"),
    ("expected i32", "expected a whole number"),
    ("expected i64", "expected a whole number"),
    ("expected path string", "expected a path"),
    ("expected a sequence", "expected a list, such as [\"a\", \"b\"]"),
    ("expected a boolean", "expected true or false"),
];

fn in_words(message: &str) -> String {
    let message = message.trim_end().replace("unknown variant", "unknown value");
    for (theirs, ours) in WORDS {
        if let Some(front) = message.strip_suffix(theirs) {
            return format!("{front}{ours}");
        }
    }
    message
}

/// serde says: unknown field `x`, expected one of `a`, `b` (or: expected `a`).
fn meant(message: &str) -> Option<&str> {
    let mut quoted = message.split('`').skip(1).step_by(2);
    if !message.starts_with("unknown ") {
        return None;
    }
    let given = quoted.next()?.to_lowercase();
    quoted
        .map(|known| (strsim::damerau_levenshtein(&given, known), known))
        .filter(|(distance, known)| *distance <= 1 + known.len() / 3)
        .min()
        .map(|(_, known)| known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn an_unknown_key_has_a_place_and_a_guess() {
        let text = "cpus = 2\n[boot]\nkernel = \"k\"\n  kernal = \"x\"\n";
        let message = parse("vm.toml", text).unwrap_err().to_string();
        assert!(message.contains("vm.toml:4:3"), "{message}");
        assert!(message.contains("unknown field `kernal`"), "{message}");
        assert!(message.contains("did you mean 'kernel'?"), "{message}");
    }

    #[test]
    fn json_is_the_same_spec() {
        let toml = "memory = \"1G\"\n[boot]\nkernel = \"k\"\n[[disk]]\npath = \"d\"\nread-only = true\n";
        let json = r#"{"memory": "1G", "boot": {"kernel": "k"}, "disk": [{"path": "d", "read-only": true}]}"#;
        assert_eq!(parse("t", toml).unwrap(), parse_json("j", json).unwrap());
    }

    #[test]
    fn a_file_is_json_by_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let written = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            read(&path)
        };
        let json = r#"{"boot": {"kernel": "k"}}"#;
        let spec = written("vm.json", json).unwrap();
        assert_eq!(spec.boot.kernel, folder.path().join("k"));
        let message = written("vm.toml", json).unwrap_err().to_string();
        assert!(message.contains("ends in .json"), "{message}");
        let message = read(&folder.path().join("vm")).unwrap_err().to_string();
        assert!(message.contains("vm.toml?"), "{message}");
        assert!(written("bom.json", &format!("{BYTE_ORDER_MARK}{json}")).is_ok());
        let message = written("VM.JSON", "[boot]\n").unwrap_err().to_string();
        assert!(message.contains("VM.JSON:1:"), "{message}");
    }

    #[test]
    fn what_is_no_spec_is_not_read_to_its_end() {
        let message = read(Path::new("/dev/zero")).unwrap_err().to_string();
        assert!(message.contains("it is longer than 1M"), "{message}");
        let message = read(&std::env::current_exe().unwrap()).unwrap_err().to_string();
        assert!(message.contains("--kernel FILE"), "{message}");
    }

    #[test]
    fn mistakes_in_json_have_a_place_and_a_guess() {
        let cases = [
            (
                "{\"boot\": {\"kernel\": \"k\",\n  \"kernal\": \"x\"}}",
                "vm.json:2:10",
                "did you mean 'kernel'?",
            ),
            (
                "{\n\"memory\": \"12X\"}",
                "vm.json:2:15",
                "'X' is not a size suffix",
            ),
            // Three characters, six bytes.
            (
                "{\"name\": \"äöü\", \"cpu\": 1}",
                "vm.json:1:21",
                "did you mean 'cpus'?",
            ),
            (
                "{\"boot\": {\"kernel\": \"k\"}} x",
                "vm.json:1:27",
                "trailing characters",
            ),
            ("{\"cpus\": 1", "vm.json:1:10", "EOF"),
            ("", "vm.json:1:1", "EOF"),
            (
                "{\"cpus\": 1, \"cpus\": 2}",
                "vm.json:1:18",
                "duplicate field `cpus`",
            ),
        ];
        for (text, place, words) in cases {
            let message = parse_json("vm.json", text).unwrap_err().to_string();
            assert!(message.contains(&format!("{place}: ")), "{text}: {message}");
            assert!(message.contains(words), "{text}: {message}");
            assert!(!message.contains("at line"), "{text}: {message}");
        }
    }

    #[test]
    fn a_wrong_value_has_its_place() {
        let text = "memory = \"12X\"\n[boot]\nkernel = \"k\"\n";
        let message = parse("vm.toml", text).unwrap_err().to_string();
        assert!(message.contains("vm.toml:1:10"), "{message}");
        assert!(message.contains("'X' is not a size suffix"), "{message}");
    }

    #[test]
    fn numbers_and_names_out_of_range_are_told_in_place() {
        let boot = "[boot]\nkernel = \"k\"\n";
        for (text, place, words) in [
            (
                format!("cpus = 999\n{boot}"),
                "1:8",
                "999 is not between 1 and 32",
            ),
            (format!("cpus = -1\n{boot}"), "1:8", "-1 is not between 1 and 32"),
            (format!("cpus = \"2\"\n{boot}"), "1:8", "expected a whole number"),
            (
                format!("{boot}[[net]]\ntap = \"averyveryverylongname\""),
                "4:7",
                "an interface's name at most 15",
            ),
            (
                format!("{boot}[[net]]\nbridge = \"averyveryverylongname\""),
                "4:10",
                "an interface's name at most 15",
            ),
        ] {
            let message = parse("vm.toml", &text).unwrap_err().to_string();
            assert!(
                message.contains(&format!("vm.toml:{place}: ")),
                "{text}: {message}"
            );
            assert!(message.contains(words), "{text}: {message}");
        }
    }

    #[test]
    fn a_disks_keys_and_values_are_checked_in_place() {
        let wrong = |line: &str| {
            let text = format!("[boot]\nkernel = \"k\"\n[[disk]]\npath = \"d\"\n{line}\n");
            parse("vm.toml", &text).unwrap_err().to_string()
        };
        let cases = [
            ("l2-cache = \"1M\"", "5:1", "did you mean 'l2-cache-size'?"),
            ("cache = \"writebak\"", "5:9", "did you mean 'writeback'?"),
            ("on-error = \"stopp\"", "5:12", "did you mean 'stop'?"),
            ("l2-cache-size = \"1K\"", "5:17", "1K is not between 64K and 1G"),
            ("serial = \"123456789012345678901\"", "5:10", "21 bytes"),
            ("poll-us = 10001", "5:11", "longer than 10000"),
            ("ops = \"many\"", "5:7", "'many' is not a size"),
            (
                "queues = \"2\"",
                "5:10",
                "expected a whole number from 0 to 65535",
            ),
            ("CACHE = \"none\"", "5:1", "did you mean 'cache'?"),
        ];
        for (line, place, words) in cases {
            let message = wrong(line);
            assert!(message.contains(&format!("vm.toml:{place}")), "{line}: {message}");
            assert!(message.contains(words), "{line}: {message}");
        }
    }

    #[test]
    fn a_far_off_key_gets_no_guess() {
        let message = parse("v", "bananas = 1\n").unwrap_err().to_string();
        assert!(!message.contains("did you mean"), "{message}");
    }

    #[test]
    fn paths_are_relative_to_the_spec() {
        let disk = "[[disk]]\npath = \"d\"\nkey-file = \"k\"\ndata-file = \"/f\"\n";
        let text = format!("[boot]\nkernel = \"k\"\ninitrd = \"/i\"\n{disk}");
        let mut spec = parse("v", &text).unwrap();
        resolve_paths(&mut spec, Path::new("/vm"));
        assert_eq!(spec.boot.kernel, Path::new("/vm/k"));
        assert_eq!(spec.boot.initrd.as_deref(), Some(Path::new("/i")));
        let disk = &spec.disks[0];
        assert_eq!(disk.path.as_deref(), Some(Path::new("/vm/d")));
        assert_eq!(disk.key_file.as_deref(), Some(Path::new("/vm/k")));
        assert_eq!(disk.data_file.as_deref(), Some(Path::new("/f")));
        let mut without = parse("v", "cpus = 1\n").unwrap();
        resolve_paths(&mut without, Path::new("/vm"));
        assert_eq!(without.boot.kernel, Path::new(""));
    }
}
