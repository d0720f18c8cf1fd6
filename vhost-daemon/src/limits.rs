//! Rate limits as flags say them: `ops=N,bytes=SIZE[,ops-burst=N][,bytes-burst=SIZE]`.

use crate::bucket::{Limiter, Rate, SharedLimiter};
use std::time::Instant;
use vm_spec::size::ByteSize;

/// Rates of one kind of traffic.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Limits {
    operations: Option<Rate>,
    bytes: Option<Rate>,
}

impl Limits {
    /// Reads rates a second; `unit` is what this device calls its operations, such as `packets`.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str, unit: &str) -> Result<Self, String> {
        let mut given: [Option<u64>; 4] = [None; 4];
        let burst = format!("{unit}-burst");
        let keys = [unit, &burst, "bytes", "bytes-burst"];
        for part in text.split(',') {
            let (key, value) = part.split_once('=').ok_or("write key=value")?;
            let index = keys.iter().position(|known| *known == key);
            let index = index.ok_or_else(|| format!("unknown key '{key}': use {}", keys.join(", ")))?;
            let size: ByteSize = value.parse().map_err(|error| format!("{key}: {error}"))?;
            if size.0 == 0 {
                return Err(format!("{key} must be at least 1"));
            }
            given[index] = Some(size.0);
        }
        let [operations, operations_burst, bytes, bytes_burst] = given;
        if (operations.is_none() && operations_burst.is_some()) || (bytes.is_none() && bytes_burst.is_some())
        {
            return Err("a burst needs its rate".to_owned());
        }
        // Without a burst of its own, a tenth of a second's worth.
        let rate = |rate: Option<u64>, burst: Option<u64>| {
            rate.map(|per_second| Rate {
                per_second,
                burst: burst.unwrap_or((per_second / 10).max(1)),
            })
        };
        Ok(Self {
            operations: rate(operations, operations_burst),
            bytes: rate(bytes, bytes_burst),
        })
    }

    /// A limiter with these limits, full now, for all queues that share them.
    #[must_use]
    pub fn limiter(&self) -> SharedLimiter {
        SharedLimiter::new(Limiter::new(self.operations, self.bytes, Instant::now()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_bursts_are_read() {
        let limits = Limits::parse("packets=1000,bytes=1M,bytes-burst=64K", "packets").unwrap();
        assert_eq!(
            limits.operations,
            Some(Rate {
                per_second: 1000,
                burst: 100
            })
        );
        assert_eq!(
            limits.bytes,
            Some(Rate {
                per_second: 1 << 20,
                burst: 64 << 10
            })
        );
        for bad in ["", "ops", "ops=0", "ops=x", "packets=1", "bytes-burst=1"] {
            assert!(Limits::parse(bad, "ops").is_err(), "{bad}");
        }
    }
}
