//! `bulkhead man`: manual pages, made of what the command line is made of.

use crate::failure::Failure;
use clap::Command;

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
    Ok(String::from_utf8_lossy(&page).into_owned())
}

#[cfg(test)]
mod tests {
    use super::super::Cli;
    use crate::failure::Failure;
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
}
