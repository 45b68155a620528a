//! Takes a request's message in whole before anything decodes it.
//!
//! The decoder sets memory aside for as much as a message's prefix announces,
//! and waits for it as long as it takes. Here bytes are counted against one
//! budget over all connections as they really arrive, what is too large is
//! refused by its prefix, and what stops arriving is given up. Nothing waits
//! for room: what does not fit is refused, so calls can't block each other.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status, body::Body};

use super::{
    Answer, Inner, Pass, Request, error,
    hash::Hashing,
    is_ours, is_serve,
    scan::{Found, light_bytes, only_binary},
};
use crate::{
    admission::bytes::{ByteBudget, Reservation},
    names::Digest,
};

/// How long a message may make no progress.
pub const STALL_MAX: Duration = Duration::from_secs(30);

/// Bytes per second that a message must arrive with, after [`STALL_MAX`].
const RATE_MIN: u64 = 16 << 10;

/// Bytes of a Serve message besides executable and input; also of the other
/// methods' messages. They decode to a multiple of their size.
const LIGHT_MAX: u64 = 1 << 20;

/// A gRPC message's flag and length.
const PREFIX: usize = 5;

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
}

impl Receive {
    /// Takes in messages up to `limit`, all of them together up to `budget`.
    #[must_use]
    pub fn new(budget: ByteBudget, limit: MessageLimit) -> Self {
        Self { budget, limit }
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
        let Self { budget, limit } = self.clone();
        Box::pin(async move {
            let serve = is_serve(&request);
            let limit = if serve { limit() } else { LIGHT_MAX };
            let (mut parts, body) = request.into_parts();
            match receive(body, budget.reserve(), limit, serve).await {
                Ok((mut message, hashing, reservation)) => {
                    let reservation = Arc::new(Mutex::new(Some(reservation)));
                    parts.extensions.insert(Received(reservation));
                    if serve && let Some((left, lifted)) = lift(&message, hashing) {
                        message = left;
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
) -> Result<(Bytes, Hashing, Reservation), Status> {
    let begun = Instant::now();
    let mut message = Message::default();
    let mut hashing = Hashing::default();
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
        message.0.extend_from_slice(&data);
        let announced = message.announced().unwrap_or(0);
        if announced.max(message.len().saturating_sub(PREFIX as u64)) > limit {
            return Err(too_large(announced, limit));
        }
        if serve && let Some(content) = message.0.get(PREFIX..) {
            hashing.follow(content);
        }
    }
    let message = message.0.freeze();
    if serve && light_bytes(message.slice(PREFIX.min(message.len())..)) > LIGHT_MAX {
        return Err(too_heavy());
    }
    Ok((message, hashing, reservation))
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

fn stalled() -> Status {
    error(Code::DeadlineExceeded, "stalled", "the request stopped arriving", None)
}

/// A message as it comes. Memory is taken for what has arrived, in one piece: it is
/// not copied again.
#[derive(Debug, Default)]
struct Message(BytesMut);

impl Message {
    /// The length that the prefix announces, once it is there.
    fn announced(&self) -> Option<u64> {
        let (prefix, _) = self.0.split_first_chunk::<PREFIX>()?;
        let [_, a, b, c, d] = *prefix;
        Some(u64::from(u32::from_be_bytes([a, b, c, d])))
    }

    fn len(&self) -> u64 {
        self.0.len() as u64
    }
}

/// What of a request is decoded here already.
#[derive(Clone, Debug)]
pub struct Lifted {
    /// The executable.
    pub binary: Bytes,
    /// Its digest, if it was made as it came.
    pub digest: Option<Digest>,
}

/// Takes the executable out of a Serve message, so that the decoder need not copy
/// it: what is left to decode, and the executable. `None` where the message is not
/// just one, uncompressed, with one executable; the decoder sees to those in whole.
fn lift(message: &Bytes, hashing: Hashing) -> Option<(Bytes, Lifted)> {
    let (prefix, _) = message.split_first_chunk::<PREFIX>()?;
    let content = message.slice(PREFIX..);
    let announced = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
    if prefix[0] != 0 || content.len() != usize::try_from(announced).ok()? {
        return None;
    }
    let Found { field, binary } = only_binary(content.clone())?;
    let rest = content.len() - field.len();
    let mut left = BytesMut::with_capacity(PREFIX + rest);
    left.put_u8(0);
    left.put_u32(u32::try_from(rest).ok()?);
    left.extend_from_slice(&content[..field.start]);
    left.extend_from_slice(&content[field.end..]);
    let digest = hashing.digest_of(&binary);
    Some((left.freeze(), Lifted { binary: content.slice(binary), digest }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::StreamBody;
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;

    type Sender = mpsc::Sender<Result<http_body::Frame<Bytes>, Status>>;

    fn body() -> (Sender, Body) {
        let (sender, receiver) = mpsc::channel(8);
        (sender, Body::new(StreamBody::new(ReceiverStream::new(receiver))))
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
            let (received, ()) = tokio::join!(receive(body, budget.reserve(), 1 << 20, true), feed);
            let (received, _, reservation) = received.unwrap();
            assert_eq!(budget.used(), whole.len() as u64);
            assert_eq!(received, whole);
            drop(reservation);
            assert_eq!(budget.used(), 0);
        }
    }

    /// Whatever is sent, what is decoded of the two parts is what the whole decodes to.
    fn check_lifted(content: Vec<u8>) -> bool {
        use crate::wire::{ServeRequest, serve_request::ServiceDef};
        use prost::Message as _;
        let mut whole = BytesMut::new();
        whole.put_u8(0);
        whole.put_u32(u32::try_from(content.len()).unwrap());
        whole.extend_from_slice(&content);
        let mut hashing = Hashing::default();
        hashing.follow(&content);
        let Some((left, lifted)) = lift(&whole.freeze(), hashing) else { return false };
        let Lifted { binary, digest } = lifted;
        assert!(digest.is_none_or(|digest| digest == Digest::of(&binary)));
        assert_eq!(left[1..PREFIX], u32::try_from(left.len() - PREFIX).unwrap().to_be_bytes());
        let expected = ServeRequest::decode(&content[..]);
        let decoded = ServeRequest::decode(left.slice(PREFIX..)).map(|request| ServeRequest {
            service_def: Some(ServiceDef::ServiceBinary(binary)),
            ..request
        });
        assert_eq!(decoded.ok(), expected.ok());
        true
    }

    #[test]
    fn an_executable_is_lifted_out() {
        use crate::wire::{ServeRequest, serve_request::ServiceDef};
        use prost::Message as _;
        let with = |binary: &'static [u8]| ServeRequest {
            namespace: "n".into(),
            method_name: "m".into(),
            options: Some(crate::wire::ExecutionOptions {
                args: vec!["a".into()],
                ..Default::default()
            }),
            service_def: Some(ServiceDef::ServiceBinary(binary.into())),
            ..ServeRequest::default()
        };
        assert!(check_lifted(with(b"program").encode_to_vec()));
        assert!(check_lifted(with(b"").encode_to_vec()));
        // Two of them: the last one counts, and the decoder knows.
        let twice = [with(b"one").encode_to_vec(), with(b"two").encode_to_vec()].concat();
        assert!(!check_lifted(twice));
        let uri = ServeRequest {
            service_def: Some(ServiceDef::ServiceUri("sha256:0".into())),
            ..ServeRequest::default()
        };
        assert!(!check_lifted(uri.encode_to_vec()));
        assert!(!check_lifted([with(b"one").encode_to_vec(), uri.encode_to_vec()].concat()));
    }

    proptest::proptest! {
        #[test]
        fn whatever_comes_is_decoded_as_a_whole_would_be(
            fields in proptest::collection::vec(
                (0_u8..8, 0_u8..6, proptest::collection::vec(proptest::num::u8::ANY, 0..6)), 0..6),
        ) {
            let mut content = Vec::new();
            for (number, kind, bytes) in fields {
                content.push(number << 3 | kind);
                if kind == 2 {
                    content.push(bytes.len() as u8);
                }
                content.extend(bytes);
            }
            check_lifted(content);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_message_is_given_up_and_its_memory_given_back() {
        let budget = ByteBudget::new(1 << 20);
        let (sender, body) = body();
        send(&sender, message(1000)[..500].to_vec()).await;
        let begun = Instant::now();
        let status = receive(body, budget.reserve(), 1 << 20, true).await.unwrap_err();
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
        let status = receive(body, reservation, 1 << 20, true).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_eq!(begun.elapsed(), STALL_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn too_much_is_refused_by_its_prefix_and_by_what_comes() {
        let (sender, first) = body();
        send(&sender, message(1000)[..6].to_vec()).await;
        let reservation = ByteBudget::new(1 << 20).reserve();
        let status = receive(first, reservation, 999, true).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);

        let (sender, second) = body();
        send(&sender, message(10)).await;
        send(&sender, vec![0; 1000]).await;
        let reservation = ByteBudget::new(1 << 20).reserve();
        let status = receive(second, reservation, 999, true).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);

        let (sender, third) = body();
        send(&sender, message(1000)).await;
        let budget = ByteBudget::new(500);
        let status = receive(third, budget.reserve(), 1 << 20, true).await.unwrap_err();
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
        let status = receive(body, reservation, 1 << 30, true).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
    }
}
