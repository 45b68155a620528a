//! What a group has: its instances, those that are being started, who waits, what failed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::{NotServed, Recipe, Served, Shape, instance::Instance};
use crate::policy;

/// Starts that fail one after the other before the next has to wait, how long it waits
/// then, and at the most: twice as long each time.
const FAILURES_FREE: u32 = 2;
const BACKOFF_MIN: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// After a start that failed, how long those wait that have another instance to wait for until
/// one more is tried.
const REST: Duration = Duration::from_secs(1);

/// How long an instance gets calls beside one that was given up, of which it isn't known
/// whether it is over: it is looked at once it has none.
const ABANDONED_MAX: Duration = Duration::from_secs(3);

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) members: Vec<Member>,
    /// Those that are being started.
    pub(super) starting: Vec<Arc<Starting>>,
    /// Shapes of calls that wait.
    pub(super) waiting: Vec<Shape>,
    /// What `min` is kept by: of the newest call that asks for nothing of the process, else
    /// of the newest.
    pub(super) recipe: Option<Recipe>,
    pub(super) failure: Option<Failure>,
    /// Failures one after the other.
    pub(super) failures: u32,
    /// How many there were in all.
    pub(super) failed: u64,
    pub(super) not_before: Option<Instant>,
    /// Until when none is started beside those that live.
    pub(super) rests_until: Option<Instant>,
    /// Its policy isn't in force any more.
    pub(super) superseded: bool,
}

/// One that is being started.
#[derive(Debug)]
pub(super) struct Starting {
    pub(super) shape: Shape,
    /// It is given up: nobody waits for it, and others need its memory. It has its place
    /// until it is over.
    given_up: AtomicBool,
    pub(super) abandoned: Notify,
    over: watch::Sender<bool>,
}

impl Starting {
    pub(super) fn new(shape: &Shape) -> Arc<Self> {
        Arc::new(Self {
            shape: shape.clone(),
            given_up: AtomicBool::new(false),
            abandoned: Notify::new(),
            over: watch::Sender::new(false),
        })
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// Returns when it is ready, or nothing is left of it. Cancel-safe.
    pub(super) async fn over(&self) {
        // The sender lives in `self`.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }
}

#[derive(Debug)]
pub(super) struct Failure {
    /// The how manyeth.
    pub(super) number: u64,
    pub(super) shape: Shape,
    pub(super) what: NoLease,
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) instance: Arc<Instance>,
    pub(super) shape: Shape,
    pub(super) standing: Standing,
    /// Calls that it has now, and has had.
    pub(super) calls: u32,
    pub(super) served: u64,
    /// Calls that ended for us, and perhaps not for it.
    pub(super) abandoned: u32,
    pub(super) abandoned_since: Option<Instant>,
    /// Of them, those one after the other.
    pub(super) overruns: u32,
    pub(super) idle_since: Instant,
    pub(super) frozen: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Gets calls.
    Ready,
    /// Is looked at: it gets none until it was seen quiet.
    Examined,
    /// Gets no more, and ends with the last that it has.
    Retired,
}

/// Why a call has no instance.
#[derive(Clone, Debug)]
pub(super) enum NoLease {
    /// For want of a process.
    NotServed(NotServed),
    /// The process was no service; in the words of a call that was served.
    Failed(Box<Served>),
}

impl From<NotServed> for NoLease {
    fn from(error: NotServed) -> Self {
        Self::NotServed(error)
    }
}

impl Member {
    /// Ends it: nobody has a call on it.
    pub(super) fn retire(&mut self) {
        self.standing = Standing::Retired;
        self.instance.service.stop();
    }

    /// Calls that it may have under way.
    fn taken(&self) -> u32 {
        self.calls.saturating_add(self.abandoned)
    }

    pub(super) fn has_room(&self, shape: &Shape, rules: &policy::Instances) -> bool {
        self.standing == Standing::Ready
            && self.shape == *shape
            && self.taken() < rules.concurrency
            && self.abandoned_since.is_none_or(|since| since.elapsed() < ABANDONED_MAX)
            && rules.max_requests.allows(self.served.saturating_add(1))
            && !self.instance.service.is_ended()
    }
}

impl State {
    pub(super) fn position(&self, instance: &Arc<Instance>) -> Option<usize> {
        self.members.iter().position(|member| Arc::ptr_eq(&member.instance, instance))
    }

    /// The one that is to get the next call of this shape.
    pub(super) fn least_busy(
        &mut self,
        shape: &Shape,
        rules: &policy::Instances,
    ) -> Option<&mut Member> {
        let free = self.members.iter_mut().filter(|member| member.has_room(shape, rules));
        free.min_by_key(|member| member.taken())
    }

    /// The last failure, if it is of this shape and later than those.
    pub(super) fn failure_since(&self, known: u64, shape: &Shape) -> Option<&NoLease> {
        let failure = self.failure.as_ref()?;
        (failure.number > known && failure.shape == *shape).then_some(&failure.what)
    }

    pub(super) fn idle(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|it| it.calls == 0 && it.standing == Standing::Ready)
    }

    /// Whether one of this shape is there that may come to have room.
    pub(super) fn has_living(&self, shape: &Shape) -> bool {
        self.members
            .iter()
            .any(|member| member.shape == *shape && member.standing != Standing::Retired)
    }

    pub(super) fn count_waiting(&self, shape: &Shape) -> usize {
        self.waiting.iter().filter(|other| *other == shape).count()
    }

    /// How long it is yet until another may be started.
    pub(super) fn backing_off(&self, now: Instant) -> Option<Duration> {
        self.not_before?.checked_duration_since(now).filter(|wait| !wait.is_zero())
    }

    /// What a call is told that none may be started for, and that has none to wait for.
    pub(super) fn crash_loop(&self, retry_after: Duration) -> NotServed {
        let last = self.failure.as_ref().map(|failure| failure.what.in_short());
        NotServed::CrashLoop { last: last.unwrap_or_default(), retry_after }
    }

    /// How long it is yet until another may be started beside those that live.
    pub(super) fn resting(&self, now: Instant) -> Option<Duration> {
        self.rests_until?.checked_duration_since(now).filter(|wait| !wait.is_zero())
    }

    pub(super) fn rest(&mut self) {
        self.rests_until = Some(Instant::now() + REST);
    }

    /// Ends an idle one of another shape, unless one is about to end; or else gives one up
    /// that is being started and that nobody waits for.
    pub(super) fn make_room(&mut self, shape: &Shape) {
        let Self { members, waiting, starting, .. } = self;
        let mut idle: Vec<_> = members.iter_mut().filter(|it| it.calls == 0).collect();
        let ends = idle.iter().any(|member| member.standing == Standing::Retired);
        if ends || starting.iter().any(|one| one.is_given_up()) {
            return;
        }
        // One that was started for a call that has only to take it is not in the way: else two
        // that want different ones could take turns in starting them, and neither be served.
        let fresh = |member: &Member| member.served == 0 && waiting.contains(&member.shape);
        match idle.iter_mut().find(|member| member.shape != *shape && !fresh(member)) {
            Some(other) => other.retire(),
            None => _ = self.abandon_one(),
        }
    }

    /// Gives one up that is being started and that nobody waits for any more, if there is one.
    /// It is told once.
    pub(super) fn abandon_one(&mut self) -> Option<Arc<Starting>> {
        let unwanted =
            |one: &&Arc<Starting>| !one.is_given_up() && !self.waiting.contains(&one.shape);
        let one = self.starting.iter().find(unwanted)?;
        one.given_up.store(true, Ordering::Relaxed);
        one.abandoned.notify_one();
        Some(Arc::clone(one))
    }

    /// No crash loop, or none any more.
    pub(super) fn forget_failures(&mut self) {
        self.failures = 0;
        self.not_before = None;
    }

    /// Those that nobody waits for.
    pub(super) fn spare(&self) -> impl Iterator<Item = &Member> {
        self.idle().filter(|member| !self.waiting.contains(&member.shape))
    }

    pub(super) fn count_ready(&self, shape: &Shape) -> usize {
        let ready = |it: &&Member| it.standing == Standing::Ready && it.shape == *shape;
        self.members.iter().filter(ready).count()
    }

    pub(super) fn count_starting(&self, shape: &Shape) -> usize {
        self.starting.iter().filter(|one| one.shape == *shape && !one.is_given_up()).count()
    }

    /// Instances that will soon be ready: those that are being started, and those that are
    /// looked at and may well be of use.
    pub(super) fn count_coming(&self, shape: &Shape) -> usize {
        let examined = self
            .members
            .iter()
            .filter(|member| member.standing == Standing::Examined && member.shape == *shape);
        self.count_starting(shape) + examined.count()
    }

    pub(super) fn no_longer_starting(&mut self, starting: &Arc<Starting>) {
        self.starting.retain(|other| !Arc::ptr_eq(other, starting));
        starting.over.send_replace(true);
    }

    /// Ends those without a call that nobody waits for.
    pub(super) fn retire_idle(&mut self) {
        let Self { members, waiting, .. } = self;
        for member in members {
            let idle = member.calls == 0 && !waiting.contains(&member.shape);
            if idle && member.standing != Standing::Retired {
                member.retire();
            }
        }
    }

    pub(super) fn count_failure(&mut self) {
        self.failures = self.failures.saturating_add(1);
        let over = self.failures.saturating_sub(FAILURES_FREE);
        if over > 0 {
            let wait = BACKOFF_MIN.saturating_mul(1 << (over - 1).min(16)).min(BACKOFF_MAX);
            self.not_before = Some(Instant::now() + wait);
        }
    }
}

impl NoLease {
    pub(super) fn in_short(&self) -> String {
        match self {
            Self::NotServed(error) => error.to_string(),
            Self::Failed(failed) => failed.in_short(),
        }
    }
}
