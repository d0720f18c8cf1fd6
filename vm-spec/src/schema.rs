//! The JSON schema of [`crate::spec::VmSpec`], made from its types by the test below.

/// JSON Schema, draft 2020-12. It names each key once: not `num-queues` and `vpc`, which are taken too.
pub const SCHEMA: &str = include_str!("../spec.schema.json");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::VmSpec;
    use serde_json::{Value, json};
    use std::path::Path;

    /// Set: the file is written anew.
    const WRITE: &str = "BULKHEAD_WRITE_SCHEMA";

    /// `format` binds no validator, as a maximum does.
    fn bound(schema: &mut Value) {
        if schema["format"] == "uint32" && schema.get("maximum").is_none() {
            schema["maximum"] = json!(u32::MAX);
        }
        if schema["format"] == "int32" {
            schema["minimum"] = json!(i32::MIN);
            schema["maximum"] = json!(i32::MAX);
        }
        match schema {
            Value::Object(keys) => keys.values_mut().for_each(bound),
            Value::Array(items) => items.iter_mut().for_each(bound),
            _ => {}
        }
    }

    #[test]
    fn is_that_of_the_types() {
        let mut made = schemars::schema_for!(VmSpec).to_value();
        bound(&mut made);
        let made = format!("{made:#}\n");
        if std::env::var_os(WRITE).is_some() {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("spec.schema.json");
            std::fs::write(path, &made).unwrap();
        }
        assert!(
            made == SCHEMA,
            "the spec has changed: run this test with {WRITE}=1"
        );
    }

    #[test]
    fn names_what_must_and_may_be_given() {
        let schema: Value = serde_json::from_str(SCHEMA).unwrap();
        assert_eq!(
            schema["$defs"]["VhostUserSpec"]["required"],
            json!(["type", "socket"])
        );
        assert_eq!(schema["additionalProperties"], json!(false));
        assert_eq!(schema["properties"]["cpus"]["default"], json!(1));
        let disk = &schema["$defs"]["DiskSpec"];
        assert_eq!(disk["required"], Value::Null);
        assert_eq!(disk["properties"]["serial"]["maxLength"], json!(20));
        assert_eq!(disk["properties"]["poll-us"]["maximum"], json!(10_000));
        let limits = &schema["$defs"]["LimitsSpec"]["properties"];
        assert_eq!(limits["pids"]["maximum"], json!(u32::MAX));
        let formats = schema["$defs"]["ImageFormat"]["oneOf"].as_array().unwrap();
        let names: Vec<_> = formats.iter().map(|one| one["const"].as_str().unwrap()).collect();
        let all = crate::spec::ImageFormat::ALL.map(crate::spec::ImageFormat::name);
        assert_eq!(names, all);
    }
}
