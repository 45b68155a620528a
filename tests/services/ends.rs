//! How instances end, and what becomes of the calls they had.

use std::time::Duration;

use dispatcher::wire::{Verdict, status::Code};

use crate::{
    Forbidden, Mode, again, call,
    common::{
        Call, Dispatcher, dispatcher::Running, host::named, scaled_ms, token, wait_for, wait_until,
    },
    gone, look, only, policy, start, started, state,
    wire::{Nothing, Number, Text},
};

in_every_mode! {
    one_that_exits,
    one_that_is_killed_by_a_signal_of_its_own,
    one_that_takes_too_much_memory,
    one_that_makes_a_forbidden_call,
    a_child_that_makes_trouble_is_its_trouble,
    one_that_never_listens,
    one_that_ends_before_it_listens,
    one_that_crashes_again_and_again,
    an_overrun_that_heeds_cancellation,
    an_overrun_that_does_not,
    who_went_away_from_one_that_does_not_heed_it,
    floods_on_its_outputs_harm_nobody,
}

/// A call that sleeps on, and is seen to.
fn bystander(dispatcher: &Dispatcher) -> Running {
    let nap = dispatcher.begin(again("ns", "Sleep", &Number { value: 25_000 }));
    wait_until("it sleeps", Duration::from_secs(10), || look(dispatcher, "ns").now == 2);
    nap
}

/// The next call finds another instance, new and well.
#[track_caller]
fn starts_anew(dispatcher: &Dispatcher, old: &str) {
    let reply = dispatcher.call(again("ns", "Look", &Nothing {}));
    let next = state(&reply);
    assert!(next.token != old && next.calls == 1 && !reply.report.warm, "{next:?}");
}

/// Has an instance ended by a call while another call is there, and asserts what both are told.
#[track_caller]
fn ends_by(
    at: &Mode,
    tables: &str,
    (method, message): (&str, &impl prost::Message),
    (verdict, reason): (Verdict, &str),
) -> [crate::Reply; 2] {
    let name = token();
    let dispatcher = start(at, &format!("{tables}{}", started(&format!("name={name}"))));
    let first = look(&dispatcher, "ns");
    let process = only(&name);
    let nap = bystander(&dispatcher);
    state(&dispatcher.call(again("ns", "Stderr", &Text { value: "last words\n".into() })));
    let guilty = dispatcher.call(again("ns", method, message));
    let innocent = nap.finish().unwrap();
    for reply in [&guilty, &innocent] {
        let reply = reply.clone().expect(Code::Unavailable, verdict, reason);
        assert!(reply.elapsed < Duration::from_millis(scaled_ms(10_000)), "{:?}", reply.elapsed);
    }
    // A call has of stderr what was written while it was there.
    assert!(innocent.stderr().contains("last words"), "{method}: {}", innocent.summary());
    wait_until("it is gone", Duration::from_secs(10), || !process.alive());
    starts_anew(&dispatcher, &first.token);
    dispatcher.stop();
    [guilty, innocent]
}

fn one_that_exits(at: &Mode) {
    let why = (Verdict::Exited, "exit_nonzero");
    for reply in ends_by(at, "", ("Exit", &Number { value: 3 }), why) {
        assert_eq!((reply.report.exit_code, reply.detail("exit_code")), (3, "3"));
    }
}

fn one_that_is_killed_by_a_signal_of_its_own(at: &Mode) {
    let why = (Verdict::Signalled, "signalled");
    for reply in ends_by(at, "", ("Abort", &Nothing {}), why) {
        assert_eq!((reply.report.signal, reply.detail("signal")), (libc::SIGABRT, "6"));
    }
}

fn one_that_takes_too_much_memory(at: &Mode) {
    let limits = "[limits]\nmemory = \"64MiB\"\n";
    let why = (Verdict::OutOfMemory, "out_of_memory");
    ends_by(at, limits, ("Allocate", &Number { value: 256 }), why);
}

fn one_that_makes_a_forbidden_call(at: &Mode) {
    let denied = match at.unshare {
        Forbidden::Named => "unshare",
        Forbidden::Unnamed => "",
        // No filter is there, and the kernel refuses. The service says so itself.
        Forbidden::Fails => {
            let dispatcher = start(at, "");
            let reply = dispatcher.call(call("ns", "Deadly", &Nothing {}));
            reply.expect(Code::PermissionDenied, Verdict::Completed, "service_status");
            dispatcher.stop();
            return;
        }
    };
    let why = (Verdict::SyscallDenied, "syscall_denied");
    for reply in ends_by(at, "", ("Deadly", &Nothing {}), why) {
        assert_eq!(reply.report.denied_syscall, denied);
    }
}

/// What an instance leaves behind when it ends goes with it, and it doesn't keep a connection.
fn a_child_that_makes_trouble_is_its_trouble(at: &Mode) {
    let child = token();
    let dispatcher = start(at, "");
    let first = look(&dispatcher, "ns");
    state(&dispatcher.call(again("ns", "Fork", &Text { value: child.clone() })));
    let process = wait_for("it has its name", Duration::from_secs(10), || named(&child).pop());
    assert_eq!(look(&dispatcher, "ns").token, first.token, "a child is nothing bad");
    let reply = dispatcher.call(again("ns", "Exit", &Number { value: 1 }));
    reply.expect(Code::Unavailable, Verdict::Exited, "exit_nonzero");
    wait_until("it went along", Duration::from_secs(10), || !process.alive());
    starts_anew(&dispatcher, &first.token);
    dispatcher.stop();
}

/// A policy for tests/programs/hostile.c.
fn hostile(at: &Mode, way: &str, tables: &str) -> String {
    policy(at, &format!("{tables}[environment]\nset = {{ HOSTILE = {way:?} }}\n"))
}

fn one_that_never_listens(at: &Mode) {
    let limit = scaled_ms(800);
    let tables = format!("[instances]\nstart_timeout = \"{limit}ms\"\n");
    let dispatcher = Dispatcher::start([
        ("deaf", hostile(at, "deaf", &tables)),
        ("silent", hostile(at, "silent", &tables)),
        ("late", policy(at, &format!("{tables}{}", started("delay=60000")))),
    ]);
    for (namespace, program, words) in [
        ("deaf", "hostile", "hostile: deaf"),
        ("silent", "hostile", "hostile: silent"),
        ("late", "service", ""),
    ] {
        let reply = dispatcher.call(Call::new(namespace, program).method("test.Probe", "Look"));
        let reply = reply.expect(Code::DeadlineExceeded, Verdict::TimedOut, "start_timeout");
        assert!(reply.message.contains(words), "the tail of stderr: {}", reply.message);
        assert!(reply.elapsed >= Duration::from_millis(limit), "{:?}", reply.elapsed);
        assert!(reply.elapsed < Duration::from_millis(limit * 6), "{:?}", reply.elapsed);
    }
    dispatcher.stop();
}

fn one_that_ends_before_it_listens(at: &Mode) {
    let dispatcher = start(at, &started("exit=7"));
    let reply = dispatcher.call(call("ns", "Look", &Nothing {}));
    let reply = reply.expect(Code::Unavailable, Verdict::Exited, "exit_nonzero");
    assert_eq!((reply.report.exit_code, reply.detail("exit_code")), (7, "7"));
    assert!(reply.message.contains("told to exit with 7"), "{}", reply.message);
    assert!(reply.stderr().contains("told to exit with 7"), "{}", reply.summary());
    dispatcher.stop();
}

fn one_that_crashes_again_and_again(at: &Mode) {
    let dispatcher =
        Dispatcher::start([("ns", policy(at, &started("exit=7"))), ("other", policy(at, ""))]);
    let mut tries = 0;
    let refused = wait_for("it is given up for a while", Duration::from_secs(60), || {
        let reply = dispatcher.call(call("ns", "Look", &Nothing {}));
        tries += 1;
        assert_eq!(reply.code, Code::Unavailable, "{}", reply.summary());
        (reply.reason() == "crash_loop").then_some(reply)
    });
    assert!(tries > 1, "the first crash is no loop");
    let refused = refused.refused(Code::Unavailable, "crash_loop");
    let retry: u64 = refused.detail("retry_after_ms").parse().expect("a number");
    assert!((1..=60_000).contains(&retry), "{retry}");
    assert_eq!(refused.trailers["grpc-retry-pushback-ms"], retry.to_string());
    // Others are not concerned: the same bytes in another namespace, other bytes in this one.
    look(&dispatcher, "other");
    let greeter = Call::new("ns", "greeter").method("helloworld.Greeter", "SayHello");
    let reply = dispatcher.call(greeter);
    reply.expect(Code::InvalidArgument, Verdict::Completed, "service_status");
    // It gets another chance.
    let limit = Duration::from_millis(retry) + Duration::from_secs(10);
    wait_until("it is tried again", limit, || {
        dispatcher.call(again("ns", "Look", &Nothing {})).verdict == Verdict::Exited
    });
    dispatcher.stop();
}

fn brief(method: &str) -> Call {
    let call = again("ns", method, &Number { value: 60_000 });
    call.timeout(Duration::from_millis(scaled_ms(500)))
}

fn an_overrun_that_heeds_cancellation(at: &Mode) {
    // With more, there may be another while this one is looked at.
    let dispatcher = start(at, "[instances]\nmax = 1\n");
    let first = look(&dispatcher, "ns");
    let nap = bystander(&dispatcher);
    for cancelled in 1..3 {
        let reply = dispatcher.call(brief("Sleep"));
        let reply = reply.expect(Code::DeadlineExceeded, Verdict::TimedOut, "timeout");
        assert!(reply.elapsed < Duration::from_millis(scaled_ms(2500)), "{:?}", reply.elapsed);
        wait_until("it is told", Duration::from_secs(10), || {
            let now = look(&dispatcher, "ns");
            assert_eq!(now.token, first.token, "it goes on");
            now.cancelled == cancelled
        });
    }
    assert!(!nap.is_over(), "the others are not concerned");
    nap.cancel();
    // The caller's own deadline is another way to the same.
    let deadline = Duration::from_millis(scaled_ms(1000));
    let nap = again("ns", "Sleep", &Number { value: 60_000 }).rpc_deadline(deadline);
    if let Ok(reply) = dispatcher.try_call(nap) {
        reply.expect(Code::DeadlineExceeded, Verdict::TimedOut, "timeout");
    }
    wait_until("it is told of all", Duration::from_secs(10), || {
        look(&dispatcher, "ns").cancelled == 4
    });
    assert_eq!(look(&dispatcher, "ns").token, first.token);
    dispatcher.stop();
}

fn an_overrun_that_does_not(at: &Mode) {
    for method in ["Spin", "Block"] {
        let name = token();
        // With one thread, it answers nothing and nobody any more.
        let dispatcher = start(at, &started(&format!("threads=1 name={name}")));
        let first = look(&dispatcher, "ns");
        let process = only(&name);
        let reply = dispatcher.call(brief(method));
        let reply = reply.expect(Code::DeadlineExceeded, Verdict::TimedOut, "timeout");
        assert!(reply.elapsed < Duration::from_millis(scaled_ms(5000)), "{:?}", reply.elapsed);
        wait_until("it is ended", Duration::from_secs(20), || !process.alive());
        starts_anew(&dispatcher, &first.token);
        dispatcher.stop();
    }
}

fn who_went_away_from_one_that_does_not_heed_it(at: &Mode) {
    let name = token();
    let dispatcher = start(at, &started(&format!("threads=1 name={name}")));
    let first = look(&dispatcher, "ns");
    let process = only(&name);
    let spin = dispatcher.begin(again("ns", "Spin", &Number { value: 60_000 }));
    let before = process.ticks();
    wait_until("it spins", Duration::from_secs(10), || process.ticks() > before + 5);
    spin.cancel();
    wait_until("it is ended", Duration::from_secs(20), || !process.alive());
    starts_anew(&dispatcher, &first.token);
    dispatcher.stop();
    gone(&name);
}

fn floods_on_its_outputs_harm_nobody(at: &Mode) {
    let dispatcher = start(at, "");
    let first = look(&dispatcher, "ns");
    let flood = again("ns", "Flood", &Number { value: 64 });
    let (one, two) = (dispatcher.begin(flood.clone()), dispatcher.begin(flood));
    assert_eq!(look(&dispatcher, "ns").token, first.token);
    for flood in [one, two] {
        let reply = flood.finish().unwrap();
        assert_eq!(state(&reply).token, first.token);
        assert!(reply.report.stderr.len() <= 64 << 10, "{}", reply.report.stderr.len());
    }
    let resident = dispatcher.process("dispatch-serve").resident().unwrap_or_default();
    assert!(resident < 256 << 20, "{resident}");
    dispatcher.stop();
}
