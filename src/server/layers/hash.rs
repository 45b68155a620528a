//! Hashes an executable while it arrives: a large one takes as long to hash as to
//! receive, and the processor that receives it has time to spare.

use std::ops::Range;

use sha2::{Digest as _, Sha256};

use super::scan::key;
use crate::names::Digest;

/// Smaller ones are hashed in no time when they are there.
const LARGE: usize = 1 << 20;

/// Follows a serialized ServeRequest as it grows.
#[derive(Clone, Debug, Default)]
pub(super) struct Hashing {
    /// Where the next field begins that wasn't looked at.
    next: usize,
    /// The bytes of the first large executable, which may not all be there.
    binary: Option<Range<usize>>,
    hash: Sha256,
    /// How far it was hashed.
    done: usize,
}

impl Hashing {
    /// Looks at the message, of which there is more than last time.
    pub(super) fn follow(&mut self, message: &[u8]) {
        if self.binary.is_none() {
            self.find(message);
        }
        if let Some(binary) = &self.binary {
            let end = binary.end.min(message.len());
            self.hash.update(&message[self.done..end]);
            self.done = end;
        }
    }

    fn find(&mut self, message: &[u8]) {
        while let Some(rest) = message.get(self.next..)
            && let Some(key) = key(rest)
        {
            let start = self.next + key.length;
            let Some(end) = start.checked_add(key.content) else { return };
            if key.field == 6 && key.is_bytes && key.content >= LARGE && start <= message.len() {
                self.binary = Some(start..end);
                self.done = start;
                return;
            }
            if end > message.len() {
                return;
            }
            self.next = end;
        }
    }

    /// The digest of these bytes of the message, if it is they that were hashed.
    pub(super) fn digest_of(self, binary: &Range<usize>) -> Option<Digest> {
        let is_whole = self.binary.as_ref() == Some(binary) && self.done == binary.end;
        is_whole.then(|| Digest::from_bytes(self.hash.finalize().into()))
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::wire::{ServeRequest, serve_request::ServiceDef};

    fn message(size: usize) -> Vec<u8> {
        let binary: Vec<u8> = (0..size).map(|index| (index % 251) as u8).collect();
        ServeRequest {
            namespace: "some-namespace".into(),
            method_name: "method".into(),
            service_def: Some(ServiceDef::ServiceBinary(binary.into())),
            ..ServeRequest::default()
        }
        .encode_to_vec()
    }

    fn followed(message: &[u8], step: usize) -> Hashing {
        let mut hashing = Hashing::default();
        for end in (0..message.len()).step_by(step).chain([message.len()]) {
            hashing.follow(&message[..end]);
        }
        hashing
    }

    #[test]
    fn whatever_the_pieces_it_is_the_digest_of_the_executable() {
        let message = message(LARGE + 5);
        let binary = message.len() - LARGE - 5..message.len();
        for step in [7_001, 16 << 10, message.len()] {
            let digest = followed(&message, step).digest_of(&binary);
            assert_eq!(digest, Some(Digest::of(&message[binary.clone()])), "{step}");
        }
    }

    #[test]
    fn of_anything_else_there_is_none() {
        let message = message(LARGE + 5);
        let binary = message.len() - LARGE - 5..message.len();
        let hashing = followed(&message, 4096);
        assert_eq!(hashing.clone().digest_of(&(binary.start + 1..binary.end)), None);
        assert_eq!(hashing.clone().digest_of(&(binary.start..binary.end - 1)), None);
        // Not all of it came.
        let cut = followed(&message[..message.len() - 1], 4096);
        assert_eq!(cut.digest_of(&binary), None);
        assert_eq!(followed(&self::message(10), 1).digest_of(&(0..10)), None);
        // A length beyond all bounds.
        let endless = [0x32, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, 7];
        assert_eq!(followed(&endless, 1).digest_of(&(11..12)), None);
    }
}
