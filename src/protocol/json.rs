//! An Any as canonical JSON, for programs that would rather not decode messages.

use std::io;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use prost_reflect::{DynamicMessage, ReflectMessage as _, SerializeOptions, Value};
use serde_json::json;

use crate::{call::Input, wire::POOL};

/// Inputs larger than this are not decoded: their JSON would hardly be smaller
/// than what fits, and decoding takes many times their size.
const DECODE_MAX: usize = 256 << 10;

/// How deep an Any may sit within another. Each level costs stack.
const ANY_DEPTH_MAX: u8 = 16;

const ANY: &str = "google.protobuf.Any";

/// Renders an input as JSON of at most `limit` bytes; `None` if it doesn't fit.
///
/// Canonical where the type is known, the value decodes as it, and JSON has a
/// form for it, else `{"@type": URL, "@value": BASE64}`.
pub(super) fn render(input: &Input, limit: usize) -> Option<String> {
    if let Some(message) = decode(input) {
        match write(&message, limit) {
            Ok(text) => return Some(text),
            Err(error) if error.is_io() => return None,
            // Such as a Timestamp beyond the year 9999.
            Err(_) => {}
        }
    }
    // Base64 takes four bytes for three: no need to try with what can't fit.
    if input.value.len() > limit / 4 * 3 {
        return None;
    }
    let text = json!({ "@type": input.type_url, "@value": STANDARD.encode(&input.value) });
    Some(text.to_string()).filter(|text| text.len() <= limit)
}

/// The input as an Any whose content is known all the way down.
fn decode(input: &Input) -> Option<DynamicMessage> {
    if input.value.len() > DECODE_MAX || !known(&input.type_url, &input.value, ANY_DEPTH_MAX) {
        return None;
    }
    let mut any = DynamicMessage::new(POOL.get_message_by_name(ANY)?);
    any.set_field_by_name("type_url", Value::String(input.type_url.clone()));
    any.set_field_by_name("value", Value::Bytes(input.value.clone()));
    Some(any)
}

/// Whether a value decodes as its type, and every Any within it as well, none
/// of them too deep.
fn known(type_url: &str, value: &[u8], depth: u8) -> bool {
    let Some(depth) = depth.checked_sub(1) else { return false };
    let Some((_, name)) = type_url.rsplit_once('/') else { return false };
    let Some(descriptor) = POOL.get_message_by_name(name) else { return false };
    DynamicMessage::decode(descriptor, value).is_ok_and(|message| all_known(&message, depth))
}

/// Recurses as deep as the decoder lets messages nest, which is bounded.
fn all_known(message: &DynamicMessage, depth: u8) -> bool {
    if message.descriptor().full_name() == ANY {
        let type_url = message.get_field_by_name("type_url");
        let value = message.get_field_by_name("value");
        return match (type_url.as_deref(), value.as_deref()) {
            (Some(Value::String(url)), Some(Value::Bytes(value))) => {
                (url.is_empty() && value.is_empty()) || known(url, value, depth)
            }
            _ => false,
        };
    }
    message.fields().all(|(_, value)| value_known(value, depth))
}

fn value_known(value: &Value, depth: u8) -> bool {
    match value {
        Value::Message(message) => all_known(message, depth),
        Value::List(list) => list.iter().all(|value| value_known(value, depth)),
        Value::Map(map) => map.values().all(|value| value_known(value, depth)),
        _ => true,
    }
}

/// An error of the buffer's says that it doesn't fit, any other that it has no form.
fn write(message: &DynamicMessage, limit: usize) -> Result<String, serde_json::Error> {
    let mut buffer = Bounded { bytes: Vec::new(), limit };
    let mut serializer = serde_json::Serializer::new(&mut buffer);
    message.serialize_with_options(&mut serializer, &SerializeOptions::new())?;
    String::from_utf8(buffer.bytes).map_err(serde::ser::Error::custom)
}

/// Fails when more is written than fits.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire;
    use prost::Message as _;

    fn input(name: &str, value: impl Into<bytes::Bytes>) -> Input {
        Input { type_url: format!("type.googleapis.com/{name}"), value: value.into() }
    }

    fn rendered(input: &Input) -> serde_json::Value {
        serde_json::from_str(&render(input, 1000).unwrap()).unwrap()
    }

    #[test]
    fn known_types_are_canonical() {
        let text = input("google.protobuf.StringValue", "hi".to_owned().encode_to_vec());
        assert_eq!(
            rendered(&text),
            json!({ "@type": "type.googleapis.com/google.protobuf.StringValue", "value": "hi" })
        );
        let duration = prost_types::Duration { seconds: 1, nanos: 500_000_000 };
        let duration = input("google.protobuf.Duration", duration.encode_to_vec());
        assert_eq!(rendered(&duration)["value"], "1.500s");
        let name = wire::NamespacedName { namespace: "a".into(), name: "b".into() };
        let name = input("collector.NamespacedName", name.encode_to_vec());
        assert_eq!(
            rendered(&name),
            json!({
                "@type": "type.googleapis.com/collector.NamespacedName",
                "namespace": "a", "name": "b"
            })
        );
    }

    #[test]
    fn others_are_base64() {
        for other in [
            input("acme.Unknown", &b"\x01\x02"[..]),
            input("google.protobuf.StringValue", &b"\xff"[..]),
            Input { type_url: "no slash".into(), value: (&b"\x01\x02"[..]).into() },
            Input { type_url: String::new(), value: (&b"\x01\x02"[..]).into() },
        ] {
            let json = rendered(&other);
            assert_eq!(json["@type"], other.type_url);
            assert_eq!(json["@value"], STANDARD.encode(&other.value));
        }
    }

    #[test]
    fn what_json_has_no_form_for_is_base64() {
        let late = prost_types::Timestamp { seconds: 1 << 60, nanos: 0 };
        let late = input("google.protobuf.Timestamp", late.encode_to_vec());
        assert_eq!(rendered(&late)["@value"], STANDARD.encode(&late.value));
    }

    #[test]
    fn what_does_not_fit_is_left_out() {
        let long = input("google.protobuf.StringValue", "x".repeat(200).encode_to_vec());
        assert!(render(&long, 200).is_none());
        assert!(render(&long, 300).is_some());
        let unknown = input("acme.Unknown", vec![0; 150]);
        assert!(render(&unknown, 200).is_none());
        assert!(render(&unknown, 300).is_some());
        assert!(render(&input("google.protobuf.BytesValue", vec![0; 1 << 20]), 1000).is_none());
    }

    fn wrapped(levels: usize) -> Input {
        let mut any = prost_types::Any {
            type_url: "x/google.protobuf.StringValue".into(),
            value: "hi".to_owned().encode_to_vec(),
        };
        for _ in 0..levels {
            any = prost_types::Any {
                type_url: "x/google.protobuf.Any".into(),
                value: any.encode_to_vec(),
            };
        }
        Input { type_url: any.type_url, value: any.value.into() }
    }

    #[test]
    fn an_any_within_an_any_is_known_down_to_a_depth() {
        assert_eq!(rendered(&wrapped(1))["value"]["value"], "hi");
        assert!(rendered(&wrapped(3)).get("@value").is_none());
        assert!(render(&wrapped(40), 1 << 20).unwrap().contains("@value"));
        // Deep enough to exhaust any stack, if it were followed.
        assert!(render(&wrapped(2000), 1 << 20).unwrap().contains("@value"));
    }
}
