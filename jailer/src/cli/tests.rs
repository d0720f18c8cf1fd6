//! The command line as a whole.

use super::*;
use crate::audit::catalogue::ATTACKS;

#[test]
fn the_command_line_is_sound() {
    Cli::command().debug_assert();
}

/// The help of the verb that these words name.
fn help(words: &str) -> String {
    let words = words.split(' ').chain(["--help"]);
    Cli::try_parse_from(["bulkhead"].into_iter().chain(words))
        .unwrap_err()
        .to_string()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn helps_name_all_that_can_be_given() {
    let named = |words: &str, name: &str| {
        let help = help(words);
        assert!(help.contains(name), "{words}: no {name}: {help}");
    };
    for role in Role::ALL {
        named("policy show", role.name());
    }
    for wall in Wall::ALL {
        named("audit", wall.name());
    }
    for role in AUDITED {
        named("audit", role.name());
    }
    for verb in ["run", "image info"] {
        named(verb, "enforce, trap, log or off");
    }
}

#[test]
fn create_names_what_it_makes() {
    let help = help("image create");
    assert!(help.contains("raw or qcow2"), "{help}");
    assert!(!help.contains("vmdk") && !help.contains("--key-f"), "{help}");
}

#[test]
fn numbers_below_zero_are_numbers() {
    for (flag, words) in [
        ("--cpus=-1", "from 1 to 32"),
        ("--cpus 999", "from 1 to 32"),
        ("--cpus -1", "from 1 to 32"),
        ("--hotplug -1", "from 0 to 8"),
        ("--memory -1", "-1"),
    ] {
        let line = ["bulkhead", "run"].into_iter().chain(flag.split(' '));
        let error = Cli::try_parse_from(line).unwrap_err().to_string();
        assert!(
            error.contains(words) && !error.contains("tip:"),
            "{flag}: {error}"
        );
    }
}

/// A role without attacks would pass an audit that tried nothing.
#[test]
fn only_roles_with_attacks_are_audited() {
    let audit = |role: Role| Cli::try_parse_from(["bulkhead", "audit", "--role", role.name()]);
    for role in Role::ALL {
        assert_eq!(audit(role).is_ok(), AUDITED.contains(&role), "{role}");
    }
}

#[test]
fn an_attack_that_was_meant_is_named() {
    let audit = |name| Cli::try_parse_from(["bulkhead", "audit", "--attack", name]);
    for attack in ATTACKS {
        audit(attack.name).expect(attack.name);
    }
    let mut wrong = ATTACKS[0].name.to_owned();
    wrong.pop();
    let error = audit(&wrong).unwrap_err();
    assert_eq!(error.exit_code(), i32::from(USAGE));
    let meant = format!("'{}'", ATTACKS[0].name);
    assert!(error.to_string().contains(&meant), "{error}");
}

#[test]
fn run_is_parsed_alone_as_among_all_verbs() {
    for line in [
        "bulkhead run --kernel k -vv --disk path=a,format=raw",
        "bulkhead run --kernl k",
        "bulkhead run a b",
        "bulkhead run --version",
        "bulkhead run --help",
    ] {
        let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let among = Cli::try_parse_from(&arguments).map(|cli| format!("{:?}", cli.verb));
        let alone = parse(arguments).map(|verb| format!("{verb:?}"));
        let text = |error: clap::Error| error.to_string();
        assert_eq!(alone.map_err(text), among.map_err(text), "{line}");
    }
}

#[test]
fn verbosity_only_raises_the_level() {
    let level = |args: &[&str]| match Cli::try_parse_from(args).unwrap().verb {
        Verb::Run(args) => args.options().log_level,
        _ => unreachable!("the arguments start with run"),
    };
    assert_eq!(level(&["bulkhead", "run", "--kernel", "k"]), "warn");
    assert_eq!(level(&["bulkhead", "run", "--kernel", "k", "-vv"]), "debug");
    assert_eq!(
        level(&["bulkhead", "run", "--kernel", "k", "-v", "--log-level=trace"]),
        "trace"
    );
}
