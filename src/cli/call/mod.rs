//! `dispatcher call`: one Serve call to a running service.
//!
//! The binary is named by its digest first; its bytes are sent only when the
//! service says that it doesn't hold them.

mod about;
mod address;
mod connect;

use std::{
    io::{self, IsTerminal as _, Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use bytes::Bytes;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use prost::Message as _;
use prost_types::Any;

use about::AboutArgs;

use super::{
    exit::{self, UNREACHABLE, USAGE},
    json,
    limits::LimitArgs,
};
use crate::{
    names::Digest,
    wire::{
        self, ServeRequest, ServeResponse, ServiceTypeRef, serve_request::ServiceDef,
        status::Code as StatusCode,
    },
};

/// Uploads from this size on are shown on a terminal.
const PROGRESS_FROM: usize = 8 << 20;
/// What a call may take on top of its timeout: queueing, upload, report.
const DEADLINE_SLACK: Duration = Duration::from_secs(60);

const EXAMPLES: &str = "\
Examples:
  dispatcher call --namespace demo --binary ./hello greeter/Hello world
  dispatcher call --address unix:/run/dispatcher.sock --namespace demo \\
      --uri sha256:HEX --input request.bin greeter/Hello
  dispatcher call --namespace demo --binary ./hello --input-type google.protobuf.StringValue \\
      --input-json '\"hi\"' --json greeter/Hello
  dispatcher call --namespace greeter --binary ./greeter --metadata x-user=ada \\
      --request-id r-17 helloworld.Greeter/SayHello
  dispatcher call --namespace demo --binary ./hello --print-request greeter/Hello |
      grpcurl -plaintext -d @ 127.0.0.1:50051 collector.CollectiveDispatcher/Serve

What stands after SERVICE/METHOD goes to the program, flags included.";

/// Arguments of `dispatcher call`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CallArgs {
    /// HOST:PORT or unix:PATH
    #[arg(
        long,
        value_name = "ADDR",
        env = "DISPATCHER_ADDRESS",
        default_value = "127.0.0.1:50051",
        value_parser = address::parse
    )]
    address: String,
    /// Whose policy applies
    #[arg(long, value_name = "NS")]
    namespace: String,
    /// The executable; sent only if the service doesn't hold it
    #[arg(long, value_name = "FILE", conflicts_with = "uri")]
    binary: Option<PathBuf>,
    /// Where the service finds the executable: sha256:HEX
    #[arg(long)]
    uri: Option<String>,
    /// The input's bytes, verbatim; - for standard input
    #[arg(long, value_name = "FILE", conflicts_with = "input_json")]
    input: Option<PathBuf>,
    /// The type URL of the input
    #[arg(long, value_name = "URL", default_value = "")]
    input_type: String,
    /// The input as JSON, of a well-known type named by --input-type or by "@type"
    #[arg(long, value_name = "JSON")]
    input_json: Option<String>,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    about: AboutArgs,
    /// Print the whole response as JSON
    #[arg(long)]
    json: bool,
    /// Print the request as JSON for `grpcurl -d @`, and send nothing
    #[arg(long)]
    print_request: bool,
    /// What to call
    #[arg(value_name = "SERVICE/METHOD")]
    target: String,
    /// Arguments for the program
    #[arg(value_name = "ARG", trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// Why there is no reply.
enum CallError {
    Usage(String),
    Unreachable(String),
    /// The connection broke when the call was on its way.
    Lost(String),
    /// A gRPC error: not an answer about the execution, but none at all.
    Rejected(tonic::Status),
}

/// Runs the command.
#[must_use]
pub fn run(args: CallArgs) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return exit::fail(exit::REFUSED, format_args!("FAILED internal: no runtime: {error}"));
        }
    };
    match runtime.block_on(call(&args)) {
        Ok(Some(response)) => show(&args, &response),
        Ok(None) => ExitCode::SUCCESS,
        Err(CallError::Usage(what)) => exit::fail(USAGE, what),
        Err(CallError::Unreachable(what)) => {
            exit::fail(UNREACHABLE, format_args!("FAILED unreachable: {what}"))
        }
        Err(CallError::Lost(what)) => {
            exit::fail(exit::REFUSED, format_args!("FAILED connection_lost: {what}"))
        }
        Err(CallError::Rejected(status)) => exit::fail(
            exit::REFUSED,
            format_args!("FAILED {}: {}", reason(&status), exit::or_none(status.message())),
        ),
    }
}

async fn call(args: &CallArgs) -> Result<Option<ServeResponse>, CallError> {
    let binary = args.binary.as_deref().map(read_binary).transpose()?;
    let mut request = request(args)?;
    if args.print_request {
        request.service_def = binary.map(ServiceDef::ServiceBinary).or(request.service_def);
        println!("{:#}", json::request(&request));
        return Ok(None);
    }
    let mut client = connect::connect(&args.address).await.map_err(CallError::Unreachable)?;
    let Some(binary) = binary else {
        return send(args, &mut client, request).await.map(Some);
    };
    let digest = Digest::of(&binary).to_string();
    request.service_def = Some(ServiceDef::ServiceUri(digest.clone()));
    let response = send(args, &mut client, request.clone()).await?;
    if !wants_bytes(&response) {
        return Ok(Some(response));
    }
    request.options.get_or_insert_default().artifact_digest = digest;
    let bar = upload_bar(binary.len());
    request.service_def = Some(ServiceDef::ServiceBinary(binary));
    client.watch(bar.clone());
    let response = send(args, &mut client, request).await;
    bar.finish_and_clear();
    response.map(Some)
}

fn wants_bytes(response: &ServeResponse) -> bool {
    response.status.as_ref().is_some_and(|status| {
        status.code() == StatusCode::NotFound
            && status.details.get("reason").is_some_and(|reason| reason == "artifact_missing")
    })
}

async fn send(
    args: &CallArgs,
    client: &mut connect::Client,
    request: ServeRequest,
) -> Result<ServeResponse, CallError> {
    let mut request = tonic::Request::new(request);
    if let Some(timeout) = args.limits.timeout() {
        request.set_timeout(timeout.saturating_add(DEADLINE_SLACK));
    }
    match client.serve(request).await {
        Ok(response) => Ok(response.into_inner()),
        // From this side, not the server's: the connection broke.
        Err(status) if std::error::Error::source(&status).is_some() => {
            let (address, cause) = (&args.address, root_cause(&status));
            Err(CallError::Lost(format!(
                "the connection to {address} broke ({cause}); whether the program ran isn't known"
            )))
        }
        Err(status) => Err(CallError::Rejected(status)),
    }
}

/// What is behind an error in the end, in words.
fn root_cause(status: &tonic::Status) -> String {
    let mut cause: &dyn std::error::Error = status;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

/// Why a call was rejected: the server's word in a trailer, else gRPC's own name
/// of the code, as `details.reason` would say it.
fn reason(status: &tonic::Status) -> String {
    let told = status.metadata().get("dispatcher-reason").and_then(|told| told.to_str().ok());
    if let Some(told) = told.filter(|told| !told.is_empty() && *told != "rpc_error") {
        return told.to_owned();
    }
    let name = format!("{:?}", status.code());
    let mut words = String::new();
    for (at, character) in name.char_indices() {
        if at > 0 && character.is_uppercase() {
            words.push('_');
        }
        words.push(character.to_ascii_lowercase());
    }
    words
}

fn request(args: &CallArgs) -> Result<ServeRequest, CallError> {
    let (service, method) = args.target.split_once('/').ok_or_else(|| {
        CallError::Usage(format!("{:?} is not SERVICE/METHOD, such as greeter/Hello", args.target))
    })?;
    let mut request = ServeRequest {
        namespace: args.namespace.clone(),
        service: Some(ServiceTypeRef {
            namespace: args.namespace.clone(),
            service_name: service.to_owned(),
        }),
        method_name: method.to_owned(),
        input: input(args)?,
        service_def: args.uri.clone().map(ServiceDef::ServiceUri),
        options: Some(args.limits.options(args.args.clone())),
        ..Default::default()
    };
    args.about.add_to(&mut request).map_err(CallError::Usage)?;
    Ok(request)
}

fn input(args: &CallArgs) -> Result<Option<Any>, CallError> {
    if let Some(text) = &args.input_json {
        let named = Some(args.input_type.clone()).filter(|named| !named.is_empty());
        let type_url = named.or_else(|| json::own_type(text)).ok_or_else(|| {
            CallError::Usage("--input-json needs --input-type, or an \"@type\" of its own".into())
        })?;
        let type_url = json::type_url(&type_url);
        let value =
            json::encode(&type_url, text).map_err(|error| CallError::Usage(error.to_string()))?;
        return Ok(Some(Any { type_url, value }));
    }
    let value = match &args.input {
        Some(path) => read_input(path).map_err(CallError::Usage)?,
        None if args.input_type.is_empty() => return Ok(None),
        None => Vec::new(),
    };
    Ok(Some(Any { type_url: args.input_type.clone(), value }))
}

/// Reads `--input`: a file, or standard input for `-`.
///
/// # Errors
/// What could not be read, and why.
pub fn read_input(path: &Path) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        io::stdin().lock().read_to_end(&mut bytes).map(drop)
    } else {
        std::fs::read(path).map(|content| bytes = content)
    };
    read.map(|()| bytes).map_err(|error| format!("{}: {error}", path.display()))
}

fn read_binary(path: &Path) -> Result<Bytes, CallError> {
    std::fs::read(path)
        .map(Bytes::from)
        .map_err(|error| CallError::Usage(format!("{}: {error}", path.display())))
}

/// Hidden for small uploads, and where nobody is looking.
fn upload_bar(size: usize) -> ProgressBar {
    if size < PROGRESS_FROM || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("uploading {bar:30} {bytes}/{total_bytes} {eta}");
    ProgressBar::new(size as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn show(args: &CallArgs, response: &ServeResponse) -> ExitCode {
    let report = response.report.clone().unwrap_or_default();
    let mut status = response.status.clone().unwrap_or_default();
    // A reader that went away (`| head`) is no failure of the call's.
    if args.json {
        writeln!(io::stdout(), "{:#}", json::response(response)).ok();
    } else {
        io::stdout().write_all(&output_bytes(response.output.as_ref())).ok();
        io::stderr().write_all(&report.stderr).ok();
        status.message = exit::without_tail(&status.message, &report.stderr);
    }
    io::stdout().flush().ok();
    exit::finish(&report, &status, !args.json && exit::is_unfinished(&report.stderr))
}

/// What the program wrote, taken out of the wrapping that the output format gave it.
pub(super) fn output_bytes(output: Option<&Any>) -> Vec<u8> {
    let Some(any) = output else { return Vec::new() };
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    let unwrapped = match name {
        "collector.Status" => wire::Status::decode(any.value.as_slice())
            .ok()
            .map(|status| status.message.into_bytes()),
        // Its wire form: field 1, bytes; the same as StringValue's.
        "google.protobuf.BytesValue" => Vec::<u8>::decode(any.value.as_slice()).ok(),
        _ => None,
    };
    unwrapped.unwrap_or_else(|| any.value.clone())
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use tonic::Code;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        call: CallArgs,
    }

    fn parsed(words: &[&str]) -> CallArgs {
        Cli::parse_from([&["call", "--namespace", "demo"], words].concat()).call
    }

    #[test]
    fn flags_become_a_request() {
        let args = parsed(&[
            "--timeout",
            "5s",
            "--memory",
            "64MiB",
            "--env",
            "A=b",
            "--input-type",
            "x/y.Z",
            "greeter/Hello",
            "--loud",
            "world",
        ]);
        let request = request(&args).ok().unwrap();
        assert_eq!(request.method_name, "Hello");
        assert_eq!(request.service.unwrap().service_name, "greeter");
        let options = request.options.unwrap();
        assert_eq!(options.args, ["--loud", "world"]);
        assert_eq!(options.timeout.unwrap().seconds, 5);
        assert_eq!(options.memory_bytes, 64 << 20);
        assert_eq!(options.env["A"], "b");
        assert_eq!(request.input.unwrap().type_url, "x/y.Z");
    }

    #[test]
    fn what_is_said_about_a_call_is_sent_and_printed() {
        let words = ["--metadata", "x-user=ada", "--request-id", "r1", "--label", "team=a"];
        let request = request(&parsed(&[&words[..], &["a/b"]].concat())).ok().unwrap();
        let printed = json::request(&request);
        assert_eq!(printed["executionContext"]["metadata.x-user"], "ada");
        assert_eq!(printed["options"]["requestId"], "r1");
        assert_eq!(printed["options"]["labels"]["team"], "a");
    }

    #[test]
    fn a_target_without_a_method_is_a_usage_error() {
        assert!(matches!(request(&parsed(&["greeter"])), Err(CallError::Usage(_))));
    }

    #[test]
    fn output_is_unwrapped() {
        let any = |name: &str, value: Vec<u8>| Any {
            type_url: format!("type.googleapis.com/{name}"),
            value,
        };
        let status = wire::Status { message: "hi".into(), ..Default::default() };
        let wrapped = any("collector.Status", status.encode_to_vec());
        assert_eq!(output_bytes(Some(&wrapped)), b"hi");
        let wrapped = any("google.protobuf.BytesValue", vec![0xff, 0].encode_to_vec());
        assert_eq!(output_bytes(Some(&wrapped)), [0xff, 0]);
        assert_eq!(output_bytes(Some(&any("acme.Thing", vec![1]))), [1]);
        assert_eq!(output_bytes(None), b"");
    }

    #[test]
    fn json_input_needs_a_type_that_is_known() {
        let with = |words: &[&str]| input(&parsed(&[words, &["a/b"]].concat()));
        let json = ["--input-json", "\"hi\""];
        assert!(matches!(with(&json), Err(CallError::Usage(_))));
        let unknown = [&json[..], &["--input-type", "acme.Thing"]].concat();
        assert!(matches!(with(&unknown), Err(CallError::Usage(_))));
        let known = [&json[..], &["--input-type", "google.protobuf.StringValue"]].concat();
        let any = with(&known).ok().flatten().unwrap();
        assert_eq!(any.type_url, "type.googleapis.com/google.protobuf.StringValue");
        assert_eq!(any.value, b"\x0a\x02hi");
        assert!(with(&[]).ok().unwrap().is_none());
    }

    #[test]
    fn codes_have_their_names() {
        let status = |code| tonic::Status::new(code, "");
        assert_eq!(reason(&status(Code::Unavailable)), "unavailable");
        assert_eq!(reason(&status(Code::ResourceExhausted)), "resource_exhausted");
        let mut told = status(Code::Unavailable);
        told.metadata_mut().insert("dispatcher-reason", "draining".parse().unwrap());
        assert_eq!(reason(&told), "draining");
    }

    #[test]
    fn bytes_are_sent_only_when_they_are_missed() {
        let answer = |code: StatusCode, reason: &str| ServeResponse {
            status: Some(wire::Status {
                code: code.into(),
                details: [("reason".to_owned(), reason.to_owned())].into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert!(wants_bytes(&answer(StatusCode::NotFound, "artifact_missing")));
        assert!(!wants_bytes(&answer(StatusCode::NotFound, "service_not_found")));
        assert!(!wants_bytes(&answer(StatusCode::Unknown, "artifact_missing")));
        assert!(!wants_bytes(&ServeResponse::default()));
    }
}
