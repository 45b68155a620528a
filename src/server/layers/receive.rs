//! Takes a request's message in whole before anything decodes it.
//!
//! The decoder sets memory aside for as much as a message's prefix announces,
//! and waits for it as long as it takes. Here bytes are counted against one
//! budget over all connections as they really arrive, what is too large is
//! refused by its prefix, and what stops arriving is given up. Nothing waits
//! for room: what does not fit is refused, so calls can't block each other.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status, body::Body};

use super::{
    Answer, Inner, Pass, Request, error,
    fill::Fillers,
    intake::{Intake, PREFIX},
    is_ours, is_serve,
};
use crate::admission::bytes::{ByteBudget, Reservation};

pub use super::intake::Lifted;

/// How long a message may make no progress.
pub const STALL_MAX: Duration = Duration::from_secs(30);

/// Bytes per second that a message must arrive with, after [`STALL_MAX`].
const RATE_MIN: u64 = 16 << 10;

/// Bytes of a Serve message besides executable and input; also of the other
/// methods' messages. They decode to a multiple of their size.
const LIGHT_MAX: u64 = 1 << 20;

/// When to come again after the budget was full.
const RETRY_AFTER_MS: u64 = 1000;

/// When a request's headers came: its deadline counts from here.
#[derive(Clone, Copy, Debug)]
pub struct Arrival(pub Instant);

/// The memory of a received message, for the handler to take.
#[derive(Clone, Debug)]
pub struct Received(Arc<Mutex<Option<Reservation>>>);

impl Received {
    /// Takes the reservation; it is there once.
    #[must_use]
    pub fn take(&self) -> Option<Reservation> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// How large a Serve message may be; asked for each, as policies change.
pub type MessageLimit = Arc<dyn Fn() -> u64 + Send + Sync>;

/// See the module.
#[derive(Clone)]
pub struct Receive {
    budget: ByteBudget,
    limit: MessageLimit,
    fillers: Fillers,
}

impl Receive {
    /// Takes in messages up to `limit`, all of them together up to `budget`.
    #[must_use]
    pub fn new(budget: ByteBudget, limit: MessageLimit) -> Self {
        Self { budget, limit, fillers: Fillers::default() }
    }
}

impl Pass for Receive {
    fn pass(&self, mut request: Request, inner: &mut impl Inner) -> Answer {
        if !is_ours(&request) {
            return Box::pin(inner.call(request));
        }
        // The instance that was polled ready is the one to call.
        let fresh = inner.clone();
        let mut inner = std::mem::replace(inner, fresh);
        request.extensions_mut().insert(Arrival(Instant::now()));
        let Self { budget, limit, fillers } = self.clone();
        Box::pin(async move {
            let serve = is_serve(&request);
            let limit = if serve { limit() } else { LIGHT_MAX };
            let (mut parts, body) = request.into_parts();
            match receive(body, budget.reserve(), limit, serve, &fillers).await {
                Ok((message, lifted, reservation)) => {
                    let reservation = Arc::new(Mutex::new(Some(reservation)));
                    parts.extensions.insert(Received(reservation));
                    if let Some(lifted) = lifted {
                        parts.extensions.insert(lifted);
                    }
                    let body = Body::new(Full::new(message));
                    inner.call(Request::from_parts(parts, body)).await
                }
                Err(status) => Ok(status.into_http()),
            }
        })
    }
}

async fn receive(
    mut body: Body,
    mut reservation: Reservation,
    limit: u64,
    serve: bool,
    fillers: &Fillers,
) -> Result<(Bytes, Option<Lifted>, Reservation), Status> {
    let begun = Instant::now();
    let mut message = Intake::new(serve);
    loop {
        let earned = Duration::from_secs(message.len() / RATE_MIN);
        let give_up = (Instant::now() + STALL_MAX).min(begun + STALL_MAX + earned);
        let frame = match timeout_at(give_up, body.frame()).await {
            Err(_) => return Err(stalled()),
            Ok(None) => break,
            Ok(Some(frame)) => frame?,
        };
        let Ok(data) = frame.into_data() else { continue };
        if !reservation.grow(data.len() as u64) {
            return Err(over_budget());
        }
        message.put(&data).await.map_err(not_kept)?;
        let announced = message.announced().unwrap_or(0);
        if announced.max(message.len().saturating_sub(PREFIX as u64)) > limit {
            return Err(too_large(announced, limit));
        }
        message.look(fillers).await.map_err(not_kept)?;
    }
    if serve && message.light() > LIGHT_MAX {
        return Err(too_heavy());
    }
    let (message, lifted) = message.finish(serve).await.map_err(not_kept)?;
    Ok((message, lifted, reservation))
}

fn over_budget() -> Status {
    let text = "too many request bytes are being received; try again in a moment";
    error(Code::ResourceExhausted, "inflight_bytes", text, Some(RETRY_AFTER_MS))
}

fn too_large(length: u64, limit: u64) -> Status {
    let text = format!("a message of {length} bytes is too large; at most {limit} are taken");
    error(Code::ResourceExhausted, "message_too_large", &text, None)
}

fn too_heavy() -> Status {
    let most = LIGHT_MAX >> 20;
    let text = format!("a request without its binary and input may have {most} MiB");
    error(Code::ResourceExhausted, "message_too_large", &text, None)
}

fn not_kept(error: io::Error) -> Status {
    Status::internal(format!("the executable could not be kept as it came: {error}"))
}

fn stalled() -> Status {
    error(Code::DeadlineExceeded, "stalled", "the request stopped arriving", None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::Digest;
    use http_body_util::StreamBody;
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;

    type Sender = mpsc::Sender<Result<http_body::Frame<Bytes>, Status>>;

    fn body() -> (Sender, Body) {
        let (sender, receiver) = mpsc::channel(8);
        (sender, Body::new(StreamBody::new(ReceiverStream::new(receiver))))
    }

    fn fillers() -> Fillers {
        Fillers::new(1, 10_000, 1000)
    }

    async fn send(sender: &Sender, data: impl Into<Bytes>) {
        sender.send(Ok(http_body::Frame::data(data.into()))).await.unwrap();
    }

    fn message(length: usize) -> Vec<u8> {
        // Field 6, the binary.
        let mut content = vec![0x32];
        prost::encode_length_delimiter(length, &mut content).unwrap();
        content.extend(std::iter::repeat_n(7, length));
        let mut bytes = vec![0];
        bytes.extend(u32::try_from(content.len()).unwrap().to_be_bytes());
        bytes.extend(content);
        bytes
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_comes_through_as_it_was_in_whatever_pieces() {
        let whole = message(20_000);
        for size in [1, 3, 5000, 30_000] {
            let budget = ByteBudget::new(1 << 20);
            let (sender, body) = body();
            let pieces = whole.clone();
            let feed = async move {
                for piece in pieces.chunks(size) {
                    send(&sender, piece.to_vec()).await;
                }
            };
            let fillers = fillers();
            let received = receive(body, budget.reserve(), 1 << 20, false, &fillers);
            let (received, ()) = tokio::join!(received, feed);
            let (received, lifted, reservation) = received.unwrap();
            assert_eq!(budget.used(), whole.len() as u64);
            assert_eq!(received, whole);
            assert!(lifted.is_none(), "no Serve message");
            drop(reservation);
            assert_eq!(budget.used(), 0);
        }
    }

    #[tokio::test]
    async fn a_large_executable_counts_wherever_its_bytes_are() {
        let whole = message(20_000);
        for step in [1000, 30_000] {
            let budget = ByteBudget::new(1 << 20);
            let (sender, body) = body();
            let pieces = whole.clone();
            let feed = async move {
                for piece in pieces.chunks(step) {
                    send(&sender, piece.to_vec()).await;
                }
            };
            let fillers = fillers();
            let received = receive(body, budget.reserve(), 1 << 20, true, &fillers);
            let (received, ()) = tokio::join!(received, feed);
            let (left, lifted, reservation) = received.unwrap();
            assert_eq!(left[..], [0, 0, 0, 0, 0], "there was nothing else");
            let lifted = lifted.unwrap();
            assert_eq!(lifted.binary, vec![7; 20_000]);
            assert_eq!(lifted.sealed.unwrap().digest, Digest::of(&[7; 20_000]));
            assert_eq!(budget.used(), whole.len() as u64);
            drop(reservation);
            assert_eq!(budget.used(), 0);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_large_executable_is_given_up_too() {
        let budget = ByteBudget::new(1 << 20);
        let (sender, stalling) = body();
        let fillers = fillers();
        send(&sender, message(20_000)[..15_000].to_vec()).await;
        let status =
            receive(stalling, budget.reserve(), 1 << 20, true, &fillers).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_eq!(budget.used(), 0);

        // It ends there: the decoder says what is wrong.
        let (sender, ending) = body();
        send(&sender, message(20_000)[..15_000].to_vec()).await;
        drop(sender);
        let received = receive(ending, budget.reserve(), 1 << 20, true, &fillers).await;
        let (left, lifted, _) = received.unwrap();
        assert!(lifted.is_none());
        assert_eq!(left, message(20_000)[..PREFIX + 4]);

        // Over the budget, in the midst of it.
        let budget = ByteBudget::new(10_000);
        let (sender, large) = body();
        send(&sender, message(20_000)[..8_000].to_vec()).await;
        send(&sender, message(20_000)[8_000..].to_vec()).await;
        let status = receive(large, budget.reserve(), 1 << 20, true, &fillers).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(budget.used(), 0);
        assert_eq!(fillers.free(), 1, "and all of them gave their place back");
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_message_is_given_up_and_its_memory_given_back() {
        let budget = ByteBudget::new(1 << 20);
        let (sender, body) = body();
        send(&sender, message(1000)[..500].to_vec()).await;
        let begun = Instant::now();
        let status = receive(body, budget.reserve(), 1 << 20, true, &fillers()).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_eq!(begun.elapsed(), STALL_MAX);
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn dribbling_is_no_progress() {
        let (sender, body) = body();
        let begun = Instant::now();
        tokio::spawn(async move {
            loop {
                send(&sender, vec![0; 1]).await;
                tokio::time::sleep(Duration::from_secs(20)).await;
            }
        });
        let reservation = ByteBudget::new(1 << 20).reserve();
        let status = receive(body, reservation, 1 << 20, true, &fillers()).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_eq!(begun.elapsed(), STALL_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn too_much_is_refused_by_its_prefix_and_by_what_comes() {
        let (sender, first) = body();
        send(&sender, message(1000)[..6].to_vec()).await;
        let reservation = ByteBudget::new(1 << 20).reserve();
        let status = receive(first, reservation, 999, true, &fillers()).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);

        let (sender, second) = body();
        send(&sender, message(10)).await;
        send(&sender, vec![0; 1000]).await;
        let reservation = ByteBudget::new(1 << 20).reserve();
        let status = receive(second, reservation, 999, true, &fillers()).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);

        let (sender, third) = body();
        send(&sender, message(1000)).await;
        let budget = ByteBudget::new(500);
        let status = receive(third, budget.reserve(), 1 << 20, true, &fillers()).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        let metadata = status.metadata();
        assert_eq!(metadata.get("grpc-retry-pushback-ms").unwrap(), "1000");
        assert_eq!(metadata.get("dispatcher-reason").unwrap(), "inflight_bytes");
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_would_decode_to_a_multiple_is_refused() {
        let arguments = crate::wire::ExecutionOptions {
            args: vec![String::new(); 600_000],
            ..Default::default()
        };
        let request = crate::wire::ServeRequest { options: Some(arguments), ..Default::default() };
        let content = prost::Message::encode_to_vec(&request);
        let mut bytes = vec![0];
        bytes.extend(u32::try_from(content.len()).unwrap().to_be_bytes());
        bytes.extend(content);
        let (sender, body) = body();
        send(&sender, bytes).await;
        drop(sender);
        let reservation = ByteBudget::new(1 << 30).reserve();
        let status = receive(body, reservation, 1 << 30, true, &fillers()).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
    }
}
