//! Health checks, metrics and reflection: what tools ask before they call.

use axum::body::Body;
use tonic::service::Routes;
use tonic_health::{
    ServingStatus,
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};
use tonic_reflection::{
    pb::{v1 as v1_pb, v1alpha as v1alpha_pb},
    server::{Builder, Error},
};

use super::{
    ServeError,
    connections::Connections,
    listen::{Incoming, Listener},
    metrics::{self, Metrics},
    transport,
};
/// What is served at all addresses, by name.
const SERVICES: [&str; 3] = [
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

/// Connections to the listener that is for health checks and metrics only.
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

    /// Serves health checks and their reflection by gRPC, and `GET /metrics` by
    /// HTTP/1.1 or 2, and nothing else on a listener, until dropped.
    pub(super) async fn serve(
        &self,
        listener: Option<Listener>,
        metrics: Metrics,
    ) -> Result<(), ServeError> {
        let Some(listener) = listener else { return std::future::pending().await };
        let incoming = Incoming::new(vec![listener], &Connections::new(CONNECTIONS_MAX));
        let page = axum::routing::get(move || std::future::ready(page(&metrics)));
        let checks = add_reflection(Routes::new(self.service()), Described::default())?;
        let router = checks.into_axum_router();
        let routes = Routes::from(router.route("/metrics", page).fallback(not_here));
        // Prometheus doesn't speak HTTP/2 without TLS.
        Ok(transport().accept_http1(true).add_routes(routes).serve_with_incoming(incoming).await?)
    }
}

fn page(metrics: &Metrics) -> http::Response<Body> {
    let (status, text) = match metrics.render() {
        Ok(text) => (http::StatusCode::OK, text),
        Err(error) => (http::StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    };
    let mut response = http::Response::new(Body::from(text));
    *response.status_mut() = status;
    let kind = http::HeaderValue::from_static(metrics::CONTENT_TYPE);
    response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    response
}

/// In the words of whoever asks: gRPC has its errors in a reply that is well.
async fn not_here(request: http::Request<Body>) -> http::Response<Body> {
    let kind = request.headers().get(http::header::CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        let text = "only grpc.health.v1.Health and its reflection are served at this address";
        return tonic::Status::unimplemented(text).into_http();
    }
    let mut response =
        http::Response::new(Body::from("here are /metrics and gRPC health checks\n"));
    *response.status_mut() = http::StatusCode::NOT_FOUND;
    response
}

/// What is described and served at one address besides health and reflection itself.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Described {
    /// File descriptor sets.
    pub(super) files: &'static [&'static [u8]],
    /// Services by name: not all that is described is served yet.
    pub(super) services: &'static [&'static str],
}

/// Adds both versions of reflection: older tools know only the alpha.
pub(super) fn add_reflection(routes: Routes, described: Described) -> Result<Routes, Error> {
    let builder = || {
        let sets = [
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            v1_pb::FILE_DESCRIPTOR_SET,
            v1alpha_pb::FILE_DESCRIPTOR_SET,
        ];
        let sets = sets.iter().chain(described.files);
        let builder = sets
            .fold(Builder::configure(), |all, set| all.register_encoded_file_descriptor_set(set));
        let services = SERVICES.iter().chain(described.services);
        services.fold(builder, |all, name| all.with_service_name(*name))
    };
    let v1 = builder().build_v1()?.max_decoding_message_size(REQUEST_MAX);
    let v1alpha = builder().build_v1alpha()?.max_decoding_message_size(REQUEST_MAX);
    Ok(routes.add_service(v1).add_service(v1alpha))
}
