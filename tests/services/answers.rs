//! What a call of a service is answered with.

use std::time::Duration;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use dispatcher::{
    names::Digest,
    wire::{Verdict, status::Code},
};
use prost::Message as _;
use tonic_health::pb::HealthCheckRequest;

use crate::{
    Mode, again, answer, assert_serving, call,
    common::{Call, Dispatcher, Settings, client::to_duration, programs, scaled_ms},
    look, policy, start, started, state,
    wire::{Entries, Entry, Failure, HelloReply, HelloRequest, Nothing, Number, Payload},
};

in_every_mode! {
    the_second_call_finds_it_warm,
    the_example_greets,
    the_health_of_a_service_is_asked_of_it,
    answers_have_the_type_that_reflection_says,
    it_may_listen_where_it_likes_and_when,
    its_status_becomes_the_calls,
    metadata_reaches_it,
    bad_metadata_is_refused,
    what_it_does_not_have_it_says,
    streaming_methods_are_refused,
    large_messages_pass,
    answers_have_a_limit,
    requests_may_not_ask_for_more,
    what_is_around_it_is_as_for_any_program,
    one_service_may_be_grpc_where_others_are_not,
}

fn payload(data: &'static [u8]) -> Payload {
    Payload { data: data.into() }
}

fn the_second_call_finds_it_warm(at: &Mode) {
    let dispatcher = start(at, "");
    let reply = dispatcher.call(call("ns", "Look", &Nothing {}));
    let first = state(&reply);
    let report = &reply.report;
    assert!(!report.warm, "{report:?}");
    assert_eq!((report.exit_code, report.signal), (0, 0));
    assert_eq!(report.mode(), at.number);
    assert_eq!(report.policy, "ns");
    assert_eq!(report.artifact_digest, Digest::of(&programs::bytes("service")).to_string());
    assert!(report.enforced.iter().any(|word| word == "no_new_privs"), "{:?}", report.enforced);
    // It doesn't apply to what lives for many calls.
    assert!(!report.enforced.iter().any(|word| word == "cpu_time"), "{:?}", report.enforced);
    assert!(to_duration(report.setup_time.as_ref()) > Duration::ZERO, "{report:?}");

    for calls in 2..5 {
        let reply = dispatcher.call(again("ns", "Look", &Nothing {}));
        let next = state(&reply);
        assert!(reply.report.warm, "{:?}", reply.report);
        assert_eq!((next.pid, &next.token, next.calls), (first.pid, &first.token, calls));
        assert_ne!(reply.report.run_id, report.run_id, "of the call, not of the instance");
    }
    let reply = dispatcher.call(again("ns", "Echo", &payload(b"\0\xff")));
    assert_eq!(answer::<Payload>(&reply, "test.Payload"), payload(b"\0\xff"));
    // Nothing said is a message too: one of which every field is as by default.
    let nothing = Call::new("ns", "service").method("test.Probe", "Echo");
    assert_eq!(answer::<Payload>(&dispatcher.call(nothing), "test.Payload"), payload(b""));
    dispatcher.stop();
}

fn the_example_greets(at: &Mode) {
    let dispatcher = start(at, "");
    let call = Call::new("ns", "greeter").method("helloworld.Greeter", "SayHello");
    let ada = HelloRequest { name: "Ada".into() }.encode_to_vec();
    let reply =
        dispatcher.call(call.clone().any("type.googleapis.com/helloworld.HelloRequest", ada));
    assert_eq!(answer::<HelloReply>(&reply, "helloworld.HelloReply").message, "Hello Ada!");
    let reply = dispatcher.call(call);
    let reply = reply.expect(Code::InvalidArgument, Verdict::Completed, "service_status");
    assert!(reply.message.contains("name is empty"), "{}", reply.message);
    assert!(reply.report.warm);
    dispatcher.stop();
}

fn the_health_of_a_service_is_asked_of_it(at: &Mode) {
    let dispatcher = start(at, "");
    let call = Call::new("ns", "greeter").method("grpc.health.v1.Health", "Check");
    let ask = |service: &str| {
        let request = HealthCheckRequest { service: service.into() }.encode_to_vec();
        dispatcher.call(
            call.clone().any("type.googleapis.com/grpc.health.v1.HealthCheckRequest", request),
        )
    };
    for service in ["", "helloworld.Greeter"] {
        assert_serving(&ask(service));
    }
    ask("no.such.Service").expect(Code::NotFound, Verdict::Completed, "service_status");
    dispatcher.stop();
}

fn answers_have_the_type_that_reflection_says(at: &Mode) {
    let words = ["both", "v1", "v1alpha", "none"];
    let started = |word: &str| policy(at, &started(&format!("reflection={word}")));
    let dispatcher = Dispatcher::start(words.map(|word| (word, started(word))));
    for word in words {
        // What holds for the first call holds for the next.
        for _ in 0..2 {
            let reply = dispatcher.call(call(word, "Echo", &payload(b"bytes")));
            if word == "none" {
                let reply = reply.expect(Code::Ok, Verdict::Completed, "");
                assert_eq!(reply.stdout(), payload(b"bytes").encode_to_vec());
            } else {
                let answer: Payload = answer(&reply, "test.Payload");
                assert_eq!(answer, payload(b"bytes"), "{word}");
            }
        }
    }
    dispatcher.stop();
}

fn it_may_listen_where_it_likes_and_when(at: &Mode) {
    let ways = [
        ("path", "listen=path"),
        ("late", "delay=300"),
        ("path-late", "listen=path delay=300"),
        // One connection is all that it takes.
        ("once", "connections=1"),
        // It says goodbye to connections again and again, in good order.
        ("short", "age=50"),
    ];
    let dispatcher =
        Dispatcher::start(ways.map(|(name, words)| (name, policy(at, &started(words)))));
    for (name, _) in ways {
        let first = look(&dispatcher, name);
        let nap = again(name, "Sleep", &Number { value: 200 });
        let second = state(&dispatcher.call(nap));
        let third = look(&dispatcher, name);
        if name == "once" {
            continue; // a second connection isn't needed, but may be tried
        }
        assert_eq!(first.token, second.token, "{name}");
        assert_eq!((first.token, third.calls), (third.token, 3), "{name}");
    }
    dispatcher.stop();
}

/// gRPC's numbers, and the codes of the same names.
const CODES: [(i32, Code); 16] = [
    (1, Code::Cancelled),
    (2, Code::Unknown),
    (3, Code::InvalidArgument),
    (4, Code::DeadlineExceeded),
    (5, Code::NotFound),
    (6, Code::AlreadyExists),
    (7, Code::PermissionDenied),
    (8, Code::ResourceExhausted),
    (9, Code::FailedPrecondition),
    (10, Code::Aborted),
    (11, Code::OutOfRange),
    (12, Code::Unimplemented),
    (13, Code::Internal),
    (14, Code::Unavailable),
    (15, Code::DataLoss),
    (16, Code::Unauthenticated),
];

fn its_status_becomes_the_calls(at: &Mode) {
    let dispatcher = start(at, "");
    let token = look(&dispatcher, "ns").token;
    let entry = |name: &str, value: &'static [u8]| Entry { name: name.into(), value: value.into() };
    for (number, code) in CODES {
        let failure = Failure {
            code: number,
            message: format!("kein Glück: {number} %41"),
            details: b"\0\xffdetail"[..].into(),
            trailers: vec![entry("x-note", b"some text"), entry("x-raw-bin", b"\xfe\x01")],
        };
        let reply = dispatcher.call(again("ns", "Fail", &failure));
        let reply = reply.expect(code, Verdict::Completed, "service_status");
        assert_eq!(reply.detail("grpc_code"), number.to_string());
        assert!(reply.message.contains(&failure.message), "{:?}", reply.message);
        assert_eq!(reply.detail("trailer.x-note"), "some text");
        let base64 = |bytes: &[u8]| BASE64_STANDARD.encode(bytes);
        // With or without padding, as gRPC has it.
        let bare = |name: &str| reply.detail(name).trim_end_matches('=').to_owned();
        let expected = |bytes: &[u8]| base64(bytes).trim_end_matches('=').to_owned();
        assert_eq!(bare("trailer.grpc-status-details-bin"), expected(&failure.details));
        assert_eq!(bare("trailer.x-raw-bin"), expected(b"\xfe\x01"));
        assert_eq!((reply.report.exit_code, reply.report.signal), (0, 0));
        assert_eq!(reply.trailers["dispatcher-reason"], "service_status");
    }
    // A service that says no is well.
    let now = look(&dispatcher, "ns");
    assert_eq!((now.token, now.calls), (token, 18));
    // What it says it fails by can't pass for what the dispatcher says.
    let failure = Failure {
        code: 5,
        trailers: vec![entry("reason", b"timeout"), entry("dispatcher-verdict", b"EXITED")],
        ..Failure::default()
    };
    let reply = dispatcher.call(again("ns", "Fail", &failure));
    let reply = reply.expect(Code::NotFound, Verdict::Completed, "service_status");
    assert_eq!(reply.trailers["dispatcher-verdict"], "COMPLETED");
    dispatcher.stop();
}

fn metadata_reaches_it(at: &Mode) {
    let dispatcher = start(at, "[limits]\ntimeout = \"20s\"\n");
    let call = call("ns", "Metadata", &Nothing {});
    let call = call.context("metadata.x-colour", "blue").context("metadata.authorization", "me");
    let reply = dispatcher.call(call.context("x-colour", "not this").context("timeout", "9s"));
    let entries = answer::<Entries>(&reply, "test.Entries").entries;
    let all = |name: &str| -> Vec<Bytes> {
        let of_name = entries.iter().filter(|entry| entry.name == name);
        of_name.map(|entry| entry.value.clone()).collect()
    };
    assert_eq!(all("x-colour"), ["blue"]);
    assert_eq!(all("authorization"), ["me"]);
    assert_eq!(reply.report.ignored_context, ["x-colour"]);
    // How long the call may take is its to know.
    let timeout = all("grpc-timeout");
    let timeout = std::str::from_utf8(&timeout[0]).unwrap();
    let (number, unit) = timeout.split_at(timeout.len() - 1);
    let unit = match unit {
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "S" => 1.0,
        other => panic!("{other}"),
    };
    let seconds = number.parse::<f64>().unwrap() * unit;
    assert!((1.0..=9.0).contains(&seconds), "{timeout}");
    // Nothing of the dispatcher's own caller is passed on.
    let again = dispatcher.call(again("ns", "Metadata", &Nothing {}));
    let entries = answer::<Entries>(&again, "test.Entries").entries;
    assert!(!entries.iter().any(|entry| entry.name == "x-colour"), "{entries:?}");
    dispatcher.stop();
}

fn bad_metadata_is_refused(at: &Mode) {
    let dispatcher = start(at, "");
    let token = look(&dispatcher, "ns").token;
    for (name, value) in [
        ("", "x"),
        ("über", "x"),
        ("two words", "x"),
        (":path", "/test.Probe/Exit"),
        // gRPC's own, and HTTP's.
        ("grpc-timeout", "1n"),
        ("grpc-encoding", "gzip"),
        ("content-type", "text/plain"),
        ("te", "gzip"),
        ("connection", "close"),
        ("host", "x"),
        ("x-value", "a\nb"),
        ("x-value", "a\r\nx-other: b"),
        ("x-value", "a\0b"),
        ("x-value-bin", "this is no base64!"),
    ] {
        let call = again("ns", "Look", &Nothing {}).context(&format!("metadata.{name}"), value);
        let reply = dispatcher.call(call).refused(Code::InvalidArgument, "bad_field");
        assert!(!reply.detail("field").is_empty(), "{name}: {}", reply.summary());
    }
    let now = look(&dispatcher, "ns");
    assert_eq!((now.token, now.calls), (token, 2), "none of them came so far");
    dispatcher.stop();
}

fn what_it_does_not_have_it_says(at: &Mode) {
    let dispatcher = start(at, "");
    for (service, method) in [("test.Probe", "NoSuch"), ("no.such.Service", "Look")] {
        let call = call("ns", "", &Nothing {}).method(service, method);
        let reply = dispatcher.call(call);
        let reply = reply.expect(Code::Unimplemented, Verdict::Completed, "service_status");
        assert_eq!(reply.detail("grpc_code"), "12", "{service}/{method}");
    }
    // A message that it can't read.
    let call = call("ns", "Echo", &Nothing {}).any("type.googleapis.com/test.Payload", [0xff; 3]);
    let reply = dispatcher.call(call);
    assert_eq!((reply.verdict, reply.reason()), (Verdict::Completed, "service_status"));
    assert_ne!(reply.code, Code::Ok);
    // Names that would make another path.
    for (service, method) in [("test.Probe/Look", "x"), ("test.Probe", "../Look"), ("", "Look")] {
        let call = again("ns", "", &Nothing {}).method(service, method);
        let reply = dispatcher.call(call);
        assert_eq!((reply.code, reply.verdict), (Code::InvalidArgument, Verdict::Refused));
    }
    dispatcher.stop();
}

fn streaming_methods_are_refused(at: &Mode) {
    let dispatcher = start(at, "");
    for method in ["Download", "Upload", "Talk"] {
        let reply = dispatcher.call(call("ns", method, &Number { value: 3 }));
        assert_eq!((reply.code, reply.reason()), (Code::Unimplemented, "streaming"), "{method}");
        assert!(reply.output.is_none(), "{method}: {}", reply.summary());
    }
    assert_eq!(look(&dispatcher, "ns").calls, 1, "it was not even called");
    let reflection = again("ns", "", &Nothing {})
        .method("grpc.reflection.v1.ServerReflection", "ServerReflectionInfo");
    dispatcher.call(reflection).refused(Code::Unimplemented, "streaming");
    // One that reflection doesn't know, and that goes on after its first message.
    let watch = again("ns", "", &Nothing {}).method("grpc.health.v1.Health", "Watch");
    let reply = dispatcher.call(watch).expect(Code::Unimplemented, Verdict::Completed, "streaming");
    assert!(reply.elapsed < Duration::from_millis(scaled_ms(10_000)), "{:?}", reply.elapsed);
    dispatcher.stop();
}

fn large_messages_pass(at: &Mode) {
    let large = "[limits]\ninput = \"80MiB\"\noutput = \"80MiB\"\nmemory = \"1GiB\"\n";
    let dispatcher = start(at, large);
    let data: Bytes = (0..64 << 20).map(|index: u32| (index >> 3) as u8).collect();
    let reply = dispatcher.call(call("ns", "Echo", &Payload { data: data.clone() }));
    assert!(answer::<Payload>(&reply, "test.Payload").data == data);
    dispatcher.stop();
}

fn answers_have_a_limit(at: &Mode) {
    let settings = Settings::new([("ns", policy(at, "[limits]\noutput = \"64KiB\"\n"))]);
    let dispatcher = settings.start();
    let token = look(&dispatcher, "ns").token;
    let make = |value| dispatcher.call(again("ns", "Make", &Number { value }));
    // The field's tag and length are of the message too.
    let fits: Payload = answer(&make((64 << 10) - 4), "test.Payload");
    assert_eq!(fits.encoded_len(), 64 << 10);
    for length in [(64 << 10) - 3, 1 << 20, 40 << 20] {
        make(length).expect(Code::ResourceExhausted, Verdict::OutputExceeded, "output");
    }
    assert_eq!(look(&dispatcher, "ns").token, token, "the others are not concerned");
    dispatcher.stop();
}

fn requests_may_not_ask_for_more(at: &Mode) {
    let limits = "[limits]\ntimeout = \"5s\"\nmemory = \"128MiB\"\n[services]\nallow = [\"test.Probe/Look\"]\n";
    let dispatcher = start(at, limits);
    let greedy = call("ns", "Look", &Nothing {}).timeout(Duration::from_secs(6));
    dispatcher.call(greedy).refused(Code::PermissionDenied, "over_policy");
    let greedy = call("ns", "Look", &Nothing {}).memory(1 << 30);
    dispatcher.call(greedy).refused(Code::PermissionDenied, "over_policy");
    let other = dispatcher.call(call("ns", "Echo", &Nothing {}));
    other.refused(Code::PermissionDenied, "service_not_allowed");
    assert_eq!(look(&dispatcher, "ns").calls, 1);
    dispatcher.stop();
}

fn what_is_around_it_is_as_for_any_program(at: &Mode) {
    let dispatcher = start(at, "");
    let reply = dispatcher.call(call("ns", "Around", &Nothing {}));
    let entries = answer::<Entries>(&reply, "test.Entries").entries;
    let all = |name: &str| -> Vec<_> {
        let of_name = entries.iter().filter(|entry| entry.name == name);
        of_name.map(|entry| String::from_utf8_lossy(&entry.value).into_owned()).collect()
    };
    assert_eq!(all("fd"), ["0", "1", "2", "3"]);
    assert_eq!(all("stdin"), ["Ok(0)"], "nothing, and at an end");
    assert_eq!(all("cwd"), ["/"]);
    if at.name != "direct" {
        assert_eq!((all("uid"), all("gid")), (vec!["65534".into()], vec!["65534".into()]));
    }
    let environment = all("env");
    let value = |name: &str| {
        let of_name = |entry: &String| entry.split_once('=').is_some_and(|(its, _)| its == name);
        environment
            .iter()
            .find(|entry| of_name(entry))
            .map(|entry| entry[name.len() + 1..].to_owned())
    };
    assert_eq!(value("LISTEN_FDS").as_deref(), Some("1"));
    assert_eq!(value("LISTEN_FDNAMES").as_deref(), Some("grpc"));
    assert_eq!(value("PATH").as_deref(), Some("/usr/local/bin:/usr/bin:/bin"));
    assert!(value("GRPC_UNIX_SOCKET").is_some_and(|path| path.starts_with('/')));
    // It isn't started for one call, and isn't told of the one that came first.
    for name in ["DISPATCHER_METHOD", "DISPATCHER_INPUT_TYPE", "GRPC_INPUT_DATA"] {
        assert_eq!(value(name), None, "{environment:?}");
    }
    let host = ["CARGO", "CI", "DISPATCHER_TEST_TOOLS", "LISTEN_UNRELATED"];
    assert!(host.iter().all(|name| value(name).is_none()), "{environment:?}");
    dispatcher.stop();
}

fn one_service_may_be_grpc_where_others_are_not(at: &Mode) {
    let service =
        "argv = \"plain\"\noutput = \"bytes\"\n[service.\"test.Probe/*\"]\nprotocol = \"grpc\"\n";
    let text = policy(at, service).replacen("protocol = \"grpc\"\n", "", 1);
    let dispatcher = Dispatcher::start([("ns", text)]);
    let first = look(&dispatcher, "ns");
    assert_eq!(dispatcher.run("ns", "act", &["print", "once"]).ok().text(), "once");
    assert_eq!(look(&dispatcher, "ns").token, first.token);
    // What is no server never listens: here, it ends.
    let reply = dispatcher.call(Call::new("ns", "act").method("test.Probe", "Look"));
    assert_ne!(reply.code, Code::Ok, "{}", reply.summary());
    assert_ne!(reply.verdict, Verdict::Failed, "{}", reply.summary());
    dispatcher.stop();
}
