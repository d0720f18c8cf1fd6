//! `bulkhead man`: manual pages, made of what the command line is made of.

use crate::failure::Failure;
use clap::Command;

/// The page of `command`, or of one of its verbs.
///
/// # Errors
/// A [`Failure`] when there is no such verb.
pub(super) fn page(mut command: Command, verb: Option<&str>) -> Result<String, Failure> {
    // For each verb's own name, as in its usage.
    command.build();
    if let Some(verb) = verb {
        command = command.find_subcommand(verb).cloned().ok_or_else(|| {
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
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_verb_has_a_manual_page() {
        let all = page(Cli::command(), None).unwrap();
        for verb in Cli::command().get_subcommands() {
            let page = page(Cli::command(), Some(verb.get_name())).unwrap();
            assert!(page.contains(".SH SYNOPSIS"), "{page}");
            assert!(all.contains(verb.get_name()), "{all}");
        }
        assert!(
            page(Cli::command(), Some("run"))
                .unwrap()
                .contains(r"power\-off\-grace")
        );
        assert_eq!(page(Cli::command(), Some("rum")).unwrap_err().code(), 2);
    }
}
