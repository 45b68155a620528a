//! What flows between a program and the server: its output, and its input.

use bollard::container::LogOutput;
use tokio::{io::AsyncWriteExt as _, net::unix::pipe};
use tokio_stream::StreamExt as _;

use super::{
    marks::Marked,
    protocol::{NONCE_LEN, Record},
};

/// Bytes of input that are copied at once.
const PIECE: usize = 64 << 10;

/// Both streams, on their way to the server.
pub struct Output {
    stdout: (Marked, Option<pipe::Sender>),
    stderr: (Marked, Option<pipe::Sender>),
}

impl Output {
    /// Of a program whose init has this nonce, to these pipes.
    #[must_use]
    pub fn new(nonce: [u8; NONCE_LEN], stdout: pipe::Sender, stderr: pipe::Sender) -> Self {
        Self {
            stdout: (Marked::new(nonce), Some(stdout)),
            stderr: (Marked::new(nonce), Some(stderr)),
        }
    }

    /// Passes all on until both have ended with the same record. `None`: without.
    pub async fn read(
        &mut self,
        mut output: impl tokio_stream::Stream<Item = Result<LogOutput, bollard::errors::Error>> + Unpin,
    ) -> Option<Record> {
        while let Some(Ok(piece)) = output.next().await {
            let ((marked, sender), bytes) = match piece {
                LogOutput::StdOut { message } => (&mut self.stdout, message),
                LogOutput::StdErr { message } => (&mut self.stderr, message),
                LogOutput::StdIn { .. } | LogOutput::Console { .. } => continue,
            };
            pass_on(sender, &marked.take(&bytes)).await;
            let (first, second) = (self.stdout.0.record(), self.stderr.0.record());
            if first.is_some() && first == second {
                return first;
            }
        }
        for (marked, sender) in [&mut self.stdout, &mut self.stderr] {
            pass_on(sender, &marked.rest()).await;
        }
        None
    }
}

/// Writes to the server's pipe, which holds the program up while it is full. Nobody
/// there any more: it is discarded.
async fn pass_on(sender: &mut Option<pipe::Sender>, bytes: &[u8]) {
    if let Some(pipe) = sender
        && pipe.write_all(bytes).await.is_err()
    {
        *sender = None;
    }
}

/// Gives the program its input, and then the end of it. A program that reads none of it,
/// or is gone, is no error.
pub async fn feed(
    mut input: std::pin::Pin<Box<dyn tokio::io::AsyncWrite + Send>>,
    source: &std::os::fd::OwnedFd,
) {
    let mut piece = vec![0; PIECE];
    let mut offset = 0;
    loop {
        // A sealed memfd: reading it waits for nothing.
        let length = match rustix::io::pread(source, &mut piece[..], offset) {
            Ok(0) => break,
            Ok(length) => length,
            Err(rustix::io::Errno::INTR) => continue,
            // Half of it must not look like the whole.
            Err(_) => return std::future::pending().await,
        };
        if input.write_all(&piece[..length]).await.is_err() {
            return;
        }
        offset += length as u64;
    }
    // The end of its input; the connection itself stays, for its output.
    let _ = input.shutdown().await;
}
