//! The server, as `dispatch-docker` hears it and tells it things.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use rustix::io::Errno;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tracing::{error, warn};

use crate::{
    jail::message::{FromLauncher, FromServer, MESSAGE_MAX, ServiceSocket},
    names::RunId,
    packets::Packets,
};

/// Answers that may wait for a server that doesn't read.
const OUTBOX_MAX: usize = 65_536;

/// Connections among them: each takes a descriptor of this process's.
const CONNECTIONS_MAX: usize = 64;

/// One answer on its way.
#[derive(Debug)]
struct Answer {
    bytes: Vec<u8>,
    connection: Option<(OwnedFd, OwnedSemaphorePermit)>,
}

/// One server.
#[derive(Debug)]
pub struct Server {
    socket: Packets,
    outbox: mpsc::Sender<Answer>,
    connections: Arc<Semaphore>,
}

impl Server {
    /// Takes up a socketpair with it.
    ///
    /// # Errors
    /// Those of [`Packets::new`].
    pub fn open(socket: OwnedFd) -> io::Result<Arc<Self>> {
        let (outbox, mut waiting) = mpsc::channel::<Answer>(OUTBOX_MAX);
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let server = Arc::new(Self { socket: Packets::new(socket)?, outbox, connections });
        let sender = Arc::downgrade(&server);
        tokio::spawn(async move {
            while let Some(Answer { bytes, connection }) = waiting.recv().await {
                let Some(server) = sender.upgrade() else { break };
                let carried: Vec<_> = connection.iter().map(|(fd, _)| fd.as_fd()).collect();
                if server.socket.send(&bytes, &carried).await.is_err() {
                    // Gone, or to be told nothing: it has to see that.
                    server.hang_up();
                    break;
                }
            }
        });
        Ok(server)
    }

    /// Tells it something, in order, and waits for nothing: clocks must not stand still
    /// for a server that doesn't read. Such a one is hung up on.
    pub fn tell(&self, message: &FromLauncher) {
        self.answer(message, None);
    }

    /// Tells it how connecting went, and gives it the connection. EAGAIN where too many
    /// wait for it already.
    pub fn tell_connected(&self, run: RunId, to: ServiceSocket, connected: Result<OwnedFd, Errno>) {
        let carried = connected.and_then(|connection| {
            let permit = Arc::clone(&self.connections).try_acquire_owned();
            permit.map(|permit| (connection, permit)).map_err(|_| Errno::AGAIN)
        });
        let (result, connection) = match carried {
            Ok(carried) => (Ok(()), Some(carried)),
            Err(error) => (Err(error.raw_os_error()), None),
        };
        self.answer(&FromLauncher::Connected { run, to, result }, connection);
    }

    fn answer(&self, message: &FromLauncher, connection: Option<(OwnedFd, OwnedSemaphorePermit)>) {
        let bytes = match postcard::to_stdvec(message) {
            Ok(bytes) => bytes,
            Err(error) => return error!(%error, "an answer can't be encoded"),
        };
        let answer = Answer { bytes, connection };
        if let Err(mpsc::error::TrySendError::Full(_)) = self.outbox.try_send(answer) {
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::sys;

    async fn next(other: &Packets) -> (FromLauncher, usize) {
        let mut buffer = vec![0; MESSAGE_MAX];
        let received = tokio::time::timeout(Duration::from_secs(20), other.receive(&mut buffer));
        let (length, descriptors) = received.await.unwrap().unwrap().unwrap();
        (postcard::from_bytes(&buffer[..length]).unwrap(), descriptors.len())
    }

    fn connection() -> OwnedFd {
        sys::seqpacket_pair().unwrap().0
    }

    #[tokio::test]
    async fn connections_come_with_their_answers_in_order() {
        let (ours, theirs) = sys::seqpacket_pair().unwrap();
        let (server, other) = (Server::open(ours).unwrap(), Packets::new(theirs).unwrap());
        let run = RunId::random().unwrap();
        let to = ServiceSocket::Own;
        let (at, setup) = (SystemTime::UNIX_EPOCH, Duration::ZERO);
        server.tell(&FromLauncher::Started { run, at, setup });
        server.tell_connected(run, to, Ok(connection()));
        server.tell_connected(run, to, Err(Errno::CONNREFUSED));
        server.tell(&FromLauncher::Seen { run, sight: None });
        assert_eq!(next(&other).await, (FromLauncher::Started { run, at, setup }, 0));
        assert_eq!(next(&other).await, (FromLauncher::Connected { run, to, result: Ok(()) }, 1));
        let result = Err(libc::ECONNREFUSED);
        assert_eq!(next(&other).await, (FromLauncher::Connected { run, to, result }, 0));
        assert_eq!(next(&other).await, (FromLauncher::Seen { run, sight: None }, 0));
    }

    #[tokio::test]
    async fn only_so_many_wait_for_a_server_that_does_not_read() {
        let (ours, theirs) = sys::seqpacket_pair().unwrap();
        let (server, other) = (Server::open(ours).unwrap(), Packets::new(theirs).unwrap());
        let (run, to) = (RunId::random().unwrap(), ServiceSocket::Inherited);
        let all = 2 * CONNECTIONS_MAX;
        // Nobody sends any of them meanwhile: this is the only thread.
        for _ in 0..all {
            server.tell_connected(run, to, Ok(connection()));
        }
        let mut carried = 0;
        for _ in 0..all {
            let (answer, descriptors) = next(&other).await;
            let result = if descriptors == 1 { Ok(()) } else { Err(libc::EAGAIN) };
            assert_eq!(answer, FromLauncher::Connected { run, to, result });
            carried += descriptors;
        }
        assert_eq!(carried, CONNECTIONS_MAX);
        server.tell_connected(run, to, Ok(connection()));
        assert_eq!(next(&other).await.1, 1, "there is room again");
    }
}
