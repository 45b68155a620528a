//! Several that want what there is not enough of.

use tokio::{task::JoinSet, time::timeout};

use super::*;

/// So long at the most; a queue's patience is twice that.
const SOON: Duration = Duration::from_secs(5);

/// The call began to wait while the instance was being looked at.
#[tokio::test]
async fn one_that_becomes_idle_later_makes_way_for_a_run_too() {
    let bench = bench(600 << 20, |_| {});
    let mut hang = of("Hang");
    hang.limits.timeout = Some(Duration::from_millis(30));
    let outcome = bench.call(hang).await.result.unwrap().outcome;
    assert_eq!(outcome.verdict, Verdict::TimedOut);
    let run = Call { namespace: "runs".parse().unwrap(), ..inline() };
    let reply = timeout(SOON, bench.call(run)).await.expect("it gets the memory");
    assert_eq!(reply.result.unwrap().outcome.verdict, Verdict::Exited);
}

/// As with one that takes a lock when it starts.
#[tokio::test]
async fn a_second_one_that_does_not_start_fails_no_call() {
    let calls = Arc::new(AtomicU32::new(0));
    let (answerer, starts) = (answerer(Arc::clone(&calls)), Arc::new(AtomicU32::new(0)));
    let counted = Arc::clone(&starts);
    let limits = |policy: &mut Policy| {
        policy.instances.max = 2;
        policy.instances.concurrency = 1;
    };
    let bench =
        with(PLENTY, limits, calls, move |_| match counted.fetch_add(1, Ordering::Relaxed) {
            0 => Behaviour::Serve(Arc::clone(&answerer)),
            _ => Behaviour::Say { stdout: vec![], stderr: vec![], end: exited(1).into() },
        });
    let bench = Arc::new(bench);
    assert!(!bench.is_warm(inline()).await);
    let mut callers = JoinSet::new();
    for _ in 0..4 {
        let bench = Arc::clone(&bench);
        callers.spawn(async move {
            for _ in 0..10 {
                assert!(bench.is_warm(of("Nap")).await);
            }
        });
    }
    timeout(2 * SOON, callers.join_all()).await.expect("each has its turn");
    let starts = starts.load(Ordering::Relaxed);
    assert!((2..=6).contains(&starts), "{starts} starts within two seconds");
}

/// A handler that goes on without end is dealt with, though there are always other calls.
#[tokio::test]
async fn one_that_was_left_a_call_is_looked_at_under_steady_load() {
    let calls = Arc::new(AtomicU32::new(0));
    let (inner, connections) = (answerer(Arc::clone(&calls)), Arc::new(AtomicU32::new(0)));
    let counted = Arc::clone(&connections);
    let counting: Answerer = Arc::new(move |stream| {
        counted.fetch_add(1, Ordering::Relaxed);
        inner(stream);
    });
    let serve = move |_: &_| Behaviour::Serve(Arc::clone(&counting));
    let bench = with(PLENTY, |policy| policy.instances.max = 1, calls, serve);
    let bench = Arc::new(bench);
    assert!(!bench.is_warm(inline()).await);
    let looked_at = Arc::new(AtomicU32::new(0));
    let mut callers = JoinSet::new();
    for number in 0..6 {
        let (bench, over) = (Arc::clone(&bench), Arc::clone(&looked_at));
        callers.spawn(async move {
            tokio::time::sleep(Duration::from_millis(7 * number)).await; // out of step
            while over.load(Ordering::Relaxed) == 0 {
                assert!(bench.is_warm(of("Nap")).await);
            }
        });
    }
    bench.got(8).await;
    let mut hang = of("Hang");
    hang.limits.timeout = Some(Duration::from_millis(30));
    let outcome = bench.call(hang).await.result.unwrap().outcome;
    assert_eq!(outcome.verdict, Verdict::TimedOut);
    let opened = timeout(2 * SOON, async {
        while connections.load(Ordering::Relaxed) < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let opened = opened.await;
    looked_at.store(1, Ordering::Relaxed);
    callers.join_all().await;
    opened.expect("it is looked at, by another connection");
}

/// What was given up may go on, and counts.
#[tokio::test]
async fn calls_go_to_the_one_with_least_to_do_whoever_waits_for_it() {
    let bench = Arc::new(bench(PLENTY, |policy| {
        policy.instances.max = 2;
        policy.instances.concurrency = 3;
    }));
    assert!(!bench.is_warm(inline()).await);
    let call = |method: &'static str| {
        let bench = Arc::clone(&bench);
        tokio::spawn(async move { bench.call(of(method)).await })
    };
    let instance = |reply: Reply| reply.result.unwrap().service.unwrap().instance.unwrap();
    let (kept, left, nap) = (call("Hang"), call("Hang"), call("Nap"));
    bench.got(4).await;
    // There is no room for this one beside them.
    let other = call("Hang");
    bench.got(5).await;
    let first = instance(nap.await.unwrap());
    left.abort();
    assert!(left.await.is_err());
    // Each has a call; the first was left another.
    assert_ne!(instance(bench.call(inline()).await), first);
    for hung in [kept, other] {
        hung.abort();
        assert!(hung.await.is_err());
    }
}

/// What was started for one is not ended for the other before that one was served, whichever
/// of the two looks first.
#[tokio::test]
async fn two_that_want_different_ones_where_one_may_be_take_turns() {
    let calls = Arc::new(AtomicU32::new(0));
    let (inner, (answer, may_answer)) = (answerer(Arc::clone(&calls)), std::sync::mpsc::channel());
    let may_answer = Arc::new(std::sync::Mutex::new(may_answer));
    let slow: Answerer = Arc::new(move |stream| {
        let (inner, may_answer) = (Arc::clone(&inner), Arc::clone(&may_answer));
        std::thread::spawn(move || {
            let () = may_answer.lock().unwrap().recv().unwrap();
            inner(stream);
        });
    });
    let serve = move |_: &_| Behaviour::Serve(Arc::clone(&slow));
    let bench = with(PLENTY, |policy| policy.instances.max = 1, calls, serve);
    let bench = Arc::new(bench);
    let call = |word: &'static str| {
        let bench = Arc::clone(&bench);
        tokio::spawn(async move { bench.is_warm(with_args("SayHello", word)).await })
    };
    let wait = async |calls: usize| {
        while bench.dispatcher.instances.waiting() < calls {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let first = call("a");
    wait(1).await;
    let other = call("b");
    wait(2).await;
    let second = call("a");
    wait(3).await;
    // So that the other is told first of what was started.
    first.abort();
    assert!(first.await.is_err());
    for _ in 0..3 {
        answer.send(()).unwrap();
    }
    for call in [second, other] {
        timeout(2 * SOON, call).await.expect("it is served").unwrap();
    }
    assert_eq!(bench.fake.launched().argv, ["service", "a"]);
    assert_eq!(bench.fake.launched().argv, ["service", "b"]);
    assert!(!bench.fake.was_asked(), "one start for each");
}

/// One that was given up has its place until it is gone.
#[tokio::test]
async fn there_are_never_more_than_may_be() {
    // It neither answers nor heeds its stop.
    let bench = with_one_place(|| Behaviour::Hang);
    let bench = Arc::new(bench);
    let left = timeout(Duration::from_millis(100), bench.call(with_args("SayHello", "deaf"))).await;
    assert!(left.is_err(), "its caller goes away while it starts");
    let deaf = bench.fake.launched().launch.run;
    let call = || {
        let bench = Arc::clone(&bench);
        tokio::spawn(async move { bench.is_warm(inline()).await })
    };
    let first = call();
    while bench.dispatcher.load().running == 0 {
        tokio::task::yield_now().await;
    }
    let second = call();
    let early = timeout(Duration::from_millis(200), async {
        while !bench.fake.was_asked() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    assert!(early.await.is_err(), "another is started beside it");
    assert_eq!(bench.fake.stopped().0, deaf);
    bench.fake.end(deaf, exited(0));
    for call in [first, second] {
        timeout(SOON, call).await.expect("it ends").unwrap();
    }
}

/// Starts that wait for a place have none, and get that of one that is idle.
#[tokio::test]
async fn where_no_more_may_be_an_idle_one_makes_way() {
    let bench = Arc::new(bench(PLENTY, |_| {}));
    bench.dispatcher.instances.leave_places(1);
    let mut callers = JoinSet::new();
    for word in ["a", "b", "c", "d"] {
        let bench = Arc::clone(&bench);
        callers.spawn(async move { bench.is_warm(with_args("SayHello", word)).await });
    }
    let warm = timeout(SOON, callers.join_all()).await.expect("each has its turn");
    assert_eq!(warm, [false; 4]);
    let instances::Count { busy, idle, starting } = bench.dispatcher.instances();
    assert_eq!((busy, idle, starting), (0, 1, 0));
}
