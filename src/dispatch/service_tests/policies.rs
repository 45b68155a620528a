//! Which instances are kept, and for how long, as policies come and go.

use super::*;
use crate::policy::PolicyFamily;

/// What one call asked of the process is not what is kept for all others.
#[tokio::test]
async fn those_that_are_kept_are_as_most_calls_want_them() {
    let bench = bench(PLENTY, |policy| {
        policy.instances.min = 1;
        policy.artifacts.digests = vec![Digest::of(&sample(None))];
    });
    assert!(!bench.is_warm(inline()).await);
    let first = bench.fake.launched().launch.run;
    assert!(!bench.is_warm(with_args("SayHello", "-v")).await);
    assert_eq!(bench.fake.launched().argv, ["service", "-v"]);
    bench.fake.end(first, exited(0));
    let bench = Arc::new(bench);
    let next = Arc::clone(&bench);
    // Before anybody asks.
    let next = tokio::task::spawn_blocking(move || next.fake.launched().argv).await;
    assert_eq!(next.unwrap(), ["service"]);
}

/// Those that other methods' calls go to are of use, whatever becomes of the first's.
#[tokio::test]
async fn an_override_for_one_method_ends_no_instance_of_the_others() {
    let bench = bench(PLENTY, |_| {});
    assert!(bench.call(of("First")).await.result.is_ok());
    let mut base = testing::policy("demo");
    base.protocol = Protocol::Grpc;
    let mut moved = base.clone();
    moved.id.variant = 1;
    moved.digest = Digest::of(b"another content");
    let mut set = testing::policy_set([testing::policy("runs")]);
    let overrides = vec![("greeter/First".to_owned(), moved)];
    set.policies.insert("demo".to_owned(), PolicyFamily { base, overrides });
    set.digest = Digest::of(b"another set");
    let digest = set.digest;
    bench.dispatcher.policies.replace(set);
    bench.dispatcher.executors.policies_changed();
    bench.fake.announce(digest);
    for _ in 0..3 {
        assert!(bench.is_warm(inline()).await);
        // One that is superseded ends once it is idle.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!bench.is_warm(of("First")).await, "which has another policy now");
}
