//! What a method takes and gives, by the server's own reflection service, v1 or v1alpha.

use bytes::Bytes;
use http::HeaderMap;
use prost::Message as _;
use prost_types::{FileDescriptorProto, MethodDescriptorProto};
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
const ANSWER_MAX: u64 = 4 << 20;
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
            timeout: None,
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

fn methods_in(files: &[Vec<u8>], service: &str) -> Option<Vec<Method>> {
    files.iter().find_map(|bytes| {
        let file = FileDescriptorProto::decode(&bytes[..]).ok()?;
        let package = file.package().to_owned();
        let full = |name: &str| match package.as_str() {
            "" => name.to_owned(),
            package => format!("{package}.{name}"),
        };
        let found = file.service.into_iter().find(|found| full(found.name()) == service)?;
        Some(found.method.into_iter().filter_map(method).collect())
    })
}

/// `None` for one whose output has no believable name.
fn method(method: MethodDescriptorProto) -> Option<Method> {
    let streaming = method.client_streaming() || method.server_streaming();
    let output = method.output_type().trim_start_matches('.').to_owned();
    let legal = |c: u8| c.is_ascii_alphanumeric() || c == b'_' || c == b'.';
    let believable = !output.is_empty() && output.len() <= NAME_MAX && output.bytes().all(legal);
    believable.then(|| Method { name: method.name().to_owned(), output, streaming })
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost_types::ServiceDescriptorProto;

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
