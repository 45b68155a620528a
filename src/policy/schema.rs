//! JSON Schema (draft 2020-12) of a policy file, for editors.
//!
//! It tells names and types; what only the loader can judge (ranges with units,
//! system calls of this architecture, keys that contradict each other) stays
//! with `policy check`.

use serde_json::{Map, Value as Json, json};

use super::{
    tables::Description,
    written::{TABLES, artifacts, call, describe, instances, limits},
};

/// The dialect that all our schemas are written in.
pub const DIALECT: &str = "https://json-schema.org/draft/2020-12/schema";

/// The schema of a policy file.
#[must_use]
pub fn schema() -> Json {
    let mut properties = properties(&describe(), TABLES);
    let special =
        [call::describe(), limits::describe(), artifacts::describe(), instances::describe()];
    properties.insert("extends".to_owned(), json!({
        "description": "The policy that this one starts from: a file in the same directory, without .toml.",
        "type": "string",
        "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
    }));
    properties.insert("service".to_owned(), json!({
        "description": "Other rules for methods that match a SERVICE/METHOD glob; the most specific one holds.",
        "type": "object",
        "propertyNames": { "pattern": r"^(\*|[A-Za-z0-9._*?-]+/[A-Za-z0-9._*?-]+)$" },
        "additionalProperties": object(self::properties(&special.concat(), TABLES)),
    }));
    let mut schema = object(properties);
    schema["$schema"] = DIALECT.into();
    schema["title"] = "A policy of the dispatcher".into();
    schema
}

/// Keys as properties, those of tables within objects.
#[must_use]
pub fn properties(keys: &[Description], tables: &[(&str, &str)]) -> Map<String, Json> {
    let mut properties = Map::new();
    for key in keys {
        let mut schema = key.schema.clone();
        schema["description"] = key.text.clone().into();
        if key.table.is_empty() {
            properties.insert(key.key.to_owned(), schema);
            continue;
        }
        let table = properties.entry(key.table).or_insert_with(|| {
            let mut table = object(Map::new());
            let about = tables.iter().find(|(name, _)| *name == key.table);
            table["description"] = about.map_or("", |(_, about)| about.trim()).into();
            table
        });
        table["properties"][key.key] = schema;
    }
    properties
}

/// An object that has these properties and no others.
#[must_use]
pub fn object(properties: Map<String, Json>) -> Json {
    json!({ "type": "object", "properties": properties, "additionalProperties": false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_described_and_nothing_else_is_allowed() {
        let schema = schema();
        let at = |path: &str| schema.pointer(path).unwrap_or_else(|| panic!("{path}"));
        assert_eq!(at("/$schema"), DIALECT);
        for key in describe() {
            let table = if key.table.is_empty() {
                String::new()
            } else {
                assert_eq!(at(&format!("/properties/{}/additionalProperties", key.table)), false);
                format!("/properties/{}", key.table)
            };
            let description = at(&format!("{table}/properties/{}/description", key.key));
            assert!(description.as_str().unwrap().ends_with('.'), "{}.{}", key.table, key.key);
        }
        assert_eq!(at("/additionalProperties"), false);
        let special = "/properties/service/additionalProperties";
        assert!(at(&format!("{special}/properties/limits/properties/memory")).is_object());
        assert!(schema.pointer(&format!("{special}/properties/mode")).is_none());
    }
}
