//! What is refused before it starts, with which words, and in which order.

mod common;

use std::sync::OnceLock;

use common::{
    Call, Dispatcher, Reply, client,
    dispatcher::{best_effort, own_user, plain},
    programs, rootless, shared,
};
use dispatcher::{
    names::Digest,
    wire::{
        ConnectRequest, DispatchRequest, ExecutionMode, Verdict,
        collective_dispatcher_client::CollectiveDispatcherClient, serve_request::ServiceDef,
        status::Code,
    },
};

/// No test program has this digest.
const UNKNOWN: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000001";

fn dispatcher() -> &'static Dispatcher {
    static SERVER: OnceLock<Dispatcher> = OnceLock::new();
    shared(&SERVER, || {
        let act = Digest::of(&programs::bytes("act"));
        Dispatcher::start([
            ("open", plain("[limits]\nmemory = \"64MiB\"\ntimeout = \"10s\"\ncpus = 0.5\n")),
            ("other", plain("")),
            ("both-modes", plain(&format!("allow_modes = [\"direct\"]\n{}", own_user()))),
            ("direct-nobody", plain("mode = \"direct\"\n")),
            ("narrow", plain("[services]\nallow = [\"greeter/*\", \"test/Only\"]\n")),
            (
                "by-uri",
                plain("[artifacts]\ninline = false\nuris = [\"https://example.com/builds/\"]\n"),
            ),
            ("pinned", plain(&format!("[artifacts]\ndigests = [\"{act}\"]\n"))),
            ("small", plain("[limits]\nartifact_size = \"100KiB\"\n")),
            ("little-input", plain("[limits]\ninput = \"1KiB\"\n")),
            ("container", format!("mode = \"container\"\n{}", best_effort())),
            (
                "scripts",
                plain("[filesystem]\nroot = \"host\"\n[artifacts]\ninterpreters = [\"/bin/sh\"]\n"),
            ),
            ("bare-scripts", plain("[artifacts]\ninterpreters = [\"/bin/sh\"]\n")),
        ])
    })
}

fn call(call: Call) -> Reply {
    dispatcher().call(call)
}

fn open() -> Call {
    Call::new("open", "act")
}

/// Asserts that the answer is a refusal that names this field.
#[track_caller]
fn refused_field(reply: Reply, reason: &str, field: &str) {
    let reply = reply.refused(Code::InvalidArgument, reason);
    assert_eq!(reply.detail("field"), field, "{}", reply.summary());
}

#[test]
fn required_fields() {
    for (field, change) in [
        ("namespace", (|r| r.namespace.clear()) as fn(&mut dispatcher::wire::ServeRequest)),
        ("service", |r| r.service = None),
        ("service", |r| r.service.get_or_insert_default().service_name.clear()),
        ("method_name", |r| r.method_name.clear()),
    ] {
        let reply = call(open().with(change));
        assert_eq!(reply.message, format!("{field} is required"));
        refused_field(reply, "missing_field", field);
    }
}

#[test]
fn malformed_names() {
    let long = "x".repeat(129);
    for bad in ["../etc/passwd", "/", ".", "..", "-x", "a b", "a/b", "a\0b", "ä", "a\n", &long] {
        for field in 0..3 {
            let reply = call(open().with(|request| match field {
                0 => request.namespace = bad.into(),
                1 => request.service.get_or_insert_default().service_name = bad.into(),
                _ => request.method_name = bad.into(),
            }));
            let reply = reply.refused(Code::InvalidArgument, "bad_field");
            assert_ne!(reply.detail("field"), "", "{bad:?}: {}", reply.summary());
        }
    }
}

#[test]
fn nonsense_limits() {
    let duration = |seconds, nanos| prost_types::Duration { seconds, nanos };
    let cases: Vec<(&str, Call)> = vec![
        ("negative timeout", open().option(|o| o.timeout = Some(duration(-1, 0)))),
        ("negative nanoseconds", open().option(|o| o.timeout = Some(duration(0, -1)))),
        (
            "nanoseconds of a second",
            open().option(|o| o.timeout = Some(duration(1, 1_000_000_000))),
        ),
        ("no timeout at all", open().option(|o| o.timeout = Some(duration(0, 0)))),
        ("centuries", open().option(|o| o.timeout = Some(duration(i64::MAX, 0)))),
        ("cpus NaN", open().cpus(f64::NAN)),
        ("cpus infinite", open().cpus(f64::INFINITY)),
        ("cpus negative", open().cpus(-1.0)),
        ("hardly any memory", open().memory(1)),
        ("context timeout", open().context("timeout", "soon")),
        ("context timeout without unit", open().context("timeout", "30")),
        ("context memory", open().context("memory", "much")),
        ("context cpus", open().context("cpus", "all")),
        ("context mode", open().context("mode", "fast")),
        ("mode 99", open().option(|o| o.mode = 99)),
        ("mode -1", open().option(|o| o.mode = -1)),
        ("output 99", open().option(|o| o.output = 99)),
        ("digest", open().option(|o| o.artifact_digest = "sha256:zz".into())),
        ("argument with NUL", open().args(&["a\0b"])),
        ("both inputs", open().any("example.com/x", [1]).input("x")),
        (
            "type without input",
            open().any("example.com/x", [1]).option(|o| o.input_type = "y/z".into()),
        ),
        ("uri of no kind", Call::uri("open", "gopher")),
        ("sha256 of no digest", Call::uri("open", "sha256:1234")),
    ];
    for (what, request) in cases {
        let reply = call(request);
        assert_eq!(reply.reason(), "bad_field", "{what}: {}", reply.summary());
        let reply = reply.refused(Code::InvalidArgument, "bad_field");
        assert_ne!(reply.detail("field"), "", "{what}: {}", reply.summary());
    }
}

/// More asked than given is refused, never clamped in silence.
#[test]
fn more_than_the_policy_gives() {
    let cases = [
        ("memory", open().memory(65 << 20)),
        ("memory", open().context("memory", "1GiB")),
        ("timeout", open().timeout(std::time::Duration::from_millis(10_001))),
        ("timeout", open().context("timeout", "1h")),
        ("cpus", open().cpus(0.75)),
        ("cpus", open().context("cpus", "2")),
    ];
    for (limit, request) in cases {
        let reply = call(request).refused(Code::PermissionDenied, "over_policy");
        assert!(reply.detail("limit").contains(limit), "{}", reply.summary());
        for key in ["requested", "allowed"] {
            assert_ne!(reply.detail(key), "", "{key}: {}", reply.summary());
        }
    }
    // Exactly as much is fine.
    call(open().memory(64 << 20).cpus(0.5).timeout(std::time::Duration::from_secs(10))).ok();
}

#[test]
fn what_the_policy_does_not_allow() {
    let denied = |request: Call, reason: &str| {
        let reply = call(request).refused(Code::PermissionDenied, reason);
        assert!(!reply.message.is_empty());
        assert!(reply.output.is_none(), "nothing ran, so nothing came out");
    };
    denied(Call::new("nobody-knows", "act"), "no_policy");
    denied(Call::new("narrow", "act"), "service_not_allowed");
    denied(Call::new("narrow", "act").method("greeters", "Hello"), "service_not_allowed");
    denied(open().mode(ExecutionMode::Direct), "mode_not_allowed");
    denied(open().context("mode", "container"), "mode_not_allowed");
    denied(Call::new("by-uri", "act"), "source_not_allowed");
    denied(Call::uri("open", "https://example.com/x"), "source_not_allowed");
    denied(Call::uri("by-uri", "https://example.com/other/x"), "source_not_allowed");
    denied(Call::uri("by-uri", "https://example.com.evil.net/builds/x"), "source_not_allowed");
    denied(Call::uri("by-uri", "file:///etc/passwd"), "source_not_allowed");
    denied(Call::new("pinned", "echo"), "digest_not_allowed");
    denied(open().env("PATH", "/evil"), "env_not_allowed");
    denied(open().env("LD_PRELOAD", "/evil.so"), "env_not_allowed");

    call(Call::new("narrow", "act").method("greeter", "Hello")).ok();
    call(Call::new("narrow", "act").method("test", "Only")).ok();
    call(Call::new("pinned", "act")).ok();
    let direct = call(Call::new("both-modes", "act").mode(ExecutionMode::Direct)).ok();
    assert_eq!(direct.report.mode(), ExecutionMode::Direct);
}

/// As the user that the policy names or not at all: never as the operator.
#[test]
fn direct_mode_becomes_its_user_or_refuses() {
    let reply = call(Call::new("direct-nobody", "act"));
    if rootless() {
        let reply = reply.refused(Code::FailedPrecondition, "control_unavailable");
        assert_eq!(reply.detail("control"), "host_uid");
        for word in ["nobody", "as root", "[identity] user"] {
            assert!(reply.message.contains(word), "{}", reply.message);
        }
    } else {
        reply.ok();
    }
}

#[test]
fn another_services_namespace() {
    let in_namespace = |namespace: &str| {
        open().with(|r| r.service.get_or_insert_default().namespace = namespace.into())
    };
    call(in_namespace("open")).ok();
    refused_field(call(in_namespace("other")), "bad_field", "service.namespace");
}

#[test]
fn executables_that_are_none() {
    let reply = call(Call::of("open", ""));
    assert_eq!(reply.message, "service binary is empty");
    reply.refused(Code::InvalidArgument, "not_executable");
    for content in ["hello", "\x7fELF", "\x7fELX....", "MZ"] {
        call(Call::of("open", content)).refused(Code::InvalidArgument, "not_executable");
    }

    // The machine's number in the ELF header; 183 is aarch64, 62 is x86-64.
    let mut foreign = programs::bytes("act").to_vec();
    let machine: u16 = if cfg!(target_arch = "x86_64") { 183 } else { 62 };
    foreign[18..20].copy_from_slice(&machine.to_le_bytes());
    call(Call::of("open", foreign)).refused(Code::InvalidArgument, "wrong_architecture");

    let reply =
        call(Call::new("open", "act-dynamic")).refused(Code::InvalidArgument, "loader_missing");
    let advice = reply.message.to_lowercase();
    assert!(advice.contains("static") && advice.contains("root"), "says what to do: {advice}");

    let wrong = open().option(|options| options.artifact_digest = UNKNOWN.into());
    call(wrong).refused(Code::InvalidArgument, "digest_mismatch");
    let right = Digest::of(&programs::bytes("act")).to_string();
    call(open().option(|options| options.artifact_digest = right)).ok();

    call(Call::new("small", "act")).refused(Code::ResourceExhausted, "artifact_too_large");
}

#[test]
fn inputs_and_arguments_are_bounded() {
    call(Call::new("little-input", "act").args(&["count"]).input(vec![0; 1024])).ok();
    let reply = call(Call::new("little-input", "act").input(vec![0; 1025]));
    assert_eq!(reply.refused(Code::PermissionDenied, "over_policy").detail("limit"), "input");

    for request in [
        open().args(&["x".repeat(130 << 10)]),
        open().args(&vec!["x".repeat(100); 1400]),
        Call::new("open", "act").args(&vec![""; 200_000]),
    ] {
        refused_field(call(request), "bad_field", "options.args");
    }
    let nearly = "x".repeat(100 << 10);
    assert_eq!(
        call(Call::new("open", "echo").args(&[&nearly])).ok().facts().all("argv")[1],
        nearly
    );
}

#[test]
fn scripts_need_their_interpreter() {
    let script =
        "#!/bin/sh\nfor word in \"$0\" \"$@\"; do echo \"word=$word\"; done\ncat\nexit 4\n";
    call(Call::of("open", script)).refused(Code::InvalidArgument, "script_not_allowed");
    // Listed, but not in the root.
    call(Call::of("bare-scripts", script)).refused(Code::InvalidArgument, "script_not_allowed");
    for other in ["#!/usr/bin/env sh\n", "#!/bin/../bin/sh\n", "#!/bin/sh2\n"] {
        call(Call::of("scripts", other)).refused(Code::InvalidArgument, "script_not_allowed");
    }
    for nothing in ["#!sh\n", "#!\n", "#!", "#! \n/bin/sh"] {
        call(Call::of("scripts", nothing)).refused(Code::InvalidArgument, "not_executable");
    }
    let run = Call::of("scripts", script).args(&["one", "two words"]).input("and stdin");
    let reply = call(run).expect(Code::Unknown, Verdict::Exited, "exit_nonzero");
    assert_eq!(reply.report.exit_code, 4);
    assert_eq!(reply.facts().all("word"), ["/run/dispatcher/service", "one", "two words"]);
    assert!(reply.text().ends_with("and stdin"), "{}", reply.text());
    // It is there to be read, not to be changed.
    let reply = call(Call::of("scripts", "#!/bin/sh\necho x > /run/dispatcher/service\n"));
    reply.expect(Code::Unknown, Verdict::Exited, "exit_nonzero");
}

#[test]
fn what_is_held_is_held_per_namespace() {
    let mut binary = programs::bytes("act").to_vec();
    binary.extend(b"held by namespace open only");
    let uri = Digest::of(&binary).to_string();
    let by_digest = |namespace: &str| call(Call::uri(namespace, &uri).args(&["print", "held"]));

    by_digest("open").refused(Code::NotFound, "artifact_missing");
    call(Call::of("open", binary)).ok();
    assert_eq!(by_digest("open").ok().text(), "held");
    // Another tenant can neither run it nor learn that it is there.
    let (elsewhere, unknown) = (by_digest("other"), call(Call::uri("other", UNKNOWN)));
    assert_eq!(elsewhere.message.replace(&uri, UNKNOWN), unknown.message);
    elsewhere.refused(Code::NotFound, "artifact_missing");
    unknown.refused(Code::NotFound, "artifact_missing");
    // `sha256:` needs no entry in artifacts.uris, and inline = false is about bytes.
    by_digest("by-uri").refused(Code::NotFound, "artifact_missing");
}

#[test]
fn nothing_given_and_nothing_registered() {
    let request = Call::without_binary("open")
        .with(|r| r.service.get_or_insert_default().namespace = "open".into());
    let reply = call(request).refused(Code::NotFound, "service_not_found");
    assert_eq!(reply.message, "service not found and no service_def provided: open/open/test");
}

#[test]
fn what_is_not_built_yet() {
    let fetched = Call::uri("by-uri", "https://example.com/builds/act");
    call(fetched).refused(Code::Unimplemented, "unimplemented");
}

#[test]
fn peers_are_not_built_yet() {
    let mut client = CollectiveDispatcherClient::new(dispatcher().channel());
    let (connect, dispatch) = client::runtime().block_on(async {
        let connect = client.connect(ConnectRequest::default()).await;
        (connect, client.dispatch(DispatchRequest::default()).await)
    });
    let codes = [
        connect.map(|reply| reply.into_inner().status.unwrap_or_default().code()),
        dispatch.map(|reply| reply.into_inner().status.unwrap_or_default().code()),
    ];
    for code in codes {
        match code {
            Ok(code) => assert!([Code::Unimplemented, Code::InvalidArgument].contains(&code)),
            Err(status) => assert_eq!(status.code(), tonic::Code::Unimplemented),
        }
    }
}

/// Form, then policy, then held or registered, then built yet.
#[test]
fn the_order_of_refusals() {
    let malformed = |r: &mut dispatcher::wire::ServeRequest| r.method_name = "a b".into();
    call(Call::new("nobody-knows", "act").with(malformed))
        .refused(Code::InvalidArgument, "bad_field");
    call(Call::uri("nobody-knows", UNKNOWN)).refused(Code::PermissionDenied, "no_policy");
    call(Call::uri("narrow", UNKNOWN)).refused(Code::PermissionDenied, "service_not_allowed");
    call(Call::uri("container", UNKNOWN)).refused(Code::NotFound, "artifact_missing");
    call(Call::without_binary("container")).refused(Code::NotFound, "service_not_found");
    let over = Call::uri("open", UNKNOWN).memory(1 << 40);
    call(over).refused(Code::PermissionDenied, "over_policy");
    let nothing = Call::without_binary("narrow").with(|r| r.service_def = None::<ServiceDef>);
    call(nothing).refused(Code::PermissionDenied, "service_not_allowed");
}

/// A refusal is a whole reply: identified, attributed, explained.
#[test]
fn refusals_have_a_report() {
    let reply = call(Call::new("nobody-knows", "act"));
    assert_eq!(reply.executor, "test-host");
    assert_eq!(reply.report.run_id.len(), 32);
    assert!(reply.report.dispatcher_version.starts_with(env!("CARGO_PKG_VERSION")));
    assert!(reply.report.enforced.is_empty(), "nothing was in force: nothing ran");
    assert_eq!(reply.report.exit_code, 0);
}
