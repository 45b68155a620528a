//! The pipeline against the fake launcher.

use super::*;
use crate::{
    admission::{AdmissionError, Capacity, bytes::ByteBudget},
    artifact::elf::sample,
    call::{Input, MEMORY_MIN},
    execute::{
        Verdict,
        fake::{Behaviour, FakeLauncher, exited},
        launcher::Launcher,
        stop::StopHandle,
    },
    jail::message::StopCause,
    testing,
    units::Limit,
};
use std::sync::atomic::{AtomicU32, Ordering};

struct Bench {
    dispatcher: Arc<Dispatcher>,
    policies: Arc<PolicyStore>,
    fake: FakeLauncher,
}

fn bench(
    policy: Policy,
    behave: impl Fn(&crate::jail::message::Launch) -> Behaviour + Send + 'static,
) -> Bench {
    let set = testing::policy_set([policy]);
    let launcher = Launcher::new();
    let fake = FakeLauncher::attach(&launcher, set.digest, behave);
    let policies = Arc::new(PolicyStore::new(set));
    let admission = Admission::new(Capacity { runs: None, memory: 1 << 40 });
    let dispatcher = Arc::new(Dispatcher::new(Arc::clone(&policies), admission, launcher, 1 << 20));
    Bench { dispatcher, policies, fake }
}

fn say(text: &str) -> Behaviour {
    Behaviour::Say { stdout: text.into(), stderr: Vec::new(), end: exited(0).into() }
}

fn context() -> Context {
    let handle = StopHandle::new();
    let stop = StopSignal::of(&handle);
    handle.disarm();
    let run = RunId::random().unwrap();
    Context { run, deadline: None, stop, sink: None, reservation: None }
}

fn inline() -> Call {
    Call { source: Source::Inline(sample(None).into()), ..testing::call() }
}

impl Bench {
    async fn call(&self, call: Call) -> Reply {
        self.dispatcher.dispatch(Ok(call), context()).await
    }

    async fn refusal(&self, call: Call) -> CallError {
        self.call(call).await.result.unwrap_err()
    }
}

#[tokio::test]
async fn a_call_runs_and_its_facts_are_told() {
    let bench = bench(testing::policy("demo"), |_| say("hello"));
    let mut call = inline();
    call.limits.memory = Some(MEMORY_MIN);
    call.input = Some(Input { type_url: "x/y.Z".into(), value: "input".into() });
    call.ignored_context = vec!["colour".into()];
    let reply = bench.call(call).await;
    let finished = reply.result.unwrap();
    assert_eq!(finished.outcome.verdict, Verdict::Exited);
    assert!(
        finished.output_fits && finished.output.unwrap().type_url.ends_with("collector.Status")
    );
    let facts = reply.facts;
    assert_eq!(facts.artifact, Some(Digest::of(&sample(None))));
    assert_eq!(facts.policy.unwrap().0, "demo");
    assert_eq!(facts.mode, Some(Mode::Jail));
    assert_eq!(facts.ignored_context, ["colour"]);

    let launched = bench.fake.launched();
    assert_eq!(launched.argv, ["service", "demo", "greeter", "SayHello"]);
    assert_eq!(launched.stdin, b"input");
    assert_eq!(launched.launch.memory, Some(MEMORY_MIN));
    assert_eq!(launched.launch.policy_set, bench.policies.current().digest);
    assert_eq!(launched.launch.run, facts.run);
}

#[tokio::test]
async fn a_held_artifact_runs_by_its_digest_for_its_own_namespace_only() {
    let bench = bench(testing::policy("default"), |_| say(""));
    let digest = Digest::of(&sample(None));
    let held = || Call { source: Source::Held(digest), ..testing::call() };
    assert!(matches!(
        bench.refusal(held()).await,
        CallError::Artifact(ArtifactError::Missing(missing)) if missing == digest
    ));
    bench.call(inline()).await.result.unwrap();
    bench.call(held()).await.result.unwrap();
    let stranger = Call { namespace: "stranger".parse().unwrap(), ..held() };
    assert!(matches!(
        bench.refusal(stranger).await,
        CallError::Artifact(ArtifactError::Missing(_))
    ));
}

#[tokio::test]
async fn refusals_come_in_the_contracts_order() {
    let mut policy = testing::policy("demo");
    policy.artifacts.uris = vec!["https://".into()];
    policy.limits.artifact_size = Limit::At(1000);
    let bench = bench(policy, |_| say(""));
    let with = |change: fn(&mut Call)| {
        let mut call = inline();
        change(&mut call);
        call
    };
    // Policy before artifact: the bytes are no executable either.
    let both = with(|call| {
        call.source = Source::Inline("text".into());
        call.mode = Some(Mode::Direct);
    });
    assert!(matches!(bench.refusal(both).await, CallError::ModeNotAllowed { .. }));
    let text = with(|call| call.source = Source::Inline("text".into()));
    assert!(matches!(bench.refusal(text).await, CallError::Artifact(ArtifactError::Elf(_))));
    let empty = with(|call| call.source = Source::Inline("".into()));
    assert!(matches!(bench.refusal(empty).await, CallError::Artifact(ArtifactError::Empty)));
    let large = with(|call| call.source = Source::Inline(vec![0; 1001].into()));
    assert!(matches!(
        bench.refusal(large).await,
        CallError::Artifact(ArtifactError::TooLarge { size: 1001, limit: 1000 })
    ));
    let other = with(|call| call.digest = Some(Digest::of(b"other")));
    assert!(matches!(
        bench.refusal(other).await,
        CallError::Artifact(ArtifactError::DigestMismatch { .. })
    ));
    let dynamic = with(|call| call.source = Source::Inline(sample(Some("/lib/ld.so")).into()));
    assert!(matches!(
        bench.refusal(dynamic).await,
        CallError::Artifact(ArtifactError::LoaderMissing(_))
    ));
    let registered = bench.refusal(testing::call()).await;
    assert_eq!(
        registered.to_string(),
        "service not found and no service_def provided: demo/demo/greeter"
    );
    let fetched = with(|call| call.source = Source::Uri("https://example.com/act".into()));
    assert!(matches!(bench.refusal(fetched).await, CallError::Unimplemented(_)));
    assert!(!bench.fake.was_asked());
}

#[tokio::test]
async fn a_stale_policy_is_decided_again_by_the_current_one() {
    let asked = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&asked);
    let bench =
        bench(testing::policy("demo"), move |_| match count.fetch_add(1, Ordering::Relaxed) {
            0 => Behaviour::Refuse(Refusal::StalePolicy),
            _ => say("second"),
        });
    let mut newer = testing::policy("demo");
    newer.limits.timeout = Limit::At(Duration::from_secs(7));
    let newer = testing::policy_set([newer]);
    let digest = newer.digest;
    let policies = Arc::clone(&bench.policies);
    let (reply, ()) = tokio::join!(bench.call(inline()), async {
        // The refusal is on its way: the fake has been asked.
        while asked.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        bench.fake.announce(digest);
        policies.replace(newer);
        bench.dispatcher.executors.policies_changed();
    });
    let finished = reply.result.unwrap();
    assert_eq!(&finished.outcome.stdout[..], b"second");
    assert_eq!(reply.facts.policy_set, Some(digest));
    let _first = bench.fake.launched();
    let second = bench.fake.launched();
    assert_eq!(second.launch.policy_set, digest);
    assert_eq!(second.launch.timeout, Some(Duration::from_secs(7)));
}

#[tokio::test]
async fn staleness_without_end_is_given_up() {
    let bench = bench(testing::policy("demo"), |_| Behaviour::Refuse(Refusal::StalePolicy));
    let error = bench.refusal(inline()).await;
    assert!(matches!(error, CallError::Execute(ExecuteError::Refused(Refusal::StalePolicy))));
    for _ in 0..=STALE_RETRIES {
        bench.fake.launched();
    }
    assert!(!bench.fake.was_asked());
}

#[tokio::test]
async fn the_queue_and_the_deadline() {
    let mut policy = testing::policy("demo");
    policy.admission.concurrency = Limit::At(1);
    policy.admission.queue = Limit::At(0);
    let bench = bench(policy, |_| Behaviour::Wait);
    let handle = StopHandle::new();
    let running = Context { stop: StopSignal::of(&handle), ..context() };
    let dispatcher = Arc::clone(&bench.dispatcher);
    let first = tokio::spawn(async move { dispatcher.dispatch(Ok(inline()), running).await });
    while bench.dispatcher.load().running == 0 {
        tokio::task::yield_now().await;
    }
    assert!(matches!(
        bench.refusal(inline()).await,
        CallError::Admission(AdmissionError::QueueFull { .. })
    ));
    let passed = Context { deadline: Some(Instant::now()), ..context() };
    let late = bench.dispatcher.dispatch(Ok(inline()), passed).await;
    assert!(matches!(late.result.unwrap_err(), CallError::Admission(AdmissionError::Deadline)));
    handle.stop();
    let stopped = first.await.unwrap().result.unwrap();
    assert_eq!(stopped.outcome.verdict, Verdict::Cancelled);
    assert_eq!(bench.fake.stopped().1, StopCause::Cancelled);
    let load = bench.dispatcher.load();
    assert_eq!((load.running, load.waiting), (0, 0));
}

#[tokio::test]
async fn the_requests_memory_is_given_back_while_the_program_runs() {
    let bench = bench(testing::policy("demo"), |_| Behaviour::Wait);
    let budget = ByteBudget::new(1 << 20);
    let mut reservation = budget.reserve();
    assert!(reservation.grow(50_000));
    let handle = StopHandle::new();
    let stop = StopSignal::of(&handle);
    let context = Context { reservation: Some(reservation), stop, ..context() };
    let mut call = inline();
    call.input = Some(Input { type_url: String::new(), value: vec![0; 321].into() });
    let dispatcher = Arc::clone(&bench.dispatcher);
    let run = tokio::spawn(async move { dispatcher.dispatch(Ok(call), context).await });
    while bench.dispatcher.load().running == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(budget.used(), 321, "of the request only the input is left");
    handle.stop();
    run.await.unwrap().result.unwrap();
    assert_eq!(budget.used(), 0);
}

#[tokio::test]
async fn a_run_that_could_not_be_removed_stays_counted() {
    let bench = bench(testing::policy("demo"), |_| Behaviour::Say {
        stdout: Vec::new(),
        stderr: Vec::new(),
        end: Box::new(crate::jail::message::End { quarantined: true, ..exited(0) }),
    });
    let admission = Admission::new(Capacity { runs: None, memory: 600 << 20 });
    let executors = bench.dispatcher.executors.clone();
    let dispatcher = Dispatcher::new(Arc::clone(&bench.policies), admission, executors, 1 << 20);
    assert!(dispatcher.dispatch(Ok(inline()), context()).await.result.is_ok());
    let soon = Context { deadline: Some(Instant::now() + Duration::from_millis(20)), ..context() };
    let second = dispatcher.dispatch(Ok(inline()), soon).await;
    assert!(matches!(second.result.unwrap_err(), CallError::Admission(AdmissionError::Deadline)));
}
