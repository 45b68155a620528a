//! Listening sockets of both kinds, and what comes in on them, bounded.

use std::{
    io,
    os::fd::OwnedFd,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::mpsc,
    task::JoinSet,
    time::{Sleep, sleep},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use super::connections::{Caller, Connections, Peer, Place, SWEEP_INTERVAL};
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

/// Connections of several listeners, as many as have a place. More are closed
/// at once: a refusal that can be seen, rather than a silent wait.
pub struct Incoming {
    stream: ReceiverStream<io::Result<Connection>>,
    /// Accepting ends when this is dropped.
    _accepting: JoinSet<()>,
}

impl Incoming {
    /// Begins to accept.
    #[must_use]
    pub fn new(listeners: Vec<Listener>, connections: &Connections) -> Self {
        let (sender, receiver) = mpsc::channel(16);
        let mut accepting = JoinSet::new();
        for listener in listeners {
            accepting.spawn(accept(listener, connections.clone(), sender.clone()));
        }
        accepting.spawn(sweep(connections.clone()));
        Self { stream: ReceiverStream::new(receiver), _accepting: accepting }
    }
}

impl tokio_stream::Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.stream).poll_next(context)
    }
}

async fn sweep(connections: Connections) {
    loop {
        sleep(SWEEP_INTERVAL).await;
        connections.close_stalled();
    }
}

async fn accept(
    listener: Listener,
    connections: Connections,
    sender: mpsc::Sender<io::Result<Connection>>,
) {
    loop {
        match listener.accept().await {
            Ok(socket) => {
                let Some(place) = connections.admit(socket.peer()) else {
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

impl Socket {
    fn peer(&self) -> Peer {
        match self {
            Self::Tcp(socket) => Peer::Tcp(socket.peer_addr().ok()),
            Self::Unix(socket) => Peer::Unix(socket.peer_cred().ok().map(|cred| cred.uid())),
        }
    }
}

/// One connection; holds its place among those allowed.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    /// Until the preface is there: how much of it is, and until when to wait.
    preface: Option<(usize, Pin<Box<Sleep>>)>,
    place: Place,
    /// Its place went to another.
    displaced: bool,
}

impl Connection {
    fn new(socket: Socket, place: Place) -> Self {
        let preface = Some((0, Box::pin(sleep(PREFACE_WAIT))));
        Self { socket, preface, place, displaced: false }
    }

    /// Whether the connection is to end; wakes the reader when it is.
    fn poll_displaced(&mut self, context: &mut Context<'_>) -> bool {
        self.displaced =
            self.displaced || Pin::new(&mut self.place.closing).poll(context).is_ready();
        self.displaced
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.place.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.poll_displaced(context) {
            return Poll::Ready(Ok(()));
        }
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
        if self.displaced {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
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
        if self.displaced {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
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
    use std::net::SocketAddr;
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
        (Incoming::new(listeners, &Connections::new(most)), address, directory)
    }

    #[tokio::test]
    async fn both_kinds_come_in_and_the_bound_is_over_both() {
        let (mut incoming, address, directory) = listening(2).await;
        let path = directory.path().join("socket");
        let _tcp_client = TcpStream::connect(address).await.unwrap();
        let tcp = incoming.next().await.unwrap().unwrap();
        assert!(matches!(tcp.connect_info().peer, Peer::Tcp(Some(_))));
        let _unix_client = UnixStream::connect(&path).await.unwrap();
        let unix = incoming.next().await.unwrap().unwrap();
        assert!(matches!(unix.connect_info().peer, Peer::Unix(Some(_))));

        let mut refused = TcpStream::connect(address).await.unwrap();
        assert_eq!(refused.read(&mut [0; 1]).await.unwrap_or(0), 0, "closed at once");
        drop(tcp);
        let _next = UnixStream::connect(&path).await.unwrap();
        assert!(incoming.next().await.unwrap().is_ok());
    }

    /// Both ends of a connection among at most one.
    fn connected() -> (UnixStream, Connection, Connections) {
        let (client, server) = UnixStream::pair().unwrap();
        let connections = Connections::new(1);
        let place = connections.admit(Peer::Unix(None)).unwrap();
        (client, Connection::new(Socket::Unix(server), place), connections)
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_loses_the_connection() {
        let (mut client, mut connection, _) = connected();
        client.write_all(b"PRI * HTTP").await.unwrap();
        let mut buffer = [0; 64];
        assert_eq!(connection.read(&mut buffer).await.unwrap(), 10);
        let error = connection.read(&mut buffer).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn after_the_preface_there_is_no_hurry() {
        let (mut client, mut connection, _) = connected();
        client.write_all(&[b'x'; PREFACE]).await.unwrap();
        let mut buffer = [0; 64];
        assert_eq!(connection.read(&mut buffer).await.unwrap(), PREFACE);
        let later = tokio::time::timeout(PREFACE_WAIT * 10, connection.read(&mut buffer));
        assert!(later.await.is_err(), "it still waits");
    }

    #[tokio::test(start_paused = true)]
    async fn who_lost_the_place_reads_the_end_and_writes_no_more() {
        let (_client, mut connection, connections) = connected();
        let waiting = tokio::spawn(async move {
            let read = connection.read(&mut [0; 64]).await.unwrap();
            (read, connection.read(&mut [0; 64]).await.unwrap(), connection.write(b"x").await)
        });
        sleep(Duration::from_secs(2)).await;
        let _newcomer = connections.admit(Peer::Unix(None)).unwrap();
        let (first, second, written) = waiting.await.unwrap();
        assert_eq!((first, second), (0, 0));
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
