//! Tells a connection which calls it has under way: such a one keeps its place,
//! for as long as it takes the answers.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use tonic::{Status, body::Body};

use super::{Answer, Inner, Pass, Request, is_ours};
use crate::{
    admission::bytes::Reservation,
    server::connections::{Caller, UnderWay},
};

/// Counts calls of the dispatcher's own methods, from their headers to the last
/// byte of the answer. Others don't count: a health watch lasts for ever.
#[derive(Clone, Copy, Debug)]
pub struct CountUnderWay;

impl Pass for CountUnderWay {
    fn pass(&self, request: Request, inner: &mut impl Inner) -> Answer {
        let caller = request.extensions().get::<Caller>();
        let under_way = caller.filter(|_| is_ours(&request)).map(Caller::begin);
        let answer = inner.call(request);
        Box::pin(async move {
            let mut response = answer.await?;
            let Some(under_way) = under_way else { return Ok(response) };
            let memory = response.extensions_mut().remove::<AnswerMemory>();
            under_way.answering(0);
            Ok(response.map(|inner| Body::new(Held { inner, under_way, _memory: memory })))
        })
    }
}

/// The memory that an answer takes up, in a response's extensions.
#[derive(Clone, Debug)]
pub struct AnswerMemory(#[allow(dead_code)] Arc<Reservation>);

impl AnswerMemory {
    /// Gives the memory back with the last clone.
    #[must_use]
    pub fn new(reservation: Reservation) -> Self {
        Self(Arc::new(reservation))
    }
}

/// A body that is under way until it is dropped, which is when all of it is sent.
struct Held {
    inner: Body,
    under_way: UnderWay,
    _memory: Option<AnswerMemory>,
}

impl http_body::Body for Held {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(context));
        if let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            self.under_way.answering(data.len());
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.inner.size_hint()
    }
}
