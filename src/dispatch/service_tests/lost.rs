//! Calls whose connection, or whose launcher's word, is lost.

use tokio::{task::JoinSet, time::timeout};

use super::*;

fn unanswered(reply: Reply) -> Unanswered {
    reply.result.unwrap().service.unwrap().answer.unwrap_err()
}

/// All of them want to know at once whether the process lives.
#[tokio::test]
async fn many_calls_of_a_lost_connection_all_end() {
    let bench = Arc::new(bench(PLENTY, |policy| {
        policy.instances.max = 1;
        policy.instances.concurrency = 100;
        policy.admission.concurrency = Limit::Unlimited;
    }));
    assert!(!bench.is_warm(inline()).await);
    let mut hung = JoinSet::new();
    for _ in 0..64 {
        let bench = Arc::clone(&bench);
        hung.spawn(async move { unanswered(bench.call(of("Hang")).await) });
    }
    bench.got(65).await;
    let dropped = timeout(Duration::from_secs(5), bench.call(of("Drop"))).await;
    let why = unanswered(dropped.expect("it ends"));
    assert!(matches!(why, Unanswered::ConnectionLost(_)), "{why:?}");
    let ends = timeout(Duration::from_secs(5), hung.join_all()).await.expect("they end");
    assert_eq!(ends.len(), 64);
    for why in ends {
        assert!(matches!(why, Unanswered::ConnectionLost(_)), "{why:?}");
    }
    assert_eq!(bench.dispatcher.instances().busy, 0);
    assert!(bench.is_warm(inline()).await, "it lives on, and takes another connection");
}

/// Its process was never heard to end, nor seen to live.
#[tokio::test]
async fn a_call_ends_in_time_whatever_the_launcher_says() {
    let calls = Arc::new(AtomicU32::new(0));
    let answerer = answerer(Arc::clone(&calls));
    let behave = move |_: &_| Behaviour::ServeUnseen(Arc::clone(&answerer));
    let bench = with(PLENTY, |policy| policy.instances.max = 1, calls, behave);
    let mut call = of("Drop");
    call.limits.timeout = Some(Duration::from_millis(400));
    let reply = timeout(Duration::from_secs(5), bench.call(call.clone())).await;
    let reply = reply.expect("it ends");
    let wall = reply.result.as_ref().unwrap().outcome.wall;
    assert!(wall < Duration::from_secs(2), "{wall:?}");
    let why = unanswered(reply);
    assert!(matches!(why, Unanswered::ConnectionLost(_)), "{why:?}");
    // Nor is it looked at for ever after a call that was given up.
    call.method = "Hang".parse().unwrap();
    let reply = timeout(Duration::from_secs(5), bench.call(call)).await.expect("it ends");
    assert_eq!(unanswered(reply), Unanswered::TimedOut);
    let next = timeout(Duration::from_secs(9), bench.call(inline())).await.expect("it ends");
    assert!(!next.facts.warm, "what can't be seen to be quiet is ended");
    next.result.unwrap().service.unwrap().answer.unwrap();
}
