//! The command line: words `key=value`.

/// What the command line says.
#[derive(Clone, Copy)]
pub(crate) struct Parameters<'a>(pub(crate) &'a str);

impl<'a> Parameters<'a> {
    /// The value of `key`, where the line has it.
    pub(crate) fn text(self, key: &str) -> Option<&'a str> {
        self.0
            .split_ascii_whitespace()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    /// The value of `key` as a decimal number; `default` where the line has none, or not a number.
    pub(crate) fn number(self, key: &str, default: u64) -> u64 {
        self.text(key)
            .and_then(|value| value.parse().ok())
            .unwrap_or(default)
    }
}
