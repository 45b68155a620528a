//! When instances are started, shared, kept and ended.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use dispatcher::{
    names::Digest,
    wire::{Verdict, status::Code},
};
use nix::sys::signal::Signal;

use crate::{
    Mode, again, call,
    common::{
        Dispatcher, Settings, host, patience, programs, scaled_ms, slowness, token, wait_for,
        wait_until,
    },
    gone, look, only, policy, start, started, state,
    wire::{Nothing, Number, State, Text},
};

in_every_mode! {
    namespaces_never_share_one,
    as_many_as_allowed_take_as_many_calls_as_allowed,
    calls_beyond_all_instances_wait,
    after_its_last_request_it_is_another,
    an_idle_one_ends,
    an_idle_one_costs_no_time,
    the_least_are_kept,
    a_reload_drains_those_of_old,
    a_reload_during_a_start_loses_no_call,
    who_goes_away_is_known_to_the_service,
    an_end_in_good_order_waits_for_calls,
    nothing_is_left,
    a_lost_launcher_takes_its_instances_along,
    a_lost_server_takes_its_instances_along,
    a_lost_monitor_takes_all_along,
}

/// Sends that many calls at once, each of which stays for a while, and returns the states
/// that they are answered with.
#[track_caller]
fn at_once(dispatcher: &Dispatcher, count: usize, milliseconds: u64) -> Vec<State> {
    let nap = again("ns", "Sleep", &Number { value: milliseconds });
    let calls: Vec<_> = (0..count).map(|_| dispatcher.begin(nap.clone())).collect();
    calls.into_iter().map(|call| state(&call.finish().expect("an answer"))).collect()
}

fn tokens(states: &[State]) -> BTreeSet<&str> {
    states.iter().map(|state| state.token.as_str()).collect()
}

fn namespaces_never_share_one(at: &Mode) {
    let dispatcher = start(at, "");
    let ours = look(&dispatcher, "ns");
    let reply = dispatcher.call(call("other", "Look", &Nothing {}));
    assert!(!reply.report.warm);
    let theirs = state(&reply);
    assert_ne!(ours.token, theirs.token);
    // Neither is ended for the other's sake.
    assert_eq!(look(&dispatcher, "ns").token, ours.token);
    assert_eq!(look(&dispatcher, "other").token, theirs.token);
    dispatcher.stop();
}

fn as_many_as_allowed_take_as_many_calls_as_allowed(at: &Mode) {
    let name = token();
    let tables = format!(
        "[admission]\nconcurrency = 64\nqueue = 64\n[limits]\nmemory = \"64MiB\"\n\
         [instances]\nmax = 4\nconcurrency = 16\n{}",
        started(&format!("name={name}"))
    );
    let dispatcher = start(at, &tables);
    look(&dispatcher, "ns");
    let nap = again("ns", "Sleep", &Number { value: scaled_ms(1000) });
    let calls: Vec<_> = (0..64).map(|_| dispatcher.begin(nap.clone())).collect();
    let mut most = 0;
    while !calls.iter().all(|call| call.is_over()) {
        most = most.max(host::named(&name).len());
        std::thread::sleep(Duration::from_millis(20)); // to look again
    }
    assert!((2..=4).contains(&most), "{most} processes where four may be");
    let states: Vec<_> = calls.into_iter().map(|call| state(&call.finish().unwrap())).collect();
    let mut calls_of: BTreeMap<&str, u64> = BTreeMap::new();
    for state in &states {
        assert!(state.most_at_once <= 16, "{state:?}");
        *calls_of.entry(&state.token).or_default() += 1;
    }
    assert!((2..=4).contains(&calls_of.len()), "{calls_of:?}");
    assert!(states.iter().any(|state| state.most_at_once > 8), "{states:?}");
    dispatcher.stop();
}

fn calls_beyond_all_instances_wait(at: &Mode) {
    let tables = "[instances]\nmax = 1\nconcurrency = 3\n[admission]\nconcurrency = 12\n";
    let dispatcher = start(at, tables);
    let first = look(&dispatcher, "ns");
    let states = at_once(&dispatcher, 12, scaled_ms(100));
    assert_eq!(tokens(&states), BTreeSet::from([first.token.as_str()]));
    let most = states.iter().map(|state| state.most_at_once).max();
    assert!(matches!(most, Some(2..=3)), "{most:?}");
    dispatcher.stop();
}

fn after_its_last_request_it_is_another(at: &Mode) {
    let name = token();
    let tables = format!("[instances]\nmax_requests = 3\n{}", started(&format!("name={name}")));
    let dispatcher = start(at, &tables);
    let states: Vec<_> = (0..8).map(|_| look(&dispatcher, "ns")).collect();
    assert_eq!(tokens(&states).len(), 3, "{states:?}");
    assert!(states.iter().all(|state| state.calls <= 3), "{states:?}");
    wait_until("those that had their share are gone", Duration::from_secs(10), || {
        host::named(&name).len() == 1
    });
    // At once, none takes more than its share either.
    let states = at_once(&dispatcher, 9, scaled_ms(100));
    assert!(states.iter().all(|state| state.calls <= 3), "{states:?}");
    dispatcher.stop();
}

fn an_idle_one_ends(at: &Mode) {
    let name = token();
    let limit = scaled_ms(700);
    let tables =
        format!("[instances]\nidle_timeout = \"{limit}ms\"\n{}", started(&format!("name={name}")));
    let dispatcher = start(at, &tables);
    let first = look(&dispatcher, "ns");
    let process = only(&name);
    // One that has a call isn't idle, however long that takes.
    let nap = again("ns", "Sleep", &Number { value: limit * 2 });
    assert_eq!(state(&dispatcher.call(nap)).token, first.token);
    let idle = Instant::now();
    wait_until("it is gone", Duration::from_secs(20), || !process.alive());
    let idle = idle.elapsed();
    assert!(idle >= Duration::from_millis(limit / 2), "{idle:?}");
    let reply = dispatcher.call(again("ns", "Look", &Nothing {}));
    assert!(!reply.report.warm);
    assert_ne!(state(&reply).token, first.token);
    dispatcher.stop();
}

/// One that is always busy is stopped while it has no call, and goes on with the next.
fn an_idle_one_costs_no_time(at: &Mode) {
    let name = token();
    let dispatcher = start(at, &started(&format!("name={name} busy=true")));
    let first = look(&dispatcher, "ns");
    let process = only(&name);
    // Containers are never stopped: their init would not see that nobody holds them.
    let can_be = at.name != "container" && host::has_cgroup_v2();
    for _ in 0..2 {
        if can_be {
            wait_until("it is stopped", Duration::from_secs(20), || process.is_frozen());
        }
        let before = process.ticks();
        let nap = dispatcher.begin(again("ns", "Sleep", &Number { value: scaled_ms(1500) }));
        wait_until("it goes on", Duration::from_secs(20), || process.ticks() > before + 10);
        assert_eq!(state(&nap.finish().unwrap()).token, first.token);
    }
    dispatcher.stop();
}

fn the_least_are_kept(at: &Mode) {
    let name = token();
    let digest = Digest::of(&programs::bytes("service"));
    let tables = format!(
        "[artifacts]\ndigests = [\"{digest}\"]\n\
         [instances]\nmin = 1\nidle_timeout = \"{}ms\"\n{}",
        scaled_ms(300),
        started(&format!("name={name}"))
    );
    let dispatcher = Dispatcher::start([("ns", policy(at, &tables))]);
    let first = look(&dispatcher, "ns");
    let process = only(&name);
    std::thread::sleep(Duration::from_millis(scaled_ms(900))); // idle three times over: the point
    assert!(process.alive());
    assert_eq!(look(&dispatcher, "ns").token, first.token);

    // What ends is replaced before anybody asks.
    dispatcher.call(again("ns", "Exit", &Number { value: 1 }));
    wait_until("another is there", Duration::from_secs(20), || {
        host::named(&name).iter().any(|found| *found != process)
    });
    wait_until("and ready", Duration::from_secs(20), || {
        dispatcher.call(again("ns", "Look", &Nothing {})).report.warm
    });
    dispatcher.stop();
}

fn a_reload_drains_those_of_old(at: &Mode) {
    let (old, new) = (token(), token());
    let named = |name: &str| policy(at, &started(&format!("name={name}")));
    let dispatcher = Dispatcher::start([("ns", named(&old)), ("other", policy(at, ""))]);
    let begun = Instant::now();
    let first = look(&dispatcher, "ns");
    // Long enough for another to start meanwhile, which takes containers a second and more.
    let long = scaled_ms(1500) + 4 * begun.elapsed().as_millis() as u64;
    let other = look(&dispatcher, "other");
    let process = only(&old);
    let nap = dispatcher.begin(again("ns", "Sleep", &Number { value: long }));
    wait_until("it sleeps", Duration::from_secs(10), || look(&dispatcher, "ns").now == 2);

    dispatcher.write_policy("ns", &named(&new));
    dispatcher.signal(Signal::SIGHUP);
    wait_until("the new policy is in force", Duration::from_secs(10), || {
        look(&dispatcher, "ns").token != first.token
    });
    assert!(!nap.is_over() && process.alive(), "what it had is not lost");
    assert!(!host::named(&new).is_empty());
    assert_eq!(state(&nap.finish().unwrap()).token, first.token);
    wait_until("and with it, it is gone", Duration::from_secs(10), || !process.alive());
    assert_eq!(look(&dispatcher, "other").token, other.token, "whose policy is as it was");
    dispatcher.stop();
}

fn a_reload_during_a_start_loses_no_call(at: &Mode) {
    let (old, new) = (token(), token());
    let slow = |name: &str| policy(at, &started(&format!("name={name} delay={}", scaled_ms(1000))));
    let dispatcher = Dispatcher::start([("ns", slow(&old))]);
    let waiting = dispatcher.begin(call("ns", "Look", &Nothing {}));
    wait_until("it is being started", Duration::from_secs(20), || !host::named(&old).is_empty());
    dispatcher.write_policy("ns", &slow(&new));
    dispatcher.signal(Signal::SIGHUP);
    state(&waiting.finish().unwrap());
    wait_until("with its last call it is gone", Duration::from_secs(10), || {
        host::named(&old).is_empty()
    });
    look(&dispatcher, "ns");
    assert!(!host::named(&new).is_empty());
    dispatcher.stop();
}

fn who_goes_away_is_known_to_the_service(at: &Mode) {
    // With more, there may be another while this one is looked at.
    let dispatcher = start(at, "[instances]\nmax = 1\n");
    let first = look(&dispatcher, "ns");
    let id = token();
    let nap = again("ns", "Sleep", &Number { value: 25_000 });
    let nap = dispatcher.begin(nap.option(|options| options.request_id = id.clone()));
    wait_until("it sleeps", Duration::from_secs(10), || look(&dispatcher, "ns").now == 2);
    nap.cancel();
    wait_until("it is told", Duration::from_secs(10), || {
        let now = look(&dispatcher, "ns");
        assert_eq!(now.token, first.token);
        now.cancelled == 1
    });
    wait_until("it is on record as cancelled", Duration::from_secs(5), || {
        let log = dispatcher.log();
        log.lines().any(|line| line.contains(&id) && line.to_lowercase().contains("cancelled"))
    });
    dispatcher.stop();
}

fn an_end_in_good_order_waits_for_calls(at: &Mode) {
    let name = token();
    let dispatcher = start(at, &started(&format!("name={name}")));
    look(&dispatcher, "ns");
    let nap = dispatcher.begin(again("ns", "Sleep", &Number { value: scaled_ms(1000) }));
    wait_until("it sleeps", Duration::from_secs(10), || look(&dispatcher, "ns").now == 2);
    dispatcher.signal(Signal::SIGTERM);
    state(&nap.finish().unwrap());
    assert_eq!(dispatcher.wait(Duration::from_secs(30)).code(), Some(0));
    gone(&name);
    dispatcher.stop();
}

/// Whatever an instance had become: stop() asserts the rest.
fn nothing_is_left(at: &Mode) {
    let (name, child) = (token(), token());
    let dispatcher = start(at, &started(&format!("name={name}")));
    look(&dispatcher, "ns");
    state(&dispatcher.call(again("ns", "Fork", &Text { value: child.clone() })));
    state(&dispatcher.call(call("other", "Fork", &Text { value: child.clone() })));
    // A child takes its name by itself.
    wait_until("all are there", Duration::from_secs(5), || {
        (host::named(&name).len(), host::named(&child).len()) == (2, 2)
    });
    dispatcher.stop();
    gone(&name);
    gone(&child);
}

fn a_lost_launcher_takes_its_instances_along(at: &Mode) {
    let name = token();
    let dispatcher = start(at, &started(&format!("name={name}")));
    let first = look(&dispatcher, "ns");
    let process = only(&name);
    let nap = dispatcher.begin(again("ns", "Sleep", &Number { value: 25_000 }));
    wait_until("it sleeps", Duration::from_secs(10), || look(&dispatcher, "ns").now == 2);
    let maker = if at.name == "container" { "dispatch-docker" } else { "dispatch-launch" };
    dispatcher.process(maker).signal(Signal::SIGKILL);
    let reply = nap.finish().unwrap();
    reply.expect(Code::Unavailable, Verdict::Failed, "launcher_lost");
    wait_until("it is gone", Duration::from_secs(10), || !process.alive());
    let next = wait_for("a new one", Duration::from_secs(20), || {
        let reply = dispatcher.call(again("ns", "Look", &Nothing {}));
        (reply.code == Code::Ok).then(|| state(&reply))
    });
    assert_ne!(next.token, first.token);
    dispatcher.stop();
}

fn a_lost_server_takes_its_instances_along(at: &Mode) {
    let name = token();
    let dispatcher = start(at, &started(&format!("name={name}")));
    look(&dispatcher, "ns");
    let process = only(&name);
    dispatcher.process("dispatch-serve").signal(Signal::SIGKILL);
    wait_until("it is gone", Duration::from_secs(10), || !process.alive());
    // The listening socket stays; what was held is not promised to.
    let next = wait_for("a new one", Duration::from_secs(20), || {
        let reply = dispatcher.try_call(call("ns", "Look", &Nothing {})).ok()?;
        (reply.code == Code::Ok).then(|| state(&reply))
    });
    assert_eq!(next.calls, 1);
    dispatcher.stop();
}

fn a_lost_monitor_takes_all_along(at: &Mode) {
    let (name, child) = (token(), token());
    let text = policy(at, &started(&format!("name={name}")));
    let prepared = Settings::new([("ns", text)]).prepare();
    let dispatcher = prepared.start();
    look(&dispatcher, "ns");
    state(&dispatcher.call(again("ns", "Fork", &Text { value: child.clone() })));
    dispatcher.descendants();
    dispatcher.signal(Signal::SIGKILL);
    dispatcher.wait(Duration::from_secs(5));
    // Docker takes its time.
    let limit = Duration::from_secs(if at.name == "container" { 10 } else { 2 });
    wait_until("the instance is gone", limit, || {
        host::named(&name).is_empty() && host::named(&child).is_empty()
    });
    dispatcher.assert_no_processes(Duration::from_secs(10));
    dispatcher.stop();
    // The next start takes away what may be left: empty cgroups, containers that ended.
    let dispatcher = prepared.start();
    look(&dispatcher, "ns");
    dispatcher.stop();
}

/// Of the host's memory, instances take what their policies give them; one that is idle makes
/// way for who has none.
#[test]
fn idle_ones_make_way() {
    let limits = "[limits]\nmemory = \"64MiB\"\n[admission]\nqueue_timeout = \"20s\"\n";
    let policies = ["a", "b", "c"].map(|name| (name, policy(&crate::JAIL, limits)));
    let dispatcher = Settings::new(policies).server("memory = \"150MiB\"\n").start();
    let started = Instant::now();
    for _ in 0..2 {
        for name in ["a", "b", "c"] {
            look(&dispatcher, name);
        }
    }
    let limit = patience(Duration::from_secs(15));
    assert!(started.elapsed() < limit, "{:?}, by {}", started.elapsed(), slowness());
    dispatcher.stop();
}
