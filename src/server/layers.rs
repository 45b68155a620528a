//! What a request passes through before a handler sees it, and a reply after.
//!
//! All of them act on the dispatcher's own methods only; health and reflection
//! pass untouched.

pub mod gate;
pub mod receive;
mod scan;
pub mod trailers;

use std::{convert::Infallible, future::Future, pin::Pin};

use tonic::body::Body;

/// What our layers' services return.
type Answer =
    Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send + 'static>>;

/// Whether a request is for one of the dispatcher's own methods.
fn is_ours(request: &http::Request<Body>) -> bool {
    request.uri().path().starts_with("/collector.")
}

/// Whether a request is a Serve call, the only one that may be large.
fn is_serve(request: &http::Request<Body>) -> bool {
    request.uri().path() == "/collector.CollectiveDispatcher/Serve"
}
