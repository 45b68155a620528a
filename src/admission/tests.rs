//! Time is tokio's, paused: nothing here waits in earnest.

use super::*;
use crate::{execute::stop::StopHandle, units::Rate};

fn admission(runs: Option<u32>, memory: u64) -> Admission {
    Admission::new(Capacity { runs, memory })
}

/// How many run, and how many wait.
fn load(admission: &Admission) -> (u32, usize) {
    let load = admission.load();
    (load.running, load.waiting)
}

fn rules(concurrency: u32, queue: u32) -> policy::Admission {
    policy::Admission {
        concurrency: Limit::At(concurrency),
        queue: Limit::At(queue),
        queue_timeout: Limit::At(Duration::from_secs(10)),
        rate: Limit::Unlimited,
    }
}

/// A call that waits in a task of its own.
type Pending = tokio::task::JoinHandle<Result<Permit, AdmissionError>>;

struct Caller {
    admission: Admission,
    rules: policy::Admission,
    memory: Limit<u64>,
    deadline: Option<Instant>,
}

impl Caller {
    fn new(admission: &Admission, rules: policy::Admission) -> Self {
        Self { admission: admission.clone(), rules, memory: Limit::At(1), deadline: None }
    }

    fn memory(mut self, memory: Limit<u64>) -> Self {
        self.memory = memory;
        self
    }

    async fn ask(&self, namespace: &str) -> Result<Permit, AdmissionError> {
        let handle = StopHandle::new();
        let mut stop = StopSignal::of(&handle);
        let namespace = namespace.parse().unwrap();
        let ask = Ask {
            namespace: &namespace,
            rules: &self.rules,
            memory: self.memory,
            deadline: self.deadline,
        };
        self.admission.admit(ask, &mut stop).await
    }

    /// Asks in a task of its own, which is in the queue when this returns.
    async fn queue(&self, namespace: &str) -> Pending {
        let caller = Self { admission: self.admission.clone(), rules: self.rules.clone(), ..*self };
        let namespace = namespace.to_owned();
        let task = tokio::spawn(async move { caller.ask(&namespace).await });
        tokio::task::yield_now().await;
        task
    }
}

async fn granted(pending: Pending) -> Permit {
    pending.await.unwrap().unwrap()
}

async fn settle() {
    for _ in 0..8 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_namespace_runs_so_many_queues_so_many_and_refuses_the_rest() {
    let admission = admission(None, 100);
    let caller = Caller::new(&admission, rules(2, 1));
    let first = caller.ask("a").await.unwrap();
    let _second = caller.ask("a").await.unwrap();
    let third = caller.queue("a").await;
    assert_eq!(load(&admission), (2, 1));
    let refused = caller.ask("a").await.unwrap_err();
    assert!(matches!(refused, AdmissionError::QueueFull { waiting: 1, .. }), "{refused}");
    assert!(caller.ask("b").await.is_ok(), "another namespace has its own");
    drop(first);
    granted(third).await;
}

#[tokio::test(start_paused = true)]
async fn without_a_queue_what_fits_still_runs() {
    let caller = Caller::new(&admission(None, 100), rules(1, 0));
    let permit = caller.ask("a").await.unwrap();
    assert!(matches!(caller.ask("a").await, Err(AdmissionError::QueueFull { waiting: 0, .. })));
    drop(permit);
    assert!(caller.ask("a").await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn waiting_ends_with_the_queue_timeout_or_the_deadline() {
    let admission = admission(None, 100);
    let mut caller = Caller::new(&admission, rules(1, 5));
    let _running = caller.ask("a").await.unwrap();
    let begun = Instant::now();
    let error = caller.ask("a").await.unwrap_err();
    assert!(matches!(error, AdmissionError::QueueTimeout { .. }), "{error}");
    assert_eq!(begun.elapsed(), Duration::from_secs(10));

    caller.deadline = Some(Instant::now() + Duration::from_secs(3));
    assert_eq!(caller.ask("a").await.unwrap_err(), AdmissionError::Deadline);
    assert_eq!(begun.elapsed(), Duration::from_secs(13));
    assert_eq!(caller.ask("b").await.unwrap_err(), AdmissionError::Deadline, "passed already");
    assert_eq!(load(&admission), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn who_stops_waiting_frees_his_place() {
    let admission = admission(None, 100);
    let caller = Caller::new(&admission, rules(1, 1));
    let running = caller.ask("a").await.unwrap();
    let waiting = caller.queue("a").await;
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    assert_eq!(load(&admission), (1, 0));
    let next = caller.queue("a").await;
    drop(running);
    granted(next).await;
    assert_eq!(load(&admission), (0, 0));
    assert!(admission.state().tenants.is_empty(), "nothing is remembered of idle namespaces");
}

#[tokio::test(start_paused = true)]
async fn a_permit_that_nobody_took_goes_to_the_next() {
    let admission = admission(None, 100);
    let caller = Caller::new(&admission, rules(1, 2));
    let running = caller.ask("a").await.unwrap();
    let gone = caller.queue("a").await;
    let next = caller.queue("a").await;
    // Granted and abandoned before its task could take it.
    drop(running);
    gone.abort();
    assert!(gone.await.is_err());
    granted(next).await;
    assert_eq!(load(&admission), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_stopped_call_leaves_the_queue() {
    let admission = admission(None, 100);
    let caller = Caller::new(&admission, rules(1, 2));
    let _running = caller.ask("a").await.unwrap();
    let handle = StopHandle::new();
    let mut stop = StopSignal::of(&handle);
    let namespace = "a".parse().unwrap();
    let ask =
        Ask { namespace: &namespace, rules: &caller.rules, memory: Limit::At(1), deadline: None };
    let (result, ()) = tokio::join!(admission.admit(ask, &mut stop), async { handle.stop() });
    assert_eq!(result.unwrap_err(), AdmissionError::Stopped);
    assert_eq!(load(&admission), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn namespaces_take_turns() {
    let admission = admission(Some(1), 100);
    let caller = Caller::new(&admission, rules(9, 9));
    let mut running = caller.ask("greedy").await.unwrap();
    let greedy = [caller.queue("greedy").await, caller.queue("greedy").await];
    let modest = caller.queue("modest").await;

    let order = std::sync::Arc::new(Mutex::new(Vec::new()));
    let note = |name: &'static str, pending: Pending| {
        let order = std::sync::Arc::clone(&order);
        tokio::spawn(async move {
            let permit = granted(pending).await;
            order.lock().unwrap().push(name);
            permit
        })
    };
    let [first, second] = greedy;
    let tasks = [note("greedy", first), note("modest", modest), note("greedy", second)];
    for task in tasks {
        drop(running);
        running = task.await.unwrap();
    }
    assert_eq!(*order.lock().unwrap(), ["greedy", "modest", "greedy"]);
}

#[tokio::test(start_paused = true)]
async fn memory_adds_up_to_the_budget_and_no_more() {
    let admission = admission(None, 100);
    let caller = |memory| Caller::new(&admission, rules(99, 99)).memory(memory);
    let most = caller(Limit::At(80)).ask("a").await.unwrap();
    let rest = caller(Limit::At(20)).ask("a").await.unwrap();
    let unlimited = caller(Limit::Unlimited).queue("a").await;
    drop(rest);
    settle().await;
    assert!(!unlimited.is_finished(), "it counts as the whole budget");
    drop(most);
    let unlimited = granted(unlimited).await;
    let small = caller(Limit::At(1)).queue("b").await;
    settle().await;
    assert!(!small.is_finished());
    drop(unlimited);
    granted(small).await;
    let never = caller(Limit::At(101)).ask("a").await.unwrap_err();
    assert_eq!(never, AdmissionError::NeverFits { asked: 101, budget: 100 });
    assert_eq!(load(&admission), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn the_large_are_overtaken_only_so_often() {
    let admission = admission(None, 100);
    let small = Caller::new(&admission, rules(99, 99)).memory(Limit::At(10));
    let large = Caller::new(&admission, rules(99, 99)).memory(Limit::At(100));
    let running = small.ask("small").await.unwrap();
    let waiting = large.queue("large").await;
    for _ in 0..OVERTAKEN_MAX {
        drop(small.ask("small").await.unwrap());
    }
    let held_back = small.queue("small").await;
    settle().await;
    assert!(!held_back.is_finished(), "room is kept now");
    drop(running);
    drop(granted(waiting).await);
    granted(held_back).await;
}

#[tokio::test(start_paused = true)]
async fn a_rate_is_a_burst_and_then_one_by_one() {
    let admission = admission(None, 100);
    let mut caller = Caller::new(&admission, rules(99, 9));
    caller.rules.rate = Limit::At(Rate(2.0));
    for _ in 0..2 {
        caller.ask("a").await.unwrap();
    }
    let error = caller.ask("a").await.unwrap_err();
    let AdmissionError::RateExceeded { retry_after, .. } = error else { panic!("{error}") };
    assert!(retry_after.abs_diff(Duration::from_millis(500)) < Duration::from_millis(1));
    assert!(caller.ask("b").await.is_ok());
    tokio::time::advance(retry_after).await;
    assert!(caller.ask("a").await.is_ok());
    assert!(caller.ask("a").await.is_err());
    tokio::time::advance(Duration::from_secs(60)).await;
    for _ in 0..2 {
        caller.ask("a").await.unwrap();
    }
    assert!(caller.ask("a").await.is_err(), "no more than a second's worth is saved up");
}

#[tokio::test(start_paused = true)]
async fn a_refused_call_costs_no_rate() {
    let admission = admission(None, 100);
    let mut caller = Caller::new(&admission, rules(1, 0));
    caller.rules.rate = Limit::At(Rate(2.0));
    let permit = caller.ask("a").await.unwrap();
    for _ in 0..5 {
        assert!(matches!(caller.ask("a").await, Err(AdmissionError::QueueFull { .. })));
    }
    drop(permit);
    assert!(caller.ask("a").await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_quarantined_run_keeps_its_memory() {
    let admission = admission(Some(1), 100);
    let caller = Caller::new(&admission, rules(1, 1)).memory(Limit::At(60));
    let aside = caller.ask("a").await.unwrap().quarantine();
    assert_eq!(load(&admission), (0, 0));
    let smaller = Caller::new(&admission, rules(1, 1)).memory(Limit::At(40));
    assert!(smaller.ask("a").await.is_ok());
    assert!(matches!(caller.ask("a").await, Err(AdmissionError::QueueTimeout { .. })));
    drop(aside);
    assert!(caller.ask("a").await.is_ok(), "it is gone and counts no more");
}

#[tokio::test(start_paused = true)]
async fn strangers_namespaces_do_not_fill_the_memory() {
    let admission = admission(None, u64::MAX);
    let mut caller = Caller::new(&admission, rules(1, 1));
    caller.rules.rate = Limit::At(Rate(1.0));
    for number in 0..TENANTS_MAX {
        caller.ask(&format!("n{number}")).await.unwrap();
    }
    let crowded = caller.ask("one-more").await.unwrap_err();
    assert!(matches!(crowded, AdmissionError::QueueFull { .. }), "{crowded}");
    tokio::time::advance(Duration::from_secs(2)).await;
    assert!(caller.ask("one-more").await.is_ok());
    assert_eq!(admission.state().tenants.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_share_is_overtaken_by_calls_only_so_often() {
    let admission = admission(None, 100);
    let small = Caller::new(&admission, rules(99, 99)).memory(Limit::At(10));
    let running = small.ask("busy").await.unwrap();
    assert!(admission.share(Limit::At(100)).unwrap().is_none());
    let queued = admission.queue_share(Limit::At(100)).unwrap();
    for _ in 0..OVERTAKEN_MAX {
        drop(small.ask("busy").await.unwrap());
        assert!(admission.share_of(&queued).is_none());
    }
    let held_back = small.queue("busy").await;
    settle().await;
    assert!(!held_back.is_finished(), "room is kept now");
    assert!(admission.lacks_memory());
    assert!(admission.share(Limit::At(10)).unwrap().is_none(), "and for no other share either");
    let none = Caller::new(&admission, rules(99, 99)).memory(Limit::At(0));
    drop(none.ask("calls").await.unwrap());
    drop(running);
    let share = admission.share_of(&queued).expect("it is its turn");
    drop(queued);
    settle().await;
    assert!(!held_back.is_finished());
    drop(share);
    granted(held_back).await;
}

#[tokio::test(start_paused = true)]
async fn of_those_that_were_overtaken_too_often_the_eldest_comes_first() {
    for call_first in [true, false] {
        let admission = admission(None, 100);
        let caller = |memory| Caller::new(&admission, rules(99, 99)).memory(Limit::At(memory));
        let running = caller(10).ask("busy").await.unwrap();
        let early = if call_first { Some(caller(100).queue("call").await) } else { None };
        let queued = admission.queue_share(Limit::At(100)).unwrap();
        let late = if call_first { None } else { Some(caller(100).queue("call").await) };
        for _ in 0..OVERTAKEN_MAX {
            drop(caller(10).ask("busy").await.unwrap());
        }
        drop(running);
        settle().await;
        let share = admission.share_of(&queued);
        assert_eq!(share.is_none(), call_first);
        let call = early.or(late).unwrap();
        assert_eq!(call.is_finished(), call_first);
        drop((share, queued));
        drop(granted(call).await);
        assert!(admission.share(Limit::At(100)).unwrap().is_some(), "nothing is left of it");
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_share_no_more_keeps_nobody_out() {
    let admission = admission(None, 100);
    let small = Caller::new(&admission, rules(99, 99)).memory(Limit::At(10));
    let _running = small.ask("busy").await.unwrap();
    let queued = admission.queue_share(Limit::At(100)).unwrap();
    for _ in 0..OVERTAKEN_MAX {
        drop(small.ask("busy").await.unwrap());
    }
    let held_back = small.queue("busy").await;
    let released = admission.released();
    drop(queued);
    granted(held_back).await;
    released.await;
}
