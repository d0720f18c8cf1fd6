//! `bulkhead man`: manual pages, made of what the command line is made of.

use crate::failure::Failure;
use clap::Command;
use std::fmt::Write as _;

/// Exit codes of `bulkhead run`, as in the README.
const EXIT_CODES: [(&str, &str); 12] = [
    ("0", "the guest powered off, or Ctrl-A x ended it"),
    (
        "any",
        "with -- COMMAND: its exit status; then nothing is said on standard error",
    ),
    ("1", "something failed; the message says what"),
    ("2", "the command line or the spec is wrong"),
    ("3", "the guest's kernel panicked"),
    (
        "4",
        "a vCPU shut down (triple fault); also a reboot by reboot=t, which nothing tells from a crash",
    ),
    ("5", "the guest reset, and on-reboot is exit"),
    ("6", "the guest reset before it did anything"),
    ("7", "a device's process was lost while the guest ran"),
    ("8", "a deadline passed"),
    ("148", "a process made a system call that its filter forbids"),
    ("128 + n", "ended by signal n, or asked by it a second time"),
];
/// Of every other verb.
const OTHERS_EXIT: &str =
    "0: done. 1: something failed. 2: the command line is wrong, or no such VM runs. 8: a deadline passed.";
const LISTENERS_EXIT: &str = "0: done, or the VM is over. 1: something failed. 2: the command line is wrong, or no such VM runs. \
     128 + n: ended by signal n.";
const IMAGE_EXIT: &str = "0: done. 1: something failed. 2: the command line is wrong. 148: the jailed tool made a system call \
     that its filter forbids. 128 + n: ended by signal n.";
const AUDIT_EXIT: &str = "0: nothing got through. 1: an attack got through, or something failed. 2: the command line is wrong. \
     128 + n: ended by signal n.";
const DOCTOR_EXIT: &str =
    "0: nothing that is needed is missing. 1: something is. 2: the command line is wrong.";
const ENVIRONMENT: [(&str, &str); 4] = [
    (
        "XDG_RUNTIME_DIR",
        "where the folder bulkhead with the VMs' run-time folders lies; without it, or where it is not a folder that only the user can write, they lie in /tmp/bulkhead-UID. Verbs look for VMs in both",
    ),
    (
        "BULKHEAD_BIN_DIR",
        "where the other programs lie, if not beside this one",
    ),
    (
        "NOTIFY_SOCKET",
        "who is told (sd_notify) when the guest runs and when the VM ends",
    ),
    ("PATH", "where newuidmap, newgidmap and passt are looked for"),
];
const FILES: [(&str, &str); 4] = [
    (
        "$XDG_RUNTIME_DIR/bulkhead/NAME/",
        "a running VM's folder, which goes with it",
    ),
    ("state.json", "in it: its processes, and what each holds open"),
    ("events.jsonl", "in it: what happened to its devices"),
    (
        "/etc/subuid, /etc/subgid",
        "subordinate ids, with which each process is a user of its own",
    ),
];

/// The page of `command`, or of one of its verbs, or of one of that one's.
///
/// # Errors
/// A [`Failure`] when there is no such verb.
pub(super) fn page(mut command: Command, verb: &[String]) -> Result<String, Failure> {
    // For each verb's own name, as in its usage.
    command.build();
    for word in verb {
        command = command.find_subcommand(word).cloned().ok_or_else(|| {
            let verb = verb.join(" ");
            Failure::usage(format!("man: there is no verb '{verb}'")).hint("bulkhead --help names them")
        })?;
    }
    let mut page = Vec::new();
    let written = clap_mangen::Man::new(command).render(&mut page);
    written.map_err(|e| Failure::host("cannot make the manual page").because(&e))?;
    Ok(complete(&String::from_utf8_lossy(&page), verb))
}

/// What the command line's types do not know: a title with its source, lines that are not stretched and places
/// where long lists of keys may be broken, exit codes, environment, files.
fn complete(made: &str, verb: &[String]) -> String {
    let mut page = String::new();
    for line in made.lines() {
        let title = line.strip_prefix(".TH ").and_then(|rest| rest.split(' ').next());
        // Into a string nothing fails to be written.
        let _ = match title {
            Some(title) => writeln!(
                page,
                ".TH {title} 1 \"\" \"bulkhead {}\" \"Bulkhead\"\n.ad l",
                env!("CARGO_PKG_VERSION")
            ),
            None => writeln!(page, "{}", line.replace("[,", "\\:[,")),
        };
    }
    let run = verb.first().is_none_or(|verb| verb == "run");
    let words: Vec<_> = verb.iter().map(String::as_str).collect();
    let text = match *words {
        [] | ["run"] => {
            list(&mut page, "EXIT STATUS", &EXIT_CODES);
            None
        }
        // It has said so.
        ["image", "check"] => None,
        ["image", ..] => Some(IMAGE_EXIT),
        ["console" | "logs"] => Some(LISTENERS_EXIT),
        ["audit"] => Some(AUDIT_EXIT),
        ["doctor"] => Some(DOCTOR_EXIT),
        _ => Some(OTHERS_EXIT),
    };
    if let Some(text) = text {
        let _ = writeln!(page, ".SH \"EXIT STATUS\"\n{text}");
    }
    if run {
        list(&mut page, "ENVIRONMENT", &ENVIRONMENT);
        list(&mut page, "FILES", &FILES);
    }
    page
}

fn list(page: &mut String, title: &str, items: &[(&str, &str)]) {
    let plain = |text: &str| text.replace('-', "\\-");
    let _ = writeln!(page, ".SH \"{title}\"");
    for (item, text) in items {
        let _ = writeln!(page, ".TP\n\\fB{}\\fR\n{}", plain(item), plain(text));
    }
}

#[cfg(test)]
mod tests {
    use super::super::Cli;
    use super::*;
    use clap::CommandFactory;

    fn page(words: &[&str]) -> Result<String, Failure> {
        let words: Vec<_> = words.iter().map(ToString::to_string).collect();
        super::page(Cli::command(), &words)
    }

    #[test]
    fn every_verb_has_a_manual_page() {
        let all = page(&[]).unwrap();
        for verb in Cli::command().get_subcommands() {
            let name = verb.get_name();
            let of_verb = page(&[name]).unwrap();
            assert!(of_verb.contains(".SH SYNOPSIS"), "{of_verb}");
            assert!(all.contains(name), "{all}");
            // Those that its page refers to.
            for below in verb.get_subcommands() {
                let title = format!(".TH bulkhead-{name}-{}", below.get_name());
                let page = page(&[name, below.get_name()]).unwrap();
                assert!(page.contains(&title), "no {title}: {page}");
            }
        }
        assert!(page(&["run"]).unwrap().contains(r"power\-off\-grace"));
        for unknown in [["rum", "x"].as_slice(), &["image", "inf"], &["run", "x"]] {
            assert_eq!(page(unknown).unwrap_err().code(), 2);
        }
    }

    #[test]
    fn exit_codes_are_the_readmes() {
        let readme = include_str!("../../../README.md").replace('`', "");
        let (_, table) = readme.split_once("\n| code | meaning |\n").unwrap();
        let rows = table.lines().skip(1).take_while(|line| line.starts_with('|'));
        let rows: Vec<_> = rows.map(|row| row.trim_matches(['|', ' ']).to_owned()).collect();
        let own = EXIT_CODES.map(|(code, meaning)| format!("{code} | {meaning}"));
        assert_eq!(rows, own);
        for verb in [&[][..], &["run"]] {
            let page = page(verb).unwrap();
            for section in ["EXIT STATUS", "ENVIRONMENT", "FILES"] {
                assert!(page.contains(&format!(".SH \"{section}\"")), "{page}");
            }
        }
        for (verb, words) in [
            (["stop"].as_slice(), "8: a deadline"),
            (&["console"], "128 + n"),
            (&["audit"], "got through"),
            (&["doctor"], "missing"),
            (&["image", "convert"], "148: the jailed tool"),
            (&["image", "check"], "3 if it leaks"),
        ] {
            let page = page(verb).unwrap();
            assert!(page.contains(words), "{page}");
            assert_eq!(page.contains("EXIT STATUS"), verb != ["image", "check"], "{page}");
        }
    }
}
