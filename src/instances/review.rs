//! What ends instances without a call: time, other policies, and others' need of memory.

use std::{cmp::Reverse, collections::HashMap, pin::Pin, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{EVICTED_MAX, Shared, group::Group, instance::Instance, members::Starting};
use crate::{
    execute::{ExecuteError, service::Service},
    names::Namespace,
    policy::PolicySet,
};

/// How long an instance is idle before it may use no more processor time.
pub(super) const FREEZE_AFTER: Duration = Duration::from_secs(2);

/// When it is tried again to start one that is to be kept and can't be.
pub(super) const LACKING_AGAIN: Duration = Duration::from_secs(5);

/// How long one that was stopped may take until its memory is free.
const GONE_WAIT: Duration = Duration::from_secs(5);

/// How long a service may go on with calls that were given up.
const GRACE: Duration = Duration::from_secs(1);
/// How its processor time is looked at meanwhile, and the share that is not the work of a
/// call: of one processor, or of what it may have where that is less.
const WINDOW: Duration = Duration::from_millis(100);
const QUIET: f64 = 0.25;

/// How long the watch waits at most: then it looks whether it is still needed.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Looks after all instances for as long as there is anybody who has them.
pub(super) fn watch(shared: &Arc<Shared>) {
    let weak = Arc::downgrade(shared);
    let (admission, executors) = (shared.admission.clone(), shared.executors.clone());
    let news = Arc::clone(&shared.review);
    tokio::spawn(async move {
        let mut makes_way: Option<Pin<Box<dyn Future<Output = bool> + Send>>> = None;
        loop {
            let Some(shared) = weak.upgrade() else { return };
            let next = review(&shared, Instant::now());
            // Whatever the news: what was in use when the call began to wait may be idle now.
            if makes_way.is_none() && admission.lacks_memory() {
                makes_way = put_out(&shared).map(|leaving| Box::pin(leaving.gone()) as _);
            }
            drop(shared);
            let latest = Instant::now() + LOOK_AGAIN;
            tokio::select! {
                () = admission.pressure() => {}
                () = news.notified() => {}
                () = executors.renewed() => {}
                () = sleep_until(next.map_or(latest, |next| next.min(latest))) => {}
                // One after the other, and none but this waits for it.
                _ = async {
                    match &mut makes_way {
                        Some(gone) => gone.await,
                        None => std::future::pending().await,
                    }
                } => makes_way = None,
            }
        }
    });
}

fn review(shared: &Arc<Shared>, now: Instant) -> Option<Instant> {
    let policies = shared.policies.current();
    let groups = shared.all_groups();
    let next = groups
        .iter()
        .filter_map(|group| group.review(shared, now, is_in_force(&policies, group)))
        .min();
    drop(groups);
    shared.groups().retain(|_, group| !group.is_forgettable(now));
    next
}

/// Whether calls of its namespace may be decided by its policy now.
fn is_in_force(policies: &PolicySet, group: &Group) -> bool {
    let (id, digest) = &group.key.policy;
    policies.all_of(&group.key.namespace).any(|policy| (&policy.id, &policy.digest) == (id, digest))
}

/// What makes way for others.
enum Leaving {
    Start(Arc<Starting>),
    Instance(Arc<Instance>),
}

impl Leaving {
    /// Returns when it is gone, or false when it takes too long.
    async fn gone(self) -> bool {
        match self {
            Self::Start(starting) => timeout(GONE_WAIT, starting.over()).await.is_ok(),
            Self::Instance(instance) => timeout(GONE_WAIT, instance.service.ended()).await.is_ok(),
        }
    }
}

/// Ends an instance that is being started for nobody, or else the longest idle one of the
/// namespace that has most. `None` where there is none.
fn put_out(shared: &Arc<Shared>) -> Option<Leaving> {
    let groups = shared.all_groups();
    // What nobody waits for any more goes first, ready or not.
    if let Some(starting) = groups.iter().find_map(|group| group.abandon_one()) {
        return Some(Leaving::Start(starting));
    }
    let mut of_namespaces: HashMap<&Namespace, usize> = HashMap::new();
    for group in &groups {
        *of_namespaces.entry(&group.key.namespace).or_default() += group.size();
    }
    let longest = groups
        .iter()
        .filter_map(|group| {
            let (kept, since) = group.idle_since()?;
            let most = Reverse(of_namespaces.get(&group.key.namespace));
            // Those that are to be kept come last. Who has many doesn't put out who has few.
            Some(((kept, most, since), group))
        })
        .min_by_key(|(order, _)| *order);
    longest.and_then(|(_, group)| group.evict()).map(Leaving::Instance)
}

/// The same, and waits until it is gone. False where there is none.
pub(super) async fn evict(shared: &Arc<Shared>) -> bool {
    match put_out(shared) {
        Some(leaving) => leaving.gone().await,
        None => false,
    }
}

/// Puts an idle instance out where something could not be started for want of room;
/// `evicted` counts them, up to [`EVICTED_MAX`]. Whether it is worth another try.
pub(super) async fn make_room_for(
    shared: &Arc<Shared>,
    error: &ExecuteError,
    evicted: &mut u32,
) -> bool {
    if !error.is_for_want_of_room() || *evicted >= EVICTED_MAX {
        return false;
    }
    *evicted += 1;
    evict(shared).await
}

/// Looks whether an instance without calls goes on with those that were given up.
pub(super) fn examine(shared: &Arc<Shared>, group: &Arc<Group>, instance: &Arc<Instance>) {
    let (shared, group, instance) = (Arc::clone(shared), Arc::clone(group), Arc::clone(instance));
    tokio::spawn(async move {
        let answers = timeout(GRACE, instance.connect());
        let quiet = is_quiet(&instance.service, QUIET * instance.cpus);
        let (answers, quiet) = tokio::join!(answers, quiet);
        let fine = match answers {
            // What was given up may still stand before others on the old one.
            Ok(Ok(connection)) if quiet => {
                instance.adopt(connection).await;
                true
            }
            _ => false,
        };
        group.examined(&instance, fine);
        shared.review.notify_one();
        shared.room.notify_waiters();
    });
}

async fn is_quiet(service: &Service, most: f64) -> bool {
    let end = Instant::now() + GRACE;
    let mut before = used(service).await;
    while Instant::now() < end {
        let begun = Instant::now();
        sleep(WINDOW).await;
        let now = used(service).await;
        let (Some(from), Some(to)) = (before, now) else { return false };
        let share = (to.saturating_sub(from)).as_secs_f64() / begun.elapsed().as_secs_f64();
        if share < most {
            return true;
        }
        before = now;
    }
    false
}

async fn used(service: &Service) -> Option<Duration> {
    let sight = timeout(GRACE, service.look()).await.ok()??;
    // Nothing at all is what is seen where nothing can be: no program starts for nothing.
    Some(sight.user + sight.system).filter(|used| !used.is_zero())
}
