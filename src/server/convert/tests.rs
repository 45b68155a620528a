//! Every row of the contract's table, and every way a request can be malformed.

mod replies;

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use super::{reply::Trailers, *};
use crate::{
    admission::AdmissionError,
    artifact::{ArtifactError, elf},
    call::{FormError, MEMORY_MIN, Source},
    dispatch::{CallError, Facts, Finished, Reply, rules},
    execute::{ExecuteError, Outcome, Verdict},
    jail::{
        message::{Exhausted, Refusal, StopCause},
        plan::{Control, Mode},
    },
    names::{Digest, RunId},
    policy::OutputFormat,
    testing,
    units::MilliCpus,
    wire::{self, serve_request::ServiceDef, status::Code},
};

fn request() -> wire::ServeRequest {
    wire::ServeRequest {
        namespace: "demo".into(),
        service: Some(wire::ServiceTypeRef {
            namespace: String::new(),
            service_name: "greeter".into(),
        }),
        method_name: "SayHello".into(),
        ..wire::ServeRequest::default()
    }
}

fn with(change: impl FnOnce(&mut wire::ServeRequest)) -> Result<crate::call::Call, FormError> {
    let mut request = request();
    change(&mut request);
    call(request)
}

fn with_options(
    change: impl FnOnce(&mut wire::ExecutionOptions),
) -> Result<crate::call::Call, FormError> {
    with(|request| change(request.options.get_or_insert_default()))
}

fn with_context(entries: &[(&str, &str)]) -> Result<crate::call::Call, FormError> {
    with(|request| {
        request.execution_context =
            entries.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    })
}

fn bad_field(result: Result<crate::call::Call, FormError>) -> &'static str {
    match result.unwrap_err() {
        FormError::Bad { field, .. } => field,
        missing @ FormError::Missing { .. } => panic!("{missing}"),
    }
}

#[test]
fn required_fields_are_asked_for_in_order() {
    let missing = |change: fn(&mut wire::ServeRequest)| with(change).unwrap_err().to_string();
    assert_eq!(
        call(wire::ServeRequest::default()).unwrap_err().to_string(),
        "namespace is required"
    );
    assert_eq!(missing(|r| r.namespace.clear()), "namespace is required");
    assert_eq!(missing(|r| r.service = None), "service is required");
    let unnamed = |r: &mut wire::ServeRequest| r.service = Some(wire::ServiceTypeRef::default());
    assert_eq!(missing(unnamed), "service is required");
    assert_eq!(missing(|r| r.method_name.clear()), "method_name is required");
    let two = |r: &mut wire::ServeRequest| {
        r.service = None;
        r.namespace = "../etc".into();
    };
    assert_eq!(missing(two), "service is required", "before any name is looked at");
}

#[test]
fn names_are_checked() {
    assert_eq!(bad_field(with(|r| r.namespace = "../etc".into())), "namespace");
    assert_eq!(bad_field(with(|r| r.method_name = "Say Hello".into())), "method_name");
    let service = |namespace: &str, name: &str| {
        with(|request| {
            request.service = Some(wire::ServiceTypeRef {
                namespace: namespace.into(),
                service_name: name.into(),
            });
        })
    };
    assert_eq!(bad_field(service("", "a/b")), "service.service_name");
    assert_eq!(bad_field(service("other", "a")), "service.namespace");
    assert_eq!(bad_field(service("a b", "a")), "service.namespace");
    assert!(service("demo", "a").is_ok());
}

#[test]
fn limits_that_are_nonsense_are_refused() {
    for (seconds, nanos) in
        [(0, 0), (-1, 0), (1, -1), (0, 1_000_000_000), (i64::MAX, 0), (i64::MIN, i32::MIN)]
    {
        let timeout = prost_types::Duration { seconds, nanos };
        let result = with_options(|options| options.timeout = Some(timeout));
        assert_eq!(bad_field(result), "options.timeout", "{seconds} {nanos}");
    }
    for cpus in [-1.0, f64::NAN, f64::INFINITY, 1e300, 0.0001, 5000.0] {
        assert_eq!(bad_field(with_options(|o| o.cpus = cpus)), "options.cpus", "{cpus}");
    }
    assert_eq!(bad_field(with_options(|o| o.memory_bytes = 1)), "options.memory_bytes");
    assert_eq!(bad_field(with_options(|o| o.mode = 99)), "options.mode");
    assert_eq!(bad_field(with_options(|o| o.output = -1)), "options.output");
    for (key, value, field) in [
        ("timeout", "soon", "execution_context.timeout"),
        ("timeout", "0s", "execution_context.timeout"),
        ("timeout", "-1s", "execution_context.timeout"),
        ("memory", "lots", "execution_context.memory"),
        ("memory", "1", "execution_context.memory"),
        ("cpus", "NaN", "execution_context.cpus"),
        ("mode", "sandbox", "execution_context.mode"),
    ] {
        assert_eq!(bad_field(with_context(&[(key, value)])), field, "{value}");
    }
}

#[test]
fn the_context_means_the_same_as_the_options_which_win() {
    let context =
        [("timeout", "2s"), ("memory", "64MiB"), ("cpus", "0.5"), ("mode", "direct"), ("x", "y")];
    let asked = with_context(&context).unwrap();
    assert_eq!(asked.limits.timeout, Some(Duration::from_secs(2)));
    assert_eq!(asked.limits.memory, Some(64 << 20));
    assert_eq!(asked.limits.cpus, Some(MilliCpus(500)));
    assert_eq!(asked.mode, Some(Mode::Direct));
    assert_eq!(asked.ignored_context, ["x"]);

    let both = with(|request| {
        request.execution_context =
            context.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        request.options = Some(wire::ExecutionOptions {
            timeout: Some(prost_types::Duration { seconds: 1, nanos: 500_000_000 }),
            memory_bytes: MEMORY_MIN,
            cpus: 2.0,
            mode: wire::ExecutionMode::Jail.into(),
            output: wire::OutputFormat::Bytes.into(),
            ..wire::ExecutionOptions::default()
        });
    })
    .unwrap();
    assert_eq!(both.limits.timeout, Some(Duration::from_millis(1500)));
    assert_eq!(both.limits.memory, Some(MEMORY_MIN));
    assert_eq!(both.limits.cpus, Some(MilliCpus(2000)));
    assert_eq!((both.mode, both.output), (Some(Mode::Jail), Some(OutputFormat::Bytes)));
}

#[test]
fn input_comes_one_way_or_the_other() {
    let any = prost_types::Any { type_url: "x/y.Z".into(), value: vec![1] };
    let by_any = with(|request| request.input = Some(any.clone())).unwrap().input.unwrap();
    let by_bytes = with_options(|options| {
        options.input_type = "x/y.Z".into();
        options.input_bytes = vec![1].into();
    });
    assert_eq!(by_bytes.unwrap().input.unwrap(), by_any);
    assert!(
        with(|request| request.input = Some(prost_types::Any::default())).unwrap().input.is_none()
    );
    assert!(with(|_| {}).unwrap().input.is_none());
    let both = with(|request| {
        request.input = Some(any);
        request.options.get_or_insert_default().input_bytes = vec![1].into();
    });
    assert_eq!(bad_field(both), "options.input_bytes");
    let nul = with(|request| {
        request.input = Some(prost_types::Any { type_url: "a\0".into(), value: vec![] });
    });
    assert_eq!(bad_field(nul), "input.type_url");
}

#[test]
fn what_to_run_is_told_apart() {
    let source = |def| with(|request| request.service_def = Some(def));
    let uri = |text: &str| source(ServiceDef::ServiceUri(text.into()));
    let digest = Digest::of(b"x");
    assert!(matches!(with(|_| {}).unwrap().source, Source::Registered));
    let binary = source(ServiceDef::ServiceBinary("x".into())).unwrap().source;
    assert!(matches!(binary, Source::Inline(bytes) if bytes == "x"));
    let held = uri(&digest.to_string()).unwrap().source;
    assert!(matches!(held, Source::Held(found) if found == digest));
    assert!(matches!(uri("https://a.example/x").unwrap().source, Source::Uri(_)));
    for bad in ["", "sha256:short", "no-scheme", ":x", "a b:c", &format!("x:{}", "y".repeat(3000))]
    {
        assert_eq!(bad_field(uri(bad)), "service_uri", "{bad}");
    }
    let named = with_options(|options| options.artifact_digest = digest.to_string());
    assert_eq!(named.unwrap().digest, Some(digest));
    let malformed = with_options(|options| options.artifact_digest = "md5:x".into());
    assert_eq!(bad_field(malformed), "options.artifact_digest");
}

#[test]
fn everything_is_bounded() {
    let many = |count: usize| (0..count).map(|n| (n.to_string(), String::new())).collect();
    let long = |bytes: usize| HashMap::from([("k".to_owned(), "v".repeat(bytes))]);
    assert_eq!(bad_field(with(|r| r.execution_context = many(257))), "execution_context");
    assert_eq!(bad_field(with(|r| r.execution_context = long(20_000))), "execution_context");
    assert_eq!(bad_field(with_options(|o| o.labels = many(257))), "options.labels");
    assert_eq!(bad_field(with_options(|o| o.labels = long(20_000))), "options.labels");
    assert_eq!(bad_field(with_options(|o| o.request_id = "x".repeat(257))), "options.request_id");
    assert_eq!(bad_field(with_options(|o| o.env = many(257))), "options.env");
    assert_eq!(bad_field(with_options(|o| o.args = vec![String::new(); 5000])), "options.args");
    assert_eq!(bad_field(with_options(|o| o.args = vec!["a\0b".into()])), "options.args");
    for (name, value) in [("", "x"), ("a=b", "x"), ("a\0", "x"), ("a", "x\0")] {
        let env = HashMap::from([(name.to_owned(), value.to_owned())]);
        assert_eq!(bad_field(with_options(|o| o.env = env)), "options.env", "{name:?}");
    }
    // The bound is on both together: each fits alone.
    let half = "x".repeat(70 << 10);
    assert!(with_options(|o| o.args = vec![half.clone()]).is_ok());
    let both = with_options(|options| {
        options.args = vec![half.clone()];
        options.env = HashMap::from([("A".into(), half.clone())]);
    });
    assert_eq!(bad_field(both), "options.args");
}
