//! Many calls at once, and what an instance may have at most.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use dispatcher::wire::{Verdict, status::Code};
use prost::Message as _;

use crate::{
    Mode, again, answer, call,
    common::{client::runtime, host, scaled_ms, token},
    look, only, start, started, state,
    wire::{Nothing, Number, Payload, State, Text},
};

in_every_mode! {
    many_at_once_are_not_mixed_up,
    calls_of_two_kinds_share_one_place,
    its_tasks_are_limited,
    its_processor_time_is_limited,
}

/// More of them where a call is not started by Docker's leave.
fn many_at_once_are_not_mixed_up(at: &Mode) {
    const AT_ONCE: usize = 64;
    let count = if at.name == "jail" { 10_000 } else { 1_000 };
    let tables = "[admission]\nconcurrency = 64\n[instances]\nconcurrency = 64\nmax = 1\n";
    let dispatcher = start(at, tables);
    let first = look(&dispatcher, "ns");
    let payload = |index: usize| Bytes::from(format!("{index} {}", "x".repeat(index % 999)));
    let echo = again("ns", "Echo", &Nothing {});
    let callers = (0..AT_ONCE).map(|caller| {
        let (echo, channel) = (echo.clone(), dispatcher.channel());
        runtime().spawn(async move {
            for index in (caller..count).step_by(AT_ONCE) {
                let message = Payload { data: payload(index) }.encode_to_vec();
                let call = echo.clone().any("type.googleapis.com/test.Payload", message);
                let reply = call.send(channel.clone()).await.unwrap();
                assert!(answer::<Payload>(&reply, "test.Payload").data == payload(index));
                assert!(reply.report.warm, "{}", reply.summary());
            }
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        runtime().block_on(caller).unwrap();
    }
    assert_eq!(look(&dispatcher, "ns").calls, count as u64 + 2);

    // All of them at the same moment.
    let nap = again("ns", "Sleep", &Number { value: scaled_ms(1500) });
    let naps: Vec<_> = (0..AT_ONCE).map(|_| dispatcher.begin(nap.clone())).collect();
    let states: Vec<_> = naps.into_iter().map(|nap| state(&nap.finish().unwrap())).collect();
    let most = states.iter().map(|state| state.most_at_once).max().unwrap();
    assert_eq!(most, AT_ONCE as u64);
    assert!(states.iter().all(|state| state.token == first.token));
    dispatcher.stop();
}

/// What a call asks for makes it another kind of instance, and there is room for one.
fn calls_of_two_kinds_share_one_place(at: &Mode) {
    let name = token();
    let tables =
        "[limits]\nmemory = \"96MiB\"\n[admission]\nconcurrency = 8\n[instances]\nmax = 1\n";
    let dispatcher = start(at, &format!("{tables}{}", started(&format!("name={name}"))));
    look(&dispatcher, "ns");
    let calls: Vec<_> = (0..8)
        .map(|index| {
            let nap = again("ns", "Sleep", &Number { value: 20 });
            dispatcher.begin(if index % 2 == 0 { nap } else { nap.memory(80 << 20) })
        })
        .collect();
    let mut most = 0;
    while !calls.iter().all(|call| call.is_over()) {
        most = most.max(host::named(&name).len());
        std::thread::sleep(Duration::from_millis(20)); // to look again
    }
    let states: Vec<State> = calls.into_iter().map(|call| state(&call.finish().unwrap())).collect();
    let tokens: BTreeSet<_> = states.iter().map(|state| &state.token).collect();
    assert!(tokens.len() >= 2, "{states:?}");
    // One that is going is still to be seen for a moment.
    assert!(most <= 2, "{most} where one may be");
    dispatcher.stop();
}

fn its_tasks_are_limited(at: &Mode) {
    let dispatcher = start(at, "[limits]\npids = 24\n");
    let first = look(&dispatcher, "ns");
    let name = token();
    let fork = || dispatcher.call(again("ns", "Fork", &Text { value: name.clone() }));
    let mut children = 0;
    let refused = loop {
        let reply = fork();
        if reply.code != Code::Ok {
            break reply;
        }
        children += 1;
        assert!(children < 24, "as many as it likes");
    };
    let refused = refused.expect(Code::Internal, Verdict::Completed, "service_status");
    assert!(refused.message.contains("os error 11"), "EAGAIN: {}", refused.message);
    assert!(children > 8, "{children}");
    assert_eq!(host::named(&name).len(), children);
    // It goes on, and nobody else is concerned.
    assert_eq!(look(&dispatcher, "ns").token, first.token);
    let other = call("other", "Fork", &Text { value: name });
    assert_ne!(state(&dispatcher.call(other)).token, first.token);
    dispatcher.stop();
}

fn its_processor_time_is_limited(at: &Mode) {
    let name = token();
    let tables = format!("[limits]\ncpus = 0.25\n{}", started(&format!("name={name}")));
    let dispatcher = start(at, &tables);
    let first = look(&dispatcher, "ns");
    let process = only(&name);
    let before = process.ticks();
    let milliseconds = scaled_ms(2000);
    let spin = again("ns", "Spin", &Number { value: milliseconds });
    assert_eq!(state(&dispatcher.call(spin)).token, first.token);
    let used = (process.ticks() - before) * 10; // a hundred ticks a second
    assert!(used < milliseconds / 2, "{used} of {milliseconds} ms");
    assert!(used > 0);
    dispatcher.stop();
}
