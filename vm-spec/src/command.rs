//! `bulkhead run ... -- COMMAND`: the kernel command line that makes a guest run one command as its first
//! process, and say its exit status by [`STATUS_REGISTER`].
//!
//! The guest needs no agent: the kernel hands what follows `--` to init, which is the guest's own `/bin/sh`.
//! Init scripts of initial RAM disks, Debian's among them, pass it on.

use crate::machine::STATUS_REGISTER;
use crate::spec::BootSpec;
use std::borrow::Cow;
use std::fmt::Write as _;

/// Its configuration space, as Linux shows it: kernels without `/dev/port` have that.
const HOST_BRIDGE: &str = "/sys/bus/pci/devices/0000:00:00.0/config";

/// Why a command cannot be put on the kernel's command line.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CommandError {
    /// The person chose an init, or gave it arguments.
    #[error("boot.command: boot.cmdline has '{0}', which the command needs for itself")]
    Taken(String),
    /// A zero byte ends what the kernel reads.
    #[error("boot.command: contains a zero byte")]
    Zero,
}

impl BootSpec {
    /// The kernel command line with the command, where there is one. Its length is not judged.
    ///
    /// # Errors
    /// [`CommandError`].
    pub fn command_line(&self) -> Result<Cow<'_, str>, CommandError> {
        if self.command.is_empty() {
            return Ok(Cow::Borrowed(&self.cmdline));
        }
        if self.command.iter().any(|word| word.contains('\0')) {
            return Err(CommandError::Zero);
        }
        let words = || self.cmdline.split_ascii_whitespace();
        let taken = |word: &&str| *word == "--" || word.starts_with("init=") || word.starts_with("rdinit=");
        if let Some(word) = words().find(taken) {
            return Err(CommandError::Taken(word.to_owned()));
        }
        // Without a root the initial RAM disk is all there is.
        let init = match words().any(|word| word.starts_with("root=")) {
            true => "init",
            false => "rdinit",
        };
        let script = format!("{BEFORE}{}{}", quoted(&self.command), after());
        let line = format!("{} {init}=/bin/sh -- -c \"{}\"", self.cmdline, one_line(&script));
        Ok(Cow::Owned(line.trim_start().to_owned()))
    }
}

/// What the guest's first process does before its command: the kernel's file systems where nobody has mounted
/// them, and the console as the terminal that Ctrl-C comes from.
const BEFORE: &str = "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin;\
    mkdir -p /proc /sys /dev 2>/dev/null;\
    [ -e /proc/self ]||mount -t proc proc /proc;\
    [ -e /sys/class ]||mount -t sysfs sys /sys;\
    [ -c /dev/null ]||mount -t devtmpfs dev /dev;\
    t=;[ -t 0 ]&&command -v setsid>/dev/null&&t='setsid -c';$t ";

/// And after it. Where the status cannot be told it powers off, which is no end with a status; to end is a
/// kernel's panic.
fn after() -> String {
    format!(
        ";s=$?;sync;mount -o remount,ro / 2>/dev/null;\
         printf \"\\\\$(printf %o $s)\"|dd of={HOST_BRIDGE} bs=1 seek={STATUS_REGISTER} conv=notrunc 2>/dev/null;\
         echo o>/proc/sysrq-trigger;sleep 9"
    )
}

/// The words, each as a shell reads it back.
fn quoted(command: &[String]) -> String {
    let quote = |word: &String| format!("'{}'", word.replace('\'', r"'\''"));
    command.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// A script that runs `script`, free of double quotes, backslashes before them and line ends, none of whose
/// words is one of `script`'s: init scripts look for theirs on the whole command line.
fn one_line(script: &str) -> String {
    let mut encoded = String::new();
    for byte in script.bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-:,+=;$".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Three digits always, since a digit may follow. Into a string nothing fails to be written.
            let _ = write!(encoded, "\\{byte:03o}");
        }
    }
    // Undivided and unmatched, what printf prints is one argument of eval.
    format!("set -f;IFS=;eval $(printf 'unset\\040IFS;set\\040+f;{encoded}')")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn boot(cmdline: &str, command: &[&str]) -> BootSpec {
        BootSpec {
            kernel: "k".into(),
            initrd: None,
            cmdline: cmdline.into(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
        }
    }

    /// Cuts a command line as the kernel does: at spaces outside double quotes, which it drops.
    fn kernel_words(line: &str) -> Vec<String> {
        let mut words = vec![String::new()];
        let mut quoted = false;
        for c in line.chars() {
            match c {
                '"' => quoted = !quoted,
                ' ' if !quoted => words.push(String::new()),
                c => words.last_mut().unwrap().push(c),
            }
        }
        words
    }

    #[test]
    fn no_command_changes_nothing() {
        assert_eq!(boot("init=/x -- y", &[]).command_line().unwrap(), "init=/x -- y");
    }

    #[test]
    fn the_command_runs_in_the_root_or_else_in_the_initial_ram_disk() {
        let init = |cmdline| kernel_words(&boot(cmdline, &["x"]).command_line().unwrap());
        let words = init("quiet root=/dev/vda rw");
        assert_eq!(
            words[..6],
            ["quiet", "root=/dev/vda", "rw", "init=/bin/sh", "--", "-c"]
        );
        assert_eq!(words.len(), 7);
        assert_eq!(init("")[..3], ["rdinit=/bin/sh", "--", "-c"]);
    }

    #[test]
    fn an_init_of_ones_own_is_refused() {
        for (cmdline, word) in [
            ("init=/x", "init=/x"),
            ("a rdinit=/x", "rdinit=/x"),
            ("a -- b", "--"),
        ] {
            let error = boot(cmdline, &["x"]).command_line().unwrap_err();
            assert_eq!(error, CommandError::Taken(word.into()));
        }
        assert_eq!(boot("", &["a\0"]).command_line().unwrap_err(), CommandError::Zero);
    }

    #[test]
    fn a_shell_finds_every_word_again() {
        let odd = [
            "printf",
            "<%s>",
            "",
            "a  b",
            "*",
            "it's",
            "\"q\"",
            "\\0 %d $HOME `x` $(y)",
            "new\nline\ttab",
            "7ü",
            "quiet root=/dev/sda",
        ];
        let script = one_line(&quoted(&odd.map(str::to_owned)));
        let words = kernel_words(&format!("-c \"{script}\""));
        let expected: String = odd[2..].iter().map(|word| format!("<{word}>")).collect();
        for shell in [&["sh"][..], &["bash"], &["busybox", "sh"]] {
            let output = Command::new(shell[0]).args(&shell[1..]).args(&words).output();
            let Ok(output) = output else {
                assert_ne!(shell, ["sh"], "every host has a shell");
                continue;
            };
            assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{shell:?}");
        }
    }
}
