//! One HTTP/2 connection with a service, over a socket that is connected already.
//!
//! A connected socket says nothing of a service: the kernel connects to whoever listens,
//! whether or not he ever takes the connection. What tells is the first frame: a server
//! begins with its SETTINGS (RFC 9113, 3.4), and until they have come nothing is sent but
//! the client's own beginning.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::client::{Builder, SendRequest};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    sync::oneshot,
    task::JoinHandle,
};

use super::frames::{Allowance, FRAME_HEADER, Frames, SETTINGS};

/// Bytes under way on one call and on the connection before we take them: large messages
/// come at full speed, and no faster than they are read.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Bytes of a frame that we take: large messages come in few.
const FRAME_MAX: u32 = 256 << 10;

/// Bytes of a reply's headers or trailers.
const HEADERS_MAX: u32 = 16 << 10;

/// Bytes of one message that are taken from it at once, to be sent.
const SEND_BUFFER: usize = 1 << 20;

/// Bytes of SETTINGS that are still believed.
const SETTINGS_MAX: usize = 16 << 10;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It was closed before anything came.
    #[error("it closed the connection without a word")]
    Closed,
    /// What came isn't HTTP/2.
    #[error("it doesn't speak HTTP/2: it began with {0}")]
    Foreign(String),
}

/// An answered connection. Calls on it go on side by side; dropping the last clone closes it.
#[derive(Clone, Debug)]
pub struct Connection {
    pub(super) sender: SendRequest<Bytes>,
    allowance: Arc<Allowance>,
    task: Arc<Task>,
}

#[derive(Debug)]
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Connection {
    /// Begins HTTP/2 on a connected socket and returns once the other side has answered,
    /// however long that takes. Cancel-safe: the socket is closed.
    ///
    /// # Errors
    /// [`OpenError`]
    pub async fn open(socket: UnixStream) -> Result<Self, OpenError> {
        let (greet, greeted) = oneshot::channel();
        let allowance = Arc::new(Allowance::default());
        let socket = Listening {
            socket,
            first: Vec::new(),
            greet: Some(greet),
            frames: Frames::new(Arc::clone(&allowance)),
        };
        let (sender, connection) = Builder::new()
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME_MAX)
            .max_header_list_size(HEADERS_MAX)
            .max_send_buffer_size(SEND_BUFFER)
            .handshake(socket)
            .await
            // It writes only: whatever fails, there is nobody to read.
            .map_err(|_| OpenError::Closed)?;
        let task = tokio::spawn(async move {
            // Whoever has a call on it learns of it there.
            let _ = connection.await;
        });
        let connection = Self { sender, allowance, task: Arc::new(Task(task)) };
        match greeted.await {
            Ok(Greeting::Settings) => Ok(connection),
            Ok(Greeting::Foreign(bytes)) => Err(OpenError::Foreign(shown(&bytes))),
            Ok(Greeting::End) | Err(_) => Err(OpenError::Closed),
        }
    }

    /// A call is made, with a message of so many bytes, and an answer of so many at most.
    pub(super) fn expect(&self, message: u64, answer: u64) {
        self.allowance.expect(message, answer);
    }

    /// Whether this is a clone of `other`.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.task, &other.task)
    }

    /// Whether no call can be made on it any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.task.0.is_finished()
    }
}

/// Bytes as text, for an error.
fn shown(bytes: &[u8]) -> String {
    let text: Vec<u8> = bytes.iter().copied().flat_map(std::ascii::escape_default).collect();
    format!("\"{}\"", String::from_utf8_lossy(&text))
}

/// What a server began with.
#[derive(Debug, PartialEq, Eq)]
enum Greeting {
    Settings,
    Foreign(Vec<u8>),
    End,
}

/// Tells of the first frame's header.
fn greeting(first: &[u8]) -> Option<Greeting> {
    let header: &[u8; FRAME_HEADER] = first.get(..FRAME_HEADER)?.try_into().ok()?;
    let [a, b, c, kind, flags, stream @ ..] = *header;
    let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
    let settings = kind == SETTINGS && flags == 0 && stream == [0; 4];
    let sensible = length % 6 == 0 && length <= SETTINGS_MAX;
    Some(match settings && sensible {
        true => Greeting::Settings,
        false => Greeting::Foreign(first.to_vec()),
    })
}

/// A socket that listens to how the other side begins.
#[derive(Debug)]
struct Listening {
    socket: UnixStream,
    first: Vec<u8>,
    /// Taken once that is known.
    greet: Option<oneshot::Sender<Greeting>>,
    frames: Frames,
}

impl Listening {
    fn hear(&mut self, bytes: &[u8]) {
        if self.greet.is_none() {
            return;
        }
        let greeting = if bytes.is_empty() {
            match self.first.is_empty() {
                true => Some(Greeting::End),
                false => Some(Greeting::Foreign(std::mem::take(&mut self.first))),
            }
        } else {
            let missing = FRAME_HEADER.saturating_sub(self.first.len());
            self.first.extend_from_slice(&bytes[..bytes.len().min(missing)]);
            greeting(&self.first)
        };
        if let Some((greeting, greet)) = greeting.and_then(|it| Some((it, self.greet.take()?))) {
            let _ = greet.send(greeting);
        }
    }
}

impl AsyncRead for Listening {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(context, buffer))?;
        self.hear(&buffer.filled()[before..]);
        let within = self.frames.take(&buffer.filled()[before..]);
        Poll::Ready(if within { Ok(()) } else { Err(io::Error::other("it sends without end")) })
    }
}

impl AsyncWrite for Listening {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[test]
    fn only_settings_are_a_beginning() {
        let settings = [0, 0, 12, 4, 0, 0, 0, 0, 0];
        assert_eq!(greeting(&settings[..8]), None);
        assert_eq!(greeting(&settings), Some(Greeting::Settings));
        for (at, value) in [(2, 13), (0, 255), (3, 0), (4, 1), (8, 1)] {
            let mut other = settings;
            other[at] = value;
            assert_eq!(greeting(&other), Some(Greeting::Foreign(other.to_vec())), "{at}");
        }
    }

    #[tokio::test]
    async fn what_is_no_server_is_told_as_what_it_is() {
        for (begins, told) in [
            (&b"HTTP/1.1 400 Bad Request\r\n"[..], "\"HTTP/1.1 \""),
            (b"\x00\x01", "\"\\x00\\x01\""),
            (b"", "without a word"),
        ] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let says = async {
                theirs.write_all(begins).await.unwrap();
                theirs.shutdown().await.unwrap();
            };
            let (opened, ()) = tokio::join!(Connection::open(ours), says);
            let error = opened.map(drop).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        }
    }

    #[tokio::test]
    async fn who_sends_without_end_is_hung_up_on() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let floods = async {
            theirs.write_all(&[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]).await.unwrap();
            // PING, answered and of no use.
            let ping = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
            let mut sent = 0;
            let mut ignored = [0; 4096];
            loop {
                // Its answers are taken, or it would be held up by them.
                let _ = theirs.try_read(&mut ignored);
                match theirs.write(&ping).await {
                    Ok(length) => sent += length,
                    Err(_) => return sent,
                }
            }
        };
        let (opened, sent) = tokio::join!(Connection::open(ours), floods);
        assert!(opened.unwrap().is_closed());
        assert!(sent < 4 << 20, "{sent}");
    }

    #[tokio::test]
    async fn who_says_nothing_is_waited_for() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let opened = tokio::time::timeout(Duration::from_millis(50), Connection::open(ours));
        assert!(opened.await.is_err());
    }
}
