//! A request's form: every field is what it should be, or the call is refused
//! before anyone looks at a policy.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Display,
    str::FromStr,
    time::Duration,
};

use bytes::Bytes;

use crate::{
    call::{ARGS_AND_ENV_MAX, AskedLimits, Call, FormError, Input, MEMORY_MIN, Source},
    jail::plan::Mode,
    names::{Digest, Namespace},
    policy::OutputFormat,
    protocol::grpc::metadata,
    units::{self, MilliCpus, Size},
    wire::{self, serve_request::ServiceDef},
};

/// Entries of `execution_context`, `options.env` and `options.labels` each.
pub const ENTRIES_MAX: usize = 256;

/// Arguments in `options.args`.
pub const ARGS_MAX: usize = 4096;

/// Bytes of keys and values of `execution_context` and of `options.labels` each.
pub const MAP_BYTES_MAX: usize = 16 << 10;

/// Bytes of `options.request_id`.
pub const REQUEST_ID_MAX: usize = 256;

/// Bytes of a type URL or a service URI.
pub const URL_MAX: usize = 2048;

/// Checks a request's form.
///
/// # Errors
/// The first fault: required fields first, in the order of the wire, then names,
/// then what is asked for.
pub fn call(request: wire::ServeRequest) -> Result<Call, FormError> {
    let options = request.options.unwrap_or_default();
    let service = request.service.unwrap_or_default();
    for (field, text) in [
        ("namespace", &request.namespace),
        ("service", &service.service_name),
        ("method_name", &request.method_name),
    ] {
        if text.is_empty() {
            return Err(FormError::Missing { field });
        }
    }
    let namespace: Namespace = parsed("namespace", &request.namespace)?;
    check_service_namespace(&namespace, &service.namespace)?;
    let context = context(request.execution_context)?;
    check_args_and_env(&options.args, &options.env)?;
    Ok(Call {
        service: parsed("service.service_name", &service.service_name)?,
        method: parsed("method_name", &request.method_name)?,
        namespace,
        mode: mode(options.mode)?.or(context.mode),
        limits: AskedLimits {
            timeout: timeout(options.timeout)?.or(context.limits.timeout),
            memory: memory(options.memory_bytes)?.or(context.limits.memory),
            cpus: cpus(options.cpus)?.or(context.limits.cpus),
        },
        output: output(options.output)?,
        digest: optional(&options.artifact_digest)
            .map(|text| parsed("options.artifact_digest", text))
            .transpose()?,
        source: source(request.service_def)?,
        input: input(request.input, options.input_type, options.input_bytes)?,
        args: options.args,
        env: options.env.into_iter().collect(),
        request_id: bounded("options.request_id", options.request_id, REQUEST_ID_MAX)?,
        labels: bounded_map("options.labels", options.labels)?,
        sealed: None,
        metadata: context.metadata,
        ignored_context: context.ignored,
    })
}

fn parsed<T: FromStr<Err: Display>>(field: &'static str, text: &str) -> Result<T, FormError> {
    text.parse().map_err(|error: T::Err| FormError::bad(field, error.to_string()))
}

fn optional(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

fn check_service_namespace(own: &Namespace, named: &str) -> Result<(), FormError> {
    if named.is_empty() || named == own.as_str() {
        return Ok(());
    }
    let field = "service.namespace";
    let named: Namespace = parsed(field, named)?;
    Err(FormError::bad(field, format!("is {named}, not the call's own namespace {own}")))
}

/// What `execution_context` asks for.
#[derive(Default)]
struct AskedByContext {
    mode: Option<Mode>,
    limits: AskedLimits,
    metadata: BTreeMap<String, String>,
    ignored: Vec<String>,
}

fn context(entries: HashMap<String, String>) -> Result<AskedByContext, FormError> {
    let mut asked = AskedByContext::default();
    for (key, value) in bounded_map("execution_context", entries)? {
        match key.as_str() {
            "timeout" => {
                let field = "execution_context.timeout";
                let timeout = units::parse_duration(&value)
                    .map_err(|error| FormError::bad(field, format!("is wrong: {error}")))?;
                asked.limits.timeout = Some(positive(field, timeout)?);
            }
            "memory" => {
                let field = "execution_context.memory";
                let bytes = units::parse_size(&value)
                    .map_err(|error| FormError::bad(field, format!("is wrong: {error}")))?;
                asked.limits.memory = Some(enough(field, bytes)?);
            }
            "cpus" => {
                let field = "execution_context.cpus";
                let cpus = units::parse_cpus(&value)
                    .map_err(|error| FormError::bad(field, format!("is wrong: {error}")))?;
                asked.limits.cpus = Some(cpus);
            }
            "mode" => {
                let wrong = |()| {
                    let what = format!("is {value:?}; write \"direct\", \"container\" or \"jail\"");
                    FormError::bad("execution_context.mode", what)
                };
                asked.mode = Some(value.parse().map_err(wrong)?);
            }
            _ => match key.strip_prefix(metadata::PREFIX) {
                Some(name) => {
                    metadata::check(name, &value).map_err(|what| {
                        FormError::bad("execution_context.metadata", format!("{name:?} {what}"))
                    })?;
                    if asked.metadata.insert(name.to_ascii_lowercase(), value).is_some() {
                        let what = format!("{name:?} is given twice, in other letters");
                        return Err(FormError::bad("execution_context.metadata", what));
                    }
                }
                None => asked.ignored.push(key),
            },
        }
    }
    Ok(asked)
}

fn mode(number: i32) -> Result<Option<Mode>, FormError> {
    match wire::ExecutionMode::try_from(number) {
        Ok(wire::ExecutionMode::Unspecified) => Ok(None),
        Ok(wire::ExecutionMode::Direct) => Ok(Some(Mode::Direct)),
        Ok(wire::ExecutionMode::Container) => Ok(Some(Mode::Container)),
        Ok(wire::ExecutionMode::Jail) => Ok(Some(Mode::Jail)),
        Err(_) => Err(FormError::bad("options.mode", format!("has the unknown value {number}"))),
    }
}

fn output(number: i32) -> Result<Option<OutputFormat>, FormError> {
    match wire::OutputFormat::try_from(number) {
        Ok(wire::OutputFormat::Unspecified) => Ok(None),
        Ok(wire::OutputFormat::Status) => Ok(Some(OutputFormat::Status)),
        Ok(wire::OutputFormat::Bytes) => Ok(Some(OutputFormat::Bytes)),
        Ok(wire::OutputFormat::Any) => Ok(Some(OutputFormat::Any)),
        Err(_) => Err(FormError::bad("options.output", format!("has the unknown value {number}"))),
    }
}

fn timeout(asked: Option<prost_types::Duration>) -> Result<Option<Duration>, FormError> {
    /// What a protobuf Duration may hold: ten thousand years.
    const SECONDS_MAX: u64 = 315_576_000_000;
    let Some(asked) = asked else { return Ok(None) };
    let field = "options.timeout";
    let nonsense = || FormError::bad(field, "is not a duration: it is negative or out of range");
    let seconds = u64::try_from(asked.seconds).map_err(|_| nonsense())?;
    let nanos = u32::try_from(asked.nanos).map_err(|_| nonsense())?;
    if seconds > SECONDS_MAX || nanos > 999_999_999 {
        return Err(nonsense());
    }
    positive(field, Duration::new(seconds, nanos)).map(Some)
}

fn positive(field: &'static str, duration: Duration) -> Result<Duration, FormError> {
    if duration.is_zero() {
        return Err(FormError::bad(field, "is zero; leave it out for the policy's own"));
    }
    Ok(duration)
}

fn memory(asked: u64) -> Result<Option<u64>, FormError> {
    if asked == 0 {
        return Ok(None);
    }
    enough("options.memory_bytes", asked).map(Some)
}

fn enough(field: &'static str, bytes: u64) -> Result<u64, FormError> {
    if bytes < MEMORY_MIN {
        let what =
            format!("is {bytes}; at least {} are needed to start anything", Size(MEMORY_MIN));
        return Err(FormError::bad(field, what));
    }
    Ok(bytes)
}

fn cpus(asked: f64) -> Result<Option<MilliCpus>, FormError> {
    if asked == 0.0 {
        return Ok(None);
    }
    let nonsense = || FormError::bad("options.cpus", format!("is {asked}; write 0.001 to 1024"));
    MilliCpus::from_f64(asked).map(Some).ok_or_else(nonsense)
}

fn source(service_def: Option<ServiceDef>) -> Result<Source, FormError> {
    let field = "service_uri";
    match service_def {
        None => Ok(Source::Registered),
        Some(ServiceDef::ServiceBinary(bytes)) => Ok(Source::Inline(bytes)),
        Some(ServiceDef::ServiceUri(uri)) if uri.is_empty() => {
            Err(FormError::bad(field, "is empty"))
        }
        Some(ServiceDef::ServiceUri(uri)) if uri.starts_with("sha256:") => {
            parsed::<Digest>(field, &uri).map(Source::Held)
        }
        Some(ServiceDef::ServiceUri(uri)) => {
            let uri = bounded(field, uri, URL_MAX)?;
            let scheme = uri.split_once(':').map_or("", |(scheme, _)| scheme);
            let fits = |c: char| c.is_ascii_alphanumeric() || "+.-".contains(c);
            if scheme.is_empty() || !scheme.chars().all(fits) {
                return Err(FormError::bad(field, "names no scheme, such as sha256: or https:"));
            }
            Ok(Source::Uri(uri))
        }
    }
}

fn input(
    any: Option<prost_types::Any>,
    input_type: String,
    input_bytes: Bytes,
) -> Result<Option<Input>, FormError> {
    let by_option = !input_type.is_empty() || !input_bytes.is_empty();
    let (field, input) = match any {
        Some(_) if by_option => {
            return Err(FormError::bad("options.input_bytes", "is given besides input; send one"));
        }
        Some(any) => {
            let input = Input { type_url: any.type_url, value: any.value.into() };
            ("input.type_url", input)
        }
        None => {
            let value = Bytes::copy_from_slice(&input_bytes);
            ("options.input_type", Input { type_url: input_type, value })
        }
    };
    let type_url = bounded(field, input.type_url, URL_MAX)?;
    if type_url.is_empty() && input.value.is_empty() {
        return Ok(None);
    }
    Ok(Some(Input { type_url, ..input }))
}

fn check_args_and_env(args: &[String], env: &HashMap<String, String>) -> Result<(), FormError> {
    if args.len() > ARGS_MAX {
        let what = format!("has {} entries; at most {ARGS_MAX} are taken", args.len());
        return Err(FormError::bad("options.args", what));
    }
    check_entries("options.env", env)?;
    if args.iter().any(|argument| argument.contains('\0')) {
        return Err(FormError::bad("options.args", "holds a NUL"));
    }
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            let what = format!("has a malformed entry {name:?}: no name, or a = or NUL in it");
            return Err(FormError::bad("options.env", what));
        }
    }
    // As execve(2) counts them: each string with its NUL.
    let args: usize = args.iter().map(|argument| argument.len() + 1).sum();
    let env: usize = env.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    if args + env > ARGS_AND_ENV_MAX {
        let most = Size(ARGS_AND_ENV_MAX as u64);
        let what = format!("and options.env have {} bytes together; at most {most}", args + env);
        return Err(FormError::bad("options.args", what));
    }
    Ok(())
}

/// No NUL, and not too long.
fn bounded(field: &'static str, text: String, limit: usize) -> Result<String, FormError> {
    if text.len() > limit {
        let what = format!("is {} bytes long; at most {limit} are taken", text.len());
        return Err(FormError::bad(field, what));
    }
    if text.contains('\0') {
        return Err(FormError::bad(field, "holds a NUL"));
    }
    Ok(text)
}

fn check_entries(field: &'static str, map: &HashMap<String, String>) -> Result<(), FormError> {
    if map.len() > ENTRIES_MAX {
        let what = format!("has {} entries; at most {ENTRIES_MAX} are taken", map.len());
        return Err(FormError::bad(field, what));
    }
    Ok(())
}

fn bounded_map(
    field: &'static str,
    map: HashMap<String, String>,
) -> Result<BTreeMap<String, String>, FormError> {
    check_entries(field, &map)?;
    let bytes: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > MAP_BYTES_MAX {
        let what = format!("has {bytes} bytes; at most {MAP_BYTES_MAX} are taken");
        return Err(FormError::bad(field, what));
    }
    Ok(map.into_iter().collect())
}
