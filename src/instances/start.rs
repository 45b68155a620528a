//! Starting an instance: memory, a process, and the first that answers.

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, sleep, timeout},
};
use tracing::{info, warn};

use super::{
    NotServed, Recipe, Served, Shared, Times, Unanswered, blank,
    group::Group,
    instance::{Instance, NoConnection, open},
    members::{NoLease, Starting},
    review, shared_out,
};
use crate::{
    admission::{AdmissionError, Share},
    execute::{
        ExecuteError, Outcome, Verdict,
        service::{Ended, Service},
        stop::until,
    },
    jail::message::ServiceSocket,
    names::RunId,
    protocol::grpc::connection::{Connection, OpenError},
};

/// How often a service is looked for that hasn't begun to listen: nothing tells of it.
/// At first, and at the most; twice as long each time.
const LOOK_MIN: Duration = Duration::from_millis(1);
const LOOK_MAX: Duration = Duration::from_millis(20);

/// How long an instance that was stopped may take to be gone.
const STOP_WAIT: Duration = Duration::from_secs(5);

/// When to come again where there is no room for another.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What one is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// A call waits for it.
    Called,
    /// It is to be kept, and nobody waits: nothing makes room for it.
    Kept,
}

/// Starts one, for whoever waits by the time that it is ready.
pub(super) fn begin(
    shared: &Arc<Shared>,
    group: &Arc<Group>,
    recipe: Recipe,
    why: Start,
    starting: Arc<Starting>,
) {
    let (shared, group) = (Arc::clone(shared), Arc::clone(group));
    tokio::spawn(async move {
        let mut evicted = 0;
        let started = loop {
            match start(&shared, &group, &recipe, why, &starting).await {
                Err(NoLease::NotServed(NotServed::Execute(error)))
                    if why == Start::Called
                        && review::make_room_for(&shared, &error, &mut evicted).await => {}
                started => break started,
            }
        };
        match started {
            Ok(instance) => {
                let instance = Arc::new(instance);
                if !group.started(&instance, &starting) {
                    instance.service.stop();
                    let _ = timeout(STOP_WAIT, instance.service.ended()).await;
                    return group.not_started(NotServed::NoRoom.into(), &starting, why);
                }
                // Once the group has it: it may have ended already, and would stay there.
                follow(&shared, &group, &instance);
                let looked_at = Arc::clone(&instance);
                tokio::spawn(async move { looked_at.in_force().await });
                shared.review.notify_one();
                shared.room.notify_waiters();
            }
            Err(what) => {
                info!(
                    namespace = %group.key.namespace, artifact = %group.key.artifact,
                    why = %what.in_short(), "no instance could be started"
                );
                group.not_started(what, &starting, why);
            }
        }
    });
}

/// Tells the group of the instance's end.
fn follow(shared: &Arc<Shared>, group: &Arc<Group>, instance: &Arc<Instance>) {
    let (group, instance) = (Arc::clone(group), Arc::clone(instance));
    let review = Arc::clone(&shared.review);
    tokio::spawn(async move {
        let ended = instance.service.ended().await;
        let lived = instance.ready_at.elapsed();
        info!(
            instance = %instance.service.run(), namespace = %group.key.namespace, ?lived,
            how = %in_words(&ended), "an instance ended"
        );
        group.ended(&instance, || failed(&instance.service, &ended, Unanswered::Ended));
        review.notify_one();
    });
}

async fn start(
    shared: &Arc<Shared>,
    group: &Arc<Group>,
    recipe: &Recipe,
    why: Start,
    starting: &Starting,
) -> Result<Instance, NoLease> {
    let granted = grant(shared, recipe, why, starting).await?;
    if why == Start::Called && !group.is_waited_for(starting) {
        return Err(NotServed::NoRoom.into());
    }
    let (begun, started) = (Instant::now(), SystemTime::now());
    let run = RunId::random().map_err(|error| {
        let error = error.to_string();
        NotServed::from(ExecuteError::Internal { what: "making an id", error })
    })?;
    let executor = shared.executors.of(recipe.shape.mode);
    let invocation = recipe.invocation(&group.key, run);
    let service =
        executor.start_service(invocation, Box::new(granted)).await.map_err(NotServed::from)?;
    let within = group.rules.start_timeout.finite();
    let ready = tokio::select! {
        biased;
        ready = answered(&service) => ready,
        ended = service.ended() => {
            return Err(failed(&service, &ended, Unanswered::EndedAtStart));
        }
        () = starting.abandoned.notified() => {
            service.stop();
            let _ = timeout(STOP_WAIT, service.ended()).await;
            return Err(NotServed::NoRoom.into());
        }
        // Until then it is not the service that is slow.
        () = async {
            service.begun().await;
            until(within.and_then(|within| Instant::now().checked_add(within))).await;
        } => Err(Unanswered::StartTimeout(within.unwrap_or_default())),
    };
    match ready {
        Ok((socket, connection)) => {
            info!(
                instance = %run, namespace = %group.key.namespace, artifact = %group.key.artifact,
                took = ?begun.elapsed(), "an instance is ready"
            );
            Ok(Instance::new(service, socket, connection, recipe.cpus))
        }
        Err(why) => {
            service.stop();
            // What it was granted is another's only when it is gone.
            let gone = timeout(STOP_WAIT, service.ended()).await;
            if gone.is_err() {
                warn!(instance = %run, "an instance that was stopped is not gone yet");
            }
            let times = Times { started, setup: begun.elapsed(), wall: Duration::ZERO };
            Err(unready(&service, times, why))
        }
    }
}

/// What an instance has as long as anything of it is left: given back in this order, so that
/// who hears of the memory finds the place.
struct Granted {
    _place: OwnedSemaphorePermit,
    _share: Share,
}

/// Its place among all instances, and its memory; idle instances make room for it.
async fn grant(
    shared: &Arc<Shared>,
    recipe: &Recipe,
    why: Start,
    starting: &Starting,
) -> Result<Granted, NotServed> {
    let begun = Instant::now();
    let patience = recipe.patience.finite();
    let mut queued = None;
    loop {
        // Made before the look, so that nothing is missed between the two.
        let (released, room) = (shared.admission.released(), shared.room.notified());
        match Arc::clone(&shared.places).try_acquire_owned() {
            Ok(place) => {
                let share = match &queued {
                    None => shared.admission.share(recipe.memory)?,
                    Some(queued) => shared.admission.share_of(queued),
                };
                if let Some(share) = share {
                    return Ok(Granted { _place: place, _share: share });
                }
                if queued.is_none() && why == Start::Called {
                    queued = Some(shared.admission.queue_share(recipe.memory)?);
                }
            }
            // It is not memory that it waits for: nobody is to keep any for it.
            Err(_) => queued = None,
        }
        if why == Start::Kept {
            return Err(NotServed::NoRoom);
        }
        if review::evict(shared).await {
            continue;
        }
        let end = patience.and_then(|patience| begun.checked_add(patience));
        tokio::select! {
            () = released => {}
            () = room => {}
            () = starting.abandoned.notified() => return Err(NotServed::NoRoom),
            () = until(end) => {
                let waited = patience.unwrap_or_default();
                let late = AdmissionError::QueueTimeout { waited, retry_after: RETRY_AFTER };
                return Err(late.into());
            }
        }
    }
}

/// The first of its two sockets that answers.
async fn answered(service: &Service) -> Result<(ServiceSocket, Connection), Unanswered> {
    let (inherited, own) = (ServiceSocket::Inherited, ServiceSocket::Own);
    tokio::select! {
        found = answers(service, inherited) => found.map(|connection| (inherited, connection)),
        found = answers(service, own) => found.map(|connection| (own, connection)),
    }
}

/// Returns when it answers there, or with what is no answer. Never where it closed that
/// socket: it may listen at the other.
async fn answers(service: &Service, socket: ServiceSocket) -> Result<Connection, Unanswered> {
    let mut pause = LOOK_MIN;
    loop {
        let later = match open(service, socket).await {
            Ok(connection) => return Ok(connection),
            Err(NoConnection::Open(error @ OpenError::Foreign(_))) => {
                return Err(Unanswered::NotGrpc(error.to_string()));
            }
            // Closed with what it inherited, or by a server that was just about to begin.
            Err(NoConnection::Open(OpenError::Closed)) => true,
            Err(NoConnection::Socket(error)) => match error.raw_os_error() {
                // What is there is not its own: in direct mode others of its user may have put
                // it there, so that nothing is known of the service.
                Some(libc::EPERM) => true,
                Some(libc::ECONNREFUSED) => socket == ServiceSocket::Own,
                _ => error.kind() != io::ErrorKind::NotConnected,
            },
        };
        if !later {
            return std::future::pending().await;
        }
        sleep(pause).await;
        pause = (pause * 2).min(LOOK_MAX);
    }
}

/// An instance that ended before its time, in the words of a call.
fn failed(service: &Service, ended: &Ended, why: Unanswered) -> NoLease {
    match &ended.0 {
        Err(error) => NotServed::from(error.clone()).into(),
        Ok(outcome) => NoLease::Failed(Box::new(Served {
            outcome: shared_out(outcome),
            instance: Some(service.run()),
            warm: false,
            answer: Err(why),
        })),
    }
}

/// One that was there, and of no use.
fn unready(service: &Service, times: Times, why: Unanswered) -> NoLease {
    let verdict = match why {
        Unanswered::StartTimeout(_) => Verdict::TimedOut,
        _ => Verdict::Refused,
    };
    let (stderr, stderr_truncated) = service.log_since(0);
    NoLease::Failed(Box::new(Served {
        outcome: Outcome { stderr, stderr_truncated, ..blank(verdict, &times) },
        instance: Some(service.run()),
        warm: false,
        answer: Err(why),
    }))
}

fn in_words(ended: &Ended) -> String {
    match &ended.0 {
        Ok(outcome) => match (outcome.exit_code, outcome.signal) {
            (0, 0) => format!("{:?}", outcome.verdict),
            (code, 0) => format!("{:?}, code {code}", outcome.verdict),
            (_, signal) => format!("{:?}, signal {signal}", outcome.verdict),
        },
        Err(error) => error.to_string(),
    }
}
