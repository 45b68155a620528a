//! Messages of the wire as canonical JSON, as grpcurl shows and takes it.

use std::sync::LazyLock;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage};
use prost_types::Any;
use serde_json::{Value, json};

use crate::wire::{self, ServeRequest, ServeResponse};

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    let mut pool = DescriptorPool::global();
    pool.decode_file_descriptor_set(wire::DESCRIPTORS)
        .expect("the descriptors are our own build's");
    pool
});

/// Why JSON text is not a message.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// The type isn't one that this program knows.
    #[error(
        "{0:?} is not a type known here; encode the message yourself and use --input with --input-type"
    )]
    UnknownType(String),
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

/// A request as JSON, for `grpcurl -d @`. An input of unknown type can't be
/// said there: it becomes `options.inputBytes` and `options.inputType`.
#[must_use]
pub fn request(request: &ServeRequest) -> Value {
    let mut request = request.clone();
    if let Some(input) = request.input.take_if(|any| !is_known(any)) {
        let options = request.options.get_or_insert_default();
        options.input_bytes = input.value.into();
        options.input_type = input.type_url;
    }
    to_json("collector.ServeRequest", &request)
}

/// A report as JSON, with the status that it goes with as `status`.
#[must_use]
pub fn report(report: &wire::ExecutionReport, status: &wire::Status) -> Value {
    let mut value = to_json("collector.ExecutionReport", report);
    if let Some(object) = value.as_object_mut() {
        object.insert("status".into(), to_json("collector.Status", status));
    }
    value
}

/// Encodes JSON text as a message of the type that a URL names.
///
/// # Errors
/// [`JsonError`].
pub fn encode(type_url: &str, text: &str) -> Result<Vec<u8>, JsonError> {
    let name = type_url.rsplit('/').next().unwrap_or_default();
    let descriptor =
        POOL.get_message_by_name(name).ok_or_else(|| JsonError::UnknownType(name.to_owned()))?;
    let mut reader = serde_json::Deserializer::from_str(text);
    DynamicMessage::deserialize(descriptor, &mut reader)
        .and_then(|message| reader.end().map(|()| message.encode_to_vec()))
        .map_err(|error| JsonError::Malformed { type_name: name.to_owned(), error })
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
    let mut message = DynamicMessage::new(
        POOL.get_message_by_name("google.protobuf.Any").expect("a well-known type"),
    );
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
}
