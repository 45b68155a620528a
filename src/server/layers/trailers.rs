//! Tells proxies and dashboards, which don't read messages, how a call went:
//! HTTP/2 trailers on every reply of ours.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use super::Answer;
use crate::server::convert::reply::Trailers;

/// Adds the [`Trailers`] that a handler put into its response's extensions to
/// the trailers of that response.
#[derive(Clone, Copy, Debug, Default)]
pub struct TrailersLayer;

impl<S> Layer<S> for TrailersLayer {
    type Service = AddTrailers<S>;

    fn layer(&self, inner: S) -> AddTrailers<S> {
        AddTrailers { inner }
    }
}

/// See [`TrailersLayer`].
#[derive(Clone, Debug)]
pub struct AddTrailers<S> {
    inner: S,
}

impl<S> Service<http::Request<Body>> for AddTrailers<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Answer {
        let answer = self.inner.call(request);
        Box::pin(async move {
            let mut response = answer.await?;
            Ok(match response.extensions_mut().remove::<Trailers>() {
                Some(trailers) => {
                    let added = headers(&trailers);
                    response.map(|inner| Body::new(WithTrailers { inner, added }))
                }
                None => response,
            })
        })
    }
}

fn headers(trailers: &Trailers) -> HeaderMap {
    let mut map = HeaderMap::new();
    map.insert("dispatcher-code", HeaderValue::from_static(trailers.code));
    map.insert("dispatcher-verdict", HeaderValue::from_static(trailers.verdict));
    map.insert("dispatcher-reason", HeaderValue::from_static(trailers.reason));
    // A run id is hexadecimal digits.
    if let Ok(run_id) = HeaderValue::from_str(&trailers.run_id) {
        map.insert("dispatcher-run-id", run_id);
    }
    if let Some(milliseconds) = trailers.retry_pushback_ms {
        map.insert("grpc-retry-pushback-ms", milliseconds.into());
    }
    map
}

struct WithTrailers {
    inner: Body,
    added: HeaderMap,
}

impl http_body::Body for WithTrailers {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(context));
        Poll::Ready(frame.map(|frame| {
            frame.map(|mut frame| {
                if let Some(trailers) = frame.trailers_mut() {
                    trailers.extend(std::mem::take(&mut self.added));
                }
                frame
            })
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }
}
