//! Tells proxies and dashboards, which don't read messages, how a call went:
//! HTTP/2 trailers on every reply of ours, gRPC errors included.

use http::{HeaderMap, HeaderValue};
use http_body_util::BodyExt as _;
use tonic::{Status, body::Body};

use super::{Answer, Inner, Pass, REASON, Request, Response, is_ours};
use crate::server::convert::{self, reply::Trailers};

/// Adds the [`Trailers`] that a handler put into its response's extensions to
/// the trailers of that response.
#[derive(Clone, Copy, Debug)]
pub struct AddTrailers;

impl Pass for AddTrailers {
    fn pass(&self, request: Request, inner: &mut impl Inner) -> Answer {
        let ours = is_ours(&request);
        let answer = inner.call(request);
        Box::pin(async move {
            let mut response = answer.await?;
            Ok(match response.extensions_mut().remove::<Trailers>() {
                Some(trailers) => with(response, headers(&trailers)),
                None if ours => refused(response),
                None => response,
            })
        })
    }
}

/// Adds to the trailers that the response ends with.
fn with(response: Response, mut added: HeaderMap) -> Response {
    response.map(|body| {
        Body::new(body.map_frame(move |mut frame| {
            if let Some(trailers) = frame.trailers_mut() {
                trailers.extend(std::mem::take(&mut added));
            }
            frame
        }))
    })
}

/// A gRPC error has no body: its headers are its trailers. Whoever raised it
/// may have said why.
fn refused(mut response: Response) -> Response {
    let headers = response.headers_mut();
    let Some(status) = headers.get(Status::GRPC_STATUS) else { return response };
    let code = convert::code_of(tonic::Code::from_bytes(status.as_bytes())).as_str_name();
    for (name, value) in [
        ("dispatcher-code", code),
        ("dispatcher-verdict", "REFUSED"),
        (REASON, "rpc_error"),
        ("dispatcher-run-id", ""),
    ] {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

fn headers(trailers: &Trailers) -> HeaderMap {
    let mut map = HeaderMap::new();
    map.insert("dispatcher-code", HeaderValue::from_static(trailers.code));
    map.insert("dispatcher-verdict", HeaderValue::from_static(trailers.verdict));
    map.insert(REASON, HeaderValue::from_static(trailers.reason));
    // A run id is hexadecimal digits.
    if let Ok(run_id) = HeaderValue::from_str(&trailers.run_id) {
        map.insert("dispatcher-run-id", run_id);
    }
    if let Some(milliseconds) = trailers.retry_pushback_ms {
        map.insert("grpc-retry-pushback-ms", milliseconds.into());
    }
    map
}
