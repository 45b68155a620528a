//! What a method takes and gives, by the server's own reflection service, v1 or v1alpha.
//!
//! An answer is walked through where it lies, and only what is kept is taken out of it: a few
//! bytes of it can stand for much memory, once they are taken apart.

use bytes::{Buf as _, Bytes};
use http::HeaderMap;
use prost::{
    Message as _,
    encoding::{WireType, decode_key, decode_varint},
};
use tonic_reflection::pb::v1;

use super::{
    connection::Connection,
    unary::{CallFailure, Unary},
};

/// The method of the reflection services.
const METHOD: &str = "ServerReflectionInfo";
/// In the order in which they are tried.
const SERVICES: [&str; 2] =
    ["grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"];

/// Bytes of an answer: descriptors of one file and what it depends on.
const ANSWER_MAX: u64 = 1 << 20;
/// Bytes of memory that are kept of an answer.
pub const KEPT_MAX: usize = 64 << 10;
/// Bytes of a type's name that are believed.
const NAME_MAX: usize = 512;

/// One method of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Method {
    /// Its name.
    pub name: Box<str>,
    /// Full name of the message that it answers with.
    pub output: Box<str>,
    /// Whether either side sends more than one message.
    pub streaming: bool,
}

impl Method {
    /// Bytes of memory that it takes, those of the allocator included.
    #[must_use]
    pub fn size(&self) -> usize {
        const ALLOCATION: usize = 24;
        size_of::<Self>() + 2 * ALLOCATION + self.name.len() + self.output.len()
    }
}

/// Asks for a service's methods: the one called `first`, and as many others as
/// [`KEPT_MAX`] has room for; `None` where the server doesn't tell.
///
/// # Errors
/// A connection that was lost.
pub async fn methods(
    connection: &Connection,
    service: &str,
    first: &str,
) -> Result<Option<Vec<Method>>, CallFailure> {
    // Both versions have the same messages: a question by symbol, and files.
    let symbol = v1::server_reflection_request::MessageRequest::FileContainingSymbol;
    let question = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(symbol(service.to_owned())),
    };
    let message = Bytes::from(question.encode_to_vec());
    for reflection in SERVICES {
        let call = Unary {
            service: reflection.to_owned(),
            method: METHOD.to_owned(),
            message: message.clone(),
            metadata: HeaderMap::new(),
            end_by: None,
            limit: ANSWER_MAX,
        };
        match connection.unary(&call).await {
            Ok(answer) if answer.status.code == 0 => {
                if answered_with_files(&answer.message) {
                    return Ok(methods_in(&answer.message, service, first));
                }
            }
            Err(lost @ CallFailure::Lost { .. }) => return Err(lost),
            // It has no such service, or makes nothing of it.
            Ok(_) | Err(_) => {}
        }
    }
    Ok(None)
}

/// Numbers of fields: of a `ServerReflectionResponse`, in both versions, and of the
/// `FileDescriptorResponse` in it.
const FILES: u32 = 4;
const FILE: u32 = 1;
/// Of a `google.protobuf.FileDescriptorProto`.
const PACKAGE: u32 = 2;
const SERVICE: u32 = 6;
/// Of a `ServiceDescriptorProto` and a `MethodDescriptorProto`.
const NAME: u32 = 1;
const METHODS: u32 = 2;
const OUTPUT: u32 = 3;
const CLIENT_STREAMING: u32 = 5;
const SERVER_STREAMING: u32 = 6;

/// One field's value, as far as it is of interest here.
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Other,
}

/// The fields of a serialized message, up to what is none.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = (u32, Value<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let (number, kind) = decode_key(&mut self.0).ok()?;
        let mut fixed = |length: usize| {
            let is_whole = self.0.len() >= length;
            is_whole.then(|| self.0.advance(length)).map(|()| Value::Other)
        };
        let value = match kind {
            WireType::Varint => Value::Number(decode_varint(&mut self.0).ok()?),
            WireType::LengthDelimited => {
                let length = usize::try_from(decode_varint(&mut self.0).ok()?).ok()?;
                let (bytes, rest) = self.0.split_at_checked(length)?;
                self.0 = rest;
                Value::Bytes(bytes)
            }
            WireType::ThirtyTwoBit => fixed(4)?,
            WireType::SixtyFourBit => fixed(8)?,
            // No descriptor has any.
            WireType::StartGroup | WireType::EndGroup => return None,
        };
        Some((number, value))
    }
}

/// Messages and strings of that number.
fn bytes_of(message: &[u8], number: u32) -> impl Iterator<Item = &[u8]> {
    Fields(message).filter_map(move |field| match field {
        (found, Value::Bytes(bytes)) if found == number => Some(bytes),
        _ => None,
    })
}

fn is_set(message: &[u8], number: u32) -> bool {
    Fields(message).any(|field| matches!(field, (found, Value::Number(1..)) if found == number))
}

fn answered_with_files(answer: &[u8]) -> bool {
    bytes_of(answer, FILES).next().is_some()
}

fn methods_in(answer: &[u8], service: &str, first: &str) -> Option<Vec<Method>> {
    let files = bytes_of(answer, FILES).flat_map(|files| bytes_of(files, FILE));
    let mut services = files.flat_map(|file| {
        let package = bytes_of(file, PACKAGE).last().unwrap_or_default();
        bytes_of(file, SERVICE).map(move |found| (package, found))
    });
    let (_, found) = services.find(|(package, found)| {
        let name = bytes_of(found, NAME).last().unwrap_or_default();
        is_full_name(service.as_bytes(), package, name)
    })?;
    let is_first = |described: &&[u8]| {
        bytes_of(described, NAME).last().unwrap_or_default() == first.as_bytes()
    };
    let described = || bytes_of(found, METHODS);
    let ordered = described().find(is_first).into_iter();
    let ordered = ordered.chain(described().filter(|described| !is_first(described)));
    let mut room = KEPT_MAX;
    let kept = ordered.filter_map(method).map_while(|method| {
        room = room.checked_sub(method.size())?;
        Some(method)
    });
    Some(kept.collect())
}

/// Whether `full` is `package.name`, or `name` where there is no package.
fn is_full_name(full: &[u8], package: &[u8], name: &[u8]) -> bool {
    match package {
        [] => full == name,
        package => full
            .strip_prefix(package)
            .and_then(|rest| rest.strip_prefix(b"."))
            .is_some_and(|rest| rest == name),
    }
}

/// `None` for one whose name or output can't be believed.
fn method(described: &[u8]) -> Option<Method> {
    let legal = |c: u8| c.is_ascii_alphanumeric() || c == b'_' || c == b'.';
    let believed = |name: &[u8]| {
        let believable =
            !name.is_empty() && name.len() <= NAME_MAX && name.iter().copied().all(legal);
        believable.then(|| String::from_utf8_lossy(name).into_owned().into_boxed_str())
    };
    let name = bytes_of(described, NAME).last()?;
    let output = bytes_of(described, OUTPUT).last()?;
    Some(Method {
        name: believed(name)?,
        output: believed(output.strip_prefix(b".").unwrap_or(output))?,
        streaming: is_set(described, CLIENT_STREAMING) || is_set(described, SERVER_STREAMING),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost_types::{FileDescriptorProto, MethodDescriptorProto, ServiceDescriptorProto};

    /// A reflection service's answer with these files.
    fn answer(files: Vec<Vec<u8>>) -> Vec<u8> {
        let files = v1::FileDescriptorResponse { file_descriptor_proto: files };
        let files = v1::server_reflection_response::MessageResponse::FileDescriptorResponse(files);
        v1::ServerReflectionResponse { message_response: Some(files), ..Default::default() }
            .encode_to_vec()
    }

    fn described(name: &str, output: &str, streams: bool) -> MethodDescriptorProto {
        MethodDescriptorProto {
            name: Some(name.into()),
            output_type: Some(output.into()),
            server_streaming: Some(streams),
            ..Default::default()
        }
    }

    fn file(package: Option<&str>, method: Vec<MethodDescriptorProto>) -> Vec<u8> {
        let service =
            ServiceDescriptorProto { name: Some("Greeter".into()), method, ..Default::default() };
        let package = package.map(str::to_owned);
        FileDescriptorProto { package, service: vec![service], ..Default::default() }
            .encode_to_vec()
    }

    #[test]
    fn methods_are_found_by_the_services_full_name() {
        let file = |package: Option<&str>| {
            let methods = [("SayHello", ".a.Reply", false), ("Watch", ".a.Reply", true)];
            let methods = methods.into_iter().chain([("Lie", "x y", false)]);
            file(
                package,
                methods.map(|(name, output, streams)| described(name, output, streams)).collect(),
            )
        };
        let expected = |name: &str, streaming| Method {
            name: name.into(),
            output: "a.Reply".into(),
            streaming,
        };
        let files = answer(vec![b"nonsense".to_vec(), file(None), file(Some("a"))]);
        for service in ["a.Greeter", "Greeter"] {
            let [hello, watch] = [expected("SayHello", false), expected("Watch", true)];
            let found = methods_in(&files, service, "SayHello");
            assert_eq!(found, Some(vec![hello.clone(), watch.clone()]));
            assert_eq!(methods_in(&files, service, "Watch"), Some(vec![watch, hello]));
        }
        for other in ["b.Greeter", "a.b.Greeter", "aGreeter", "a.", ""] {
            assert_eq!(methods_in(&files, other, "SayHello"), None, "{other}");
        }
        assert!(answered_with_files(&files) && !answered_with_files(b"\x3a\x00"));
    }

    /// However much it tells, little is kept; and what is called first of all.
    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        let name = |number: usize| format!("{number:0>500}");
        let output = format!(".a.{}", "R".repeat(500));
        let methods = (0..1000).map(|number| described(&name(number), &output, false));
        let files = answer(vec![file(Some("a"), methods.collect())]);
        let kept = methods_in(&files, "a.Greeter", &name(999)).unwrap();
        let bytes: usize = kept.iter().map(Method::size).sum();
        assert!((KEPT_MAX - 2048..=KEPT_MAX).contains(&bytes), "{bytes}");
        assert_eq!((*kept[0].name).to_owned(), name(999));
        assert_eq!((*kept[1].name).to_owned(), name(0));
    }

    #[test]
    fn what_is_cut_short_is_read_as_far_as_it_goes() {
        let methods = vec![described("SayHello", ".a.Reply", false)];
        let files = answer(vec![file(Some("a"), methods)]);
        assert_eq!(methods_in(&files, "a.Greeter", "").unwrap().len(), 1);
        for length in 0..files.len() {
            assert_eq!(methods_in(&files[..length], "a.Greeter", ""), None, "{length}");
        }
        // Groups, lengths beyond the end, and what is not even a number.
        for nonsense in
            [&b"\x23\x24"[..], b"\x22\x7f", b"\x22\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"]
        {
            assert_eq!(methods_in(nonsense, "a.Greeter", ""), None);
        }
    }
}
