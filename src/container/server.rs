//! The server, as `dispatch-docker` hears it and tells it things.

use std::{io, os::fd::OwnedFd, sync::Arc};

use tokio::sync::mpsc;
use tracing::{error, warn};

use crate::{
    jail::message::{FromLauncher, FromServer, MESSAGE_MAX},
    packets::Packets,
};

/// Answers that may wait for a server that doesn't read.
const OUTBOX_MAX: usize = 65_536;

/// One server.
#[derive(Debug)]
pub struct Server {
    socket: Packets,
    outbox: mpsc::Sender<Vec<u8>>,
}

impl Server {
    /// Takes up a socketpair with it.
    ///
    /// # Errors
    /// Those of [`Packets::new`].
    pub fn open(socket: OwnedFd) -> io::Result<Arc<Self>> {
        let (outbox, mut waiting) = mpsc::channel::<Vec<u8>>(OUTBOX_MAX);
        let server = Arc::new(Self { socket: Packets::new(socket)?, outbox });
        let sender = Arc::downgrade(&server);
        tokio::spawn(async move {
            while let Some(bytes) = waiting.recv().await {
                let Some(server) = sender.upgrade() else { break };
                if server.socket.send(&bytes, &[]).await.is_err() {
                    break; // whoever listens to it sees the same
                }
            }
        });
        Ok(server)
    }

    /// Tells it something, in order, and waits for nothing: clocks must not stand still
    /// for a server that doesn't read. Such a one is hung up on.
    pub fn tell(&self, message: &FromLauncher) {
        let bytes = match postcard::to_stdvec(message) {
            Ok(bytes) => bytes,
            Err(error) => return error!(%error, "an answer can't be encoded"),
        };
        if let Err(mpsc::error::TrySendError::Full(_)) = self.outbox.try_send(bytes) {
            warn!("the server takes no answers");
            self.hang_up();
        }
    }

    /// What it says next, with its descriptors: `None` in their place where some were
    /// lost. Nothing at its end.
    ///
    /// # Errors
    /// Those of recvmsg(2), and for what can't be read.
    pub async fn hear(
        &self,
        buffer: &mut Vec<u8>,
    ) -> io::Result<Option<(FromServer, Option<Vec<OwnedFd>>)>> {
        buffer.resize(MESSAGE_MAX, 0);
        let Some(packet) = self.socket.receive_bytes(buffer).await? else { return Ok(None) };
        let message = postcard::from_bytes(&buffer[..packet.length]).map_err(io::Error::other)?;
        Ok(Some((message, packet.descriptors)))
    }

    /// Ends the conversation, on both sides.
    pub fn hang_up(&self) {
        self.socket.hang_up();
    }
}
