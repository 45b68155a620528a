//! Which instance gets which call, against the fake launcher and a server of frames.

mod contention;
mod lost;
mod policies;

use std::{
    os::unix::net::UnixStream as StdStream,
    sync::atomic::{AtomicU32, Ordering},
};

use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use http::{HeaderMap, Request, Response};
use tokio::net::UnixStream;

use super::*;
use crate::{
    admission::{AdmissionError, Capacity},
    artifact::elf::sample,
    execute::{
        Verdict,
        fake::{Answerer, Behaviour, FakeLauncher, exited},
        launcher::Launcher,
        stop::StopHandle,
    },
    instances::NotServed,
    jail::{
        message::{Exhausted, Refusal},
        plan::TemplateId,
    },
    testing,
};

/// Answers every call with a message, but those of `Hang`, and those of `Nap` after a moment;
/// `Goodbye` ends the connection in good order, and `Drop` at once.
fn answerer(calls: Arc<AtomicU32>) -> Answerer {
    let runtime = tokio::runtime::Handle::current();
    Arc::new(move |stream: StdStream| {
        let calls = Arc::clone(&calls);
        stream.set_nonblocking(true).unwrap();
        let _entered = runtime.enter();
        let stream = UnixStream::from_std(stream).unwrap();
        runtime.spawn(async move {
            let Ok(mut connection) = h2::server::handshake(stream).await else { return };
            while let Some(Ok((request, respond))) = connection.accept().await {
                if request.uri().path().ends_with("/Drop") {
                    calls.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                if request.uri().path().ends_with("/Goodbye") {
                    // It takes no more on this connection, and finishes what it has.
                    connection.graceful_shutdown();
                }
                tokio::spawn(answer(request, respond, Arc::clone(&calls)));
            }
        });
    })
}

async fn answer(
    request: Request<h2::RecvStream>,
    mut respond: SendResponse<Bytes>,
    calls: Arc<AtomicU32>,
) {
    let path = request.uri().path().to_owned();
    let head = Response::builder().header("content-type", "application/grpc");
    if path.contains("ServerReflection") {
        let none = head.header("grpc-status", "12").body(()).unwrap();
        let _ = respond.send_response(none, true);
        return;
    }
    calls.fetch_add(1, Ordering::Relaxed);
    if path.ends_with("/Hang") {
        // Until it is reset.
        let _ = std::future::poll_fn(|context| respond.poll_reset(context)).await;
        return;
    }
    if path.ends_with("/Nap") {
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    let mut body = respond.send_response(head.body(()).unwrap(), false).unwrap();
    let message = BytesMut::from(&b"\0\0\0\0\x02hi"[..]).freeze();
    body.send_data(message, false).unwrap();
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    body.send_trailers(trailers).unwrap();
}

struct Bench {
    dispatcher: Dispatcher,
    fake: FakeLauncher,
    calls: Arc<AtomicU32>,
}

/// A dispatcher of so much memory; namespaces `demo` and `hoard` have services, `runs` runs
/// programs.
fn bench(memory: u64, change: impl FnOnce(&mut Policy)) -> Bench {
    let calls = Arc::new(AtomicU32::new(0));
    let answerer = answerer(Arc::clone(&calls));
    with(memory, change, calls, move |launch| match launch.namespace.as_str() {
        "runs" => Behaviour::Say { stdout: vec![], stderr: vec![], end: exited(0).into() },
        _ => Behaviour::Serve(Arc::clone(&answerer)),
    })
}

fn with(
    memory: u64,
    change: impl FnOnce(&mut Policy),
    calls: Arc<AtomicU32>,
    behave: impl Fn(&crate::jail::message::Launch) -> Behaviour + Send + 'static,
) -> Bench {
    let mut policy = testing::policy("demo");
    policy.protocol = Protocol::Grpc;
    change(&mut policy);
    let mut hoard = testing::policy("hoard");
    hoard.protocol = Protocol::Grpc;
    let set = testing::policy_set([policy, hoard, testing::policy("runs")]);
    let launcher = Launcher::new();
    let fake = FakeLauncher::attach(&launcher, set.digest, behave);
    let admission = Admission::new(Capacity { runs: None, memory });
    let policies = Arc::new(PolicyStore::new(set));
    Bench { dispatcher: Dispatcher::new(policies, admission, launcher, 1 << 20), fake, calls }
}

fn inline() -> Call {
    Call { source: Source::Inline(sample(None).into()), ..testing::call() }
}

/// A call of this method.
fn of(method: &str) -> Call {
    Call { method: method.parse().unwrap(), ..inline() }
}

/// One that asks for a process of its own.
fn with_args(method: &str, word: &str) -> Call {
    Call { args: vec![word.into()], ..of(method) }
}

impl Bench {
    /// Returns when services have got so many calls.
    async fn got(&self, calls: u32) {
        while self.calls.load(Ordering::Relaxed) < calls {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn call(&self, call: Call) -> Reply {
        let handle = StopHandle::new();
        let stop = StopSignal::of(&handle);
        handle.disarm();
        let run = RunId::random().unwrap();
        let context = Context { run, deadline: None, stop, sink: None, reservation: None };
        self.dispatcher.dispatch(Ok(call), context).await
    }

    /// Whether it was answered by an instance that was there.
    async fn is_warm(&self, call: Call) -> bool {
        let reply = self.call(call).await;
        let finished = reply.result.unwrap();
        assert_eq!(finished.outcome.verdict, Verdict::Completed, "{:?}", finished.service);
        assert_eq!(&finished.output.unwrap().value[..], b"\x0a\x02hi");
        reply.facts.warm
    }
}

const PLENTY: u64 = 1 << 40;

#[tokio::test]
async fn one_instance_takes_many_calls() {
    let bench = bench(PLENTY, |_| {});
    assert!(!bench.is_warm(inline()).await);
    for _ in 0..3 {
        assert!(bench.is_warm(inline()).await);
    }
    assert_eq!(bench.calls.load(Ordering::Relaxed), 4);
    assert_eq!(bench.dispatcher.instances(), instances::Count { busy: 0, idle: 1, starting: 0 });
    let launched = bench.fake.launched();
    assert_eq!((launched.argv, launched.launch.timeout), (vec!["service".to_owned()], None));
    assert!(launched.stdin.is_empty());
    assert!(!bench.fake.was_asked(), "there is one");
}

#[tokio::test]
async fn who_wants_another_process_gets_one_in_the_place_of_an_idle_one() {
    let bench = bench(PLENTY, |policy| policy.instances.max = 1);
    assert!(!bench.is_warm(inline()).await);
    let first = bench.fake.launched().launch.run;
    let mut verbose = inline();
    verbose.args = vec!["-v".into()];
    assert!(!bench.is_warm(verbose.clone()).await);
    assert_eq!(bench.fake.stopped().0, first);
    assert_eq!(bench.fake.launched().argv, ["service", "-v"]);
    assert!(bench.is_warm(verbose).await);
}

#[tokio::test]
async fn a_call_that_runs_over_ends_alone_where_the_service_heeds_it() {
    let bench = bench(PLENTY, |policy| policy.instances.max = 1);
    assert!(!bench.is_warm(inline()).await);
    let mut hang = inline();
    hang.method = "Hang".parse().unwrap();
    hang.limits.timeout = Some(Duration::from_millis(30));
    let outcome = bench.call(hang).await.result.unwrap().outcome;
    assert_eq!(outcome.verdict, Verdict::TimedOut);
    // It is looked at first, and found quiet.
    assert!(bench.is_warm(inline()).await);
    let _only = bench.fake.launched();
    assert!(!bench.fake.was_asked());
}

#[tokio::test]
async fn what_ends_at_once_is_not_started_for_ever() {
    let calls = Arc::new(AtomicU32::new(0));
    let bench = with(
        PLENTY,
        |_| {},
        calls,
        |_| Behaviour::Say {
            stdout: vec![],
            stderr: b"no such thing".to_vec(),
            end: exited(3).into(),
        },
    );
    let mut crashed = 0;
    let refused = loop {
        match bench.call(inline()).await.result {
            Ok(finished) => {
                crashed += 1;
                assert_eq!(finished.outcome.exit_code, 3);
                assert_eq!(&finished.outcome.stderr[..], b"no such thing");
                let answer = finished.service.unwrap().answer;
                assert_eq!(answer.unwrap_err(), Unanswered::EndedAtStart);
            }
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, CallError::Service(NotServed::CrashLoop { .. })), "{refused}");
    assert!(crashed > 1, "the first is no loop");
}

#[tokio::test]
async fn an_idle_one_is_kept_as_long_as_its_policy_says() {
    for (idle_timeout, kept) in [
        (Limit::At(Duration::from_secs(3600)), true),
        (Limit::Unlimited, true),
        (Limit::At(Duration::from_millis(100)), false),
    ] {
        let bench = bench(1 << 30, |policy| policy.instances.idle_timeout = idle_timeout);
        assert!(!bench.is_warm(inline()).await);
        let gone = async {
            while bench.dispatcher.instances().idle > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let within = Duration::from_millis(if kept { 500 } else { 10_000 });
        let gone = tokio::time::timeout(within, gone).await.is_ok();
        assert_eq!(gone, !kept, "{idle_timeout:?}");
    }
}

#[tokio::test]
async fn an_idle_one_makes_way_for_who_needs_its_memory() {
    // Two have 512 MiB each, and there is no room for both.
    let bench = bench(600 << 20, |_| {});
    assert!(!bench.is_warm(inline()).await);
    let service = bench.fake.launched().launch.run;
    let run = Call { namespace: "runs".parse().unwrap(), ..inline() };
    let outcome = bench.call(run).await.result.unwrap().outcome;
    assert_eq!(outcome.verdict, Verdict::Exited);
    assert_eq!(bench.fake.stopped().0, service);
    assert!(!bench.is_warm(inline()).await);
}

/// Of what the host has only so much, an idle instance has its share.
#[tokio::test]
async fn an_idle_one_makes_way_for_who_lacks_other_than_memory() {
    let full = || Refusal::Exhausted(Exhausted::Descriptors);
    for idle in [true, false] {
        let calls = Arc::new(AtomicU32::new(0));
        let (answerer, lacking) = (answerer(Arc::clone(&calls)), AtomicU32::new(1));
        let bench = with(
            PLENTY,
            |_| {},
            calls,
            move |launch| match launch.namespace.as_str() {
                "demo" => Behaviour::Serve(Arc::clone(&answerer)),
                _ if lacking.swap(0, Ordering::Relaxed) > 0 => Behaviour::Refuse(full()),
                _ => Behaviour::Say { stdout: vec![], stderr: vec![], end: exited(0).into() },
            },
        );
        if idle {
            assert!(!bench.is_warm(inline()).await);
        }
        let run = Call { namespace: "runs".parse().unwrap(), ..inline() };
        match bench.call(run).await.result {
            Ok(finished) => {
                assert!(idle);
                assert_eq!(finished.outcome.verdict, Verdict::Exited);
                bench.fake.stopped();
            }
            Err(CallError::Execute(error)) => assert!(!idle && error.is_for_want_of_room()),
            Err(error) => panic!("{error}"),
        }
    }
}

/// Who hoards them loses his own.
#[tokio::test]
async fn of_idle_ones_those_of_who_has_most_make_way() {
    let bench = bench(1600 << 20, |_| {});
    assert!(!bench.is_warm(inline()).await);
    let hoard = |word: &str| {
        let args = vec![word.to_owned()];
        Call { namespace: "hoard".parse().unwrap(), args, ..inline() }
    };
    assert!(!bench.is_warm(hoard("a")).await);
    assert!(!bench.is_warm(hoard("b")).await);
    // There is room for three.
    let run = Call { namespace: "runs".parse().unwrap(), ..inline() };
    bench.call(run).await.result.unwrap();
    assert!(bench.is_warm(inline()).await, "the longest idle, and the only one of its namespace");
    assert!(bench.is_warm(hoard("b")).await);
    assert!(!bench.is_warm(hoard("a")).await);
}

#[tokio::test]
async fn those_that_are_kept_put_nobody_out() {
    let other = || [sample(None), vec![0]].concat();
    let digests = [Digest::of(&sample(None)), Digest::of(&other())];
    // There is room for one of the two.
    let bench = bench(600 << 20, |policy| {
        policy.instances.min = 1;
        policy.artifacts.digests = digests.to_vec();
    });
    assert!(!bench.is_warm(inline()).await);
    let first = bench.fake.launched().launch.run;
    let call = || Call { source: Source::Inline(other().into()), ..testing::call() };
    assert!(!bench.is_warm(call()).await, "for a call the other one goes");
    assert_eq!(bench.fake.stopped().0, first);
    for _ in 0..50 {
        assert!(bench.is_warm(call()).await, "it doesn't come back by itself");
        // One that is never idle can't be put out anyway.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let _second = bench.fake.launched();
    assert!(!bench.fake.was_asked());
}

#[tokio::test]
async fn those_that_are_to_be_kept_are_no_calls_failure() {
    // There is room for one of two.
    let bench = bench(600 << 20, |policy| {
        policy.instances.min = 2;
        policy.artifacts.digests = vec![Digest::of(&sample(None))];
    });
    for round in 0..20 {
        assert_eq!(bench.is_warm(inline()).await, round > 0);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn an_idle_one_of_another_shape_makes_way_too() {
    let bench = bench(600 << 20, |_| {});
    assert!(!bench.is_warm(inline()).await);
    let mut verbose = inline();
    verbose.args = vec!["-v".into()];
    assert!(!bench.is_warm(verbose).await);
}

#[tokio::test]
async fn one_that_becomes_idle_later_makes_way_as_well() {
    let bench = bench(600 << 20, |_| {});
    let mut hang = inline();
    hang.method = "Hang".parse().unwrap();
    hang.limits.timeout = Some(Duration::from_millis(30));
    let outcome = bench.call(hang).await.result.unwrap().outcome;
    assert_eq!(outcome.verdict, Verdict::TimedOut);
    // It is looked at for a while, and nobody gives up a permit meanwhile.
    let mut verbose = inline();
    verbose.args = vec!["-v".into()];
    let started = Instant::now();
    assert!(!bench.is_warm(verbose).await);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_connection_that_is_closed_in_good_order_is_made_anew() {
    let bench = bench(PLENTY, |policy| policy.instances.max = 1);
    assert!(!bench.is_warm(inline()).await);
    let mut hang = inline();
    hang.method = "Hang".parse().unwrap();
    hang.limits.timeout = Some(Duration::from_millis(500));
    let (hung, ()) = tokio::join!(bench.call(hang), async {
        while bench.calls.load(Ordering::Relaxed) < 2 {
            tokio::task::yield_now().await;
        }
        let mut goodbye = inline();
        goodbye.method = "Goodbye".parse().unwrap();
        assert!(bench.is_warm(goodbye).await);
        // The old one still has a call.
        for _ in 0..3 {
            assert!(bench.is_warm(inline()).await);
        }
    });
    let answer = hung.result.unwrap().service.unwrap().answer;
    assert_eq!(answer.unwrap_err(), Unanswered::TimedOut);
}

/// Nothing of the call was sent: it does no harm to have another instance.
#[tokio::test]
async fn one_that_cannot_be_reached_any_more_costs_no_call() {
    let calls = Arc::new(AtomicU32::new(0));
    let (answerer, connections) = (answerer(Arc::clone(&calls)), AtomicU32::new(0));
    let once: Answerer =
        Arc::new(move |stream| match connections.fetch_add(1, Ordering::Relaxed) {
            1 => drop(stream),
            _ => answerer(stream),
        });
    let bench = with(PLENTY, |_| {}, calls, move |_| Behaviour::Serve(Arc::clone(&once)));
    assert!(!bench.is_warm(inline()).await);
    let mut goodbye = inline();
    goodbye.method = "Goodbye".parse().unwrap();
    assert!(bench.is_warm(goodbye).await);
    assert!(!bench.is_warm(inline()).await, "another instance");
    bench.fake.stopped();
}

#[tokio::test]
async fn what_is_started_for_nobody_makes_way_first() {
    // What begins with a byte more never answers.
    let deaf = || [sample(None), vec![0]].concat();
    let calls = Arc::new(AtomicU32::new(0));
    let answerer = answerer(Arc::clone(&calls));
    let size = sample(None).len() as u64;
    let bench = with(
        600 << 20,
        |_| {},
        calls,
        move |launch| match launch.executable_size == size {
            true => Behaviour::Serve(Arc::clone(&answerer)),
            false => Behaviour::Wait,
        },
    );
    let call = || Call { source: Source::Inline(deaf().into()), ..testing::call() };
    let left = tokio::time::timeout(Duration::from_millis(100), bench.call(call())).await;
    assert!(left.is_err(), "its caller goes away while it starts");
    let started = bench.fake.launched().launch.run;
    // It has all the memory there is, for ten seconds more.
    let began = Instant::now();
    assert!(!bench.is_warm(inline()).await);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(bench.fake.stopped().0, started);
}

/// Its services take a while to answer first.
fn slow_bench() -> Bench {
    let calls = Arc::new(AtomicU32::new(0));
    let inner = answerer(Arc::clone(&calls));
    let slow: Answerer = Arc::new(move |stream| {
        let inner = Arc::clone(&inner);
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            inner(stream);
        });
    });
    with(PLENTY, |_| {}, calls, move |_| Behaviour::Serve(Arc::clone(&slow)))
}

#[tokio::test]
async fn a_reload_during_a_start_loses_no_call() {
    let bench = slow_bench();
    let mut other = testing::policy("demo");
    other.protocol = Protocol::Grpc;
    other.digest = Digest::of(b"another content");
    let reload = async {
        while bench.dispatcher.instances().starting == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let set = testing::policy_set([other, testing::policy("runs")]);
        let digest = set.digest;
        bench.dispatcher.policies.replace(set);
        bench.fake.announce(digest);
    };
    let call = tokio::time::timeout(Duration::from_secs(10), bench.call(inline()));
    let (reply, ()) = tokio::join!(call, reload);
    let answer = reply.expect("it ends").result.unwrap().service.unwrap().answer;
    assert_eq!(answer.unwrap().code, 0);
    // It is of no use to those that come under the new one.
    assert!(!bench.is_warm(inline()).await);
}

/// One instance at a time, which may start for ever; what is started with an argument does this.
fn with_one_place(with_argument: fn() -> Behaviour) -> Bench {
    let calls = Arc::new(AtomicU32::new(0));
    let answerer = answerer(Arc::clone(&calls));
    let limits = |policy: &mut Policy| {
        policy.instances.max = 1;
        policy.instances.start_timeout = Limit::Unlimited;
    };
    with(PLENTY, limits, calls, move |launch| match launch.argc > 1 {
        false => Behaviour::Serve(Arc::clone(&answerer)),
        true => with_argument(),
    })
}

#[tokio::test]
async fn a_start_for_nobody_makes_room_for_another_shape() {
    // What is started with an argument never answers.
    let bench = with_one_place(|| Behaviour::Wait);
    let mut deaf = inline();
    deaf.args = vec!["deaf".into()];
    let left = tokio::time::timeout(Duration::from_millis(100), bench.call(deaf)).await;
    assert!(left.is_err(), "its caller goes away while it starts");
    let call = tokio::time::timeout(Duration::from_secs(5), bench.call(inline()));
    let answer = call.await.expect("it ends").result.unwrap().service.unwrap().answer;
    assert_eq!(answer.unwrap().code, 0);
}

#[tokio::test]
async fn calls_beyond_all_instances_wait_as_long_as_they_may() {
    let bench = bench(PLENTY, |policy| {
        policy.instances.max = 1;
        policy.instances.concurrency = 1;
        policy.admission.queue_timeout = Limit::At(Duration::from_millis(40));
    });
    assert!(!bench.is_warm(inline()).await);
    let mut hang = inline();
    hang.method = "Hang".parse().unwrap();
    hang.limits.timeout = Some(Duration::from_millis(400));
    let (hung, waited) = tokio::join!(bench.call(hang), async {
        while bench.calls.load(Ordering::Relaxed) < 2 {
            tokio::task::yield_now().await;
        }
        bench.call(inline()).await.result.unwrap_err()
    });
    assert!(
        matches!(waited, CallError::Admission(AdmissionError::QueueTimeout { .. })),
        "{waited}"
    );
    let hung = hung.result.unwrap();
    assert_eq!(hung.service.unwrap().answer.unwrap_err(), Unanswered::TimedOut);
}

#[test]
fn who_has_what_is_told_by_namespace_policy_and_bytes() {
    let key = |namespace: &str, policy: &[u8], artifact: &[u8]| Key {
        namespace: namespace.parse().unwrap(),
        policy: (TemplateId { policy: "p".into(), variant: 0 }, Digest::of(policy)),
        artifact: Digest::of(artifact),
    };
    let keys = [key("a", b"", b""), key("b", b"", b""), key("a", b"x", b""), key("a", b"", b"x")];
    let count =
        keys.iter().map(|key| (key.clone(), ())).collect::<std::collections::HashMap<_, _>>().len();
    assert_eq!(count, keys.len());
}
