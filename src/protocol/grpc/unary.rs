//! One unary call, gRPC over HTTP/2: a message out, at most one message and a status in.
//!
//! Messages are bytes to us, passed on as they are. Every part of an answer is checked:
//! whoever answers is somebody's program.

use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::{Reason, RecvStream, client::ResponseFuture};
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use tokio::time::Instant;

use super::connection::Connection;

/// Before each message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// Messages up to this size go with their prefix in one piece.
const ONE_PIECE: usize = 16 << 10;

/// How long an answer may go on after its message: then it is a stream.
const END_WAIT: Duration = Duration::from_secs(5);

/// Trailers of an answer that are passed on, and bytes of them together.
const TRAILERS_MAX: usize = 64;
const TRAILER_BYTES_MAX: usize = 8 << 10;

/// Bytes of a status message that are passed on.
const MESSAGE_MAX: usize = 8 << 10;

const STATUS: &str = "grpc-status";
const MESSAGE: &str = "grpc-message";

/// One call.
#[derive(Debug)]
pub struct Unary {
    /// The service's full name.
    pub service: String,
    /// The method's.
    pub method: String,
    /// The request, serialized.
    pub message: Bytes,
    /// What the caller adds to the headers.
    pub metadata: HeaderMap,
    /// When it must be over: the service is told how long that is from when it is sent.
    pub end_by: Option<Instant>,
    /// Bytes of the answer's message; more is given up.
    pub limit: u64,
}

/// What a service answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: ServiceStatus,
    /// Its message: there is one if the status is OK.
    pub message: Bytes,
}

/// A gRPC status, as its trailers have it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceStatus {
    /// Its code; a number that gRPC doesn't know is UNKNOWN.
    pub code: u8,
    /// Its message, decoded.
    pub message: String,
    /// All other trailers, in their order: binary ones as base64.
    pub trailers: Vec<(String, String)>,
}

/// gRPC's OK and UNKNOWN.
const OK: u8 = 0;
const UNKNOWN: u8 = 2;
/// The highest code that gRPC knows, UNAUTHENTICATED.
const CODE_MAX: u8 = 16;

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallFailure {
    /// Its message is larger than the limit.
    #[error("its answer has {0} bytes")]
    TooLarge(u64),
    /// It answered with more than one message.
    #[error("it answered with a stream of messages")]
    Streaming,
    /// It ended this call, and only this one, without an answer.
    #[error("it reset the call: {0}")]
    Reset(String),
    /// It answered with what is no gRPC.
    #[error("its answer isn't gRPC: {0}")]
    Malformed(String),
    /// The connection is gone; `sent`: the service may have begun with the call.
    #[error("the connection was lost: {why}")]
    Lost {
        /// How.
        why: String,
        /// Whether the request was sent.
        sent: bool,
    },
}

impl Connection {
    /// Makes a call. Dropping the future cancels it: the service is told by RST_STREAM.
    ///
    /// # Errors
    /// [`CallFailure`]
    pub async fn unary(&self, call: &Unary) -> Result<Answer, CallFailure> {
        let head = head(call)?;
        let unsent = |error: h2::Error| CallFailure::Lost { why: error.to_string(), sent: false };
        // This doesn't wait. Where the service takes no more calls at once, h2 keeps the call
        // until it does; one that is lost meanwhile is taken for sent, which is the safe side.
        let mut sender = self.sender.clone().ready().await.map_err(unsent)?;
        let (response, mut body) = sender.send_request(head, false).map_err(unsent)?;
        self.expect(call.message.len() as u64, call.limit);
        // All of it at once: it is in memory, and goes as the service takes it.
        let (prefix, message) = framed(&call.message);
        let sent = match message {
            None => body.send_data(prefix, true),
            Some(message) => {
                body.send_data(prefix, false).and_then(|()| body.send_data(message, true))
            }
        };
        sent.map_err(|error| failure(&error))?;
        read(response, call.limit).await
    }
}

/// A message as it goes out: in one piece, or where it is large its prefix and itself.
fn framed(message: &Bytes) -> (Bytes, Option<Bytes>) {
    let mut first = BytesMut::with_capacity(PREFIX + ONE_PIECE.min(message.len()));
    first.put_u8(0);
    // Inputs are bounded far below this.
    first.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    if message.len() <= ONE_PIECE {
        first.extend_from_slice(message);
        return (first.freeze(), None);
    }
    (first.freeze(), Some(message.clone()))
}

fn head(call: &Unary) -> Result<Request<()>, CallFailure> {
    let path = format!("http://localhost/{}/{}", call.service, call.method);
    let mut request = Request::post(path)
        .body(())
        .map_err(|error| CallFailure::Malformed(format!("no path can be made: {error}")))?;
    let headers = request.headers_mut();
    headers.clone_from(&call.metadata);
    headers.insert("te", HeaderValue::from_static("trailers"));
    headers.insert("content-type", HeaderValue::from_static("application/grpc"));
    headers.insert("user-agent", HeaderValue::from_static("dispatcher"));
    let left = call.end_by.map(|end| end.saturating_duration_since(Instant::now()));
    if let Some(left) = left
        && let Ok(timeout) = HeaderValue::try_from(grpc_timeout(left))
    {
        headers.insert("grpc-timeout", timeout);
    }
    Ok(request)
}

/// At most eight digits and a unit, as the header is.
fn grpc_timeout(timeout: Duration) -> String {
    const DIGITS_MAX: u128 = 99_999_999;
    [(timeout.as_micros(), 'u'), (timeout.as_millis(), 'm'), (timeout.as_secs().into(), 'S')]
        .into_iter()
        .find(|(number, _)| *number <= DIGITS_MAX)
        .map_or_else(|| format!("{DIGITS_MAX}S"), |(number, unit)| format!("{number}{unit}"))
}

async fn read(response: ResponseFuture, limit: u64) -> Result<Answer, CallFailure> {
    let malformed = |what: String| Err(CallFailure::Malformed(what));
    let (parts, mut body) = response.await.map_err(|error| failure(&error))?.into_parts();
    if parts.status != StatusCode::OK {
        return malformed(format!("its HTTP status is {}", parts.status.as_u16()));
    }
    let kind = parts.headers.get("content-type").map_or(&b""[..], HeaderValue::as_bytes);
    if !kind.starts_with(b"application/grpc") {
        return malformed(format!("its content-type is {:?}", String::from_utf8_lossy(kind)));
    }
    // Without a message the status may be all there is.
    if parts.headers.contains_key(STATUS) {
        return answer(status(&parts.headers)?, None);
    }
    let mut message = Incomplete::new(limit);
    take(&mut message, &mut body).await?;
    let rest = async {
        take(&mut message, &mut body).await?;
        body.trailers().await.map_err(|error| failure(&error))
    };
    // Whoever has a single message to say is at the end with it.
    let ended = tokio::time::timeout(END_WAIT, rest).await;
    match ended.map_err(|_| CallFailure::Streaming)?? {
        Some(trailers) => answer(status(&trailers)?, message.finish()?),
        None => malformed("it has no trailers".to_owned()),
    }
}

/// Takes what comes until the message is complete or, if it is already, until the end.
async fn take(message: &mut Incomplete, body: &mut RecvStream) -> Result<(), CallFailure> {
    let was_complete = message.is_complete();
    while message.is_complete() == was_complete
        && let Some(data) = body.data().await
    {
        let data = data.map_err(|error| failure(&error))?;
        let length = data.len();
        message.take(data)?;
        // What was taken may be followed by as much.
        body.flow_control().release_capacity(length).map_err(|error| failure(&error))?;
    }
    Ok(())
}

fn answer(status: ServiceStatus, message: Option<Bytes>) -> Result<Answer, CallFailure> {
    match message {
        None if status.code == OK => {
            Err(CallFailure::Malformed("it is OK, and has no message".to_owned()))
        }
        message => Ok(Answer { status, message: message.unwrap_or_default() }),
    }
}

/// A message as it comes in.
struct Incomplete {
    limit: u64,
    bytes: BytesMut,
    /// The message's length, once its prefix is there.
    length: Option<usize>,
}

impl Incomplete {
    fn new(limit: u64) -> Self {
        Self { limit, bytes: BytesMut::new(), length: None }
    }

    fn take(&mut self, data: Bytes) -> Result<(), CallFailure> {
        self.bytes.extend_from_slice(&data);
        if self.length.is_none() && self.bytes.len() >= PREFIX {
            let compressed = self.bytes.get_u8();
            let length = self.bytes.get_u32();
            if compressed != 0 {
                let what = "its message is compressed, which nobody asked for";
                return Err(CallFailure::Malformed(what.to_owned()));
            }
            if u64::from(length) > self.limit {
                return Err(CallFailure::TooLarge(length.into()));
            }
            self.length = Some(length as usize);
        }
        match self.length {
            Some(length) if self.bytes.len() > length => Err(CallFailure::Streaming),
            _ => Ok(()),
        }
    }

    fn is_complete(&self) -> bool {
        self.length == Some(self.bytes.len())
    }

    fn finish(self) -> Result<Option<Bytes>, CallFailure> {
        match self.length {
            None if self.bytes.is_empty() => Ok(None),
            Some(length) if length == self.bytes.len() => Ok(Some(self.bytes.freeze())),
            _ => Err(CallFailure::Malformed("its message ends too early".to_owned())),
        }
    }
}

fn status(headers: &HeaderMap) -> Result<ServiceStatus, CallFailure> {
    let Some(code) = headers.get(STATUS) else {
        return Err(CallFailure::Malformed("it has no grpc-status".to_owned()));
    };
    let code = code.to_str().ok().filter(|text| is_plain(text));
    let code = code.and_then(|text| text.parse::<u8>().ok());
    let message = headers.get(MESSAGE).map_or(&b""[..], HeaderValue::as_bytes);
    let mut trailers = Vec::new();
    let mut bytes = 0;
    for (name, value) in headers {
        let ours = matches!(name.as_str(), STATUS | MESSAGE | "content-type" | "date" | "server");
        let Ok(value) = value.to_str() else { continue };
        bytes += name.as_str().len() + value.len();
        if ours || trailers.len() == TRAILERS_MAX || bytes > TRAILER_BYTES_MAX {
            continue;
        }
        trailers.push((name.to_string(), value.to_owned()));
    }
    Ok(ServiceStatus {
        code: code.filter(|code| *code <= CODE_MAX).unwrap_or(UNKNOWN),
        message: decoded(message),
        trailers,
    })
}

/// Digits alone, as a status code is written.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|c| c.is_ascii_digit()) && (text.len() == 1 || !text.starts_with('0'))
}

/// A status message is percent-encoded UTF-8; what isn't is taken as it is.
fn decoded(message: &[u8]) -> String {
    let mut bytes = Vec::with_capacity(message.len());
    let mut rest = message;
    while let Some((first, after)) = rest.split_first() {
        let hex = |at: usize| after.get(at).and_then(|c| char::from(*c).to_digit(16));
        match (first, hex(0), hex(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((high << 4 | low) as u8);
                rest = &after[2..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes.truncate(MESSAGE_MAX);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What became of a call whose exchange failed.
fn failure(error: &h2::Error) -> CallFailure {
    let why = error.to_string();
    // RFC 9113, 8.7 and 6.8: it has done nothing with the call, and says so; the second is
    // how a server closes a connection in good order.
    let refused = error.reason() == Some(Reason::REFUSED_STREAM);
    let closed = error.is_go_away() && error.is_remote();
    let closed_well = closed && error.reason() == Some(Reason::NO_ERROR);
    let sent = !refused && !closed_well;
    match error.is_reset() && sent {
        true => CallFailure::Reset(why),
        false => CallFailure::Lost { why, sent },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_have_eight_digits_at_most() {
        for (timeout, text) in [
            (Duration::from_millis(1500), "1500000u"),
            (Duration::from_secs(99), "99000000u"),
            (Duration::from_secs(100), "100000m"),
            (Duration::from_secs(1_000_000), "1000000S"),
            (Duration::MAX, "99999999S"),
            (Duration::ZERO, "0u"),
        ] {
            assert_eq!(grpc_timeout(timeout), text);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_is_told_what_is_left_when_it_is_called() {
        let mut call = Unary {
            service: "a.B".into(),
            method: "C".into(),
            message: Bytes::new(),
            metadata: HeaderMap::new(),
            end_by: Some(Instant::now() + Duration::from_secs(3)),
            limit: 0,
        };
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(head(&call).unwrap().headers()["grpc-timeout"], "1000000u");
        call.end_by = None;
        assert!(!head(&call).unwrap().headers().contains_key("grpc-timeout"));
    }

    fn whole(pieces: &[&[u8]], limit: u64) -> Result<Option<Bytes>, CallFailure> {
        let mut message = Incomplete::new(limit);
        for piece in pieces {
            message.take(Bytes::copy_from_slice(piece))?;
        }
        message.finish()
    }

    #[test]
    fn messages_come_in_any_pieces_and_no_larger_than_they_may() {
        assert_eq!(whole(&[b"\0\0", b"\0\0\x03a", b"bc"], 3), Ok(Some("abc".into())));
        assert_eq!(whole(&[b"\0\0\0\0\0"], 0), Ok(Some("".into())));
        assert_eq!(whole(&[], 3), Ok(None));
        assert_eq!(whole(&[b"\0\0\0\0\x03abc"], 2), Err(CallFailure::TooLarge(3)));
        assert_eq!(whole(&[b"\0\xff\xff\xff\xff"], 9), Err(CallFailure::TooLarge(u32::MAX.into())));
        let two = whole(&[b"\0\0\0\0\x01a\0\0\0\0\0"], 9);
        assert_eq!(two, Err(CallFailure::Streaming));
        for short in [&b"\0\0\0"[..], b"\0\0\0\0\x02a", b"\x01\0\0\0\x01a"] {
            assert!(matches!(whole(&[short], 9), Err(CallFailure::Malformed(_))), "{short:?}");
        }
    }

    fn trailers(entries: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in entries {
            map.append(*name, HeaderValue::from_str(value).unwrap());
        }
        map
    }

    #[test]
    fn a_status_is_what_its_trailers_say_within_reason() {
        let found = status(&trailers(&[
            (STATUS, "5"),
            (MESSAGE, "no %C3%A4 %zz %"),
            ("x-cause", "a"),
            ("grpc-status-details-bin", "!!"),
        ]));
        let trailer = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            found,
            Ok(ServiceStatus {
                code: 5,
                message: "no ä %zz %".to_owned(),
                trailers: vec![trailer("x-cause", "a"), trailer("grpc-status-details-bin", "!!")],
            })
        );
        for lie in ["999", "-1", "17", "text", "", "007", "+0"] {
            assert_eq!(status(&trailers(&[(STATUS, lie)])).unwrap().code, UNKNOWN, "{lie}");
        }
        assert!(status(&trailers(&[("x", "y")])).is_err());
        let many: Vec<_> = (0..1000).map(|_| ("x", "y")).chain([(STATUS, "0")]).collect();
        assert_eq!(status(&trailers(&many)).unwrap().trailers.len(), TRAILERS_MAX);
        let large = "y".repeat(TRAILER_BYTES_MAX);
        assert!(status(&trailers(&[(STATUS, "0"), ("x", &large)])).unwrap().trailers.is_empty());
        let long = status(&trailers(&[(STATUS, "2"), (MESSAGE, &"y".repeat(9000))])).unwrap();
        assert_eq!(long.message.len(), MESSAGE_MAX);
    }
}
