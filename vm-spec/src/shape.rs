//! Tables that are written as tables. Derived deserialisers would take a list of a table's values as well, in an
//! order that nobody writes down.

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use std::fmt;
use std::marker::PhantomData;

struct Table<T>(PhantomData<T>);
struct Tables<T>(PhantomData<T>);

/// Reads a table, and nothing else that `T` could be made of.
///
/// # Errors
/// The deserialiser's.
pub fn table<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Table(PhantomData).deserialize(deserializer)
}

/// Reads a list of tables.
pub(crate) fn tables<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    deserializer.deserialize_seq(Tables(PhantomData))
}

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for Table<T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Table<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table (in JSON: an object)")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Tables<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of tables: [[...]] in TOML, [{...}] in JSON")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<T>, A::Error> {
        let mut all = Vec::new();
        while let Some(item) = items.next_element_seed(Table(PhantomData))? {
            all.push(item);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use crate::spec::VmSpec;

    fn refusal(json: &str) -> String {
        serde_json::from_str::<VmSpec>(json).unwrap_err().to_string()
    }

    #[test]
    fn a_list_of_values_is_no_table() {
        for json in [
            r#"{"boot": ["k", null, "", []]}"#,
            r#"{"boot": {"kernel": "k"}, "disk": [["disk0", "d"]]}"#,
            r#"{"boot": {"kernel": "k"}, "limits": [1]}"#,
        ] {
            let message = refusal(json);
            assert!(message.contains("expected a table"), "{json}: {message}");
        }
        let message = refusal(r#"{"boot": {"kernel": "k"}, "net": {"user": true}}"#);
        assert!(message.contains("expected a list of tables"), "{message}");
    }

    #[test]
    fn a_key_that_may_be_absent_may_be_null() {
        let disk = r#"{"l2-cache-size": null, "serial": null, "poll-us": null, "format": null}"#;
        let json = format!(r#"{{"boot": {{"kernel": "k"}}, "disk": [{disk}]}}"#);
        let spec: VmSpec = serde_json::from_str(&json).unwrap();
        assert_eq!(spec.disks, [crate::disk::DiskSpec::default()]);
    }
}
