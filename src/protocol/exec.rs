//! `protocol = "exec"`: argv, environment and stdin in, stdout out.

use bytes::Bytes;
use prost::Message as _;

use super::json;
use crate::{
    artifact::elf::Executable,
    call::{Call, INPUT_DATA_MAX},
    policy::{Argv, OutputFormat, Policy},
    wire,
};

const STATUS_TYPE: &str = "type.googleapis.com/collector.Status";
const BYTES_TYPE: &str = "type.googleapis.com/google.protobuf.BytesValue";

/// argv, complete.
#[must_use]
pub fn argv(call: &Call, style: Argv, executable: &Executable) -> Vec<String> {
    let mut argv = super::command(executable);
    if style == Argv::Collector {
        argv.extend([
            call.namespace.to_string(),
            call.service.to_string(),
            call.method.to_string(),
        ]);
    }
    argv.extend(call.args.iter().cloned());
    argv
}

/// The environment, complete: the policy's, then the call's, then ours, each
/// over the one before.
#[must_use]
pub fn environment(call: &Call, policy: &Policy) -> Vec<(String, String)> {
    let mut environment = policy.environment.clone();
    environment.extend(call.env.clone());
    let type_url = call.input.as_ref().map_or("", |input| &input.type_url);
    let mut set = |name: &str, value: String| environment.insert(name.to_owned(), value);
    set("DISPATCHER_NAMESPACE", call.namespace.to_string());
    set("DISPATCHER_SERVICE", call.service.to_string());
    set("DISPATCHER_METHOD", call.method.to_string());
    set("DISPATCHER_INPUT_TYPE", type_url.to_owned());
    let data = match &call.input {
        None => Some("{}".to_owned()),
        Some(input) => json::render(input, INPUT_DATA_MAX),
    };
    match data {
        Some(data) => set("GRPC_INPUT_DATA", data),
        None => environment.remove("GRPC_INPUT_DATA"),
    };
    environment.into_iter().collect()
}

/// Standard input: the message as it came.
#[must_use]
pub fn stdin(call: &Call) -> Bytes {
    call.input.as_ref().map(|input| input.value.clone()).unwrap_or_default()
}

/// Makes `output` of stdout; `false` where it was to be a serialized Any and isn't.
#[must_use]
pub fn output(stdout: &Bytes, format: OutputFormat) -> (prost_types::Any, bool) {
    match format {
        OutputFormat::Status => match std::str::from_utf8(stdout) {
            Ok(message) => (status(message), true),
            Err(_) => (bytes_value(stdout), true),
        },
        OutputFormat::Bytes => (bytes_value(stdout), true),
        OutputFormat::Any => match any(stdout) {
            Some(any) => (any, true),
            None => (bytes_value(stdout), false),
        },
    }
}

fn status(message: &str) -> prost_types::Any {
    let status = wire::Status { message: message.to_owned(), ..wire::Status::default() };
    prost_types::Any { type_url: STATUS_TYPE.to_owned(), value: status.encode_to_vec() }
}

pub(super) fn bytes_value(stdout: &Bytes) -> prost_types::Any {
    prost_types::Any { type_url: BYTES_TYPE.to_owned(), value: stdout.encode_to_vec() }
}

/// An Any that says nothing of its type is taken for something else.
fn any(stdout: &Bytes) -> Option<prost_types::Any> {
    let any = prost_types::Any::decode(stdout.clone()).ok()?;
    (stdout.is_empty() || !any.type_url.is_empty()).then_some(any)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{call::Input, testing};

    #[test]
    fn argv_has_the_name_and_the_arguments() {
        let mut call = testing::call();
        call.args = vec!["-v".into(), String::new()];
        let argv = |style, executable| argv(&call, style, executable);
        assert_eq!(
            argv(Argv::Collector, &Executable::Static),
            ["service", "demo", "greeter", "SayHello", "-v", ""]
        );
        assert_eq!(argv(Argv::Plain, &Executable::Static), ["service", "-v", ""]);
        let script = Executable::Script {
            interpreter: "/usr/bin/python3".into(),
            argument: Some("-u".into()),
        };
        assert_eq!(
            argv(Argv::Plain, &script),
            ["/usr/bin/python3", "-u", "/run/dispatcher/service", "-v", ""]
        );
    }

    fn variables(call: &Call) -> std::collections::BTreeMap<String, String> {
        environment(call, &testing::policy("demo")).into_iter().collect()
    }

    #[test]
    fn the_environment_has_the_policys_the_calls_and_ours() {
        let mut call = testing::call();
        call.env.insert("HOME".into(), "/elsewhere".into());
        call.env.insert("DISPATCHER_METHOD".into(), "forged".into());
        call.input = Some(Input {
            type_url: "type.googleapis.com/google.protobuf.StringValue".into(),
            value: "hi".to_owned().encode_to_vec().into(),
        });
        let variables = variables(&call);
        assert_eq!(variables["LANG"], "C.UTF-8");
        assert_eq!(variables["HOME"], "/elsewhere");
        assert_eq!(variables["DISPATCHER_NAMESPACE"], "demo");
        assert_eq!(variables["DISPATCHER_SERVICE"], "greeter");
        assert_eq!(variables["DISPATCHER_METHOD"], "SayHello");
        assert!(variables["DISPATCHER_INPUT_TYPE"].ends_with("StringValue"));
        assert!(variables["GRPC_INPUT_DATA"].contains("\"hi\""));
    }

    #[test]
    fn input_data_is_empty_braces_without_input_and_absent_where_it_does_not_fit() {
        let mut call = testing::call();
        assert_eq!(variables(&call)["GRPC_INPUT_DATA"], "{}");
        assert_eq!(variables(&call)["DISPATCHER_INPUT_TYPE"], "");
        assert!(stdin(&call).is_empty());
        let value = Bytes::from(vec![0; INPUT_DATA_MAX]);
        call.input = Some(Input { type_url: "x/y.Z".into(), value: value.clone() });
        call.env.insert("GRPC_INPUT_DATA".into(), "forged".into());
        assert!(!variables(&call).contains_key("GRPC_INPUT_DATA"));
        assert_eq!(stdin(&call), value);
    }

    #[test]
    fn stdout_becomes_output() {
        let of = |stdout: &[u8], format| output(&Bytes::copy_from_slice(stdout), format);
        let (any, fine) = of(b"hello", OutputFormat::Status);
        let status = wire::Status::decode(&any.value[..]).unwrap();
        assert_eq!((any.type_url.as_str(), status.message.as_str()), (STATUS_TYPE, "hello"));
        assert!(fine);

        for format in [OutputFormat::Status, OutputFormat::Bytes, OutputFormat::Any] {
            let (any, fine) = of(b"\xff\xfe", format);
            assert_eq!(any.type_url, BYTES_TYPE);
            assert_eq!(Vec::<u8>::decode(&any.value[..]).unwrap(), b"\xff\xfe");
            assert_eq!(fine, format != OutputFormat::Any);
        }

        let inner = status_any();
        assert_eq!(of(&inner.encode_to_vec(), OutputFormat::Any), (inner, true));
        assert_eq!(of(b"", OutputFormat::Any), (prost_types::Any::default(), true));
        // Field 2 alone: decodes, but has no type.
        assert!(!of(b"\x12\x01x", OutputFormat::Any).1);
    }

    fn status_any() -> prost_types::Any {
        super::status("x")
    }
}
