//! Messages of the wire as canonical JSON, as grpcurl shows and takes it.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use prost::Message;
use prost_reflect::{DynamicMessage, MessageDescriptor};
use prost_types::Any;
use serde_json::{Value, json};

use crate::wire::{POOL, ServeRequest, ServeResponse};

/// The type that holds any other.
const ANY: &str = "google.protobuf.Any";

/// Why JSON text is not a message.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// The type isn't one that this program knows.
    #[error(
        "{0:?} is not a type known here; encode the message yourself and use --input with --input-type"
    )]
    UnknownType(String),
    /// The text says that it is of another type.
    #[error("the input's \"@type\" is {own:?}, and --input-type names {named:?}")]
    OtherType {
        /// By the flag.
        named: String,
        /// By the text.
        own: String,
    },
    /// The text doesn't fit the type.
    #[error("the input is not a {type_name} in JSON: {error}")]
    Malformed {
        /// Of which type it should be.
        type_name: String,
        /// Where and why it is not.
        error: serde_json::Error,
    },
}

/// A reply as JSON. An output of unknown type is shown as
/// `{"@type": URL, "@value": BASE64}`.
#[must_use]
pub fn response(response: &ServeResponse) -> Value {
    let (known, output) = split_any(response.output.as_ref());
    let mut value =
        to_json("collector.ServeResponse", &ServeResponse { output: known, ..response.clone() });
    if let (Some(output), Some(object)) = (output, value.as_object_mut()) {
        object.insert("output".into(), output);
    }
    value
}

/// A request as JSON, for `grpcurl -d @`. There an Any can only be said whose
/// type both sides know: so the input becomes `options.inputBytes` and
/// `options.inputType`, which mean the same.
#[must_use]
pub fn request(request: &ServeRequest) -> Value {
    let mut request = request.clone();
    if let Some(input) = request.input.take() {
        let options = request.options.get_or_insert_default();
        options.input_bytes = input.value.into();
        options.input_type = input.type_url;
    }
    to_json("collector.ServeRequest", &request)
}

/// The report of a reply as JSON, and beside its fields the reply's `status` and
/// `output`.
#[must_use]
pub fn report(reply: &ServeResponse) -> Value {
    let mut reply = response(reply);
    let mut report = reply["report"].take();
    if report.is_null() {
        report = json!({});
    }
    for key in ["status", "output"] {
        if reply.get(key).is_some() {
            report[key] = reply[key].take();
        }
    }
    report
}

/// The type URL for a type that is named by its URL or by its name alone.
#[must_use]
pub fn type_url(named: &str) -> String {
    if named.contains('/') { named.to_owned() } else { format!("type.googleapis.com/{named}") }
}

/// The type that JSON text names by itself: its `@type`.
#[must_use]
pub fn own_type(text: &str) -> Option<String> {
    let value: Value = serde_json::from_str(text).ok()?;
    value.get("@type")?.as_str().map(str::to_owned)
}

/// Encodes JSON text as a message of the type that a URL names. Text that
/// repeats its type as `@type` is read as the JSON of an Any.
///
/// # Errors
/// [`JsonError`].
pub fn encode(type_url: &str, text: &str) -> Result<Vec<u8>, JsonError> {
    let name = type_url.rsplit('/').next().unwrap_or_default();
    let unknown = || JsonError::UnknownType(name.to_owned());
    let malformed = |error| JsonError::Malformed { type_name: name.to_owned(), error };
    let descriptor = POOL.get_message_by_name(name).ok_or_else(unknown)?;
    if let Some(own) = own_type(text) {
        if own.rsplit('/').next() != Some(name) {
            return Err(JsonError::OtherType { named: name.to_owned(), own });
        }
        let any = POOL.get_message_by_name(ANY).ok_or_else(unknown)?;
        let bytes = read(any, text).map_err(malformed)?;
        return Any::decode(bytes.as_slice())
            .map(|any| any.value)
            .map_err(|error| malformed(serde::de::Error::custom(error)));
    }
    read(descriptor, text).map_err(malformed)
}

fn read(descriptor: MessageDescriptor, text: &str) -> Result<Vec<u8>, serde_json::Error> {
    let mut reader = serde_json::Deserializer::from_str(text);
    let message = DynamicMessage::deserialize(descriptor, &mut reader)?;
    reader.end()?;
    Ok(message.encode_to_vec())
}

fn split_any(any: Option<&Any>) -> (Option<Any>, Option<Value>) {
    match any {
        Some(any) if !is_known(any) => {
            let value = json!({ "@type": any.type_url, "@value": STANDARD.encode(&any.value) });
            (None, Some(value))
        }
        other => (other.cloned(), None),
    }
}

fn is_known(any: &Any) -> bool {
    let mut message =
        DynamicMessage::new(POOL.get_message_by_name(ANY).expect("a well-known type"));
    let bytes = any.encode_to_vec();
    message.merge(bytes.as_slice()).is_ok() && serde_json::to_value(&message).is_ok()
}

/// `name` is one of the wire's own messages, whose Anys are known.
fn to_json(name: &str, message: &impl Message) -> Value {
    let descriptor = POOL.get_message_by_name(name).expect("a message of the wire");
    DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .ok()
        .and_then(|message| serde_json::to_value(message).ok())
        .unwrap_or(Value::Null)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire;

    #[test]
    fn outputs_of_any_type_can_be_shown() {
        let any =
            |type_url: &str, value: &[u8]| Any { type_url: type_url.into(), value: value.to_vec() };
        let status = wire::Status { message: "hello".into(), ..Default::default() };
        let known = any("type.googleapis.com/collector.Status", &status.encode_to_vec());
        let shown = response(&ServeResponse { output: Some(known), ..Default::default() });
        assert_eq!(shown["output"]["message"], "hello");
        let unknown = any("type.googleapis.com/acme.Thing", b"\x01\x02");
        let shown = response(&ServeResponse { output: Some(unknown), ..Default::default() });
        assert_eq!(
            shown["output"],
            json!({"@type": "type.googleapis.com/acme.Thing", "@value": "AQI="})
        );
    }

    #[test]
    fn json_input_is_encoded_by_its_type_or_refused() {
        let bytes = encode("type.googleapis.com/google.protobuf.StringValue", "\"hi\"").unwrap();
        assert_eq!(bytes, b"\x0a\x02hi");
        assert!(matches!(encode("acme.Thing", "{}"), Err(JsonError::UnknownType(_))));
        assert!(matches!(
            encode("collector.Status", "{\"x\": 1}"),
            Err(JsonError::Malformed { .. })
        ));
        assert!(matches!(
            encode("collector.Status", "{} trailing"),
            Err(JsonError::Malformed { .. })
        ));
    }

    #[test]
    fn json_that_names_its_type_is_read_by_it() {
        let text = r#"{"@type": "type.googleapis.com/collector.Status", "message": "hi"}"#;
        let url = own_type(text).unwrap();
        let status = wire::Status { message: "hi".into(), ..Default::default() };
        assert_eq!(encode(&url, text).unwrap(), status.encode_to_vec());
        let other = encode("google.protobuf.StringValue", text);
        assert!(matches!(other, Err(JsonError::OtherType { .. })), "{other:?}");
        assert_eq!(own_type("{}"), None);
        assert_eq!(own_type("[1"), None);
        assert_eq!(type_url("a.B"), "type.googleapis.com/a.B");
        assert_eq!(type_url("example.com/a.B"), "example.com/a.B");
    }

    #[test]
    fn a_requests_input_is_said_in_bytes() {
        let input = Any { type_url: "x/a.B".into(), value: b"\x01\x02".to_vec() };
        let shown = request(&ServeRequest { input: Some(input), ..Default::default() });
        assert_eq!(shown["options"]["inputType"], "x/a.B");
        assert_eq!(shown["options"]["inputBytes"], "AQI=");
        assert!(shown.get("input").is_none());
    }

    #[test]
    fn a_report_has_status_and_output_beside_it() {
        let details = [("reason".to_owned(), "exit_nonzero".to_owned())].into();
        let reply = ServeResponse {
            status: Some(wire::Status { code: 2, details, ..Default::default() }),
            report: Some(wire::ExecutionReport { exit_code: 3, ..Default::default() }),
            ..Default::default()
        };
        let shown = report(&reply);
        assert_eq!(shown["exitCode"], 3);
        assert_eq!(shown["status"]["details"]["reason"], "exit_nonzero");
        assert_eq!(report(&ServeResponse::default())["output"], Value::Null);
    }
}
