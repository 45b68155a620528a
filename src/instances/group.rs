//! The instances of one artifact, under one policy, of one namespace: who gets which, and
//! when there are to be more.
//!
//! A call takes the least busy instance of its shape. Where none has room, and no more
//! calls can be expected to be served by those that are being started, one more is, up to
//! `max`. Failures are told to the calls that waited for them, and make the next start wait
//! where one follows the other.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::{
    Count, Key, NotServed, Recipe, Shape, Shared,
    instance::Instance,
    lease::{How, Lease},
    members::{Failure, Member, NoLease, Standing, Starting, State},
    review,
    start::{self, Start},
};
use crate::{
    admission::AdmissionError,
    execute::stop::{StopSignal, until},
    policy,
};

/// An instance that lived for so long is no part of a crash loop.
const SETTLED: Duration = Duration::from_secs(10);

/// Calls that ran over one after the other, without one that was answered between them,
/// after which an instance is given up.
const OVERRUNS_MAX: u32 = 4;

/// When to come again after a long wait.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) key: Key,
    pub(super) rules: policy::Instances,
    /// `min` is kept.
    pub(super) pinned: bool,
    state: Mutex<State>,
    changed: Notify,
}

impl Group {
    pub(super) fn new(key: Key, rules: policy::Instances, pinned: bool) -> Self {
        Self { key, rules, pinned, state: Mutex::default(), changed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An instance for one call, started where that is needed.
    ///
    /// Cancel-safe: what is being started goes on for whoever comes next.
    pub(super) async fn acquire(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        recipe: &Recipe,
        deadline: Option<Instant>,
        stop: &mut StopSignal,
    ) -> Result<Lease, NoLease> {
        let begun = Instant::now();
        let patience = recipe.patience.finite();
        let waits_end = patience.and_then(|patience| begun.checked_add(patience));
        // Who waits for a start waits as long as that may take, which itself may wait for
        // memory, but not for one start after the other.
        let starts_end = self
            .rules
            .start_timeout
            .finite()
            .and_then(|start| waits_end?.checked_add(patience?)?.checked_add(start));
        let mut place = None;
        let mut known = None;
        loop {
            // Made before the look, so that nothing is missed between the two.
            let changed = self.changed.notified();
            let (end, again) = match self.look(shared, recipe, &mut known, &mut place)? {
                Found::Lease(lease) => return Ok(lease),
                Found::Starting => (starts_end, None),
                Found::Queued(again) => (waits_end, again),
            };
            tokio::select! {
                () = changed => {}
                () = until(again) => {}
                () = stop.stopped() => {
                    return Err(NotServed::from(AdmissionError::Stopped).into());
                }
                () = until(deadline) => {
                    return Err(NotServed::from(AdmissionError::Deadline).into());
                }
                () = until(end) => {
                    let waited = Duration::from_millis(begun.elapsed().as_millis() as u64);
                    let late = AdmissionError::QueueTimeout { waited, retry_after: RETRY_AFTER };
                    return Err(NotServed::from(late).into());
                }
            }
        }
    }

    /// One look at what there is.
    fn look(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        recipe: &Recipe,
        known: &mut Option<u64>,
        place: &mut Option<Place>,
    ) -> Result<Found, NoLease> {
        let mut state = self.state();
        let shape = &recipe.shape;
        if let Some(member) = state.least_busy(shape, &self.rules) {
            member.calls += 1;
            member.served += 1;
            if std::mem::take(&mut member.frozen) {
                member.instance.service.freeze(false);
                // It is to be frozen again, which nobody has planned for.
                shared.review.notify_one();
            }
            return Ok(Found::Lease(Lease::new(self, shared, &member.instance)));
        }
        // Failures of before it came are not its, nor those of others beside one that lives and
        // that it can wait for.
        let living = state.has_living(shape);
        let failed = state.failed;
        let known = known.get_or_insert(failed);
        if living {
            *known = failed;
        } else if let Some(failure) = state.failure_since(*known, shape) {
            return Err(failure.clone());
        }
        if place.is_none() {
            state.waiting.push(shape.clone());
            *place = Some(Place { group: Arc::clone(self), shape: shape.clone() });
        }
        let coming = state.count_coming(shape);
        let waits = |again| if coming > 0 { Found::Starting } else { Found::Queued(again) };
        let expected = coming.saturating_mul(self.rules.concurrency as usize);
        if state.count_waiting(shape) <= expected {
            return Ok(waits(None));
        }
        let now = Instant::now();
        if let Some(wait) = state.backing_off(now) {
            let helpless = coming == 0 && !living;
            return match helpless {
                true => Err(state.crash_loop(wait).into()),
                false => Ok(waits(Some(now + wait))),
            };
        }
        if living && let Some(wait) = state.resting(now) {
            return Ok(waits(Some(now + wait)));
        }
        if state.members.len() + state.starting.len() >= self.rules.max as usize {
            state.make_room(shape);
            return Ok(waits(None));
        }
        if recipe.plain || state.recipe.as_ref().is_none_or(|kept| !kept.plain) {
            state.recipe = Some(recipe.clone());
        }
        self.start_one(shared, &mut state, recipe.clone(), Start::Called);
        Ok(Found::Starting)
    }

    fn start_one(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        state: &mut State,
        recipe: Recipe,
        why: Start,
    ) {
        let starting = Starting::new(&recipe.shape);
        state.starting.push(Arc::clone(&starting));
        start::begin(shared, self, recipe, why, starting);
    }

    /// One that was being started is ready. False where it was given up meanwhile: it is to be
    /// ended.
    pub(super) fn started(&self, instance: &Arc<Instance>, starting: &Arc<Starting>) -> bool {
        let mut state = self.state();
        if starting.is_given_up() {
            return false;
        }
        state.no_longer_starting(starting);
        let shape = starting.shape.clone();
        state.members.push(Member {
            instance: Arc::clone(instance),
            shape,
            standing: Standing::Ready,
            calls: 0,
            served: 0,
            abandoned: 0,
            abandoned_since: None,
            overruns: 0,
            idle_since: Instant::now(),
            frozen: false,
        });
        if state.superseded {
            state.retire_idle();
        }
        drop(state);
        self.changed.notify_waiters();
        true
    }

    /// One that was being started never will be.
    pub(super) fn not_started(&self, what: NoLease, starting: &Arc<Starting>, why: Start) {
        let mut state = self.state();
        state.no_longer_starting(starting);
        let shape = starting.shape.clone();
        let given_up = matches!(what, NoLease::NotServed(NotServed::NoRoom));
        if given_up || why == Start::Kept && matches!(what, NoLease::NotServed(_)) {
            // It is no call's failure: who waits for one has another begun.
            drop(state);
            return self.changed.notify_waiters();
        }
        // Without a process there was none that could crash.
        if matches!(what, NoLease::Failed(_)) {
            state.count_failure();
        }
        state.rest();
        state.failed += 1;
        state.failure = Some(Failure { number: state.failed, shape, what });
        drop(state);
        self.changed.notify_waiters();
    }

    /// One has ended, for whatever reason.
    pub(super) fn ended(&self, instance: &Arc<Instance>, last: impl FnOnce() -> NoLease) {
        let mut state = self.state();
        let Some(index) = state.position(instance) else { return };
        let member = state.members.swap_remove(index);
        let by_itself = member.standing != Standing::Retired;
        if by_itself {
            if member.instance.ready_at.elapsed() >= SETTLED {
                state.forget_failures();
            }
            state.count_failure();
            // Those that it had are told by themselves; this is for the crash loop's words.
            let number = state.failed;
            state.failure = Some(Failure { number, shape: member.shape, what: last() });
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// A call let go of its instance.
    pub(super) fn release(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        instance: &Arc<Instance>,
        how: How,
    ) {
        let mut state = self.state();
        let superseded = state.superseded;
        let Some(index) = state.position(instance) else { return };
        let member = &mut state.members[index];
        member.calls -= 1;
        member.idle_since = Instant::now();
        match how {
            How::Answered => member.overruns = 0,
            How::Done => {}
            How::Lost => member.standing = Standing::Retired,
            How::Overrun => member.overruns += 1,
            How::Cancelled => {}
        }
        if matches!(how, How::Overrun | How::Cancelled) {
            member.abandoned += 1;
            member.abandoned_since.get_or_insert_with(Instant::now);
        }
        let worn = !self.rules.max_requests.allows(member.served.saturating_add(1));
        if worn || superseded || member.overruns >= OVERRUNS_MAX {
            member.standing = Standing::Retired;
        }
        let idle = member.calls == 0;
        let retired = member.standing == Standing::Retired;
        if idle && retired {
            member.instance.service.stop();
        } else if idle && member.abandoned > 0 && member.standing == Standing::Ready {
            member.standing = Standing::Examined;
            review::examine(shared, self, instance);
        }
        if how == How::Answered {
            state.forget_failures();
        }
        let wake = !state.waiting.is_empty();
        drop(state);
        if idle {
            shared.room.notify_waiters();
        }
        if wake {
            self.changed.notify_waiters();
        }
    }

    /// An idle instance was looked at: it is quiet, or goes on with what was given up.
    pub(super) fn examined(&self, instance: &Arc<Instance>, quiet: bool) {
        let mut state = self.state();
        let Some(index) = state.position(instance) else { return };
        let member = &mut state.members[index];
        if quiet && member.standing == Standing::Examined {
            member.standing = Standing::Ready;
            member.abandoned = 0;
            member.abandoned_since = None;
        } else {
            member.retire();
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// Ends what is idle for too long, and what is superseded; freezes what was idle for a
    /// while. When to look again.
    pub(super) fn review(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        now: Instant,
        in_force: bool,
    ) -> Option<Instant> {
        let mut state = self.state();
        state.superseded = !in_force;
        if state.superseded {
            state.retire_idle();
            return None;
        }
        let wanted = self.wanted();
        // Instances of other shapes, for calls that ask for something else, are spare.
        let kept = state.recipe.as_ref().filter(|_| wanted > 0).map(|recipe| recipe.shape.clone());
        let ready = kept.as_ref().map_or(0, |kept| state.count_ready(kept));
        let mut spare = ready.saturating_sub(wanted);
        let mut next: Option<Instant> = None;
        let mut due = |at: Instant| next = Some(next.map_or(at, |next| next.min(at)));
        for member in state.members.iter_mut().filter(|it| it.standing == Standing::Ready) {
            let idle_since = if member.calls > 0 { now } else { member.idle_since };
            let end = self.rules.idle_timeout.finite().map(|idle| idle_since + idle);
            let is_kept = kept.as_ref() == Some(&member.shape);
            if end.is_some_and(|end| end <= now) && (!is_kept || spare > 0) {
                spare -= usize::from(is_kept);
                member.retire();
                continue;
            }
            let freeze = idle_since + review::FREEZE_AFTER;
            if freeze <= now && !member.frozen {
                member.frozen = true;
                member.instance.service.freeze(true);
            }
            if let Some(end) = end.filter(|end| *end > now) {
                due(end);
            }
            if !member.frozen {
                due(freeze);
            }
        }
        let full = state.members.len() + state.starting.len() >= self.rules.max as usize;
        let there = kept.map_or(0, |kept| state.count_ready(&kept) + state.count_coming(&kept));
        if let (true, Some(recipe)) = (there < wanted, &mut state.recipe) {
            // The policy is the same; the set that it is of may be another by now.
            recipe.policy_set = shared.policies.current().digest;
            let recipe = recipe.clone();
            match state.backing_off(now) {
                Some(wait) => due(now + wait),
                None if full => {}
                None => self.start_one(shared, &mut state, recipe, Start::Kept),
            }
            due(now + review::LACKING_AGAIN);
        }
        next
    }

    /// Since when its longest idle instance is that nobody waits for; and whether it is one of
    /// those that are kept.
    pub(super) fn idle_since(&self) -> Option<(bool, Instant)> {
        let state = self.state();
        state.spare().map(|member| (self.is_kept(&state, member), member.idle_since)).min()
    }

    /// Whether there would be less than `min` without it.
    fn is_kept(&self, state: &State, member: &Member) -> bool {
        let kept = state.recipe.as_ref().is_some_and(|recipe| recipe.shape == member.shape);
        kept && state.count_ready(&member.shape) <= self.wanted()
    }

    /// How many are kept whether or not there are calls.
    fn wanted(&self) -> usize {
        if self.pinned { self.rules.min as usize } else { 0 }
    }

    /// Whether a call waits for one of this shape.
    pub(super) fn is_waited_for(&self, starting: &Starting) -> bool {
        self.state().waiting.contains(&starting.shape)
    }

    /// Gives one up that is being started and that nobody waits for any more.
    pub(super) fn abandon_one(&self) -> Option<Arc<Starting>> {
        self.state().abandon_one()
    }

    /// Ends that one: others need its memory more.
    pub(super) fn evict(&self) -> Option<Arc<Instance>> {
        let mut state = self.state();
        let last = |member: &&Member| (self.is_kept(&state, member), member.idle_since);
        let longest = state.spare().min_by_key(last)?.instance.clone();
        let index = state.position(&longest)?;
        state.members[index].retire();
        Some(longest)
    }

    /// Ends all of its instances.
    pub(super) fn stop_all(&self) {
        for member in &self.state().members {
            member.instance.service.stop();
        }
    }

    /// Whether nothing is lost with it.
    pub(super) fn is_forgettable(self: &Arc<Self>, now: Instant) -> bool {
        self.is_empty() && self.state().not_before.is_none_or(|at| at <= now)
    }

    /// Whether nothing is lost with it but how long the next start is off.
    pub(super) fn is_empty(self: &Arc<Self>) -> bool {
        let state = self.state();
        let nobody =
            state.members.is_empty() && state.starting.is_empty() && state.waiting.is_empty();
        // Who is about to take a look holds it.
        nobody && Arc::strong_count(self) == 1
    }

    /// How many calls wait.
    #[cfg(test)]
    pub(super) fn count_waiting(&self) -> usize {
        self.state().waiting.len()
    }

    /// As if its instances had ended again and again.
    #[cfg(test)]
    pub(super) fn back_off(&self) {
        let mut state = self.state();
        while state.backing_off(Instant::now()).is_none() {
            state.count_failure();
        }
    }

    /// How many instances it has, and starts.
    pub(super) fn size(&self) -> usize {
        let state = self.state();
        state.members.len() + state.starting.len()
    }

    /// Adds its instances.
    pub(super) fn count(&self, count: &mut Count) {
        let state = self.state();
        let busy = state.members.iter().filter(|member| member.calls > 0).count();
        count.busy += busy;
        count.idle += state.members.len() - busy;
        count.starting += state.starting.len();
    }
}

/// What a look came to.
enum Found {
    Lease(Lease),
    /// One that is being started will do.
    Starting,
    /// There are as many as there may be, at least until then.
    Queued(Option<Instant>),
}

/// A waiting call's place.
struct Place {
    group: Arc<Group>,
    shape: Shape,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.group.state();
        if let Some(index) = state.waiting.iter().position(|other| *other == self.shape) {
            state.waiting.swap_remove(index);
        }
        if state.superseded {
            state.retire_idle();
        }
        // What this one waited for may be in the way of those who want another.
        if state.waiting.iter().any(|other| *other != self.shape) {
            drop(state);
            self.group.changed.notify_waiters();
        }
    }
}
