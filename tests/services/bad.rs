//! Services that are none, and services that mean harm: tests/programs/hostile.c.

use std::time::Duration;

use dispatcher::wire::{Verdict, status::Code};

use crate::{
    Mode, Reply,
    common::{Call, Dispatcher, scaled_ms},
    look, policy,
};

in_every_mode! {
    what_is_no_grpc_is_named,
    a_good_answer_is_taken,
    reflection_that_does_not_answer_is_not_waited_for_twice,
    bad_answers_are_errors,
    bad_answers_to_many_at_once_are_errors,
    floods_end,
    what_is_at_the_path_is_no_socket,
}

/// A dispatcher with a namespace for each of these ways, and one for a service that is well.
fn start(at: &Mode, ways: &[&'static str]) -> Dispatcher {
    with_tables(at, ways, "[instances]\n")
}

/// The same, with these tables, the last of which is that of instances.
fn with_tables(at: &Mode, ways: &[&'static str], tables: &str) -> Dispatcher {
    let limits = format!(
        "[limits]\ntimeout = \"{0}ms\"\n{tables}start_timeout = \"{0}ms\"\n",
        scaled_ms(2000)
    );
    let mut policies = vec![("well", policy(at, ""))];
    for way in ways {
        let hostile = format!("{limits}[environment]\nset = {{ HOSTILE = {way:?} }}\n");
        policies.push((way, policy(at, &hostile)));
    }
    Dispatcher::start(policies)
}

/// What a call of such a service comes to, soon; the well one goes on as it was.
#[track_caller]
fn attack(dispatcher: &Dispatcher, way: &str) -> Reply {
    let well = look(dispatcher, "well");
    let reply = dispatcher.call(Call::new(way, "hostile").method("test.Probe", "Echo").input("\0"));
    let limit = Duration::from_millis(scaled_ms(6000));
    assert!(reply.elapsed < limit, "{way}: {:?}", reply.elapsed);
    assert_eq!(look(dispatcher, "well").token, well.token, "{way}: others are not concerned");
    let details: usize = reply.details.iter().map(|(key, value)| key.len() + value.len()).sum();
    assert!(details + reply.message.len() < 64 << 10, "{way}: {details} bytes of details");
    reply
}

fn what_is_no_grpc_is_named(at: &Mode) {
    let ways = ["http1", "garbage"];
    let dispatcher = start(at, &ways);
    for way in ways {
        attack(&dispatcher, way).refused(Code::Unavailable, "not_grpc");
    }
    dispatcher.stop();
}

/// So that the others are told apart by what is bad about them.
fn a_good_answer_is_taken(at: &Mode) {
    let dispatcher = start(at, &["ok"]);
    let reply = attack(&dispatcher, "ok").expect(Code::Ok, Verdict::Completed, "");
    assert_eq!(reply.stdout(), b"", "of a type that it doesn't tell");
    dispatcher.stop();
}

/// The first call waits for it, for a quarter of its own time.
fn reflection_that_does_not_answer_is_not_waited_for_twice(at: &Mode) {
    let dispatcher = start(at, &["unreflected"]);
    let limit = Duration::from_millis(scaled_ms(2000));
    for _ in 0..4 {
        attack(&dispatcher, "unreflected").expect(Code::Ok, Verdict::Completed, "");
    }
    let mut later = Duration::ZERO;
    for _ in 0..8 {
        let reply = attack(&dispatcher, "unreflected").expect(Code::Ok, Verdict::Completed, "");
        later += reply.elapsed;
    }
    assert!(later < limit, "eight calls took {later:?}");
    dispatcher.stop();
}

fn bad_answers_are_errors(at: &Mode) {
    let ways = [
        "no-trailers",
        "no-status",
        "status-999",
        "status-minus",
        "status-text",
        "two",
        "none",
        "truncated",
        "compressed",
        "reset",
        "html",
        "hang",
        "settings",
        "hangup",
        "goaway",
    ];
    let dispatcher = start(at, &ways);
    for way in ways {
        let reply = attack(&dispatcher, way);
        assert_ne!(reply.code, Code::Ok, "{way}: {}", reply.summary());
        assert!(!reply.reason().is_empty(), "{way}: {}", reply.summary());
        // The dispatcher has done nothing wrong.
        let own_fault = reply.verdict == Verdict::Failed || reply.reason() == "internal";
        assert!(!own_fault, "{way}: {}", reply.summary());
        match way {
            // gRPC's word for numbers that it doesn't know.
            "status-999" | "status-minus" | "status-text" => {
                assert_eq!(reply.code, Code::Unknown, "{way}: {}", reply.summary());
            }
            // Nothing was wrong but that no answer came.
            "hang" => {
                assert_eq!(
                    (reply.code, reply.verdict, reply.reason()),
                    (Code::DeadlineExceeded, Verdict::TimedOut, "timeout"),
                    "{way}: {}",
                    reply.summary()
                );
            }
            _ => {}
        }
    }
    dispatcher.stop();
}

/// Each call of many is answered, though one connection serves them all.
fn bad_answers_to_many_at_once_are_errors(at: &Mode) {
    let ways = ["no-trailers", "reset", "settings", "hangup", "goaway"];
    let limit = Duration::from_millis(scaled_ms(8000));
    let tables = "[admission]\nconcurrency = 64\n[instances]\nconcurrency = 64\nmax = 1\n";
    let dispatcher = with_tables(at, &ways, tables);
    for way in ways {
        let call = Call::new(way, "hostile").method("test.Probe", "Echo").input("\0");
        let calls: Vec<_> = (0..48).map(|_| dispatcher.begin(call.clone())).collect();
        for call in calls {
            let reply = call.finish().unwrap();
            assert_ne!(reply.code, Code::Ok, "{way}: {}", reply.summary());
            assert!(reply.elapsed < limit, "{way}: {:?}", reply.elapsed);
        }
    }
    dispatcher.stop();
}

/// Endless ones cost neither time nor memory without end.
fn floods_end(at: &Mode) {
    let ways = ["huge", "continuation", "headers", "bomb", "trailers", "pings"];
    let dispatcher = start(at, &ways);
    for way in ways {
        let reply = attack(&dispatcher, way);
        match way {
            // Many, but an answer: to take it is as good as not to.
            "trailers" => {}
            _ => assert_ne!(reply.code, Code::Ok, "{way}: {}", reply.summary()),
        }
    }
    let resident = dispatcher.process("dispatch-serve").resident().unwrap_or_default();
    assert!(resident < 256 << 20, "{resident}");
    dispatcher.stop();
}

fn what_is_at_the_path_is_no_socket(at: &Mode) {
    let ways = ["symlink", "fifo", "file"];
    let dispatcher = start(at, &ways);
    for way in ways {
        let reply = attack(&dispatcher, way);
        let known = [Code::DeadlineExceeded, Code::Unavailable].contains(&reply.code);
        assert!(known && reply.verdict != Verdict::Failed, "{way}: {}", reply.summary());
        assert_ne!(reply.verdict, Verdict::Completed, "{way}: {}", reply.summary());
    }
    dispatcher.stop();
}
