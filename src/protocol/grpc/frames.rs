//! What a server may send, frame by frame.
//!
//! HTTP/2 itself holds up messages, and nothing else: a server may send headers, PINGs and
//! the like for ever, and each costs us more to take apart than it costs it to send. So each
//! frame is charged before anybody looks into it, and who has spent what calls are worth is
//! hung up on.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// A frame's header, RFC 9113, 4.1: length, type, flags, stream.
pub(super) const FRAME_HEADER: usize = 9;
pub(super) const SETTINGS: u8 = 4;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PUSH_PROMISE: u8 = 5;
const CONTINUATION: u8 = 9;

/// What a connection has to begin with, and gets with each call, besides the answer's bytes:
/// headers and trailers of 16 KiB, or some thousand small frames.
const BEGINNING: u64 = 1 << 20;
const CALL: u64 = 256 << 10;
/// A call's worth that may be unspent.
const CALLS_MAX: u64 = 16;

/// What each frame costs besides its bytes.
const FRAME: u64 = 256;
/// How many times its bytes one of headers costs: a byte may stand for a whole field (RFC 7541, 6.1).
const FIELDS: u64 = 16;
/// Of a message to a server, so many bytes may come back as one small frame: it tells as it
/// takes them (WINDOW_UPDATE).
const UPDATE: u64 = 4 << 10;

/// What may still be spent on a connection.
#[derive(Debug)]
pub(super) struct Allowance {
    /// On bytes of messages.
    data: AtomicU64,
    /// On all else.
    rest: AtomicU64,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { data: AtomicU64::new(0), rest: AtomicU64::new(BEGINNING) }
    }
}

impl Allowance {
    /// A call is made, with a message of so many bytes, and an answer of so many at most.
    pub(super) fn expect(&self, message: u64, answer: u64) {
        let updates = message / UPDATE * FRAME;
        add(&self.data, answer.saturating_add(CALL), answer.saturating_mul(2 * CALLS_MAX));
        add(&self.rest, CALL + updates, BEGINNING + CALLS_MAX * CALL + updates);
    }
}

/// `most`: beyond it nothing is saved up.
fn add(account: &AtomicU64, more: u64, most: u64) {
    let sum = |left: u64| Some(left.saturating_add(more).min(most.max(left).max(more)));
    // It never fails: there is always a sum.
    let _ = account.fetch_update(Ordering::Relaxed, Ordering::Relaxed, sum);
}

fn spend(account: &AtomicU64, cost: u64) -> bool {
    let left = |left: u64| left.checked_sub(cost);
    account.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left).is_ok()
}

/// The frames of a stream of bytes.
#[derive(Debug)]
pub(super) struct Frames {
    allowance: Arc<Allowance>,
    /// Of the next frame's header, what is there.
    header: Vec<u8>,
    /// Bytes to come of the frame before.
    left: usize,
}

impl Frames {
    pub(super) fn new(allowance: Arc<Allowance>) -> Self {
        Self { allowance, header: Vec::with_capacity(FRAME_HEADER), left: 0 }
    }

    /// Charges what came; false where that is too much.
    pub(super) fn take(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            if self.left > 0 {
                let taken = self.left.min(bytes.len());
                self.left -= taken;
                bytes = &bytes[taken..];
                continue;
            }
            let missing = (FRAME_HEADER - self.header.len()).min(bytes.len());
            self.header.extend_from_slice(&bytes[..missing]);
            bytes = &bytes[missing..];
            if let &[a, b, c, kind, ..] = &self.header[..]
                && self.header.len() == FRAME_HEADER
            {
                self.header.clear();
                self.left = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                if !self.charge(kind, self.left as u64) {
                    return false;
                }
            }
        }
        true
    }

    fn charge(&self, kind: u8, length: u64) -> bool {
        let Allowance { data, rest } = &*self.allowance;
        match kind {
            // One without bytes is a small frame like others.
            DATA if length > 0 => spend(data, length) && spend(rest, FRAME / 16),
            HEADERS | CONTINUATION | PUSH_PROMISE => spend(rest, FRAME + length * FIELDS),
            _ => spend(rest, FRAME + length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, length: usize) -> Vec<u8> {
        let size = (length as u32).to_be_bytes();
        let mut bytes = vec![size[1], size[2], size[3], kind, 0, 0, 0, 0, 1];
        bytes.resize(FRAME_HEADER + length, 0);
        bytes
    }

    /// How many such frames are taken, after so many calls of an answer of a MiB.
    fn taken(kind: u8, length: usize, calls: usize) -> usize {
        let allowance = Arc::new(Allowance::default());
        (0..calls).for_each(|_| allowance.expect(0, 1 << 20));
        let mut frames = Frames::new(allowance);
        let one = frame(kind, length);
        (0..1 << 20).take_while(|_| frames.take(&one)).count()
    }

    #[test]
    fn each_kind_is_taken_as_often_as_it_may_be() {
        // A call's headers and trailers, large ones too, and its message.
        assert!(taken(HEADERS, 8 << 10, 1) >= 2);
        assert!((64..=80).contains(&taken(DATA, 16 << 10, 1)));
        // Floods: of one-byte fields, of pings, of nothing.
        assert!(taken(HEADERS, 250, 1) < 400);
        assert!(taken(6, 8, 1) < 8_000);
        assert!(taken(DATA, 0, 1) < 8_000);
        assert!(taken(DATA, 1, 1) < 100_000);
        // Nothing is saved up without end.
        assert!(taken(HEADERS, 250, 10_000) < 2_000);
    }

    #[test]
    fn frames_may_come_in_any_pieces() {
        let allowance = Arc::new(Allowance::default());
        let mut frames = Frames::new(Arc::clone(&allowance));
        let all = [frame(SETTINGS, 12), frame(HEADERS, 30), frame(6, 8)].concat();
        for byte in &all {
            assert!(frames.take(std::slice::from_ref(byte)));
        }
        let spent = BEGINNING - allowance.rest.load(Ordering::Relaxed);
        assert_eq!(spent, 3 * FRAME + 12 + 30 * FIELDS + 8);
    }
}
