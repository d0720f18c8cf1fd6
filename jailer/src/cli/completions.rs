//! `bulkhead completions`: clap's scripts, and the names of the VMs that run.

use clap::Command;
use clap_complete::Shell;

/// Prints the names: the first column, below its head.
const NAMES: &str = "bulkhead ps 2>/dev/null | sed 1d | cut -d' ' -f1";

/// The completion script of `command` for `shell`.
pub(super) fn script(mut command: Command, shell: Shell) -> String {
    let mut made = Vec::new();
    clap_complete::generate(shell, &mut command, "bulkhead", &mut made);
    let made = String::from_utf8_lossy(&made).into_owned();
    let verbs: Vec<&str> = command
        .get_subcommands()
        .filter(|verb| {
            verb.get_positionals()
                .next()
                .is_some_and(|first| first.get_id() == "vm")
        })
        .map(Command::get_name)
        .collect();
    match shell {
        Shell::Bash => bash(&made, &verbs),
        Shell::Fish => fish(made, &verbs),
        Shell::Zsh => zsh(&made),
        _ => made,
    }
}

fn bash(made: &str, verbs: &[&str]) -> String {
    // `$2` is the word that is completed, the first behind the verb.
    let ours = format!(
        "_bulkhead_names() {{
    _bulkhead \"$@\"
    case \"${{COMP_WORDS[1]}}\" in
        {})
            if [[ \"$COMP_CWORD\" -eq 2 && \"$2\" != -* ]]; then
                COMPREPLY=( $(compgen -W \"$({NAMES})\" -- \"$2\") )
            fi
            ;;
    esac
}}
",
        verbs.join("|")
    );
    match made.rfind("\nif [[ \"${BASH_VERSINFO") {
        Some(at) => {
            let registration = made[at..].replace("-F _bulkhead ", "-F _bulkhead_names ");
            format!("{}\n{ours}{registration}", &made[..at])
        }
        None => made.to_owned(),
    }
}

fn fish(mut made: String, verbs: &[&str]) -> String {
    for verb in verbs {
        made.push_str(&format!(
            "complete -c bulkhead -n \"__fish_bulkhead_using_subcommand {verb}\" -f -a \"({NAMES})\"\n"
        ));
    }
    made
}

fn zsh(made: &str) -> String {
    let ours = format!(
        "_bulkhead_names() {{
    local -a names
    names=(${{(f)\"$({NAMES})\"}})
    compadd -a names
}}
"
    );
    let named = made.replace(
        "':vm -- The VM'\\''s name:_default'",
        "':vm -- The VM'\\''s name:_bulkhead_names'",
    );
    match named.rfind("\nif [ \"$funcstack") {
        Some(at) => format!("{}\n{ours}{}", &named[..at], &named[at..]),
        None => named,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Cli;
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn running_vms_are_named() {
        let script = |shell| super::script(Cli::command(), shell);
        let bash = script(Shell::Bash);
        assert!(bash.contains("console|logs|stop|kill"), "{bash}");
        assert!(!bash.contains("-F _bulkhead "), "{bash}");
        assert_eq!(bash.matches("-F _bulkhead_names ").count(), 2);
        let fish = script(Shell::Fish);
        assert!(
            fish.contains(&format!("using_subcommand stop\" -f -a \"({NAMES})\"")),
            "{fish}"
        );
        let zsh = script(Shell::Zsh);
        assert!(zsh.contains("name:_bulkhead_names'"), "{zsh}");
        assert!(zsh.contains("\n_bulkhead_names() {"), "{zsh}");
    }
}
