//! Sizes as people write them: `512M`, `4GiB`, `1048576`.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::str::FromStr;

/// A number of bytes. Written as a plain number or with a binary suffix (`K`, `M`, `G`, `T`,
/// optionally followed by `iB` or `B`; all are powers of 1024).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct ByteSize(pub u64);

/// Why a text is no size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SizeError {
    /// No digits, something other than digits before the suffix, or a fraction.
    #[error("'{0}' is not a size: write a whole number and an optional suffix, such as 512M")]
    Number(String),
    /// A suffix that is not K, M, G or T.
    #[error("'{0}' is not a size suffix: use K, M, G or T")]
    Suffix(String),
    /// More than 2^64 - 1 bytes.
    #[error("'{0}' is too large for a size")]
    Overflow(String),
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, suffix) = text.split_at(digits);
        if number.is_empty() || suffix.starts_with(['.', ',']) {
            return Err(SizeError::Number(text.to_owned()));
        }
        let shift = match suffix.trim().to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "K" | "KB" | "KIB" => 10,
            "M" | "MB" | "MIB" => 20,
            "G" | "GB" | "GIB" => 30,
            "T" | "TB" | "TIB" => 40,
            _ => return Err(SizeError::Suffix(suffix.to_owned())),
        };
        let overflow = || SizeError::Overflow(text.to_owned());
        let value: u64 = number.parse().map_err(|_| overflow())?;
        value.checked_mul(1 << shift).map(Self).ok_or_else(overflow)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, suffix) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{suffix}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = ByteSize;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as 512M, or a number of bytes")
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(value))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<ByteSize, E> {
                u64::try_from(value)
                    .map(ByteSize)
                    .map_err(|_| E::custom("a size cannot be negative"))
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<ByteSize, E> {
                value.parse().map_err(E::custom)
            }
        }
        if deserializer.is_human_readable() {
            deserializer.deserialize_any(Visitor)
        } else {
            u64::deserialize(deserializer).map(Self)
        }
    }
}

#[cfg(test)]
impl schemars::JsonSchema for ByteSize {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ByteSize".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "A number of bytes, or a text such as 512M: K, M, G and T are powers of 1024.",
            "anyOf": [
                { "type": "integer", "minimum": 0 },
                { "type": "string", "pattern": "^[0-9]+ *([kKmMgGtT]([iI]?[bB])?|[bB])?$" },
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in [
            ("0", 0),
            ("512M", 512 << 20),
            ("4GiB", 4 << 30),
            ("1 k", 1024),
            ("2tb", 2 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn refuses_with_the_part_that_is_wrong() {
        assert_eq!("M".parse::<ByteSize>(), Err(SizeError::Number("M".into())));
        assert_eq!("-1M".parse::<ByteSize>(), Err(SizeError::Number("-1M".into())));
        assert_eq!("1.5G".parse::<ByteSize>(), Err(SizeError::Number("1.5G".into())));
        assert_eq!("1X".parse::<ByteSize>(), Err(SizeError::Suffix("X".into())));
        assert_eq!(
            "99999999T".parse::<ByteSize>(),
            Err(SizeError::Overflow("99999999T".into()))
        );
    }

    #[test]
    fn prints_the_largest_exact_suffix() {
        assert_eq!(ByteSize(5 << 30).to_string(), "5G");
        assert_eq!(ByteSize(1025).to_string(), "1025");
        assert_eq!(ByteSize(0).to_string(), "0");
    }
}
