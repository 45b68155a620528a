//! The launcher's client against a fake launcher on a real socketpair.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::time::Instant;

use super::{
    Chunk, ExecuteError, Invocation, Verdict,
    fake::{Behaviour, FakeLauncher, exited},
    launcher::Launcher,
    stop::{StopHandle, StopSignal},
};
use crate::{
    jail::{
        message::{Oom, Refusal, StopCause},
        plan::{Control, Mode, TemplateId},
    },
    names::{Digest, RunId},
    sys,
    units::Limit,
};

const SET: Digest = Digest::from_bytes([7; 32]);

fn invocation() -> Invocation {
    Invocation {
        run: RunId::random().unwrap(),
        policy_set: SET,
        template: TemplateId { policy: "demo".into(), variant: 0 },
        mode: Mode::Jail,
        namespace: "default".into(),
        executable: Arc::new(sys::sealed_memfd(c"program", &[b"\x7fELF"], true).unwrap()),
        executable_size: 4,
        interpreter: None,
        argv: vec!["service".into(), "demo".into()],
        environment: vec![("HOME".into(), "/tmp".into())],
        input: Bytes::from_static(b"input"),
        timeout: Limit::At(Duration::from_secs(20)),
        deadline: None,
        memory: None,
        cpus: None,
        output_limit: Limit::At(1000),
        stderr_limit: Limit::At(4),
    }
}

fn never() -> StopSignal {
    let handle = StopHandle::new();
    let signal = StopSignal::of(&handle);
    handle.disarm();
    signal
}

fn fake(behave: impl Fn() -> Behaviour + Send + 'static) -> (Launcher, FakeLauncher) {
    let launcher = Launcher::new();
    let fake = FakeLauncher::attach(&launcher, SET, move |_| behave());
    (launcher, fake)
}

#[tokio::test]
async fn a_run_gets_its_call_and_gives_its_output() {
    let (launcher, fake) = fake(|| Behaviour::Say {
        stdout: b"hello".to_vec(),
        stderr: b"a warning".to_vec(),
        end: exited(3).into(),
    });
    let outcome = launcher.execute(invocation(), never(), None).await.unwrap();
    assert_eq!((outcome.verdict, outcome.exit_code), (Verdict::Exited, 3));
    assert_eq!((&outcome.stdout[..], outcome.stdout_truncated), (&b"hello"[..], false));
    assert_eq!((&outcome.stderr[..], outcome.stderr_truncated), (&b"ning"[..], true));
    assert_eq!(outcome.enforced, [Control::Output]);

    let launched = fake.launched();
    assert_eq!(launched.argv, ["service", "demo"]);
    assert_eq!(launched.environment["HOME"], "/tmp");
    assert_eq!(launched.stdin, b"input");
    assert_eq!(launched.launch.timeout, Some(Duration::from_secs(20)));
    assert_eq!(launched.launch.executable_size, 4);
}

#[tokio::test]
async fn output_is_seen_live() {
    let (launcher, _fake) = fake(|| Behaviour::Wait);
    let (sink, mut chunks) = tokio::sync::mpsc::channel(1);
    let handle = StopHandle::new();
    let stop = StopSignal::of(&handle);
    let run = tokio::spawn(async move { launcher.execute(invocation(), stop, Some(sink)).await });
    assert_eq!(chunks.recv().await, Some(Chunk::Stdout("begun".into())));
    handle.stop();
    let outcome = run.await.unwrap().unwrap();
    assert_eq!((outcome.verdict, outcome.signal), (Verdict::Cancelled, 9));
    assert_eq!(&outcome.stdout[..], b"begun");
}

#[tokio::test]
async fn a_flood_is_stopped_at_the_limit() {
    let (launcher, _fake) = fake(|| Behaviour::Flood);
    let outcome = launcher.execute(invocation(), never(), None).await.unwrap();
    assert_eq!(outcome.verdict, Verdict::OutputExceeded);
    assert_eq!((outcome.stdout.len(), outcome.stdout_truncated), (1000, true));
}

#[tokio::test]
async fn the_deadline_ends_a_run() {
    let (launcher, fake) = fake(|| Behaviour::Wait);
    let mut invocation = invocation();
    invocation.deadline = Some(Instant::now() + Duration::from_millis(50));
    let outcome = launcher.execute(invocation, never(), None).await.unwrap();
    assert_eq!(outcome.verdict, Verdict::TimedOut);
    assert!(fake.launched().launch.timeout.unwrap() <= Duration::from_millis(50));
}

#[tokio::test]
async fn an_abandoned_run_is_stopped() {
    let (launcher, fake) = fake(|| Behaviour::Wait);
    let (sink, mut chunks) = tokio::sync::mpsc::channel(1);
    let client = launcher.clone();
    let run = tokio::spawn(async move { client.execute(invocation(), never(), Some(sink)).await });
    chunks.recv().await.unwrap();
    run.abort();
    assert!(run.await.unwrap_err().is_cancelled());
    let launched = fake.launched();
    assert_eq!(fake.stopped(), (launched.launch.run, StopCause::Cancelled));
}

#[tokio::test]
async fn refusals_come_back() {
    let (launcher, _fake) = fake(|| Behaviour::Refuse(Refusal::StalePolicy));
    let error = launcher.execute(invocation(), never(), None).await.unwrap_err();
    assert!(matches!(error, ExecuteError::Refused(Refusal::StalePolicy)), "{error}");
}

#[tokio::test]
async fn a_stopped_call_is_not_even_launched() {
    let (launcher, fake) = fake(|| Behaviour::Wait);
    let handle = StopHandle::new();
    handle.stop();
    let error = launcher.execute(invocation(), StopSignal::of(&handle), None).await.unwrap_err();
    assert!(matches!(error, ExecuteError::Stopped(StopCause::Cancelled)), "{error}");
    assert!(!fake.was_asked());
}

#[tokio::test]
async fn the_launchers_death_fails_its_runs_and_the_next_one_takes_over() {
    let (launcher, _fake) = fake(|| Behaviour::Die);
    let outcome = launcher.execute(invocation(), never(), None).await.unwrap();
    assert_eq!(outcome.verdict, Verdict::Failed);
    assert_eq!(outcome.failure.unwrap().0, "launcher_lost");
    assert_eq!(&outcome.stdout[..], b"begun", "what was captured so far is kept");

    let runs = Arc::new(AtomicU32::new(0));
    let seen = Arc::clone(&runs);
    let waiting = launcher.execute(invocation(), never(), None);
    let attach = async {
        FakeLauncher::attach(&launcher, SET, move |_| {
            seen.fetch_add(1, Ordering::Relaxed);
            Behaviour::Say { stdout: Vec::new(), stderr: Vec::new(), end: exited(0).into() }
        })
    };
    let (outcome, _fake) = tokio::join!(waiting, attach);
    assert_eq!(outcome.unwrap().verdict, Verdict::Exited);
    assert_eq!(runs.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn without_a_launcher_a_call_waits_a_moment_only() {
    let begun = Instant::now();
    let error = Launcher::new().execute(invocation(), never(), None).await.unwrap_err();
    assert!(matches!(error, ExecuteError::LauncherLost), "{error}");
    assert_eq!(begun.elapsed(), super::launcher::RESTART_WAIT);
}

#[tokio::test]
async fn the_precedence_reaches_the_outcome() {
    let (launcher, _fake) = fake(|| Behaviour::Say {
        stdout: Vec::new(),
        stderr: Vec::new(),
        end: Box::new(crate::jail::message::End { oom: Oom::Own, quarantined: true, ..exited(0) }),
    });
    let outcome = launcher.execute(invocation(), never(), None).await.unwrap();
    assert_eq!(outcome.verdict, Verdict::OutOfMemory);
    assert!(outcome.quarantined);
}

#[tokio::test]
async fn a_nul_never_reaches_the_launcher() {
    let (launcher, fake) = fake(|| Behaviour::Wait);
    let mut invocation = invocation();
    invocation.argv.push("a\0b".into());
    let error = launcher.execute(invocation, never(), None).await.unwrap_err();
    assert!(matches!(error, ExecuteError::Internal { .. }), "{error}");
    assert!(!fake.was_asked());
}

/// Time is paused: with nothing else to do, it jumps to the next timer.
#[tokio::test(start_paused = true)]
async fn a_launcher_that_hangs_is_not_waited_for_and_its_run_stays_counted() {
    struct Grant(Arc<AtomicU32>);
    impl Drop for Grant {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let (launcher, fake) = fake(|| Behaviour::Hang);
    launcher.ready().await;
    let mut invocation = invocation();
    invocation.deadline = Some(Instant::now() + Duration::from_secs(1));
    let run = invocation.run;
    let error = launcher.execute(invocation, never(), None).await.unwrap_err();
    assert!(matches!(error, ExecuteError::Stuck(_)), "{error}");
    let given_back = Arc::new(AtomicU32::new(0));
    launcher.keep_until_released(run, Box::new(Grant(Arc::clone(&given_back))));
    assert_eq!(given_back.load(Ordering::Relaxed), 0);
    fake.end(run, exited(0));
    while given_back.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
}

/// What is left out could be the word of its end.
#[tokio::test]
async fn a_run_of_which_more_is_said_than_was_asked_is_ended_and_stays_counted() {
    let (launcher, fake) = fake(|| Behaviour::Wait);
    let (sink, mut chunks) = tokio::sync::mpsc::channel(1);
    let client = launcher.clone();
    let run = tokio::spawn(async move { client.execute(invocation(), never(), Some(sink)).await });
    chunks.recv().await.unwrap();
    let id = fake.launched().launch.run;
    fake.babble(id, 64);
    let ended = tokio::time::timeout(Duration::from_secs(5), run).await.expect("it ends");
    let error = ended.unwrap().unwrap_err();
    assert!(matches!(error, ExecuteError::Stuck(_)), "{error}");
    assert_eq!(fake.stopped(), (id, StopCause::Cancelled));
    // Until it is known to be gone.
    while launcher.quarantined() > 0 {
        tokio::task::yield_now().await;
    }
}
