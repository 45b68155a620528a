//! Names and values of environment variables.

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};

use super::super::{
    fault::{At, Fault},
    kinds::{Kind, Shown, Text, Wrong, toml_string},
    read::Item,
};

/// The name of an environment variable that a policy or a call may set.
pub struct VariableName;

impl Text for VariableName {
    type Value = String;
    const WHAT: &'static str = "the name of an environment variable";
    const HELP: &'static str = "write letters, digits and _, no digit first";

    fn parse(text: &str) -> Result<String, Wrong> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if text.is_empty()
            || !text.chars().all(plain)
            || text.starts_with(|c: char| c.is_ascii_digit())
        {
            return Err(Wrong::is_not(text, Self::WHAT, Self::HELP));
        }
        if is_reserved_variable(text) {
            let message = format!("has {text:?}, which the dispatcher sets by itself");
            return Err(Wrong::new(message, "leave it out"));
        }
        Ok(text.to_owned())
    }

    fn show(value: &String) -> String {
        value.clone()
    }

    fn pattern() -> Option<&'static str> {
        Some("^[A-Za-z_][A-Za-z0-9_]*$")
    }
}

/// Whether a variable is the dispatcher's to set, not a policy's or a request's.
#[must_use]
pub fn is_reserved_variable(name: &str) -> bool {
    name.starts_with("DISPATCHER_")
        || name.starts_with("LISTEN_")
        || matches!(name, "GRPC_INPUT_DATA" | "GRPC_UNIX_SOCKET")
}

/// `[environment] set`: merged key by key.
pub struct Variables;

impl Kind for Variables {
    type Value = BTreeMap<String, At<String>>;

    fn read(item: &Item<'_>, faults: &mut Vec<Fault>) -> Option<Self::Value> {
        if !item.is_table() {
            faults.push(item.wrong("a table", "write set = { NAME = \"value\" }"));
            return None;
        }
        let mut whole = true;
        let variables = item.table(faults, |table, faults| {
            let mut variables = BTreeMap::new();
            for (name, value) in table.take_all() {
                let checked = VariableName::parse(name.value).map_err(|wrong| {
                    let message = format!("{} {}", item.key(), wrong.message);
                    faults.push(Fault::new(&name.place, message, wrong.help));
                });
                match (checked, VariableValue::read(&value, faults)) {
                    (Ok(name), Some(text)) => {
                        _ = variables.insert(name, At { value: text, place: value.place() });
                    }
                    _ => whole = false,
                }
            }
            variables
        })?;
        whole.then_some(variables)
    }

    fn inherit(given: &Self::Value, inherited: &Self::Value) -> Self::Value {
        let mut merged = inherited.clone();
        merged.extend(given.clone());
        merged
    }

    fn show(value: &Self::Value) -> Shown {
        let show = |(name, item): (&String, &At<String>)| {
            (name.clone(), At { value: toml_string(&item.value), place: item.place.clone() })
        };
        Shown::Map(value.iter().map(show).collect())
    }

    fn schema() -> Json {
        json!({
            "type": "object",
            "propertyNames": {
                "pattern": "^[A-Za-z_][A-Za-z0-9_]*$",
                "not": { "pattern": "^(DISPATCHER_|LISTEN_|GRPC_INPUT_DATA$|GRPC_UNIX_SOCKET$)" },
            },
            "additionalProperties": { "type": "string" },
        })
    }
}

/// Any text.
struct VariableValue;

impl Text for VariableValue {
    type Value = String;
    const WHAT: &'static str = "a text";
    const HELP: &'static str = "write it in quotes";

    fn parse(text: &str) -> Result<String, Wrong> {
        Ok(text.to_owned())
    }

    fn show(value: &String) -> String {
        value.clone()
    }
}
