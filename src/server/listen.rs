//! Listening sockets of both kinds, and what comes in on them, bounded.

use std::{
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
    time::{Sleep, sleep},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::config::ListenAddress;

/// How long a new connection may take to send HTTP/2's preface. From there on
/// keepalive pings find the dead ones.
const PREFACE_WAIT: Duration = Duration::from_secs(10);

/// Bytes of the preface.
const PREFACE: usize = 24;

/// How long accepting rests when the process is out of descriptors or memory.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// A socket that listens.
#[derive(Debug)]
pub enum Listener {
    /// For anyone who can reach the address.
    Tcp(TcpListener),
    /// For anyone who may open the path.
    Unix(UnixListener),
}

impl Listener {
    /// Takes up a bound and listening socket.
    ///
    /// # Errors
    /// Those of fcntl(2), and of registering the socket with the runtime.
    pub fn from_fd(socket: OwnedFd, address: &ListenAddress) -> io::Result<Self> {
        match address {
            ListenAddress::Tcp { .. } => {
                let listener = std::net::TcpListener::from(socket);
                listener.set_nonblocking(true)?;
                Ok(Self::Tcp(TcpListener::from_std(listener)?))
            }
            ListenAddress::Unix(_) => {
                let listener = std::os::unix::net::UnixListener::from(socket);
                listener.set_nonblocking(true)?;
                Ok(Self::Unix(UnixListener::from_std(listener)?))
            }
        }
    }

    async fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Tcp(listener) => {
                let (socket, _) = listener.accept().await?;
                // Replies are one write; waiting to fill a segment only delays them.
                socket.set_nodelay(true)?;
                Ok(Socket::Tcp(socket))
            }
            Self::Unix(listener) => Ok(Socket::Unix(listener.accept().await?.0)),
        }
    }
}

/// Connections of several listeners, at most `most` of them at once. More are
/// closed at once: a refusal that can be seen, rather than a silent wait.
pub struct Incoming {
    stream: ReceiverStream<io::Result<Connection>>,
    /// Accepting ends when this is dropped.
    _accepting: JoinSet<()>,
}

impl Incoming {
    /// Begins to accept.
    #[must_use]
    pub fn new(listeners: Vec<Listener>, most: usize) -> Self {
        let places = Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS)));
        let (sender, receiver) = mpsc::channel(16);
        let mut accepting = JoinSet::new();
        for listener in listeners {
            accepting.spawn(accept(listener, Arc::clone(&places), sender.clone()));
        }
        Self { stream: ReceiverStream::new(receiver), _accepting: accepting }
    }
}

impl tokio_stream::Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.stream).poll_next(context)
    }
}

async fn accept(
    listener: Listener,
    places: Arc<Semaphore>,
    sender: mpsc::Sender<io::Result<Connection>>,
) {
    loop {
        match listener.accept().await {
            Ok(socket) => {
                let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                    debug!("a connection too many was closed");
                    continue;
                };
                if sender.send(Ok(Connection::new(socket, place))).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_REST).await;
            }
        }
    }
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// An address.
    Tcp(Option<SocketAddr>),
    /// A local user, by number.
    Unix(Option<u32>),
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(Some(address)) => write!(f, "{address}"),
            Self::Unix(Some(uid)) => write!(f, "uid:{uid}"),
            Self::Tcp(None) | Self::Unix(None) => f.write_str("unknown"),
        }
    }
}

/// One connection; holds its place among those allowed.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    /// Until the preface is there: how much of it is, and until when to wait.
    preface: Option<(usize, Pin<Box<Sleep>>)>,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    fn new(socket: Socket, place: OwnedSemaphorePermit) -> Self {
        let preface = Some((0, Box::pin(sleep(PREFACE_WAIT))));
        Self { socket, preface, _place: place }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        match &self.socket {
            Socket::Tcp(socket) => Peer::Tcp(socket.peer_addr().ok()),
            Socket::Unix(socket) => Peer::Unix(socket.peer_cred().ok().map(|cred| cred.uid())),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let polled = match &mut this.socket {
            Socket::Tcp(socket) => Pin::new(socket).poll_read(context, buffer),
            Socket::Unix(socket) => Pin::new(socket).poll_read(context, buffer),
        };
        if let Some((seen, patience)) = &mut this.preface {
            *seen += buffer.filled().len() - before;
            if *seen >= PREFACE {
                this.preface = None;
            } else if polled.is_pending() && patience.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        polled
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.socket {
            Socket::Tcp(socket) => Pin::new(socket).poll_write(context, bytes),
            Socket::Unix(socket) => Pin::new(socket).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.socket {
            Socket::Tcp(socket) => Pin::new(socket).poll_write_vectored(context, slices),
            Socket::Unix(socket) => Pin::new(socket).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.socket {
            Socket::Tcp(socket) => Pin::new(socket).poll_flush(context),
            Socket::Unix(socket) => Pin::new(socket).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.socket {
            Socket::Tcp(socket) => Pin::new(socket).poll_shutdown(context),
            Socket::Unix(socket) => Pin::new(socket).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_stream::StreamExt as _;

    async fn listening(most: usize) -> (Incoming, SocketAddr, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let unix = std::os::unix::net::UnixListener::bind(directory.path().join("socket")).unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        let any = ListenAddress::Tcp { host: String::new(), port: 0 };
        let path = ListenAddress::Unix("/socket".into());
        let listeners = vec![
            Listener::from_fd(tcp.into(), &any).unwrap(),
            Listener::from_fd(unix.into(), &path).unwrap(),
        ];
        (Incoming::new(listeners, most), address, directory)
    }

    #[tokio::test]
    async fn both_kinds_come_in_and_the_bound_is_over_both() {
        let (mut incoming, address, directory) = listening(2).await;
        let path = directory.path().join("socket");
        let _tcp_client = TcpStream::connect(address).await.unwrap();
        let tcp = incoming.next().await.unwrap().unwrap();
        assert!(matches!(tcp.connect_info(), Peer::Tcp(Some(_))));
        let _unix_client = UnixStream::connect(&path).await.unwrap();
        let unix = incoming.next().await.unwrap().unwrap();
        assert!(matches!(unix.connect_info(), Peer::Unix(Some(_))));

        let mut refused = TcpStream::connect(address).await.unwrap();
        assert_eq!(refused.read(&mut [0; 1]).await.unwrap_or(0), 0, "closed at once");
        drop(tcp);
        let _next = UnixStream::connect(&path).await.unwrap();
        assert!(incoming.next().await.unwrap().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_loses_the_connection() {
        let (client, server) = UnixStream::pair().unwrap();
        let place = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let mut connection = Connection::new(Socket::Unix(server), place);
        let mut client = client;
        client.write_all(b"PRI * HTTP").await.unwrap();
        let mut buffer = [0; 64];
        assert_eq!(connection.read(&mut buffer).await.unwrap(), 10);
        let error = connection.read(&mut buffer).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn after_the_preface_there_is_no_hurry() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let place = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let mut connection = Connection::new(Socket::Unix(server), place);
        client.write_all(&[b'x'; PREFACE]).await.unwrap();
        let mut buffer = [0; 64];
        assert_eq!(connection.read(&mut buffer).await.unwrap(), PREFACE);
        let later = tokio::time::timeout(PREFACE_WAIT * 10, connection.read(&mut buffer));
        assert!(later.await.is_err(), "it still waits");
    }
}
