//! What a request passes through before a handler sees it, and a reply after.
//!
//! All of them act on the dispatcher's own methods only; health and reflection
//! pass untouched.

pub mod gate;
pub mod receive;
mod scan;
pub mod trailers;
pub mod under_way;

use std::{convert::Infallible, future::Future, pin::Pin};

use tonic::{
    Status,
    body::Body,
    metadata::{MetadataMap, MetadataValue},
};

/// What our layers' services return.
type Answer =
    Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send + 'static>>;

/// The trailer that says why.
const REASON: &str = "dispatcher-reason";

/// A gRPC error that says why, and when to come again; [`trailers`] adds the rest.
fn error(code: tonic::Code, reason: &'static str, text: &str, retry_ms: Option<u64>) -> Status {
    let mut metadata = MetadataMap::new();
    metadata.insert(REASON, MetadataValue::from_static(reason));
    if let Some(milliseconds) = retry_ms {
        metadata.insert("grpc-retry-pushback-ms", milliseconds.into());
    }
    Status::with_metadata(code, text, metadata)
}

/// Whether a request is for one of the dispatcher's own methods.
fn is_ours(request: &http::Request<Body>) -> bool {
    request.uri().path().starts_with("/collector.")
}

/// Whether a request is a Serve call, the only one that may be large.
fn is_serve(request: &http::Request<Body>) -> bool {
    request.uri().path() == "/collector.CollectiveDispatcher/Serve"
}
