//! Reading what a program writes: the beginning of stdout, the end of stderr.

use std::{collections::VecDeque, io};

use bytes::{Bytes, BytesMut};
use tokio::{io::AsyncReadExt as _, net::unix::pipe, sync::Notify};

use super::{Chunk, OutputSink};
use crate::units::Limit;

/// Most bytes of stdout or stderr held for one run where the policy's limit is
/// "unlimited" or higher.
pub(super) const CAPTURE_MAX: u64 = 256 << 20;

/// Bytes asked for with one read(2): a pipe's usual capacity.
const READ_SIZE: usize = 64 << 10;

/// The beginning of stdout, up to a limit.
#[derive(Debug)]
pub(super) struct Head {
    limit: usize,
    kept: BytesMut,
    exceeded: bool,
}

impl Head {
    pub(super) fn new(limit: Limit<u64>) -> Self {
        Self { limit: bounded(limit), kept: BytesMut::new(), exceeded: false }
    }

    /// Reads until the pipe's end, keeping up to the limit and discarding the
    /// rest; `over` is told when there is more. Cancel-safe: what was kept stays.
    pub(super) async fn read(
        &mut self,
        mut pipe: pipe::Receiver,
        over: &Notify,
        sink: Option<&OutputSink>,
    ) -> io::Result<()> {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(READ_SIZE);
            if pipe.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
            let room = self.limit - self.kept.len();
            if buffer.len() > room && !self.exceeded {
                self.exceeded = true;
                over.notify_one();
            }
            buffer.truncate(room);
            self.kept.extend_from_slice(&buffer);
            if let Some(sink) = sink.filter(|_| !buffer.is_empty()) {
                // Nobody listening any more is no reason to end the run.
                let _ = sink.send(Chunk::Stdout(buffer.split().freeze())).await;
            }
            buffer.clear();
        }
    }

    /// What was kept, and whether there was more.
    pub(super) fn finish(self) -> (Bytes, bool) {
        (self.kept.freeze(), self.exceeded)
    }
}

/// The end of stderr, up to a limit.
#[derive(Debug)]
pub(super) struct Tail {
    limit: usize,
    kept: VecDeque<u8>,
    dropped: bool,
}

impl Tail {
    pub(super) fn new(limit: Limit<u64>) -> Self {
        Self { limit: bounded(limit), kept: VecDeque::new(), dropped: false }
    }

    /// Reads until the pipe's end. Cancel-safe: what was kept stays.
    pub(super) async fn read(
        &mut self,
        mut pipe: pipe::Receiver,
        sink: Option<&OutputSink>,
    ) -> io::Result<()> {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(READ_SIZE);
            if pipe.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
            self.keep(&buffer);
            if let Some(sink) = sink {
                let _ = sink.send(Chunk::Stderr(buffer.split().freeze())).await;
            }
            buffer.clear();
        }
    }

    pub(super) fn keep(&mut self, bytes: &[u8]) {
        let newest = &bytes[bytes.len().saturating_sub(self.limit)..];
        let excess = (self.kept.len() + newest.len()).saturating_sub(self.limit);
        self.dropped |= excess > 0 || newest.len() < bytes.len();
        self.kept.drain(..excess);
        self.kept.extend(newest);
    }

    /// The newest bytes that were kept, so many at most.
    pub(super) fn newest(&self, count: usize) -> Bytes {
        let skipped = self.kept.len().saturating_sub(count);
        self.kept.iter().skip(skipped).copied().collect()
    }

    /// What was kept, and whether there was more before it.
    pub(super) fn finish(self) -> (Bytes, bool) {
        (Vec::from(self.kept).into(), self.dropped)
    }
}

fn bounded(limit: Limit<u64>) -> usize {
    let bytes = limit.finite().unwrap_or(CAPTURE_MAX).min(CAPTURE_MAX);
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    async fn head_of(limit: u64, content: &[u8]) -> (Bytes, bool, bool) {
        let (mut sender, receiver) = pipe::pipe().unwrap();
        let mut head = Head::new(Limit::At(limit));
        let over = Notify::new();
        let write = async {
            sender.write_all(content).await.unwrap();
            drop(sender);
        };
        let (_, read) = tokio::join!(write, head.read(receiver, &over, None));
        read.unwrap();
        let told = tokio::time::timeout(std::time::Duration::ZERO, over.notified()).await.is_ok();
        let (kept, truncated) = head.finish();
        (kept, truncated, told)
    }

    #[tokio::test]
    async fn the_head_keeps_exactly_the_limit() {
        assert_eq!(head_of(5, b"12345").await, ("12345".into(), false, false));
        assert_eq!(head_of(5, b"123456").await, ("12345".into(), true, true));
        assert_eq!(head_of(0, b"").await, ("".into(), false, false));
        assert_eq!(head_of(0, b"x").await, ("".into(), true, true));
        let flood = vec![b'x'; 1 << 20];
        assert_eq!(head_of(70_000, &flood).await, (flood[..70_000].to_vec().into(), true, true));
    }

    #[test]
    fn the_tail_keeps_the_newest() {
        let mut tail = Tail::new(Limit::At(4));
        tail.keep(b"ab");
        tail.keep(b"cd");
        assert!(!tail.dropped);
        tail.keep(b"e");
        assert_eq!(tail.finish(), ("bcde".into(), true));

        let mut tail = Tail::new(Limit::At(3));
        tail.keep(b"a long line");
        assert_eq!(tail.finish(), ("ine".into(), true));

        let mut nothing = Tail::new(Limit::At(0));
        nothing.keep(b"x");
        assert_eq!(nothing.finish(), ("".into(), true));
    }

    #[tokio::test]
    async fn chunks_reach_the_sink_up_to_the_limit() {
        let (mut sender, receiver) = pipe::pipe().unwrap();
        sender.write_all(b"hello").await.unwrap();
        drop(sender);
        let (sink, mut chunks) = tokio::sync::mpsc::channel(8);
        let mut head = Head::new(Limit::At(4));
        head.read(receiver, &Notify::new(), Some(&sink)).await.unwrap();
        assert_eq!(chunks.recv().await, Some(Chunk::Stdout("hell".into())));
        assert_eq!(head.finish(), ("hell".into(), true));
    }
}
