//! What a method takes and gives, by the server's own reflection service, v1 or v1alpha.

use bytes::Bytes;
use http::HeaderMap;
use prost::Message as _;
use tonic_reflection::pb::{v1, v1alpha};

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
/// Methods of a service that are believed.
const METHODS_MAX: usize = 1024;
/// Bytes of a type's name that are believed.
const NAME_MAX: usize = 512;

/// One method of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Method {
    /// Its name.
    pub name: String,
    /// Full name of the message that it answers with.
    pub output: String,
    /// Whether either side sends more than one message.
    pub streaming: bool,
}

/// Asks for a service's methods; `None` where the server doesn't tell.
///
/// # Errors
/// A connection that was lost.
pub async fn methods(
    connection: &Connection,
    service: &str,
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
                let files = match reflection == SERVICES[0] {
                    true => files_of_v1(answer.message),
                    false => files_of_v1alpha(answer.message),
                };
                if let Some(files) = files {
                    return Ok(methods_in(&files, service));
                }
            }
            Err(lost @ CallFailure::Lost { .. }) => return Err(lost),
            // It has no such service, or makes nothing of it.
            Ok(_) | Err(_) => {}
        }
    }
    Ok(None)
}

fn files_of_v1(answer: Bytes) -> Option<Vec<Vec<u8>>> {
    use v1::server_reflection_response::MessageResponse;
    match v1::ServerReflectionResponse::decode(answer).ok()?.message_response? {
        MessageResponse::FileDescriptorResponse(files) => Some(files.file_descriptor_proto),
        _ => None,
    }
}

fn files_of_v1alpha(answer: Bytes) -> Option<Vec<Vec<u8>>> {
    use v1alpha::server_reflection_response::MessageResponse;
    match v1alpha::ServerReflectionResponse::decode(answer).ok()?.message_response? {
        MessageResponse::FileDescriptorResponse(files) => Some(files.file_descriptor_proto),
        _ => None,
    }
}

/// Of a `google.protobuf.FileDescriptorProto`, what is asked for here. The rest isn't even
/// taken apart: a few bytes of it can stand for much memory.
#[derive(Clone, PartialEq, prost::Message)]
struct File {
    #[prost(string, tag = "2")]
    package: String,
    #[prost(message, repeated, tag = "6")]
    services: Vec<Service>,
}

/// Of a `ServiceDescriptorProto`.
#[derive(Clone, PartialEq, prost::Message)]
struct Service {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "2")]
    methods: Vec<Described>,
}

/// Of a `MethodDescriptorProto`.
#[derive(Clone, PartialEq, prost::Message)]
struct Described {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "3")]
    output: String,
    #[prost(bool, tag = "5")]
    client_streaming: bool,
    #[prost(bool, tag = "6")]
    server_streaming: bool,
}

fn methods_in(files: &[Vec<u8>], service: &str) -> Option<Vec<Method>> {
    files.iter().find_map(|bytes| {
        let File { package, services } = File::decode(&bytes[..]).ok()?;
        let full = |name: &str| match package.as_str() {
            "" => name.to_owned(),
            package => format!("{package}.{name}"),
        };
        let found = services.into_iter().find(|found| full(&found.name) == service)?;
        Some(found.methods.into_iter().take(METHODS_MAX).filter_map(method).collect())
    })
}

/// `None` for one whose name or output can't be believed.
fn method(described: Described) -> Option<Method> {
    let streaming = described.client_streaming || described.server_streaming;
    let output = described.output.strip_prefix('.').unwrap_or(&described.output).to_owned();
    let legal = |c: u8| c.is_ascii_alphanumeric() || c == b'_' || c == b'.';
    let believable =
        |name: &str| !name.is_empty() && name.len() <= NAME_MAX && name.bytes().all(legal);
    let believed = believable(&described.name) && believable(&output);
    believed.then_some(Method { name: described.name, output, streaming })
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost_types::{FileDescriptorProto, MethodDescriptorProto, ServiceDescriptorProto};

    #[test]
    fn what_is_not_asked_for_is_not_taken_apart() {
        // A million empty messages, two bytes each.
        let mut file = [0x22, 0].repeat(1 << 20);
        file.extend(
            File { package: "a".into(), services: vec![Service::default()] }.encode_to_vec(),
        );
        let decoded = File::decode(&file[..]).unwrap();
        assert_eq!((decoded.package.as_str(), decoded.services.len()), ("a", 1));
    }

    #[test]
    fn methods_are_found_by_the_services_full_name() {
        let method = |name: &str, output: &str, streams: bool| MethodDescriptorProto {
            name: Some(name.into()),
            output_type: Some(output.into()),
            server_streaming: Some(streams),
            ..Default::default()
        };
        let file = |package: Option<&str>| {
            let service = ServiceDescriptorProto {
                name: Some("Greeter".into()),
                method: vec![
                    method("SayHello", ".a.Reply", false),
                    method("Watch", ".a.Reply", true),
                    method("Lie", "x y", false),
                ],
                ..Default::default()
            };
            let package = package.map(str::to_owned);
            FileDescriptorProto { package, service: vec![service], ..Default::default() }
                .encode_to_vec()
        };
        let expected = |name: &str, streaming| Method {
            name: name.to_owned(),
            output: "a.Reply".to_owned(),
            streaming,
        };
        let both = Some(vec![expected("SayHello", false), expected("Watch", true)]);
        let files = [b"nonsense".to_vec(), file(None), file(Some("a"))];
        assert_eq!(methods_in(&files, "a.Greeter"), both);
        assert_eq!(methods_in(&files, "Greeter"), both);
        assert_eq!(methods_in(&files, "b.Greeter"), None);
    }
}
