//! How many calls run at once, how many wait and how long, and who is turned away; and that
//! none is for what others happen to have on its way.

mod common;

use std::{
    fs,
    io::IoSlice,
    os::{fd::AsRawFd as _, unix::net::UnixDatagram},
    sync::OnceLock,
    time::{Duration, Instant},
};

use common::{
    Call, Dispatcher, Reply, Settings,
    client::{gauge, to_duration},
    dispatcher::{Running, plain},
    host, not_here, rootless, scaled_ms, shared, slowness, token, wait_until,
};
use dispatcher::wire::{Verdict, status::Code};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Calls a second: fewer than this machine could begin.
fn rate() -> u32 {
    (5.0 / slowness()).max(1.0) as u32
}

fn policy(lines: &str) -> String {
    plain(&format!("[admission]\n{lines}\n"))
}

fn dispatcher() -> &'static Dispatcher {
    static SERVER: OnceLock<Dispatcher> = OnceLock::new();
    shared(&SERVER, || {
        let brief = format!("concurrency = 1\nqueue = 4\nqueue_timeout = \"{}ms\"", scaled_ms(300));
        Dispatcher::start([
            // One policy per test: the tests run at the same time.
            ("one", policy("concurrency = 1\nqueue = 1\nqueue_timeout = \"1m\"")),
            ("brief", policy(&brief)),
            ("deadline", policy("concurrency = 1\nqueue = 4\nqueue_timeout = \"1m\"")),
            ("none", policy("concurrency = 1\nqueue = 0")),
            ("leaving", policy("concurrency = 1\nqueue = 1\nqueue_timeout = \"1m\"")),
            ("three", policy("concurrency = 3\nqueue = 64\nqueue_timeout = \"1m\"")),
            ("rate", policy(&format!("rate = \"{}/s\"", rate()))),
            ("slow-rate", policy("rate = \"1/h\"")),
            ("free", plain("")),
        ])
    })
}

/// Starts a run that goes on until it is cancelled, and sees it running.
fn occupy(dispatcher: &Dispatcher, namespace: &str) -> (Running, String) {
    let name = token();
    let running = dispatcher.begin(Call::new(namespace, "act").args(&["name", &name, "forever"]));
    wait_until("the place is taken", Duration::from_secs(10), || !host::named(&name).is_empty());
    (running, name)
}

/// Asserts a refusal for overload that says when to come back.
#[track_caller]
fn overloaded(reply: Reply, reason: &str) {
    let reply = reply.refused(Code::ResourceExhausted, reason);
    let retry: u64 = reply.detail("retry_after_ms").parse().expect("retry_after_ms is a number");
    assert!(retry > 0, "{}", reply.summary());
    let pushback = reply.trailers.get("grpc-retry-pushback-ms").expect("the trailer for clients");
    assert_eq!(pushback, &retry.to_string());
}

fn queue_time(reply: &Reply) -> Duration {
    to_duration(reply.report.queue_time.as_ref())
}

/// What a call is told that will not wait: `queue_full`, or that it stood in the
/// queue until its deadline. Empty where the answer came too late.
fn told_at_the_queue(namespace: &str) -> String {
    let brief = Call::new(namespace, "act").rpc_deadline(Duration::from_millis(scaled_ms(200)));
    dispatcher().try_call(brief).map(|reply| reply.reason().to_owned()).unwrap_or_default()
}

/// Sends a call and sees it stand in the queue, of which it takes the last place.
fn queue_up(call: &Call) -> Running {
    let namespace = call.request.namespace.clone();
    let mut waiting = dispatcher().begin(call.clone());
    wait_until("the queue is full", Duration::from_secs(10), || {
        // The call that looks may have come first and taken the place for a moment.
        if waiting.is_over() {
            waiting = dispatcher().begin(call.clone());
        }
        told_at_the_queue(&namespace) == "queue_full" && !waiting.is_over()
    });
    waiting
}

#[test]
fn a_full_queue_turns_away() {
    let (first, _) = occupy(dispatcher(), "one");
    let second = queue_up(&Call::new("one", "act").args(&["print", "second"]));
    let asked = Instant::now();
    overloaded(dispatcher().run("one", "act", &[]), "queue_full");
    assert!(
        asked.elapsed() < Duration::from_millis(scaled_ms(1000)),
        "at once: {:?}",
        asked.elapsed()
    );
    // Another namespace is not concerned.
    dispatcher().run("free", "act", &[]).ok();

    first.cancel();
    let second = second.finish().unwrap().ok();
    assert_eq!(second.text(), "second");
    assert!(queue_time(&second) > Duration::ZERO);
    assert!(second.wall() < second.elapsed, "time in the queue is not time of the run");
}

#[test]
fn without_a_queue_nobody_waits() {
    let (first, _) = occupy(dispatcher(), "none");
    overloaded(dispatcher().run("none", "act", &[]), "queue_full");
    first.cancel();
    wait_until("the place is free again", Duration::from_secs(10), || {
        dispatcher().run("none", "act", &[]).verdict == Verdict::Exited
    });
}

#[test]
fn waiting_ends() {
    let (first, _) = occupy(dispatcher(), "brief");
    let reply = dispatcher().run("brief", "act", &[]);
    let (limit, waited) = (Duration::from_millis(scaled_ms(300)), reply.elapsed);
    assert!(waited >= limit && waited < limit * 4, "{waited:?}");
    overloaded(reply, "queue_timeout");
    first.cancel();
}

#[test]
fn the_rpc_deadline_holds_in_the_queue_too() {
    let (first, _) = occupy(dispatcher(), "deadline");
    let deadline = Duration::from_millis(scaled_ms(1000));
    let reply = dispatcher().call(Call::new("deadline", "act").rpc_deadline(deadline));
    assert!(reply.elapsed < deadline, "the refusal arrives in time: {:?}", reply.elapsed);
    reply.refused(Code::DeadlineExceeded, "deadline_in_queue");
    // The policy's own timeout does not run while a call waits.
    let call = Call::new("deadline", "act").args(&["print", "late"]);
    let waiting = dispatcher().begin(call.timeout(Duration::from_millis(scaled_ms(200))));
    std::thread::sleep(Duration::from_millis(scaled_ms(400))); // longer than its timeout: the point
    first.cancel();
    assert_eq!(waiting.finish().unwrap().ok().text(), "late");
}

#[test]
fn who_leaves_the_queue_frees_the_place() {
    let (first, _) = occupy(dispatcher(), "leaving");
    queue_up(&Call::new("leaving", "act")).cancel();
    // Who is let in waits until its deadline; who is not is turned away at once.
    wait_until("the place in the queue is free", Duration::from_secs(10), || {
        told_at_the_queue("leaving") == "deadline_in_queue"
    });
    first.cancel();
}

#[test]
fn the_queue_keeps_its_order() {
    // One of its own: the metrics count who waits under any policy.
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("health");
    let order = policy("concurrency = 1\nqueue = 8\nqueue_timeout = \"1m\"");
    let dispatcher = Settings::new([("order", order)])
        .server(&format!("health_listen = \"unix:{}\"\n", socket.display()))
        .start();
    let (first, _) = occupy(&dispatcher, "order");
    let mut waiting = vec![];
    for index in 0..4 {
        let call = Call::new("order", "act").args(&["print", &index.to_string()]);
        waiting.push(dispatcher.begin(call));
        // Arrival is what counts.
        wait_until("it has arrived", Duration::from_secs(10), || {
            gauge(&socket, "dispatcher_waiting") == waiting.len() as u64
        });
    }
    first.cancel();
    let replies: Vec<_> = waiting.into_iter().map(|call| call.finish().unwrap().ok()).collect();
    let start = |reply: &Reply| {
        let time = reply.report.start_time.unwrap();
        (time.seconds, time.nanos)
    };
    assert!(replies.is_sorted_by_key(start), "first come, first served");
    dispatcher.stop();
}

#[test]
fn no_more_than_allowed_run_at_once() {
    let call = Call::new("three", "act").args(&["clock", "sleep", "60", "clock"]);
    let calls: Vec<_> = (0..24).map(|_| dispatcher().begin(call.clone())).collect();
    let mut changes = vec![];
    for call in calls {
        let facts = call.finish().unwrap().ok().facts();
        let times: Vec<u64> = facts.all("clock").iter().map(|time| time.parse().unwrap()).collect();
        changes.push((times[0], 1));
        changes.push((times[1], -1));
    }
    changes.sort();
    let (mut now, mut most) = (0, 0);
    for (_, change) in changes {
        now += change;
        most = most.max(now);
    }
    assert!((2..=3).contains(&most), "{most} at once where 3 may");
}

#[test]
fn rates_are_kept() {
    let started = Instant::now();
    let (mut begun, mut refused) = (0_u32, 0);
    while started.elapsed() < Duration::from_secs(2) {
        // Together: a slow machine makes no five calls a second one after the other.
        let calls: Vec<_> = (0..16).map(|_| dispatcher().begin(Call::new("rate", "act"))).collect();
        for call in calls {
            let reply = call.finish().unwrap();
            if reply.verdict == Verdict::Exited {
                begun += 1;
            } else {
                overloaded(reply, "rate_exceeded");
                refused += 1;
            }
        }
    }
    // A burst of one second's worth, and then as many in each second.
    let seconds = started.elapsed().as_secs_f64();
    let most = f64::from(rate()) * (seconds + 1.0) + 1.0;
    assert!(f64::from(begun) <= most, "{begun} in {seconds} s");
    assert!(begun >= rate() && refused > 0, "{begun} begun, {refused} refused");

    dispatcher().run("slow-rate", "act", &[]).ok();
    let reply = dispatcher().run("slow-rate", "act", &[]);
    assert!(
        reply.detail("retry_after_ms").parse::<u64>().unwrap() > 1_000_000,
        "{}",
        reply.summary()
    );
    overloaded(reply, "rate_exceeded");
}

/// A policy of runs that don't wait long for their turn.
fn hasty(memory: &str) -> String {
    plain(&format!("[limits]\nmemory = \"{memory}\"\n[admission]\nqueue_timeout = \"300ms\"\n"))
}

/// The server's own limits, over all namespaces together.
#[test]
fn the_host_has_limits_of_its_own() {
    let policy = plain("[limits]\nmemory = \"48MiB\"\n[admission]\nqueue_timeout = \"1m\"\n");
    let settings = Settings::new([
        ("a", policy.clone()),
        ("b", policy),
        ("hasty", hasty("48MiB")),
        ("huge", plain("[limits]\nmemory = \"4GiB\"\n")),
    ]);
    let dispatcher = settings.server("concurrency = 2\nmemory = \"100MiB\"\n").start();

    let (first, _) = occupy(&dispatcher, "a");
    let (second, _) = occupy(&dispatcher, "b");
    let third = dispatcher.begin(Call::new("a", "act").args(&["print", "third"]));
    overloaded(dispatcher.run("hasty", "act", &[]), "queue_timeout");
    first.cancel();
    assert_eq!(third.finish().unwrap().ok().text(), "third");
    second.cancel();

    // What can never fit is refused, not kept waiting for ever.
    let reply = dispatcher.run("huge", "act", &[]);
    assert_eq!(reply.verdict, Verdict::Refused, "{}", reply.summary());
    assert!(reply.elapsed < Duration::from_secs(5), "{:?}", reply.elapsed);
    // Asking for less makes it fit.
    dispatcher.call(Call::new("huge", "act").memory(32 << 20)).ok();
    dispatcher.stop();
}

/// The sum of the memory limits is what the budget bounds, not the number of runs.
#[test]
fn the_memory_budget_is_kept() {
    let policy = plain("[limits]\nmemory = \"64MiB\"\n[admission]\nqueue_timeout = \"1m\"\n");
    let dispatcher = Settings::new([("a", policy), ("hasty", hasty("64MiB"))])
        .server("memory = \"100MiB\"\n")
        .start();
    let (first, _) = occupy(&dispatcher, "a");
    overloaded(dispatcher.run("hasty", "act", &[]), "queue_timeout");
    // A smaller one fits beside it.
    dispatcher.call(Call::new("a", "act").memory(16 << 20)).ok();
    first.cancel();
    wait_until("the budget is free again", Duration::from_secs(10), || {
        dispatcher.run("a", "act", &[]).verdict == Verdict::Exited
    });
    dispatcher.stop();
}

/// The kernel counts descriptors that are on their way in sockets for a user, and holds a sender
/// to its own limit of open ones, unix(7): without root that user is everybody's.
#[test]
fn few_descriptors_are_enough_whatever_is_on_its_way_elsewhere() {
    const MOST: usize = 6;
    if !rootless() {
        not_here!("root's runs have users of their own");
    }
    let few = format!("[limits]\nopen_files = {MOST}\n");
    let dispatcher = Dispatcher::start([("jail", plain(&few))]);
    let (sender, receiver) = UnixDatagram::pair().unwrap();
    let on_their_way = [sender.as_raw_fd(); 4 * MOST];
    let rights = [ControlMessage::ScmRights(&on_their_way)];
    let bytes = [IoSlice::new(b"x")];
    sendmsg::<()>(sender.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None).unwrap();
    let running = dispatcher.begin(Call::new("jail", "act").args(&["print", "ran"]));
    // It has its limits then, and has yet to send the listener of its filter.
    let limit = format!("Max open files            {MOST} ");
    wait_until("the program's process has its limits", Duration::from_secs(10), || {
        dispatcher.descendants().iter().any(|process| {
            let limits = fs::read_to_string(format!("/proc/{}/limits", process.pid));
            limits.is_ok_and(|limits| limits.contains(&limit))
        })
    });
    assert!(!running.is_over());
    drop((sender, receiver));
    assert_eq!(running.finish().unwrap().ok().stdout(), b"ran");
    dispatcher.stop();
}
