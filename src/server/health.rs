//! Health checks and reflection: what tools ask before they call.

use tonic_health::{
    ServingStatus,
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};
use tonic_reflection::{
    pb::{v1 as v1_pb, v1alpha as v1alpha_pb},
    server::{Builder, Error, v1, v1alpha},
};

use super::{
    listen::{Incoming, Listener},
    transport,
};
use crate::wire;

/// What is served, by name.
const SERVICES: [&str; 4] = [
    "collector.CollectiveDispatcher",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

/// Answers that turn while draining: the service as a whole, and whether to
/// send it calls.
const TURNING: [&str; 3] = ["", "readiness", "collector.CollectiveDispatcher"];

/// Says only that the process is alive.
const LIVENESS: &str = "liveness";

/// Bytes of a health or reflection request.
const REQUEST_MAX: usize = 64 << 10;

/// Connections to the listener that is for health checks only.
const CONNECTIONS_MAX: usize = 64;

/// The service's health.
#[derive(Clone, Debug)]
pub(super) struct Health {
    reporter: HealthReporter,
}

impl Health {
    /// In good health.
    pub(super) async fn new() -> Self {
        let health = Self { reporter: HealthReporter::new() };
        health.turn(ServingStatus::Serving).await;
        health.reporter.set_service_status(LIVENESS, ServingStatus::Serving).await;
        health
    }

    /// No more calls are wanted; the process is alive all the same.
    pub(super) async fn draining(&self) {
        self.turn(ServingStatus::NotServing).await;
    }

    async fn turn(&self, status: ServingStatus) {
        for name in TURNING {
            self.reporter.set_service_status(name, status).await;
        }
    }

    /// The service that answers checks.
    pub(super) fn service(&self) -> HealthServer<HealthService> {
        HealthServer::new(HealthService::from_health_reporter(self.reporter.clone()))
            .max_decoding_message_size(REQUEST_MAX)
    }

    /// Serves health checks alone on a listener, until dropped.
    pub(super) async fn serve(
        &self,
        listener: Option<Listener>,
    ) -> Result<(), tonic::transport::Error> {
        let Some(listener) = listener else { return std::future::pending().await };
        let incoming = Incoming::new(vec![listener], CONNECTIONS_MAX);
        transport().add_service(self.service()).serve_with_incoming(incoming).await
    }
}

/// Both versions of reflection: older tools know only the alpha.
pub(super) fn reflection() -> Result<
    (
        v1::ServerReflectionServer<impl v1::ServerReflection>,
        v1alpha::ServerReflectionServer<impl v1alpha::ServerReflection>,
    ),
    Error,
> {
    let builder = || {
        let sets = [
            wire::DESCRIPTORS,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            v1_pb::FILE_DESCRIPTOR_SET,
            v1alpha_pb::FILE_DESCRIPTOR_SET,
        ];
        let described = sets
            .into_iter()
            .fold(Builder::configure(), Builder::register_encoded_file_descriptor_set);
        // By name: not all that is described is served yet.
        SERVICES.into_iter().fold(described, Builder::with_service_name)
    };
    let v1 = builder().build_v1()?.max_decoding_message_size(REQUEST_MAX);
    let v1alpha = builder().build_v1alpha()?.max_decoding_message_size(REQUEST_MAX);
    Ok((v1, v1alpha))
}
