//! What a request passes through before a handler sees it, and a reply after.
//!
//! All of them act on the dispatcher's own methods only; health and reflection
//! pass untouched.

mod fill;
pub mod gate;
mod intake;
pub mod receive;
mod scan;
pub mod trailers;
pub mod under_way;

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use tonic::{
    Status,
    body::Body,
    metadata::{MetadataMap, MetadataValue},
};
use tower::{Layer, Service};

type Request = http::Request<Body>;
type Response = http::Response<Body>;

/// What our layers' services return.
type Answer = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send + 'static>>;

/// What one of our layers does with each call.
pub trait Pass {
    /// Hands the call on to `inner`, which is ready for one, or answers it itself.
    fn pass(&self, request: Request, inner: &mut impl Inner) -> Answer;
}

/// A service that a layer of ours stands before.
pub trait Inner:
    Service<Request, Response = Response, Error = Infallible, Future: Send + 'static>
    + Clone
    + Send
    + 'static
{
}

impl<S> Inner for S where
    S: Service<Request, Response = Response, Error = Infallible, Future: Send + 'static>
        + Clone
        + Send
        + 'static
{
}

/// A [`Pass`] as a tower layer.
#[derive(Clone, Copy, Debug)]
pub struct Before<P>(pub P);

impl<P: Clone, S> Layer<S> for Before<P> {
    type Service = Passing<P, S>;

    fn layer(&self, inner: S) -> Passing<P, S> {
        Passing { pass: self.0.clone(), inner }
    }
}

/// The service that [`Before`] makes of the one it is put before.
#[derive(Clone, Debug)]
pub struct Passing<P, S> {
    pass: P,
    inner: S,
}

impl<P: Pass, S: Inner> Service<Request> for Passing<P, S> {
    type Response = Response;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request) -> Answer {
        self.pass.pass(request, &mut self.inner)
    }
}

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
fn is_ours(request: &Request) -> bool {
    request.uri().path().starts_with("/collector.")
}

/// Whether a request is a Serve call, the only one that may be large.
fn is_serve(request: &Request) -> bool {
    request.uri().path() == "/collector.CollectiveDispatcher/Serve"
}
