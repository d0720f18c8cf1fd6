//! Runs the distribution's tools and turns their failures into errors with the tool's own words.

use crate::{Error, Result};
use std::ffi::{OsStr, OsString};
use std::process::{Command, Output, Stdio};

/// Where the system's own tools are, which Debian leaves out of the PATH of ordinary users, and of whom plain `su`
/// made root.
const SYSTEM_FOLDERS: &str = "/usr/sbin:/sbin";

/// Most bytes of a tool's error output that an error repeats.
const STDERR_TAIL: usize = 2000;

/// Runs `command` with no input and returns its standard output. `package` is the Debian package
/// to name when the program is missing.
pub(crate) fn run(command: &mut Command, package: &'static str) -> Result<Vec<u8>> {
    let output = output(command, package)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(Error::Command {
        command: command.get_program().to_string_lossy().into_owned(),
        status: output.status.to_string(),
        stderr: tail(&output.stderr),
    })
}

/// The PATH, with the folders of the system's own tools after the others.
#[must_use]
pub fn search_path() -> OsString {
    with_system_folders(std::env::var_os("PATH").as_deref())
}

fn with_system_folders(path: Option<&OsStr>) -> OsString {
    let mut all = path
        .filter(|path| !path.is_empty())
        .map_or_else(|| OsString::from("/usr/local/bin:/usr/bin:/bin"), OsStr::to_owned);
    all.push(":");
    all.push(SYSTEM_FOLDERS);
    all
}

/// Runs `command` with no input and returns how it ended and what it wrote.
pub(crate) fn output(command: &mut Command, package: &'static str) -> Result<Output> {
    command
        .env("PATH", search_path())
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::Missing {
            program: command.get_program().to_string_lossy().into_owned(),
            package,
            source,
        })
}

fn tail(bytes: &[u8]) -> String {
    let start = bytes.len().saturating_sub(STDERR_TAIL);
    String::from_utf8_lossy(&bytes[start..]).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_s_tools_are_found_by_ordinary_users() {
        let path = with_system_folders(Some(OsStr::new("/usr/bin:/bin")));
        assert_eq!(path, "/usr/bin:/bin:/usr/sbin:/sbin");
        assert_eq!(
            with_system_folders(None),
            with_system_folders(Some(OsStr::new("")))
        );
        let output = run(Command::new("sh").args(["-c", "echo $PATH"]), "dash").unwrap();
        let folders = String::from_utf8(output).unwrap();
        assert!(folders.trim().ends_with(SYSTEM_FOLDERS), "{folders}");
    }

    #[test]
    fn a_failure_carries_the_tool_s_words_and_a_missing_tool_its_package() {
        let error = run(
            Command::new("sh").args(["-c", "echo no space >&2; exit 3"]),
            "dash",
        )
        .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("no space") && text.contains("exit status: 3"),
            "{text}"
        );
        let error = run(&mut Command::new("no-such-tool"), "some-package").unwrap_err();
        assert!(error.to_string().contains("some-package"));
    }
}
