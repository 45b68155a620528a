//! All that strangers talk to: the gRPC service.
//!
//! [`main`] is the process `dispatch-serve`; [`run`] serves on given listeners
//! until it is told to stop, and can be used without the rest.

pub mod connections;
pub mod convert;
mod deadline;
mod health;
pub mod layers;
pub mod listen;
pub mod message;
mod metrics;
mod process;
mod service;
#[cfg(test)]
mod tests;

pub use process::main;

use std::{future::Future, sync::Arc, time::Duration};

use tokio::{
    sync::oneshot,
    time::{Instant, timeout, timeout_at},
};
use tonic::{service::Routes, transport::Server};
use tracing::{info, warn};

use crate::{
    admission::{
        Admission, Capacity,
        budget::{self, BudgetError},
        bytes::ByteBudget,
    },
    config::Config,
    dispatch::Dispatcher,
    execute::{Executors, stop::StopHandle},
    policy::{Policy, store::PolicyStore},
    units::Limit,
    wire::{self, collective_dispatcher_server::CollectiveDispatcherServer},
};
use connections::Connections;
use health::{Described, Health};
use layers::{
    Before,
    gate::Gate,
    receive::{MessageLimit, Receive},
    trailers::AddTrailers,
    under_way::CountUnderWay,
};
use listen::{Incoming, Listener};
use metrics::{Gauges, Metrics};
use service::Handler;

/// Calls at once on one connection; more wait on the client's side.
const STREAMS_MAX: u32 = 256;

/// Bytes that one call, and one connection, may send ahead of our reading.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Bytes of one request's headers.
const HEADERS_MAX: u32 = 16 << 10;

/// How often a silent connection is pinged, and how long it may take to answer.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Bytes of a Serve message besides executable and input.
const MESSAGE_SLACK: u64 = 4 << 20;

/// Bytes of a Serve message that are always taken: a policy's refusal, which
/// says what is too large by how much, is worth more than a transport error.
const MESSAGE_MIN: u64 = 164 << 20;

/// Bytes of a reply: stdout and stderr at the most that is captured of them.
const REPLY_MAX: usize = 600 << 20;

/// How long stopped calls may take to be answered at the end of the drain.
const STOP_WAIT: Duration = Duration::from_secs(10);

/// How long replies may take to be sent once the last call is done.
const GOODBYE_WAIT: Duration = Duration::from_secs(2);

/// How much longer than its drain timeout the server may take to end.
pub const DRAIN_OVERTIME: Duration = STOP_WAIT.saturating_add(GOODBYE_WAIT);

/// Where to serve.
#[derive(Debug, Default)]
pub struct Listeners {
    /// For everything.
    pub service: Vec<Listener>,
    /// For health checks and metrics only.
    pub health: Option<Listener>,
}

/// Why serving ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The memory budget could not be told.
    #[error("the memory budget could not be told")]
    Budget(#[from] BudgetError),
    /// The descriptors for reflection are unusable.
    #[error("reflection could not be set up")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The transport failed.
    #[error("serving failed")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves until `shutdown` completes, then drains: new calls are refused,
/// running ones may finish within the configured time, what is left is stopped
/// and answered.
///
/// # Errors
/// [`ServeError`]; a drain that had to stop calls is none.
pub async fn run(
    listeners: Listeners,
    config: &Config,
    policies: Arc<PolicyStore>,
    executors: Executors,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let capacity = Capacity {
        runs: (config.concurrency > 0).then_some(config.concurrency),
        memory: budget::resolve(config.memory)?,
    };
    info!(?capacity, "serving");
    let admission = Admission::new(capacity);
    let limit = message_limit(Arc::clone(&policies), config.inflight_bytes);
    let dispatcher =
        Arc::new(Dispatcher::new(policies, admission, executors, config.artifact_cache));
    let gate = Gate::default();
    let bytes = ByteBudget::new(config.inflight_bytes);
    let connections =
        Connections::new(usize::try_from(config.max_connections).unwrap_or(usize::MAX));
    let metrics = Metrics::new(Gauges {
        dispatcher: Arc::clone(&dispatcher),
        bytes: bytes.clone(),
        connections: connections.clone(),
        gate: gate.clone(),
    });
    let stop_all = Arc::new(StopHandle::new());
    let handler = Handler::new(
        dispatcher,
        metrics.clone(),
        bytes.clone(),
        config.id.clone(),
        Arc::clone(&stop_all),
    );
    let health = Health::new().await;
    let routes = routes(handler, &health)?;

    let (end, ended) = oneshot::channel::<()>();
    let server = transport()
        // Outermost: a call is under way until all of its answer is sent.
        .layer(Before(CountUnderWay))
        // So far out that every reply of ours gets its trailers.
        .layer(Before(AddTrailers))
        // Before anything is received: a draining service takes no bytes in.
        .layer(Before(gate.clone()))
        // Before anything is decoded: decoding takes as much memory as it is told.
        .layer(Before(Receive::new(bytes, limit)))
        .add_routes(routes)
        .serve_with_incoming_shutdown(Incoming::new(listeners.service, &connections), async {
            let _ = ended.await;
        });
    let mut server = std::pin::pin!(server);
    let health_server = health.serve(listeners.health, metrics);
    let mut health_server = std::pin::pin!(health_server);

    let mut drained = std::pin::pin!(async {
        shutdown.await;
        drain(&gate, &health, &stop_all, config.drain_timeout).await;
    });
    tokio::select! {
        served = &mut server => return Ok(served?),
        served = &mut health_server => return served,
        () = &mut drained => {}
    }
    let _ = end.send(());
    if timeout(GOODBYE_WAIT, server).await.is_err() {
        info!("connections that were still open are closed");
    }
    Ok(())
}

/// What HTTP/2 itself is held to.
fn transport() -> Server {
    Server::builder()
        // A client that vanished gives its connection back.
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .max_concurrent_streams(STREAMS_MAX)
        // Large binaries come in at full speed, and no faster than they are read.
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_max_header_list_size(HEADERS_MAX)
}

/// No compression anywhere: a small message that becomes a large one is an attack.
fn routes(handler: Handler, health: &Health) -> Result<Routes, tonic_reflection::server::Error> {
    let dispatcher = CollectiveDispatcherServer::new(handler)
        // The receiving layer has bounded it already, by the policies in force.
        .max_decoding_message_size(usize::MAX)
        .max_encoding_message_size(REPLY_MAX);
    let routes = Routes::new(dispatcher).add_service(health.service());
    let described =
        Described { files: &[wire::DESCRIPTORS], services: &["collector.CollectiveDispatcher"] };
    let routes = health::add_reflection(routes, described)?;
    Ok(Routes::from(routes.into_axum_router().fallback(no_such_service)))
}

async fn no_such_service() -> http::Response<axum::body::Body> {
    let text = "no such service here; reflection lists those that there are (grpcurl ADDRESS list)";
    tonic::Status::unimplemented(text).into_http()
}

async fn drain(gate: &Gate, health: &Health, stop_all: &StopHandle, within: Duration) {
    info!(running = gate.inside(), within = ?within, "draining");
    health.draining().await;
    gate.close();
    if timeout(within, gate.empty()).await.is_ok() {
        return;
    }
    warn!(running = gate.inside(), "the drain's time is over: calls are stopped");
    stop_all.stop();
    if timeout_at(Instant::now() + STOP_WAIT, gate.empty()).await.is_err() {
        warn!(running = gate.inside(), "calls could not be stopped in time");
    }
}

/// The largest message that any policy in force could want, within what may be
/// in flight at all. Policies change rarely: the answer is kept for each set.
fn message_limit(policies: Arc<PolicyStore>, inflight: u64) -> MessageLimit {
    let kept = std::sync::Mutex::new(None);
    Arc::new(move || {
        let policies = policies.current();
        let mut kept = kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match *kept {
            Some((digest, limit)) if digest == policies.digest => limit,
            _ => {
                let families = policies.policies.values();
                let all = families.flat_map(|family| {
                    std::iter::once(&family.base)
                        .chain(family.overrides.iter().map(|(_, policy)| policy))
                });
                let largest = all.map(wanted).max().unwrap_or(0).max(MESSAGE_MIN);
                let limit = largest.min(inflight);
                *kept = Some((policies.digest, limit));
                limit
            }
        }
    })
}

fn wanted(policy: &Policy) -> u64 {
    let bytes = |limit: Limit<u64>| limit.finite().unwrap_or(u64::MAX);
    bytes(policy.limits.artifact_size)
        .saturating_add(bytes(policy.limits.input))
        .saturating_add(MESSAGE_SLACK)
}
