//! May it run now? Permits, bounded queues and rates: per namespace, and over all.
//!
//! A call waits in its namespace's queue, first come first served. When room
//! appears the namespaces take turns, so that one with a long queue does not
//! keep the others out. A run whose memory does not fit yet may be overtaken by
//! smaller ones, but only so often ([`OVERTAKEN_MAX`]): then room is kept for it.
//! A run with unlimited memory counts as the whole budget; one whose limit is
//! larger than the budget is refused, as no waiting would help.

mod bucket;
pub mod budget;
pub mod bytes;
mod shares;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};
use tracing::warn;

use crate::{
    execute::stop::{StopSignal, until},
    names::Namespace,
    policy,
    units::{Limit, Size, Span},
};
use bucket::Bucket;
pub use shares::{QueuedShare, Share};

/// How often a run may be overtaken by ones that need less memory.
pub const OVERTAKEN_MAX: u32 = 16;

/// Namespaces with calls or rates to remember.
const TENANTS_MAX: usize = 4096;

/// Calls that wait, over all namespaces.
const WAITING_MAX: usize = 16_384;

/// When to come again after a full queue or a long wait.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What all running calls may have together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Runs at once; `None`: as memory allows.
    pub runs: Option<u32>,
    /// Bytes that their memory limits add up to.
    pub memory: u64,
}

/// What is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Calls with a permit.
    pub running: u32,
    /// Calls in queues.
    pub waiting: usize,
    /// Bytes promised to those that run, and to what is left of ended ones.
    pub memory: u64,
    /// Bytes that may be promised.
    pub budget: u64,
}

/// What one call wants.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Whose queue it joins.
    pub namespace: &'a Namespace,
    /// Its policy's `[admission]`.
    pub rules: &'a policy::Admission,
    /// Its memory limit in bytes.
    pub memory: Limit<u64>,
    /// When waiting makes no sense any more.
    pub deadline: Option<Instant>,
}

/// Why a call may not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmissionError {
    /// More memory than all runs together may be promised: waiting won't help.
    #[error(
        "the run's memory limit of {} is more than the {} that the server may promise in all; ask for less, or raise [server] memory",
        Size(*asked), Size(*budget)
    )]
    NeverFits {
        /// Bytes that the run would have.
        asked: u64,
        /// Bytes that there are.
        budget: u64,
    },
    /// As many wait as may.
    #[error("the queue is full: {waiting} calls of the namespace wait already")]
    QueueFull {
        /// How many.
        waiting: u32,
        /// When to come again.
        retry_after: Duration,
    },
    /// It waited as long as the policy lets it.
    #[error("no room after waiting for {} in the queue", Span(*waited))]
    QueueTimeout {
        /// The policy's `queue_timeout`.
        waited: Duration,
        /// When to come again.
        retry_after: Duration,
    },
    /// Too many calls per time.
    #[error("the namespace's rate of {per_second} calls per second is exceeded")]
    RateExceeded {
        /// The policy's `rate`.
        per_second: String,
        /// When the next call may begin.
        retry_after: Duration,
    },
    /// Its deadline passed in the queue.
    #[error("the deadline passed before the call could start")]
    Deadline,
    /// Its caller went away, or the service is stopping.
    #[error("cancelled while waiting to start")]
    Stopped,
}

/// Hands out permits.
#[derive(Clone, Debug)]
pub struct Admission {
    shared: Arc<Mutex<State>>,
    news: Arc<News>,
}

/// What others wait for.
#[derive(Debug, Default)]
struct News {
    /// A call waits for memory.
    pressure: Notify,
    /// Memory was given back.
    released: Notify,
}

#[derive(Debug)]
struct State {
    capacity: Capacity,
    running: u32,
    memory: u64,
    waiting: usize,
    tenants: HashMap<Namespace, Tenant>,
    shares: shares::Queue,
    /// Namespaces that have someone waiting, in the order of their turns.
    turns: VecDeque<Namespace>,
    next_id: u64,
}

#[derive(Debug, Default)]
struct Tenant {
    running: u32,
    waiting: VecDeque<Waiter>,
    bucket: Option<Bucket>,
}

#[derive(Debug)]
struct Waiter {
    id: u64,
    memory: u64,
    concurrency: Limit<u32>,
    overtaken: u32,
    wake: oneshot::Sender<()>,
}

impl Waiter {
    /// Whether memory is kept from it for a share that was overtaken too often.
    fn is_kept_out(&self, shares: &shares::Queue) -> bool {
        let overdue = (self.overtaken >= OVERTAKEN_MAX).then_some(self.id);
        self.memory > 0 && shares.keep_out(overdue)
    }
}

impl Admission {
    /// An admission with nothing running.
    #[must_use]
    pub fn new(capacity: Capacity) -> Self {
        let state = State {
            capacity,
            running: 0,
            memory: 0,
            waiting: 0,
            tenants: HashMap::new(),
            shares: shares::Queue::default(),
            turns: VecDeque::new(),
            next_id: 0,
        };
        Self { shared: Arc::new(Mutex::new(state)), news: Arc::default() }
    }

    /// Returns when memory was given back after this was called.
    pub fn released(&self) -> impl Future<Output = ()> + '_ {
        self.news.released.notified()
    }

    /// Returns when a call waits for memory. For one listener.
    pub async fn pressure(&self) {
        self.news.pressure.notified().await;
    }

    /// Whether a call waits for memory alone.
    #[must_use]
    pub fn lacks_memory(&self) -> bool {
        let state = self.state();
        let has_place = state.capacity.runs.is_none_or(|runs| state.running < runs);
        has_place
            && state.tenants.values().any(|tenant| {
                tenant.waiting.front().is_some_and(|first| {
                    first.concurrency.allows(tenant.running.saturating_add(1))
                        && (state.memory.saturating_add(first.memory) > state.capacity.memory
                            || first.is_kept_out(&state.shares))
                })
            })
    }

    /// Waits for a permit, in turn. Cancel-safe: dropping the future gives the
    /// place, or the permit, back.
    ///
    /// # Errors
    /// [`AdmissionError`]
    pub async fn admit(
        &self,
        ask: Ask<'_>,
        stop: &mut StopSignal,
    ) -> Result<Permit, AdmissionError> {
        let begun = Instant::now();
        if ask.deadline.is_some_and(|deadline| deadline <= begun) {
            return Err(AdmissionError::Deadline);
        }
        let (place, woken) = self.join(ask, begun)?;
        let patience = ask.rules.queue_timeout.finite();
        tokio::select! {
            biased;
            granted = woken => match granted {
                Ok(()) => Ok(Permit(place)),
                Err(_) => Err(AdmissionError::Stopped),
            },
            () = stop.stopped() => Err(AdmissionError::Stopped),
            () = until(ask.deadline) => Err(AdmissionError::Deadline),
            () = until(patience.and_then(|patience| begun.checked_add(patience))) => {
                let waited = patience.unwrap_or_default();
                Err(AdmissionError::QueueTimeout { waited, retry_after: RETRY_AFTER })
            }
        }
    }

    /// What is under way, over all namespaces.
    #[must_use]
    pub fn load(&self) -> Load {
        let state = self.state();
        Load {
            running: state.running,
            waiting: state.waiting,
            memory: state.memory,
            budget: state.capacity.memory,
        }
    }

    /// Takes a place in the queue, which may come with a permit at once.
    fn join(
        &self,
        ask: Ask<'_>,
        now: Instant,
    ) -> Result<(Place, oneshot::Receiver<()>), AdmissionError> {
        let mut state = self.state();
        let memory = state.wanted(ask.memory)?;
        state.check_room(ask.namespace, now)?;
        state.check_rate(ask, now)?;
        let (id, woken) = state.enqueue(ask.namespace, memory, ask.rules.concurrency);
        self.grant(&mut state);
        let waiting = state.position_after(ask.namespace, id);
        if waiting.is_some_and(|ahead| !ask.rules.queue.allows(ahead.saturating_add(1))) {
            state.leave(ask.namespace, id);
            let waiting = waiting.unwrap_or_default();
            return Err(AdmissionError::QueueFull { waiting, retry_after: RETRY_AFTER });
        }
        state.spend_rate(ask, now);
        let place = Place { admission: self.clone(), namespace: ask.namespace.clone(), id, memory };
        Ok((place, woken))
    }

    /// Lets in whoever fits, and tells of who would but for memory.
    fn grant(&self, state: &mut State) {
        if !state.grant() {
            self.news.pressure.notify_one();
        }
    }

    fn give_back(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        change(&mut state);
        self.grant(&mut state);
        drop(state);
        self.news.released.notify_waiters();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What a memory limit counts as.
    fn wanted(&self, memory: Limit<u64>) -> Result<u64, AdmissionError> {
        let budget = self.capacity.memory;
        match memory.finite() {
            Some(asked) if asked > budget => Err(AdmissionError::NeverFits { asked, budget }),
            memory => Ok(memory.unwrap_or(budget)),
        }
    }

    /// Forgets idle namespaces when there are many, and refuses beyond the bounds.
    fn check_room(&mut self, namespace: &Namespace, now: Instant) -> Result<(), AdmissionError> {
        if self.tenants.len() >= TENANTS_MAX && !self.tenants.contains_key(namespace) {
            self.tenants.retain(|_, tenant| !tenant.is_forgettable(now));
        }
        let crowded = self.tenants.len() >= TENANTS_MAX && !self.tenants.contains_key(namespace);
        if crowded || self.waiting >= WAITING_MAX {
            return Err(AdmissionError::QueueFull { waiting: 0, retry_after: RETRY_AFTER });
        }
        Ok(())
    }

    fn check_rate(&mut self, ask: Ask<'_>, now: Instant) -> Result<(), AdmissionError> {
        let Some(rate) = ask.rules.rate.finite() else { return Ok(()) };
        let tenant = self.tenants.entry(ask.namespace.clone()).or_default();
        let bucket = tenant.bucket.get_or_insert_with(|| Bucket::full(rate, now));
        bucket.refill(rate, now);
        bucket.wait().map_or(Ok(()), |retry_after| {
            Err(AdmissionError::RateExceeded { per_second: rate.0.to_string(), retry_after })
        })
    }

    fn spend_rate(&mut self, ask: Ask<'_>, now: Instant) {
        let Some(rate) = ask.rules.rate.finite() else { return };
        if let Some(tenant) = self.tenants.get_mut(ask.namespace) {
            tenant.bucket.get_or_insert_with(|| Bucket::full(rate, now)).take();
        }
    }

    fn enqueue(
        &mut self,
        namespace: &Namespace,
        memory: u64,
        concurrency: Limit<u32>,
    ) -> (u64, oneshot::Receiver<()>) {
        let id = self.next_id;
        self.next_id += 1;
        let (wake, woken) = oneshot::channel();
        let tenant = self.tenants.entry(namespace.clone()).or_default();
        if tenant.waiting.is_empty() {
            self.turns.push_back(namespace.clone());
        }
        tenant.waiting.push_back(Waiter { id, memory, concurrency, overtaken: 0, wake });
        self.waiting += 1;
        (id, woken)
    }

    /// How many wait before this one; `None` if it waits no more.
    fn position_after(&self, namespace: &Namespace, id: u64) -> Option<u32> {
        let waiting = &self.tenants.get(namespace)?.waiting;
        let position = waiting.iter().position(|waiter| waiter.id == id)?;
        Some(u32::try_from(position).unwrap_or(u32::MAX))
    }

    /// Lets in whoever fits, namespace after namespace. False where one was held up by
    /// what is promised to others.
    fn grant(&mut self) -> bool {
        let mut index = 0;
        let mut held_up = Vec::new();
        let mut any_kept_out = false;
        while let Some(namespace) = self.turns.get(index).cloned() {
            let Some(tenant) = self.tenants.get_mut(&namespace) else {
                self.turns.remove(index);
                continue;
            };
            let Some(first) = tenant.waiting.front() else {
                self.turns.remove(index);
                continue;
            };
            let room = self.capacity.runs.is_none_or(|runs| self.running < runs)
                && self.memory.saturating_add(first.memory) <= self.capacity.memory;
            if !first.concurrency.allows(tenant.running.saturating_add(1)) {
                index += 1;
            } else if first.is_kept_out(&self.shares) {
                any_kept_out = true;
                index += 1;
            } else if !room {
                if first.overtaken >= OVERTAKEN_MAX {
                    return false;
                }
                held_up.push(namespace);
                index += 1;
            } else {
                let memory = first.memory;
                if let Some(granted) = tenant.waiting.pop_front() {
                    // Whoever stopped waiting finds the permit on leaving.
                    let _ = granted.wake.send(());
                }
                tenant.running += 1;
                let more = !tenant.waiting.is_empty();
                self.running += 1;
                self.memory += memory;
                self.waiting -= 1;
                self.turns.remove(index);
                if more {
                    self.turns.push_back(namespace);
                }
                self.count_overtaken(&held_up);
                if memory > 0 {
                    self.shares.count_overtaken(self.capacity.memory.saturating_sub(self.memory));
                }
            }
        }
        held_up.is_empty() && !any_kept_out
    }

    fn count_overtaken(&mut self, held_up: &[Namespace]) {
        for namespace in held_up {
            let tenant = self.tenants.get_mut(namespace);
            if let Some(first) = tenant.and_then(|tenant| tenant.waiting.front_mut()) {
                first.overtaken += 1;
            }
        }
    }

    /// Takes a waiting call out of its queue; whether it was still there.
    fn leave(&mut self, namespace: &Namespace, id: u64) -> bool {
        let Some(tenant) = self.tenants.get_mut(namespace) else { return false };
        let Some(position) = tenant.waiting.iter().position(|waiter| waiter.id == id) else {
            return false;
        };
        tenant.waiting.remove(position);
        if tenant.waiting.is_empty() {
            self.turns.retain(|turn| turn != namespace);
        }
        self.waiting -= 1;
        self.forget_idle(namespace);
        true
    }

    /// Gives a run's place back, and its memory unless something of it is left.
    fn release(&mut self, namespace: &Namespace, memory: u64) {
        self.running -= 1;
        self.memory -= memory;
        if let Some(tenant) = self.tenants.get_mut(namespace) {
            tenant.running -= 1;
        }
        self.forget_idle(namespace);
    }

    fn forget_idle(&mut self, namespace: &Namespace) {
        let idle = self.tenants.get(namespace).is_some_and(|tenant| {
            tenant.running == 0 && tenant.waiting.is_empty() && tenant.bucket.is_none()
        });
        if idle {
            self.tenants.remove(namespace);
        }
    }
}

impl Tenant {
    /// Nothing runs or waits, and a fresh bucket would be as full.
    fn is_forgettable(&mut self, now: Instant) -> bool {
        let rested = self.bucket.as_mut().is_none_or(|bucket| bucket.is_full(now));
        self.running == 0 && self.waiting.is_empty() && rested
    }
}

/// A place in a queue, and after that among those that run. Dropping it gives
/// it back.
#[derive(Debug)]
struct Place {
    admission: Admission,
    namespace: Namespace,
    id: u64,
    memory: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.admission.give_back(|state| {
            if !state.leave(&self.namespace, self.id) {
                state.release(&self.namespace, self.memory);
            }
        });
    }
}

/// Leave to run; held until the run is gone.
#[derive(Debug)]
pub struct Permit(Place);

impl Permit {
    /// Gives the place back but keeps its memory counted for as long as the
    /// answer is held: something of the run is left that can't be removed yet.
    #[must_use = "dropping it gives the memory back"]
    pub fn quarantine(mut self) -> Share {
        let memory = std::mem::take(&mut self.0.memory);
        warn!(namespace = %self.0.namespace, memory, "a run can't be removed yet; its memory stays counted");
        Share { admission: self.0.admission.clone(), memory }
    }
}
