//! gRPC services, kept warm: which process answers a call, and when there is one more or less.
//!
//! | file | what |
//! | --- | --- |
//! | `group` | the instances of one artifact, under one policy, of one namespace |
//! | `members` | what a group has |
//! | `lease` | a call's share of an instance |
//! | `start` | from a launch to an instance that has answered |
//! | `instance` | one process, the connection with it, a call on it |
//! | `methods` | what it tells of its services' methods |
//! | `review` | what ends without a call: idle, superseded, in the way |
//!
//! An instance is the same to all calls that it gets. What a call wants of the process
//! itself (its limits, arguments, environment) is therefore its [`Shape`], and instances
//! of other shapes are others to it.

mod group;
mod instance;
mod lease;
mod members;
mod methods;
mod review;
mod start;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tokio::{
    sync::{Notify, Semaphore},
    time::Instant,
};

use self::{
    group::Group,
    instance::{Exchange, Unreached},
    lease::Lease,
    members::NoLease,
};
use crate::{
    admission::{Admission, AdmissionError},
    execute::{ExecuteError, Executors, Invocation, Outcome, Verdict, stop::StopSignal},
    jail::plan::{Control, Mode, TemplateId},
    names::{Digest, Namespace, RunId},
    policy::{self, store::PolicyStore},
    protocol::grpc::unary::{ServiceStatus, Unary},
    units::{Limit, MilliCpus, Span},
};

/// Groups that are remembered.
const GROUPS_MAX: usize = 4096;
/// Instances of all groups together.
const INSTANCES_MAX: usize = 1024;
/// Instances that one call gives up since nothing of it reached them.
const UNREACHED_MAX: u32 = 1;
/// Idle instances that one call puts out at the most, for want of other than memory.
const EVICTED_MAX: u32 = 8;
/// Bytes of an answer where the policy's limit is "unlimited" or higher.
pub const ANSWER_MAX: u64 = 256 << 20;

/// All services, over all namespaces.
#[derive(Clone, Debug)]
pub struct Instances {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    executors: Executors,
    admission: Admission,
    policies: Arc<PolicyStore>,
    groups: Mutex<HashMap<Key, Arc<Group>>>,
    /// One for each process: those that are only waited for have none.
    places: Arc<Semaphore>,
    /// Something may now end at another time than was thought.
    review: Arc<Notify>,
    /// An instance has become idle, which may make room for another.
    room: Notify,
    /// Somebody does so.
    watched: AtomicBool,
}

/// Whose instances: never anybody else's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The caller's namespace.
    pub namespace: Namespace,
    /// The policy, and its content.
    pub policy: (TemplateId, Digest),
    /// The executable.
    pub artifact: Digest,
}

/// What a call wants of the process that serves it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// How it is run.
    pub mode: Mode,
    /// Tighter than the policy's, if asked for.
    pub memory: Option<u64>,
    /// Tighter than the policy's, if asked for.
    pub cpus: Option<MilliCpus>,
    /// argv, complete.
    pub argv: Vec<String>,
    /// Environment, complete but for where it listens.
    pub environment: Vec<(String, String)>,
}

/// How to start an instance.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Which instances may take its place.
    pub shape: Shape,
    /// Whether that is what calls get that ask for nothing of the process.
    pub plain: bool,
    /// The policies by which it was decided.
    pub policy_set: Digest,
    /// The sealed executable.
    pub executable: Arc<OwnedFd>,
    /// Its size in bytes.
    pub executable_size: u64,
    /// For `#!` programs: the interpreter.
    pub interpreter: Option<String>,
    /// Bytes of memory that it may have.
    pub memory: Limit<u64>,
    /// Share of processor time that it may have.
    pub cpus: Limit<MilliCpus>,
    /// Bytes of its standard error that are kept.
    pub stderr_limit: Limit<u64>,
    /// How long it may wait for memory.
    pub patience: Limit<Duration>,
}

impl Recipe {
    fn invocation(&self, key: &Key, run: RunId) -> Invocation {
        let Shape { mode, memory, cpus, argv, environment } = self.shape.clone();
        Invocation {
            run,
            policy_set: self.policy_set,
            template: key.policy.0.clone(),
            mode,
            namespace: key.namespace.to_string(),
            executable: Arc::clone(&self.executable),
            executable_size: self.executable_size,
            argv,
            interpreter: self.interpreter.clone(),
            environment,
            input: Bytes::new(),
            // The time limit is each call's.
            timeout: Limit::Unlimited,
            deadline: None,
            memory,
            cpus,
            output_limit: Limit::Unlimited,
            stderr_limit: self.stderr_limit,
        }
    }
}

/// One call to a service.
#[derive(Debug)]
pub struct Ask {
    /// Whose instances may serve it.
    pub key: Key,
    /// How to start one.
    pub recipe: Recipe,
    /// The policy's `[instances]`.
    pub rules: policy::Instances,
    /// Whether the policy names the digests that may run: then `min` are kept.
    pub pinned: bool,
    /// The message and what goes with it; when it must be over is set here.
    pub call: Unary,
    /// Wall clock of the call.
    pub timeout: Limit<Duration>,
    /// When it must be over whatever its timeout.
    pub deadline: Option<Instant>,
    /// Heard when nobody waits for it any more.
    pub stop: StopSignal,
    /// Bytes of the answer.
    pub output_limit: Limit<u64>,
}

/// A call that was served, or an instance that could not be had for it.
#[derive(Clone, Debug)]
pub struct Served {
    /// How it went, as far as it is the process's doing or ours.
    pub outcome: Outcome,
    /// The instance.
    pub instance: Option<RunId>,
    /// It was there before the call came.
    pub warm: bool,
    /// What it answered.
    pub answer: Result<Answered, Unanswered>,
}

/// What a service answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    /// Its status.
    pub status: ServiceStatus,
    /// Its message.
    pub message: Bytes,
    /// Full name of the message's type, where the service tells.
    pub output: Option<String>,
}

/// Why a service didn't answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unanswered {
    /// The call's time was over.
    TimedOut,
    /// Nobody waited for it any more.
    Cancelled,
    /// Its answer is larger than it may be.
    TooLarge,
    /// The method takes or gives more than one message; `called`: as its answer showed.
    Streaming {
        /// Whether it was called.
        called: bool,
    },
    /// It answered with what is no answer.
    BadAnswer(String),
    /// It closed the connection, and lives on.
    ConnectionLost(String),
    /// Its process ended; the outcome has how.
    Ended,
    /// Its process ended before it had answered anything.
    EndedAtStart,
    /// It didn't answer within `start_timeout`.
    StartTimeout(Duration),
    /// It answers with what is no gRPC.
    NotGrpc(String),
}

/// Why a call wasn't given to any instance.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NotServed {
    /// The process could not be started.
    #[error(transparent)]
    Execute(#[from] ExecuteError),
    /// It can't have an instance now.
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    /// Instances end as soon as they are started: the next one is a while off.
    #[error(
        "the service ended again and again, at last so: {last}; another is started in {} at the \
         earliest",
        Span(Duration::from_millis(retry_after.as_millis() as u64))
    )]
    CrashLoop {
        /// How the last one ended.
        last: String,
        /// When the next may be started.
        retry_after: Duration,
    },
    /// There is no room for one that nobody waits for.
    #[error("there is no memory for an instance that is only to be kept")]
    NoRoom,
    /// There are as many services as may be remembered.
    #[error("there are too many services; come again later")]
    TooMany {
        /// When to come again.
        retry_after: Duration,
    },
}

/// How many instances there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// With a call.
    pub busy: usize,
    /// Without one.
    pub idle: usize,
    /// Not ready yet.
    pub starting: usize,
}

impl Instances {
    /// None yet.
    #[must_use]
    pub fn new(executors: Executors, admission: Admission, policies: Arc<PolicyStore>) -> Self {
        let shared = Arc::new(Shared {
            executors,
            admission,
            policies,
            groups: Mutex::default(),
            places: Arc::new(Semaphore::new(INSTANCES_MAX)),
            review: Arc::default(),
            room: Notify::new(),
            watched: AtomicBool::new(false),
        });
        Self { shared }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> Count {
        self.shared.count()
    }

    /// As if all instances but so many were taken.
    #[cfg(test)]
    pub(crate) fn leave_places(&self, left: usize) {
        self.shared.places.forget_permits(INSTANCES_MAX - left);
    }

    /// How many calls wait for one.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> usize {
        self.shared.all_groups().iter().map(|group| group.count_waiting()).sum()
    }

    /// Puts an idle instance out where something else could not be started for want of room;
    /// `evicted` counts them. Whether it is worth another try.
    pub async fn make_room_for(&self, error: &ExecuteError, evicted: &mut u32) -> bool {
        review::make_room_for(&self.shared, error, evicted).await
    }

    /// Serves one call: by an instance that is there, or by one that is started for it.
    ///
    /// # Errors
    /// [`NotServed`]
    pub async fn serve(&self, ask: Ask) -> Result<Served, NotServed> {
        let begun = Instant::now();
        let group = self.group(&ask)?;
        let Ask { recipe, mut call, timeout, deadline, mut stop, output_limit, .. } = ask;
        call.limit = output_limit.finite().unwrap_or(ANSWER_MAX).min(ANSWER_MAX);
        let mut unreached = 0;
        loop {
            let lease = match group.acquire(&self.shared, &recipe, deadline, &mut stop).await {
                Ok(lease) => lease,
                Err(NoLease::NotServed(error)) => return Err(error),
                Err(NoLease::Failed(failed)) => return Ok(*failed),
            };
            let warm = lease.instance().ready_at <= begun;
            let setup = begun.elapsed();
            let now = Instant::now();
            let own = timeout.finite().and_then(|timeout| now.checked_add(timeout));
            let end_by = [own, deadline].into_iter().flatten().min();
            call.end_by = end_by;
            let started = SystemTime::now();
            let mark = lease.instance().service.logged();
            let exchange = match lease.instance().exchange(&call, &mut stop).await {
                Ok(exchange) => exchange,
                Err(_) if unreached < UNREACHED_MAX => {
                    unreached += 1;
                    lease.lost();
                    continue;
                }
                Err(Unreached(why)) => {
                    let why = Unanswered::ConnectionLost(why);
                    lease.instance().perhaps_ended(why, end_by, &mut stop).await
                }
            };
            // Where our clock and the service's were apart.
            let timed_out =
                matches!(exchange, Exchange::GaveUp | Exchange::Unanswered(Unanswered::TimedOut));
            let over = timed_out && end_by == own;
            let least = end_by.filter(|_| over).map(|end| end.saturating_duration_since(now));
            let least = least.unwrap_or_default();
            let wall = now.elapsed().max(least);
            let times = Times { started, setup, wall };
            return Ok(told(lease, exchange, times, mark, warm, end_by.is_some()).await);
        }
    }

    fn group(&self, ask: &Ask) -> Result<Arc<Group>, NotServed> {
        let mut groups = self.shared.groups();
        if let Some(group) = groups.get(&ask.key) {
            return Ok(Arc::clone(group));
        }
        if groups.len() >= GROUPS_MAX {
            forget(&mut groups, Instant::now());
        }
        if groups.len() >= GROUPS_MAX {
            return Err(NotServed::TooMany { retry_after: Duration::from_secs(1) });
        }
        let group = Arc::new(Group::new(ask.key.clone(), ask.rules.clone(), ask.pinned));
        groups.insert(ask.key.clone(), Arc::clone(&group));
        if !self.shared.watched.swap(true, Ordering::Relaxed) {
            review::watch(&self.shared);
        }
        Ok(group)
    }
}

/// Forgets groups that have nothing; where that is not enough, also those that only wait until
/// their next start, of the namespace that has most of them: none can fill the table with what
/// crashes.
fn forget(groups: &mut HashMap<Key, Arc<Group>>, now: Instant) {
    let before = groups.len();
    groups.retain(|_, group| !group.is_forgettable(now));
    if groups.len() < before {
        return;
    }
    let mut empty: HashMap<Namespace, usize> = HashMap::new();
    for (key, _) in groups.iter().filter(|(_, group)| group.is_empty()) {
        *empty.entry(key.namespace.clone()).or_default() += 1;
    }
    if let Some((most, _)) = empty.into_iter().max_by_key(|(_, count)| *count) {
        groups.retain(|key, group| key.namespace != most || !group.is_empty());
    }
}

impl Shared {
    fn groups(&self) -> MutexGuard<'_, HashMap<Key, Arc<Group>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self) -> Count {
        let mut count = Count::default();
        for group in self.groups().values() {
            group.count(&mut count);
        }
        count
    }

    fn all_groups(&self) -> Vec<Arc<Group>> {
        self.groups().values().cloned().collect()
    }
}

impl Drop for Shared {
    /// Nobody is left to call them.
    fn drop(&mut self) {
        for group in self.all_groups() {
            group.stop_all();
        }
    }
}

struct Times {
    started: SystemTime,
    setup: Duration,
    wall: Duration,
}

/// Puts how a call went into words, and lets its instance go.
async fn told(
    lease: Lease,
    exchange: Exchange,
    times: Times,
    mark: u64,
    warm: bool,
    timed: bool,
) -> Served {
    let instance = Arc::clone(lease.instance());
    let answer = match exchange {
        Exchange::Answered(answered) => {
            lease.answered();
            Ok(answered)
        }
        Exchange::GaveUp => {
            lease.done();
            Err(Unanswered::TimedOut)
        }
        Exchange::Unanswered(why) => {
            match &why {
                Unanswered::TimedOut => lease.overrun(),
                // It goes on, or not: for us it is over.
                Unanswered::Cancelled
                | Unanswered::TooLarge
                | Unanswered::Streaming { called: true } => lease.cancelled(),
                Unanswered::ConnectionLost(_) if instance.is_lost() => lease.lost(),
                _ => lease.done(),
            }
            Err(why)
        }
        Exchange::Ended(ended) => {
            lease.done();
            let outcome = match &ended.0 {
                // With all that is known of it, and all that is kept of its log.
                Ok(outcome) => shared_out(outcome),
                Err(_) => blank(Verdict::Failed, &times),
            };
            let Times { started, setup, wall } = times;
            let outcome = Outcome { started, setup, wall, ..outcome };
            let answer = Err(Unanswered::Ended);
            return Served { outcome, instance: Some(instance.service.run()), warm, answer };
        }
    };
    let verdict = match &answer {
        Ok(_) | Err(Unanswered::BadAnswer(_) | Unanswered::ConnectionLost(_)) => Verdict::Completed,
        Err(Unanswered::Streaming { called: true }) => Verdict::Completed,
        Err(Unanswered::TimedOut) => Verdict::TimedOut,
        Err(Unanswered::Cancelled) => Verdict::Cancelled,
        Err(Unanswered::TooLarge) => Verdict::OutputExceeded,
        Err(_) => Verdict::Refused,
    };
    let (stderr, stderr_truncated) = instance.service.log_since(mark);
    let (mut enforced, runtime) = instance.in_force().await;
    enforced.extend(timed.then_some(Control::Timeout));
    enforced.push(Control::Output);
    let outcome = Outcome { stderr, stderr_truncated, enforced, runtime, ..blank(verdict, &times) };
    Served { outcome, instance: Some(instance.service.run()), warm, answer }
}

/// How a process ended, to each of the calls that it had: its processor time is none's alone.
fn shared_out(outcome: &Outcome) -> Outcome {
    Outcome { user: Duration::ZERO, system: Duration::ZERO, ..outcome.clone() }
}

/// An outcome of which only the verdict and the times are known.
fn blank(verdict: Verdict, times: &Times) -> Outcome {
    let Times { started, setup, wall } = *times;
    Outcome { setup, wall, ..Outcome::unknown(verdict, started) }
}

impl Served {
    /// How it went, in a few words.
    fn in_short(&self) -> String {
        match &self.answer {
            Ok(_) => "it answered".to_owned(),
            Err(Unanswered::StartTimeout(_)) => "it did not answer in time".to_owned(),
            Err(Unanswered::NotGrpc(what)) => what.clone(),
            Err(_) => match self.outcome.verdict {
                Verdict::Exited => format!("it exited with code {}", self.outcome.exit_code),
                Verdict::Signalled => format!("it was ended by signal {}", self.outcome.signal),
                Verdict::OutOfMemory => "it needed more memory than it may have".to_owned(),
                Verdict::SyscallDenied => "it made a forbidden system call".to_owned(),
                _ => "it was stopped".to_owned(),
            },
        }
    }
}
