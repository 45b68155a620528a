//! A connection to the service, which tells how much of an upload has gone.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use indicatif::ProgressBar;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tonic::{
    Request, Response, Status,
    transport::{Channel, Endpoint, Uri},
};

use super::address::socket_path;
use crate::wire::{
    ServeRequest, ServeResponse, collective_dispatcher_client::CollectiveDispatcherClient,
};

const CONNECT_TIME: Duration = Duration::from_secs(10);

/// A client, and the bar that counts what it writes.
pub(super) struct Client {
    inner: CollectiveDispatcherClient<Channel>,
    progress: tokio::sync::watch::Sender<ProgressBar>,
}

impl Client {
    /// Counts what is written from now on.
    pub(super) fn watch(&self, bar: ProgressBar) {
        self.progress.send_replace(bar);
    }

    /// One Serve call.
    pub(super) async fn serve(
        &mut self,
        request: Request<ServeRequest>,
    ) -> Result<Response<ServeResponse>, Status> {
        self.inner.serve(request).await
    }
}

/// Connects to `HOST:PORT` or `unix:PATH`.
pub(super) async fn connect(address: &str) -> Result<Client, String> {
    let (progress, watched) = tokio::sync::watch::channel(ProgressBar::hidden());
    let target = address.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let (target, watched) = (target.clone(), watched.clone());
        async move { open(&target).await.map(|stream| TokioIo::new(Counted { stream, watched })) }
    });
    let channel = Endpoint::from_static("http://dispatcher")
        .connect_timeout(CONNECT_TIME)
        .connect_with_connector(connector)
        .await
        .map_err(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            format!(
                "{address} can't be reached: {}; is the service running? (--address, $DISPATCHER_ADDRESS)",
                cause.unwrap_or_else(|| error.to_string())
            )
        })?;
    let inner = CollectiveDispatcherClient::new(channel)
        .max_decoding_message_size(usize::MAX)
        .max_encoding_message_size(usize::MAX);
    Ok(Client { inner, progress })
}

async fn open(target: &str) -> io::Result<Box<dyn Stream>> {
    match target.strip_prefix("unix:") {
        Some(path) => Ok(Box::new(UnixStream::connect(socket_path(path)).await?)),
        None => {
            let stream = TcpStream::connect(target).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream))
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Tells a progress bar of each write.
struct Counted {
    stream: Box<dyn Stream>,
    watched: tokio::sync::watch::Receiver<ProgressBar>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if let Poll::Ready(Ok(count)) = &written {
            self.watched.borrow().inc(*count as u64);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
