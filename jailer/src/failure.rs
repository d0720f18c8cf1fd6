//! What a person is told when something fails: what, why, and what to do about it.

use crate::tell::{chain, printable};
use std::error::Error;
use std::fmt;
use vm_spec::control::exit_code;

/// A failure in three lines: what failed; the cause; a hint.
#[derive(Debug)]
pub struct Failure {
    what: String,
    cause: Option<String>,
    hint: Option<String>,
    code: u8,
}

impl Failure {
    /// The spec or the command line is wrong (exit code 2).
    pub fn usage(what: impl Into<String>) -> Self {
        Self::new(what, exit_code::USAGE)
    }

    /// Something that the spec names, or that the host should offer, is not as it must be (exit
    /// code 1).
    pub fn host(what: impl Into<String>) -> Self {
        Self::new(what, exit_code::ERROR)
    }

    fn new(what: impl Into<String>, code: u8) -> Self {
        Self {
            what: what.into(),
            cause: None,
            hint: None,
            code,
        }
    }

    /// Adds the cause, in words.
    #[must_use]
    pub fn cause(mut self, cause: impl Into<String>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// Adds the cause, an error with the errors behind it.
    #[must_use]
    pub fn because(self, error: &dyn Error) -> Self {
        self.cause(chain(error))
    }

    /// Adds the hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// With another exit code than the kind's own.
    #[must_use]
    pub fn exiting(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// What failed and its cause, on one line, for another to tell.
    pub fn line(&self) -> String {
        let what = printable(&self.what);
        match &self.cause {
            Some(cause) => format!("{what}: {}", printable(cause)),
            None => what,
        }
    }

    /// The exit code.
    pub fn code(&self) -> u8 {
        self.code
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Names of files and what stands in images may hold anything: a line is a line.
        write!(f, "error: {}", printable(&self.what))?;
        if let Some(cause) = &self.cause {
            write!(f, "\n  cause: {}", printable(cause))?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\n  hint: {}", printable(hint))?;
        }
        Ok(())
    }
}

impl Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_is_one_line() {
        let failure = Failure::usage("a\nb").cause("\x1b[2J").hint("c");
        assert_eq!(
            failure.to_string(),
            "error: a\\nb\n  cause: \\u{1b}[2J\n  hint: c"
        );
    }
}
