//! What a disk process can be ordered to do by `--control-fd`.
//!
//! ```text
//! size BYTES    the disk is to be this long; answered "ok\n" or "error: REASON\n" once it is, other orders
//!               meanwhile; with an error at once while it grows already
//! metrics       answered by Prometheus' text format and a line "# EOF\n"
//! ```

/// What was ordered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Order {
    /// The disk's new length in bytes.
    Size(u64),
    Metrics,
    /// A line that is none of these.
    Unknown,
}

impl Order {
    pub(crate) fn parse(line: &str) -> Self {
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("metrics"), None, None) => Self::Metrics,
            (Some("size"), Some(bytes), None) => bytes.parse().map_or(Self::Unknown, Self::Size),
            _ => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_a_word_or_two() {
        assert_eq!(Order::parse("metrics"), Order::Metrics);
        assert_eq!(Order::parse("size 1024"), Order::Size(1024));
        for line in [
            "",
            "size",
            "size 1G",
            "size 1 2",
            "size 18446744073709551616",
            "metrics x",
        ] {
            assert_eq!(Order::parse(line), Order::Unknown, "{line}");
        }
    }
}
